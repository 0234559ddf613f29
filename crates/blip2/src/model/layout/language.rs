//! The tensors of the language models, by the names of their own Hugging Face checkpoints.

use serde_json::Value as Json;

use crate::language::{OptConfig, T5Config};
use crate::{Error, Result};

/// The families that BLIP-2 was published with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Opt,
    T5,
}

impl Family {
    /// Of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] when the model is of another family.
    pub(super) fn of(json: &Json) -> Result<Self> {
        match json["model_type"].as_str() {
            Some("opt") => Ok(Self::Opt),
            Some("t5") => Ok(Self::T5),
            other => Err(Error::Config {
                field: "language.model_type".into(),
                reason: format!("is {}, expected opt or t5: BLIP-2 has no other", other.unwrap_or("missing")),
            }),
        }
    }

    /// What LAVIS's names of its parts begin with.
    pub(super) fn lavis_prefix(self) -> &'static str {
        match self {
            Self::Opt => "opt",
            Self::T5 => "t5",
        }
    }

    /// A tensor that every model of the family has and none has twice: a checkpoint holds it only when the language model is
    /// in it, while a copy of the embeddings may be there though the model was frozen.
    pub(super) fn telling_tensor(self) -> &'static str {
        match self {
            Self::Opt => "model.decoder.layers.0.self_attn_layer_norm.weight",
            Self::T5 => "encoder.block.0.layer.0.layer_norm.weight",
        }
    }

    /// The name here of a tensor in a checkpoint of the language model alone; nothing for what BLIP-2 never uses.
    pub(super) fn own_name(self, name: &str) -> Option<String> {
        match self {
            // Meta's own conversions were saved without the head, and so without the first part of the name.
            Self::Opt if name.starts_with("decoder.") => Some(format!("model.{name}")),
            // A leftover of T5's conversion, in no module.
            Self::T5 if name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight" => {
                None
            }
            _ => Some(name.to_owned()),
        }
    }
}

/// A language model's tensors.
#[derive(Debug, Clone)]
pub(super) struct Language {
    pub(super) family: Family,
    /// Width of its embeddings, and of what stands for a picture beside them.
    pub(super) width: usize,
    /// Width of its layers, which OPT-350m's embeddings are narrower than.
    pub(super) inner_width: usize,
    /// Rows of its embeddings.
    pub(super) vocab_size: usize,
    /// Names and shapes.
    pub(super) tensors: Vec<(String, Vec<usize>)>,
    /// Tied weights that may be stored all the same: the name, and what it is a copy of.
    pub(super) copies: Vec<(String, String)>,
}

impl Language {
    /// Of a `config.json`; `has` says whether the checkpoint, which has `n_tensors`, has a certain one, where the configuration
    /// leaves that open.
    ///
    /// # Errors
    /// [`Error::Config`] when the model is of another family or a size is wrong.
    pub(super) fn of(json: &Json, n_tensors: usize, has: impl Fn(&str) -> bool) -> Result<Self> {
        match Family::of(json)? {
            Family::Opt => {
                let config = OptConfig::from_hugging_face(json)?;
                check_layers("language.num_hidden_layers", config.num_hidden_layers, n_tensors)?;
                Ok(opt(&config))
            }
            Family::T5 => {
                let config = T5Config::from_hugging_face(json)?;
                check_layers("language.num_layers", config.num_layers, n_tensors)?;
                check_layers("language.num_decoder_layers", config.num_decoder_layers, n_tensors)?;
                Ok(t5(&config, has("lm_head.weight")))
            }
        }
    }
}

/// A table of more layers than there are tensors would be written down only to miss them all.
///
/// # Errors
/// [`Error::Config`].
pub(super) fn check_layers(field: &str, n_layers: usize, n_tensors: usize) -> Result<()> {
    if n_layers <= n_tensors {
        return Ok(());
    }
    let reason = format!("is {n_layers}, but the checkpoint has {n_tensors} tensors in all");
    Err(Error::Config { field: field.into(), reason })
}

fn opt(config: &OptConfig) -> Language {
    let (d, ffn, width) = (config.hidden_size, config.ffn_dim, config.word_embed_proj_dim);
    let mut tensors = Vec::new();
    let mut add =
        |name: String, shape: &[usize]| tensors.push((format!("model.decoder.{name}"), shape.to_vec()));
    add("embed_tokens.weight".into(), &[config.vocab_size, width]);
    // The table has two rows before position 0.
    add("embed_positions.weight".into(), &[config.max_position_embeddings + 2, d]);
    if width != d {
        add("project_in.weight".into(), &[d, width]);
        add("project_out.weight".into(), &[width, d]);
    }
    let has_final_norm = config.do_layer_norm_before && !config.remove_final_layer_norm;
    let norms = (0..config.num_hidden_layers)
        .flat_map(|i| ["self_attn_layer_norm", "final_layer_norm"].map(|norm| format!("layers.{i}.{norm}")))
        .chain(has_final_norm.then(|| "final_layer_norm".into()));
    for norm in norms {
        add(format!("{norm}.weight"), &[d]);
        add(format!("{norm}.bias"), &[d]);
    }
    for i in 0..config.num_hidden_layers {
        let attention =
            ["q_proj", "k_proj", "v_proj", "out_proj"].map(|part| (format!("self_attn.{part}"), d, d));
        let feed_forward = [("fc1".to_owned(), ffn, d), ("fc2".to_owned(), d, ffn)];
        for (part, n_out, n_in) in attention.into_iter().chain(feed_forward) {
            add(format!("layers.{i}.{part}.weight"), &[n_out, n_in]);
            if config.enable_bias {
                add(format!("layers.{i}.{part}.bias"), &[n_out]);
            }
        }
    }
    let head = "lm_head.weight".to_owned();
    let mut copies = Vec::new();
    if config.tie_word_embeddings {
        copies.push((head, "model.decoder.embed_tokens.weight".into()));
    } else {
        tensors.push((head, vec![config.vocab_size, width]));
    }
    Language { family: Family::Opt, width, inner_width: d, vocab_size: config.vocab_size, tensors, copies }
}

fn t5(config: &T5Config, has_head: bool) -> Language {
    let (d, ffn, inner) = (config.d_model, config.d_ff, config.num_heads * config.d_kv);
    let table = || vec![config.vocab_size, d];
    let mut tensors = vec![("shared.weight".to_owned(), table())];
    if has_head {
        tensors.push(("lm_head.weight".into(), table()));
    }
    for (stack, n_layers) in [("encoder", config.num_layers), ("decoder", config.num_decoder_layers)] {
        let mut add =
            |name: String, shape: &[usize]| tensors.push((format!("{stack}.{name}"), shape.to_vec()));
        for i in 0..n_layers {
            let attentions = if stack == "encoder" {
                &["SelfAttention"][..]
            } else {
                &["SelfAttention", "EncDecAttention"]
            };
            for (layer, attention) in attentions.iter().enumerate() {
                let at = format!("block.{i}.layer.{layer}");
                for part in ["q", "k", "v"] {
                    add(format!("{at}.{attention}.{part}.weight"), &[inner, d]);
                }
                add(format!("{at}.{attention}.o.weight"), &[d, inner]);
                add(format!("{at}.layer_norm.weight"), &[d]);
            }
            let at = format!("block.{i}.layer.{}", attentions.len());
            for part in if config.is_gated_act { &["wi_0", "wi_1"][..] } else { &["wi"] } {
                add(format!("{at}.DenseReluDense.{part}.weight"), &[ffn, d]);
            }
            add(format!("{at}.DenseReluDense.wo.weight"), &[d, ffn]);
            add(format!("{at}.layer_norm.weight"), &[d]);
        }
        let bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        add(bias.into(), &[config.relative_attention_num_buckets, config.num_heads]);
        add("final_layer_norm.weight".into(), &[d]);
    }
    let copies =
        ["encoder", "decoder"].map(|stack| (format!("{stack}.embed_tokens.weight"), "shared.weight".into()));
    Language {
        family: Family::T5,
        width: d,
        inner_width: d,
        vocab_size: config.vocab_size,
        tensors,
        copies: copies.into(),
    }
}
