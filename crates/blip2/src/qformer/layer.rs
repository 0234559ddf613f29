//! One layer: shared self-attention, the queries' cross-attention, a feed-forward part for queries and one for text.

use candle_core::Tensor;

use super::{CrossAttentionProbe, QFormerConfig};
use crate::layers::{
    Activation, AttentionShape, DropoutRng, LayerNorm, Linear, Loader, Plan, activate, attention,
};
use crate::{Error, Result};

#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention: Attention,
    pub(super) crossattention: Option<Attention>,
    query: FeedForward,
    text: Option<FeedForward>,
}

impl Layer {
    pub(super) fn load(
        config: &QFormerConfig,
        loader: &Loader<'_>,
        layer_idx: usize,
        with_text: bool,
    ) -> Result<Self> {
        let crosses = layer_idx.is_multiple_of(config.cross_attention_frequency);
        let cross = || Attention::load(config, &loader.at("crossattention"), config.encoder_hidden_size);
        Ok(Self {
            attention: Attention::load(config, &loader.at("attention"), config.hidden_size)?,
            crossattention: crosses.then(cross).transpose()?,
            query: FeedForward::load(config, loader, "_query")?,
            text: with_text.then(|| FeedForward::load(config, loader, "")).transpose()?,
        })
    }

    /// What follows the self-attention that queries and text share: the queries look at the picture, then queries and text pass
    /// a feed-forward layer each. `hidden` has the query rows first.
    pub(super) fn after_self_attention(
        &self,
        hidden: &Tensor,
        n_query_rows: usize,
        cross: Option<(&Attention, &(Tensor, Tensor), &Plan)>,
        probe: Option<&mut CrossAttentionProbe>,
        dropout: &mut DropoutRng,
    ) -> Result<Tensor> {
        let n_text_rows = hidden.dim(0)? - n_query_rows;
        let queries = if n_query_rows > 0 {
            let mut queries = hidden.narrow(0, 0, n_query_rows)?;
            if let Some((block, (k, v), plan)) = cross {
                queries = block.forward(&queries, k, v, plan, probe, dropout)?;
            }
            Some(self.query.forward(&queries, dropout)?)
        } else {
            None
        };
        if n_text_rows == 0 {
            return queries.ok_or_else(|| Error::Request("an empty batch".into()));
        }
        let Some(text) = &self.text else {
            return Err(Error::Request("this checkpoint was loaded without the Q-Former's text side".into()));
        };
        let text = text.forward(&hidden.narrow(0, n_query_rows, n_text_rows)?, dropout)?;
        match queries {
            Some(queries) => Ok(Tensor::cat(&[&queries, &text], 0)?),
            None => Ok(text),
        }
    }
}

/// Attention with its output projection and post-norm residual; keys and values come from the caller.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    query: Linear,
    pub(super) key: Linear,
    pub(super) value: Linear,
    dense: Linear,
    layer_norm: LayerNorm,
    shape: AttentionShape,
}

impl Attention {
    pub(super) fn load(config: &QFormerConfig, loader: &Loader<'_>, key_width: usize) -> Result<Self> {
        let (width, n_heads) = (config.hidden_size, config.num_attention_heads);
        let (inner, output) = (loader.at("attention"), loader.at("output"));
        Ok(Self {
            query: inner.linear("query", width, width)?,
            key: inner.linear("key", key_width, width)?,
            value: inner.linear("value", key_width, width)?,
            dense: output.linear("dense", width, width)?,
            layer_norm: LayerNorm::load(&output.at("LayerNorm"), width, config.layer_norm_eps)?,
            shape: AttentionShape::multi_head(n_heads, width / n_heads),
        })
    }

    pub(super) fn forward(
        &self,
        x: &Tensor,
        k: &Tensor,
        v: &Tensor,
        plan: &Plan,
        probe: Option<&mut CrossAttentionProbe>,
        dropout: &mut DropoutRng,
    ) -> Result<Tensor> {
        let q = self.query.forward(x)?;
        let mut context = attention(&q, k, v, plan, self.shape, dropout.draw())?;
        if let Some(probe) = probe {
            context = probe.note([&q, k, v], self.shape, &context)?;
        }
        let out = dropout.apply(&self.dense.forward(&context)?)?;
        Ok(self.layer_norm.forward_residual(&out, x)?)
    }
}

#[derive(Debug, Clone)]
struct FeedForward {
    intermediate: Linear,
    output: Linear,
    layer_norm: LayerNorm,
}

impl FeedForward {
    pub(super) fn load(config: &QFormerConfig, loader: &Loader<'_>, suffix: &str) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let output = loader.at(format!("output{suffix}"));
        Ok(Self {
            intermediate: loader.at(format!("intermediate{suffix}")).linear("dense", width, inner)?,
            output: output.linear("dense", inner, width)?,
            layer_norm: LayerNorm::load(&output.at("LayerNorm"), width, config.layer_norm_eps)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, dropout: &mut DropoutRng) -> Result<Tensor> {
        let inner = activate(&self.intermediate.forward(x)?, Activation::GeluErf)?;
        let out = dropout.apply(&self.output.forward(&inner)?)?;
        Ok(self.layer_norm.forward_residual(&out, x)?)
    }
}
