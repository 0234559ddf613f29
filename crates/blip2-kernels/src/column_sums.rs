//! Sums over rows: the gradient of a bias.

use rayon::prelude::*;

use crate::isa::{Isa, with_isa};
use crate::lanes::axpy;

/// Rows a task sums; the partial sums are added in order, whatever the number of threads.
const ROWS_A_TASK: usize = 256;

/// `sums += ` the sum of the rows of `x`, each of `sums.len()` elements.
///
/// # Panics
/// When `x` is not whole rows.
pub fn add_column_sums(x: &[f32], sums: &mut [f32]) {
    let width = sums.len();
    if width == 0 {
        return;
    }
    assert!(x.len().is_multiple_of(width), "{} elements are no rows of {width}", x.len());
    let isa = Isa::detect();
    let partial: Vec<Vec<f32>> = x
        .par_chunks(ROWS_A_TASK * width)
        .map(|rows| {
            let mut sums = vec![0.0; width];
            with_isa(
                isa,
                #[inline(always)]
                || rows.chunks_exact(width).for_each(|row| axpy(1.0, row, &mut sums)),
            );
            sums
        })
        .collect();
    for row in partial {
        axpy(1.0, &row, sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TAILS, WIDTHS, assert_near, numbers};

    #[test]
    fn sums_equal_the_reference_for_every_tail_and_width() {
        for width in TAILS.chain(WIDTHS) {
            let x = numbers(3 * width, 1);
            let mut sums = numbers(width, 2).to_vec();
            let expected: Vec<f64> = (0..width)
                .map(|j| f64::from(sums[j]) + (0..3).map(|i| f64::from(x[i * width + j])).sum::<f64>())
                .collect();
            add_column_sums(&x, &mut sums);
            assert_near(&sums, &expected, 1e-6, width);
            let mut spoilt = vec![0.0; width];
            add_column_sums(&numbers(3 * width, 1).with(width, f32::INFINITY), &mut spoilt);
            assert!((0..width).all(|j| spoilt[j].is_finite() == (j != 0)), "{width}");
        }
    }

    #[test]
    fn every_row_is_added_once() {
        for n_rows in [0, 1, 255, 256, 600] {
            let x: Vec<f32> = (0..n_rows * 3).map(|i| (i % 7) as f32).collect();
            let mut sums = [0.5; 3];
            add_column_sums(&x, &mut sums);
            for (j, sum) in sums.iter().enumerate() {
                assert_eq!(*sum, 0.5 + (0..n_rows).map(|i| x[i * 3 + j]).sum::<f32>());
            }
        }
    }
}
