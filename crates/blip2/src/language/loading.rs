//! How the families read their tensors: straight from the file's rows into the packed format.

use std::sync::Arc;

use blip2_kernels::quantized::{Format, QuantizedWeight};
use candle_core::{Device, Tensor};

use crate::layers::{
    FrozenFormat, FrozenWeight, LayerNorm, Linear, Precision, Quantization, RmsNorm, TensorSource, Weight,
};
use crate::weights::gguf::Gguf;
use crate::weights::safetensors::Safetensors;
use crate::weights::{RandomWeights, TensorRows, is_finite};
use crate::{Error, Result};

/// Embeddings in the frozen format of a linear layer, read row by row.
#[derive(Debug, Clone)]
pub(super) struct Table(pub(super) FrozenWeight);

impl Table {
    /// The embeddings of tokens, or of positions, one a row.
    ///
    /// # Errors
    /// [`Error::Request`] when a token is not in the vocabulary.
    pub(super) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let (width, n_tokens) = (self.0.in_features(), self.0.out_features());
        let mut rows = vec![0.0; ids.len() * width];
        for (&id, row) in ids.iter().zip(rows.chunks_exact_mut(width)) {
            if id as usize >= n_tokens {
                let reason = format!("token {id} is not in the vocabulary of {n_tokens} tokens");
                return Err(Error::Request(reason));
            }
            self.0.row(id as usize, row);
        }
        Ok(Tensor::from_vec(rows, (ids.len(), width), &Device::Cpu)?)
    }
}

/// Runs `pass` on one of rayon's threads. The hundreds of kernels in a pass then hand work to their neighbours; from a
/// thread outside, each would first wake one and wait, which costs a decode step more than its arithmetic.
pub(super) fn on_a_worker<T: Send>(pass: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| pass())
}

/// Where tensors come from; names are those of Hugging Face.
pub(super) enum File<'a> {
    Gguf(&'a Gguf),
    HuggingFace { file: &'a Safetensors, prefix: &'a str },
    Random(RandomWeights),
}

impl File<'_> {
    /// The rows of a tensor, with the name that the file has for it; nothing where tensors are drawn.
    fn tensor(&self, name: &str) -> Result<Option<(TensorRows<'_>, String)>> {
        match self {
            Self::Gguf(file) => {
                let name = gguf_name(name);
                Ok(Some((file.tensor(&name)?, name)))
            }
            Self::HuggingFace { file, prefix } => {
                let name = format!("{prefix}{name}");
                Ok(Some((file.tensor(&name)?, name)))
            }
            Self::Random(_) => Ok(None),
        }
    }

    /// Whether a tensor is there that not every checkpoint has.
    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Self::Gguf(file) => file.contains(&gguf_name(name)),
            Self::HuggingFace { file, prefix } => file.contains(&format!("{prefix}{name}")),
            Self::Random(_) => true,
        }
    }

    /// A matrix that the file holds in few bits as the kernels read it.
    fn quantized(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        match self {
            Self::Gguf(_) | Self::Random(_) => Ok(None),
            Self::HuggingFace { file, prefix } => file.quantized(&format!("{prefix}{name}")),
        }
    }
}

/// The name in a GGUF file of the tensor that Hugging Face calls `name`.
fn gguf_name(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let Some((i, name)) = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else {
        return match name {
            "embed_tokens.weight" => "token_embd.weight",
            "norm.weight" => "output_norm.weight",
            "lm_head.weight" => "output.weight",
            other => other,
        }
        .into();
    };
    let (module, kind) = name.rsplit_once('.').unwrap_or((name, "weight"));
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{i}.{module}.{kind}")
}

/// Where a GGUF file keeps row `row` of a query or key projection. Files of the architecture `llama` store the rows of each
/// head in the order that rotates neighbours (0, d/2, 1, d/2 + 1, …), this project as Hugging Face rotates halves.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

pub(super) struct Loader<'a> {
    file: &'a File<'a>,
    format: FrozenFormat,
    /// Parameters read so far.
    pub(super) n_parameters: usize,
    /// Memory of what was read so far.
    pub(super) n_bytes: usize,
}

impl<'a> Loader<'a> {
    pub(super) fn new(file: &'a File<'a>, format: FrozenFormat) -> Self {
        Self { file, format, n_parameters: 0, n_bytes: 0 }
    }

    /// The embeddings of the vocabulary, or its output head.
    pub(super) fn table(&mut self, name: &str, n_tokens: usize, width: usize) -> Result<FrozenWeight> {
        let format = self.format.quantization.map(Quantization::vocabulary);
        self.frozen(name, n_tokens, width, format, None)
    }

    /// Packs a matrix straight from the file's rows, never holding it in f32. `rotary_head_dim` is given for projections
    /// whose outputs are rotated.
    fn frozen(
        &mut self,
        name: &str,
        n_out: usize,
        n_in: usize,
        format: Option<Format>,
        rotary_head_dim: Option<usize>,
    ) -> Result<FrozenWeight> {
        let weight = if let Some(stored) = self.file.quantized(name)? {
            let found = vec![stored.out_features(), stored.in_features()];
            if found != [n_out, n_in] {
                return Err(Error::TensorShape { name: name.into(), expected: vec![n_out, n_in], found });
            }
            FrozenWeight::Quantized(Arc::new(stored))
        } else if let File::Random(weights) = self.file {
            weights.matrix(name, n_out, n_in, format, self.format.precision)
        } else {
            let (rows, name) = self.tensor(name)?;
            let rows = rows.expect_shape(&name, &[n_out, n_in])?;
            let stored_row = self.stored_row(rotary_head_dim);
            match format {
                Some(format) => {
                    let weight = FrozenWeight::quantize(&name, &rows, format, &stored_row)?;
                    if let File::HuggingFace { file, .. } = self.file {
                        file.note_quantized(&name, &weight);
                    }
                    weight
                }
                None => FrozenWeight::pack(&name, &rows, self.format.precision, &stored_row)?,
            }
        };
        self.n_parameters += n_out * n_in;
        self.n_bytes += weight.n_bytes();
        Ok(weight)
    }

    pub(super) fn linear(
        &mut self,
        name: &str,
        n_out: usize,
        n_in: usize,
        has_bias: bool,
        rotary_head_dim: Option<usize>,
    ) -> Result<Linear> {
        let format = self.format.quantization.map(Quantization::language);
        let weight = self.frozen(&format!("{name}.weight"), n_out, n_in, format, rotary_head_dim)?;
        let bias = if has_bias {
            let stored = self.vector(&format!("{name}.bias"), n_out)?;
            let stored_row = self.stored_row(rotary_head_dim);
            let values: Vec<f32> = (0..n_out).map(|row| stored[stored_row(row)]).collect();
            Some(Tensor::from_vec(values, n_out, &Device::Cpu)?)
        } else {
            None
        };
        Ok(Linear::new(Weight::Frozen(weight), bias))
    }

    pub(super) fn norm(&mut self, name: &str, size: usize, eps: f64) -> Result<RmsNorm> {
        let weight = self.vector(&format!("{name}.weight"), size)?;
        Ok(RmsNorm::new(Tensor::from_vec(weight, size, &Device::Cpu)?, eps))
    }

    /// Positions that have been learned, a row each.
    pub(super) fn positions(&mut self, name: &str, n_rows: usize, width: usize) -> Result<Table> {
        let weight = if let File::Random(weights) = self.file {
            weights.matrix(name, n_rows, width, None, Precision::F32)
        } else {
            let (rows, name) = self.tensor(name)?;
            FrozenWeight::pack_table(&name, &rows.expect_shape(&name, &[n_rows, width])?, self.format)?
        };
        self.n_parameters += n_rows * width;
        self.n_bytes += weight.n_bytes();
        Ok(Table(weight))
    }

    /// A matrix that is kept as it is: a bias of attention.
    pub(super) fn matrix(&mut self, name: &str, n_rows: usize, width: usize) -> Result<Tensor> {
        let values = self.values(name, &[n_rows, width])?;
        self.n_parameters += values.len();
        self.n_bytes += size_of_val(values.as_slice());
        Ok(Tensor::from_vec(values, (n_rows, width), &Device::Cpu)?)
    }

    pub(super) fn layer_norm(&mut self, name: &str, size: usize, eps: f64) -> Result<LayerNorm> {
        let mut part = |part: &str| -> Result<Tensor> {
            Ok(Tensor::from_vec(self.vector(&format!("{name}.{part}"), size)?, size, &Device::Cpu)?)
        };
        Ok(LayerNorm::new(part("weight")?, part("bias")?, eps))
    }

    pub(super) fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values = self.values(name, &[len])?;
        self.n_parameters += len;
        self.n_bytes += size_of_val(values.as_slice());
        Ok(values)
    }

    fn tensor(&self, name: &str) -> Result<(TensorRows<'a>, String)> {
        self.file.tensor(name)?.ok_or_else(|| Error::MissingTensor { name: name.into() })
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        if let File::Random(weights) = self.file {
            return weights.read_shaped(name, shape);
        }
        let (rows, name) = self.tensor(name)?;
        let values = rows.expect_shape(&name, shape)?.to_vec();
        if is_finite(&values) { Ok(values) } else { Err(Error::NotFinite { name }) }
    }

    fn stored_row(&self, rotary_head_dim: Option<usize>) -> impl Fn(usize) -> usize + Sync + use<> {
        let head_dim = rotary_head_dim.filter(|_| matches!(self.file, File::Gguf(_)));
        move |row| head_dim.map_or(row, |head_dim| interleaved_row(row, head_dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_those_of_llama_cpp() {
        // llama.cpp stores reshape(heads, 2, d / 2).swapaxes(1, 2) of Hugging Face's rows.
        let stored_as: Vec<usize> = (0..2)
            .flat_map(|head| (0..4).flat_map(move |pair| [head * 8 + pair, head * 8 + 4 + pair]))
            .collect();
        for row in 0..16 {
            assert_eq!(stored_as[interleaved_row(row, 8)], row);
        }
    }

    #[test]
    fn names_are_translated() {
        for (name, expected) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ] {
            assert_eq!(gguf_name(name), expected);
        }
    }
}
