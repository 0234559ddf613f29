//! A language model's Hugging Face folder, its own or that of a whole BLIP-2 model.

use std::path::Path;

use serde_json::Value as Json;

use super::language::{Family, Language};
use super::small_files;
use crate::Result;
use crate::model::hugging_face;

/// What the folder says of the language model. No weight is read.
pub(super) struct LanguageFolder<'a> {
    pub(super) path: &'a Path,
    /// Its own configuration.
    pub(super) text: Json,
    pub(super) family: Family,
    /// Whether it is that of a whole model, whose language model has all that BLIP-2 makes of one.
    pub(super) is_whole: bool,
}

impl<'a> LanguageFolder<'a> {
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) when the model is of another family, and those of reading `config.json`.
    pub(super) fn read(path: &'a Path) -> Result<Self> {
        let json = hugging_face::read_json(path)?;
        let is_whole = json["model_type"] == "blip-2";
        let text = if is_whole { hugging_face::text_config(&json) } else { json };
        let family = Family::of(&text).map_err(|error| error.in_folder(path))?;
        Ok(Self { path, text, family, is_whole })
    }

    /// The configuration that the language model has inside BLIP-2.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub(super) fn adapted(&self, language: &Language) -> Result<Json> {
        let mut text = self.text.clone();
        if !self.is_whole {
            small_files::adapt_text_config(&mut text, self.path, language)?;
        }
        Ok(text)
    }
}
