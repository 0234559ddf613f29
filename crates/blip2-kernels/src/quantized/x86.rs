//! The sums of [`sums`](super::sums) with AVX-512 VNNI and with AVX2.
//!
//! VNNI multiplies unsigned bytes (the weights) by signed ones (the activations) and adds four products to 32 bits. AVX2
//! adds only two of them, to 16 bits with saturation: weights of eight bits are multiplied as magnitudes, with their
//! signs moved to the activations, so that two products are at most 2 · 128 · 127; of products of four bits, the
//! sixteen that a block adds to one 16-bit sum are at most 16 · 15 · 127.

use std::arch::x86_64::*;

use super::format::{BLOCK, QUAD, WIDTH};
use super::sums::{Activations, Tile};

/// How far ahead of the products of a few rows four-bit weights are fetched: a fifth faster with five rows. With one row, and
/// with eight bits, reading far ahead is what the processor does by itself, and asking for it costs more than it gains.
const AHEAD: usize = 4096;

/// Four integers of a row in every lane.
///
/// # Safety
/// `x` must point to four bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn four(x: *const i8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { x.cast::<i32>().read_unaligned() })
}

/// # Safety
/// `x` must have R rows of `4 * quads.len()` integers.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) unsafe fn avx512_integer_sums<const R: usize>(
    x: Activations<'_>,
    quads: &[[u8; QUAD]],
    sums: &mut Tile<i32>,
) {
    let values = x.values.as_ptr();
    let mut acc = [[_mm512_setzero_si512(); 2]; R];
    for (r, acc) in acc.iter_mut().enumerate() {
        *acc = [_mm512_set1_epi32(x.starts[r]); 2];
    }
    for (p, quad) in quads.iter().enumerate() {
        // SAFETY: a quad is 128 bytes; integers 4 p to 4 p + 3 of R rows are there, as the caller promised.
        unsafe {
            let quad = quad.as_ptr();
            let (q0, q1) = (_mm512_loadu_si512(quad.cast()), _mm512_loadu_si512(quad.add(64).cast()));
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = four(values.add(r * x.stride + 4 * p));
                acc[0] = _mm512_dpbusd_epi32(acc[0], q0, x);
                acc[1] = _mm512_dpbusd_epi32(acc[1], q1, x);
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        // SAFETY: a row of a tile is 32 integers.
        unsafe {
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), acc[0]);
            _mm512_storeu_si512(sums.as_mut_ptr().add(16).cast(), acc[1]);
        }
    }
}

/// Blocks of integers of `BITS` bits, with a smallest value where `OFFSET`.
///
/// # Safety
/// `x` must have R rows of `n_blocks` blocks of integers and scales, and `panel` as many blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn avx512_block_sums<const R: usize, const BITS: usize, const OFFSET: bool>(
    x: Activations<'_>,
    panel: &[u8],
    sums: &mut Tile<f32>,
) {
    let head = if OFFSET { 4 * WIDTH } else { 2 * WIDTH };
    let block_bytes = head + BITS * QUAD;
    let low = _mm512_set1_epi8(15);
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for b in 0..x.n_blocks {
        // SAFETY: block b is there in `panel` and in R rows of values and scales, as the caller promised.
        unsafe {
            let block = panel.as_ptr().add(b * block_bytes);
            let values = x.values.as_ptr().add(b * BLOCK);
            if BITS == 4 && R > 1 && R < 6 {
                for line in (0..block_bytes).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(AHEAD + line).cast());
                }
            }
            let mut integers = [[_mm512_setzero_si512(); 2]; R];
            if !OFFSET {
                for (r, integers) in integers.iter_mut().enumerate() {
                    *integers = [_mm512_set1_epi32(*x.starts.as_ptr().add(r * x.n_blocks + b)); 2];
                }
            }
            for p in 0..BITS {
                let quad = block.add(head + p * QUAD);
                let (q0, q1) = (_mm512_loadu_si512(quad.cast()), _mm512_loadu_si512(quad.add(64).cast()));
                if BITS == 8 {
                    for (r, integers) in integers.iter_mut().enumerate() {
                        let x = four(values.add(r * x.stride + 4 * p));
                        integers[0] = _mm512_dpbusd_epi32(integers[0], q0, x);
                        integers[1] = _mm512_dpbusd_epi32(integers[1], q1, x);
                    }
                } else {
                    let (low0, low1) = (_mm512_and_si512(q0, low), _mm512_and_si512(q1, low));
                    let high0 = _mm512_and_si512(_mm512_srli_epi16::<4>(q0), low);
                    let high1 = _mm512_and_si512(_mm512_srli_epi16::<4>(q1), low);
                    for (r, integers) in integers.iter_mut().enumerate() {
                        let at = values.add(r * x.stride + 4 * p);
                        let (x, x_high) = (four(at), four(at.add(16)));
                        integers[0] = _mm512_dpbusd_epi32(integers[0], low0, x);
                        integers[1] = _mm512_dpbusd_epi32(integers[1], low1, x);
                        integers[0] = _mm512_dpbusd_epi32(integers[0], high0, x_high);
                        integers[1] = _mm512_dpbusd_epi32(integers[1], high1, x_high);
                    }
                }
            }
            for half in 0..2 {
                let halves =
                    |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(block.add(at + 32 * half).cast()));
                let scale = halves(0);
                for (r, (acc, integers)) in acc.iter_mut().zip(&integers).enumerate() {
                    let at = r * x.n_blocks + b;
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*x.scales.as_ptr().add(at)));
                    acc[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers[half]), scale, acc[half]);
                    if OFFSET {
                        let total = _mm512_set1_ps(*x.totals.as_ptr().add(at));
                        acc[half] = _mm512_fmadd_ps(halves(2 * WIDTH), total, acc[half]);
                    }
                }
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        // SAFETY: a row of a tile is 32 numbers.
        unsafe {
            _mm512_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(16), acc[1]);
        }
    }
}

/// Four integers of a row in every lane.
///
/// # Safety
/// `x` must point to four bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four_256(x: *const i8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { x.cast::<i32>().read_unaligned() })
}

/// `acc + Σ x w` of four neighbours; `size` is `|w|`.
#[inline]
#[target_feature(enable = "avx2")]
fn add_four(acc: __m256i, x: __m256i, w: __m256i, size: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, w));
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// # Safety
/// `values` must have R rows of `4 * quads.len()` integers, `stride` apart.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn avx2_integer_sums<const R: usize>(
    values: &[i8],
    stride: usize,
    quads: &[[u8; QUAD]],
    sums: &mut [[i32; WIDTH]],
) {
    let (values, flip) = (values.as_ptr(), _mm256_set1_epi8(-128));
    // Half a panel at a time: R × 2 sums leave registers for what they are made from.
    for half in 0..2 {
        let mut acc = [[_mm256_setzero_si256(); 2]; R];
        for (p, quad) in quads.iter().enumerate() {
            for i in 0..2 {
                // SAFETY: a quad is four times 32 bytes; integers 4 p to 4 p + 3 of R rows are there, as the caller promised.
                unsafe {
                    let q = _mm256_loadu_si256(quad.as_ptr().add(64 * half + 32 * i).cast());
                    let w = _mm256_xor_si256(q, flip);
                    let size = _mm256_abs_epi8(w);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        acc[i] = add_four(acc[i], four_256(values.add(r * stride + 4 * p)), w, size);
                    }
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            // SAFETY: half a row of a tile is 16 integers.
            unsafe {
                let sums = sums.as_mut_ptr().add(16 * half);
                _mm256_storeu_si256(sums.cast(), acc[0]);
                _mm256_storeu_si256(sums.add(8).cast(), acc[1]);
            }
        }
    }
}

/// Blocks of integers of `BITS` bits, with a smallest value where `OFFSET`.
///
/// # Safety
/// `x` must have R rows of `n_blocks` blocks of integers and scales, and `panel` as many blocks.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2_block_sums<const R: usize, const BITS: usize, const OFFSET: bool>(
    x: Activations<'_>,
    panel: &[u8],
    sums: &mut [[f32; WIDTH]],
) {
    let head = if OFFSET { 4 * WIDTH } else { 2 * WIDTH };
    let block_bytes = head + BITS * QUAD;
    let (low, flip) = (_mm256_set1_epi8(15), _mm256_set1_epi8(-128));
    // A quarter of a panel, 8 outputs, at a time.
    for part in 0..4 {
        let mut acc = [_mm256_setzero_ps(); R];
        for b in 0..x.n_blocks {
            // SAFETY: block b is there in `panel` and in R rows of values and scales, as the caller promised.
            unsafe {
                let block = panel.as_ptr().add(b * block_bytes);
                let values = x.values.as_ptr().add(b * BLOCK);
                let mut integers = [_mm256_setzero_si256(); R];
                for p in 0..BITS {
                    let q = _mm256_loadu_si256(block.add(head + p * QUAD + 32 * part).cast());
                    if BITS == 8 {
                        let w = _mm256_xor_si256(q, flip);
                        let size = _mm256_abs_epi8(w);
                        for (r, integers) in integers.iter_mut().enumerate() {
                            *integers =
                                add_four(*integers, four_256(values.add(r * x.stride + 4 * p)), w, size);
                        }
                    } else {
                        let q_high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), low);
                        let q = _mm256_and_si256(q, low);
                        for (r, integers) in integers.iter_mut().enumerate() {
                            let at = values.add(r * x.stride + 4 * p);
                            let pairs = _mm256_maddubs_epi16(q, four_256(at));
                            let high = _mm256_maddubs_epi16(q_high, four_256(at.add(16)));
                            *integers = _mm256_add_epi16(*integers, _mm256_add_epi16(pairs, high));
                        }
                    }
                }
                let halves = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(block.add(at + 16 * part).cast()));
                let scale = halves(0);
                for (r, (acc, integers)) in acc.iter_mut().zip(integers).enumerate() {
                    let at = r * x.n_blocks + b;
                    let mut integers = integers;
                    if BITS == 4 {
                        integers = _mm256_madd_epi16(integers, _mm256_set1_epi16(1));
                        if !OFFSET {
                            let start = _mm256_set1_epi32(*x.starts.as_ptr().add(at));
                            integers = _mm256_add_epi32(integers, start);
                        }
                    }
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*x.scales.as_ptr().add(at)));
                    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), scale, *acc);
                    if OFFSET {
                        let total = _mm256_set1_ps(*x.totals.as_ptr().add(at));
                        *acc = _mm256_fmadd_ps(halves(2 * WIDTH), total, *acc);
                    }
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            // SAFETY: a quarter of a row of a tile is 8 numbers.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(8 * part), acc) };
        }
    }
}
