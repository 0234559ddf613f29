//! A stage-1 run: a Q-Former from BERT, or a trained one further.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::layers::{Loader as Weights, TensorSource, Trainable};
use blip2::model::EncoderOptions;
use blip2::qformer::{QFormer, QFormerConfig, TextSide};
use blip2::text::clean_caption;
use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::{
    IMAGE_TOKENS, Observer, Run, RunPrecision, check_width, loader_config, open_data, open_output,
    resolve_data, validate_kept, validate_step,
};
use crate::data::{Batch, DataConfig, Dataset, Loader, Sample, Text};
use crate::features::{FeatureCache, FeatureEncoder};
use crate::gradients::Gradients;
use crate::initialize::{from_bert, is_berts};
use crate::stage1::{self, StepOptions};
use crate::trainer::{LoopConfig, Objective, Outcome, Value};
use crate::{Error, Result};

/// The configuration of a stage-1 run, as TOML.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage1Config {
    /// 1.
    pub stage: u32,
    /// Where checkpoints and logs go; relative to the configuration file, like every path here.
    pub output: PathBuf,
    /// Where the frozen encoder's features are kept.
    pub features: PathBuf,
    /// The frozen image encoder: EfficientNet-Lite0's file, a vision transformer's as LAVIS loads it, or the Hugging Face folder
    /// of a BLIP-2 model, of which the encoder is taken.
    pub encoder: PathBuf,
    /// Side in pixels of the pictures that the encoder is to see, instead of the one it was trained with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Attention heads of a LAVIS encoder of no published width, which its file does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoder_heads: Option<usize>,
    /// What the Q-Former starts from.
    pub init: Stage1Init,
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
    /// The share of a picture's tokens that a step sees, drawn for each picture anew; 1 for all, as in the paper. Fewer make it
    /// hard to remember pictures, where these are few.
    #[serde(default = "super::all_tokens")]
    pub image_tokens_kept: f64,
    /// The share of a caption's tokens that the contrastive loss sees, drawn anew for each step; 1 for all, as in the paper. Like
    /// `image_tokens_kept`, for few pictures; matching and captioning see all.
    #[serde(default = "super::all_tokens")]
    pub text_tokens_kept: f64,
    /// Whether captioning is learned. A Q-Former that goes on to stage 2 needs it; one that is only to match, embed and classify may
    /// spend its last steps on that.
    #[serde(default = "super::yes")]
    pub captioning: bool,
    /// The learning rate of what is BERT's own (embeddings, self-attention, the text's feed-forward layers) as a factor of the
    /// others'; 1 as in the paper. BERT knows more words than a small data set shows, and at the full rate forgets them.
    #[serde(default = "one")]
    pub bert_learning_rate: f64,
    /// Precision of the matrix products; master weights and sums are f32.
    pub precision: RunPrecision,
    /// The first step that learns matching; 0 for all, as in the paper. Matching is half of a step's work, and learns
    /// nothing before contrast has told pictures apart (some hundred steps).
    #[serde(default)]
    pub matching_from_step: u64,
    /// The first step whose negatives are drawn by similarity; 0 for all, as in the paper. Before it they are any other
    /// pictures and texts of the batch: a head that knows nothing learns from those first.
    #[serde(default)]
    pub hard_negatives_from_step: u64,
    /// The loop's settings.
    pub run: LoopConfig,
    /// The Q-Former's sizes; a file that does not say them has those of the Hugging Face folder that it starts from.
    pub qformer: QFormerConfig,
    /// The training data.
    pub data: Vec<DataConfig>,
}

/// What a Q-Former starts from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Stage1Init {
    /// A BERT checkpoint, `model.safetensors`; what BERT lacks is random.
    Bert(PathBuf),
    /// A Q-Former with its heads, to train further: safetensors files of trained weights, or the Hugging Face folder of a BLIP-2
    /// model for matching that has them all (`blip2 convert` keeps those that the public conversion drops).
    Weights(Vec<PathBuf>),
}

fn one() -> f64 {
    1.0
}

impl Stage1Config {
    /// How the encoder is opened.
    pub fn encoder_options(&self) -> EncoderOptions {
        EncoderOptions { image_size: self.image_size, num_attention_heads: self.encoder_heads }
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        for file in [&mut self.output, &mut self.features, &mut self.encoder, &mut self.vocabulary] {
            *file = base.join(&file);
        }
        match &mut self.init {
            Stage1Init::Bert(file) => *file = base.join(&file),
            Stage1Init::Weights(files) => files.iter_mut().for_each(|file| *file = base.join(&file)),
        }
        resolve_data(&mut self.data, base);
    }

    pub(super) fn validate(&self) -> Result<()> {
        self.qformer.validate()?;
        if self.batch_size < 2 {
            return Err(Error::config("batch_size", "must be 2 or more: contrast needs another picture"));
        }
        validate_step(self.batch_size, self.micro_batch, self.dropout, self.image_tokens_kept)?;
        validate_kept("text_tokens_kept", self.text_tokens_kept)?;
        if !(0.0..=1.0).contains(&self.bert_learning_rate) {
            return Err(Error::config("bert_learning_rate", "must be 0 to 1"));
        }
        if let Some(number) = self.data.iter().position(|entry| entry.weight != 1.0) {
            let reason = "is for stage 2: the losses of stage 1 are of pairs, not of answers";
            return Err(Error::config(format!("data[{number}].weight"), reason));
        }
        if !(3..=self.qformer.max_position_embeddings).contains(&self.max_text_tokens) {
            let limit = self.qformer.max_position_embeddings;
            return Err(Error::config("max_text_tokens", format!("must be 3 to {limit}")));
        }
        Ok(())
    }
}

/// Turns a caption into token ids, `[CLS]` first and `[SEP]` last, at most so many.
pub type Tokenize<'a> = &'a dyn Fn(&str, usize) -> Result<Vec<u32>>;

/// Runs stage 1, from the newest checkpoint of `config.output` when `resume` is set; `init` holds the tensors of what
/// `config.init` names.
///
/// # Errors
/// When a file cannot be used, the loss stops being finite, or a checkpoint cannot be written.
pub fn train_stage1(
    config: &Stage1Config,
    encoder: &dyn FeatureEncoder,
    init: &dyn TensorSource,
    tokenize: Tokenize<'_>,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let checkpoint = open_output(&config.output, resume)?;
    let loader = loader_config(config.batch_size, config.seed);
    let (qformer, variables) = start(config, init, encoder.width())?;
    let check = |dataset: &Dataset| {
        let is_captioned = |sample: &Sample| matches!(sample.text, Text::Captions(_));
        if let Some(sample) = dataset.samples().iter().find(|sample| !is_captioned(sample)) {
            let reason = "has questions or dialogues, and stage 1 learns from captions: leave it to stage 2";
            return Err(Error::file(&config.data[sample.entry].path, reason));
        }
        Loader::new(dataset, loader.clone()).map(drop)
    };
    let (dataset, features) =
        open_data(&config.output, &config.data, &config.features, encoder, check, observer)?;
    let objective = Stage1 { qformer, variables, dataset: &dataset, features: &features, tokenize, config };
    let run = Run {
        output: &config.output,
        settings: &config.run,
        config: toml::to_string(config).map_err(|e| Error::Training(e.to_string()))?,
        loader,
        checkpoint,
    };
    run.train(&objective, &dataset, observer)
}

/// The Q-Former that a run starts from, and its variables. What contradicts the configuration or the encoder, of tokens of so
/// many numbers, is said here: before the features are computed, which may take hours.
fn start(
    config: &Stage1Config,
    init: &dyn TensorSource,
    encoder_width: usize,
) -> Result<(QFormer, BTreeMap<String, Var>)> {
    check_width(&config.qformer, encoder_width)?;
    let from_bert = match &config.init {
        Stage1Init::Bert(_) => Some(from_bert(&config.qformer, init, config.seed)?),
        Stage1Init::Weights(_) => None,
    };
    let tensors = from_bert.as_ref().map_or(init, |tensors| tensors as &dyn TensorSource);
    let trainable = Trainable::default();
    let weights = Weights::trainable(tensors, &trainable, config.precision.into());
    let qformer = QFormer::load(&config.qformer, &weights, TextSide::Whole)?;
    Ok((qformer, trainable.into_variables()))
}

/// Stage 1 over a data set with cached features.
struct Stage1<'a> {
    qformer: QFormer,
    variables: BTreeMap<String, Var>,
    dataset: &'a Dataset,
    features: &'a FeatureCache,
    tokenize: Tokenize<'a>,
    config: &'a Stage1Config,
}

impl Stage1<'_> {
    fn learns_matching(&self, step: u64) -> bool {
        step >= self.config.matching_from_step
    }

    fn batch(&self, batch: &Batch, step: u64) -> Result<stage1::Batch> {
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
        let seed = [self.config.seed, IMAGE_TOKENS, step];
        let features = self.features.gather_some(&views, self.config.image_tokens_kept, &seed)?;
        let shape = (features.len() / self.features.width(), self.features.width());
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
            text_tokens_kept: self.config.text_tokens_kept,
            matching: self.learns_matching(step),
            captioning: self.config.captioning,
            hard_negatives: step >= self.config.hard_negatives_from_step,
        };
        let (gradients, values) =
            stage1::gradients(&self.qformer, &self.variables, &self.batch(batch, step)?, options)?;
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

    fn learning_rate_factor(&self, name: &str) -> f64 {
        if is_berts(name) { self.config.bert_learning_rate } else { 1.0 }
    }

    fn waits(&self, name: &str, step: u64) -> bool {
        (name.starts_with("itm_head.") && !self.learns_matching(step))
            || (name.starts_with("cls.") && !self.config.captioning)
    }
}
