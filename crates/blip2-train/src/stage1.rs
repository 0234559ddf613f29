//! Stage 1: the Q-Former learns to look at pictures through text (BLIP-2 §3.2).
//!
//! [`gradients`] computes ITC + ITM + ITG and their gradients for a batch. With more than one part it runs the
//! contrastive loss in two passes: features of all parts without a graph, the loss and its gradient on the
//! features, then each part again with its graph (dropout replayed) and the feature gradients fed in. Memory is
//! that of one part, the gradients are those of the whole batch.

use std::collections::BTreeMap;
use std::ops::Range;

use blip2::layers::DropoutRng;
use blip2::qformer::{QFormer, TextBatch};
use candle_core::{DType, Tensor, Var};

use crate::gradients::Gradients;
use crate::health::query_cosine;
use crate::losses::{
    HardNegatives, captioning_loss_sum, contrastive_loss, matching_loss_sum, sample_negatives, similarities,
};
use crate::random::Random;
use crate::{Error, Result};

/// A stage-1 batch of B picture-text pairs.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The frozen encoder's tokens, `[B * P, encoder_hidden_size]`.
    pub image_embeds: Tensor,
    /// Equal for pairs of one picture.
    pub image_ids: Vec<u64>,
    /// Token ids of each text, `[CLS] … [SEP]`.
    pub texts: Vec<Vec<u32>>,
}

/// What a step needs besides the batch.
#[derive(Debug, Clone, Copy)]
pub struct StepOptions {
    /// Pairs computed at once; the batch is cut into parts of this size.
    pub micro_batch: usize,
    /// Dropout probability.
    pub dropout: f32,
    /// The run's seed.
    pub seed: u64,
    /// The step, which with the seed determines dropout and negatives.
    pub step: u64,
    /// The id of `[DEC]`, which starts a text to generate in place of `[CLS]`.
    pub decoder_start: u32,
    /// The share of a text's tokens between `[CLS]` and `[SEP]` that the contrastive loss sees; 1 for all.
    pub text_tokens_kept: f64,
    /// Whether the step learns matching too; it is half of the work.
    pub matching: bool,
    /// Whether the step learns captioning.
    pub captioning: bool,
    /// Whether matching's negatives are drawn by similarity, or any of the batch.
    pub hard_negatives: bool,
}

/// The values a step reports.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Values {
    /// Contrastive loss.
    pub itc: f32,
    /// Matching loss; 0 in a step without matching, like the accuracy.
    pub itm: f32,
    /// Captioning loss; 0 in a step without captioning.
    pub itg: f32,
    /// Share of pairs whose match is classified rightly.
    pub itm_accuracy: f32,
    /// In-batch recall at 1, the mean of both directions.
    pub recall_at_1: f32,
    /// The learned temperature before the step.
    pub temperature: f32,
    /// Mean cosine between different query outputs of one picture: 1 is collapse.
    pub query_cosine: f32,
}

impl Values {
    /// The sum of the three losses.
    pub fn loss(&self) -> f32 {
        self.itc + self.itm + self.itg
    }
}

/// Some pairs of the batch, computed together.
struct Part {
    rows: Range<usize>,
    texts: TextBatch,
    /// What contrast sees of the texts.
    contrast_texts: TextBatch,
}

/// Computes the losses of `batch` and the gradients of `variables`, the Q-Former's own.
///
/// # Errors
/// When the batch holds one picture only, a text does not fit, or the tensor engine fails.
pub fn gradients(
    qformer: &QFormer,
    variables: &BTreeMap<String, Var>,
    batch: &Batch,
    options: StepOptions,
) -> Result<(Gradients, Values)> {
    run(qformer, variables, batch, None, options)
}

/// [`gradients`] with the hard negatives given instead of drawn, for a comparison with another implementation.
///
/// # Errors
/// As [`gradients`].
pub fn gradients_with_negatives(
    qformer: &QFormer,
    variables: &BTreeMap<String, Var>,
    batch: &Batch,
    negatives: &HardNegatives,
    options: StepOptions,
) -> Result<(Gradients, Values)> {
    run(qformer, variables, batch, Some(negatives), options)
}

fn run(
    qformer: &QFormer,
    variables: &BTreeMap<String, Var>,
    batch: &Batch,
    negatives: Option<&HardNegatives>,
    options: StepOptions,
) -> Result<(Gradients, Values)> {
    let n = batch.texts.len();
    let parts: Vec<Part> = (0..n)
        .step_by(options.micro_batch.max(1))
        .map(|start| {
            let rows = start..(start + options.micro_batch.max(1)).min(n);
            let contrast_texts =
                TextBatch::new(rows.clone().map(|i| kept_tokens(&batch.texts[i], i, options)));
            Part { texts: TextBatch::new(&batch.texts[rows.clone()]), contrast_texts, rows }
        })
        .collect();
    let n_image_tokens = batch.image_embeds.dim(0)? / n.max(1);
    let step = Step { qformer, batch, negatives, options, n_image_tokens };
    if let [part] = &parts[..] { step.one_pass(variables, part) } else { step.two_pass(variables, &parts) }
}

/// What random numbers are drawn for: each purpose has its own stream.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    QueryDropout,
    TextDropout,
    MatchDropout,
    CaptionDropout,
    Negatives,
    TextTokens,
}

/// Text number `row` of the batch without the tokens that the step's contrastive loss does not see: each token is left out by a
/// draw of its own, in the same way whichever part of the batch the text is in.
fn kept_tokens(ids: &[u32], row: usize, options: StepOptions) -> Vec<u32> {
    let mut random = Random::new(&[options.seed, options.step, Purpose::TextTokens as u64, row as u64]);
    let last = ids.len() - 1;
    let mut is_kept = |i: usize| {
        let draw = random.unit();
        i == 0 || i == last || draw < options.text_tokens_kept
    };
    ids.iter().enumerate().filter(|(i, _)| is_kept(*i)).map(|(_, &id)| id).collect()
}

struct Step<'a> {
    qformer: &'a QFormer,
    batch: &'a Batch,
    negatives: Option<&'a HardNegatives>,
    options: StepOptions,
    n_image_tokens: usize,
}

/// The contrastive features of a part, and what the later passes need of the query pass.
struct Features {
    image: Tensor,
    text: Tensor,
    query_keys: blip2::qformer::QueryKeys,
    image_keys: blip2::qformer::ImageKeys,
}

impl Step<'_> {
    fn one_pass(&self, variables: &BTreeMap<String, Var>, part: &Part) -> Result<(Gradients, Values)> {
        let features = self.features(part)?;
        let sims = similarities(&features.image, &features.text, self.qformer.config().num_query_tokens)?;
        let itc = contrastive_loss(&sims, self.temperature()?, &self.batch.image_ids)?;
        let (mut values, negatives) = self.measure(&sims, &itc)?;
        let rest = self.match_and_caption(part, &features, &negatives, &mut values)?;
        let mut gradients = Gradients::default();
        gradients.backward(variables, &(itc + rest)?)?;
        Ok((gradients, values))
    }

    fn two_pass(&self, variables: &BTreeMap<String, Var>, parts: &[Part]) -> Result<(Gradients, Values)> {
        let n_queries = self.qformer.config().num_query_tokens;
        let (mut images, mut texts) = (Vec::new(), Vec::new());
        for part in parts {
            let features = self.features(part)?;
            images.push(features.image.detach());
            texts.push(features.text.detach());
        }
        let image = Var::from_tensor(&Tensor::cat(&images, 0)?)?;
        let text = Var::from_tensor(&Tensor::cat(&texts, 0)?)?;
        let sims = similarities(image.as_tensor(), text.as_tensor(), n_queries)?;
        let itc = contrastive_loss(&sims, self.temperature()?, &self.batch.image_ids)?;
        let (mut values, negatives) = self.measure(&sims, &itc)?;
        // What is not of the features reaches the temperature.
        let mut gradients = Gradients::default();
        let mut store = gradients.backward(variables, &itc)?;
        let missing = || candle_core::Error::Msg("the contrastive loss gave its features no gradient".into());
        let d_image = store.remove(image.as_tensor()).ok_or_else(missing)?;
        let d_text = store.remove(text.as_tensor()).ok_or_else(missing)?;
        for part in parts {
            let features = self.features(part)?;
            let (start, len) = (part.rows.start, part.rows.len());
            let d_image = d_image.narrow(0, start * n_queries, len * n_queries)?.contiguous()?;
            let d_text = d_text.narrow(0, start, len)?.contiguous()?;
            // Its gradient with respect to the features is the one of the whole batch's contrastive loss.
            let surrogate =
                ((&features.image * d_image)?.sum_all()? + (&features.text * d_text)?.sum_all()?)?;
            let rest = self.match_and_caption(part, &features, &negatives, &mut values)?;
            gradients.backward(variables, &(surrogate + rest)?)?;
        }
        Ok((gradients, values))
    }

    /// The masks of one pass of one part: the same at every call, which is what replays them.
    fn dropout(&self, part: &Part, purpose: Purpose) -> DropoutRng {
        let StepOptions { seed, step, dropout, .. } = self.options;
        let mut random = Random::new(&[seed, step, purpose as u64, part.rows.start as u64]);
        DropoutRng::new(dropout, random.next_u64())
    }

    fn features(&self, part: &Part) -> Result<Features> {
        let image_keys = self.image_keys(part.rows.clone())?;
        let (query_output, query_keys) =
            self.qformer.encode_queries(&image_keys, &mut self.dropout(part, Purpose::QueryDropout))?;
        let text =
            self.qformer.encode_text(&part.contrast_texts, &mut self.dropout(part, Purpose::TextDropout))?;
        let image = self.qformer.project_image(&query_output)?;
        let text = self.qformer.project_text(&text, &part.contrast_texts)?;
        Ok(Features { image, text, query_keys, image_keys })
    }

    fn image_keys(&self, rows: Range<usize>) -> Result<blip2::qformer::ImageKeys> {
        let p = self.n_image_tokens;
        let embeds = self.batch.image_embeds.narrow(0, rows.start * p, rows.len() * p)?;
        Ok(self.qformer.image_keys(&embeds, rows.len())?)
    }

    /// Matching and captioning of a part, each as its share of the whole batch's mean. `values` are those of the parts before it,
    /// and have it added.
    fn match_and_caption(
        &self,
        part: &Part,
        features: &Features,
        negatives: &HardNegatives,
        values: &mut Values,
    ) -> Result<Tensor> {
        let itg = if self.options.captioning {
            self.caption(part, features, self.n_tokens())?
        } else {
            Tensor::zeros((), DType::F32, self.batch.image_embeds.device())?
        };
        values.itg += itg.to_scalar::<f32>()?;
        if !self.options.matching {
            return Ok(itg);
        }
        let n_pairs = 3 * self.batch.texts.len();
        let (logits, labels) = self.match_logits(part, features, negatives)?;
        let itm = (matching_loss_sum(&logits, &labels)? / n_pairs as f64)?;
        values.itm += itm.to_scalar::<f32>()?;
        values.itm_accuracy += count_correct(&logits, &labels)? as f32 / n_pairs as f32;
        Ok((itm + itg)?)
    }

    /// A part's share of the captioning loss.
    fn caption(&self, part: &Part, features: &Features, n_tokens: usize) -> Result<Tensor> {
        let texts = (0..part.texts.len()).map(|i| {
            let mut ids = part.texts.text(i).to_vec();
            ids[0] = self.options.decoder_start;
            ids
        });
        let texts = TextBatch::new(texts);
        let mut dropout = self.dropout(part, Purpose::CaptionDropout);
        let hidden = self.qformer.decode_text(&features.query_keys, &texts, &mut dropout)?;
        let (sum, _) = captioning_loss_sum(self.qformer, &hidden, &texts)?;
        Ok((sum / n_tokens as f64)?)
    }

    /// The logits of a part's 3B pairs: own picture and own text, a negative picture, a negative text.
    fn match_logits(
        &self,
        part: &Part,
        features: &Features,
        negatives: &HardNegatives,
    ) -> Result<(Tensor, Vec<u32>)> {
        let rows = part.rows.clone();
        let n = rows.len();
        let is_whole_batch = n == self.batch.texts.len();
        // In a part, the negative pictures may lie outside it: their keys are computed for it alone.
        let (image_keys, negative_images): (_, Vec<usize>) = if is_whole_batch {
            (features.image_keys.clone(), negatives.image_for_text.clone())
        } else {
            let p = self.n_image_tokens;
            let embeds = &self.batch.image_embeds;
            let mut pieces = vec![embeds.narrow(0, rows.start * p, n * p)?];
            for &image in &negatives.image_for_text[rows.clone()] {
                pieces.push(embeds.narrow(0, image * p, p)?);
            }
            (self.qformer.image_keys(&Tensor::cat(&pieces, 0)?, 2 * n)?, (n..2 * n).collect())
        };
        let own: Vec<usize> = (0..n).collect();
        let images: Vec<usize> = own.iter().chain(&negative_images).chain(&own).copied().collect();
        let own_texts = rows.clone().chain(rows.clone());
        let negative_texts = rows.map(|i| negatives.text_for_image[i]);
        let texts = TextBatch::new(own_texts.chain(negative_texts).map(|i| &self.batch.texts[i]));
        let mut dropout = self.dropout(part, Purpose::MatchDropout);
        let (queries, _) = self.qformer.encode_pairs(&image_keys, &images, &texts, &mut dropout)?;
        let labels = (0..3 * n).map(|i| u32::from(i < n)).collect();
        Ok((self.qformer.match_logits(&queries)?, labels))
    }

    fn temperature(&self) -> Result<&Tensor> {
        let missing = || candle_core::Error::Msg("a Q-Former in training has a temperature".into());
        Ok(self.qformer.temperature()?.ok_or_else(missing)?)
    }

    fn n_tokens(&self) -> usize {
        self.batch.texts.iter().map(|ids| ids.len() - 1).sum()
    }

    fn measure(&self, sims: &Tensor, itc: &Tensor) -> Result<(Values, HardNegatives)> {
        let ids = &self.batch.image_ids;
        let itc = itc.to_scalar::<f32>()?;
        // Told before negatives are drawn: there is no drawing by similarities that are no numbers.
        if !itc.is_finite() {
            return Err(Error::NotFinite { step: self.options.step, what: "itc".into() });
        }
        let temperature = self.temperature()?.to_scalar::<f32>()?;
        let sims = sims.flatten_all()?.to_vec1::<f32>()?;
        let mut random = Random::new(&[self.options.seed, self.options.step, Purpose::Negatives as u64]);
        let negatives = match self.negatives {
            Some(given) => given.clone(),
            None if self.options.hard_negatives => sample_negatives(&sims, temperature, ids, &mut random)?,
            None => sample_negatives(&sims, f32::INFINITY, ids, &mut random)?,
        };
        let values = Values {
            itc,
            temperature,
            query_cosine: query_cosine(self.qformer, &self.batch.image_embeds, ids.len())?,
            recall_at_1: recall_at_1(&sims, ids),
            ..Values::default()
        };
        Ok((values, negatives))
    }
}

fn recall_at_1(sims: &[f32], ids: &[u64]) -> f32 {
    let n = ids.len();
    let hit = |own: usize, similarity: &dyn Fn(usize) -> f32| {
        (0..n)
            .max_by(|&a, &b| similarity(a).total_cmp(&similarity(b)))
            .is_some_and(|best| ids[best] == ids[own])
    };
    let image_to_text = (0..n).filter(|&i| hit(i, &|t| sims[i * n + t])).count();
    let text_to_image = (0..n).filter(|&t| hit(t, &|i| sims[i * n + t])).count();
    (image_to_text + text_to_image) as f32 / (2 * n) as f32
}

fn count_correct(logits: &Tensor, labels: &[u32]) -> Result<usize> {
    let logits = logits.to_vec2::<f32>()?;
    Ok(logits.iter().zip(labels).filter(|(l, label)| u32::from(l[1] > l[0]) == **label).count())
}
