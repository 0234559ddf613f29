//! The rounds, seen from inside: nothing here depends on how fast the machine is.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::time::Duration;

use blip2::image::RgbImage;
use blip2::text::Turn;
use tokio::sync::oneshot;

use super::*;
use crate::testing::model;

/// A running engine with a tiny encoder-decoder model.
struct Running {
    engine: Arc<Engine>,
    metrics: Arc<Metrics>,
    pixels: Arc<Vec<f32>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start() -> Self {
        let (model, metrics, config) = (model("blip2_t5"), Arc::new(Metrics::new()), ServerConfig::default());
        let cache = Arc::new(Recent::new(config.picture_cache_bytes));
        let (engine, thread) = Engine::start(&model, &cache, &metrics, &config).expect("an engine");
        let processor = model.vision().expect("an encoder").processor();
        let pixels = Arc::new(processor.pixels(&RgbImage::new(30, 20)));
        Self { engine: Arc::new(engine), metrics, pixels, thread: Some(thread) }
    }

    fn write(&self, generation: GenerationConfig) -> UnboundedReceiver<Event> {
        let prompt = self.engine.model.prompt(&[Turn::open("who?")]).expect("a prompt");
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
