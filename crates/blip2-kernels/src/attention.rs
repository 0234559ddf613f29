//! Fused scaled-dot-product attention over packed rows, with its gradient.
//!
//! Scores are never held for more than one sequence and head, or one query and some heads. The gradient computes the
//! probabilities again. The work for a query row runs over its own keys in order, so it does not depend on what else is in the
//! batch.

mod columns;
mod decode;
mod element;
mod head;
mod product;
#[cfg(target_arch = "x86_64")]
mod rounded;

use std::ops::Range;

use rayon::prelude::*;

use crate::awake::each;
use crate::dropout::Dropout;
use crate::gemm::{Output, Precision};
use crate::isa::{Isa, with_isa};
use crate::lanes::axpy;
use decode::decode;
pub use element::Element;
use head::{Head, Scratch, padded};

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

impl Sequence {
    /// Rows that all see each other.
    pub fn mutual(rows: Vec<Span>) -> Self {
        Self { queries: rows.clone(), keys: rows, causal: false }
    }
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

impl AttentionShape {
    /// As many heads of keys as of queries, and the usual scale.
    pub fn multi_head(n_heads: usize, head_dim: usize) -> Self {
        Self { n_heads, n_kv_heads: n_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
    }
}

/// What is added to a score by how far the key stands from the query, in a sequence whose last query is its last key: T5's
/// relative position bias.
#[derive(Debug, Clone, Copy)]
pub struct RelativeBias<'a> {
    /// `[n_heads, width]`; column `n_before + key - query`.
    pub values: &'a [f32],
    /// Columns for keys before the query.
    pub n_before: usize,
}

impl RelativeBias<'_> {
    fn check(&self, sequences: &[Sequence], n_heads: usize) {
        let width = self.values.len() / n_heads;
        assert!(
            self.values.len() == width * n_heads && self.n_before < width,
            "the bias is not [heads, width]"
        );
        for sequence in sequences {
            let farthest = count(&sequence.keys).saturating_sub(1);
            assert!(farthest <= self.n_before, "the bias does not reach back to the first key");
            let ahead = if sequence.causal { 0 } else { farthest };
            assert!(ahead < width - self.n_before, "the bias does not reach the last key");
        }
    }
}

/// Rows of queries, keys or values, `stride` numbers from one to the next.
#[derive(Debug, Clone, Copy)]
struct Rows<'a, E> {
    values: &'a [E],
    stride: usize,
}

/// `softmax(q kᵀ * scale + bias) v` for each sequence and head; rows of `out` that no sequence names are left alone.
///
/// `q` and `out` are `[Nq, n_heads * head_dim]`, `k` and `v` `[Nk, n_kv_heads * head_dim]`, in f32 or, as a cache may keep
/// them, in bf16. Dropout acts on the probabilities.
///
/// # Panics
/// When a span lies outside its rows, a query row belongs to two sequences, a sequence has queries and no keys, or a causal one
/// more queries than keys.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention<E: Element>(
    q: &[f32],
    k: &[E],
    v: &[E],
    sequences: &[Sequence],
    shape: AttentionShape,
    bias: Option<RelativeBias<'_>>,
    dropout: Option<Dropout>,
    out: &mut [f32],
) {
    let offsets = check(q.len(), k.len(), v.len(), sequences, shape);
    assert_eq!(out.len(), q.len(), "out must have the shape of q");
    let (width, kv_width) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
    let [k, v] = [k, v].map(|values| Rows { values, stride: kv_width });
    let (isa, q) = (Isa::detect(), Rows { values: q, stride: width });
    mix(isa, Precision::F32, q, [k, v], sequences, &offsets, shape, bias, dropout, out);
}

/// [`attention`] of queries, keys and values that stand side by side in each row, as one product gives them:
/// `qkv` is `[N, 3 * n_heads * head_dim]`, `out` `[N, n_heads * head_dim]`. Without bias and dropout. With [`Precision::Bf16`]
/// what is multiplied may be rounded to bf16 first, and is where the machine multiplies that faster; sums are f32.
///
/// # Panics
/// As [`attention`], and when queries and keys have not the same heads.
pub fn attention_joint(
    qkv: &[f32],
    sequences: &[Sequence],
    shape: AttentionShape,
    precision: Precision,
    out: &mut [f32],
) {
    let width = shape.n_heads * shape.head_dim;
    assert!(
        shape.n_kv_heads == shape.n_heads,
        "queries and keys that stand side by side have the same heads"
    );
    let offsets = check(out.len(), out.len(), out.len(), sequences, shape);
    assert_eq!(qkv.len(), 3 * out.len(), "qkv must be [N, 3 * width]");
    let part = |i: usize| Rows { values: &qkv[(i * width).min(qkv.len())..], stride: 3 * width };
    let isa = Isa::detect();
    mix(isa, precision, part(0), [part(1), part(2)], sequences, &offsets, shape, None, None, out);
}

/// The result of sequences that were checked against the rows.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
fn mix<E: Element>(
    isa: Isa,
    precision: Precision,
    q: Rows<'_, f32>,
    [k, v]: [Rows<'_, E>; 2],
    sequences: &[Sequence],
    offsets: &[u64],
    shape: AttentionShape,
    bias: Option<RelativeBias<'_>>,
    dropout: Option<Dropout>,
    out: &mut [f32],
) {
    if let Some(bias) = bias {
        bias.check(sequences, shape.n_heads);
    }
    let d = shape.head_dim;
    let width = shape.n_heads * d;
    let out = Output(out.as_mut_ptr());
    let is_step = |sequence: &Sequence| count(&sequence.queries) == 1 && dropout.is_none();
    // A step reads the keys of several heads in one go, where there are tasks enough for the threads.
    let groups_of_a_step = head_groups(sequences.len(), shape, rayon::current_num_threads());
    let n_groups = |sequence: &Sequence| match count(&sequence.queries) {
        0 => 0,
        _ if is_step(sequence) => groups_of_a_step,
        _ => shape.n_heads,
    };
    // The same heads of neighbouring sequences follow each other: beams share most of their keys, which are then read again from
    // the cache of one core.
    let tasks: Vec<(usize, Range<usize>)> = (0..shape.n_heads)
        .flat_map(|i| {
            let some = sequences.iter().map(n_groups).enumerate().filter(move |&(_, n)| i < n);
            some.map(move |(number, n)| (number, i * shape.n_heads / n..(i + 1) * shape.n_heads / n))
        })
        .collect();
    each(tasks.len(), |at| {
        let (number, heads) = tasks[at].clone();
        let sequence = &sequences[number];
        let mut scratch = Scratch::take();
        let put = |query: usize, head: usize, result: &[f32]| {
            assert!(result.len() >= d);
            // SAFETY: `query` is one of the sequence's at both uses: `check` made sure that it is a row of q, hence of out, and
            // that no other sequence has it; other tasks write the columns of other heads.
            unsafe { std::ptr::copy_nonoverlapping(result.as_ptr(), out.at(query * width + head * d), d) };
        };
        with_isa(
            isa,
            #[inline(always)]
            || {
                if is_step(sequence) {
                    let query = rows(&sequence.queries).next().expect("one query");
                    decode(isa, sequence, query, shape, heads.clone(), bias, q, [k, v], &mut scratch);
                    for (head, row) in heads.zip(scratch.out.chunks_exact(padded(d))) {
                        put(query, head, row);
                    }
                    return;
                }
                for head in heads {
                    let work = Head::new(isa, sequence, shape, head, bias, offsets[number], dropout);
                    work.forward(precision, q, [k, v], &mut scratch);
                    for (row, query) in scratch.out.chunks_exact(padded(d)).zip(rows(&sequence.queries)) {
                        put(query, head, row);
                    }
                }
            },
        );
        scratch.give_back();
    });
}

/// How many groups of neighbouring heads each of `n_sequences` steps is cut into: the fewest that give every thread as many
/// tasks, of whole key heads where there are enough of these.
fn head_groups(n_sequences: usize, shape: AttentionShape, n_threads: usize) -> usize {
    let is_even = |groups: &usize| {
        let tasks = n_sequences * groups;
        tasks >= 8 * n_threads || tasks.is_multiple_of(n_threads)
    };
    let whole_key_heads = (1..=shape.n_kv_heads).filter(|n| shape.n_kv_heads.is_multiple_of(*n));
    whole_key_heads.filter(is_even).chain((1..=shape.n_heads).filter(is_even)).next().unwrap_or(shape.n_heads)
}

/// The gradients of [`attention`] by `q`, `k` and `v`; the bias is frozen wherever there is one. Keys that sequences share get the sum.
///
/// # Panics
/// As [`attention`].
#[allow(clippy::too_many_arguments, reason = "the operands of attention and a gradient")]
pub fn attention_backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    sequences: &[Sequence],
    shape: AttentionShape,
    bias: Option<RelativeBias<'_>>,
    dropout: Option<Dropout>,
) -> [Vec<f32>; 3] {
    let offsets = check(q.len(), k.len(), v.len(), sequences, shape);
    if let Some(bias) = bias {
        bias.check(sequences, shape.n_heads);
    }
    assert_eq!(d_out.len(), q.len(), "the gradient must have the shape of q");
    let mut gradients = [q, k, v].map(|x| vec![0.0; x.len()]);
    let isa = Isa::detect();
    let (d, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
    let (q_width, k_width) = (shape.n_heads * d, shape.n_kv_heads * d);
    let [d_q, d_k, d_v] = gradients.each_mut().map(|gradient| Output(gradient.as_mut_ptr()));
    // A task owns a key head's columns of the keys that its sequences share, and adds to them in a fixed order.
    let groups = sharing(sequences, k.len() / k_width);
    let [q, d_out] = [q, d_out].map(|values| Rows { values, stride: q_width });
    let [k, v] = [k, v].map(|values| Rows { values, stride: k_width });
    (0..groups.len() * shape.n_kv_heads).into_par_iter().for_each(|unit| {
        let (members, kv_head) = (&groups[unit / shape.n_kv_heads], unit % shape.n_kv_heads);
        let mut scratch = Scratch::take();
        with_isa(
            isa,
            #[inline(always)]
            || {
                for &number in members {
                    let sequence = &sequences[number];
                    for head in kv_head * group..(kv_head + 1) * group {
                        let work = Head::new(isa, sequence, shape, head, bias, offsets[number], dropout);
                        work.backward([q, k, v, d_out], &mut scratch);
                        let gradients = scratch.d_q.chunks_exact(padded(d));
                        for (row, query) in gradients.zip(rows(&sequence.queries)) {
                            // SAFETY: `query` is a row of q, of this sequence alone; these columns are this head's.
                            let to = unsafe {
                                std::slice::from_raw_parts_mut(d_q.at(query * q_width + head * d), d)
                            };
                            to.copy_from_slice(&row[..d]);
                        }
                        for (gradients, d_rows) in [(&scratch.d_k, &d_k), (&scratch.d_v, &d_v)] {
                            for (row, key) in gradients.chunks_exact(padded(d)).zip(rows(&sequence.keys)) {
                                // SAFETY: `key` is a row of k and v that only this task's sequences name; these columns are
                                // this key head's.
                                let to = unsafe {
                                    std::slice::from_raw_parts_mut(d_rows.at(key * k_width + kv_head * d), d)
                                };
                                axpy(1.0, &row[..d], to);
                            }
                        }
                    }
                }
            },
        );
        scratch.give_back();
    });
    gradients
}

/// The sequences in groups, such that sequences of different groups have no key row in common; in order, in each group.
fn sharing(sequences: &[Sequence], n_keys: usize) -> Vec<Vec<usize>> {
    // The group that a key row belongs to, and for each group the group that it was merged into.
    let mut group_of = vec![usize::MAX; n_keys];
    let mut merged: Vec<usize> = (0..sequences.len()).collect();
    fn root(merged: &[usize], mut group: usize) -> usize {
        while merged[group] != group {
            group = merged[group];
        }
        group
    }
    for (number, sequence) in sequences.iter().enumerate() {
        for key in rows(&sequence.keys) {
            if group_of[key] != usize::MAX {
                let (one, other) = (root(&merged, group_of[key]), root(&merged, number));
                merged[one.max(other)] = one.min(other);
            }
            group_of[key] = number;
        }
    }
    let mut groups = vec![Vec::new(); sequences.len()];
    for number in 0..sequences.len() {
        groups[root(&merged, number)].push(number);
    }
    groups.retain(|group| !group.is_empty());
    groups
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
        assert!(n == 0 || m > 0, "a sequence has {n} queries and no keys");
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

#[cfg(test)]
mod tests;
