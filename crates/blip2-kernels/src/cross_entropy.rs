//! Softmax cross-entropy with label smoothing.

use rayon::prelude::*;

use crate::isa::{Isa, with_isa};
use crate::lanes::{exp_of_negative, max, sum, sum_by};

/// The loss of each row: `(1 - s) * -log p[target] + s * mean over classes of -log p`.
///
/// # Panics
/// When the lengths do not fit or a target is not below `n_classes`.
pub fn cross_entropy(logits: &[f32], n_classes: usize, targets: &[u32], smoothing: f32, losses: &mut [f32]) {
    assert!(logits.len() == targets.len() * n_classes && losses.len() == targets.len(), "lengths do not fit");
    let isa = Isa::detect();
    let rows = logits.par_chunks_exact(n_classes.max(1)).zip(targets).zip(losses);
    rows.for_each(|((row, &target), loss)| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                let max = max(row);
                let log_sum = max + sum_by(row.len(), |i| exp_of_negative(row[i] - max)).ln();
                let nll = log_sum - row[target as usize];
                let uniform = if smoothing == 0.0 { 0.0 } else { log_sum - sum(row) / n_classes as f32 };
                *loss = (1.0 - smoothing) * nll + smoothing * uniform;
            },
        );
    });
}

/// The gradient of the logits in their place: `d_loss * (softmax(logits) - target distribution)`, row by row.
///
/// # Panics
/// As [`cross_entropy`].
pub fn cross_entropy_backward(
    logits: &mut [f32],
    n_classes: usize,
    targets: &[u32],
    smoothing: f32,
    d_losses: &[f32],
) {
    assert!(
        logits.len() == targets.len() * n_classes && d_losses.len() == targets.len(),
        "lengths do not fit"
    );
    let isa = Isa::detect();
    let rows = logits.par_chunks_exact_mut(n_classes.max(1)).zip(targets).zip(d_losses);
    rows.for_each(|((row, &target), &d_loss)| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                let max = max(row);
                row.iter_mut().for_each(|x| *x = exp_of_negative(*x - max));
                let scale = d_loss / sum(row);
                let floor = d_loss * smoothing / n_classes as f32;
                row.iter_mut().for_each(|d| *d = *d * scale - floor);
                row[target as usize] -= d_loss * (1.0 - smoothing);
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TAILS, WIDTHS, assert_near, numbers};

    fn reference(row: &[f64], target: usize, smoothing: f64) -> f64 {
        let log_sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        let mean = row.iter().map(|x| log_sum - x).sum::<f64>() / row.len() as f64;
        (1.0 - smoothing) * (log_sum - row[target]) + smoothing * mean
    }

    #[test]
    fn losses_equal_the_definition_for_every_tail_and_vocabulary() {
        for n_classes in TAILS.chain(WIDTHS).chain([30_522, 32_128]) {
            let logits = numbers(2 * n_classes, 1).times(20.0);
            let targets = [n_classes as u32 - 1, 0];
            for smoothing in [0.0f32, 0.1] {
                let (mut losses, mut d_logits) = (vec![0.0; 2], logits.to_vec());
                cross_entropy(&logits, n_classes, &targets, smoothing, &mut losses);
                cross_entropy_backward(&mut d_logits, n_classes, &targets, smoothing, &[1.0, 2.0]);
                for (r, row) in logits.chunks_exact(n_classes).enumerate() {
                    let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                    let expected = reference(&row, targets[r] as usize, f64::from(smoothing));
                    let s = f64::from(smoothing);
                    assert_near(&losses[r..=r], &[expected], 1e-5, (n_classes, smoothing));
                    let total: f64 = row.iter().map(|x| x.exp()).sum();
                    let gradient: Vec<f64> = (0..n_classes)
                        .map(|j| {
                            let target = if j == targets[r] as usize { 1.0 - s } else { 0.0 };
                            [1.0, 2.0][r] * (row[j].exp() / total - target - s / n_classes as f64)
                        })
                        .collect();
                    let found = &d_logits[r * n_classes..(r + 1) * n_classes];
                    assert_near(found, &gradient, 1e-5, (n_classes, smoothing));
                }
            }
        }
    }

    #[test]
    fn a_class_may_be_impossible_but_not_undefined() {
        for (special, is_finite) in [(f32::NEG_INFINITY, true), (f32::INFINITY, false), (f32::NAN, false)] {
            let logits = numbers(2 * 37, 1).with(36, special);
            let (mut losses, mut d_logits) = ([0.0; 2], logits.to_vec());
            cross_entropy(&logits, 37, &[3, 36], 0.0, &mut losses);
            cross_entropy_backward(&mut d_logits, 37, &[3, 36], 0.0, &[1.0; 2]);
            assert_eq!(losses[0].is_finite(), is_finite, "{special}: {losses:?}");
            assert_eq!(d_logits[..37].iter().all(|d| d.is_finite()), is_finite, "{special}");
            assert!(losses[1].is_finite() && d_logits[37..].iter().all(|d| d.is_finite()));
        }
    }

    #[test]
    fn losses_and_gradients_equal_the_definition() {
        for n_classes in [1, 2, 15, 16, 33, 67] {
            for smoothing in [0.0f32, 0.1] {
                let logits: Vec<f32> = (0..3 * n_classes).map(|i| (i as f32 * 1.7).sin() * 4.0).collect();
                let targets = [0, n_classes as u32 - 1, n_classes as u32 / 2];
                let d_losses = [1.0, -0.5, 2.0];
                let mut losses = [0.0; 3];
                cross_entropy(&logits, n_classes, &targets, smoothing, &mut losses);
                let mut d_logits = logits.clone();
                cross_entropy_backward(&mut d_logits, n_classes, &targets, smoothing, &d_losses);
                for r in 0..3 {
                    let row: Vec<f64> =
                        logits[r * n_classes..(r + 1) * n_classes].iter().map(|&x| f64::from(x)).collect();
                    let loss = |row: &[f64]| reference(row, targets[r] as usize, f64::from(smoothing));
                    assert!((f64::from(losses[r]) - loss(&row)).abs() < 1e-5, "{n_classes} {smoothing}");
                    for j in 0..n_classes {
                        let shifted = |by: f64| {
                            let mut row = row.clone();
                            row[j] += by;
                            loss(&row)
                        };
                        let slope = (shifted(1e-5) - shifted(-1e-5)) / 2e-5 * f64::from(d_losses[r]);
                        let found = f64::from(d_logits[r * n_classes + j]);
                        assert!((found - slope).abs() < 1e-5, "{n_classes} {smoothing} {j}: {found} {slope}");
                    }
                }
            }
        }
    }
}
