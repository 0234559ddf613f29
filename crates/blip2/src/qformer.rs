//! The Q-Former: a BERT whose learned queries look at a picture (BLIP-2 §3.1, arXiv 2301.12597).
//!
//! Queries and text tokens share self-attention; each has its own feed-forward layers; only queries
//! cross-attend to the picture. The attention modes of the paper's figure 2 differ in which rows an attention
//! [`Plan`] lets see which:
//!
//! | mode | call |
//! |---|---|
//! | queries only (ITC picture, stage 2) | [`QFormer::encode_queries`] |
//! | text only (ITC text) | [`QFormer::encode_text`] |
//! | bidirectional (ITM) | [`QFormer::encode_pairs`] |
//! | multimodal causal (ITG) | [`QFormer::decode_text`] over the [`QueryKeys`] of a query pass |
//!
//! All tensors are packed rows `[N, D]`, see [`crate::layers`]. Tensor names are those of Hugging Face's BLIP-2;
//! what its conversion drops is kept under `temp` and `cls`.

mod config;
mod heads;
mod layer;
mod probe;
mod text_batch;

use std::ops::Range;

use blip2_kernels::awake::awake;
use candle_core::Tensor;

use crate::layers::{DropoutRng, LayerNorm, Loader, Plan, Sequence, Span};
use crate::{Error, Result};
use heads::TextParts;
use layer::Layer;

pub(crate) use config::LN_VISION_EPS;
pub use config::QFormerConfig;
pub use heads::TextSide;
pub use probe::CrossAttentionProbe;
pub use text_batch::TextBatch;

/// A picture's keys and values in every cross-attention layer; computed once a picture, whatever looks at it.
#[derive(Debug, Clone)]
pub struct ImageKeys {
    layers: Vec<(Tensor, Tensor)>,
    n_tokens: usize,
    n_images: usize,
}

impl ImageKeys {
    fn span(&self, image: usize) -> Span {
        Span { start: image * self.n_tokens, len: self.n_tokens }
    }
}

/// The keys and values of a query pass in every layer, which [`QFormer::decode_text`] continues from.
#[derive(Debug, Clone, Default)]
pub struct QueryKeys {
    layers: Vec<(Tensor, Tensor)>,
}

/// The Q-Former with its queries and stage-1 heads.
#[derive(Debug, Clone)]
pub struct QFormer {
    config: QFormerConfig,
    /// LAVIS's `ln_vision`: normalises the picture's tokens.
    vision_layernorm: LayerNorm,
    /// `[1, Q, D]`.
    query_tokens: Tensor,
    layernorm: LayerNorm,
    layers: Vec<Layer>,
    text: Option<TextParts>,
}

/// What a pass writes down besides its result.
#[derive(Default)]
struct Notes<'a> {
    /// The keys and values of every self-attention.
    keys: Option<&'a mut QueryKeys>,
    /// The cross-attention.
    probe: Option<&'a mut CrossAttentionProbe>,
}

/// The rows of one pass: query rows first, then text rows.
struct Rows {
    hidden: Tensor,
    n_query_rows: usize,
}

impl QFormer {
    /// Loads the Q-Former with as much of its text side as asked for.
    ///
    /// # Errors
    /// When the configuration contradicts itself or a tensor is missing or has another shape.
    pub fn load(config: &QFormerConfig, loader: &Loader<'_>, text: TextSide) -> Result<Self> {
        config.validate()?;
        let with_text = text != TextSide::None;
        let (width, eps) = (config.hidden_size, config.layer_norm_eps);
        let qformer = loader.at("qformer");
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::load(config, &qformer.at(format!("encoder.layer.{i}")), i, with_text))
            .collect::<Result<_>>()?;
        Ok(Self {
            vision_layernorm: LayerNorm::load(
                &loader.at("vision_layernorm"),
                config.encoder_hidden_size,
                config.vision_layer_norm_eps,
            )?,
            query_tokens: loader.tensor("query_tokens", &[1, config.num_query_tokens, width])?,
            layernorm: LayerNorm::load(&qformer.at("layernorm"), width, eps)?,
            layers,
            text: with_text.then(|| TextParts::load(config, loader, text)).transpose()?,
            config: config.clone(),
        })
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &QFormerConfig {
        &self.config
    }

    /// A picture's tokens as the queries attend to them: the encoder's output, `[B * P, encoder_hidden_size]`, after its last norm
    /// (LAVIS's `ln_vision`), in the same shape.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn normalize_image(&self, image_embeds: &Tensor) -> Result<Tensor> {
        Ok(self.vision_layernorm.forward(image_embeds)?)
    }

    /// Projects a picture's tokens to the keys and values of every cross-attention layer.
    ///
    /// # Shapes
    /// - `image_embeds`: `[B * P, encoder_hidden_size]`, the picture encoder's output
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn image_keys(&self, image_embeds: &Tensor, n_images: usize) -> Result<ImageKeys> {
        let (n_rows, _) = image_embeds.dims2()?;
        if n_images == 0 || n_rows % n_images != 0 {
            return Err(Error::Request(format!(
                "{n_rows} picture tokens do not divide into {n_images} pictures"
            )));
        }
        let layers = awake(|| {
            let x = self.normalize_image(image_embeds)?;
            let crosses = self.layers.iter().filter_map(|layer| layer.crossattention.as_ref());
            crosses.map(|cross| Ok((cross.key.forward(&x)?, cross.value.forward(&x)?))).collect::<Result<_>>()
        })?;
        Ok(ImageKeys { layers, n_tokens: n_rows / n_images, n_images })
    }

    /// Runs the queries over each picture.
    ///
    /// Returns `[B * Q, D]` and the pass's own keys and values for [`Self::decode_text`].
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn encode_queries(&self, image: &ImageKeys, dropout: &mut DropoutRng) -> Result<(Tensor, QueryKeys)> {
        let mut keys = QueryKeys::default();
        let notes = Notes { keys: Some(&mut keys), probe: None };
        Ok((self.run_queries(image, notes, dropout)?, keys))
    }

    /// [`Self::encode_queries`] of one picture, `[Q, D]`, with its cross-attention noted in `probe`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn encode_queries_probed(
        &self,
        image: &ImageKeys,
        probe: &mut CrossAttentionProbe,
    ) -> Result<Tensor> {
        let notes = Notes { keys: None, probe: Some(probe) };
        self.run_queries(image, notes, &mut DropoutRng::off())
    }

    fn run_queries(&self, image: &ImageKeys, notes: Notes<'_>, dropout: &mut DropoutRng) -> Result<Tensor> {
        let images: Vec<usize> = (0..image.n_images).collect();
        let rows = Rows {
            hidden: self.embed_queries(images.len(), dropout)?,
            n_query_rows: self.n_queries(images.len()),
        };
        let plan = (0..images.len()).map(|i| Sequence::mutual(vec![self.query_span(i)])).collect();
        Ok(awake(|| self.run(rows, &plan, Some((image, &images)), None, notes, dropout))?.hidden)
    }

    /// Runs texts alone; row `spans[i].start` of the result is the `[CLS]` feature of text `i`.
    ///
    /// # Errors
    /// When the model was loaded without its text side, or a text is too long.
    pub fn encode_text(&self, texts: &TextBatch, dropout: &mut DropoutRng) -> Result<Tensor> {
        let rows = Rows { hidden: self.embed_text(texts, dropout)?, n_query_rows: 0 };
        let plan = (0..texts.len()).map(|i| Sequence::mutual(vec![span(texts.span(i), 0)])).collect();
        Ok(awake(|| self.run(rows, &plan, None, None, Notes::default(), dropout))?.hidden)
    }

    /// Runs queries and text together, fully bidirectional: pair `i` is picture `images[i]` with text `i`.
    ///
    /// Returns the query rows `[pairs * Q, D]` and the text rows.
    ///
    /// # Errors
    /// When the model was loaded without its text side, or a text is too long.
    pub fn encode_pairs(
        &self,
        image: &ImageKeys,
        images: &[usize],
        texts: &TextBatch,
        dropout: &mut DropoutRng,
    ) -> Result<(Tensor, Tensor)> {
        let hidden = self.run_pairs(image, images, texts, Notes::default(), dropout)?;
        let n_query_rows = self.n_queries(images.len());
        let n_text_rows = hidden.dim(0)? - n_query_rows;
        Ok((hidden.narrow(0, 0, n_query_rows)?, hidden.narrow(0, n_query_rows, n_text_rows)?))
    }

    /// The query rows `[Q, D]` of [`Self::encode_pairs`] for one picture and one text, with the cross-attention noted in
    /// `probe`.
    ///
    /// # Errors
    /// As [`Self::encode_pairs`].
    pub fn encode_pair_probed(
        &self,
        image: &ImageKeys,
        text: &TextBatch,
        probe: &mut CrossAttentionProbe,
    ) -> Result<Tensor> {
        let notes = Notes { keys: None, probe: Some(probe) };
        let hidden = self.run_pairs(image, &[0], text, notes, &mut DropoutRng::off())?;
        Ok(hidden.narrow(0, 0, self.n_queries(1))?)
    }

    fn run_pairs(
        &self,
        image: &ImageKeys,
        images: &[usize],
        texts: &TextBatch,
        notes: Notes<'_>,
        dropout: &mut DropoutRng,
    ) -> Result<Tensor> {
        if images.len() != texts.len() {
            return Err(Error::Request(format!("{} pictures for {} texts", images.len(), texts.len())));
        }
        let n_query_rows = self.n_queries(images.len());
        let queries = self.embed_queries(images.len(), dropout)?;
        let hidden = Tensor::cat(&[&queries, &self.embed_text(texts, dropout)?], 0)?;
        let plan = (0..texts.len())
            .map(|i| Sequence::mutual(vec![self.query_span(i), span(texts.span(i), n_query_rows)]))
            .collect();
        let rows = Rows { hidden, n_query_rows };
        Ok(awake(|| self.run(rows, &plan, Some((image, images)), None, notes, dropout))?.hidden)
    }

    /// Runs texts causally on top of a query pass: each token sees all queries of its picture and the tokens up
    /// to itself. Text `i` belongs to picture `i` of that pass. Gives the texts' rows, `[tokens of all texts, hidden_size]`.
    ///
    /// # Errors
    /// When the model was loaded without its text side, or a text is too long.
    pub fn decode_text(
        &self,
        queries: &QueryKeys,
        texts: &TextBatch,
        dropout: &mut DropoutRng,
    ) -> Result<Tensor> {
        let n_query_rows = self.n_queries(texts.len());
        let plan = (0..texts.len())
            .map(|i| Sequence {
                queries: vec![span(texts.span(i), 0)],
                keys: vec![self.query_span(i), span(texts.span(i), n_query_rows)],
                causal: true,
            })
            .collect();
        let rows = Rows { hidden: self.embed_text(texts, dropout)?, n_query_rows: 0 };
        Ok(awake(|| self.run(rows, &plan, None, Some(queries), Notes::default(), dropout))?.hidden)
    }

    fn n_queries(&self, n_images: usize) -> usize {
        n_images * self.config.num_query_tokens
    }

    fn query_span(&self, i: usize) -> Span {
        Span { start: self.n_queries(i), len: self.config.num_query_tokens }
    }

    fn embed_queries(&self, n_images: usize, dropout: &mut DropoutRng) -> Result<Tensor> {
        let (_, n_queries, width) = self.query_tokens.dims3()?;
        let normed = self.layernorm.forward(&self.query_tokens.reshape((n_queries, width))?)?;
        let rows = normed.unsqueeze(0)?.broadcast_as((n_images, n_queries, width))?;
        Ok(dropout.apply(&rows.contiguous()?.reshape((n_images * n_queries, width))?)?)
    }

    fn embed_text(&self, texts: &TextBatch, dropout: &mut DropoutRng) -> Result<Tensor> {
        let parts = self.text_parts()?;
        let limit = self.config.max_position_embeddings;
        for text in texts.spans() {
            if text.len() > limit {
                return Err(Error::TextTooLong { n_tokens: text.len(), limit });
            }
            if text.is_empty() {
                return Err(Error::Request("a text has no tokens".into()));
            }
        }
        if let Some(id) = texts.ids().iter().find(|&&id| id as usize >= self.config.vocab_size) {
            return Err(Error::Request(format!("token {id} is outside the vocabulary")));
        }
        let positions: Vec<u32> = texts.spans().iter().flat_map(|s| 0..s.len() as u32).collect();
        let words = parts.word_embeddings.forward(texts.ids())?;
        let positions = parts.position_embeddings.forward(&positions)?;
        Ok(dropout.apply(&self.layernorm.forward_residual(&words, &positions)?)?)
    }

    fn run(
        &self,
        mut rows: Rows,
        plan: &Plan,
        image: Option<(&ImageKeys, &[usize])>,
        prefix: Option<&QueryKeys>,
        mut notes: Notes<'_>,
        dropout: &mut DropoutRng,
    ) -> Result<Rows> {
        let cross_plan: Option<Plan> = image.map(|(keys, images)| {
            let sequences = images.iter().enumerate().map(|(i, &image)| Sequence {
                queries: vec![self.query_span(i)],
                keys: vec![keys.span(image)],
                causal: false,
            });
            sequences.collect()
        });
        let mut cross_layers = image.map(|(keys, _)| keys.layers.iter());
        for (i, layer) in self.layers.iter().enumerate() {
            let (k, v) =
                (layer.attention.key.forward(&rows.hidden)?, layer.attention.value.forward(&rows.hidden)?);
            if let Some(keys) = &mut notes.keys {
                keys.layers.push((k.clone(), v.clone()));
            }
            let (k, v) = match prefix {
                Some(prefix) => {
                    let (prefix_k, prefix_v) = &prefix.layers[i];
                    (Tensor::cat(&[prefix_k, &k], 0)?, Tensor::cat(&[prefix_v, &v], 0)?)
                }
                None => (k, v),
            };
            let hidden = layer.attention.forward(&rows.hidden, &k, &v, plan, None, dropout)?;
            let cross = match (&layer.crossattention, &mut cross_layers, &cross_plan) {
                (Some(block), Some(keys), Some(plan)) => keys.next().map(|keys| (block, keys, plan)),
                _ => None,
            };
            rows.hidden = layer.after_self_attention(
                &hidden,
                rows.n_query_rows,
                cross,
                notes.probe.as_deref_mut(),
                dropout,
            )?;
        }
        Ok(rows)
    }
}

fn span(rows: Range<usize>, offset: usize) -> Span {
    Span { start: rows.start + offset, len: rows.len() }
}
