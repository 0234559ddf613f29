//! Cross-entropy, alone and fused with the vocabulary projection.

use std::ops::Range;
use std::sync::Arc;

use blip2_kernels::column_sums::add_column_sums;
use blip2_kernels::cross_entropy as kernels;
use blip2_kernels::gemm::Precision;
use blip2_kernels::linear::Epilogue;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::linear::{dense_forward, dense_input_gradient, dense_weight_gradient};
use super::view::{slice, tensor, with_slices};
use super::weight_gradient::add_to;
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
    logits.contiguous()?.apply_op1(CrossEntropy(Targets { classes: targets.into(), smoothing }))
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
    let targets = Targets { classes: targets.into(), smoothing };
    match head.weight() {
        Weight::Dense(weight, precision) => {
            check_targets(&targets.classes, n_rows, weight.dim(0)?)?;
            let bias = match head.bias() {
                Some(bias) => bias.clone(),
                None => Tensor::zeros(0, x.dtype(), x.device())?,
            };
            x.apply_op3(weight, &bias, DenseCrossEntropy { targets, precision: *precision })
        }
        Weight::Frozen(weight) => {
            check_targets(&targets.classes, n_rows, weight.out_features())?;
            let bias = head.bias().map(Tensor::to_vec1).transpose()?;
            x.apply_op1(FrozenCrossEntropy { weight: weight.clone(), bias, targets })
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

/// The right class of each row, and how much of the mass goes to all classes alike.
struct Targets {
    classes: Arc<[u32]>,
    smoothing: f32,
}

impl Targets {
    /// The rows in blocks of [`ROWS_AT_A_TIME`].
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let n_rows = self.classes.len();
        (0..n_rows).step_by(ROWS_AT_A_TIME).map(move |start| start..(start + ROWS_AT_A_TIME).min(n_rows))
    }

    /// The loss of each row; `logits_of(rows)` computes the logits of a block.
    fn losses(&self, n_classes: usize, logits_of: impl Fn(Range<usize>) -> Vec<f32>) -> (CpuStorage, Shape) {
        let mut losses = vec![0.0; self.classes.len()];
        for rows in self.blocks() {
            let logits = logits_of(rows.clone());
            let (targets, losses) = (&self.classes[rows.clone()], &mut losses[rows]);
            kernels::cross_entropy(&logits, n_classes, targets, self.smoothing, losses);
        }
        (CpuStorage::F32(losses), Shape::from(self.classes.len()))
    }

    /// Hands the gradient of each block's logits to `visit(rows, d_logits)`; `logits_of` as in [`Self::losses`].
    fn backward(
        &self,
        n_classes: usize,
        d_losses: &[f32],
        logits_of: impl Fn(Range<usize>) -> Vec<f32>,
        mut visit: impl FnMut(Range<usize>, &[f32]),
    ) {
        for rows in self.blocks() {
            let mut logits = logits_of(rows.clone());
            let (targets, d_losses) = (&self.classes[rows.clone()], &d_losses[rows.clone()]);
            kernels::cross_entropy_backward(&mut logits, n_classes, targets, self.smoothing, d_losses);
            visit(rows, &logits);
        }
    }
}

/// Where some rows of `width` elements lie.
fn elements(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

struct CrossEntropy(Targets);

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n_rows, n_classes) = l.shape().dims2()?;
        let Targets { classes, smoothing } = &self.0;
        let mut losses = vec![0.0; n_rows];
        kernels::cross_entropy(slice(s, l)?, n_classes, classes, *smoothing, &mut losses);
        Ok((CpuStorage::F32(losses), Shape::from(n_rows)))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, d_losses: &Tensor) -> Result<Option<Tensor>> {
        let (_, n_classes) = logits.dims2()?;
        let Targets { classes, smoothing } = &self.0;
        let d_logits = with_slices([logits, &d_losses.contiguous()?], |[x, d_losses]| {
            let mut d_x = x.to_vec();
            kernels::cross_entropy_backward(&mut d_x, n_classes, classes, *smoothing, d_losses);
            d_x
        })?;
        tensor(d_logits, logits).map(Some)
    }
}

struct DenseCrossEntropy {
    targets: Targets,
    precision: Precision,
}

impl DenseCrossEntropy {
    /// Computes the logits of some rows of `x`, `[N, n_in]`.
    fn logits_of(&self, [x, w, bias]: [&[f32]; 3], n_in: usize) -> impl Fn(Range<usize>) -> Vec<f32> {
        let precision = self.precision;
        move |rows| dense_forward(&x[elements(&rows, n_in)], w, bias, n_in, precision)
    }
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
        let operands = [slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?];
        let (n_classes, n_in) = l2.shape().dims2()?;
        Ok(self.targets.losses(n_classes, self.logits_of(operands, n_in)))
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
        let (mut d_x, mut d_b) = (Vec::with_capacity(x.elem_count()), vec![0.0; bias.elem_count()]);
        let d_w = with_slices([x, w, bias, &d_losses.contiguous()?], |[x, ws, bias, d_losses]| {
            add_to(w, |mut d_w| {
                let logits_of = self.logits_of([x, ws, bias], n_in);
                self.targets.backward(n_classes, d_losses, logits_of, |rows, d_logits| {
                    let own = elements(&rows, n_in);
                    d_x.extend_from_slice(&dense_input_gradient(d_logits, ws, n_in, self.precision));
                    let shape = [n_classes, n_in];
                    d_w = Some(dense_weight_gradient(d_logits, &x[own], shape, self.precision, d_w.take()));
                    if !d_b.is_empty() {
                        add_column_sums(d_logits, &mut d_b);
                    }
                });
                d_w.unwrap_or_else(|| vec![0.0; ws.len()])
            })
        })??;
        let d_b = if d_b.is_empty() { None } else { Some(tensor(d_b, bias)?) };
        Ok((Some(tensor(d_x, x)?), d_w, d_b))
    }
}

struct FrozenCrossEntropy {
    weight: FrozenWeight,
    bias: Option<Vec<f32>>,
    targets: Targets,
}

impl FrozenCrossEntropy {
    /// Computes the logits of some rows of `x`, `[N, n_in]`.
    fn logits_of(&self, x: &[f32]) -> impl Fn(Range<usize>) -> Vec<f32> {
        move |rows| {
            let own = elements(&rows, self.weight.in_features());
            self.weight.forward(&x[own], rows.len(), Epilogue::bias(self.bias.as_deref()))
        }
    }
}

impl CustomOp1 for FrozenCrossEntropy {
    fn name(&self) -> &'static str {
        "frozen-linear-cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(self.targets.losses(self.weight.out_features(), self.logits_of(slice(s, l)?)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_losses: &Tensor) -> Result<Option<Tensor>> {
        let n_classes = self.weight.out_features();
        let d_x = with_slices([x, &d_losses.contiguous()?], |[x, d_losses]| {
            let mut d_x = Vec::with_capacity(x.len());
            self.targets.backward(n_classes, d_losses, self.logits_of(x), |rows, d_logits| {
                d_x.extend_from_slice(&self.weight.input_gradient(d_logits, rows.len()));
            });
            d_x
        })?;
        tensor(d_x, x).map(Some)
    }
}
