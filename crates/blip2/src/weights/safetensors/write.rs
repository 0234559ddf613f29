//! The writer of safetensors files: from values in memory, or tensor by tensor.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;

use super::super::{Encoding, write_atomically};
use crate::Result;

/// A tensor to be stored.
#[derive(Debug, Clone)]
pub struct NamedTensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Its values, in row-major order.
    pub values: Values<'a>,
}

impl<'a> NamedTensor<'a> {
    /// A tensor of f32 numbers.
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &'a [f32]) -> Self {
        Self { name: name.into(), shape: shape.into(), values: Values::F32(values) }
    }
}

/// The values of a tensor to be stored, in the type in which they are stored.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)] // the names are the format's own
pub enum Values<'a> {
    F32(&'a [f32]),
    /// f32 values that are rounded to f16 on the way to the disk.
    F32AsF16(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    I8(&'a [i8]),
    U8(&'a [u8]),
    U32(&'a [u32]),
    I64(&'a [i64]),
    U64(&'a [u64]),
    /// Panels of a matrix in few bits, stored first and at a multiple of 64 bytes.
    Panels(&'a [u8]),
    /// The bytes of a tensor as another safetensors file has them.
    Stored(Encoding, &'a [u8]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(v) | Self::F32AsF16(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U8(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::Panels(v) => v.len(),
            Self::Stored(_, v) => 8 * v.len() / self.dtype().bitsize(),
        }
    }

    fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F32AsF16(_) | Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::BF16,
            Self::I8(_) => Dtype::I8,
            Self::U8(_) | Self::Panels(_) => Dtype::U8,
            Self::U32(_) => Dtype::U32,
            Self::I64(_) => Dtype::I64,
            Self::U64(_) => Dtype::U64,
            Self::Stored(encoding, _) => dtype(*encoding).expect("a type that the format has"),
        }
    }

    fn n_bytes(&self) -> usize {
        self.len() * self.dtype().bitsize() / 8
    }

    fn write(&self, file: &mut impl Write) -> io::Result<()> {
        match *self {
            Self::F32(v) => write_each(file, v, |x| x.to_le_bytes()),
            Self::F32AsF16(v) => write_each(file, v, |x| f16::from_f32(x).to_le_bytes()),
            Self::F16(v) => write_each(file, v, |x| x.to_le_bytes()),
            Self::Bf16(v) => write_each(file, v, |x| x.to_le_bytes()),
            Self::I8(v) => write_each(file, v, |x| x.to_le_bytes()),
            Self::U8(v) | Self::Panels(v) | Self::Stored(_, v) => file.write_all(v),
            Self::U32(v) => write_each(file, v, |x| x.to_le_bytes()),
            Self::I64(v) => write_each(file, v, |x| x.to_le_bytes()),
            Self::U64(v) => write_each(file, v, |x| x.to_le_bytes()),
        }
    }
}

/// Writes through a small buffer: a checkpoint is never held in memory a second time.
fn write_each<T: Copy, const N: usize>(
    file: &mut impl Write,
    values: &[T],
    bytes_of: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(4096 * N);
    for chunk in values.chunks(4096) {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|&value| bytes_of(value)));
        file.write_all(&buffer)?;
    }
    Ok(())
}

/// Writes tensors to a safetensors file, atomically (see [`write_atomically`]).
///
/// The bytes depend on nothing but the arguments: after panels, tensors are laid out by falling alignment and then by
/// name, the metadata is sorted.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) that names the file.
///
/// # Panics
/// When a shape does not fit its values, two tensors have one name, or one was stored in blocks that the format does not
/// have.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &[NamedTensor<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let about = |tensor: &NamedTensor<'_>| {
        let n_values: usize = tensor.shape.iter().product();
        assert_eq!(n_values, tensor.values.len(), "shape {:?} of `{}`", tensor.shape, tensor.name);
        About {
            name: tensor.name.clone(),
            dtype: tensor.values.dtype(),
            shape: tensor.shape.clone(),
            n_bytes: tensor.values.n_bytes(),
            are_panels: matches!(tensor.values, Values::Panels(_)),
        }
    };
    write_file(path.as_ref(), tensors.iter().map(about).collect(), metadata, |i, file| {
        tensors[i].values.write(file)
    })
}

/// A tensor that [`stream_safetensors`] is to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorAbout {
    /// Its name in the file.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub encoding: Encoding,
}

impl TensorAbout {
    /// Bytes of its elements.
    ///
    /// # Panics
    /// When there can be no such tensor: it was described, not read from a file.
    pub fn n_bytes(&self) -> usize {
        let n_bytes = self.encoding.n_bytes(&self.shape);
        n_bytes.unwrap_or_else(|reason| panic!("`{}` {reason}", self.name))
    }
}

/// Writes tensors as [`write_safetensors`] does, each only when its turn comes: `write` gets the index of a tensor in
/// `tensors` and writes its bytes, of which never more than one tensor's need be in memory.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) that names the file, also when `write` fails or gives another number of bytes than the tensor has.
///
/// # Panics
/// When two tensors have one name, or one is in quantised blocks, which the format does not have.
pub fn stream_safetensors(
    path: impl AsRef<Path>,
    tensors: &[TensorAbout],
    metadata: &BTreeMap<String, String>,
    mut write: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let about = |tensor: &TensorAbout| {
        let dtype = dtype(tensor.encoding).unwrap_or_else(|| panic!("`{}` is quantised", tensor.name));
        let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
        About { name, dtype, shape, n_bytes: tensor.n_bytes(), are_panels: false }
    };
    write_file(path.as_ref(), tensors.iter().map(about).collect(), metadata, |i, file| {
        let mut counted = Counted { file, n_bytes: 0 };
        write(i, &mut counted)?;
        if counted.n_bytes == tensors[i].n_bytes() {
            return Ok(());
        }
        let (name, n_bytes) = (&tensors[i].name, counted.n_bytes);
        Err(io::Error::other(format!(
            "{n_bytes} bytes were written for `{name}`, not the {}",
            tensors[i].n_bytes()
        )))
    })
}

struct Counted<'a, W> {
    file: &'a mut W,
    n_bytes: usize,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.n_bytes += n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

struct About {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    n_bytes: usize,
    are_panels: bool,
}

/// Header and data of tensors.
fn write_file(
    path: &Path,
    tensors: Vec<About>,
    metadata: &BTreeMap<String, String>,
    mut write: impl FnMut(usize, &mut io::BufWriter<std::fs::File>) -> io::Result<()>,
) -> Result<()> {
    let mut order: Vec<_> = tensors.into_iter().enumerate().collect();
    order.sort_by(|(_, a), (_, b)| {
        let panels_first = b.are_panels.cmp(&a.are_panels);
        panels_first.then(b.dtype.cmp(&a.dtype)).then_with(|| a.name.cmp(&b.name))
    });
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut end = 0;
    for (_, About { name, dtype, shape, n_bytes, .. }) in &order {
        let start = end;
        end += n_bytes;
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        assert!(header.insert(name.clone(), info).is_none(), "two tensors are named `{name}`");
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // So that the data starts aligned; eight bytes stand before the header.
    let alignment = if order.first().is_some_and(|(_, first)| first.are_panels) { 64 } else { 8 };
    header.resize((8 + header.len()).next_multiple_of(alignment) - 8, b' ');
    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        order.iter().try_for_each(|(i, _)| write(*i, file))
    })
}

/// The format's name of a plain type.
fn dtype(encoding: Encoding) -> Option<Dtype> {
    Some(match encoding {
        Encoding::F32 => Dtype::F32,
        Encoding::F16 => Dtype::F16,
        Encoding::Bf16 => Dtype::BF16,
        Encoding::F64 => Dtype::F64,
        Encoding::Bool => Dtype::BOOL,
        Encoding::U8 => Dtype::U8,
        Encoding::I8 => Dtype::I8,
        Encoding::U16 => Dtype::U16,
        Encoding::I16 => Dtype::I16,
        Encoding::U32 => Dtype::U32,
        Encoding::I32 => Dtype::I32,
        Encoding::U64 => Dtype::U64,
        Encoding::I64 => Dtype::I64,
        _ => return None,
    })
}
