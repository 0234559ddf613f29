//! Dropout as a function: whether an element is kept is a hash of the seed and its index.

use crate::buffer::{fill, one_in_chunks};
use crate::isa::{Isa, with_isa};

/// A dropout mask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, in `[0, 1)`.
    pub p: f32,
    /// Which mask.
    pub seed: u64,
}

impl Dropout {
    /// What element `index` is multiplied with: 0, or `1 / (1 - p)`.
    #[inline(always)]
    pub(crate) fn factor(&self, index: u32) -> f32 {
        // murmur3's finaliser over index and seed, twice so that both halves of the seed reach every bit.
        let mut h = index ^ self.seed as u32;
        h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        h = (h ^ (h >> 16)) ^ (self.seed >> 32) as u32;
        h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        let uniform = (h >> 8) as f32 / (1 << 24) as f32;
        if uniform < self.p { 0.0 } else { 1.0 / (1.0 - self.p) }
    }
}

/// `mask(x)`; the gradient is the same function of the gradient.
pub fn dropout(x: &[f32], d: Dropout) -> Vec<f32> {
    const CHUNK: usize = 1 << 14;
    let isa = Isa::detect();
    one_in_chunks(x.len(), CHUNK, |start, out| {
        let x = &x[start..][..out.len()];
        with_isa(
            isa,
            #[inline(always)]
            || {
                fill(
                    out,
                    #[inline(always)]
                    |i| x[i] * d.factor((start as u32).wrapping_add(i as u32)),
                )
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TAILS, WIDTHS, numbers};

    #[test]
    fn drops_the_asked_share_and_keeps_the_mean() {
        let n = 200_000;
        for p in [0.1, 0.5] {
            let out = dropout(&vec![1.0; n], Dropout { p, seed: 42 });
            let dropped = out.iter().filter(|&&x| x == 0.0).count() as f32 / n as f32;
            assert!((dropped - p).abs() < 0.005, "{dropped}");
            assert!((out.iter().sum::<f32>() / n as f32 - 1.0).abs() < 0.01);
        }
    }

    #[test]
    fn every_element_is_dropped_or_scaled() {
        let d = Dropout { p: 0.4, seed: 9 };
        for n in TAILS.chain(WIDTHS) {
            let x = numbers(n, 1).with(n - 1, f32::NAN);
            for (i, (out, x)) in dropout(&x, d).iter().zip(&*x).enumerate() {
                let expected = x * d.factor(i as u32);
                assert!(*out == expected || out.is_nan() && expected.is_nan(), "{n} {i}");
            }
        }
    }

    #[test]
    fn masks_of_different_seeds_are_independent() {
        let n = 100_000;
        let mask = |seed| dropout(&vec![1.0; n], Dropout { p: 0.5, seed });
        assert_eq!(mask(1), mask(1));
        for other in [2, 1 << 32, 1 << 63] {
            let both = mask(1).iter().zip(mask(other)).filter(|(a, b)| **a == 0.0 && *b == 0.0).count();
            assert!((both as f32 / n as f32 - 0.25).abs() < 0.01, "seed {other}: {both}");
        }
    }
}
