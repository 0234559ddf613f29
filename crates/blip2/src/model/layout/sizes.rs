//! The sizes of a model from the shapes in its LAVIS state dict, and the other way round into a `config.json`.

use serde_json::{Value as Json, json};

use super::state::State;
use super::table::{Architecture, Head};
use crate::qformer::{LN_VISION_EPS, QFormerConfig};
use crate::vision::vit::{VitActivation, VitConfig};
use crate::{Error, Result};

/// What BLIP-2's Q-Former takes from BERT, where a checkpoint without a text side does not say it.
const BERT_VOCAB: usize = 30522;
const BERT_POSITIONS: usize = 512;

/// The image encoder's sizes. Attention heads leave no trace in the weights: those of the published encoders are known, for
/// others `heads` says them.
///
/// # Errors
/// [`Error::MissingTensor`], or [`Error::Config`] when the number of heads is not known.
pub(super) fn vision(state: &State<'_>, heads: Option<usize>) -> Result<VitConfig> {
    let is_clip = state.contains("visual_encoder.class_embedding");
    let [patches, positions, fc1, blocks] = if is_clip {
        [
            "conv1.weight",
            "positional_embedding",
            "transformer.resblocks.0.mlp.c_fc.weight",
            "transformer.resblocks",
        ]
    } else {
        ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks"]
    }
    .map(|name| format!("visual_encoder.{name}"));
    let (hidden_size, patch_size) = (axis(state, &patches, 0)?, axis(state, &patches, 2)?);
    let n_tokens = axis(state, &positions, if is_clip { 0 } else { 1 })?;
    let base = if is_clip { VitConfig::clip_l(224) } else { VitConfig::eva_clip_g(224) };
    let known = (hidden_size == base.hidden_size).then_some(base.num_attention_heads);
    let config = VitConfig {
        hidden_size,
        intermediate_size: axis(state, &fc1, 0)?,
        num_hidden_layers: count(state, &blocks),
        num_attention_heads: heads.or(known).ok_or_else(|| unknown_heads("vision_config", hidden_size))?,
        image_size: n_tokens.saturating_sub(1).isqrt().saturating_mul(patch_size),
        patch_size,
        ..base
    };
    config.validate()?;
    Ok(config)
}

/// How many blocks of an encoder's own checkpoint BLIP-2 has: all but the last of EVA-CLIP ViT-g's 40 and CLIP ViT-L's 24
/// (BLIP-2 §3.3), known by their width; others are taken as they are.
pub(super) fn n_blocks(is_clip: bool, width: usize, n_stored: usize) -> usize {
    let published = if is_clip { VitConfig::clip_l(224) } else { VitConfig::eva_clip_g(224) };
    if width == published.hidden_size { n_stored.min(published.num_hidden_layers) } else { n_stored }
}

/// The Q-Former's sizes; `heads` as for [`vision`].
///
/// # Errors
/// As [`vision`].
pub(super) fn qformer(state: &State<'_>, heads: Option<usize>) -> Result<QFormerConfig> {
    let at = |name: &str| format!("Qformer.bert.{name}");
    let hidden_size = axis(state, "query_tokens", 2)?;
    let num_hidden_layers = count(state, &at("encoder.layer"));
    let has_cross =
        |i: &usize| state.contains(&at(&format!("encoder.layer.{i}.crossattention.self.key.weight")));
    let known = (hidden_size == 768).then_some(12);
    let words = at("embeddings.word_embeddings.weight");
    let positions = [("embeddings.position_embeddings.weight", 0), ("embeddings.position_ids", 1)];
    let positions = positions.iter().find_map(|(name, n)| axis(state, &at(name), *n).ok());
    let config = QFormerConfig {
        vocab_size: axis(state, &words, 0).unwrap_or(BERT_VOCAB),
        hidden_size,
        num_hidden_layers,
        num_attention_heads: heads.or(known).ok_or_else(|| unknown_heads("qformer_config", hidden_size))?,
        intermediate_size: axis(state, &at("encoder.layer.0.intermediate_query.dense.weight"), 0)?,
        max_position_embeddings: positions.unwrap_or(BERT_POSITIONS),
        layer_norm_eps: 1e-12,
        // The first layer always has cross-attention; a Q-Former without a second is one whose period was not reached.
        cross_attention_frequency: (1..num_hidden_layers).find(has_cross).unwrap_or(num_hidden_layers.max(1)),
        encoder_hidden_size: axis(state, &at("encoder.layer.0.crossattention.self.key.weight"), 1)?,
        num_query_tokens: axis(state, "query_tokens", 1)?,
        image_text_hidden_size: axis(state, "vision_proj.weight", 0).unwrap_or(256),
        vision_layer_norm_eps: LN_VISION_EPS,
    };
    config.validate()?;
    Ok(config)
}

fn axis(state: &State<'_>, name: &str, axis: usize) -> Result<usize> {
    let shape = state.shape(name)?;
    shape.get(axis).copied().ok_or_else(|| Error::TensorNames {
        missing: Vec::new(),
        misshapen: vec![format!("{name} is {shape:?}, expected at least {} dimensions", axis + 1)],
        unknown: Vec::new(),
    })
}

/// The numbers that follow `prefix`, counted from 0 to the largest.
fn count(state: &State<'_>, prefix: &str) -> usize {
    let number =
        |name: &str| name.strip_prefix(prefix)?.strip_prefix('.')?.split('.').next()?.parse::<usize>().ok();
    // A hostile number must not become an endless loop over blocks; what is left out is then unknown.
    state.names().filter_map(number).filter(|n| *n < 1024).max().map_or(0, |last| last + 1)
}

fn unknown_heads(part: &str, width: usize) -> Error {
    Error::Config {
        field: format!("{part}.num_attention_heads"),
        reason: format!(
            "is not in the weights, and no published model has the width {width}: give it, as `encoder_heads` in training, \
             in a config.json in a conversion"
        ),
    }
}

/// The configuration as transformers writes it. What it has no field for stands under names that it passes over:
/// `post_layernorm_eps`, `pre_norm`, `patch_bias`.
///
/// `text` is the language model's own configuration, `dtype` the name of the widest number type among the weights.
pub(super) fn config_json(
    model: &Architecture,
    text: Option<&Json>,
    image_token: Option<usize>,
    dtype: &str,
) -> Json {
    let Architecture { vision, qformer, head } = model;
    let mut vision_config = json!({
        "model_type": "blip_2_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": match vision.hidden_act {
            VitActivation::Gelu => "gelu",
            VitActivation::QuickGelu => "quick_gelu",
        },
        "layer_norm_eps": vision.layer_norm_eps,
        "post_layernorm_eps": qformer.vision_layer_norm_eps,
        "attention_dropout": 0.0,
        "initializer_range": 1e-10,
        "qkv_bias": vision.qkv_bias,
    });
    if vision.pre_norm {
        vision_config["pre_norm"] = true.into();
    }
    if !vision.patch_bias {
        vision_config["patch_bias"] = false.into();
    }
    let is_matching = matches!(head, Head::Matching);
    let mut config = json!({
        "architectures": [if is_matching { "Blip2ForImageTextRetrieval" } else { "Blip2ForConditionalGeneration" }],
        "model_type": "blip-2",
        "torch_dtype": dtype,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "num_query_tokens": qformer.num_query_tokens,
        "image_text_hidden_size": qformer.image_text_hidden_size,
        "image_token_index": image_token,
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.hidden_size,
            "num_hidden_layers": qformer.num_hidden_layers,
            "num_attention_heads": qformer.num_attention_heads,
            "intermediate_size": qformer.intermediate_size,
            "max_position_embeddings": qformer.max_position_embeddings,
            "layer_norm_eps": qformer.layer_norm_eps,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "encoder_hidden_size": qformer.encoder_hidden_size,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "initializer_range": 0.02,
            "pad_token_id": 0,
            "use_qformer_text_input": is_matching,
        },
        "vision_config": vision_config,
    });
    if let Some(text) = text {
        config["text_config"] = text.clone();
        config["use_decoder_only_language_model"] = (text["model_type"] == "opt").into();
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_of_the_published_encoders_is_dropped() {
        assert_eq!(n_blocks(false, 1408, 40), 39);
        assert_eq!(n_blocks(false, 1408, 39), 39);
        assert_eq!(n_blocks(true, 1024, 24), 23);
        assert_eq!(n_blocks(false, 24, 2), 2);
    }
}
