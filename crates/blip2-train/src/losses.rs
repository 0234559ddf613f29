//! The three losses of stage 1 (BLIP-2 §3.2), as pure functions of features and logits.

use blip2::layers::linear_cross_entropy;
use blip2::qformer::{QFormer, TextBatch};
use candle_core::{D, Device, Tensor};

use crate::random::Random;
use crate::{Error, Result};

/// Label smoothing of ITC and ITG (LAVIS `blip2_qformer.py`).
pub const LABEL_SMOOTHING: f32 = 0.1;

/// Similarity of each picture with each text: the largest cosine over the picture's queries.
///
/// # Shapes
/// - `image_feats`: `[B * Q, width]`, `text_feats`: `[B, width]`, rows of length 1
/// - returns `[B pictures, B texts]`; its transpose is the text-to-picture similarity
///
/// # Errors
/// Those of the tensor engine.
pub fn similarities(image_feats: &Tensor, text_feats: &Tensor, n_queries: usize) -> Result<Tensor> {
    let (n_rows, n_texts) = (image_feats.dim(0)?, text_feats.dim(0)?);
    let by_query = image_feats.matmul(&text_feats.t()?)?; // [B * Q, B]
    Ok(by_query.reshape((n_rows / n_queries, n_queries, n_texts))?.max(1)?)
}

/// Image-text contrastive loss over both directions, averaged.
///
/// `image_ids` name the pictures: all captions of one picture are its positives and share the target mass.
///
/// # Shapes
/// - `similarities`: `[B, B]`, picture by text, of [`similarities`]
/// - `temperature`: a scalar, which divides them
/// - returns a scalar
///
/// # Errors
/// Those of the tensor engine.
pub fn contrastive_loss(similarities: &Tensor, temperature: &Tensor, image_ids: &[u64]) -> Result<Tensor> {
    let targets = contrastive_targets(image_ids, similarities.device())?;
    let logits = similarities.broadcast_div(temperature)?;
    let image_to_text = soft_cross_entropy(&logits, &targets)?;
    let text_to_image = soft_cross_entropy(&logits.t()?.contiguous()?, &targets)?;
    Ok(((image_to_text + text_to_image)? / 2.0)?)
}

fn contrastive_targets(image_ids: &[u64], device: &Device) -> Result<Tensor> {
    let n = image_ids.len();
    let mut targets = Vec::with_capacity(n * n);
    for id in image_ids {
        let n_positive = image_ids.iter().filter(|other| *other == id).count() as f32;
        let floor = LABEL_SMOOTHING / n as f32;
        let positive = (1.0 - LABEL_SMOOTHING) / n_positive + floor;
        targets.extend(image_ids.iter().map(|other| if other == id { positive } else { floor }));
    }
    Ok(Tensor::from_vec(targets, (n, n), device)?)
}

fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    // The maximum is a constant: it cancels in value and gradient.
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    Ok((log_p * targets)?.sum(D::Minus1)?.mean_all()?.neg()?)
}

/// Which pairs of a batch image-text matching looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HardNegatives {
    /// For each text, a picture that is not its own.
    pub image_for_text: Vec<usize>,
    /// For each picture, a text that is not one of its own.
    pub text_for_image: Vec<usize>,
}

/// Draws hard negatives with probability proportional to the softmax of the similarities; never the pair
/// itself nor another caption of the same picture.
///
/// `similarities` is `[B, B]` row-major, picture by text. At an infinite temperature all are equally likely.
///
/// # Errors
/// When a batch holds one picture only: there is no negative.
pub fn sample_negatives(
    similarities: &[f32],
    temperature: f32,
    image_ids: &[u64],
    random: &mut Random,
) -> Result<HardNegatives> {
    let n = image_ids.len();
    let mut draw = |own: usize, similarity: &dyn Fn(usize) -> f32| {
        let logit = |j: usize| f64::from(similarity(j) / temperature);
        let max = (0..n).map(logit).fold(f64::NEG_INFINITY, f64::max);
        let negative = |j: usize| image_ids[j] != image_ids[own];
        // The floor keeps every negative possible when the softmax underflows (LAVIS adds 1e-4 likewise).
        let weights: Vec<f64> =
            (0..n).map(|j| if negative(j) { (logit(j) - max).exp() + 1e-4 } else { 0.0 }).collect();
        random.weighted(&weights).ok_or_else(|| {
            Error::config("batch_size", "leaves a batch with one picture only: matching needs two or more")
        })
    };
    let image_for_text = (0..n).map(|t| draw(t, &|i| similarities[i * n + t])).collect::<Result<_>>()?;
    let text_for_image = (0..n).map(|i| draw(i, &|t| similarities[i * n + t])).collect::<Result<_>>()?;
    Ok(HardNegatives { image_for_text, text_for_image })
}

/// Image-text matching: cross-entropy of `[N, 2]` logits, the sum over the pairs.
///
/// # Errors
/// Those of the tensor engine.
pub fn matching_loss_sum(logits: &Tensor, labels: &[u32]) -> Result<Tensor> {
    Ok(blip2::layers::cross_entropy(logits, labels, 0.0)?.sum_all()?)
}

/// Image-grounded text generation: the sum over tokens of the loss of predicting each token from the ones
/// before it, and the number of tokens.
///
/// `hidden` is the output of [`QFormer::decode_text`] for `texts`, which start with `[DEC]`.
///
/// # Errors
/// Those of the tensor engine.
pub fn captioning_loss_sum(qformer: &QFormer, hidden: &Tensor, texts: &TextBatch) -> Result<(Tensor, usize)> {
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    for i in 0..texts.len() {
        let span = texts.span(i);
        rows.extend((span.start..span.end - 1).map(|row| row as u32));
        targets.extend_from_slice(&texts.text(i)[1..]);
    }
    let rows = Tensor::from_slice(&rows, rows.len(), hidden.device())?;
    let (x, decoder) = qformer.language_head(&hidden.index_select(&rows, 0)?)?;
    let losses = linear_cross_entropy(&x, decoder, &targets, LABEL_SMOOTHING)?;
    Ok((losses.sum_all()?, targets.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negatives_are_never_of_the_same_picture() {
        let ids = [7, 8, 7, 9];
        let similarities = vec![1.0; 16];
        for step in 0..200 {
            let negatives =
                sample_negatives(&similarities, 0.07, &ids, &mut Random::new(&[1, step])).unwrap();
            for i in 0..4 {
                assert_ne!(ids[negatives.image_for_text[i]], ids[i]);
                assert_ne!(ids[negatives.text_for_image[i]], ids[i]);
            }
        }
    }

    #[test]
    fn negatives_prefer_the_similar() {
        let mut similarities = vec![0.0; 9];
        similarities[1] = 1.0; // picture 0, text 1
        let mut hits = 0;
        for step in 0..200 {
            let random = &mut Random::new(&[1, step]);
            let negatives = sample_negatives(&similarities, 0.07, &[1, 2, 3], random).unwrap();
            hits += usize::from(negatives.text_for_image[0] == 1);
            hits += usize::from(negatives.image_for_text[1] == 0);
        }
        assert!(hits > 390, "{hits} of 400");
    }

    #[test]
    fn negatives_at_infinite_temperature_are_any() {
        let mut similarities = vec![0.0; 16];
        similarities[1] = 1.0; // picture 0, text 1
        let mut hits = [0; 4];
        for step in 0..600 {
            let random = &mut Random::new(&[1, step]);
            let negatives = sample_negatives(&similarities, f32::INFINITY, &[1, 2, 3, 4], random).unwrap();
            hits[negatives.text_for_image[0]] += 1;
        }
        assert_eq!(hits[0], 0);
        assert!(hits[1..].iter().all(|&n| (150..250).contains(&n)), "{hits:?}");
    }

    #[test]
    fn one_picture_has_no_negatives() {
        let error = sample_negatives(&[1.0; 4], 0.07, &[5, 5], &mut Random::new(&[1])).unwrap_err();
        assert!(error.to_string().contains("two or more"), "{error}");
    }

    #[test]
    fn untrained_contrastive_loss_is_the_logarithm_of_the_batch() {
        let similarities = Tensor::zeros((8, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
        let temperature = Tensor::new(0.07f32, &Device::Cpu).unwrap();
        let loss = contrastive_loss(&similarities, &temperature, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        assert!((loss.to_scalar::<f32>().unwrap() - 8f32.ln()).abs() < 1e-6);
    }
}
