//! Reader of PyTorch checkpoints (`.pth`, `.pt`) that executes nothing.
//!
//! Such a file is a Python pickle with tensors beside it, and unpickling it with Python runs whatever code it names.
//! Here the pickle is interpreted by a machine that knows only what describes tensors (`machine`) and refuses the
//! rest by name. Opening reads the description and checks every size; values are copied out one tensor at a time, with
//! their strides: some files (EfficientNet's among them) store convolution weights in permuted order.
//!
//! Read is the legacy container, made of consecutive pickles and storages (`torch.save` before 1.6).

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
};

use half::{bf16, f16};

use self::machine::{Cursor, Object, Pickle, StorageKind, StorageRef, TensorView, Value};
use super::MappedFile;
use crate::layers::TensorSource;
use crate::{Error, Result};

mod machine;

/// The number that the first pickle of a legacy file holds.
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
/// Version of the legacy container.
const PROTOCOL: i128 = 1001;
/// Bounds on names and nesting, beyond what any model uses: a container that holds itself has endless names.
const MAX_NAME_BYTES: usize = 512;
const MAX_DEPTH: usize = 8;
const MAX_TENSORS: usize = 100_000;

/// An opened PyTorch checkpoint: names, shapes, and values on request.
pub struct TorchCheckpoint {
    file: MappedFile,
    tensors: BTreeMap<String, StoredTensor>,
}

/// Where a tensor's elements are; checked against the file when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
struct StoredTensor {
    kind: StorageKind,
    /// The storage's bytes in the file.
    storage: Range<usize>,
    /// In elements, as are the strides.
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl TorchCheckpoint {
    /// Opens the checkpoint at `path` and reads its description. Tensors in nested dictionaries are named with dots
    /// (`model.conv.weight`); everything else in the file (numbers, texts, settings) is passed over.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::File`] when it is no PyTorch checkpoint, is cut short or damaged,
    /// or asks for code to be run.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = MappedFile::open(path)?;
        let tensors = index(file.bytes()).map_err(|reason| super::refuse(path, reason))?;
        Ok(Self { file, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// All of the file's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    /// The names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's shape, slowest dimension first.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.tensor(name)?.shape)
    }

    /// Copies out a tensor of floating-point numbers, contiguous, the last dimension fastest.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::TensorShape`] when it is not of shape `expected`; [`Error::File`] when it
    /// holds integers.
    pub fn f32(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.tensor_of_shape(name, expected)?;
        match tensor.kind {
            StorageKind::F32 => Ok(tensor.gather(self.bytes(), f32::from_le_bytes)),
            StorageKind::F16 => Ok(tensor.gather(self.bytes(), |bytes| f16::from_le_bytes(bytes).to_f32())),
            StorageKind::Bf16 => Ok(tensor.gather(self.bytes(), |bytes| bf16::from_le_bytes(bytes).to_f32())),
            StorageKind::F64 => Ok(tensor.gather(self.bytes(), |bytes| f64::from_le_bytes(bytes) as f32)),
            _ => Err(self.wrong_kind(name, "floating-point numbers", "integers")),
        }
    }

    /// Copies out a tensor of integers (or truth values, as 0 and 1), contiguous, the last dimension fastest.
    ///
    /// # Errors
    /// As [`f32`](Self::f32), with the kinds exchanged.
    pub fn i64(&self, name: &str, expected: &[usize]) -> Result<Vec<i64>> {
        let tensor = self.tensor_of_shape(name, expected)?;
        match tensor.kind {
            StorageKind::I64 => Ok(tensor.gather(self.bytes(), i64::from_le_bytes)),
            StorageKind::I32 => Ok(tensor.gather(self.bytes(), |bytes| i32::from_le_bytes(bytes).into())),
            StorageKind::I16 => Ok(tensor.gather(self.bytes(), |bytes| i16::from_le_bytes(bytes).into())),
            StorageKind::I8 => Ok(tensor.gather(self.bytes(), |bytes| i8::from_le_bytes(bytes).into())),
            StorageKind::U8 | StorageKind::Bool => Ok(tensor.gather(self.bytes(), |[byte]| byte.into())),
            _ => Err(self.wrong_kind(name, "integers", "floating-point numbers")),
        }
    }

    fn tensor(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.into() })
    }

    fn tensor_of_shape(&self, name: &str, expected: &[usize]) -> Result<&StoredTensor> {
        let tensor = self.tensor(name)?;
        if tensor.shape != expected {
            return Err(Error::TensorShape {
                name: name.into(),
                expected: expected.into(),
                found: tensor.shape.clone(),
            });
        }
        Ok(tensor)
    }

    fn wrong_kind(&self, name: &str, expected: &str, found: &str) -> Error {
        let reason = format!(
            "tensor `{name}` holds {found} where {expected} are expected: this is another model's file"
        );
        super::refuse(self.path(), reason)
    }
}

impl TensorSource for TorchCheckpoint {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|tensor| tensor.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        self.f32(name, &self.tensor(name)?.shape)
    }
}

impl std::fmt::Debug for TorchCheckpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut about = f.debug_struct("TorchCheckpoint");
        about
            .field("path", &self.path())
            .field("n_bytes", &self.bytes().len())
            .field("n_tensors", &self.tensors.len());
        about.finish()
    }
}

impl StoredTensor {
    /// Copies the elements in order of the shape, wherever the strides have put them.
    fn gather<T, const N: usize>(&self, file: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (elements, _) = file[self.storage.clone()].as_chunks::<N>();
        let n_elements = self.shape.iter().product();
        let mut values = Vec::with_capacity(n_elements);
        let mut position = vec![0; self.shape.len()];
        let mut at = self.offset;
        for _ in 0..n_elements {
            values.push(decode(elements[at]));
            // On to the next position, as an odometer counts.
            for axis in (0..position.len()).rev() {
                position[axis] += 1;
                at += self.strides[axis];
                if position[axis] < self.shape[axis] {
                    break;
                }
                at -= self.shape[axis] * self.strides[axis];
                position[axis] = 0;
            }
        }
        values
    }
}

/// Finds the tensors of a checkpoint. The error is the reason alone; the caller knows the file.
fn index(bytes: &[u8]) -> std::result::Result<BTreeMap<String, StoredTensor>, String> {
    if !bytes.starts_with(b"\x80") {
        let found = super::recognise(bytes).unwrap_or("give the .pth file itself");
        return Err(format!("this is not a PyTorch checkpoint of the legacy kind: {found}"));
    }
    index_legacy(bytes)
}

/// The legacy container: pickles of a magic number, a version, facts about the writer's machine, the object, and the
/// storages' keys; then each storage, its number of elements (8 bytes) first.
fn index_legacy(bytes: &[u8]) -> std::result::Result<BTreeMap<String, StoredTensor>, String> {
    let magic = machine::read(bytes, 0)?;
    if magic.root != Value::Int(MAGIC) {
        return Err("this is a Python pickle, but not a PyTorch checkpoint: refused".into());
    }
    let version = machine::read(bytes, magic.end)?;
    if version.root != Value::Int(PROTOCOL) {
        return Err(
            "this is a PyTorch checkpoint of an unknown version: save it again with a current PyTorch".into(),
        );
    }
    let machine_facts = machine::read(bytes, version.end)?;
    if !is_little_endian(&machine_facts) {
        return Err("it was written on a big-endian machine: save it again on a common one".into());
    }
    let checkpoint = machine::read(bytes, machine_facts.end)?;
    let keys = machine::read(bytes, checkpoint.end)?;

    let mut stored: HashMap<&str, StorageRef<'_>> = HashMap::new();
    for object in &checkpoint.objects {
        let Object::Storage(storage) = object else { continue };
        if stored.insert(storage.key, *storage).is_some_and(|before| before != *storage) {
            return Err("it describes the same storage in two ways: the file is damaged".into());
        }
    }
    let mut places = HashMap::new();
    let mut cursor = Cursor { bytes, at: keys.end };
    for key in list_of_texts(&keys).ok_or("its list of storages is damaged")? {
        let storage = stored.get(key).ok_or("it holds a storage that no tensor uses: the file is damaged")?;
        let n_elements = cursor.number(8)?;
        if n_elements != storage.n_elements as u64 {
            return Err(format!(
                "a storage of {n_elements} elements is described as having {}: the file is damaged",
                storage.n_elements
            ));
        }
        let start = cursor.at;
        cursor.take(
            storage.n_elements.checked_mul(storage.kind.size()).ok_or("a storage is larger than memory")?,
        )?;
        if places.insert(key, start..cursor.at).is_some() {
            return Err("it holds the same storage twice: the file is damaged".into());
        }
    }
    named_tensors(&checkpoint, &places)
}

/// Whether the pickled facts about the writer's machine say `little_endian`.
fn is_little_endian(pickle: &Pickle<'_>) -> bool {
    let Value::Object(root) = pickle.root else { return false };
    let Object::Dict(facts) = &pickle.objects[root] else { return false };
    facts.contains(&(Value::Text("little_endian"), Value::Bool(true)))
}

fn list_of_texts<'a>(pickle: &Pickle<'a>) -> Option<Vec<&'a str>> {
    let Value::Object(root) = pickle.root else { return None };
    let Object::List(items) = &pickle.objects[root] else { return None };
    let texts = items.iter().map(|item| match item {
        Value::Text(text) => Some(*text),
        _ => None,
    });
    texts.collect()
}

/// Walks the dictionaries from the root and names every tensor by its path.
fn named_tensors(
    pickle: &Pickle<'_>,
    places: &HashMap<&str, Range<usize>>,
) -> std::result::Result<BTreeMap<String, StoredTensor>, String> {
    let mut found = BTreeMap::new();
    let mut to_visit = vec![(String::new(), 0, pickle.root)];
    let mut n_visits = 0;
    while let Some((name, depth, value)) = to_visit.pop() {
        let Value::Object(object) = value else { continue };
        match &pickle.objects[object] {
            Object::Tensor(view) => {
                let tensor = stored_tensor(view, places)?;
                if found.insert(name, tensor).is_some() {
                    return Err("it names a tensor twice: the file is damaged".into());
                }
            }
            Object::Dict(items) => {
                for (key, value) in items {
                    let (Value::Text(key), Value::Object(_)) = (key, value) else { continue };
                    n_visits += 1;
                    if depth == MAX_DEPTH
                        || n_visits > MAX_TENSORS
                        || name.len() + key.len() >= MAX_NAME_BYTES
                    {
                        return Err(
                            "its dictionaries are nested or named like no checkpoint's: refused".into()
                        );
                    }
                    let dot = if name.is_empty() { "" } else { "." };
                    to_visit.push((format!("{name}{dot}{key}"), depth + 1, *value));
                }
            }
            _ => {}
        }
    }
    if found.is_empty() {
        return Err("there is no tensor in it: give the checkpoint with the weights".into());
    }
    Ok(found)
}

fn stored_tensor(
    view: &TensorView<'_>,
    places: &HashMap<&str, Range<usize>>,
) -> std::result::Result<StoredTensor, String> {
    let storage =
        places.get(view.storage.key).ok_or("a tensor's values are not in the file: fetch it again")?;
    // Along an axis of one element nothing is ever stepped, so its stride says nothing (and may be any number).
    let strides =
        view.shape.iter().zip(&view.strides).map(|(&extent, &stride)| if extent > 1 { stride } else { 0 });
    Ok(StoredTensor {
        kind: view.storage.kind,
        storage: storage.clone(),
        offset: view.offset,
        shape: view.shape.clone(),
        strides: strides.collect(),
    })
}

#[cfg(test)]
mod tests;
