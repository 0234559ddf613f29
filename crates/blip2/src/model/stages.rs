//! What every stage makes of pictures and texts, by name: for comparisons with other implementations.

use candle_core::Tensor;

use super::{Blip2, image_keys};
use crate::image::RgbImage;
use crate::layers::DropoutRng;
use crate::{Error, Result};

impl Blip2 {
    /// The raw outputs of the stages that pictures pass, in order and in the shapes of transformers:
    ///
    /// - `pixel_values`: `[B, 3, S, S]`, what the encoder sees
    /// - `vision.out`: `[B, P, E]`, its tokens after the last norm (`vision_model`'s `last_hidden_state`)
    /// - `qformer.out`: `[B, Q, D]`, the queries
    /// - `language_projection.out`: `[B, Q, L]`, the queries as the language model reads them
    /// - `logits`: `[B, N, V]` after each of the N rows of image and prompt, or `[B, 1, V]` of an encoder-decoder model: after the
    ///   token that its decoder begins with
    /// - `text.out`: `[N, D]`, the hidden states of all texts' tokens, text by text ([`text_features`](Self::text_features));
    ///   [`n_matcher_tokens`](Self::n_matcher_tokens) says how many rows each has
    /// - `multimodal.out`: `[B * T, Q, D]`, the queries of each picture with each text, picture by picture
    ///   ([`multimodal_features`](Self::multimodal_features))
    ///
    /// `language_projection.out` and `logits` are of models with a stage-2 part only. `prompt` is read as by
    /// [`complete`](Self::complete); without it the model's own for captions. The last two are of the Q-Former of stage 1, and
    /// there where texts are given.
    ///
    /// # Errors
    /// When there is no picture, the model was opened without its encoder, or the prompt is too long; with texts also when the
    /// model has no stage-1 part, or a text is empty or too long.
    pub fn stages(
        &self,
        pictures: &[RgbImage],
        prompt: Option<&str>,
        texts: &[&str],
    ) -> Result<Vec<(&'static str, Tensor)>> {
        let Some(vision) = &self.vision else {
            return Err(Error::Request("the model was opened without its image encoder".into()));
        };
        if pictures.is_empty() {
            return Err(Error::Request("there is no picture".into()));
        }
        // First of all, since a text may be refused.
        let text_rows = if texts.is_empty() { Vec::new() } else { self.text_features(texts)? };
        let n = pictures.len();
        let by_picture = |rows: &Tensor| -> Result<Tensor> {
            let (n_rows, width) = rows.dims2()?;
            Ok(rows.reshape((n, n_rows / n, width))?)
        };
        let qformer = match &self.stage2 {
            Some(stage2) => stage2.qformer(),
            None => self.stage1()?.qformer(),
        };
        let pixels = vision.processor().batch(pictures)?;
        let features = self.encode(pictures)?;
        let features: Vec<_> = features.iter().collect();
        let tokens: Vec<_> = features.iter().map(|features| features.tokens()).collect();
        let tokens = qformer.normalize_image(&Tensor::cat(&tokens, 0)?)?;
        let keys = image_keys(qformer, &features)?;
        let (queries, _) = qformer.encode_queries(&keys, &mut DropoutRng::off())?;
        let mut stages = vec![
            ("pixel_values", pixels.permute((0, 3, 1, 2))?.contiguous()?),
            ("vision.out", by_picture(&tokens)?),
            ("qformer.out", by_picture(&queries)?),
        ];
        if let Some(stage2) = &self.stage2 {
            let soft_tokens = stage2.soft_tokens(&features)?;
            let prompt = match prompt {
                Some(text) => stage2.raw(text)?,
                None => stage2.instruction(self.instruction())?,
            };
            let logits: Vec<_> = soft_tokens
                .iter()
                .map(|soft_tokens| stage2.prompt_logits(&prompt, soft_tokens))
                .collect::<Result<_>>()?;
            stages.push(("language_projection.out", Tensor::stack(&soft_tokens, 0)?));
            stages.push(("logits", Tensor::stack(&logits, 0)?));
        }
        if !texts.is_empty() {
            let pairs = features.iter().map(|features| self.multimodal_features(features, texts));
            stages.push(("text.out", Tensor::cat(&text_rows, 0)?));
            stages.push(("multimodal.out", Tensor::cat(&pairs.collect::<Result<Vec<_>>>()?, 0)?));
        }
        Ok(stages)
    }
}
