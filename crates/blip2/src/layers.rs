//! The layers all towers share, each written once, for inference and for training.
//!
//! This folder is where a model's tensors meet the kernels of [`blip2_kernels`]. What is public here is differentiable
//! with respect to its inputs and its trainable weights; the forms that only inference uses are private to this crate and
//! say that they have no gradient. candle's own fused softmax and layer norm silently have none either; nothing may use them.
//!
//! # Packed rows
//!
//! A batch of token sequences is one `[N, D]` tensor of rows without padding. A [`Plan`] tells attention which
//! rows belong together, so a batch equals its singles bit for bit and nothing is computed for padding.

mod activation;
mod attention;
mod dropout;
mod embedding;
mod frozen;
mod linear;
mod loss;
mod norm;
mod parameters;
mod rope;
mod view;
mod weight_gradient;

pub use activation::{activate, gated};
pub use attention::{AttentionShape, Plan, RelativeBias, Sequence, Span, attention, attention_biased};
pub(crate) use attention::{Element, attention_cached, attention_joint, attention_to, keep_rows};
pub use blip2_kernels::activation::Activation;
pub use blip2_kernels::gemm::Precision;
pub use blip2_kernels::isa::{Isa, UnknownIsa};
pub use dropout::DropoutRng;
pub use embedding::Embedding;
pub use frozen::{FrozenFormat, FrozenWeight, Quantization};
pub use linear::{Linear, MatrixSize, Weight};
pub use loss::{cross_entropy, linear_cross_entropy};
pub use norm::{LayerNorm, RmsNorm};
pub use parameters::{Loader, TensorSource, Trainable};
pub use rope::rope;
pub use weight_gradient::{WeightGradients, backward};
