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
mod tests {
    use super::*;

    const MAGIC_PICKLE: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
    const VERSION_PICKLE: &[u8] = b"\x80\x02M\xe9\x03.";
    const FACTS_PICKLE: &[u8] = b"\x80\x02}q\x00X\x0d\x00\x00\x00little_endian\x88s.";

    /// A legacy checkpoint around the pickle `checkpoint`, with the storages `(key, n_elements, bytes)`.
    fn legacy(checkpoint: &[u8], storages: &[(&str, u64, &[u8])]) -> Vec<u8> {
        let mut file = [MAGIC_PICKLE, VERSION_PICKLE, FACTS_PICKLE, checkpoint, b"\x80\x02]("].concat();
        for (key, ..) in storages {
            file.extend(text(key));
        }
        file.extend(b"e.");
        for (_, n_elements, bytes) in storages {
            file.extend(n_elements.to_le_bytes());
            file.extend(*bytes);
        }
        file
    }

    fn text(text: &str) -> Vec<u8> {
        [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// LONG1 of eight bytes.
    fn int(value: i64) -> Vec<u8> {
        [b"\x8a\x08", &value.to_le_bytes()[..]].concat()
    }

    fn ints(values: &[i64]) -> Vec<u8> {
        [b"(".to_vec(), values.iter().flat_map(|&value| int(value)).collect(), b"t".to_vec()].concat()
    }

    /// The instructions that leave one tensor on the stack.
    fn tensor(
        class: &str,
        key: &str,
        n_elements: i64,
        offset: i64,
        shape: &[i64],
        strides: &[i64],
    ) -> Vec<u8> {
        [
            &b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"[..],
            format!("{class}\n").as_bytes(),
            &text(key),
            &text("cpu"),
            &int(n_elements),
            b"NtQ",
            &int(offset),
            &ints(shape),
            &ints(strides),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
        .concat()
    }

    /// A state dict with the one tensor that `instructions` make.
    fn state_dict(name: &str, instructions: &[u8]) -> Vec<u8> {
        [&b"\x80\x02ccollections\nOrderedDict\n)R"[..], &text(name), instructions, b"s."].concat()
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn open(bytes: &[u8]) -> Result<TorchCheckpoint> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.pth");
        std::fs::write(&path, bytes).unwrap();
        TorchCheckpoint::open(&path)
    }

    fn refusal(bytes: &[u8]) -> String {
        let message = open(bytes).expect_err("this file must be refused").to_string();
        assert!(message.contains("weights.pth"), "the message names the file: {message}");
        message
    }

    fn small_file() -> Vec<u8> {
        let values = floats(&[0., 1., 2., 3., 4., 5.]);
        // Shape [2, 3] stored column by column: strides [1, 2].
        let pickle = state_dict("layer.weight", &tensor("FloatStorage", "7", 6, 0, &[2, 3], &[1, 2]));
        legacy(&pickle, &[("7", 6, &values)])
    }

    #[test]
    fn permuted_strides_are_followed() {
        let file = open(&small_file()).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["layer.weight"]);
        assert_eq!(file.shape("layer.weight").unwrap(), [2, 3]);
        assert_eq!(file.f32("layer.weight", &[2, 3]).unwrap(), [0., 2., 4., 1., 3., 5.]);
        assert!(matches!(file.f32("layer.weight", &[3, 2]), Err(Error::TensorShape { .. })));
        assert!(matches!(file.f32("layer.bias", &[3]), Err(Error::MissingTensor { .. })));
        assert!(file.i64("layer.weight", &[2, 3]).unwrap_err().to_string().contains("floating-point"));
    }

    #[test]
    fn every_storage_class_is_decoded() {
        let cases: [(&str, Vec<u8>); 10] = [
            ("DoubleStorage", [1f64, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect()),
            ("FloatStorage", floats(&[1., -2.])),
            ("HalfStorage", [1., -2.].iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()),
            (
                "BFloat16Storage",
                [1., -2.].iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
            ),
            ("LongStorage", [1i64, -2].iter().flat_map(|value| value.to_le_bytes()).collect()),
            ("IntStorage", [1i32, -2].iter().flat_map(|value| value.to_le_bytes()).collect()),
            ("ShortStorage", [1i16, -2].iter().flat_map(|value| value.to_le_bytes()).collect()),
            ("CharStorage", vec![1, 0xfe]),
            ("ByteStorage", vec![1, 0xfe]),
            ("BoolStorage", vec![1, 0]),
        ];
        for (class, bytes) in cases {
            let file =
                open(&legacy(&state_dict("x", &tensor(class, "0", 2, 0, &[2], &[1])), &[("0", 2, &bytes)]));
            let file = file.unwrap();
            match class {
                "DoubleStorage" | "FloatStorage" | "HalfStorage" | "BFloat16Storage" => {
                    assert_eq!(file.f32("x", &[2]).unwrap(), [1., -2.], "{class}");
                }
                "ByteStorage" => assert_eq!(file.i64("x", &[2]).unwrap(), [1, 254]),
                "BoolStorage" => assert_eq!(file.i64("x", &[2]).unwrap(), [1, 0]),
                _ => assert_eq!(file.i64("x", &[2]).unwrap(), [1, -2], "{class}"),
            }
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_without_a_panic() {
        let file = small_file();
        assert!(open(&file).is_ok());
        for length in 0..file.len() {
            let reason = index(&file[..length]).expect_err("a cut file must be refused");
            assert!(
                reason.contains("fetch it again") || reason.contains("not a PyTorch"),
                "cut at {length}: {reason}"
            );
        }
    }

    #[test]
    fn a_file_with_any_byte_changed_never_panics_nor_reads_outside() {
        let file = small_file();
        for at in 0..file.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut damaged = file.clone();
                damaged[at] ^= change;
                let Ok(tensors) = index(&damaged) else { continue };
                for tensor in tensors.values() {
                    assert!(tensor.gather(&damaged, |[byte]| byte).len() <= file.len());
                }
            }
        }
    }

    #[test]
    fn code_is_refused_by_name_and_not_run() {
        let evil = state_dict("x", b"cos\nsystem\n(X\x04\x00\x00\x00exittR");
        assert!(refusal(&legacy(&evil, &[])).contains("`os.system`"));
        let by_stack = [b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93)R.".to_vec()].concat();
        assert!(refusal(&legacy(&by_stack, &[])).contains("`builtins.eval`"));
        // Also in place of the magic number, before anything is known about the file.
        assert!(refusal(b"\x80\x02cposix\nsystem\n.").contains("`posix.system`"));
        // Calling a value that is no function, and the instructions that make objects of any class.
        assert!(refusal(&legacy(b"\x80\x02N)R.", &[])).contains("not a known function"));
        for opcode in [b'i', b'o', 0x81, 0x92, 0x82] {
            assert!(refusal(&legacy(&[0x80, 2, opcode, b'.'], &[])).contains("refused"), "{opcode:#x}");
        }
    }

    #[test]
    fn views_that_leave_their_storage_are_refused() {
        let values = floats(&[0.; 6]);
        let cases: [(i64, i64, &[i64], &[i64]); 9] = [
            (6, 1, &[2, 3], &[3, 1]),               // one past the end
            (6, 0, &[2, 3], &[4, 1]),               // a stride too long
            (6, -1, &[2, 3], &[3, 1]),              // before the start
            (6, 0, &[-2, -3], &[3, 1]),             // negative sizes whose product is right
            (6, 0, &[1 << 40, 1 << 40], &[0, 0]),   // the number of elements overflows
            (6, 0, &[1 << 40], &[0]),               // one element repeated for ever
            (6, 0, &[2, 3], &[i64::MAX, i64::MAX]), // the last index overflows
            (6, i64::MAX, &[2], &[i64::MAX]),       // the same from the offset
            (6, 0, &[2, 3], &[1]),                  // fewer strides than dimensions
        ];
        for (n, offset, shape, strides) in cases {
            let pickle = state_dict("x", &tensor("FloatStorage", "0", n, offset, shape, strides));
            refusal(&legacy(&pickle, &[("0", 6, &values)]));
        }
        let deep = state_dict("x", &tensor("FloatStorage", "0", 6, 0, &[1; 9], &[1; 9]));
        assert!(refusal(&legacy(&deep, &[("0", 6, &values)])).contains("dimensions"));
    }

    #[test]
    fn an_axis_of_one_may_have_any_stride() {
        let pickle = state_dict("x", &tensor("FloatStorage", "0", 2, 0, &[1, 2], &[i64::MAX, 1]));
        let file = open(&legacy(&pickle, &[("0", 2, &floats(&[4., 5.]))])).unwrap();
        assert_eq!(file.f32("x", &[1, 2]).unwrap(), [4., 5.]);
    }

    #[test]
    fn sizes_that_promise_more_than_the_file_holds_are_refused() {
        let values = floats(&[0.; 6]);
        for n_elements in [7, 1 << 62, i64::MAX] {
            let pickle = state_dict("x", &tensor("DoubleStorage", "0", n_elements, 0, &[6], &[1]));
            refusal(&legacy(&pickle, &[("0", n_elements as u64, &values)]));
            refusal(&legacy(&pickle, &[("0", 6, &values)]));
        }
        // A text of four gigabytes, an integer of 255 bytes, a memo place that does not exist.
        refusal(&legacy(b"\x80\x02X\xff\xff\xff\xff.", &[]));
        refusal(&legacy(&[&b"\x80\x02\x8a\xff"[..], &[1; 255], b"."].concat(), &[]));
        refusal(&legacy(b"\x80\x02j\xff\xff\xff\xff.", &[]));
        // Storages missing, unused, described twice in different ways.
        let pickle = state_dict("x", &tensor("FloatStorage", "0", 6, 0, &[6], &[1]));
        refusal(&legacy(&pickle, &[]));
        refusal(&legacy(&pickle, &[("0", 6, &values), ("1", 6, &values)]));
        refusal(&legacy(&pickle, &[("0", 6, &values), ("0", 6, &values)]));
    }

    #[test]
    fn runaway_programs_end() {
        let many = [&b"\x80\x02"[..], &vec![b'N'; 3_000_000], b"."].concat();
        assert!(refusal(&legacy(&many, &[])).contains("more than"));
        let marks = [&b"\x80\x02"[..], &vec![b'('; 3_000_000], b"."].concat();
        assert!(refusal(&legacy(&marks, &[])).contains("more than"));
        // A dictionary that holds itself, and one that doubles with every level.
        let endless = [&b"\x80\x02}q\x00"[..], &text("a"), b"h\x00s."].concat();
        assert!(refusal(&legacy(&endless, &[])).contains("nested"));
        let mut doubling = b"\x80\x02}q\x00".to_vec();
        for level in 0..40 {
            let (a, b) = (text("a"), text("b"));
            doubling
                .extend([&b"}("[..], &a, &[b'h', level], &b, &[b'h', level], b"uq", &[level + 1]].concat());
        }
        doubling.push(b'.');
        assert!(refusal(&legacy(&doubling, &[])).contains("nested"));
        // An empty stack, popped.
        for program in [&b"0."[..], b".", b"t.", b"s.", b"(0.", b"R.", b"Q.", b"b.", b"a.", b"q\x00."] {
            refusal(&legacy(&[b"\x80\x02", program].concat(), &[]));
        }
    }

    #[test]
    fn tensors_in_nested_dictionaries_have_dotted_names() {
        let inner = tensor("FloatStorage", "0", 1, 0, &[], &[]);
        let pickle = [
            &b"\x80\x02}("[..],
            &text("epoch"),
            b"K\x05",
            &text("model"),
            b"}",
            &text("scale"),
            &inner,
            b"su.",
        ]
        .concat();
        let file = open(&legacy(&pickle, &[("0", 1, &floats(&[3.]))])).unwrap();
        assert_eq!(file.f32("model.scale", &[]).unwrap(), [3.]);
    }

    #[test]
    fn other_files_are_refused() {
        assert!(refusal(b"").contains("empty"));
        assert!(refusal(b"\x89PNG\r\n").contains("not a PyTorch checkpoint"));
        assert!(refusal(b"\x80\x02K\x01.").contains("not a PyTorch checkpoint"));
        assert!(refusal(&legacy(b"\x80\x02}.", &[])).contains("no tensor"));
    }
}
