//! Gradients by parameter name.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use blip2::layers;
use blip2_kernels::adamw::sum_of_squares;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var};
use rayon::prelude::*;

use crate::{Error, Result};

/// The gradient of each trainable variable, summed over the parts of a batch.
#[derive(Debug, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, Vec<f32>>,
}

impl Gradients {
    /// A backward pass from `loss`, whose gradients of `variables` are added; a variable that it does not reach is left out.
    /// Returns the gradients of everything else.
    ///
    /// # Errors
    /// Those of the tensor engine. What was summed before is lost then.
    pub fn backward(&mut self, variables: &BTreeMap<String, Var>, loss: &Tensor) -> Result<GradStore> {
        let earlier = |(name, variable): (_, &Var)| Some((variable.id(), self.by_name.remove(name)?));
        let mut sums = variables.iter().filter_map(earlier).collect();
        let mut store = layers::backward(loss, &mut sums)?;
        for (name, variable) in variables {
            let rest = store.remove(variable.as_tensor()).map(into_values).transpose()?;
            let sum = match (sums.remove(&variable.id()), rest) {
                (Some(mut sum), Some(rest)) => {
                    sum.par_iter_mut().zip(&rest).for_each(|(s, g)| *s += g);
                    sum
                }
                (Some(sum), None) | (None, Some(sum)) => sum,
                (None, None) => continue,
            };
            self.by_name.insert(name.clone(), sum);
        }
        Ok(store)
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
            let part = sum_of_squares(gradient);
            if !part.is_finite() {
                return Err(Error::NotFinite { step, what: format!("the gradient of {name}") });
            }
            sum += part;
        }
        Ok(sum.sqrt())
    }
}

/// The numbers of a gradient, in row-major order. The tensor engine made them for it alone, as the sum of what came back along each
/// path: they are taken out, not copied. Whoever has a clone of the tensor finds it empty.
fn into_values(gradient: Tensor) -> candle_core::Result<Vec<f32>> {
    struct TakeOut(Mutex<Option<Vec<f32>>>);

    impl InplaceOp1 for TakeOut {
        fn name(&self) -> &'static str {
            "take-out"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            if let CpuStorage::F32(values) = storage
                && layout.contiguous_offsets() == Some((0, values.len()))
            {
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::mem::take(values));
            }
            Ok(())
        }
    }

    let taken = TakeOut(Mutex::new(None));
    gradient.inplace_op1(&taken)?;
    match taken.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(values) => Ok(values),
        // Part of other numbers, or in another order.
        None => gradient.flatten_all()?.to_vec1(),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn gradients_are_summed_in_the_order_of_their_variables_whatever_their_layout() {
        let device = Device::Cpu;
        let a = Var::new(&[[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &device).unwrap();
        let variables = BTreeMap::from([("a".to_owned(), a.clone())]);
        let weight = Tensor::new(&[[1.0f32, 10.0], [2.0, 20.0], [3.0, 30.0]], &device).unwrap();
        let mut gradients = Gradients::default();
        for _ in 0..2 {
            // Transposed, and used twice.
            let used = (a.t().unwrap() * &weight).unwrap().sum_all().unwrap();
            let loss = (used + a.sum_all().unwrap()).unwrap();
            gradients.backward(&variables, &loss).unwrap();
        }
        assert_eq!(gradients.get("a").unwrap(), [4.0, 6.0, 8.0, 22.0, 42.0, 62.0]);
        // The variable itself is as it was.
        assert_eq!(a.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn numbers_in_another_order_or_among_others_are_copied() {
        let rows = Tensor::new(&[[1.0f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu).unwrap();
        assert_eq!(into_values(rows.t().unwrap()).unwrap(), [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
        assert_eq!(into_values(rows.narrow(0, 1, 2).unwrap()).unwrap(), [3.0, 4.0, 5.0, 6.0]);
        assert_eq!(into_values(rows.narrow(0, 0, 2).unwrap()).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(into_values(rows).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }
}
