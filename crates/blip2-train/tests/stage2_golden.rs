//! Stage 2 against an independent PyTorch implementation: the query path in front of a frozen language model, its
//! loss on the answers, the gradient of every trained parameter, and ten optimiser steps (`tools/golden_stage2.py`).

#[path = "../../blip2/tests/support/golden.rs"]
mod golden;
#[path = "support/steps.rs"]
mod steps;
#[path = "support/stage2.rs"]
mod support;

use std::path::Path;

use blip2::layers::DropoutRng;
use blip2_train::stage2::Batch;
use candle_core::Tensor;
use golden::{Comparison, Golden};
use steps::compare_gradients;
use support::{Stage2, difference};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/stage2.safetensors");

fn open() -> (Golden, Stage2) {
    let golden = Golden::parse("stage2", include_bytes!("golden/stage2.safetensors"));
    let language_config: serde_json::Value = golden.metadata("language_config");
    let stage2 = Stage2::open(&golden, Path::new(FILE), &language_config, "language_model.");
    (golden, stage2)
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
    let mut comparison = golden.comparison();
    let n_gradients = compare_gradients(&golden, &mut comparison, &stage2.variables, &gradients);
    comparison.finish(n_gradients);
}

#[test]
fn ten_steps_agree() {
    let golden = Golden::parse("stage2_steps", include_bytes!("golden/stage2_steps.safetensors"));
    let (_, stage2) = open();
    steps::ten_steps_agree(&golden, &stage2.variables, || stage2.gradients());
}
