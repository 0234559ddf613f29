//! What operators watch, in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Bounds of the buckets of times, in seconds: from a cached picture to the longest request.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];
/// Bounds of the buckets of batch sizes.
const TEXTS: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

/// The numbers of one server.
#[derive(Debug)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    request_seconds: Histogram,
    first_token_seconds: Histogram,
    between_tokens_seconds: Histogram,
    stages: [Histogram; 6],
    batch_texts: Histogram,
    pub(crate) connections: AtomicUsize,
    pub(crate) queued: AtomicUsize,
    pub(crate) running_texts: AtomicUsize,
    pub(crate) cached_picture_bytes: AtomicUsize,
    pub(crate) cached_prompt_bytes: AtomicUsize,
    pub(crate) kv_bytes: AtomicUsize,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) cached_prompt_tokens: AtomicU64,
    pub(crate) generated_tokens: AtomicU64,
    pub(crate) picture_hits: AtomicU64,
    pub(crate) picture_misses: AtomicU64,
    pub(crate) panics: AtomicU64,
}

/// The stages of a request whose times are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// From base64 to pixels.
    Decode,
    /// In the queue.
    Wait,
    /// The image encoder and the Q-Former, for a batch of pictures.
    Encode,
    /// One computation about pictures that is not writing: a match, labels, a heat map.
    Compute,
    /// The language model reads the prompts of newcomers; of long ones the beginning.
    Prompt,
    /// It reads on in long prompts, then writes one token for each text of the batch.
    Step,
}

impl Stage {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Decode, "decode"),
        (Self::Wait, "wait"),
        (Self::Encode, "encode"),
        (Self::Compute, "compute"),
        (Self::Prompt, "prompt"),
        (Self::Step, "step"),
    ];
}

/// Observations in buckets.
#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds: what is beyond the last.
    counts: Vec<AtomicU64>,
    /// In millionths, since there is no atomic float.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add((value * 1e6) as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, label: &str) {
        let comma = if label.is_empty() { "" } else { "," };
        let mut total = 0;
        let bounds = self.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (count, bound) in self.counts.iter().zip(bounds) {
            total += count.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}_bucket{{{label}{comma}le=\"{bound}\"}} {total}");
        }
        let braces = if label.is_empty() { String::new() } else { format!("{{{label}}}") };
        let sum = self.sum.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum{braces} {sum}\n{name}_count{braces} {total}");
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let seconds = || Histogram::new(&SECONDS);
        Self {
            requests: Mutex::default(),
            request_seconds: seconds(),
            first_token_seconds: seconds(),
            between_tokens_seconds: seconds(),
            stages: std::array::from_fn(|_| seconds()),
            batch_texts: Histogram::new(&TEXTS),
            connections: AtomicUsize::new(0),
            queued: AtomicUsize::new(0),
            running_texts: AtomicUsize::new(0),
            cached_picture_bytes: AtomicUsize::new(0),
            cached_prompt_bytes: AtomicUsize::new(0),
            kv_bytes: AtomicUsize::new(0),
            prompt_tokens: AtomicU64::new(0),
            cached_prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            picture_hits: AtomicU64::new(0),
            picture_misses: AtomicU64::new(0),
            panics: AtomicU64::new(0),
        }
    }

    /// A request ended: `ok`, the code of its error, or `client_disconnected`.
    pub(crate) fn request(&self, route: &'static str, outcome: &'static str, took: Duration) {
        let mut requests = self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *requests.entry((route, outcome)).or_default() += 1;
        drop(requests);
        self.request_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn stage(&self, stage: Stage, took: Duration) {
        let at = Stage::ALL.iter().position(|(known, _)| *known == stage).unwrap_or(0);
        self.stages[at].observe(took.as_secs_f64());
    }

    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token_seconds.observe(after.as_secs_f64());
    }

    pub(crate) fn next_token(&self, after: Duration) {
        self.between_tokens_seconds.observe(after.as_secs_f64());
    }

    pub(crate) fn batch(&self, n_texts: usize) {
        self.batch_texts.observe(n_texts as f64);
    }

    /// All numbers, in Prometheus' text format.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let head = |out: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        head(&mut out, "blip2_requests_total", "counter", "Requests that ended, by address and outcome.");
        let requests = self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        for ((route, outcome), count) in requests {
            let _ = writeln!(out, "blip2_requests_total{{route=\"{route}\",outcome=\"{outcome}\"}} {count}");
        }
        for (name, help, histogram) in [
            ("blip2_request_seconds", "From a request's headers to its last byte.", &self.request_seconds),
            ("blip2_first_token_seconds", "From acceptance to the first token.", &self.first_token_seconds),
            ("blip2_between_tokens_seconds", "Between two tokens of a text.", &self.between_tokens_seconds),
            ("blip2_batch_texts", "Texts that one step of the language model grows.", &self.batch_texts),
        ] {
            head(&mut out, name, "histogram", help);
            histogram.write(&mut out, name, "");
        }
        head(&mut out, "blip2_stage_seconds", "histogram", "Time in each stage.");
        for ((_, stage), histogram) in Stage::ALL.iter().zip(&self.stages) {
            histogram.write(&mut out, "blip2_stage_seconds", &format!("stage=\"{stage}\""));
        }
        for (name, help, value) in [
            ("blip2_connections", "Open connections.", &self.connections),
            ("blip2_queue_requests", "Requests that wait for the model.", &self.queued),
            ("blip2_running_texts", "Texts that are being written.", &self.running_texts),
            ("blip2_picture_cache_bytes", "Memory of remembered pictures.", &self.cached_picture_bytes),
            (
                "blip2_prompt_cache_bytes",
                "Memory of what the language model has read before.",
                &self.cached_prompt_bytes,
            ),
            ("blip2_kv_cache_bytes", "Memory of the language model's keys and values.", &self.kv_bytes),
        ] {
            head(&mut out, name, "gauge", help);
            let _ = writeln!(out, "{name} {}", value.load(Ordering::Relaxed));
        }
        for (name, help, value) in [
            ("blip2_prompt_tokens_total", "Tokens of prompts, pictures' included.", &self.prompt_tokens),
            ("blip2_cached_prompt_tokens_total", "Of these, remembered ones.", &self.cached_prompt_tokens),
            ("blip2_generated_tokens_total", "Tokens written.", &self.generated_tokens),
            ("blip2_picture_cache_hits_total", "Pictures that were remembered.", &self.picture_hits),
            ("blip2_picture_cache_misses_total", "Pictures that were not.", &self.picture_misses),
            ("blip2_panics_total", "Requests that met a mistake of the program.", &self.panics),
        ] {
            head(&mut out, name, "counter", help);
            let _ = writeln!(out, "{name} {}", value.load(Ordering::Relaxed));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_bounds_inclusive() {
        let metrics = Metrics::new();
        for value in [1, 2, 2, 5, 999] {
            metrics.batch(value);
        }
        metrics.request("/v1/models", "ok", Duration::from_millis(30));
        let text = metrics.text();
        for line in [
            "blip2_batch_texts_bucket{le=\"1\"} 1",
            "blip2_batch_texts_bucket{le=\"2\"} 3",
            "blip2_batch_texts_bucket{le=\"8\"} 4",
            "blip2_batch_texts_bucket{le=\"64\"} 4",
            "blip2_batch_texts_bucket{le=\"+Inf\"} 5",
            "blip2_batch_texts_sum 1009",
            "blip2_requests_total{route=\"/v1/models\",outcome=\"ok\"} 1",
            "blip2_stage_seconds_bucket{stage=\"wait\",le=\"0.001\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
