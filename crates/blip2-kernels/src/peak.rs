//! What a processor can do at most: multiply-adds of registers alone, as fast as they come.
//!
//! No kernel is made of these loops: they are what kernels are measured by, and would not be if they were the kernels.

#[cfg(target_arch = "x86_64")]
use crate::amx;
use crate::isa::Isa;

/// What is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// Single precision.
    F32,
    /// bf16, added in single precision.
    Bf16,
    /// Bytes, added in 32 bits.
    Int8,
}

/// The most rounds that sums in single precision count without rounding.
pub const MOST_ROUNDS: usize = 1 << 22;

/// Sums that take turns, so that none is waited for: two or, on AArch64, four instructions at a time, each of which takes four
/// cycles or a few more. They and what is multiplied fit into the registers.
#[cfg(target_arch = "x86_64")]
const N_SUMS: usize = 12;
#[cfg(target_arch = "aarch64")]
const N_SUMS: usize = 16;

/// Does so many rounds of the widest multiply-adds that a set has for such numbers, and counts them. Nothing where it has no
/// instruction for them: bytes without dot products, and all of plain Rust. bf16 is widened, and multiplied in single precision,
/// where there is no instruction for it.
///
/// # Panics
/// When there are more rounds than [`MOST_ROUNDS`], or the machine does not have the set.
pub fn multiply_adds(isa: Isa, numbers: Numbers, n_rounds: usize) -> Option<u64> {
    assert!(n_rounds <= MOST_ROUNDS && isa.is_available());
    match (isa, numbers) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the set is available.
        (Isa::Avx512 | Isa::Amx, Numbers::F32) => Some(unsafe { x86::avx512_f32(n_rounds) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Isa::Avx512, Numbers::Bf16) => Some(unsafe { x86::avx512_bf16(n_rounds) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Isa::Avx512, Numbers::Int8) => Some(unsafe { x86::avx512_int8(n_rounds) }),
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx, Numbers::Bf16) => Some(in_parts(n_rounds, |n| {
            // SAFETY: as above.
            let sums = unsafe { amx::bf16_rounds(0x3f80_3f80, n) };
            sums.as_flattened().iter().map(|&count| count as u64).sum()
        })),
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx, Numbers::Int8) => Some(in_parts(n_rounds, |n| {
            // SAFETY: as above.
            let sums = unsafe { amx::int8_rounds(0x0101_0101, n) };
            sums.as_flattened().iter().map(|&count| count as u64).sum()
        })),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Isa::AvxVnni | Isa::Avx2, Numbers::F32 | Numbers::Bf16) => Some(unsafe { x86::avx2_f32(n_rounds) }),
        #[cfg(target_arch = "x86_64")]
        (Isa::AvxVnni, Numbers::Int8) if is_x86_feature_detected!("avxvnni") => {
            // SAFETY: as above.
            Some(unsafe { x86::vex_int8(n_rounds) })
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: without AVX-VNNI the set is available for AVX-512 VL and VNNI only.
        (Isa::AvxVnni, Numbers::Int8) => Some(unsafe { x86::evex_int8(n_rounds) }),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Numbers::F32 | Numbers::Bf16) => {
            // SAFETY: as above.
            Some(unsafe { arm::neon_f32(n_rounds) })
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        (Isa::NeonDot, Numbers::Int8) => Some(unsafe { arm::dot_int8(n_rounds) }),
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        (Isa::NeonI8mm, Numbers::Int8) => Some(unsafe { arm::i8mm_int8(n_rounds) }),
        _ => None,
    }
}

/// Rounds of AMX, which add 32 or 64 to a sum at once, so many at a time that sums in single precision stay exact.
#[cfg(target_arch = "x86_64")]
fn in_parts(n_rounds: usize, mut count: impl FnMut(usize) -> u64) -> u64 {
    const PART: usize = MOST_ROUNDS / 16;
    (0..n_rounds).step_by(PART).map(|first| count(PART.min(n_rounds - first))).sum()
}

/// A loop of one instruction, which adds products of ones to the lanes of sums: what these are in the end is how many there were.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! rounds {
    ($name:ident, $features:literal, [$lane:ty; $n_lanes:literal], $of_lane:ident, $ones:expr,
     |$sum:ident, $a:ident, $b:ident| $next:expr) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name(n_rounds: usize) -> u64 {
            // Unknown to the compiler, which otherwise knows products of ones, and that equal sums stay equal.
            let ($a, $b) = (std::hint::black_box($ones), std::hint::black_box($ones));
            let zeros = std::hint::black_box([<$lane>::default(); super::N_SUMS]);
            let mut sums = [$of_lane(<$lane>::default()); super::N_SUMS];
            for (sum, zero) in sums.iter_mut().zip(zeros) {
                *sum = $of_lane(zero);
            }
            for _ in 0..n_rounds {
                for sum in &mut sums {
                    let $sum = *sum;
                    *sum = $next;
                }
            }
            // A copy, so that the sums themselves need no memory.
            let sums = std::hint::black_box(sums);
            let counts = sums.iter().map(|sum| {
                // SAFETY: these are the lanes of a register.
                let lanes: [$lane; $n_lanes] = unsafe { std::mem::transmute(*sum) };
                lanes.iter().map(|&count| count as u64).sum::<u64>()
            });
            counts.sum()
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    rounds!(avx512_f32, "avx512f", [f32; 16], _mm512_set1_ps, _mm512_set1_ps(1.0), |sum, a, b| {
        _mm512_fmadd_ps(a, b, sum)
    });
    rounds!(
        avx512_bf16,
        "avx512f,avx512bf16",
        [f32; 16],
        _mm512_set1_ps,
        // SAFETY: this only names 512 bits as 32 bf16 numbers, each 1.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(0x3f80_3f80)) },
        |sum, a, b| _mm512_dpbf16_ps(sum, a, b)
    );
    rounds!(
        avx512_int8,
        "avx512f,avx512vnni",
        [i32; 16],
        _mm512_set1_epi32,
        _mm512_set1_epi8(1),
        |sum, a, b| _mm512_dpbusd_epi32(sum, a, b)
    );
    rounds!(avx2_f32, "avx2,fma", [f32; 8], _mm256_set1_ps, _mm256_set1_ps(1.0), |sum, a, b| {
        _mm256_fmadd_ps(a, b, sum)
    });
    rounds!(vex_int8, "avx2,avxvnni", [i32; 8], _mm256_set1_epi32, _mm256_set1_epi8(1), |sum, a, b| {
        _mm256_dpbusd_avx_epi32(sum, a, b)
    });
    rounds!(
        evex_int8,
        "avx2,avx512f,avx512vl,avx512vnni",
        [i32; 8],
        _mm256_set1_epi32,
        _mm256_set1_epi8(1),
        |sum, a, b| _mm256_dpbusd_epi32(sum, a, b)
    );
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use crate::quantized::neon::{sdot, smmla};

    rounds!(neon_f32, "neon", [f32; 4], vdupq_n_f32, vdupq_n_f32(1.0), |sum, a, b| vfmaq_f32(sum, a, b));
    rounds!(dot_int8, "neon,dotprod", [i32; 4], vdupq_n_s32, vdupq_n_s8(1), |sum, a, b| sdot(sum, a, b));
    rounds!(i8mm_int8, "neon,i8mm", [i32; 4], vdupq_n_s32, vdupq_n_s8(1), |sum, a, b| smmla(sum, a, b));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sums themselves are the count, so that a loop that the compiler shortened would be noticed.
    #[test]
    fn all_multiply_adds_are_done() {
        for isa in Isa::all_available() {
            for numbers in [Numbers::F32, Numbers::Bf16, Numbers::Int8] {
                // Lanes of a register, and products that are added to each.
                let a_register = match (isa, numbers) {
                    (Isa::Scalar, _) | (Isa::Avx2 | Isa::Neon, Numbers::Int8) => {
                        assert_eq!(multiply_adds(isa, numbers, 5), None, "{isa:?} {numbers:?}");
                        continue;
                    }
                    (Isa::Avx512 | Isa::Amx, Numbers::F32) => 16,
                    (Isa::Avx512, Numbers::Bf16) => 16 * 2,
                    (Isa::Avx512, Numbers::Int8) => 16 * 4,
                    // Products of registers in all four sums.
                    (Isa::Amx, Numbers::Bf16) => 256 * 2,
                    (Isa::Amx, Numbers::Int8) => 256 * 4,
                    (Isa::AvxVnni, Numbers::Int8) => 8 * 4,
                    (Isa::AvxVnni | Isa::Avx2, _) => 8,
                    (Isa::NeonDot, Numbers::Int8) => 4 * 4,
                    (Isa::NeonI8mm, Numbers::Int8) => 4 * 8,
                    (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, _) => 4,
                };
                let a_round = multiply_adds(isa, numbers, 1).expect("an instruction");
                assert!(
                    a_round.is_multiple_of(a_register) && a_round > 8 * a_register,
                    "{isa:?} {numbers:?}"
                );
                for n_rounds in [0, 2, 1000] {
                    let found = multiply_adds(isa, numbers, n_rounds);
                    assert_eq!(found, Some(n_rounds as u64 * a_round), "{isa:?} {numbers:?}");
                }
            }
        }
    }
}
