//! Rows as columns: keys are read row by row and multiplied column by column.

use crate::isa::Isa;
use crate::lanes::LANES;

/// Puts up to 16 rows, the first `d` numbers of each, into 16 neighbouring columns of `to`: number `c` of row `j` to
/// `to[c * stride + j]`. Columns of rows that are empty are zero.
///
/// # Panics
/// When a row that is not empty has less than `d` numbers, or `to` does not hold the columns.
pub(super) fn columns(isa: Isa, rows: &[&[f32]; LANES], d: usize, to: &mut [f32], stride: usize) {
    assert!(rows.iter().all(|row| row.is_empty() || row.len() >= d), "a row of `d` numbers");
    assert!(d == 0 || to.len() >= (d - 1) * stride + LANES, "`to` must hold the columns");
    assert!(isa.is_available());
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        // SAFETY: the instruction set is available; the rest was checked above.
        return unsafe { avx512_columns(rows, d, to.as_mut_ptr(), stride) };
    }
    for (c, to) in to.chunks_mut(stride).take(d).enumerate() {
        for (to, row) in to.iter_mut().zip(rows) {
            *to = row.get(c).copied().unwrap_or(0.0);
        }
    }
}

/// # Safety
/// Rows that are not empty must have `d` numbers, and `to` must take 16 at each of the first `d` multiples of `stride`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_columns(rows: &[&[f32]; LANES], d: usize, to: *mut f32, stride: usize) {
    use std::arch::x86_64::*;
    let pair = |x, y| (_mm512_castps_pd(x), _mm512_castps_pd(y));
    for first in (0..d).step_by(LANES) {
        let n = LANES.min(d - first);
        let mask = ((1u32 << n) - 1) as u16;
        let mut r = [_mm512_setzero_ps(); LANES];
        for (r, row) in r.iter_mut().zip(rows).filter(|(_, row)| !row.is_empty()) {
            // SAFETY: numbers `first` to `first + n` of the row are there; the others are not read.
            *r = unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr().add(first)) };
        }
        // Two neighbours, then four, become columns within the quarters of a register; then quarters change places.
        let mut two = r;
        for i in (0..LANES).step_by(2) {
            two[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
            two[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        let mut four = two;
        for i in (0..LANES).step_by(4) {
            for half in 0..2 {
                let (x, y) = pair(two[i + half], two[i + half + 2]);
                four[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                four[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
            }
        }
        let mut columns = four;
        for k in 0..4 {
            let even = |a: usize| _mm512_shuffle_f32x4::<0x88>(four[a + k], four[a + 4 + k]);
            let odd = |a: usize| _mm512_shuffle_f32x4::<0xdd>(four[a + k], four[a + 4 + k]);
            columns[k] = _mm512_shuffle_f32x4::<0x88>(even(0), even(8));
            columns[8 + k] = _mm512_shuffle_f32x4::<0xdd>(even(0), even(8));
            columns[4 + k] = _mm512_shuffle_f32x4::<0x88>(odd(0), odd(8));
            columns[12 + k] = _mm512_shuffle_f32x4::<0xdd>(odd(0), odd(8));
        }
        for (i, column) in columns.iter().enumerate().take(n) {
            // SAFETY: `first + i` is below `d`: 16 numbers are there, as the caller promised.
            unsafe { _mm512_storeu_ps(to.add((first + i) * stride), *column) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_a_row_stands_in_its_column() {
        let values: Vec<f32> = (0..LANES * 100).map(|i| i as f32 + 1.0).collect();
        for (d, n_rows, stride) in
            [(1, 16, 16), (16, 16, 16), (17, 3, 32), (80, 16, 48), (88, 9, 16), (5, 0, 16)]
        {
            let rows: [&[f32]; LANES] =
                std::array::from_fn(|j| if j < n_rows { &values[100 * j..][..d] } else { &[][..] });
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
    }
}
