//! GGUF files (versions 2 and 3), the container of quantised language models.
//!
//! Layout: magic, version, counts, metadata (key, type, value), tensor table (name, dimensions, type, offset), padding,
//! data. A header is other people's bytes: every count is checked against a limit and against what is left of the file
//! before memory is spent on it, every offset against the data and against the other tensors.

mod header;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Encoding, MappedFile, TensorRows, refuse};
use crate::{Error, Result};
use header::read_header;

/// A metadata value. Numbers are widened; nothing is lost.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs)] // the names say it
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A metadata array.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs)] // the names say it
pub enum Array {
    Unsigned(Vec<u64>),
    Signed(Vec<i64>),
    Float(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
}

/// A GGUF file, memory-mapped, its header read and checked.
///
/// It remembers which tensors were read; [`finish`](Self::finish) then tells of those that nobody wanted.
///
/// Two conventions of the files matter to models: dimensions are stored fastest first (this reader turns them round, so
/// that shapes read as in PyTorch), and for the architecture `llama` the rows of the query and key projections are
/// stored in the order that rotates neighbouring pairs, not the two halves of a head as Hugging Face does.
#[derive(Debug)]
pub struct Gguf {
    file: MappedFile,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    shape: Vec<usize>,
    encoding: Encoding,
    range: Range<usize>,
    used: AtomicBool,
}

impl Gguf {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] with what is wrong: another format, cut short, damaged, a tensor type that is
    /// not read here (the importance-matrix types `IQ…` among them).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let header = read_header(file.bytes()).map_err(|reason| refuse(file.path(), reason))?;
        Ok(Self { metadata: header.metadata, tensors: header.tensors, file })
    }

    /// The file.
    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The value of `key`, if the file has it.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A whole number.
    ///
    /// # Errors
    /// [`Error::File`] when the file lacks the key or holds something else under it; likewise below.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.typed(key, "a whole number below 2³²", |value| match value {
            Value::Unsigned(n) => u32::try_from(*n).ok(),
            Value::Signed(n) => u32::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A number.
    ///
    /// # Errors
    /// As [`u32`](Self::u32).
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.typed(key, "a number", |value| match value {
            Value::Float(x) => Some(*x as f32),
            Value::Unsigned(n) => Some(*n as f32),
            Value::Signed(n) => Some(*n as f32),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// As [`u32`](Self::u32).
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A text.
    ///
    /// # Errors
    /// As [`u32`](Self::u32).
    pub fn string(&self, key: &str) -> Result<&str> {
        self.typed(key, "a text", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// As [`u32`](Self::u32).
    pub fn strings(&self, key: &str) -> Result<&[String]> {
        self.typed(key, "a list of texts", |value| match value {
            Value::Array(Array::String(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// A list of whole numbers.
    ///
    /// # Errors
    /// As [`u32`](Self::u32).
    pub fn integers(&self, key: &str) -> Result<Vec<i64>> {
        self.typed(key, "a list of whole numbers", |value| match value {
            Value::Array(Array::Signed(numbers)) => Some(numbers.clone()),
            Value::Array(Array::Unsigned(numbers)) => {
                numbers.iter().map(|&n| i64::try_from(n).ok()).collect::<Option<_>>()
            }
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        let value =
            self.get(key).ok_or_else(|| refuse(self.file.path(), format!("has no metadata `{key}`")))?;
        convert(value).ok_or_else(|| refuse(self.file.path(), format!("metadata `{key}` is not {expected}")))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name. Asking does not count as reading it.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Its shape, slowest dimension first. Asking does not count as reading it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    /// The tensor's rows, to be decoded one by one, and marks it as used.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorRows<'_>> {
        let entry = self.entry(name)?;
        entry.used.store(true, Ordering::Relaxed);
        TensorRows::new(entry.shape.clone(), entry.encoding, &self.file, entry.range.clone())
            .map_err(|reason| refuse(self.file.path(), format!("tensor `{name}` {reason}")))
    }

    /// All its values as f32, in row-major order.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.tensor(name)?.to_vec())
    }

    /// Decodes one row (all dimensions but the last count rows); for many rows, keep the result of
    /// [`tensor`](Self::tensor).
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    ///
    /// # Panics
    /// When there is no such row or `into` is not exactly one row.
    pub fn read_row_f32(&self, name: &str, row: usize, into: &mut [f32]) -> Result<()> {
        self.tensor(name)?.read_row(row, into);
        Ok(())
    }

    /// Counts the tensors for which `is_known` holds as used: those that this kind of file has and the model does
    /// without.
    pub fn ignore(&self, is_known: impl Fn(&str) -> bool) {
        for (name, entry) in &self.tensors {
            if is_known(name) {
                entry.used.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Ends loading.
    ///
    /// # Errors
    /// [`Error::UnusedTensors`] with every tensor that was neither read nor ignored.
    pub fn finish(&self) -> Result<()> {
        super::no_unused(self.tensors.iter().map(|(name, entry)| (name, &entry.used)))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.into() })
    }
}

#[cfg(test)]
mod tests;
