//! `/v1/explain`: where the model looked for a text, as numbers that a client lays over the picture.

use std::sync::Arc;

use axum::extract::{Request, State};
use blip2::model::Word;
use blip2::text::Turn;
use serde::Deserialize;
use serde_json::json;

use crate::app::App;
use crate::error::ApiError;
use crate::json::Json;
use crate::wire::{ImageField, Object};

/// The longest text that is explained, with its picture: the slope needs what every layer computed of every token.
const MAX_TOKENS: usize = 512;

#[derive(Debug, Deserialize)]
struct ExplainRequest {
    model: Option<String>,
    image: ImageField,
    text: String,
    question: Option<String>,
    history: Option<Vec<Object<Exchange>>>,
    caption: Option<bool>,
    word: Option<String>,
    occurrence: Option<usize>,
}

/// An earlier question of the conversation, and its answer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exchange {
    question: String,
    answer: String,
}

/// What was done with the text.
enum Told {
    Matched,
    /// As the answer to the last turn, or without turns as a caption; of it a word or all.
    Written {
        turns: Vec<Turn>,
        word: Option<String>,
        occurrence: usize,
    },
}

/// The heat map of a text that was matched with the picture, or written about it.
pub(crate) async fn explain(State(app): State<Arc<App>>, request: Request) -> Result<Json, ApiError> {
    let body = app.body(request).await?;
    let ExplainRequest { model, image, text, question, history, caption, word, occurrence } = body.json()?;
    drop(body);
    let history: Vec<Exchange> = history.unwrap_or_default().into_iter().map(|Object(turn)| turn).collect();
    let told = match (question, caption == Some(true), word) {
        (Some(_), true, _) => {
            let message = "the text is a caption or the answer to a question: leave one of the two out";
            return Err(ApiError::invalid("caption", message));
        }
        (None, false, Some(_)) => {
            let message = "a word is part of a caption or an answer: add \"caption\": true or the question";
            return Err(ApiError::invalid("word", message));
        }
        _ if history.iter().any(|turn| turn.question.trim().is_empty() || turn.answer.trim().is_empty()) => {
            return Err(ApiError::invalid("history", "an earlier question or answer is empty"));
        }
        (None, _, _) if !history.is_empty() => {
            let message = "the history of a conversation comes before a question: add the question";
            return Err(ApiError::invalid("history", message));
        }
        _ if occurrence == Some(0) => {
            return Err(ApiError::invalid("occurrence", "occurrence counts from 1"));
        }
        (None, false, None) => Told::Matched,
        (question, _, word) => {
            let earlier = history.into_iter().map(|turn| Turn::answered(turn.question, turn.answer));
            let turns = earlier.chain(question.map(Turn::open)).collect();
            Told::Written { turns, word, occurrence: occurrence.unwrap_or(1) }
        }
    };
    match &told {
        Told::Matched => app.check_comparison(model.as_deref())?,
        Told::Written { .. } => {
            app.check_model(model.as_deref())?;
            app.own_generation()?;
        }
    }
    let mut texts = vec![text.clone()];
    if let Told::Written { turns, word, .. } = &told {
        texts.extend(
            turns.iter().flat_map(|turn| [Some(&turn.question), turn.answer.as_ref()]).flatten().cloned(),
        );
        texts.extend(word.clone());
    }
    app.check_texts(&texts, texts.len(), "text")?;
    if let Told::Written { turns, .. } = &told {
        app.check_length(turns, &text)?;
    }
    let picture = app.read_image(image).await?;
    let map = app
        .engine
        .compute(vec![picture], move |model, features| {
            match told {
                Told::Matched => model.explain_match(features[0], &text),
                Told::Written { turns, word, occurrence } => {
                    let word = word.as_deref().map(|text| Word { text, occurrence });
                    model.explain_answer(features[0], &turns, &text, word)
                }
            }
            .map_err(|error| ApiError::library(&error, "text"))
        })
        .await?;
    Ok(Json(json!({"object": "heat_map", "model": app.name, "side": map.side, "values": map.values})))
}

impl App {
    /// Whether an answer can be explained: before memory is taken for it.
    fn check_length(&self, turns: &[Turn], answer: &str) -> Result<(), ApiError> {
        let n_prompt = self
            .model
            .prompt(turns)
            .map_err(|error| ApiError::library(&error, "question"))?
            .n_rows(self.model.config().qformer.num_query_tokens);
        let Some(tokenizer) = self.model.language_tokenizer() else { return Err(ApiError::internal()) };
        let answer = tokenizer.encode_text(answer).map_err(|error| ApiError::library(&error, "text"))?;
        let n_tokens = n_prompt + answer.len();
        if n_tokens > MAX_TOKENS {
            let message = format!(
                "the text needs {n_tokens} tokens with its picture, this server explains at most {MAX_TOKENS}"
            );
            return Err(ApiError { code: "context_length_exceeded", ..ApiError::invalid("text", message) });
        }
        Ok(())
    }
}
