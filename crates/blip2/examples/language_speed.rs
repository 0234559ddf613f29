//! How fast a language model loads, reads and writes.
//!
//! `cargo run --release -p blip2 --example language_speed -- FILE.gguf [f32|bf16]`
#![allow(clippy::print_stdout, reason = "this is a program")]

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use blip2::cache::CachedSequence;
use blip2::generate::{GenerationConfig, Request, Session, StopRules, generate};
use blip2::language::LanguageModel;
use blip2::layers::Precision;
use blip2::weights::gguf::Gguf;
use blip2::{Error, Result};

const N_RUNS: usize = 5;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or_else(|| Error::Request("which GGUF file?".into()))?;
    let precision = match arguments.next().as_deref() {
        Some("f32") => Precision::F32,
        _ => Precision::Bf16,
    };
    let load = || LanguageModel::from_gguf(&Gguf::open(&path)?, precision);
    report("load", median(|| load().map(drop))?, 1, "times");
    let model = load()?;
    println!("{} parameters, {} MB in {precision:?}", model.n_parameters(), model.n_bytes() / 1_000_000);

    // As the default model's prompt: some words, 32 image rows, some words.
    let ids: Vec<u32> = (0..60).map(|i| 1000 + 37 * i).collect();
    let embeds = model.embed(&ids)?;
    let prompts = |n: usize| vec![(CachedSequence::new(), embeds.clone()); n];
    for n in [1, 8] {
        let time = median(|| Session::new(&model, &mut model.new_cache(), prompts(n)).map(drop))?;
        report(&format!("read {n} prompts of {} tokens", ids.len()), time, n * ids.len(), "tokens");
    }
    for (n, num_beams, max_new_tokens) in [(1, 1, 64), (1, 5, 20), (8, 1, 20), (8, 5, 20)] {
        let config = GenerationConfig { num_beams, max_new_tokens, ..Default::default() };
        let mut cache = model.new_cache();
        let mut session = Session::new(&model, &mut cache, prompts(n))?;
        let stop = StopRules::default();
        let request = Request { config: &config, stop: &stop, seen: &[], constraint: None };
        let time = median(|| generate(&mut session, request, &mut |_| ControlFlow::Continue(())).map(drop))?;
        let what = format!("{n} prompts, {num_beams} beams, {max_new_tokens} tokens");
        report(&what, time, n * max_new_tokens, "tokens");
    }
    Ok(())
}

fn median(mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut times = Vec::with_capacity(N_RUNS);
    for _ in 0..N_RUNS {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[N_RUNS / 2])
}

fn report(what: &str, time: Duration, n: usize, unit: &str) {
    println!("{what:36} {:8.1} ms  {:8.1} {unit}/s", time.as_secs_f64() * 1e3, n as f64 / time.as_secs_f64());
}
