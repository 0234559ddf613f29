//! Checkpoints in few bits: matrices stored as the kernels read them, so that loading is mapping the file.
//!
//! In a safetensors file such a matrix is a tensor of bytes (U8) under its usual name. The metadata entry
//! `blip2.quantized`, in JSON, tells the format and the shape `[out, in]` of each; how a format's bytes lie is described at
//! [`Format`]. These tensors come first and the header is padded, so that each starts at a multiple of 64. All other
//! tensors are what they were in the original checkpoint.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use blip2_kernels::quantized::{Format, QuantizedWeight};
use serde::{Deserialize, Serialize};

use super::MappedFile;
use super::safetensors::{NamedTensor, Safetensors, Values, write_safetensors};
use crate::layers::{FrozenWeight, Quantization};
use crate::{Error, Result};

/// The metadata entry.
const KEY: &str = "blip2.quantized";

/// Counts changes of how the bytes of a format lie.
const LAYOUT: u32 = 1;

/// What the metadata entry holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    layout: u32,
    /// What was asked for.
    pub(super) dtype: Quantization,
    /// The name of the original's folder, which tells what the model was tuned for.
    pub(super) original: String,
    pub(super) matrices: BTreeMap<String, Matrix>,
}

/// A matrix of the index.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Matrix {
    format: StoredFormat,
    /// `[out, in]`.
    pub(super) shape: [usize; 2],
}

/// [`Format`] by its name in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredFormat {
    Int8,
    Int8Blocks,
    Int8LongBlocks,
    Int4,
    Int4Offset,
    Q4K,
    Q5K,
    Q6K,
}

impl From<StoredFormat> for Format {
    fn from(format: StoredFormat) -> Self {
        match format {
            StoredFormat::Int8 => Self::Int8,
            StoredFormat::Int8Blocks => Self::Int8Blocks,
            StoredFormat::Int8LongBlocks => Self::Int8LongBlocks,
            StoredFormat::Int4 => Self::Int4,
            StoredFormat::Int4Offset => Self::Int4Offset,
            StoredFormat::Q4K => Self::Q4K,
            StoredFormat::Q5K => Self::Q5K,
            StoredFormat::Q6K => Self::Q6K,
        }
    }
}

impl From<Format> for StoredFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Int8 => Self::Int8,
            Format::Int8Blocks => Self::Int8Blocks,
            Format::Int8LongBlocks => Self::Int8LongBlocks,
            Format::Int4 => Self::Int4,
            Format::Int4Offset => Self::Int4Offset,
            Format::Q4K => Self::Q4K,
            Format::Q5K => Self::Q5K,
            Format::Q6K => Self::Q6K,
        }
    }
}

impl Index {
    /// The index in a file's metadata, if there is one; the reason why it cannot be used is for an error message.
    pub(super) fn read(metadata: &BTreeMap<String, String>) -> std::result::Result<Option<Self>, String> {
        let Some(json) = metadata.get(KEY) else { return Ok(None) };
        let index: Self = serde_json::from_str(json)
            .map_err(|error| format!("its list of quantised matrices cannot be read: {error}"))?;
        if index.layout != LAYOUT {
            return Err(format!(
                "its matrices lie in layout {}, this version reads {LAYOUT}: quantise the original again",
                index.layout
            ));
        }
        Ok(Some(index))
    }
}

impl Matrix {
    /// Checks the sizes against the bytes that the file has for it.
    pub(super) fn check(self, n_bytes: usize) -> std::result::Result<(), String> {
        let ([n_out, n_in], format) = (self.shape, Format::from(self.format));
        let expected = format.n_bytes(n_out, n_in);
        let fits = n_in <= format.max_in_features() && n_in.is_multiple_of(format.in_features_multiple());
        if n_out == 0 || n_in == 0 || !fits || expected != Some(n_bytes) {
            return Err(format!("holds {n_bytes} bytes, which are no {n_out} x {n_in} matrix in {format:?}"));
        }
        Ok(())
    }

    /// The weight, where its bytes are.
    pub(super) fn open(self, file: &MappedFile, range: Range<usize>) -> QuantizedWeight {
        let bytes = Box::new(MappedPart { file: file.clone(), range });
        let [n_out, n_in] = self.shape;
        QuantizedWeight::from_bytes(n_out, n_in, self.format.into(), bytes)
    }
}

/// Bytes of a mapped file.
struct MappedPart {
    file: MappedFile,
    range: Range<usize>,
}

impl AsRef<[u8]> for MappedPart {
    fn as_ref(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }
}

/// Writes a checkpoint that was opened with [`Safetensors::noting`] and loaded: matrices that a loader rounded as it
/// did, other tensors as they are, without those that it ignored.
///
/// # Errors
/// [`Error::Request`] when nothing was rounded; [`Error::Io`] that names the file.
pub(crate) fn write_quantized(
    path: &Path,
    checkpoint: &Safetensors,
    dtype: Quantization,
    original: &str,
) -> Result<()> {
    let noted = checkpoint.noted();
    if noted.is_empty() {
        return Err(Error::Request("this model has no matrices that are held in few bits".into()));
    }
    let mut matrices = BTreeMap::new();
    let mut tensors = Vec::new();
    for (name, weight) in &noted {
        let FrozenWeight::Quantized(weight) = weight else { continue };
        let shape = [weight.out_features(), weight.in_features()];
        matrices.insert(name.clone(), Matrix { format: weight.format().into(), shape });
        let bytes = weight.bytes();
        tensors.push(NamedTensor {
            name: name.clone(),
            shape: vec![bytes.len()],
            values: Values::Panels(bytes),
        });
    }
    let others: Vec<_> = checkpoint
        .kept_names()
        .filter(|name| !noted.contains_key(*name))
        .map(|name| Ok((name, checkpoint.tensor(name)?)))
        .collect::<Result<_>>()?;
    for (name, rows) in &others {
        let values = Values::Stored(rows.encoding(), rows.bytes());
        tensors.push(NamedTensor { name: (*name).into(), shape: rows.shape().into(), values });
    }
    let index = Index { layout: LAYOUT, dtype, original: original.into(), matrices };
    let json = serde_json::to_string(&index)
        .map_err(|error| Error::Request(format!("the list of matrices cannot be written: {error}")))?;
    write_safetensors(path, &tensors, &BTreeMap::from([(KEY.to_owned(), json)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(metadata: &str, n_bytes: usize) -> Result<Safetensors> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let bytes = vec![0u8; n_bytes];
        let tensor = NamedTensor { name: "a".into(), shape: vec![n_bytes], values: Values::Panels(&bytes) };
        write_safetensors(&path, &[tensor], &BTreeMap::from([(KEY.into(), metadata.into())])).unwrap();
        Safetensors::open_files(&[path])
    }

    /// A file says what it likes; nothing is read by it before it was checked.
    #[test]
    fn a_list_that_does_not_fit_the_file_is_refused() {
        let index =
            |matrices: &str| format!(r#"{{"layout":1,"dtype":"int8","original":"x","matrices":{matrices}}}"#);
        let n_bytes = Format::Int8.n_bytes(3, 8).unwrap();
        let good = index(r#"{"a":{"format":"int8","shape":[3,8]}}"#);
        let opened = file(&good, n_bytes).unwrap();
        assert_eq!(opened.shape("a").unwrap(), [3, 8]);
        assert_eq!(opened.quantization(), Some(Quantization::Int8));
        assert!(opened.tensor("a").unwrap_err().to_string().contains("few bits"));
        for (metadata, expected) in [
            (index(r#"{"a":{"format":"int8","shape":[3,9]}}"#), "no 3 x 9 matrix"),
            (index(r#"{"a":{"format":"int8","shape":[0,8]}}"#), "no 0 x 8 matrix"),
            (index(r#"{"a":{"format":"int8","shape":[18446744073709551615,8]}}"#), "matrix"),
            (index(r#"{"a":{"format":"int8","shape":[32,18446744073709551615]}}"#), "matrix"),
            (index(r#"{"a":{"format":"int3","shape":[3,8]}}"#), "cannot be read"),
            (index(r#"{"b":{"format":"int8","shape":[3,8]}}"#), "no tensor of bytes `b`"),
            (good.replace("\"layout\":1", "\"layout\":2"), "layout 2"),
            ("[]".into(), "cannot be read"),
        ] {
            let error = file(&metadata, n_bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{metadata}: {error}");
        }
        // Bytes enough for a block, of which there are only parts.
        let part = index(r#"{"a":{"format":"q6_k","shape":[1,8]}}"#);
        let error = file(&part, Format::Q6K.n_bytes(1, 8).unwrap()).unwrap_err().to_string();
        assert!(error.contains("no 1 x 8 matrix"), "{error}");
    }
}
