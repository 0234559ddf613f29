//! BLEU-1 to BLEU-4 (Papineni et al. 2002) over a corpus, with `pycocoevalcap`'s smoothing constants.

use std::collections::HashMap;

use super::CaptionPair;
use super::ngrams::{Counts, MAX_ORDER, count};

/// Added to every count of matches, so that none at all gives almost 0 and never 0/0.
const TINY: f64 = 1e-15;
/// Added to every count of possible matches and to the reference length, for the same reason.
const SMALL: f64 = 1e-9;

/// BLEU-1 to BLEU-4.
#[derive(Debug, Clone, PartialEq)]
pub struct Bleu {
    /// Over the corpus: matches and lengths are summed before dividing. This is what papers report.
    pub corpus: [f64; MAX_ORDER],
    /// For each pair alone, in the order given.
    pub each: Vec<[f64; MAX_ORDER]>,
}

/// BLEU with the closest reference length (the shorter of two equally close) for the brevity penalty.
#[must_use]
pub fn bleu(pairs: &[CaptionPair]) -> Bleu {
    let mut total = Matches::default();
    let mut each = Vec::with_capacity(pairs.len());
    for pair in pairs {
        let matches = Matches::of(pair);
        each.push(matches.score());
        total.add(&matches);
    }
    Bleu { corpus: total.score(), each }
}

/// Counts of one pair, or their sums over a corpus.
#[derive(Default)]
struct Matches {
    candidate_length: usize,
    reference_length: usize,
    /// Per order, runs of the candidate which a reference also has (at most as often as any one reference has it).
    matched: [u32; MAX_ORDER],
    /// Per order, runs of the candidate.
    possible: [usize; MAX_ORDER],
}

impl Matches {
    fn of(pair: &CaptionPair) -> Self {
        let mut most: HashMap<&[String], u32> = HashMap::new();
        for reference in &pair.references {
            for (ngram, n) in count(reference) {
                let entry = most.entry(ngram).or_default();
                *entry = n.max(*entry);
            }
        }
        let candidate: Counts<'_> = count(&pair.candidate);
        let mut matched = [0; MAX_ORDER];
        for (ngram, &n) in &candidate {
            matched[ngram.len() - 1] += n.min(most.get(ngram).copied().unwrap_or(0));
        }
        let length = pair.candidate.len();
        let closest = pair.references.iter().map(Vec::len).min_by_key(|&l| (l.abs_diff(length), l));
        Self {
            candidate_length: length,
            reference_length: closest.unwrap_or(0),
            matched,
            possible: std::array::from_fn(|i| length.saturating_sub(i)),
        }
    }

    fn add(&mut self, other: &Self) {
        self.candidate_length += other.candidate_length;
        self.reference_length += other.reference_length;
        for order in 0..MAX_ORDER {
            self.matched[order] += other.matched[order];
            self.possible[order] += other.possible[order];
        }
    }

    /// The geometric mean of the precisions up to each order, times the brevity penalty.
    fn score(&self) -> [f64; MAX_ORDER] {
        let ratio = (self.candidate_length as f64 + TINY) / (self.reference_length as f64 + SMALL);
        let brevity = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
        let mut product = 1.0;
        std::array::from_fn(|i| {
            product *= (f64::from(self.matched[i]) + TINY) / (self.possible[i] as f64 + SMALL);
            product.powf(1.0 / (i + 1) as f64) * brevity
        })
    }
}
