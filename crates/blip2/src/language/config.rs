//! Which family a `config.json` is of, and how all of them read its fields.

use serde_json::Value as Json;

use super::{LlamaConfig, OptConfig, T5Config};
use crate::{Error, Result};

/// The structure of a language model of any family.
pub(super) enum Config {
    Llama(LlamaConfig),
    Opt(OptConfig),
    T5(T5Config),
}

impl Config {
    /// Reads a Hugging Face `config.json`; its `model_type` names the family, LLaMA where it names none.
    ///
    /// # Errors
    /// [`Error::Config`] when the family is not known, or as the family's own.
    pub(super) fn from_hugging_face(json: &Json) -> Result<Self> {
        match json["model_type"].as_str() {
            Some("llama") | None => LlamaConfig::from_hugging_face(json).map(Self::Llama),
            Some("opt") => OptConfig::from_hugging_face(json).map(Self::Opt),
            Some("t5") => T5Config::from_hugging_face(json).map(Self::T5),
            Some(other) => Err(unsupported("model_type", &other, "llama, opt or t5")),
        }
    }
}

pub(super) fn unsupported(field: &str, found: &dyn std::fmt::Display, expected: &str) -> Error {
    Error::Config { field: format!("language.{field}"), reason: format!("is {found}, expected {expected}") }
}

/// Sizes that a model can have: none is 0, and none so large that memory is spent on a mistake.
pub(super) fn check_sizes(sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| !(1..=1 << 24).contains(size)) {
        Some((field, size)) => Err(unsupported(field, size, "1 to 16777216")),
        None => Ok(()),
    }
}

fn field<'a, T>(
    json: &'a Json,
    name: &str,
    expected: &str,
    convert: impl FnOnce(&'a Json) -> Option<T>,
) -> Result<Option<T>> {
    match &json[name] {
        Json::Null => Ok(None),
        value => convert(value).map(Some).ok_or_else(|| unsupported(name, value, expected)),
    }
}

pub(super) fn text<'a>(json: &'a Json, name: &str) -> Result<Option<&'a str>> {
    field(json, name, "a text", Json::as_str)
}

pub(super) fn number(json: &Json, name: &str) -> Result<Option<f64>> {
    field(json, name, "a number", Json::as_f64)
}

pub(super) fn boolean(json: &Json, name: &str) -> Result<bool> {
    boolean_or(json, name, false)
}

pub(super) fn boolean_or(json: &Json, name: &str, default: bool) -> Result<bool> {
    Ok(field(json, name, "true or false", Json::as_bool)?.unwrap_or(default))
}

pub(super) fn size_or(json: &Json, name: &str, default: usize) -> Result<usize> {
    let convert = |value: &Json| usize::try_from(value.as_u64()?).ok();
    Ok(field(json, name, "a whole number", convert)?.unwrap_or(default))
}

pub(super) fn size(json: &Json, name: &str) -> Result<usize> {
    if json[name].is_null() {
        return Err(unsupported(name, &"missing", "a whole number"));
    }
    size_or(json, name, 0)
}
