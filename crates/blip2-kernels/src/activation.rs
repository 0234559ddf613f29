//! Elementwise nonlinearities and their gradients.
//!
//! The exact GELU and its two approximations are different functions with different names.

use rayon::prelude::*;

use crate::buffer::{fill, in_chunks, one_in_chunks};
use crate::isa::{Isa, with_isa};
use crate::lanes::{erf, exp_of_negative, sigmoid};

/// A nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x`.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x Φ(x)`, exact.
    GeluErf,
    /// The tanh approximation of GELU (`gelu_new`).
    GeluTanh,
    /// `x sigmoid(1.702 x)`, as CLIP uses it.
    QuickGelu,
    /// `x sigmoid(x)`.
    Silu,
}

/// Elements a task works on: large enough to outweigh handing it out.
const CHUNK: usize = 1 << 14;

/// `sqrt(2 / pi)`.
const TANH_SCALE: f32 = 0.797_884_6;

#[inline(always)]
fn value(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Identity => x,
        // Not `max`, which would make a zero of what is not a number.
        Activation::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::GeluErf => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        // 1 + tanh(u) = 2 sigmoid(2 u)
        Activation::GeluTanh => x * sigmoid(2.0 * TANH_SCALE * (x + 0.044_715 * x * x * x)),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Silu => x * sigmoid(x),
    }
}

#[inline(always)]
fn derivative(x: f32, activation: Activation) -> f32 {
    let gated = |s: f32, inner: f32| s + x * s * (1.0 - s) * inner;
    match activation {
        Activation::Identity => 1.0,
        Activation::Relu => f32::from(u8::from(x > 0.0)),
        Activation::Relu6 => f32::from(u8::from(x > 0.0 && x < 6.0)),
        Activation::GeluErf => {
            const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
            0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
                + x * DENSITY * exp_of_negative(-0.5 * x * x)
        }
        Activation::GeluTanh => {
            let s = sigmoid(2.0 * TANH_SCALE * (x + 0.044_715 * x * x * x));
            gated(s, 2.0 * TANH_SCALE * (1.0 + 3.0 * 0.044_715 * x * x))
        }
        Activation::QuickGelu => gated(sigmoid(1.702 * x), 1.702),
        Activation::Silu => gated(sigmoid(x), 1.0),
    }
}

/// Evaluates `$body` with the activation as the constant `$a`, so that each loop is compiled for its own.
macro_rules! for_each_activation {
    ($activation:expr, $a:ident => $body:expr) => {
        for_each_activation!($activation, $a => $body; Identity Relu Relu6 GeluErf GeluTanh QuickGelu Silu)
    };
    ($activation:expr, $a:ident => $body:expr; $($name:ident)*) => {
        match $activation {
            $(Activation::$name => {
                const $a: Activation = Activation::$name;
                $body
            })*
        }
    };
}

/// `activation(x)`.
pub fn activate(x: &[f32], activation: Activation) -> Vec<f32> {
    let isa = Isa::detect();
    one_in_chunks(x.len(), CHUNK, |start, out| {
        let x = &x[start..][..out.len()];
        with_isa(
            isa,
            #[inline(always)]
            || for_each_activation!(activation, A => fill(out, #[inline(always)] |i| value(x[i], A))),
        )
    })
}

/// `x = activation(x)`.
pub(crate) fn activate_in_place(x: &mut [f32], activation: Activation) {
    if activation == Activation::Identity {
        return;
    }
    let isa = Isa::detect();
    x.par_chunks_mut(CHUNK).for_each(|x| {
        with_isa(
            isa,
            #[inline(always)]
            || activate_few(x, activation),
        );
    });
}

/// `x = activation(x)` inside `with_isa`, on this thread.
#[inline(always)]
pub(crate) fn activate_few(x: &mut [f32], activation: Activation) {
    for_each_activation!(activation, A => x.iter_mut().for_each(|x| *x = value(*x, A)));
}

/// `activation'(x) d_out`, the gradient of [`activate`].
///
/// # Panics
/// When the lengths differ.
pub fn activate_backward(x: &[f32], activation: Activation, d_out: &[f32]) -> Vec<f32> {
    assert_eq!(x.len(), d_out.len(), "lengths differ");
    let isa = Isa::detect();
    one_in_chunks(x.len(), CHUNK, |start, d_x| {
        let (x, d_out) = (&x[start..][..d_x.len()], &d_out[start..][..d_x.len()]);
        with_isa(
            isa,
            #[inline(always)]
            || for_each_activation!(activation, A => fill(d_x, #[inline(always)] |i| derivative(x[i], A) * d_out[i])),
        )
    })
}

/// `activation(gate) * up`.
///
/// # Panics
/// When the lengths differ.
pub fn gated(gate: &[f32], up: &[f32], activation: Activation) -> Vec<f32> {
    assert_eq!(gate.len(), up.len(), "lengths differ");
    let isa = Isa::detect();
    one_in_chunks(gate.len(), CHUNK, |start, out| {
        let (gate, up) = (&gate[start..][..out.len()], &up[start..][..out.len()]);
        with_isa(
            isa,
            #[inline(always)]
            || for_each_activation!(activation, A => fill(out, #[inline(always)] |i| value(gate[i], A) * up[i])),
        )
    })
}

/// The gradients of [`gated`]: of `gate`, and of `up`.
///
/// # Panics
/// When the lengths differ.
pub fn gated_backward(
    gate: &[f32],
    up: &[f32],
    activation: Activation,
    d_out: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    assert!(up.len() == gate.len() && d_out.len() == gate.len(), "lengths differ");
    let isa = Isa::detect();
    let ([d_gate, d_up], _) = in_chunks(gate.len(), CHUNK, |start, [d_gate, d_up]| {
        let n = d_gate.len();
        let (gate, up, d_out) = (&gate[start..][..n], &up[start..][..n], &d_out[start..][..n]);
        with_isa(
            isa,
            #[inline(always)]
            || {
                for_each_activation!(activation, A => {
                    let d_gate = fill(d_gate, #[inline(always)] |i| derivative(gate[i], A) * up[i] * d_out[i]);
                    ([d_gate, fill(d_up, #[inline(always)] |i| value(gate[i], A) * d_out[i])], ())
                })
            },
        )
    });
    (d_gate, d_up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TAILS, WIDTHS, assert_near, numbers};

    const ALL: [Activation; 7] = [
        Activation::Identity,
        Activation::Relu,
        Activation::Relu6,
        Activation::GeluErf,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Silu,
    ];

    #[test]
    fn values_are_those_of_pytorch() {
        // torch.nn.functional at x = -1.5 and 0.7
        let expected = [
            (Activation::Relu, 0.0, 0.7),
            (Activation::GeluErf, -0.100_210_8, 0.530_625_4),
            (Activation::GeluTanh, -0.100_428_4, 0.530_570_7),
            (Activation::Silu, -0.273_638_8, 0.467_731_6),
        ];
        for (activation, at_negative, at_positive) in expected {
            let out = activate(&[-1.5, 0.7], activation);
            assert!(
                (out[0] - at_negative).abs() < 2e-6 && (out[1] - at_positive).abs() < 2e-6,
                "{activation:?} {out:?}"
            );
        }
    }

    /// In double precision; the error function by its series, or by its continued fraction where that is faster.
    fn reference(x: f64, activation: Activation) -> f64 {
        let erf = |x: f64| {
            if x.abs() > 3.0 {
                let fraction = (1..60).rev().fold(0.0, |below, k| f64::from(k) / 2.0 / (x.abs() + below));
                let tail = (-x * x).exp() / (x.abs() + fraction) / std::f64::consts::PI.sqrt();
                return (1.0 - tail).copysign(x);
            }
            let (mut term, mut sum) = (x, x);
            for n in 1..100 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match activation {
            Activation::Identity => x,
            Activation::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Activation::Relu6 => x.clamp(0.0, 6.0),
            Activation::GeluErf => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
            }
            Activation::QuickGelu => x * sigmoid(1.702 * x),
            Activation::Silu => x * sigmoid(x),
        }
    }

    #[test]
    fn values_equal_the_reference_for_every_tail_and_width() {
        for n in TAILS.chain(WIDTHS) {
            let x = numbers(n, 1).times(9.0);
            for activation in ALL {
                let expected: Vec<f64> = x.iter().map(|&x| reference(f64::from(x), activation)).collect();
                assert_near(&activate(&x, activation), &expected, 2e-6, (activation, n));
                let up = numbers(n, 2);
                let expected: Vec<f64> = expected.iter().zip(&*up).map(|(a, u)| a * f64::from(*u)).collect();
                assert_near(&gated(&x, &up, activation), &expected, 2e-6, (activation, n));
                let d_out = numbers(n, 3);
                let d_x = activate_backward(&x, activation, &d_out);
                let (d_gate, d_up) = gated_backward(&x, &up, activation, &d_out);
                for i in 0..n {
                    assert!((d_gate[i] - d_x[i] * up[i]).abs() < 1e-5, "{activation:?} {n} {i}");
                    let a = reference(f64::from(x[i]), activation);
                    assert!(
                        (f64::from(d_up[i]) - a * f64::from(d_out[i])).abs() < 2e-5,
                        "{activation:?} {n} {i}"
                    );
                }
            }
        }
    }

    #[test]
    fn not_a_number_stays_and_infinity_has_its_limit() {
        for at in [0, 16, 36] {
            for activation in ALL {
                let clean = activate(&numbers(37, 1), activation);
                for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let out = activate(&numbers(37, 1).with(at, special), activation);
                    for (i, (out, clean)) in out.iter().zip(&clean).enumerate() {
                        if i != at {
                            assert_eq!(out, clean, "{activation:?} {special} {i}");
                        }
                    }
                    let limit = match (activation, special) {
                        (_, x) if x.is_nan() => f32::NAN,
                        (Activation::Identity, x) => x,
                        (Activation::Relu6, f32::INFINITY) => 6.0,
                        (_, f32::INFINITY) => f32::INFINITY,
                        (Activation::Relu | Activation::Relu6, _) => 0.0,
                        // An infinity times zero, as in PyTorch.
                        _ => f32::NAN,
                    };
                    let found = out[at];
                    assert!(
                        found == limit || found.is_nan() && limit.is_nan(),
                        "{activation:?}({special}): {found}, not {limit}"
                    );
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let x: Vec<f32> = (0..67).map(|i| (i as f32 - 33.0) * 0.21 + 0.013).collect();
        let (h, ones) = (1e-2f32, vec![1.0; 67]);
        for activation in ALL {
            let shifted = |by: f32| activate(&x.iter().map(|x| x + by).collect::<Vec<_>>(), activation);
            let (above, below) = (shifted(h), shifted(-h));
            let d_x = activate_backward(&x, activation, &ones);
            for i in 0..67 {
                let kink = |at: f32| (x[i] - at).abs() < 2.0 * h;
                if matches!(activation, Activation::Relu | Activation::Relu6) && (kink(0.0) || kink(6.0)) {
                    continue;
                }
                let slope = (above[i] - below[i]) / (2.0 * h);
                assert!((slope - d_x[i]).abs() < 2e-3, "{activation:?} at {}: {slope} {}", x[i], d_x[i]);
            }
        }
    }

    #[test]
    fn the_gated_unit_is_the_product() {
        let (gate, up, d_out) = (vec![0.3; 40], vec![-2.0; 40], vec![0.5; 40]);
        let out = gated(&gate, &up, Activation::Silu);
        let a = activate(&gate, Activation::Silu);
        let d_a = activate_backward(&gate, Activation::Silu, &d_out);
        let (d_gate, d_up) = gated_backward(&gate, &up, Activation::Silu, &d_out);
        assert!((out[39] - a[39] * -2.0).abs() < 1e-6);
        assert!((d_gate[39] - d_a[39] * -2.0).abs() < 1e-6);
        assert!((d_up[39] - a[39] * 0.5).abs() < 1e-6);
    }
}
