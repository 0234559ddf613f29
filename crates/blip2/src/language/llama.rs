//! The LLaMA family (arXiv 2302.13971, grouped-query attention as in 2307.09288; HF `LlamaForCausalLM`): RMS norm, rotary
//! positions, SwiGLU, output head tied to the embeddings or its own.

mod config;

use std::sync::Arc;

use candle_core::Tensor;

pub use self::config::LlamaConfig;
use super::causal::{Causal, check_rows};
use super::loading::{File, Loader, Table};
use crate::Result;
use crate::cache::KvCache;
use crate::layers::{
    Activation, AttentionShape, FrozenFormat, Linear, MatrixSize, Precision, RmsNorm, Weight, gated, rope,
};
use crate::weights::gguf::Gguf;
use crate::weights::safetensors::Safetensors;

/// A frozen LLaMA-like model.
#[derive(Debug, Clone)]
pub struct Llama {
    config: LlamaConfig,
    /// `[vocab_size, hidden_size]`; the same object as the head's weight where they are tied.
    embed_tokens: Table,
    layers: Arc<[Layer]>,
    norm: RmsNorm,
    lm_head: Linear,
    n_parameters: usize,
    n_bytes: usize,
    cache_precision: Precision,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Llama {
    /// Loads a model from a GGUF file, whole.
    ///
    /// # Errors
    /// When it is of another architecture, or a tensor is missing, misshapen or unknown.
    pub fn from_gguf(file: &Gguf, format: FrozenFormat) -> Result<Self> {
        let config = LlamaConfig::from_gguf(file)?;
        let model = Self::load(config, &File::Gguf(file), format)?;
        file.finish()?;
        Ok(model)
    }

    /// Loads a model from the tensors of a Hugging Face checkpoint whose names start with `prefix`.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn from_safetensors(
        config: LlamaConfig,
        file: &Safetensors,
        prefix: &str,
        format: FrozenFormat,
    ) -> Result<Self> {
        config.validate()?;
        let model = Self::load(config, &File::HuggingFace { file, prefix }, format)?;
        // A tied head may be stored all the same, old files also hold the rotary frequencies: both follow from the rest.
        let is_known = |name: &str| {
            name.strip_prefix(prefix).is_some_and(|name| {
                (name == "lm_head.weight" && model.config.tie_word_embeddings)
                    || name.ends_with("rotary_emb.inv_freq")
            })
        };
        file.ignore(is_known);
        Ok(model)
    }

    pub(super) fn load(config: LlamaConfig, file: &File<'_>, format: FrozenFormat) -> Result<Self> {
        let mut loader = Loader::new(file, format);
        let (d, ffn) = (config.hidden_size, config.intermediate_size);
        let (n_heads, n_kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (q, kv) = (n_heads * config.head_dim, n_kv_heads * config.head_dim);
        let embed_tokens = loader.table("model.embed_tokens.weight", config.vocab_size, d)?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.table("lm_head.weight", config.vocab_size, d)?
        };
        let layer = |loader: &mut Loader<'_>, i: usize| -> Result<Layer> {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let has_bias = config.attention_bias;
            let mlp_bias = config.mlp_bias;
            Ok(Layer {
                input_layernorm: loader.norm(&at("input_layernorm"), d, config.rms_norm_eps)?,
                q_proj: loader.linear(&at("self_attn.q_proj"), q, d, has_bias, Some(config.head_dim))?,
                k_proj: loader.linear(&at("self_attn.k_proj"), kv, d, has_bias, Some(config.head_dim))?,
                v_proj: loader.linear(&at("self_attn.v_proj"), kv, d, has_bias, None)?,
                o_proj: loader.linear(&at("self_attn.o_proj"), d, q, has_bias, None)?,
                post_attention_layernorm: loader.norm(
                    &at("post_attention_layernorm"),
                    d,
                    config.rms_norm_eps,
                )?,
                gate_proj: loader.linear(&at("mlp.gate_proj"), ffn, d, mlp_bias, None)?,
                up_proj: loader.linear(&at("mlp.up_proj"), ffn, d, mlp_bias, None)?,
                down_proj: loader.linear(&at("mlp.down_proj"), d, ffn, mlp_bias, None)?,
            })
        };
        let layers: Vec<_> =
            (0..config.num_hidden_layers).map(|i| layer(&mut loader, i)).collect::<Result<_>>()?;
        let norm = loader.norm("model.norm", d, config.rms_norm_eps)?;
        Ok(Self {
            embed_tokens: Table(embed_tokens),
            lm_head: Linear::new(Weight::Frozen(lm_head), None),
            layers: layers.into(),
            norm,
            n_parameters: loader.n_parameters,
            n_bytes: loader.n_bytes,
            cache_precision: format.cache_precision(),
            config,
        })
    }

    /// Its structure.
    pub fn config(&self) -> &LlamaConfig {
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

    /// The output head, `hidden_size` to `vocab_size`.
    pub fn head(&self) -> &Linear {
        &self.lm_head
    }

    /// The matrices that a row passes, without the head.
    pub(super) fn matrices(&self) -> MatrixSize {
        let layers = self.layers.iter().flat_map(|layer| {
            let attention = [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj];
            attention.into_iter().chain([&layer.gate_proj, &layer.up_proj, &layer.down_proj])
        });
        layers.map(Linear::matrix).sum()
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> KvCache {
        let width = self.config.num_key_value_heads * self.config.head_dim;
        KvCache::new(self.layers.len(), width, self.cache_precision)
    }

    /// The embeddings of tokens, `[ids.len(), hidden_size]`.
    ///
    /// # Errors
    /// [`Request`](crate::Error::Request) when a token is not in the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.embed_tokens.rows(ids)
    }
}

impl Causal for Llama {
    fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            n_kv_heads: self.config.num_key_value_heads,
            ..AttentionShape::multi_head(self.config.num_attention_heads, self.config.head_dim)
        }
    }

    fn run(
        &self,
        embeds: &Tensor,
        positions: &Arc<[u32]>,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let config = &self.config;
        check_rows(embeds, positions, config.hidden_size, config.max_position_embeddings)?;
        let rotate = |x: &Tensor, n_heads: usize| {
            rope(x, positions, n_heads, config.head_dim, config.rope_theta as f32)
        };
        let mut x = embeds.clone(); // [N, D]
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let normed = layer.input_layernorm.forward(&x)?;
            let [q, k, v] = Linear::forward_all([&layer.q_proj, &layer.k_proj, &layer.v_proj], &normed)?;
            let q = rotate(&q, config.num_attention_heads)?;
            let k = rotate(&k, config.num_key_value_heads)?;
            let attended = attend(layer_idx, &q, &k, &v)?;
            x = layer.o_proj.forward_then(&attended, Activation::Identity, Some(&x))?;

            let normed = layer.post_attention_layernorm.forward(&x)?;
            let [gate, up] = Linear::forward_all([&layer.gate_proj, &layer.up_proj], &normed)?;
            let inner = gated(&gate, &up, Activation::Silu)?;
            x = layer.down_proj.forward_then(&inner, Activation::Identity, Some(&x))?;
        }
        Ok(self.norm.forward(&x)?)
    }
}
