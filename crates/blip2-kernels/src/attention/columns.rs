//! Rows as columns: keys are read row by row and multiplied column by column.

use super::element::Element;
use crate::isa::Isa;
use crate::lanes::LANES;
#[cfg(target_arch = "x86_64")]
use crate::transpose::transposed;

/// Puts up to 16 rows, the first `d` numbers of each, into 16 neighbouring columns of `to`: number `c` of row `j` to
/// `to[c * stride + j]`. Columns of rows that are empty are zero.
///
/// # Panics
/// When a row that is not empty has less than `d` numbers, or `to` does not hold the columns.
pub(super) fn columns<E: Element>(isa: Isa, rows: &[&[E]; LANES], d: usize, to: &mut [f32], stride: usize) {
    assert!(rows.iter().all(|row| row.is_empty() || row.len() >= d), "a row of `d` numbers");
    assert!(d == 0 || to.len() >= (d - 1) * stride + LANES, "`to` must hold the columns");
    assert!(isa.is_available());
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && d.is_multiple_of(E::PER_WORD) {
        let to = to.as_mut_ptr();
        // SAFETY: the instruction set is available; the rest was checked above.
        return unsafe {
            if rows.iter().any(|row| row.is_empty()) {
                avx512_columns::<_, false>(rows, d, to, stride);
            } else {
                avx512_columns::<_, true>(rows, d, to, stride);
            }
        };
    }
    for (c, to) in to.chunks_mut(stride).take(d).enumerate() {
        for (to, row) in to.iter_mut().zip(rows) {
            *to = row.get(c).map_or(0.0, |x| x.widen());
        }
    }
}

/// # Safety
/// Rows that are not empty, all of them where `ALL`, must have `d` numbers, which are whole words, and `to` must take 16 at each
/// of the first `d` multiples of `stride`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_columns<E: Element, const ALL: bool>(
    rows: &[&[E]; LANES],
    d: usize,
    to: *mut f32,
    stride: usize,
) {
    use std::arch::x86_64::*;
    const { assert!(size_of::<E>() * E::PER_WORD == 4) };
    let n_words = d / E::PER_WORD;
    for first in (0..n_words).step_by(LANES) {
        let n = LANES.min(n_words - first);
        let mask = ((1u32 << n) - 1) as u16;
        let mut words = [_mm512_setzero_ps(); LANES];
        for (words, row) in words.iter_mut().zip(rows) {
            let from = row.as_ptr().cast::<f32>().wrapping_add(first);
            // SAFETY: words `first` to `first + n` of a row that is not empty are there; no others are read.
            *words = unsafe {
                match n {
                    LANES if ALL => _mm512_loadu_ps(from),
                    _ if ALL || !row.is_empty() => _mm512_maskz_loadu_ps(mask, from),
                    _ => _mm512_setzero_ps(),
                }
            };
        }
        for (i, column) in transposed(words).into_iter().enumerate().take(n) {
            // SAFETY: numbers of word `first + i` are below `d`: 16 numbers are there, as the caller promised.
            unsafe {
                let to = to.add((first + i) * E::PER_WORD * stride);
                if E::PER_WORD == 1 {
                    _mm512_storeu_ps(to, column);
                } else {
                    let words = _mm512_castps_si512(column);
                    let upper = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                    _mm512_storeu_ps(to, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)));
                    _mm512_storeu_ps(to.add(stride), _mm512_castsi512_ps(upper));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_number_of_a_row_stands_in_its_column() {
        fn check<E: Element>(d: usize, n_rows: usize, stride: usize) {
            // Numbers that bf16 holds too.
            let values: Vec<f32> = (0..LANES * 100).map(|i| (i % 256) as f32 + 1.0).collect();
            let stored: Vec<E> = values.iter().map(|&x| E::narrow(x)).collect();
            let rows: [&[E]; LANES] =
                std::array::from_fn(|j| if j < n_rows { &stored[100 * j..][..d] } else { &[][..] });
            for isa in Isa::all_available() {
                let mut to = vec![-1.0; d * stride];
                columns(isa, &rows, d, &mut to, stride);
                for (c, found) in to.chunks(stride).enumerate() {
                    for (j, &found) in found.iter().enumerate() {
                        let expected = match j {
                            _ if j >= LANES => -1.0,
                            _ if j >= n_rows => 0.0,
                            _ => values[100 * j + c],
                        };
                        assert_eq!(found, expected, "{isa:?} {d} {n_rows} {stride}: ({c}, {j})");
                    }
                }
            }
        }
        for (d, n_rows, stride) in
            [(1, 16, 16), (16, 16, 16), (17, 3, 32), (80, 16, 48), (88, 9, 16), (5, 0, 16), (34, 2, 64)]
        {
            check::<f32>(d, n_rows, stride);
            check::<bf16>(d, n_rows, stride);
        }
    }
}
