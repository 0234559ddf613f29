//! The characters that a vocabulary can write: T5's SentencePiece lacks the braces of a JSON object.

use std::collections::BTreeSet;

use regex_syntax::hir::{Hir, HirKind};
use serde_json::{Value as Json, json};

/// The characters that can be written one by one. A form is held to them before a text begins: else it could lead to where
/// nothing can come next.
#[derive(Debug)]
pub(super) struct Alphabet(BTreeSet<char>);

impl Alphabet {
    /// The characters of a vocabulary; `None` where every byte is a token, so that all can be written.
    pub(super) fn of<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let (mut bytes, mut characters) = ([false; 256], BTreeSet::new());
        for token in tokens {
            if let [byte] = *token {
                bytes[usize::from(byte)] = true;
            }
            if let Ok(text) = std::str::from_utf8(token) {
                let mut all = text.chars();
                characters.extend(all.next().filter(|_| all.next().is_none()));
            }
        }
        // UTF-8 has no other bytes.
        if (0..=0xbf).chain(0xc2..=0xf4).all(|byte: usize| bytes[byte]) {
            return None;
        }
        if bytes[0x80..].contains(&true) {
            let is_spelled =
                |c: &char| c.encode_utf8(&mut [0; 4]).bytes().all(|byte| bytes[usize::from(byte)]);
            characters.extend(('\0'..=char::MAX).filter(is_spelled));
        }
        Some(Self(characters))
    }

    /// The first character of `text` that cannot be written.
    pub(super) fn missing(&self, text: &str) -> Option<char> {
        text.chars().find(|c| !self.0.contains(c))
    }

    /// The first character that every match of `pattern` has and that cannot be written.
    pub(super) fn missing_of_pattern(&self, pattern: &str) -> Option<char> {
        self.missing_of_hir(&regex_syntax::parse(pattern).ok()?)
    }

    fn missing_of_hir(&self, pattern: &Hir) -> Option<char> {
        match pattern.kind() {
            HirKind::Literal(literal) => self.missing(std::str::from_utf8(&literal.0).ok()?),
            HirKind::Capture(capture) => self.missing_of_hir(&capture.sub),
            HirKind::Repetition(repetition) if repetition.min > 0 => self.missing_of_hir(&repetition.sub),
            HirKind::Concat(parts) => parts.iter().find_map(|part| self.missing_of_hir(part)),
            HirKind::Alternation(parts) => {
                // The first says which, where each lacks one.
                let missing: Option<Vec<_>> = parts.iter().map(|part| self.missing_of_hir(part)).collect();
                missing?.first().copied()
            }
            _ => None,
        }
    }

    /// A pattern of all texts that can be written.
    pub(super) fn pattern(&self) -> String {
        class(self.0.iter().copied())
    }

    /// Takes out of a schema what cannot be written, and gives the first character that it would need; a part of which nothing
    /// is left becomes `false`. What does not name its kind is left: something of another kind can be written in its place.
    pub(super) fn restrict_schema(&self, schema: &mut Json) -> Option<char> {
        let Json::Object(fields) = schema else { return None };
        let mut missing = None;
        for (name, value) in fields.iter_mut() {
            let found = match (name.as_str(), value) {
                ("properties", Json::Object(properties)) => {
                    let restrict = |(name, schema): (&String, &mut Json)| {
                        let lacks = self.missing(&json!(name).to_string());
                        if lacks.is_some() {
                            *schema = Json::Bool(false);
                        }
                        lacks.or_else(|| self.restrict_schema(schema))
                    };
                    first(properties.iter_mut().map(restrict))
                }
                ("patternProperties" | "$defs" | "definitions", Json::Object(schemas)) => {
                    first(schemas.values_mut().map(|schema| self.restrict_schema(schema)))
                }
                ("allOf" | "anyOf" | "oneOf" | "prefixItems" | "items", Json::Array(schemas)) => {
                    first(schemas.iter_mut().map(|schema| self.restrict_schema(schema)))
                }
                ("items" | "additionalItems" | "additionalProperties", schema) => {
                    self.restrict_schema(schema)
                }
                _ => None,
            };
            missing = missing.or(found);
        }
        let mut nothing_left = false;
        for (name, needs) in [("type", type_needs as fn(&Json) -> String), ("enum", Json::to_string)] {
            let Some(value) = fields.get_mut(name) else { continue };
            let given = match value {
                Json::Array(values) => std::mem::take(values),
                Json::String(_) if name == "type" => vec![value.take()],
                _ => continue, // refused by the compiler
            };
            let lacks = |value: &Json| self.missing(&needs(value));
            missing = missing.or_else(|| given.iter().find_map(lacks));
            let mut left: Vec<_> = given.into_iter().filter(|value| lacks(value).is_none()).collect();
            nothing_left |= left.is_empty();
            *value = if name == "type" && left.len() == 1 { left.remove(0) } else { Json::Array(left) };
        }
        if let Some(lacks) = fields.get("const").and_then(|value| self.missing(&value.to_string())) {
            (missing, nothing_left) = (missing.or(Some(lacks)), true);
        }
        if let Some(pattern) = fields.get("pattern").and_then(Json::as_str) {
            missing = missing.or_else(|| self.missing_of_pattern(pattern));
        }
        if fields.contains_key("pattern") || fields.contains_key("format") {
            // In JSON, some characters need others to be written.
            let is_written = |c: &char| self.missing(&json!(c.to_string()).to_string()).is_none();
            let within =
                json!({"pattern": format!("^{}$", class(self.0.iter().copied().filter(is_written)))});
            match fields.get_mut("allOf") {
                Some(Json::Array(schemas)) => schemas.push(within),
                Some(_) => {} // refused by the compiler
                None => {
                    fields.insert("allOf".into(), json!([within]));
                }
            }
        }
        if nothing_left {
            *schema = Json::Bool(false);
        }
        missing
    }
}

/// What a value of a type cannot do without.
fn type_needs(name: &Json) -> String {
    match name.as_str() {
        Some("object") => "{}",
        Some("array") => "[]",
        Some("string") => "\"",
        Some("boolean") => "truefalse",
        Some("null") => "null",
        _ => "",
    }
    .into()
}

/// The first of what was found. Not `find_map`: every part has to be seen.
fn first(found: impl Iterator<Item = Option<char>>) -> Option<char> {
    found.fold(None, Option::or)
}

/// A pattern of all texts of these characters, which come in order.
fn class(characters: impl Iterator<Item = char>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for c in characters.map(u32::from) {
        match ranges.last_mut() {
            Some((_, end)) if *end + 1 == c => *end = c,
            _ => ranges.push((c, c)),
        }
    }
    if ranges.is_empty() {
        return "(?:)".into();
    }
    let ranges: String = ranges.iter().map(|(from, to)| format!("\\x{{{from:X}}}-\\x{{{to:X}}}")).collect();
    format!("[{ranges}]*")
}
