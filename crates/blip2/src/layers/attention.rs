//! Scaled dot-product attention over packed rows.

use std::sync::Arc;

use blip2_kernels::attention as kernels;
pub(crate) use blip2_kernels::attention::Element;
pub use blip2_kernels::attention::{AttentionShape, Sequence, Span};
use blip2_kernels::dropout::Dropout;
use blip2_kernels::gemm::Precision;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::view::{slice, tensor, with_slices};
use crate::cache::{LayerRows, with_rows};

/// Which query rows attend to which key rows: one entry a sequence.
pub type Plan = Arc<[Sequence]>;

/// Multi-head attention, grouped-query where `shape.n_kv_heads < shape.n_heads`.
///
/// # Shapes
/// - `q`: `[Nq, n_heads * head_dim]`; `k`, `v`: `[Nk, n_kv_heads * head_dim]`
/// - returns `[Nq, n_heads * head_dim]`; a query row that no sequence of `plan` names is zero
///
/// `dropout` acts on the probabilities, after the softmax.
///
/// # Errors
/// Those of the tensor engine.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    plan: &Plan,
    shape: AttentionShape,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let op = Attention { plan: plan.clone(), shape, bias: None, dropout };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// [`attention`] of frozen rows in which queries, keys and values stand side by side, `[N, 3 * n_heads * head_dim]`, as one
/// linear layer gives them: the same without copies. No gradient. With [`Precision::Bf16`] products may be rounded.
///
/// # Errors
/// Those of the tensor engine.
pub(crate) fn attention_joint(
    qkv: &Tensor,
    plan: &Plan,
    shape: AttentionShape,
    precision: Precision,
) -> Result<Tensor> {
    let (n_rows, width) = (qkv.dim(0)?, shape.n_heads * shape.head_dim);
    let out = with_slices([&qkv.contiguous()?], |[qkv]| {
        let mut out = vec![0.0; n_rows * width];
        kernels::attention_joint(qkv, plan, shape, precision, &mut out);
        out
    })?;
    Tensor::from_vec(out, (n_rows, width), qkv.device())
}

/// What is added to a score by how far the key stands from the query (T5).
#[derive(Debug, Clone)]
pub struct RelativeBias {
    /// `[n_heads, width]`; column `n_before + key - query`, where the last query of a sequence stands at its last key.
    pub values: Arc<[f32]>,
    /// Columns for keys before the query.
    pub n_before: usize,
}

impl RelativeBias {
    fn view(&self) -> kernels::RelativeBias<'_> {
        kernels::RelativeBias { values: &self.values, n_before: self.n_before }
    }
}

/// [`attention`], of the same shapes, with a frozen bias on the scores and without dropout.
///
/// # Errors
/// Those of the tensor engine.
pub fn attention_biased(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    plan: &Plan,
    shape: AttentionShape,
    bias: &RelativeBias,
) -> Result<Tensor> {
    let op = Attention { plan: plan.clone(), shape, bias: Some(bias.clone()), dropout: None };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// [`attention`] of rows that continue cached ones: appends `k` and `v` to the cached rows, then attends to all of them
/// as `plan` says. No gradient.
///
/// # Errors
/// Those of the tensor engine.
pub(crate) fn attention_cached(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cached: &mut LayerRows,
    plan: &Plan,
    shape: AttentionShape,
    bias: Option<&RelativeBias>,
) -> Result<Tensor> {
    keep_rows(cached, k, v)?;
    attention_to(q, cached, plan, shape, bias)
}

/// Appends rows to those that are kept.
///
/// # Errors
/// Those of the tensor engine; then nothing was appended.
pub(crate) fn keep_rows(kept: &mut LayerRows, k: &Tensor, v: &Tensor) -> Result<()> {
    with_slices([&k.contiguous()?, &v.contiguous()?], |[k, v]| kept.push(k, v))
}

/// [`attention`] to rows that are kept elsewhere. No gradient.
///
/// # Errors
/// Those of the tensor engine.
pub(crate) fn attention_to(
    q: &Tensor,
    rows: &LayerRows,
    plan: &Plan,
    shape: AttentionShape,
    bias: Option<&RelativeBias>,
) -> Result<Tensor> {
    let out = with_slices([&q.contiguous()?], |[q]| {
        let mut out = vec![0.0; q.len()];
        let bias = bias.map(RelativeBias::view);
        with_rows!(rows, rows => {
            kernels::attention(q, &rows.keys, &rows.values, plan, shape, bias, None, &mut out);
        });
        out
    })?;
    tensor(out, q)
}

struct Attention {
    plan: Plan,
    shape: AttentionShape,
    bias: Option<RelativeBias>,
    dropout: Option<Dropout>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
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
        let (q, k, v) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let mut out = vec![0.0; q.len()];
        let bias = self.bias.as_ref().map(RelativeBias::view);
        kernels::attention(q, k, v, &self.plan, self.shape, bias, self.dropout, &mut out);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [d_q, d_k, d_v] = with_slices([q, k, v, &d_out.contiguous()?], |[q, k, v, d_out]| {
            let (plan, shape) = (&self.plan, self.shape);
            kernels::attention_backward(
                q,
                k,
                v,
                d_out,
                plan,
                shape,
                self.bias.as_ref().map(RelativeBias::view),
                self.dropout,
            )
        })?;
        Ok((Some(tensor(d_q, q)?), Some(tensor(d_k, k)?), Some(tensor(d_v, v)?)))
    }
}
