//! `/v1/embeddings`: texts and pictures in the space where they are compared.

use std::sync::Arc;

use axum::extract::{Request, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::error::ApiError;
use crate::json::Json;
use crate::wire::{ImageField, OneOrMany, choice};

#[derive(Debug, Deserialize)]
struct EmbeddingRequest {
    model: Option<String>,
    input: OneOrMany<Input>,
    #[serde(default, deserialize_with = "choice")]
    encoding_format: Option<Encoding>,
    dimensions: Option<usize>,
    #[serde(default, deserialize_with = "choice")]
    pooling: Option<Pooling>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Encoding {
    Float,
    Base64,
}

/// What becomes of a picture's rows, one for each query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Pooling {
    /// Their mean, of length 1: one vector, comparable with those of texts.
    #[default]
    Mean,
    /// All of them, one after the other. The similarity of a text is the largest of its cosines with them.
    None,
}

/// A text, or a text or picture by name.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, {\"text\": …} or {\"image\": …}")]
enum Input {
    Text(String),
    Named { text: Option<String>, image: Option<ImageField>, image_url: Option<ImageField> },
}

/// What an input is.
enum Source {
    Text(String),
    Picture(String),
}

impl Input {
    /// One thing, since a vector is of a text or of a picture: whoever names both would take it for one of both together.
    fn source(self) -> Result<Source, ApiError> {
        let named = match self {
            Self::Text(text) => return Ok(Source::Text(text)),
            Self::Named { text, image, image_url } => [
                text.map(Source::Text),
                image.map(|image| Source::Picture(image.into_text())),
                image_url.map(|image| Source::Picture(image.into_text())),
            ],
        };
        let mut named = named.into_iter().flatten();
        match (named.next(), named.next()) {
            (Some(source), None) => Ok(source),
            (None, _) => Err(ApiError::invalid("input", "an input is empty: give a text or a picture")),
            (Some(_), Some(_)) => {
                let message = "a vector is of a text or of a picture: give one of text, image and image_url in each \
                               input, and the others as inputs of their own";
                Err(ApiError::invalid("input", message))
            }
        }
    }
}

pub(crate) async fn embed(State(app): State<Arc<App>>, request: Request) -> Result<Json, ApiError> {
    let body = app.body(request).await?;
    let asked: EmbeddingRequest = body.json()?;
    let _memory = body.understood();
    app.check_model(asked.model.as_deref())?;
    app.check_dimensions(asked.dimensions)?;
    let is_base64 = asked.encoding_format == Some(Encoding::Base64);
    let (vectors, n_tokens) =
        vectors(&app, asked.input.into_vec(), asked.pooling.unwrap_or_default()).await?;
    let data: Vec<Value> = vectors
        .into_iter()
        .enumerate()
        .map(|(index, values)| {
            let embedding = if is_base64 {
                STANDARD
                    .encode(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
                    .into()
            } else {
                Value::from(values)
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    Ok(Json(json!({
        "object": "list",
        "data": data,
        "model": app.name,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    })))
}

/// Where an input's vector comes from.
enum Place {
    Text(usize),
    Picture(usize),
}

/// A vector for each input, and the tokens of all.
async fn vectors(
    app: &Arc<App>,
    inputs: Vec<Input>,
    pooling: Pooling,
) -> Result<(Vec<Vec<f32>>, usize), ApiError> {
    if app.model.matcher().is_none() {
        return Err(ApiError::part_missing("compare texts and pictures"));
    }
    let mut texts = Vec::new();
    let mut pictures = Vec::new();
    let mut places = Vec::new();
    for input in inputs {
        match input.source()? {
            Source::Text(text) => {
                places.push(Place::Text(texts.len()));
                texts.push(text);
            }
            Source::Picture(picture) => {
                places.push(Place::Picture(pictures.len()));
                pictures.push(picture);
            }
        }
    }
    app.check_texts(&texts, places.len() - pictures.len(), "input")?;
    app.check_picture_count(pictures.len(), "input")?;
    if places.is_empty() {
        return Err(ApiError::invalid("input", "input is empty: give a text or a picture"));
    }
    let mut read = Vec::with_capacity(pictures.len());
    for picture in pictures {
        read.push(app.pictures.read(picture.into(), "input").await?);
    }
    let width = app.model.config().qformer.image_text_hidden_size;
    let n_image = app.model.config().qformer.num_query_tokens * read.len();
    app.engine
        .compute(read, move |model, features| {
            let in_words = |error| ApiError::library(&error, "input");
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let n_text: usize = model.n_matcher_tokens(&texts).map_err(in_words)?.iter().sum();
            let of_texts = model.embed_texts(&texts).map_err(in_words)?;
            let of_pictures = if features.is_empty() {
                Vec::new()
            } else {
                model.embed_images(features).map_err(in_words)?
            };
            let vector = |place: &Place| match *place {
                Place::Text(at) => of_texts[at].clone(),
                Place::Picture(at) if pooling == Pooling::Mean => mean(&of_pictures[at], width),
                Place::Picture(at) => of_pictures[at].clone(),
            };
            Ok((places.iter().map(vector).collect(), n_text + n_image))
        })
        .await
}

/// The mean of rows, of length 1.
fn mean(rows: &[f32], width: usize) -> Vec<f32> {
    let sum: Vec<f32> = (0..width).map(|i| rows.iter().skip(i).step_by(width).sum()).collect();
    let length = sum.iter().map(|value| value * value).sum::<f32>().sqrt();
    sum.into_iter().map(|value| value / length.max(f32::MIN_POSITIVE)).collect()
}

impl App {
    /// Vectors of texts, for the interfaces that have no others.
    pub(crate) async fn embed_texts(
        self: &Arc<Self>,
        texts: Vec<String>,
    ) -> Result<(Vec<Vec<f32>>, usize), ApiError> {
        vectors(self, texts.into_iter().map(Input::Text).collect(), Pooling::Mean).await
    }

    /// Whether vectors have as many numbers as a request wants of them.
    pub(crate) fn check_dimensions(&self, wanted: Option<usize>) -> Result<(), ApiError> {
        let width = self.model.config().qformer.image_text_hidden_size;
        match wanted.filter(|wanted| *wanted != width) {
            None => Ok(()),
            Some(wanted) => {
                let message = format!("dimensions is {wanted}, this model's vectors have {width}");
                Err(ApiError::invalid("dimensions", message))
            }
        }
    }

    /// Whether a request's texts are few and short enough.
    pub(crate) fn check_texts(&self, texts: &[String], n: usize, param: &str) -> Result<(), ApiError> {
        let limits = &self.config.limits;
        if n > limits.texts {
            return Err(ApiError::invalid(
                param,
                format!("there are {n} texts, the limit is {}", limits.texts),
            ));
        }
        if texts.iter().map(String::len).sum::<usize>() > limits.text_bytes {
            let message = format!("the texts together have more than {} bytes", limits.text_bytes);
            return Err(ApiError::invalid(param, message));
        }
        Ok(())
    }

    /// Whether a request's pictures are few enough.
    pub(crate) fn check_picture_count(&self, n: usize, param: &str) -> Result<(), ApiError> {
        let limit = self.config.limits.pictures;
        if n > limit {
            return Err(ApiError::invalid(param, format!("there are {n} pictures, the limit is {limit}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_mean_has_length_one() {
        let mean = super::mean(&[3.0, 0.0, 3.0, 0.0, 0.0, 8.0], 2);
        assert_eq!(mean, [0.6, 0.8]);
        assert_eq!(super::mean(&[0.0; 4], 2), [0.0, 0.0]);
    }
}
