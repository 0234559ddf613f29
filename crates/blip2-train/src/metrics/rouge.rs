//! ROUGE-L (Lin 2004) as the caption community computes it.

use super::{CaptionPair, Scores};

/// How much more recall weighs than precision; `pycocoevalcap`'s value.
const BETA: f64 = 1.2;

/// ROUGE-L: the F-measure of the longest common subsequence, with the best precision and the best recall over
/// the references (which may come from different ones), averaged over the corpus.
#[must_use]
pub fn rouge_l(pairs: &[CaptionPair]) -> Scores {
    Scores::of(pairs.iter().map(score).collect())
}

fn score(pair: &CaptionPair) -> f64 {
    let (mut precision, mut recall) = (0.0_f64, 0.0_f64);
    for reference in &pair.references {
        let (common, candidate_length, reference_length) = match (pair.candidate.len(), reference.len()) {
            // An empty text counts as one empty word in pycocoevalcap: equal to another, different from all others.
            (0, 0) => (1.0, 1.0, 1.0),
            (m, n) => {
                (to_f64(common_subsequence(&pair.candidate, reference)), to_f64(m.max(1)), to_f64(n.max(1)))
            }
        };
        precision = precision.max(common / candidate_length);
        recall = recall.max(common / reference_length);
    }
    if precision == 0.0 || recall == 0.0 {
        return 0.0;
    }
    (1.0 + BETA * BETA) * precision * recall / (recall + BETA * BETA * precision)
}

/// The length of the longest common subsequence, in one row of the usual table.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

fn to_f64(length: usize) -> f64 {
    length as f64
}
