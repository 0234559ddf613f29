//! What the decoder-only families share: how packed rows are read, with a cache and without.

use std::sync::Arc;

use candle_core::Tensor;

use super::loading::on_a_worker;
use crate::cache::{CachedSequence, KvCache};
use crate::layers::{AttentionShape, Plan, attention, attention_cached};
use crate::{Error, Result};

/// A decoder-only model: its layers, and what stands around them here.
pub(super) trait Causal: Sync {
    /// The heads of every layer.
    fn attention_shape(&self) -> AttentionShape;

    /// The pass over packed rows of embeddings at their `positions`; `attend` gets the layer's number, and queries, keys and
    /// values of these rows.
    ///
    /// # Errors
    /// When the shapes do not agree or a position is beyond the context.
    fn run(
        &self,
        embeds: &Tensor,
        positions: &Arc<[u32]>,
        attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor>;

    /// Reads packed rows, `[N, width]`; `plan` names each text's rows, `positions` each row's place in its text. Gives the
    /// final hidden states, ready for the head, in the same shape; differentiable to `embeds`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn forward(&self, embeds: &Tensor, positions: &Arc<[u32]>, plan: &Plan) -> Result<Tensor> {
        let shape = self.attention_shape();
        on_a_worker(|| self.run(embeds, positions, |_, q, k, v| attention(q, k, v, plan, shape, None)))
    }

    /// Reads packed rows that continue texts of a cache: `lengths[i]` rows for `sequences[i]`, in this order.
    ///
    /// # Errors
    /// As [`run`](Self::run), and when a sequence is not of this cache; then nothing has changed.
    fn forward_cached(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
    ) -> Result<Tensor> {
        let shape = self.attention_shape();
        cache.append(sequences, lengths, |rows, _, new| {
            on_a_worker(|| {
                self.run(embeds, &new.positions, |layer_idx, q, k, v| {
                    attention_cached(q, k, v, &mut rows[layer_idx], &new.plan, shape, None)
                })
            })
        })
    }
}

/// Refuses rows of another width than the model's, or beyond its context.
pub(super) fn check_rows(embeds: &Tensor, positions: &[u32], width: usize, context_len: usize) -> Result<()> {
    let (n_rows, found) = embeds.dims2()?;
    if found != width || n_rows != positions.len() {
        let n = positions.len();
        return Err(Error::Request(format!(
            "the language model was given {n_rows} rows of {found} values for {n} positions of {width}"
        )));
    }
    let n_tokens = positions.iter().max().map_or(0, |&last| last as usize + 1);
    if n_tokens > context_len {
        return Err(Error::TextTooLong { n_tokens, limit: context_len });
    }
    Ok(())
}
