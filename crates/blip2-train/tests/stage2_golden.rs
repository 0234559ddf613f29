//! Stage 2 against an independent PyTorch implementation: the query path in front of a frozen language model, its
//! loss on the answers, the gradient of every trained parameter, and ten optimiser steps (`tools/golden_stage2.py`).
//!
//! The objective is put together here, from the parts of the library: Q-Former, projection, language model and
//! loss. What is checked is that these parts and the gradients through all of them are right.

#[path = "../../blip2/tests/support/golden.rs"]
mod golden;

use std::collections::BTreeMap;

use blip2::config::QFormerConfig;
use blip2::language::LanguageModel;
use blip2::layers::{DropoutRng, Linear, Loader, Precision, Trainable, linear_cross_entropy};
use blip2::qformer::QFormer;
use blip2::weights::safetensors::Safetensors;
use blip2_train::gradients::Gradients;
use blip2_train::optimizer::{Optimizer, OptimizerConfig};
use candle_core::{Device, Tensor, Var};
use golden::{Comparison, Golden};
use serde::Deserialize;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/stage2.safetensors");

struct Stage2 {
    qformer: QFormer,
    language_projection: Linear,
    language_model: LanguageModel,
    variables: BTreeMap<String, Var>,
    image_embeds: Tensor,
    /// Per sample; -1 where a projected query stands.
    ids: Vec<Vec<i64>>,
    /// Per row of all samples, whether the loss counts its token.
    is_target: Vec<bool>,
}

/// The rows of one pass.
struct Pass {
    queries: Tensor,
    soft_tokens: Tensor,
    hidden: Tensor,
    loss: Tensor,
}

fn open() -> (Golden, Stage2) {
    let golden = Golden::parse("stage2", include_bytes!("golden/stage2.safetensors"));
    let config: QFormerConfig = golden.metadata("config");
    let file = Safetensors::open(FILE).expect("a checkpoint");
    let language_config: serde_json::Value = golden.metadata("language_config");
    let language_model =
        LanguageModel::from_safetensors(&language_config, &file, "language_model.", Precision::F32)
            .expect("a language model");
    let trainable = Trainable::default();
    let loader = Loader::trainable(&golden, &trainable, Precision::F32);
    let qformer = QFormer::load(&config, &loader, false).expect("a query path");
    let language_projection = loader
        .linear("language_projection", config.hidden_size, language_model.hidden_size())
        .expect("a projection");
    let stage2 = Stage2 {
        qformer,
        language_projection,
        language_model,
        variables: trainable.into_variables(),
        image_embeds: golden.rows("in.image_embeds"),
        ids: golden.lists("in.ids", "in.lengths"),
        is_target: golden.integers::<u8>("in.is_target").into_iter().map(|t| t == 1).collect(),
    };
    (golden, stage2)
}

impl Stage2 {
    fn forward(&self) -> blip2::Result<Pass> {
        let image = self.qformer.image_keys(&self.image_embeds, self.ids.len())?;
        let (queries, _) = self.qformer.encode_queries(&image, &mut DropoutRng::off())?;
        let soft_tokens = self.language_projection.forward(&queries)?;

        // One table of rows, soft tokens first, and for each place in the texts the row that stands there.
        let packed: Vec<i64> = self.ids.concat();
        let words: Vec<u32> = packed.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        let table = Tensor::cat(&[&soft_tokens, &self.language_model.embed(&words)?], 0)?;
        let (mut soft, mut word) = (0.., soft_tokens.dim(0)? as u32..);
        let rows: Vec<u32> =
            packed.iter().filter_map(|&id| if id < 0 { soft.next() } else { word.next() }).collect();
        let embeds = table.index_select(&index(&rows)?, 0)?;
        let lengths: Vec<usize> = self.ids.iter().map(Vec::len).collect();
        let hidden = self.language_model.forward(&embeds, &lengths)?;

        // The row before a target predicts it; no text starts with one.
        let targets: Vec<u32> = (0..packed.len()).filter(|&i| self.is_target[i]).map(|i| i as u32).collect();
        let before: Vec<u32> = targets.iter().map(|i| i - 1).collect();
        let ids: Vec<u32> = targets.iter().map(|&i| packed[i as usize] as u32).collect();
        let predicting = hidden.index_select(&index(&before)?, 0)?;
        let loss = linear_cross_entropy(&predicting, self.language_model.head(), &ids, 0.0)?.mean_all()?;
        Ok(Pass { queries, soft_tokens, hidden, loss })
    }

    fn gradients(&self) -> (Gradients, f32) {
        let loss = self.forward().expect("a loss").loss;
        let mut gradients = Gradients::default();
        gradients.add(&self.variables, &mut loss.backward().expect("gradients")).expect("f32 gradients");
        (gradients, loss.to_scalar().expect("a number"))
    }
}

fn index(rows: &[u32]) -> candle_core::Result<Tensor> {
    Tensor::from_slice(rows, rows.len(), &Device::Cpu)
}

#[test]
fn rows_and_loss_agree() {
    let (golden, stage2) = open();
    let pass = stage2.forward().expect("rows");
    let mut comparison: Comparison<'_> = golden.comparison();
    let last = stage2.qformer.config().num_hidden_layers - 1;
    comparison.tensor(&format!("queries.layer_{last:02}"), &pass.queries);
    comparison.tensor("out.soft_tokens", &pass.soft_tokens);
    comparison.tensor("out.logits", &stage2.language_model.logits(&pass.hidden).expect("logits"));
    comparison.tensor("loss", &pass.loss);
    comparison.finish(4);
}

/// Every gradient in the file is compared, and nothing is trained that the file lacks: the language model and
/// the text side of the Q-Former are not.
#[test]
fn every_gradient_agrees() {
    let (golden, stage2) = open();
    let (gradients, _) = stage2.gradients();
    let names: Vec<&str> = golden.expected().filter_map(|name| name.strip_prefix("grad.")).collect();
    assert_eq!(names, stage2.variables.keys().collect::<Vec<_>>());
    let mut comparison = golden.comparison();
    for name in &names {
        comparison.slice(&format!("grad.{name}"), gradients.get(name).expect("a gradient"));
    }
    comparison.finish(names.len());
}

#[derive(Deserialize)]
struct Recipe {
    lr: f64,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
    clip_norm: f64,
}

#[test]
fn ten_steps_agree() {
    let steps = Golden::parse("stage2_steps", include_bytes!("golden/stage2_steps.safetensors"));
    let (_, stage2) = open();
    let Recipe { lr, beta1, beta2, eps, weight_decay, clip_norm } = steps.metadata("optimizer");
    let config = OptimizerConfig { beta1, beta2, eps, weight_decay, clip_norm };
    let mut optimizer = Optimizer::new(config, &stage2.variables);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let (gradients, loss) = stage2.gradients();
        losses.push(loss);
        norms.push(optimizer.step(&stage2.variables, &gradients, lr).expect("a step") as f32);
    }
    let mut comparison = steps.comparison();
    comparison.slice("steps.loss", &losses);
    comparison.slice("steps.gradient_norm", &norms);
    for (name, variable) in &stage2.variables {
        comparison.tensor(&format!("final.{name}"), variable);
    }
    comparison.finish(2 + stage2.variables.len());
}
