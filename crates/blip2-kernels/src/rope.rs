//! Rotary position embedding with half-split pairs.

use rayon::prelude::*;

/// Rotates the pairs `(i, i + head_dim / 2)` of each head by `position * base^(-2 i / head_dim)`.
///
/// `x` and `out` are `[positions.len(), n_heads * head_dim]`; `inverse` rotates back, which is the gradient.
///
/// # Panics
/// When the lengths do not fit or `head_dim` is odd.
pub fn rope(
    x: &[f32],
    positions: &[u32],
    n_heads: usize,
    head_dim: usize,
    base: f32,
    inverse: bool,
    out: &mut [f32],
) {
    let width = n_heads * head_dim;
    assert!(head_dim.is_multiple_of(2), "a head of odd width has no pairs");
    assert!(
        x.len() == positions.len() * width && out.len() == x.len(),
        "x must be [positions, heads * width]"
    );
    if width == 0 {
        return;
    }
    let half = head_dim / 2;
    // Angles in double precision: a position of thousands leaves f32 few digits after the point.
    let frequencies: Vec<f64> =
        (0..half).map(|i| f64::from(base).powf(-2.0 * i as f64 / head_dim as f64)).collect();
    let rows = x.par_chunks_exact(width).zip(out.par_chunks_exact_mut(width)).zip(positions);
    rows.with_min_len(8).for_each(|((x, out), &position)| {
        let rotations: Vec<(f32, f32)> = frequencies
            .iter()
            .map(|frequency| {
                let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                (if inverse { -sin as f32 } else { sin as f32 }, cos as f32)
            })
            .collect();
        for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
            for (i, (sin, cos)) in rotations.iter().enumerate() {
                let (a, b) = (x[i], x[i + half]);
                out[i] = a * cos - b * sin;
                out[i + half] = b * cos + a * sin;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_near, numbers};

    #[test]
    fn every_width_of_a_head_is_rotated_in_pairs() {
        for head_dim in (2..=70).step_by(2).chain([80, 88, 128]) {
            let (n_heads, positions) = (3, [0, 7, 4000]);
            let x = numbers(3 * n_heads * head_dim, 1).with(n_heads * head_dim + 1, f32::NAN);
            let mut out = vec![0.0; x.len()];
            rope(&x, &positions, n_heads, head_dim, 1e4, false, &mut out);
            let expected: Vec<f64> = (0..x.len())
                .map(|at| {
                    let (row, i) = (at / (n_heads * head_dim), at % head_dim);
                    let half = head_dim / 2;
                    let angle =
                        f64::from(positions[row]) * 1e4f64.powf(-2.0 * (i % half) as f64 / head_dim as f64);
                    let (a, other) = (f64::from(x[at]), if i < half { at + half } else { at - half });
                    let b = f64::from(x[other]) * if i < half { -1.0 } else { 1.0 };
                    a * angle.cos() + b * angle.sin()
                })
                .collect();
            assert_near(&out, &expected, 1e-6, head_dim);
        }
    }

    #[test]
    fn rotates_by_the_position_and_back() {
        let x: Vec<f32> = (0..16).map(|i| (i as f32).cos()).collect();
        let mut out = vec![0.0; 16];
        rope(&x, &[0, 3], 2, 4, 100.0, false, &mut out);
        assert_eq!(out[..8], x[..8], "position 0 is not rotated");
        // Second row, first head: angles 3 and 3 / 10.
        for (i, angle) in [(0, 3.0f32), (1, 0.3)] {
            let (a, b) = (x[8 + i], x[10 + i]);
            assert!((out[8 + i] - (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
            assert!((out[10 + i] - (b * angle.cos() + a * angle.sin())).abs() < 1e-6);
        }
        let mut back = vec![0.0; 16];
        rope(&out, &[0, 3], 2, 4, 100.0, true, &mut back);
        assert!(back.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
