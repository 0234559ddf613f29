//! Models of a given size with random weights: what a published one costs in time and memory, without its file.

use serde_json::{Value as Json, json};

use super::config::{ModelConfig, Stage1Config, Stage2Config, VisionConfig};
use super::hugging_face::BRIDGE_PRECISION;
use super::stage1::Stage1;
use super::stage2::{Source, Stage2};
use super::texts::{TextReader, Texts};
use super::{Blip2, OpenOptions};
use crate::generate::GenerationConfig;
use crate::image::ImageProcessor;
use crate::language::LanguageModel;
use crate::layers::{Loader, Precision, Quantization};
use crate::qformer::{QFormer, QFormerConfig, TextSide};
use crate::text::{BertTokenizer, LanguageTokenizer, PromptFormat};
use crate::vision::VisionEncoder;
use crate::vision::vit::{AlignCorners, Vit, VitConfig};
use crate::weights::RandomWeights;
use crate::{Error, Result};

/// The sizes that are known by name: the published ones, the default model's, and tiny ones of each kind.
pub const SHAPES: [&str; 9] = [
    "blip2-opt-2.7b",
    "blip2-opt-6.7b",
    "blip2-flan-t5-xl",
    "blip2-flan-t5-xxl",
    "blip2-itm-vit-g",
    "default",
    "tiny",
    "tiny-flan-t5",
    "tiny-itm",
];

/// A model's sizes, from which one with random weights is made. Its words are numbers: token `i` is the word `i`.
#[derive(Debug, Clone, PartialEq)]
pub struct RandomModel {
    name: &'static str,
    /// Without one, EfficientNet-Lite0.
    pub(super) vit: Option<VitConfig>,
    pub(super) qformer: QFormerConfig,
    /// The parts of stage 1.
    matches: bool,
    /// The language model's `config.json`, where there is one.
    pub(super) language: Option<Json>,
}

impl RandomModel {
    /// The model of one of the [`SHAPES`].
    ///
    /// # Errors
    /// [`Error::Request`] with the known ones.
    pub fn named(name: &str) -> Result<Self> {
        let vit_g = VitConfig::eva_clip_g(224);
        let published = |language| (Some(vit_g.clone()), qformer(768, 12, 12, 1408), false, Some(language));
        let tiny_vit = VitConfig {
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            image_size: 28,
            ..vit_g.clone()
        };
        let tiny = |language: Option<Json>| {
            let config = QFormerConfig { vocab_size: 200, num_query_tokens: 4, ..qformer(32, 2, 4, 32) };
            (Some(tiny_vit.clone()), config, language.is_none(), language)
        };
        let (vit, qformer, matches, language) = match name {
            "blip2-opt-2.7b" => published(opt(50304, 2560, 32, 32)),
            "blip2-opt-6.7b" => published(opt(50304, 4096, 32, 32)),
            "blip2-flan-t5-xl" => published(flan_t5(32128, 2048, 5120, 24, 32)),
            "blip2-flan-t5-xxl" => published(flan_t5(32128, 4096, 10240, 24, 64)),
            "blip2-itm-vit-g" => (Some(vit_g.clone()), qformer(768, 12, 12, 1408), true, None),
            "default" => (None, qformer(384, 6, 12, 1280), true, Some(smollm2_135m())),
            "tiny" => tiny(Some(opt(100, 32, 2, 4))),
            "tiny-flan-t5" => tiny(Some(flan_t5(100, 32, 48, 2, 4))),
            "tiny-itm" => tiny(None),
            _ => {
                let known = SHAPES.join(", ");
                return Err(Error::Request(format!("there is no shape `{name}`; known ones are {known}")));
            }
        };
        let name = SHAPES.into_iter().find(|known| *known == name).unwrap_or("random");
        Ok(Self { name, vit, qformer, matches, language })
    }

    /// Bytes of memory that the model takes, roughly, with the parts and in the formats that `options` ask for.
    pub fn memory_needed(&self, options: &OpenOptions) -> u64 {
        let plain = if options.precision == Precision::F32 { 32 } else { 16 };
        let (vision, language) = match options.quantization {
            // With their scales.
            Some(Quantization::Int8) => (9, 9),
            Some(Quantization::Int4) => (9, 5),
            // A language model in half precision stays so.
            None => (plain, 16),
        };
        let vit = self.vit.as_ref().map_or(5_000_000, VitConfig::n_parameters) as u64;
        let language_model =
            self.language.as_ref().filter(|_| options.stage2).map_or(0, n_language_parameters);
        // Queries and texts have a feed-forward layer each.
        let QFormerConfig { hidden_size: d, intermediate_size: ffn, num_hidden_layers: n, .. } = self.qformer;
        let qformer = (n * (8 * d * d + 4 * d * ffn) + self.qformer.vocab_size * d) as u64;
        let bridge = if self.vit.is_some() { 32 } else { plain };
        let bits = vit * vision + language_model * language + qformer * bridge;
        (64 << 20) + bits / 8 + bits / 64
    }

    /// Draws the weights, each straight into the format that `options` ask for; parts that they leave out are not drawn.
    ///
    /// # Errors
    /// When the options contradict the model.
    pub fn draw(&self, seed: u64, options: &OpenOptions) -> Result<Blip2> {
        let weights = RandomWeights::new(seed);
        let loader = Loader::frozen(&weights, options.precision);
        let vision = options.vision.then(|| self.vision(weights, &loader, options)).transpose()?;
        // As the folders of published models are opened.
        let bridge = if self.vit.is_some() { BRIDGE_PRECISION } else { options.precision };
        let bridge = options.bridge_loader(&weights, bridge, None);
        let stage1 = (self.matches && options.stage1).then(|| self.stage1(&bridge)).transpose()?;
        let language = self.language.as_ref().filter(|_| options.stage2);
        let stage2 = language.map(|language| self.stage2(language, weights, &bridge, options)).transpose()?;
        let config = ModelConfig {
            name: format!("{}, random weights", self.name),
            vision: match &self.vit {
                Some(vit) => VisionConfig::Vit(vit.clone()),
                None => VisionConfig::EfficientnetLite0 {
                    file: "random".into(),
                    sha256: None,
                    image_size: options.image_size,
                },
            },
            qformer: self.qformer.clone(),
            stage1: self.matches.then(|| Stage1Config { weights: Vec::new(), vocabulary: "numbers".into() }),
            stage2: self.language.as_ref().map(|_| stage2_config()),
        };
        Ok(Blip2 { config, vision, stage1, stage2 })
    }

    fn vision(
        &self,
        weights: RandomWeights,
        loader: &Loader<'_>,
        options: &OpenOptions,
    ) -> Result<VisionEncoder> {
        let Some(config) = &self.vit else {
            return VisionEncoder::random_efficientnet_lite0(weights, options.image_size);
        };
        let config =
            VitConfig { image_size: options.image_size.unwrap_or(config.image_size), ..config.clone() };
        let processor = ImageProcessor::blip2(config.image_size);
        let loader = loader.at("vision_model").quantizing(options.quantization);
        let vit = Vit::load(config, &loader, AlignCorners::No)?;
        VisionEncoder::vit(vit, processor, "random weights".into())
    }

    fn stage1(&self, loader: &Loader<'_>) -> Result<Stage1> {
        let qformer = QFormer::load(&self.qformer, loader, TextSide::Matching)?;
        // One piece less than embeddings, which have a row for [DEC].
        let tokenizer = BertTokenizer::numbered(self.qformer.vocab_size - 1)?;
        let n_parameters = self.qformer.n_query_parameters();
        let reader = TextReader::new(tokenizer, Texts::AsGiven, self.qformer.max_position_embeddings);
        Ok(Stage1::new(qformer, reader, n_parameters))
    }

    fn stage2(
        &self,
        language: &Json,
        weights: RandomWeights,
        loader: &Loader<'_>,
        options: &OpenOptions,
    ) -> Result<Stage2> {
        let qformer = QFormer::load(&self.qformer, loader, TextSide::None)?;
        let model = LanguageModel::random(language, weights, options.frozen_format())?;
        let projection =
            loader.linear("language_projection", self.qformer.hidden_size, model.hidden_size())?;
        let tokenizer = LanguageTokenizer::numbered(model.vocab_size())?;
        Stage2::new(qformer, projection, model, tokenizer, &stage2_config(), Source::default())
    }
}

fn stage2_config() -> Stage2Config {
    Stage2Config {
        weights: Vec::new(),
        language_model: "random".into(),
        language_model_sha256: None,
        prompt: PromptFormat::Plain {
            template: "{image}{prompt}".into(),
            bos: false,
            eos: false,
            end_of_answer: "2".into(),
            between_turns: " ".into(),
        },
        caption_prompt: None,
        chat_prompt: None,
        instruction: "10 11 12 13 14 15 16 17".into(),
        generation: GenerationConfig { num_beams: 5, max_new_tokens: 30, ..GenerationConfig::default() },
        answering: None,
    }
}

fn qformer(width: usize, n_layers: usize, n_heads: usize, encoder_width: usize) -> QFormerConfig {
    QFormerConfig {
        vocab_size: 30523,
        hidden_size: width,
        num_hidden_layers: n_layers,
        num_attention_heads: n_heads,
        intermediate_size: 4 * width,
        max_position_embeddings: 512,
        layer_norm_eps: 1e-12,
        cross_attention_frequency: 2,
        encoder_hidden_size: encoder_width,
        num_query_tokens: 32,
        image_text_hidden_size: 256,
        vision_layer_norm_eps: 1e-6,
    }
}

fn opt(n_tokens: usize, width: usize, n_layers: usize, n_heads: usize) -> Json {
    json!({
        "model_type": "opt", "vocab_size": n_tokens, "hidden_size": width, "ffn_dim": 4 * width,
        "num_hidden_layers": n_layers, "num_attention_heads": n_heads, "max_position_embeddings": 2048,
    })
}

fn flan_t5(n_tokens: usize, width: usize, inner: usize, n_layers: usize, n_heads: usize) -> Json {
    json!({
        "model_type": "t5", "vocab_size": n_tokens, "d_model": width, "d_kv": 64, "d_ff": inner,
        "num_layers": n_layers, "num_decoder_layers": n_layers, "num_heads": n_heads,
        "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": false,
        "decoder_start_token_id": 0,
    })
}

fn smollm2_135m() -> Json {
    json!({
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": true,
    })
}

/// Numbers of the matrices of a language model; the rest does not count beside them.
fn n_language_parameters(config: &Json) -> u64 {
    let size = |field: &str| config[field].as_u64().unwrap_or(0);
    match config["model_type"].as_str() {
        Some("opt") => {
            let (d, ffn) = (size("hidden_size"), size("ffn_dim"));
            size("num_hidden_layers") * (4 * d * d + 2 * d * ffn) + size("vocab_size") * d
        }
        Some("t5") => {
            let (d, inner, ffn) = (size("d_model"), size("num_heads") * size("d_kv"), size("d_ff"));
            size("num_layers") * (12 * d * inner + 6 * d * ffn) + 2 * size("vocab_size") * d
        }
        _ => {
            let (d, ffn) = (size("hidden_size"), size("intermediate_size"));
            size("num_hidden_layers") * (4 * d * d + 3 * d * ffn) + size("vocab_size") * d
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Limits, Pixels, RgbImage};
    use crate::model::ImageFeatures;

    fn picture() -> RgbImage {
        RgbImage::from_fn(40, 30, |x, y| ::image::Rgb([x as u8 * 6, y as u8 * 8, 99]))
    }

    #[test]
    fn a_tiny_model_of_every_kind_works_in_every_format_and_is_its_seed() {
        let dtypes = [(Precision::F32, None), (Precision::Bf16, None)]
            .into_iter()
            .chain([Quantization::Int8, Quantization::Int4].map(|few| (Precision::F32, Some(few))));
        for (precision, quantization) in dtypes {
            let options = OpenOptions { precision, quantization, ..OpenOptions::default() };
            for name in ["tiny", "tiny-flan-t5"] {
                let shape = RandomModel::named(name).unwrap();
                let generation = GenerationConfig { max_new_tokens: 5, num_beams: 2, ..Default::default() };
                let caption = |seed| {
                    let model = shape.draw(seed, &options).unwrap();
                    let features = model.encode(&[picture()]).unwrap();
                    model.caption(&[&features[0]], &generation).unwrap().concat().remove(0)
                };
                let first = caption(1);
                assert!(!first.token_ids.is_empty() && first == caption(1), "{name}");
                assert_ne!(first.log_probs, caption(2).log_probs, "{name}");
            }
            let model = RandomModel::named("tiny-itm").unwrap().draw(1, &options).unwrap();
            let features = model.encode(&[picture()]).unwrap();
            let scores = model.match_texts(&features[0], &["10 11", "12"]).unwrap();
            assert!(scores[0].itm_probability != scores[1].itm_probability);
        }
    }

    #[test]
    fn the_qformer_is_in_few_bits_where_that_is_asked_for() {
        let embed = |quantization, quantize_qformer| {
            let options = OpenOptions { quantization, quantize_qformer, ..OpenOptions::default() };
            let model = RandomModel::named("tiny-itm").unwrap().draw(1, &options).unwrap();
            let features = model.encode(&[picture()]).unwrap();
            model.embed_images(&[&features[0]]).unwrap().concat()
        };
        let few = Some(Quantization::Int8);
        assert_ne!(embed(few, true), embed(few, false));
        assert_eq!(embed(None, true), embed(None, false));
    }

    /// A batch of files equals its pictures one by one, with few bits too, and one that cannot be read costs only itself.
    #[test]
    fn files_are_encoded_together_as_they_are_alone() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..3).map(|i| dir.path().join(format!("{i}.png"))).collect();
        let pictures: Vec<_> = (0..3)
            .map(|i| RgbImage::from_fn(30 + i, 20, |x, y| ::image::Rgb([x as u8, y as u8, 50 * i as u8])))
            .collect();
        for i in [0, 2] {
            std::fs::write(&paths[i], crate::image::png(&pictures[i])).unwrap();
        }
        std::fs::write(&paths[1], "no picture").unwrap();
        for quantization in [None, Some(Quantization::Int8)] {
            let options = OpenOptions { stage2: false, quantization, ..OpenOptions::default() };
            let model = RandomModel::named("tiny").unwrap().draw(1, &options).unwrap();
            let found = model.encode_files(&paths, &Limits::default(), Pixels::AsSeen).unwrap();
            for i in [0, 2] {
                let alone = model.encode(&[pictures[i].clone()]).unwrap().remove(0);
                let values = |features: &ImageFeatures| features.tokens().to_vec2::<f32>().unwrap();
                assert_eq!(values(found[i].as_ref().unwrap()), values(&alone));
            }
            let problem = found[1].as_ref().unwrap_err().to_string();
            assert!(problem.contains("1.png") && problem.contains("not a picture"), "{problem}");
            assert!(
                model.encode_files(&[] as &[&str], &Limits::default(), Pixels::AsSeen).unwrap().is_empty()
            );
        }
    }

    #[test]
    fn parts_that_are_left_out_are_not_there() {
        let options = OpenOptions { stage2: false, ..OpenOptions::default() };
        let model = RandomModel::named("tiny").unwrap().draw(1, &options).unwrap();
        assert!(model.vision().is_some() && model.language_model().is_none());
    }

    #[test]
    fn an_unknown_shape_is_told_the_known_ones() {
        let error = RandomModel::named("blip3").unwrap_err().to_string();
        assert!(error.contains("`blip3`") && SHAPES.iter().all(|name| error.contains(name)), "{error}");
        assert!(SHAPES.iter().all(|name| RandomModel::named(name).is_ok()));
    }

    /// What issue-tracker arithmetic says of OPT-2.7B: 3.75 billion numbers with encoder and Q-Former.
    #[test]
    fn memory_follows_from_the_sizes() {
        let shape = RandomModel::named("blip2-opt-2.7b").unwrap();
        let gigabytes = |precision, quantization| {
            let options = OpenOptions { precision, quantization, ..OpenOptions::default() };
            (shape.memory_needed(&options) as f64 / 1e8).round() / 10.0
        };
        assert_eq!(gigabytes(Precision::Bf16, None), 9.1);
        assert_eq!(gigabytes(Precision::F32, Some(Quantization::Int8)), 5.5);
        assert_eq!(gigabytes(Precision::F32, Some(Quantization::Int4)), 4.0);
        let parameters = n_language_parameters(&opt(50272, 2560, 32, 32));
        assert!((2_640_000_000..2_660_000_000).contains(&parameters), "{parameters}");
    }
}
