//! The Q-Former's sizes, with the field names of Hugging Face's `config.json`.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Epsilon of LAVIS's `ln_vision`, PyTorch's default. Hugging Face's has the encoder's, 1e-6.
pub(crate) const LN_VISION_EPS: f64 = 1e-5;

/// The Q-Former (`Blip2QFormerConfig`), with what stage 1 adds to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QFormerConfig {
    /// Text vocabulary, `[DEC]` included; 30523 for the BERT tokenizer.
    pub vocab_size: usize,
    /// Width of queries and text tokens.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Longest text, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of the BERT layer norms.
    pub layer_norm_eps: f64,
    /// Every n-th layer, from layer 0, has cross-attention to the picture.
    pub cross_attention_frequency: usize,
    /// Width of the picture's tokens.
    pub encoder_hidden_size: usize,
    /// Learned queries a picture.
    pub num_query_tokens: usize,
    /// Width of the space in which pictures and texts are compared.
    pub image_text_hidden_size: usize,
    /// Epsilon of the layer norm on the picture's tokens (`ln_vision`).
    pub vision_layer_norm_eps: f64,
}

impl QFormerConfig {
    /// Parameters of the query path: queries, norms and layers, without the text side.
    pub fn n_query_parameters(&self) -> usize {
        let Self { hidden_size: d, intermediate_size: ffn, encoder_hidden_size: e, .. } = *self;
        let attention = |n_in: usize| d * (d + 1) + 2 * d * (n_in + 1) + d * (d + 1) + 2 * d;
        let feed_forward = ffn * (d + 1) + d * (ffn + 1) + 2 * d;
        let n_cross = self.num_hidden_layers.div_ceil(self.cross_attention_frequency);
        self.num_hidden_layers * (attention(d) + feed_forward)
            + n_cross * attention(e)
            + self.num_query_tokens * d
            + 2 * (d + e)
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the field to change.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("cross_attention_frequency", self.cross_attention_frequency),
            ("encoder_hidden_size", self.encoder_hidden_size),
            ("num_query_tokens", self.num_query_tokens),
            ("image_text_hidden_size", self.image_text_hidden_size),
        ];
        for (field, value) in sizes {
            if value == 0 || value > 1 << 20 {
                let reason = format!("is {value}, expected 1 to 1048576");
                return Err(Error::Config { field: format!("qformer.{field}"), reason });
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let reason =
                format!("is {}, which {} heads do not divide", self.hidden_size, self.num_attention_heads);
            return Err(Error::Config { field: "qformer.hidden_size".into(), reason });
        }
        Ok(())
    }
}
