//! T5's structure, from its `config.json`, and its buckets of distances.

use serde_json::Value as Json;

use super::super::config::{boolean, boolean_or, check_sizes, number, size, size_or, text, unsupported};
use crate::Result;
use crate::layers::Activation;

/// The structure of a T5 model. Field names are those of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct T5Config {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of an embedding.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width inside the feed-forward layers.
    pub d_ff: usize,
    /// Encoder layers.
    pub num_layers: usize,
    /// Decoder layers.
    pub num_decoder_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Buckets of distances.
    pub relative_attention_num_buckets: usize,
    /// From which distance on all keys are alike.
    pub relative_attention_max_distance: usize,
    /// Epsilon of the RMS norms.
    pub layer_norm_epsilon: f64,
    /// Whether the feed-forward layers are gated.
    pub is_gated_act: bool,
    /// Their nonlinearity. BLIP-2 runs Flan-T5 with the exact GELU, which is not what Flan-T5 was trained with.
    pub activation: Activation,
    /// Whether the decoder's output is scaled by `d_model^-0.5` before the head.
    pub scale_decoder_outputs: bool,
    /// What the decoder begins with.
    pub decoder_start_token_id: u32,
}

impl T5Config {
    /// Reads a Hugging Face `config.json` (of the model itself, or the `text_config` of a BLIP-2 model). Fields without
    /// influence on the computation are ignored.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) when a field is missing or wrong, or asks for what is not implemented.
    pub fn from_hugging_face(json: &Json) -> Result<Self> {
        let projection = text(json, "feed_forward_proj")?.unwrap_or("relu");
        let (is_gated_act, named) = match projection.strip_prefix("gated-") {
            // A historical name: T5 v1.1 has the approximation.
            Some("gelu") => (true, "gelu_new"),
            Some(name) => (true, name),
            None => (false, projection),
        };
        let activation = match text(json, "dense_act_fn")?.unwrap_or(named) {
            "relu" => Activation::Relu,
            "gelu" => Activation::GeluErf,
            "gelu_new" => Activation::GeluTanh,
            "silu" | "swish" => Activation::Silu,
            other => return Err(unsupported("dense_act_fn", &other, "relu, gelu, gelu_new or silu")),
        };
        let num_layers = size(json, "num_layers")?;
        let is_tied = boolean_or(json, "tie_word_embeddings", true)?;
        let scale = if json["scale_decoder_outputs"].is_null() {
            is_tied
        } else {
            boolean(json, "scale_decoder_outputs")?
        };
        let start = size_or(json, "decoder_start_token_id", 0)?;
        let config = Self {
            vocab_size: size(json, "vocab_size")?,
            d_model: size(json, "d_model")?,
            d_kv: size(json, "d_kv")?,
            d_ff: size(json, "d_ff")?,
            num_layers,
            num_decoder_layers: size_or(json, "num_decoder_layers", num_layers)?,
            num_heads: size(json, "num_heads")?,
            relative_attention_num_buckets: size_or(json, "relative_attention_num_buckets", 32)?,
            relative_attention_max_distance: size_or(json, "relative_attention_max_distance", 128)?,
            layer_norm_epsilon: number(json, "layer_norm_epsilon")?.unwrap_or(1e-6),
            is_gated_act,
            activation,
            scale_decoder_outputs: scale,
            decoder_start_token_id: u32::try_from(start)
                .map_err(|_| unsupported("decoder_start_token_id", &start, "a token"))?,
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
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_layers", self.num_layers),
            ("num_decoder_layers", self.num_decoder_layers),
            ("num_heads", self.num_heads),
        ])?;
        let n_buckets = self.relative_attention_num_buckets;
        if !n_buckets.is_multiple_of(4) || n_buckets == 0 || n_buckets > 1 << 16 {
            return Err(unsupported("relative_attention_num_buckets", &n_buckets, "a multiple of 4"));
        }
        if self.relative_attention_max_distance <= n_buckets / 2 {
            let expected = format!("above half the {n_buckets} buckets");
            return Err(unsupported(
                "relative_attention_max_distance",
                &self.relative_attention_max_distance,
                &expected,
            ));
        }
        if !(self.layer_norm_epsilon > 0.0 && self.layer_norm_epsilon.is_finite()) {
            return Err(unsupported("layer_norm_epsilon", &self.layer_norm_epsilon, "above 0"));
        }
        if self.decoder_start_token_id as usize >= self.vocab_size {
            return Err(unsupported("decoder_start_token_id", &self.decoder_start_token_id, "a token"));
        }
        Ok(())
    }

    /// The bucket of a key that stands `distance` after the query (before it, where negative).
    pub(super) fn bucket(&self, distance: i64, is_decoder: bool) -> usize {
        let n_buckets = self.relative_attention_num_buckets;
        // The encoder's second half is for keys after the query; the decoder sees none.
        let (n, first) = if is_decoder {
            (n_buckets, 0)
        } else {
            (n_buckets / 2, if distance > 0 { n_buckets / 2 } else { 0 })
        };
        let distance = if is_decoder { (-distance).max(0) } else { distance.abs() } as usize;
        let n_exact = n / 2;
        if distance < n_exact {
            return first + distance;
        }
        // In single precision, as the reference computes it: at a few distances the rounding decides the bucket.
        let share = (distance as f32 / n_exact as f32).ln()
            / (self.relative_attention_max_distance as f64 / n_exact as f64).ln() as f32;
        first + (n_exact + (share * (n - n_exact) as f32) as usize).min(n - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::safetensors::Safetensors;

    #[test]
    fn distances_fall_into_the_buckets_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/t5_tiny.safetensors");
        let file = Safetensors::open(path).unwrap();
        let buckets: Json = serde_json::from_str(&file.metadata()["buckets"]).unwrap();
        let configs: Json = serde_json::from_str(&file.metadata()["configs"]).unwrap();
        let mut config = T5Config::from_hugging_face(&configs["flan"]).unwrap();
        (config.relative_attention_num_buckets, config.relative_attention_max_distance) = (32, 128);
        for (name, is_decoder) in [("encoder", false), ("decoder", true)] {
            let found: Vec<_> = (-300..=300).map(|distance| config.bucket(distance, is_decoder)).collect();
            let expected: Vec<usize> = serde_json::from_value(buckets[name].clone()).unwrap();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn the_fields_that_decide_activation_and_scale_mean_what_transformers_makes_of_them() {
        let base = serde_json::json!({
            "vocab_size": 10, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
        });
        let with = |changes: &Json| {
            let mut json = base.clone();
            changes.as_object().unwrap().iter().for_each(|(name, value)| json[name] = value.clone());
            let config = T5Config::from_hugging_face(&json).unwrap();
            (config.is_gated_act, config.activation, config.scale_decoder_outputs)
        };
        let json = |text: &str| serde_json::from_str::<Json>(text).unwrap();
        assert_eq!(with(&json("{}")), (false, Activation::Relu, true));
        let flan = r#"{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": false}"#;
        assert_eq!(with(&json(flan)), (true, Activation::GeluTanh, false));
        // BLIP-2's configurations override the activation.
        let blip2 =
            r#"{"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": false}"#;
        assert_eq!(with(&json(blip2)), (true, Activation::GeluErf, false));
        let scaled = r#"{"tie_word_embeddings": false, "scale_decoder_outputs": true}"#;
        assert_eq!(with(&json(scaled)), (false, Activation::Relu, true));
    }
}
