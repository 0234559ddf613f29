//! What the golden tests of both stages share: every gradient, and ten steps of the optimiser.

use std::collections::BTreeMap;

use blip2_train::gradients::Gradients;
use blip2_train::optimizer::{Optimizer, OptimizerConfig};
use candle_core::Var;
use serde::Deserialize;

use crate::golden::{Comparison, Golden};

/// Compares the gradient of every variable, which are all that the file has; gives their number.
pub(crate) fn compare_gradients(
    golden: &Golden,
    comparison: &mut Comparison<'_>,
    variables: &BTreeMap<String, Var>,
    gradients: &Gradients,
) -> usize {
    let names: Vec<&str> = golden.expected().filter_map(|name| name.strip_prefix("grad.")).collect();
    assert_eq!(names, variables.keys().collect::<Vec<_>>());
    for name in &names {
        comparison.slice(&format!("grad.{name}"), gradients.get(name).expect("a gradient"));
    }
    names.len()
}

#[derive(Deserialize)]
struct Recipe {
    lr: f64,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
    clip_norm: f64,
}

/// Ten steps with the optimiser of the file: the losses that `step` gives, the norms, and the variables in the end.
pub(crate) fn ten_steps_agree(
    golden: &Golden,
    variables: &BTreeMap<String, Var>,
    step: impl Fn() -> (Gradients, f32),
) {
    let Recipe { lr, beta1, beta2, eps, weight_decay, clip_norm } = golden.metadata("optimizer");
    let config = OptimizerConfig { beta1, beta2, eps, weight_decay, clip_norm };
    let mut optimizer = Optimizer::new(config, variables);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let (gradients, loss) = step();
        losses.push(loss);
        norms.push(optimizer.step(variables, &gradients, &|_| lr).expect("a step") as f32);
    }
    let mut comparison = golden.comparison();
    comparison.slice("steps.loss", &losses);
    comparison.slice("steps.gradient_norm", &norms);
    for (name, variable) in variables {
        comparison.tensor(&format!("final.{name}"), variable);
    }
    comparison.finish(2 + variables.len());
}
