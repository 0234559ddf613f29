//! Cross-entropy, alone and fused with the vocabulary projection.

use std::sync::Arc;

use blip2_kernels::column_sums::add_column_sums;
use blip2_kernels::cross_entropy as kernels;
use blip2_kernels::gemm::Precision;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::linear::{dense_forward_into, dense_input_gradient_into, dense_weight_gradient};
use super::view::{slice, tensor, with_slices};
use super::{FrozenWeight, Linear, Weight};

/// Rows of logits held at a time: a vocabulary of 50,000 makes each row 200 kB.
const ROWS_AT_A_TIME: usize = 512;

/// The cross-entropy of each row of `logits`, `[N, V]`, with its target class; returns `[N]`.
///
/// Label smoothing as PyTorch defines it: `(1 - s) * nll + s * mean over classes of -log p`.
///
/// # Errors
/// When the number of targets is not `N`, or a target is not below `V`.
pub fn cross_entropy(logits: &Tensor, targets: &[u32], smoothing: f32) -> Result<Tensor> {
    let (n_rows, n_classes) = logits.dims2()?;
    check_targets(targets, n_rows, n_classes)?;
    logits.contiguous()?.apply_op1(CrossEntropy { targets: targets.into(), smoothing })
}

/// [`cross_entropy`] of `head(x)` without ever holding all logits: `x` is `[N, D]`, `head` maps to `[N, V]`.
///
/// The gradient computes the logits again, some rows at a time.
///
/// # Errors
/// As [`cross_entropy`].
pub fn linear_cross_entropy(x: &Tensor, head: &Linear, targets: &[u32], smoothing: f32) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (n_rows, _) = x.dims2()?;
    let targets: Arc<[u32]> = targets.into();
    match head.weight() {
        Weight::Dense(weight, precision) => {
            check_targets(&targets, n_rows, weight.dim(0)?)?;
            let bias = match head.bias() {
                Some(bias) => bias.clone(),
                None => Tensor::zeros(0, x.dtype(), x.device())?,
            };
            x.apply_op3(weight, &bias, DenseCrossEntropy { targets, smoothing, precision: *precision })
        }
        Weight::Frozen(weight) => {
            check_targets(&targets, n_rows, weight.out_features())?;
            let bias = head.bias().map(Tensor::to_vec1).transpose()?;
            x.apply_op1(FrozenCrossEntropy { weight: weight.clone(), bias, targets, smoothing })
        }
    }
}

fn check_targets(targets: &[u32], n_rows: usize, n_classes: usize) -> Result<()> {
    if targets.len() != n_rows {
        candle_core::bail!("{} targets for {n_rows} rows of logits", targets.len());
    }
    match targets.iter().find(|&&t| t as usize >= n_classes) {
        Some(t) => candle_core::bail!("target {t} is not one of {n_classes} classes"),
        None => Ok(()),
    }
}

struct CrossEntropy {
    targets: Arc<[u32]>,
    smoothing: f32,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n_rows, n_classes) = l.shape().dims2()?;
        let mut losses = vec![0.0; n_rows];
        kernels::cross_entropy(slice(s, l)?, n_classes, &self.targets, self.smoothing, &mut losses);
        Ok((CpuStorage::F32(losses), Shape::from(n_rows)))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, d_losses: &Tensor) -> Result<Option<Tensor>> {
        let (_, n_classes) = logits.dims2()?;
        let d_logits = with_slices([logits, &d_losses.contiguous()?], |[x, d_losses]| {
            let mut d_x = vec![0.0; x.len()];
            kernels::cross_entropy_backward(x, n_classes, &self.targets, self.smoothing, d_losses, &mut d_x);
            d_x
        })?;
        tensor(d_logits, logits).map(Some)
    }
}

struct DenseCrossEntropy {
    targets: Arc<[u32]>,
    smoothing: f32,
    precision: Precision,
}

impl CustomOp3 for DenseCrossEntropy {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
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
        let (x, w, bias) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let (n_classes, n_in) = l2.shape().dims2()?;
        let mut losses = vec![0.0; self.targets.len()];
        let mut logits = vec![0.0; ROWS_AT_A_TIME.min(losses.len()) * n_classes];
        let chunks = x.chunks(ROWS_AT_A_TIME * n_in).zip(self.targets.chunks(ROWS_AT_A_TIME));
        for ((x, targets), losses) in chunks.zip(losses.chunks_mut(ROWS_AT_A_TIME)) {
            let logits = &mut logits[..targets.len() * n_classes];
            dense_forward_into(x, w, bias, n_in, self.precision, logits);
            kernels::cross_entropy(logits, n_classes, targets, self.smoothing, losses);
        }
        Ok((CpuStorage::F32(losses), Shape::from(self.targets.len())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        d_losses: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n_classes, n_in) = w.dims2()?;
        let (d_x, d_w, d_b) =
            with_slices([x, w, bias, &d_losses.contiguous()?], |[x, w, bias, d_losses]| {
                let (mut d_x, mut d_w, mut d_b) =
                    (vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; bias.len()]);
                let n_elements = ROWS_AT_A_TIME.min(d_losses.len()) * n_classes;
                let (mut logits, mut d_logits) = (vec![0.0; n_elements], vec![0.0; n_elements]);
                for start in (0..d_losses.len()).step_by(ROWS_AT_A_TIME) {
                    let rows = start..(start + ROWS_AT_A_TIME).min(d_losses.len());
                    let elements = rows.start * n_in..rows.end * n_in;
                    let (x, targets) = (&x[elements.clone()], &self.targets[rows.clone()]);
                    let logits = &mut logits[..rows.len() * n_classes];
                    let d_logits = &mut d_logits[..rows.len() * n_classes];
                    dense_forward_into(x, w, bias, n_in, self.precision, logits);
                    let d_losses = &d_losses[rows];
                    kernels::cross_entropy_backward(
                        logits,
                        n_classes,
                        targets,
                        self.smoothing,
                        d_losses,
                        d_logits,
                    );
                    dense_input_gradient_into(d_logits, w, n_in, self.precision, &mut d_x[elements]);
                    dense_weight_gradient(d_logits, x, n_in, start > 0, self.precision, &mut d_w);
                    if !d_b.is_empty() {
                        add_column_sums(d_logits, &mut d_b);
                    }
                }
                (d_x, d_w, d_b)
            })?;
        let d_b = if d_b.is_empty() { None } else { Some(tensor(d_b, bias)?) };
        Ok((Some(tensor(d_x, x)?), Some(tensor(d_w, w)?), d_b))
    }
}

struct FrozenCrossEntropy {
    weight: FrozenWeight,
    bias: Option<Vec<f32>>,
    targets: Arc<[u32]>,
    smoothing: f32,
}

impl CustomOp1 for FrozenCrossEntropy {
    fn name(&self) -> &'static str {
        "frozen-linear-cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, n_in, n_classes) = (slice(s, l)?, self.weight.in_features(), self.weight.out_features());
        let mut losses = vec![0.0; self.targets.len()];
        let mut logits = vec![0.0; ROWS_AT_A_TIME.min(losses.len()) * n_classes];
        let chunks = x.chunks(ROWS_AT_A_TIME * n_in).zip(self.targets.chunks(ROWS_AT_A_TIME));
        for ((x, targets), losses) in chunks.zip(losses.chunks_mut(ROWS_AT_A_TIME)) {
            let logits = &mut logits[..targets.len() * n_classes];
            self.weight.forward_into(x, targets.len(), self.bias.as_deref(), logits);
            kernels::cross_entropy(logits, n_classes, targets, self.smoothing, losses);
        }
        Ok((CpuStorage::F32(losses), Shape::from(self.targets.len())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_losses: &Tensor) -> Result<Option<Tensor>> {
        let (n_in, n_classes) = (self.weight.in_features(), self.weight.out_features());
        let d_x = with_slices([x, &d_losses.contiguous()?], |[x, d_losses]| {
            let mut d_x = vec![0.0; x.len()];
            let n_elements = ROWS_AT_A_TIME.min(d_losses.len()) * n_classes;
            let (mut logits, mut d_logits) = (vec![0.0; n_elements], vec![0.0; n_elements]);
            for start in (0..d_losses.len()).step_by(ROWS_AT_A_TIME) {
                let rows = start..(start + ROWS_AT_A_TIME).min(d_losses.len());
                let elements = rows.start * n_in..rows.end * n_in;
                let logits = &mut logits[..rows.len() * n_classes];
                let d_logits = &mut d_logits[..rows.len() * n_classes];
                let bias = self.bias.as_deref();
                self.weight.forward_into(&x[elements.clone()], rows.len(), bias, logits);
                let (targets, d_losses) = (&self.targets[rows.clone()], &d_losses[rows.clone()]);
                kernels::cross_entropy_backward(
                    logits,
                    n_classes,
                    targets,
                    self.smoothing,
                    d_losses,
                    d_logits,
                );
                self.weight.input_gradient(d_logits, rows.len(), &mut d_x[elements]);
            }
            d_x
        })?;
        tensor(d_x, x).map(Some)
    }
}
