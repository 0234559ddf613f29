//! A language model in the middle of a text.

use candle_core::Tensor;

use super::{Continuation, Decoder};
use crate::cache::{CachedSequence, KvCache};
use crate::language::LanguageModel;
use crate::{Error, Result};

/// A language model that has read prompts into a cache, as the [`Decoder`] of [`generate`](super::generate).
///
/// What is generated is forgotten when the session ends: the cache then holds what it held before and the prompts, which
/// [`finish`](Self::finish) hands back for the next turn of a conversation.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a LanguageModel,
    cache: &'a mut KvCache,
    prompts: Vec<CachedSequence>,
    live: Vec<CachedSequence>,
    prompt_logits: Vec<f32>,
    /// After the last tokens that were read.
    logits: Vec<f32>,
    /// Rows of the cache that stay.
    n_kept_rows: usize,
}

impl<'a> Session<'a> {
    /// Reads prompts: to each text of `cache` (new, or the earlier turns of a conversation) the rows of embeddings that
    /// follow it, `[n, hidden_size]`, at least one.
    ///
    /// # Errors
    /// [`Error::TextTooLong`] when a text does not fit the model's context, [`Error::Request`] when there is nothing to
    /// read or the text is not of this cache.
    pub fn new(
        model: &'a LanguageModel,
        cache: &'a mut KvCache,
        prompts: Vec<(CachedSequence, Tensor)>,
    ) -> Result<Self> {
        let (mut sequences, embeds): (Vec<_>, Vec<_>) = prompts.into_iter().unzip();
        let prompt_logits = read_prompts(model, cache, &mut sequences, &embeds)?;
        Ok(Self {
            model,
            n_kept_rows: cache.n_rows(),
            cache,
            live: sequences.clone(),
            prompts: sequences,
            prompt_logits,
            logits: Vec::new(),
        })
    }

    /// Ends the session; gives the prompts as the cache holds them.
    pub fn finish(mut self) -> Vec<CachedSequence> {
        std::mem::take(&mut self.prompts)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.cache.rewind(self.n_kept_rows);
    }
}

impl Decoder for Session<'_> {
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn n_prompts(&self) -> usize {
        self.prompts.len()
    }

    fn room(&self, prompt: usize) -> usize {
        self.model.context_len() - self.prompts[prompt].len()
    }

    /// Also returns to the prompts, when something was generated before.
    fn prompt_logits(&mut self) -> Result<&[f32]> {
        self.cache.rewind(self.n_kept_rows);
        self.live.clone_from(&self.prompts);
        Ok(&self.prompt_logits)
    }

    fn extend(&mut self, continuations: &[Continuation<'_>]) -> Result<&[f32]> {
        extend(self.model, self.cache, &mut self.live, continuations, &mut self.logits)?;
        Ok(&self.logits)
    }
}

/// Replaces the texts `live` of a cache by `continuations`, and `logits` by those after every new token. When the model fails the
/// texts are as before.
pub(super) fn extend(
    model: &LanguageModel,
    cache: &mut KvCache,
    live: &mut Vec<CachedSequence>,
    continuations: &[Continuation<'_>],
    logits: &mut Vec<f32>,
) -> Result<()> {
    let mut next: Vec<_> = continuations.iter().map(|c| live[c.parent].clone()).collect();
    let lengths: Vec<_> = continuations.iter().map(|c| c.tokens.len()).collect();
    let tokens: Vec<u32> = continuations.iter().flat_map(|c| c.tokens).copied().collect();
    if tokens.is_empty() {
        logits.clear();
    } else {
        let embeds = model.embed(&tokens)?;
        let hidden = model.forward_cached(&embeds, cache, &mut next, &lengths)?;
        model.logits_into(&hidden, logits)?;
    }
    *live = next;
    Ok(())
}

/// Reads prompts: lengthens each of `sequences` by its rows of embeddings; gives the logits after each,
/// `[prompts, vocab_size]`. When the model fails nothing has changed.
pub(super) fn read_prompts(
    model: &LanguageModel,
    cache: &mut KvCache,
    sequences: &mut [CachedSequence],
    embeds: &[Tensor],
) -> Result<Vec<f32>> {
    let lengths = embeds.iter().map(|rows| Ok(rows.dims2()?.0)).collect::<Result<Vec<_>>>()?;
    if lengths.is_empty() {
        return Err(no_prompt());
    }
    for (sequence, &len) in sequences.iter().zip(&lengths) {
        check_length(model, sequence, len)?;
    }
    let (n_rows, n_memory_rows) = (cache.n_rows(), cache.n_memory_rows());
    let embeds = Tensor::cat(embeds, 0)?.detach();
    let mut logits = Vec::new();
    model
        .read_prompts(&embeds, cache, sequences, &lengths)
        .and_then(|hidden| model.logits_into(&hidden, &mut logits))
        .inspect_err(|_| {
            cache.rewind(n_rows);
            cache.rewind_memory(n_memory_rows);
        })?;
    Ok(logits)
}

/// Whether a text can be lengthened by the `n_rows` rows of a prompt.
pub(super) fn check_length(model: &LanguageModel, sequence: &CachedSequence, n_rows: usize) -> Result<()> {
    if n_rows == 0 {
        return Err(no_prompt());
    }
    let (n_tokens, limit) = (sequence.len() + n_rows, model.context_len());
    if n_tokens > limit { Err(Error::TextTooLong { n_tokens, limit }) } else { Ok(()) }
}

fn no_prompt() -> Error {
    Error::Request("there is no prompt to continue".into())
}
