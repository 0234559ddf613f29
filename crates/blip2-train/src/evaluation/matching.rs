//! Whether the matching head tells a picture's own text from another's.

use blip2::model::Blip2;

use super::{OnProgress, TestSet, for_each_batch, text_of, wrong_kind};
use crate::Result;
use crate::data::{Skipped, Text};
use crate::metrics::percent_by_kind;

/// A picture beside a text, and what the matching head says about the two.
#[derive(Debug, Clone, PartialEq)]
pub struct MatchedPair {
    /// The picture, as the manifest names it.
    pub image: String,
    /// The text.
    pub text: String,
    /// Whether the text is the picture's own.
    pub is_own: bool,
    /// The probability that they match, 0 to 1.
    pub itm_probability: f32,
}

impl MatchedPair {
    /// Whether the head is right: above a half for the picture's own text, not above for another's.
    pub fn is_right(&self) -> bool {
        (self.itm_probability > 0.5) == self.is_own
    }
}

/// All pairs, and what was left out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MatchingReport {
    /// Two for each picture, and one for the first.
    pub pairs: Vec<MatchedPair>,
    /// Pictures that could not be read.
    pub skipped: Vec<Skipped>,
}

impl MatchingReport {
    /// How many of the pairs are told right, in percent, and how many there are: of own texts, and of others'.
    pub fn accuracy(&self) -> [(f64, usize); 2] {
        [true, false].map(|is_own| {
            let some = self.pairs.iter().filter(|pair| pair.is_own == is_own);
            let (percent, _) = percent_by_kind(some.clone().map(|pair| ("", f64::from(pair.is_right()))));
            (percent, some.count())
        })
    }
}

/// Matches each picture with its first caption and with that of the picture before it, which is another's.
///
/// # Errors
/// When a row is not of captions, no picture can be read, or the model fails.
pub fn matching(model: &Blip2, test_set: TestSet<'_>, on_progress: OnProgress<'_>) -> Result<MatchingReport> {
    let mut report = MatchingReport::default();
    let mut before: Option<(String, String)> = None;
    for_each_batch(model, test_set, &mut report.skipped, on_progress, |batch| {
        for (row, features) in batch {
            let Text::Captions(captions) = text_of(row)? else { return Err(wrong_kind(row, "captions")) };
            let Some(own) = captions.into_iter().next() else { return Err(wrong_kind(row, "captions")) };
            let other = before.take().filter(|(image, _)| *image != row.image).map(|(_, text)| text);
            let texts: Vec<&str> = [Some(own.as_str()), other.as_deref()].into_iter().flatten().collect();
            for (i, (&text, scores)) in texts.iter().zip(model.match_texts(features, &texts)?).enumerate() {
                report.pairs.push(MatchedPair {
                    image: row.image.clone(),
                    text: text.to_owned(),
                    is_own: i == 0,
                    itm_probability: scores.itm_probability,
                });
            }
            before = Some((row.image.clone(), own));
        }
        Ok(())
    })?;
    Ok(report)
}
