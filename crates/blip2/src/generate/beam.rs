//! Beam search, with the rules of transformers' `GenerationMixin._beam_search`.
//!
//! Each step looks at the best `max(2, 1 + end tokens) · num_beams` continuations of a prompt's beams. Those among the
//! first `num_beams` that are complete may enter the list of finished texts; the best incomplete ones are the next
//! beams. A search that samples draws that many continuations, without putting back, by the probabilities of the texts that
//! they make, and goes on with them in the same way: transformers' beam sampling, with random numbers of our own.
//!
//! Where rules leave fewer texts than are to be returned, transformers fills up with texts of beams that never were, whose
//! logarithm of a probability is -10⁹: copies of what was found, or nothing but padding, as its sorting of equals has it.
//! Here they are copies of the best.

use std::cmp::Ordering;

use super::constraint::{self, Constraint};
use super::{
    EarlyStopping, Event, FinishReason, Generation, GenerationConfig, OnEvent, Rules, no_token, normalised,
};
use crate::Result;
use crate::sampling::{SampleRng, log_sum_exp};

/// What stands for the logarithm of the probability of a text that was not found.
const NOT_FOUND: f32 = -1e9;

/// An unfinished text.
#[derive(Debug, Clone)]
pub(super) struct Beam {
    /// Row of the last logits that belongs to it: its own, or its parent's while its last token is not read.
    pub(super) row: usize,
    pub(super) tokens: Vec<u32>,
    log_probs: Vec<f32>,
    /// Sum of the log-probabilities after penalties, and after temperature and filters where it samples.
    sum: f32,
    constraint: Option<Box<dyn Constraint>>,
}

/// A beam and the token that may follow it.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// By which it is chosen, the larger the better: its sum, or by chance.
    key: f64,
    sum: f32,
    beam: usize,
    token: u32,
    log_prob: f32,
}

impl Candidate {
    /// Best first; of equals the earlier beam, then the smaller token.
    fn rank(&self, other: &Self) -> Ordering {
        other.key.total_cmp(&self.key).then((self.beam, self.token).cmp(&(other.beam, other.token)))
    }
}

/// The search of one prompt.
pub(super) struct Search {
    /// The unfinished texts, best first; none when the search is over.
    pub(super) beams: Vec<Beam>,
    /// Best first, at most `num_beams`.
    finished: Vec<Generation>,
    /// Where it samples.
    rng: Option<SampleRng>,
}

impl Search {
    /// A search that starts from one row of logits.
    pub(super) fn new(
        config: &GenerationConfig,
        row: usize,
        constraint: Option<Box<dyn Constraint>>,
    ) -> Self {
        let empty = Beam { row, tokens: Vec::new(), log_probs: Vec::new(), sum: 0.0, constraint };
        let rng = config.do_sample.then(|| SampleRng::new(config.seed, 0));
        Self { beams: vec![empty], finished: Vec::new(), rng }
    }

    /// [`advance`](Self::advance)s and tells of the best beam; once `is_cancelled`, beams that have tokens end as they are.
    pub(super) fn step(
        &mut self,
        logits: &[f32],
        vocab_size: usize,
        rules: &Rules<'_>,
        on_event: OnEvent<'_>,
        is_cancelled: &mut bool,
    ) -> Result<()> {
        if *is_cancelled && self.beams.iter().all(|beam| !beam.tokens.is_empty()) {
            self.cancel(rules.config);
            return Ok(());
        }
        self.advance(logits, vocab_size, rules)?;
        if let Some(best) = self.beams.first() {
            let event = Event::BestBeam { prompt: rules.prompt, token_ids: &best.tokens };
            *is_cancelled |= on_event(event).is_break();
        }
        Ok(())
    }

    /// The best finished texts, as many as are to be returned.
    pub(super) fn into_texts(self, config: &GenerationConfig) -> Vec<Generation> {
        let mut texts = self.finished;
        texts.truncate(config.num_return_sequences);
        if let Some(best) = texts.first() {
            let score = normalised(NOT_FOUND, best.token_ids.len(), config.length_penalty);
            let copy = Generation { score, ..best.clone() };
            texts.resize(config.num_return_sequences, copy);
        }
        texts
    }

    /// Takes the beams one token further, or ends the search by leaving none.
    fn advance(&mut self, logits: &[f32], vocab_size: usize, rules: &Rules<'_>) -> Result<()> {
        let config = rules.config;
        let candidates = self.candidates(logits, vocab_size, rules)?;
        if candidates.is_empty() {
            if self.finished.is_empty() {
                return Err(no_token());
            }
            self.beams.clear();
            return Ok(());
        }
        let is_full = self.finished.len() == config.num_beams;
        let takes_more = !(is_full && config.early_stopping == EarlyStopping::Immediate);
        let mut next = Vec::with_capacity(config.num_beams);
        for (rank, candidate) in candidates.iter().enumerate() {
            let beam = self.extended(candidate)?;
            match rules.finish(&beam.tokens)? {
                None if next.len() < config.num_beams => next.push(beam),
                Some(finish) if rank < config.num_beams && takes_more => self.complete(beam, finish, config),
                _ => {}
            }
        }
        self.beams = if self.can_improve(&next, rules) { next } else { Vec::new() };
        Ok(())
    }

    /// The best continuations, or those that were drawn; best first.
    fn candidates(&mut self, logits: &[f32], vocab_size: usize, rules: &Rules<'_>) -> Result<Vec<Candidate>> {
        let n = rules.config.num_beams * (1 + rules.stop.end_tokens().len()).max(2);
        // Kept best first; most tokens are turned away by one comparison with the last.
        let mut best: Vec<Candidate> = Vec::with_capacity(n + 1);
        let mut scores = Vec::with_capacity(vocab_size);
        for (beam_idx, beam) in self.beams.iter_mut().enumerate() {
            let row = &logits[beam.row * vocab_size..][..vocab_size];
            let norm = log_sum_exp(row);
            scores.clear();
            scores.extend(row.iter().map(|logit| logit - norm));
            rules.penalise(&beam.tokens, &mut scores);
            constraint::restrict(beam.constraint.as_mut(), row, norm, &mut scores)?;
            if self.rng.is_some() {
                rules.filter(&mut scores);
            }
            for (token, &score) in (0..).zip(&scores) {
                let sum = beam.sum + score;
                if sum == f32::NEG_INFINITY || sum.is_nan() {
                    continue;
                }
                let key = f64::from(sum) + self.rng.as_mut().map_or(0.0, SampleRng::next_gumbel);
                let is_better = best.len() < n || best.last().is_some_and(|last| key > last.key);
                if !is_better {
                    continue;
                }
                let log_prob = row[token as usize] - norm;
                let candidate = Candidate { key, sum, beam: beam_idx, token, log_prob };
                let at = best.partition_point(|other| other.rank(&candidate) == Ordering::Less);
                best.insert(at, candidate);
                best.truncate(n);
            }
        }
        if self.rng.is_some() {
            best.iter_mut().for_each(|drawn| drawn.key = drawn.sum.into());
            best.sort_by(Candidate::rank);
        }
        Ok(best)
    }

    fn extended(&self, candidate: &Candidate) -> Result<Beam> {
        let mut beam = self.beams[candidate.beam].clone();
        beam.tokens.push(candidate.token);
        beam.log_probs.push(candidate.log_prob);
        beam.sum = candidate.sum;
        constraint::push(beam.constraint.as_mut(), candidate.token)?;
        Ok(beam)
    }

    /// Enters a complete text into the list of finished ones, if it is good enough.
    fn complete(&mut self, beam: Beam, finish: FinishReason, config: &GenerationConfig) {
        let score = normalised(beam.sum, beam.tokens.len(), config.length_penalty);
        let text = Generation { token_ids: beam.tokens, log_probs: beam.log_probs, score, finish };
        let at = self.finished.partition_point(|other| other.score >= score);
        self.finished.insert(at, text);
        self.finished.truncate(config.num_beams);
    }

    /// Whether going on with `next` can change the list of finished texts.
    fn can_improve(&self, next: &[Beam], rules: &Rules<'_>) -> bool {
        let config = rules.config;
        let Some(best) = next.first() else { return false };
        if self.finished.len() < config.num_beams {
            return true;
        }
        let len = match config.early_stopping {
            EarlyStopping::Immediate => return false,
            EarlyStopping::Never if config.length_penalty > 0.0 => rules.limit.n_tokens,
            EarlyStopping::Never | EarlyStopping::Heuristic => best.tokens.len(),
        };
        let worst = self.finished.last().map_or(f32::NEG_INFINITY, |text| text.score);
        normalised(best.sum, len, config.length_penalty) > worst
    }

    /// Ends all beams as they are.
    pub(super) fn cancel(&mut self, config: &GenerationConfig) {
        for beam in std::mem::take(&mut self.beams) {
            self.complete(beam, FinishReason::Cancelled, config);
        }
    }
}
