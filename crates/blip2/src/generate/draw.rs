//! One token after the other: greedy search and sampling.

use super::{
    Continuation, Decoder, Event, FinishReason, Generation, GenerationConfig, Limit, OnEvent, Request,
    no_token, normalised,
};
use crate::Result;
use crate::sampling::{self, SampleRng, log_sum_exp};

/// A text that grows.
struct Running {
    prompt: usize,
    sequence: usize,
    /// Row of the last logits that belongs to it.
    row: usize,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
    rng: SampleRng,
}

impl Running {
    fn finish(self, finish: FinishReason, config: &GenerationConfig) -> Finished {
        let sum = self.log_probs.iter().sum();
        let score = normalised(sum, self.tokens.len(), config.length_penalty);
        let generation = Generation { token_ids: self.tokens, log_probs: self.log_probs, score, finish };
        Finished { prompt: self.prompt, sequence: self.sequence, generation }
    }
}

struct Finished {
    prompt: usize,
    sequence: usize,
    generation: Generation,
}

pub(super) fn run<D: Decoder + ?Sized>(
    decoder: &mut D,
    request: Request<'_>,
    limits: &[Limit],
    on_event: OnEvent<'_>,
) -> Result<Vec<Vec<Generation>>> {
    let (config, vocab_size) = (request.config, decoder.vocab_size());
    let mut running: Vec<Running> = (0..decoder.n_prompts())
        .flat_map(|prompt| (0..config.num_return_sequences).map(move |sequence| (prompt, sequence)))
        .map(|(prompt, sequence)| Running {
            prompt,
            sequence,
            row: prompt,
            tokens: Vec::new(),
            log_probs: Vec::new(),
            rng: SampleRng::new(config.seed, sequence as u64),
        })
        .collect();
    let mut finished = Vec::with_capacity(running.len());
    let mut logits = decoder.prompt_logits()?;
    let mut scores = Vec::with_capacity(vocab_size);
    let mut is_cancelled = false;
    while !running.is_empty() {
        let mut still_running = Vec::with_capacity(running.len());
        for mut text in running {
            if is_cancelled && !text.tokens.is_empty() {
                finished.push(text.finish(FinishReason::Cancelled, config));
                continue;
            }
            let row = &logits[text.row * vocab_size..][..vocab_size];
            scores.clear();
            scores.extend_from_slice(row);
            request.penalise(text.prompt, limits[text.prompt].n_tokens, &text.tokens, &mut scores);
            let token = choose(config, &mut scores, &mut text.rng).ok_or_else(no_token)?;
            let log_prob = row[token as usize] - log_sum_exp(row);
            text.tokens.push(token);
            text.log_probs.push(log_prob);
            let Running { prompt, sequence, .. } = text;
            is_cancelled |= on_event(Event::Token { prompt, sequence, token, log_prob }).is_break();

            let mut finish = request.stop.check(&text.tokens, &config.stop_strings)?;
            if text.tokens.len() == limits[prompt].n_tokens {
                finish = finish.or(Some(limits[prompt].reason));
            }
            if is_cancelled {
                finish = finish.or(Some(FinishReason::Cancelled));
            }
            match finish {
                Some(finish) => finished.push(text.finish(finish, config)),
                None => still_running.push(text),
            }
        }
        running = still_running;
        if is_cancelled {
            finished.extend(running.drain(..).map(|text| text.finish(FinishReason::Cancelled, config)));
        }
        if !running.is_empty() {
            let last = |text: &Running| text.tokens.len() - 1;
            let continuations: Vec<_> = running
                .iter()
                .map(|text| Continuation { parent: text.row, tokens: &text.tokens[last(text)..] })
                .collect();
            logits = decoder.extend(&continuations)?;
            running.iter_mut().enumerate().for_each(|(row, text)| text.row = row);
        }
    }
    finished.sort_by_key(|text| (text.prompt, text.sequence));
    let mut results = vec![Vec::with_capacity(config.num_return_sequences); limits.len()];
    finished.into_iter().for_each(|text| results[text.prompt].push(text.generation));
    Ok(results)
}

fn choose(config: &GenerationConfig, scores: &mut [f32], rng: &mut SampleRng) -> Option<u32> {
    if !config.do_sample {
        return sampling::argmax(scores);
    }
    if config.temperature != 1.0 {
        sampling::temperature(scores, config.temperature);
    }
    sampling::top_k(scores, config.top_k);
    if config.top_p < 1.0 {
        sampling::top_p(scores, config.top_p);
    }
    if config.min_p > 0.0 {
        sampling::min_p(scores, config.min_p);
    }
    sampling::draw(scores, rng)
}
