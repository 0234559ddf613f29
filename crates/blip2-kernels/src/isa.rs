//! The instruction sets the kernels are compiled for, and which of them this machine has.

use std::sync::OnceLock;

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust: the reference of every test.
    Scalar,
    /// AArch64 with NEON, which all of them have.
    Neon,
    /// NEON with dot products of four bytes (`sdot`).
    NeonDot,
    /// [`NeonDot`](Self::NeonDot) with products of small matrices of bytes (`smmla`).
    NeonI8mm,
    /// AVX2, FMA and F16C.
    Avx2,
    /// [`Avx2`](Self::Avx2) with dot products of four bytes in 256 bits: AVX-VNNI, or AVX-512 VL and VNNI, which also
    /// processors have that lack AVX-512's bf16 (Cascade Lake, Ice Lake).
    AvxVnni,
    /// AVX-512 F, BW, VL, DQ, BF16 and VNNI.
    Avx512,
    /// [`Avx512`](Self::Avx512) with AMX, which multiplies small matrices of bf16 and of bytes (Intel since Sapphire Rapids), where
    /// the system gives it to those who ask: Linux does.
    Amx,
}

impl Isa {
    /// The best set of this machine, or the one that `BLIP2_ISA` names: what [`detect`](Self::detect) gives.
    ///
    /// # Errors
    /// When `BLIP2_ISA` names no set, or one that this machine does not have.
    pub fn from_environment() -> Result<Self, UnknownIsa> {
        let available = Self::available();
        match std::env::var_os("BLIP2_ISA").filter(|name| !name.is_empty()) {
            None => Ok(available[available.len() - 1]),
            Some(name) => Self::named(&name.to_string_lossy()),
        }
    }

    /// The set of this machine that has this name.
    fn named(name: &str) -> Result<Self, UnknownIsa> {
        let found = Self::available().iter().find(|isa| isa.name() == name);
        found.copied().ok_or_else(|| UnknownIsa { name: name.into() })
    }

    /// The set that kernels use, once and for all.
    ///
    /// # Panics
    /// Where [`from_environment`](Self::from_environment) refuses: programs ask that first.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| Self::from_environment().unwrap_or_else(|error| panic!("{error}")))
    }

    /// Every set of this machine, lowest first.
    pub fn all_available() -> Vec<Self> {
        Self::available().to_vec()
    }

    fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let mut available = vec![Self::Scalar];
            #[cfg(target_arch = "aarch64")]
            {
                use std::arch::is_aarch64_feature_detected;
                available.push(Self::Neon);
                let dot = is_aarch64_feature_detected!("dotprod");
                if dot {
                    available.push(Self::NeonDot);
                }
                if dot && is_aarch64_feature_detected!("i8mm") {
                    available.push(Self::NeonI8mm);
                }
            }
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                if avx2 {
                    available.push(Self::Avx2);
                }
                let avx_vnni = is_x86_feature_detected!("avxvnni") || has_evex_vnni();
                if avx2 && avx_vnni {
                    available.push(Self::AvxVnni);
                }
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni");
                if avx2 && avx512 {
                    available.push(Self::Avx512);
                    if crate::amx::is_permitted() {
                        available.push(Self::Amx);
                    }
                }
            }
            available
        })
    }

    /// Whether this machine has it, whatever `BLIP2_ISA` says. Kernels ask before they use its instructions, so that they
    /// are sound for any value.
    pub(crate) fn is_available(self) -> bool {
        Self::available().contains(&self)
    }

    /// Whether it has AVX-512 with bf16 and dot products of bytes.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_avx512(self) -> bool {
        matches!(self, Self::Avx512 | Self::Amx)
    }

    /// Its name, as `BLIP2_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::NeonDot => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }
}

/// Whether the dot products of AVX-VNNI are there in the encoding of AVX-512.
#[cfg(target_arch = "x86_64")]
fn has_evex_vnni() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

/// `BLIP2_ISA` does not name an instruction set of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownIsa {
    name: String,
}

impl std::fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
        write!(f, "BLIP2_ISA={}: the instruction sets of this machine are {}", self.name, known.join(", "))
    }
}

impl std::error::Error for UnknownIsa {}

/// Runs `body`, which must be `#[inline(always)]` code, compiled for `isa`, or for the baseline where the machine lacks that.
///
/// Loops over fixed-size lanes are written once in plain Rust; this lets the compiler use the wide registers. On AArch64 it
/// does so everywhere: NEON is what every function is compiled for.
/// The closure must be `#[inline(always)] || …`: it is called from three places, and a closure that the compiler does not
/// inline into each is compiled once, for the baseline registers.
#[inline]
pub fn with_isa<R>(isa: Isa, body: impl FnOnce() -> R) -> R {
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
            // SAFETY: these features are there.
            Isa::Avx512 | Isa::Amx if isa.is_available() => return unsafe { avx512(body) },
            // SAFETY: as above.
            Isa::Avx2 | Isa::AvxVnni if isa.is_available() => return unsafe { avx2(body) },
            _ => {}
        }
    }
    let _ = isa;
    body()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_there_and_the_best_is_the_last() {
        let available = Isa::all_available();
        assert_eq!(available[0], Isa::Scalar);
        assert!(available.contains(&Isa::detect()) && available.iter().all(|isa| isa.is_available()));
        assert_eq!(Isa::from_environment(), Ok(Isa::detect()));
        if std::env::var_os("BLIP2_ISA").is_none() {
            assert_eq!(Isa::detect(), available[available.len() - 1]);
        }
        #[cfg(target_arch = "aarch64")]
        assert!(Isa::Neon.is_available() && !Isa::Avx2.is_available());
        #[cfg(target_arch = "x86_64")]
        {
            assert!(!Isa::Neon.is_available());
            assert!(Isa::AvxVnni.is_available() || !Isa::Avx2.is_available() || !has_evex_vnni());
        }
    }

    #[test]
    fn sets_are_known_by_their_names_and_others_are_refused() {
        for isa in Isa::all_available() {
            assert_eq!(Isa::named(isa.name()), Ok(isa));
        }
        for name in ["", "avx1024", "AVX2"] {
            let error = Isa::named(name).unwrap_err().to_string();
            assert!(error.contains(&format!("BLIP2_ISA={name}: ")) && error.contains("scalar"), "{error}");
        }
    }
}
