//! Layer norm and RMS norm.

use blip2_kernels::norm as kernels;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::parameters::Loader;
use super::view::{slice, tensor, with_slices};

/// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    /// From `weight` and `bias`, both `[size]`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias, eps: eps as f32 }
    }

    /// Loads `weight` and `bias`, both `[size]`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(loader: &Loader<'_>, size: usize, eps: f64) -> crate::Result<Self> {
        let (weight, bias) = (loader.tensor("weight", &[size])?, loader.tensor("bias", &[size])?);
        Ok(Self::new(weight, bias, eps))
    }

    /// Normalises the rows of `x`, `[N, D]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op2(&self.weight_and_bias()?, Norm { eps: self.eps })
    }

    /// Normalises the rows of `x + residual`, both `[N, D]`, in one pass: the post-norm residual connection of BERT.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let op = Norm { eps: self.eps };
        x.contiguous()?.apply_op3(&residual.contiguous()?, &self.weight_and_bias()?, op)
    }

    // A custom operation takes at most three tensors, so weight and bias travel as one.
    fn weight_and_bias(&self) -> Result<Tensor> {
        Tensor::cat(&[&self.weight, &self.bias], 0)
    }
}

struct Norm {
    eps: f32,
}

impl Norm {
    fn forward(&self, x: &[f32], residual: Option<&[f32]>, weight_and_bias: &[f32]) -> CpuStorage {
        let (weight, bias) = weight_and_bias.split_at(weight_and_bias.len() / 2);
        CpuStorage::F32(kernels::layer_norm(x, residual, weight, bias, self.eps))
    }

    /// The gradients of `x` (which is the residual's too) and of weight and bias.
    fn backward(
        &self,
        x: &[f32],
        residual: Option<&[f32]>,
        weight_and_bias: &[f32],
        d_out: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let weight = &weight_and_bias[..weight_and_bias.len() / 2];
        let (d_x, d_weight, d_bias) = kernels::layer_norm_backward(x, residual, weight, self.eps, d_out);
        (d_x, [d_weight, d_bias].concat())
    }
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.forward(slice(s1, l1)?, None, slice(s2, l2)?), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        wb: &Tensor,
        _: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_x, d_wb) =
            with_slices([x, wb, &d_out.contiguous()?], |[x, wb, d_out]| self.backward(x, None, wb, d_out))?;
        Ok((Some(tensor(d_x, x)?), Some(tensor(d_wb, wb)?)))
    }
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "residual-layer-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.forward(slice(s1, l1)?, Some(slice(s2, l2)?), slice(s3, l3)?), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        wb: &Tensor,
        _: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (d_x, d_wb) =
            with_slices([x, residual, wb, &d_out.contiguous()?], |[x, residual, wb, d_out]| {
                self.backward(x, Some(residual), wb, d_out)
            })?;
        let d_x = tensor(d_x, x)?;
        Ok((Some(d_x.clone()), Some(d_x), Some(tensor(d_wb, wb)?)))
    }
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// From `weight`, `[size]`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps: eps as f32 }
    }

    /// Normalises the rows of `x`, `[N, D]`. The gradient reaches `x`, and `weight` where that is trainable.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op2(&self.weight, Rms { eps: self.eps })
    }
}

struct Rms {
    eps: f32,
}

impl CustomOp2 for Rms {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = kernels::rms_norm(slice(s1, l1)?, slice(s2, l2)?, self.eps);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_x, d_weight) = with_slices([x, weight, &d_out.contiguous()?], |[x, w, d_out]| {
            kernels::rms_norm_backward(x, w, self.eps, d_out, weight.is_variable())
        })?;
        Ok((Some(tensor(d_x, x)?), d_weight.map(|d| tensor(d, weight)).transpose()?))
    }
}
