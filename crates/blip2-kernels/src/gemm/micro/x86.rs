//! The register tiles with AVX-512 and with AVX2 and FMA.

use std::arch::x86_64::*;

use super::{NR, Tile};
use crate::gemm::pack::LINE;

/// Lines of `ahead` are fetched meanwhile, one or two with each row of the panel, as far as there are.
///
/// # Safety
/// As [`tile`](super::tile), with R rows and 32 columns.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512_f32<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, ahead, .. } = tile;
    let (a, n_words) = (a.as_ptr().cast::<f32>(), panel.len() / NR);
    let mut b = panel.as_ptr().cast::<f32>();
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let lines = ahead.len().div_ceil(LINE * n_words.max(1));
    let mut ahead = ahead.as_ptr();
    // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = from.add(r * from_stride);
            *sums = [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))];
        }
        for p in 0..n_words {
            for _ in 0..lines {
                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                ahead = ahead.wrapping_add(LINE);
            }
            let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
            b = b.add(NR);
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a.add(r * a_stride + p));
                sums[0] = _mm512_fmadd_ps(x, b0, sums[0]);
                sums[1] = _mm512_fmadd_ps(x, b1, sums[1]);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(c.add(r * c_stride), sums[0]);
            _mm512_storeu_ps(c.add(r * c_stride + 16), sums[1]);
        }
    }
}

/// # Safety
/// As [`tile`](super::tile), with R rows and 32 columns.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn avx512_bf16<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, .. } = tile;
    let n_words = panel.len() / NR;
    let (a, mut b) = (a.as_ptr().cast::<i32>(), panel.as_ptr());
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32. The
    // transmutes only name 512 bits as 32 bf16 numbers.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = from.add(r * from_stride);
            *sums = [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))];
        }
        for p in 0..n_words {
            let b0: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.cast()));
            let b1: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.add(16).cast()));
            b = b.add(NR);
            for (r, sums) in sums.iter_mut().enumerate() {
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a.add(r * a_stride + p)));
                sums[0] = _mm512_dpbf16_ps(sums[0], x, b0);
                sums[1] = _mm512_dpbf16_ps(sums[1], x, b1);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(c.add(r * c_stride), sums[0]);
            _mm512_storeu_ps(c.add(r * c_stride + 16), sums[1]);
        }
    }
}

/// # Safety
/// As [`tile`](super::tile), with R rows and 32 columns; three rows of sums fill twelve of sixteen registers.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_f32<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, .. } = tile;
    let (a, n_words) = (a.as_ptr().cast::<f32>(), panel.len() / NR);
    let mut b = panel.as_ptr().cast::<f32>();
    let mut sums = [[_mm256_setzero_ps(); 4]; R];
    // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(from.add(r * from_stride + 8 * i));
            }
        }
        for p in 0..n_words {
            let mut x = [_mm256_setzero_ps(); R];
            for (r, x) in x.iter_mut().enumerate() {
                *x = _mm256_broadcast_ss(&*a.add(r * a_stride + p));
            }
            for i in 0..4 {
                let b = _mm256_loadu_ps(b.add(8 * i));
                for (sums, x) in sums.iter_mut().zip(x) {
                    sums[i] = _mm256_fmadd_ps(x, b, sums[i]);
                }
            }
            b = b.add(NR);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * c_stride + 8 * i), *sum);
            }
        }
    }
}

/// The lower and the upper bf16 of each word, widened.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(words: __m256i) -> [__m256; 2] {
    let upper = _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32));
    [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)), _mm256_castsi256_ps(upper)]
}

/// # Safety
/// As [`tile`](super::tile), with R rows and 32 columns.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_bf16<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, .. } = tile;
    let n_words = panel.len() / NR;
    let (a, mut b) = (a.as_ptr().cast::<i32>(), panel.as_ptr());
    let mut sums = [[_mm256_setzero_ps(); 4]; R];
    // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(from.add(r * from_stride + 8 * i));
            }
        }
        for p in 0..n_words {
            for i in 0..4 {
                let [low, high] = halves(_mm256_loadu_si256(b.add(8 * i).cast()));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let [x_low, x_high] = halves(_mm256_set1_epi32(*a.add(r * a_stride + p)));
                    sums[i] = _mm256_fmadd_ps(x_low, low, sums[i]);
                    sums[i] = _mm256_fmadd_ps(x_high, high, sums[i]);
                }
            }
            b = b.add(NR);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * c_stride + 8 * i), *sum);
            }
        }
    }
}
