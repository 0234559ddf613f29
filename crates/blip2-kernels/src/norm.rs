//! Layer norm and RMS norm with their gradients.

use rayon::prelude::*;

use crate::isa::{Isa, with_isa};
use crate::lanes::{sum, sum_by};

/// Rows a task works on; weight gradients are summed over such chunks in order, whatever the number of threads.
const ROWS_A_TASK: usize = 64;

/// `out = (y - mean) / sqrt(variance + eps) * weight + bias` with `y = x + residual`, over rows of `weight.len()`.
///
/// # Panics
/// When the lengths do not fit.
pub fn layer_norm(
    x: &[f32],
    residual: Option<&[f32]>,
    weight: &[f32],
    bias: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    check(x.len(), width, &[out.len(), residual.map_or(x.len(), <[f32]>::len)]);
    assert_eq!(bias.len(), width, "weight and bias differ in length");
    let isa = Isa::detect();
    out.par_chunks_mut(ROWS_A_TASK * width).enumerate().for_each(|(task, out)| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    let at = (task * ROWS_A_TASK + i) * width;
                    add(&x[at..at + width], residual.map(|r| &r[at..at + width]), out);
                    let (mean, scale) = statistics(out, eps);
                    for j in 0..width {
                        out[j] = (out[j] - mean) * scale * weight[j] + bias[j];
                    }
                }
            },
        );
    });
}

/// The gradients of [`layer_norm`]; `d_x` is the residual's gradient too.
///
/// # Panics
/// When the lengths do not fit.
#[allow(clippy::too_many_arguments, reason = "three gradients of four operands")]
pub fn layer_norm_backward(
    x: &[f32],
    residual: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_weight: &mut [f32],
    d_bias: &mut [f32],
) {
    let width = weight.len();
    check(x.len(), width, &[d_out.len(), d_x.len(), residual.map_or(x.len(), <[f32]>::len)]);
    assert!(d_weight.len() == width && d_bias.len() == width, "weight gradients differ in length");
    let isa = Isa::detect();
    let tasks = d_x.par_chunks_mut(ROWS_A_TASK * width).enumerate();
    let sums: Vec<(Vec<f32>, Vec<f32>)> = tasks
        .map(|(task, d_x)| {
            let (mut d_weight, mut d_bias) = (vec![0.0; width], vec![0.0; width]);
            with_isa(
                isa,
                #[inline(always)]
                || {
                    for (i, d_x) in d_x.chunks_exact_mut(width).enumerate() {
                        let at = (task * ROWS_A_TASK + i) * width;
                        let d_out = &d_out[at..at + width];
                        add(&x[at..at + width], residual.map(|r| &r[at..at + width]), d_x);
                        let (mean, scale) = statistics(d_x, eps);
                        for j in 0..width {
                            d_x[j] = (d_x[j] - mean) * scale; // the normalised input
                            d_weight[j] += d_out[j] * d_x[j];
                            d_bias[j] += d_out[j];
                        }
                        let mean_d = sum_by(width, |j| d_out[j] * weight[j]) / width as f32;
                        let mean_dx = sum_by(width, |j| d_out[j] * weight[j] * d_x[j]) / width as f32;
                        for j in 0..width {
                            d_x[j] = scale * (d_out[j] * weight[j] - mean_d - d_x[j] * mean_dx);
                        }
                    }
                },
            );
            (d_weight, d_bias)
        })
        .collect();
    d_weight.fill(0.0);
    d_bias.fill(0.0);
    for (w, b) in sums {
        d_weight.iter_mut().zip(w).for_each(|(sum, w)| *sum += w);
        d_bias.iter_mut().zip(b).for_each(|(sum, b)| *sum += b);
    }
}

/// `out = x / sqrt(mean(x²) + eps) * weight`, over rows of `weight.len()`.
///
/// # Panics
/// When the lengths do not fit.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    check(x.len(), width, &[out.len()]);
    let isa = Isa::detect();
    x.par_chunks(ROWS_A_TASK * width).zip(out.par_chunks_mut(ROWS_A_TASK * width)).for_each(|(x, out)| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                    let scale = 1.0 / (sum_by(width, |j| x[j] * x[j]) / width as f32 + eps).sqrt();
                    for j in 0..width {
                        out[j] = x[j] * scale * weight[j];
                    }
                }
            },
        );
    });
}

/// The gradients of [`rms_norm`]; that of the weight only where it is asked for.
///
/// # Panics
/// When the lengths do not fit.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_weight: Option<&mut [f32]>,
) {
    let width = weight.len();
    check(x.len(), width, &[d_out.len(), d_x.len()]);
    let isa = Isa::detect();
    let wants_weight = d_weight.is_some();
    let tasks = d_x.par_chunks_mut(ROWS_A_TASK * width).enumerate();
    let sums: Vec<Vec<f32>> = tasks
        .map(|(task, d_x)| {
            let mut d_weight = vec![0.0; if wants_weight { width } else { 0 }];
            with_isa(
                isa,
                #[inline(always)]
                || {
                    for (i, d_x) in d_x.chunks_exact_mut(width).enumerate() {
                        let at = (task * ROWS_A_TASK + i) * width;
                        let (x, d_out) = (&x[at..at + width], &d_out[at..at + width]);
                        let scale = 1.0 / (sum_by(width, |j| x[j] * x[j]) / width as f32 + eps).sqrt();
                        let mean = sum_by(width, |j| d_out[j] * weight[j] * x[j]) / width as f32;
                        for j in 0..width {
                            d_x[j] = scale * (d_out[j] * weight[j] - x[j] * scale * scale * mean);
                        }
                        for (j, sum) in d_weight.iter_mut().enumerate() {
                            *sum += d_out[j] * x[j] * scale;
                        }
                    }
                },
            );
            d_weight
        })
        .collect();
    if let Some(d_weight) = d_weight {
        assert_eq!(d_weight.len(), width, "the weight gradient differs in length");
        d_weight.fill(0.0);
        for w in sums {
            d_weight.iter_mut().zip(w).for_each(|(sum, w)| *sum += w);
        }
    }
}

fn check(len: usize, width: usize, others: &[usize]) {
    assert!(width > 0 && len.is_multiple_of(width), "{len} elements are no rows of {width}");
    assert!(others.iter().all(|&other| other == len), "lengths differ");
}

#[inline(always)]
fn add(x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
    match residual {
        Some(residual) => {
            for (i, out) in out.iter_mut().enumerate() {
                *out = x[i] + residual[i];
            }
        }
        None => out.copy_from_slice(x),
    }
}

/// Mean and `1 / sqrt(variance + eps)`.
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let mean = sum(x) / x.len() as f32;
    let variance = sum_by(x.len(), |j| (x[j] - mean) * (x[j] - mean)) / x.len() as f32;
    (mean, 1.0 / (variance + eps).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 0.737).sin() * 1.5).collect()
    }

    fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|&x| f64::from(x)).collect()
    }

    /// `sum(d_out * norm(x))` in double precision, whose derivatives are the gradients.
    fn objective(x: &[f64], weight: &[f64], bias: Option<&[f64]>, d_out: &[f64], eps: f64) -> f64 {
        let width = weight.len();
        x.chunks(width)
            .zip(d_out.chunks(width))
            .map(|(x, d)| {
                let mean = if bias.is_some() { x.iter().sum::<f64>() / width as f64 } else { 0.0 };
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                let scale = (variance + eps).sqrt().recip();
                (0..width)
                    .map(|j| d[j] * ((x[j] - mean) * scale * weight[j] + bias.map_or(0.0, |b| b[j])))
                    .sum::<f64>()
            })
            .sum()
    }

    fn slope(f: impl Fn(f64) -> f64) -> f64 {
        (f(1e-5) - f(-1e-5)) / 2e-5
    }

    #[test]
    fn layer_norm_and_its_gradients_equal_the_definition() {
        for (rows, width) in [(1, 2), (3, 15), (2, 16), (130, 17), (2, 67)] {
            let (x, residual, d_out) =
                (numbers(rows * width, 0.0), numbers(rows * width, 5.0), numbers(rows * width, 9.0));
            let (weight, bias) = (numbers(width, 2.0), numbers(width, 3.0));
            let mut out = vec![0.0; x.len()];
            layer_norm(&x, Some(&residual), &weight, &bias, 1e-5, &mut out);
            let (mut d_x, mut d_w, mut d_b) = (vec![0.0; x.len()], vec![0.0; width], vec![0.0; width]);
            layer_norm_backward(&x, Some(&residual), &weight, 1e-5, &d_out, &mut d_x, &mut d_w, &mut d_b);
            let y: Vec<f64> = wide(&x).iter().zip(wide(&residual)).map(|(a, b)| a + b).collect();
            let (w, b, d) = (wide(&weight), wide(&bias), wide(&d_out));
            let total: f64 = wide(&out).iter().zip(&d).map(|(o, d)| o * d).sum();
            assert!((total - objective(&y, &w, Some(&b), &d, 1e-5)).abs() < 1e-3);
            let shifted = |v: &[f64], j: usize, by: f64| {
                let mut v = v.to_vec();
                v[j] += by;
                v
            };
            for j in 0..width {
                let at = x.len() - width + j;
                let numeric = slope(|h| objective(&shifted(&y, at, h), &w, Some(&b), &d, 1e-5));
                assert!(
                    (f64::from(d_x[at]) - numeric).abs() < 1e-3 * (1.0 + numeric.abs()),
                    "{} {numeric}",
                    d_x[at]
                );
                let numeric = slope(|h| objective(&y, &shifted(&w, j, h), Some(&b), &d, 1e-5));
                assert!(
                    (f64::from(d_w[j]) - numeric).abs() < 1e-3 * (1.0 + numeric.abs()),
                    "{} {numeric}",
                    d_w[j]
                );
                let numeric = slope(|h| objective(&y, &w, Some(&shifted(&b, j, h)), &d, 1e-5));
                assert!(
                    (f64::from(d_b[j]) - numeric).abs() < 1e-3 * (1.0 + numeric.abs()),
                    "{} {numeric}",
                    d_b[j]
                );
            }
        }
    }

    #[test]
    fn rms_norm_and_its_gradients_equal_the_definition() {
        for (rows, width) in [(1, 1), (3, 15), (130, 18), (2, 67)] {
            let (x, d_out, weight) =
                (numbers(rows * width, 0.5), numbers(rows * width, 9.0), numbers(width, 2.0));
            let mut out = vec![0.0; x.len()];
            rms_norm(&x, &weight, 1e-5, &mut out);
            let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; width]);
            rms_norm_backward(&x, &weight, 1e-5, &d_out, &mut d_x, Some(&mut d_w));
            let (y, w, d) = (wide(&x), wide(&weight), wide(&d_out));
            let total: f64 = wide(&out).iter().zip(&d).map(|(o, d)| o * d).sum();
            assert!((total - objective(&y, &w, None, &d, 1e-5)).abs() < 1e-3);
            for j in 0..width {
                let numeric = |v: &[f64], at: usize, of_weight: bool| {
                    slope(|h| {
                        let mut v = v.to_vec();
                        v[at] += h;
                        if of_weight {
                            objective(&y, &v, None, &d, 1e-5)
                        } else {
                            objective(&v, &w, None, &d, 1e-5)
                        }
                    })
                };
                let expected = numeric(&y, j, false);
                assert!((f64::from(d_x[j]) - expected).abs() < 1e-3 * (1.0 + expected.abs()));
                let expected = numeric(&w, j, true);
                assert!((f64::from(d_w[j]) - expected).abs() < 1e-3 * (1.0 + expected.abs()));
            }
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() {
        let (x, d_out, weight) = (numbers(500 * 48, 0.0), numbers(500 * 48, 1.0), numbers(48, 2.0));
        let run = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
            let (mut d_x, mut d_w, mut d_b) = (vec![0.0; x.len()], vec![0.0; 48], vec![0.0; 48]);
            pool.install(|| {
                layer_norm_backward(&x, None, &weight, 1e-5, &d_out, &mut d_x, &mut d_w, &mut d_b)
            });
            (d_x, d_w, d_b)
        };
        assert_eq!(run(1), run(3));
    }
}
