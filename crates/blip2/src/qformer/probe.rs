//! Where the queries look: cross-attention weighted by what it is worth (Grad-CAM).

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::layers::AttentionShape;
use crate::{Error, Result};

/// Notes the cross-attention of one pass over one picture, so that the gradient of a score made from that pass can be
/// brought back to the attention's probabilities.
///
/// Grad-CAM (arXiv 1610.02391) as ALBEF and LAVIS apply it to cross-attention: a probability counts as much as the score
/// would rise with it, where it would rise.
#[derive(Debug, Default)]
pub struct CrossAttentionProbe {
    layers: Vec<Probed>,
}

#[derive(Debug)]
struct Probed {
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shape: AttentionShape,
    /// Zero, added to what the attention gives: its gradient is the gradient there.
    touch: Var,
}

impl CrossAttentionProbe {
    /// Notes one layer's attention, and gives its result back with the touch added.
    pub(super) fn note(
        &mut self,
        [queries, keys, values]: [&Tensor; 3],
        shape: AttentionShape,
        context: &Tensor,
    ) -> Result<Tensor> {
        let touch = Var::from_tensor(&context.zeros_like()?)?;
        let touched = (context + touch.as_tensor())?;
        let [queries, keys, values] = [queries, keys, values].map(Tensor::detach);
        self.layers.push(Probed { queries, keys, values, shape, touch });
        Ok(touched)
    }

    /// How much each of the picture's tokens was worth to the score that `gradients` come from: mean over layers, heads
    /// and queries, nowhere below zero.
    ///
    /// # Errors
    /// When no cross-attention was noted, or the score does not depend on it.
    pub fn relevance(&self, gradients: &GradStore) -> Result<Vec<f32>> {
        let mut relevance = Vec::new();
        for layer in &self.layers {
            let Some(gradient) = gradients.get(layer.touch.as_tensor()) else { continue };
            let of_layer = layer.relevance(gradient)?;
            if relevance.is_empty() {
                relevance = of_layer;
            } else {
                relevance.iter_mut().zip(of_layer).for_each(|(sum, x)| *sum += x);
            }
        }
        if relevance.is_empty() {
            return Err(Error::Request("the score does not depend on what the queries saw".into()));
        }
        let n_layers = self.layers.len() as f32;
        relevance.iter_mut().for_each(|x| *x /= n_layers);
        Ok(relevance)
    }
}

impl Probed {
    fn relevance(&self, gradient: &Tensor) -> Result<Vec<f32>> {
        let AttentionShape { n_heads, head_dim, scale, .. } = self.shape;
        let [q, k, v, d_out] =
            [&self.queries, &self.keys, &self.values, gradient].map(|rows| rows.to_vec2::<f32>());
        let (q, k, v, d_out) = (q?, k?, v?, d_out?);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let mut relevance = vec![0.0; k.len()];
        for (q, d_out) in q.iter().zip(&d_out) {
            for head in (0..n_heads).map(|head| head * head_dim..(head + 1) * head_dim) {
                let scores: Vec<f32> =
                    k.iter().map(|k| scale * dot(&q[head.clone()], &k[head.clone()])).collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = scores.iter().map(|score| (score - largest).exp()).sum();
                for ((relevance, score), v) in relevance.iter_mut().zip(&scores).zip(&v) {
                    // The result is the probabilities' sum of values, so this is the score's slope along one of them.
                    let slope = dot(&d_out[head.clone()], &v[head.clone()]);
                    *relevance += (score - largest).exp() / sum * slope.max(0.0);
                }
            }
        }
        let n = (q.len() * n_heads) as f32;
        relevance.iter_mut().for_each(|x| *x /= n);
        Ok(relevance)
    }
}
