//! Captions from the web, and captions of our own beside them, of which those stay that fit their picture best: the data
//! recipe of BLIP-2 (§3.4, after CapFilt of BLIP, arXiv 2201.12086 §3.3).

use blip2::model::{Blip2, ImageFeatures};

use crate::Result;

/// By which score captions are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// The cosine of picture and text, the largest over the queries (ITC).
    Similarity,
    /// The probability that the text matches (ITM).
    Matching,
}

/// What stays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filter {
    /// By which score.
    pub by: Score,
    /// The most captions of a picture that stay.
    pub n_kept: usize,
    /// The least that a caption must score.
    pub minimum: Option<f32>,
}

/// The captions of a picture that stay, the best first, each with its score. A text that comes twice (but for capitals and
/// spaces) is one.
///
/// # Errors
/// When `matcher` has no stage-1 part, or a caption is empty or too long for it.
pub fn best_captions(
    matcher: &Blip2,
    features: &ImageFeatures,
    captions: &[String],
    filter: Filter,
) -> Result<Vec<(String, f32)>> {
    let texts = distinct(captions);
    if texts.is_empty() {
        return Ok(Vec::new());
    }
    let scores = matcher.match_texts(features, &texts)?;
    let scored = texts.into_iter().zip(scores).map(|(text, score)| match filter.by {
        Score::Similarity => (text.to_owned(), score.itc_similarity),
        Score::Matching => (text.to_owned(), score.itm_probability),
    });
    Ok(keep(scored.collect(), filter))
}

fn keep(mut scored: Vec<(String, f32)>, filter: Filter) -> Vec<(String, f32)> {
    scored.retain(|(_, score)| filter.minimum.is_none_or(|minimum| *score >= minimum));
    // Stable: of two that score the same the earlier stays.
    scored.sort_by(|a, b| b.1.total_cmp(&a.1));
    scored.truncate(filter.n_kept);
    scored
}

fn distinct(captions: &[String]) -> Vec<&str> {
    let normal = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    let mut seen = std::collections::HashSet::new();
    captions
        .iter()
        .map(|text| text.trim())
        .filter(|text| !text.is_empty() && seen.insert(normal(text)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_stay_in_order_and_copies_count_once() {
        let captions = ["A dog.", " a  dog. ", "", "a cat"].map(str::to_owned);
        assert_eq!(distinct(&captions), ["A dog.", "a cat"]);
        let scored =
            || [("a", 0.1), ("b", 0.4), ("c", 0.4), ("d", 0.3)].map(|(t, s)| (t.to_owned(), s)).to_vec();
        let names = |filter| keep(scored(), filter).into_iter().map(|(text, _)| text).collect::<String>();
        let filter = Filter { by: Score::Similarity, n_kept: 2, minimum: None };
        assert_eq!(names(filter), "bc");
        assert_eq!(names(Filter { n_kept: 9, minimum: Some(0.3), ..filter }), "bcd");
        assert_eq!(names(Filter { minimum: Some(0.5), ..filter }), "");
    }
}
