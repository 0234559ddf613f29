//! What a model was trained with that neither its tensors nor the fields of transformers say: how it was spoken to, and the
//! size of its pictures. A folder's `config.json` has it under a name that transformers passes over.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::config::wrong;
use crate::Result;
use crate::text::PromptFormat;

/// Its name in `config.json`.
const FIELD: &str = "trained_with";

/// What is not there is as in the published models of the family.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::model) struct TrainedWith {
    /// What asks for a caption, or how one begins; may be empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::model) instruction: Option<String>,
    /// How questions are asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::model) prompt: Option<PromptFormat>,
    /// How captions are asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::model) caption_prompt: Option<PromptFormat>,
    /// Side of the pictures in pixels, where it is not the one that the position embeddings are stored for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::model) image_size: Option<usize>,
}

impl TrainedWith {
    /// What a folder's configuration says of it.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) when it cannot be understood.
    pub(in crate::model) fn read(config: &Json) -> Result<Self> {
        if config[FIELD].is_null() {
            return Ok(Self::default());
        }
        let read: Self = serde_json::from_value(config[FIELD].clone())
            .map_err(|error| wrong(FIELD, &format!("cannot be read: {error}")))?;
        let says_nothing = read.instruction.as_ref().is_none_or(|instruction| instruction.trim().is_empty());
        if says_nothing && read.caption_prompt == Some(PromptFormat::ChatMl) {
            return Err(wrong("trained_with.instruction", "is empty: it is what asks for a caption"));
        }
        Ok(read)
    }

    /// Writes it into a folder's configuration; nothing where there is nothing to say.
    pub(in crate::model) fn write(&self, config: &mut Json) {
        if *self != Self::default() {
            config[FIELD] = serde_json::to_value(self).unwrap_or_default(); // texts and numbers always are JSON
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_is_not_written() {
        let mut config = json!({"model_type": "blip-2"});
        TrainedWith::default().write(&mut config);
        assert_eq!(config, json!({"model_type": "blip-2"}));
        assert_eq!(TrainedWith::read(&config).unwrap(), TrainedWith::default());
        for trained_with in [
            // Nothing to say is not the same as saying nothing.
            TrainedWith { instruction: Some(String::new()), ..TrainedWith::default() },
            TrainedWith {
                instruction: Some("describe it".into()),
                prompt: Some(PromptFormat::plain()),
                caption_prompt: Some(PromptFormat::ChatMl),
                image_size: Some(364),
            },
        ] {
            trained_with.write(&mut config);
            assert_eq!(TrainedWith::read(&config).unwrap(), trained_with);
        }
    }

    #[test]
    fn what_cannot_be_understood_is_refused_by_name() {
        for (json, expected) in [
            (json!("a photo of"), "trained_with"),
            (json!({"instruction": 3}), "trained_with"),
            (json!({"instructions": ["a photo of"]}), "instructions"),
            (json!({"prompt": {"kind": "alpaca"}}), "alpaca"),
            (json!({"caption_prompt": {"kind": "chat_ml"}}), "trained_with.instruction"),
        ] {
            let error = TrainedWith::read(&json!({"trained_with": json})).unwrap_err().to_string();
            assert!(error.contains(expected), "{json}: {error}");
        }
    }
}
