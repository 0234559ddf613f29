//! Frozen matrices, in whatever format the kernels read them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blip2_kernels::gemm::Precision;
use blip2_kernels::linear::{Epilogue, Format as PlainFormat, PackedWeight};
use blip2_kernels::quantized::{Format, QuantizedWeight};
use serde::{Deserialize, Serialize};

use crate::weights::{Encoding, TensorRows, is_finite};
use crate::{Error, Result};

/// Few bits for the large frozen matrices of a model: those of the layers of a vision transformer and of a language
/// model. Whatever else a model has, its Q-Former, its norms and its biases, stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// Eight bits.
    Int8,
    /// Four bits for the layers of the language model; eight for its embeddings and output head, which every token
    /// depends on, and for the vision transformer, whose products cost more than its memory.
    Int4,
}

impl Quantization {
    /// The format of a vision transformer's layers.
    pub(crate) fn vision(self) -> Format {
        Format::Int8
    }

    /// The format of a language model's layers. Activations have outliers there (OPT from 6.7 billion parameters on, T5's
    /// feed-forward layers): scaled by blocks, these cost their neighbours only.
    pub(crate) fn language(self) -> Format {
        match self {
            Self::Int8 => Format::Int8LongBlocks,
            Self::Int4 => Format::Int4,
        }
    }

    /// The format of a Q-Former's layers, where it is rounded at all.
    pub(crate) fn bridge(self) -> Format {
        self.language()
    }

    /// The format of a language model's embeddings and output head.
    pub(crate) fn vocabulary(self) -> Format {
        Format::Int8LongBlocks
    }
}

/// How the frozen matrices of a part are held and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrozenFormat {
    /// Precision of products with matrices that are not quantised.
    pub precision: Precision,
    /// Whether the large ones are.
    pub quantization: Option<Quantization>,
}

impl FrozenFormat {
    /// The precision of the keys and values that a language model keeps: a model in few bits rounds its activations to eight
    /// anyway.
    pub(crate) fn cache_precision(self) -> Precision {
        if self.quantization.is_some() { Precision::Bf16 } else { Precision::F32 }
    }
}

impl From<Precision> for FrozenFormat {
    fn from(precision: Precision) -> Self {
        Self { precision, quantization: None }
    }
}

/// A frozen matrix `[out, in]`. Cheap to clone.
#[derive(Clone)]
pub enum FrozenWeight {
    /// Floating-point numbers in panels.
    Packed(Arc<PackedWeight>),
    /// Integers in panels.
    Quantized(Arc<QuantizedWeight>),
}

impl std::fmt::Debug for FrozenWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Packed(w) => write!(f, "Packed([{}, {}])", w.out_features(), w.in_features()),
            Self::Quantized(w) => w.fmt(f),
        }
    }
}

/// Reads the rows of a matrix and lets go of the file's pages; refuses one that is not all numbers.
fn read_finite<T>(
    name: &str,
    rows: &TensorRows<'_>,
    stored_row: &(dyn Fn(usize) -> usize + Sync),
    read: impl FnOnce(&(dyn Fn(usize, &mut [f32]) + Sync)) -> T,
) -> Result<T> {
    let is_sound = AtomicBool::new(true);
    let matrix = read(&|i, into| {
        rows.read_row(stored_row(i), into);
        if !is_finite(into) {
            is_sound.store(false, Ordering::Relaxed);
        }
    });
    rows.release();
    if is_sound.into_inner() { Ok(matrix) } else { Err(Error::NotFinite { name: name.to_owned() }) }
}

impl FrozenWeight {
    /// Packs the stored matrix `name`, output `i` from the stored row `stored_row(i)`, and lets go of the file's pages.
    /// Numbers of 16 bits stay so, whatever the precision of the products.
    ///
    /// # Errors
    /// [`Error::NotFinite`].
    pub(crate) fn pack(
        name: &str,
        rows: &TensorRows<'_>,
        precision: Precision,
        stored_row: &(dyn Fn(usize) -> usize + Sync),
    ) -> Result<Self> {
        let format = match (precision, rows.encoding()) {
            (Precision::F32, Encoding::F16) => PlainFormat::WideF16,
            (Precision::F32, Encoding::Bf16) => PlainFormat::WideBf16,
            (precision, _) => precision.into(),
        };
        Self::pack_as(name, rows, format, stored_row)
    }

    /// Packs a stored table whose rows are added, not multiplied: as [`pack`](Self::pack) does for f32, but where the matrices
    /// beside it are in few bits, not in more than sixteen.
    ///
    /// # Errors
    /// [`Error::NotFinite`].
    pub(crate) fn pack_table(name: &str, rows: &TensorRows<'_>, format: FrozenFormat) -> Result<Self> {
        let stored_row = &|row| row;
        match (format.quantization, rows.encoding()) {
            (Some(_), encoding) if encoding != Encoding::Bf16 => {
                Self::pack_as(name, rows, PlainFormat::WideF16, stored_row)
            }
            _ => Self::pack(name, rows, Precision::F32, stored_row),
        }
    }

    fn pack_as(
        name: &str,
        rows: &TensorRows<'_>,
        format: PlainFormat,
        stored_row: &(dyn Fn(usize) -> usize + Sync),
    ) -> Result<Self> {
        let packed = read_finite(name, rows, stored_row, |row| {
            PackedWeight::pack(rows.n_rows(), rows.row_len(), format, row)
        })?;
        Ok(Self::Packed(Arc::new(packed)))
    }

    /// The format in which stored blocks are taken as they are when `format` is asked for. They are where that is not more
    /// bits: rounding again would lose more. The k-quants are always taken so: a file has more bits for some matrices than
    /// for others since these need them.
    pub(crate) fn kept(encoding: Encoding, format: Format) -> Option<Format> {
        match (encoding, format) {
            (Encoding::Q4_0, _) => Some(Format::Int4),
            (Encoding::Q4_1, _) => Some(Format::Int4Offset),
            (Encoding::Q4K, _) => Some(Format::Q4K),
            (Encoding::Q5K, _) => Some(Format::Q5K),
            (Encoding::Q6K, _) => Some(Format::Q6K),
            (Encoding::Q8_0, Format::Int8 | Format::Int8Blocks | Format::Int8LongBlocks) => {
                Some(Format::Int8Blocks)
            }
            _ => None,
        }
    }

    /// Rounds a stored matrix as [`pack`](Self::pack) packs it, or takes its blocks as they are where they are to be
    /// [`kept`](Self::kept).
    ///
    /// # Errors
    /// [`Error::NotFinite`].
    pub(crate) fn quantize(
        name: &str,
        rows: &TensorRows<'_>,
        format: Format,
        stored_row: &(dyn Fn(usize) -> usize + Sync),
    ) -> Result<Self> {
        let (n_out, n_in) = (rows.n_rows(), rows.row_len());
        let quantized = match Self::kept(rows.encoding(), format) {
            Some(format) => {
                let blocks = |i: usize| rows.row_bytes(stored_row(i));
                let quantized = QuantizedWeight::from_gguf_blocks(n_out, n_in, format, &blocks);
                rows.release();
                quantized
            }
            None => read_finite(name, rows, stored_row, |row| {
                QuantizedWeight::quantize(n_out, n_in, format, row)
            })?,
        };
        Ok(Self::Quantized(Arc::new(quantized)))
    }

    /// Inputs of the map.
    pub fn in_features(&self) -> usize {
        match self {
            Self::Packed(w) => w.in_features(),
            Self::Quantized(w) => w.in_features(),
        }
    }

    /// Outputs of the map.
    pub fn out_features(&self) -> usize {
        match self {
            Self::Packed(w) => w.out_features(),
            Self::Quantized(w) => w.out_features(),
        }
    }

    /// The precision that suffices for what goes with its products: theirs, and bf16 for few bits, which round activations to
    /// eight.
    pub fn precision(&self) -> Precision {
        match self {
            Self::Packed(w) => w.precision(),
            Self::Quantized(_) => Precision::Bf16,
        }
    }

    /// Memory of the matrix, in bytes.
    pub fn n_bytes(&self) -> usize {
        match self {
            Self::Packed(w) => w.n_bytes(),
            Self::Quantized(w) => w.bytes().len(),
        }
    }

    /// Row `i` of the matrix, as it was rounded.
    ///
    /// # Panics
    /// When there is no such row or `into` is not of length `in`.
    pub fn row(&self, i: usize, into: &mut [f32]) {
        match self {
            Self::Packed(w) => w.row(i, into),
            Self::Quantized(w) => w.row(i, into),
        }
    }

    /// `activation(x Wᵀ + bias) + residual`; `x` is `[n_rows, in]`, the result and the residual `[n_rows, out]`.
    pub(super) fn forward(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>) -> Vec<f32> {
        match self {
            Self::Packed(w) => w.forward(x, n_rows, epilogue),
            Self::Quantized(w) => w.forward(x, n_rows, epilogue),
        }
    }

    /// [`forward`](Self::forward) into `y`.
    pub(super) fn forward_into(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>, y: &mut [f32]) {
        match self {
            Self::Packed(w) => w.forward_into(x, n_rows, epilogue, y),
            Self::Quantized(w) => w.forward_into(x, n_rows, epilogue, y),
        }
    }

    /// [`forward`](Self::forward) of several matrices to the same `x`.
    pub(super) fn forward_all(products: &[(&Self, Epilogue<'_>)], x: &[f32], n_rows: usize) -> Vec<Vec<f32>> {
        let quantized: Option<Vec<_>> = products
            .iter()
            .map(|(weight, epilogue)| match weight {
                Self::Quantized(weight) => Some((&**weight, *epilogue)),
                Self::Packed(_) => None,
            })
            .collect();
        match quantized {
            Some(products) => QuantizedWeight::forward_all(&products, x, n_rows),
            None => products.iter().map(|(weight, epilogue)| weight.forward(x, n_rows, *epilogue)).collect(),
        }
    }

    /// `d_y W`.
    pub(super) fn input_gradient(&self, d_y: &[f32], n_rows: usize) -> Vec<f32> {
        match self {
            Self::Packed(w) => w.input_gradient(d_y, n_rows),
            // The weights were rounded more than bf16 rounds.
            Self::Quantized(w) => w.input_gradient(d_y, n_rows, Precision::Bf16),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::gguf::Gguf;

    /// The golden file's tensors are random blocks, whose numbers the `gguf` package told.
    #[test]
    fn blocks_of_a_gguf_file_stay_what_they_are() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/gguf_types.gguf");
        let file = Gguf::open(path).expect("a file");
        for (name, wanted, kept) in [
            ("Q8_0", Format::Int8LongBlocks, Format::Int8Blocks),
            ("Q8_0", Format::Int4, Format::Int4),
            ("Q4_0", Format::Int8, Format::Int4),
            ("Q4_1", Format::Int4, Format::Int4Offset),
            ("Q4_K", Format::Int4, Format::Q4K),
            ("Q5_K", Format::Int8LongBlocks, Format::Q5K),
            ("Q6_K", Format::Int4, Format::Q6K),
            ("Q3_K", Format::Int8LongBlocks, Format::Int8LongBlocks),
        ] {
            let rows = file.tensor(name).expect("a tensor");
            let weight = FrozenWeight::quantize(name, &rows, wanted, &|row| 2 - row).expect("a weight");
            let FrozenWeight::Quantized(quantized) = &weight else { panic!("it is quantised") };
            assert_eq!(quantized.format(), kept, "{name}");
            let (mut found, mut stored) = (vec![0.0; rows.row_len()], vec![0.0; rows.row_len()]);
            for row in 0..3 {
                weight.row(row, &mut found);
                rows.read_row(2 - row, &mut stored);
                if kept == wanted && name != "Q8_0" || (name, kept) == ("Q8_0", Format::Int4) {
                    assert!(found != stored, "{name} is rounded");
                } else {
                    assert_eq!(found, stored, "{name}");
                }
            }
        }
    }
}
