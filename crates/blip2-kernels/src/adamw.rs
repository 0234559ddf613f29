//! The AdamW update (arXiv 1711.05101), as `torch.optim.AdamW` computes it.

use rayon::prelude::*;

use crate::isa::{Isa, with_isa};
use crate::lanes::LANES;

/// The constants of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the mean of the gradients.
    pub beta1: f32,
    /// Decay of the mean of the squared gradients.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Which update this is, from 1.
    pub step: u64,
}

/// Updates `param` and its moments in place; the gradient counts `grad_scale` times.
///
/// # Panics
/// When the lengths differ.
pub fn adamw_step(param: &mut [f32], grad: &[f32], grad_scale: f32, m: &mut [f32], v: &mut [f32], h: AdamW) {
    assert!(grad.len() == param.len() && m.len() == param.len() && v.len() == param.len(), "lengths differ");
    const CHUNK: usize = 1 << 14;
    let (beta1, beta2) = (f64::from(h.beta1), f64::from(h.beta2));
    let step_size = (f64::from(h.lr) / (1.0 - beta1.powf(h.step as f64))) as f32;
    let root_correction = (1.0 - beta2.powf(h.step as f64)).sqrt() as f32;
    let decay = 1.0 - h.lr * h.weight_decay;
    let isa = Isa::detect();
    let chunks = param.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    chunks.zip(moments).for_each(|((param, grad), (m, v))| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                for i in 0..param.len() {
                    let g = grad[i] * grad_scale;
                    m[i] += (g - m[i]) * (1.0 - h.beta1);
                    v[i] = v[i] * h.beta2 + g * g * (1.0 - h.beta2);
                    let denominator = v[i].sqrt() / root_correction + h.eps;
                    param[i] = param[i] * decay - step_size * (m[i] / denominator);
                }
            },
        );
    });
}

/// The sum of the squares of `x`, added in f64: that of the whole gradient is its norm's. The same for any number of threads and any
/// instruction set.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    const CHUNK: usize = 1 << 16;
    let isa = Isa::detect();
    let parts: Vec<f64> = x
        .par_chunks(CHUNK)
        .map(|chunk| {
            let mut sums = [0.0f64; LANES];
            with_isa(
                isa,
                #[inline(always)]
                || {
                    let (chunks, rest) = chunk.as_chunks::<LANES>();
                    for x in chunks {
                        // A square of f32 is exact in f64.
                        for (sum, &x) in sums.iter_mut().zip(x) {
                            *sum += f64::from(x) * f64::from(x);
                        }
                    }
                    for (sum, &x) in sums.iter_mut().zip(rest) {
                        *sum += f64::from(x) * f64::from(x);
                    }
                },
            );
            sums.iter().sum()
        })
        .collect();
    parts.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TAILS, WIDTHS, numbers};

    #[test]
    fn squares_are_summed_in_f64() {
        for n in TAILS.chain(WIDTHS).chain([3 << 16]) {
            let x = numbers(n, 1);
            let expected: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let found = sum_of_squares(&x);
            assert!((found - expected).abs() <= 1e-11 * expected, "{n}: {found} instead of {expected}");
            assert!(sum_of_squares(&numbers(n, 1).with(n / 2, f32::NAN)).is_nan());
            assert_eq!(sum_of_squares(&numbers(n, 1).with(n / 2, f32::INFINITY)), f64::INFINITY);
        }
        assert_eq!(sum_of_squares(&[]), 0.0);
    }

    #[test]
    fn every_element_is_updated_by_itself() {
        let h = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.05, step: 3 };
        let step = |param: &[f32], grad: &[f32]| {
            let (mut param, mut m, mut v) = (param.to_vec(), vec![0.1; grad.len()], vec![0.2; grad.len()]);
            adamw_step(&mut param, grad, 0.5, &mut m, &mut v, h);
            [param, m, v]
        };
        for n in TAILS.chain(WIDTHS) {
            let (param, grad) = (numbers(n, 1), numbers(n, 2));
            let all = step(&param, &grad);
            // Each alone, which is what the definition is checked with.
            for i in (0..n).step_by(n / 70 + 1).chain([n - 1]) {
                let alone = step(&param[i..=i], &grad[i..=i]);
                for (all, alone) in all.iter().zip(&alone) {
                    assert!((all[i] - alone[0]).abs() <= 1e-6 * alone[0].abs(), "{n} {i}");
                }
            }
            let spoilt = step(&param, &numbers(n, 2).with(n / 2, f32::NAN));
            for (all, spoilt) in all.iter().zip(&spoilt) {
                assert!((0..n).all(|i| if i == n / 2 { spoilt[i].is_nan() } else { spoilt[i] == all[i] }));
            }
        }
    }

    #[test]
    fn ten_steps_equal_the_definition_in_double_precision() {
        let h = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.05, step: 0 };
        let mut param = vec![0.5f32, -1.0, 2.0];
        let (mut m, mut v) = (vec![0.0; 3], vec![0.0; 3]);
        let mut expected: Vec<[f64; 3]> = param.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
        for step in 1..=10u64 {
            let grad: Vec<f32> = (0..3).map(|i| ((step * 7 + i) as f32).sin()).collect();
            adamw_step(&mut param, &grad, 0.5, &mut m, &mut v, AdamW { step, ..h });
            for ([p, m, v], g) in expected.iter_mut().zip(&grad) {
                let g = f64::from(*g) * 0.5;
                *p -= 1e-2 * 0.05 * *p;
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.98 * *v + 0.02 * g * g;
                let (m_hat, v_hat) =
                    (*m / (1.0 - 0.9f64.powi(step as i32)), *v / (1.0 - 0.98f64.powi(step as i32)));
                *p -= 1e-2 * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
        for (p, [expected, ..]) in param.iter().zip(expected) {
            assert!((f64::from(*p) - expected).abs() < 2e-6, "{p} {expected}");
        }
    }
}
