//! The parts of a model by themselves, in whatever form people have them: what training starts from.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::hugging_face::{self, Renamed};
use super::layout::{LavisEncoder, Layout};
use crate::image::ImageProcessor;
use crate::language::{LanguageModel, LlamaConfig, context_len};
use crate::layers::{FrozenFormat, Loader, TensorSource};
use crate::qformer::QFormerConfig;
use crate::text::LanguageTokenizer;
use crate::vision::VisionEncoder;
use crate::vision::vit::{AlignCorners, Vit};
use crate::weights::gguf::Gguf;
use crate::weights::int8::TrainedWeights;
use crate::weights::safetensors::Safetensors;
use crate::weights::{Checkpoint, StoredTensor};
use crate::{Error, Result};

/// What is to be known of an image encoder that its file does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncoderOptions {
    /// Side in pixels of the pictures that the encoder is to see, instead of the one it was trained with.
    pub image_size: Option<usize>,
    /// Attention heads of a LAVIS encoder of no published width: they leave no trace in the weights.
    pub num_attention_heads: Option<usize>,
}

/// Opens a frozen image encoder: EfficientNet-Lite0's PyTorch file, a vision transformer's as LAVIS loads it (`eva_vit_g.pth`,
/// `clip_vit_L.pth`), or a Hugging Face folder of a whole BLIP-2 model, of which the encoder is taken. A vision transformer's
/// matrices are packed for the kernels in `format`; EfficientNet-Lite0 is computed in f32.
///
/// Its [fingerprint](VisionEncoder::fingerprint) is that of the encoder's own tensors, whatever file they are in and whatever
/// `format` is.
///
/// # Errors
/// When it is none of these, a tensor is missing or misshapen, or the options are for another kind of encoder.
pub fn open_encoder(
    path: impl AsRef<Path>,
    options: EncoderOptions,
    format: impl Into<FrozenFormat>,
) -> Result<VisionEncoder> {
    let (path, format) = (path.as_ref(), format.into());
    if path.is_dir() {
        let (json, file) = open_folder(path)?;
        return hugging_face::open_encoder(path, &json, &file, options.image_size, format)
            .map_err(|error| error.in_folder(path));
    }
    let checkpoint = Checkpoint::open(path)?;
    if Layout::of(&checkpoint) != Some(Layout::ImageEncoder) {
        if options.num_attention_heads.is_some() {
            let reason = "is no vision transformer and has no attention heads";
            return Err(Error::File { path: path.into(), reason: reason.into() });
        }
        return VisionEncoder::efficientnet_lite0(path, options.image_size);
    }
    let stored = LavisEncoder::of(&checkpoint, options.num_attention_heads)?;
    let fingerprint = fingerprint(stored.tensors())?;
    let mut config = stored.config().clone();
    config.image_size = options.image_size.unwrap_or(config.image_size);
    let align = AlignCorners::of(&config);
    let processor = ImageProcessor::blip2(config.image_size);
    let loader = Loader::frozen(&stored, format.precision).quantizing(format.quantization);
    VisionEncoder::vit(Vit::load(config, &loader.at("vision_model"), align)?, processor, fingerprint)
}

/// Opens a language model with its tokenizer: what [`LanguageModel::open`] opens, or a Hugging Face folder of a whole BLIP-2
/// model, of which the language model is taken.
///
/// # Errors
/// As [`LanguageModel::open`].
pub fn open_language_model(
    path: impl AsRef<Path>,
    format: impl Into<FrozenFormat>,
) -> Result<(LanguageModel, LanguageTokenizer)> {
    let path = path.as_ref();
    if !is_blip2_folder(path)? {
        return LanguageModel::open(path, format);
    }
    let (json, file) = open_folder(path)?;
    hugging_face::open_language_model(path, &json, &file, format.into())
        .map_err(|error| error.in_folder(path))
}

/// How many rows a language model reads, in any form that [`open_language_model`] knows: known without its weights.
pub(super) fn language_context_len(path: &Path) -> Result<usize> {
    if !path.is_dir() {
        return Ok(LlamaConfig::from_gguf(&Gguf::open(path)?)?.max_position_embeddings);
    }
    let json = hugging_face::read_json(path)?;
    let is_inside = json["model_type"] == "blip-2";
    let text = if is_inside { hugging_face::text_config(&json) } else { json };
    context_len(&text).map_err(|error| error.in_folder(path))
}

/// Its tokenizer, likewise.
pub(super) fn language_tokenizer(path: &Path) -> Result<LanguageTokenizer> {
    if !path.is_dir() {
        return LanguageTokenizer::from_gguf(&Gguf::open(path)?);
    }
    if !is_blip2_folder(path)? {
        return LanguageTokenizer::from_folder(path);
    }
    let text = hugging_face::text_config(&hugging_face::read_json(path)?);
    hugging_face::tokenizer(path, &text, hugging_face::Family::of(&text)?)
}

/// The sizes of the Q-Former in a Hugging Face folder; nothing where `path` is no such folder.
///
/// # Errors
/// When its configuration cannot be read.
pub fn qformer_config(path: impl AsRef<Path>) -> Result<Option<QFormerConfig>> {
    let path = path.as_ref();
    if !is_blip2_folder(path)? {
        return Ok(None);
    }
    let json = hugging_face::read_config(path)?.unwrap_or_default();
    let in_folder = |error: Error| error.in_folder(path);
    let mut config = hugging_face::qformer_config(&json).map_err(in_folder)?;
    config.encoder_hidden_size =
        hugging_face::vit_config(&json["vision_config"]).map_err(in_folder)?.hidden_size;
    Ok(Some(config))
}

/// Opens trained weights under the names that training has for them: safetensors files of a checkpoint, or the Hugging Face folder
/// of a BLIP-2 model, whose Q-Former, projection and heads are taken.
///
/// # Errors
/// When a file cannot be read, or a folder is given beside other files.
pub fn open_trained(paths: &[impl AsRef<Path>]) -> Result<Box<dyn TensorSource>> {
    let folder = paths.iter().map(AsRef::as_ref).find(|path| path.is_dir());
    match folder {
        None => Ok(Box::new(TrainedWeights::open(paths)?)),
        Some(folder) if paths.len() == 1 => Ok(Box::new(Renamed(open_folder(folder)?.1))),
        Some(folder) => {
            Err(Error::File { path: folder.into(), reason: "is a model's folder: give it alone".into() })
        }
    }
}

/// Whether a path is the Hugging Face folder of a BLIP-2 model; other folders belong to language models, say.
pub(super) fn is_blip2_folder(path: &Path) -> Result<bool> {
    if !path.is_dir() {
        return Ok(false);
    }
    Ok(hugging_face::read_json(path)?["model_type"] == "blip-2")
}

fn open_folder(path: &Path) -> Result<(serde_json::Value, Safetensors)> {
    let Some(json) = hugging_face::read_config(path)? else {
        let reason = "is no folder of a BLIP-2 model as Hugging Face publishes them";
        return Err(Error::File { path: path.into(), reason: reason.into() });
    };
    Ok((json, Safetensors::open(path)?))
}

/// What tells tensors from others: SHA-256 of their names, shapes, types and elements.
pub(super) fn fingerprint<'a>(
    tensors: impl Iterator<Item = Result<(&'a str, StoredTensor<'a>)>>,
) -> Result<String> {
    let mut hasher = Sha256::new();
    for tensor in tensors {
        let (name, tensor) = tensor?;
        hasher.update(format!("{name} {:?} {:?}\n", tensor.shape, tensor.encoding));
        hasher.update(&tensor.bytes);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
