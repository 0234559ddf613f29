//! Every tensor of a BLIP-2 model under its names in both layouts, with its shape.

use super::language::Language;
use crate::qformer::QFormerConfig;
use crate::vision::vit::VitConfig;

/// What a model is made of, as far as the names and shapes of its tensors depend on it.
#[derive(Debug, Clone)]
pub(super) struct Architecture {
    pub(super) vision: VitConfig,
    pub(super) qformer: QFormerConfig,
    pub(super) head: Head,
}

#[derive(Debug, Clone)]
pub(super) enum Head {
    /// Stage 1: `Blip2ForImageTextRetrieval`, LAVIS's `blip2`.
    Matching,
    /// Stage 2: `Blip2ForConditionalGeneration`, LAVIS's `blip2_opt` and `blip2_t5`.
    Language(Language),
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its name in a Hugging Face folder.
    pub(super) name: String,
    /// Its shape there.
    pub(super) shape: Vec<usize>,
    /// What it is in a LAVIS state dict.
    pub(super) lavis: Lavis,
    /// Whether Hugging Face's own conversion leaves it out, so that a folder may lack it.
    pub(super) is_extra: bool,
}

impl Entry {
    /// Its LAVIS name, or the beginning of its LAVIS names.
    pub(super) fn lavis_name(&self) -> &str {
        match &self.lavis {
            Lavis::Same(name, _) | Lavis::QueryValueBias(name) => name,
        }
    }

    /// What is there as a whole or not at all: the temperature, the head.
    pub(super) fn module(&self) -> &str {
        self.name.split('.').next().unwrap_or_default()
    }
}

/// A tensor of the Hugging Face layout in a LAVIS state dict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lavis {
    /// The same elements, there in this shape.
    Same(String, Vec<usize>),
    /// The biases of queries, keys and values in one, where LAVIS has `….q_bias` and `….v_bias` and holds those of the keys
    /// at zero. They cancel in the softmax; a model that was trained elsewhere and has others keeps them as `….k_bias`.
    QueryValueBias(String),
}

/// A tensor that says nothing new: it may be stored, and is checked and left out, or made anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Derived {
    /// The same as the tensor of this name (tied weights).
    CopyOf(String),
    /// The numbers from 0, `[1, n]`, as int64.
    Positions(usize),
}

/// A layout's tensors.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
    /// By their LAVIS names. A whole LAVIS state dict has all of them.
    pub(super) derived_lavis: Vec<(String, Derived)>,
    /// By their Hugging Face names; current files have none.
    pub(super) derived_hugging_face: Vec<(String, Derived)>,
}

impl Table {
    pub(super) fn of(model: &Architecture) -> Self {
        let mut table = Self::of_encoder(&model.vision);
        table.extend_behind_encoder(model);
        table
    }

    /// Of all that is not the image encoder: what is trained, and the language model.
    pub(super) fn without_encoder(model: &Architecture) -> Self {
        let mut table = Self::default();
        table.extend_behind_encoder(model);
        table
    }

    fn extend_behind_encoder(&mut self, model: &Architecture) {
        self.norm("vision_model.post_layernorm", "ln_vision", model.vision.hidden_size);
        self.qformer(&model.qformer, matches!(model.head, Head::Matching));
        match &model.head {
            Head::Matching => self.matching(&model.qformer),
            Head::Language(language) => self.language(language, model.qformer.hidden_size),
        }
    }

    /// Of an image encoder without the norm behind it, which is the Q-Former's.
    pub(super) fn of_encoder(config: &VitConfig) -> Self {
        let mut table = Self::default();
        table.encoder(config);
        table
    }

    fn push(&mut self, name: String, lavis: Lavis, shape: &[usize]) {
        self.entries.push(Entry { name, shape: shape.into(), lavis, is_extra: false });
    }

    fn same(&mut self, name: impl Into<String>, lavis: impl Into<String>, shape: &[usize]) {
        self.push(name.into(), Lavis::Same(lavis.into(), shape.into()), shape);
    }

    fn linear(&mut self, name: &str, lavis: &str, n_out: usize, n_in: usize) {
        self.same(format!("{name}.weight"), format!("{lavis}.weight"), &[n_out, n_in]);
        self.same(format!("{name}.bias"), format!("{lavis}.bias"), &[n_out]);
    }

    fn norm(&mut self, name: &str, lavis: &str, size: usize) {
        self.same(format!("{name}.weight"), format!("{lavis}.weight"), &[size]);
        self.same(format!("{name}.bias"), format!("{lavis}.bias"), &[size]);
    }

    /// EVA-CLIP's transformer, or CLIP's, which is known by its norm before the blocks.
    fn encoder(&mut self, config: &VitConfig) {
        let is_clip = config.pre_norm;
        let (d, ffn, patch, n) =
            (config.hidden_size, config.intermediate_size, config.patch_size, config.n_tokens());
        let embeddings = |name: &str| format!("vision_model.embeddings.{name}");
        let lavis = |name: &str| format!("visual_encoder.{name}");
        let same = |name: &str, shape: &[usize]| Lavis::Same(lavis(name), shape.into());
        if is_clip {
            self.push(embeddings("class_embedding"), same("class_embedding", &[d]), &[1, 1, d]);
            self.push(embeddings("position_embedding"), same("positional_embedding", &[n, d]), &[1, n, d]);
        } else {
            self.same(embeddings("class_embedding"), lavis("cls_token"), &[1, 1, d]);
            self.same(embeddings("position_embedding"), lavis("pos_embed"), &[1, n, d]);
        }
        let patches = lavis(if is_clip { "conv1" } else { "patch_embed.proj" });
        let weight = [d, 3, patch, patch];
        self.same(embeddings("patch_embedding.weight"), format!("{patches}.weight"), &weight);
        if config.patch_bias {
            self.same(embeddings("patch_embedding.bias"), format!("{patches}.bias"), &[d]);
        }
        if is_clip {
            self.norm("vision_model.pre_layernorm", &lavis("ln_pre"), d);
        }
        for i in 0..config.num_hidden_layers {
            let block = format!("vision_model.encoder.layers.{i}");
            let at = |name: &str| format!("{block}.{name}");
            if is_clip {
                let lavis = |name: &str| format!("visual_encoder.transformer.resblocks.{i}.{name}");
                self.norm(&at("layer_norm1"), &lavis("ln_1"), d);
                self.same(at("self_attn.qkv.weight"), lavis("attn.in_proj_weight"), &[3 * d, d]);
                if config.qkv_bias {
                    self.same(at("self_attn.qkv.bias"), lavis("attn.in_proj_bias"), &[3 * d]);
                }
                self.linear(&at("self_attn.projection"), &lavis("attn.out_proj"), d, d);
                self.norm(&at("layer_norm2"), &lavis("ln_2"), d);
                self.linear(&at("mlp.fc1"), &lavis("mlp.c_fc"), ffn, d);
                self.linear(&at("mlp.fc2"), &lavis("mlp.c_proj"), d, ffn);
            } else {
                let lavis = |name: &str| format!("visual_encoder.blocks.{i}.{name}");
                self.norm(&at("layer_norm1"), &lavis("norm1"), d);
                self.same(at("self_attn.qkv.weight"), lavis("attn.qkv.weight"), &[3 * d, d]);
                if config.qkv_bias {
                    self.push(at("self_attn.qkv.bias"), Lavis::QueryValueBias(lavis("attn")), &[3 * d]);
                }
                self.linear(&at("self_attn.projection"), &lavis("attn.proj"), d, d);
                self.norm(&at("layer_norm2"), &lavis("norm2"), d);
                self.linear(&at("mlp.fc1"), &lavis("mlp.fc1"), ffn, d);
                self.linear(&at("mlp.fc2"), &lavis("mlp.fc2"), d, ffn);
            }
        }
    }

    fn qformer(&mut self, config: &QFormerConfig, with_text: bool) {
        let (d, ffn, encoder) = (config.hidden_size, config.intermediate_size, config.encoder_hidden_size);
        self.same("query_tokens", "query_tokens", &[1, config.num_query_tokens, d]);
        self.norm("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm", d);
        for i in 0..config.num_hidden_layers {
            let at = |name: &str| format!("qformer.encoder.layer.{i}.{name}");
            let lavis = |name: &str| format!("Qformer.bert.encoder.layer.{i}.{name}");
            let has_cross = i % config.cross_attention_frequency == 0;
            for (attention, n_in) in [("attention", d), ("crossattention", encoder)] {
                if attention == "crossattention" && !has_cross {
                    continue;
                }
                for (part, n_in) in [("query", d), ("key", n_in), ("value", n_in)] {
                    let (ours, theirs) =
                        (format!("{attention}.attention.{part}"), format!("{attention}.self.{part}"));
                    self.linear(&at(&ours), &lavis(&theirs), d, n_in);
                }
                let output = format!("{attention}.output");
                self.linear(&at(&format!("{output}.dense")), &lavis(&format!("{output}.dense")), d, d);
                self.norm(&at(&format!("{output}.LayerNorm")), &lavis(&format!("{output}.LayerNorm")), d);
            }
            for side in if with_text { &["_query", ""][..] } else { &["_query"] } {
                let (inner, outer) = (format!("intermediate{side}.dense"), format!("output{side}"));
                self.linear(&at(&inner), &lavis(&inner), ffn, d);
                self.linear(&at(&format!("{outer}.dense")), &lavis(&format!("{outer}.dense")), d, ffn);
                self.norm(&at(&format!("{outer}.LayerNorm")), &lavis(&format!("{outer}.LayerNorm")), d);
            }
        }
        let positions = Derived::Positions(config.max_position_embeddings);
        self.derived_lavis.push(("Qformer.bert.embeddings.position_ids".into(), positions.clone()));
        for module in ["embeddings", "qformer.embeddings"] {
            self.derived_hugging_face.push((format!("{module}.position_ids"), positions.clone()));
        }
    }

    fn matching(&mut self, config: &QFormerConfig) {
        let (d, vocab) = (config.hidden_size, config.vocab_size);
        let words = "Qformer.bert.embeddings.word_embeddings.weight";
        self.same("embeddings.word_embeddings.weight", words, &[vocab, d]);
        let positions = "position_embeddings.weight";
        self.same(
            format!("embeddings.{positions}"),
            format!("Qformer.bert.embeddings.{positions}"),
            &[config.max_position_embeddings, d],
        );
        self.linear("vision_projection", "vision_proj", config.image_text_hidden_size, d);
        self.linear("text_projection", "text_proj", config.image_text_hidden_size, d);
        self.linear("itm_head", "itm_head", 2, d);
        let n_public = self.entries.len();
        self.same("temp", "temp", &[]);
        let cls = "cls.predictions";
        self.same(format!("{cls}.bias"), format!("Qformer.{cls}.bias"), &[vocab]);
        self.linear(&format!("{cls}.transform.dense"), &format!("Qformer.{cls}.transform.dense"), d, d);
        self.norm(&format!("{cls}.transform.LayerNorm"), &format!("Qformer.{cls}.transform.LayerNorm"), d);
        self.entries[n_public..].iter_mut().for_each(|entry| entry.is_extra = true);
        for (part, of) in [("weight", words.to_owned()), ("bias", format!("Qformer.{cls}.bias"))] {
            self.derived_lavis.push((format!("Qformer.{cls}.decoder.{part}"), Derived::CopyOf(of)));
        }
    }

    fn language(&mut self, language: &Language, width: usize) {
        let projection = format!("{}_proj", language.family.lavis_prefix());
        self.linear("language_projection", &projection, language.width, width);
        let ours = |name: &str| format!("language_model.{name}");
        let theirs = |name: &str| format!("{}_model.{name}", language.family.lavis_prefix());
        for (name, shape) in &language.tensors {
            self.same(ours(name), theirs(name), shape);
        }
        for (name, of) in &language.copies {
            self.derived_hugging_face.push((ours(name), Derived::CopyOf(ours(of))));
            self.derived_lavis.push((theirs(name), Derived::CopyOf(theirs(of))));
        }
    }
}

#[cfg(test)]
mod tests;
