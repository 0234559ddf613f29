//! The generation configuration.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How to generate. Field names, defaults and meaning are those of transformers' `GenerationConfig`, except that sampling
/// filters are off unless set and `max_new_tokens` is 30, as in LAVIS; `presence_penalty` and `frequency_penalty`, which it has
/// not, are OpenAI's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerationConfig {
    /// Beams of the beam search, among whose continuations `do_sample` draws; 1 for greedy search or sampling.
    pub num_beams: usize,
    /// Exponent of the length by which a beam's score is divided: above 0 favours long texts, below 0 short ones.
    pub length_penalty: f32,
    /// When a beam search with `num_beams` finished texts ends.
    pub early_stopping: EarlyStopping,
    /// Draw tokens at random instead of taking the best.
    pub do_sample: bool,
    /// Divides the logits before drawing (> 0).
    pub temperature: f32,
    /// Draw among this many best tokens; 0 for all.
    pub top_k: usize,
    /// Draw among the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Draw among the tokens at least this fraction as likely as the best; 0 for all.
    pub min_p: f32,
    /// Above 1, tokens that already occurred become less likely.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that were generated: above 0 they become less likely, below 0 likelier; -2 to 2.
    pub presence_penalty: f32,
    /// The same, for each time that a token was generated.
    pub frequency_penalty: f32,
    /// No sequence of this many tokens occurs twice; 0 for no such rule.
    pub no_repeat_ngram_size: usize,
    /// The end token is impossible before this many tokens.
    pub min_new_tokens: usize,
    /// The text ends after this many tokens.
    pub max_new_tokens: usize,
    /// The end token is impossible before the text has this many tokens, those that the rules see before it
    /// ([`sees_prompt`](Self::sees_prompt)) counted; both minima hold.
    pub min_length: usize,
    /// The text ends when it has this many tokens, counted as for `min_length`: in place of `max_new_tokens`, if set.
    pub max_length: Option<usize>,
    /// Sequences of tokens that may not occur. One that is an end token and nothing else is passed over.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that are not chosen first.
    pub begin_suppress_tokens: Vec<u32>,
    /// The token that comes where exactly one token stands before it: the first one of an encoder-decoder model.
    pub forced_bos_token_id: Option<u32>,
    /// The last token that fits is one of these.
    pub forced_eos_token_id: Vec<u32>,
    /// The tokens that end a text; the model's own when empty.
    pub eos_token_id: Vec<u32>,
    /// Whether the rules above see a prompt's ids before the generated ones, an image token for each query among them, as
    /// in transformers since BLIP-2 has an image token there. LAVIS passes embeddings, so that they see nothing of it.
    pub sees_prompt: bool,
    /// Texts to return for each prompt.
    pub num_return_sequences: usize,
    /// A text ends when one of these appears in it.
    pub stop_strings: Vec<String>,
    /// Decides all draws: the same seed gives the same texts.
    pub seed: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            num_beams: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::Heuristic,
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            no_repeat_ngram_size: 0,
            min_new_tokens: 0,
            max_new_tokens: 30,
            min_length: 0,
            max_length: None,
            bad_words_ids: Vec::new(),
            suppress_tokens: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            forced_bos_token_id: None,
            forced_eos_token_id: Vec::new(),
            eos_token_id: Vec::new(),
            sees_prompt: false,
            num_return_sequences: 1,
            stop_strings: Vec::new(),
            seed: 0,
        }
    }
}

/// When a beam search that has `num_beams` finished texts ends: `false`, `true` or `"never"`, as transformers write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "EarlyStoppingText", into = "EarlyStoppingText")]
pub enum EarlyStopping {
    /// `false`: when the best running beam, at its present length, is no better than the worst finished text.
    #[default]
    Heuristic,
    /// `true`: at once.
    Immediate,
    /// `"never"`: when no running beam can become better than the worst finished text at any length.
    Never,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"never\"")]
enum EarlyStoppingText {
    Bool(bool),
    Text(String),
}

impl TryFrom<EarlyStoppingText> for EarlyStopping {
    type Error = String;

    fn try_from(text: EarlyStoppingText) -> std::result::Result<Self, String> {
        match text {
            EarlyStoppingText::Bool(false) => Ok(Self::Heuristic),
            EarlyStoppingText::Bool(true) => Ok(Self::Immediate),
            EarlyStoppingText::Text(text) if text == "never" => Ok(Self::Never),
            EarlyStoppingText::Text(text) => {
                Err(format!("early_stopping is {text:?}, expected true, false or \"never\""))
            }
        }
    }
}

impl From<EarlyStopping> for EarlyStoppingText {
    fn from(value: EarlyStopping) -> Self {
        match value {
            EarlyStopping::Heuristic => Self::Bool(false),
            EarlyStopping::Immediate => Self::Bool(true),
            EarlyStopping::Never => Self::Text("never".into()),
        }
    }
}

impl GenerationConfig {
    /// Checks the values, alone and against each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the field to change.
    pub fn validate(&self) -> Result<()> {
        check("num_beams", self.num_beams, (1..=256).contains(&self.num_beams), "1 to 256")?;
        check("length_penalty", self.length_penalty, self.length_penalty.is_finite(), "a number")?;
        let is_positive = |x: f32| x > 0.0 && x.is_finite();
        check("temperature", self.temperature, is_positive(self.temperature), {
            "above 0 (for the likeliest token turn do_sample off)"
        })?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1")?;
        let penalty = self.repetition_penalty;
        check("repetition_penalty", penalty, is_positive(penalty), "above 0 (1 is none)")?;
        for (name, penalty) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            check(name, penalty, (-2.0..=2.0).contains(&penalty), "-2 to 2 (0 is none)")?;
        }
        check("max_new_tokens", self.max_new_tokens, self.max_new_tokens > 0, "at least 1")?;
        let is_reachable = self.max_length.is_some() || self.min_new_tokens <= self.max_new_tokens;
        let most = format!("at most max_new_tokens, {}", self.max_new_tokens);
        check("min_new_tokens", self.min_new_tokens, is_reachable, &most)?;
        if let Some(max_length) = self.max_length {
            check("max_length", max_length, max_length > 0, "at least 1")?;
            check("min_length", self.min_length, self.min_length <= max_length, "at most max_length")?;
        }
        let has_empty = self.bad_words_ids.iter().any(Vec::is_empty);
        check("bad_words_ids", "an empty sequence", !has_empty, "tokens")?;
        let has_empty = self.stop_strings.iter().any(String::is_empty);
        check("stop_strings", "an empty string", !has_empty, "text")?;

        let n = self.num_return_sequences;
        check("num_return_sequences", n, n > 0, "at least 1")?;
        if self.num_beams > 1 {
            let most = format!("at most num_beams, {}", self.num_beams);
            check("num_return_sequences", n, n <= self.num_beams, &most)?;
        } else if !self.do_sample {
            check(
                "num_return_sequences",
                n,
                n == 1,
                "1: greedy search has one result (use beams or do_sample)",
            )?;
        }
        Ok(())
    }
}

fn check(field: &str, value: impl std::fmt::Display, is_valid: bool, expected: &str) -> Result<()> {
    if is_valid {
        return Ok(());
    }
    Err(Error::Config {
        field: format!("generation.{field}"),
        reason: format!("is {value}, expected {expected}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> std::result::Result<GenerationConfig, String> {
        let config: GenerationConfig = serde_json::from_str(json).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn every_field_is_read_and_written_back() {
        let config = parse(
            r#"{"num_beams": 5, "length_penalty": -1, "early_stopping": "never", "temperature": 0.7, "top_k": 40,
                "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.15, "no_repeat_ngram_size": 3, "min_new_tokens": 8,
                "presence_penalty": 0.5, "frequency_penalty": -0.25, "max_new_tokens": 30,
                "num_return_sequences": 5, "stop_strings": ["\n"], "seed": 3, "do_sample": false,
                "min_length": 2, "max_length": 40, "bad_words_ids": [[3], [4, 5]], "suppress_tokens": [6],
                "begin_suppress_tokens": [7], "forced_bos_token_id": 8, "forced_eos_token_id": [9],
                "eos_token_id": [9, 10], "sees_prompt": true}"#,
        )
        .unwrap();
        assert_eq!(config.early_stopping, EarlyStopping::Never);
        assert_eq!(parse(&serde_json::to_string(&config).unwrap()).unwrap(), config);
        assert_eq!(parse(r#"{"early_stopping": true}"#).unwrap().early_stopping, EarlyStopping::Immediate);
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn each_mistake_is_named() {
        for (json, expected) in [
            (r#"{"num_beam": 3}"#, "unknown field `num_beam`"),
            (r#"{"num_beams": 0}"#, "`generation.num_beams` is 0, expected 1 to 256"),
            (r#"{"temperature": 0}"#, "`generation.temperature` is 0, expected above 0"),
            (r#"{"top_p": 0}"#, "`generation.top_p` is 0"),
            (r#"{"top_p": 1.5}"#, "`generation.top_p` is 1.5"),
            (r#"{"min_p": -0.5}"#, "`generation.min_p` is -0.5"),
            (r#"{"repetition_penalty": 0}"#, "`generation.repetition_penalty` is 0"),
            (r#"{"presence_penalty": 2.5}"#, "`generation.presence_penalty` is 2.5, expected -2 to 2"),
            (r#"{"frequency_penalty": -3}"#, "`generation.frequency_penalty` is -3, expected -2 to 2"),
            (r#"{"max_new_tokens": 0}"#, "`generation.max_new_tokens` is 0"),
            (
                r#"{"min_new_tokens": 31}"#,
                "`generation.min_new_tokens` is 31, expected at most max_new_tokens",
            ),
            (r#"{"max_length": 0}"#, "`generation.max_length` is 0"),
            (
                r#"{"max_length": 5, "min_length": 6}"#,
                "`generation.min_length` is 6, expected at most max_length",
            ),
            (r#"{"bad_words_ids": [[1], []]}"#, "`generation.bad_words_ids` is an empty sequence"),
            (r#"{"num_return_sequences": 2}"#, "greedy search has one result"),
            (r#"{"num_beams": 2, "num_return_sequences": 3}"#, "expected at most num_beams"),
            (r#"{"stop_strings": [""]}"#, "`generation.stop_strings` is an empty string"),
            (r#"{"early_stopping": "always"}"#, "expected true, false or \\\"never\\\""),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(&expected.replace("\\\"", "\"")), "{json}: {error}");
        }
    }
}
