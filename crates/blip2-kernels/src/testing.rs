//! What the tests of several kernels share.

use std::ops::Deref;

/// Widths of the published models and of the default one: heads, tokens, layers, vocabularies.
pub(crate) const WIDTHS: [usize; 11] = [88, 257, 384, 576, 768, 1280, 1408, 2560, 6144, 10_240, 50_272];

/// Every tail there is, and more than one whole step of every kernel.
pub(crate) const TAILS: std::ops::RangeInclusive<usize> = 1..=70;

/// Numbers in -1 to 1, one element into their memory, which ends with them: at no aligned address, and a sanitiser sees
/// who reads on.
pub(crate) struct Numbers(Box<[f32]>);

impl Deref for Numbers {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0[1..]
    }
}

impl Numbers {
    /// The same numbers with another at `at`.
    pub(crate) fn with(mut self, at: usize, x: f32) -> Self {
        self.0[at + 1] = x;
        self
    }

    /// All of them times `factor`.
    pub(crate) fn times(mut self, factor: f32) -> Self {
        self.0.iter_mut().for_each(|x| *x *= factor);
        self
    }
}

pub(crate) fn numbers(n: usize, seed: u32) -> Numbers {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    Numbers(
        (0..=n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect(),
    )
}

/// Panics unless the numbers are near, each within `tolerance` of the larger of one and itself, or both are no number.
#[track_caller]
pub(crate) fn assert_near(found: &[f32], expected: &[f64], tolerance: f64, of: impl std::fmt::Debug) {
    assert_eq!(found.len(), expected.len(), "{of:?}");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let found = f64::from(found);
        let near = found == expected
            || (found.is_nan() && expected.is_nan())
            || (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(near, "{of:?}, element {i}: {found} instead of {expected}");
    }
}
