//! The texts of one prompt while they grow, however their tokens are chosen: the one definition of a step that
//! [`generate`](super::generate) and [`Batch`](super::Batch) share.

use super::beam::Search;
use super::draw::Draws;
use super::{Continuation, FinishReason, Generation, GenerationConfig, Limit, OnEvent, StopRules};
use crate::Result;

/// What holds for the texts of one prompt.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    /// By which events name the prompt.
    pub(super) prompt: usize,
    pub(super) config: &'a GenerationConfig,
    pub(super) stop: &'a StopRules<'a>,
    /// Tokens that the repetition penalty and the n-gram rule see before the generated ones.
    pub(super) seen: &'a [u32],
    pub(super) limit: Limit,
}

impl Rules<'_> {
    /// Applies the rules that hold for every way of choosing a token, in place.
    pub(super) fn penalise(&self, generated: &[u32], scores: &mut [f32]) {
        let config = self.config;
        if config.repetition_penalty != 1.0 || config.no_repeat_ngram_size > 0 {
            let tokens = [self.seen, generated].concat();
            if config.repetition_penalty != 1.0 {
                crate::sampling::repetition_penalty(scores, &tokens, config.repetition_penalty);
            }
            crate::sampling::no_repeat_ngram(scores, &tokens, config.no_repeat_ngram_size);
        }
        if generated.len() < config.min_new_tokens {
            self.stop.end_tokens().iter().for_each(|&token| crate::sampling::forbid(scores, token));
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
    pub(super) fn new(config: &GenerationConfig, row: usize) -> Self {
        if config.num_beams > 1 {
            Self::Beams(Search::new(row))
        } else {
            Self::Draws(Draws::new(config, row))
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
            Self::Beams(search) => search.into_texts(config.num_return_sequences),
        }
    }
}

fn last(parent: usize, tokens: &[u32]) -> Continuation<'_> {
    Continuation { parent, tokens: &tokens[tokens.len().saturating_sub(1)..] }
}
