//! Convolutions in NHWC: depthwise, and the rearrangement that makes any other one a matrix product.

use rayon::prelude::*;

use crate::activation::{Activation, activate_in_place};
use crate::isa::{Isa, with_isa};

/// Sizes of a convolution over a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvDims {
    /// Input rows.
    pub height: usize,
    /// Input columns.
    pub width: usize,
    /// Input channels.
    pub channels: usize,
    /// Side of the square kernel.
    pub kernel: usize,
    /// Step of the kernel.
    pub stride: usize,
    /// Zero rows above the picture.
    pub pad_top: usize,
    /// Zero columns left of the picture.
    pub pad_left: usize,
    /// Output rows.
    pub out_height: usize,
    /// Output columns.
    pub out_width: usize,
}

impl ConvDims {
    /// TensorFlow's "SAME": the output is `ceil(input / stride)`, the odd zero goes to the bottom and right.
    pub fn same(height: usize, width: usize, channels: usize, kernel: usize, stride: usize) -> Self {
        let (out_height, out_width) = (height.div_ceil(stride), width.div_ceil(stride));
        let pad = |out: usize, size: usize| ((out - 1) * stride + kernel).saturating_sub(size) / 2;
        let (pad_top, pad_left) = (pad(out_height, height), pad(out_width, width));
        Self { height, width, channels, kernel, stride, pad_top, pad_left, out_height, out_width }
    }

    fn input_len(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// The input position of kernel cell `(ky, kx)` for output `(y, x)`, unless it falls on padding.
    #[inline(always)]
    fn source(&self, y: usize, x: usize, ky: usize, kx: usize) -> Option<usize> {
        let row = (y * self.stride + ky).checked_sub(self.pad_top).filter(|&row| row < self.height)?;
        let column =
            (x * self.stride + kx).checked_sub(self.pad_left).filter(|&column| column < self.width)?;
        Some(row * self.width + column)
    }
}

/// Convolves each channel with its own kernel.
///
/// # Shapes
/// - `x`: `[height, width, channels]`
/// - `weight`: `[kernel, kernel, channels]`, `bias`: `[channels]`
/// - `out`: `[out_height, out_width, channels]`
///
/// # Panics
/// When the lengths do not fit.
pub fn depthwise_conv2d(
    x: &[f32],
    dims: ConvDims,
    weight: &[f32],
    bias: &[f32],
    activation: Activation,
    out: &mut [f32],
) {
    let c = dims.channels;
    assert_eq!(x.len(), dims.input_len(), "x must be [height, width, channels]");
    assert!(weight.len() == dims.kernel * dims.kernel * c && bias.len() == c, "weight or bias do not fit");
    let row_len = dims.out_width * c;
    assert_eq!(out.len(), dims.out_height * row_len, "out does not fit");
    let isa = Isa::detect();
    out.par_chunks_exact_mut(row_len.max(1)).enumerate().for_each(|(y, out)| {
        with_isa(
            isa,
            #[inline(always)]
            || {
                for (column, out) in out.chunks_exact_mut(c).enumerate() {
                    out.copy_from_slice(bias);
                    for ky in 0..dims.kernel {
                        for kx in 0..dims.kernel {
                            let Some(source) = dims.source(y, column, ky, kx) else { continue };
                            let (x, w) = (&x[source * c..][..c], &weight[(ky * dims.kernel + kx) * c..][..c]);
                            for i in 0..c {
                                out[i] += x[i] * w[i];
                            }
                        }
                    }
                }
            },
        );
    });
    if activation != Activation::Identity {
        activate_in_place(out, activation);
    }
}

/// Lays out, for each output position, the inputs under the kernel, so that a convolution is a matrix product.
///
/// # Shapes
/// - `x`: `[height, width, channels]`
/// - `out`: `[out_height * out_width, kernel * kernel * channels]`
///
/// # Panics
/// When the lengths do not fit.
pub fn im2col(x: &[f32], dims: ConvDims, out: &mut [f32]) {
    let c = dims.channels;
    let patch = dims.kernel * dims.kernel * c;
    assert_eq!(x.len(), dims.input_len(), "x must be [height, width, channels]");
    assert_eq!(out.len(), dims.out_height * dims.out_width * patch, "out does not fit");
    out.par_chunks_exact_mut((dims.out_width * patch).max(1)).enumerate().for_each(|(y, out)| {
        for (column, out) in out.chunks_exact_mut(patch).enumerate() {
            for (cell, out) in out.chunks_exact_mut(c).enumerate() {
                match dims.source(y, column, cell / dims.kernel, cell % dims.kernel) {
                    Some(source) => out.copy_from_slice(&x[source * c..][..c]),
                    None => out.fill(0.0),
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TAILS, assert_near, numbers};

    #[test]
    fn every_number_of_channels_is_convolved() {
        for c in TAILS.chain([96, 240, 672, 1152]) {
            let dims = ConvDims::same(3, 2, c, 3, 1);
            let x = numbers(6 * c, 1).with(c - 1, f32::NAN);
            let (weight, bias) = (numbers(9 * c, 2), numbers(c, 3));
            let mut out = vec![0.0; 6 * c];
            depthwise_conv2d(&x, dims, &weight, &bias, Activation::Identity, &mut out);
            let expected: Vec<f64> = (0..6 * c)
                .map(|at| {
                    let (y, column, ch) = (at / (2 * c), at / c % 2, at % c);
                    let cells = (0..9).filter_map(|cell| {
                        let (row, column) =
                            ((y + cell / 3).checked_sub(1)?, (column + cell % 3).checked_sub(1)?);
                        let inside = row < 3 && column < 2;
                        inside.then(|| {
                            f64::from(x[(row * 2 + column) * c + ch]) * f64::from(weight[cell * c + ch])
                        })
                    });
                    f64::from(bias[ch]) + cells.sum::<f64>()
                })
                .collect();
            assert_near(&out, &expected, 1e-5, c);
        }
    }

    #[test]
    fn depthwise_equals_the_definition_for_every_stride_and_padding() {
        for (height, width, kernel, stride) in
            [(5, 7, 3, 1), (6, 4, 3, 2), (9, 9, 5, 2), (1, 1, 5, 1), (8, 8, 5, 1)]
        {
            let c = 19;
            let dims = ConvDims::same(height, width, c, kernel, stride);
            let number = |i: usize| (i as f32 * 0.77).sin();
            let x: Vec<f32> = (0..dims.input_len()).map(number).collect();
            let weight: Vec<f32> = (0..kernel * kernel * c).map(|i| number(i + 5)).collect();
            let bias: Vec<f32> = (0..c).map(|i| number(i + 9)).collect();
            let mut out = vec![0.0; dims.out_height * dims.out_width * c];
            depthwise_conv2d(&x, dims, &weight, &bias, Activation::Relu6, &mut out);
            let mut columns = vec![0.0; dims.out_height * dims.out_width * kernel * kernel * c];
            im2col(&x, dims, &mut columns);
            let total_pad = ((dims.out_height - 1) * stride + kernel).saturating_sub(height);
            assert_eq!(dims.pad_top, total_pad / 2, "the odd zero goes below");
            for (position, out) in out.chunks(c).enumerate() {
                let (y, x_out) = (position / dims.out_width, position % dims.out_width);
                for ch in 0..c {
                    let mut expected = f64::from(bias[ch]);
                    for cell in 0..kernel * kernel {
                        let row = (y * stride + cell / kernel) as isize - dims.pad_top as isize;
                        let column = (x_out * stride + cell % kernel) as isize - dims.pad_left as isize;
                        let inside =
                            row >= 0 && column >= 0 && (row as usize) < height && (column as usize) < width;
                        let value =
                            if inside { x[(row as usize * width + column as usize) * c + ch] } else { 0.0 };
                        assert_eq!(columns[(position * kernel * kernel + cell) * c + ch], value);
                        expected += f64::from(value) * f64::from(weight[cell * c + ch]);
                    }
                    assert!((f64::from(out[ch]) - expected.clamp(0.0, 6.0)).abs() < 1e-4);
                }
            }
        }
    }
}
