//! Gradients of weights, summed where they are made.
//!
//! The tensor engine adds each gradient to zeros of its own, in one thread: three passes over memory, which for weights are as
//! many as the model has. Here the operations that know how add to the sum themselves.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

use super::view::tensor;

/// The gradients of weights, row-major, by the tensor of the weight.
pub type WeightGradients = HashMap<TensorId, Vec<f32>>;

thread_local! {
    /// Those of the backward pass that this thread is in, if it is one of [`backward`].
    static SUMS: RefCell<Option<WeightGradients>> = const { RefCell::new(None) };
}

/// A backward pass from `loss`. Gradients of weights that linear layers, embeddings and [`linear_cross_entropy`] use are added to
/// `sums`; everything else, and what other operations do with a weight, is in what is returned.
///
/// [`linear_cross_entropy`]: super::linear_cross_entropy
///
/// # Errors
/// Those of the tensor engine; then nothing is in `sums`.
pub fn backward(loss: &Tensor, sums: &mut WeightGradients) -> Result<GradStore> {
    /// Whatever happens, another backward pass of this thread has its gradients to itself.
    struct End;

    impl Drop for End {
        fn drop(&mut self) {
            SUMS.take();
        }
    }

    let _end = End;
    SUMS.set(Some(std::mem::take(sums)));
    let store = loss.backward()?;
    *sums = SUMS.take().unwrap_or_default();
    Ok(store)
}

/// Adds to the gradient of `weight`, as part of an operation's backward pass: `add` is given what is there, if anything is, and
/// gives that with its own added. Gives the gradient where nobody sums it, for the tensor engine.
pub(super) fn add_to(
    weight: &Tensor,
    add: impl FnOnce(Option<Vec<f32>>) -> Vec<f32>,
) -> Result<Option<Tensor>> {
    let earlier = SUMS.with_borrow_mut(|sums| sums.as_mut().map(|sums| sums.remove(&weight.id())));
    let is_summed = earlier.is_some();
    let gradient = add(earlier.flatten());
    if !is_summed {
        return tensor(gradient, weight).map(Some);
    }
    SUMS.with_borrow_mut(|sums| sums.get_or_insert_default().insert(weight.id(), gradient));
    Ok(None)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::{Linear, Precision, Weight, linear_cross_entropy};
    use super::*;

    /// A loss with a weight used three times, one of them by the tensor engine's own operations.
    fn loss(weight: &Var, x: &Tensor) -> Tensor {
        let weight = weight.as_tensor();
        let head = Linear::new(Weight::Dense(weight.clone(), Precision::F32), None);
        let own = head.forward(x).and_then(|y| y.sqr()?.sum_all());
        let losses = linear_cross_entropy(x, &head, &[2, 0], 0.1).and_then(|losses| losses.sum_all());
        let engines = weight.sqr().and_then(|w| w.sum_all());
        ((own.unwrap() + losses.unwrap()).unwrap() + engines.unwrap()).unwrap()
    }

    fn values(gradient: &Tensor) -> Vec<f32> {
        gradient.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn sums_and_what_the_engine_has_are_the_gradient_as_often_as_it_was_added() {
        let weight = Var::new(&[[1.0f32, -2.0], [0.5, 3.0], [-1.0, 0.25]], &Device::Cpu).unwrap();
        let x = Tensor::new(&[[0.5f32, 1.0], [-1.5, 2.0]], &Device::Cpu).unwrap();
        let whole = || values(&loss(&weight, &x).backward().unwrap().remove(weight.as_tensor()).unwrap());
        let expected = whole();
        let mut sums = WeightGradients::new();
        for times in [1.0, 2.0] {
            let store = backward(&loss(&weight, &x), &mut sums).unwrap();
            let engines = values(store.get(weight.as_tensor()).unwrap());
            assert_eq!(engines, values(weight.as_tensor()).iter().map(|w| 2.0 * w).collect::<Vec<_>>());
            for ((sum, engines), expected) in sums[&weight.id()].iter().zip(engines).zip(&expected) {
                let found = sum + times * engines;
                assert!(
                    (found - times * expected).abs() < 1e-4,
                    "{found} instead of {times} times {expected}"
                );
            }
        }
        assert_eq!(whole(), expected, "a pass of the tensor engine has its gradients to itself again");
    }
}
