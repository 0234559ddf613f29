//! Training and evaluation of BLIP-2.
//!
//! The loop, [`trainer`], reads top to bottom; the losses of the paper are pure functions in [`losses`]; a
//! stage ([`stage1`], [`stage2`]) turns a batch into gradients; [`optimizer`] updates the trainable variables only.
//! Everything random is a function of the seed and the step ([`random`]), so resuming needs no random state.

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
