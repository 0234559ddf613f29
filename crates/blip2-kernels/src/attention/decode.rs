//! One query and all keys of its text: a step of generation, which reads each key and each value once.
//!
//! Neighbouring heads are worked on together: of a row of keys they read neighbouring numbers, as memory likes it. Sums run
//! in the order of [`Head`](super::head::Head), so results are equal, bit for bit, where all numbers are finite.

use std::ops::Range;

use super::columns::columns;
use super::element::Element;
use super::head::{Scratch, padded, resize, softmax};
use super::product::{Strided, panel};
use super::{AttentionShape, RelativeBias, Rows, Sequence, count, rows};
use crate::isa::Isa;
use crate::lanes::{LANES, axpy};
use crate::memory::prefetch;

/// Keys whose scores are summed side by side.
const KEYS: usize = 4 * LANES;

/// Rows of values that are mixed in one go.
const VALUES: usize = 4;

/// The results of `heads` for row `query`, the only one of `sequence`, into `scratch.out`, `[heads, d']`. For use inside `with_isa`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub(super) fn decode<E: Element>(
    isa: Isa,
    sequence: &Sequence,
    query: usize,
    shape: AttentionShape,
    heads: Range<usize>,
    bias: Option<RelativeBias<'_>>,
    q: Rows<'_, f32>,
    [k, v]: [Rows<'_, E>; 2],
    scratch: &mut Scratch,
) {
    let (d, n_keys) = (shape.head_dim, count(&sequence.keys));
    let (wide, m) = (padded(d), n_keys.next_multiple_of(KEYS));
    let key_head = |head: usize| head * shape.n_kv_heads / shape.n_heads;
    resize(&mut scratch.q, heads.len() * d);
    for (to, x) in
        scratch.q.iter_mut().zip(&q.values[query * q.stride + heads.start * d..][..heads.len() * d])
    {
        *to = x * shape.scale;
    }
    resize(&mut scratch.p, heads.len() * m);
    resize(&mut scratch.k_t, KEYS * d);
    let mut keys = rows(&sequence.keys);
    for first in (0..n_keys).step_by(KEYS) {
        let mut some = [0; KEYS];
        let n = KEYS.min(n_keys - first);
        some[..n].iter_mut().zip(&mut keys).for_each(|(to, key)| *to = key);
        let mut read = None;
        for (h, head) in heads.clone().enumerate() {
            if read != Some(key_head(head)) {
                read = Some(key_head(head));
                keys_as_columns(isa, &some[..n], k, key_head(head) * d, d, &mut scratch.k_t);
            }
            let query = Strided { values: &scratch.q[h * d..], row: 0, column: 1 };
            panel::<1, KEYS>(0, d, KEYS, 0, query, &scratch.k_t, &mut scratch.p[h * m + first..]);
        }
    }
    for (h, head) in heads.clone().enumerate() {
        let seen = &mut scratch.p[h * m..][..n_keys];
        if let Some(bias) = &bias {
            let width = bias.values.len() / shape.n_heads;
            let from = head * width + bias.n_before - (n_keys - 1);
            axpy(1.0, &bias.values[from..][..n_keys], seen);
        }
        softmax(seen);
    }
    resize(&mut scratch.out, heads.len() * wide);
    scratch.out[..heads.len() * wide].fill(0.0);
    let mut keys = rows(&sequence.keys);
    let mut keys_ahead = rows(&sequence.keys).skip(2 * VALUES);
    for first in (0..n_keys).step_by(VALUES) {
        let (mut some, mut ahead) = ([0; VALUES], [None; VALUES]);
        some.iter_mut().zip(&mut keys).for_each(|(to, row)| *to = row);
        ahead.iter_mut().zip(&mut keys_ahead).for_each(|(to, row)| *to = Some(row));
        let n = VALUES.min(n_keys - first);
        for (h, head) in heads.clone().enumerate() {
            let part = |row: usize| &v.values[row * v.stride + key_head(head) * d..][..d];
            let (p, out) = (&scratch.p[h * m + first..][..n], &mut scratch.out[h * wide..][..d]);
            for &row in ahead.iter().flatten() {
                prefetch(part(row));
            }
            if let Some(p) = p.first_chunk() {
                add_values([part(some[0]), part(some[1]), part(some[2]), part(some[3])], p, out);
                continue;
            }
            // In a closure it would be compiled for any machine, where each product calls a function.
            for (&p, row) in p.iter().zip(some) {
                add_values([part(row)], &[p], out);
            }
        }
    }
}

/// Adds each of some rows of values times its probability to `out`, one after the other.
#[inline(always)]
fn add_values<E: Element, const N: usize>(values: [&[E]; N], p: &[f32; N], out: &mut [f32]) {
    let (chunks, rest) = out.as_chunks_mut::<LANES>();
    for (i, out) in chunks.iter_mut().enumerate() {
        let mut sums = *out;
        for (values, p) in values.iter().zip(p) {
            let values: &[E; LANES] = values[i * LANES..].first_chunk().expect("as many values as results");
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = value.widen().mul_add(*p, *sum);
            }
        }
        *out = sums;
    }
    let n_whole = chunks.len() * LANES;
    for (values, p) in values.iter().zip(p) {
        for (out, value) in rest.iter_mut().zip(&values[n_whole..]) {
            *out = value.widen().mul_add(*p, *out);
        }
    }
}

/// Numbers `at` to `at + d` of up to 64 rows as columns of `to`, `[d, 64]`. Those of the next heads are asked for meanwhile.
#[inline(always)]
fn keys_as_columns<E: Element>(
    isa: Isa,
    rows: &[usize],
    keys: Rows<'_, E>,
    at: usize,
    d: usize,
    to: &mut [f32],
) {
    for (first, rows) in rows.chunks(LANES).enumerate() {
        let some: [&[E]; LANES] = std::array::from_fn(
            #[inline(always)]
            |j| rows.get(j).map_or(&[][..], |row| &keys.values[row * keys.stride + at..][..d]),
        );
        for &row in rows {
            let next_heads = &keys.values[row * keys.stride + at + d..];
            prefetch(&next_heads[..next_heads.len().min(2 * d)]);
        }
        columns(isa, &some, d, &mut to[first * LANES..], KEYS);
    }
}
