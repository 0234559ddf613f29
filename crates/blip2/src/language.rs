//! The frozen language model, behind one small interface for all families.
//!
//! It reads packed rows of embeddings, never token ids: the projected queries of the Q-Former stand among the
//! embeddings of words. Without a cache the pass is differentiable to its input, which is all that training needs of a
//! frozen model; with a [`KvCache`] it is how [`generate`](crate::generate) reads.

mod causal;
mod config;
mod llama;
mod loading;
mod opt;
mod t5;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blip2_kernels::awake::awake;
use candle_core::Tensor;

use causal::Causal;
use config::Config;
pub use llama::{Llama, LlamaConfig};
use loading::File;
pub use opt::{Opt, OptConfig};
pub use t5::{T5, T5Config};

use crate::cache::{CachedSequence, KvCache};
use crate::layers::{FrozenFormat, Linear, MatrixSize, Plan, Sequence, Span};
use crate::text::LanguageTokenizer;
use crate::weights::RandomWeights;
use crate::weights::gguf::Gguf;
use crate::weights::safetensors::Safetensors;
use crate::{Error, Result};

/// How many rows a model of this Hugging Face `config.json` reads, known without its weights.
///
/// # Errors
/// When the model type is not known or a size is wrong.
pub(crate) fn context_len(config: &serde_json::Value) -> Result<usize> {
    Ok(match Config::from_hugging_face(config)? {
        Config::Llama(config) => config.max_position_embeddings,
        Config::Opt(config) => config.max_position_embeddings,
        Config::T5(_) => t5::MAX_ROWS,
    })
}

/// A language model of any family.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum LanguageModel {
    /// LLaMA and its relatives of the same structure, SmolLM2 among them.
    Llama(Llama),
    /// OPT.
    Opt(Opt),
    /// T5, an encoder and a decoder.
    T5(T5),
}

impl LanguageModel {
    /// Loads a model from a GGUF file; its matrices are packed for the kernels in `format`.
    ///
    /// # Errors
    /// When the architecture is not known, or a tensor is missing, misshapen or unknown.
    pub fn from_gguf(file: &Gguf, format: impl Into<FrozenFormat>) -> Result<Self> {
        Llama::from_gguf(file, format.into()).map(Self::Llama)
    }

    /// Loads a model from a Hugging Face checkpoint: its `config.json` and the tensors whose names start with `prefix`
    /// (empty, or `language_model.` inside a BLIP-2 checkpoint). Tensors that it does not use are the caller's to check
    /// with [`Safetensors::finish`].
    ///
    /// # Errors
    /// When the model type is not known, or a tensor is missing or misshapen.
    pub fn from_safetensors(
        config: &serde_json::Value,
        file: &Safetensors,
        prefix: &str,
        format: impl Into<FrozenFormat>,
    ) -> Result<Self> {
        let format: FrozenFormat = format.into();
        // What is stored in few bits is what would be rounded to them, in its keys and values too.
        let quantization = format.quantization.or(file.quantization());
        let format = FrozenFormat { quantization, ..format };
        match Config::from_hugging_face(config)? {
            Config::Llama(config) => Llama::from_safetensors(config, file, prefix, format).map(Self::Llama),
            Config::Opt(config) => Opt::from_safetensors(config, file, prefix, format).map(Self::Opt),
            Config::T5(config) => T5::from_safetensors(config, file, prefix, format).map(Self::T5),
        }
    }

    /// A model of these sizes (a Hugging Face `config.json`) whose weights are drawn.
    ///
    /// # Errors
    /// When the model type is not known or a size is wrong.
    pub fn random(
        config: &serde_json::Value,
        weights: RandomWeights,
        format: impl Into<FrozenFormat>,
    ) -> Result<Self> {
        let (file, format) = (File::Random(weights), format.into());
        match Config::from_hugging_face(config)? {
            Config::Llama(config) => Llama::load(config, &file, format).map(Self::Llama),
            Config::Opt(config) => Opt::load(config, &file, format).map(Self::Opt),
            Config::T5(config) => T5::load(config, &file, format).map(Self::T5),
        }
    }

    /// Loads a model with its tokenizer from a GGUF file, or from a Hugging Face folder with `config.json`,
    /// a tokenizer ([`LanguageTokenizer::from_folder`]) and one or more `.safetensors` files.
    ///
    /// # Errors
    /// When a file is missing or is not what its name says; those of [`from_gguf`](Self::from_gguf) and
    /// [`from_safetensors`](Self::from_safetensors).
    pub fn open(
        path: impl AsRef<Path>,
        format: impl Into<FrozenFormat>,
    ) -> Result<(Self, LanguageTokenizer)> {
        let path = path.as_ref();
        if !path.is_dir() {
            let file = Gguf::open(path)?;
            return Ok((Self::from_gguf(&file, format)?, LanguageTokenizer::from_gguf(&file)?));
        }
        let config_path = path.join("config.json");
        let config = crate::small_file::read(&config_path)
            .map_err(|source| Error::Io { path: config_path.clone(), source })?;
        let config = serde_json::from_slice(&config)
            .map_err(|e| Error::File { path: config_path.clone(), reason: format!("is not JSON: {e}") })?;
        let file = Safetensors::open_files(&weight_files(path)?)?;
        let in_folder = |error: Error| error.in_folder(path);
        let model = Self::from_safetensors(&config, &file, "", format).map_err(in_folder)?;
        file.finish().map_err(in_folder)?;
        Ok((model, LanguageTokenizer::from_folder(path)?))
    }

    /// Width of an embedding.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Llama(model) => model.config().hidden_size,
            Self::Opt(model) => model.config().word_embed_proj_dim,
            Self::T5(model) => model.config().d_model,
        }
    }

    /// Tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Llama(model) => model.config().vocab_size,
            Self::Opt(model) => model.config().vocab_size,
            Self::T5(model) => model.config().vocab_size,
        }
    }

    /// The longest text, in tokens.
    pub fn context_len(&self) -> usize {
        match self {
            Self::Llama(model) => model.config().max_position_embeddings,
            Self::Opt(model) => model.config().max_position_embeddings,
            Self::T5(model) => model.context_len(),
        }
    }

    /// How many parameters it has; a tied output head counts once.
    pub fn n_parameters(&self) -> usize {
        match self {
            Self::Llama(model) => model.n_parameters(),
            Self::Opt(model) => model.n_parameters(),
            Self::T5(model) => model.n_parameters(),
        }
    }

    /// Memory of its weights, in bytes.
    pub fn n_bytes(&self) -> usize {
        match self {
            Self::Llama(model) => model.n_bytes(),
            Self::Opt(model) => model.n_bytes(),
            Self::T5(model) => model.n_bytes(),
        }
    }

    /// The embeddings of tokens, `[ids.len(), hidden_size]`.
    ///
    /// # Errors
    /// When a token is not in the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Llama(model) => model.embed(ids),
            Self::Opt(model) => model.embed(ids),
            Self::T5(model) => model.embed(ids),
        }
    }

    /// Reads texts of `lengths` tokens whose embeddings are packed in `embeds`, `[sum of lengths, hidden_size]`; gives
    /// the final hidden states (normed, ready for the head) in the same shape. Differentiable to `embeds`.
    ///
    /// # Errors
    /// When the lengths do not sum to the rows, or a text is longer than the context; of an encoder-decoder model, which reads no
    /// single texts, always.
    pub fn forward(&self, embeds: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        if let Self::T5(_) = self {
            return Err(no_single_text());
        }
        let alone = |&shared: &usize| Branched { shared, continuations: Vec::new() };
        self.forward_branched(embeds, &lengths.iter().map(alone).collect::<Vec<_>>())
    }

    /// As [`forward`](Self::forward), for texts that share their beginnings: each of `texts` is a beginning of `shared`
    /// rows and its `continuations`, one after the other, each of which sees the beginning and itself. Every row equals
    /// that of the same text read alone; the beginning is computed once.
    ///
    /// An encoder-decoder model reads the beginnings with its encoder and the continuations, which begin with
    /// [`decoder_start`](Self::decoder_start), with its decoder. Its rows of beginnings are what the encoder gives, which is
    /// nothing for the head.
    ///
    /// # Errors
    /// When the rows are not those of the texts, or a text is longer than the context.
    pub fn forward_branched(&self, embeds: &Tensor, texts: &[Branched]) -> Result<Tensor> {
        let (positions, plan) = branched_texts(texts);
        awake(|| match self {
            Self::Llama(model) => model.forward(embeds, &positions, &plan),
            Self::Opt(model) => model.forward(embeds, &positions, &plan),
            Self::T5(model) => model.forward(embeds, texts),
        })
    }

    /// As [`forward`](Self::forward), for rows that continue texts of a cache: `sequences[i]` is lengthened by
    /// `lengths[i]` rows of `embeds`, `[sum of lengths, hidden_size]`, of which the hidden states come back in the same shape. A
    /// model in few bits attends to keys and values in bf16 here. No gradient.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and when a sequence is not of this cache; then nothing has changed.
    pub fn forward_cached(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
    ) -> Result<Tensor> {
        awake(|| match self {
            Self::Llama(model) => model.forward_cached(embeds, cache, sequences, lengths),
            Self::Opt(model) => model.forward_cached(embeds, cache, sequences, lengths),
            Self::T5(model) => model.forward_cached(embeds, cache, sequences, lengths),
        })
    }

    /// Reads prompts into a cache, the rows of each packed after the other: `sequences[i]` is lengthened by its
    /// `lengths[i]` rows (of an encoder-decoder model: it must be new, the encoder reads the rows and the decoder begins).
    /// Gives the hidden states that the next tokens come from, `[prompts, hidden_size]`. No gradient.
    ///
    /// # Errors
    /// As [`forward_cached`](Self::forward_cached).
    pub fn read_prompts(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
    ) -> Result<Tensor> {
        if let Self::T5(model) = self {
            return awake(|| model.begin(embeds, cache, sequences, lengths));
        }
        let hidden = self.forward_cached(embeds, cache, sequences, lengths)?;
        let ends = lengths.iter().scan(0, |end, len| {
            *end += len;
            Some(*end as u32 - 1)
        });
        let last_rows = Tensor::from_vec(ends.collect::<Vec<_>>(), lengths.len(), hidden.device())?;
        Ok(hidden.index_select(&last_rows, 0)?)
    }

    /// Whether a prompt can only be read as a whole: it cannot be continued by another turn, as an encoder sees all of it
    /// at once.
    pub fn reads_prompts_whole(&self) -> bool {
        matches!(self, Self::T5(_))
    }

    /// The token that the decoder of an encoder-decoder model begins with.
    pub fn decoder_start(&self) -> Option<u32> {
        match self {
            Self::T5(model) => Some(model.config().decoder_start_token_id),
            Self::Llama(_) | Self::Opt(_) => None,
        }
    }

    /// Scores of every next token, `[N, vocab_size]`, after the given rows of hidden states.
    ///
    /// # Errors
    /// When the width is not that of the model.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.head().forward(hidden)?)
    }

    /// [`logits`](Self::logits) of rows that need no gradient, in place of what is in `into`.
    pub(crate) fn logits_into(&self, hidden: &Tensor, into: &mut Vec<f32>) -> Result<()> {
        Ok(self.head().forward_into(hidden, into)?)
    }

    /// The output head, for a loss that never holds all logits
    /// ([`linear_cross_entropy`](crate::layers::linear_cross_entropy)).
    pub fn head(&self) -> &Linear {
        match self {
            Self::Llama(model) => model.head(),
            Self::Opt(model) => model.head(),
            Self::T5(model) => model.head(),
        }
    }

    /// The matrices that a row of a prompt passes, without the head.
    pub fn prompt_matrices(&self) -> MatrixSize {
        match self {
            Self::Llama(model) => model.matrices(),
            Self::Opt(model) => model.matrices(),
            Self::T5(model) => model.prompt_matrices(),
        }
    }

    /// The matrices that a generated token passes, without the head.
    pub fn answer_matrices(&self) -> MatrixSize {
        match self {
            Self::Llama(model) => model.matrices(),
            Self::Opt(model) => model.matrices(),
            Self::T5(model) => model.answer_matrices(),
        }
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> KvCache {
        match self {
            Self::Llama(model) => model.new_cache(),
            Self::Opt(model) => model.new_cache(),
            Self::T5(model) => model.new_cache(),
        }
    }
}

/// The `.safetensors` files of a language model's folder, sorted.
///
/// # Errors
/// When there are none, or the folder cannot be read.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { path: folder.into(), source };
    let entries = std::fs::read_dir(folder).map_err(io)?;
    let mut files =
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>().map_err(io)?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    if files.is_empty() {
        let reason = "holds no .safetensors file: give a language model's folder or a GGUF file".into();
        return Err(Error::File { path: folder.into(), reason });
    }
    Ok(files)
}

fn no_single_text() -> Error {
    Error::Request(
        "an encoder-decoder model does not read prompt and answer as one text: give it the prompt and what its decoder reads".into(),
    )
}

/// Texts with one beginning, as numbers of rows; packed in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branched {
    /// Rows of the beginning, at least one.
    pub shared: usize,
    /// Rows of each continuation.
    pub continuations: Vec<usize>,
}

impl Branched {
    /// Rows of the beginning and all continuations.
    pub fn n_rows(&self) -> usize {
        self.shared + self.continuations.iter().sum::<usize>()
    }
}

/// Attention and positions of decoder-only models: a beginning sees what came before in it, a continuation also the whole
/// beginning, from which its positions count on.
fn branched_texts(texts: &[Branched]) -> (Arc<[u32]>, Plan) {
    let (mut start, mut plan, mut positions) = (0, Vec::new(), Vec::new());
    for text in texts {
        let shared = Span { start, len: text.shared };
        plan.push(Sequence { queries: vec![shared], keys: vec![shared], causal: true });
        positions.extend(0..text.shared as u32);
        start += text.shared;
        for &len in &text.continuations {
            let own = Span { start, len };
            plan.push(Sequence { queries: vec![own], keys: vec![shared, own], causal: true });
            positions.extend(text.shared as u32..(text.shared + len) as u32);
            start += len;
        }
    }
    (positions.into(), plan.into())
}
