//! Where the model looked: a heat map over the picture for a text that it matched or wrote.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::{Blip2, ImageFeatures, image_keys};
use crate::image::{RgbImage, resize_bicubic};
use crate::language::Branched;
use crate::layers::linear_cross_entropy;
use crate::qformer::CrossAttentionProbe;
use crate::text::{LanguageTokenizer, Turn};
use crate::{Error, Result};

/// How much each part of a picture was worth to a text, as a grid over the picture that the encoder saw.
#[derive(Debug, Clone, PartialEq)]
pub struct HeatMap {
    /// Rows, and columns, of the grid.
    pub side: usize,
    /// From the left to the right and the top to the bottom, `side * side` values; the largest is 1, all are 0 when
    /// nothing counted.
    pub values: Vec<f32>,
}

/// A part of an answer, and which of the places where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word<'a> {
    /// The part, whatever its case.
    pub text: &'a str,
    /// The first place is 1. Places between other letters or digits count only when there are no others: `a` is not
    /// looked for in `cat`.
    pub occurrence: usize,
}

impl<'a> From<&'a str> for Word<'a> {
    /// The first place.
    fn from(text: &'a str) -> Self {
        Self { text, occurrence: 1 }
    }
}

impl HeatMap {
    /// Of the tokens of a square grid; a token before it stands for the picture as a whole and is left out.
    fn new(mut relevance: Vec<f32>) -> Result<Self> {
        let side = relevance.len().isqrt();
        let values = relevance.split_off(relevance.len() - side * side);
        if side == 0 || relevance.len() > 1 {
            return Err(Error::Request("the image encoder's tokens are no square grid".into()));
        }
        let largest = values.iter().copied().fold(0.0, f32::max);
        let scaled = |x: f32| if largest > 0.0 { x / largest } else { 0.0 };
        Ok(Self { side, values: values.into_iter().map(scaled).collect() })
    }

    /// Lays the map over the picture that it is of: the more a place counted, the more it glows.
    pub fn over(&self, picture: &RgbImage) -> RgbImage {
        let side = self.side as u32;
        let grid = RgbImage::from_fn(side, side, |x, y| {
            let value = self.values[y as usize * self.side + x as usize];
            [(value * 255.0).round() as u8; 3].into()
        });
        let mut smooth = resize_bicubic(&grid, picture.width(), picture.height());
        for (pixel, under) in smooth.pixels_mut().zip(picture.pixels()) {
            let value = f32::from(pixel[0]) / 255.0;
            let (glow, share) = (glow(value), MOST_GLOW * value);
            for (channel, (glow, under)) in pixel.0.iter_mut().zip(glow.into_iter().zip(under.0)) {
                *channel = (share * glow + (1.0 - share) * f32::from(under)).round() as u8;
            }
        }
        smooth
    }
}

/// How much of the picture the brightest place hides.
const MOST_GLOW: f32 = 0.7;

/// From blue over red to yellow: its lightness grows with `value`, so it reads without colours too.
fn glow(value: f32) -> [f32; 3] {
    const STOPS: [[f32; 3]; 4] =
        [[20.0, 20.0, 120.0], [150.0, 20.0, 120.0], [240.0, 80.0, 40.0], [255.0, 240.0, 90.0]];
    let at = value.clamp(0.0, 1.0) * (STOPS.len() - 1) as f32;
    let below = (at as usize).min(STOPS.len() - 2);
    let part = at - below as f32;
    std::array::from_fn(|i| STOPS[below][i] * (1.0 - part) + STOPS[below + 1][i] * part)
}

impl Blip2 {
    /// Where the matching head looked for `text`: its cross-attention, weighted by the slope of the logarithm of the odds
    /// that the text matches.
    ///
    /// # Errors
    /// When the model has no stage-1 part, or the text is empty or too long.
    pub fn explain_match(&self, features: &ImageFeatures, text: &str) -> Result<HeatMap> {
        let stage1 = self.stage1()?;
        let texts = stage1.tokenize(&[text])?;
        let keys = image_keys(stage1.qformer(), &[features])?;
        let mut probe = CrossAttentionProbe::default();
        let queries = stage1.qformer().encode_pair_probed(&keys, &texts, &mut probe)?;
        let logits = stage1.qformer().match_logits(&queries)?.squeeze(0)?;
        let log_odds = (logits.get(1)? - logits.get(0)?)?;
        HeatMap::new(probe.relevance(&log_odds.backward()?)?)
    }

    /// Where the model looked to write `answer` to the last of `turns`, which waits for it, or without turns as a caption;
    /// with `word`, to write that part of it: the queries' cross-attention, weighted by the slope of the logarithm of these
    /// tokens' probability.
    ///
    /// # Errors
    /// When the model has no stage-2 part, the question or the answer is empty, the conversation does not fit the context, or
    /// the answer does not have the word, or not as often.
    pub fn explain_answer(
        &self,
        features: &ImageFeatures,
        turns: &[Turn],
        answer: &str,
        word: Option<Word<'_>>,
    ) -> Result<HeatMap> {
        let stage2 = self.stage2()?;
        if answer.trim().is_empty() {
            return Err(Error::Request("the text to explain is empty".into()));
        }
        let prompt = stage2.render_whole(turns, self.instruction())?;
        let question = turns.last().map_or(self.instruction(), |turn| &turn.question);
        let answer_ids = stage2.format_of(turns).answer_ids(stage2.tokenizer(), question, answer)?;
        let explained = match word {
            Some(word) => tokens_of(stage2.tokenizer(), &answer_ids, word)?,
            None => 0..answer_ids.len(),
        };

        let keys = image_keys(stage2.qformer(), &[features])?;
        let mut probe = CrossAttentionProbe::default();
        let queries = stage2.qformer().encode_queries_probed(&keys, &mut probe)?;
        let soft_tokens = stage2.project(&queries)?;
        let language_model = stage2.language_model();
        let mut rows = vec![stage2.embed(&prompt, &soft_tokens)?];
        let n_before = rows[0].dim(0)?;
        // A decoder of its own begins with a token of its own.
        let start = language_model.decoder_start();
        let read: Vec<u32> =
            start.into_iter().chain(answer_ids[..explained.end - 1].iter().copied()).collect();
        if !read.is_empty() {
            rows.push(language_model.embed(&read)?);
        }
        let text = Branched { shared: n_before, continuations: vec![read.len()] };
        let hidden = language_model.forward_branched(&Tensor::cat(&rows, 0)?, &[text])?;
        // A row predicts the token after it.
        let n_before = n_before + usize::from(start.is_some());
        let predicting: Vec<u32> = explained.clone().map(|i| (n_before + i - 1) as u32).collect();
        let predicting = Tensor::from_slice(&predicting, predicting.len(), &Device::Cpu)?;
        let losses = linear_cross_entropy(
            &hidden.index_select(&predicting, 0)?,
            language_model.head(),
            &answer_ids[explained],
            0.0,
        )?;
        HeatMap::new(probe.relevance(&losses.sum_all()?.neg()?.backward()?)?)
    }
}

/// The tokens of the place where `word` stands in an answer.
fn tokens_of(tokenizer: &LanguageTokenizer, ids: &[u32], word: Word<'_>) -> Result<Range<usize>> {
    let sought = word.text.trim().to_lowercase();
    let whole = tokenizer.decode(ids).to_lowercase();
    let Some(start) = place_of(&whole, &sought, word.occurrence) else {
        let times = if word.occurrence > 1 { format!(" {} times", word.occurrence) } else { String::new() };
        return Err(Error::Request(format!("the text has no \"{sought}\"{times} to explain")));
    };
    let end = start + sought.len();
    // What the first n tokens say, for each n.
    let len_after = |n: usize| tokenizer.decode(&ids[..n]).to_lowercase().len();
    let first = (1..=ids.len()).find(|&n| len_after(n) > start).unwrap_or(1) - 1;
    let last = (first + 1..=ids.len()).find(|&n| len_after(n) >= end).unwrap_or(ids.len());
    Ok(first..last)
}

/// Where `sought` begins for the `occurrence`th time.
fn place_of(whole: &str, sought: &str, occurrence: usize) -> Option<usize> {
    if sought.is_empty() {
        return None;
    }
    let places = || whole.match_indices(sought).map(|(start, _)| start);
    let stands_alone = |&start: &usize| {
        let before = whole[..start].chars().next_back();
        let after = whole[start + sought.len()..].chars().next();
        ![before, after].into_iter().flatten().any(char::is_alphanumeric)
    };
    let idx = occurrence.checked_sub(1)?;
    if places().any(|start| stands_alone(&start)) {
        places().filter(stands_alone).nth(idx)
    } else {
        places().nth(idx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tests::tiny_tokenizer;

    #[test]
    fn a_heat_map_is_the_grid_of_the_picture() {
        let map = HeatMap::new(vec![9.0, 0.0, 1.0, 2.0, 4.0]).expect("a class token and a grid of two");
        assert_eq!((map.side, map.values), (2, vec![0.0, 0.25, 0.5, 1.0]));
        assert_eq!(HeatMap::new(vec![0.0; 4]).expect("a grid").values, vec![0.0; 4]);
        assert!(HeatMap::new(vec![0.0; 6]).is_err() && HeatMap::new(Vec::new()).is_err());
    }

    #[test]
    fn the_map_glows_where_it_counts() {
        let map = HeatMap { side: 2, values: vec![1.0, 0.0, 0.0, 0.0] };
        let over = map.over(&RgbImage::from_pixel(40, 30, [0, 0, 0].into()));
        assert_eq!(over.dimensions(), (40, 30));
        assert!(over.get_pixel(2, 2)[0] > 150 && over.get_pixel(37, 27)[0] == 0);
    }

    #[test]
    fn a_word_is_found_in_the_tokens_of_its_text() {
        let tokenizer = tiny_tokenizer();
        let ids = tokenizer.encode_text("a dog on the beach").expect("tokens");
        for word in ["dog", "the", "Beach", "on the"] {
            let tokens = tokens_of(&tokenizer, &ids, word.into()).expect("a place");
            let said = tokenizer.decode(&ids[tokens]).to_lowercase();
            assert!(said.contains(&word.to_lowercase()), "{word}: {said}");
            assert!(said.len() <= word.len() + 8, "{word}: {said}");
        }
        assert!(tokens_of(&tokenizer, &ids, "cat".into()).is_err());
        assert!(tokens_of(&tokenizer, &ids, " ".into()).is_err());
        let twice = Word { text: "the", occurrence: 2 };
        let error = tokens_of(&tokenizer, &ids, twice).expect_err("refused").to_string();
        assert!(error.contains("\"the\" 2 times"), "{error}");
    }

    #[test]
    fn a_word_stands_between_other_characters_than_letters() {
        let whole = "a cat, a bat; the café's a";
        let place = |word, occurrence| place_of(whole, word, occurrence);
        assert_eq!([1, 2, 3, 4].map(|nth| place("a", nth)), [Some(0), Some(7), Some(26), None]);
        assert_eq!((place("at", 1), place("at", 2)), (Some(3), Some(10)), "inside words, since nowhere else");
        assert_eq!((place("café", 1), place("caf", 1)), (Some(18), Some(18)));
        assert_eq!((place("a", 0), place("", 1)), (None, None));
    }
}
