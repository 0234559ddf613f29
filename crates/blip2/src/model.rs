//! A whole model from its folder: what people use.
//!
//! A [`Blip2`] is immutable after loading. A picture goes through the frozen encoder once ([`Blip2::encode`]); whatever is
//! asked about it afterwards starts from its [`ImageFeatures`].

mod answers;
mod chat;
mod config;
mod explain;
mod given;
mod hugging_face;
pub mod layout;
mod memory;
mod parts;
mod preset;
mod quantize;
mod random;
mod read_text;
mod stage1;
mod stage2;
mod stages;
mod texts;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

pub use answers::{AnswerBatch, Answered, Ask, Piece};
pub use chat::Chat;
pub use config::{FILE_NAME, ModelConfig, Stage1Config, Stage2Config, VisionConfig};
pub use explain::{HeatMap, Word};
pub use given::{Given, check_prompt};
pub use memory::memory_needed;
pub use parts::{EncoderOptions, open_encoder, open_language_model, open_trained, qformer_config};
pub use preset::{GenerationDefaults, Preset};
pub use quantize::{has_stored_blocks, quantize, stored_quantization};
pub use random::{RandomModel, SHAPES};
pub use read_text::ReadText;
pub use stage1::{LABEL, LabelScore, MatchScore, labelled};
pub use stage2::{Answer, Choice};
pub use texts::{Compared, check_texts};

use crate::image::{ImageError, Limits, Pixels, RgbImage};
use crate::layers::{FrozenFormat, Loader, Precision, Quantization, TensorSource};
use crate::qformer::ImageKeys;
use crate::vision::VisionEncoder;
use crate::weights::{MappedFile, sha256};
use crate::{Error, Result};

/// How to open a model.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Folders in which frozen parts are looked for that are not in the model's own.
    pub frozen: Vec<PathBuf>,
    /// Precision of the matrix products.
    pub precision: Precision,
    /// Few bits for the large frozen matrices, of a vision transformer and of a language model; nothing leaves them as they
    /// are stored. A language model in a GGUF file keeps the blocks that are in as few bits already.
    pub quantization: Option<Quantization>,
    /// Few bits for the matrices of the Q-Former and of the projections behind it too, which are otherwise left as they are. It is
    /// small, so this saves little, and tells what rounding costs.
    pub quantize_qformer: bool,
    /// Side in pixels of the pictures that the image encoder is to see, instead of the one the model was trained with: a vision
    /// transformer's position embeddings are interpolated (transformers' `interpolate_pos_encoding`).
    pub image_size: Option<usize>,
    /// Whose model it is to be, where the implementations differ; nothing for what the folder says. LAVIS's norm behind the image
    /// encoder has an epsilon of 1e-5, that of transformers the encoder's own, 1e-6 (of a Hugging Face folder). A text that is
    /// compared with pictures is cleaned by LAVIS as a caption, and left as it is by transformers.
    pub preset: Option<Preset>,
    /// Whether to load the image encoder; without it the caller brings [`ImageFeatures`].
    pub vision: bool,
    /// Whether to load the stage-1 part, where there is one.
    pub stage1: bool,
    /// Whether to load the stage-2 part, where there is one.
    pub stage2: bool,
}

impl OpenOptions {
    fn frozen_format(&self) -> FrozenFormat {
        FrozenFormat { precision: self.precision, quantization: self.quantization }
    }

    /// What a Q-Former and the projections behind it load their tensors with; `stored` is what few bits the large matrices of
    /// their file are in already.
    fn bridge_loader<'a>(
        &self,
        source: &'a dyn TensorSource,
        precision: Precision,
        stored: Option<Quantization>,
    ) -> Loader<'a> {
        let quantization = self.quantization.or(stored).filter(|_| self.quantize_qformer);
        Loader::frozen(source, precision).quantizing_bridge(quantization)
    }
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            frozen: Vec::new(),
            precision: Precision::F32,
            quantization: None,
            quantize_qformer: false,
            image_size: None,
            preset: None,
            vision: true,
            stage1: true,
            stage2: true,
        }
    }
}

/// A BLIP-2 model: frozen encoder, Q-Former, frozen language model.
#[derive(Debug)]
pub struct Blip2 {
    config: ModelConfig,
    vision: Option<VisionEncoder>,
    stage1: Option<stage1::Stage1>,
    stage2: Option<stage2::Stage2>,
}

/// A picture as the frozen encoder sees it: its tokens, `[P, E]`. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageFeatures {
    tokens: Tensor,
}

impl ImageFeatures {
    /// From the encoder's rows, `n_tokens * width` values.
    ///
    /// # Errors
    /// When `rows` is not a whole number of tokens of this width.
    pub fn from_rows(rows: Vec<f32>, width: usize) -> Result<Self> {
        if width == 0 || rows.is_empty() || !rows.len().is_multiple_of(width) {
            return Err(Error::Request(format!("{} values are no tokens of width {width}", rows.len())));
        }
        let shape = (rows.len() / width, width);
        Ok(Self { tokens: Tensor::from_vec(rows, shape, &Device::Cpu)? })
    }

    /// The encoder's tokens, `[P, E]`.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }
}

impl Blip2 {
    /// Opens a model folder: one of this project, or a BLIP-2 model as Hugging Face publishes them (OPT and Flan-T5).
    ///
    /// # Errors
    /// When the configuration or a file is missing or wrong; a frozen part that is nowhere is named with the folders
    /// that were looked in. Of a Hugging Face folder [`Error::Folder`] has all tensors that are missing, misshapen or
    /// unknown, and no weight was read.
    pub fn open(folder: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let folder = folder.as_ref();
        if let Some(json) = hugging_face::read_config(folder)? {
            return hugging_face::open(folder, &json, options);
        }
        let config = ModelConfig::read(folder)?;
        let find = |file: &Path| find_frozen(folder, &options.frozen, file);
        let open_vision = || -> Result<VisionEncoder> {
            match &config.vision {
                VisionConfig::EfficientnetLite0 { file, sha256: expected, image_size } => {
                    let path = find(file)?;
                    check_sha256(&path, expected.as_deref())?;
                    VisionEncoder::efficientnet_lite0(path, options.image_size.or(*image_size))
                }
                VisionConfig::VitFile { file, sha256: expected, image_size, num_attention_heads } => {
                    let (path, num_attention_heads) = (find(file)?, *num_attention_heads);
                    let image_size = options.image_size.or(*image_size);
                    let about = EncoderOptions { image_size, num_attention_heads };
                    let encoder = open_encoder(&path, about, options.frozen_format())?;
                    refuse_other(&path, encoder.fingerprint(), expected.as_deref())?;
                    Ok(encoder)
                }
                VisionConfig::Vit(_) => {
                    Err(Error::Config { field: "vision.kind".into(), reason: "is not known here".into() })
                }
            }
        };
        let vision = options.vision.then(open_vision).transpose()?;
        if let Some(vision) = vision.as_ref().filter(|v| v.width() != config.qformer.encoder_hidden_size) {
            let reason = format!("must be the image encoder's {}", vision.width());
            let wrong = Error::Config { field: "qformer.encoder_hidden_size".into(), reason };
            return Err(wrong.in_folder(folder));
        }
        let stage1 = config.stage1.as_ref().filter(|_| options.stage1);
        let stage1 =
            stage1.map(|stage1| stage1::Stage1::open(folder, &config, stage1, options)).transpose()?;
        let stage2 = config.stage2.as_ref().filter(|_| options.stage2);
        let stage2 = stage2
            .map(|stage2| {
                let language_model = find(&stage2.language_model)?;
                check_sha256(&language_model, stage2.language_model_sha256.as_deref())?;
                stage2::Stage2::open(folder, &config, stage2, &language_model, options)
            })
            .transpose()?;
        Ok(Self { vision, stage1, stage2, config })
    }

    /// What it is made of.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The frozen image encoder, where it is loaded.
    pub fn vision(&self) -> Option<&VisionEncoder> {
        self.vision.as_ref()
    }

    /// The Q-Former of stage 1, where it is loaded.
    pub fn matcher(&self) -> Option<&crate::qformer::QFormer> {
        self.stage1.as_ref().map(|stage1| stage1.qformer())
    }

    /// The frozen language model, where it is loaded.
    pub fn language_model(&self) -> Option<&crate::language::LanguageModel> {
        self.stage2.as_ref().map(|stage2| stage2.language_model())
    }

    /// The language model's tokenizer, where it is loaded.
    pub fn language_tokenizer(&self) -> Option<&crate::text::LanguageTokenizer> {
        self.stage2.as_ref().map(|stage2| stage2.tokenizer())
    }

    /// Parameters of what stage 1 trained, where it is loaded.
    pub fn n_matcher_parameters(&self) -> Option<usize> {
        self.stage1.as_ref().map(|stage1| stage1.n_parameters())
    }

    /// Parameters of what stage 2 trained: queries, query path and projection, where it is loaded.
    pub fn n_bridge_parameters(&self) -> Option<usize> {
        self.stage2.as_ref().map(|stage2| stage2.n_parameters())
    }

    /// Parameters of all parts that are loaded.
    pub fn n_parameters(&self) -> usize {
        let parts = [
            self.vision().map(VisionEncoder::n_parameters),
            self.n_matcher_parameters(),
            self.n_bridge_parameters(),
            self.language_model().map(crate::language::LanguageModel::n_parameters),
        ];
        parts.into_iter().flatten().sum()
    }

    /// Runs the frozen encoder over pictures.
    ///
    /// # Errors
    /// When the model was opened without its encoder; those of the tensor engine.
    pub fn encode(&self, pictures: &[RgbImage]) -> Result<Vec<ImageFeatures>> {
        let vision = self.encoder()?;
        let processor = vision.processor();
        let pixels: Vec<_> = pictures.par_iter().map(|picture| processor.pixels(picture)).collect();
        encode_pixels(vision, &pixels)
    }

    /// Reads picture files, some at once, and runs the frozen encoder over all that can be read in one pass: for each file its
    /// features, or what is wrong with it. They are those that each picture has alone.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_files(
        &self,
        paths: &[impl AsRef<Path> + Sync],
        limits: &Limits,
        pixels: Pixels,
    ) -> Result<Vec<std::result::Result<ImageFeatures, ImageError>>> {
        let vision = self.encoder()?;
        let open = |path: &_| crate::image::open(path, limits, pixels);
        let mut read = Vec::with_capacity(paths.len());
        let of_files = vision.processor().pixels_of_all(paths, open).into_iter();
        let problems: Vec<_> = of_files.map(|pixels| pixels.map(|pixels| read.push(pixels)).err()).collect();
        let mut features = encode_pixels(vision, &read)?.into_iter();
        let result = |problem: Option<_>| problem.map(Err).or_else(|| features.next().map(Ok));
        Ok(problems.into_iter().filter_map(result).collect())
    }

    fn encoder(&self) -> Result<&VisionEncoder> {
        self.vision
            .as_ref()
            .ok_or_else(|| Error::Request("the model was opened without its image encoder".into()))
    }

    fn stage1(&self) -> Result<&stage1::Stage1> {
        self.stage1.as_ref().ok_or_else(|| {
            Error::Request(format!(
                "the model {} has no stage-1 part, which matching, embedding and classifying need",
                self.config.name
            ))
        })
    }

    fn stage2(&self) -> Result<&stage2::Stage2> {
        self.stage2.as_ref().ok_or_else(|| {
            Error::Request(format!(
                "the model {} has no stage-2 part, which captions and answers need",
                self.config.name
            ))
        })
    }
}

/// Whether a folder holds a BLIP-2 model as Hugging Face publishes them, and not one of this project.
///
/// # Errors
/// When its configuration is missing, is not JSON, or is that of another kind of model.
pub fn is_hugging_face(folder: impl AsRef<Path>) -> Result<bool> {
    Ok(hugging_face::read_config(folder.as_ref())?.is_some())
}

/// The features of pictures that are prepared, `[S, S, 3]` values each.
fn encode_pixels(vision: &VisionEncoder, pixels: &[Vec<f32>]) -> Result<Vec<ImageFeatures>> {
    if pixels.is_empty() {
        return Ok(Vec::new());
    }
    let width = vision.width();
    let rows = vision.encode(&pixels.concat())?;
    rows.chunks_exact(vision.n_tokens() * width)
        .map(|rows| ImageFeatures::from_rows(rows.to_vec(), width))
        .collect()
}

/// The keys and values of some pictures in a Q-Former.
fn image_keys(qformer: &crate::qformer::QFormer, features: &[&ImageFeatures]) -> Result<ImageKeys> {
    let tokens: Vec<&Tensor> = features.iter().map(|features| &features.tokens).collect();
    if tokens.is_empty() {
        return Err(Error::Request("there is no picture".into()));
    }
    qformer.image_keys(&Tensor::cat(&tokens, 0)?, tokens.len())
}

fn find_frozen(folder: &Path, frozen: &[PathBuf], file: &Path) -> Result<PathBuf> {
    let folders = std::iter::once(folder).chain(frozen.iter().map(PathBuf::as_path));
    if let Some(found) = folders.clone().map(|folder| folder.join(file)).find(|path| path.exists()) {
        return Ok(found);
    }
    let looked: Vec<_> = folders.map(|folder| folder.display().to_string()).collect();
    Err(Error::File {
        path: file.into(),
        reason: format!(
            "this frozen part of the model is in none of: {}; put it there or set BLIP2_FROZEN to its folder (for \
             the default model's parts: blip2 fetch)",
            looked.join(", ")
        ),
    })
}

/// The frozen parts are what the trained part was trained with, or the model says nonsense.
fn check_sha256(path: &Path, expected: Option<&str>) -> Result<()> {
    if expected.is_none() {
        return Ok(());
    }
    refuse_other(path, &sha256(MappedFile::open(path)?.bytes()), expected)
}

fn refuse_other(path: &Path, found: &str, expected: Option<&str>) -> Result<()> {
    let Some(expected) = expected.filter(|expected| !found.eq_ignore_ascii_case(expected)) else {
        return Ok(());
    };
    Err(Error::File {
        path: path.into(),
        reason: format!(
            "this is not the file that the model was trained with: its SHA-256 is {found}, not {expected}; delete it and \
             fetch the right one (for the default model's parts: blip2 fetch)"
        ),
    })
}
