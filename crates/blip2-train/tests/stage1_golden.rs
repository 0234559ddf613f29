//! Stage 1 against an independent PyTorch implementation: the three losses, the gradient of every parameter, and
//! ten optimiser steps (`tools/golden_qformer.py`).

#[path = "../../blip2/tests/support/golden.rs"]
mod golden;
#[path = "support/steps.rs"]
mod steps;

use std::collections::BTreeMap;

use blip2::layers::{Loader, Precision, Trainable};
use blip2::qformer::{QFormer, QFormerConfig, TextSide};
use blip2_train::gradients::Gradients;
use blip2_train::losses::HardNegatives;
use blip2_train::stage1::{Batch, StepOptions, Values, gradients_with_negatives};
use candle_core::Var;
use golden::Golden;
use steps::compare_gradients;

struct Stage1 {
    qformer: QFormer,
    variables: BTreeMap<String, Var>,
    batch: Batch,
    negatives: HardNegatives,
    dec: u32,
}

fn open() -> (Golden, Stage1) {
    let golden = Golden::parse("stage1", include_bytes!("golden/stage1.safetensors"));
    let config: QFormerConfig = golden.metadata("config");
    let trainable = Trainable::default();
    let loader = Loader::trainable(&golden, &trainable, Precision::F32);
    let qformer = QFormer::load(&config, &loader, TextSide::Whole).expect("a model");
    let stage1 = Stage1 {
        qformer,
        variables: trainable.into_variables(),
        batch: Batch {
            image_embeds: golden.rows("in.image_embeds"),
            image_ids: golden.integers("in.image_ids"),
            texts: golden.lists("in.text_ids", "in.text_lengths"),
        },
        negatives: HardNegatives {
            image_for_text: golden.integers("in.negative_images"),
            text_for_image: golden.integers("in.negative_texts"),
        },
        dec: golden.metadata("dec_token_id"),
    };
    (golden, stage1)
}

impl Stage1 {
    fn options(&self, micro_batch: usize) -> StepOptions {
        StepOptions {
            micro_batch,
            dropout: 0.0,
            seed: 0,
            step: 0,
            decoder_start: self.dec,
            text_tokens_kept: 1.0,
            matching: true,
            captioning: true,
            hard_negatives: true,
        }
    }

    fn gradients(&self, micro_batch: usize) -> (Gradients, Values) {
        self.gradients_with(self.options(micro_batch))
    }

    fn gradients_with(&self, options: StepOptions) -> (Gradients, Values) {
        gradients_with_negatives(&self.qformer, &self.variables, &self.batch, &self.negatives, options)
            .expect("gradients")
    }
}

/// A step without matching learns the rest as it was, and leaves the matching head alone.
#[test]
fn matching_can_wait() {
    let (_, stage1) = open();
    for micro_batch in [usize::MAX, 2] {
        let (_, with) = stage1.gradients(micro_batch);
        let options = StepOptions { matching: false, ..stage1.options(micro_batch) };
        let (gradients, without) = stage1.gradients_with(options);
        assert_eq!((without.itc, without.itg, without.itm), (with.itc, with.itg, 0.0));
        assert_eq!(gradients.missing(&stage1.variables), ["itm_head.bias", "itm_head.weight"]);
    }
}

/// Contrast over a part of each text is another contrast, the same however the batch is cut; matching and captioning see all words.
#[test]
fn contrast_may_see_a_part_of_the_texts() {
    let (_, stage1) = open();
    let part = |micro_batch| StepOptions { text_tokens_kept: 0.5, ..stage1.options(micro_batch) };
    let (_, whole) = stage1.gradients(usize::MAX);
    let (gradients, values) = stage1.gradients_with(part(usize::MAX));
    let (cut_gradients, cut) = stage1.gradients_with(part(2));
    assert!((values.itc - whole.itc).abs() > 1e-3, "{} {}", values.itc, whole.itc);
    assert_eq!((values.itm, values.itg), (whole.itm, whole.itg));
    assert!((values.itc - cut.itc).abs() < 1e-5, "{} {}", values.itc, cut.itc);
    for name in stage1.variables.keys() {
        let [one, two] = [&gradients, &cut_gradients].map(|g| g.get(name).expect("a gradient"));
        let largest = one.iter().fold(1e-3f32, |most, g| most.max(g.abs()));
        let error = one.iter().zip(two).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(error < 1e-3 * largest, "{name}: {error} of {largest}");
    }
}

/// Every gradient in the file is compared, and the model has no parameter that the file lacks.
fn losses_and_gradients_agree(micro_batch: usize) {
    let (golden, stage1) = open();
    let (gradients, values) = stage1.gradients(micro_batch);
    assert!(gradients.missing(&stage1.variables).is_empty(), "{:?}", gradients.missing(&stage1.variables));
    let mut comparison = golden.comparison();
    comparison.slice("loss.itc", &[values.itc]);
    comparison.slice("loss.itm", &[values.itm]);
    comparison.slice("loss.itg", &[values.itg]);
    comparison.slice("loss.total", &[values.loss()]);
    let n_gradients = compare_gradients(&golden, &mut comparison, &stage1.variables, &gradients);
    comparison.finish(4 + n_gradients);
}

#[test]
fn losses_and_every_gradient_agree() {
    losses_and_gradients_agree(usize::MAX);
}

#[test]
fn losses_and_every_gradient_agree_in_parts() {
    losses_and_gradients_agree(2);
}

#[test]
fn ten_steps_agree() {
    let golden = Golden::parse("stage1_steps", include_bytes!("golden/stage1_steps.safetensors"));
    let (_, stage1) = open();
    steps::ten_steps_agree(&golden, &stage1.variables, || {
        let (gradients, values) = stage1.gradients(usize::MAX);
        (gradients, values.loss())
    });
}
