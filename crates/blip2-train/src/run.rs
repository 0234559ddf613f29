//! A training run from its configuration file: what `blip2 train` does.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use blip2::config::QFormerConfig;
use blip2::layers::{Loader as Weights, Precision, TensorSource, Trainable};
use blip2::qformer::QFormer;
use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, DataConfig, Dataset, Loader, LoaderConfig, Text};
use crate::features::{Computed, FeatureCache, FeatureEncoder, Progress};
use crate::gradients::Gradients;
use crate::initialize::from_bert;
use crate::log::{StepValues, TrainingLog};
use crate::stage1::{self, StepOptions};
use crate::trainer::{self, LoopConfig, Objective, Outcome, Report, Start, Value};
use crate::{Error, Result, checkpoint};

/// The configuration of a stage-1 run, as TOML.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Where checkpoints and logs go; relative to the configuration file, like every path here.
    pub output: PathBuf,
    /// Where the frozen encoder's features are kept.
    pub features: PathBuf,
    /// The frozen image encoder's file.
    pub encoder: PathBuf,
    /// The BERT checkpoint that the Q-Former starts from.
    pub bert: PathBuf,
    /// The BERT vocabulary.
    pub vocabulary: PathBuf,
    /// Seed of everything random.
    pub seed: u64,
    /// Picture-text pairs a step.
    pub batch_size: usize,
    /// Pairs computed at once; smaller needs less memory and gives the same gradients.
    pub micro_batch: usize,
    /// Longest text, in tokens with `[CLS]` and `[SEP]`.
    pub max_text_tokens: usize,
    /// Dropout probability of the Q-Former.
    pub dropout: f32,
    /// Precision of the matrix products; master weights and sums are f32.
    pub precision: RunPrecision,
    /// The loop's settings.
    pub run: LoopConfig,
    /// The Q-Former's sizes.
    pub qformer: QFormerConfig,
    /// The training data.
    pub data: Vec<DataConfig>,
}

/// Precision of the matrix products in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunPrecision {
    /// Single precision.
    F32,
    /// Operands rounded to bf16, sums in f32.
    Bf16,
}

impl RunConfig {
    /// Reads a configuration file and makes its paths relative to the working folder.
    ///
    /// # Errors
    /// [`Error::File`] with the line of an unknown field or a wrong value.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let mut config: Self = toml::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
        let base = path.parent().unwrap_or(Path::new(""));
        for file in [&mut config.output, &mut config.features, &mut config.encoder, &mut config.bert] {
            *file = base.join(&file);
        }
        config.vocabulary = base.join(&config.vocabulary);
        for entry in &mut config.data {
            entry.path = base.join(&entry.path);
            entry.images = entry.images.take().map(|images| base.join(images));
        }
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        self.qformer.validate()?;
        if self.batch_size < 2 {
            return Err(Error::config("batch_size", "must be 2 or more: contrast needs another picture"));
        }
        if !(1..=self.batch_size).contains(&self.micro_batch) {
            return Err(Error::config("micro_batch", format!("must be 1 to {}", self.batch_size)));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config("dropout", "must be at least 0 and below 1"));
        }
        if !(3..=self.qformer.max_position_embeddings).contains(&self.max_text_tokens) {
            let limit = self.qformer.max_position_embeddings;
            return Err(Error::config("max_text_tokens", format!("must be 3 to {limit}")));
        }
        Ok(())
    }
}

/// What a run tells its caller while it goes on; any answer but `Continue` ends it after the step, saved.
pub trait Observer {
    /// Features are being computed.
    fn on_features(&mut self, progress: Progress) -> ControlFlow<()>;
    /// Features are ready.
    fn on_data(&mut self, dataset: &Dataset, computed: &Computed);
    /// A step was made.
    fn on_step(&mut self, report: &Report) -> ControlFlow<()>;
}

/// Turns a caption into token ids, `[CLS]` first and `[SEP]` last, at most so many.
pub type Tokenize<'a> = &'a dyn Fn(&str, usize) -> Result<Vec<u32>>;

/// Runs stage 1, from the newest checkpoint of `config.output` when `resume` is set.
///
/// # Errors
/// When a file cannot be used, the loss stops being finite, or a checkpoint cannot be written.
pub fn train_stage1(
    config: &RunConfig,
    encoder: &dyn FeatureEncoder,
    bert: &dyn TensorSource,
    tokenize: Tokenize<'_>,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    std::fs::create_dir_all(&config.output).map_err(Error::io(&config.output))?;
    let checkpoint = checkpoint::newest(&config.output)?;
    if let (Some(path), false) = (&checkpoint, resume) {
        return Err(Error::file(
            path,
            "is there already: continue with --resume, or choose another `output`",
        ));
    }
    let mut dataset = Dataset::load(&config.data, Path::new(""))?;
    let (features, computed) = FeatureCache::compute(&config.features, &dataset, encoder, |progress| {
        observer.on_features(progress)
    })?;
    dataset.skip_images(&computed.unusable);
    observer.on_data(&dataset, &computed);
    let loader = LoaderConfig {
        batch_size: config.batch_size,
        seed: config.seed,
        drop_last: true,
        distinct_groups: true,
    };
    let mut loader = Loader::new(&dataset, loader)?;
    let objective = Stage1::new(config, bert, &dataset, &features, tokenize)?;
    let start = match &checkpoint {
        Some(path) => Start::resume(path, &config.run, &objective, &mut loader)?,
        None => Start::fresh(&config.run, &objective),
    };
    let mut log = TrainingLog::open(&config.output, start.step())?;
    let mut log_error = None;
    let settings = toml::to_string(config).map_err(|e| Error::Training(e.to_string()))?;
    let outcome = trainer::train(
        &objective,
        &mut loader,
        &config.run,
        &settings,
        &config.output,
        start,
        &mut |report| {
            let mut values = StepValues::new(report.step);
            report.values.iter().for_each(|(name, value)| values.push(*name, *value));
            values.push("learning_rate", report.learning_rate);
            values.push("gradient_norm", report.gradient_norm);
            if let Err(error) = log.record(&values) {
                log_error = Some(error);
                return ControlFlow::Break(());
            }
            observer.on_step(report)
        },
    )?;
    match log_error {
        Some(error) => Err(error),
        None => Ok(outcome),
    }
}

/// Stage 1 over a data set with cached features.
struct Stage1<'a> {
    qformer: QFormer,
    variables: BTreeMap<String, Var>,
    dataset: &'a Dataset,
    features: &'a FeatureCache,
    tokenize: Tokenize<'a>,
    config: &'a RunConfig,
}

impl<'a> Stage1<'a> {
    fn new(
        config: &'a RunConfig,
        bert: &dyn TensorSource,
        dataset: &'a Dataset,
        features: &'a FeatureCache,
        tokenize: Tokenize<'a>,
    ) -> Result<Self> {
        let precision = match config.precision {
            RunPrecision::F32 => Precision::F32,
            RunPrecision::Bf16 => Precision::Bf16,
        };
        if features.width() != config.qformer.encoder_hidden_size {
            let reason = format!("must be the image encoder's {}", features.width());
            return Err(Error::config("qformer.encoder_hidden_size", reason));
        }
        let tensors = from_bert(&config.qformer, bert, config.seed)?;
        let trainable = Trainable::default();
        let weights = Weights::trainable(&tensors, &trainable, precision);
        let qformer = QFormer::load(&config.qformer, &weights, true)?;
        Ok(Self { qformer, variables: trainable.into_variables(), dataset, features, tokenize, config })
    }

    fn batch(&self, batch: &Batch) -> Result<stage1::Batch> {
        let mut texts = Vec::with_capacity(batch.items.len());
        for item in &batch.items {
            let Text::Captions(captions) = &self.dataset.samples()[item.sample].text else {
                return Err(Error::Training(
                    "stage 1 learns from captions: the data has questions or dialogues".into(),
                ));
            };
            texts.push((self.tokenize)(&clean_caption(&captions[item.choice]), self.config.max_text_tokens)?);
        }
        let views: Vec<(usize, u32)> = batch.items.iter().map(|item| (item.image, item.view)).collect();
        let features = self.features.gather(&views)?;
        let shape = (views.len() * self.features.n_tokens(), self.features.width());
        Ok(stage1::Batch {
            image_embeds: Tensor::from_vec(features, shape, &Device::Cpu)?,
            image_ids: batch.items.iter().map(|item| u64::from(item.group)).collect(),
            texts,
        })
    }
}

impl Objective for Stage1<'_> {
    fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    fn gradients(&self, batch: &Batch, step: u64) -> Result<(Gradients, Vec<Value>)> {
        let options = StepOptions {
            micro_batch: self.config.micro_batch,
            dropout: self.config.dropout,
            seed: self.config.seed,
            step,
            // [DEC] is the last entry of the vocabulary (BLIP-2 adds it to BERT's).
            decoder_start: self.config.qformer.vocab_size as u32 - 1,
        };
        let (gradients, values) =
            stage1::gradients(&self.qformer, &self.variables, &self.batch(batch)?, options)?;
        let values = [
            ("loss", values.loss()),
            ("itc", values.itc),
            ("itm", values.itm),
            ("itg", values.itg),
            ("itm_accuracy", values.itm_accuracy),
            ("recall_at_1", values.recall_at_1),
            ("temperature", values.temperature),
            ("query_cosine", values.query_cosine),
        ];
        Ok((gradients, values.map(|(name, value)| (name, f64::from(value))).to_vec()))
    }
}

/// LAVIS's `blip_caption`: lower case, punctuation to spaces, at most 50 words.
fn clean_caption(caption: &str) -> String {
    let spaced = caption.to_lowercase().replace(['.', '!', '"', '(', ')', '*', '#', ':', ';', '~'], " ");
    spaced.split_whitespace().take(50).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_are_cleaned_as_lavis_does() {
        assert_eq!(clean_caption("A dog (brown) runs; it's fast !"), "a dog brown runs it's fast");
        assert_eq!(clean_caption(&"word ".repeat(60)).split(' ').count(), 50);
    }

    #[test]
    fn unknown_settings_are_refused_with_their_name() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "outptu = \"x\"\n").expect("written");
        let error = RunConfig::read(&path).expect_err("an unknown field").to_string();
        assert!(error.contains("outptu") && error.contains("run.toml"), "{error}");
    }
}
