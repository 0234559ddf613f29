//! BLIP-2 in Rust.

pub mod cache;
pub mod config;
pub mod error;
pub mod generate;
pub mod image;
pub mod language;
pub mod layers;
pub mod model;
pub mod qformer;
pub mod sampling;
pub mod text;
pub mod vision;
pub mod weights;

pub use error::{Error, Result};
