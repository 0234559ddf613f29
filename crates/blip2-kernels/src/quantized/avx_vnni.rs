//! The sums of [`sums`](super::sums) with AVX-VNNI: as with AVX-512 VNNI, in registers of 256 bits.

use std::arch::x86_64::*;

use super::avx2::{four, nibbles, scales};
use super::format::{Layout, QUAD, SCALES, WIDTH};
use super::sums::Activations;

/// The two kernels with `$dot` for the dot products of four bytes: AVX-VNNI has an encoding of its own for the instruction,
/// which processors with AVX-512 VNNI may lack, although theirs does the same.
macro_rules! kernels {
    ($module:ident, $features:literal, $dot:ident) => {
        mod $module {
            use super::*;

            /// # Safety
            /// `x` must have rows of `4 * quads.len()` integers from row `first` on, at least R.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn integer_sums<const R: usize>(
                x: Activations<'_>,
                first: usize,
                quads: &[[u8; QUAD]],
                sums: &mut [[i32; WIDTH]],
            ) {
                let values = x.values[first * x.stride..].as_ptr();
                // Half a panel at a time: R × 2 sums leave registers for what they are made from.
                for half in 0..2 {
                    let mut acc = [[_mm256_setzero_si256(); 2]; R];
                    for (acc, start) in acc.iter_mut().zip(&x.starts[first..]) {
                        *acc = [_mm256_set1_epi32(*start); 2];
                    }
                    for (p, quad) in quads.iter().enumerate() {
                        // SAFETY: a quad is four times 32 bytes; integers 4 p to 4 p + 3 of R rows are there, as the caller
                        // promised.
                        unsafe {
                            let quad = quad.as_ptr().add(64 * half);
                            let q =
                                [_mm256_loadu_si256(quad.cast()), _mm256_loadu_si256(quad.add(32).cast())];
                            for (r, acc) in acc.iter_mut().enumerate() {
                                let x = four(values.add(r * x.stride + 4 * p));
                                *acc = [$dot(acc[0], q[0], x), $dot(acc[1], q[1], x)];
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
            #[target_feature(enable = $features)]
            pub(super) unsafe fn block_sums<const R: usize, L: Layout>(
                x: Activations<'_>,
                panel: &[u8],
                sums: &mut [[f32; WIDTH]],
            ) {
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
                            if !L::OFFSET {
                                for (r, integers) in integers.iter_mut().enumerate() {
                                    *integers = _mm256_set1_epi32(*x.starts.as_ptr().add(r * x.n_blocks + b));
                                }
                            }
                            for p in 0..L::QUADS {
                                if L::BITS == 8 {
                                    let q = _mm256_loadu_si256(body.add(p * QUAD + 32 * part).cast());
                                    for (r, integers) in integers.iter_mut().enumerate() {
                                        *integers =
                                            $dot(*integers, q, four(values.add(r * x.stride + 4 * p)));
                                    }
                                } else {
                                    let [q, q_high] = nibbles::<L>(body, p, part);
                                    for (r, integers) in integers.iter_mut().enumerate() {
                                        let at = values.add(r * x.stride + 4 * p);
                                        *integers = $dot(*integers, q, four(at));
                                        *integers = $dot(*integers, q_high, four(at.add(L::INPUTS / 2)));
                                    }
                                }
                            }
                            let scale = scales::<L>(group, L::BLOCK_SCALES + i * WIDTH, part);
                            for (r, (acc, integers)) in acc.iter_mut().zip(integers).enumerate() {
                                let x_scale = _mm256_set1_ps(*x.scales.as_ptr().add(r * x.n_blocks + b));
                                let scale = _mm256_mul_ps(scale, x_scale);
                                *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), scale, *acc);
                            }
                            if L::OFFSET {
                                let at = L::BLOCK_MINIMA - SCALES + i * WIDTH;
                                let minimum = scales::<L>(group.add(SCALES), at, part);
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
        }
    };
}

kernels!(vex, "avx2,fma,f16c,avxvnni", _mm256_dpbusd_avx_epi32);
kernels!(evex, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", _mm256_dpbusd_epi32);

/// # Safety
/// [`Isa::AvxVnni`](crate::isa::Isa::AvxVnni) must be available; `x` must have rows of `4 * quads.len()` integers from row
/// `first` on, at least R.
pub(super) unsafe fn integer_sums<const R: usize>(
    x: Activations<'_>,
    first: usize,
    quads: &[[u8; QUAD]],
    sums: &mut [[i32; WIDTH]],
) {
    if !is_x86_feature_detected!("avxvnni") {
        // SAFETY: the caller's promise; where AVX-VNNI is missing, the set is available for AVX-512 VL and VNNI only.
        return unsafe { evex::integer_sums::<R>(x, first, quads, sums) };
    }
    // SAFETY: the caller's promise.
    unsafe { vex::integer_sums::<R>(x, first, quads, sums) }
}

/// # Safety
/// [`Isa::AvxVnni`](crate::isa::Isa::AvxVnni) must be available; `x` must have R rows of `n_blocks` blocks of integers and
/// scales, and `panel` as many blocks.
pub(super) unsafe fn block_sums<const R: usize, L: Layout>(
    x: Activations<'_>,
    panel: &[u8],
    sums: &mut [[f32; WIDTH]],
) {
    if !is_x86_feature_detected!("avxvnni") {
        // SAFETY: as above.
        return unsafe { evex::block_sums::<R, L>(x, panel, sums) };
    }
    // SAFETY: the caller's promise.
    unsafe { vex::block_sums::<R, L>(x, panel, sums) }
}
