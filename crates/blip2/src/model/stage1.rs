//! What the Q-Former of stage 1 does alone: match, embed, classify.

use std::path::{Path, PathBuf};

use candle_core::{D, Tensor};

use super::texts::{LAVIS_MATCH_TOKENS, LAVIS_RETRIEVAL_TOKENS, TextReader, Texts};
use super::{Blip2, ImageFeatures, ModelConfig, OpenOptions, Stage1Config, image_keys};
use crate::layers::DropoutRng;
use crate::qformer::{QFormer, TextBatch, TextSide};
use crate::text::BertTokenizer;
use crate::weights::int8::TrainedWeights;
use crate::{Error, Result};

/// Divides similarities where the checkpoint has lost its learned temperature: the value that training begins with.
const INITIAL_TEMPERATURE: f32 = 0.07;

#[derive(Debug)]
pub(super) struct Stage1 {
    qformer: QFormer,
    reader: TextReader,
    n_parameters: usize,
}

/// How well a text fits a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatchScore {
    /// Probability that the text matches, from the matching head (ITM).
    pub itm_probability: f32,
    /// Cosine of text and picture, the largest over the queries, without temperature (ITC).
    pub itc_similarity: f32,
}

/// A label and how likely it is among the given ones.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelScore {
    /// The label, as it was given.
    pub label: String,
    /// Softmax over the labels of the similarities divided by the learned temperature, or by the 0.07 that training begins
    /// with where the checkpoint has lost it, as those that were converted to Hugging Face's layout have.
    pub probability: f32,
    /// Cosine of label and picture, the largest over the queries.
    pub itc_similarity: f32,
}

impl Stage1 {
    pub(super) fn open(
        folder: &Path,
        config: &ModelConfig,
        stage1: &Stage1Config,
        options: &OpenOptions,
    ) -> Result<Self> {
        let paths: Vec<PathBuf> = stage1.weights.iter().map(|file| folder.join(file)).collect();
        let weights = TrainedWeights::open(&paths)?;
        let loader = options.bridge_loader(&weights, options.precision, None);
        let qformer = QFormer::load(&config.qformer, &loader, TextSide::Whole)?;
        weights.finish()?;
        let vocabulary = folder.join(&stage1.vocabulary);
        let tokenizer = BertTokenizer::from_vocab(&vocabulary)?;
        tokenizer
            .check_rows(config.qformer.vocab_size)
            .map_err(|reason| Error::File { path: vocabulary, reason })?;
        let texts = Texts::of(options.preset, Texts::Cleaned);
        let reader = TextReader::new(tokenizer, texts, config.qformer.max_position_embeddings);
        Ok(Self::new(qformer, reader, weights.n_parameters()))
    }

    pub(super) fn new(qformer: QFormer, reader: TextReader, n_parameters: usize) -> Self {
        Self { qformer, reader, n_parameters }
    }

    pub(super) fn n_parameters(&self) -> usize {
        self.n_parameters
    }

    pub(super) fn qformer(&self) -> &QFormer {
        &self.qformer
    }

    pub(super) fn tokenize(&self, texts: &[&str]) -> Result<TextBatch> {
        self.tokenize_cut(texts, None)
    }

    /// [`tokenize`](Self::tokenize), of texts that LAVIS reads so many tokens of.
    fn tokenize_cut(&self, texts: &[&str], lavis_tokens: impl Into<Option<usize>>) -> Result<TextBatch> {
        let lavis_tokens = lavis_tokens.into();
        let ids = texts.iter().map(|text| self.reader.ids(text, lavis_tokens)).collect::<Result<Vec<_>>>()?;
        Ok(TextBatch::new(ids))
    }

    /// `[B, Q, E]`
    fn embed_images(&self, features: &[&ImageFeatures]) -> Result<Tensor> {
        let (queries, _) =
            self.qformer.encode_queries(&image_keys(&self.qformer, features)?, &mut DropoutRng::off())?;
        let rows = self.qformer.project_image(&queries)?;
        let (n_rows, width) = rows.dims2()?;
        Ok(rows.reshape((features.len(), n_rows / features.len(), width))?)
    }

    /// `[T, E]`
    fn embed_texts(&self, texts: &TextBatch) -> Result<Tensor> {
        let hidden = self.qformer.encode_text(texts, &mut DropoutRng::off())?;
        self.qformer.project_text(&hidden, texts)
    }

    /// A row of `E` values for each text.
    fn embed_batch(&self, texts: &TextBatch) -> Result<Vec<Vec<f32>>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        Ok(self.embed_texts(texts)?.to_vec2()?)
    }

    /// The queries of a picture with each text, `[T * Q, D]`.
    fn encode_pairs(&self, features: &ImageFeatures, texts: &TextBatch) -> Result<Tensor> {
        if texts.is_empty() {
            return Err(Error::Request("there is no text to match the picture with".into()));
        }
        let keys = image_keys(&self.qformer, &[features])?;
        let images = vec![0; texts.len()];
        let (queries, _) = self.qformer.encode_pairs(&keys, &images, texts, &mut DropoutRng::off())?;
        Ok(queries)
    }

    fn itm_logits(&self, features: &ImageFeatures, texts: &TextBatch) -> Result<Vec<[f32; 2]>> {
        let queries = self.encode_pairs(features, texts)?;
        let logits = self.qformer.match_logits(&queries)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(logits.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect())
    }

    /// Cosine of a picture with each text, the largest over the queries.
    fn similarities(&self, features: &ImageFeatures, texts: &TextBatch) -> Result<Vec<f32>> {
        let image = self.embed_images(&[features])?.squeeze(0)?; // [Q, E]
        let by_query = self.embed_texts(texts)?.matmul(&image.t()?)?; // [T, Q]
        Ok(by_query.max(D::Minus1)?.to_vec1()?)
    }
}

/// What stands for the label in a template of [`Blip2::classify`].
pub const LABEL: &str = "{label}";

/// The texts that [`Blip2::classify`] compares with a picture: the template with each label in it.
pub fn labelled(template: &str, labels: &[&str]) -> Vec<String> {
    labels.iter().map(|label| template.replace(LABEL, label)).collect()
}

impl Blip2 {
    /// The matching head's raw logits (no match, match) of a picture with each text, as re-ranking needs them. Texts are those
    /// of [`embed_candidates`](Self::embed_candidates).
    ///
    /// # Errors
    /// As [`match_texts`](Self::match_texts).
    pub fn itm_logits(&self, features: &ImageFeatures, texts: &[&str]) -> Result<Vec<[f32; 2]>> {
        let stage1 = self.stage1()?;
        stage1.itm_logits(features, &stage1.tokenize_cut(texts, LAVIS_RETRIEVAL_TOKENS)?)
    }

    /// How well each text fits a picture; with [`Preset::Lavis`] its first 32 tokens.
    ///
    /// [`Preset::Lavis`]: super::Preset::Lavis
    ///
    /// # Errors
    /// When the model has no stage-1 part, there is no text, or a text is empty or too long.
    pub fn match_texts(&self, features: &ImageFeatures, texts: &[&str]) -> Result<Vec<MatchScore>> {
        let stage1 = self.stage1()?;
        let batch = stage1.tokenize_cut(texts, LAVIS_MATCH_TOKENS)?;
        let logits = stage1.itm_logits(features, &batch)?;
        let score = |([no, yes], itc_similarity): ([f32; 2], f32)| MatchScore {
            itm_probability: 1.0 / (1.0 + (no - yes).exp()),
            itc_similarity,
        };
        Ok(logits.into_iter().zip(stage1.similarities(features, &batch)?).map(score).collect())
    }

    /// Features of pictures for comparing them with texts: for each picture its queries' rows, `Q * E` values, each
    /// row of length 1.
    ///
    /// # Errors
    /// When the model has no stage-1 part.
    pub fn embed_images(&self, features: &[&ImageFeatures]) -> Result<Vec<Vec<f32>>> {
        let rows = self.stage1()?.embed_images(features)?;
        Ok(rows.flatten_from(1)?.to_vec2()?)
    }

    /// Features of texts for comparing them with pictures, `E` values of length 1 each.
    ///
    /// # Errors
    /// When the model has no stage-1 part, or a text is empty or too long.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let stage1 = self.stage1()?;
        stage1.embed_batch(&stage1.tokenize(texts)?)
    }

    /// As [`embed_texts`](Self::embed_texts), of texts among which retrieval finds a picture's: with [`Preset::Lavis`] their
    /// first 35 tokens.
    ///
    /// [`Preset::Lavis`]: super::Preset::Lavis
    ///
    /// # Errors
    /// As [`embed_texts`](Self::embed_texts).
    pub fn embed_candidates(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let stage1 = self.stage1()?;
        stage1.embed_batch(&stage1.tokenize_cut(texts, LAVIS_RETRIEVAL_TOKENS)?)
    }

    /// The raw hidden states of texts that the Q-Former reads without a picture (LAVIS's `text_embeds`): for each text `[N, D]`,
    /// a row for each of its [`n_matcher_tokens`](Self::n_matcher_tokens), from `[CLS]` to `[SEP]`. The first row is what
    /// [`embed_texts`](Self::embed_texts) projects.
    ///
    /// # Errors
    /// As [`embed_texts`](Self::embed_texts).
    pub fn text_features(&self, texts: &[&str]) -> Result<Vec<Tensor>> {
        let stage1 = self.stage1()?;
        let batch = stage1.tokenize(texts)?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let rows = stage1.qformer.encode_text(&batch, &mut DropoutRng::off())?;
        let of_text = |text| -> Result<Tensor> {
            let span = batch.span(text);
            Ok(rows.narrow(0, span.start, span.len())?)
        };
        (0..batch.len()).map(of_text).collect()
    }

    /// The raw queries after a picture and a text were read together, each seeing the other (LAVIS's `multimodal_embeds`):
    /// `[T, Q, D]`, for the picture with each text. They are what the matching head judges.
    ///
    /// # Errors
    /// As [`match_texts`](Self::match_texts).
    pub fn multimodal_features(&self, features: &ImageFeatures, texts: &[&str]) -> Result<Tensor> {
        let stage1 = self.stage1()?;
        let queries = stage1.encode_pairs(features, &stage1.tokenize(texts)?)?;
        let (n_rows, width) = queries.dims2()?;
        Ok(queries.reshape((texts.len(), n_rows / texts.len(), width))?)
    }

    /// How many tokens the Q-Former reads of each text.
    ///
    /// # Errors
    /// As [`embed_texts`](Self::embed_texts).
    pub fn n_matcher_tokens(&self, texts: &[&str]) -> Result<Vec<usize>> {
        let batch = self.stage1()?.tokenize(texts)?;
        Ok((0..batch.len()).map(|text| batch.text(text).len()).collect())
    }

    /// Which of the labels a picture shows, the likeliest first; each is compared as `template` with `{label}` replaced.
    ///
    /// # Errors
    /// When the model has no stage-1 part, there is no label, the template has no `{label}`, or a text is too long.
    pub fn classify(
        &self,
        features: &ImageFeatures,
        labels: &[&str],
        template: &str,
    ) -> Result<Vec<LabelScore>> {
        let stage1 = self.stage1()?;
        if labels.is_empty() {
            return Err(Error::Request("there is no label to choose from".into()));
        }
        if labels.iter().any(|label| label.trim().is_empty()) {
            return Err(Error::Request("a label is empty".into()));
        }
        if !template.contains(LABEL) {
            return Err(Error::Request(format!("the template \"{template}\" has no {LABEL}")));
        }
        let texts = labelled(template, labels);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let similarities = stage1.similarities(features, &stage1.tokenize(&texts)?)?;
        let temperature =
            stage1.qformer.temperature()?.map_or(Ok(INITIAL_TEMPERATURE), Tensor::to_scalar::<f32>)?;
        let largest = similarities.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |similarity: f32| ((similarity - largest) / temperature).exp();
        let sum: f32 = similarities.iter().map(|&similarity| weight(similarity)).sum();
        let mut scores: Vec<_> = labels
            .iter()
            .zip(similarities)
            .map(|(label, itc_similarity)| LabelScore {
                label: (*label).to_owned(),
                probability: weight(itc_similarity) / sum,
                itc_similarity,
            })
            .collect();
        scores.sort_by(|a, b| b.probability.total_cmp(&a.probability));
        Ok(scores)
    }
}
