//! Rows that become columns in registers.

use std::arch::x86_64::*;

use crate::lanes::LANES;

/// Sixteen rows of sixteen words as columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transposed(r: [__m512; LANES]) -> [__m512; LANES] {
    let pair = |x, y| (_mm512_castps_pd(x), _mm512_castps_pd(y));
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
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    #[allow(clippy::print_stdout, reason = "what a test leaves out it says")]
    fn every_number_changes_its_two_places() {
        if !Isa::all_available().contains(&Isa::Avx512) {
            println!("SKIPPED: this machine has no AVX-512 with bf16");
            return;
        }
        let values: Vec<f32> = (0..LANES * LANES).map(|i| i as f32).collect();
        let mut found = vec![0.0f32; LANES * LANES];
        // SAFETY: the instruction set is there; each row has 16 numbers.
        unsafe {
            let mut rows = [_mm512_setzero_ps(); LANES];
            for (row, values) in rows.iter_mut().zip(values.chunks(LANES)) {
                *row = _mm512_loadu_ps(values.as_ptr());
            }
            for (column, found) in transposed(rows).iter().zip(found.chunks_mut(LANES)) {
                _mm512_storeu_ps(found.as_mut_ptr(), *column);
            }
        }
        for (i, &found) in found.iter().enumerate() {
            assert_eq!(found, (i % LANES * LANES + i / LANES) as f32);
        }
    }
}
