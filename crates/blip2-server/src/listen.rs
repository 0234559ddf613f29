//! Accepting connections: a bounded number, deadlines for headers and writes, and an end that loses nothing.
//!
//! `axum::serve` sets no timer, so that half a header holds a connection for ever; therefore the loop is here.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use axum::Router;
use blip2::model::Blip2;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, timeout};

use crate::app::{App, FORMS};
use crate::body::Budget;
use crate::config::ServerConfig;
use crate::engine::Engine;
use crate::error::StartError;
use crate::metrics::Metrics;
use crate::picture::PictureReader;
use crate::recent::Recent;

/// A server that listens and whose model is warm.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
    model_thread: JoinHandle<()>,
}

impl Server {
    /// Binds the address, then runs the model once: when this returns the server can answer.
    ///
    /// # Errors
    /// When the configuration is not safe or contradicts itself, the address cannot be bound, or the model fails.
    pub async fn bind(model: Arc<Blip2>, config: ServerConfig) -> Result<Self, StartError> {
        config.validate()?;
        let bind = |source| StartError::Bind { address: config.address, source };
        let listener = TcpListener::bind(config.address).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let metrics = Arc::new(Metrics::new());
        let cache = Arc::new(Recent::new(config.picture_cache_bytes));
        let (engine, model_thread) = Engine::start(&model, &cache, &metrics, &config)?;
        let name = config.model_name.clone().unwrap_or_else(|| plain_name(&model.config().name));
        let app = App {
            pictures: Arc::new(PictureReader::new(&model, &cache, &metrics, &config)),
            budget: Budget::new(config.limits.all_body_bytes),
            forms: Semaphore::new(FORMS),
            name,
            engine,
            metrics,
            model,
            config,
            started: SystemTime::now(),
            is_draining: AtomicBool::new(false),
            process: RandomState::new().hash_one(std::process::id()),
            n_requests: AtomicU64::new(0),
        };
        Ok(Self { listener, address, app: Arc::new(app), model_thread })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the model is called in requests.
    pub fn model_name(&self) -> &str {
        &self.app.name
    }

    /// Answers until `shutdown`, then finishes what was accepted, for as long as the configuration allows.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { listener, address, app, model_thread } = self;
        tracing::info!(%address, model = app.name, "listening");
        let connections = Connections::new(&app);
        tokio::select! {
            () = connections.accept_all(&listener) => {}
            () = shutdown => {}
        }
        app.is_draining.store(true, Ordering::Release);
        tracing::info!("shutting down: finishing what was accepted");
        let _ = timeout(app.config.drain_delay, connections.accept_all(&listener)).await;
        // Whoever reached the operating system before now was accepted.
        connections.accept_waiting(&listener).await;
        drop(listener);
        let is_finished = timeout(app.config.drain, connections.graceful.shutdown()).await.is_ok();
        if is_finished {
            app.engine.close();
        } else {
            tracing::warn!("the time to finish is over: ending the requests that are left");
            app.engine.abort();
            // The last words, an error, still have to reach the clients.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        // A step of the model is the longest that this can take.
        let joined = tokio::task::spawn_blocking(move || model_thread.join());
        let _ = timeout(Duration::from_secs(5), joined).await;
        tracing::info!("ended");
    }
}

/// The open connections.
struct Connections {
    app: Arc<App>,
    router: Router,
    slots: Arc<Semaphore>,
    graceful: GracefulShutdown,
}

impl Connections {
    fn new(app: &Arc<App>) -> Self {
        Self {
            app: app.clone(),
            router: app.clone().router(),
            slots: Arc::new(Semaphore::new(app.config.limits.connections)),
            graceful: GracefulShutdown::new(),
        }
    }

    async fn accept_all(&self, listener: &TcpListener) {
        loop {
            // Without a slot nobody is accepted: the others wait in the operating system's queue.
            let Ok(slot) = self.slots.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => self.serve(stream, slot),
                Err(error) => {
                    // Most often a lack of file descriptors, which only time mends.
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Those who are in the operating system's queue now.
    async fn accept_waiting(&self, listener: &TcpListener) {
        while let Ok(slot) = self.slots.clone().try_acquire_owned()
            && let Ok(Ok((stream, _))) = timeout(Duration::from_millis(1), listener.accept()).await
        {
            self.serve(stream, slot);
        }
    }

    fn serve(&self, stream: TcpStream, slot: OwnedSemaphorePermit) {
        let limits = &self.app.config.limits;
        // Small pieces of a stream are to arrive when they are sent.
        let _ = stream.set_nodelay(true);
        let stream = TokioIo::new(ImpatientStream::new(stream, limits.idle));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header)
            .max_headers(64)
            .max_header_size(32 << 10)
            .serve_connection(stream, TowerToHyperService::new(self.router.clone()));
        let connection = self.graceful.watch(connection);
        let metrics = self.app.metrics.clone();
        metrics.connections.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            // How a connection breaks is its client's affair.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection broke");
            }
            metrics.connections.fetch_sub(1, Ordering::Relaxed);
            drop(slot);
        });
    }
}

/// A connection that is given up when its client takes nothing for too long.
struct ImpatientStream {
    stream: TcpStream,
    patience: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl ImpatientStream {
    fn new(stream: TcpStream, patience: Duration) -> Self {
        Self { stream, patience, waiting: None }
    }

    /// Passes on what became of a write; waiting too long becomes an error.
    fn limit<T>(&mut self, context: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.waiting = None;
            return poll;
        }
        let deadline = Instant::now() + self.patience;
        let sleep = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if sleep.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncRead for ImpatientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for ImpatientStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.limit(context, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(context);
        self.limit(context, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_shutdown(context);
        self.limit(context, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, buffers);
        self.limit(context, poll)
    }
}

/// Resolves when the process is told to end.
///
/// # Errors
/// When the operating system gives no signals.
pub(crate) fn signal() -> Result<impl Future<Output = ()>, StartError> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Runtime)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Runtime)?;
        Ok(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
    }
    #[cfg(not(unix))]
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}

/// A model's name as programs write it: `blip2 default, interim` is `blip2-default-interim`. Capitals stay, as names on the hub
/// have them.
fn plain_name(name: &str) -> String {
    let words: Vec<String> = name
        .split(|c: char| !(c.is_ascii_alphanumeric() || "._-/".contains(c)))
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    if words.is_empty() { "blip2".into() } else { words.join("-") }
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_plain() {
        assert_eq!(super::plain_name("blip2 default, interim"), "blip2-default-interim");
        assert_eq!(super::plain_name("Salesforce/blip2-opt-2.7b"), "Salesforce/blip2-opt-2.7b");
        assert_eq!(super::plain_name("…"), "blip2");
    }
}
