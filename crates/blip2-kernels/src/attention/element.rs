//! The numbers that keys and values are held in.

use half::bf16;

/// A number of keys and values; computed with as f32.
pub trait Element: Copy + Send + Sync + 'static {
    /// Its value.
    fn widen(self) -> f32;

    /// The nearest number to `x`.
    fn narrow(x: f32) -> Self;

    /// How many of them a word of 32 bits holds, the first in its lowest bits.
    const PER_WORD: usize;

    /// The same numbers where they are f32.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
}

impl Element for f32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Element for bf16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_bits(crate::gemm::bf16_bits(x) as u16)
    }

    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}
