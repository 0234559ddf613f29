//! Token and position embeddings.

use candle_core::{Result, Tensor};

use super::parameters::Loader;

/// A table of vectors looked up by id.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// Loads `weight`, `[n, width]`.
    ///
    /// # Errors
    /// When the tensor is missing or has another shape.
    pub fn load(loader: &Loader<'_>, n: usize, width: usize) -> crate::Result<Self> {
        Ok(Self { weight: loader.tensor("weight", &[n, width])? })
    }

    /// The vectors of `ids`, `[ids.len(), width]`.
    ///
    /// # Errors
    /// When an id is not in the table.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(ids, ids.len(), self.weight.device())?;
        self.weight.index_select(&ids, 0)
    }

    /// The table, `[n, width]`, for an output head tied to it.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}
