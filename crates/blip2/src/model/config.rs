//! A model folder's `config.json`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::QFormerConfig;
use crate::generate::GenerationConfig;
use crate::text::PromptFormat;
use crate::{Error, Result};

/// The name of the configuration in a model folder.
pub const FILE_NAME: &str = "config.json";

/// What a model is made of. Paths are relative to its folder.
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
    },
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
    /// How it is spoken to.
    pub prompt: PromptFormat,
    /// What is asked for a caption.
    pub instruction: String,
    /// How captions and answers are generated unless the caller says otherwise.
    #[serde(default)]
    pub generation: GenerationConfig,
}

impl ModelConfig {
    /// Reads the configuration of a model folder.
    ///
    /// # Errors
    /// When there is none, a field is unknown, missing or wrong.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let config: Self = serde_json::from_slice(&bytes)
            .map_err(|error| Error::File { path: path.clone(), reason: error.to_string() })?;
        config.validate()?;
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
        if let Some(stage2) = &self.stage2 {
            if stage2.instruction.trim().is_empty() {
                return wrong("stage2.instruction", "is empty: it is what asks for a caption");
            }
            stage2.generation.validate()?;
        }
        Ok(())
    }
}
