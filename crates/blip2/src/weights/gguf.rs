//! GGUF files (versions 2 and 3), the container of quantised language models.
//!
//! Layout: magic, version, counts, metadata (key, type, value), tensor table (name, dimensions, type, offset), padding,
//! data. A header is other people's bytes: every count is checked against a limit and against what is left of the file
//! before memory is spent on it, every offset against the data and against the other tensors.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use super::{Encoding, MappedFile, TensorRows, recognise, refuse};
use crate::{Error, Result};

/// The most tensors a file may list. The largest published language models have some thousands.
const MAX_TENSORS: u64 = 1 << 17;
/// The most metadata entries. Published files have some tens.
const MAX_METADATA: u64 = 1 << 14;
/// The longest key or tensor name (the format's limit for keys is 65,535, ggml's for names 64).
const MAX_NAME: u64 = 1 << 16;
/// The longest single text (chat templates are some tens of kilobytes).
const MAX_STRING: u64 = 1 << 24;
/// The most elements that all arrays of the header may hold together (a vocabulary of 256,000 with its merges,
/// scores and types is about 1.3 million). This, not the file's size, bounds the memory a header can cost.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 24;
/// How deep arrays may nest.
const MAX_ARRAY_DEPTH: usize = 4;
/// ggml's limit.
const MAX_DIMENSIONS: u32 = 4;
/// The largest alignment of the data that is believed.
const MAX_ALIGNMENT: u64 = 1 << 20;

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
        TensorRows::new(entry.shape.clone(), entry.encoding, &self.file.bytes()[entry.range.clone()])
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

/// ggml's type numbers. `Err` carries the name of a type that is known but not read.
fn encoding(ggml_type: u32) -> std::result::Result<Encoding, &'static str> {
    Ok(match ggml_type {
        0 => Encoding::F32,
        1 => Encoding::F16,
        2 => Encoding::Q4_0,
        3 => Encoding::Q4_1,
        6 => Encoding::Q5_0,
        7 => Encoding::Q5_1,
        8 => Encoding::Q8_0,
        10 => Encoding::Q2K,
        11 => Encoding::Q3K,
        12 => Encoding::Q4K,
        13 => Encoding::Q5K,
        14 => Encoding::Q6K,
        24 => Encoding::I8,
        25 => Encoding::I16,
        26 => Encoding::I32,
        27 => Encoding::I64,
        28 => Encoding::F64,
        30 => Encoding::Bf16,
        9 => return Err("Q8_1"),
        15 => return Err("Q8_K"),
        16 => return Err("IQ2_XXS"),
        17 => return Err("IQ2_XS"),
        18 => return Err("IQ3_XXS"),
        19 => return Err("IQ1_S"),
        20 => return Err("IQ4_NL"),
        21 => return Err("IQ3_S"),
        22 => return Err("IQ2_S"),
        23 => return Err("IQ4_XS"),
        29 => return Err("IQ1_M"),
        31 => return Err("Q4_0_4_4"),
        32 => return Err("Q4_0_4_8"),
        33 => return Err("Q4_0_8_8"),
        34 => return Err("TQ1_0"),
        35 => return Err("TQ2_0"),
        39 => return Err("MXFP4"),
        _ => return Err("an unknown type"),
    })
}

struct Header {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Entry>,
}

/// Reads and checks everything before the data. Errors are reasons for the user.
fn read_header(bytes: &[u8]) -> std::result::Result<Header, String> {
    let mut reader = Reader { bytes, at: 0, array_elements_left: MAX_ARRAY_ELEMENTS };
    if !bytes.starts_with(b"GGUF") {
        return Err(recognise(bytes).unwrap_or("this is not a GGUF file").into());
    }
    reader.at = 4;
    match reader.u32()? {
        2 | 3 => {}
        1 => return Err("GGUF version 1 is not read: convert the file with a newer llama.cpp".into()),
        version if (1..=3).contains(&version.swap_bytes()) => {
            return Err("this GGUF file is big-endian: get the little-endian one".into());
        }
        version => return Err(format!("GGUF version {version} is not known here (2 and 3 are)")),
    }
    // A tensor takes at least 8 + 4 + 8 + 4 + 8 bytes of header, a metadata entry 8 + 4 + 1.
    let n_tensors = reader.count("tensors", MAX_TENSORS, 32)?;
    let n_metadata = reader.count("metadata entries", MAX_METADATA, 13)?;

    let mut metadata = BTreeMap::new();
    for _ in 0..n_metadata {
        let key = reader.string(MAX_NAME)?;
        let value_type = reader.u32()?;
        let value =
            reader.value(value_type).map_err(|reason| format!("metadata `{}`: {reason}", shown(&key)))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("has the metadata `{}` twice", shown(&key)));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && (1..=MAX_ALIGNMENT).contains(n) => *n as usize,
        Some(_) => return Err("metadata `general.alignment` is not a power of two".into()),
    };

    let mut infos = Vec::with_capacity(n_tensors);
    for _ in 0..n_tensors {
        infos.push(reader.tensor_info()?);
    }
    let data_start = if n_tensors == 0 { bytes.len() } else { reader.at.next_multiple_of(alignment) };
    Ok(Header { metadata, tensors: place(infos, data_start, bytes.len(), alignment)? })
}

struct TensorInfo {
    name: String,
    shape: Vec<usize>,
    encoding: Encoding,
    offset: u64,
}

/// Turns offsets into ranges of the file, none of which may leave it or touch another.
fn place(
    infos: Vec<TensorInfo>,
    data_start: usize,
    file_len: usize,
    alignment: usize,
) -> std::result::Result<BTreeMap<String, Entry>, String> {
    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::with_capacity(infos.len());
    for TensorInfo { name, shape, encoding, offset } in infos {
        let refuse = |reason: String| format!("tensor `{}` {reason}", shown(&name));
        let n_bytes = encoding.n_bytes(&shape).map_err(refuse)?;
        let start = usize::try_from(offset).ok().and_then(|offset| data_start.checked_add(offset));
        let range = start.and_then(|start| Some(start..start.checked_add(n_bytes)?));
        let range = match range {
            Some(range) if range.end <= file_len => range,
            _ => {
                return Err(refuse(format!(
                    "lies beyond the end of the file ({file_len} bytes): cut short or damaged, fetch it again"
                )));
            }
        };
        if offset % alignment as u64 != 0 {
            return Err(refuse(format!(
                "starts at {offset}, which is not a multiple of {alignment}: damaged"
            )));
        }
        ranges.push((range.start, range.end));
        let entry = Entry { shape, encoding, range, used: AtomicBool::new(false) };
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(format!("has the tensor `{}` twice", shown(&name)));
        }
    }
    ranges.sort_unstable();
    if ranges.windows(2).any(|pair| pair[1].0 < pair[0].1) {
        return Err("has tensors that overlap: damaged, fetch it again".into());
    }
    Ok(tensors)
}

/// A name from the file for an error message: of bounded length, control characters made visible.
fn shown(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_debug).collect()
}

/// Walks over the header; nothing is read without checking that it is there.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    array_elements_left: u64,
}

type Read<T> = std::result::Result<T, String>;

impl<'a> Reader<'a> {
    fn take(&mut self, n_bytes: u64) -> Read<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(n_bytes)
            .ok()
            .and_then(|n| rest.get(..n))
            .ok_or("cut short inside the header: fetch it again")?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        Ok(*self.take(N as u64)?.first_chunk().expect("take gives what was asked for"))
    }

    fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each.
    fn count(&mut self, what: &str, limit: u64, min_bytes: u64) -> Read<usize> {
        let n = self.u64()?;
        if n > limit {
            return Err(format!("claims {n} {what}, more than the {limit} that are allowed: damaged"));
        }
        if n * min_bytes > (self.bytes.len() - self.at) as u64 {
            return Err(format!("claims {n} {what}, more than it has bytes for: cut short, fetch it again"));
        }
        Ok(n as usize) // at most 2²⁴
    }

    fn string(&mut self, limit: u64) -> Read<String> {
        let len = self.u64()?;
        if len > limit {
            return Err(format!(
                "claims a text of {len} bytes, more than the {limit} that are allowed: damaged"
            ));
        }
        let text =
            std::str::from_utf8(self.take(len)?).map_err(|_| "has a text that is not UTF-8: damaged")?;
        Ok(text.into())
    }

    fn value(&mut self, value_type: u32) -> Read<Value> {
        Ok(match value_type {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string(MAX_STRING)?),
            9 => Value::Array(self.value_array(1)?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            unknown => return Err(format!("has the unknown type {unknown}: damaged")),
        })
    }

    fn bool(&mut self) -> Read<bool> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("holds {other} where true or false belongs: damaged")),
        }
    }

    fn value_array(&mut self, depth: usize) -> Read<Array> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(format!("nests arrays more than {MAX_ARRAY_DEPTH} deep: damaged"));
        }
        let element_type = self.u32()?;
        let min_bytes = match element_type {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            unknown => return Err(format!("is an array of the unknown type {unknown}: damaged")),
        };
        let n = self.count("array elements", self.array_elements_left, min_bytes)?;
        self.array_elements_left -= n as u64;
        Ok(match element_type {
            0 => Array::Unsigned(self.each(n, |r| r.array().map(|b| u8::from_le_bytes(b).into()))?),
            1 => Array::Signed(self.each(n, |r| r.array().map(|b| i8::from_le_bytes(b).into()))?),
            2 => Array::Unsigned(self.each(n, |r| r.array().map(|b| u16::from_le_bytes(b).into()))?),
            3 => Array::Signed(self.each(n, |r| r.array().map(|b| i16::from_le_bytes(b).into()))?),
            4 => Array::Unsigned(self.each(n, |r| r.u32().map(u64::from))?),
            5 => Array::Signed(self.each(n, |r| r.array().map(|b| i32::from_le_bytes(b).into()))?),
            6 => Array::Float(self.each(n, |r| r.array().map(|b| f32::from_le_bytes(b).into()))?),
            7 => Array::Bool(self.each(n, Self::bool)?),
            8 => Array::String(self.each(n, |r| r.string(MAX_STRING))?),
            9 => Array::Array(self.each(n, |r| r.value_array(depth + 1))?),
            10 => Array::Unsigned(self.each(n, Self::u64)?),
            11 => Array::Signed(self.each(n, |r| r.array().map(i64::from_le_bytes))?),
            _ => Array::Float(self.each(n, |r| r.array().map(f64::from_le_bytes))?),
        })
    }

    fn each<T>(&mut self, n: usize, mut read: impl FnMut(&mut Self) -> Read<T>) -> Read<Vec<T>> {
        (0..n).map(|_| read(self)).collect()
    }

    fn tensor_info(&mut self) -> Read<TensorInfo> {
        let name = self.string(MAX_NAME)?;
        let n_dimensions = self.u32()?;
        if n_dimensions == 0 || n_dimensions > MAX_DIMENSIONS {
            return Err(format!("tensor `{}` has {n_dimensions} dimensions: damaged", shown(&name)));
        }
        let mut shape = Vec::with_capacity(n_dimensions as usize);
        for _ in 0..n_dimensions {
            match usize::try_from(self.u64()?) {
                Ok(n) if n > 0 => shape.push(n),
                _ => return Err(format!("tensor `{}` has an impossible dimension: damaged", shown(&name))),
            }
        }
        shape.reverse(); // stored fastest first
        let encoding = encoding(self.u32()?).map_err(|type_name| {
            format!(
                "tensor `{}` is stored as {type_name}, which is not read here: get the model as Q4_1, Q8_0, \
                 Q4_K_M, Q6_K or F16",
                shown(&name)
            )
        })?;
        Ok(TensorInfo { name, shape, encoding, offset: self.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::safetensors::Safetensors;

    fn golden(name: &str) -> String {
        format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn every_type_decodes_to_the_bits_of_the_gguf_package() {
        let file = Gguf::open(golden("gguf_types.gguf")).unwrap();
        let expected = Safetensors::open(golden("gguf_types.safetensors")).unwrap();
        assert_eq!(file.names().count(), 14);
        for name in file.names() {
            let expected_values = expected.read_f32(name).unwrap();
            assert_eq!(file.shape(name).unwrap(), expected.shape(name).unwrap(), "{name}");
            assert_eq!(file.read_f32(name).unwrap(), expected_values, "{name}");
            let rows = file.tensor(name).unwrap();
            let mut row = vec![f32::NAN; rows.row_len()];
            for (i, expected) in expected_values.chunks(rows.row_len()).enumerate() {
                rows.read_row(i, &mut row);
                assert_eq!(row, expected, "{name} row {i}");
            }
        }
        file.finish().unwrap();
        expected.finish().unwrap();
    }

    #[test]
    fn metadata_of_every_type_is_read() {
        let file = Gguf::open(golden("gguf_types.gguf")).unwrap();
        let expected = [
            ("uint8", Value::Unsigned(200)),
            ("int8", Value::Signed(-100)),
            ("uint16", Value::Unsigned(60000)),
            ("int16", Value::Signed(-30000)),
            ("uint32", Value::Unsigned(4_000_000_000)),
            ("int32", Value::Signed(-2_000_000_000)),
            ("uint64", Value::Unsigned((1 << 63) + 1)),
            ("int64", Value::Signed(-(1 << 62))),
            ("float32", Value::Float(1.5)),
            ("float64", Value::Float(0.1)),
            ("bool", Value::Bool(true)),
            ("string", Value::String("größer".into())),
            ("array.13", Value::Array(Array::String(vec!["a".into(), "".into(), "日本".into()]))),
            ("array.14", Value::Array(Array::Signed(vec![1, -2, 3]))),
            ("array.15", Value::Array(Array::Float(vec![0.5, 0.25]))),
            ("array.16", Value::Array(Array::Array(vec![Array::Signed(vec![1]), Array::Signed(vec![2, 3])]))),
        ];
        assert_eq!(file.metadata().len(), expected.len() + 1);
        for (key, value) in expected {
            assert_eq!(file.get(&format!("value.{key}")), Some(&value), "{key}");
        }
        assert_eq!(file.string("general.architecture").unwrap(), "golden");
        assert_eq!(file.u32("value.uint8").unwrap(), 200);
        assert_eq!(file.f32("value.uint8").unwrap(), 200.0);
        assert_eq!(file.strings("value.array.13").unwrap(), ["a", "", "日本"]);
        assert_eq!(file.integers("value.array.14").unwrap(), [1, -2, 3]);
        for (key, reason) in [("value.int8", "is not a whole number"), ("value.none", "has no metadata")] {
            let error = file.u32(key).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("gguf_types.gguf"), "{error}");
        }
    }

    #[test]
    fn tensors_that_nobody_read_are_told() {
        let file = Gguf::open(golden("gguf_types.gguf")).unwrap();
        file.read_f32("Q4_1").unwrap();
        file.ignore(|name| name.starts_with('F') || name.ends_with('K'));
        let Err(Error::UnusedTensors { names }) = file.finish() else { panic!("nothing was missed") };
        assert_eq!(names, ["BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "cube"]);
        assert!(matches!(file.tensor("absent"), Err(Error::MissingTensor { name }) if name == "absent"));
    }

    /// A file made field by field, so that a test can get one of them wrong.
    struct Forged(Vec<u8>);

    impl Forged {
        fn new(version: u32, n_tensors: u64, n_metadata: u64) -> Self {
            Self(b"GGUF".to_vec()).u32(version).u64(n_tensors).u64(n_metadata)
        }
        fn u32(mut self, n: u32) -> Self {
            self.0.extend(n.to_le_bytes());
            self
        }
        fn u64(mut self, n: u64) -> Self {
            self.0.extend(n.to_le_bytes());
            self
        }
        fn text(self, text: &str) -> Self {
            let mut longer = self.u64(text.len() as u64);
            longer.0.extend(text.as_bytes());
            longer
        }
        fn tensor(self, name: &str, shape: &[u64], ggml_type: u32, offset: u64) -> Self {
            let named = self.text(name).u32(shape.len() as u32);
            shape.iter().fold(named, |file, &n| file.u64(n)).u32(ggml_type).u64(offset)
        }
        fn data(mut self, n_bytes: usize) -> Self {
            self.0.resize(self.0.len().next_multiple_of(32) + n_bytes, 0);
            self
        }
    }

    fn reason(file: Forged) -> String {
        match read_header(&file.0) {
            Ok(_) => panic!("the file was accepted"),
            Err(reason) => reason,
        }
    }

    #[test]
    fn a_sound_forgery_is_accepted() {
        let two = Forged::new(3, 2, 0).tensor("a", &[8], 0, 0).tensor("b", &[2, 3], 0, 32).data(32 + 24);
        let header = read_header(&two.0).unwrap();
        assert_eq!(header.tensors["b"].shape, [3, 2]);
        assert!(read_header(&Forged::new(2, 0, 0).data(0).0).is_ok());
    }

    #[test]
    fn each_lie_in_a_header_is_refused_for_what_it_is() {
        let huge = u64::MAX;
        let one = || Forged::new(3, 1, 0);
        let entry = |key: &str| Forged::new(3, 0, 1).text(key);
        let twice = Forged::new(3, 0, 2).text("k").u32(4).u32(1).text("k").u32(4).u32(2);
        for (file, expected) in [
            (Forged(b"PK\x03\x04 and so on".to_vec()), "zip archive"),
            (Forged(b"<!DOCTYPE html><html>".to_vec()), "web page"),
            (Forged(b"version https://git-lfs.github.com/spec/v1".to_vec()), "git lfs pull"),
            (Forged(b"abcdefgh".to_vec()), "not a GGUF file"),
            (Forged(b"GGUF\x03".to_vec()), "cut short"),
            (Forged::new(1, 0, 0), "version 1"),
            (Forged::new(4, 0, 0), "version 4"),
            (Forged::new(3u32.swap_bytes(), 0, 0), "big-endian"),
            (Forged::new(3, huge, 0), "more than the"),
            (Forged::new(3, 0, huge), "more than the"),
            (Forged::new(3, 1000, 0), "than it has bytes for"),
            (entry("k").u32(13).u64(0), "unknown type 13"),
            (entry("k").u32(7).u32(2), "true or false"),
            (entry("k").u32(8).u64(huge), "a text of"),
            (entry("k").u32(8).u64(100), "cut short"),
            (entry("k").u32(8).u64(1).u32(0xff), "not UTF-8"),
            (entry("k").u32(9).u32(4).u64(huge), "more than the"),
            (entry("k").u32(9).u32(4).u64(1 << 20), "than it has bytes for"),
            (entry("k").u32(9).u32(77).u64(1), "unknown type 77"),
            ((0..5).fold(entry("k").u32(9), |f, _| f.u32(9).u64(1)).u32(4).u64(0), "nests arrays"),
            (entry("general.alignment").u32(4).u32(24).data(0), "power of two"),
            (entry("general.alignment").u32(4).u32(0).data(0), "power of two"),
            (twice.data(0), "`k` twice"),
            (one().tensor("t", &[], 0, 0).data(64), "0 dimensions"),
            (one().tensor("t", &[1; 5], 0, 0).data(64), "5 dimensions"),
            (one().tensor("t", &[4, 0], 0, 0).data(64), "impossible dimension"),
            (one().tensor("t", &[1 << 40, 1 << 40], 0, 0).data(64), "impossible shape"),
            (one().tensor("t", &[1 << 62], 24, 0).data(64), "impossible shape"),
            (one().tensor("t", &[33], 2, 0).data(64), "blocks of 32"),
            (one().tensor("t", &[32], 19, 0).data(64), "IQ1_S"),
            (one().tensor("t", &[32], 99, 0).data(64), "unknown type"),
            (one().tensor("t", &[17], 0, 0).data(64), "beyond the end"),
            (one().tensor("t", &[4], 0, huge - 31).data(64), "beyond the end"),
            (one().tensor("t", &[4], 0, 64).data(64), "beyond the end"),
            (one().tensor("t", &[4], 0, 4).data(64), "multiple of 32"),
            (one().tensor("t\u{1b}[2J", &[4], 0, 4).data(64), "t\\u{1b}[2J"),
            (Forged::new(3, 2, 0).tensor("t", &[4], 0, 0).tensor("t", &[4], 0, 32).data(64), "`t` twice"),
            (Forged::new(3, 2, 0).tensor("t", &[16], 0, 0).tensor("u", &[4], 0, 32).data(64), "overlap"),
        ] {
            let reason = reason(file);
            assert!(reason.contains(expected), "expected {expected:?}, got {reason:?}");
        }
    }

    #[test]
    fn a_cut_file_is_refused_and_a_flipped_bit_never_panics() {
        let bytes = std::fs::read(golden("gguf_types.gguf")).unwrap();
        let header_len = bytes.len() - 20_000; // all of the header and some data
        for len in (0..header_len).chain((header_len..bytes.len()).step_by(997)) {
            assert!(read_header(&bytes[..len]).is_err(), "accepted {len} of {} bytes", bytes.len());
        }
        let mut out = vec![0.0; 2048];
        for bit in 0..header_len * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // Whatever is still accepted must be readable within the file.
            for entry in read_header(&damaged).into_iter().flat_map(|header| header.tensors.into_values()) {
                let n_values: usize = entry.shape.iter().product();
                out.resize(n_values, 0.0);
                entry.encoding.decode(&damaged[entry.range], &mut out);
            }
        }
    }

    #[test]
    fn the_default_language_model_has_the_tensors_it_should() {
        let Some(frozen) = std::env::var_os("BLIP2_FROZEN") else {
            return eprintln_skipped();
        };
        let file = Gguf::open(Path::new(&frozen).join("SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
        assert_eq!(file.string("general.architecture").unwrap(), "llama");
        assert_eq!(file.u32("llama.block_count").unwrap(), 30);
        assert_eq!(file.strings("tokenizer.ggml.merges").unwrap().len(), 48_900);
        let n_parameters: usize =
            file.names().map(|name| file.shape(name).unwrap().iter().product::<usize>()).sum();
        assert_eq!(n_parameters, 134_515_008);
        let mut row = [0.0; 576];
        file.read_row_f32("token_embd.weight", 49_151, &mut row).unwrap();
        let deviation = (row.iter().map(|x| x * x).sum::<f32>() / 576.0).sqrt();
        assert!((0.05..0.3).contains(&deviation), "{deviation}");
    }

    #[allow(clippy::print_stderr)] // the one way a test can say that it did not run
    fn eprintln_skipped() {
        eprintln!("SKIPPED: BLIP2_FROZEN does not name the folder of the frozen models");
    }
}
