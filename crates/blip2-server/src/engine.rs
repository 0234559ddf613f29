//! The thread that owns the computing, and the queue before it.
//!
//! Handlers hand over requests whose every field is checked and whose pictures are decoded; here they wait, are computed in
//! batches and answered through a channel. A request whose channel is closed is one that nobody waits for: it is dropped
//! before its next token, or before the next part of its prompt is read.

mod queue;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use blip2::generate::{Constraint, GenerationConfig, PROMPT_ROWS_A_STEP};
use blip2::model::{Answer, Blip2, ImageFeatures};
use blip2::text::Prompt;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use self::queue::Queue;
use self::worker::Worker;
use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::picture::{Picture, SeenPicture};
use crate::recent::Recent;

/// What a request wants written.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) picture: Picture,
    pub(crate) prompt: Prompt,
    pub(crate) generation: GenerationConfig,
    /// What the answer has to be.
    pub(crate) constraint: Option<Box<dyn Constraint>>,
    /// How many of the likeliest tokens to tell of in every place.
    pub(crate) top_log_probs: usize,
}

/// What a writer hears of its request.
#[derive(Debug)]
pub(crate) enum Event {
    Token(Token),
    /// The last event.
    Done(Result<Written, ApiError>),
}

/// What came of a request for writing.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) answers: Vec<Answer>,
    /// Tokens of the prompt that had been read before, for other requests.
    pub(crate) n_cached: usize,
}

/// A token that was just written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    pub(crate) sequence: usize,
    pub(crate) id: u32,
    /// The characters that it completes.
    pub(crate) text: String,
    pub(crate) log_prob: f32,
    /// The likeliest tokens in its place and their log-probabilities.
    pub(crate) top: Vec<(u32, f32)>,
}

/// One computation about pictures.
pub(crate) type Run = Box<dyn FnOnce(Result<(&Blip2, &[&ImageFeatures]), ApiError>) + Send>;

/// A request in the queue.
pub(crate) struct Job {
    accepted: Instant,
    /// Where its log lines belong.
    span: tracing::Span,
    work: Work,
}

enum Work {
    Write { write: Box<Write>, events: UnboundedSender<Event> },
    Compute { pictures: Vec<Picture>, run: Run, is_wanted: Box<dyn Fn() -> bool + Send> },
}

impl Job {
    fn is_wanted(&self) -> bool {
        match &self.work {
            Work::Write { events, .. } => !events.is_closed(),
            Work::Compute { is_wanted, .. } => is_wanted(),
        }
    }

    /// Tells whoever waits that nothing will come of it.
    fn refuse(self, error: ApiError) {
        match self.work {
            Work::Write { events, .. } => drop(events.send(Event::Done(Err(error)))),
            Work::Compute { run, .. } => run(Err(error)),
        }
    }
}

/// The handle that requests go through.
#[derive(Debug)]
pub(crate) struct Engine {
    queue: Arc<Queue>,
    model: Arc<Blip2>,
    kv_budget: usize,
    batch: usize,
    is_alive: Arc<AtomicBool>,
}

impl Engine {
    /// Starts the thread; the model has seen a first picture when this returns.
    ///
    /// # Errors
    /// When the model fails.
    pub(crate) fn start(
        model: &Arc<Blip2>,
        cache: &Arc<Recent<SeenPicture>>,
        metrics: &Arc<Metrics>,
        config: &ServerConfig,
    ) -> Result<(Self, JoinHandle<()>), crate::StartError> {
        Self::start_reading(PROMPT_ROWS_A_STEP, model, cache, metrics, config)
    }

    /// The same, reading so many rows of a long prompt between two tokens.
    fn start_reading(
        prompt_rows: usize,
        model: &Arc<Blip2>,
        cache: &Arc<Recent<SeenPicture>>,
        metrics: &Arc<Metrics>,
        config: &ServerConfig,
    ) -> Result<(Self, JoinHandle<()>), crate::StartError> {
        worker::warm_up(model)?;
        let queue = Arc::new(Queue::new(config.queue, metrics.clone()));
        let is_alive = Arc::new(AtomicBool::new(true));
        let worker = Worker {
            model: model.clone(),
            queue: queue.clone(),
            cache: cache.clone(),
            read: Recent::new(config.prompt_cache_bytes),
            metrics: metrics.clone(),
            batch: config.batch,
            kv_budget: config.kv_bytes,
            row_bytes: row_bytes(model),
            prompt_rows,
        };
        let alive = Alive(is_alive.clone());
        let thread = std::thread::Builder::new()
            .name("blip2-model".into())
            .spawn(move || {
                let _alive = alive;
                worker.run();
            })
            .map_err(crate::StartError::Runtime)?;
        let engine =
            Self { queue, model: model.clone(), kv_budget: config.kv_bytes, batch: config.batch, is_alive };
        Ok((engine, thread))
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.is_alive.load(Ordering::Acquire)
    }

    /// Whether a request would be refused now: asked before its body is read.
    pub(crate) fn is_full(&self) -> bool {
        self.queue.is_full()
    }

    /// Accepts a request for writing.
    ///
    /// # Errors
    /// When the queue is full or closed, or the request alone needs more than there is.
    pub(crate) fn write(&self, write: Write) -> Result<UnboundedReceiver<Event>, ApiError> {
        if n_texts(&write.generation) > self.batch {
            let message = format!("this server writes at most {} texts or beams at once", self.batch);
            return Err(ApiError::invalid("n", message));
        }
        if kv_bytes(&write, &self.model, row_bytes(&self.model)) > self.kv_budget {
            let message =
                "so long a text does not fit the server's memory: ask for fewer tokens, answers or beams";
            return Err(ApiError::invalid("max_tokens", message));
        }
        let (events, receiver) = unbounded_channel();
        self.push(Work::Write { write: Box::new(write), events })?;
        Ok(receiver)
    }

    /// Accepts a request for one computation, and waits for it.
    ///
    /// # Errors
    /// When the queue is full or closed; those of `run`.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        pictures: Vec<Picture>,
        run: impl FnOnce(&Blip2, &[&ImageFeatures]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (sender, mut receiver) = unbounded_channel();
        let closed = sender.clone();
        let run: Run = Box::new(move |given| {
            let _ = sender.send(given.and_then(|(model, features)| run(model, features)));
        });
        self.push(Work::Compute { pictures, run, is_wanted: Box::new(move || !closed.is_closed()) })?;
        // Nothing comes when the computation panicked.
        receiver.recv().await.unwrap_or_else(|| Err(ApiError::internal()))
    }

    fn push(&self, work: Work) -> Result<(), ApiError> {
        self.queue.push(Job { accepted: Instant::now(), span: tracing::Span::current(), work })
    }

    /// Accepts nothing more; the thread ends when all is done.
    pub(crate) fn close(&self) {
        self.queue.close();
    }

    /// Ends everything now, with an error.
    pub(crate) fn abort(&self) {
        self.queue.abort();
    }
}

/// Tells of the thread's end, however it ends.
struct Alive(Arc<AtomicBool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Texts that grow at once for a request.
fn n_texts(generation: &GenerationConfig) -> usize {
    generation.num_beams.max(generation.num_return_sequences)
}

/// What a token takes in the language model's memory.
fn row_bytes(model: &Blip2) -> usize {
    model.language_model().map_or(0, |language_model| language_model.new_cache().row_bytes())
}

/// What a request can take at most in the language model's memory.
fn kv_bytes(write: &Write, model: &Blip2, row_bytes: usize) -> usize {
    let n_prompt = write.prompt.n_rows(model.config().qformer.num_query_tokens);
    let n_rows = n_prompt + n_texts(&write.generation) * write.generation.max_new_tokens;
    n_rows.saturating_mul(row_bytes)
}
