//! PyTorch checkpoints (`.pth`, `.pt`, `.bin`): a reader that executes nothing, and a writer.
//!
//! Such a file is a Python pickle with tensors beside it, and unpickling it with Python runs whatever code it names.
//! Here the pickle is interpreted by a machine that knows only what describes tensors (`machine`) and refuses the
//! rest by name. Opening reads the description and checks every size; values are copied out one tensor at a time, with
//! their strides: some files (EfficientNet's among them) store convolution weights in permuted order.
//!
//! Both containers are read: the zip archive that `torch.save` writes since 1.6 (`zip`), and the one before it, made of
//! consecutive pickles and storages.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use half::{bf16, f16};

use self::machine::{Cursor, Object, Pickle, StorageKind, StorageRef, TensorView, Value};
use super::{Encoding, MappedFile, StoredTensor};
use crate::layers::TensorSource;
use crate::{Error, Result};

mod machine;
mod write;
mod zip;

pub use write::write_torch;

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
    tensors: BTreeMap<String, View>,
}

/// Where a tensor's elements are; checked against the file when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
struct View {
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

    /// How a tensor's elements are stored.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn encoding(&self, name: &str) -> Result<Encoding> {
        Ok(encoding(self.tensor(name)?.kind))
    }

    /// A tensor as it is stored, whatever it holds. Its bytes are the file's own where they lie there in order.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        let view = self.tensor(name)?;
        let bytes = match view.in_order() {
            Some(range) => Cow::Borrowed(&self.bytes()[range]),
            None => Cow::Owned(view.gather_bytes(self.bytes())),
        };
        Ok(StoredTensor { shape: view.shape.clone(), encoding: encoding(view.kind), bytes })
    }

    /// Lets go of the memory behind a tensor; reading it again fetches it from the file again.
    pub(super) fn release(&self, name: &str) {
        if let Some(view) = self.tensors.get(name) {
            self.file.release(&self.bytes()[view.storage.clone()]);
        }
    }

    fn tensor(&self, name: &str) -> Result<&View> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.into() })
    }

    fn tensor_of_shape(&self, name: &str, expected: &[usize]) -> Result<&View> {
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

fn encoding(kind: StorageKind) -> Encoding {
    match kind {
        StorageKind::F64 => Encoding::F64,
        StorageKind::F32 => Encoding::F32,
        StorageKind::F16 => Encoding::F16,
        StorageKind::Bf16 => Encoding::Bf16,
        StorageKind::I64 => Encoding::I64,
        StorageKind::I32 => Encoding::I32,
        StorageKind::I16 => Encoding::I16,
        StorageKind::I8 => Encoding::I8,
        StorageKind::U8 => Encoding::U8,
        StorageKind::Bool => Encoding::Bool,
    }
}

impl View {
    /// The bytes in the file, if the elements lie there in order of the shape.
    fn in_order(&self) -> Option<Range<usize>> {
        let mut n_elements = 1;
        for (&extent, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if extent > 1 && stride != n_elements {
                return None;
            }
            n_elements *= extent;
        }
        let size = self.kind.size();
        let start = self.storage.start + self.offset * size;
        Some(start..start + n_elements * size)
    }

    fn gather_bytes(&self, file: &[u8]) -> Vec<u8> {
        match self.kind.size() {
            8 => self.gather(file, |bytes: [u8; 8]| bytes).into_flattened(),
            4 => self.gather(file, |bytes: [u8; 4]| bytes).into_flattened(),
            2 => self.gather(file, |bytes: [u8; 2]| bytes).into_flattened(),
            _ => self.gather(file, |[byte]| byte),
        }
    }

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
fn index(bytes: &[u8]) -> std::result::Result<BTreeMap<String, View>, String> {
    if bytes.starts_with(b"PK") {
        zip::index(bytes)
    } else if bytes.starts_with(b"\x80") {
        index_legacy(bytes)
    } else {
        let found = super::recognise(bytes).unwrap_or("give the .pth file itself");
        Err(format!("this is not a PyTorch checkpoint: {found}"))
    }
}

/// The legacy container: pickles of a magic number, a version, facts about the writer's machine, the object, and the
/// storages' keys; then each storage, its number of elements (8 bytes) first.
fn index_legacy(bytes: &[u8]) -> std::result::Result<BTreeMap<String, View>, String> {
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

    let stored = storages(&checkpoint)?;
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
        cursor.take(storage.n_bytes()?)?;
        if places.insert(key, start..cursor.at).is_some() {
            return Err("it holds the same storage twice: the file is damaged".into());
        }
    }
    named_tensors(&checkpoint, &places)
}

/// The storages that a checkpoint's tensors are views of, by key.
fn storages<'a>(checkpoint: &Pickle<'a>) -> std::result::Result<HashMap<&'a str, StorageRef<'a>>, String> {
    let mut stored: HashMap<&str, StorageRef<'_>> = HashMap::new();
    for object in &checkpoint.objects {
        let Object::Storage(storage) = object else { continue };
        if stored.insert(storage.key, *storage).is_some_and(|before| before != *storage) {
            return Err("it describes the same storage in two ways: the file is damaged".into());
        }
    }
    Ok(stored)
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
) -> std::result::Result<BTreeMap<String, View>, String> {
    let mut found = BTreeMap::new();
    let mut to_visit = vec![(String::new(), 0, pickle.root)];
    let mut n_visits = 0;
    while let Some((name, depth, value)) = to_visit.pop() {
        let Value::Object(object) = value else { continue };
        match &pickle.objects[object] {
            Object::Tensor(view) => {
                let tensor = checked_view(view, places)?;
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

fn checked_view(
    view: &TensorView<'_>,
    places: &HashMap<&str, Range<usize>>,
) -> std::result::Result<View, String> {
    let storage =
        places.get(view.storage.key).ok_or("a tensor's values are not in the file: fetch it again")?;
    // Along an axis of one element nothing is ever stepped, so its stride says nothing (and may be any number).
    let strides =
        view.shape.iter().zip(&view.strides).map(|(&extent, &stride)| if extent > 1 { stride } else { 0 });
    Ok(View {
        kind: view.storage.kind,
        storage: storage.clone(),
        offset: view.offset,
        shape: view.shape.clone(),
        strides: strides.collect(),
    })
}

#[cfg(test)]
mod tests;
