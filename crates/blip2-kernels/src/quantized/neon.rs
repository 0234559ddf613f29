//! The sums of [`sums`](super::sums) with NEON.
//!
//! Weights of eight bits become signed; of fewer bits they are positive and below 64, and their zero point is added last. `sdot`
//! adds products of four signed bytes to 32 bits; without it, products are 16 bits wide (at most 128 · 127) and added in
//! pairs. `smmla` multiplies two rows of eight bytes by two others: rows of activations by outputs, for which two quads are
//! interleaved.

use std::arch::aarch64::*;
use std::arch::asm;

use super::format::{Layout, QUAD, SCALES, WIDTH};
use super::sums::Activations;

/// Four integers of a row in every lane.
///
/// # Safety
/// `x` must point to four bytes.
#[inline(always)]
unsafe fn four(x: *const i8) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned())) }
}

/// Eight integers of two rows.
///
/// # Safety
/// Both must point to eight bytes.
#[inline(always)]
unsafe fn eight_of_two(x: *const i8, y: *const i8) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe { vcombine_s8(vld1_s8(x), vld1_s8(y)) }
}

/// The 16 bytes `at` quad `p` of eight-bit weights, signed.
///
/// # Safety
/// They must be there.
#[inline(always)]
unsafe fn signed(quads: *const u8, p: usize, at: usize) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_s8_u8(veorq_u8(vld1q_u8(quads.add(p * QUAD + at)), vdupq_n_u8(128))) }
}

/// The integers in 16 bytes `at` quad `p`, and those of the quad that shares its bytes.
///
/// # Safety
/// `body` must point to a block's integers.
#[inline(always)]
unsafe fn nibbles<L: Layout>(body: *const u8, p: usize, at: usize) -> [int8x16_t; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let q = vld1q_u8(body.add(p * QUAD + at));
        let (mut low, mut high) = (vandq_u8(q, vdupq_n_u8(15)), vshrq_n_u8::<4>(q));
        if L::EXTRA_BITS > 0 {
            // The bits of the quad of high nibbles lie four positions above those of the low ones.
            let mask = vdupq_n_u8(((1 << L::EXTRA_BITS) - 1) << 4);
            let shift = vdupq_n_s8(-((L::EXTRA_BITS * p) as i8));
            let bits = vshlq_u8(vld1q_u8(body.add(L::QUADS * QUAD + at)), shift);
            low = vorrq_u8(low, vandq_u8(vshlq_n_u8::<4>(bits), mask));
            high = vorrq_u8(high, vandq_u8(bits, mask));
        }
        [vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)]
    }
}

/// Numbers `at` to `at + 3` of 32 in half precision, times four bytes of those at `factors` where there are super-blocks.
///
/// # Safety
/// `numbers` must point to 64 bytes, and 32 must be at `factors` from there.
#[inline(always)]
unsafe fn scales<L: Layout>(numbers: *const u8, factors: usize, at: usize) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        let halves = vld1_u16(numbers.add(2 * at).cast());
        let wide: float32x4_t;
        asm!(
            "fcvtl {wide:v}.4s, {halves:v}.4h",
            wide = lateout(vreg) wide,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
        if L::BLOCKS == 1 {
            return wide;
        }
        let factors = numbers.add(factors + at).cast::<i8>();
        let factors: [i32; 4] = std::array::from_fn(|i| i32::from(*factors.add(i)));
        vmulq_f32(wide, vcvtq_f32_s32(vld1q_s32(factors.as_ptr())))
    }
}

/// `acc` plus products of four neighbours: what NEON always has.
#[inline(always)]
fn widening_dot(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: NEON is there. Two products are at most 2 · 128 · 127.
    unsafe {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        let high = vmull_high_s8(w, x);
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
}

/// `acc` plus products of four neighbours.
#[inline]
#[target_feature(enable = "dotprod")]
pub(crate) fn sdot(mut acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is there, and reads and writes registers only.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {w:v}.16b, {x:v}.16b",
            acc = inout(vreg) acc,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// `acc` plus the products of two rows of eight bytes, the first row's with both of `w`, then the second's.
#[inline]
#[target_feature(enable = "i8mm")]
pub(crate) fn smmla(mut acc: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "smmla {acc:v}.4s, {x:v}.16b, {w:v}.16b",
            acc = inout(vreg) acc,
            x = in(vreg) x,
            w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// The kernels with `$dot` for the products of four neighbours.
macro_rules! kernels {
    ($module:ident, $features:literal, $dot:ident) => {
        pub(super) mod $module {
            use super::*;

            /// # Safety
            /// `values` must have R rows of `4 * quads.len()` integers, `stride` apart.
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn integer_sums<const R: usize>(
                values: &[i8],
                stride: usize,
                quads: &[[u8; QUAD]],
                sums: &mut [[i32; WIDTH]],
            ) {
                let (values, quads, n_quads) = (values.as_ptr(), quads.as_ptr().cast::<u8>(), quads.len());
                // Half a panel at a time: R × 4 sums, four weights and what they are multiplied with.
                for half in 0..2 {
                    // SAFETY: there are `n_quads` quads; integers 4 p to 4 p + 3 of R rows are there, as the caller promised;
                    // half a row of a tile is 16 integers.
                    unsafe {
                        let mut acc = [[vdupq_n_s32(0); 4]; R];
                        for p in 0..n_quads {
                            let w = [0, 16, 32, 48].map(|at| signed(quads, p, 64 * half + at));
                            for (r, acc) in acc.iter_mut().enumerate() {
                                let x = four(values.add(r * stride + 4 * p));
                                for (acc, w) in acc.iter_mut().zip(w) {
                                    *acc = $dot(*acc, w, x);
                                }
                            }
                        }
                        for (sums, acc) in sums.iter_mut().zip(acc) {
                            for (i, acc) in acc.into_iter().enumerate() {
                                vst1q_s32(sums.as_mut_ptr().add(16 * half + 4 * i), acc);
                            }
                        }
                    }
                }
            }

            /// # Safety
            /// `x` must have R rows of `n_blocks` blocks of integers and scales, and `panel` as many blocks.
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn block_sums<const R: usize, L: Layout>(
                x: Activations<'_>,
                panel: &[u8],
                sums: &mut [[f32; WIDTH]],
            ) {
                // Half a panel at a time: R × 8 sums.
                for half in 0..2 {
                    // SAFETY: the blocks are there in `panel` and in R rows of values and scales, as the caller promised; half a
                    // row of a tile is 16 numbers.
                    unsafe {
                        let mut acc = [[vdupq_n_f32(0.0); 4]; R];
                        for b in 0..x.n_blocks {
                            let (group, i) = (panel.as_ptr().add(b / L::BLOCKS * L::GROUP), b % L::BLOCKS);
                            let body = group.add(L::HEAD + i * L::BODY);
                            let values = x.values.as_ptr().add(b * L::INPUTS);
                            let mut integers = [[vdupq_n_s32(0); 4]; R];
                            for p in 0..L::QUADS {
                                for k in 0..4 {
                                    let at = 64 * half + 16 * k;
                                    if L::BITS == 8 {
                                        let w = signed(body, p, at);
                                        for (r, integers) in integers.iter_mut().enumerate() {
                                            let x = four(values.add(r * x.stride + 4 * p));
                                            integers[k] = $dot(integers[k], w, x);
                                        }
                                    } else {
                                        let [w, w_high] = nibbles::<L>(body, p, at);
                                        for (r, integers) in integers.iter_mut().enumerate() {
                                            let at = values.add(r * x.stride + 4 * p);
                                            integers[k] = $dot(integers[k], w, four(at));
                                            let x = four(at.add(L::INPUTS / 2));
                                            integers[k] = $dot(integers[k], w_high, x);
                                        }
                                    }
                                }
                            }
                            for k in 0..4 {
                                let scale =
                                    of_block::<L>(Place { group, block: i, output: 16 * half + 4 * k });
                                for r in 0..R {
                                    acc[r][k] = scaled::<L>(acc[r][k], integers[r][k], scale, &x, r, b);
                                }
                            }
                        }
                        for (sums, acc) in sums.iter_mut().zip(acc) {
                            for (k, acc) in acc.into_iter().enumerate() {
                                vst1q_f32(sums.as_mut_ptr().add(16 * half + 4 * k), acc);
                            }
                        }
                    }
                }
            }
        }
    };
}

kernels!(base, "neon", widening_dot);
kernels!(dot, "neon,dotprod", sdot);

/// Block `block` of a group, from output `output` on.
#[derive(Clone, Copy)]
struct Place {
    group: *const u8,
    block: usize,
    output: usize,
}

/// The scales of four outputs, and their smallest values where the format has them.
///
/// # Safety
/// The block must be there.
#[inline(always)]
unsafe fn of_block<L: Layout>(at: Place) -> [float32x4_t; 2] {
    let Place { group, block, output } = at;
    // SAFETY: the caller's promise.
    unsafe {
        let scale = scales::<L>(group, L::BLOCK_SCALES + block * WIDTH, output);
        if !L::OFFSET {
            return [scale, vdupq_n_f32(0.0)];
        }
        [scale, scales::<L>(group.add(SCALES), L::BLOCK_MINIMA - SCALES + block * WIDTH, output)]
    }
}

/// `acc` plus the sums of block `b` and row `r` times their scale, and the smallest values times the sum of activations.
///
/// # Safety
/// Row `r` must have block `b`.
#[inline(always)]
unsafe fn scaled<L: Layout>(
    mut acc: float32x4_t,
    mut integers: int32x4_t,
    [scale, minimum]: [float32x4_t; 2],
    x: &Activations<'_>,
    r: usize,
    b: usize,
) -> float32x4_t {
    let of_row = r * x.n_blocks + b;
    // SAFETY: the caller's promise.
    unsafe {
        if L::BITS < 8 && !L::OFFSET {
            integers = vaddq_s32(integers, vdupq_n_s32(*x.starts.as_ptr().add(of_row)));
        }
        let scale = vmulq_n_f32(scale, *x.scales.as_ptr().add(of_row));
        acc = vfmaq_f32(acc, vcvtq_f32_s32(integers), scale);
        if L::OFFSET {
            acc = vfmaq_n_f32(acc, minimum, *x.totals.as_ptr().add(of_row));
        }
    }
    acc
}

/// The kernels for two rows at a time: one to three pairs `P`, of the last of which the second row may be missing.
pub(super) mod i8mm {
    use super::*;

    /// The second row of pair `pair`, or the first again where there are `n_rows` only.
    #[inline(always)]
    fn second(pair: usize, n_rows: usize) -> usize {
        (2 * pair + 1).min(n_rows - 1)
    }

    /// Weights of eight inputs from two quads: of outputs 0 and 1, and of 2 and 3.
    #[inline(always)]
    fn interleave(first: int8x16_t, second: int8x16_t) -> [int8x16_t; 2] {
        // SAFETY: NEON is always there.
        unsafe {
            let (a, b) = (vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second));
            [vreinterpretq_s8_s32(vzip1q_s32(a, b)), vreinterpretq_s8_s32(vzip2q_s32(a, b))]
        }
    }

    /// Four sums of the first row of a pair and four of the second.
    #[inline(always)]
    fn of_rows(sums: [int32x4_t; 2]) -> [int32x4_t; 2] {
        // SAFETY: NEON is always there.
        unsafe {
            let [a, b] = sums.map(|sums| vreinterpretq_s64_s32(sums));
            [vreinterpretq_s32_s64(vzip1q_s64(a, b)), vreinterpretq_s32_s64(vzip2q_s64(a, b))]
        }
    }

    /// # Safety
    /// `values` must have `sums.len()` rows of `4 * quads.len()` integers, `stride` apart and readable to the next multiple of
    /// eight; `P` pairs must hold the rows.
    #[target_feature(enable = "neon,dotprod,i8mm")]
    pub(in super::super) unsafe fn integer_sums<const P: usize>(
        values: &[i8],
        stride: usize,
        quads: &[[u8; QUAD]],
        sums: &mut [[i32; WIDTH]],
    ) {
        let (values, n_rows, n_quads) = (values.as_ptr(), sums.len(), quads.len());
        let quads = quads.as_ptr().cast::<u8>();
        for half in 0..2 {
            // SAFETY: there are `n_quads` quads; the rows are there, as the caller promised; half a row of a tile is 16 integers.
            unsafe {
                let mut acc = [[[vdupq_n_s32(0); 2]; 4]; P];
                for p in (0..n_quads).step_by(2) {
                    let mut x = [vdupq_n_s8(0); P];
                    for (pair, x) in x.iter_mut().enumerate() {
                        let at = values.add(4 * p);
                        *x = eight_of_two(at.add(2 * pair * stride), at.add(second(pair, n_rows) * stride));
                    }
                    for k in 0..4 {
                        let at = 64 * half + 16 * k;
                        let next = if p + 1 < n_quads { signed(quads, p + 1, at) } else { vdupq_n_s8(0) };
                        let w = interleave(signed(quads, p, at), next);
                        for (acc, x) in acc.iter_mut().zip(x) {
                            acc[k] = [smmla(acc[k][0], x, w[0]), smmla(acc[k][1], x, w[1])];
                        }
                    }
                }
                for (sums, acc) in sums.chunks_mut(2).zip(acc) {
                    for (k, acc) in acc.into_iter().enumerate() {
                        for (sums, row) in sums.iter_mut().zip(of_rows(acc)) {
                            vst1q_s32(sums.as_mut_ptr().add(16 * half + 4 * k), row);
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// `x` must have `sums.len()` rows of `n_blocks` blocks of integers and scales, and `panel` as many blocks; `P` pairs
    /// must hold the rows.
    #[target_feature(enable = "neon,dotprod,i8mm")]
    pub(in super::super) unsafe fn block_sums<const P: usize, L: Layout>(
        x: Activations<'_>,
        panel: &[u8],
        sums: &mut [[f32; WIDTH]],
    ) {
        let n_rows = sums.len();
        // A quarter of a panel at a time: P × 8 sums.
        for part in 0..4 {
            // SAFETY: the blocks are there in `panel` and in the rows of values and scales, as the caller promised; a quarter of a
            // row of a tile is 8 numbers.
            unsafe {
                let mut acc = [[[vdupq_n_f32(0.0); 2]; 2]; P];
                for b in 0..x.n_blocks {
                    let (group, i) = (panel.as_ptr().add(b / L::BLOCKS * L::GROUP), b % L::BLOCKS);
                    let body = group.add(L::HEAD + i * L::BODY);
                    let values = x.values.as_ptr().add(b * L::INPUTS);
                    let mut integers = [[[vdupq_n_s32(0); 2]; 2]; P];
                    for p in (0..L::QUADS).step_by(2) {
                        for k in 0..2 {
                            let at = 32 * part + 16 * k;
                            let w = if L::BITS == 8 {
                                let none = [vdupq_n_s8(0); 2];
                                [interleave(signed(body, p, at), signed(body, p + 1, at)), none]
                            } else {
                                let [low, high] = nibbles::<L>(body, p, at);
                                let [next_low, next_high] = nibbles::<L>(body, p + 1, at);
                                [interleave(low, next_low), interleave(high, next_high)]
                            };
                            for (pair, integers) in integers.iter_mut().enumerate() {
                                let first = values.add(2 * pair * x.stride + 4 * p);
                                let other = values.add(second(pair, n_rows) * x.stride + 4 * p);
                                let sums = &mut integers[k];
                                let both = eight_of_two(first, other);
                                *sums = [smmla(sums[0], both, w[0][0]), smmla(sums[1], both, w[0][1])];
                                if L::BITS < 8 {
                                    let both =
                                        eight_of_two(first.add(L::INPUTS / 2), other.add(L::INPUTS / 2));
                                    *sums = [smmla(sums[0], both, w[1][0]), smmla(sums[1], both, w[1][1])];
                                }
                            }
                        }
                    }
                    for k in 0..2 {
                        let scale = of_block::<L>(Place { group, block: i, output: 8 * part + 4 * k });
                        for pair in 0..P {
                            let [one, other] = of_rows(integers[pair][k]);
                            let acc = &mut acc[pair];
                            acc[0][k] = scaled::<L>(acc[0][k], one, scale, &x, 2 * pair, b);
                            acc[1][k] = scaled::<L>(acc[1][k], other, scale, &x, second(pair, n_rows), b);
                        }
                    }
                }
                for (sums, acc) in sums.chunks_mut(2).zip(acc) {
                    for (sums, row) in sums.iter_mut().zip(acc) {
                        for (k, row) in row.into_iter().enumerate() {
                            vst1q_f32(sums.as_mut_ptr().add(8 * part + 4 * k), row);
                        }
                    }
                }
            }
        }
    }
}
