//! Everything that can go wrong with a request, and the one place where it becomes a response.
//!
//! Messages are written here or by the library in the words of what a client holds; nothing of a decoder's or of the
//! machine's own words reaches a client. The shape is that of the interface which was spoken to.

use std::net::SocketAddr;

use axum::body::Body;
use axum::http::header::{ACCEPT_ENCODING, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use blip2::image::ImageError;
use serde_json::json;

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Anybody could use it.
    #[error(
        "{address} can be reached from other machines and there is no key: give one (BLIP2_API_KEY or \
         --api-key-file), listen on 127.0.0.1, or say --allow-no-key"
    )]
    NoKey {
        /// Where it should have listened.
        address: SocketAddr,
    },
    /// A value that makes no sense.
    #[error("{0}")]
    Config(String),
    /// Keys that cannot be read.
    #[error("the keys in {path}: {reason}")]
    Keys {
        /// Where they should be.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The address is taken or not this machine's.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Threads or signals cannot be had.
    #[error("the operating system refuses threads or signals: {0}")]
    Runtime(std::io::Error),
    /// The model does not work.
    #[error("the model failed on a first picture: {0}")]
    Model(#[from] blip2::Error),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// The word that programs go by; never changes.
    pub(crate) code: &'static str,
    pub(crate) message: String,
    /// The field of the request that is wrong.
    pub(crate) param: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), param: None }
    }

    /// A field with a value that cannot be.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        Self { param: Some(param.into()), ..error }
    }

    /// Something that clients of this interface may ask for and that does not exist here.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: "unsupported_value", ..Self::invalid(param, message) }
    }

    /// A body that is not what it should be.
    pub(crate) fn body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_body", message)
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("the request's body has more than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    }

    /// A body that is packed in a way that is not known here.
    pub(crate) fn unknown_encoding() -> Self {
        let message =
            "the request's body has a content-encoding other than gzip: send it as gzip, or as it is";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding", message)
    }

    /// A body whose pieces stopped coming.
    pub(crate) fn body_too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", "the request's body did not arrive in time")
    }

    pub(crate) fn timeout() -> Self {
        let message = "the answer took longer than the server allows: ask for fewer tokens";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
    }

    pub(crate) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address: see /docs")
    }

    pub(crate) fn method_not_allowed() -> Self {
        let message = "this address does not know this method: see /docs";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    pub(crate) fn unauthorised() -> Self {
        let message = "a key of this server is needed: send `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    pub(crate) fn host_not_allowed() -> Self {
        let message = "without a key this server answers under its own machine's name only: start it with \
                       --allowed-host NAME, or with a key";
        Self::new(StatusCode::FORBIDDEN, "host_not_allowed", message)
    }

    pub(crate) fn model_not_found(asked: &str, name: &str) -> Self {
        let asked: String = asked.chars().take(100).collect();
        let message = format!("there is no model `{asked}`: this server has `{name}`");
        let error = Self::new(StatusCode::NOT_FOUND, "model_not_found", message);
        Self { param: Some("model".into()), ..error }
    }

    /// The part of the model that this needs is absent.
    pub(crate) fn part_missing(what: &str) -> Self {
        let message = format!("the model of this server cannot {what}: the part for that is not in it");
        Self::new(StatusCode::BAD_REQUEST, "model_part_missing", message)
    }

    /// The queue is full.
    pub(crate) fn overloaded() -> Self {
        let message = "the server has as many requests as it can hold: try again in a moment";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "server_overloaded", message)
    }

    pub(crate) fn shutting_down() -> Self {
        let message = "the server is shutting down: try again";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message)
    }

    /// A mistake of ours; what it was is in the log.
    pub(crate) fn internal() -> Self {
        let message = "the server failed at this request: its log has the reason under the request's id";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// What is wrong with a picture, without the decoder's own words.
    pub(crate) fn picture(error: &ImageError, param: &str) -> Self {
        let (code, message) = match error {
            ImageError::Damaged { format, .. } => {
                ("invalid_image", format!("the {format} picture is damaged: save it again"))
            }
            ImageError::Truncated { .. } | ImageError::Empty => ("invalid_image", error.to_string()),
            ImageError::NotAPicture { .. } => ("invalid_image_format", format!("the file {error}")),
            ImageError::Unsupported { format, .. } => (
                "invalid_image_format",
                format!("{format} pictures of this kind are not read here: convert it to JPEG or PNG"),
            ),
            ImageError::TooManyBytes { .. }
            | ImageError::TooManyPixels { .. }
            | ImageError::TooLong { .. } => ("image_too_large", error.to_string()),
            _ => ("invalid_image", "the picture cannot be read".into()),
        };
        Self { code, ..Self::invalid(param, message) }
    }

    /// What the library says about a request that made sense so far.
    pub(crate) fn library(error: &blip2::Error, param: &str) -> Self {
        match error {
            blip2::Error::TextTooLong { n_tokens, limit } => {
                let message = format!(
                    "the text needs {n_tokens} tokens with its picture, the model has room for {limit}"
                );
                Self { code: "context_length_exceeded", ..Self::invalid(param, message) }
            }
            blip2::Error::AnswerForm(message) => {
                Self { code: "invalid_constraint", ..Self::invalid(param, message.clone()) }
            }
            blip2::Error::Request(message) => Self::invalid(param, message.clone()),
            blip2::Error::Config { field, reason } => {
                let field = field.rsplit('.').next().unwrap_or(param);
                Self::invalid(field, format!("`{field}` {reason}"))
            }
            error => {
                tracing::error!(%error, "the model failed");
                Self::internal()
            }
        }
    }

    /// Whether coming back later can help.
    fn retry_after(&self) -> Option<&'static str> {
        matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE).then_some("1")
    }

    /// OpenAI's word for the class of error.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// As the interface at this path writes errors.
    pub(crate) fn json(&self, shape: Shape) -> serde_json::Value {
        match shape {
            Shape::OpenAi => json!({"error": {
                "message": self.message, "type": self.kind(), "param": self.param, "code": self.code,
            }}),
            Shape::Ollama => json!({"error": self.message}),
        }
    }

    /// The one conversion of an error to a response.
    pub(crate) fn into_shaped_response(self, shape: Shape) -> Response {
        let body = Body::from(self.json(shape).to_string());
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after() {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(seconds));
        } else if self.status.is_server_error() || self.status == StatusCode::REQUEST_TIMEOUT {
            // Clients of OpenAI try again by themselves; here the same would happen again.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        } else if self.status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
        } else if self.status == StatusCode::UNAUTHORIZED {
            // HTTP wants to be told how to come in.
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// How an interface writes its errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    OpenAi,
    Ollama,
}

impl Shape {
    /// Of the interface at a path.
    pub(crate) fn of(path: &str) -> Self {
        if path.starts_with("/api/") { Self::Ollama } else { Self::OpenAi }
    }
}

/// Leaves the shape to the layer that knows the path: see [`crate::app`].
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}
