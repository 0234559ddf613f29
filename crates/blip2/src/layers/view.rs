//! Reading a candle tensor as a slice.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};

/// The contiguous f32 elements behind a custom operation's argument.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a kernel argument is not contiguous")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Calls `f` with the elements of contiguous CPU tensors.
pub(super) fn with_slices<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> R,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[f32]; N] = [&[]; N];
    for (out, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *out = match &**storage {
            Storage::Cpu(cpu) => slice(cpu, layout)?,
            _ => bail!("this layer is implemented for the CPU only"),
        };
    }
    Ok(f(slices))
}

/// A CPU tensor from freshly computed elements.
pub(super) fn tensor(data: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(data, like.shape(), like.device())
}
