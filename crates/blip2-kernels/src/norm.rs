//! Layer norm and RMS norm with their gradients.

use crate::buffer::{Unwritten, fill, in_chunks, one_in_chunks};
use crate::isa::{Isa, with_isa};
use crate::lanes::{sum, sum_by};

/// Rows a task works on; weight gradients are summed over such chunks in order, whatever the number of threads.
const ROWS_A_TASK: usize = 64;

/// `(y - mean) / sqrt(variance + eps) * weight + bias` with `y = x + residual`, over rows of `weight.len()`.
///
/// # Panics
/// When the lengths do not fit.
pub fn layer_norm(x: &[f32], residual: Option<&[f32]>, weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    check(x.len(), width, &[residual.map_or(x.len(), <[f32]>::len)]);
    assert_eq!(bias.len(), width, "weight and bias differ in length");
    let isa = Isa::detect();
    one_in_chunks(x.len(), ROWS_A_TASK * width, |start, out| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                let out = add(x, residual, start, out);
                for out in out.chunks_exact_mut(width) {
                    let (mean, scale) = statistics(out, eps);
                    for j in 0..width {
                        out[j] = (out[j] - mean) * scale * weight[j] + bias[j];
                    }
                }
                out
            },
        )
    })
}

/// The gradients of [`layer_norm`]: of `x`, which is the residual's too, of the weight and of the bias.
///
/// # Panics
/// When the lengths do not fit.
pub fn layer_norm_backward(
    x: &[f32],
    residual: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    d_out: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let width = weight.len();
    check(x.len(), width, &[d_out.len(), residual.map_or(x.len(), <[f32]>::len)]);
    let isa = Isa::detect();
    let ([d_x], sums) = in_chunks(x.len(), ROWS_A_TASK * width, |start, [d_x]| {
        let (mut d_weight, mut d_bias) = (vec![0.0; width], vec![0.0; width]);
        with_isa(
            isa,
            #[inline(always)]
            || {
                let d_x = add(x, residual, start, d_x);
                let d_out = &d_out[start..][..d_x.len()];
                for (d_x, d_out) in d_x.chunks_exact_mut(width).zip(d_out.chunks_exact(width)) {
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
                ([d_x], (d_weight, d_bias))
            },
        )
    });
    let (mut d_weight, mut d_bias) = (vec![0.0; width], vec![0.0; width]);
    for (w, b) in sums {
        d_weight.iter_mut().zip(w).for_each(|(sum, w)| *sum += w);
        d_bias.iter_mut().zip(b).for_each(|(sum, b)| *sum += b);
    }
    (d_x, d_weight, d_bias)
}

/// `x / sqrt(mean(x²) + eps) * weight`, over rows of `weight.len()`.
///
/// # Panics
/// When the lengths do not fit.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    check(x.len(), width, &[]);
    let isa = Isa::detect();
    one_in_chunks(x.len(), ROWS_A_TASK * width, |start, out| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                let out = add(x, None, start, out);
                for out in out.chunks_exact_mut(width) {
                    let scale = 1.0 / (sum_by(width, |j| out[j] * out[j]) / width as f32 + eps).sqrt();
                    for j in 0..width {
                        out[j] = out[j] * scale * weight[j];
                    }
                }
                out
            },
        )
    })
}

/// The gradients of [`rms_norm`]: of `x`, and of the weight where that is asked for.
///
/// # Panics
/// When the lengths do not fit.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    d_out: &[f32],
    wants_weight: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let width = weight.len();
    check(x.len(), width, &[d_out.len()]);
    let isa = Isa::detect();
    let ([d_x], sums) = in_chunks(x.len(), ROWS_A_TASK * width, |start, [d_x]| {
        let mut d_weight = vec![0.0; if wants_weight { width } else { 0 }];
        with_isa(
            isa,
            #[inline(always)]
            || {
                let d_x = add(x, None, start, d_x);
                let d_out = &d_out[start..][..d_x.len()];
                for (d_x, d_out) in d_x.chunks_exact_mut(width).zip(d_out.chunks_exact(width)) {
                    let scale = 1.0 / (sum_by(width, |j| d_x[j] * d_x[j]) / width as f32 + eps).sqrt();
                    let mean = sum_by(width, |j| d_out[j] * weight[j] * d_x[j]) / width as f32;
                    for (j, sum) in d_weight.iter_mut().enumerate() {
                        *sum += d_out[j] * d_x[j] * scale;
                    }
                    for j in 0..width {
                        d_x[j] = scale * (d_out[j] * weight[j] - d_x[j] * scale * scale * mean);
                    }
                }
                ([d_x], d_weight)
            },
        )
    });
    let d_weight = wants_weight.then(|| {
        let mut d_weight = vec![0.0; width];
        for w in sums {
            d_weight.iter_mut().zip(w).for_each(|(sum, w)| *sum += w);
        }
        d_weight
    });
    (d_x, d_weight)
}

fn check(len: usize, width: usize, others: &[usize]) {
    assert!(width > 0 && len.is_multiple_of(width), "{len} elements are no rows of {width}");
    assert!(others.iter().all(|&other| other == len), "lengths differ");
}

/// Writes the rows of `x + residual` that begin at element `start`.
#[inline(always)]
fn add<'a>(x: &[f32], residual: Option<&[f32]>, start: usize, out: &'a mut Unwritten) -> &'a mut [f32] {
    let x = &x[start..][..out.len()];
    match residual {
        Some(residual) => {
            let residual = &residual[start..][..out.len()];
            fill(
                out,
                #[inline(always)]
                |i| x[i] + residual[i],
            )
        }
        None => fill(
            out,
            #[inline(always)]
            |i| x[i],
        ),
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
    use crate::testing::{TAILS, WIDTHS, assert_near, numbers as random};

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
            let out = layer_norm(&x, Some(&residual), &weight, &bias, 1e-5);
            let (d_x, d_w, d_b) = layer_norm_backward(&x, Some(&residual), &weight, 1e-5, &d_out);
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
            let out = rms_norm(&x, &weight, 1e-5);
            let (d_x, d_w) = rms_norm_backward(&x, &weight, 1e-5, &d_out, true);
            let d_w = d_w.expect("it was asked for");
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
    fn norms_equal_the_definition_for_every_tail_and_width() {
        for width in TAILS.chain(WIDTHS) {
            let rows = if width > 3000 { 2 } else { 3 };
            let (x, residual) = (random(rows * width, 1), random(rows * width, 2));
            let (weight, bias, d_out) = (random(width, 3), random(width, 4), random(rows * width, 5));
            let (mut layer, mut rms) = (Vec::new(), Vec::new());
            for (x, residual) in x.chunks_exact(width).zip(residual.chunks_exact(width)) {
                let y: Vec<f64> = wide(x).iter().zip(wide(residual)).map(|(x, r)| x + r).collect();
                let mean = y.iter().sum::<f64>() / width as f64;
                let variance = y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / width as f64;
                let square = wide(x).iter().map(|x| x * x).sum::<f64>() / width as f64;
                for j in 0..width {
                    let (w, b) = (f64::from(weight[j]), f64::from(bias[j]));
                    layer.push((y[j] - mean) / (variance + 1e-3).sqrt() * w + b);
                    rms.push(f64::from(x[j]) / (square + 1e-3).sqrt() * w);
                }
            }
            assert_near(&layer_norm(&x, Some(&residual), &weight, &bias, 1e-3), &layer, 2e-5, width);
            assert_near(&rms_norm(&x, &weight, 1e-3), &rms, 1e-5, width);
            // A gradient is a slope: along the gradient's own direction the sum of squares.
            let (d_x, d_w, d_b) = layer_norm_backward(&x, Some(&residual), &weight, 1e-3, &d_out);
            let (d_rms, d_w_rms) = rms_norm_backward(&x, &weight, 1e-3, &d_out, true);
            let d_w_rms = d_w_rms.expect("it was asked for");
            let (y, w, b, d) = (
                wide(&x).iter().zip(wide(&residual)).map(|(x, r)| x + r).collect::<Vec<_>>(),
                wide(&weight),
                wide(&bias),
                wide(&d_out),
            );
            let along = |x: &[f64], direction: &[f32], h: f64| -> Vec<f64> {
                x.iter().zip(direction).map(|(x, d)| x + h * f64::from(*d)).collect()
            };
            for (name, gradient, slope) in [
                ("x", &d_x, slope(|h| objective(&along(&y, &d_x, h), &w, Some(&b), &d, 1e-3))),
                ("weight", &d_w, slope(|h| objective(&y, &along(&w, &d_w, h), Some(&b), &d, 1e-3))),
                ("bias", &d_b, slope(|h| objective(&y, &w, Some(&along(&b, &d_b, h)), &d, 1e-3))),
                ("x of RMS", &d_rms, slope(|h| objective(&along(&wide(&x), &d_rms, h), &w, None, &d, 1e-3))),
                (
                    "weight of RMS",
                    &d_w_rms,
                    slope(|h| objective(&wide(&x), &along(&w, &d_w_rms, h), None, &d, 1e-3)),
                ),
            ] {
                let squares: f64 = wide(gradient).iter().map(|g| g * g).sum();
                assert!(
                    (squares - slope).abs() < 1e-4 * (1.0 + slope.abs()),
                    "{name} {width}: {squares} {slope}"
                );
            }
        }
    }

    #[test]
    fn a_row_that_is_not_finite_spoils_no_other() {
        let (width, weight) = (37, random(37, 3));
        let clean = random(3 * width, 1);
        let expected = (layer_norm(&clean, None, &weight, &weight, 1e-5), rms_norm(&clean, &weight, 1e-5));
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let x = random(3 * width, 1).with(width + 36, special);
            let found = (layer_norm(&x, None, &weight, &weight, 1e-5), rms_norm(&x, &weight, 1e-5));
            for (found, expected) in [(found.0, &expected.0), (found.1, &expected.1)] {
                assert!(found[width + 36].is_nan(), "{special}");
                assert_eq!(found[..width], expected[..width]);
                assert_eq!(found[2 * width..], expected[2 * width..]);
            }
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() {
        let (x, d_out, weight) = (numbers(500 * 48, 0.0), numbers(500 * 48, 1.0), numbers(48, 2.0));
        let run = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
            pool.install(|| layer_norm_backward(&x, None, &weight, 1e-5, &d_out))
        };
        assert_eq!(run(1), run(3));
    }
}
