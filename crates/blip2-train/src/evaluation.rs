//! Measuring a model: captions, questions, recognition, retrieval, matching.
//!
//! Rows come from manifests and caption files as in training ([`read_test_set`](crate::data::read_test_set)). A picture that
//! cannot be read is left out, counted and named; nothing else is. Where no picture is left there is an error and no score.

mod matching;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use blip2::generate::GenerationConfig;
use blip2::image::{Limits, Pixels};
use blip2::model::{Blip2, ImageFeatures};

use crate::data::{Row, Skipped, Text};
use crate::metrics::{
    Candidates, CaptionPair, CaptionScores, Rescoring, RetrievalScores, answer_score, names_any,
    percent_by_kind, rerank, retrieval,
};
use crate::{Error, Result};

pub use matching::{MatchedPair, MatchingReport, matching};

/// Pictures that go through the model at once.
const AT_ONCE: usize = 8;

/// What a model is measured on.
#[derive(Debug, Clone, Copy)]
pub struct TestSet<'a> {
    /// The rows of a manifest.
    pub rows: &'a [Row],
    /// The folder that the rows name their pictures relative to.
    pub base: &'a Path,
    /// How the pictures are read.
    pub pixels: Pixels,
}

/// Is told how many of how many items are done.
pub type OnProgress<'a> = &'a mut dyn FnMut(usize, usize);

/// What the model said about one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The picture, as the manifest names it.
    pub image: String,
    /// The question; empty for a caption.
    pub question: String,
    /// What the model wrote.
    pub text: String,
    /// What people wrote, or the names that count.
    pub references: Vec<String>,
    /// Its own score, 0 to 1: the accuracy of an answer, whether a name was found. Captions are scored together.
    pub score: Option<f64>,
    /// The row's group and kind.
    pub group: Option<String>,
    /// What the question is about.
    pub kind: Option<String>,
}

/// Predictions, and what was left out.
#[derive(Debug, Clone, Default)]
pub struct Evaluated {
    /// One for each row whose picture could be read.
    pub predictions: Vec<Prediction>,
    /// The others.
    pub skipped: Vec<Skipped>,
}

impl Evaluated {
    /// The mean score in percent, over all and by kind; not a number where nothing has a score.
    pub fn accuracy(&self) -> (f64, BTreeMap<String, (f64, usize)>) {
        percent_by_kind(self.predictions.iter().filter_map(|prediction| {
            Some((prediction.kind.as_deref().unwrap_or_default(), prediction.score?))
        }))
    }

    /// How many groups (works, people, places) have most of their rows right, of how many; rows without a group are not
    /// counted.
    pub fn groups(&self) -> (usize, usize) {
        let mut groups: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
        for prediction in &self.predictions {
            let Some(group) = &prediction.group else { continue };
            let (sum, n) = groups.entry(group).or_default();
            *sum += prediction.score.unwrap_or(0.0);
            *n += 1;
        }
        (groups.values().filter(|(sum, n)| 2.0 * sum > *n as f64).count(), groups.len())
    }

    /// The scores of all captions together.
    pub fn caption_scores(&self) -> CaptionScores {
        let pair = |p: &Prediction| CaptionPair::from_text(&p.text, &p.references);
        CaptionScores::of(&self.predictions.iter().map(pair).collect::<Vec<_>>())
    }
}

/// Captions every picture; the rows are of captions.
///
/// # Errors
/// When a row is not of captions, no picture can be read, or the model fails.
pub fn captions(
    model: &Blip2,
    test_set: TestSet<'_>,
    generation: &GenerationConfig,
    on_progress: OnProgress<'_>,
) -> Result<Evaluated> {
    let mut evaluated = Evaluated::default();
    for_each_batch(model, test_set, &mut evaluated.skipped, on_progress, |batch| {
        let features: Vec<_> = batch.iter().map(|(_, features)| features).collect();
        for ((row, _), answers) in batch.iter().zip(model.caption(&features, generation)?) {
            let Text::Captions(references) = text_of(row)? else { return Err(wrong_kind(row, "captions")) };
            evaluated.predictions.push(prediction(row, String::new(), &answers, references, None));
        }
        Ok(())
    })?;
    Ok(evaluated)
}

/// Asks every row's question. A row with `names` counts when the answer contains one; of the others, those with several
/// answers by the official VQA rule, those with one when the answers are equal after the official normalisation.
///
/// # Errors
/// When a row is not a question, no picture can be read, or the model fails.
pub fn questions(
    model: &Blip2,
    test_set: TestSet<'_>,
    generation: &GenerationConfig,
    on_progress: OnProgress<'_>,
) -> Result<Evaluated> {
    let mut evaluated = Evaluated::default();
    for_each_batch(model, test_set, &mut evaluated.skipped, on_progress, |batch| {
        let mut asked = Vec::with_capacity(batch.len());
        for (row, features) in batch {
            let Text::QuestionAnswer { question, answers } = text_of(row)? else {
                return Err(wrong_kind(row, "a question with its answer"));
            };
            asked.push((features, question, answers));
        }
        let requests: Vec<_> =
            asked.iter().map(|(features, question, _)| (*features, question.as_str())).collect();
        let said = model.ask(&requests, generation)?;
        for (((row, _), (_, question, references)), answers) in batch.iter().zip(asked).zip(said) {
            let text = answers.first().map_or("", |answer| &answer.text);
            let (score, references) = if row.names.is_empty() {
                (answer_score(text, &references), references)
            } else {
                (f64::from(u8::from(names_any(text, &row.names))), row.names.clone())
            };
            evaluated.predictions.push(prediction(row, question, &answers, references, Some(score)));
        }
        Ok(())
    })?;
    Ok(evaluated)
}

/// What is compared in [`retrieve`], and what orders it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetrievalConfig {
    /// All captions of a picture, not the first only.
    pub all_captions: bool,
    /// What orders the candidates that similarity found; nothing leaves them in its order.
    pub rescoring: Option<Rescoring>,
    /// How many candidates of each picture and of each text are re-ranked; LAVIS takes 128.
    pub n_candidates: NonZeroUsize,
}

/// Retrieval by similarity, and re-ranked with the matching head.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrievalReport {
    /// Pictures and texts compared.
    pub n_images: usize,
    /// Texts.
    pub n_texts: usize,
    /// By ITC alone.
    pub itc: RetrievalScores,
    /// The best candidates of ITC re-ranked, where that was asked for.
    pub reranked: Option<RetrievalScores>,
    /// What was left out.
    pub skipped: Vec<Skipped>,
}

/// Compares every picture with every text: the first caption of each row, or all of them.
///
/// # Errors
/// When a row is not of captions, no picture can be read, or the model fails.
pub fn retrieve(
    model: &Blip2,
    test_set: TestSet<'_>,
    config: RetrievalConfig,
    on_progress: OnProgress<'_>,
) -> Result<RetrievalReport> {
    let (mut pictures, mut texts, mut image_of_text) = (Vec::new(), Vec::new(), Vec::new());
    let mut skipped = Vec::new();
    for_each_batch(model, test_set, &mut skipped, on_progress, |batch| {
        for (row, features) in batch {
            let Text::Captions(captions) = text_of(row)? else { return Err(wrong_kind(row, "captions")) };
            let n = if config.all_captions { captions.len() } else { 1 };
            image_of_text.extend(std::iter::repeat_n(pictures.len(), n));
            texts.extend(captions.into_iter().take(n));
            pictures.push(features.clone());
        }
        Ok(())
    })?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let (n_images, n_texts) = (pictures.len(), texts.len());
    let similarities = similarities(model, &pictures, &texts)?;
    let itc = retrieval(&similarities, n_images, &image_of_text);
    let reranked = match config.rescoring {
        Some(rescoring) => {
            let candidates = Candidates::best(&similarities, n_images, n_texts, config.n_candidates.get());
            let (text_logits, image_logits) =
                match_candidates(model, &pictures, &texts, &candidates, on_progress)?;
            Some(rerank(&similarities, &image_of_text, &candidates, &text_logits, &image_logits, rescoring))
        }
        None => None,
    };
    Ok(RetrievalReport { n_images, n_texts, itc, reranked, skipped })
}

/// A logit for each entry of lists of candidates.
type Lists = Vec<Vec<f32>>;

/// The "match" logits of all candidates, in the shapes of [`Candidates`]: of a picture's texts, and of a text's pictures.
fn match_candidates(
    model: &Blip2,
    pictures: &[ImageFeatures],
    texts: &[&str],
    candidates: &Candidates,
    on_progress: OnProgress<'_>,
) -> Result<(Lists, Lists)> {
    // A pair that is a candidate in both directions goes through the model once.
    let mut texts_of: Vec<Vec<usize>> = candidates.texts_of_image.clone();
    for (text, images) in candidates.images_of_text.iter().enumerate() {
        images.iter().for_each(|&image| texts_of[image].push(text));
    }
    let mut logits = BTreeMap::new();
    for (image, of_image) in texts_of.iter_mut().enumerate() {
        of_image.sort_unstable();
        of_image.dedup();
        let chosen: Vec<&str> = of_image.iter().map(|&text| texts[text]).collect();
        for (&text, [_, matches]) in of_image.iter().zip(model.itm_logits(&pictures[image], &chosen)?) {
            logits.insert((image, text), matches);
        }
        on_progress(image + 1, pictures.len());
    }
    let lists = |lists: &[Vec<usize>], pair: &dyn Fn(usize, usize) -> (usize, usize)| -> Lists {
        let of =
            |(query, found): (usize, &Vec<usize>)| found.iter().map(|&f| logits[&pair(query, f)]).collect();
        lists.iter().enumerate().map(of).collect()
    };
    Ok((
        lists(&candidates.texts_of_image, &|image, text| (image, text)),
        lists(&candidates.images_of_text, &|text, image| (image, text)),
    ))
}

/// `[n_images, n_texts]`: the largest cosine over a picture's queries.
fn similarities(model: &Blip2, pictures: &[ImageFeatures], texts: &[&str]) -> Result<Vec<f32>> {
    let mut text_rows = Vec::with_capacity(texts.len());
    for chunk in texts.chunks(64) {
        text_rows.extend(model.embed_candidates(chunk)?);
    }
    let width = model.config().qformer.image_text_hidden_size;
    let mut similarities = Vec::with_capacity(pictures.len() * texts.len());
    for chunk in pictures.chunks(AT_ONCE) {
        for queries in model.embed_images(&chunk.iter().collect::<Vec<_>>())? {
            similarities.extend(text_rows.iter().map(|text| {
                let cosine = |query: &[f32]| query.iter().zip(text).map(|(a, b)| a * b).sum::<f32>();
                queries.chunks_exact(width).map(cosine).fold(f32::NEG_INFINITY, f32::max)
            }));
        }
    }
    Ok(similarities)
}

/// Reads and encodes the pictures of some rows at a time; consecutive rows of one picture share its features. That no picture
/// can be read is an error.
fn for_each_batch(
    model: &Blip2,
    test_set: TestSet<'_>,
    skipped: &mut Vec<Skipped>,
    on_progress: OnProgress<'_>,
    mut visit: impl FnMut(&[(&Row, ImageFeatures)]) -> Result<()>,
) -> Result<()> {
    let TestSet { rows, base, pixels } = test_set;
    let mut last: Option<(&str, ImageFeatures)> = None;
    let mut n_read = 0;
    for (number, chunk) in rows.chunks(AT_ONCE).enumerate() {
        let mut batch = Vec::with_capacity(chunk.len());
        for row in chunk {
            if let Some((_, features)) = last.as_ref().filter(|(image, _)| *image == row.image) {
                batch.push((row, features.clone()));
                continue;
            }
            let path = base.join(&row.image);
            match blip2::image::open(&path, &Limits::default(), pixels) {
                Ok(picture) => {
                    for features in model.encode(&[picture])? {
                        last = Some((&row.image, features.clone()));
                        batch.push((row, features));
                    }
                }
                Err(error) => {
                    // A picture with several questions is one picture.
                    if skipped.iter().all(|picture| picture.name != row.image) {
                        // It has its name already.
                        let said = error.to_string();
                        let reason = said.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&said);
                        skipped.push(Skipped { name: row.image.clone(), reason: reason.to_owned() });
                    }
                }
            }
        }
        n_read += batch.len();
        if !batch.is_empty() {
            visit(&batch)?;
        }
        on_progress((number * AT_ONCE + chunk.len()).min(rows.len()), rows.len());
    }
    match skipped.first() {
        Some(first) if n_read == 0 => {
            Err(Error::Training(format!("there is nothing to measure on: no picture can be read, {first}")))
        }
        None if n_read == 0 => Err(Error::Training("there is nothing to measure on: no row".into())),
        _ => Ok(()),
    }
}

fn text_of(row: &Row) -> Result<Text> {
    row.text().map_err(|reason| Error::Training(format!("the row of {}: {reason}", row.image)))
}

fn wrong_kind(row: &Row, wanted: &str) -> Error {
    Error::Training(format!("the row of {} must hold {wanted}", row.image))
}

fn prediction(
    row: &Row,
    question: String,
    answers: &[blip2::model::Answer],
    references: Vec<String>,
    score: Option<f64>,
) -> Prediction {
    Prediction {
        image: row.image.clone(),
        question,
        text: answers.first().map(|answer| answer.text.clone()).unwrap_or_default(),
        references,
        score,
        group: row.group.clone(),
        kind: row.kind.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(group: &str, kind: &str, score: f64) -> Prediction {
        Prediction {
            image: format!("{group}.jpg"),
            question: "What?".into(),
            text: String::new(),
            references: Vec::new(),
            score: Some(score),
            group: Some(group.into()),
            kind: Some(kind.into()),
        }
    }

    #[test]
    fn accuracy_is_the_mean_over_rows_and_a_group_needs_most_of_its_rows() {
        let predictions = vec![
            said("a", "x", 1.0),
            said("a", "x", 1.0),
            said("a", "y", 0.0),
            said("b", "y", 1.0),
            said("b", "y", 0.0),
        ];
        let mut evaluated = Evaluated { predictions, skipped: Vec::new() };
        let (all, kinds) = evaluated.accuracy();
        assert!((all - 60.0).abs() < 1e-9);
        assert_eq!(kinds["x"], (100.0, 2));
        assert!((kinds["y"].0 - 100.0 / 3.0).abs() < 1e-9);
        assert_eq!(evaluated.groups(), (1, 2)); // half of b is not most of it
        // What belongs to no group makes none.
        evaluated.predictions.iter_mut().for_each(|prediction| prediction.group = None);
        assert_eq!(evaluated.groups(), (0, 0));
        evaluated.predictions.push(said("c", "x", 1.0));
        assert_eq!(evaluated.groups(), (1, 1));
    }
}
