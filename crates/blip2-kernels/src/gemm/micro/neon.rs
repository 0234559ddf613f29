//! The register tiles with NEON.
//!
//! Half of a panel at a time: six rows of sixteen sums are 24 of 32 registers. bf16 numbers are widened, which is exact, and
//! multiplied in f32.

use std::arch::aarch64::*;

use super::{NR, Tile};

/// # Safety
/// As [`tile`](super::tile), with R rows, at most six, and 32 columns.
pub(super) unsafe fn f32<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, .. } = tile;
    let (a, n_words) = (a.as_ptr().cast::<f32>(), panel.len() / NR);
    for half in [0, NR / 2] {
        // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words, the panel n_words rows of 32.
        unsafe {
            let mut sums = load::<R>(from.add(half), from_stride);
            for p in 0..n_words {
                let b = panel.as_ptr().cast::<f32>().add(p * NR + half);
                let b = [vld1q_f32(b), vld1q_f32(b.add(4)), vld1q_f32(b.add(8)), vld1q_f32(b.add(12))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = vld1q_dup_f32(a.add(r * a_stride + p));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = vfmaq_f32(*sum, b, x);
                    }
                }
            }
            store(sums, c.add(half), c_stride);
        }
    }
}

/// # Safety
/// As [`tile`](super::tile), with R rows, at most four, and 32 columns.
pub(super) unsafe fn bf16<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, .. } = tile;
    let (a, n_words) = (a.as_ptr(), panel.len() / NR);
    for half in [0, NR / 2] {
        // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words, the panel n_words rows of 32.
        unsafe {
            let mut sums = load::<R>(from.add(half), from_stride);
            for p in 0..n_words {
                let b = panel.as_ptr().add(p * NR + half);
                let b = [0, 4, 8, 12].map(|i| halves(vld1q_u32(b.add(i))));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let [low, high] = halves(vld1q_dup_u32(a.add(r * a_stride + p)));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = vfmaq_f32(*sum, b[0], low);
                        *sum = vfmaq_f32(*sum, b[1], high);
                    }
                }
            }
            store(sums, c.add(half), c_stride);
        }
    }
}

/// The lower and the upper bf16 of each word, widened.
#[inline(always)]
fn halves(words: uint32x4_t) -> [float32x4_t; 2] {
    // SAFETY: NEON is always there.
    unsafe {
        let upper = vandq_u32(words, vdupq_n_u32(0xffff_0000));
        [vreinterpretq_f32_u32(vshlq_n_u32::<16>(words)), vreinterpretq_f32_u32(upper)]
    }
}

/// # Safety
/// `from` must have R rows of 16 elements, `stride` apart.
#[inline(always)]
unsafe fn load<const R: usize>(from: *const f32, stride: usize) -> [[float32x4_t; 4]; R] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|r| std::array::from_fn(|i| unsafe { vld1q_f32(from.add(r * stride + 4 * i)) }))
}

/// # Safety
/// `c` must have R rows of 16 elements, `stride` apart.
#[inline(always)]
unsafe fn store<const R: usize>(sums: [[float32x4_t; 4]; R], c: *mut f32, stride: usize) {
    for (r, sums) in sums.into_iter().enumerate() {
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { vst1q_f32(c.add(r * stride + 4 * i), sum) };
        }
    }
}
