//! Small matrix products in plain loops that the compiler keeps in registers; for use inside `with_isa`.

use crate::lanes::LANES;

/// Rows of the result that are computed together, so that a row of `b` is read once for all of them.
const ROWS: usize = 4;

/// A matrix inside a slice: element `(i, k)` is `values[i * row + k * column]`.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    pub values: &'a [f32],
    pub row: usize,
    pub column: usize,
}

/// `c[i] = sum over k of a[i, k] * b[k]` for `i < n_rows` and `k < inner(i)`; rows of `b` and `c` have `width` elements,
/// a multiple of `LANES`.
///
/// Each element is summed in the order of `k`, by itself: it does not depend on the other rows. Rows that are computed
/// together go to the largest of their `inner`, so `a` must be zero beyond; where `b` is no number there, they become none.
#[inline(always)]
pub(super) fn product(
    n_rows: usize,
    inner: impl Fn(usize) -> usize,
    width: usize,
    a: Strided<'_>,
    b: &[f32],
    c: &mut [f32],
) {
    let mut i = 0;
    while i + ROWS <= n_rows {
        let most = (i..i + ROWS).map(&inner).max().unwrap_or(0);
        block::<ROWS>(i, most, width, a, b, c);
        i += ROWS;
    }
    while i < n_rows {
        block::<1>(i, inner(i), width, a, b, c);
        i += 1;
    }
}

#[inline(always)]
fn block<const R: usize>(first: usize, inner: usize, width: usize, a: Strided<'_>, b: &[f32], c: &mut [f32]) {
    let mut column = 0;
    while column + 2 * LANES <= width {
        panel::<R, { 2 * LANES }>(first, inner, width, column, a, b, c);
        column += 2 * LANES;
    }
    while column < width {
        panel::<R, LANES>(first, inner, width, column, a, b, c);
        column += LANES;
    }
}

/// [`product`] of `R` rows from `first` on and `W` columns from `column` on.
#[inline(always)]
pub(super) fn panel<const R: usize, const W: usize>(
    first: usize,
    inner: usize,
    width: usize,
    column: usize,
    a: Strided<'_>,
    b: &[f32],
    c: &mut [f32],
) {
    let mut sums = [[0.0f32; W]; R];
    for k in 0..inner {
        let b: &[f32; W] = b[k * width + column..].first_chunk().expect("b has `inner` rows of `width`");
        for (r, sums) in sums.iter_mut().enumerate() {
            let a = a.values[(first + r) * a.row + k * a.column];
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = b.mul_add(a, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        c[(first + r) * width + column..][..W].copy_from_slice(sums);
    }
}
