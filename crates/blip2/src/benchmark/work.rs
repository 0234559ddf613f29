//! What a stage has to do: operations of its matrix products and attention, and bytes of weights that it reads.

use super::{Settings, Stage};
use crate::layers::MatrixSize;
use crate::model::{Blip2, VisionConfig};
use crate::qformer::QFormerConfig;

/// Nothing where it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Work {
    pub(super) operations: Option<f64>,
    pub(super) bytes: Option<f64>,
}

impl Work {
    /// One run of a stage; of [`Stage::Decode`], one token of one text a picture.
    pub(super) fn of(model: &Blip2, stage: Stage, settings: &Settings) -> Self {
        let n = settings.batch as f64;
        let of_vision = || {
            let (vision, VisionConfig::Vit(config)) = (model.vision()?, &model.config().vision) else {
                return None;
            };
            let (matrices, tokens) = (vision.matrices()?, vision.n_tokens() as f64);
            let attention = 4.0 * tokens * tokens * (config.hidden_size * config.num_hidden_layers) as f64;
            let operations = n * (2.0 * tokens * matrices.n_weights as f64 + attention);
            Some(Self { operations: Some(operations), bytes: Some(matrices.n_bytes as f64) })
        };
        let of_language = |rows_of_prompt: f64, rows_of_answer: f64| {
            let language_model = model.language_model()?;
            let head = language_model.head().matrix();
            let prompt = language_model.prompt_matrices();
            // Those of a decoder-only model are the same.
            let answer = if language_model.reads_prompts_whole() || rows_of_prompt == 0.0 {
                language_model.answer_matrices()
            } else {
                MatrixSize::default()
            };
            let prompt = if rows_of_prompt == 0.0 { MatrixSize::default() } else { prompt };
            let weights = rows_of_prompt * prompt.n_weights as f64
                + rows_of_answer * (answer.n_weights + head.n_weights) as f64;
            let bytes = (prompt.n_bytes + answer.n_bytes + head.n_bytes) as f64;
            Some(Self { operations: Some(n * 2.0 * weights), bytes: Some(bytes) })
        };
        let work = match stage {
            Stage::Vision => of_vision(),
            Stage::Qformer => {
                let n_image_tokens = model.vision().map_or(0, |vision| vision.n_tokens());
                let width = model.language_model().map_or(0, |language_model| language_model.hidden_size());
                let operations = n * qformer_operations(&model.config().qformer, n_image_tokens, width);
                Some(Self { operations: Some(operations), bytes: None })
            }
            Stage::Prefill => {
                of_language((model.config().qformer.num_query_tokens + settings.prompt_tokens) as f64, 1.0)
            }
            Stage::Decode => of_language(0.0, 1.0),
            Stage::Preprocess | Stage::Match | Stage::Caption => None,
        };
        work.unwrap_or_default()
    }

    /// The same for so many texts, which share the reading.
    pub(super) fn times(self, n: usize) -> Self {
        Self { operations: self.operations.map(|operations| operations * n as f64), ..self }
    }
}

/// Of the queries of a picture, and their projection to a width.
fn qformer_operations(config: &QFormerConfig, n_image_tokens: usize, projected_to: usize) -> f64 {
    let QFormerConfig { hidden_size: d, intermediate_size: ffn, num_query_tokens: q, .. } = *config;
    let n_cross = config.num_hidden_layers.div_ceil(config.cross_attention_frequency);
    let layer = q * (4 * d * d + 2 * d * ffn) + 2 * q * q * d;
    let cross =
        q * 2 * d * d + n_image_tokens * 2 * config.encoder_hidden_size * d + 2 * q * n_image_tokens * d;
    2.0 * (config.num_hidden_layers * layer + n_cross * cross + q * d * projected_to) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{OpenOptions, RandomModel};

    fn settings(batch: usize) -> Settings {
        let (stages, pictures) = (Vec::new(), Vec::new());
        Settings { stages, pictures, batch, prompt_tokens: 8, tokens: 5, beams: 1, texts: 1, repeat: 1 }
    }

    #[test]
    fn work_is_counted_by_hand() {
        let model = RandomModel::named("tiny").unwrap().draw(1, &OpenOptions::default()).unwrap();
        let of = |stage, batch| Work::of(&model, stage, &settings(batch));
        // Two layers of four square matrices and two of four times the width, and a head of 100 tokens.
        let layers = 2 * (4 * 32 * 32 + 2 * 32 * 128);
        assert_eq!(of(Stage::Decode, 3).operations, Some((3 * 2 * (layers + 3200)) as f64));
        assert_eq!(of(Stage::Prefill, 1).operations, Some((2 * (12 * layers + 3200)) as f64));
        assert_eq!(of(Stage::Decode, 1).bytes, of(Stage::Decode, 3).bytes);
        assert_eq!(of(Stage::Decode, 1).times(5).operations, of(Stage::Decode, 5).operations);
        // Five tokens a picture: four patches and the class token.
        let matrices = 2 * (4 * 32 * 32 + 2 * 32 * 48) + 32 * 3 * 14 * 14;
        assert_eq!(of(Stage::Vision, 1).operations, Some((2 * 5 * matrices + 4 * 25 * 32 * 2) as f64));
        assert_eq!(of(Stage::Caption, 1), Work::default());
    }
}
