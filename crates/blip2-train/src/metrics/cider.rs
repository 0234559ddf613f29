//! CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726): consensus with the references, rare words weighing more.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::ngrams::{MAX_ORDER, count};
use super::{CaptionPair, Scores};

/// Width of the length penalty, in words.
const SIGMA: f64 = 6.0;
/// CIDEr-D is reported times ten.
const SCALE: f64 = 10.0;

/// CIDEr-D with document frequencies taken from the references given, one document per picture.
///
/// A corpus of one picture scores 0, as every word is then as frequent as can be.
#[must_use]
pub fn cider_d(pairs: &[CaptionPair]) -> Scores {
    let frequencies = Frequencies::of(pairs);
    Scores::of(pairs.iter().map(|pair| score(pair, &frequencies)).collect())
}

fn score(pair: &CaptionPair, frequencies: &Frequencies<'_>) -> f64 {
    let candidate = Vector::of(&pair.candidate, frequencies);
    let sum: f64 = pair.references.iter().map(|r| candidate.similarity(&Vector::of(r, frequencies))).sum();
    SCALE * sum / to_f64(MAX_ORDER) / to_f64(pair.references.len())
}

/// In how many pictures' references each run of words occurs.
struct Frequencies<'a> {
    log_n_pictures: f64,
    n_pictures_with: HashMap<&'a [String], u32>,
}

impl<'a> Frequencies<'a> {
    fn of(pairs: &'a [CaptionPair]) -> Self {
        let mut n_pictures_with = HashMap::new();
        for pair in pairs {
            let seen: HashSet<&[String]> =
                pair.references.iter().flat_map(|r| count(r).into_keys()).collect();
            for ngram in seen {
                *n_pictures_with.entry(ngram).or_default() += 1;
            }
        }
        Self { log_n_pictures: to_f64(pairs.len()).ln(), n_pictures_with }
    }

    /// The logarithm of the inverse document frequency; a run no reference has counts as if one had it.
    fn weight(&self, ngram: &[String]) -> f64 {
        let n = self.n_pictures_with.get(ngram).copied().unwrap_or(1);
        self.log_n_pictures - f64::from(n).ln()
    }
}

/// A text as tf-idf weights of its runs of words.
struct Vector<'a> {
    weights: BTreeMap<&'a [String], f64>,
    /// Euclidean norm per order.
    norms: [f64; MAX_ORDER],
    /// The number of word *pairs*: `pycocoevalcap` counts those as the length, so a lone word has none.
    length: usize,
}

impl<'a> Vector<'a> {
    fn of(words: &'a [String], frequencies: &Frequencies<'_>) -> Self {
        let mut squares = [0.0; MAX_ORDER];
        let mut weights = BTreeMap::new();
        for (ngram, n) in count(words) {
            let weight = f64::from(n) * frequencies.weight(ngram);
            squares[ngram.len() - 1] += weight * weight;
            weights.insert(ngram, weight);
        }
        Self { weights, norms: squares.map(f64::sqrt), length: words.len().saturating_sub(1) }
    }

    /// The clipped cosine, summed over the orders, damped by the difference in length.
    fn similarity(&self, reference: &Vector<'_>) -> f64 {
        let mut products = [0.0; MAX_ORDER];
        for (ngram, &weight) in &self.weights {
            let other = reference.weights.get(ngram).copied().unwrap_or(0.0);
            products[ngram.len() - 1] += weight.min(other) * other;
        }
        let mut cosines = 0.0;
        for (order, product) in products.into_iter().enumerate() {
            let norms = self.norms[order] * reference.norms[order];
            // A zero norm means that all weights are zero, and then the product is.
            cosines += if norms > 0.0 { product / norms } else { product };
        }
        let difference = to_f64(self.length) - to_f64(reference.length);
        cosines * (-(difference * difference) / (2.0 * SIGMA * SIGMA)).exp()
    }
}

fn to_f64(count: usize) -> f64 {
    count as f64
}
