//! Elementwise nonlinearities and their gradients.
//!
//! The exact GELU and its two approximations are different functions with different names.

use rayon::prelude::*;

use crate::buffer::{fill, in_chunks, one_in_chunks};
use crate::isa::{Isa, with_isa};
use crate::lanes::{erf, exp, sigmoid};

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
        Activation::Relu => x.max(0.0),
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
            0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * DENSITY * exp(-0.5 * x * x)
        }
        Activation::GeluTanh => {
            let s = sigmoid(2.0 * TANH_SCALE * (x + 0.044_715 * x * x * x));
            gated(s, 2.0 * TANH_SCALE * (1.0 + 3.0 * 0.044_715 * x * x))
        }
        Activation::QuickGelu => gated(sigmoid(1.702 * x), 1.702),
        Activation::Silu => gated(sigmoid(x), 1.0),
    }
}

/// Calls `$f` with the activation as a constant, so that each loop is compiled for its own.
macro_rules! for_each_activation {
    ($activation:expr, $a:ident => $body:expr) => {
        match $activation {
            Activation::Identity => {
                const $a: Activation = Activation::Identity;
                $body
            }
            Activation::Relu => {
                const $a: Activation = Activation::Relu;
                $body
            }
            Activation::Relu6 => {
                const $a: Activation = Activation::Relu6;
                $body
            }
            Activation::GeluErf => {
                const $a: Activation = Activation::GeluErf;
                $body
            }
            Activation::GeluTanh => {
                const $a: Activation = Activation::GeluTanh;
                $body
            }
            Activation::QuickGelu => {
                const $a: Activation = Activation::QuickGelu;
                $body
            }
            Activation::Silu => {
                const $a: Activation = Activation::Silu;
                $body
            }
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
