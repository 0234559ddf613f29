//! A stage-2 run: a Q-Former from stage 1 learns to speak to a frozen language model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::language::LanguageModel;
use blip2::layers::{Linear, Loader as Weights, TensorSource, Trainable};
use blip2::model::EncoderOptions;
use blip2::qformer::{QFormer, QFormerConfig, TextSide};
use blip2::text::prompt::Turn as PromptTurn;
use blip2::text::{LanguageTokenizer, Prompt, PromptFormat};
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    IMAGE_TOKENS, Observer, Run, RunPrecision, check_width, loader_config, open_data, open_output,
    resolve_data, validate_step,
};
use crate::data::{Batch, DataConfig, Dataset, Loader, Text};
use crate::features::{FeatureCache, FeatureEncoder};
use crate::frozen::FrozenProof;
use crate::gradients::Gradients;
use crate::initialize::{self, Tensors};
use crate::random::Random;
use crate::stage2::{self, Bridge, StepOptions};
use crate::trainer::{LoopConfig, Objective, Outcome, Value};
use crate::{Error, Result};

/// The configuration of a stage-2 run, as TOML.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage2Config {
    /// 2.
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
    /// The frozen language model: a GGUF file, its Hugging Face folder, or that of a BLIP-2 model, of which it is taken.
    pub language_model: PathBuf,
    /// Trained weights to start from: the safetensors files of stage 1, or of an earlier stage 2 with its projection, or the
    /// Hugging Face folder of a BLIP-2 model, to fine-tune its Q-Former and its projection.
    pub init: Vec<PathBuf>,
    /// Seed of everything random.
    pub seed: u64,
    /// Texts that an epoch deals to one step.
    pub batch_size: usize,
    /// Pictures computed at once; smaller needs less memory and gives the same gradients.
    pub micro_batch: usize,
    /// Texts of one picture that a step learns from: the dealt one, and others of its kind (captions, or questions) drawn
    /// from all that is said about the picture. Its vectors are computed once for all of them, and one instruction asks
    /// for all captions, so that the language model reads both once.
    pub texts_per_picture: usize,
    /// Longest prompt with picture and answer, in rows of the language model's input.
    pub max_rows: usize,
    /// What is asked for a caption; one is drawn each time.
    pub instructions: Vec<String>,
    /// How the language model is spoken to.
    pub prompt: PromptFormat,
    /// How it is asked for a caption, where that is not how it is asked a question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption_prompt: Option<PromptFormat>,
    /// Whether captions are learned as sentences with a capital and a full stop, or as they are written.
    #[serde(default = "super::yes")]
    pub tidy_captions: bool,
    /// Prefix language modelling, for an encoder-decoder model: the encoder reads the beginning of a caption, drawn each time,
    /// of at least a word and at most half of them, and the decoder learns to go on.
    #[serde(default)]
    pub split_captions: bool,
    /// Dropout probability of the Q-Former.
    pub dropout: f32,
    /// The share of a picture's tokens that a step sees, drawn for each picture anew; 1 for all, as in the paper. Fewer make it
    /// hard to remember pictures, where these are few.
    #[serde(default = "super::all_tokens")]
    pub image_tokens_kept: f64,
    /// Precision of the matrix products; master weights and sums are f32.
    pub precision: RunPrecision,
    /// The loop's settings.
    pub run: LoopConfig,
    /// The Q-Former's sizes, those of stage 1; a file that does not say them has those of the Hugging Face folder that it starts
    /// from.
    pub qformer: QFormerConfig,
    /// The training data.
    pub data: Vec<DataConfig>,
}

impl Stage2Config {
    /// How the encoder is opened.
    pub fn encoder_options(&self) -> EncoderOptions {
        EncoderOptions { image_size: self.image_size, num_attention_heads: self.encoder_heads }
    }

    /// How the language model is asked for a caption.
    pub fn caption_prompt(&self) -> &PromptFormat {
        self.caption_prompt.as_ref().unwrap_or(&self.prompt)
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        for file in [&mut self.output, &mut self.features, &mut self.encoder, &mut self.language_model] {
            *file = base.join(&file);
        }
        self.init.iter_mut().for_each(|file| *file = base.join(&file));
        resolve_data(&mut self.data, base);
    }

    pub(super) fn validate(&self) -> Result<()> {
        self.qformer.validate()?;
        if self.batch_size == 0 {
            return Err(Error::config("batch_size", "must be 1 or more"));
        }
        validate_step(self.batch_size, self.micro_batch, self.dropout, self.image_tokens_kept)?;
        if self.texts_per_picture == 0 {
            return Err(Error::config("texts_per_picture", "must be 1 or more"));
        }
        // A model that does not chat may describe a picture unasked: `[""]`.
        let is_asked = |instruction: &String| !instruction.trim().is_empty();
        if self.instructions.is_empty()
            || (*self.caption_prompt() == PromptFormat::ChatMl && !self.instructions.iter().all(is_asked))
        {
            return Err(Error::config("instructions", "must hold wordings to ask for a caption with"));
        }
        if self.init.is_empty() {
            return Err(Error::config("init", "must name the weights of stage 1"));
        }
        Ok(())
    }
}

/// The frozen language model of a run, with its tokenizer.
#[derive(Debug, Clone, Copy)]
pub struct Language<'a> {
    /// The model.
    pub model: &'a LanguageModel,
    /// Its tokenizer.
    pub tokenizer: &'a LanguageTokenizer,
}

/// Runs stage 2, from the newest checkpoint of `config.output` when `resume` is set; `init` holds the tensors of the
/// files that `config.init` names. At the end the frozen parts are proved to be what they were.
///
/// # Errors
/// When a file cannot be used, the loss stops being finite, a checkpoint cannot be written, or a frozen part changed.
pub fn train_stage2(
    config: &Stage2Config,
    encoder: &dyn FeatureEncoder,
    language: Language<'_>,
    init: &dyn TensorSource,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let checkpoint = open_output(&config.output, resume)?;
    let mut frozen_files = vec![config.encoder.as_path(), config.language_model.as_path()];
    frozen_files.dedup(); // a whole model's folder is both
    let loader = loader_config(config.batch_size, config.seed);
    let start = Start::new(config, language, init, encoder.width())?;
    let check = |dataset: &Dataset| {
        Loader::new(dataset, loader.clone())?;
        Prompts { config, language, dataset }.check()
    };
    let before = FrozenProof::take(&frozen_files, language)?;
    let (dataset, features) =
        open_data(&config.output, &config.data, &config.features, encoder, check, observer)?;
    let objective = Stage2::new(start, Prompts { config, language, dataset: &dataset }, &features);
    let run = Run {
        output: &config.output,
        settings: &config.run,
        config: toml::to_string(config).map_err(|e| Error::Training(e.to_string()))?,
        loader,
        checkpoint,
    };
    let outcome = run.train(&objective, &dataset, observer)?;
    let after = FrozenProof::take(&frozen_files, language)?;
    before.compare(&after)?;
    after.write(&config.output)?;
    Ok(outcome)
}

/// What a run starts from: the Q-Former, its projection, and their variables.
struct Start {
    qformer: QFormer,
    language_projection: Linear,
    variables: BTreeMap<String, Var>,
}

impl Start {
    /// What contradicts the configuration, the language model or the encoder, of tokens of so many numbers, is said here: before
    /// the features are computed, which may take hours.
    fn new(
        config: &Stage2Config,
        language: Language<'_>,
        init: &dyn TensorSource,
        encoder_width: usize,
    ) -> Result<Self> {
        check_width(&config.qformer, encoder_width)?;
        let is_open = |prompt: &PromptFormat| !matches!(prompt, PromptFormat::Plain { eos: true, .. });
        if language.model.decoder_start().is_some() {
            for (field, prompt) in [("prompt", &config.prompt), ("caption_prompt", config.caption_prompt())] {
                if is_open(prompt) {
                    let reason = "must be of the kind `plain` with `eos = true`: the language model's encoder reads texts that \
                                  end with its mark";
                    return Err(Error::config(field, reason));
                }
            }
        }
        if config.split_captions && language.model.decoder_start().is_none() {
            let reason = "is for encoder-decoder models: this language model reads all of a caption as it is";
            return Err(Error::config("split_captions", reason));
        }
        let context = language.model.context_len();
        if config.max_rows > context {
            return Err(Error::config("max_rows", format!("must be at most the language model's {context}")));
        }
        let (width, language_width) = (config.qformer.hidden_size, language.model.hidden_size());
        let projection: Tensors = initialize::language_projection(init, width, language_width, config.seed)?;
        let trainable = Trainable::default();
        let precision = config.precision.into();
        let qformer =
            QFormer::load(&config.qformer, &Weights::trainable(init, &trainable, precision), TextSide::None)?;
        let language_projection = Weights::trainable(&projection, &trainable, precision).linear(
            "language_projection",
            width,
            language_width,
        )?;
        Ok(Self { qformer, language_projection, variables: trainable.into_variables() })
    }
}

/// Stage 2 over a data set with cached features.
struct Stage2<'a> {
    start: Start,
    prompts: Prompts<'a>,
    /// For each picture, all that is said about it: sample and choice.
    texts_of: Vec<Vec<(usize, usize)>>,
    features: &'a FeatureCache,
}

impl<'a> Stage2<'a> {
    fn new(start: Start, prompts: Prompts<'a>, features: &'a FeatureCache) -> Self {
        let dataset = prompts.dataset;
        let mut texts_of = vec![Vec::new(); dataset.images().len()];
        for (number, sample) in dataset.samples().iter().enumerate() {
            texts_of[sample.image].extend((0..sample.text.n_choices()).map(|choice| (number, choice)));
        }
        Self { start, prompts, texts_of, features }
    }

    fn batch(&self, batch: &Batch, step: u64) -> Result<stage2::Batch> {
        let Prompts { config, dataset, .. } = self.prompts;
        let mut prompts = Vec::with_capacity(batch.items.len());
        let is_caption = |sample: usize| matches!(dataset.samples()[sample].text, Text::Captions(_));
        let mut weights = Vec::with_capacity(batch.items.len());
        for (number, item) in batch.items.iter().enumerate() {
            let mut random = Random::new(&[config.seed, TEXTS, step, number as u64]);
            let dealt = (item.sample, item.choice);
            let mut texts: Vec<_> = self.texts_of[item.image]
                .iter()
                .copied()
                .filter(|&text| text != dealt && is_caption(text.0) == is_caption(item.sample))
                .collect();
            random.shuffle(&mut texts);
            texts.truncate(config.texts_per_picture - 1);
            texts.insert(0, dealt);
            let instruction = &config.instructions[random.below(config.instructions.len())];
            let mut of_picture = Vec::with_capacity(texts.len());
            for text in texts {
                of_picture.extend(self.prompts.of(text, instruction, &mut random)?);
            }
            prompts.push(of_picture);
            weights.push(dataset.entries()[dataset.samples()[item.sample].entry].weight as f32);
        }
        let views: Vec<(usize, u32)> = batch.items.iter().map(|item| (item.image, item.view)).collect();
        let seed = [config.seed, IMAGE_TOKENS, step];
        let features = self.features.gather_some(&views, config.image_tokens_kept, &seed)?;
        let shape = (features.len() / self.features.width(), self.features.width());
        let image_embeds = Tensor::from_vec(features, shape, &Device::Cpu)?;
        Ok(stage2::Batch { image_embeds, prompts, weights })
    }
}

/// How what is said about pictures becomes what the language model reads.
#[derive(Clone, Copy)]
struct Prompts<'a> {
    config: &'a Stage2Config,
    language: Language<'a>,
    dataset: &'a Dataset,
}

impl Prompts<'_> {
    /// Refuses a text that is longer than a step takes, before there is a step that meets it.
    fn check(&self) -> Result<()> {
        let instruction = self.longest_instruction()?;
        self.dataset.samples().par_iter().enumerate().try_for_each(|(number, sample)| {
            let mut random = Random::new(&[self.config.seed, TEXTS, number as u64]);
            (0..sample.text.n_choices()).try_for_each(|choice| {
                self.of((number, choice), instruction, &mut random).map(drop).map_err(|error| {
                    let source = &self.dataset.images()[sample.image].source;
                    let is_long = matches!(error, Error::Model(blip2::Error::TextTooLong { .. }));
                    let remedy = if is_long { ", or raise `max_rows`" } else { "" };
                    Error::Training(format!("what is said about {source}: {error}{remedy}"))
                })
            })
        })
    }

    /// The instruction that takes most rows; none where no caption needs one.
    fn longest_instruction(&self) -> Result<&str> {
        let mut longest = (0, "");
        if !self.dataset.samples().iter().any(|sample| matches!(sample.text, Text::Captions(_))) {
            return Ok(longest.1);
        }
        for instruction in &self.config.instructions {
            let turn = PromptTurn::answered(instruction, "a");
            let prompt = self.render(self.config.caption_prompt(), &[turn]).map_err(|error| match error {
                Error::Model(blip2::Error::TextTooLong { .. }) => {
                    let reason = format!("is too small for the instruction {instruction:?}: {error}");
                    Error::config("max_rows", reason)
                }
                error => Error::config("instructions", format!("has {instruction:?}: {error}")),
            })?;
            longest = longest.max((prompt.n_rows(self.config.qformer.num_query_tokens), instruction));
        }
        Ok(longest.1)
    }

    /// What is to be learned from a text: one prompt, or of a dialogue one for each answer, where the model learns one at a time.
    fn of(
        &self,
        (sample, choice): (usize, usize),
        instruction: &str,
        random: &mut Random,
    ) -> Result<Vec<Prompt>> {
        let turns = match &self.dataset.samples()[sample].text {
            Text::Captions(captions) => {
                let caption = &captions[choice];
                let caption =
                    if self.config.tidy_captions { tidy_caption(caption) } else { caption.trim().to_owned() };
                let turn = if self.config.split_captions {
                    let (beginning, rest) = split_caption(&caption, random);
                    PromptTurn::answered(format!("{instruction} {beginning}"), rest)
                } else {
                    PromptTurn::answered(instruction, caption)
                };
                return Ok(vec![self.render(self.config.caption_prompt(), &[turn])?]);
            }
            Text::QuestionAnswer { question, answers } => {
                vec![PromptTurn::answered(question, &answers[choice])]
            }
            Text::Turns(turns) => {
                turns.iter().map(|turn| PromptTurn::answered(&turn.question, &turn.answer)).collect()
            }
        };
        let first = if self.language.model.reads_prompts_whole() { 1 } else { turns.len() };
        (first..=turns.len()).map(|n| self.render(&self.config.prompt, &turns[..n])).collect()
    }

    fn render(&self, format: &PromptFormat, turns: &[PromptTurn]) -> Result<Prompt> {
        let (n_queries, limit) = (self.config.qformer.num_query_tokens, self.config.max_rows);
        Ok(format.render_within(self.language.tokenizer, turns, Some(n_queries), limit)?)
    }
}

/// Stream of random numbers: which texts, in which wording.
const TEXTS: u64 = 0x7e87;

impl Objective for Stage2<'_> {
    fn variables(&self) -> &BTreeMap<String, Var> {
        &self.start.variables
    }

    fn gradients(&self, batch: &Batch, step: u64) -> Result<(Gradients, Vec<Value>)> {
        let Prompts { config, language, .. } = self.prompts;
        let options =
            StepOptions { micro_batch: config.micro_batch, dropout: config.dropout, seed: config.seed, step };
        let bridge = Bridge {
            qformer: &self.start.qformer,
            language_projection: &self.start.language_projection,
            language_model: language.model,
        };
        let (gradients, values) =
            stage2::gradients(&bridge, &self.start.variables, &self.batch(batch, step)?, options)?;
        Ok((
            gradients,
            vec![
                ("loss", f64::from(values.loss)),
                ("answer_tokens", values.n_tokens as f64),
                ("query_cosine", f64::from(values.query_cosine)),
            ],
        ))
    }
}

/// A caption as the language model shall write it: one sentence with a capital and a full stop. Annotators agree on
/// neither, and a model that must guess them spends its capacity on punctuation.
fn tidy_caption(caption: &str) -> String {
    let words: Vec<&str> = caption.split_whitespace().collect();
    let mut text = String::new();
    for word in words {
        let is_mark = word.chars().all(|c| matches!(c, '.' | ',' | ';' | '!' | '?'));
        if !text.is_empty() && !is_mark {
            text.push(' ');
        }
        text.push_str(word);
    }
    let text = text.trim_end_matches(['.', ' ', ',', ';']);
    let mut letters = text.chars();
    match letters.next() {
        Some(first) if text.ends_with(['!', '?']) => format!("{}{}", first.to_uppercase(), letters.as_str()),
        Some(first) => format!("{}{}.", first.to_uppercase(), letters.as_str()),
        None => caption.trim().to_owned(),
    }
}

/// The beginning of a caption, one word to half of them, and the rest; of a single word nothing and that.
fn split_caption<'a>(caption: &'a str, random: &mut Random) -> (&'a str, &'a str) {
    // Where words end, but for the last one's.
    let starts = caption.char_indices().filter(|(_, c)| c.is_whitespace()).map(|(i, _)| i);
    let ends: Vec<usize> = starts.filter(|&i| !caption[..i].ends_with(char::is_whitespace)).collect();
    let most = ends.len().div_ceil(2);
    if most == 0 {
        return ("", caption);
    }
    let (beginning, rest) = caption.split_at(ends[random.below(most)]);
    (beginning, rest.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_become_sentences() {
        assert_eq!(tidy_caption("a dog , brown , runs ."), "A dog, brown, runs.");
        assert_eq!(tidy_caption("Two dogs running"), "Two dogs running.");
        assert_eq!(tidy_caption("Look at this !"), "Look at this!");
        assert_eq!(tidy_caption(" . "), ".");
    }

    #[test]
    fn captions_are_split_at_most_in_the_middle() {
        let mut random = Random::new(&[1]);
        let mut splits = |caption: &'static str| -> std::collections::BTreeSet<_> {
            (0..50).map(|_| split_caption(caption, &mut random)).collect()
        };
        let all = |pairs: &[(&'static str, &'static str)]| pairs.iter().copied().collect();
        assert_eq!(splits("a  dog runs home"), all(&[("a", "dog runs home"), ("a  dog", "runs home")]));
        assert_eq!(splits("a dog runs"), all(&[("a", "dog runs")]));
        assert_eq!(splits("dogs"), all(&[("", "dogs")]));
    }
}
