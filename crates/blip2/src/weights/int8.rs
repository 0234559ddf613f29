//! Trained weights in eight bits: how the small default model is stored.
//!
//! A matrix `name` of type I8, `[out, in]`, has a companion `name.scale`, F32 `[out]`: a value is the integer times the
//! scale of its row. Rows are scaled by their own largest value, so an error is at most half a scale. Everything else
//! is stored as it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Encoding;
use super::safetensors::{NamedTensor, Safetensors, Values, write_safetensors};
use crate::layers::TensorSource;
use crate::{Error, Result};

/// What is appended to a matrix's name for its scales.
const SCALE: &str = ".scale";

/// Matrices with fewer values are stored as they are: they save nothing.
const FEWEST_VALUES: usize = 4096;

/// A checkpoint whose eight-bit matrices are widened when they are read; other tensors are read as they are stored.
#[derive(Debug)]
pub struct TrainedWeights(Safetensors);

impl TrainedWeights {
    /// Opens the files that together are one checkpoint.
    ///
    /// # Errors
    /// As [`Safetensors::open_files`].
    pub fn open(paths: &[impl AsRef<Path>]) -> Result<Self> {
        Safetensors::open_files(paths).map(Self)
    }

    /// Ends loading.
    ///
    /// # Errors
    /// [`Error::UnusedTensors`] with every tensor that was not read.
    pub fn finish(&self) -> Result<()> {
        self.0.finish()
    }

    /// Values of all tensors, scales not counted.
    pub(crate) fn n_parameters(&self) -> usize {
        let names = self
            .0
            .names()
            .filter(|name| !name.strip_suffix(SCALE).is_some_and(|matrix| self.0.contains(matrix)));
        names.filter_map(|name| self.0.shape(name).ok()).map(|shape| shape.iter().product::<usize>()).sum()
    }
}

impl TensorSource for TrainedWeights {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        TensorSource::shape(&self.0, name)
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.0.tensor(name)?;
        let mut values = tensor.to_vec();
        if tensor.encoding() == Encoding::I8 {
            let scale_name = format!("{name}{SCALE}");
            let scales = self.0.read_f32(&scale_name)?;
            let shape = self.0.shape(name)?;
            if shape.len() != 2 || shape[0] != scales.len() {
                let expected = shape.first().copied().into_iter().collect();
                return Err(Error::TensorShape { name: scale_name, expected, found: vec![scales.len()] });
            }
            for (row, scale) in values.chunks_exact_mut(shape[1].max(1)).zip(scales) {
                row.iter_mut().for_each(|value| *value *= scale);
            }
        }
        Ok(values)
    }
}

/// How trained weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As they are.
    F32,
    /// Rounded to half precision.
    F16,
    /// Matrices in eight bits, the rest as it is.
    Int8,
}

/// Writes tensors in shards of at most `max_shard_bytes` (a single larger tensor has a shard of its own) named
/// `stem-00001-of-0000N.safetensors`, or `stem.safetensors` when one is enough; gives the files in order.
///
/// The bytes depend on nothing but the arguments.
///
/// # Errors
/// [`Error::Io`] that names the file.
pub fn write_trained(
    folder: &Path,
    stem: &str,
    tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    storage: Storage,
    max_shard_bytes: usize,
) -> Result<Vec<PathBuf>> {
    let stored: Vec<Stored> =
        tensors.iter().flat_map(|(name, (shape, data))| Stored::of(name, shape, data, storage)).collect();
    let mut shards: Vec<Vec<&Stored>> = vec![Vec::new()];
    let mut size = 0;
    for tensor in &stored {
        if size + tensor.n_bytes() > max_shard_bytes && size > 0 {
            shards.push(Vec::new());
            size = 0;
        }
        size += tensor.n_bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    let n_shards = shards.len();
    let mut paths = Vec::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let name = match n_shards {
            1 => format!("{stem}.safetensors"),
            n => format!("{stem}-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let path = folder.join(name);
        let named: Vec<_> = shard.into_iter().map(Stored::named).collect();
        write_safetensors(&path, &named, &BTreeMap::new())?;
        paths.push(path);
    }
    Ok(paths)
}

struct Stored {
    name: String,
    shape: Vec<usize>,
    data: Data,
}

enum Data {
    F32(Vec<f32>),
    F16(Vec<f32>),
    I8(Vec<i8>),
}

impl Stored {
    fn of(name: &str, shape: &[usize], data: &[f32], storage: Storage) -> Vec<Self> {
        let stored =
            |name: &str, shape: &[usize], data| Self { name: name.into(), shape: shape.into(), data };
        match (storage, shape) {
            (Storage::Int8, &[n_rows, n_columns]) if data.len() >= FEWEST_VALUES => {
                let (mut values, mut scales) = (Vec::with_capacity(data.len()), Vec::with_capacity(n_rows));
                for row in data.chunks_exact(n_columns) {
                    let scale = row.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    values.extend(row.iter().map(|x| (x * inverse).round().clamp(-127.0, 127.0) as i8));
                    scales.push(scale);
                }
                vec![
                    stored(name, shape, Data::I8(values)),
                    stored(&format!("{name}{SCALE}"), &[n_rows], Data::F32(scales)),
                ]
            }
            (Storage::F16, _) => vec![stored(name, shape, Data::F16(data.to_vec()))],
            _ => vec![stored(name, shape, Data::F32(data.to_vec()))],
        }
    }

    fn n_bytes(&self) -> usize {
        match &self.data {
            Data::F32(v) => 4 * v.len(),
            Data::F16(v) => 2 * v.len(),
            Data::I8(v) => v.len(),
        }
    }

    fn named(&self) -> NamedTensor<'_> {
        let values = match &self.data {
            Data::F32(v) => Values::F32(v),
            Data::F16(v) => Values::F32AsF16(v),
            Data::I8(v) => Values::I8(v),
        };
        NamedTensor { name: self.name.clone(), shape: self.shape.clone(), values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let matrix: Vec<f32> = (0..8 * 1024).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect();
        let mut with_zero_row = matrix.clone();
        with_zero_row[1024..2048].fill(0.0);
        BTreeMap::from([
            ("a.weight".into(), (vec![8, 1024], matrix)),
            ("b.weight".into(), (vec![8, 1024], with_zero_row)),
            ("bias".into(), (vec![3], vec![0.1, -0.2, 0.3])),
            ("temp".into(), (vec![], vec![0.07])),
        ])
    }

    #[test]
    fn values_come_back_within_half_a_step_and_shards_keep_their_size() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = tensors();
        let paths = write_trained(dir.path(), "stage1", &tensors, Storage::Int8, 10_000).unwrap();
        assert_eq!(paths.len(), 2);
        assert!(paths[1].ends_with("stage1-00002-of-00002.safetensors"), "{paths:?}");
        let read = TrainedWeights::open(&paths).unwrap();
        for (name, (shape, data)) in &tensors {
            assert_eq!(read.shape(name).as_ref(), Some(shape));
            let found = read.read_f32(name).unwrap();
            let half_a_step = if shape.len() == 2 { 0.5 / 127.0 * 0.5 + 1e-7 } else { 0.0 };
            for (a, b) in data.iter().zip(found) {
                assert!((a - b).abs() <= half_a_step, "{name}: {a} {b}");
            }
        }
        read.finish().unwrap();
    }

    /// Integers without their scales are not weights.
    #[test]
    fn a_missing_scale_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let matrix =
            NamedTensor { name: "a.weight".into(), shape: vec![1, 3], values: Values::I8(&[1, 2, 3]) };
        write_safetensors(&path, &[matrix], &BTreeMap::new()).unwrap();
        let error = TrainedWeights::open(&[path]).unwrap().read_f32("a.weight").unwrap_err().to_string();
        assert!(error.contains("a.weight.scale"), "{error}");
    }

    #[test]
    fn a_tensor_that_nobody_reads_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let paths = write_trained(dir.path(), "x", &tensors(), Storage::F32, usize::MAX).unwrap();
        assert_eq!(paths, [dir.path().join("x.safetensors")]);
        let read = TrainedWeights::open(&paths).unwrap();
        assert_eq!(read.read_f32("bias").unwrap(), [0.1, -0.2, 0.3]);
        let error = read.finish().unwrap_err().to_string();
        assert!(error.contains("a.weight") && !error.contains("bias"), "{error}");
    }
}
