//! What an answer has to be: one of several, a text of a pattern, JSON of a schema.
//!
//! [`Grammars`] knows the bytes of every token of a language model; with them it compiles an [`AnswerForm`] to a
//! [`Grammar`], which tells generation before every token which ones may come. The work is that of the crate `llguidance`,
//! with its bounds of time and memory set for outside input.

mod alphabet;

use std::collections::BTreeSet;
use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory, regex_to_lark};
use serde_json::{Value as Json, json};

use self::alphabet::Alphabet;
use super::LanguageTokenizer;
use crate::generate::Constraint;
use crate::{Error, Result};

/// What an answer has to be.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerForm {
    /// One of these texts.
    Choice(Vec<String>),
    /// A text that matches this regular expression as a whole, blanks around it aside: without look-around and references.
    Regex(String),
    /// A JSON object, whatever is in it.
    JsonObject,
    /// JSON that fits this schema, written without line breaks. Keywords that cannot be kept to are refused.
    JsonSchema(Json),
}

impl AnswerForm {
    /// Bytes of a schema or a pattern, or of all texts to choose from.
    pub const MAX_BYTES: usize = 64 << 10;

    fn n_bytes(&self) -> usize {
        match self {
            Self::Choice(choices) => choices.iter().map(|choice| choice.len() + 1).sum(),
            Self::Regex(pattern) => pattern.len(),
            Self::JsonObject => 0,
            Self::JsonSchema(schema) => schema.to_string().len(),
        }
    }

    /// Refuses what no model could keep to. It costs nothing and needs no vocabulary: what [`Grammars::compile`] refuses beyond
    /// it takes one.
    ///
    /// # Errors
    /// [`Error::AnswerForm`] when it is too long, a choice is missing or empty, or the pattern is none.
    pub fn check(&self) -> Result<()> {
        let (n_bytes, limit) = (self.n_bytes(), Self::MAX_BYTES);
        if n_bytes > limit {
            return Err(refuse(format!("the form of the answer has {n_bytes} bytes, the limit is {limit}")));
        }
        match self {
            Self::Choice(choices)
                if choices.is_empty() || choices.iter().any(|choice| choice.trim().is_empty()) =>
            {
                Err(refuse("there is no answer to choose from, or one is empty"))
            }
            Self::Regex(pattern) => check_regex(pattern),
            Self::Choice(_) | Self::JsonObject | Self::JsonSchema(_) => Ok(()),
        }
    }
}

/// The vocabulary of a language model, ready for grammars.
pub struct Grammars {
    factory: ParserFactory,
    end_tokens: Arc<[u32]>,
    /// What comes before every answer that is not JSON.
    blank: &'static str,
    /// Whether it comes before JSON too: every text of this tokenizer begins with one.
    always_blank: bool,
    /// What the tokenizer can write, where that is not everything.
    alphabet: Option<Alphabet>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("end_tokens", &self.end_tokens).finish_non_exhaustive()
    }
}

/// What a compilation and a step may cost. A state of the lexer takes up to 2 kB, so a text's grammar takes at most 10 MB; a
/// step takes some milliseconds at most. JSON schemas of ordinary programs need a hundredth of it.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 1000,
    initial_lexer_fuel: 500_000,
    step_lexer_fuel: 100_000,
    step_max_items: 50_000,
    max_lexer_states: 5_000,
    max_grammar_size: 50_000,
    precompute_large_lexemes: false,
    verbose_errors: false,
};

impl Grammars {
    /// The vocabulary of `tokenizer`; a text ends with any of `end_tokens`, and begins with a blank where the prompt leaves that
    /// to the answer: both ways to begin would be two texts that look alike. Every text of T5's tokenizer begins with one.
    ///
    /// # Errors
    /// [`Error::AnswerForm`] when the bytes of its tokens are not known, or there is no end token.
    pub fn new(tokenizer: &LanguageTokenizer, end_tokens: &[u32], begins_with_blank: bool) -> Result<Self> {
        let words: Option<Vec<Vec<u8>>> = (0..tokenizer.n_tokens() as u32)
            .map(|id| {
                // What stands for no text has no bytes.
                let is_text = !tokenizer.is_control(id) && !end_tokens.contains(&id);
                if is_text { tokenizer.token_bytes(id).map(<[u8]>::to_vec) } else { Some(Vec::new()) }
            })
            .collect();
        let words = words.ok_or_else(|| {
            refuse(
                "the form of an answer needs a byte-level or SentencePiece tokenizer, this model has another",
            )
        })?;
        let [first, ..] = *end_tokens else {
            return Err(refuse("this model has no token that ends an answer"));
        };
        if end_tokens.iter().any(|&id| id as usize >= words.len()) {
            return Err(refuse("the token that ends an answer is not in this model's tokenizer"));
        }
        let info = TokRxInfo::new(words.len() as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(end_tokens);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).map_err(unusable)?;
        factory.quiet();
        *factory.limits_mut() = LIMITS;
        let always_blank = tokenizer.begins_texts_with_blank();
        let blank = if begins_with_blank || always_blank { " " } else { "" };
        // Where an end token is a text too, other tokens have its characters.
        let texts = (0..words.len() as u32).filter(|&id| !tokenizer.is_control(id));
        let alphabet = Alphabet::of(texts.filter_map(|id| tokenizer.token_bytes(id)));
        Ok(Self { factory, end_tokens: end_tokens.into(), blank, always_blank, alphabet })
    }

    fn text(&self, pattern: &str) -> TopLevelGrammar {
        let pattern = format!("{}(?:{pattern})", self.blank);
        match &self.alphabet {
            None => TopLevelGrammar::from_regex(&pattern),
            Some(alphabet) => {
                let [pattern, within] = [pattern, alphabet.pattern()].map(|text| regex_to_lark(&text, ""));
                TopLevelGrammar::from_lark(format!("start: TEXT\nTEXT: /{pattern}/ & /{within}/"))
            }
        }
    }

    fn json(&self, schema: Json) -> Result<TopLevelGrammar> {
        let mut schema = on_one_line(schema)?;
        let missing = self.alphabet.as_ref().and_then(|alphabet| alphabet.restrict_schema(&mut schema));
        // `false` is all that is left of a schema of which nothing can be written.
        if let (false, Some(missing)) = (schema.is_object(), missing) {
            return Err(refuse(format!("the JSON schema cannot be followed: {}", cannot_write(missing))));
        }
        Ok(if self.always_blank {
            TopLevelGrammar::from_lark(format!("start: \" \" json\njson: %json {schema}"))
        } else {
            TopLevelGrammar::from_json_schema(schema)
        })
    }

    /// A character that a form would need and that cannot be written.
    fn missing(&self, form: &AnswerForm) -> Option<char> {
        let alphabet = self.alphabet.as_ref()?;
        match form {
            AnswerForm::Choice(choices) => choices.iter().find_map(|choice| alphabet.missing(choice.trim())),
            AnswerForm::Regex(pattern) => alphabet.missing_of_pattern(unanchored(pattern)),
            AnswerForm::JsonObject => alphabet.missing("{}"),
            AnswerForm::JsonSchema(schema) => alphabet.restrict_schema(&mut schema.clone()),
        }
    }

    /// Compiles what an answer has to be.
    ///
    /// # Errors
    /// [`Error::AnswerForm`] when it contradicts itself, is not understood, takes too much to compile, or needs a character that
    /// the tokenizer cannot write.
    pub fn compile(&self, form: &AnswerForm) -> Result<Grammar> {
        form.check()?;
        let (what, grammar) = match form {
            AnswerForm::Choice(choices) => {
                if let Some(missing) = self.missing(form) {
                    let reason = cannot_write(missing);
                    return Err(refuse(format!("the list of answers cannot be followed: {reason}")));
                }
                let escaped: Vec<_> = choices.iter().map(|choice| escape(choice.trim())).collect();
                ("the list of answers", self.text(&escaped.join("|")))
            }
            AnswerForm::Regex(pattern) => ("the regular expression", self.text(unanchored(pattern))),
            AnswerForm::JsonObject => ("the JSON object", self.json(json!({"type": "object"}))?),
            AnswerForm::JsonSchema(schema) => ("the JSON schema", self.json(schema.clone())?),
        };
        let refused = |error: &dyn std::fmt::Display| {
            let reason = match (form, self.missing(form)) {
                (AnswerForm::JsonObject | AnswerForm::JsonSchema(_), missing) => {
                    let also = missing.map(|missing| format!("; {}", cannot_write(missing)));
                    in_short(&error.to_string()) + &also.unwrap_or_default()
                }
                (_, Some(missing)) => cannot_write(missing),
                // The compiler repeats all of it.
                (AnswerForm::Choice(_) | AnswerForm::Regex(_), None) => {
                    "it is too large, or has parts that are not supported (assertions, lazy repetition)"
                        .into()
                }
            };
            refuse(format!("{what} cannot be followed: {reason}"))
        };
        // The compilers recurse, and a mistake in them is this request's alone.
        let compile = || {
            let mut matcher = Matcher::new(self.factory.create_parser(grammar));
            // A first step, so that what no text can fit is said now.
            matcher.compute_mask().map(|_| matcher)
        };
        let matcher = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(compile));
        Ok(Grammar {
            matcher: matcher.map_err(|error| refused(&error))?,
            end_tokens: self.end_tokens.clone(),
        })
    }
}

/// An [`AnswerForm`] in the middle of a text.
pub struct Grammar {
    matcher: Matcher,
    end_tokens: Arc<[u32]>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Constraint for Grammar {
    fn restrict(&mut self, scores: &mut [f32]) -> Result<()> {
        let mask = self.matcher.compute_mask_or_eos().map_err(unusable)?;
        for (token, score) in scores.iter_mut().enumerate() {
            // The model may have more tokens than the tokenizer: they mean nothing.
            if token >= mask.len() || !mask.get(token) {
                *score = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn push(&mut self, token: u32) -> Result<()> {
        if self.end_tokens.contains(&token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(unusable)
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self { matcher: self.matcher.clone(), end_tokens: self.end_tokens.clone() })
    }
}

fn refuse(reason: impl Into<String>) -> Error {
    Error::AnswerForm(reason.into())
}

fn cannot_write(missing: char) -> String {
    format!("this model's tokenizer cannot write `{missing}`")
}

fn unusable(error: impl std::fmt::Display) -> Error {
    refuse(format!("the form of the answer cannot be kept to: {}", in_short(&error.to_string())))
}

/// The first line of a compiler's message: what comes after it is about the compiler. Where that line is about the compiler
/// too, what it means for a schema.
fn in_short(message: &str) -> String {
    const LONGEST: usize = 200;
    const MEANINGS: [(&str, &str); 3] = [
        ("oneOf constraints", "oneOf is not supported where several of its schemas may fit: use anyOf"),
        ("Only absolute $ref", "a $ref names something outside of it"),
        ("NoExtensionBias", "no text fits it"),
    ];
    let line = message.lines().next().unwrap_or_default().trim();
    if line.is_empty() || line.starts_with("panic") {
        return "it is too large or too deep".into();
    }
    if let Some((_, meaning)) = MEANINGS.iter().find(|(beginning, _)| line.starts_with(beginning)) {
        return (*meaning).into();
    }
    // A pattern's own error comes last, after the pattern with a mark below it.
    let of_pattern = message.lines().find_map(|line| line.trim().strip_prefix("error: "));
    match of_pattern.filter(|_| line.contains("regex parse error")) {
        Some(reason) => format!("a pattern in it: {}", reason.chars().take(LONGEST).collect::<String>()),
        None => line.chars().take(LONGEST).collect(),
    }
}

/// Refuses what is no regular expression, or one that is nested deeply, in the words of those who know.
fn check_regex(pattern: &str) -> Result<()> {
    match regex_syntax::ast::parse::Parser::new().parse(pattern) {
        Ok(_) => Ok(()),
        Err(error) => Err(refuse(format!("the regular expression cannot be followed: {}", error.kind()))),
    }
}

/// Without the marks of beginning and end, which a whole match has anyway.
fn unanchored(pattern: &str) -> &str {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    match pattern.strip_suffix('$') {
        Some(rest) if rest.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 0 => rest,
        _ => pattern,
    }
}

/// A pattern that matches `text` and nothing else.
fn escape(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii_punctuation() {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern
}

/// Refuses `multipleOf` of many digits: the compiler counts with a state for every remainder, of numbers that have to be
/// multiples of several for all remainders of all of them, and has no other bound on that.
fn check_divisors(schema: &Json) -> Result<()> {
    const MAX_REMAINDERS: u64 = 10_000;
    let (mut divisors, mut rest) = (BTreeSet::new(), vec![schema]);
    while let Some(value) = rest.pop() {
        match value {
            Json::Object(fields) => {
                // 0.25 is counted in steps of 25.
                if let Some(Json::Number(step)) = fields.get("multipleOf") {
                    let step = step.to_string().replace('.', "");
                    divisors.insert(step.parse::<u64>().unwrap_or(u64::MAX).max(1));
                }
                rest.extend(fields.values());
            }
            Json::Array(values) => rest.extend(values),
            _ => {}
        }
    }
    let n_remainders = divisors.iter().fold(1, |n: u64, step| n.saturating_mul(*step));
    if n_remainders > MAX_REMAINDERS {
        return Err(refuse("the JSON schema cannot be followed: its multipleOf have too many digits"));
    }
    Ok(())
}

/// A schema with the white space that is left to choose decided: small models do not find out of it again.
fn on_one_line(schema: Json) -> Result<Json> {
    let mut schema = match schema {
        Json::Bool(true) => json!({}),
        Json::Object(_) => schema,
        _ => return Err(refuse("the JSON schema is not an object")),
    };
    check_divisors(&schema)?;
    JsonCompileOptions {
        whitespace_flexible: false,
        item_separator: ", ".into(),
        key_separator: ": ".into(),
        ..JsonCompileOptions::default()
    }
    .apply_to(&mut schema);
    Ok(schema)
}
