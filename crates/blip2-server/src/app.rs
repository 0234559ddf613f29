//! The routes, and what holds for all of them: names, keys, deadlines, errors, numbers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{CACHE_CONTROL, HeaderName, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderValue, Method};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use blip2::model::Blip2;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::Semaphore;
use tracing::Instrument;

use crate::access::check_host;
use crate::body::{Budget, RequestBody, discard};
use crate::config::ServerConfig;
use crate::engine::Engine;
use crate::error::{ApiError, Shape};
use crate::metrics::Metrics;
use crate::picture::PictureReader;
use crate::{explain, ollama, openai, page, tasks};

/// Every address: its method, its path, and whether it is answered without a key.
pub const ROUTES: &[(&str, &str, bool)] = &[
    ("GET", "/", true),
    ("GET", "/docs", true),
    ("GET", "/static/{file}", true),
    ("GET", "/openapi.json", true),
    ("GET", "/health", true),
    ("GET", "/ready", true),
    ("GET", "/metrics", false),
    ("GET", "/v1/models", false),
    ("GET", "/v1/models/{model}", false),
    ("POST", "/v1/chat/completions", false),
    ("POST", "/v1/embeddings", false),
    ("POST", "/v1/caption", false),
    ("POST", "/v1/vqa", false),
    ("POST", "/v1/match", false),
    ("POST", "/v1/classify", false),
    ("POST", "/v1/explain", false),
    ("POST", "/api/chat", false),
    ("POST", "/api/generate", false),
    ("POST", "/api/embed", false),
    ("POST", "/api/embeddings", false),
    ("POST", "/api/show", false),
    ("GET", "/api/tags", false),
    ("GET", "/api/ps", false),
    ("GET", "/api/version", false),
];

/// Forms of answers that are compiled at once.
pub(crate) const FORMS: usize = 2;

/// What all requests share.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) model: Arc<Blip2>,
    /// What the model is called here.
    pub(crate) name: String,
    pub(crate) config: ServerConfig,
    pub(crate) engine: Engine,
    pub(crate) pictures: Arc<PictureReader>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) budget: Budget,
    /// Of which every compilation of what an answer has to be takes one.
    pub(crate) forms: Semaphore,
    /// When it started, for those who ask how old the model is.
    pub(crate) started: SystemTime,
    pub(crate) is_draining: AtomicBool,
    /// Makes ids of different processes different.
    pub(crate) process: u64,
    pub(crate) n_requests: AtomicU64,
}

/// What a request carries along.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Its id, in the log and in the response's `x-request-id`.
    pub(crate) id: String,
    /// When it has to be over.
    pub(crate) deadline: Instant,
    /// How a streamed answer ended: `ok` or an error's code.
    pub(crate) outcome: Arc<OnceLock<&'static str>>,
}

impl App {
    /// All routes with their layers.
    pub(crate) fn router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/", get(page::index))
            .route("/docs", get(page::docs))
            .route("/static/{file}", get(page::file))
            .route("/openapi.json", get(page::openapi))
            .route("/health", get(page::health))
            .route("/ready", get(ready))
            .route("/metrics", get(metrics))
            .route("/v1/models", get(openai::models::list))
            // With the slashes that names on the hub have.
            .route("/v1/models/{*model}", get(openai::models::one))
            .route("/v1/chat/completions", post(openai::chat::complete))
            .route("/v1/embeddings", post(openai::embeddings::embed))
            .route("/v1/caption", post(tasks::caption))
            .route("/v1/vqa", post(tasks::answer))
            .route("/v1/match", post(tasks::match_texts))
            .route("/v1/classify", post(tasks::classify))
            .route("/v1/explain", post(explain::explain))
            .route("/api/chat", post(ollama::chat))
            .route("/api/generate", post(ollama::generate))
            .route("/api/embed", post(ollama::embed))
            .route("/api/embeddings", post(ollama::embeddings))
            .route("/api/show", post(ollama::show))
            .route("/api/tags", get(ollama::tags))
            .route("/api/ps", get(ollama::running))
            .route("/api/version", get(ollama::version))
            .fallback(async || ApiError::not_found())
            .method_not_allowed_fallback(async || ApiError::method_not_allowed())
            .layer(from_fn_with_state(self.clone(), around))
            .with_state(self)
    }

    /// The body of a request that may cost something: nothing is read when the queue is full.
    pub(crate) async fn body(&self, request: Request) -> Result<RequestBody, ApiError> {
        let (parts, body) = request.into_parts();
        if self.engine.is_full() {
            discard(body).await;
            return Err(ApiError::overloaded());
        }
        RequestBody::read(&parts.headers, body, &self.config.limits, &self.budget).await
    }

    /// Whether a request means this model; one that names none does. Capitals make no difference, as on the hub.
    pub(crate) fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        let Some(asked) = asked else { return Ok(()) };
        let names = [Some(asked), asked.strip_suffix(":latest")];
        if names.into_iter().flatten().any(|name| name.eq_ignore_ascii_case(&self.name)) {
            return Ok(());
        }
        Err(ApiError::model_not_found(asked, &self.name))
    }

    /// Who may ask this.
    fn check_access(&self, request: &Request, is_open: bool) -> Result<(), ApiError> {
        if is_open {
            return Ok(());
        }
        if self.config.keys.is_empty() {
            if self.config.address.ip().is_loopback() {
                return check_host(request.headers(), request.uri(), &self.config.allowed_hosts);
            }
            return Ok(());
        }
        self.config.keys.check(request.headers())
    }

    fn id(&self, request: &Request) -> String {
        let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let is_plain = |id: &&str| {
            (1..=64).contains(&id.len())
                && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        given.filter(is_plain).map_or_else(
            || format!("{:016x}-{:x}", self.process, self.n_requests.fetch_add(1, Ordering::Relaxed)),
            str::to_owned,
        )
    }
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What happens around every handler.
async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    // `ROUTES` names a parameter alike, whether it may have slashes or not.
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().replace("{*", "{"));
    let route = path.and_then(|path| ROUTES.iter().find(|(_, known, _)| *known == path));
    // An address that is none is answered like one that needs a key: nobody without one learns which there are.
    let (route, is_open) = route.map_or(("other", false), |(_, path, is_open)| (*path, *is_open));
    let shape = Shape::of(request.uri().path());
    let id = app.id(&request);
    let context =
        Context { id: id.clone(), deadline: start + app.config.limits.request, outcome: Arc::default() };
    let span = tracing::info_span!("request", id, method = %request.method(), route);
    request.extensions_mut().insert(context.clone());
    let mut ended = Ended { app: app.clone(), route, start, span: span.clone(), outcome: None };

    let is_head = request.method() == Method::HEAD;
    let mut response = async {
        if let Err(error) = app.check_access(&request, is_open) {
            discard(request.into_body()).await;
            return axum::response::IntoResponse::into_response(error);
        }
        let handler = guarded(&app, next.run(request));
        let answered = tokio::time::timeout_at(context.deadline.into(), handler).await;
        answered.unwrap_or_else(|_| axum::response::IntoResponse::into_response(ApiError::timeout()))
    }
    .instrument(span)
    .await;

    let status = response.status();
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        ended.outcome = Some(error.code);
        response = error.into_shaped_response(shape);
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers
        .entry("content-security-policy")
        .or_insert(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
    ended.outcome = ended.outcome.or_else(|| status.is_success().then_some("ok")).or(Some("refused"));
    let (parts, body) = response.into_parts();
    if is_head || body.is_end_stream() {
        return Response::from_parts(parts, body);
    }
    // Only now is the outcome open again: the body may not reach the client.
    let outcome = ended.outcome.take();
    let body = Observed { body, ended, outcome, streamed: context.outcome };
    Response::from_parts(parts, Body::new(body))
}

/// A handler whose panic is this request's and nobody else's.
async fn guarded(app: &App, handler: impl Future<Output = Response>) -> Response {
    let mut handler = Box::pin(handler);
    let polled = std::future::poll_fn(move |context| {
        match catch_unwind(AssertUnwindSafe(|| handler.as_mut().poll(context))) {
            Ok(poll) => poll.map(Some),
            Err(_) => Poll::Ready(None),
        }
    });
    polled.await.unwrap_or_else(|| {
        app.metrics.panics.fetch_add(1, Ordering::Relaxed);
        tracing::error!("a handler met a mistake of the program");
        axum::response::IntoResponse::into_response(ApiError::internal())
    })
}

/// Writes down how a request ended, whenever that is. Without an outcome its client left.
struct Ended {
    app: Arc<App>,
    route: &'static str,
    start: Instant,
    span: tracing::Span,
    outcome: Option<&'static str>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or("client_disconnected");
        let took = self.start.elapsed();
        self.app.metrics.request(self.route, outcome, took);
        let milliseconds = took.as_millis() as u64;
        self.span.in_scope(|| tracing::info!(outcome, milliseconds, "done"));
    }
}

/// A response's body that knows whether it was sent whole.
struct Observed {
    body: Body,
    ended: Ended,
    /// What it is if all of it is sent.
    outcome: Option<&'static str>,
    streamed: Arc<OnceLock<&'static str>>,
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            self.ended.outcome = self.streamed.get().copied().or(self.outcome);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Whether requests should come here: not before the model has seen a picture, not while the server ends.
async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    if app.is_draining.load(Ordering::Acquire) {
        return Err(ApiError::shutting_down());
    }
    if app.engine.is_alive() { Ok("ready\n") } else { Err(ApiError::internal()) }
}

async fn metrics(State(app): State<Arc<App>>) -> ([(HeaderName, &'static str); 1], String) {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(axum::http::header::CONTENT_TYPE, kind)], app.metrics.text())
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
