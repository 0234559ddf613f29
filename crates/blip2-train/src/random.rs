//! Random numbers that are the same on every machine and in every release.
//!
//! Orders, caption picks and augmented views are functions of a seed and of what they are for, never of a shared
//! generator's history: a resumed run needs a few integers and no generator state.

use blip2::splitmix::{GAMMA, mix};

/// A stream of SplitMix64 ([`blip2::splitmix`]), made for one purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random(u64);

impl Random {
    /// A generator for one purpose: every different list of numbers gives an independent stream.
    pub fn new(purpose: &[u64]) -> Self {
        let mut random = Self(GAMMA);
        for &number in purpose {
            random.0 ^= number;
            random.0 = random.next_u64();
        }
        random
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// A whole number in `0..n`; the bias of the multiplication is below `n / 2^64`.
    ///
    /// # Panics
    /// When `n` is zero.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "an empty range has no number to draw");
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number in `[low, high)`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// A standard normal number (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// An index with probability proportional to its weight; `None` when every weight is zero.
    pub fn weighted(&mut self, weights: &[f64]) -> Option<usize> {
        let mut rest = self.unit() * weights.iter().sum::<f64>();
        let mut last = None;
        for (i, &weight) in weights.iter().enumerate() {
            if weight > 0.0 {
                last = Some(i);
                if rest < weight {
                    break;
                }
                rest -= weight;
            }
        }
        last
    }

    /// Puts a slice in random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_different_purposes_differ_and_repeat() {
        let draw = |purpose: &[u64]| Random::new(purpose).next_u64();
        assert_eq!(draw(&[1, 2]), draw(&[1, 2]));
        let all = [draw(&[]), draw(&[0]), draw(&[0, 0]), draw(&[1]), draw(&[1, 2]), draw(&[2, 1])];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "streams must differ: {all:?}");
        }
    }

    #[test]
    fn below_is_even_and_shuffle_keeps_everything() {
        let mut random = Random::new(&[7]);
        let mut counts = [0usize; 5];
        for _ in 0..50_000 {
            counts[random.below(5)] += 1;
        }
        assert!(counts.iter().all(|&c| (9_500..10_500).contains(&c)), "{counts:?}");
        let mut items: Vec<usize> = (0..100).collect();
        random.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn weighted_follows_the_weights_and_never_picks_zero() {
        let mut random = Random::new(&[3]);
        let mut counts = [0usize; 4];
        for _ in 0..10_000 {
            let Some(i) = random.weighted(&[0.0, 1.0, 3.0, 0.0]) else { panic!("there are weights") };
            counts[i] += 1;
        }
        assert_eq!((counts[0], counts[3]), (0, 0));
        assert!((counts[2] as f64 / counts[1] as f64 - 3.0).abs() < 0.3, "{counts:?}");
        assert_eq!(random.weighted(&[0.0, 0.0]), None);
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let mut random = Random::new(&[4]);
        let draws: Vec<f64> = (0..20_000).map(|_| random.normal()).collect();
        let mean = draws.iter().sum::<f64>() / 2e4;
        let variance = draws.iter().map(|d| d * d).sum::<f64>() / 2e4;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
