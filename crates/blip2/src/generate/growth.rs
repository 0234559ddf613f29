//! The texts of one prompt while they grow, however their tokens are chosen: the one definition of a step that
//! [`generate`](super::generate) and [`Batch`](super::Batch) share.

use super::beam::Search;
use super::draw::Draws;
use super::{
    Constraint, Continuation, FinishReason, Generation, GenerationConfig, Limit, OnEvent, StopRules,
};
use crate::Result;
use crate::sampling::{
    self, forbid, no_bad_words, no_repeat_ngram, only, presence_and_frequency_penalty, repetition_penalty,
};

/// What holds for the texts of one prompt.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    /// By which events name the prompt.
    pub(super) prompt: usize,
    pub(super) config: &'a GenerationConfig,
    pub(super) stop: &'a StopRules<'a>,
    /// Tokens that the rules see before the generated ones.
    pub(super) seen: &'a [u32],
    pub(super) limit: Limit,
}

impl Rules<'_> {
    /// Applies the rules that hold for every way of choosing a token, in place and in the order of transformers; OpenAI's
    /// penalties, which see generated tokens only, among the first.
    pub(super) fn penalise(&self, generated: &[u32], scores: &mut [f32]) {
        let Self { config, seen, .. } = *self;
        let end = self.stop.end_tokens();
        let looks_back = config.repetition_penalty != 1.0
            || config.no_repeat_ngram_size > 0
            || !config.bad_words_ids.is_empty();
        if looks_back {
            let tokens = [seen, generated].concat();
            if config.repetition_penalty != 1.0 {
                repetition_penalty(scores, &tokens, config.repetition_penalty);
            }
            no_repeat_ngram(scores, &tokens, config.no_repeat_ngram_size);
            let is_end = |word: &[u32]| matches!(word, [token] if end.contains(token));
            no_bad_words(scores, &tokens, config.bad_words_ids.iter().filter(|word| !is_end(word)));
        }
        let (presence, frequency) = (config.presence_penalty, config.frequency_penalty);
        if presence != 0.0 || frequency != 0.0 {
            presence_and_frequency_penalty(scores, generated, presence, frequency);
        }
        let len = seen.len() + generated.len();
        if generated.len() < config.min_new_tokens || len < config.min_length {
            end.iter().for_each(|&token| forbid(scores, token));
        }
        if let Some(token) = config.forced_bos_token_id.filter(|_| len == 1) {
            only(scores, &[token]);
        }
        if !config.forced_eos_token_id.is_empty() && generated.len() + 1 == self.limit.n_tokens {
            only(scores, &config.forced_eos_token_id);
        }
        config.suppress_tokens.iter().for_each(|&token| forbid(scores, token));
        // A forced beginning is not the first token that the model chooses.
        let is_forced = seen.len() <= 1 && config.forced_bos_token_id.is_some();
        if generated.len() == usize::from(is_forced) {
            config.begin_suppress_tokens.iter().for_each(|&token| forbid(scores, token));
        }
    }

    /// Applies what is done to scores before a draw, in place and in the order of transformers. For beams it leaves a token that
    /// goes on beside all that end a text.
    pub(super) fn filter(&self, scores: &mut [f32]) {
        let config = self.config;
        let n_kept = if config.num_beams > 1 { 1 + self.stop.end_tokens().len() } else { 1 };
        if config.temperature != 1.0 {
            sampling::temperature(scores, config.temperature);
        }
        if config.top_k > 0 {
            sampling::top_k(scores, config.top_k.max(n_kept));
        }
        if config.top_p < 1.0 {
            sampling::top_p(scores, config.top_p, n_kept);
        }
        if config.min_p > 0.0 {
            sampling::min_p(scores, config.min_p, n_kept);
        }
    }

    /// Why a text ends with its last token, if it does.
    pub(super) fn finish(&self, tokens: &[u32]) -> Result<Option<FinishReason>> {
        let finish = self.stop.check(tokens, &self.config.stop_strings)?;
        Ok(finish.or((tokens.len() == self.limit.n_tokens).then_some(self.limit.reason)))
    }
}

/// The texts of one prompt.
pub(super) enum Growth {
    Draws(Draws),
    Beams(Search),
}

impl Growth {
    /// Texts that go on from one row of logits.
    pub(super) fn new(
        config: &GenerationConfig,
        row: usize,
        constraint: Option<Box<dyn Constraint>>,
    ) -> Self {
        if config.num_beams > 1 {
            Self::Beams(Search::new(config, row, constraint))
        } else {
            Self::Draws(Draws::new(config, row, constraint.as_deref()))
        }
    }

    /// Texts that are not complete.
    pub(super) fn n_running(&self) -> usize {
        match self {
            Self::Draws(draws) => draws.running.len(),
            Self::Beams(search) => search.beams.len(),
        }
    }

    /// Takes every running text one token further.
    pub(super) fn step(
        &mut self,
        logits: &[f32],
        vocab_size: usize,
        rules: &Rules<'_>,
        on_event: OnEvent<'_>,
        is_cancelled: &mut bool,
    ) -> Result<()> {
        match self {
            Self::Draws(draws) => draws.step(logits, vocab_size, rules, on_event, is_cancelled),
            Self::Beams(search) => search.step(logits, vocab_size, rules, on_event, is_cancelled),
        }
    }

    /// The running texts as continuations of the last ones: each text's row and its last token, if it has one.
    pub(super) fn unread(&self) -> Vec<Continuation<'_>> {
        match self {
            Self::Draws(draws) => draws.running.iter().map(|text| last(text.row, &text.tokens)).collect(),
            Self::Beams(search) => search.beams.iter().map(|beam| last(beam.row, &beam.tokens)).collect(),
        }
    }

    /// The row of the only text; `None` where there are several, or beams of one.
    pub(super) fn only_row(&self) -> Option<usize> {
        match self {
            Self::Draws(draws) => draws.only_row(),
            Self::Beams(_) => None,
        }
    }

    /// The running texts have their own rows from `first_row` on.
    pub(super) fn place(&mut self, first_row: usize) {
        match self {
            Self::Draws(draws) => {
                draws.running.iter_mut().zip(first_row..).for_each(|(text, row)| text.row = row);
            }
            Self::Beams(search) => {
                search.beams.iter_mut().zip(first_row..).for_each(|(beam, row)| beam.row = row);
            }
        }
    }

    /// Ends all texts as they are.
    pub(super) fn cancel(&mut self, config: &GenerationConfig) {
        match self {
            Self::Draws(draws) => draws.cancel(config),
            Self::Beams(search) => search.cancel(config),
        }
    }

    /// The texts, the best first where beams rank them.
    pub(super) fn into_texts(self, config: &GenerationConfig) -> Vec<Generation> {
        match self {
            Self::Draws(draws) => draws.into_texts(),
            Self::Beams(search) => search.into_texts(config),
        }
    }
}

fn last(parent: usize, tokens: &[u32]) -> Continuation<'_> {
    Continuation { parent, tokens: &tokens[tokens.len().saturating_sub(1)..] }
}
