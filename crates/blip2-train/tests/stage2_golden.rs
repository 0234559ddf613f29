//! Stage 2 against an independent PyTorch implementation: the query path in front of a frozen language model, its
//! loss on the answers, the gradient of every trained parameter, and ten optimiser steps (`tools/golden_stage2.py`).

#[path = "../../blip2/tests/support/golden.rs"]
mod golden;

use std::collections::BTreeMap;

use blip2::config::QFormerConfig;
use blip2::language::LanguageModel;
use blip2::layers::{DropoutRng, Linear, Loader, Precision, Trainable};
use blip2::qformer::{QFormer, TextSide};
use blip2::text::Prompt;
use blip2::weights::safetensors::Safetensors;
use blip2_train::gradients::Gradients;
use blip2_train::optimizer::{Optimizer, OptimizerConfig};
use blip2_train::stage2::{Batch, Bridge, StepOptions, Values, gradients};
use candle_core::{Tensor, Var};
use golden::{Comparison, Golden};
use serde::Deserialize;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/stage2.safetensors");

struct Stage2 {
    qformer: QFormer,
    language_projection: Linear,
    language_model: LanguageModel,
    variables: BTreeMap<String, Var>,
    batch: Batch,
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
    let qformer = QFormer::load(&config, &loader, TextSide::None).expect("a query path");
    let language_projection = loader
        .linear("language_projection", config.hidden_size, language_model.hidden_size())
        .expect("a projection");
    let is_target: Vec<u8> = golden.integers("in.is_target");
    let mut is_target = is_target.into_iter();
    let prompts = golden.lists("in.ids", "in.lengths").into_iter().map(|ids: Vec<i64>| {
        let is_target: Vec<bool> = is_target.by_ref().take(ids.len()).map(|t| t == 1).collect();
        vec![prompt(&ids, &is_target)]
    });
    let prompts: Vec<_> = prompts.collect();
    let weights = vec![1.0; prompts.len()];
    let stage2 = Stage2 {
        qformer,
        language_projection,
        language_model,
        variables: trainable.into_variables(),
        batch: Batch { image_embeds: golden.rows("in.image_embeds"), prompts, weights },
    };
    (golden, stage2)
}

/// The golden's text, in which -1 is the place of a projected query.
fn prompt(ids: &[i64], is_target: &[bool]) -> Prompt {
    let words = ids.iter().zip(is_target).filter(|(id, _)| **id >= 0);
    let answers = words.clone().enumerate().filter(|(_, (_, target))| **target);
    Prompt {
        image_at: ids.iter().position(|id| *id < 0),
        answers: answers.map(|(idx, _)| idx..idx + 1).collect(),
        ids: words.map(|(id, _)| *id as u32).collect(),
    }
}

impl Stage2 {
    fn bridge(&self) -> Bridge<'_> {
        Bridge {
            qformer: &self.qformer,
            language_projection: &self.language_projection,
            language_model: &self.language_model,
        }
    }

    fn gradients_of(&self, batch: &Batch, micro_batch: usize) -> (Gradients, Values) {
        let options = StepOptions { micro_batch, dropout: 0.0, seed: 0, step: 0 };
        gradients(&self.bridge(), &self.variables, batch, options).expect("gradients")
    }

    fn gradients(&self) -> (Gradients, f32) {
        let (gradients, values) = self.gradients_of(&self.batch, usize::MAX);
        (gradients, values.loss)
    }
}

/// The largest difference of any gradient, relative to the largest gradient: those of the keys' biases are zero but
/// for rounding.
fn difference<'a>(a: &Gradients, b: &Gradients, names: impl Iterator<Item = &'a String>) -> f32 {
    let (mut largest, mut difference) = (0.0f32, 0.0f32);
    for name in names {
        for (a, b) in a.get(name).expect("a").iter().zip(b.get(name).expect("b")) {
            largest = largest.max(a.abs());
            difference = difference.max((a - b).abs());
        }
    }
    assert!(largest > 0.0);
    difference / largest
}

/// Texts that share a picture's rows give the loss and the gradients of the same texts on copies of the picture.
#[test]
fn shared_pictures_equal_copies() {
    let (_, stage2) = open();
    let n_image_tokens = stage2.batch.image_embeds.dim(0).expect("rows") / stage2.batch.prompts.len();
    let first = stage2.batch.image_embeds.narrow(0, 0, n_image_tokens).expect("a picture");
    let one = stage2.batch.prompts[0][0].clone();
    // The same beginning, another question and answer.
    let mut other = one.clone();
    let last = other.ids.len() - 1;
    other.ids[last] = (other.ids[last] + 1) % 7;
    other.ids.push(3);
    other.answers.push(last + 1..last + 2);
    let texts = [one.clone(), other, one];
    let shared = Batch { image_embeds: first.clone(), prompts: vec![texts.to_vec()], weights: vec![1.0] };
    let copies = Batch {
        image_embeds: Tensor::cat(&[&first; 3], 0).expect("copies"),
        prompts: texts.iter().map(|text| vec![text.clone()]).collect(),
        weights: vec![1.0; 3],
    };
    let (a, a_values) = stage2.gradients_of(&shared, usize::MAX);
    let (b, b_values) = stage2.gradients_of(&copies, usize::MAX);
    assert_eq!(a_values.n_tokens, b_values.n_tokens);
    assert!((a_values.loss - b_values.loss).abs() < 1e-5, "{a_values:?} {b_values:?}");
    let difference = difference(&a, &b, stage2.variables.keys());
    assert!(difference < 1e-5, "{difference}");
}

/// A picture of weight two counts as the picture twice.
#[test]
fn a_weight_counts_as_copies() {
    let (_, stage2) = open();
    let Batch { image_embeds, prompts, .. } = &stage2.batch;
    let n = prompts.len();
    let first = image_embeds.narrow(0, 0, image_embeds.dim(0).expect("rows") / n).expect("a picture");
    let mut weights = vec![1.0; n];
    weights[0] = 2.0;
    let weighted = Batch { weights, ..stage2.batch.clone() };
    let copied = Batch {
        image_embeds: Tensor::cat(&[&first, image_embeds], 0).expect("a copy"),
        prompts: [&prompts[..1], &prompts[..]].concat(),
        weights: vec![1.0; n + 1],
    };
    let (a, a_values) = stage2.gradients_of(&weighted, usize::MAX);
    let (b, b_values) = stage2.gradients_of(&copied, usize::MAX);
    assert!((a_values.loss - b_values.loss).abs() < 1e-5, "{a_values:?} {b_values:?}");
    assert!((a_values.loss - stage2.gradients().1).abs() > 1e-4, "the weight changes the loss");
    let difference = difference(&a, &b, stage2.variables.keys());
    assert!(difference < 1e-5, "{difference}");
}

/// A batch cut into parts gives the gradients of the whole.
#[test]
fn parts_equal_the_whole() {
    let (_, stage2) = open();
    let (whole, whole_values) = stage2.gradients_of(&stage2.batch, usize::MAX);
    let (parts, parts_values) = stage2.gradients_of(&stage2.batch, 1);
    assert!((whole_values.loss - parts_values.loss).abs() < 1e-5);
    let difference = difference(&whole, &parts, stage2.variables.keys());
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn rows_and_loss_agree() {
    let (golden, stage2) = open();
    let n = stage2.batch.prompts.len();
    let pass = stage2.bridge().forward(&stage2.batch, 0..n, &mut DropoutRng::off()).expect("rows");
    let mut comparison: Comparison<'_> = golden.comparison();
    let last = stage2.qformer.config().num_hidden_layers - 1;
    comparison.tensor(&format!("queries.layer_{last:02}"), &pass.queries);
    comparison.tensor("out.soft_tokens", &pass.soft_tokens);
    comparison.tensor("out.logits", &stage2.language_model.logits(&pass.hidden).expect("logits"));
    comparison.slice("loss", &[stage2.gradients().1]);
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
