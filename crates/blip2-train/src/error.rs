//! The training crate's error type.

use std::path::PathBuf;

/// Result with the training crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can stop a training or an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A data file, configuration or checkpoint is not what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file, with the line where there is one.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A setting that makes no sense.
    #[error("{0}")]
    Config(String),
    /// The loss or a gradient is not a finite number.
    #[error("step {step}: {what} is not finite; the last good checkpoint is kept. Lower the learning rate")]
    NotFinite {
        /// The optimiser step.
        step: u64,
        /// Which value.
        what: String,
    },
    /// The model library failed.
    #[error(transparent)]
    Model(#[from] blip2::Error),
    /// The tensor engine failed.
    #[error("tensor engine: {0}")]
    Tensor(#[from] candle_core::Error),
}
