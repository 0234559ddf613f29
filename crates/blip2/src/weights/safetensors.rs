//! Safetensors checkpoints: one file, the shards of one, or a folder that holds them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use blip2_kernels::quantized::QuantizedWeight;
use safetensors::Dtype;

use super::checkpoint::TORCH_FILES;
use super::quantized::{Index, Matrix};
use super::{Encoding, MappedFile, TensorRows, refuse};
use crate::layers::{FrozenWeight, Quantization, TensorSource};
use crate::{Error, Result};

mod header;
mod write;

pub use write::{NamedTensor, TensorAbout, Values, stream_safetensors, write_safetensors};
/// The name of a checkpoint that is one file, in a Hugging Face folder.
pub const SINGLE_NAME: &str = "model.safetensors";

/// The name of the list of a checkpoint's shards, in a Hugging Face folder.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// The longest header or index that is read: ten times that of a model of ten thousand tensors.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// Tensors kept in one or several safetensors files, memory-mapped.
///
/// It remembers which tensors were read; [`finish`](Self::finish) then tells of those that nobody wanted.
#[derive(Debug)]
pub struct Safetensors {
    files: Vec<MappedFile>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
    quantized: Option<(Quantization, String)>,
    noted: Option<Mutex<BTreeMap<String, FrozenWeight>>>,
}

#[derive(Debug)]
struct Entry {
    file_idx: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
    /// What the bytes are, where they are a matrix in few bits.
    matrix: Option<Matrix>,
    used: AtomicBool,
    ignored: AtomicBool,
}

impl Safetensors {
    /// Opens one checkpoint: a `.safetensors` file, a `….safetensors.index.json` that lists shards beside it, or a
    /// folder with `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// As [`open_files`](Self::open_files); [`Error::File`] too when the index is not one, names a file that is not there,
    /// or differs from what its shards hold.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let [file, index] = [SINGLE_NAME, INDEX_NAME].map(|name| path.join(name));
            return match (file.exists(), index.exists()) {
                (true, _) => Self::open_files(&[file]),
                (false, true) => Self::open_shards(&index),
                (false, false) => Err(refuse(path, no_weights(path))),
            };
        }
        if path.extension().is_some_and(|extension| extension == "json") {
            return Self::open_shards(path);
        }
        Self::open_files(&[path])
    }

    /// Opens files that together are one checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] with the file's name and what is wrong with it: cut short, a header that
    /// does not match the data, another format, a tensor that two files hold or one holds twice, tensors that overlap.
    pub fn open_files(paths: &[impl AsRef<Path>]) -> Result<Self> {
        let mut checkpoint = Self {
            files: Vec::new(),
            metadata: BTreeMap::new(),
            tensors: BTreeMap::new(),
            quantized: None,
            noted: None,
        };
        for path in paths {
            checkpoint.add(MappedFile::open(path)?)?;
        }
        Ok(checkpoint)
    }

    /// Opens the shards that an index lists, which must hold exactly the tensors that it says.
    fn open_shards(index: &Path) -> Result<Self> {
        let weight_map = read_index(index)?;
        let paths = shards_of(index, &weight_map)?;
        let absent: Vec<_> = paths.iter().filter(|path| !path.exists()).map(|path| file_name(path)).collect();
        if !absent.is_empty() {
            let (n_shards, names) = (paths.len(), absent.join(", "));
            return Err(refuse(
                index,
                format!("of its {n_shards} shards these are not there: {names}: fetch them"),
            ));
        }
        let checkpoint = Self::open_files(&paths)?;
        for (name, shard) in &weight_map {
            match checkpoint.tensors.get(name).map(|entry| file_name(checkpoint.files[entry.file_idx].path()))
            {
                Some(found) if found == *shard => {}
                Some(found) => {
                    return Err(refuse(
                        index,
                        format!("says that `{name}` is in {shard}, but it is in {found}"),
                    ));
                }
                None => {
                    return Err(refuse(index, format!("says that `{name}` is in {shard}, but it is not")));
                }
            }
        }
        match checkpoint.tensors.iter().find(|(name, _)| !weight_map.contains_key(*name)) {
            Some((name, entry)) => {
                let shard = checkpoint.files[entry.file_idx].path();
                Err(refuse(
                    shard,
                    format!("holds the tensor `{name}`, which {} does not list", file_name(index)),
                ))
            }
            None => Ok(checkpoint),
        }
    }

    fn add(&mut self, file: MappedFile) -> Result<()> {
        let (data, header) = header::read(file.bytes()).map_err(|reason| refuse(file.path(), reason))?;
        for (name, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                file_idx: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: data + start..data + end,
                matrix: None,
                used: AtomicBool::new(false),
                ignored: AtomicBool::new(false),
            };
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                let other = self.files[other.file_idx].path().display();
                return Err(refuse(file.path(), format!("the tensor `{name}` is also in {other}")));
            }
        }
        let metadata: BTreeMap<String, String> =
            header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        let index = Index::read(&metadata).map_err(|reason| refuse(file.path(), reason))?;
        if let Some(index) = index {
            self.add_matrices(&file, &index.matrices)?;
            self.quantized = Some((index.dtype, index.original));
        }
        self.metadata.extend(metadata);
        self.files.push(file);
        Ok(())
    }

    /// The matrices in few bits that the file, which is about to be added, says it has.
    fn add_matrices(&mut self, file: &MappedFile, matrices: &BTreeMap<String, Matrix>) -> Result<()> {
        for (name, matrix) in matrices {
            let here = self.files.len();
            let entry =
                self.tensors.get_mut(name).filter(|entry| entry.file_idx == here && entry.dtype == Dtype::U8);
            let Some(entry) = entry else {
                return Err(refuse(file.path(), format!("has no tensor of bytes `{name}`, which it lists")));
            };
            let refuse = |reason| refuse(file.path(), format!("tensor `{name}` {reason}"));
            matrix.check(entry.range.len()).map_err(refuse)?;
            entry.shape = matrix.shape.into();
            entry.matrix = Some(*matrix);
        }
        Ok(())
    }

    /// The same checkpoint, which remembers what its matrices are rounded to.
    pub(crate) fn noting(mut self) -> Self {
        self.noted = Some(Mutex::default());
        self
    }

    /// What matrices were rounded to, by name.
    pub(super) fn noted(&self) -> BTreeMap<String, FrozenWeight> {
        let noted =
            self.noted.as_ref().map(|noted| noted.lock().unwrap_or_else(PoisonError::into_inner).clone());
        noted.unwrap_or_default()
    }

    /// Whether its large matrices are stored in few bits.
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantized.as_ref().map(|(quantization, _)| *quantization)
    }

    /// Bytes of a matrix that is stored in few bits; nothing for other tensors.
    pub(crate) fn quantized_bytes(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).filter(|entry| entry.matrix.is_some()).map(|entry| entry.range.len())
    }

    /// The name of the folder that a checkpoint in few bits was made from.
    pub(crate) fn original_name(&self) -> Option<&str> {
        self.quantized.as_ref().map(|(_, original)| original.as_str())
    }

    /// Names of the tensors that were not [ignored](Self::ignore).
    pub(super) fn kept_names(&self) -> impl Iterator<Item = &str> {
        let kept = self.tensors.iter().filter(|(_, entry)| !entry.ignored.load(Ordering::Relaxed));
        kept.map(|(name, _)| name.as_str())
    }

    /// The files, in the order they were opened.
    pub fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// The free text that was stored beside the tensors, by key.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name. Asking does not count as reading it.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Its shape. Asking does not count as reading it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    /// The tensor's rows, to be decoded one by one, and marks it as used.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::File`] when its number type is one that this project does not read.
    pub fn tensor(&self, name: &str) -> Result<TensorRows<'_>> {
        let entry = self.entry(name)?;
        let file = &self.files[entry.file_idx];
        let refuse = |reason: String| refuse(file.path(), format!("tensor `{name}` {reason}"));
        if entry.matrix.is_some() {
            return Err(refuse("is a matrix in few bits, where numbers are needed".into()));
        }
        let encoding = encoding(entry.dtype).ok_or_else(|| {
            refuse(format!("holds {} numbers: convert it to F32, F16 or BF16", entry.dtype))
        })?;
        entry.used.store(true, Ordering::Relaxed);
        TensorRows::new(entry.shape.clone(), encoding, file, entry.range.clone()).map_err(refuse)
    }

    /// All its values as f32, in row-major order.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let rows = self.tensor(name)?;
        let values = rows.to_vec();
        rows.release();
        Ok(values)
    }

    /// Decodes one row (all dimensions but the last count rows); for many rows, keep the result of
    /// [`tensor`](Self::tensor).
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    ///
    /// # Panics
    /// When there is no such row or `into` is not exactly one row.
    pub fn read_row_f32(&self, name: &str, row: usize, into: &mut [f32]) -> Result<()> {
        self.tensor(name)?.read_row(row, into);
        Ok(())
    }

    /// Counts the tensors for which `is_known` holds as used: those that this kind of checkpoint has and the model
    /// does without.
    pub fn ignore(&self, is_known: impl Fn(&str) -> bool) {
        for (name, entry) in &self.tensors {
            if is_known(name) {
                entry.used.store(true, Ordering::Relaxed);
                entry.ignored.store(true, Ordering::Relaxed);
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

/// Why a folder without safetensors cannot be opened, with the remedy where it has PyTorch's files.
fn no_weights(folder: &Path) -> String {
    let lacks = format!("this folder has neither {SINGLE_NAME} nor {INDEX_NAME}");
    match TORCH_FILES.iter().find(|name| folder.join(name).exists()) {
        Some(found) => format!(
            "{lacks} but {found}, which can hold programs: `blip2 convert {} NEW-FOLDER` makes safetensors of it and runs \
             nothing",
            folder.display()
        ),
        None => lacks,
    }
}

fn encoding(dtype: Dtype) -> Option<Encoding> {
    Some(match dtype {
        Dtype::F32 => Encoding::F32,
        Dtype::F16 => Encoding::F16,
        Dtype::BF16 => Encoding::Bf16,
        Dtype::F64 => Encoding::F64,
        Dtype::BOOL => Encoding::Bool,
        Dtype::U8 => Encoding::U8,
        Dtype::I8 => Encoding::I8,
        Dtype::U16 => Encoding::U16,
        Dtype::I16 => Encoding::I16,
        Dtype::U32 => Encoding::U32,
        Dtype::I32 => Encoding::I32,
        Dtype::U64 => Encoding::U64,
        Dtype::I64 => Encoding::I64,
        _ => return None,
    })
}

/// The shard files that a Hugging Face index lists, each beside the index; whether they are there is not looked at.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] when it is not an index or leads out of its folder.
pub fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    shards_of(index, &read_index(index)?)
}

/// Each tensor's shard.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let file = MappedFile::open(index)?;
    if file.bytes().len() as u64 > MAX_HEADER_BYTES {
        let reason =
            format!("has {} bytes, more than the list of any checkpoint's tensors", file.bytes().len());
        return Err(refuse(index, reason));
    }
    let parsed: Index = serde_json::from_slice(file.bytes())
        .map_err(|error| refuse(index, format!("this is not an index of safetensors shards: {error}")))?;
    if parsed.weight_map.is_empty() {
        return Err(refuse(index, "lists no tensors"));
    }
    Ok(parsed.weight_map)
}

fn shards_of(index: &Path, weight_map: &BTreeMap<String, String>) -> Result<Vec<PathBuf>> {
    let mut names: Vec<_> = weight_map.values().collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(|name| {
            // An index must not lead out of its folder.
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(refuse(index, format!("the shard `{name}` is not a plain file name")));
            }
            Ok(index.with_file_name(name))
        })
        .collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

impl TensorSource for Safetensors {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Safetensors::shape(self, name).ok().map(<[usize]>::to_vec)
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        Safetensors::read_f32(self, name)
    }

    fn rows(&self, name: &str) -> Result<Option<TensorRows<'_>>> {
        self.tensor(name).map(Some)
    }

    fn quantized(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        let entry = self.entry(name)?;
        let Some(matrix) = entry.matrix else { return Ok(None) };
        entry.used.store(true, Ordering::Relaxed);
        Ok(Some(matrix.open(&self.files[entry.file_idx], entry.range.clone())))
    }

    fn note_quantized(&self, name: &str, weight: &FrozenWeight) {
        if let Some(noted) = &self.noted {
            noted.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), weight.clone());
        }
    }
}

#[cfg(test)]
mod tests;
