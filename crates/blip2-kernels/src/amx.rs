//! Intel's matrix extensions (AMX): registers of 16 rows of 64 bytes, multiplied as small matrices.
//!
//! A panel of 32 columns of words, or of quads of bytes, is just what two of these registers load: row by row a word of each of 16
//! columns. The language has no functions for these instructions yet, so they are written as assembly.

use std::arch::asm;
use std::marker::PhantomData;

/// Rows of a register.
pub(crate) const ROWS: usize = 16;
/// Words along a row of a register: along `k`, or columns.
pub(crate) const WORDS: usize = 16;

/// What `ldtilecfg` reads: all eight registers with 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shape([u8; 64]);

static WHOLE: Shape = {
    let mut shape = [0; 64];
    shape[0] = 1; // the palette of 8 registers
    let mut i = 0;
    while i < 8 {
        shape[16 + 2 * i] = (4 * WORDS) as u8;
        shape[48 + i] = ROWS as u8;
        i += 1;
    }
    Shape(shape)
};

/// Whether processor and system have these registers; asks the system for them, which gives them to those who ask only.
pub(crate) fn is_permitted() -> bool {
    // The leaf of extended features: registers, bf16 and int8 in these bits of EDX.
    const FEATURES: u32 = 1 << 24 | 1 << 22 | 1 << 25;
    // Bits of the states that the system saves: the registers' shape and their contents.
    const STATES: u64 = 1 << 17 | 1 << 18;

    #[target_feature(enable = "xsave")]
    fn saved_states() -> u64 {
        // SAFETY: register 0 is always there.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    if !cfg!(target_os = "linux") || !is_x86_feature_detected!("xsave") {
        return false;
    }
    #[allow(unused_unsafe, reason = "safe in later versions of the language")]
    // SAFETY: every processor of 64 bits has the instruction; what it does not know it answers with zeros.
    let features = unsafe {
        let highest = std::arch::x86_64::__cpuid(0).eax;
        if highest < 7 { 0 } else { std::arch::x86_64::__cpuid_count(7, 0).edx }
    };
    // SAFETY: the processor has `xsave`.
    features & FEATURES == FEATURES && unsafe { saved_states() } & STATES == STATES && ask_the_system()
}

#[cfg(target_os = "linux")]
fn ask_the_system() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XTILEDATA: u64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that lets this process use the registers; it touches no memory, and fails where they are not there.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn ask_the_system() -> bool {
    false
}

/// Bytes of a register.
pub(crate) const BYTES: usize = 4 * ROWS * WORDS;

/// At the beginning of a line of the cache: a row of a register that crosses two takes longer to load.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Aligned<A>(pub(crate) A);

/// Where the operands of a product are.
#[derive(Clone, Copy)]
pub(crate) struct Operands {
    /// `n_steps` whole registers one after another, of the first 16 rows and of those after them. The processor fetches ahead what
    /// is read in order; rows that lie apart it does not.
    pub(crate) a: [*const u8; 2],
    /// `16 n_steps` rows of 32 words.
    pub(crate) panel: *const u8,
    /// Products of registers one after another along `k`; at least one.
    pub(crate) n_steps: usize,
    /// What is wanted next: [`AHEAD`] bytes of it a step are fetched into the second level of the cache meanwhile. Where nothing is,
    /// the panel itself.
    pub(crate) ahead: *const u8,
}

/// Bytes that are fetched with a step: all of a panel, while eight tiles of rows meet the one before it. Asked for in one go they
/// would hold up the loads of rows.
pub(crate) const AHEAD: usize = 256;
const _: () = assert!(AHEAD == 256, "the assembly of the products has it too");

/// Steps along `k` before sums are put back: 16 KiB of a panel, and as much of rows, which pass by. Twice as many would push the panel
/// out of the first level.
pub(crate) const STEPS: usize = 8;

/// Which eighth of what is wanted next tile `i` of `n` fetches, if any.
pub(crate) fn eighth(i: usize, n: usize) -> Option<usize> {
    const PARTS: usize = 8 * ROWS * WORDS / AHEAD;
    let at = |i: usize| i * PARTS / n.max(PARTS);
    (at(i + 1) > at(i)).then(|| at(i))
}

/// The registers of this thread, with their shape while this lives: 32 × 32 sums, and operands on their way.
///
/// The assembly below leaves sums in registers that the compiler does not know of, and so does not use.
pub(crate) struct Registers {
    /// They belong to the thread.
    _not_send: PhantomData<*mut ()>,
}

impl Registers {
    /// Takes them.
    ///
    /// # Safety
    /// [`is_permitted`] must have been true. While it lives its thread must not take them again, in a task that it runs while it
    /// waits for others, say.
    pub(crate) unsafe fn take() -> Self {
        // SAFETY: the machine has them, the shape is a whole and valid one.
        unsafe { asm!("ldtilecfg [rip + {}]", sym WHOLE, options(nostack)) };
        Self { _not_send: PhantomData }
    }

    /// Sums become zero.
    pub(crate) fn clear(&mut self) {
        // SAFETY: the registers are taken.
        unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack)) };
    }

    /// Sums become what is there: 32 rows of 32, or 16 where `n_rows` is at most that, `stride` sums apart.
    ///
    /// # Safety
    /// They must be readable.
    pub(crate) unsafe fn load<T>(&mut self, n_rows: usize, from: *const T, stride: usize) {
        const { assert!(size_of::<T>() == 4) };
        // SAFETY: the registers are taken, and the caller's promise.
        unsafe {
            asm!("tileloadd tmm0, [{p} + {s}]", "tileloadd tmm1, [{p} + {s} + 64]", p = in(reg) from, s = in(reg) 4 * stride,
                 options(nostack, readonly));
            if n_rows > ROWS {
                asm!("tileloadd tmm2, [{p} + {s}]", "tileloadd tmm3, [{p} + {s} + 64]", p = in(reg) from.add(ROWS * stride),
                     s = in(reg) 4 * stride, options(nostack, readonly));
            }
        }
    }

    /// Writes the sums, as [`load`](Self::load) reads them.
    ///
    /// # Safety
    /// They must be writable.
    pub(crate) unsafe fn store<T>(&mut self, n_rows: usize, to: *mut T, stride: usize) {
        const { assert!(size_of::<T>() == 4) };
        // SAFETY: as above.
        unsafe {
            asm!("tilestored [{p} + {s}], tmm0", "tilestored [{p} + {s} + 64], tmm1", p = in(reg) to, s = in(reg) 4 * stride,
                 options(nostack));
            if n_rows > ROWS {
                asm!("tilestored [{p} + {s}], tmm2", "tilestored [{p} + {s} + 64], tmm3", p = in(reg) to.add(ROWS * stride),
                     s = in(reg) 4 * stride, options(nostack));
            }
        }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: they are taken.
        unsafe { asm!("tilerelease", options(nostack)) };
    }
}

/// Products that are added to the sums, with an instruction.
macro_rules! products {
    ($name:ident, $product:literal, $doc:literal) => {
        impl Registers {
            #[doc = $doc]
            ///
            /// # Safety
            /// `x` must be readable as it says; of rows after the first 16 nothing is read where `n_rows` is at most that.
            pub(crate) unsafe fn $name(&mut self, n_rows: usize, x: Operands) {
                debug_assert!(n_rows <= 2 * ROWS && x.n_steps > 0);
                // SAFETY: the registers are taken, and the caller's promise.
                unsafe {
                    if n_rows <= ROWS {
                        asm!(
                            "2:",
                            "tileloadd tmm4, [{a} + {a_stride}]",
                            "prefetcht1 [{ahead}]",
                            "prefetcht1 [{ahead} + 64]",
                            "tileloadd tmm6, [{b} + {b_stride}]",
                            "prefetcht1 [{ahead} + 128]",
                            "prefetcht1 [{ahead} + 192]",
                            "tileloadd tmm7, [{b} + {b_stride} + 64]",
                            "add {ahead}, 256",
                            "add {a}, 1024",
                            "add {b}, 2048",
                            concat!($product, " tmm0, tmm4, tmm6"),
                            concat!($product, " tmm1, tmm4, tmm7"),
                            "dec {n}",
                            "jnz 2b",
                            a = inout(reg) x.a[0] => _,
                            a_stride = in(reg) 4 * WORDS,
                            b = inout(reg) x.panel => _,
                            b_stride = in(reg) 8 * WORDS,
                            ahead = inout(reg) x.ahead => _,
                            n = inout(reg) x.n_steps => _,
                            options(nostack, readonly),
                        );
                        return;
                    }
                    asm!(
                        "2:",
                        "tileloadd tmm4, [{a} + {a_stride}]",
                        "prefetcht1 [{ahead}]",
                        "tileloadd tmm6, [{b} + {b_stride}]",
                        "tileloadd tmm5, [{lower} + {a_stride}]",
                        "prefetcht1 [{ahead} + 64]",
                        concat!($product, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm7, [{b} + {b_stride} + 64]",
                        "prefetcht1 [{ahead} + 128]",
                        "add {a}, 1024",
                        concat!($product, " tmm2, tmm5, tmm6"),
                        "add {lower}, 1024",
                        "add {b}, 2048",
                        concat!($product, " tmm1, tmm4, tmm7"),
                        "prefetcht1 [{ahead} + 192]",
                        "add {ahead}, 256",
                        concat!($product, " tmm3, tmm5, tmm7"),
                        "dec {n}",
                        "jnz 2b",
                        a = inout(reg) x.a[0] => _,
                        lower = inout(reg) x.a[1] => _,
                        a_stride = in(reg) 4 * WORDS,
                        b = inout(reg) x.panel => _,
                        b_stride = in(reg) 8 * WORDS,
                        ahead = inout(reg) x.ahead => _,
                        n = inout(reg) x.n_steps => _,
                        options(nostack, readonly),
                    );
                }
            }
        }
    };
}

products!(add_bf16, "tdpbf16ps", "Adds `a * panel`: words of two neighbouring bf16.");
products!(
    add_int8,
    "tdpbsud",
    "Adds `a * panel`: words of four bytes, which are signed in `a` and unsigned in the panel."
);

/// Multiplies registers of ones over and over, and gives the sums.
macro_rules! rounds {
    ($name:ident, $product:literal, $sum:ty) => {
        /// Four products of registers full of `ones` a round, each added to sums of its own: the lanes of all sums.
        ///
        /// # Safety
        /// [`is_permitted`] must have been true.
        pub(crate) unsafe fn $name(ones: u32, n_rounds: usize) -> [[$sum; ROWS * WORDS]; 4] {
            let ones = [ones; ROWS * WORDS];
            let mut sums = [[<$sum>::default(); ROWS * WORDS]; 4];
            if n_rounds == 0 {
                return sums;
            }
            // SAFETY: whole registers are read and written, which have 16 rows of 16 words.
            unsafe {
                asm!(
                    "ldtilecfg [rip + {shape}]",
                    "tileloadd tmm4, [{ones} + {stride}]",
                    "tileloadd tmm5, [{ones} + {stride}]",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    concat!($product, " tmm0, tmm4, tmm5"),
                    concat!($product, " tmm1, tmm4, tmm5"),
                    concat!($product, " tmm2, tmm4, tmm5"),
                    concat!($product, " tmm3, tmm4, tmm5"),
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{sums} + {stride}], tmm0",
                    "tilestored [{sums} + {stride} + 1024], tmm1",
                    "tilestored [{sums} + {stride} + 2048], tmm2",
                    "tilestored [{sums} + {stride} + 3072], tmm3",
                    "tilerelease",
                    shape = sym WHOLE,
                    ones = in(reg) ones.as_ptr(),
                    sums = in(reg) sums.as_mut_ptr(),
                    stride = in(reg) 4 * WORDS,
                    n = inout(reg) n_rounds => _,
                    options(nostack),
                );
            }
            sums
        }
    };
}

rounds!(bf16_rounds, "tdpbf16ps", f32);
rounds!(int8_rounds, "tdpbsud", i32);
