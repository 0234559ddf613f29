//! Times linear layers in eight and four bits against bf16 and f32, on the shapes of the published models.
//!
//! `cargo run --release -p blip2-kernels --example quantized_speed [RUNS]`
//!
//! The formats take turns, so that a change of the machine's speed meets all of them. Times are the shortest and the median
//! of the runs, rates are of the shortest, and the ratios say how many times faster than bf16 both are. For few rows, each
//! run reads another copy of the weights, so that they come from memory as a model's do.

use std::hint::black_box;
use std::time::Instant;

use blip2_kernels::linear::{Epilogue, Format as PlainFormat, PackedWeight};
use blip2_kernels::quantized::{Format, QuantizedWeight};

/// Bytes that no cache holds.
const BEYOND_CACHE: usize = 256 << 20;

enum Weight {
    Packed(PackedWeight),
    Quantized(QuantizedWeight),
}

impl Weight {
    fn n_bytes(&self) -> usize {
        match self {
            Self::Packed(w) => w.n_bytes(),
            Self::Quantized(w) => w.bytes().len(),
        }
    }

    fn forward(&self, x: &[f32], n_rows: usize, bias: &[f32]) -> Vec<f32> {
        match self {
            Self::Packed(w) => w.forward(x, n_rows, Epilogue::bias(Some(bias))),
            Self::Quantized(w) => w.forward(x, n_rows, Epilogue::bias(Some(bias))),
        }
    }
}

fn main() {
    let n_runs = std::env::args().nth(1).and_then(|runs| runs.parse().ok()).unwrap_or(15);
    // (rows, outputs, inputs): decode, beams, prefill, ViT-g.
    for (n_rows, n_out, n_in) in [
        (1, 10_240, 2560),
        (1, 2560, 10_240),
        (1, 2560, 2560),
        (1, 50_272, 2560),
        (5, 10_240, 2560),
        (40, 10_240, 2560),
        (257, 6144, 1408),
        (257, 1408, 6144),
        (1028, 6144, 1408),
    ] {
        measure(n_rows, n_out, n_in, n_runs);
    }
}

fn measure(n_rows: usize, n_out: usize, n_in: usize, n_runs: usize) {
    let row = |i: usize, row: &mut [f32]| {
        row.iter_mut().enumerate().for_each(|(j, w)| *w = ((i * n_in + j) as f32 * 0.618).fract() - 0.5);
    };
    let pack = |format| Weight::Packed(PackedWeight::pack(n_out, n_in, format, &row));
    let quantize = |format| Weight::Quantized(QuantizedWeight::quantize(n_out, n_in, format, &row));
    type Make<'a> = Box<dyn Fn() -> Weight + 'a>;
    let mut makers: Vec<(String, Make<'_>)> = vec![
        ("F32".into(), Box::new(|| pack(PlainFormat::F32))),
        ("Bf16".into(), Box::new(|| pack(PlainFormat::Bf16))),
    ];
    for format in Format::ALL {
        if Format::ROUNDED.contains(&format) {
            makers.push((format!("{format:?}"), Box::new(move || quantize(format))));
        } else if n_in.is_multiple_of(format.in_features_multiple()) {
            // Any bytes are some weight, and these are one of small numbers.
            let n_bytes = format.n_bytes(n_out, n_in).expect("a weight that fits into memory");
            let bytes = move || Box::new(vec![0x15u8; n_bytes]);
            let make = move || Weight::Quantized(QuantizedWeight::from_bytes(n_out, n_in, format, bytes()));
            makers.push((format!("{format:?}"), Box::new(make)));
        }
    }
    let weights: Vec<(String, Vec<Weight>)> = makers
        .iter()
        .map(|(name, make)| {
            let first = make();
            let copies = if n_rows < 12 { (BEYOND_CACHE / first.n_bytes()).clamp(1, 4) } else { 1 };
            (name.clone(), std::iter::once(first).chain((1..copies).map(|_| make())).collect())
        })
        .collect();
    let x: Vec<f32> = (0..n_rows * n_in).map(|i| (i as f32 * 0.37).sin()).collect();
    let bias = vec![0.25; n_out];
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); weights.len()];
    for run in 0..=n_runs {
        for ((_, copies), times) in weights.iter().zip(&mut times) {
            let weight = &copies[run % copies.len()];
            let start = Instant::now();
            black_box(weight.forward(&x, n_rows, &bias));
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let shortest_and_median = |times: &[f64]| {
        let mut counted = times[1..].to_vec();
        counted.sort_by(f64::total_cmp);
        (counted[0], counted[counted.len() / 2])
    };
    let bf16 = shortest_and_median(&times[1]);
    for ((name, copies), times) in weights.iter().zip(&times) {
        let (shortest, median) = shortest_and_median(times);
        let operations = 2.0 * (n_rows * n_out * n_in) as f64 / shortest / 1e9;
        let bytes = copies[0].n_bytes() as f64 / shortest / 1e9;
        let (a, b) = (bf16.0 / shortest, bf16.1 / median);
        #[allow(clippy::print_stdout, reason = "an example prints")]
        {
            println!(
                "{n_rows:>4} x {n_out:>5} x {n_in:>5} {name:10} {:8.3} ms ({:8.3}) {operations:7.1} GFLOP/s {bytes:6.1} GB/s \
                 {a:5.2} ({b:5.2}) x bf16",
                shortest * 1e3,
                median * 1e3,
            );
        }
    }
}
