//! Token and position embeddings.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::parameters::Loader;
use super::view::{slice, with_slices};
use super::weight_gradient::add_to;

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
        self.weight.apply_op1(Lookup { ids: ids.to_vec() })
    }

    /// The table, `[n, width]`, for an output head tied to it.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

struct Lookup {
    ids: Vec<u32>,
}

impl CustomOp1 for Lookup {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = l.shape().dims2()?;
        let table = slice(s, l)?;
        let mut rows = Vec::with_capacity(self.ids.len() * width);
        for &id in &self.ids {
            if id as usize >= n {
                bail!("there is no id {id} in a table of {n}");
            }
            rows.extend_from_slice(&table[id as usize * width..][..width]);
        }
        Ok((CpuStorage::F32(rows), Shape::from((self.ids.len(), width))))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, d_rows: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = table.dims2()?;
        with_slices([&d_rows.contiguous()?], |[d_rows]| {
            add_to(table, |earlier| {
                let mut d_table = earlier.unwrap_or_else(|| vec![0.0; table.elem_count()]);
                for (&id, d_row) in self.ids.iter().zip(d_rows.chunks_exact(width)) {
                    let sum = &mut d_table[id as usize * width..][..width];
                    sum.iter_mut().zip(d_row).for_each(|(sum, d)| *sum += d);
                }
                d_table
            })
        })?
    }
}
