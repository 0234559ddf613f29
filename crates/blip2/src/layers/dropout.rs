//! Dropout whose masks can be replayed.

use blip2_kernels::dropout as kernels;
use blip2_kernels::dropout::Dropout;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::view::{slice, tensor, with_slices};
use crate::splitmix::GAMMA;

/// Hands out the dropout masks of one pass through a model, in order.
///
/// A mask depends on the seed, on how many were asked for before it and on the element's index, on nothing
/// else: a second pass with the same seed replays the first one exactly, which the two-pass contrastive
/// gradient needs.
#[derive(Debug, Clone)]
pub struct DropoutRng {
    p: f32,
    seed: u64,
    n_drawn: u64,
}

impl DropoutRng {
    /// No dropout: inference.
    pub fn off() -> Self {
        Self::new(0.0, 0)
    }

    /// Drops each element with probability `p` in `[0, 1)`.
    pub fn new(p: f32, seed: u64) -> Self {
        Self { p, seed, n_drawn: 0 }
    }

    /// The next mask, or nothing when dropout is off.
    pub fn draw(&mut self) -> Option<Dropout> {
        if self.p == 0.0 {
            return None;
        }
        self.n_drawn += 1;
        Some(Dropout { p: self.p, seed: self.seed ^ self.n_drawn.wrapping_mul(GAMMA) })
    }

    /// Applies the next mask to `x`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn apply(&mut self, x: &Tensor) -> Result<Tensor> {
        match self.draw() {
            None => Ok(x.clone()),
            Some(mask) => x.contiguous()?.apply_op1(Mask(mask)),
        }
    }
}

struct Mask(Dropout);

impl CustomOp1 for Mask {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(kernels::dropout(slice(s, l)?, self.0)), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_out: &Tensor) -> Result<Option<Tensor>> {
        let d_x = with_slices([&d_out.contiguous()?], |[d_out]| kernels::dropout(d_out, self.0))?;
        tensor(d_x, x).map(Some)
    }
}
