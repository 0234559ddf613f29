//! The sizes of a LLaMA-like model, from either file format.

use serde_json::Value as Json;

use super::super::config::{boolean, check_sizes, number, size, size_or, text, unsupported};
use crate::Result;
use crate::weights::gguf::{Gguf, Value};

/// The structure of a LLaMA-like model. Field names are those of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of an embedding.
    pub hidden_size: usize,
    /// Width inside the feed-forward layers.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, each shared by a group of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The longest text, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary position embedding.
    pub rope_theta: f64,
    /// Whether the output head is the table of embeddings.
    pub tie_word_embeddings: bool,
    /// Whether the attention projections have biases.
    pub attention_bias: bool,
    /// Whether the feed-forward layers have biases.
    pub mlp_bias: bool,
}

impl LlamaConfig {
    /// Reads the metadata `llama.*` of a GGUF file.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) when a key is missing or has the wrong type, [`Error::Config`](crate::Error::Config) when the model is of another
    /// architecture or uses what is not implemented.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let architecture = file.string("general.architecture")?;
        if architecture != "llama" {
            return Err(unsupported("general.architecture", &architecture, "llama"));
        }
        let size = |key: &str| file.u32(&format!("llama.{key}")).map(|n| n as usize);
        let size_or = |key: &str, default: usize| match file.get(&format!("llama.{key}")) {
            Some(_) => size(key),
            None => Ok(default),
        };
        let scaling = "llama.rope.scaling.type";
        if file.get(scaling).is_some() && file.string(scaling)? != "none" {
            return Err(unsupported(
                scaling,
                &file.string(scaling)?,
                "none: rope scaling is not implemented",
            ));
        }
        for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
            if file.get(key).is_some() && !matches!(file.f32(key)?, 0.0 | 1.0) {
                return Err(unsupported(key, &file.f32(key)?, "1: rope scaling is not implemented"));
            }
        }
        if file.contains("rope_freqs.weight") {
            return Err(unsupported(
                "rope_freqs.weight",
                &"present",
                "absent: rope scaling is not implemented",
            ));
        }
        if file.get("llama.expert_count").is_some() && file.u32("llama.expert_count")? > 0 {
            return Err(unsupported("llama.expert_count", &file.u32("llama.expert_count")?, "0"));
        }
        let (hidden_size, n_heads) = (size("embedding_length")?, size("attention.head_count")?);
        if n_heads == 0 {
            return Err(unsupported("llama.attention.head_count", &0, "at least 1"));
        }
        let head_dim = size_or("attention.key_length", hidden_size / n_heads)?;
        for key in ["attention.value_length", "rope.dimension_count"] {
            let found = size_or(key, head_dim)?;
            if found != head_dim {
                return Err(unsupported(
                    &format!("llama.{key}"),
                    &found,
                    &format!("{head_dim}, the key length"),
                ));
            }
        }
        let vocab_size = match file.shape("token_embd.weight")? {
            [vocab_size, _] => *vocab_size,
            shape => return Err(unsupported("token_embd.weight", &format!("{shape:?}"), "a matrix")),
        };
        let rope_theta = match file.get("llama.rope.freq_base") {
            Some(Value::Float(base)) => *base,
            Some(_) => f64::from(file.f32("llama.rope.freq_base")?),
            None => 10_000.0,
        };
        let config = Self {
            vocab_size,
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            num_hidden_layers: size("block_count")?,
            num_attention_heads: n_heads,
            num_key_value_heads: size_or("attention.head_count_kv", n_heads)?,
            head_dim,
            max_position_embeddings: size("context_length")?,
            rms_norm_eps: f64::from(file.f32("llama.attention.layer_norm_rms_epsilon")?),
            rope_theta,
            tie_word_embeddings: !file.contains("output.weight"),
            attention_bias: file.contains("blk.0.attn_q.bias"),
            mlp_bias: file.contains("blk.0.ffn_up.bias"),
        };
        config.validate()?;
        Ok(config)
    }

    /// Reads a Hugging Face `config.json` (of the model itself, or the `text_config` of a BLIP-2 model). Fields without
    /// influence on the computation are ignored.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) when a field is missing or wrong, or asks for what is not implemented.
    pub fn from_hugging_face(json: &Json) -> Result<Self> {
        let model_type = text(json, "model_type")?.unwrap_or("llama");
        if model_type != "llama" {
            return Err(unsupported("model_type", &model_type, "llama"));
        }
        let activation = text(json, "hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(unsupported("hidden_act", &activation, "silu"));
        }
        // Older files have `rope_theta` and `rope_scaling`, newer ones both inside `rope_parameters`.
        let mut rope_theta = number(json, "rope_theta")?;
        for field in ["rope_scaling", "rope_parameters"] {
            let rope = &json[field];
            if rope.is_null() {
                continue;
            }
            let kind = text(rope, "rope_type")?.or(text(rope, "type")?).unwrap_or("default");
            if kind != "default" {
                let expected = "default: rope scaling is not implemented";
                return Err(unsupported(&format!("{field}.rope_type"), &kind, expected));
            }
            rope_theta = number(rope, "rope_theta")?.or(rope_theta);
        }
        let partial = number(json, "partial_rotary_factor")?.unwrap_or(1.0);
        if partial != 1.0 {
            return Err(unsupported("partial_rotary_factor", &partial, "1"));
        }
        let (hidden_size, n_heads) = (size(json, "hidden_size")?, size(json, "num_attention_heads")?);
        let config = Self {
            vocab_size: size(json, "vocab_size")?,
            hidden_size,
            intermediate_size: size(json, "intermediate_size")?,
            num_hidden_layers: size(json, "num_hidden_layers")?,
            num_attention_heads: n_heads,
            num_key_value_heads: size_or(json, "num_key_value_heads", n_heads)?,
            head_dim: size_or(json, "head_dim", hidden_size.checked_div(n_heads).unwrap_or(0))?,
            max_position_embeddings: size_or(json, "max_position_embeddings", 2048)?,
            rms_norm_eps: number(json, "rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rope_theta.unwrap_or(10_000.0),
            tie_word_embeddings: boolean(json, "tie_word_embeddings")?,
            attention_bias: boolean(json, "attention_bias")?,
            mlp_bias: boolean(json, "mlp_bias")?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with the field that is wrong.
    pub fn validate(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ])?;
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of the {} attention heads", self.num_attention_heads);
            return Err(unsupported("num_key_value_heads", &self.num_key_value_heads, &expected));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(unsupported("head_dim", &self.head_dim, "an even number"));
        }
        for (field, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(unsupported(field, &value, "above 0"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sizes() -> Json {
        json!({
            "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "torch_dtype": "float32",
        })
    }

    fn with(changes: &Json) -> Result<LlamaConfig> {
        let mut json = sizes();
        for (name, value) in changes.as_object().unwrap() {
            json[name] = value.clone();
        }
        LlamaConfig::from_hugging_face(&json)
    }

    #[test]
    fn old_and_new_rope_fields_mean_the_same() {
        let old = with(&json!({"rope_theta": 1e5, "rope_scaling": null})).unwrap();
        let new = with(&json!({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}})).unwrap();
        assert_eq!(old, new);
        assert_eq!((old.head_dim, old.rope_theta), (8, 1e5));
        assert_eq!(with(&json!({})).unwrap().rope_theta, 10_000.0);
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (changes, expected) in [
            (json!({"model_type": "opt"}), "`language.model_type` is opt"),
            (json!({"hidden_act": "gelu"}), "`language.hidden_act` is gelu"),
            (json!({"rope_scaling": {"type": "linear", "factor": 2}}), "rope scaling is not implemented"),
            (
                json!({"rope_parameters": {"rope_type": "llama3"}}),
                "`language.rope_parameters.rope_type` is llama3",
            ),
            (json!({"num_key_value_heads": 4}), "`language.num_key_value_heads` is 4"),
            (json!({"hidden_size": null}), "`language.hidden_size` is missing"),
            (json!({"hidden_size": -3}), "`language.hidden_size` is -3"),
            (json!({"num_attention_heads": 0}), "`language.num_attention_heads` is 0"),
            (json!({"vocab_size": 1_u64 << 40}), "`language.vocab_size` is 1099511627776"),
            (json!({"head_dim": 7}), "an even number"),
            (json!({"rms_norm_eps": 0}), "`language.rms_norm_eps` is 0"),
            (json!({"attention_bias": "yes"}), "true or false"),
        ] {
            let error = with(&changes).unwrap_err().to_string();
            assert!(error.contains(expected), "{changes}: {error}");
        }
    }
}
