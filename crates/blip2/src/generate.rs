//! Text generation: the loop between a language model and a list of tokens.
//!
//! [`generate`] continues a batch of prompts greedily, by beam search, by sampling or by both; [`score`] says how likely given
//! answers are. Both work on anything that is a [`Decoder`]; the real one is [`Session`], a language model with its
//! key-value cache. [`Batch`] is the same loop driven by the caller, for prompts that come and go between tokens.
//! Configuration and results mean what they mean in Hugging Face transformers. Nothing here knows words: prompts come as
//! rows of embeddings, results leave as token ids, and what a text has to be is a [`Constraint`].
//!
//! A prompt's result does not depend on the prompts beside it.

mod batch;
mod beam;
mod config;
mod constraint;
mod draw;
mod growth;
mod session;
mod stop;

use std::ops::ControlFlow;

pub use batch::{Batch, Finished, Newcomer, PROMPT_ROWS_A_STEP};
pub use config::{EarlyStopping, GenerationConfig};
pub use constraint::Constraint;
pub use session::Session;
pub use stop::StopRules;

use self::growth::{Growth, Rules};
use crate::sampling::log_sum_exp;
use crate::{Error, Result};

/// What the loops need of a language model that has read its prompts.
///
/// A decoder holds *live* texts, numbered from 0: at first the prompts, then the continuations of the last
/// [`extend`](Self::extend).
pub trait Decoder {
    /// Tokens of the vocabulary: the length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// How many prompts were read.
    fn n_prompts(&self) -> usize;

    /// How many tokens may follow a prompt before the model's context is full.
    fn room(&self, prompt: usize) -> usize;

    /// The logits after each prompt, `[n_prompts, vocab_size]`.
    ///
    /// # Errors
    /// When the model fails.
    fn prompt_logits(&mut self) -> Result<&[f32]>;

    /// Replaces the live texts by `continuations`; gives the logits after every new token,
    /// `[sum of the lengths, vocab_size]`.
    ///
    /// # Errors
    /// When the model fails.
    fn extend(&mut self, continuations: &[Continuation<'_>]) -> Result<&[f32]>;
}

/// A live text and the tokens that come after it; none leaves it as it is.
#[derive(Debug, Clone, Copy)]
pub struct Continuation<'a> {
    /// Number of the live text.
    pub parent: usize,
    /// What follows it.
    pub tokens: &'a [u32],
}

/// What to generate after the prompts of a [`Decoder`].
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// How.
    pub config: &'a GenerationConfig,
    /// When a text is complete.
    pub stop: &'a StopRules<'a>,
    /// For each prompt, tokens that the rules of the configuration see before the generated ones, and that its lengths
    /// count. Empty: they see generated tokens only.
    pub seen: &'a [Vec<u32>],
    /// What every text has to be, from its first token on.
    pub constraint: Option<&'a dyn Constraint>,
}

/// A generated text.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Its tokens; with the end token, if it ended with one.
    pub token_ids: Vec<u32>,
    /// The natural logarithm of each token's probability, as the model gave it (before penalties and filters).
    pub log_probs: Vec<f32>,
    /// By which beam search ranks: the summed log-probabilities after penalties (and, where it samples, after temperature and
    /// filters), divided by `len^length_penalty`. Without beams the same of the model's own log-probabilities.
    pub score: f32,
    /// Why it ends where it does.
    pub finish: FinishReason,
}

/// Why a text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model said so.
    EndOfText,
    /// A stop string appeared.
    StopString,
    /// `max_new_tokens` were generated.
    MaxNewTokens,
    /// The model's context is full.
    ContextFull,
    /// The callback asked to stop.
    Cancelled,
}

/// Progress, as it happens.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Greedy search or sampling chose a token; it stays.
    Token {
        /// Number of the prompt.
        prompt: usize,
        /// Which of its returned sequences.
        sequence: usize,
        /// The token.
        token: u32,
        /// Its log-probability.
        log_prob: f32,
        /// The model's scores of every token in this place, before penalties and filters.
        logits: &'a [f32],
    },
    /// Beam search took a step; this is its best unfinished text, which later steps may replace by another.
    BestBeam {
        /// Number of the prompt.
        prompt: usize,
        /// All its tokens so far.
        token_ids: &'a [u32],
    },
}

/// Receives every [`Event`]; `Break` ends all texts where they are.
pub type OnEvent<'a> = &'a mut dyn FnMut(Event<'_>) -> ControlFlow<()>;

/// Continues every prompt of `decoder`: for each prompt `num_return_sequences` texts, the best first where beams rank
/// them. Where fewer are possible, the last are copies of the best, with a score below any.
///
/// # Errors
/// [`Error::Config`] when the configuration contradicts itself, [`Error::TextTooLong`] when a prompt leaves no room,
/// [`Error::Request`] when the model's scores are not numbers, or those of the decoder and of the stop rules.
pub fn generate<D: Decoder + ?Sized>(
    decoder: &mut D,
    request: Request<'_>,
    on_event: OnEvent<'_>,
) -> Result<Vec<Vec<Generation>>> {
    check(request.config, request.stop)?;
    let limits = (0..decoder.n_prompts())
        .map(|prompt| Limit::new(request.config, request.seen(prompt).len(), decoder.room(prompt)))
        .collect::<Result<Vec<_>>>()?;
    let vocab_size = decoder.vocab_size();
    let rules = |prompt: usize| Rules {
        prompt,
        config: request.config,
        stop: request.stop,
        seen: request.seen(prompt),
        limit: limits[prompt],
    };
    let mut texts: Vec<_> = (0..limits.len())
        .map(|prompt| Growth::new(request.config, prompt, request.constraint.map(Constraint::fork)))
        .collect();
    let mut logits = decoder.prompt_logits()?;
    let mut is_cancelled = false;
    loop {
        for (prompt, growth) in texts.iter_mut().enumerate().filter(|(_, growth)| growth.n_running() > 0) {
            growth.step(logits, vocab_size, &rules(prompt), on_event, &mut is_cancelled)?;
        }
        if is_cancelled {
            texts.iter_mut().for_each(|growth| growth.cancel(request.config));
        }
        let unread: Vec<_> = texts.iter().flat_map(Growth::unread).collect();
        if unread.is_empty() {
            break;
        }
        logits = decoder.extend(&unread)?;
        place(&mut texts);
    }
    Ok(texts.into_iter().map(|growth| growth.into_texts(request.config)).collect())
}

/// Checks a configuration, alone and against what ends a text.
fn check(config: &GenerationConfig, stop: &StopRules<'_>) -> Result<()> {
    config.validate()?;
    if !config.stop_strings.is_empty() && !stop.can_decode() {
        let reason = "needs a tokenizer to decode the text with";
        return Err(Error::Config { field: "generation.stop_strings".into(), reason: reason.into() });
    }
    Ok(())
}

/// After their last tokens were read together, the running texts have their rows in this order.
fn place<'a>(texts: impl IntoIterator<Item = &'a mut Growth>) {
    let mut row = 0;
    for growth in texts {
        growth.place(row);
        row += growth.n_running();
    }
}

/// How long a prompt's continuation may get, and what it means to get there.
#[derive(Debug, Clone, Copy)]
struct Limit {
    n_tokens: usize,
    reason: FinishReason,
}

impl Limit {
    fn new(config: &GenerationConfig, n_seen: usize, room: usize) -> Result<Self> {
        if room == 0 {
            let reason =
                "the prompt leaves no room for an answer in the language model's context: shorten it";
            return Err(Error::Request(reason.into()));
        }
        let wanted = match config.max_length {
            Some(max_length) => max_length.saturating_sub(n_seen),
            None => config.max_new_tokens,
        };
        if wanted == 0 {
            return Err(Error::Config {
                field: "generation.max_length".into(),
                reason: format!("leaves no room for an answer: the prompt has {n_seen} tokens"),
            });
        }
        Ok(if room < wanted {
            Self { n_tokens: room, reason: FinishReason::ContextFull }
        } else {
            Self { n_tokens: wanted, reason: FinishReason::MaxNewTokens }
        })
    }
}

impl Request<'_> {
    fn seen(&self, prompt: usize) -> &[u32] {
        self.seen.get(prompt).map_or(&[], Vec::as_slice)
    }
}

/// `sum / len^length_penalty`.
fn normalised(sum: f32, len: usize, length_penalty: f32) -> f32 {
    sum / (len as f32).powf(length_penalty)
}

fn no_token() -> Error {
    Error::Request("the language model gave no usable score for any next token".into())
}

/// How likely an answer is after a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerScore {
    /// The natural logarithm of each token's probability, given the prompt and the tokens before it.
    pub log_probs: Vec<f32>,
}

impl AnswerScore {
    /// The logarithm of the whole answer's probability.
    pub fn log_likelihood(&self) -> f32 {
        self.log_probs.iter().sum()
    }
}

/// Scores `answers` (each at least one token, with its end token if the end shall count) as continuations of the only
/// prompt of `decoder`, which is read once for all of them.
///
/// # Errors
/// [`Error::Request`] when an answer is empty, does not fit the context or has a token outside the vocabulary, or when
/// there is not exactly one prompt; else those of the decoder.
pub fn score<D: Decoder + ?Sized>(decoder: &mut D, answers: &[Vec<u32>]) -> Result<Vec<AnswerScore>> {
    // A row of logits is some 200 kB: answers go through the model in groups of about this many tokens.
    const ROWS_AT_A_TIME: usize = 64;
    if decoder.n_prompts() != 1 {
        return Err(Error::Request(format!(
            "answers are scored after one prompt, not {}",
            decoder.n_prompts()
        )));
    }
    let (vocab_size, room) = (decoder.vocab_size(), decoder.room(0));
    for answer in answers {
        if answer.is_empty() {
            return Err(Error::Request("an answer to be scored is empty".into()));
        }
        if answer.len() > room {
            return Err(Error::TextTooLong { n_tokens: answer.len(), limit: room });
        }
        if let Some(token) = answer.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(Error::Request(format!("token {token} is not in the vocabulary of {vocab_size}")));
        }
    }
    let log_prob = |row: &[f32], token: u32| row[token as usize] - log_sum_exp(row);
    let after_prompt = decoder.prompt_logits()?.to_vec();
    let mut scores = Vec::with_capacity(answers.len());
    let mut rest = answers;
    while !rest.is_empty() {
        let mut n_rows = 0;
        let n = rest.iter().take_while(|answer| {
            let is_first = n_rows == 0;
            n_rows += answer.len();
            is_first || n_rows <= ROWS_AT_A_TIME
        });
        let (group, later) = rest.split_at(n.count());
        // Text 0 stays the prompt, for the groups to come.
        let prompt = Continuation { parent: 0, tokens: &[] };
        let continuations: Vec<_> = std::iter::once(prompt)
            .chain(group.iter().map(|answer| Continuation { parent: 0, tokens: &answer[..answer.len() - 1] }))
            .collect();
        let logits = decoder.extend(&continuations)?;
        let mut rows = logits.chunks_exact(vocab_size);
        for answer in group {
            let mut log_probs = vec![log_prob(&after_prompt, answer[0])];
            log_probs.extend(answer[1..].iter().zip(&mut rows).map(|(&token, row)| log_prob(row, token)));
            scores.push(AnswerScore { log_probs });
        }
        rest = later;
    }
    Ok(scores)
}

#[cfg(test)]
mod tests;
