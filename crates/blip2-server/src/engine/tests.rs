//! The rounds, seen from inside: nothing here depends on how fast the machine is.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::time::Duration;

use blip2::image::RgbImage;
use blip2::text::Turn;
use tokio::sync::oneshot;

use super::*;
use crate::testing::model;

/// A running engine with a tiny model.
struct Running {
    engine: Arc<Engine>,
    metrics: Arc<Metrics>,
    pixels: Arc<Vec<f32>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// With an encoder-decoder model.
    fn start() -> Self {
        Self::start_reading(PROMPT_ROWS_A_STEP, "blip2_t5", &ServerConfig::default())
    }

    fn start_reading(prompt_rows: usize, name: &str, config: &ServerConfig) -> Self {
        let (model, metrics) = (model(name), Arc::new(Metrics::new()));
        let cache = Arc::new(Recent::new(config.picture_cache_bytes));
        let (engine, thread) =
            Engine::start_reading(prompt_rows, &model, &cache, &metrics, config).expect("an engine");
        let processor = model.vision().expect("an encoder").processor();
        let pixels = Arc::new(processor.pixels(&RgbImage::new(30, 20)));
        Self { engine: Arc::new(engine), metrics, pixels, thread: Some(thread) }
    }

    fn write(&self, generation: GenerationConfig) -> UnboundedReceiver<Event> {
        self.write_about("who?", generation)
    }

    fn write_about(&self, question: &str, generation: GenerationConfig) -> UnboundedReceiver<Event> {
        let prompt = self.engine.model.prompt(&[Turn::open(question)]).expect("a prompt");
        let picture = Picture::New { key: [1; 32], pixels: self.pixels.clone() };
        let write = Write { picture, prompt, generation, constraint: None, top_log_probs: 0 };
        self.engine.write(write).expect("accepted")
    }

    /// A computation that goes on until the second half is dropped; the first half tells when it begins.
    fn occupy(&self) -> (oneshot::Receiver<()>, mpsc::Sender<()>) {
        let (begin, begun) = oneshot::channel();
        let (release, released) = mpsc::channel::<()>();
        let engine = self.engine.clone();
        tokio::spawn(async move {
            let held = engine.compute(Vec::new(), move |_, _| {
                let _ = begin.send(());
                let _ = released.recv();
                Ok(())
            });
            held.await
        });
        (begun, release)
    }

    /// The thread does nothing else until what this returns is dropped.
    async fn hold(&self) -> mpsc::Sender<()> {
        let (begun, release) = self.occupy();
        begun.await.expect("it began");
        release
    }

    async fn wait_for_queue(&self, n: usize) {
        let reached = async {
            while self.metrics.queued.load(Relaxed) != n {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reached).await.expect("in the queue");
    }

    /// Rounds in which something was read or written.
    fn n_steps(&self) -> usize {
        let text = self.metrics.text();
        let count =
            text.lines().find_map(|line| line.strip_prefix("blip2_stage_seconds_count{stage=\"step\"} "));
        count.and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    fn n_rows(&self, question: &str) -> usize {
        let prompt = self.engine.model.prompt(&[Turn::open(question)]).expect("a prompt");
        prompt.n_rows(self.engine.model.config().qformer.num_query_tokens)
    }

    /// Ends it once all is done.
    fn end(&mut self) {
        self.engine.close();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it ended well");
        }
    }
}

/// Exactly `n` tokens.
fn tokens(n: usize) -> GenerationConfig {
    GenerationConfig { min_new_tokens: n, max_new_tokens: n, ..GenerationConfig::default() }
}

async fn n_written(mut events: UnboundedReceiver<Event>) -> Result<usize, ApiError> {
    loop {
        match events.recv().await.expect("an event") {
            Event::Token(_) => {}
            Event::Done(written) => return written.map(|written| written.answers[0].token_ids.len()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_takes_no_neighbour_along() {
    let mut running = Running::start();
    let held = running.hold().await;
    // What the decoder begins with is as long as the whole text may be.
    let never = GenerationConfig { max_length: Some(1), ..GenerationConfig::default() };
    let events = [tokens(3), never.clone(), tokens(5), never].map(|generation| running.write(generation));
    drop(held);
    let mut outcomes = Vec::new();
    for events in events {
        outcomes.push(n_written(events).await.map_err(|error| (error.code, error.param)));
    }
    let refused = || Err(("invalid_value", Some("max_length".to_owned())));
    assert_eq!(outcomes, [Ok(3), refused(), Ok(5), refused()]);
    running.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_grow_between_two_computations() {
    let mut running = Running::start();
    let held = running.hold().await;
    let events = running.write(tokens(20));
    let computations: Vec<_> = (0..10)
        .map(|_| {
            let (engine, metrics) = (running.engine.clone(), running.metrics.clone());
            tokio::spawn(async move {
                engine.compute(Vec::new(), move |_, _| Ok(metrics.generated_tokens.load(Relaxed))).await
            })
        })
        .collect();
    running.wait_for_queue(11).await;
    drop(held);
    let mut n_before = Vec::new();
    for computation in computations {
        n_before.push(computation.await.expect("not cancelled").expect("computed"));
    }
    n_before.sort_unstable();
    assert_eq!(n_before, (0..10).collect::<Vec<_>>(), "tokens before each of them");
    assert_eq!(n_written(events).await, Ok(20));
    running.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_computation_whose_client_left_is_not_begun() {
    let mut running = Running::start();
    let held = running.hold().await;
    // The next two are taken from the queue together.
    let (begun, release) = running.occupy();
    running.wait_for_queue(1).await;
    let n_run = Arc::new(AtomicUsize::new(0));
    let left = tokio::spawn({
        let (engine, n_run) = (running.engine.clone(), n_run.clone());
        async move { engine.compute(Vec::new(), move |_, _| Ok(n_run.fetch_add(1, Relaxed))).await }
    });
    running.wait_for_queue(2).await;
    drop(held);
    begun.await.expect("it began");
    left.abort();
    assert!(left.await.is_err(), "cancelled");
    drop(release);
    running.end();
    assert_eq!(n_run.load(Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_whose_client_left_end_with_the_step_under_way() {
    const N_TEXTS: u64 = 4;
    let mut running = Running::start();
    let drawn = GenerationConfig { do_sample: true, num_return_sequences: N_TEXTS as usize, ..tokens(400) };
    let mut events = running.write(drawn);
    assert!(matches!(events.recv().await, Some(Event::Token(_))), "it began");
    drop(events);
    let before = running.metrics.generated_tokens.load(Relaxed);
    // Waits for all that is written.
    running.end();
    let after = running.metrics.generated_tokens.load(Relaxed) - before;
    assert!(after <= 2 * N_TEXTS, "{after} tokens for nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn room_for_keys_and_values_is_given_back_when_nothing_comes() {
    let mut running = Running::start();
    let n_bytes = || running.metrics.kv_bytes.load(Relaxed);
    for _ in 0..2 {
        let mut events = running.write(tokens(20));
        assert!(matches!(events.recv().await, Some(Event::Token(_))), "it began");
        assert_eq!(n_written(events).await, Ok(20));
        let given_back = async {
            while n_bytes() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), given_back).await.expect("nothing is kept");
    }
    running.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_whose_client_left_is_not_read_on() {
    let question = "who? ".repeat(8);
    // A row a round, and one text at a time.
    let config = ServerConfig { batch: 1, ..ServerConfig::default() };
    let mut running = Running::start_reading(1, "blip2_opt", &config);
    let (n_long, n_short) = (running.n_rows(&question), running.n_rows("who?"));
    assert!(n_long > n_short + 8, "{n_long} {n_short}");
    let held = running.hold().await;
    let events = running.write_about(&question, tokens(3));
    running.wait_for_queue(1).await;
    let (first_begun, first) = running.occupy();
    running.wait_for_queue(2).await;
    let (begun, release) = running.occupy();
    running.wait_for_queue(3).await;
    drop(held);
    first_begun.await.expect("it began with the prompt");
    drop(first);
    begun.await.expect("it began in the next round");
    assert_eq!(running.n_steps(), 1, "the prompt is being read");
    drop(events);
    // There is no place for this one before that one's is free.
    let next = running.write(tokens(2));
    running.wait_for_queue(1).await;
    drop(release);
    assert_eq!(n_written(next).await, Ok(2));
    running.end();
    let n_steps = running.n_steps();
    assert!(n_steps < n_long, "{n_steps} rounds, the long prompt alone takes {n_long}");
}
