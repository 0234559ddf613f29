//! Elementwise nonlinearities.

use blip2_kernels::activation as kernels;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::Activation;
use super::view::{slice, tensor, with_slices};

/// `activation(x)`, any shape.
///
/// # Errors
/// Those of the tensor engine.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Activate(activation))
}

/// `activation(gate) * up`, the gated unit of SwiGLU and GEGLU; both of one shape.
///
/// # Errors
/// Those of the tensor engine.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(activation))
}

struct Activate(Activation);

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(kernels::activate(slice(s, l)?, self.0)), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_out: &Tensor) -> Result<Option<Tensor>> {
        let d_x = with_slices([x, &d_out.contiguous()?], |[x, d_out]| {
            kernels::activate_backward(x, self.0, d_out)
        })?;
        tensor(d_x, x).map(Some)
    }
}

struct Gated(Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated-activation"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = kernels::gated(slice(s1, l1)?, slice(s2, l2)?, self.0);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_gate, d_up) = with_slices([gate, up, &d_out.contiguous()?], |[g, u, d_out]| {
            kernels::gated_backward(g, u, self.0, d_out)
        })?;
        Ok((Some(tensor(d_gate, gate)?), Some(tensor(d_up, up)?)))
    }
}
