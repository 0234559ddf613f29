//! The work of one sequence and head: probabilities, their mix of the values, and the gradients.
//!
//! Rows are gathered into buffers whose width is a multiple of the lanes, padded with zeros.

use std::cell::RefCell;

use super::columns::columns;
use super::element::Element;
use super::product::{Strided, product};
#[cfg(target_arch = "x86_64")]
use super::rounded;
use super::{AttentionShape, RelativeBias, Rows, Sequence, count, rows};
use crate::buffer::keep;
use crate::dropout::Dropout;
use crate::gemm::Precision;
use crate::isa::Isa;
use crate::lanes::{LANES, axpy, dot, exp_of_negative, max, sum};

/// One sequence and head.
pub(super) struct Head<'a> {
    isa: Isa,
    sequence: &'a Sequence,
    shape: AttentionShape,
    head: usize,
    bias: Option<RelativeBias<'a>>,
    /// The index of the sequence's first probability, for dropout.
    offset: u64,
    dropout: Option<Dropout>,
    n_queries: usize,
    n_keys: usize,
}

/// Buffers of one task's work, kept by each thread. `n` queries, `m` keys, `d` the head's width, `m'` and `d'` rounded up
/// to lanes. A step of generation has its shapes from [`decode`](super::decode): of some heads `q` `[heads, d]`, `p`
/// `[heads, m'']` with `m''` rounded up to 64, `out` `[heads, d']`, and `k_t` `[d, 64]`.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[n, d']`, times the scale.
    pub q: Vec<f32>,
    /// `[d, m']`: keys as columns.
    pub k_t: Vec<f32>,
    /// `[m, d']`.
    k: Vec<f32>,
    /// `[m, d']`.
    v: Vec<f32>,
    /// `[d, m']`.
    v_t: Vec<f32>,
    /// `[n, m']`: probabilities, 0 where a key is not seen.
    pub p: Vec<f32>,
    /// `[n, m']`: probabilities after dropout; unused without.
    dropped: Vec<f32>,
    /// `[n, d']`.
    d_out: Vec<f32>,
    /// `[n, m']`: the gradient of the probabilities, then of the scores.
    d_p: Vec<f32>,
    /// `[n, d']`: the result of the forward pass.
    pub out: Vec<f32>,
    /// `[n, d']`.
    pub d_q: Vec<f32>,
    /// `[m, d']`.
    pub d_k: Vec<f32>,
    /// `[m, d']`.
    pub d_v: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    words: rounded::Words,
}

thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());

impl Scratch {
    // Taken, not borrowed: a thread never works on two tasks at once, but the compiler cannot know.
    pub(super) fn take() -> Self {
        SCRATCH.take()
    }

    pub(super) fn give_back(self) {
        keep(&SCRATCH, self);
    }
}

/// `n` rounded up to whole lanes.
#[inline(always)]
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

#[inline(always)]
pub(super) fn resize(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Scores to probabilities.
#[inline(always)]
pub(super) fn softmax(scores: &mut [f32]) {
    let max = max(scores);
    scores.iter_mut().for_each(|p| *p = exp_of_negative(*p - max));
    let share = 1.0 / sum(scores);
    scores.iter_mut().for_each(|p| *p *= share);
}

impl<'a> Head<'a> {
    pub(super) fn new(
        isa: Isa,
        sequence: &'a Sequence,
        shape: AttentionShape,
        head: usize,
        bias: Option<RelativeBias<'a>>,
        offset: u64,
        dropout: Option<Dropout>,
    ) -> Self {
        let (n_queries, n_keys) = (count(&sequence.queries), count(&sequence.keys));
        Self { isa, sequence, shape, head, bias, offset, dropout, n_queries, n_keys }
    }

    /// How many keys query `i` sees.
    #[inline(always)]
    fn n_visible(&self, i: usize) -> usize {
        if self.sequence.causal { self.n_keys - (self.n_queries - 1 - i) } else { self.n_keys }
    }

    /// This head's part of a query row.
    #[inline(always)]
    fn of_query<'r>(&self, values: Rows<'r, f32>, row: usize) -> &'r [f32] {
        let d = self.shape.head_dim;
        &values.values[row * values.stride + self.head * d..][..d]
    }

    /// This head's part of a row of k or v.
    #[inline(always)]
    fn of_key<'r, E>(&self, values: Rows<'r, E>, row: usize) -> &'r [E] {
        let AttentionShape { n_heads, n_kv_heads, head_dim: d, .. } = self.shape;
        &values.values[row * values.stride + self.head * n_kv_heads / n_heads * d..][..d]
    }

    /// Rows of queries into `to`, `[n, d']`.
    #[inline(always)]
    fn gather_queries(&self, values: Rows<'_, f32>, factor: f32, to: &mut Vec<f32>) {
        let d = padded(self.shape.head_dim);
        resize(to, self.n_queries * d);
        for (to, row) in to.chunks_exact_mut(d).zip(rows(&self.sequence.queries)) {
            let (head, rest) = to.split_at_mut(self.shape.head_dim);
            for (to, x) in head.iter_mut().zip(self.of_query(values, row)) {
                *to = x * factor;
            }
            rest.fill(0.0);
        }
    }

    /// Rows of keys or values into `to`, `[m, d']`.
    #[inline(always)]
    fn gather_keys<E: Element>(&self, values: Rows<'_, E>, to: &mut Vec<f32>) {
        let d = padded(self.shape.head_dim);
        resize(to, self.n_keys * d);
        for (to, row) in to.chunks_exact_mut(d).zip(rows(&self.sequence.keys)) {
            let (head, rest) = to.split_at_mut(self.shape.head_dim);
            head.iter_mut().zip(self.of_key(values, row)).for_each(|(to, x)| *to = x.widen());
            rest.fill(0.0);
        }
    }

    /// Rows of keys or values as columns into `to`, `[d, m']`.
    #[inline(always)]
    fn gather_columns<E: Element>(&self, values: Rows<'_, E>, to: &mut Vec<f32>) {
        let (d, m) = (self.shape.head_dim, padded(self.n_keys));
        resize(to, d * m);
        let mut rows = rows(&self.sequence.keys).map(|row| self.of_key(values, row));
        for first in (0..m).step_by(LANES) {
            let some: [&[E]; LANES] = std::array::from_fn(
                #[inline(always)]
                |_| rows.next().unwrap_or_default(),
            );
            columns(self.isa, &some, d, &mut to[first..], m);
        }
    }

    /// The scores into `p`.
    #[inline(always)]
    fn scores<E: Element>(
        &self,
        precision: Precision,
        q: Rows<'_, f32>,
        k: Rows<'_, E>,
        scratch: &mut Scratch,
    ) {
        let (d, m) = (self.shape.head_dim, padded(self.n_keys));
        self.gather_queries(q, self.shape.scale, &mut scratch.q);
        resize(&mut scratch.p, self.n_queries * m);
        #[cfg(target_arch = "x86_64")]
        if E::PER_WORD == 1 && rounded::is_faster(self.isa, precision) {
            let keys = rows(&self.sequence.keys).filter_map(|row| E::as_f32(self.of_key(k, row)));
            let sizes = [self.n_queries, self.n_keys, d];
            let a = &scratch.q;
            return rounded::rows_by_rows(
                self.isa,
                sizes,
                a,
                padded(d),
                keys,
                &mut scratch.words,
                &mut scratch.p,
            );
        }
        let _ = precision;
        self.gather_columns(k, &mut scratch.k_t);
        let a = Strided { values: &scratch.q, row: padded(d), column: 1 };
        product(self.n_queries, |_| d, m, a, &scratch.k_t, &mut scratch.p);
    }

    /// The probabilities into `p`, and after dropout into `dropped` where there is dropout.
    #[inline(always)]
    fn probabilities<E: Element>(
        &self,
        precision: Precision,
        q: Rows<'_, f32>,
        k: Rows<'_, E>,
        scratch: &mut Scratch,
    ) {
        self.scores(precision, q, k, scratch);
        let m = padded(self.n_keys);
        for (i, row) in scratch.p.chunks_exact_mut(m).take(self.n_queries).enumerate() {
            let (seen, unseen) = row.split_at_mut(self.n_visible(i));
            if let Some(bias) = &self.bias {
                let width = bias.values.len() / self.shape.n_heads;
                let query = self.n_keys + i - self.n_queries;
                let from = self.head * width + bias.n_before - query;
                axpy(1.0, &bias.values[from..][..seen.len()], seen);
            }
            softmax(seen);
            unseen.fill(0.0);
        }
        let Some(dropout) = self.dropout else { return };
        resize(&mut scratch.dropped, self.n_queries * m);
        let rows = scratch.p.chunks_exact(m).zip(scratch.dropped.chunks_exact_mut(m)).take(self.n_queries);
        for (i, (p, dropped)) in rows.enumerate() {
            let first = self.first_index(i);
            for (j, (p, dropped)) in p.iter().zip(dropped).enumerate() {
                *dropped = p * dropout.factor(first.wrapping_add(j as u32));
            }
        }
    }

    /// The index of query `i`'s first probability, for dropout. Masks repeat after 2^32 probabilities, far beyond any batch.
    #[inline(always)]
    fn first_index(&self, i: usize) -> u32 {
        (self.offset + ((self.head * self.n_queries + i) * self.n_keys) as u64) as u32
    }

    /// The result into `scratch.out`. Products are in f32, or in bf16 where the machine multiplies that faster.
    #[inline(always)]
    pub(super) fn forward<E: Element>(
        &self,
        precision: Precision,
        q: Rows<'_, f32>,
        [k, v]: [Rows<'_, E>; 2],
        scratch: &mut Scratch,
    ) {
        self.probabilities(precision, q, k, scratch);
        let (d, m) = (padded(self.shape.head_dim), padded(self.n_keys));
        resize(&mut scratch.out, self.n_queries * d);
        let p = if self.dropout.is_some() { &scratch.dropped } else { &scratch.p };
        #[cfg(target_arch = "x86_64")]
        if E::PER_WORD == 1 && rounded::is_faster(self.isa, precision) {
            let values = rows(&self.sequence.keys).filter_map(|row| E::as_f32(self.of_key(v, row)));
            let sizes = [self.n_queries, self.n_keys, self.shape.head_dim];
            return rounded::rows_by_columns(
                self.isa,
                sizes,
                p,
                m,
                values,
                &mut scratch.words,
                &mut scratch.out,
            );
        }
        self.gather_keys(v, &mut scratch.v);
        let a = Strided { values: p, row: m, column: 1 };
        product(self.n_queries, |i| self.n_visible(i), d, a, &scratch.v, &mut scratch.out);
    }

    /// The gradients into `d_q`, `d_k` and `d_v` of the scratch.
    #[inline(always)]
    pub(super) fn backward(&self, [q, k, v, d_out]: [Rows<'_, f32>; 4], scratch: &mut Scratch) {
        self.probabilities(Precision::F32, q, k, scratch);
        self.gather_keys(k, &mut scratch.k);
        self.gather_columns(v, &mut scratch.v_t);
        self.gather_queries(d_out, 1.0, &mut scratch.d_out);
        let (n, d, m) = (self.n_queries, padded(self.shape.head_dim), padded(self.n_keys));
        for (buffer, len) in [(&mut scratch.d_p, n * m), (&mut scratch.d_q, n * d)] {
            resize(buffer, len);
        }
        for buffer in [&mut scratch.d_k, &mut scratch.d_v] {
            resize(buffer, self.n_keys * d);
        }

        let p = if self.dropout.is_some() { &scratch.dropped } else { &scratch.p };
        let a = Strided { values: p, row: 1, column: m };
        product(self.n_keys, |_| n, d, a, &scratch.d_out, &mut scratch.d_v);

        let a = Strided { values: &scratch.d_out, row: d, column: 1 };
        product(n, |_| self.shape.head_dim, m, a, &scratch.v_t, &mut scratch.d_p);
        let rows = scratch.p.chunks_exact(m).zip(scratch.d_p.chunks_exact_mut(m)).take(n);
        for (i, (p, d_p)) in rows.enumerate() {
            if let Some(dropout) = self.dropout {
                let first = self.first_index(i);
                for (j, d_p) in d_p.iter_mut().enumerate() {
                    *d_p *= dropout.factor(first.wrapping_add(j as u32));
                }
            }
            let seen = self.n_visible(i);
            let mean = dot(&p[..seen], &d_p[..seen]);
            for (d_p, p) in d_p.iter_mut().zip(p) {
                *d_p = p * (*d_p - mean);
            }
        }

        let a = Strided { values: &scratch.d_p, row: m, column: 1 };
        product(n, |i| self.n_visible(i), d, a, &scratch.k, &mut scratch.d_q);
        scratch.d_q[..n * d].iter_mut().for_each(|x| *x *= self.shape.scale);
        let a = Strided { values: &scratch.d_p, row: 1, column: m };
        product(self.n_keys, |_| n, d, a, &scratch.q, &mut scratch.d_k);
    }
}
