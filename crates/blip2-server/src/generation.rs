//! The fields by which requests say how to write, and what they become.

use std::hash::{BuildHasher, RandomState};

use blip2::generate::{EarlyStopping, GenerationConfig};
use serde::Deserialize;
use serde_json::Value as Json;

use crate::answer_form::{Form, FormFields};
use crate::config::Limits;
use crate::error::ApiError;
use crate::wire::OneOrMany;

/// OpenAI's fields, and those that vLLM's clients add. Read from the same body as the rest of a request.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GenerationFields {
    n: Option<usize>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    min_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    seed: Option<i64>,
    stop: Option<OneOrMany<String>>,
    num_beams: Option<usize>,
    length_penalty: Option<f32>,
    early_stopping: Option<EarlyStopping>,
    repetition_penalty: Option<f32>,
    no_repeat_ngram_size: Option<usize>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<serde_json::Map<String, Json>>,
    response_format: Option<Json>,
    structured_outputs: Option<Json>,
    guided_json: Option<Json>,
    guided_regex: Option<Json>,
    guided_choice: Option<Json>,
    guided_grammar: Option<Json>,
    tools: Option<Vec<Json>>,
    functions: Option<Vec<Json>>,
}

/// How to write, and what has to come of it.
#[derive(Debug)]
pub(crate) struct Manner {
    pub(crate) generation: GenerationConfig,
    pub(crate) form: Option<Form>,
}

impl GenerationFields {
    /// The configuration of a chat: what the model says for itself, but without beams, whose text cannot be shown as it
    /// grows, and with room for more than a caption.
    pub(crate) fn for_chat(own: &GenerationConfig, limits: &Limits) -> GenerationConfig {
        const ROOM: usize = 256;
        let own = in_new_tokens(own.clone(), limits);
        GenerationConfig {
            num_beams: 1,
            max_new_tokens: own.max_new_tokens.max(ROOM).min(limits.tokens),
            ..own
        }
    }

    /// Changes `base` by what the request says.
    pub(crate) fn apply(&self, base: GenerationConfig, limits: &Limits) -> Result<Manner, ApiError> {
        self.refuse_unsupported()?;
        Ok(Manner { generation: self.generation(base, limits)?, form: self.form_fields().form()? })
    }

    fn form_fields(&self) -> FormFields<'_> {
        FormFields {
            response_format: self.response_format.as_ref(),
            structured_outputs: self.structured_outputs.as_ref(),
            guided_json: self.guided_json.as_ref(),
            guided_regex: self.guided_regex.as_ref(),
            guided_choice: self.guided_choice.as_ref(),
            guided_grammar: self.guided_grammar.as_ref(),
        }
    }

    fn generation(&self, base: GenerationConfig, limits: &Limits) -> Result<GenerationConfig, ApiError> {
        let mut config = in_new_tokens(base, limits);
        self.apply_lengths(&mut config, limits)?;
        self.apply_choice(&mut config, limits)?;
        set(&mut config.length_penalty, self.length_penalty);
        set(&mut config.early_stopping, self.early_stopping);
        set(&mut config.repetition_penalty, self.repetition_penalty);
        set(&mut config.presence_penalty, self.presence_penalty);
        set(&mut config.frequency_penalty, self.frequency_penalty);
        set(&mut config.no_repeat_ngram_size, self.no_repeat_ngram_size);
        if let Some(stop) = &self.stop {
            config.stop_strings = stop_strings(stop.as_slice())?;
        }
        config.validate().map_err(|error| ApiError::library(&error, "generation"))?;
        Ok(config)
    }

    /// Greedy, sampled or searched with beams; how many.
    fn apply_choice(&self, config: &mut GenerationConfig, limits: &Limits) -> Result<(), ApiError> {
        let n = self.n.unwrap_or(1);
        if !(1..=limits.answers).contains(&n) {
            return Err(ApiError::invalid(
                "n",
                format!("n is {n}, this server gives 1 to {}", limits.answers),
            ));
        }
        config.num_return_sequences = n;
        if let Some(beams) = self.num_beams {
            if !(1..=limits.beams).contains(&beams) {
                let message =
                    format!("num_beams is {beams}, this server searches with 1 to {}", limits.beams);
                return Err(ApiError::invalid("num_beams", message));
            }
            config.num_beams = beams;
        }
        let filters = self.top_p.is_some_and(|p| p < 1.0)
            || self.top_k.is_some_and(|k| k > 0)
            || self.min_p.is_some_and(|p| p > 0.0);
        if let Some(temperature) = self.temperature.filter(|given| !(given.is_finite() && *given >= 0.0)) {
            let message = format!("temperature is {temperature}, expected 0 (the likeliest token) or more");
            return Err(ApiError::invalid("temperature", message));
        }
        // Of several answers that nobody said how to choose: as everywhere with this interface, by drawing.
        let draws = match self.temperature {
            Some(temperature) => temperature != 0.0,
            None => filters || (n > 1 && self.num_beams.is_none()),
        };
        if draws {
            config.do_sample = true;
            set(&mut config.temperature, self.temperature);
            if self.num_beams.is_none() {
                config.num_beams = 1;
            }
        } else if self.temperature.is_some() {
            config.do_sample = false;
        }
        if n > 1 && !config.do_sample && config.num_beams == 1 {
            let message = "at temperature 0 all answers are the same: ask for one, or give num_beams";
            return Err(ApiError::invalid("n", message));
        }
        if n > config.num_beams && config.num_beams > 1 {
            let message = format!("n is {n}, a search with {} beams has no more answers", config.num_beams);
            return Err(ApiError::invalid("n", message));
        }
        set(&mut config.top_p, self.top_p);
        set(&mut config.min_p, self.min_p);
        if let Some(k) = self.top_k {
            // -1 is how some clients say "all".
            let invalid =
                || ApiError::invalid("top_k", format!("top_k is {k}, expected 1 or more, or 0 for all"));
            config.top_k = usize::try_from(k.max(0)).map_err(|_| invalid())?;
            if k < -1 {
                return Err(invalid());
            }
        }
        config.seed = match self.seed {
            Some(seed) => seed.cast_unsigned(),
            None if config.do_sample => RandomState::new().hash_one(0),
            None => config.seed,
        };
        Ok(())
    }

    fn apply_lengths(&self, config: &mut GenerationConfig, limits: &Limits) -> Result<(), ApiError> {
        let given = self.max_completion_tokens.map(|n| ("max_completion_tokens", n));
        if let Some((param, n)) = given.or_else(|| self.max_tokens.map(|n| ("max_tokens", n))) {
            let fits = usize::try_from(n).ok().filter(|n| (1..=limits.tokens).contains(n));
            config.max_new_tokens = fits.ok_or_else(|| {
                ApiError::invalid(param, format!("{param} is {n}, this server writes 1 to {}", limits.tokens))
            })?;
        }
        let max = config.max_new_tokens;
        config.min_new_tokens = match self.min_tokens {
            None => config.min_new_tokens.min(max),
            Some(min) if min <= max => {
                // As for the longest: what counts the prompt would hold as well.
                config.min_length = 0;
                min
            }
            Some(min) => {
                let message = format!("min_tokens is {min}, more than the longest answer of {max}");
                return Err(ApiError::invalid("min_tokens", message));
            }
        };
        Ok(())
    }

    /// What clients may ask for and does not exist here is said, not left out.
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let has_tools = [&self.tools, &self.functions].into_iter().flatten().any(|tools| !tools.is_empty());
        let has_bias = self.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty());
        for (param, is_asked) in [("logit_bias", has_bias), ("tools", has_tools)] {
            if is_asked {
                let message = format!("{param} is not supported here: leave it out");
                return Err(ApiError::unsupported(param, message));
            }
        }
        Ok(())
    }
}

/// The longest text as requests count it. A model folder's `generation_config.json` may bound the prompt and the text together,
/// which holds in place of `max_new_tokens`: then neither a request's limit would hold nor the memory that is set aside.
fn in_new_tokens(own: GenerationConfig, limits: &Limits) -> GenerationConfig {
    let longest = own.max_length.unwrap_or(own.max_new_tokens);
    GenerationConfig { max_new_tokens: longest.min(limits.tokens), max_length: None, ..own }
}

/// At most four, as OpenAI has it, and none that is empty or a text of its own.
pub(crate) fn stop_strings(stop: &[String]) -> Result<Vec<String>, ApiError> {
    if stop.len() > 4 || stop.iter().any(|stop| stop.is_empty() || stop.len() > 256) {
        return Err(ApiError::invalid("stop", "stop is at most four texts of 1 to 256 bytes"));
    }
    Ok(stop.to_vec())
}

pub(crate) fn set<T>(field: &mut T, given: Option<T>) {
    if let Some(value) = given {
        *field = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(json: &str) -> Result<GenerationConfig, ApiError> {
        let own = GenerationConfig { num_beams: 5, max_new_tokens: 30, ..GenerationConfig::default() };
        let limits = Limits::default();
        let fields: GenerationFields = serde_json::from_str(json).expect("fields");
        fields.apply(GenerationFields::for_chat(&own, &limits), &limits).map(|manner| manner.generation)
    }

    #[test]
    fn unset_fields_are_greedy_and_set_ones_draw() {
        let greedy = apply("{}").expect("valid");
        assert_eq!((greedy.do_sample, greedy.num_beams, greedy.max_new_tokens), (false, 1, 256));
        for json in [r#"{"temperature": 0.7}"#, r#"{"top_p": 0.9}"#, r#"{"top_k": 5}"#, r#"{"n": 2}"#] {
            assert!(apply(json).expect("valid").do_sample, "{json}");
        }
        for json in
            [r#"{"temperature": 0}"#, r#"{"top_p": 1}"#, r#"{"top_k": -1}"#, r#"{"n": 2, "num_beams": 2}"#]
        {
            assert!(!apply(json).expect("valid").do_sample, "{json}");
        }
        let both = apply(r#"{"n": 2, "num_beams": 3, "temperature": 0.5}"#).expect("valid");
        assert_eq!((both.do_sample, both.num_beams, both.num_return_sequences), (true, 3, 2));
        let seeds: Vec<u64> = (0..2).map(|_| apply(r#"{"temperature": 1}"#).expect("valid").seed).collect();
        assert_ne!(seeds[0], seeds[1], "without a seed answers differ");
        assert_eq!(apply(r#"{"temperature": 1, "seed": -1}"#).expect("valid").seed, u64::MAX);
        let limits = r#"{"max_tokens": 9, "max_completion_tokens": 7, "min_tokens": 2, "stop": "x"}"#;
        let limits = apply(limits).expect("valid");
        assert_eq!((limits.max_new_tokens, limits.min_new_tokens), (7, 2));
        assert_eq!(limits.stop_strings, ["x"]);
    }

    #[test]
    fn openais_penalties_are_taken() {
        let config = apply(r#"{"presence_penalty": 0.5, "frequency_penalty": -1}"#).expect("valid");
        assert_eq!((config.presence_penalty, config.frequency_penalty), (0.5, -1.0));
        let config = apply(r#"{"presence_penalty": null, "frequency_penalty": 0}"#).expect("valid");
        assert_eq!((config.presence_penalty, config.frequency_penalty), (0.0, 0.0));
    }

    #[test]
    fn a_folders_lengths_give_way_to_a_requests() {
        let limits = Limits { tokens: 300, ..Limits::default() };
        let own = |max_length| GenerationConfig {
            max_length: Some(max_length),
            min_length: 9,
            ..Default::default()
        };
        let lengths = |own: GenerationConfig, json: &str| {
            let fields: GenerationFields = serde_json::from_str(json).expect("fields");
            let config = fields.apply(own, &limits).expect("valid").generation;
            assert_eq!(config.max_length, None, "it would hold instead of max_new_tokens");
            (config.max_new_tokens, config.min_new_tokens, config.min_length)
        };
        assert_eq!(lengths(own(40), "{}"), (40, 0, 9));
        assert_eq!(lengths(own(400), "{}"), (300, 0, 9));
        assert_eq!(lengths(own(40), r#"{"max_tokens": 60}"#), (60, 0, 9));
        assert_eq!(lengths(own(40), r#"{"max_tokens": 60, "min_tokens": 50}"#), (60, 50, 0));
        assert_eq!(lengths(own(40), r#"{"min_tokens": 0}"#), (40, 0, 0));
        assert_eq!(lengths(GenerationFields::for_chat(&own(40), &limits), "{}"), (256, 0, 9));
        assert_eq!(lengths(GenerationFields::for_chat(&own(400), &limits), "{}"), (300, 0, 9));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (json, param, code) in [
            (r#"{"n": 0}"#, "n", "invalid_value"),
            (r#"{"n": 9}"#, "n", "invalid_value"),
            (r#"{"n": 2, "temperature": 0}"#, "n", "invalid_value"),
            (r#"{"num_beams": 17}"#, "num_beams", "invalid_value"),
            (r#"{"n": 3, "num_beams": 2}"#, "n", "invalid_value"),
            (r#"{"n": 3, "num_beams": 2, "temperature": 1}"#, "n", "invalid_value"),
            (r#"{"max_tokens": 0}"#, "max_tokens", "invalid_value"),
            (r#"{"max_tokens": -1}"#, "max_tokens", "invalid_value"),
            (r#"{"max_completion_tokens": 9223372036854775807}"#, "max_completion_tokens", "invalid_value"),
            (r#"{"max_tokens": 3, "min_tokens": 4}"#, "min_tokens", "invalid_value"),
            (r#"{"temperature": -1}"#, "temperature", "invalid_value"),
            (r#"{"temperature": 1e308}"#, "temperature", "invalid_value"),
            (r#"{"top_p": 0}"#, "top_p", "invalid_value"),
            (r#"{"top_k": -2}"#, "top_k", "invalid_value"),
            (r#"{"min_p": 2}"#, "min_p", "invalid_value"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty", "invalid_value"),
            (r#"{"stop": ["a", "b", "c", "d", "e"]}"#, "stop", "invalid_value"),
            (r#"{"stop": ""}"#, "stop", "invalid_value"),
            (r#"{"presence_penalty": 2.5}"#, "presence_penalty", "invalid_value"),
            (r#"{"frequency_penalty": -2.5}"#, "frequency_penalty", "invalid_value"),
            (r#"{"logit_bias": {"5": 1}}"#, "logit_bias", "unsupported_value"),
            (r#"{"response_format": {"type": "xml"}}"#, "response_format", "unsupported_value"),
            (r#"{"guided_choice": "a"}"#, "guided_choice", "invalid_value"),
            (r#"{"tools": [{}]}"#, "tools", "unsupported_value"),
        ] {
            let error = apply(json).expect_err(json);
            assert_eq!((error.param.as_deref(), error.code), (Some(param), code), "{json}: {error:?}");
        }
        for json in [
            r#"{"presence_penalty": 0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}"#,
            "{}",
        ] {
            assert!(apply(json).is_ok(), "{json}");
        }
    }
}
