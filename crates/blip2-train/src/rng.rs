//! Random numbers that are a function of what they are for.
//!
//! Every use derives its own generator from the run's seed, a purpose and a counter (the step, the epoch), so
//! a resumed run draws exactly what the uninterrupted one would have drawn.

/// splitmix64 (Steele, Lea, Flood 2014): small, and good enough for sampling and shuffling.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The generator for `purpose` at `counter` of the run seeded with `seed`.
    pub fn new(seed: u64, purpose: &str, counter: u64) -> Self {
        let mut rng = Self(seed);
        for byte in purpose.bytes() {
            rng.0 = rng.next_u64() ^ u64::from(byte);
        }
        rng.0 = rng.next_u64() ^ counter;
        rng.next_u64();
        rng
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`; `n` must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        // The bias of the multiplication is below n / 2^64.
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// An index with probability proportional to its weight; `None` when all weights are zero.
    pub fn weighted(&mut self, weights: &[f64]) -> Option<usize> {
        let total: f64 = weights.iter().sum();
        let mut rest = self.uniform() * total;
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

    /// Fisher-Yates.
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
    fn purposes_and_counters_give_different_streams() {
        let first = |seed, purpose, counter| Rng::new(seed, purpose, counter).next_u64();
        assert_eq!(first(1, "order", 0), first(1, "order", 0));
        assert_ne!(first(1, "order", 0), first(2, "order", 0));
        assert_ne!(first(1, "order", 0), first(1, "order", 1));
        assert_ne!(first(1, "order", 0), first(1, "captions", 0));
    }

    #[test]
    fn weighted_follows_the_weights_and_never_picks_zero() {
        let mut rng = Rng::new(3, "test", 0);
        let mut counts = [0; 4];
        for _ in 0..10_000 {
            counts[rng.weighted(&[0.0, 1.0, 3.0, 0.0]).unwrap()] += 1;
        }
        assert_eq!((counts[0], counts[3]), (0, 0));
        assert!((counts[2] as f64 / counts[1] as f64 - 3.0).abs() < 0.3, "{counts:?}");
        assert_eq!(rng.weighted(&[0.0, 0.0]), None);
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let mut rng = Rng::new(4, "test", 0);
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / f64::from(n);
        let variance = draws.iter().map(|d| d * d).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
