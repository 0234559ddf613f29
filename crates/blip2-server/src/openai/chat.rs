//! `/v1/chat/completions`: a conversation about a picture, whole or as it grows.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use blip2::model::Answer;
use blip2::text::LanguageTokenizer;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::{App, Context, unix_seconds};
use crate::engine::{Token, Written};
use crate::error::{ApiError, Shape};
use crate::generation::GenerationFields;
use crate::growing_text::GrowingText;
use crate::json::Json;
use crate::stream::{self, EVENTS, EVENTS_END, EVENTS_PING, Format, event};
use crate::wire::{Accepted, Complete, ImageField, Message, Object, finish_reason};

/// What a request says besides how to write ([`GenerationFields`]).
#[derive(Debug, Deserialize)]
struct ChatRequest {
    model: Option<String>,
    messages: Vec<Object<ChatMessage>>,
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of parts, each an object with its type")]
enum Content {
    Text(String),
    Parts(Vec<Object<Part>>),
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
    image_url: Option<ImageField>,
}

impl TryFrom<ChatMessage> for Message {
    type Error = ApiError;

    fn try_from(message: ChatMessage) -> Result<Self, ApiError> {
        let mut said = Self { role: message.role, ..Self::default() };
        match message.content {
            None => {}
            Some(Content::Text(text)) => said.text = text,
            Some(Content::Parts(parts)) => {
                let mut texts = Vec::new();
                for Object(part) in parts {
                    match (part.r#type.as_str(), part.text, part.image_url) {
                        ("text" | "input_text" | "output_text", Some(text), _) => texts.push(text),
                        ("image_url" | "input_image", _, Some(image)) => {
                            said.pictures.push(image.into_text())
                        }
                        (kind, ..) => {
                            let kind: String = kind.chars().take(40).collect();
                            let message = format!(
                                "a part of the type `{kind}` is not known or lacks its content: expected \
                                 {{\"type\": \"text\", \"text\": …}} or {{\"type\": \"image_url\", \"image_url\": \
                                 {{\"url\": …}}}}"
                            );
                            return Err(ApiError::invalid("messages", message));
                        }
                    }
                }
                said.text = texts.join("\n");
            }
        }
        Ok(said)
    }
}

pub(crate) async fn complete(
    State(app): State<Arc<App>>,
    Extension(context): Extension<Context>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.body(request).await?;
    let asked: ChatRequest = body.json()?;
    let fields: GenerationFields = body.json()?;
    let memory = body.understood();
    app.check_model(asked.model.as_deref())?;
    let limits = &app.config.limits;
    let messages = asked.messages.into_iter().map(|Object(message)| Message::try_from(message));
    let dialogue = app.dialogue(messages.collect::<Result<Vec<_>, _>>()?)?;
    let manner = fields.apply(GenerationFields::for_chat(app.own_manner(&dialogue)?, limits), limits)?;
    let log_probs = LogProbs::new(asked.logprobs, asked.top_logprobs, manner.generation.num_beams)?;
    let mut accepted = app.converse(dialogue, manner, log_probs.top, memory).await?;
    let head = Head {
        id: format!("chatcmpl-{}", context.id),
        created: unix_seconds(std::time::SystemTime::now()),
        app,
    };
    if asked.stream == Some(true) {
        let with_usage = asked.stream_options.and_then(|Object(options)| options.include_usage) == Some(true);
        let Accepted { events, generation, n_prompt, n_image } = accepted;
        let growing =
            (0..generation.num_return_sequences).map(|_| GrowingText::new(&generation.stop_strings));
        let stream =
            ChatStream { head, log_probs, with_usage, n_prompt, n_image, growing: growing.collect() };
        return Ok(stream::response(events, stream, &context));
    }
    let Complete { answers, n_cached, tokens, .. } = accepted.complete().await?;
    let usage = usage((accepted.n_prompt, accepted.n_image, n_cached), &answers);
    let choices: Vec<Value> = answers
        .iter()
        .enumerate()
        .map(|(index, answer)| {
            let text = GrowingText::new(&accepted.generation.stop_strings).finish(&answer.text).to_owned();
            let log_probs = if log_probs.wanted {
                head.log_probs(&whole_tokens(&tokens[index], answer))
            } else {
                Value::Null
            };
            json!({
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": log_probs,
                "finish_reason": finish_reason(answer.finish),
            })
        })
        .collect();
    let mut response = head.object("chat.completion");
    response["choices"] = choices.into();
    response["usage"] = usage;
    Ok(Json(response).into_response())
}

/// Which log-probabilities a client wants.
#[derive(Debug, Clone, Copy)]
struct LogProbs {
    wanted: bool,
    top: usize,
}

impl LogProbs {
    fn new(wanted: Option<bool>, top: Option<usize>, num_beams: usize) -> Result<Self, ApiError> {
        let (wanted, top) = (wanted == Some(true), top.unwrap_or(0));
        let invalid = |message: &str| Err(ApiError::invalid("top_logprobs", message));
        match top {
            0 => {}
            1..=20 if !wanted => return invalid("top_logprobs needs \"logprobs\": true"),
            1..=20 if num_beams > 1 => {
                return invalid("top_logprobs is not known of beams: ask for one beam");
            }
            1..=20 => {}
            _ => return invalid("top_logprobs is at most 20"),
        }
        Ok(Self { wanted, top })
    }
}

/// The tokens of an answer; of beams, which come all at once, from the answer itself.
fn whole_tokens(tokens: &[Token], answer: &Answer) -> Vec<Token> {
    if !tokens.is_empty() {
        return tokens.to_vec();
    }
    let pairs = answer.token_ids.iter().zip(&answer.log_probs);
    let token = |(&id, &log_prob)| Token { sequence: 0, id, text: String::new(), log_prob, top: Vec::new() };
    pairs.map(token).collect()
}

/// How many tokens were read (all, those of the picture, those that were remembered) and written.
fn usage((n_prompt, n_image, n_cached): (usize, usize, usize), answers: &[Answer]) -> Value {
    let n_written: usize = answers.iter().map(|answer| answer.token_ids.len()).sum();
    json!({
        "prompt_tokens": n_prompt,
        "completion_tokens": n_written,
        "total_tokens": n_prompt + n_written,
        "prompt_tokens_details": {
            "image_tokens": n_image, "text_tokens": n_prompt - n_image, "cached_tokens": n_cached,
        },
    })
}

/// What every object of a response begins with.
struct Head {
    id: String,
    created: u64,
    app: Arc<App>,
}

impl Head {
    fn object(&self, kind: &str) -> Value {
        json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.app.name,
            "system_fingerprint": concat!("blip2-", env!("CARGO_PKG_VERSION")),
        })
    }

    /// OpenAI's form of tokens with their log-probabilities; marks that stand for no text are left out.
    fn log_probs(&self, tokens: &[Token]) -> Value {
        let Some(tokenizer) = self.app.model.language_tokenizer() else { return Value::Null };
        let content: Vec<Value> = tokens
            .iter()
            .filter(|token| !tokenizer.is_control(token.id))
            .map(|token| {
                let mut entry = log_prob(tokenizer, token.id, token.log_prob);
                let top: Vec<Value> =
                    token.top.iter().map(|&(id, value)| log_prob(tokenizer, id, value)).collect();
                entry["top_logprobs"] = top.into();
                entry
            })
            .collect();
        json!({"content": content, "refusal": null})
    }
}

fn log_prob(tokenizer: &LanguageTokenizer, id: u32, value: f32) -> Value {
    let text = tokenizer.decode(&[id]);
    // Part of a character has no text of its own, and its bytes are not known here.
    let bytes = (!text.contains(char::REPLACEMENT_CHARACTER)).then(|| text.as_bytes().to_vec());
    // Impossible tokens have no finite one, and JSON no infinity.
    json!({"token": text, "logprob": value.max(-9999.0), "bytes": bytes})
}

/// Server-sent events, each a `chat.completion.chunk`.
struct ChatStream {
    head: Head,
    log_probs: LogProbs,
    with_usage: bool,
    n_prompt: usize,
    n_image: usize,
    growing: Vec<GrowingText>,
}

impl ChatStream {
    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = self.head.object("chat.completion.chunk");
        chunk["choices"] = choices;
        if self.with_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&self, index: usize, delta: Value, log_probs: Value, finish: Option<&str>) -> String {
        let choice = json!({"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish});
        event(&self.chunk(json!([choice])))
    }
}

impl Format for ChatStream {
    const MEDIA_TYPE: &'static str = EVENTS;
    const PING: Option<&'static str> = EVENTS_PING;

    fn begin(&mut self) -> String {
        let begin = |index| {
            self.choice(
                index,
                json!({"role": "assistant", "content": "", "refusal": null}),
                Value::Null,
                None,
            )
        };
        (0..self.growing.len()).map(begin).collect()
    }

    fn token(&mut self, token: Token) -> String {
        let Some(growing) = self.growing.get_mut(token.sequence) else { return String::new() };
        let text = growing.push(&token.text).to_owned();
        let log_probs = if self.log_probs.wanted {
            self.head.log_probs(std::slice::from_ref(&token))
        } else {
            Value::Null
        };
        let has_log_probs = log_probs["content"].as_array().is_some_and(|content| !content.is_empty());
        if text.is_empty() && !has_log_probs {
            return String::new();
        }
        self.choice(token.sequence, json!({"content": text}), log_probs, None)
    }

    fn done(&mut self, written: Written) -> String {
        let Written { answers, n_cached } = written;
        let mut out = String::new();
        for (index, answer) in answers.iter().enumerate() {
            let Some(growing) = self.growing.get_mut(index) else { continue };
            let rest = growing.finish(&answer.text).to_owned();
            if !rest.is_empty() {
                out += &self.choice(index, json!({"content": rest}), Value::Null, None);
            }
            out += &self.choice(index, json!({}), Value::Null, Some(finish_reason(answer.finish)));
        }
        if self.with_usage {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage((self.n_prompt, self.n_image, n_cached), &answers);
            out += &event(&chunk);
        }
        out + EVENTS_END
    }

    fn failed(&mut self, error: &ApiError) -> String {
        event(&error.json(Shape::OpenAi))
    }
}
