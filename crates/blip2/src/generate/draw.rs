//! One token after the other: greedy search and sampling.

use super::constraint::{self, Constraint};
use super::{Event, FinishReason, Generation, GenerationConfig, OnEvent, Rules, no_token, normalised};
use crate::Result;
use crate::sampling::{self, SampleRng, log_sum_exp};

/// The texts of one prompt.
pub(super) struct Draws {
    pub(super) running: Vec<Running>,
    finished: Vec<(usize, Generation)>,
}

/// A text that grows.
pub(super) struct Running {
    sequence: usize,
    /// Row of the last logits that belongs to it.
    pub(super) row: usize,
    pub(super) tokens: Vec<u32>,
    log_probs: Vec<f32>,
    rng: SampleRng,
    constraint: Option<Box<dyn Constraint>>,
}

impl Running {
    fn finish(self, finish: FinishReason, config: &GenerationConfig) -> (usize, Generation) {
        let sum = self.log_probs.iter().sum();
        let score = normalised(sum, self.tokens.len(), config.length_penalty);
        let text = Generation { token_ids: self.tokens, log_probs: self.log_probs, score, finish };
        (self.sequence, text)
    }
}

impl Draws {
    /// Texts that all start from one row of logits.
    pub(super) fn new(config: &GenerationConfig, row: usize, constraint: Option<&dyn Constraint>) -> Self {
        let running = (0..config.num_return_sequences)
            .map(|sequence| Running {
                sequence,
                row,
                tokens: Vec::new(),
                log_probs: Vec::new(),
                rng: SampleRng::new(config.seed, sequence as u64),
                constraint: constraint.map(Constraint::fork),
            })
            .collect();
        Self { running, finished: Vec::new() }
    }

    /// Gives every text one more token; once `is_cancelled`, those that have some stay as they are.
    pub(super) fn step(
        &mut self,
        logits: &[f32],
        vocab_size: usize,
        rules: &Rules<'_>,
        on_event: OnEvent<'_>,
        is_cancelled: &mut bool,
    ) -> Result<()> {
        let config = rules.config;
        let mut scores = Vec::with_capacity(vocab_size);
        for mut text in std::mem::take(&mut self.running) {
            if *is_cancelled && !text.tokens.is_empty() {
                self.finished.push(text.finish(FinishReason::Cancelled, config));
                continue;
            }
            let row = &logits[text.row * vocab_size..][..vocab_size];
            scores.clear();
            scores.extend_from_slice(row);
            rules.penalise(&text.tokens, &mut scores);
            constraint::restrict(text.constraint.as_mut(), row, 0.0, &mut scores)?;
            let token = choose(rules, &mut scores, &mut text.rng).ok_or_else(no_token)?;
            let log_prob = row[token as usize] - log_sum_exp(row);
            constraint::push(text.constraint.as_mut(), token)?;
            text.tokens.push(token);
            text.log_probs.push(log_prob);
            let (prompt, sequence) = (rules.prompt, text.sequence);
            let event = Event::Token { prompt, sequence, token, log_prob, logits: row };
            *is_cancelled |= on_event(event).is_break();
            match rules.finish(&text.tokens)? {
                Some(finish) => self.finished.push(text.finish(finish, config)),
                None => self.running.push(text),
            }
        }
        Ok(())
    }

    /// Ends all texts as they are.
    pub(super) fn cancel(&mut self, config: &GenerationConfig) {
        let running = std::mem::take(&mut self.running).into_iter();
        self.finished.extend(running.map(|text| text.finish(FinishReason::Cancelled, config)));
    }

    /// The row of the only text, where there was one from the start and it is not complete.
    pub(super) fn only_row(&self) -> Option<usize> {
        match &self.running[..] {
            [text] if self.finished.is_empty() => Some(text.row),
            _ => None,
        }
    }

    pub(super) fn into_texts(mut self) -> Vec<Generation> {
        self.finished.sort_by_key(|(sequence, _)| *sequence);
        self.finished.into_iter().map(|(_, text)| text).collect()
    }
}

fn choose(rules: &Rules<'_>, scores: &mut [f32], rng: &mut SampleRng) -> Option<u32> {
    if !rules.config.do_sample {
        return sampling::argmax(scores);
    }
    rules.filter(scores);
    sampling::draw(scores, rng)
}
