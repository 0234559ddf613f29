//! The instruction sets the kernels are compiled for, and which of them this machine has.

use std::sync::OnceLock;

/// An instruction set; the later contain the earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: the reference of every test.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ, BF16 and VNNI.
    Avx512,
}

impl Isa {
    /// The best set of this machine, or the one that `BLIP2_ISA` names.
    ///
    /// # Panics
    /// When `BLIP2_ISA` names no set, or one that this machine does not have.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let available = Self::all_available();
            let best = available[available.len() - 1];
            let Ok(name) = std::env::var("BLIP2_ISA") else { return best };
            match available.iter().find(|isa| isa.name() == name) {
                Some(&isa) => isa,
                None => panic!(
                    "BLIP2_ISA={name}: this machine has {}",
                    available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
                ),
            }
        })
    }

    /// Every set of this machine, lowest first.
    pub fn all_available() -> Vec<Self> {
        let mut available = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                available.push(Self::Avx2);
            }
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bf16")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 && avx512 {
                available.push(Self::Avx512);
            }
        }
        available
    }

    /// Its name, as `BLIP2_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

/// Runs `body`, which must be `#[inline(always)]` code, compiled for `isa`.
///
/// Loops over fixed-size lanes are written once in plain Rust; this lets the compiler use the wide registers.
/// The closure must be `#[inline(always)] || …`: it is called from three places, and a closure that the compiler does not
/// inline into each is compiled once, for the baseline registers.
#[inline]
pub(crate) fn with_isa<R>(isa: Isa, body: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(body: impl FnOnce() -> R) -> R {
            body()
        }
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
        fn avx512<R>(body: impl FnOnce() -> R) -> R {
            body()
        }
        match isa {
            // SAFETY: `Isa` values other than `Scalar` come from `all_available`, which checked these features.
            Isa::Avx512 if Isa::Avx512 <= Isa::detect_best() => return unsafe { avx512(body) },
            // SAFETY: as above.
            Isa::Avx2 if Isa::Avx2 <= Isa::detect_best() => return unsafe { avx2(body) },
            _ => {}
        }
    }
    let _ = isa;
    body()
}

impl Isa {
    /// The best set of the machine whatever `BLIP2_ISA` says; makes `with_isa` sound for any argument.
    pub(crate) fn detect_best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let available = Self::all_available();
            available[available.len() - 1]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_there_and_the_order_is_upward() {
        let available = Isa::all_available();
        assert_eq!(available[0], Isa::Scalar);
        assert!(available.is_sorted());
        assert!(available.contains(&Isa::detect()));
    }
}
