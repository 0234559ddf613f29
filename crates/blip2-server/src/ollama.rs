//! The interface of Ollama, as its clients speak it: lines of JSON, pictures as base64 beside the text.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use blip2::generate::GenerationConfig;
use blip2::model::Answer;
use serde::de::Unexpected;
use serde::{Deserialize, Deserializer};
use serde_json::{Number, Value, json};

use crate::answer_form;
use crate::app::{App, Context, unix_seconds};
use crate::body::Memory;
use crate::config::Limits;
use crate::engine::{Token, Written};
use crate::error::{ApiError, Shape};
use crate::generation::{GenerationFields, Manner};
use crate::growing_text::GrowingText;
use crate::json::Json;
use crate::stream::{self, Format};
use crate::wire::{Accepted, Complete, Message, Object, OneOrMany, finish_reason};

#[derive(Debug, Deserialize)]
struct ChatRequest {
    model: Option<String>,
    messages: Vec<Object<ChatMessage>>,
    stream: Option<bool>,
    format: Option<Value>,
    tools: Option<Vec<Value>>,
    options: Option<Object<Options>>,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<String>,
    images: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct GenerateRequest {
    model: Option<String>,
    prompt: Option<String>,
    system: Option<String>,
    images: Option<Vec<String>>,
    stream: Option<bool>,
    format: Option<Value>,
    suffix: Option<String>,
    template: Option<String>,
    raw: Option<bool>,
    options: Option<Object<Options>>,
}

/// Ollama's names of what decides how to write; those of its runner's own (threads, GPU layers) are left alone.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Options {
    temperature: Option<f32>,
    #[serde(deserialize_with = "whole")]
    top_k: Option<i64>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    #[serde(deserialize_with = "whole")]
    seed: Option<i64>,
    #[serde(deserialize_with = "whole")]
    num_predict: Option<i64>,
    stop: Option<OneOrMany<String>>,
    repeat_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    num_beams: Option<usize>,
}

/// A whole number, or nothing; 40.0 is one too: some clients write all numbers so, and Ollama takes them.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    /// Up to here every whole number is one of floating point.
    const LARGEST: f64 = 9_007_199_254_740_992.0;
    let Some(number) = Option::<Number>::deserialize(deserializer)? else { return Ok(None) };
    let of_float = |number: f64| (number.fract() == 0.0 && number.abs() <= LARGEST).then_some(number as i64);
    let whole = number.as_i64().or_else(|| number.as_f64().and_then(of_float));
    let invalid = || {
        let found = Unexpected::Float(number.as_f64().unwrap_or(f64::INFINITY));
        serde::de::Error::invalid_type(found, &"a whole number")
    };
    whole.map(Some).ok_or_else(invalid)
}

impl Options {
    fn generation(&self, own: &GenerationConfig, limits: &Limits) -> Result<GenerationConfig, ApiError> {
        let stop = self.stop.as_ref().map(|stop| stop.as_slice().to_vec());
        let fields = json!({
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "seed": self.seed, "stop": stop, "num_beams": self.num_beams,
            "repetition_penalty": self.repeat_penalty, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        });
        let fields: GenerationFields = serde_json::from_value(fields).map_err(|_| ApiError::internal())?;
        let mut base = GenerationFields::for_chat(own, limits);
        // A bound and no order: beyond what there is, and at 0 or below, it is as much as there is.
        if let Some(n) = self.num_predict {
            let bound = usize::try_from(n).ok().filter(|n| *n > 0);
            base.max_new_tokens = bound.unwrap_or(limits.tokens).min(limits.tokens);
        }
        Ok(fields.apply(base, limits)?.generation)
    }
}

fn refuse(name: &str, is_given: bool) -> Result<(), ApiError> {
    if is_given {
        return Err(ApiError::unsupported(name, format!("{name} is not supported here")));
    }
    Ok(())
}

pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(context): Extension<Context>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.body(request).await?;
    let asked: ChatRequest = body.json()?;
    let memory = body.understood();
    refuse("tools", asked.tools.is_some_and(|tools| !tools.is_empty()))?;
    let ask = Ask {
        model: asked.model,
        messages: asked
            .messages
            .into_iter()
            .map(|Object(message)| Message {
                role: message.role,
                text: message.content.unwrap_or_default(),
                pictures: message.images.unwrap_or_default(),
            })
            .collect(),
        format: asked.format,
        options: asked.options.map(|Object(options)| options).unwrap_or_default(),
        stream: asked.stream,
        is_chat: true,
    };
    respond(&app, &context, ask, memory).await
}

pub(crate) async fn generate(
    State(app): State<Arc<App>>,
    Extension(context): Extension<Context>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.body(request).await?;
    let asked: GenerateRequest = body.json()?;
    let memory = body.understood();
    refuse("raw", asked.raw == Some(true))?;
    refuse("suffix", asked.suffix.is_some_and(|suffix| !suffix.is_empty()))?;
    refuse("template", asked.template.is_some_and(|template| !template.is_empty()))?;
    let pictures = asked.images.unwrap_or_default();
    let mut messages = Vec::new();
    let prompt = asked.prompt.unwrap_or_default();
    if !prompt.is_empty() || !pictures.is_empty() {
        let system = asked.system.filter(|system| !system.is_empty());
        messages.extend(system.map(|text| Message { role: "system".into(), text, pictures: Vec::new() }));
        messages.push(Message { role: "user".into(), text: prompt, pictures });
    }
    let ask = Ask {
        model: asked.model,
        messages,
        format: asked.format,
        options: asked.options.map(|Object(options)| options).unwrap_or_default(),
        stream: asked.stream,
        is_chat: false,
    };
    respond(&app, &context, ask, memory).await
}

/// What both ways of asking have in common.
struct Ask {
    model: Option<String>,
    /// None: whether the model is there.
    messages: Vec<Message>,
    format: Option<Value>,
    options: Options,
    stream: Option<bool>,
    is_chat: bool,
}

async fn respond(app: &Arc<App>, context: &Context, ask: Ask, memory: Memory) -> Result<Response, ApiError> {
    let start = Instant::now();
    let Ask { model, messages, format, options, stream, is_chat } = ask;
    app.check_model(model.as_deref())?;
    let (limits, form) = (&app.config.limits, answer_form::of_ollama(format.as_ref())?);
    let line = Line { app, is_chat };
    if messages.is_empty() {
        options.generation(app.own_answering()?, limits)?;
        return Ok(Json(line.loaded()).into_response());
    }
    let dialogue = app.dialogue(messages)?;
    let manner = Manner { generation: options.generation(app.own_manner(&dialogue)?, limits)?, form };
    let mut accepted = app.converse(dialogue, manner, 0, memory).await?;
    if stream != Some(false) {
        let Accepted { events, generation, n_prompt, .. } = accepted;
        let growing = GrowingText::new(&generation.stop_strings);
        let lines = Lines { app: app.clone(), is_chat, n_prompt, growing, start, first: None };
        return Ok(stream::response(events, lines, context));
    }
    let Complete { answers, first, .. } = accepted.complete().await?;
    let mut growing = GrowingText::new(&accepted.generation.stop_strings);
    let Some(answer) = answers.first() else { return Err(ApiError::internal()) };
    let text = growing.finish(&answer.text).to_owned();
    Ok(Json(line.last(&text, answer, accepted.n_prompt, start, first)).into_response())
}

/// How a line of a response is written.
struct Line<'a> {
    app: &'a App,
    is_chat: bool,
}

impl Line<'_> {
    fn of(&self, text: &str) -> Value {
        let mut line =
            json!({"model": self.app.name, "created_at": rfc3339(SystemTime::now()), "done": false});
        if self.is_chat {
            line["message"] = json!({"role": "assistant", "content": text});
        } else {
            line["response"] = text.into();
        }
        line
    }

    /// The end of an answer that began at `start` and whose first token came at `first`; of beams, which come all at once,
    /// no time is told apart.
    fn last(
        &self,
        text: &str,
        answer: &Answer,
        n_prompt: usize,
        start: Instant,
        first: Option<Instant>,
    ) -> Value {
        let (first, end) = (first.unwrap_or(start), Instant::now());
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let mut line = self.of(text);
        line["done"] = true.into();
        line["done_reason"] = finish_reason(answer.finish).into();
        line["total_duration"] = nanoseconds(end - start).into();
        line["load_duration"] = 0.into();
        line["prompt_eval_count"] = n_prompt.into();
        line["prompt_eval_duration"] = nanoseconds(first - start).into();
        line["eval_count"] = answer.token_ids.len().into();
        line["eval_duration"] = nanoseconds(end - first).into();
        line
    }

    /// The answer to a request that asks for nothing: the model is there.
    fn loaded(&self) -> Value {
        let mut line = self.of("");
        line["done"] = true.into();
        line["done_reason"] = "load".into();
        line
    }
}

/// Lines of JSON.
struct Lines {
    app: Arc<App>,
    is_chat: bool,
    n_prompt: usize,
    growing: GrowingText,
    start: Instant,
    first: Option<Instant>,
}

impl Format for Lines {
    const MEDIA_TYPE: &'static str = "application/x-ndjson";
    const PING: Option<&'static str> = None;

    fn begin(&mut self) -> String {
        String::new()
    }

    fn token(&mut self, token: Token) -> String {
        self.first.get_or_insert_with(Instant::now);
        let text = self.growing.push(&token.text);
        if text.is_empty() {
            return String::new();
        }
        format!("{}\n", Line { app: &self.app, is_chat: self.is_chat }.of(text))
    }

    fn done(&mut self, written: Written) -> String {
        let Some(answer) = written.answers.first() else { return self.failed(&ApiError::internal()) };
        let line = Line { app: &self.app, is_chat: self.is_chat };
        let rest = self.growing.finish(&answer.text);
        let rest = if rest.is_empty() { String::new() } else { format!("{}\n", line.of(rest)) };
        format!("{rest}{}\n", line.last("", answer, self.n_prompt, self.start, self.first))
    }

    fn failed(&mut self, error: &ApiError) -> String {
        format!("{}\n", error.json(Shape::Ollama))
    }
}

#[derive(Debug, Deserialize)]
struct EmbedRequest {
    model: Option<String>,
    input: OneOrMany<String>,
    dimensions: Option<usize>,
}

pub(crate) async fn embed(State(app): State<Arc<App>>, request: Request) -> Result<Json, ApiError> {
    let start = Instant::now();
    let body = app.body(request).await?;
    let asked: EmbedRequest = body.json()?;
    app.check_model(asked.model.as_deref())?;
    app.check_dimensions(asked.dimensions)?;
    let texts = match asked.input {
        OneOrMany::One(text) if text.is_empty() => Vec::new(),
        input => input.into_vec(),
    };
    // Nothing is how clients see to it that the model is there.
    let (vectors, n_tokens) = if texts.is_empty() { (Vec::new(), 0) } else { app.embed_texts(texts).await? };
    Ok(Json(json!({
        "model": app.name,
        "embeddings": vectors,
        "total_duration": u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
        "load_duration": 0,
        "prompt_eval_count": n_tokens,
    })))
}

#[derive(Debug, Deserialize)]
struct EmbeddingsRequest {
    model: Option<String>,
    prompt: Option<String>,
}

/// The older way to ask, for one text.
pub(crate) async fn embeddings(State(app): State<Arc<App>>, request: Request) -> Result<Json, ApiError> {
    let body = app.body(request).await?;
    let asked: EmbeddingsRequest = body.json()?;
    app.check_model(asked.model.as_deref())?;
    let prompt = asked.prompt.filter(|prompt| !prompt.is_empty());
    let Some(prompt) = prompt else { return Ok(Json(json!({"embedding": []}))) };
    let (mut vectors, _) = app.embed_texts(vec![prompt]).await?;
    Ok(Json(json!({"embedding": vectors.pop()})))
}

pub(crate) async fn tags(State(app): State<Arc<App>>) -> Json {
    let mut model = describe(&app);
    model["modified_at"] = rfc3339(app.started).into();
    Json(json!({"models": [model]}))
}

/// What is in memory: the one model, as long as the server runs, whatever `keep_alive` a request has.
pub(crate) async fn running(State(app): State<Arc<App>>) -> Json {
    let mut model = describe(&app);
    model["expires_at"] = "9999-12-31T23:59:59Z".into();
    model["size_vram"] = 0.into();
    model["context_length"] = context_length(&app).into();
    Json(json!({"models": [model]}))
}

fn describe(app: &App) -> Value {
    let size = app.model.language_model().map_or(0, blip2::language::LanguageModel::n_bytes);
    json!({"name": app.name, "model": app.name, "size": size, "digest": digest(app), "details": details(app)})
}

fn context_length(app: &App) -> Option<usize> {
    app.model.language_model().map(blip2::language::LanguageModel::context_len)
}

#[derive(Debug, Deserialize)]
struct ShowRequest {
    #[serde(alias = "name")]
    model: Option<String>,
}

pub(crate) async fn show(State(app): State<Arc<App>>, request: Request) -> Result<Json, ApiError> {
    let body = app.body(request).await?;
    let asked: ShowRequest = body.json()?;
    app.check_model(asked.model.as_deref())?;
    let mut capabilities = Vec::new();
    if app.model.language_model().is_some() {
        capabilities.extend(["completion", "vision"]);
    }
    if app.model.matcher().is_some() {
        capabilities.push("embedding");
    }
    let width = app.model.config().qformer.image_text_hidden_size;
    Ok(Json(json!({
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": details(&app),
        "model_info": {
            "general.architecture": "blip2",
            "general.basename": app.model.config().name,
            "general.parameter_count": app.model.n_parameters(),
            "blip2.context_length": context_length(&app),
            "blip2.embedding_length": width,
        },
        "capabilities": capabilities,
        "modified_at": rfc3339(app.started),
    })))
}

pub(crate) async fn version() -> Json {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

fn details(app: &App) -> Value {
    json!({
        "parent_model": "", "format": "safetensors", "family": "blip2", "families": ["blip2"],
        "parameter_size": format!("{}M", app.model.n_parameters() / 1_000_000), "quantization_level": "",
    })
}

/// Says which encoder this is; there is no file whose digest it could be.
fn digest(app: &App) -> String {
    let fingerprint = app.model.vision().map_or("", |vision| vision.fingerprint());
    blip2::weights::sha256(format!("{}\0{fingerprint}", app.name).as_bytes())
}

/// A time as `2026-11-25T14:05:09Z`.
fn rfc3339(time: SystemTime) -> String {
    let seconds = unix_seconds(time);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Civil date of a day number: eras of 400 years that begin on the first of March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_795_615_509, "2026-11-25T14:05:09Z"),
        ] {
            assert_eq!(rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
