//! One query and all keys of its text: a step of generation, which reads each key and each value once.
//!
//! Neighbouring heads are worked on together: of a row of keys they read neighbouring numbers, as memory likes it. Sums run
//! in the order of [`Head`](super::head::Head), so results are equal, bit for bit, where all numbers are finite.

use std::ops::Range;

use super::columns::columns;
use super::element::Element;
use super::head::{Scratch, padded, resize, softmax};
use super::{AttentionShape, RelativeBias, Rows, Sequence, count, rows};
use crate::isa::Isa;
use crate::lanes::{LANES, axpy};

/// Keys whose scores are summed side by side.
const KEYS: usize = 4 * LANES;

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
    if !E::IS_F32 {
        resize(&mut scratch.k, LANES * d);
    }
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
                keys_as_columns(isa, &some[..n], k, key_head(head) * d, d, &mut scratch.k, &mut scratch.k_t);
            }
            let mut sums = [0.0f32; KEYS];
            for (column, &x) in scratch.k_t.as_chunks::<KEYS>().0.iter().zip(&scratch.q[h * d..][..d]) {
                for (sum, key) in sums.iter_mut().zip(column) {
                    *sum = key.mul_add(x, *sum);
                }
            }
            scratch.p[h * m + first..][..KEYS].copy_from_slice(&sums);
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
    for (j, row) in rows(&sequence.keys).enumerate() {
        for (h, head) in heads.clone().enumerate() {
            let p = scratch.p[h * m + j];
            let values = &v.values[row * v.stride + key_head(head) * d..][..d];
            for (out, value) in scratch.out[h * wide..].iter_mut().zip(values) {
                *out = value.widen().mul_add(p, *out);
            }
        }
    }
}

/// Numbers `at` to `at + d` of up to 64 rows as columns of `to`, `[d, 64]`; `wide` is for the rows on their way.
#[inline(always)]
fn keys_as_columns<E: Element>(
    isa: Isa,
    rows: &[usize],
    keys: Rows<'_, E>,
    at: usize,
    d: usize,
    wide: &mut [f32],
    to: &mut [f32],
) {
    for (first, rows) in rows.chunks(LANES).enumerate() {
        let part = |row: usize| &keys.values[row * keys.stride + at..][..d];
        if !E::IS_F32 {
            for (wide, &row) in wide.chunks_exact_mut(d).zip(rows) {
                wide.iter_mut().zip(part(row)).for_each(|(wide, key)| *wide = key.widen());
            }
        }
        let wide = &*wide;
        let some: [&[f32]; LANES] = std::array::from_fn(
            #[inline(always)]
            |j| match rows.get(j) {
                Some(&row) => E::as_f32(part(row)).unwrap_or_else(|| &wide[j * d..][..d]),
                None => &[],
            },
        );
        columns(isa, &some, d, &mut to[first * LANES..], KEYS);
    }
}
