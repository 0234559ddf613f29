//! What only BLIP-2 can do, in an interface of its own: captions, questions with given answers, matching, labels.

mod written;

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use blip2::model::LABEL;
use blip2::text::Turn;
use serde::Deserialize;
use serde_json::{Value, json};

use self::written::{Kind, respond};
use crate::app::{App, Context};
use crate::error::ApiError;
use crate::generation::GenerationFields;
use crate::json::Json;
use crate::picture::{Picture, Source};
use crate::wire::{Dialogue, ImageField, OneOrMany};

#[derive(Debug, Deserialize)]
struct CaptionRequest {
    model: Option<String>,
    image: ImageField,
    stream: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct VqaRequest {
    model: Option<String>,
    image: ImageField,
    question: String,
    choices: Option<Vec<String>>,
    stream: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct MatchRequest {
    model: Option<String>,
    image: ImageField,
    #[serde(alias = "text")]
    texts: OneOrMany<String>,
}

#[derive(Debug, Deserialize)]
struct ClassifyRequest {
    model: Option<String>,
    image: ImageField,
    labels: Vec<String>,
    template: Option<String>,
}

/// Describes a picture: JSON, or the picture's file itself as the body.
pub(crate) async fn caption(
    State(app): State<Arc<App>>,
    Extension(context): Extension<Context>,
    request: Request,
) -> Result<Response, ApiError> {
    let is_file = is_file(request.headers());
    let body = app.body(request).await?;
    let (source, fields, stream, memory) = if is_file {
        let (bytes, memory) = body.into_parts();
        (Source::File(bytes), GenerationFields::default(), None, memory)
    } else {
        let CaptionRequest { model, image, stream } = body.json()?;
        app.check_model(model.as_deref())?;
        let fields = body.json()?;
        (Source::Text(image.into_text()), fields, stream, body.understood())
    };
    let manner = fields.apply(app.own_generation()?.clone(), &app.config.limits)?;
    let dialogue = Dialogue { turns: Vec::new(), picture: source };
    let accepted = app.write(dialogue, manner, 0, "image").await?;
    drop(memory);
    respond(&app, &context, accepted, Kind::Caption, stream).await
}

/// Whether a body is a picture's file, by its media type.
fn is_file(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind.starts_with("image/") || kind == "application/octet-stream"
}

/// Answers a question, freely or by choosing among given answers.
pub(crate) async fn answer(
    State(app): State<Arc<App>>,
    Extension(context): Extension<Context>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.body(request).await?;
    let VqaRequest { model, image, question, choices, stream } = body.json()?;
    let fields: GenerationFields = body.json()?;
    let memory = body.understood();
    app.check_model(model.as_deref())?;
    let manner = fields.apply(app.own_answering()?.clone(), &app.config.limits)?;
    app.check_texts(std::slice::from_ref(&question), 1, "question")?;
    let Some(choices) = choices else {
        let dialogue = Dialogue { turns: vec![Turn::open(question)], picture: image.into_text().into() };
        let accepted = app.write(dialogue, manner, 0, "question").await?;
        drop(memory);
        return respond(&app, &context, accepted, Kind::Answer, stream).await;
    };
    if stream == Some(true) {
        let message = "given answers are compared, and known all at once: leave out stream, or choices";
        return Err(ApiError::unsupported("stream", message));
    }
    app.check_texts(&choices, choices.len(), "choices")?;
    // Said now rather than after a wait.
    app.model
        .prompt(&[Turn::open(question.clone())])
        .map_err(|error| ApiError::library(&error, "question"))?;
    let picture = app.read_image(image).await?;
    drop(memory);
    let ranked = app
        .engine
        .compute(vec![picture], move |model, features| {
            model.rank(features[0], &question, &choices).map_err(|error| ApiError::library(&error, "choices"))
        })
        .await?;
    let rows: Vec<Value> = ranked
        .into_iter()
        .map(|choice| {
            json!({"answer": choice.answer, "probability": choice.probability,
                "log_likelihood": choice.log_likelihood})
        })
        .collect();
    Ok(Json(json!({"object": "vqa", "model": app.name, "choices": rows})).into_response())
}

/// How well texts fit a picture.
pub(crate) async fn match_texts(State(app): State<Arc<App>>, request: Request) -> Result<Json, ApiError> {
    let body = app.body(request).await?;
    let MatchRequest { model, image, texts } = body.json()?;
    let memory = body.understood();
    app.check_comparison(model.as_deref())?;
    let texts = texts.into_vec();
    app.check_texts(&texts, texts.len(), "texts")?;
    let picture = app.read_image(image).await?;
    drop(memory);
    let rows = app
        .engine
        .compute(vec![picture], move |model, features| {
            let borrowed: Vec<&str> = texts.iter().map(String::as_str).collect();
            let scores = model
                .match_texts(features[0], &borrowed)
                .map_err(|error| ApiError::library(&error, "texts"))?;
            let row = |(text, score): (String, blip2::model::MatchScore)| {
                json!({"text": text, "itm_probability": score.itm_probability,
                    "itc_similarity": score.itc_similarity})
            };
            Ok(texts.into_iter().zip(scores).map(row).collect::<Vec<Value>>())
        })
        .await?;
    Ok(Json(json!({"object": "match", "model": app.name, "scores": rows})))
}

/// Whether the template with each label in it, which is what the model reads, is as short as all texts have to be: its places
/// times the labels' lengths could be megabytes.
fn check_filled(template: &str, labels: &[String], limit: usize) -> Result<(), ApiError> {
    let n_places = template.matches(LABEL).count();
    let n_around = template.len() - n_places * LABEL.len();
    if labels.iter().map(|label| n_around + n_places * label.len()).sum::<usize>() > limit {
        let message = format!("the labels in their template have together more than {limit} bytes");
        return Err(ApiError::invalid("template", message));
    }
    Ok(())
}

/// Which of the labels a picture shows.
pub(crate) async fn classify(State(app): State<Arc<App>>, request: Request) -> Result<Json, ApiError> {
    let body = app.body(request).await?;
    let ClassifyRequest { model, image, labels, template } = body.json()?;
    let memory = body.understood();
    app.check_comparison(model.as_deref())?;
    app.check_texts(&labels, labels.len(), "labels")?;
    let template = template.unwrap_or_else(|| "a photo of {label}".into());
    app.check_texts(std::slice::from_ref(&template), 1, "template")?;
    check_filled(&template, &labels, app.config.limits.text_bytes)?;
    let picture = app.read_image(image).await?;
    drop(memory);
    let scores = app
        .engine
        .compute(vec![picture], move |model, features| {
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            model
                .classify(features[0], &labels, &template)
                .map_err(|error| ApiError::library(&error, "labels"))
        })
        .await?;
    let rows: Vec<Value> = scores
        .into_iter()
        .map(|score| {
            json!({"label": score.label, "probability": score.probability,
                "itc_similarity": score.itc_similarity})
        })
        .collect();
    Ok(Json(json!({"object": "classification", "model": app.name, "labels": rows})))
}

impl App {
    pub(crate) async fn read_image(&self, image: ImageField) -> Result<Picture, ApiError> {
        self.pictures.read(image.into_text().into(), "image").await
    }

    /// Whether a request means this model, and the model compares.
    pub(crate) fn check_comparison(&self, model: Option<&str>) -> Result<(), ApiError> {
        self.check_model(model)?;
        if self.model.matcher().is_none() {
            return Err(ApiError::part_missing("compare texts and pictures"));
        }
        Ok(())
    }
}
