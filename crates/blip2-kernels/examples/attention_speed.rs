//! Times attention and its gradient on the training shapes of the default model, and the steps of OPT-2.7B's generation.
//!
//! `cargo run --release -p blip2-kernels --example attention_speed`

use std::time::Instant;

use blip2_kernels::attention::{AttentionShape, Sequence, Span, attention, attention_backward};
use blip2_kernels::dropout::Dropout;
use half::bf16;

fn main() {
    // Picture-text matching in stage 1: 32 queries and 24 tokens.
    let qformer = AttentionShape { n_heads: 12, n_kv_heads: 12, head_dim: 32, scale: 0.17 };
    let matching: Vec<Sequence> = (0..192).map(|i| whole(i * 56, 56, i * 56, 56, false)).collect();
    measure("matching, 192 x 56", qformer, &matching, None);
    measure("matching, 192 x 56, dropout", qformer, &matching, Some(Dropout { p: 0.1, seed: 7 }));
    let cross: Vec<Sequence> = (0..192).map(|i| whole(i * 32, 32, i * 49, 49, false)).collect();
    measure("cross-attention, 192 x 32 to 49", qformer, &cross, None);
    // Stage 2: a shared prefix of 40 rows, three texts of 24 rows that see it.
    let llama = AttentionShape { n_heads: 9, n_kv_heads: 3, head_dim: 64, scale: 0.125 };
    let branched: Vec<Sequence> = (0..32)
        .flat_map(|i| {
            let first = i * 112;
            let prefix = Span { start: first, len: 40 };
            let texts = (0..3).map(move |t| {
                let own = Span { start: first + 40 + t * 24, len: 24 };
                Sequence { queries: vec![own], keys: vec![prefix, own], causal: true }
            });
            std::iter::once(whole(first, 40, first, 40, true)).chain(texts)
        })
        .collect();
    measure("language model, 32 x (40 + 3 x 24)", llama, &branched, None);
    for (n_texts, n_shared, n_own) in [(1, 40, 20), (5, 40, 20), (5, 0, 60), (1, 40, 500)] {
        measure_steps(n_texts, n_shared, n_own);
    }
}

/// A step of texts with some keys in common and some of their own through the 32 layers of OPT-2.7B, whose keys and values lie
/// in bf16 at different places.
fn measure_steps(n_texts: usize, n_shared: usize, n_own: usize) {
    let shape = AttentionShape::multi_head(32, 80);
    let width = shape.n_heads * shape.head_dim;
    let n_rows = n_shared + n_texts * n_own;
    let texts: Vec<Sequence> = (0..n_texts)
        .map(|i| Sequence {
            queries: vec![Span { start: i, len: 1 }],
            keys: vec![Span { start: 0, len: n_shared }, Span { start: n_shared + i * n_own, len: n_own }],
            causal: true,
        })
        .collect();
    let rows: Vec<bf16> = (0..n_rows * width).map(|i| bf16::from_f32((i as f32 * 0.37).sin())).collect();
    let layers: Vec<[Vec<bf16>; 2]> = (0..32).map(|_| [rows.clone(), rows.clone()]).collect();
    let q: Vec<f32> = (0..n_texts * width).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut out = vec![0.0; q.len()];
    let time = median(|| {
        for [k, v] in &layers {
            attention(&q, k, v, &texts, shape, None, None, &mut out);
        }
    });
    let name = format!("32 layers, {n_texts} x ({n_shared} + {n_own}) keys");
    #[allow(clippy::print_stdout, reason = "an example prints")]
    {
        println!("{name:40} forward {time:6.2} ms");
    }
}

fn whole(query: usize, n_queries: usize, key: usize, n_keys: usize, causal: bool) -> Sequence {
    Sequence {
        queries: vec![Span { start: query, len: n_queries }],
        keys: vec![Span { start: key, len: n_keys }],
        causal,
    }
}

fn measure(name: &str, shape: AttentionShape, sequences: &[Sequence], dropout: Option<Dropout>) {
    let end = |spans: &[Span]| spans.iter().map(|span| span.start + span.len).max().unwrap_or(0);
    let n_queries = sequences.iter().map(|s| end(&s.queries)).max().unwrap_or(0);
    let n_keys = sequences.iter().map(|s| end(&s.keys)).max().unwrap_or(0);
    let numbers = |n: usize| -> Vec<f32> { (0..n).map(|i| (i as f32 * 0.37).sin()).collect() };
    let q = numbers(n_queries * shape.n_heads * shape.head_dim);
    let k = numbers(n_keys * shape.n_kv_heads * shape.head_dim);
    let (v, d_out) = (k.clone(), q.clone());
    let mut out = vec![0.0; q.len()];
    let forward = median(|| attention(&q, &k, &v, sequences, shape, None, dropout, &mut out));
    let backward = median(|| {
        std::hint::black_box(attention_backward(&q, &k, &v, &d_out, sequences, shape, None, dropout));
    });
    #[allow(clippy::print_stdout, reason = "an example prints")]
    {
        println!("{name:40} forward {forward:6.2} ms  backward {backward:6.2} ms");
    }
}

fn median(mut work: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
