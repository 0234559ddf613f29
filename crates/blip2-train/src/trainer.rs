//! The training loop: deal a batch, compute gradients, update, report, save.
//!
//! The loop knows neither models nor losses: a stage is an [`Objective`]. Everything it needs to go on after a stop
//! is in the checkpoint, and everything random depends on the seed and the step alone, so a run that was killed and
//! resumed ends with the same weights, bit for bit, as one that was not.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, State};
use crate::data::{Batch, Loader};
use crate::gradients::Gradients;
use crate::optimizer::{Optimizer, OptimizerConfig};
use crate::schedule::Schedule;
use crate::{Error, Result};

/// A stage of training: what it trains, and what a batch teaches it.
pub trait Objective {
    /// The trainable variables by checkpoint name.
    fn variables(&self) -> &BTreeMap<String, Var>;

    /// The gradients of a batch, and the values to report; the first value is the total loss.
    ///
    /// # Errors
    /// When the batch cannot be used or the tensor engine fails.
    fn gradients(&self, batch: &Batch, step: u64) -> Result<(Gradients, Vec<Value>)>;

    /// A variable's learning rate, as a factor of the schedule's.
    fn learning_rate_factor(&self, _name: &str) -> f64 {
        1.0
    }

    /// Whether a variable is meant to have no gradient in this step.
    fn waits(&self, _name: &str, _step: u64) -> bool {
        false
    }
}

/// A named number of a step, as it appears in progress lines, logs and plots.
pub type Value = (&'static str, f64);

/// The settings of the loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoopConfig {
    /// Passes over the data.
    pub epochs: u64,
    /// The most steps, where the run is to end before its epochs do; the learning rate's curve ends there too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// The learning rate over the run.
    pub learning_rate: Schedule,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Steps between checkpoints.
    pub save_every: u64,
}

impl LoopConfig {
    /// Refuses settings that no run can have, before anything is read for it.
    ///
    /// # Errors
    /// [`Error::Config`] with the field.
    pub fn validate(&self) -> Result<()> {
        let Self { epochs, max_steps, learning_rate, optimizer, save_every } = self;
        for (field, value) in
            [("epochs", *epochs), ("max_steps", max_steps.unwrap_or(1)), ("save_every", *save_every)]
        {
            if value == 0 {
                return Err(Error::config(format!("run.{field}"), "must be 1 or more"));
            }
        }
        // Written so that what is no number is refused too.
        let is_share = |value: f32| (0.0..1.0).contains(&value);
        let is_positive = |value: f64| value > 0.0 && value.is_finite();
        let is_not_negative = |value: f64| value >= 0.0 && value.is_finite();
        for (field, is_right, expected) in [
            ("learning_rate.peak", is_positive(learning_rate.peak), "above 0"),
            (
                "learning_rate.min",
                is_not_negative(learning_rate.min) && learning_rate.min <= learning_rate.peak,
                "at least 0 and at most the peak",
            ),
            ("optimizer.beta1", is_share(optimizer.beta1), "at least 0 and below 1"),
            ("optimizer.beta2", is_share(optimizer.beta2), "at least 0 and below 1"),
            ("optimizer.eps", is_positive(optimizer.eps.into()), "above 0"),
            ("optimizer.weight_decay", is_not_negative(optimizer.weight_decay.into()), "at least 0"),
            ("optimizer.clip_norm", optimizer.clip_norm > 0.0, "above 0"),
        ] {
            if !is_right {
                return Err(Error::config(format!("run.{field}"), format!("must be {expected}")));
            }
        }
        Ok(())
    }

    /// How many steps a run has whose epochs have so many batches.
    pub(crate) fn n_steps(&self, batches_per_epoch: usize) -> u64 {
        let n_steps = self.epochs.saturating_mul(batches_per_epoch as u64);
        self.max_steps.map_or(n_steps, |most| n_steps.min(most))
    }
}

/// A finished step.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Steps made, this one included.
    pub step: u64,
    /// Steps of the whole run.
    pub n_steps: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// What the objective reported; the total loss first.
    pub values: Vec<Value>,
    /// The learning rate it was made with.
    pub learning_rate: f64,
    /// Length of the gradient before clipping.
    pub gradient_norm: f64,
    /// The step's pictures, however many texts each has, by the seconds from its batch to its update: the one number here
    /// that differs from run to run.
    pub images_per_second: f64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were made; the last checkpoint.
    Finished(PathBuf),
    /// The observer asked to stop; the checkpoint to resume from.
    Stopped(PathBuf),
}

/// Where a run starts.
#[derive(Debug)]
pub struct Start {
    optimizer: Optimizer,
    step: u64,
    settings: Option<String>,
}

impl Start {
    /// From the first step.
    pub fn fresh(config: &LoopConfig, objective: &impl Objective) -> Self {
        Self { optimizer: Optimizer::new(config.optimizer, objective.variables()), step: 0, settings: None }
    }

    /// Steps that were made before.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The configuration that the checkpoint was written with, as text.
    pub fn settings(&self) -> Option<&str> {
        self.settings.as_deref()
    }

    /// From a checkpoint: restores the variables' values, the optimiser and the loader's place.
    ///
    /// # Errors
    /// When the checkpoint belongs to another model or to other data.
    pub fn resume(
        path: &Path,
        config: &LoopConfig,
        objective: &impl Objective,
        loader: &mut Loader,
    ) -> Result<Self> {
        let (state, mut model, moments) = checkpoint::load(path).map_err(|error| {
            let before = format!("remove {} to continue from the checkpoint before it", path.display());
            Error::Training(format!("{error}; {before}"))
        })?;
        let variables = objective.variables();
        for (name, variable) in variables {
            let fits = model.remove(name).filter(|(shape, _)| shape == variable.dims());
            let Some((shape, data)) = fits else {
                return Err(Error::file(path, format!("has no `{name}` of shape {:?}", variable.dims())));
            };
            variable.set(&Tensor::from_vec(data, shape, variable.device())?)?;
        }
        if let Some(name) = model.keys().next() {
            return Err(Error::file(path, format!("holds `{name}`, which this run does not train")));
        }
        loader.restore(&state.loader)?;
        let optimizer = Optimizer::resume(config.optimizer, variables, moments, state.step)?;
        Ok(Self { optimizer, step: state.step, settings: Some(state.config) })
    }
}

/// Runs the loop from `start` to the end of the last epoch or the last of `max_steps`, or until `on_step` breaks.
///
/// `settings` is the run's whole configuration as text; every checkpoint carries it.
///
/// # Errors
/// When a loss or gradient is not finite (the last checkpoint stays as it was), or a checkpoint cannot be written.
pub fn train(
    objective: &impl Objective,
    loader: &mut Loader,
    config: &LoopConfig,
    settings: &str,
    run_dir: &Path,
    start: Start,
    on_step: &mut dyn FnMut(&Report) -> ControlFlow<()>,
) -> Result<Outcome> {
    let Start { mut optimizer, mut step, .. } = start;
    let n_steps = config.n_steps(loader.batches_per_epoch());
    if step >= n_steps {
        let ends_by_steps = config.max_steps == Some(n_steps);
        return Err(Error::config(
            if ends_by_steps { "max_steps" } else { "epochs" },
            format!("{n_steps} steps are already made: there is nothing left to do"),
        ));
    }
    let save = |step, loader: &Loader, optimizer: &Optimizer| {
        let state = State { step, loader: loader.state(), config: settings.to_owned() };
        checkpoint::save(run_dir, &state, objective.variables(), optimizer)
    };
    loop {
        let started = Instant::now();
        let batch = loader.next_batch();
        let (gradients, values) = objective.gradients(&batch, step)?;
        if let Some((name, _)) = values.iter().find(|(_, value)| !value.is_finite()) {
            return Err(Error::NotFinite { step, what: (*name).to_owned() });
        }
        // A part of the graph that no gradient reaches would silently stay untrained.
        let missing = gradients.missing(objective.variables());
        if let Some(name) = missing.into_iter().find(|name| !objective.waits(name, step)) {
            return Err(Error::Training(format!("no gradient reaches `{name}`")));
        }
        let learning_rate = config.learning_rate.at(step, n_steps);
        let rate_of = |name: &str| learning_rate * objective.learning_rate_factor(name);
        let gradient_norm = optimizer.step(objective.variables(), &gradients, &rate_of)?;
        step += 1;
        let images_per_second = per_second(batch.items.len(), started.elapsed());
        let epoch = batch.epoch;
        let report = Report { step, n_steps, epoch, values, learning_rate, gradient_norm, images_per_second };
        let stop = on_step(&report);
        if step == n_steps {
            return save(step, loader, &optimizer).map(Outcome::Finished);
        }
        if stop.is_break() {
            return save(step, loader, &optimizer).map(Outcome::Stopped);
        }
        if step.is_multiple_of(config.save_every.max(1)) {
            save(step, loader, &optimizer)?;
        }
    }
}

/// A clock may stand still for a tiny step; no number is infinite all the same.
fn per_second(n: usize, elapsed: Duration) -> f64 {
    n as f64 / elapsed.max(Duration::from_nanos(1)).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_a_second() {
        assert_eq!(per_second(64, Duration::from_millis(500)), 128.0);
        assert!(per_second(64, Duration::ZERO).is_finite());
    }
}
