//! A model folder's `config.json`.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::generate::GenerationConfig;
use crate::qformer::QFormerConfig;
use crate::text::PromptFormat;
use crate::vision::vit::VitConfig;
use crate::{Error, Result};

/// The name of the configuration in a model folder.
pub const FILE_NAME: &str = "config.json";

/// What a model is made of. Files are named without their folder: a model names nothing outside its own and the folders of
/// frozen parts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// What people call it.
    pub name: String,
    /// The frozen image encoder.
    pub vision: VisionConfig,
    /// The Q-Former's sizes, in both stages.
    pub qformer: QFormerConfig,
    /// Matching, embedding, classifying: the Q-Former as stage 1 left it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage1: Option<Stage1Config>,
    /// Captions and answers: the Q-Former as stage 2 left it, and the language model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage2: Option<Stage2Config>,
}

/// The frozen image encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum VisionConfig {
    /// EfficientNet-Lite0 from its PyTorch file.
    EfficientnetLite0 {
        /// The file's name, in the model's folder or in one of the folders of frozen parts.
        file: PathBuf,
        /// SHA-256 of the file that the model was trained with, in hexadecimal; another file is refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
        /// Side of the pictures, in pixels, where it is not that which the encoder was made for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image_size: Option<usize>,
    },
    /// A vision transformer from the file that LAVIS loads, or from the Hugging Face folder of a BLIP-2 model.
    VitFile {
        /// The file's or folder's name, in the model's folder or in one of the folders of frozen parts.
        file: PathBuf,
        /// SHA-256 of the encoder's tensors that the model was trained with ([`fingerprint`](crate::vision::VisionEncoder::fingerprint)),
        /// in hexadecimal; others are refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
        /// Side of the pictures, in pixels, where it is not that which the encoder was made for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image_size: Option<usize>,
        /// Attention heads of a LAVIS encoder of no published width.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        num_attention_heads: Option<usize>,
    },
    /// A vision transformer, whose weights are in the checkpoint.
    Vit(VitConfig),
}

/// The stage-1 part of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage1Config {
    /// The trained weights, safetensors files.
    pub weights: Vec<PathBuf>,
    /// BERT's vocabulary.
    pub vocabulary: PathBuf,
}

/// The stage-2 part of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage2Config {
    /// The trained weights, safetensors files.
    pub weights: Vec<PathBuf>,
    /// The frozen language model's GGUF file or folder, in the model's folder or in one of the folders of frozen parts.
    pub language_model: PathBuf,
    /// SHA-256 of the GGUF file that the model was trained with, in hexadecimal; another file is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language_model_sha256: Option<String>,
    /// How it is spoken to.
    pub prompt: PromptFormat,
    /// How it is asked for a caption, where that is not how it is asked a question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption_prompt: Option<PromptFormat>,
    /// How it is spoken to in a conversation, where that is not how it is asked a single question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_prompt: Option<PromptFormat>,
    /// What is asked for a caption; may be empty where the model describes a picture unasked.
    pub instruction: String,
    /// How captions are generated unless the caller says otherwise.
    #[serde(default)]
    pub generation: GenerationConfig,
    /// How answers are generated, where that is not how captions are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answering: Option<GenerationConfig>,
}

impl Stage2Config {
    /// How answers to questions are generated unless the caller says otherwise.
    pub fn answering(&self) -> &GenerationConfig {
        self.answering.as_ref().unwrap_or(&self.generation)
    }
}

impl ModelConfig {
    /// Reads the configuration of a model folder.
    ///
    /// # Errors
    /// When there is none, a field is unknown, missing or wrong.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let bytes =
            crate::small_file::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let config: Self = serde_json::from_slice(&bytes)
            .map_err(|error| Error::File { path: path.clone(), reason: error.to_string() })?;
        config.validate().map_err(|error| error.in_folder(folder))?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        self.qformer.validate()?;
        let wrong = |field: &str, reason: &str| {
            Err(Error::Config { field: field.to_owned(), reason: reason.to_owned() })
        };
        if self.stage1.is_none() && self.stage2.is_none() {
            return wrong("stage1", "and `stage2` are both missing: a model has at least one");
        }
        let mut files = Vec::new();
        match &self.vision {
            VisionConfig::EfficientnetLite0 { file, .. } | VisionConfig::VitFile { file, .. } => {
                files.push(("vision.file", file))
            }
            VisionConfig::Vit(_) => {
                return wrong("vision.kind", "is `vit`: such a model is opened from its Hugging Face folder");
            }
        }
        if let Some(stage1) = &self.stage1 {
            files.extend(stage1.weights.iter().map(|file| ("stage1.weights", file)));
            files.push(("stage1.vocabulary", &stage1.vocabulary));
        }
        if let Some(stage2) = &self.stage2 {
            files.extend(stage2.weights.iter().map(|file| ("stage2.weights", file)));
            files.push(("stage2.language_model", &stage2.language_model));
        }
        if let Some((field, file)) = files.into_iter().find(|(_, file)| !is_plain_name(file)) {
            return wrong(field, &format!("is `{}`: it must be a name without a folder", file.display()));
        }
        if let Some(stage2) = &self.stage2 {
            if stage2.instruction.trim().is_empty() && stage2.prompt == PromptFormat::ChatMl {
                return wrong("stage2.instruction", "is empty: it is what asks for a caption");
            }
            stage2.generation.validate()?;
            stage2.answering().validate()?;
        }
        Ok(())
    }
}

fn is_plain_name(file: &Path) -> bool {
    let mut components = file.components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_names_nothing_outside_its_folder() {
        for name in ["weights.safetensors", "a b", ".hidden"] {
            assert!(is_plain_name(Path::new(name)), "{name}");
        }
        for name in ["", ".", "..", "../vocab.txt", "/etc/passwd", "a/b", "a/.."] {
            assert!(!is_plain_name(Path::new(name)), "{name}");
        }
    }
}
