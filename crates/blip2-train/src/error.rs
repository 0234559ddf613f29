//! The training crate's error type.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// Result with the training crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in training and evaluation, in the words of what the user holds.
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
    /// A line of a manifest or a configuration cannot be understood.
    #[error("{}:{line}: {reason}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// The line, counted from one.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not what it should be (cut short, mislabelled, of another run).
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// A configuration value is wrong.
    #[error("config: `{field}` {reason}")]
    Config {
        /// The field, with its path (`data[0].repeat`).
        field: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// Training cannot go on (nothing to train on, a loss that is not finite, a run that does not match).
    #[error("{0}")]
    Training(String),
    /// The caller asked to stop while features were computed, before there was a step to save.
    #[error(
        "stopped after the features of {done} of {total} views; they are kept, the next start goes on from there"
    )]
    Stopped {
        /// Views whose features are there.
        done: usize,
        /// Views that are needed.
        total: usize,
    },
    /// A value of the training is not a finite number.
    #[error(
        "step {step}: {what} is not finite; the last checkpoint is kept, continue from it with a lower learning rate"
    )]
    NotFinite {
        /// The optimiser step.
        step: u64,
        /// Which value.
        what: String,
    },
    /// The library failed.
    #[error(transparent)]
    Model(#[from] blip2::Error),
    /// The tensor engine failed.
    #[error("tensor engine: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// Wraps an operating system error with the file it happened on; made for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    /// Shorthand for [`Error::File`].
    pub fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), reason: reason.into() }
    }

    /// Shorthand for [`Error::Config`].
    pub fn config(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { field: field.into(), reason: reason.into() }
    }
}

/// A message as one line without control characters, which are shown as in Rust (`\n`): names of files are part of messages, and
/// may hold line breaks and whatever a terminal obeys.
pub fn one_line(message: &str) -> Cow<'_, str> {
    if !message.contains(char::is_control) {
        return message.into();
    }
    let mut line = String::with_capacity(message.len() + 8);
    for c in message.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line.into()
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line("a\nb\u{1b}c"), r"a\nb\u{1b}c");
        assert_eq!(one_line("`é`: \"no\""), "`é`: \"no\"");
    }
}
