//! How the numbers of a packed weight are stored.

#[cfg(target_arch = "x86_64")]
use crate::gemm::bf16_words;
use crate::gemm::{MatrixRef, NR, Precision, pack_panel};
use crate::isa::{Isa, with_isa};

/// How a packed weight is stored, and in which precision it is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// f32 numbers, f32 products.
    F32,
    /// Numbers rounded to bf16, and so is what they are multiplied with.
    Bf16,
    /// f16 numbers in half the memory, widened on their way into f32 products.
    WideF16,
    /// bf16 numbers in half the memory, widened on their way into f32 products.
    WideBf16,
}

impl From<Precision> for Format {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

impl Format {
    /// The precision of its products.
    pub fn precision(self) -> Precision {
        match self {
            Self::F32 | Self::WideF16 | Self::WideBf16 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
        }
    }

    /// Words of a stored panel, `k_len` numbers deep and NR wide.
    pub(crate) fn panel_words(self, k_len: usize) -> usize {
        match self {
            Self::F32 => k_len * NR,
            Self::Bf16 => k_len.div_ceil(2) * NR,
            // Two neighbours of a row share a word.
            Self::WideF16 | Self::WideBf16 => k_len * NR / 2,
        }
    }

    /// Stores panels that were packed for [`Self::precision`].
    pub(super) fn narrow(self, words: Vec<u32>) -> Vec<u32> {
        let pairs = |bits: fn(f32) -> u16| {
            let (pairs, _) = words.as_chunks::<2>();
            pairs
                .iter()
                .map(|pair| {
                    let [low, high] = pair.map(|word| u32::from(bits(f32::from_bits(word))));
                    low | high << 16
                })
                .collect()
        };
        match self {
            Self::F32 | Self::Bf16 => words,
            Self::WideF16 => pairs(|x| half::f16::from_f32(x).to_bits()),
            Self::WideBf16 => pairs(|x| half::bf16::from_f32(x).to_bits()),
        }
    }

    /// A stored panel as the micro-kernels read it, in `wide` where it is stored narrower.
    pub(crate) fn widen<'a>(self, isa: Isa, stored: &'a [u32], wide: &'a mut Vec<u32>) -> &'a [u32] {
        let is_f16 = match self {
            Self::F32 | Self::Bf16 => return stored,
            Self::WideF16 => true,
            Self::WideBf16 => false,
        };
        wide.resize(2 * stored.len(), 0);
        let (pairs, _) = wide.as_chunks_mut::<2>();
        with_isa(
            isa,
            #[inline(always)]
            || {
                let pairs = pairs.iter_mut().zip(stored);
                if is_f16 {
                    pairs.for_each(|(pair, &word)| *pair = [word & 0xffff, word >> 16].map(f16_to_f32_bits));
                } else {
                    pairs.for_each(|(pair, &word)| *pair = [word << 16, word & 0xffff_0000]);
                }
            },
        );
        wide
    }

    /// Up to 32 numbers along `k` of the first `n_columns` columns of a stored panel, as words of a panel whose columns these numbers
    /// are, and whose `k` the columns.
    pub(super) fn turn(self, isa: Isa, stored: &[u32], n_columns: usize, n_numbers: usize, to: &mut [u32]) {
        #[cfg(target_arch = "x86_64")]
        if isa.has_avx512()
            && self == Self::Bf16
            && let (Some(stored), Some(to)) = (stored.first_chunk(), to.first_chunk_mut())
        {
            assert!(isa.is_available());
            // SAFETY: the instruction set is available.
            return unsafe { bf16_words::turned(stored, to) };
        }
        let mut rows = [0.0; NR * NR];
        for (column, row) in rows.chunks_exact_mut(NR).enumerate().take(n_columns) {
            self.column(stored, column, &mut row[..n_numbers]);
        }
        let view = MatrixRef { data: &rows, row_stride: NR, col_stride: 1 };
        with_isa(
            isa,
            #[inline(always)]
            || pack_panel(isa, self.precision(), n_columns, n_numbers, view, to),
        );
    }

    /// Column `column` of a stored panel, the first `into.len()` numbers along `k`.
    pub(super) fn column(self, stored: &[u32], column: usize, into: &mut [f32]) {
        match self {
            Self::F32 => {
                let words = stored.as_chunks::<NR>().0.iter().map(|row| row[column]);
                into.iter_mut().zip(words).for_each(|(x, word)| *x = f32::from_bits(word));
            }
            Self::Bf16 => {
                let words = stored.as_chunks::<NR>().0.iter().map(|row| row[column]);
                for (pair, word) in into.chunks_mut(2).zip(words) {
                    pair[0] = f32::from_bits(word << 16);
                    if let Some(high) = pair.get_mut(1) {
                        *high = f32::from_bits(word & 0xffff_0000);
                    }
                }
            }
            Self::WideF16 | Self::WideBf16 => {
                let words = stored.as_chunks::<{ NR / 2 }>().0.iter().map(|row| row[column / 2]);
                for (x, word) in into.iter_mut().zip(words) {
                    let bits = if column.is_multiple_of(2) { word & 0xffff } else { word >> 16 };
                    *x = f32::from_bits(match self {
                        Self::WideF16 => f16_to_f32_bits(bits),
                        _ => bits << 16,
                    });
                }
            }
        }
    }
}

/// The f32 with the value of the f16 in the lower half of a word, in operations that vectorise.
#[inline(always)]
fn f16_to_f32_bits(half: u32) -> u32 {
    let sign = (half & 0x8000) << 16;
    let magnitude = (half & 0x7fff) << 13;
    // Exponents differ by 112 in their bias; the product also normalises what is subnormal as f16.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    // Infinity and NaN have no exponent to scale.
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    sign | scaled | special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_to_its_value() {
        for bits in 0..=u16::MAX {
            let (found, expected) =
                (f32::from_bits(f16_to_f32_bits(bits.into())), half::f16::from_bits(bits).to_f32());
            assert!(
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                "{bits:#x}"
            );
        }
    }
}
