//! Words of two neighbouring bf16, as the micro-kernels read them, with the instructions that AVX-512 has for rounding. Unlike
//! plain Rust they take numbers below the normal ones for zero.

use std::arch::x86_64::*;

use super::NR;
use crate::lanes::LANES;
use crate::transpose::transposed;

/// 16 numbers of `row` from `first` on, zero beyond its end.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &[f32], first: usize) -> __m512 {
    let n = row.len().saturating_sub(first);
    let from = row.as_ptr().wrapping_add(first);
    if n >= LANES {
        // SAFETY: 16 numbers are there.
        unsafe { _mm512_loadu_ps(from) }
    } else {
        // SAFETY: `n` numbers are there; no others are read.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, from) }
    }
}

/// Writes the first of 16 words, as many as `to` has.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(words: __m512i, to: &mut [u32]) {
    let mask = if to.len() < LANES { (1u16 << to.len()) - 1 } else { u16::MAX };
    // SAFETY: as many words as `to` has are written.
    unsafe { _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), mask, words) };
}

/// Numbers `first` to `first + 32` of a row in 16 words, zero beyond its end.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn along(row: &[f32], first: usize) -> __m512i {
    let words = _mm512_cvtne2ps_pbh(load(row, first + LANES), load(row, first));
    // SAFETY: both are 512 bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(words) }
}

/// Numbers `first` to `first + 16` of two rows in 16 words, zero beyond their end.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn across(low: &[f32], high: &[f32], first: usize) -> __m512i {
    let (low, high) = (_mm512_cvtneps_pbh(load(low, first)), _mm512_cvtneps_pbh(load(high, first)));
    // SAFETY: all are 256 bits.
    let (low, high) = unsafe {
        (std::mem::transmute::<__m256bh, __m256i>(low), std::mem::transmute::<__m256bh, __m256i>(high))
    };
    _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)))
}

/// A row, in words along it.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn row(row: &[f32], to: &mut [u32]) {
    for (i, to) in to[..row.len().div_ceil(2)].chunks_mut(LANES).enumerate() {
        store(along(row, 2 * LANES * i), to);
    }
}

/// Up to 16 rows of `d` numbers, in words along them, as columns of a panel: half of `to`'s rows of 32 words, from its first on.
/// A row that is empty is a column of zeros.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn columns(rows: &[&[f32]; LANES], d: usize, to: &mut [u32]) {
    for (i, to) in to.chunks_mut(LANES * NR).enumerate() {
        let mut words = [_mm512_setzero_ps(); LANES];
        for (words, row) in words.iter_mut().zip(rows) {
            *words = _mm512_castsi512_ps(along(row, 2 * LANES * i));
        }
        let n = LANES.min(d.div_ceil(2) - i * LANES);
        for (column, to) in transposed(words).into_iter().take(n).zip(to.chunks_mut(NR)) {
            store(_mm512_castps_si512(column), &mut to[..LANES]);
        }
    }
}

/// Numbers `first` to `first + 32` of two rows, in words across them: a row of a panel. Zero beyond their end.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn neighbours(low: &[f32], high: &[f32], first: usize, to: &mut [u32; NR]) {
    let (left, right) = to.split_at_mut(LANES);
    store(across(low, high, first), left);
    store(across(low, high, first + LANES), right);
}

/// Up to 16 columns of a matrix of `n_rows` rows, in words across its rows, as rows of `to`: word `p` of column `i` at
/// `to[i * stride + p]`. `row(k)` gives the columns of row `k`.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn rows_of_columns<'a>(
    row: impl Fn(usize) -> &'a [f32],
    n_rows: usize,
    to: &mut [u32],
    stride: usize,
) {
    let n_words = n_rows.div_ceil(2);
    for first in (0..n_words).step_by(LANES) {
        let n = LANES.min(n_words - first);
        let mut words = [_mm512_setzero_ps(); LANES];
        for (p, words) in words.iter_mut().enumerate().take(n) {
            let k = 2 * (first + p);
            let high = if k + 1 < n_rows { row(k + 1) } else { &[] };
            *words = _mm512_castsi512_ps(across(row(k), high, 0));
        }
        for (column, to) in transposed(words).into_iter().zip(to.chunks_mut(stride)) {
            store(_mm512_castps_si512(column), &mut to[first..first + n]);
        }
    }
}

/// The transpose of 32 × 32 numbers: 16 words along `k` of each of the 32 columns of a panel, as words across them. Word `i` of column
/// `j` holds numbers `2 i` and `2 i + 1` of `j`; what comes out are the words `2 i` and `2 i + 1` of row `j / 2`.
#[target_feature(enable = "avx512f")]
pub(crate) fn turned(words: &[u32; LANES * NR], to: &mut [u32; LANES * NR]) {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    let left = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let right = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let (mut lows, mut highs) = ([_mm512_setzero_ps(); LANES], [_mm512_setzero_ps(); LANES]);
    for (i, words) in words.as_chunks::<NR>().0.iter().enumerate() {
        // SAFETY: 32 words are there.
        let (x, y) = unsafe {
            (_mm512_loadu_epi32(words.as_ptr().cast()), _mm512_loadu_epi32(words.as_ptr().add(LANES).cast()))
        };
        let (even, odd) = (_mm512_permutex2var_epi32(x, even, y), _mm512_permutex2var_epi32(x, odd, y));
        // Of two neighbouring columns, numbers 2 i and numbers 2 i + 1.
        let both_lows = _mm512_or_si512(_mm512_andnot_si512(high, even), _mm512_slli_epi32::<16>(odd));
        let both_highs = _mm512_or_si512(_mm512_srli_epi32::<16>(even), _mm512_and_si512(high, odd));
        (lows[i], highs[i]) = (_mm512_castsi512_ps(both_lows), _mm512_castsi512_ps(both_highs));
    }
    let columns = transposed(lows).into_iter().zip(transposed(highs));
    for ((low, high), to) in columns.zip(to.as_chunks_mut::<NR>().0) {
        let (low, high) = (_mm512_castps_si512(low), _mm512_castps_si512(high));
        let (first, second) = to.split_at_mut(LANES);
        store(_mm512_permutex2var_epi32(low, left, high), first);
        store(_mm512_permutex2var_epi32(low, right, high), second);
    }
}
