//! A response that grows: events of the engine as server-sent events or as lines of JSON.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Interval, Sleep, interval_at, sleep_until};

use crate::app::Context;
use crate::engine::{Event, Token, Written};
use crate::error::ApiError;

/// How long nothing may be sent, since what stands between server and client gives up on silence.
const SILENCE: Duration = Duration::from_secs(15);

/// The media type of server-sent events.
pub(crate) const EVENTS: &str = "text/event-stream";
/// An event that says nothing.
pub(crate) const EVENTS_PING: Option<&str> = Some(": still here\n\n");
/// What OpenAI's clients, and those of this server's own interface, know the end by.
pub(crate) const EVENTS_END: &str = "data: [DONE]\n\n";

/// A server-sent event.
pub(crate) fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

/// How an interface writes a growing answer.
pub(crate) trait Format: Send + 'static {
    /// Its media type.
    const MEDIA_TYPE: &'static str;
    /// What says nothing but that the server is still there.
    const PING: Option<&'static str>;

    /// What comes before anything.
    fn begin(&mut self) -> String;
    /// A token; may be nothing.
    fn token(&mut self, token: Token) -> String;
    /// The end.
    fn done(&mut self, written: Written) -> String;
    /// The end, when it failed on the way.
    fn failed(&mut self, error: &ApiError) -> String;
}

/// The body of such a response. When the client leaves it is dropped, and with it the channel that the engine watches.
struct Growing<F> {
    events: UnboundedReceiver<Event>,
    format: F,
    state: State,
    ping: Interval,
    deadline: Pin<Box<Sleep>>,
    outcome: Arc<OnceLock<&'static str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Running,
    Ended,
}

/// A response that grows with `events`.
pub(crate) fn response<F: Format + Unpin>(
    events: UnboundedReceiver<Event>,
    format: F,
    context: &Context,
) -> Response {
    let growing = Growing {
        events,
        format,
        state: State::New,
        ping: interval_at(tokio::time::Instant::now() + SILENCE, SILENCE),
        deadline: Box::pin(sleep_until(context.deadline.into())),
        outcome: context.outcome.clone(),
    };
    let mut response = Body::from_stream(growing).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(F::MEDIA_TYPE));
    // For nginx, which otherwise keeps pieces back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<F: Format + Unpin> Growing<F> {
    fn end(&mut self, result: Result<Written, ApiError>) -> String {
        self.state = State::Ended;
        self.events.close();
        match result {
            Ok(written) => {
                let _ = self.outcome.set("ok");
                self.format.done(written)
            }
            Err(error) => {
                let _ = self.outcome.set(error.code);
                self.format.failed(&error)
            }
        }
    }
}

impl<F: Format + Unpin> Stream for Growing<F> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        match self.state {
            State::Ended => return Poll::Ready(None),
            State::New => {
                self.state = State::Running;
                let begin = self.format.begin();
                if !begin.is_empty() {
                    return Poll::Ready(Some(Ok(begin.into())));
                }
            }
            State::Running => {}
        }
        loop {
            let text = match self.events.poll_recv(context) {
                Poll::Ready(Some(Event::Token(token))) => self.format.token(token),
                Poll::Ready(Some(Event::Done(result))) => self.end(result),
                Poll::Ready(None) => self.end(Err(ApiError::internal())),
                Poll::Pending => {
                    if self.deadline.as_mut().poll(context).is_ready() {
                        self.end(Err(ApiError::timeout()))
                    } else if self.ping.poll_tick(context).is_ready() {
                        // Polled again so that the next tick wakes this task.
                        let _ = self.ping.poll_tick(context);
                        F::PING.unwrap_or_default().into()
                    } else {
                        return Poll::Pending;
                    }
                }
            };
            if !text.is_empty() {
                self.ping.reset();
                return Poll::Ready(Some(Ok(text.into())));
            }
        }
    }
}
