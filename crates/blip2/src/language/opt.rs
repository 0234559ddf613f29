//! OPT (arXiv 2205.01068; HF `OPTForCausalLM`): learned positions with an offset of 2, biases everywhere, ReLU, norm before
//! each sublayer, or after it in the one size (350m) that also has embeddings of another width.

mod config;

use std::sync::Arc;

use candle_core::Tensor;

pub use self::config::OptConfig;
use super::causal::{Causal, check_rows};
use super::loading::{File, Loader, Table};
use crate::Result;
use crate::cache::KvCache;
use crate::layers::{
    Activation, AttentionShape, FrozenFormat, LayerNorm, Linear, MatrixSize, Precision, Weight,
};
use crate::weights::safetensors::Safetensors;

/// Rows of the position table before position 0.
const POSITION_OFFSET: usize = 2;

/// Epsilon of every norm: PyTorch's default.
const LAYER_NORM_EPS: f64 = 1e-5;

/// A frozen OPT model.
#[derive(Debug, Clone)]
pub struct Opt {
    config: OptConfig,
    /// `[vocab_size, word_embed_proj_dim]`; the same object as the head's weight where they are tied.
    embed_tokens: Table,
    /// `[max_position_embeddings + 2, hidden_size]`.
    embed_positions: Table,
    project_in: Option<Linear>,
    layers: Arc<[Layer]>,
    final_layer_norm: Option<LayerNorm>,
    project_out: Option<Linear>,
    lm_head: Linear,
    n_parameters: usize,
    n_bytes: usize,
    cache_precision: Precision,
}

#[derive(Debug)]
struct Layer {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    self_attn_layer_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    final_layer_norm: LayerNorm,
}

impl Opt {
    /// Loads a model from the tensors of a Hugging Face checkpoint whose names start with `prefix`.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn from_safetensors(
        config: OptConfig,
        file: &Safetensors,
        prefix: &str,
        format: FrozenFormat,
    ) -> Result<Self> {
        config.validate()?;
        let is_tied = config.tie_word_embeddings;
        let model = Self::load(config, &File::HuggingFace { file, prefix }, format)?;
        // A tied head may be stored all the same.
        file.ignore(|name| is_tied && name.strip_prefix(prefix) == Some("lm_head.weight"));
        Ok(model)
    }

    pub(super) fn load(config: OptConfig, file: &File<'_>, format: FrozenFormat) -> Result<Self> {
        let mut loader = Loader::new(file, format);
        let (d, width, bias) = (config.hidden_size, config.word_embed_proj_dim, config.enable_bias);
        // Meta's own conversions were saved without the head, and so without the first part of the name.
        let has = |root: &str| file.has(&format!("{root}.embed_tokens.weight"));
        let is_headless = !has("model.decoder") && has("decoder");
        let root = if is_headless { "decoder" } else { "model.decoder" };
        let decoder = |name: &str| format!("{root}.{name}");
        let embed_tokens = loader.table(&decoder("embed_tokens.weight"), config.vocab_size, width)?;
        let n_positions = config.max_position_embeddings + POSITION_OFFSET;
        let embed_positions = loader.positions(&decoder("embed_positions.weight"), n_positions, d)?;
        let projects = width != d;
        let project = |loader: &mut Loader<'_>, name: &str, n_out, n_in| -> Result<Option<Linear>> {
            projects.then(|| loader.linear(&decoder(name), n_out, n_in, false, None)).transpose()
        };
        let project_in = project(&mut loader, "project_in", d, width)?;
        let project_out = project(&mut loader, "project_out", width, d)?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let at = |name: &str| decoder(&format!("layers.{i}.{name}"));
                Ok(Layer {
                    q_proj: loader.linear(&at("self_attn.q_proj"), d, d, bias, None)?,
                    k_proj: loader.linear(&at("self_attn.k_proj"), d, d, bias, None)?,
                    v_proj: loader.linear(&at("self_attn.v_proj"), d, d, bias, None)?,
                    out_proj: loader.linear(&at("self_attn.out_proj"), d, d, bias, None)?,
                    self_attn_layer_norm: loader.layer_norm(
                        &at("self_attn_layer_norm"),
                        d,
                        LAYER_NORM_EPS,
                    )?,
                    fc1: loader.linear(&at("fc1"), config.ffn_dim, d, bias, None)?,
                    fc2: loader.linear(&at("fc2"), d, config.ffn_dim, bias, None)?,
                    final_layer_norm: loader.layer_norm(&at("final_layer_norm"), d, LAYER_NORM_EPS)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let has_final_norm = config.do_layer_norm_before && !config.remove_final_layer_norm;
        let final_layer_norm = has_final_norm
            .then(|| loader.layer_norm(&decoder("final_layer_norm"), d, LAYER_NORM_EPS))
            .transpose()?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.table("lm_head.weight", config.vocab_size, width)?
        };
        Ok(Self {
            embed_tokens: Table(embed_tokens),
            embed_positions,
            project_in,
            layers: layers.into(),
            final_layer_norm,
            project_out,
            lm_head: Linear::new(Weight::Frozen(lm_head), None),
            n_parameters: loader.n_parameters,
            n_bytes: loader.n_bytes,
            cache_precision: format.cache_precision(),
            config,
        })
    }

    /// Its structure.
    pub fn config(&self) -> &OptConfig {
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

    /// The output head, `word_embed_proj_dim` to `vocab_size`.
    pub fn head(&self) -> &Linear {
        &self.lm_head
    }

    /// The matrices that a row passes, without the head.
    pub(super) fn matrices(&self) -> MatrixSize {
        let layers = self.layers.iter().flat_map(|layer| {
            [&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.out_proj, &layer.fc1, &layer.fc2]
        });
        layers.chain(&self.project_in).chain(&self.project_out).map(Linear::matrix).sum()
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.layers.len(), self.config.hidden_size, self.cache_precision)
    }

    /// The embeddings of tokens, `[ids.len(), word_embed_proj_dim]`.
    ///
    /// # Errors
    /// [`Request`](crate::Error::Request) when a token is not in the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.embed_tokens.rows(ids)
    }
}

impl Causal for Opt {
    fn attention_shape(&self) -> AttentionShape {
        let n_heads = self.config.num_attention_heads;
        AttentionShape::multi_head(n_heads, self.config.hidden_size / n_heads)
    }

    fn run(
        &self,
        embeds: &Tensor,
        positions: &Arc<[u32]>,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let config = &self.config;
        check_rows(embeds, positions, config.word_embed_proj_dim, config.max_position_embeddings)?;
        let places: Vec<u32> = positions.iter().map(|position| position + POSITION_OFFSET as u32).collect();
        let places = self.embed_positions.rows(&places)?;
        let embeds =
            self.project_in.as_ref().map_or(Ok(embeds.clone()), |project| project.forward(embeds))?;
        let mut x = (embeds + places)?; // [N, D]
        let before = config.do_layer_norm_before;
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let input = if before { layer.self_attn_layer_norm.forward(&x)? } else { x.clone() };
            let [q, k, v] = Linear::forward_all([&layer.q_proj, &layer.k_proj, &layer.v_proj], &input)?;
            let attended = attend(layer_idx, &q, &k, &v)?;
            // The norm stands before the sublayer, or after the residual.
            let residual = before.then_some(&x);
            let y = layer.out_proj.forward_then(&attended, Activation::Identity, residual)?;
            x = if before { y } else { layer.self_attn_layer_norm.forward_residual(&y, &x)? };
            let input = if before { layer.final_layer_norm.forward(&x)? } else { x.clone() };
            let inner = layer.fc1.forward_then(&input, config.activation, None)?;
            let y = layer.fc2.forward_then(&inner, Activation::Identity, before.then_some(&x))?;
            x = if before { y } else { layer.final_layer_norm.forward_residual(&y, &x)? };
        }
        if let Some(norm) = &self.final_layer_norm {
            x = norm.forward(&x)?;
        }
        Ok(self.project_out.as_ref().map_or(Ok(x.clone()), |project| project.forward(&x))?)
    }
}
