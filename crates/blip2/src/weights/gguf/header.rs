//! The header of a GGUF file: read and judged before anything else is believed.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use super::{Array, Entry, Value};
use crate::weights::{Encoding, recognise};

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

pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Entry>,
}

/// Reads and checks everything before the data. Errors are reasons for the user.
pub(super) fn read_header(bytes: &[u8]) -> std::result::Result<Header, String> {
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
