//! What stands around the layers for texts: their embeddings, and the heads of stage 1 (ITC's projections, ITM's classifier, ITG's
//! vocabulary).

use candle_core::Tensor;

use super::{QFormer, QFormerConfig, TextBatch};
use crate::layers::{Activation, Embedding, LayerNorm, Linear, Loader, activate};
use crate::{Error, Result};

/// How much of the text side to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextSide {
    /// Nothing: stage 2 does without.
    None,
    /// All that stage 1 trains.
    Whole,
    /// What matching needs. The language-modelling head and the temperature, which the conversion to Hugging Face's layout
    /// drops, are loaded where the checkpoint has them.
    Matching,
}

/// What only text needs; stage 2 and captioning do without.
#[derive(Debug, Clone)]
pub(super) struct TextParts {
    pub(super) word_embeddings: Embedding,
    pub(super) position_embeddings: Embedding,
    language_head: Option<LanguageHead>,
    vision_projection: Linear,
    text_projection: Linear,
    itm_head: Linear,
    temp: Option<Tensor>,
}

/// BERT's language-modelling head; its vocabulary projection is the word embeddings.
#[derive(Debug, Clone)]
struct LanguageHead {
    transform: Linear,
    transform_norm: LayerNorm,
    decoder: Linear,
}

impl TextParts {
    pub(super) fn load(config: &QFormerConfig, loader: &Loader<'_>, text: TextSide) -> Result<Self> {
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        let embeddings = loader.at("qformer.embeddings");
        let positions = config.max_position_embeddings;
        let must_have = text == TextSide::Whole;
        let has_head = must_have || loader.has("cls.predictions.bias");
        let has_temp = must_have || loader.has("temp");
        Ok(Self {
            word_embeddings: Embedding::load(&embeddings.at("word_embeddings"), vocab, width)?,
            position_embeddings: Embedding::load(&embeddings.at("position_embeddings"), positions, width)?,
            language_head: has_head.then(|| LanguageHead::load(config, loader)).transpose()?,
            vision_projection: loader.linear("vision_projection", width, config.image_text_hidden_size)?,
            text_projection: loader.linear("text_projection", width, config.image_text_hidden_size)?,
            itm_head: loader.linear("itm_head", width, 2)?,
            temp: has_temp.then(|| loader.tensor("temp", &[])).transpose()?,
        })
    }
}

impl LanguageHead {
    fn load(config: &QFormerConfig, loader: &Loader<'_>) -> Result<Self> {
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        let cls = loader.at("cls.predictions");
        let transform = cls.at("transform");
        let tied = loader.at("qformer.embeddings.word_embeddings").weight("weight", width, vocab)?;
        Ok(Self {
            transform: transform.linear("dense", width, width)?,
            transform_norm: LayerNorm::load(&transform.at("LayerNorm"), width, config.layer_norm_eps)?,
            decoder: Linear::new(tied, Some(cls.tensor("bias", &[vocab])?)),
        })
    }
}

impl QFormer {
    /// The picture's features in the comparison space, `[B * Q, image_text_hidden_size]`, each of length 1.
    ///
    /// # Errors
    /// When the model was loaded without its text side.
    pub fn project_image(&self, query_output: &Tensor) -> Result<Tensor> {
        normalize(&self.text_parts()?.vision_projection.forward(query_output)?)
    }

    /// The texts' features in the comparison space, `[B, image_text_hidden_size]`, each of length 1, from [`Self::encode_text`].
    ///
    /// # Errors
    /// When the model was loaded without its text side.
    pub fn project_text(&self, text_output: &Tensor, texts: &TextBatch) -> Result<Tensor> {
        let cls: Vec<u32> = (0..texts.len()).map(|i| texts.span(i).start as u32).collect();
        let cls = text_output.index_select(&Tensor::from_slice(&cls, cls.len(), text_output.device())?, 0)?;
        normalize(&self.text_parts()?.text_projection.forward(&cls)?)
    }

    /// Image-text matching logits `[pairs, 2]` (no match, match): the mean over the logits of each pair's queries, whose rows are
    /// `[pairs * Q, hidden_size]`, from [`Self::encode_pairs`].
    ///
    /// # Errors
    /// When the model was loaded without its text side.
    pub fn match_logits(&self, query_rows: &Tensor) -> Result<Tensor> {
        let logits = self.text_parts()?.itm_head.forward(query_rows)?;
        let n_queries = self.config.num_query_tokens;
        Ok(logits.reshape((logits.dim(0)? / n_queries, n_queries, 2))?.mean(1)?)
    }

    /// The language-modelling head up to its vocabulary projection: `text_rows`, `[N, hidden_size]`, as rows of the same shape that
    /// are to be classified, and the projection to the vocabulary.
    ///
    /// # Errors
    /// When the model was loaded without its text side, or its checkpoint has no such head.
    pub fn language_head(&self, text_rows: &Tensor) -> Result<(Tensor, &Linear)> {
        let Some(head) = &self.text_parts()?.language_head else {
            return Err(Error::Request(
                "this checkpoint has no language-modelling head of the Q-Former".into(),
            ));
        };
        let x = activate(&head.transform.forward(text_rows)?, Activation::GeluErf)?;
        Ok((head.transform_norm.forward(&x)?, &head.decoder))
    }

    /// The learned temperature that divides similarities, a scalar; nothing where the checkpoint has none.
    ///
    /// # Errors
    /// When the model was loaded without its text side.
    pub fn temperature(&self) -> Result<Option<&Tensor>> {
        Ok(self.text_parts()?.temp.as_ref())
    }

    pub(super) fn text_parts(&self) -> Result<&TextParts> {
        self.text.as_ref().ok_or_else(|| {
            Error::Request(
                "this checkpoint was loaded without the Q-Former's text side, which matching needs".into(),
            )
        })
    }
}

/// Scales each row to length 1 (`torch.nn.functional.normalize`, eps 1e-12).
fn normalize(x: &Tensor) -> Result<Tensor> {
    let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?;
    Ok(x.broadcast_div(&norm.maximum(1e-12)?)?)
}
