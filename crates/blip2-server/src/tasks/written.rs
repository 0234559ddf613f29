//! Captions and answers that are written: whole, or as they grow.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use blip2::model::Answer;
use serde_json::{Value, json};

use crate::app::{App, Context};
use crate::engine::{Token, Written};
use crate::error::{ApiError, Shape};
use crate::growing_text::GrowingText;
use crate::json::Json;
use crate::stream::{self, EVENTS, EVENTS_END, EVENTS_PING, Format, event};
use crate::wire::{Accepted, Complete, finish_reason};

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Caption,
    Answer,
}

impl Kind {
    /// The whole response.
    fn whole(self, app: &App, answers: &[Answer], stop: &[String]) -> Value {
        let row = |answer: &Answer| {
            let log_likelihood: f32 = answer.log_probs.iter().sum();
            json!({"text": GrowingText::new(stop).finish(&answer.text), "log_likelihood": log_likelihood,
                "n_tokens": answer.token_ids.len(), "finish_reason": finish_reason(answer.finish)})
        };
        let rows: Vec<Value> = answers.iter().map(row).collect();
        match self {
            Self::Caption => json!({"object": "caption", "model": app.name, "captions": rows}),
            Self::Answer => json!({"object": "vqa", "model": app.name, "answers": rows}),
        }
    }

    /// A piece of a text.
    fn piece(self, app: &App, index: usize, text: &str) -> Value {
        let object = match self {
            Self::Caption => "caption.chunk",
            Self::Answer => "vqa.chunk",
        };
        json!({"object": object, "model": app.name, "index": index, "text": text})
    }
}

/// Answers with what is written, as the client wants it.
pub(super) async fn respond(
    app: &Arc<App>,
    context: &Context,
    mut accepted: Accepted,
    kind: Kind,
    stream: Option<bool>,
) -> Result<Response, ApiError> {
    if stream == Some(true) {
        let Accepted { events, generation, .. } = accepted;
        let stop = generation.stop_strings;
        let growing = (0..generation.num_return_sequences).map(|_| GrowingText::new(&stop)).collect();
        return Ok(stream::response(events, Pieces { app: app.clone(), kind, stop, growing }, context));
    }
    let Complete { answers, .. } = accepted.complete().await?;
    Ok(Json(kind.whole(app, &answers, &accepted.generation.stop_strings)).into_response())
}

/// Server-sent events: pieces of the texts, then the whole response.
struct Pieces {
    app: Arc<App>,
    kind: Kind,
    stop: Vec<String>,
    growing: Vec<GrowingText>,
}

impl Pieces {
    fn event(&self, index: usize, text: &str) -> String {
        if text.is_empty() { String::new() } else { event(&self.kind.piece(&self.app, index, text)) }
    }
}

impl Format for Pieces {
    const MEDIA_TYPE: &'static str = EVENTS;
    const PING: Option<&'static str> = EVENTS_PING;

    fn begin(&mut self) -> String {
        String::new()
    }

    fn token(&mut self, token: Token) -> String {
        let Some(growing) = self.growing.get_mut(token.sequence) else { return String::new() };
        let text = growing.push(&token.text).to_owned();
        self.event(token.sequence, &text)
    }

    fn done(&mut self, written: Written) -> String {
        let mut out = String::new();
        for (index, answer) in written.answers.iter().enumerate() {
            let Some(growing) = self.growing.get_mut(index) else { continue };
            let rest = growing.finish(&answer.text).to_owned();
            out += &self.event(index, &rest);
        }
        out + &event(&self.kind.whole(&self.app, &written.answers, &self.stop)) + EVENTS_END
    }

    fn failed(&mut self, error: &ApiError) -> String {
        event(&error.json(Shape::OpenAi))
    }
}
