//! AdamW over named variables, with the decay groups of this project.

use std::cell::RefCell;
use std::collections::BTreeMap;

use blip2_kernels::adamw::{AdamW, adamw_step};
use candle_core::{CpuStorage, InplaceOp1, Layout, Var};
use serde::{Deserialize, Serialize};

use crate::gradients::Gradients;
use crate::{Error, Result};

/// The optimiser's constants (paper, appendix: AdamW with betas 0.9 and 0.98, weight decay 0.05).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Decay of the mean of the gradients.
    pub beta1: f32,
    /// Decay of the mean of the squared gradients.
    pub beta2: f32,
    /// Added to the root of the squared mean.
    pub eps: f32,
    /// Decoupled weight decay of the matrices.
    pub weight_decay: f32,
    /// Longest allowed gradient, all variables taken as one vector.
    pub clip_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.05, clip_norm: 1.0 }
    }
}

/// The two moments of a variable.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Running mean of the gradient.
    pub m: Vec<f32>,
    /// Running mean of its square.
    pub v: Vec<f32>,
}

/// AdamW's state for a set of variables.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    moments: BTreeMap<String, Moments>,
    n_updates: u64,
}

/// Whether weight decay applies: to matrices and embeddings; not to biases, norms, the temperature and the
/// queries. (LAVIS decays the last two, as an accident of its test for one-dimensional tensors.)
pub fn decays(name: &str, rank: usize) -> bool {
    rank >= 2 && name != "query_tokens"
}

impl Optimizer {
    /// Fresh moments for `variables`.
    pub fn new(config: OptimizerConfig, variables: &BTreeMap<String, Var>) -> Self {
        let zeros = |v: &Var| Moments { m: vec![0.0; v.elem_count()], v: vec![0.0; v.elem_count()] };
        let moments = variables.iter().map(|(name, v)| (name.clone(), zeros(v))).collect();
        Self { config, moments, n_updates: 0 }
    }

    /// Continues from saved moments.
    ///
    /// # Errors
    /// When a variable has no moments or moments of another size.
    pub fn resume(
        config: OptimizerConfig,
        variables: &BTreeMap<String, Var>,
        moments: BTreeMap<String, Moments>,
        n_updates: u64,
    ) -> Result<Self> {
        for (name, variable) in variables {
            let n = variable.elem_count();
            if !moments.get(name).is_some_and(|s| s.m.len() == n && s.v.len() == n) {
                return Err(Error::Training(format!(
                    "the checkpoint's optimiser state does not fit `{name}`"
                )));
            }
        }
        Ok(Self { config, moments, n_updates })
    }

    /// The moments by variable name.
    pub fn moments(&self) -> &BTreeMap<String, Moments> {
        &self.moments
    }

    /// How many updates were made.
    pub fn n_updates(&self) -> u64 {
        self.n_updates
    }

    /// Clips `gradients` and updates each variable at its learning rate; returns the gradient's norm before clipping.
    ///
    /// # Errors
    /// When a gradient is not finite; nothing is changed then.
    pub fn step(
        &mut self,
        variables: &BTreeMap<String, Var>,
        gradients: &Gradients,
        learning_rate: &dyn Fn(&str) -> f64,
    ) -> Result<f64> {
        let norm = gradients.global_norm(self.n_updates)?;
        let clip =
            if norm > self.config.clip_norm { (self.config.clip_norm / (norm + 1e-6)) as f32 } else { 1.0 };
        self.n_updates += 1;
        for (name, variable) in variables {
            let (Some(gradient), Some(moments)) = (gradients.get(name), self.moments.get_mut(name)) else {
                continue;
            };
            let decay = if decays(name, variable.rank()) { self.config.weight_decay } else { 0.0 };
            let hyper = AdamW {
                lr: learning_rate(name) as f32,
                beta1: self.config.beta1,
                beta2: self.config.beta2,
                eps: self.config.eps,
                weight_decay: decay,
                step: self.n_updates,
            };
            let update = Update { gradient, clip, hyper, moments: RefCell::new(moments) };
            variable.inplace_op1(&update)?;
        }
        Ok(norm)
    }
}

/// Updates a variable where it lies.
struct Update<'a> {
    gradient: &'a [f32],
    clip: f32,
    hyper: AdamW,
    moments: RefCell<&'a mut Moments>,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("a trainable variable is not contiguous f32")
        };
        let mut moments = self.moments.borrow_mut();
        let Moments { m, v } = &mut **moments;
        adamw_step(&mut data[start..end], self.gradient, self.clip, m, v, self.hyper);
        Ok(())
    }
}
