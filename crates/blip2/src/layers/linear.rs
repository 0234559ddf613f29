//! The affine map, in whatever format its weight is held.

use blip2_kernels::column_sums::add_column_sums;
use blip2_kernels::gemm::{MatrixRef, Precision, Start, gemm, product};
use blip2_kernels::linear::Epilogue;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::view::{slice, tensor, with_slices};
use super::weight_gradient::add_to;
use super::{Activation, FrozenWeight, activate};

/// A weight matrix `[out, in]`.
#[derive(Clone)]
pub enum Weight {
    /// A plain tensor, trainable where it is a variable; products are computed in the given precision.
    Dense(Tensor, Precision),
    /// Frozen, in a format that the kernels read.
    Frozen(FrozenWeight),
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dense(w, precision) => write!(f, "Dense({:?}, {precision:?})", w.shape()),
            Self::Frozen(w) => w.fmt(f),
        }
    }
}

/// How large matrices are: what a row is multiplied with, two operations a weight, and what is read of memory for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MatrixSize {
    /// Numbers, however they are stored.
    pub n_weights: usize,
    /// Bytes, scales included.
    pub n_bytes: usize,
}

impl std::iter::Sum for MatrixSize {
    fn sum<I: Iterator<Item = Self>>(sizes: I) -> Self {
        sizes.fold(Self::default(), |a, b| Self {
            n_weights: a.n_weights + b.n_weights,
            n_bytes: a.n_bytes + b.n_bytes,
        })
    }
}

/// `x Wᵀ + b`. The weight's format is a property of the value, so one model definition serves training and
/// every inference precision.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// From a weight `[out, in]` and a bias `[out]`.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Maps the rows of `x`, `[N, in]`, to `[N, out]`.
    ///
    /// # Errors
    /// When the width of `x` is not `in`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        match &self.weight {
            Weight::Dense(weight, precision) => {
                let bias = match &self.bias {
                    Some(bias) => bias.clone(),
                    None => Tensor::zeros(0, x.dtype(), x.device())?,
                };
                x.apply_op3(weight, &bias, DenseLinear { precision: *precision })
            }
            Weight::Frozen(weight) => x.apply_op1(self.frozen(weight, Activation::Identity)?),
        }
    }

    /// [`forward`](Self::forward) without a gradient, into memory that is used again: what a large result takes anew, the system
    /// gives page by page.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub(crate) fn forward_into(&self, x: &Tensor, y: &mut Vec<f32>) -> Result<()> {
        let Weight::Frozen(weight) = &self.weight else {
            y.clear();
            return with_slices([&self.forward(x)?], |[result]| y.extend_from_slice(result));
        };
        check_width(x.layout(), weight.in_features())?;
        let layer = self.frozen(weight, Activation::Identity)?;
        with_slices([&x.contiguous()?], |[x]| {
            let n_rows = x.len() / weight.in_features();
            y.resize(n_rows * weight.out_features(), 0.0);
            weight.forward_into(x, n_rows, Epilogue::bias(layer.bias.as_deref()), y);
        })
    }

    /// `activation(x Wᵀ + b) + residual`. Where the weight is frozen and nothing before has a gradient, it is one pass
    /// over the result; everywhere it is the same, bit for bit, and has its gradient.
    ///
    /// # Errors
    /// When the width of `x` is not `in`, or the residual is not of the result's shape.
    pub fn forward_then(
        &self,
        x: &Tensor,
        activation: Activation,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let is_tracked = x.track_op() || residual.is_some_and(Tensor::track_op);
        if let Weight::Frozen(weight) = &self.weight
            && !is_tracked
        {
            let (x, op) = (x.contiguous()?, self.frozen(weight, activation)?);
            return match residual {
                Some(residual) => x.apply_op2_no_bwd(&residual.contiguous()?, &op),
                None => x.apply_op1_no_bwd(&op),
            };
        }
        let mut y = self.forward(x)?;
        if activation != Activation::Identity {
            y = activate(&y, activation)?;
        }
        match residual {
            Some(residual) => y + residual,
            None => Ok(y),
        }
    }

    /// [`forward`](Self::forward) of several layers to the same `x`; frozen ones are computed together where nothing before has
    /// a gradient.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let x = x.contiguous()?;
        let frozen: Option<Vec<_>> = layers
            .iter()
            .map(|layer| match &layer.weight {
                Weight::Frozen(weight) if !x.track_op() => Some(layer.frozen(weight, Activation::Identity)),
                _ => None,
            })
            .collect();
        let results: Vec<Tensor> = match frozen {
            Some(frozen) => {
                let frozen = frozen.into_iter().collect::<Result<Vec<_>>>()?;
                for layer in &frozen {
                    check_width(x.layout(), layer.weight.in_features())?;
                }
                let products: Vec<_> = frozen
                    .iter()
                    .map(|layer| (&layer.weight, Epilogue::bias(layer.bias.as_deref())))
                    .collect();
                let n_rows = x.elem_count() / products.first().map_or(1, |(weight, _)| weight.in_features());
                let results = with_slices([&x], |[x]| FrozenWeight::forward_all(&products, x, n_rows))?;
                let tensor = |(y, layer): (_, &FrozenLinear)| {
                    Tensor::from_vec(y, output_shape(x.layout(), layer.weight.out_features()), x.device())
                };
                results.into_iter().zip(&frozen).map(tensor).collect::<Result<_>>()?
            }
            None => layers.iter().map(|layer| layer.forward(&x)).collect::<Result<_>>()?,
        };
        match results.try_into() {
            Ok(results) => Ok(results),
            Err(results) => candle_core::bail!("{} results of {N} layers", Vec::<Tensor>::len(&results)),
        }
    }

    fn frozen(&self, weight: &FrozenWeight, activation: Activation) -> Result<FrozenLinear> {
        let bias = self.bias.as_ref().map(Tensor::to_vec1).transpose()?;
        Ok(FrozenLinear { weight: weight.clone(), bias, activation })
    }

    /// The precision that suffices for what goes with its products; see [`FrozenWeight::precision`].
    pub(crate) fn precision(&self) -> Precision {
        match &self.weight {
            Weight::Dense(_, precision) => *precision,
            Weight::Frozen(weight) => weight.precision(),
        }
    }

    /// The numbers of its matrix.
    pub fn matrix(&self) -> MatrixSize {
        match &self.weight {
            Weight::Dense(weight, _) => {
                let n_weights = weight.elem_count();
                MatrixSize { n_weights, n_bytes: n_weights * weight.dtype().size_in_bytes() }
            }
            Weight::Frozen(weight) => MatrixSize {
                n_weights: weight.out_features() * weight.in_features(),
                n_bytes: weight.n_bytes(),
            },
        }
    }

    pub(super) fn weight(&self) -> &Weight {
        &self.weight
    }

    pub(super) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

/// A matrix stored row by row.
fn rows(data: &[f32], width: usize) -> MatrixRef<'_> {
    MatrixRef { data, row_stride: width, col_stride: 1 }
}

/// The transpose of a matrix stored row by row.
fn columns(data: &[f32], width: usize) -> MatrixRef<'_> {
    MatrixRef { data, row_stride: 1, col_stride: width }
}

/// `x Wᵀ (+ b)` on slices; an empty bias is none.
pub(super) fn dense_forward(
    x: &[f32],
    w: &[f32],
    bias: &[f32],
    n_in: usize,
    precision: Precision,
) -> Vec<f32> {
    let (n_rows, n_out) = (x.len() / n_in, w.len() / n_in);
    let a = rows(x, n_in);
    let b = columns(w, n_in);
    product(n_rows, n_out, n_in, a, b, (!bias.is_empty()).then_some(bias), precision)
}

/// `d_y W` on slices.
pub(super) fn dense_input_gradient(d_y: &[f32], w: &[f32], n_in: usize, precision: Precision) -> Vec<f32> {
    let n_out = w.len() / n_in;
    let a = rows(d_y, n_out);
    let b = rows(w, n_in);
    product(d_y.len() / n_out, n_in, n_out, a, b, None, precision)
}

/// `d_yᵀ x`, added to what there is.
pub(super) fn dense_weight_gradient(
    d_y: &[f32],
    x: &[f32],
    [n_out, n_in]: [usize; 2],
    precision: Precision,
    earlier: Option<Vec<f32>>,
) -> Vec<f32> {
    let n_rows = x.len() / n_in;
    let a = columns(d_y, n_out);
    let b = rows(x, n_in);
    match earlier {
        Some(mut sum) => {
            gemm(n_out, n_in, n_rows, a, b, Start::Result, &mut sum, precision);
            sum
        }
        None => product(n_out, n_in, n_rows, a, b, None, precision),
    }
}

fn check_width(x: &Layout, n_in: usize) -> Result<()> {
    match x.dims().last() {
        Some(&width) if width == n_in => Ok(()),
        _ => candle_core::bail!("a linear layer of {n_in} inputs was given {:?}", x.shape()),
    }
}

fn output_shape(x: &Layout, n_out: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = n_out;
    }
    Shape::from(dims)
}

struct DenseLinear {
    precision: Precision,
}

impl CustomOp3 for DenseLinear {
    fn name(&self) -> &'static str {
        "linear"
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
        let (n_out, n_in) = l2.shape().dims2()?;
        check_width(l1, n_in)?;
        let y = dense_forward(x, w, bias, n_in, self.precision);
        Ok((CpuStorage::F32(y), output_shape(l1, n_out)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n_out, n_in) = w.dims2()?;
        let d_y = d_y.contiguous()?;
        let d_w = if w.is_variable() {
            with_slices([x, &d_y], |[x, d_y]| {
                add_to(w, |earlier| dense_weight_gradient(d_y, x, [n_out, n_in], self.precision, earlier))
            })??
        } else {
            None
        };
        let (d_x, d_b) = with_slices([w, &d_y], |[w, d_y]| {
            let d_b = (bias.elem_count() > 0).then(|| {
                let mut d_b = vec![0.0; bias.elem_count()];
                add_column_sums(d_y, &mut d_b);
                d_b
            });
            (dense_input_gradient(d_y, w, n_in, self.precision), d_b)
        })?;
        let d_b = d_b.map(|d| tensor(d, bias)).transpose()?;
        Ok((Some(tensor(d_x, x)?), d_w, d_b))
    }
}

struct FrozenLinear {
    weight: FrozenWeight,
    bias: Option<Vec<f32>>,
    activation: Activation,
}

impl FrozenLinear {
    fn forward(&self, s: &CpuStorage, l: &Layout, residual: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let (x, n_in, n_out) = (slice(s, l)?, self.weight.in_features(), self.weight.out_features());
        check_width(l, n_in)?;
        let (n_rows, shape) = (x.len() / n_in, output_shape(l, n_out));
        if residual.is_some_and(|residual| residual.len() != n_rows * n_out) {
            candle_core::bail!("a residual was given that has not the shape {shape:?}");
        }
        let epilogue = Epilogue { bias: self.bias.as_deref(), activation: self.activation, residual };
        Ok((CpuStorage::F32(self.weight.forward(x, n_rows, epilogue)), shape))
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(s, l, None)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, d_y: &Tensor) -> Result<Option<Tensor>> {
        if self.activation != Activation::Identity {
            candle_core::bail!("a fused activation has no gradient");
        }
        let d_x = with_slices([&d_y.contiguous()?], |[d_y]| {
            self.weight.input_gradient(d_y, d_y.len() / self.weight.out_features())
        })?;
        tensor(d_x, x).map(Some)
    }
}

/// The second argument is the residual.
impl CustomOp2 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear-residual"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(s1, l1, Some(slice(s2, l2)?))
    }
}
