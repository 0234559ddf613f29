//! Stage 2 with the weights and the batch of a golden file.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use blip2::language::LanguageModel;
use blip2::layers::{Linear, Loader, Precision, Trainable};
use blip2::qformer::{QFormer, QFormerConfig, TextSide};
use blip2::text::Prompt;
use blip2::weights::safetensors::Safetensors;
use blip2_train::gradients::Gradients;
use blip2_train::stage2::{Batch, Bridge, StepOptions, Values, gradients};
use candle_core::Var;

use crate::golden::Golden;

pub(crate) struct Stage2 {
    pub(crate) qformer: QFormer,
    pub(crate) language_projection: Linear,
    pub(crate) language_model: LanguageModel,
    pub(crate) variables: BTreeMap<String, Var>,
    pub(crate) batch: Batch,
}

impl Stage2 {
    /// The bridge and batch of `golden`, in front of the language model that its file `path` holds under `prefix`.
    pub(crate) fn open(
        golden: &Golden,
        path: &Path,
        language_config: &serde_json::Value,
        prefix: &str,
    ) -> Self {
        let config: QFormerConfig = golden.metadata("config");
        let file = Safetensors::open(path).expect("a checkpoint");
        let language_model = LanguageModel::from_safetensors(language_config, &file, prefix, Precision::F32)
            .expect("a language model");
        let trainable = Trainable::default();
        let loader = Loader::trainable(golden, &trainable, Precision::F32);
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
        Self {
            qformer,
            language_projection,
            language_model,
            variables: trainable.into_variables(),
            batch: Batch { image_embeds: golden.rows("in.image_embeds"), prompts, weights },
        }
    }

    pub(crate) fn bridge(&self) -> Bridge<'_> {
        Bridge {
            qformer: &self.qformer,
            language_projection: &self.language_projection,
            language_model: &self.language_model,
        }
    }

    pub(crate) fn gradients_of(&self, batch: &Batch, micro_batch: usize) -> (Gradients, Values) {
        let options = StepOptions { micro_batch, dropout: 0.0, seed: 0, step: 0 };
        gradients(&self.bridge(), &self.variables, batch, options).expect("gradients")
    }

    pub(crate) fn gradients(&self) -> (Gradients, f32) {
        let (gradients, values) = self.gradients_of(&self.batch, usize::MAX);
        (gradients, values.loss)
    }
}

/// The golden's text, in which -1 is the place of a projected query.
fn prompt(ids: &[i64], is_target: &[bool]) -> Prompt {
    let words = ids.iter().zip(is_target).filter(|(id, _)| **id >= 0);
    let mut answers: Vec<Range<usize>> = Vec::new();
    for (idx, _) in words.clone().enumerate().filter(|(_, (_, target))| **target) {
        match answers.last_mut().filter(|answer| answer.end == idx) {
            Some(answer) => answer.end += 1,
            None => answers.push(idx..idx + 1),
        }
    }
    Prompt {
        image_at: ids.iter().position(|id| *id < 0),
        answers,
        ids: words.map(|(id, _)| *id as u32).collect(),
    }
}

/// The largest difference of any gradient, relative to the largest gradient: those of the keys' biases are zero but
/// for rounding.
pub(crate) fn difference<'a>(a: &Gradients, b: &Gradients, names: impl Iterator<Item = &'a String>) -> f32 {
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
