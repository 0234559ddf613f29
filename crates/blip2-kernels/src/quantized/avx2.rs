//! The sums of [`sums`](super::sums) with AVX2, which adds two products of bytes to 16 bits with saturation: weights of eight bits are
//! multiplied as magnitudes, with their signs moved to the activations, so that two products are at most 2 · 128 · 127; of
//! products of six bits four are at most 4 · 63 · 127, and of four bits the sixteen that a block adds to one 16-bit sum
//! 16 · 15 · 127.

use std::arch::x86_64::*;

use super::format::{Layout, QUAD, SCALES, WIDTH};
use super::sums::Activations;

/// Four integers of a row in every lane.
///
/// # Safety
/// `x` must point to four bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn four(x: *const i8) -> __m256i {
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
pub(super) unsafe fn integer_sums<const R: usize>(
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
                        acc[i] = add_four(acc[i], four(values.add(r * stride + 4 * p)), w, size);
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

/// # Safety
/// `x` must have R rows of `n_blocks` blocks of integers and scales, and `panel` as many blocks.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn block_sums<const R: usize, L: Layout>(
    x: Activations<'_>,
    panel: &[u8],
    sums: &mut [[f32; WIDTH]],
) {
    let (flip, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
    // A quarter of a panel, 8 outputs, at a time.
    for part in 0..4 {
        let mut acc = [_mm256_setzero_ps(); R];
        for b in 0..x.n_blocks {
            // SAFETY: block b is there in `panel` and in R rows of values and scales, as the caller promised.
            unsafe {
                let (group, i) = (panel.as_ptr().add(b / L::BLOCKS * L::GROUP), b % L::BLOCKS);
                let body = group.add(L::HEAD + i * L::BODY);
                let values = x.values.as_ptr().add(b * L::INPUTS);
                let mut integers = [_mm256_setzero_si256(); R];
                for p in 0..L::QUADS {
                    if L::BITS == 8 {
                        let q = _mm256_loadu_si256(body.add(p * QUAD + 32 * part).cast());
                        let w = _mm256_xor_si256(q, flip);
                        let size = _mm256_abs_epi8(w);
                        for (r, integers) in integers.iter_mut().enumerate() {
                            *integers = add_four(*integers, four(values.add(r * x.stride + 4 * p)), w, size);
                        }
                    } else {
                        let [q, q_high] = nibbles::<L>(body, p, part);
                        for (r, integers) in integers.iter_mut().enumerate() {
                            let at = values.add(r * x.stride + 4 * p);
                            let pairs = _mm256_maddubs_epi16(q, four(at));
                            let high = _mm256_maddubs_epi16(q_high, four(at.add(L::INPUTS / 2)));
                            let pairs = _mm256_add_epi16(pairs, high);
                            *integers = if L::BITS == 4 {
                                _mm256_add_epi16(*integers, pairs)
                            } else {
                                _mm256_add_epi32(*integers, _mm256_madd_epi16(pairs, ones))
                            };
                        }
                    }
                }
                let scale = scales::<L>(group, L::BLOCK_SCALES + i * WIDTH, part);
                for (r, (acc, integers)) in acc.iter_mut().zip(integers).enumerate() {
                    let at = r * x.n_blocks + b;
                    let mut integers = integers;
                    if L::BITS == 4 {
                        integers = _mm256_madd_epi16(integers, ones);
                    }
                    if L::BITS < 8 && !L::OFFSET {
                        let start = _mm256_set1_epi32(*x.starts.as_ptr().add(at));
                        integers = _mm256_add_epi32(integers, start);
                    }
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*x.scales.as_ptr().add(at)));
                    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), scale, *acc);
                }
                if L::OFFSET {
                    let minimum = scales::<L>(group.add(SCALES), L::BLOCK_MINIMA - SCALES + i * WIDTH, part);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let total = _mm256_set1_ps(*x.totals.as_ptr().add(r * x.n_blocks + b));
                        *acc = _mm256_fmadd_ps(minimum, total, *acc);
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

/// The integers of quad `p` of a quarter of a panel, and of the quad that shares its bytes.
///
/// # Safety
/// `body` must point to a block's integers.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn nibbles<L: Layout>(body: *const u8, p: usize, part: usize) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(15);
    // SAFETY: the caller's promise.
    let q = unsafe { _mm256_loadu_si256(body.add(p * QUAD + 32 * part).cast()) };
    let [q, q_high] = [_mm256_and_si256(q, low), _mm256_and_si256(_mm256_srli_epi16::<4>(q), low)];
    if L::EXTRA_BITS == 0 {
        return [q, q_high];
    }
    // The bits of the quad of high nibbles lie four positions above those of the low ones.
    let mask = _mm256_set1_epi8((((1 << L::EXTRA_BITS) - 1) << 4) as i8);
    // SAFETY: the caller's promise.
    let bits = unsafe { _mm256_loadu_si256(body.add(L::QUADS * QUAD + 32 * part).cast()) };
    let bits = _mm256_srl_epi16(bits, _mm_cvtsi32_si128((L::EXTRA_BITS * p) as i32));
    let low_bits = _mm256_and_si256(_mm256_slli_epi16::<4>(bits), mask);
    [_mm256_or_si256(q, low_bits), _mm256_or_si256(q_high, _mm256_and_si256(bits, mask))]
}

/// A quarter of 32 numbers in half precision, times 32 bytes at `factors` where there are super-blocks.
///
/// # Safety
/// `numbers` must point to 64 bytes, and 32 must be at `factors` from there.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn scales<L: Layout>(numbers: *const u8, factors: usize, part: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let numbers_of_part = _mm256_cvtph_ps(_mm_loadu_si128(numbers.add(16 * part).cast()));
        if L::BLOCKS == 1 {
            return numbers_of_part;
        }
        let factors = _mm_loadl_epi64(numbers.add(factors + 8 * part).cast());
        _mm256_mul_ps(numbers_of_part, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(factors)))
    }
}
