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
        let x = slice(s, l)?;
        let mut out = vec![0.0; x.len()];
        kernels::activate(x, self.0, &mut out);
        Ok((CpuStorage::F32(out), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_out: &Tensor) -> Result<Option<Tensor>> {
        let d_x = with_slices([x, &d_out.contiguous()?], |[x, d_out]| {
            let mut d_x = vec![0.0; x.len()];
            kernels::activate_backward(x, self.0, d_out, &mut d_x);
            d_x
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
        let (gate, up) = (slice(s1, l1)?, slice(s2, l2)?);
        let mut out = vec![0.0; gate.len()];
        kernels::gated(gate, up, self.0, &mut out);
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
            let (mut d_gate, mut d_up) = (vec![0.0; g.len()], vec![0.0; g.len()]);
            kernels::gated_backward(g, u, self.0, d_out, &mut d_gate, &mut d_up);
            (d_gate, d_up)
        })?;
        Ok((Some(tensor(d_gate, gate)?), Some(tensor(d_up, up)?)))
    }
}
