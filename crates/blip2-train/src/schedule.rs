//! The learning rate: linear warm-up, then cosine, evaluated at every step.

use serde::{Deserialize, Serialize};

/// Linear from 0 over the warm-up steps to `peak`, then half a cosine down to `min`.
///
/// LAVIS evaluates its cosine once an epoch; the paper's curve is per step, as here.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The highest learning rate.
    pub peak: f64,
    /// The learning rate at the end.
    pub min: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
}

impl Schedule {
    /// The learning rate of step `step` (from 0) of `n_steps`.
    pub fn at(&self, step: u64, n_steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let rest = n_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / rest as f64).min(1.0);
        self.min + (self.peak - self.min) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_peaks_and_falls_to_the_minimum() {
        let schedule = Schedule { peak: 1.0, min: 0.1, warmup_steps: 10 };
        assert!((schedule.at(0, 110) - 0.1).abs() < 1e-12);
        assert!((schedule.at(9, 110) - 1.0).abs() < 1e-12);
        assert!((schedule.at(10, 110) - 1.0).abs() < 1e-12);
        assert!((schedule.at(60, 110) - 0.55).abs() < 1e-12);
        assert!((schedule.at(110, 110) - 0.1).abs() < 1e-12);
        assert!((schedule.at(500, 110) - 0.1).abs() < 1e-12);
    }
}
