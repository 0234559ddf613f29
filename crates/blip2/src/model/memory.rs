//! How much memory a model takes, known from what its files say of themselves.

use std::path::Path;

use crate::Result;
use crate::layers::Precision;
use crate::weights::Encoding;
use crate::weights::safetensors::Safetensors;

/// Bytes of memory that a model in a Hugging Face folder takes when products are computed in `precision`: the weights, and
/// an eighth of them for what a picture and several beams need. Only the headers of the weight files are read.
///
/// # Errors
/// When a weight file is missing or damaged.
pub fn memory_needed(folder: impl AsRef<Path>, precision: Precision) -> Result<u64> {
    let file = Safetensors::open(folder)?;
    let tensors = file.names().map(|name| {
        let rows = file.tensor(name)?;
        Ok((rows.shape().to_vec(), rows.encoding()))
    });
    Ok(needed(&tensors.collect::<Result<Vec<_>>>()?, precision))
}

/// What a process takes without any model.
const BASE: u64 = 64 << 20;

fn needed(tensors: &[(Vec<usize>, Encoding)], precision: Precision) -> u64 {
    let n_bytes = |(shape, encoding): &(Vec<usize>, Encoding)| {
        let n_values: u64 = shape.iter().map(|&size| size as u64).product();
        // Matrices of half-precision numbers stay as they are, and all products in bf16 read half-precision numbers.
        let is_half = matches!(encoding, Encoding::F16 | Encoding::Bf16) || precision == Precision::Bf16;
        n_values * if shape.len() > 1 && is_half { 2 } else { 4 }
    };
    let weights: u64 = tensors.iter().map(n_bytes).sum();
    BASE + weights + weights / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_count_as_they_are_kept_and_vectors_in_full() {
        let tensors =
            |encoding| [(vec![1000, 200], encoding), (vec![10, 3, 2, 2], encoding), (vec![400], encoding)];
        let n_in_matrices = 1000 * 200 + 10 * 3 * 2 * 2;
        for (encoding, precision, n_bytes) in [
            (Encoding::F32, Precision::F32, 4),
            (Encoding::F32, Precision::Bf16, 2),
            (Encoding::F16, Precision::F32, 2),
            (Encoding::Bf16, Precision::Bf16, 2),
        ] {
            let weights = n_in_matrices * n_bytes + 400 * 4;
            assert_eq!(needed(&tensors(encoding), precision), BASE + weights + weights / 8);
        }
    }
}
