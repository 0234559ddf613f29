//! Weights that are drawn instead of read, to measure a model of a given size without its file.

use std::sync::Arc;

use blip2_kernels::linear::{Format as PlainFormat, PackedWeight};
use blip2_kernels::quantized::{Format, QuantizedWeight};

use crate::layers::{FrozenWeight, Precision, TensorSource};
use crate::splitmix::{GAMMA, mix};
use crate::{Error, Result};

/// A checkpoint that has every tensor that is asked for, in the shape that is asked for. A tensor's numbers follow from the
/// seed and its name: matrices keep the variance of what they are multiplied with, norms are near 1, biases near 0.
///
/// Large matrices are drawn row by row on their way into the format of the kernels and are never in memory as f32.
#[derive(Debug, Clone, Copy)]
pub struct RandomWeights {
    seed: u64,
}

impl RandomWeights {
    /// The weights of this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The matrix `name`, `[n_out, n_in]`, in a format of few bits, or as a checkpoint in half precision is held.
    pub(crate) fn matrix(
        self,
        name: &str,
        n_out: usize,
        n_in: usize,
        format: Option<Format>,
        precision: Precision,
    ) -> FrozenWeight {
        let stream = self.stream(name);
        let row = |i: usize, into: &mut [f32]| stream.row(i, scale(n_in), into);
        match (format, precision) {
            (Some(format), _) => {
                FrozenWeight::Quantized(Arc::new(QuantizedWeight::quantize(n_out, n_in, format, &row)))
            }
            (None, precision) => {
                let format = match precision {
                    Precision::F32 => PlainFormat::WideF16,
                    Precision::Bf16 => PlainFormat::Bf16,
                };
                FrozenWeight::Packed(Arc::new(PackedWeight::pack(n_out, n_in, format, &row)))
            }
        }
    }

    fn stream(self, name: &str) -> Stream {
        // FNV-1a tells names apart, the mixing function their streams.
        let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        Stream(mix(name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv) ^ mix(self.seed)))
    }
}

/// Half the width of the uniform distribution of a matrix's numbers: their variance is that of 1 / `n_in`.
fn scale(n_in: usize) -> f32 {
    (3.0 / n_in as f32).sqrt()
}

/// The numbers of a tensor.
#[derive(Debug, Clone, Copy)]
struct Stream(u64);

impl Stream {
    /// Row `i`, uniform from `-scale` to `scale`.
    fn row(self, i: usize, scale: f32, into: &mut [f32]) {
        let mut state = mix(self.0 ^ (i as u64).wrapping_mul(GAMMA));
        // Two numbers of 32 bits a step.
        for pair in into.chunks_mut(2) {
            state = state.wrapping_add(GAMMA);
            let bits = mix(state);
            for (value, bits) in pair.iter_mut().zip([bits as u32, (bits >> 32) as u32]) {
                *value = (bits as i32) as f32 * (scale / 2_147_483_648.0);
            }
        }
    }
}

impl TensorSource for RandomWeights {
    /// None is the right one before somebody asks.
    fn shape(&self, _: &str) -> Option<Vec<usize>> {
        None
    }

    fn check(&self, _: &str, _: &[usize]) -> Result<()> {
        Ok(())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        Err(Error::Request(format!("`{name}` is to be drawn, but in which shape?")))
    }

    fn read_shaped(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let is_vector = shape.len() < 2;
        let n_in: usize = shape.iter().skip(1).product();
        let scale = if is_vector { 0.1 } else { scale(n_in) };
        let mut values = vec![0.0; shape.iter().product()];
        let (row_len, stream) = (if is_vector { values.len() } else { n_in }, self.stream(name));
        for (i, row) in values.chunks_mut(row_len.max(1)).enumerate() {
            stream.row(i, scale, row);
        }
        // The weights of norms, and the variances of batch norms.
        if is_vector && (name.ends_with("weight") || name.ends_with("running_var")) {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_depends_on_seed_and_name_and_matrices_keep_variances() {
        let weights = RandomWeights::new(1);
        let a = weights.read_shaped("a.weight", &[200, 300]).unwrap();
        assert_eq!(a, weights.read_shaped("a.weight", &[200, 300]).unwrap());
        assert_ne!(a, weights.read_shaped("b.weight", &[200, 300]).unwrap());
        assert_ne!(a, RandomWeights::new(2).read_shaped("a.weight", &[200, 300]).unwrap());
        let variance = a.iter().map(|x| f64::from(x * x)).sum::<f64>() / a.len() as f64;
        assert!((variance * 300.0 - 1.0).abs() < 0.02, "{variance}");
        let norm = weights.read_shaped("norm.weight", &[500]).unwrap();
        assert!(norm.iter().all(|x| (0.9..=1.1).contains(x)) && norm[0] != norm[1]);
        let bias = weights.read_shaped("norm.bias", &[500]).unwrap();
        assert!(bias.iter().all(|x| x.abs() <= 0.1));
    }

    /// However it is held, it is the same matrix.
    #[test]
    fn a_matrix_is_drawn_in_every_format() {
        let (weights, n_out, n_in) = (RandomWeights::new(1), 40, 70);
        let values = weights.read_shaped("w", &[n_out, n_in]).unwrap();
        for (format, precision, tolerance) in [
            (None, Precision::F32, 1e-3),
            (None, Precision::Bf16, 1e-2),
            (Some(Format::Int8), Precision::F32, 2e-2),
            (Some(Format::Int8LongBlocks), Precision::F32, 2e-2),
            (Some(Format::Int4), Precision::F32, 2e-1),
        ] {
            let matrix = weights.matrix("w", n_out, n_in, format, precision);
            let mut row = vec![0.0; n_in];
            for (i, expected) in values.chunks(n_in).enumerate() {
                matrix.row(i, &mut row);
                let error = row.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error < tolerance * scale(n_in), "{format:?} {precision:?}: {error}");
            }
        }
    }
}
