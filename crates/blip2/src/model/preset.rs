//! Whose defaults a text is generated with, and whose preparation it is compared with: this model's, those of transformers, or
//! those of LAVIS.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use super::{Blip2, ModelConfig, hugging_face};
use crate::generate::{EarlyStopping, GenerationConfig};
use crate::{Error, Result};

/// An implementation of BLIP-2 whose results are to be had.
///
/// A preset is more than numbers: whoever wants the source's tokens also decodes pictures as it does
/// ([`Pixels::Pillow`](crate::image::Pixels::Pillow)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// Hugging Face transformers' `generate`: greedy, 20 tokens, 50 candidates where it draws; penalties see the picture's
    /// and the prompt's tokens. Texts are compared as they are given.
    Hf,
    /// The `generate` of LAVIS's `blip2_opt.py` and `blip2_t5.py`: 5 beams, 30 tokens, a nucleus of 0.9 where it draws;
    /// penalties see generated tokens only. Texts are compared as its `blip_caption` processor cleans them, and of a text that is
    /// matched the first 32 tokens are read (35 in retrieval).
    Lavis,
}

impl Blip2 {
    /// How this model writes a caption unless the caller says otherwise: in its own way, or with the defaults of `preset`.
    pub fn generation(&self, preset: Option<Preset>) -> GenerationConfig {
        match preset {
            None => self.config.stage2.as_ref().map(|stage2| stage2.generation.clone()).unwrap_or_default(),
            Some(preset) => self.preset(preset),
        }
    }

    /// As [`generation`](Self::generation), for the answer to a question; presets make no difference between the two.
    pub fn answering(&self, preset: Option<Preset>) -> GenerationConfig {
        match preset {
            None => self.config.stage2.as_ref().map(|stage2| stage2.answering().clone()).unwrap_or_default(),
            Some(preset) => self.preset(preset),
        }
    }

    fn preset(&self, preset: Preset) -> GenerationConfig {
        match &self.stage2 {
            Some(stage2) => preset.generation(stage2.folder_generation(), stage2.end_of_answer()),
            None => preset.generation(&FolderGeneration::default(), &[]),
        }
    }
}

impl Preset {
    /// Its defaults, with what a folder changes of them; `end_of_answer` ends a text by the prompt's format.
    fn generation(self, folder: &FolderGeneration, end_of_answer: &[u32]) -> GenerationConfig {
        match self {
            Self::Hf => {
                let mut config = GenerationConfig {
                    num_beams: 1,
                    max_new_tokens: 20,
                    top_k: 50,
                    sees_prompt: true,
                    ..GenerationConfig::default()
                };
                folder.apply(&mut config);
                config
            }
            // Its `min_length` of 1 counts the prompt (OPT) or the start token (T5), so that it forbids nothing.
            Self::Lavis => GenerationConfig {
                num_beams: 5,
                max_new_tokens: 30,
                top_p: 0.9,
                eos_token_id: end_of_answer.to_vec(),
                ..GenerationConfig::default()
            },
        }
    }
}

/// How the model in a folder writes unless the caller says otherwise, as its small files say: known before the model is opened.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationDefaults {
    /// What [`Blip2::generation`] will give, but for the tokens that end a text, which a tokenizer knows.
    pub captions: GenerationConfig,
    /// What [`Blip2::answering`] will give, likewise.
    pub answers: GenerationConfig,
}

impl GenerationDefaults {
    /// Of a folder of this project or of Hugging Face, in the model's own way or with the defaults of `preset`.
    ///
    /// # Errors
    /// When the folder holds no model, or what it says cannot be read.
    pub fn read(folder: impl AsRef<Path>, preset: Option<Preset>) -> Result<Self> {
        let folder = folder.as_ref();
        let for_both = |config: GenerationConfig| Self { captions: config.clone(), answers: config };
        if hugging_face::read_config(folder)?.is_some() {
            let settings = FolderGeneration::read(folder)?;
            return Ok(for_both(match preset {
                Some(preset) => preset.generation(&settings, &[]),
                None => settings.own(),
            }));
        }
        let own = ModelConfig::read(folder)?.stage2;
        Ok(match (preset, own) {
            (Some(preset), _) => for_both(preset.generation(&FolderGeneration::default(), &[])),
            (None, Some(stage2)) => Self { answers: stage2.answering().clone(), captions: stage2.generation },
            (None, None) => for_both(GenerationConfig::default()),
        })
    }
}

const GENERATION_FILE: &str = "generation_config.json";

/// What a folder's `generation_config.json` says; nothing of it is a default of ours.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct FolderGeneration {
    num_beams: Option<usize>,
    length_penalty: Option<f32>,
    early_stopping: Option<EarlyStopping>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    no_repeat_ngram_size: Option<usize>,
    min_new_tokens: Option<usize>,
    max_new_tokens: Option<usize>,
    min_length: Option<usize>,
    max_length: Option<usize>,
    bad_words_ids: Option<Vec<Vec<u32>>>,
    suppress_tokens: Option<Vec<u32>>,
    begin_suppress_tokens: Option<Vec<u32>>,
    forced_bos_token_id: Option<u32>,
    forced_eos_token_id: Option<OneOrMore>,
    eos_token_id: Option<OneOrMore>,
    num_return_sequences: Option<usize>,
    stop_strings: Option<Strings>,
    #[serde(flatten)]
    others: serde_json::Map<String, Json>,
}

/// Token ids, written as one or as a list.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMore {
    One(u32),
    More(Vec<u32>),
}

impl OneOrMore {
    pub(super) fn list(&self) -> Vec<u32> {
        match self {
            Self::One(token) => vec![*token],
            Self::More(tokens) => tokens.clone(),
        }
    }
}

/// The whole numbers of a field that has one or a list of them.
fn numbers(value: &Json) -> Vec<i64> {
    match value {
        Json::Array(values) => values.iter().filter_map(Json::as_i64).collect(),
        value => value.as_i64().into_iter().collect(),
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Strings {
    One(String),
    More(Vec<String>),
}

/// The field for the token that fills short texts of a batch up. Nothing is filled up here.
pub(super) const PAD_TOKEN: &str = "pad_token_id";

/// By this, too, published configurations say that there is none.
pub(super) const NO_PAD_TOKEN: i64 = -1;

/// Fields that change no token here: bookkeeping, output, speed, token ids that the model's own configuration has, and
/// rules about an encoder's tokens, which transformers passes over as well since BLIP-2's encoder reads embeddings.
const WITHOUT_EFFECT: [&str; 17] = [
    "_from_model_config",
    "_commit_hash",
    "transformers_version",
    "bos_token_id",
    PAD_TOKEN,
    "decoder_start_token_id",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "use_cache",
    "cache_implementation",
    "max_cache_len",
    "disable_compile",
];

impl FolderGeneration {
    /// Reads the folder's file, if it has one.
    ///
    /// # Errors
    /// When it cannot be read, or asks for a rule that is not known here.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(GENERATION_FILE);
        let bytes = match crate::small_file::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(Error::Io { path, source }),
        };
        let refuse = |reason: String| Error::File { path: path.clone(), reason };
        let json: Json = serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
        for field in ["eos_token_id", "forced_bos_token_id", "forced_eos_token_id"] {
            let is_token = |value: &Json| value.as_u64().is_some_and(|id| u32::try_from(id).is_ok());
            let is_valid = match &json[field] {
                Json::Null => true,
                Json::Array(values) => values.iter().all(is_token),
                value => is_token(value),
            };
            if !is_valid {
                return Err(refuse(format!("`{field}` is {}, expected a token's number", json[field])));
            }
        }
        let read: Self = serde_json::from_value(json).map_err(|error| refuse(error.to_string()))?;
        let neutral = |value: &Json| {
            matches!(value, Json::Null | Json::Bool(false))
                || value.as_f64().is_some_and(|x| x == 0.0 || x == 1.0)
        };
        let unknown = read
            .others
            .iter()
            .find(|(name, value)| !WITHOUT_EFFECT.contains(&name.as_str()) && !neutral(value));
        if let Some((name, value)) = unknown {
            return Err(refuse(format!("asks for `{name}` = {value}, which is not known here: take it out")));
        }
        let mut config = GenerationConfig::default();
        read.apply(&mut config);
        config.validate().map_err(|error| refuse(error.to_string()))?;
        Ok(read)
    }

    /// Refuses token ids that a vocabulary does not have, but for those that are suppressed: what is not there is never chosen.
    ///
    /// # Errors
    /// [`Error::File`] with the field and the id.
    pub(super) fn check_tokens(&self, folder: &Path, n_tokens: usize) -> Result<()> {
        let ids = |named: &Option<OneOrMore>| named.as_ref().map(OneOrMore::list).unwrap_or_default();
        let named = |field: &str| self.others.get(field).map(numbers).unwrap_or_default();
        let others = ["bos_token_id", "decoder_start_token_id"].map(|field| (field, named(field)));
        let pad = named(PAD_TOKEN).into_iter().filter(|id| *id != NO_PAD_TOKEN).collect();
        let bad_words = self.bad_words_ids.iter().flatten().flatten().copied().map(i64::from).collect();
        let fields = [
            ("eos_token_id", ids(&self.eos_token_id)),
            ("forced_bos_token_id", self.forced_bos_token_id.into_iter().collect()),
            ("forced_eos_token_id", ids(&self.forced_eos_token_id)),
        ];
        let fields = fields.map(|(field, ids)| (field, ids.into_iter().map(i64::from).collect::<Vec<_>>()));
        let fields = fields.into_iter().chain(others).chain([(PAD_TOKEN, pad), ("bad_words_ids", bad_words)]);
        for (field, ids) in fields {
            let is_known = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < n_tokens);
            if let Some(id) = ids.iter().find(|id| !is_known(id)) {
                let reason = format!(
                    "`{field}` has {id}: the language model's vocabulary has {n_tokens} tokens, from 0 on"
                );
                return Err(Error::File { path: folder.join(GENERATION_FILE), reason });
            }
        }
        Ok(())
    }

    /// LAVIS's defaults, which the published captions were made with, and what the file changes of them.
    pub(super) fn own(&self) -> GenerationConfig {
        let mut config = GenerationConfig {
            num_beams: 5,
            max_new_tokens: 30,
            sees_prompt: true,
            ..GenerationConfig::default()
        };
        self.apply(&mut config);
        config
    }

    /// The tokens that end a text, if the file names them.
    pub(super) fn end_tokens(&self) -> Option<Vec<u32>> {
        self.eos_token_id.as_ref().map(OneOrMore::list)
    }

    /// Changes what the file names.
    pub(super) fn apply(&self, config: &mut GenerationConfig) {
        fn set<T: Clone>(field: &mut T, named: &Option<T>) {
            if let Some(value) = named {
                field.clone_from(value);
            }
        }
        if self.do_sample == Some(true) {
            config.num_beams = 1;
        }
        set(&mut config.num_beams, &self.num_beams);
        set(&mut config.length_penalty, &self.length_penalty);
        set(&mut config.early_stopping, &self.early_stopping);
        set(&mut config.do_sample, &self.do_sample);
        set(&mut config.temperature, &self.temperature);
        set(&mut config.top_k, &self.top_k);
        set(&mut config.top_p, &self.top_p);
        set(&mut config.min_p, &self.min_p);
        set(&mut config.repetition_penalty, &self.repetition_penalty);
        set(&mut config.no_repeat_ngram_size, &self.no_repeat_ngram_size);
        set(&mut config.bad_words_ids, &self.bad_words_ids);
        set(&mut config.suppress_tokens, &self.suppress_tokens);
        set(&mut config.begin_suppress_tokens, &self.begin_suppress_tokens);
        set(&mut config.num_return_sequences, &self.num_return_sequences);
        // Of two limits the one that counts new tokens holds where both are named.
        match (self.min_new_tokens, self.min_length) {
            (Some(min_new_tokens), _) => {
                (config.min_new_tokens, config.min_length) = (min_new_tokens, 0);
            }
            (None, Some(min_length)) => config.min_length = min_length,
            (None, None) => {}
        }
        match (self.max_new_tokens, self.max_length) {
            (Some(max_new_tokens), _) => {
                (config.max_new_tokens, config.max_length) = (max_new_tokens, None);
            }
            (None, Some(max_length)) => config.max_length = Some(max_length),
            (None, None) => {}
        }
        config.forced_bos_token_id = self.forced_bos_token_id.or(config.forced_bos_token_id);
        set(&mut config.forced_eos_token_id, &self.forced_eos_token_id.as_ref().map(OneOrMore::list));
        match &self.stop_strings {
            Some(Strings::One(text)) => config.stop_strings = vec![text.clone()],
            Some(Strings::More(texts)) => config.stop_strings.clone_from(texts),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> std::result::Result<GenerationConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("generation_config.json"), json).unwrap();
        let mut config = GenerationConfig::default();
        FolderGeneration::read(folder.path()).map_err(|error| error.to_string())?.apply(&mut config);
        Ok(config)
    }

    #[test]
    fn the_folders_settings_are_taken_and_its_bookkeeping_is_not() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(FolderGeneration::read(empty.path()).unwrap(), FolderGeneration::default());
        let published = r#"{"_from_model_config": true, "bos_token_id": 2, "eos_token_id": 50118, "pad_token_id": 1,
            "transformers_version": "4.27.0.dev0", "max_length": null, "typical_p": 1.0, "num_beam_groups": 1}"#;
        assert_eq!(read(published).unwrap(), GenerationConfig::default());
        let config = read(
            r#"{"num_beams": 3, "max_length": 40, "max_new_tokens": 7, "early_stopping": "never", "top_k": 9,
                "forced_eos_token_id": 5, "bad_words_ids": [[1, 2]], "stop_strings": ".", "min_length": 9,
                "min_new_tokens": 2}"#,
        )
        .unwrap();
        let expected = GenerationConfig {
            num_beams: 3,
            max_new_tokens: 7,
            early_stopping: EarlyStopping::Never,
            top_k: 9,
            forced_eos_token_id: vec![5],
            bad_words_ids: vec![vec![1, 2]],
            stop_strings: vec![".".into()],
            min_new_tokens: 2,
            ..GenerationConfig::default()
        };
        assert_eq!(config, expected);
        assert_eq!(read(r#"{"max_length": 40}"#).unwrap().max_length, Some(40));
    }

    #[test]
    fn rules_that_are_not_known_are_refused_by_name() {
        for (json, expected) in [
            (r#"{"penalty_alpha": 0.6}"#, "penalty_alpha"),
            (r#"{"sequence_bias": [[[1], -1.0]]}"#, "sequence_bias"),
            (r#"{"num_beams": 0}"#, "generation.num_beams"),
            (r#"{"num_beams": "two"}"#, "generation_config.json"),
            (r#"{"eos_token_id": -1}"#, "`eos_token_id` is -1, expected a token's number"),
            (r#"{"forced_eos_token_id": [2, 0.5]}"#, "`forced_eos_token_id` is [2,0.5], expected"),
            ("[]", "generation_config.json"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(expected), "{json}: {error}");
        }
    }
}
