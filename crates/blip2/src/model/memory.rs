//! How much memory a model takes, known from what its files say of themselves.

use std::path::Path;

use crate::Result;
use crate::layers::{Precision, Quantization};
use crate::weights::Encoding;
use crate::weights::safetensors::Safetensors;

/// Bytes of memory that a model in a Hugging Face folder takes when products are computed in `precision` and its large
/// matrices are rounded to `quantization`: the weights, and an eighth of them for what a picture and several beams need.
/// Only the headers of the weight files are read.
///
/// # Errors
/// When a weight file is missing or damaged.
pub fn memory_needed(
    folder: impl AsRef<Path>,
    precision: Precision,
    quantization: Option<Quantization>,
) -> Result<u64> {
    let file = Safetensors::open(folder)?;
    if file.quantization().is_some() {
        // What is stored as the kernels read it takes what its files take.
        let weights: u64 = file.files().iter().map(|file| file.bytes().len() as u64).sum();
        return Ok(BASE + weights + weights / 8);
    }
    let tensors = file.names().map(|name| {
        let rows = file.tensor(name)?;
        let n_bits = bits_of_a_value(name, rows.shape(), rows.encoding(), precision, quantization);
        Ok(rows.shape().iter().map(|&size| size as u64).product::<u64>() * n_bits / 8)
    });
    let weights = tensors.sum::<Result<u64>>()?;
    Ok(BASE + weights + weights / 8)
}

/// What a process takes without any model.
const BASE: u64 = 64 << 20;

fn bits_of_a_value(
    name: &str,
    shape: &[usize],
    encoding: Encoding,
    precision: Precision,
    quantization: Option<Quantization>,
) -> u64 {
    if shape.len() < 2 {
        return 32; // vectors are kept in f32
    }
    let in_language_model = name.starts_with("language_model.");
    match quantization {
        // With their scales.
        Some(Quantization::Int4) if in_language_model => 5,
        Some(_) if in_language_model || name.starts_with("vision_model.") => 9,
        // Matrices of half-precision numbers stay as they are, and all products in bf16 read half-precision numbers.
        _ if matches!(encoding, Encoding::F16 | Encoding::Bf16) || precision == Precision::Bf16 => 16,
        _ => 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_count_as_they_are_kept_and_vectors_in_full() {
        let matrix = "language_model.model.decoder.layers.0.fc1.weight";
        for (name, shape, encoding, precision, quantization, n_bits) in [
            (matrix, &[10, 20][..], Encoding::F32, Precision::F32, None, 32),
            (matrix, &[10, 20], Encoding::F32, Precision::Bf16, None, 16),
            (matrix, &[10, 20], Encoding::F16, Precision::F32, None, 16),
            (matrix, &[10, 20], Encoding::Bf16, Precision::Bf16, None, 16),
            (matrix, &[10, 20], Encoding::F16, Precision::F32, Some(Quantization::Int8), 9),
            (matrix, &[10, 20], Encoding::F16, Precision::F32, Some(Quantization::Int4), 5),
            ("vision_model.w", &[10, 3, 2, 2], Encoding::F16, Precision::F32, Some(Quantization::Int4), 9),
            ("qformer.w", &[10, 20], Encoding::F32, Precision::F32, Some(Quantization::Int4), 32),
            ("language_model.b", &[20], Encoding::F16, Precision::Bf16, Some(Quantization::Int4), 32),
        ] {
            let found = bits_of_a_value(name, shape, encoding, precision, quantization);
            assert_eq!(found, n_bits, "{name} {encoding:?} {precision:?} {quantization:?}");
        }
    }
}
