//! T5 and Flan-T5 (arXiv 1910.10683, 2210.11416; HF `T5ForConditionalGeneration`): an encoder that reads the prompt and a
//! decoder that writes the answer, RMS norm before each sublayer, no biases, no scaling of the scores, positions as a bias on
//! the scores by distance.

use std::sync::Arc;

use candle_core::Tensor;
use serde_json::Value as Json;

use super::config::{boolean, boolean_or, check_sizes, number, size, size_or, text, unsupported};
use super::loading::{File, Loader, Table, on_a_worker};
use crate::cache::{CachedSequence, KvCache, LayerRows};
use crate::layers::{
    Activation, AttentionShape, FrozenFormat, Linear, MatrixSize, Plan, RelativeBias, RmsNorm, Sequence,
    Span, Weight, attention_biased, attention_cached, attention_to, gated,
};
use crate::weights::safetensors::Safetensors;
use crate::{Error, Result};

/// Rows that are read or written at most. T5 has no limit of its own: it was trained on 512 and gets worse beyond.
const MAX_ROWS: usize = 4096;

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
    /// [`Error::Config`] when a field is missing or wrong, or asks for what is not implemented.
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
    /// [`Error::Config`] with the field that is wrong.
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
    fn bucket(&self, distance: i64, is_decoder: bool) -> usize {
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

/// A frozen T5 model.
#[derive(Debug, Clone)]
pub struct T5 {
    config: T5Config,
    /// `[vocab_size, d_model]`.
    shared: Table,
    encoder: Stack,
    decoder: Stack,
    lm_head: Linear,
    n_parameters: usize,
    n_bytes: usize,
}

/// The layers of encoder or decoder.
#[derive(Debug, Clone)]
struct Stack {
    layers: Arc<[Layer]>,
    /// `[buckets, heads]`, of the first layer and used by all.
    relative_attention_bias: Arc<[f32]>,
    final_layer_norm: RmsNorm,
}

#[derive(Debug)]
struct Layer {
    self_attention: Attention,
    /// The decoder's attention to the encoder's output.
    cross_attention: Option<Attention>,
    feed_forward_norm: RmsNorm,
    /// Two where gated: the gate first.
    wi: Vec<Linear>,
    wo: Linear,
}

#[derive(Debug)]
struct Attention {
    layer_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
}

impl T5 {
    /// Loads a model from the tensors of a Hugging Face checkpoint whose names start with `prefix`.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn from_safetensors(
        config: T5Config,
        file: &Safetensors,
        prefix: &str,
        format: FrozenFormat,
    ) -> Result<Self> {
        config.validate()?;
        let model = Self::load(config, &File::HuggingFace { file, prefix }, format)?;
        // Copies of the shared table, and a leftover of the first conversions.
        file.ignore(|name| {
            name.strip_prefix(prefix).is_some_and(|name| {
                matches!(
                    name,
                    "encoder.embed_tokens.weight"
                        | "decoder.embed_tokens.weight"
                        | "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
                )
            })
        });
        Ok(model)
    }

    pub(super) fn load(config: T5Config, file: &File<'_>, format: FrozenFormat) -> Result<Self> {
        let mut loader = Loader::new(file, format);
        let shared = loader.table("shared.weight", config.vocab_size, config.d_model)?;
        let encoder = Stack::load(&config, &mut loader, false)?;
        let decoder = Stack::load(&config, &mut loader, true)?;
        // The head of its own wins over the table, whatever the configuration says of tying.
        let lm_head = if file.has("lm_head.weight") {
            loader.table("lm_head.weight", config.vocab_size, config.d_model)?
        } else {
            shared.clone()
        };
        Ok(Self {
            shared: Table(shared),
            encoder,
            decoder,
            lm_head: Linear::new(Weight::Frozen(lm_head), None),
            n_parameters: loader.n_parameters,
            n_bytes: loader.n_bytes,
            config,
        })
    }

    /// Its structure.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// How many parameters it has; a tied head counts once.
    pub fn n_parameters(&self) -> usize {
        self.n_parameters
    }

    /// Memory of its weights, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The output head, `d_model` to `vocab_size`; the hidden states it is given are scaled already.
    pub fn head(&self) -> &Linear {
        &self.lm_head
    }

    /// The matrices that a row of the prompt passes: the encoder, and what the decoder keeps of its output.
    pub(super) fn prompt_matrices(&self) -> MatrixSize {
        let kept =
            self.decoder.layers.iter().flat_map(|layer| &layer.cross_attention).flat_map(|c| [&c.k, &c.v]);
        self.encoder.matrices().chain(kept).map(Linear::matrix).sum()
    }

    /// The matrices that a row of the answer passes, without the head.
    pub(super) fn answer_matrices(&self) -> MatrixSize {
        let cross =
            self.decoder.layers.iter().flat_map(|layer| &layer.cross_attention).flat_map(|c| [&c.q, &c.o]);
        self.decoder.matrices().chain(cross).map(Linear::matrix).sum()
    }

    /// The longest prompt, and the longest answer.
    pub fn context_len(&self) -> usize {
        MAX_ROWS
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> KvCache {
        KvCache::with_memory(self.decoder.layers.len(), self.config.num_heads * self.config.d_kv)
    }

    /// The embeddings of tokens, `[ids.len(), d_model]`.
    ///
    /// # Errors
    /// [`Error::Request`] when a token is not in the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.shared.rows(ids)
    }

    /// The encoder: reads packed texts of `lengths` rows, each row seeing its whole text.
    ///
    /// # Shapes
    /// - `embeds`: `[sum of lengths, d_model]`, and so is the result, normed
    ///
    /// # Errors
    /// When the lengths do not sum to the rows, or a text is too long.
    pub fn encode(&self, embeds: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let (n_rows, width) = embeds.dims2()?;
        if width != self.config.d_model || n_rows != lengths.iter().sum::<usize>() {
            return Err(Error::Request(format!(
                "the language model was given {n_rows} rows of {width} values for texts of {lengths:?} rows of {}",
                self.config.d_model
            )));
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest > MAX_ROWS {
            return Err(Error::TextTooLong { n_tokens: longest, limit: MAX_ROWS });
        }
        let mut start = 0;
        let plan: Plan = lengths
            .iter()
            .map(|&len| {
                start += len;
                let all = vec![Span { start: start - len, len }];
                Sequence { queries: all.clone(), keys: all, causal: false }
            })
            .collect();
        let (shape, bias) = (self.attention_shape(), self.encoder.bias(&self.config, longest, false));
        on_a_worker(|| {
            let mut x = embeds.clone();
            for layer in self.encoder.layers.iter() {
                x = layer
                    .self_attention
                    .residual(&x, |q, k, v| attention_biased(q, k, v, &plan, shape, &bias))?;
                x = layer.feed_forward(&x, &self.config)?;
            }
            Ok(self.encoder.final_layer_norm.forward(&x)?)
        })
    }

    /// Reads prompts: encodes them into the cache's memory and begins an answer to each. `sequences` must be empty; the
    /// decoder's hidden states after the start token come back, one row a prompt.
    ///
    /// # Errors
    /// As [`encode`](Self::encode), and when a sequence is not empty.
    pub fn begin(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
    ) -> Result<Tensor> {
        if sequences.iter().any(|sequence| !sequence.is_empty()) {
            return Err(Error::Request("an encoder-decoder model reads a prompt as a whole".into()));
        }
        let encoded = self.encode(embeds, lengths)?;
        let keep = |layer: &Layer| -> Result<LayerRows> {
            let Some(cross) = &layer.cross_attention else { return Ok(LayerRows::default()) };
            let rows = |linear: &Linear| linear.forward(&encoded)?.flatten_all()?.to_vec1::<f32>();
            Ok(LayerRows { keys: rows(&cross.k)?, values: rows(&cross.v)? })
        };
        let layers = self.decoder.layers.iter().map(keep).collect::<Result<Vec<_>>>()?;
        cache.remember(sequences, lengths, layers);
        let starts = vec![self.config.decoder_start_token_id; sequences.len()];
        self.forward_cached(&self.embed(&starts)?, cache, sequences, &vec![1; sequences.len()])
    }

    /// The decoder: reads packed rows that continue answers of a cache, `lengths[i]` rows for `sequences[i]`.
    ///
    /// # Errors
    /// When the shapes do not agree, an answer is too long or a sequence is not of this cache; then nothing has changed.
    pub fn forward_cached(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
    ) -> Result<Tensor> {
        let longest =
            sequences.iter().zip(lengths).map(|(sequence, len)| sequence.len() + len).max().unwrap_or(0);
        if longest > MAX_ROWS {
            return Err(Error::TextTooLong { n_tokens: longest, limit: MAX_ROWS });
        }
        let (shape, bias) = (self.attention_shape(), self.decoder.bias(&self.config, longest, true));
        cache.append(sequences, lengths, |rows, memory, new| {
            on_a_worker(|| {
                let mut x = embeds.clone();
                for ((layer, rows), memory) in self.decoder.layers.iter().zip(rows).zip(memory) {
                    x = layer.self_attention.residual(&x, |q, k, v| {
                        attention_cached(q, k, v, rows, &new.plan, shape, Some(&bias))
                    })?;
                    if let Some(cross) = &layer.cross_attention {
                        let q = cross.q.forward(&cross.layer_norm.forward(&x)?)?;
                        let attended = attention_to(&q, memory, &new.memory_plan, shape, None)?;
                        x = cross.o.forward_then(&attended, Activation::Identity, Some(&x))?;
                    }
                    x = layer.feed_forward(&x, &self.config)?;
                }
                let x = self.decoder.final_layer_norm.forward(&x)?;
                if self.config.scale_decoder_outputs {
                    return Ok((x * (self.config.d_model as f64).powf(-0.5))?);
                }
                Ok(x)
            })
        })
    }

    fn attention_shape(&self) -> AttentionShape {
        let n_heads = self.config.num_heads;
        AttentionShape { n_heads, n_kv_heads: n_heads, head_dim: self.config.d_kv, scale: 1.0 }
    }
}

impl Stack {
    fn load(config: &T5Config, loader: &mut Loader<'_>, is_decoder: bool) -> Result<Self> {
        let (name, n_layers) =
            if is_decoder { ("decoder", config.num_decoder_layers) } else { ("encoder", config.num_layers) };
        let (d, inner, eps) = (config.d_model, config.num_heads * config.d_kv, config.layer_norm_epsilon);
        let attention = |loader: &mut Loader<'_>, at: &str, module: &str| -> Result<Attention> {
            let mut linear = |part: &str, n_out, n_in| {
                loader.linear(&format!("{at}.{module}.{part}"), n_out, n_in, false, None)
            };
            let (q, k, v, o) = (
                linear("q", inner, d)?,
                linear("k", inner, d)?,
                linear("v", inner, d)?,
                linear("o", d, inner)?,
            );
            Ok(Attention { layer_norm: loader.norm(&format!("{at}.layer_norm"), d, eps)?, q, k, v, o })
        };
        let mut layers = Vec::with_capacity(n_layers);
        for i in 0..n_layers {
            let at = |layer: usize| format!("{name}.block.{i}.layer.{layer}");
            let self_attention = attention(loader, &at(0), "SelfAttention")?;
            let cross_attention =
                if is_decoder { Some(attention(loader, &at(1), "EncDecAttention")?) } else { None };
            let feed_forward = at(if is_decoder { 2 } else { 1 });
            let parts: &[&str] = if config.is_gated_act { &["wi_0", "wi_1"] } else { &["wi"] };
            let dense = |part: &str| format!("{feed_forward}.DenseReluDense.{part}");
            let wi = parts
                .iter()
                .map(|part| loader.linear(&dense(part), config.d_ff, d, false, None))
                .collect::<Result<_>>()?;
            layers.push(Layer {
                self_attention,
                cross_attention,
                wi,
                wo: loader.linear(&dense("wo"), d, config.d_ff, false, None)?,
                feed_forward_norm: loader.norm(&format!("{feed_forward}.layer_norm"), d, eps)?,
            });
        }
        let bias = format!("{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        let bias = loader.matrix(&bias, config.relative_attention_num_buckets, config.num_heads)?;
        Ok(Self {
            layers: layers.into(),
            relative_attention_bias: bias.flatten_all()?.to_vec1::<f32>()?.into(),
            final_layer_norm: loader.norm(&format!("{name}.final_layer_norm"), d, eps)?,
        })
    }

    /// Those of self-attention and feed-forward layers.
    fn matrices(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| {
            let Attention { q, k, v, o, .. } = &layer.self_attention;
            [q, k, v, o, &layer.wo].into_iter().chain(&layer.wi)
        })
    }

    /// The bias of every head for texts of up to `longest` rows.
    fn bias(&self, config: &T5Config, longest: usize, is_decoder: bool) -> RelativeBias {
        let (n_heads, n_before) = (config.num_heads, longest.max(1) - 1);
        let n_after = if is_decoder { 0 } else { n_before };
        let distances = -(n_before as i64)..=n_after as i64;
        let buckets: Vec<usize> = distances.map(|distance| config.bucket(distance, is_decoder)).collect();
        let of_head = |head: usize| {
            buckets.iter().map(move |bucket| self.relative_attention_bias[bucket * n_heads + head])
        };
        RelativeBias { values: (0..n_heads).flat_map(of_head).collect(), n_before }
    }
}

impl Attention {
    /// `x + attention(norm(x))`; `attend` gets queries, keys and values.
    fn residual(
        &self,
        x: &Tensor,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let normed = self.layer_norm.forward(x)?;
        let [q, k, v] = Linear::forward_all([&self.q, &self.k, &self.v], &normed)?;
        Ok(self.o.forward_then(&attend(&q, &k, &v)?, Activation::Identity, Some(x))?)
    }
}

impl Layer {
    fn feed_forward(&self, x: &Tensor, config: &T5Config) -> Result<Tensor> {
        let normed = self.feed_forward_norm.forward(x)?;
        let inner = match &self.wi[..] {
            [gate, up] => {
                let [gate, up] = Linear::forward_all([gate, up], &normed)?;
                gated(&gate, &up, config.activation)?
            }
            [wi, ..] => wi.forward_then(&normed, config.activation, None)?,
            [] => normed,
        };
        Ok(self.wo.forward_then(&inner, Activation::Identity, Some(x))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
