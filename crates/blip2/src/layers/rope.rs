//! Rotary position embedding.

use std::sync::Arc;

use blip2_kernels::rope as kernels;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::view::{slice, tensor, with_slices};

/// Rotates each head of each row of `x`, `[N, n_heads * head_dim]`, by its position (arXiv 2104.09864, with the
/// half-split pairs of Hugging Face).
///
/// # Errors
/// Those of the tensor engine.
pub fn rope(
    x: &Tensor,
    positions: &Arc<[u32]>,
    n_heads: usize,
    head_dim: usize,
    base: f32,
) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rope { positions: positions.clone(), n_heads, head_dim, base })
}

struct Rope {
    positions: Arc<[u32]>,
    n_heads: usize,
    head_dim: usize,
    base: f32,
}

impl Rope {
    fn rotate(&self, x: &[f32], inverse: bool) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        kernels::rope(x, &self.positions, self.n_heads, self.head_dim, self.base, inverse, &mut out);
        out
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.rotate(slice(s, l)?, false)), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_out: &Tensor) -> Result<Option<Tensor>> {
        tensor(with_slices([&d_out.contiguous()?], |[d_out]| self.rotate(d_out, true))?, x).map(Some)
    }
}
