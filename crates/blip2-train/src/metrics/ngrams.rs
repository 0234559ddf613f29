//! Counting runs of words, shared by BLEU and CIDEr-D.

use std::collections::BTreeMap;

/// Both metrics look at runs of one to four words.
pub(super) const MAX_ORDER: usize = 4;

/// How often each run of 1 to [`MAX_ORDER`] words occurs.
///
/// Ordered, so that sums over it come out the same, bit for bit, in every run.
pub(super) type Counts<'a> = BTreeMap<&'a [String], u32>;

/// Counts the runs of 1 to [`MAX_ORDER`] words of a text.
pub(super) fn count(words: &[String]) -> Counts<'_> {
    let mut counts = Counts::new();
    for order in 1..=MAX_ORDER {
        for ngram in words.windows(order) {
            *counts.entry(ngram).or_default() += 1;
        }
    }
    counts
}
