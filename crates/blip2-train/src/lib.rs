//! Training and evaluation of BLIP-2.
//!
//! # The way of a step
//!
//! 1. [`run`] reads a configuration file, opens what it names and begins the loop, [`trainer`], which reads top to bottom.
//! 2. [`data`] deals a batch: which texts of which pictures. [`features`] hands out what the frozen encoder made of the
//!    pictures, once for the whole run, from disk.
//! 3. A stage ([`stage1`], [`stage2`]) turns the batch into losses ([`losses`], pure functions) and [`gradients`].
//! 4. [`optimizer`] updates the trainable variables, at the learning rate of [`schedule`].
//! 5. [`log`] writes the step's values down, [`health`] looks for signs of a collapse, and now and then [`checkpoint`]
//!    writes all that it takes to go on.
//!
//! Everything random is a function of the seed and the step ([`random`]), so resuming needs no random state.
//!
//! What comes before: [`initialize`] makes a Q-Former of BERT, [`recipe`], [`questions`] and [`capfilt`] make training data.
//! What comes after: [`evaluation`] measures a model by [`metrics`], and [`frozen`] proves that only the bridge has changed.

pub mod capfilt;
pub mod checkpoint;
pub mod data;
pub mod encoder;
pub mod error;
pub mod evaluation;
pub mod features;
pub mod frozen;
pub mod gradients;
pub mod health;
pub mod initialize;
pub mod log;
pub mod losses;
pub mod metrics;
pub mod optimizer;
pub mod plot;
pub mod question_baseline;
pub mod questions;
pub mod random;
pub mod recipe;
pub mod run;
pub mod schedule;
pub mod stage1;
pub mod stage2;
pub mod trainer;

pub use error::{Error, Result, one_line};
