//! Gradients by parameter name.

use std::collections::BTreeMap;

use candle_core::Var;
use candle_core::backprop::GradStore;
use rayon::prelude::*;

use crate::{Error, Result};

/// The gradient of each trainable variable, summed over the parts of a batch.
#[derive(Debug, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, Vec<f32>>,
}

impl Gradients {
    /// Adds what a backward pass left for `variables`; a variable without a gradient is left out.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn add(&mut self, variables: &BTreeMap<String, Var>, store: &mut GradStore) -> Result<()> {
        for (name, variable) in variables {
            let Some(gradient) = store.remove(variable.as_tensor()) else { continue };
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            match self.by_name.get_mut(name) {
                Some(sum) => sum.par_iter_mut().zip(&gradient).for_each(|(s, g)| *s += g),
                None => {
                    self.by_name.insert(name.clone(), gradient);
                }
            }
        }
        Ok(())
    }

    /// The gradient of a variable, in its row-major order.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.by_name.get(name).map(Vec::as_slice)
    }

    /// The names of `variables` that no gradient reached: a frozen or forgotten part of the graph.
    pub fn missing<'a>(&self, variables: &'a BTreeMap<String, Var>) -> Vec<&'a str> {
        variables.keys().filter(|name| !self.by_name.contains_key(*name)).map(String::as_str).collect()
    }

    /// The length of all gradients taken as one vector.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the first gradient that is not finite.
    pub fn global_norm(&self, step: u64) -> Result<f64> {
        let mut sum = 0.0;
        for (name, gradient) in &self.by_name {
            // Fixed chunks, summed in order: the same norm for any number of threads.
            let parts: Vec<f64> = gradient
                .par_chunks(1 << 16)
                .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
                .collect();
            let part: f64 = parts.iter().sum();
            if !part.is_finite() {
                return Err(Error::NotFinite { step, what: format!("the gradient of {name}") });
            }
            sum += part;
        }
        Ok(sum.sqrt())
    }
}
