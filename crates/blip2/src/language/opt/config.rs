//! OPT's structure, from its `config.json`.

use serde_json::Value as Json;

use super::super::config::{boolean_or, check_sizes, number, size, size_or, text, unsupported};
use super::LAYER_NORM_EPS;
use crate::Result;
use crate::layers::Activation;

/// The structure of an OPT model. Field names are those of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct OptConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the layers.
    pub hidden_size: usize,
    /// Width of an embedding; projected where it is not the layers'.
    pub word_embed_proj_dim: usize,
    /// Width inside the feed-forward layers.
    pub ffn_dim: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// The longest text, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the norms stand before the sublayers (all sizes but 350m).
    pub do_layer_norm_before: bool,
    /// Whether the norm after the last layer was left out (early conversions).
    pub remove_final_layer_norm: bool,
    /// Whether the projections have biases.
    pub enable_bias: bool,
    /// The nonlinearity of the feed-forward layers.
    pub activation: Activation,
    /// Whether the output head is the table of embeddings.
    pub tie_word_embeddings: bool,
}

impl OptConfig {
    /// Reads a Hugging Face `config.json` (of the model itself, or the `text_config` of a BLIP-2 model). Fields without
    /// influence on the computation are ignored.
    ///
    /// # Errors
    /// [`Config`](crate::Error::Config) when a field is missing or wrong, or asks for what is not implemented.
    pub fn from_hugging_face(json: &Json) -> Result<Self> {
        let activation = match text(json, "activation_function")?.unwrap_or("relu") {
            "relu" => Activation::Relu,
            "gelu" => Activation::GeluErf,
            other => return Err(unsupported("activation_function", &other, "relu or gelu")),
        };
        if !boolean_or(json, "layer_norm_elementwise_affine", true)? {
            return Err(unsupported("layer_norm_elementwise_affine", &false, "true"));
        }
        let hidden_size = size(json, "hidden_size")?;
        let config = Self {
            vocab_size: size(json, "vocab_size")?,
            hidden_size,
            word_embed_proj_dim: size_or(json, "word_embed_proj_dim", hidden_size)?,
            ffn_dim: size(json, "ffn_dim")?,
            num_hidden_layers: size(json, "num_hidden_layers")?,
            num_attention_heads: size(json, "num_attention_heads")?,
            max_position_embeddings: size_or(json, "max_position_embeddings", 2048)?,
            do_layer_norm_before: boolean_or(json, "do_layer_norm_before", true)?,
            remove_final_layer_norm: boolean_or(json, "_remove_final_layer_norm", false)?,
            enable_bias: boolean_or(json, "enable_bias", true)?,
            activation,
            tie_word_embeddings: boolean_or(json, "tie_word_embeddings", true)?,
        };
        if number(json, "layer_norm_eps")?.is_some_and(|eps| eps != LAYER_NORM_EPS) {
            return Err(unsupported("layer_norm_eps", &json["layer_norm_eps"], "1e-5, which OPT always has"));
        }
        config.validate()?;
        Ok(config)
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// [`Config`](crate::Error::Config) with the field that is wrong.
    pub fn validate(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("word_embed_proj_dim", self.word_embed_proj_dim),
            ("ffn_dim", self.ffn_dim),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ])?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let expected = format!("a multiple of the {} attention heads", self.num_attention_heads);
            return Err(unsupported("hidden_size", &self.hidden_size, &expected));
        }
        Ok(())
    }
}
