//! The library's error type.

use std::path::{Path, PathBuf};

/// Result with the library's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in the library, in the words of what the user holds.
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
    /// A file is not what it should be (cut short, mislabelled, hostile).
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// A picture cannot be used.
    #[error("{0}")]
    Image(#[from] crate::image::ImageError),
    /// A configuration value is wrong.
    #[error("config: `{field}` {reason}")]
    Config {
        /// The field, with its path (`qformer.hidden_size`).
        field: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A checkpoint lacks a tensor.
    #[error("the checkpoint has no tensor `{name}`")]
    MissingTensor {
        /// Its full name.
        name: String,
    },
    /// A checkpoint's tensor has the wrong shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// Its full name.
        name: String,
        /// What the configuration asks for.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// A checkpoint's tensor holds values that are no numbers.
    #[error(
        "tensor `{name}` holds values that are infinite or not numbers: the checkpoint is damaged, or its training failed"
    )]
    NotFinite {
        /// Its full name.
        name: String,
    },
    /// A checkpoint holds tensors that the model does not use.
    #[error("the checkpoint has tensors that this model does not use: {}", names.join(", "))]
    UnusedTensors {
        /// Their full names.
        names: Vec<String>,
    },
    /// The tensors of a checkpoint are not those of the model that it should be.
    #[error(
        "the tensors are not those of this model{}{}{}",
        list("missing", missing),
        list("of another shape", misshapen),
        list("unknown", unknown)
    )]
    TensorNames {
        /// Names of tensors that the model has and the checkpoint lacks.
        missing: Vec<String>,
        /// Tensors of another shape, each with the shape it has and the one it should have.
        misshapen: Vec<String>,
        /// Names of tensors that the model does not have.
        unknown: Vec<String>,
    },
    /// The tensors in a model's folder are not right.
    #[error("{}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with them.
        source: Box<Error>,
    },
    /// Text could not be turned into tokens or back.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The prompt and the answer do not fit the language model's context.
    #[error("the text needs {n_tokens} tokens, the limit is {limit}: shorten it")]
    TextTooLong {
        /// Tokens of the text.
        n_tokens: usize,
        /// How many fit.
        limit: usize,
    },
    /// A request that makes no sense.
    #[error("{0}")]
    Request(String),
    /// What an answer has to be is not understood, or cannot be kept to.
    #[error("{0}")]
    AnswerForm(String),
    /// The tensor engine failed.
    #[error("tensor engine: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// The same, with the model's folder or the configuration in it where the error itself does not say which.
    pub(crate) fn in_folder(self, folder: &Path) -> Self {
        match self {
            Self::Config { field, reason } => {
                let path = folder.join(crate::model::FILE_NAME);
                Self::File { path, reason: format!("`{field}` {reason}") }
            }
            Self::MissingTensor { .. }
            | Self::TensorShape { .. }
            | Self::NotFinite { .. }
            | Self::UnusedTensors { .. }
            | Self::TensorNames { .. } => Self::Folder { path: folder.into(), source: Box::new(self) },
            error => error,
        }
    }
}

/// Names in a message that stays readable when all of a model is missing.
fn list(what: &str, names: &[String]) -> String {
    const SHOWN: usize = 40;
    match names.len() {
        0 => String::new(),
        n if n > SHOWN => format!("; {what}: {} and {} more", names[..SHOWN].join(", "), n - SHOWN),
        _ => format!("; {what}: {}", names.join(", ")),
    }
}
