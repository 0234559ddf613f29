//! `/v1/models`: the one model that is here.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::app::{App, unix_seconds};
use crate::error::ApiError;
use crate::json::Json;

pub(crate) async fn list(State(app): State<Arc<App>>) -> Json {
    Json(json!({"object": "list", "data": [describe(&app)]}))
}

pub(crate) async fn one(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::not_found())?;
    app.check_model(Some(&name))?;
    Ok(Json(describe(&app)))
}

fn describe(app: &App) -> Value {
    let (writes, compares) = (app.model.language_model().is_some(), app.model.matcher().is_some());
    let mut does: Vec<&str> = Vec::new();
    if writes {
        does.extend(["chat", "caption", "vqa", "explain_answer"]);
    }
    if compares {
        does.extend(["match", "explain_match", "classify", "embeddings"]);
    }
    json!({
        "id": app.name,
        "object": "model",
        "created": unix_seconds(app.started),
        "owned_by": "blip2",
        // By this clients of llama.cpp find out that it sees.
        "architecture": {
            "input_modalities": ["text", "image"],
            "output_modalities": if writes { vec!["text"] } else { vec![] },
        },
        "capabilities": does,
    })
}
