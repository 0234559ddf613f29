//! Fused scaled-dot-product attention over packed rows, with its gradient.
//!
//! Scores are never held for more than one sequence and head. The gradient computes the probabilities again. The work
//! for a query row runs over its own keys in order, so it does not depend on what else is in the batch.

use std::cell::RefCell;

use rayon::prelude::*;

use crate::dropout::Dropout;
use crate::gemm::Output;
use crate::isa::{Isa, with_isa};
use crate::lanes::{axpy, dot, exp, max, sum};

/// Consecutive rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first row.
    pub start: usize,
    /// How many rows.
    pub len: usize,
}

/// Which query rows see which key rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Rows of `q`, in order. No row may belong to two sequences.
    pub queries: Vec<Span>,
    /// Rows of `k` and `v`, in order. Sequences may share them.
    pub keys: Vec<Span>,
    /// The last query row sees all keys, the one before it all but the last, and so on.
    pub causal: bool,
}

/// Heads and their width.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Heads of the queries.
    pub n_heads: usize,
    /// Heads of keys and values, a divisor of `n_heads`; head `h` reads key head `h * n_kv_heads / n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What scores are multiplied with, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// `softmax(q kᵀ * scale) v` for each sequence and head; rows of `out` that no sequence names are left alone.
///
/// `q` and `out` are `[Nq, n_heads * head_dim]`, `k` and `v` `[Nk, n_kv_heads * head_dim]`. Dropout acts on the
/// probabilities.
///
/// # Panics
/// When a span lies outside its rows, a query row belongs to two sequences, or a causal sequence has more queries than
/// keys.
pub fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    sequences: &[Sequence],
    shape: AttentionShape,
    dropout: Option<Dropout>,
    out: &mut [f32],
) {
    let offsets = check(q.len(), k.len(), v.len(), sequences, shape);
    assert_eq!(out.len(), q.len(), "out must have the shape of q");
    let isa = Isa::detect();
    let width = shape.n_heads * shape.head_dim;
    let out = Output(out.as_mut_ptr());
    (0..sequences.len() * shape.n_heads).into_par_iter().for_each(|unit| {
        let (number, head) = (unit / shape.n_heads, unit % shape.n_heads);
        let mut scratch = Scratch::take();
        with_isa(
            isa,
            #[inline(always)]
            || {
                let work =
                    Head { sequence: &sequences[number], shape, head, offset: offsets[number], dropout };
                work.gather(q, k, &mut scratch);
                let mut row = vec![0.0; shape.head_dim];
                for (i, query) in rows(&work.sequence.queries).enumerate() {
                    let n_keys = work.n_visible(i);
                    work.probabilities(i, n_keys, &mut scratch);
                    row.fill(0.0);
                    for (j, key) in rows(&work.sequence.keys).take(n_keys).enumerate() {
                        let p = scratch.p[j] * work.factor(i, j);
                        axpy(p, work.of_key(v, key), &mut row);
                    }
                    // SAFETY: `check` made sure that `query` is a row of q, hence of out, and that no other sequence has it;
                    // other heads write other columns.
                    unsafe {
                        let to = out.at(query * width + head * shape.head_dim);
                        std::ptr::copy_nonoverlapping(row.as_ptr(), to, shape.head_dim);
                    }
                }
            },
        );
        scratch.give_back();
    });
}

/// The gradients of [`attention`]: `d_q`, `d_k` and `d_v` are overwritten; keys that sequences share get the sum.
///
/// # Panics
/// As [`attention`].
#[allow(clippy::too_many_arguments, reason = "three gradients of three operands")]
pub fn attention_backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    sequences: &[Sequence],
    shape: AttentionShape,
    dropout: Option<Dropout>,
    d_q: &mut [f32],
    d_k: &mut [f32],
    d_v: &mut [f32],
) {
    let offsets = check(q.len(), k.len(), v.len(), sequences, shape);
    assert!(d_out.len() == q.len() && d_q.len() == q.len(), "gradients must have the shape of q");
    assert!(d_k.len() == k.len() && d_v.len() == k.len(), "gradients must have the shape of k and v");
    for buffer in [&mut *d_q, &mut *d_k, &mut *d_v] {
        buffer.fill(0.0);
    }
    let isa = Isa::detect();
    let (d, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
    let (q_width, k_width) = (shape.n_heads * d, shape.n_kv_heads * d);
    let (d_q, d_k, d_v) = (Output(d_q.as_mut_ptr()), Output(d_k.as_mut_ptr()), Output(d_v.as_mut_ptr()));
    // Sequences may share keys, heads do not: a task owns a key head's columns and adds to them in a fixed order.
    (0..shape.n_kv_heads).into_par_iter().for_each(|kv_head| {
        let mut scratch = Scratch::take();
        with_isa(
            isa,
            #[inline(always)]
            || {
                for (number, sequence) in sequences.iter().enumerate() {
                    for head in kv_head * group..(kv_head + 1) * group {
                        let work = Head { sequence, shape, head, offset: offsets[number], dropout };
                        work.gather(q, k, &mut scratch);
                        work.gather_rows(k, v, &mut scratch);
                        work.backward(d_out, &mut scratch);
                        for (i, query) in rows(&sequence.queries).enumerate() {
                            // SAFETY: `query` is a row of q; these columns belong to this task alone.
                            let to = unsafe {
                                std::slice::from_raw_parts_mut(d_q.at(query * q_width + head * d), d)
                            };
                            to.copy_from_slice(&scratch.d_q[i * d..][..d]);
                        }
                        for (j, key) in rows(&sequence.keys).enumerate() {
                            // SAFETY: `key` is a row of k and v; these columns belong to this task alone.
                            let (to_k, to_v) = unsafe {
                                let at = key * k_width + kv_head * d;
                                (
                                    std::slice::from_raw_parts_mut(d_k.at(at), d),
                                    std::slice::from_raw_parts_mut(d_v.at(at), d),
                                )
                            };
                            axpy(1.0, &scratch.d_k[j * d..][..d], to_k);
                            axpy(1.0, &scratch.d_v[j * d..][..d], to_v);
                        }
                    }
                }
            },
        );
        scratch.give_back();
    });
}

/// Checks every span and returns, for each sequence, the index of its first probability, for dropout.
fn check(q: usize, k: usize, v: usize, sequences: &[Sequence], shape: AttentionShape) -> Vec<u64> {
    let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = shape;
    assert!(
        n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads) && head_dim > 0,
        "heads do not divide: {shape:?}"
    );
    assert!(k == v, "k and v differ in length");
    let (n_queries, n_keys) = (q / (n_heads * head_dim), k / (n_kv_heads * head_dim));
    assert!(q == n_queries * n_heads * head_dim && k == n_keys * n_kv_heads * head_dim, "rows are not whole");
    let mut taken = vec![false; n_queries];
    let mut offset = 0;
    let mut offsets = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let (n, m) = (count(&sequence.queries), count(&sequence.keys));
        assert!(!sequence.causal || n <= m, "a causal sequence has {n} queries for {m} keys");
        assert!(sequence.keys.iter().all(|span| span.start + span.len <= n_keys), "a key span is outside k");
        for span in &sequence.queries {
            assert!(span.start + span.len <= n_queries, "a query span is outside q");
            for taken in &mut taken[span.start..span.start + span.len] {
                assert!(!std::mem::replace(taken, true), "a query row belongs to two sequences");
            }
        }
        offsets.push(offset);
        offset += (n_heads * n * m) as u64;
    }
    offsets
}

fn count(spans: &[Span]) -> usize {
    spans.iter().map(|span| span.len).sum()
}

fn rows(spans: &[Span]) -> impl Iterator<Item = usize> + '_ {
    spans.iter().flat_map(|span| span.start..span.start + span.len)
}

/// One sequence and head.
struct Head<'a> {
    sequence: &'a Sequence,
    shape: AttentionShape,
    head: usize,
    offset: u64,
    dropout: Option<Dropout>,
}

/// Buffers of one head's work, kept by each thread.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    /// `[head_dim, keys]`, so that scores of neighbouring keys are computed side by side.
    k_t: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    p: Vec<f32>,
    d_p: Vec<f32>,
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
    n_keys: usize,
}

thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());

impl Scratch {
    // Taken, not borrowed: a thread never works on two heads at once, but the compiler cannot know.
    fn take() -> Self {
        SCRATCH.take()
    }

    fn give_back(self) {
        SCRATCH.set(self);
    }
}

#[inline(always)]
fn resize(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

impl Head<'_> {
    /// This head's part of row `key` of k or v.
    #[inline(always)]
    fn of_key<'a>(&self, rows: &'a [f32], key: usize) -> &'a [f32] {
        let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let kv_head = self.head * n_kv_heads / n_heads;
        &rows[(key * n_kv_heads + kv_head) * head_dim..][..head_dim]
    }

    /// Queries, and keys as columns: what the probabilities are computed from.
    #[inline(always)]
    fn gather(&self, q: &[f32], k: &[f32], scratch: &mut Scratch) {
        let d = self.shape.head_dim;
        let q_width = self.shape.n_heads * d;
        let (n, m) = (count(&self.sequence.queries), count(&self.sequence.keys));
        scratch.n_keys = m;
        resize(&mut scratch.q, n * d);
        for (i, row) in rows(&self.sequence.queries).enumerate() {
            scratch.q[i * d..(i + 1) * d].copy_from_slice(&q[row * q_width + self.head * d..][..d]);
        }
        resize(&mut scratch.k_t, m * d);
        resize(&mut scratch.p, m);
        for (j, row) in rows(&self.sequence.keys).enumerate() {
            for (c, x) in self.of_key(k, row).iter().enumerate() {
                scratch.k_t[c * m + j] = *x;
            }
        }
    }

    /// Keys and values as rows, which the gradients go over many times.
    #[inline(always)]
    fn gather_rows(&self, k: &[f32], v: &[f32], scratch: &mut Scratch) {
        let (d, m) = (self.shape.head_dim, count(&self.sequence.keys));
        resize(&mut scratch.k, m * d);
        resize(&mut scratch.v, m * d);
        for (j, row) in rows(&self.sequence.keys).enumerate() {
            scratch.k[j * d..(j + 1) * d].copy_from_slice(self.of_key(k, row));
            scratch.v[j * d..(j + 1) * d].copy_from_slice(self.of_key(v, row));
        }
    }

    /// How many keys query `i` sees.
    #[inline(always)]
    fn n_visible(&self, i: usize) -> usize {
        let m = count(&self.sequence.keys);
        if self.sequence.causal { m - (count(&self.sequence.queries) - 1 - i) } else { m }
    }

    /// Dropout's factor for query `i` and key `j`.
    #[inline(always)]
    fn factor(&self, i: usize, j: usize) -> f32 {
        let Some(dropout) = &self.dropout else { return 1.0 };
        let (n, m) = (count(&self.sequence.queries), count(&self.sequence.keys));
        let index = self.offset + ((self.head * n + i) * m + j) as u64;
        // Masks repeat after 2^32 probabilities, far beyond any batch.
        dropout.factor(index as u32)
    }

    /// `p[..n_keys]` = softmax of query `i`'s scores, before dropout.
    #[inline(always)]
    fn probabilities(&self, i: usize, n_keys: usize, scratch: &mut Scratch) {
        let (d, m) = (self.shape.head_dim, scratch.n_keys);
        let p = &mut scratch.p[..n_keys];
        p.fill(0.0);
        for c in 0..d {
            axpy(scratch.q[i * d + c] * self.shape.scale, &scratch.k_t[c * m..][..n_keys], p);
        }
        let max = max(p);
        p.iter_mut().for_each(|p| *p = exp(*p - max));
        let total = sum(p);
        p.iter_mut().for_each(|p| *p /= total);
    }

    /// The gradients of this head into `d_q`, `d_k` and `d_v` of the scratch.
    #[inline(always)]
    fn backward(&self, d_out: &[f32], scratch: &mut Scratch) {
        let (d, m, n) = (self.shape.head_dim, scratch.n_keys, count(&self.sequence.queries));
        let width = self.shape.n_heads * d;
        resize(&mut scratch.d_q, n * d);
        resize(&mut scratch.d_p, m);
        for buffer in [&mut scratch.d_k, &mut scratch.d_v] {
            resize(buffer, m * d);
            buffer[..m * d].fill(0.0);
        }
        for (i, row) in rows(&self.sequence.queries).enumerate() {
            let n_keys = self.n_visible(i);
            self.probabilities(i, n_keys, scratch);
            let d_row = &d_out[row * width + self.head * d..][..d];
            let (p, d_p) = (&scratch.p[..n_keys], &mut scratch.d_p[..n_keys]);
            for (j, d_p) in d_p.iter_mut().enumerate() {
                let factor = self.factor(i, j);
                axpy(p[j] * factor, d_row, &mut scratch.d_v[j * d..][..d]);
                *d_p = factor * dot(d_row, &scratch.v[j * d..][..d]);
            }
            let mean = dot(p, d_p);
            let d_q = &mut scratch.d_q[i * d..][..d];
            d_q.fill(0.0);
            for (j, d_p) in d_p.iter().enumerate() {
                let d_score = p[j] * (d_p - mean) * self.shape.scale;
                axpy(d_score, &scratch.k[j * d..][..d], d_q);
                axpy(d_score, &scratch.q[i * d..][..d], &mut scratch.d_k[j * d..][..d]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
    }

    fn span(start: usize, len: usize) -> Span {
        Span { start, len }
    }

    fn sequence(queries: &[Span], keys: &[Span], causal: bool) -> Sequence {
        Sequence { queries: queries.to_vec(), keys: keys.to_vec(), causal }
    }

    const SHAPE: AttentionShape = AttentionShape { n_heads: 4, n_kv_heads: 2, head_dim: 6, scale: 0.4 };

    /// `sum(d_out * attention)` in double precision.
    fn objective(q: &[f64], k: &[f64], v: &[f64], d_out: &[f64], sequences: &[Sequence]) -> f64 {
        let AttentionShape { n_heads, n_kv_heads, head_dim: d, scale } = SHAPE;
        let mut total = 0.0;
        for s in sequences {
            let (queries, keys): (Vec<_>, Vec<_>) = (rows(&s.queries).collect(), rows(&s.keys).collect());
            for h in 0..n_heads {
                let g = h * n_kv_heads / n_heads;
                for (i, &row) in queries.iter().enumerate() {
                    let seen = if s.causal { &keys[..keys.len() + i + 1 - queries.len()] } else { &keys[..] };
                    let key = |j: usize, c: usize| k[(j * n_kv_heads + g) * d + c];
                    let query = |c: usize| q[(row * n_heads + h) * d + c];
                    let scores: Vec<f64> = seen
                        .iter()
                        .map(|&j| {
                            ((0..d).map(|c| query(c) * key(j, c)).sum::<f64>() * f64::from(scale)).exp()
                        })
                        .collect();
                    let sum: f64 = scores.iter().sum();
                    for c in 0..d {
                        let mixed: f64 = seen
                            .iter()
                            .zip(&scores)
                            .map(|(&j, s)| s / sum * v[(j * n_kv_heads + g) * d + c])
                            .sum();
                        total += mixed * d_out[(row * n_heads + h) * d + c];
                    }
                }
            }
        }
        total
    }

    fn plans() -> Vec<Vec<Sequence>> {
        vec![
            vec![sequence(&[span(0, 5)], &[span(0, 7)], false)],
            vec![sequence(&[span(0, 5)], &[span(0, 7)], true)],
            // Shared keys, and spans in pieces.
            vec![
                sequence(&[span(3, 2)], &[span(1, 3), span(5, 2)], false),
                sequence(&[span(0, 1), span(2, 1)], &[span(0, 5)], true),
                sequence(&[span(1, 1)], &[span(6, 1)], true),
            ],
        ]
    }

    #[test]
    fn values_and_gradients_equal_the_definition() {
        let (q, d_out) = (numbers(5 * 24, 0.0), numbers(5 * 24, 2.0));
        let (k, v) = (numbers(7 * 12, 3.0), numbers(7 * 12, 4.0));
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let inputs = [wide(&q), wide(&k), wide(&v)];
        for plan in plans() {
            let mut out = vec![0.0; q.len()];
            attention(&q, &k, &v, &plan, SHAPE, None, &mut out);
            let total: f64 = wide(&out).iter().zip(wide(&d_out)).map(|(o, d)| o * d).sum();
            assert!(
                (total - objective(&inputs[0], &inputs[1], &inputs[2], &wide(&d_out), &plan)).abs() < 1e-5
            );
            let (mut d_q, mut d_k, mut d_v) = (vec![9.0; q.len()], vec![9.0; k.len()], vec![9.0; v.len()]);
            attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, None, &mut d_q, &mut d_k, &mut d_v);
            for (which, gradient) in [&d_q, &d_k, &d_v].into_iter().enumerate() {
                for (i, found) in gradient.iter().enumerate() {
                    let at = |h: f64| {
                        let mut inputs = inputs.clone();
                        inputs[which][i] += h;
                        objective(&inputs[0], &inputs[1], &inputs[2], &wide(&d_out), &plan)
                    };
                    let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                    assert!((f64::from(*found) - slope).abs() < 1e-5, "input {which}, {i}: {found} {slope}");
                }
            }
        }
    }

    #[test]
    fn a_sequence_does_not_depend_on_the_others() {
        let (q, k, v) = (numbers(5 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0));
        let plan = plans().pop().expect("the last plan");
        let run = |sequences: &[Sequence]| {
            let mut out = vec![0.0; q.len()];
            attention(&q, &k, &v, sequences, SHAPE, None, &mut out);
            out
        };
        let all = run(&plan);
        for s in &plan {
            let alone = run(std::slice::from_ref(s));
            for row in rows(&s.queries) {
                assert_eq!(alone[row * 24..(row + 1) * 24], all[row * 24..(row + 1) * 24]);
            }
        }
    }

    #[test]
    fn decoding_the_last_row_equals_the_whole_causal_pass() {
        let (q, k, v) = (numbers(7 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0));
        let (mut whole, mut last) = (vec![0.0; q.len()], vec![0.0; q.len()]);
        attention(&q, &k, &v, &[sequence(&[span(0, 7)], &[span(0, 7)], true)], SHAPE, None, &mut whole);
        attention(&q, &k, &v, &[sequence(&[span(6, 1)], &[span(0, 7)], true)], SHAPE, None, &mut last);
        assert_eq!(whole[6 * 24..], last[6 * 24..]);
    }

    #[test]
    fn gradients_match_the_masks_of_the_forward_pass() {
        // With dropout the output is linear in v: its slope along a direction is exact.
        let (q, k, v, d_out) =
            (numbers(5 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0), numbers(5 * 24, 2.0));
        let dropout = Some(Dropout { p: 0.4, seed: 7 });
        for plan in plans() {
            let total = |v: &[f32]| {
                let mut out = vec![0.0; q.len()];
                attention(&q, &k, v, &plan, SHAPE, dropout, &mut out);
                out.iter().zip(&d_out).map(|(o, d)| f64::from(*o) * f64::from(*d)).sum::<f64>()
            };
            let (mut d_q, mut d_k, mut d_v) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, dropout, &mut d_q, &mut d_k, &mut d_v);
            let expected: f64 = v.iter().zip(&d_v).map(|(v, d)| f64::from(*v) * f64::from(*d)).sum();
            assert!((total(&v) - expected).abs() < 1e-4, "{} {expected}", total(&v));
            assert!(total(&v) != 0.0);
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() {
        let (q, k, v, d_out) =
            (numbers(5 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0), numbers(5 * 24, 2.0));
        let plan = plans().pop().expect("the last plan");
        let run = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
            let (mut d_q, mut d_k, mut d_v) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            pool.install(|| {
                attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, None, &mut d_q, &mut d_k, &mut d_v)
            });
            (d_q, d_k, d_v)
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    #[should_panic(expected = "two sequences")]
    fn a_query_row_in_two_sequences_is_refused() {
        let s = sequence(&[span(0, 1)], &[span(0, 1)], false);
        attention(&[0.0; 24], &[0.0; 12], &[0.0; 12], &[s.clone(), s], SHAPE, None, &mut [0.0; 24]);
    }
}
