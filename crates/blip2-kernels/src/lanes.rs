//! Reductions in a fixed order of lanes, and functions that vectorise; all `#[inline(always)]` for `with_isa`.
//!
//! Multiply-adds are fused, which is one instruction wherever there are wide registers, and so equal on all instruction sets.
//! Processors without it pay with a function call; they are older than AVX2.

pub(crate) const LANES: usize = 16;

#[inline(always)]
fn fold(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of `f(i)` over `0..n`.
#[inline(always)]
pub(crate) fn sum_by(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = n / LANES * LANES;
    let mut start = 0;
    while start < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
        start += LANES;
    }
    for i in whole..n {
        lanes[i - whole] += f(i);
    }
    fold(lanes, |a, b| a + b)
}

/// The sum of a slice.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, x) in lanes.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    for (sum, x) in lanes.iter_mut().zip(rest) {
        *sum += x;
    }
    fold(lanes, |a, b| a + b)
}

/// The dot product of two slices of one length.
#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in xs.iter().zip(ys) {
        for i in 0..LANES {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    for (i, (x, y)) in x_rest.iter().zip(y_rest).enumerate() {
        lanes[i] = x.mul_add(*y, lanes[i]);
    }
    fold(lanes, |a, b| a + b)
}

/// The largest element, or NaN where there is one; `-inf` for none.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let keep_nan = |a: f32, b: f32| if a > b || a.is_nan() { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (max, &x) in lanes.iter_mut().zip(chunk) {
            *max = keep_nan(*max, x);
        }
    }
    for (max, &x) in lanes.iter_mut().zip(rest) {
        *max = keep_nan(*max, x);
    }
    fold(lanes, keep_nan)
}

/// `y += a * x`.
#[inline(always)]
pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(a, *y);
    }
}

/// 1.5 * 2^23: adding it to a number below 2^22 rounds that to the nearest integer, which then stands in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// The nearest integer to `x`, ties to even; any number where `x` is not below 2^22 in magnitude.
#[inline(always)]
pub(crate) fn round(x: f32) -> i32 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32
}

/// What `e^x` is made of: `value * 2^n`. Where `x` is so large or small that there is no such `n`, it is any number.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, i32) {
    // Cody-Waite reduction and the minimax polynomial of Cephes' expf.
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let whole = rounded - ROUND;
    let r = whole.mul_add(2.121_944_4e-4, whole.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_6e-1);
    p = p.mul_add(r, 5e-1);
    ((p * r).mul_add(r, r) + 1.0, n)
}

/// `2^n` for -126 to 127; any number for others.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32).wrapping_shl(23))
}

/// `e^x` to about 2 ulp; 0 below -87.3, infinite above 88.7, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (value, n) = exp_parts(x);
    // In two halves: n may be 128, whose power alone is infinite.
    let half = n >> 1;
    let value = value * power_of_two(half) * power_of_two(n.wrapping_sub(half));
    if x < -87.3 {
        0.0
    } else if x > 88.72 {
        f32::INFINITY
    } else {
        value
    }
}

/// [`exp`] where `x` is not above zero, or NaN.
#[inline(always)]
pub(crate) fn exp_of_negative(x: f32) -> f32 {
    let (value, n) = exp_parts(x);
    let value = value * power_of_two(n);
    if x < -87.3 { 0.0 } else { value }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `erf(x) / x` as a polynomial of `x² / 8 - 1`: a least-squares fit at 200 Chebyshev nodes, for `|x|` up to 4, beyond which the
/// function is 1 in single precision.
const ERF: [f32; 17] = [
    0.353_531,
    -0.176_576_2,
    0.131_675_26,
    -0.107_712_3,
    0.090_206_07,
    -0.074_700_09,
    0.059_907_76,
    -0.045_949_392,
    0.032_998_22,
    -0.021_833_49,
    0.014_406_954,
    -0.009_846_444,
    0.004_950_848_4,
    -0.001_246_793_5,
    0.001_024_414_7,
    -0.001_324_858_3,
    0.000_489_034_86,
];

/// The error function to 2e-7 absolute and 3e-7 relative: no division and no exponential, which take longer than all of it.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = (x * x).mul_add(0.125, -1.0);
    let mut p = ERF[16];
    for c in ERF[..16].iter().rev() {
        p = p.mul_add(s, *c);
    }
    (p * x).clamp(-1.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_ulp_and_keeps_the_special_values() {
        let mut worst = 0.0f64;
        for i in -873_000..887_200 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 3.0 * f64::from(f32::EPSILON), "{worst:e}");
        for i in -873_000..=0 {
            let x = i as f32 * 1e-4;
            assert_eq!(exp_of_negative(x).to_bits(), exp(x).to_bits(), "{x}");
        }
        for x in [-87.4, -1e4, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!((exp(x), exp_of_negative(x)), (0.0, 0.0), "{x}");
        }
        for x in [88.8, 1e4, f32::MAX] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
        assert!(exp_of_negative(f32::NAN).is_nan() && exp_of_negative(-f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_that_of_its_series() {
        // 2/√π Σ (-1)ⁿ x²ⁿ⁺¹ / (n! (2n + 1)), whose terms are up to 3e5 below 4, in f64.
        let series = |x: f64| {
            let (mut power, mut sum) = (x, 0.0);
            for n in 0..200 {
                sum += power / f64::from(2 * n + 1);
                power *= -x * x / f64::from(n + 1);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        };
        for i in 0..=40_000 {
            let x = i as f32 * 1e-4;
            let (value, expected) = (f64::from(erf(x)), series(f64::from(x)));
            let error = (value - expected).abs();
            assert!(error < 2e-7 && error <= 3e-7 * expected, "{x}: {value} {expected}");
            assert_eq!(erf(-x), -erf(x), "{x}");
        }
        for x in [4.0, 4.5, 1e20, f32::INFINITY] {
            assert_eq!((erf(x), erf(-x)), (1.0, -1.0), "{x}");
        }
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_element() {
        for n in 0..=67 {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let expected: f64 = x.iter().map(|&x| f64::from(x)).sum();
            assert!((f64::from(sum(&x)) - expected).abs() < 1e-5, "{n}");
            assert!((f64::from(sum_by(n, |i| x[i])) - expected).abs() < 1e-5, "{n}");
            let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from(dot(&x, &x)) - squares).abs() < 1e-4, "{n}");
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{n}");
        }
        assert!(max(&[1.0, f32::NAN, 2.0]).is_nan());
    }
}
