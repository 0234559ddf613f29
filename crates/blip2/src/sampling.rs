//! From logits to a token: the penalties, the filters of sampling, and the draw.
//!
//! The rules and their order are those of Hugging Face transformers, so that a generation configuration means the
//! same in both: repetition penalty, no-repeat n-gram, bad words, minimum length, forced and suppressed tokens, temperature,
//! top-k, top-p, min-p. OpenAI's penalties, which it has not, come after the repetition penalty. A token that may not be
//! chosen has the score `-inf`. Which of them run is decided by [`GenerationConfig`](crate::generate::GenerationConfig).

use crate::splitmix::{GAMMA, mix};

/// Divides positive and multiplies negative scores of tokens that occur in `tokens` (CTRL, arXiv 1909.05858).
pub fn repetition_penalty(scores: &mut [f32], tokens: &[u32], penalty: f32) {
    let mut seen: Vec<u32> = tokens.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        let Some(score) = scores.get_mut(token as usize) else { continue };
        *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
    }
}

/// Subtracts `presence` from the score of every token that occurs in `tokens`, and `frequency` for each time that it does
/// (OpenAI's penalties).
pub fn presence_and_frequency_penalty(scores: &mut [f32], tokens: &[u32], presence: f32, frequency: f32) {
    let mut seen: Vec<u32> = tokens.to_vec();
    seen.sort_unstable();
    for equal in seen.chunk_by(|a, b| a == b) {
        if let Some(score) = scores.get_mut(equal[0] as usize) {
            *score -= presence + equal.len() as f32 * frequency;
        }
    }
}

/// Forbids every token that would repeat a sequence of `n` tokens of `tokens`.
pub fn no_repeat_ngram(scores: &mut [f32], tokens: &[u32], n: usize) {
    if n == 0 || tokens.len() + 1 < n {
        return;
    }
    let last = &tokens[tokens.len() + 1 - n..];
    for ngram in tokens.windows(n) {
        if ngram[..n - 1] == *last {
            forbid(scores, ngram[n - 1]);
        }
    }
}

/// Forbids every token that would complete one of `words` after `tokens`.
pub fn no_bad_words<'a>(scores: &mut [f32], tokens: &[u32], words: impl IntoIterator<Item = &'a Vec<u32>>) {
    for word in words {
        if let Some((&last, before)) = word.split_last()
            && tokens.ends_with(before)
        {
            forbid(scores, last);
        }
    }
}

/// Makes all tokens but these impossible; of these all are equally likely.
pub fn only(scores: &mut [f32], tokens: &[u32]) {
    scores.fill(f32::NEG_INFINITY);
    for &token in tokens {
        if let Some(score) = scores.get_mut(token as usize) {
            *score = 0.0;
        }
    }
}

/// Makes one token impossible.
pub fn forbid(scores: &mut [f32], token: u32) {
    if let Some(score) = scores.get_mut(token as usize) {
        *score = f32::NEG_INFINITY;
    }
}

/// Divides the scores by `temperature` (> 0): below 1 the likely tokens become likelier.
pub fn temperature(scores: &mut [f32], temperature: f32) {
    scores.iter_mut().for_each(|score| *score /= temperature);
}

/// Keeps the `k` best tokens, and those that tie with the last of them.
pub fn top_k(scores: &mut [f32], k: usize) {
    if k == 0 || k >= scores.len() {
        return;
    }
    let threshold = nth_best(scores, k);
    forbid_where(scores, |score| score < threshold);
}

/// The `n`-th best score, counted from 1; the worst where there are fewer.
fn nth_best(scores: &[f32], n: usize) -> f32 {
    let mut sorted = scores.to_vec();
    let Some(last) = sorted.len().checked_sub(1) else { return f32::NEG_INFINITY };
    *sorted.select_nth_unstable_by(n.saturating_sub(1).min(last), |a, b| b.total_cmp(a)).1
}

/// Keeps the smallest set of likeliest tokens whose probabilities sum to at least `p` (nucleus, arXiv 1904.09751), and at least
/// `n_kept` tokens (1 or more).
pub fn top_p(scores: &mut [f32], p: f32, n_kept: usize) {
    let mut ascending: Vec<(f32, usize)> =
        scores.iter().copied().zip(0..).filter(|&(score, _)| score > f32::NEG_INFINITY).collect();
    ascending.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    let Some(&(best, _)) = ascending.last() else { return };
    let others = &ascending[..ascending.len().saturating_sub(n_kept)];
    let total: f64 = ascending.iter().map(|&(score, _)| f64::from(score - best).exp()).sum();
    let mut tail = 0.0;
    for &(score, token) in others {
        tail += f64::from(score - best).exp() / total;
        if tail > 1.0 - f64::from(p) {
            break;
        }
        scores[token] = f32::NEG_INFINITY;
    }
}

/// Keeps the tokens that are at least `p` times as likely as the best one (arXiv 2407.01082), and the best `n_kept` (1 or more).
pub fn min_p(scores: &mut [f32], p: f32, n_kept: usize) {
    let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let threshold = (best + p.ln()).min(nth_best(scores, n_kept));
    forbid_where(scores, |score| score < threshold);
}

fn forbid_where(scores: &mut [f32], is_forbidden: impl Fn(f32) -> bool) {
    scores.iter_mut().filter(|score| is_forbidden(**score)).for_each(|score| *score = f32::NEG_INFINITY);
}

/// The best token; of equals the first. `None` when every token is forbidden.
pub fn argmax(scores: &[f32]) -> Option<u32> {
    let mut best = None;
    let mut best_score = f32::NEG_INFINITY;
    for (token, &score) in (0..).zip(scores) {
        if score > best_score {
            (best, best_score) = (Some(token), score);
        }
    }
    best
}

/// Draws a token with the probabilities `softmax(scores)`. `None` when every token is forbidden.
pub fn draw(scores: &[f32], rng: &mut SampleRng) -> Option<u32> {
    let best = scores[argmax(scores)? as usize];
    let weight = |score: f32| if score == f32::NEG_INFINITY { 0.0 } else { f64::from((score - best).exp()) };
    let total: f64 = scores.iter().map(|&score| weight(score)).sum();
    let mut left = rng.next_unit() * total;
    let mut last = None;
    for (token, &score) in (0..).zip(scores) {
        let weight = weight(score);
        if weight == 0.0 {
            continue;
        }
        last = Some(token);
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last // rounding can leave a crumb after the last possible token
}

/// `ln Σ exp(logit)`, stable; `-inf` when all are.
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return max;
    }
    // Sums of 64 in f32, then f64: as accurate as f64 throughout, and the compiler can vectorise the inner one.
    let sum: f64 = logits
        .chunks(64)
        .map(|chunk| f64::from(chunk.iter().map(|&logit| (logit - max).exp()).sum::<f32>()))
        .sum();
    max + sum.ln() as f32
}

/// The random numbers of one sampled sequence: a function of the seed and of the sequence's number, so a prompt
/// draws the same tokens alone and in a batch.
#[derive(Debug, Clone)]
pub struct SampleRng {
    state: u64,
}

impl SampleRng {
    /// The stream of the `sequence`-th sequence returned for a prompt.
    pub fn new(seed: u64, sequence: u64) -> Self {
        // Streams start far apart: the number goes through the mixing function once before it is used.
        Self { state: seed ^ mix(sequence.wrapping_add(GAMMA)) }
    }

    /// The next number, uniform in `[0, 1)`.
    pub fn next_unit(&mut self) -> f64 {
        self.state = self.state.wrapping_add(GAMMA);
        (mix(self.state) >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// The next number of Gumbel's distribution. Added to the logarithms of probabilities, such numbers make the order of the
    /// sums that of draws without putting back (arXiv 1903.06059).
    pub fn next_gumbel(&mut self) -> f64 {
        -(-self.next_unit().ln()).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEG: f32 = f32::NEG_INFINITY;

    #[test]
    fn repetition_penalty_lowers_both_signs_and_each_token_once() {
        let mut scores = [2.0, -2.0, 1.0, 0.0];
        repetition_penalty(&mut scores, &[0, 1, 1, 0, 99], 2.0);
        assert_eq!(scores, [1.0, -4.0, 1.0, 0.0]);
    }

    #[test]
    fn presence_counts_once_and_frequency_every_time() {
        let mut scores = [2.0, -2.0, 1.0, NEG];
        presence_and_frequency_penalty(&mut scores, &[0, 1, 1, 3, 0, 99, 1], 0.5, 0.25);
        assert_eq!(scores, [1.0, -3.25, 1.0, NEG]);
        presence_and_frequency_penalty(&mut scores, &[0, 1, 1, 3], -0.5, -0.25);
        assert_eq!(
            scores,
            [1.75, -2.25, 1.0, NEG],
            "below 0 they are bonuses, but not for what may not be chosen"
        );
        presence_and_frequency_penalty(&mut scores, &[], 2.0, 2.0);
        assert_eq!(scores, [1.75, -2.25, 1.0, NEG]);
    }

    #[test]
    fn no_repeat_ngram_forbids_only_what_would_repeat() {
        let mut scores = [0.0; 5];
        no_repeat_ngram(&mut scores, &[1, 2, 3, 1, 4, 1], 2);
        assert_eq!(scores, [0.0, 0.0, NEG, 0.0, NEG], "1 was followed by 2 and by 4");
        let mut scores = [0.0; 5];
        no_repeat_ngram(&mut scores, &[1, 2, 3, 1, 2], 3);
        assert_eq!(scores, [0.0, 0.0, 0.0, NEG, 0.0]);
        let mut scores = [0.0; 3];
        no_repeat_ngram(&mut scores, &[2], 1);
        assert_eq!(scores, [0.0, 0.0, NEG]);
        no_repeat_ngram(&mut scores, &[], 3);
        assert_eq!(scores, [0.0, 0.0, NEG]);
    }

    #[test]
    fn a_bad_word_is_forbidden_where_it_would_become_whole() {
        let words = [vec![0], vec![1, 2], vec![3, 1, 4], vec![9, 9]];
        let mut scores = [0.0; 5];
        no_bad_words(&mut scores, &[3, 1], &words);
        assert_eq!(scores, [NEG, 0.0, NEG, 0.0, NEG]);
        let mut scores = [0.0; 5];
        no_bad_words(&mut scores, &[], &words);
        assert_eq!(scores, [NEG, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn only_the_given_tokens_are_left() {
        let mut scores = [1.0, NEG, 3.0];
        only(&mut scores, &[1, 7]);
        assert_eq!(scores, [NEG, 0.0, NEG]);
    }

    #[test]
    fn filters_keep_at_least_the_best_token() {
        for filter in
            [|s: &mut [f32]| top_k(s, 1), |s: &mut [f32]| top_p(s, 1e-6, 1), |s: &mut [f32]| min_p(s, 1.0, 1)]
        {
            let mut scores = [0.5, 3.0, 1.0];
            filter(&mut scores);
            assert_eq!(scores, [NEG, 3.0, NEG]);
        }
        for filter in [|s: &mut [f32]| top_p(s, 1e-6, 2), |s: &mut [f32]| min_p(s, 1.0, 2)] {
            let mut scores = [0.5, 3.0, 1.0];
            filter(&mut scores);
            assert_eq!(scores, [NEG, 3.0, 1.0], "or as many as are to be kept");
            let mut scores = [NEG, 3.0];
            filter(&mut scores);
            assert_eq!(scores, [NEG, 3.0], "what is impossible is not kept for it");
        }
    }

    #[test]
    fn a_wide_open_filter_keeps_everything() {
        let scores = [0.5, 3.0, 1.0, NEG];
        for filter in
            [|s: &mut [f32]| top_k(s, 9), |s: &mut [f32]| top_p(s, 1.0, 1), |s: &mut [f32]| min_p(s, 0.0, 1)]
        {
            let mut filtered = scores;
            filter(&mut filtered);
            assert_eq!(filtered, scores);
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let scores = [0.6_f32.ln(), NEG, 0.3_f32.ln(), 0.1_f32.ln()];
        let mut rng = SampleRng::new(7, 0);
        let mut counts = [0; 4];
        for _ in 0..100_000 {
            counts[draw(&scores, &mut rng).unwrap() as usize] += 1;
        }
        // Five standard deviations of a binomial of 100,000 draws are at most 790.
        for (count, expected) in counts.into_iter().zip([60_000_i32, 0, 30_000, 10_000]) {
            assert!((count - expected).abs() < 790, "{counts:?}");
        }
        assert_eq!(counts[1], 0);
        assert_eq!(draw(&[NEG, NEG], &mut rng), None);
    }

    #[test]
    fn streams_of_one_seed_differ() {
        let first = |seed, sequence| SampleRng::new(seed, sequence).next_unit();
        assert_eq!(first(1, 0), first(1, 0));
        assert_ne!(first(1, 0), first(1, 1));
        assert_ne!(first(1, 0), first(2, 0));
        assert_ne!(first(0, 1), first(1, 0));
    }

    #[test]
    fn log_sum_exp_is_stable() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2_f32.ln())).abs() < 1e-4);
        assert_eq!(log_sum_exp(&[NEG, NEG]), NEG);
        assert_eq!(log_sum_exp(&[NEG, 3.0]), 3.0);
    }

    #[test]
    fn of_equals_the_first_is_best() {
        assert_eq!(argmax(&[1.0, 2.0, 2.0]), Some(1));
        assert_eq!(argmax(&[f32::NAN, NEG]), None);
    }
}
