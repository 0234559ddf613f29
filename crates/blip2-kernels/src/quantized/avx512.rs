//! The sums of [`sums`](super::sums) with AVX-512 VNNI, which multiplies unsigned bytes (the weights) by signed ones (the
//! activations) and adds four products to 32 bits.

use std::arch::x86_64::*;

use super::format::{Layout, QUAD, SCALES, WIDTH};
use super::sums::{Activations, Tile};
use crate::isa::Isa;

/// Quads that are multiplied between two [fetches](fetch).
const QUADS_A_PART: usize = 8;

/// Asks for the lines of some bytes, which are read soon. The second level of Intel's cache takes more lines at once than the first.
#[inline(always)]
pub(super) fn fetch(isa: Isa, bytes: &[u8]) {
    for line in bytes.chunks(64) {
        // SAFETY: nothing is read.
        #[allow(unused_unsafe, reason = "safe in later versions of the language")]
        unsafe {
            if isa == Isa::Amx {
                _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
            } else {
                _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
            }
        }
    }
}

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
pub(super) unsafe fn integer_sums<const R: usize>(
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

/// # Safety
/// `x` must have R rows of `n_blocks` blocks of integers and scales, and `panel` as many blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn block_sums<const R: usize, L: Layout>(
    isa: Isa,
    x: Activations<'_>,
    panel: &[u8],
    ahead: &[u8],
    sums: &mut Tile<f32>,
) {
    let low = _mm512_set1_epi8(15);
    // A part with some quads: many lines at once wait for each other.
    let n_parts = x.n_blocks * L::QUADS.div_ceil(QUADS_A_PART);
    let mut ahead = ahead.chunks(ahead.len().div_ceil(n_parts).next_multiple_of(64).max(64));
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for b in 0..x.n_blocks {
        // SAFETY: block b is there in `panel` and in R rows of values and scales, as the caller promised.
        unsafe {
            let (group, i) = (panel.as_ptr().add(b / L::BLOCKS * L::GROUP), b % L::BLOCKS);
            let body = group.add(L::HEAD + i * L::BODY);
            let values = x.values.as_ptr().add(b * L::INPUTS);
            let mut integers = [[_mm512_setzero_si512(); 2]; R];
            if !L::OFFSET {
                for (r, integers) in integers.iter_mut().enumerate() {
                    *integers = [_mm512_set1_epi32(*x.starts.as_ptr().add(r * x.n_blocks + b)); 2];
                }
            }
            for p in 0..L::QUADS {
                if p % QUADS_A_PART == 0
                    && let Some(lines) = ahead.next()
                {
                    fetch(isa, lines);
                }
                let quad = body.add(p * QUAD);
                let (q0, q1) = (_mm512_loadu_si512(quad.cast()), _mm512_loadu_si512(quad.add(64).cast()));
                if L::BITS == 8 {
                    for (r, integers) in integers.iter_mut().enumerate() {
                        let x = four(values.add(r * x.stride + 4 * p));
                        integers[0] = _mm512_dpbusd_epi32(integers[0], q0, x);
                        integers[1] = _mm512_dpbusd_epi32(integers[1], q1, x);
                    }
                } else {
                    let (mut low0, mut low1) = (_mm512_and_si512(q0, low), _mm512_and_si512(q1, low));
                    let mut high0 = _mm512_and_si512(_mm512_srli_epi16::<4>(q0), low);
                    let mut high1 = _mm512_and_si512(_mm512_srli_epi16::<4>(q1), low);
                    if L::EXTRA_BITS > 0 {
                        let extra = body.add(L::QUADS * QUAD);
                        let [low_bits0, high_bits0] = extra_bits::<L>(extra, p);
                        let [low_bits1, high_bits1] = extra_bits::<L>(extra.add(64), p);
                        (low0, low1) = (_mm512_or_si512(low0, low_bits0), _mm512_or_si512(low1, low_bits1));
                        (high0, high1) =
                            (_mm512_or_si512(high0, high_bits0), _mm512_or_si512(high1, high_bits1));
                    }
                    for (r, integers) in integers.iter_mut().enumerate() {
                        let at = values.add(r * x.stride + 4 * p);
                        let (x, x_high) = (four(at), four(at.add(L::INPUTS / 2)));
                        integers[0] = _mm512_dpbusd_epi32(integers[0], low0, x);
                        integers[1] = _mm512_dpbusd_epi32(integers[1], low1, x);
                        integers[0] = _mm512_dpbusd_epi32(integers[0], high0, x_high);
                        integers[1] = _mm512_dpbusd_epi32(integers[1], high1, x_high);
                    }
                }
            }
            for half in 0..2 {
                let scale = scales(group, L::BLOCK_SCALES + i * WIDTH, half, L::BLOCKS > 1);
                for (r, (acc, integers)) in acc.iter_mut().zip(&integers).enumerate() {
                    let at = r * x.n_blocks + b;
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*x.scales.as_ptr().add(at)));
                    acc[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers[half]), scale, acc[half]);
                }
                if L::OFFSET {
                    let minimum =
                        scales(group.add(SCALES), L::BLOCK_MINIMA - SCALES + i * WIDTH, half, L::BLOCKS > 1);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let total = _mm512_set1_ps(*x.totals.as_ptr().add(r * x.n_blocks + b));
                        acc[half] = _mm512_fmadd_ps(minimum, total, acc[half]);
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

/// The bits beside the nibbles of quad `p` of half a panel, at their place: of the low nibbles, and of the high ones, whose quad
/// is `L::QUADS` further on. There are four positions between the two.
///
/// # Safety
/// `extra` must point to 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn extra_bits<L: Layout>(extra: *const u8, p: usize) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8((((1 << L::EXTRA_BITS) - 1) << 4) as i8);
    // SAFETY: the caller's promise.
    let bits = unsafe { _mm512_loadu_si512(extra.cast()) };
    let bits = _mm512_srl_epi16(bits, _mm_cvtsi32_si128((L::EXTRA_BITS * p) as i32));
    [_mm512_and_si512(_mm512_slli_epi16::<4>(bits), mask), _mm512_and_si512(bits, mask)]
}

/// Half of 32 numbers in half precision, times 32 bytes at `factors` where there are.
///
/// # Safety
/// `numbers` must point to 64 bytes, and 32 must be at `factors` from there.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn scales(numbers: *const u8, factors: usize, half: usize, has_factors: bool) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let numbers_of_half = _mm512_cvtph_ps(_mm256_loadu_si256(numbers.add(32 * half).cast()));
        if !has_factors {
            return numbers_of_half;
        }
        let factors = _mm_loadu_si128(numbers.add(factors + 16 * half).cast());
        _mm512_mul_ps(numbers_of_half, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(factors)))
    }
}

/// The bits of the largest magnitude; they order as magnitudes do, infinity and NaN last.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn largest<const N: usize>(x: &[f32; N]) -> u32 {
    const { assert!(N.is_multiple_of(16)) };
    let magnitude = _mm512_set1_epi32(i32::MAX);
    let mut largest = _mm512_setzero_si512();
    for at in (0..N).step_by(16) {
        // SAFETY: 16 elements from `at` on are there.
        let x = unsafe { _mm512_loadu_si512(x.as_ptr().add(at).cast()) };
        largest = _mm512_max_epu32(largest, _mm512_and_si512(x, magnitude));
    }
    _mm512_reduce_max_epu32(largest)
}

/// The integers nearest to `x * scale`, which are less than 128, and their sum.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn round_all<const N: usize>(x: &[f32; N], scale: f32, to: &mut [i8; N]) -> i32 {
    const { assert!(N.is_multiple_of(16)) };
    let mut sum = _mm512_setzero_si512();
    for at in (0..N).step_by(16) {
        // SAFETY: 16 elements from `at` on are there.
        unsafe {
            let x = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(at)), _mm512_set1_ps(scale));
            let rounded = _mm512_cvtps_epi32(x);
            sum = _mm512_add_epi32(sum, rounded);
            _mm_storeu_si128(to.as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(rounded));
        }
    }
    _mm512_reduce_add_epi32(sum)
}
