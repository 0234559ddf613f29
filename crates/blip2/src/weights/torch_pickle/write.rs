//! Writes what `torch.save` would: a zip archive whose pickle names nothing but tensors, so that
//! `torch.load(…, weights_only=True)` reads it.

use std::io::{self, Seek, Write};
use std::path::Path;

use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::super::{Encoding, safetensors::TensorAbout, write_atomically};
use crate::Result;

/// PyTorch begins every storage at a multiple of this, so that it can be used where it is mapped.
const ALIGNMENT: u16 = 64;

/// Writes the state dict of `tensors` under the key `key` (LAVIS's is `model`), atomically; `write` gets the index of a tensor
/// and writes its bytes, as for [`stream_safetensors`](super::super::safetensors::stream_safetensors).
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) that names the file, also when `write` fails.
///
/// # Panics
/// When a tensor is of a type that PyTorch's checkpoints do not have.
pub fn write_torch(
    path: impl AsRef<Path>,
    key: &str,
    tensors: &[TensorAbout],
    mut write: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let pickle = pickle(key, tensors);
    write_atomically(path, |file| {
        let mut archive = ZipWriter::new(file);
        let written = write_entries(&mut archive, &pickle, tensors, &mut write);
        if let Err(error) = written {
            // Dropped unfinished, it would try to finish and complain on standard error.
            std::mem::forget(archive);
            return Err(error);
        }
        archive.finish()?;
        Ok(())
    })
}

fn write_entries(
    archive: &mut ZipWriter<impl Write + Seek>,
    pickle: &[u8],
    tensors: &[TensorAbout],
    write: &mut impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let options =
        SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(ALIGNMENT);
    for (name, bytes) in [("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")] {
        archive.start_file(format!("archive/{name}"), options)?;
        archive.write_all(bytes)?;
    }
    for (i, tensor) in tensors.iter().enumerate() {
        let is_large = tensor.n_bytes() as u64 >= u64::from(u32::MAX);
        archive.start_file(format!("archive/data/{i}"), options.large_file(is_large))?;
        write(i, archive)?;
    }
    Ok(())
}

fn storage_class(encoding: Encoding) -> Option<&'static str> {
    Some(match encoding {
        Encoding::F64 => "DoubleStorage",
        Encoding::F32 => "FloatStorage",
        Encoding::F16 => "HalfStorage",
        Encoding::Bf16 => "BFloat16Storage",
        Encoding::I64 => "LongStorage",
        Encoding::I32 => "IntStorage",
        Encoding::I16 => "ShortStorage",
        Encoding::I8 => "CharStorage",
        Encoding::U8 => "ByteStorage",
        Encoding::Bool => "BoolStorage",
        _ => return None,
    })
}

/// `{key: OrderedDict([(name, tensor), …])}`, with the instructions that the machine beside this file reads.
fn pickle(key: &str, tensors: &[TensorAbout]) -> Vec<u8> {
    let mut program = b"\x80\x02}".to_vec();
    text(&mut program, key);
    program.extend(b"ccollections\nOrderedDict\n)R(");
    for (i, TensorAbout { name, shape, encoding }) in tensors.iter().enumerate() {
        let class = storage_class(*encoding)
            .unwrap_or_else(|| panic!("`{name}` is {encoding:?}, which PyTorch does not have"));
        text(&mut program, name);
        program.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut program, "storage");
        program.extend(format!("ctorch\n{class}\n").bytes());
        text(&mut program, &i.to_string());
        text(&mut program, "cpu");
        int(&mut program, shape.iter().product());
        program.extend(b"tQ");
        int(&mut program, 0);
        let strides = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product());
        tuple(&mut program, shape.iter().copied());
        tuple(&mut program, strides);
        // No gradient is wanted, and there are no hooks.
        program.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    program.extend(b"us.");
    program
}

fn text(program: &mut Vec<u8>, text: &str) {
    program.push(b'X');
    program.extend((text.len() as u32).to_le_bytes());
    program.extend(text.bytes());
}

/// LONG1, which holds any number.
fn int(program: &mut Vec<u8>, value: usize) {
    program.extend(b"\x8a\x09");
    program.extend((value as u64).to_le_bytes());
    program.push(0); // the sign
}

fn tuple(program: &mut Vec<u8>, values: impl Iterator<Item = usize>) {
    program.push(b'(');
    values.for_each(|value| int(program, value));
    program.push(b't');
}

#[cfg(test)]
mod tests {
    use super::super::TorchCheckpoint;
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pth");
        let original =
            TorchCheckpoint::open(format!("{}/tests/golden/torch_zip.pth", env!("CARGO_MANIFEST_DIR")))
                .unwrap();
        let names: Vec<_> = original.names().map(str::to_owned).collect();
        let about = |name: &String| {
            let tensor = original.stored(name).unwrap();
            let name = name.strip_prefix("model.").unwrap().to_owned();
            TensorAbout { name, shape: tensor.shape, encoding: tensor.encoding }
        };
        let abouts: Vec<_> = names.iter().map(about).collect();
        write_torch(&path, "model", &abouts, |i, file| {
            file.write_all(&original.stored(&names[i]).unwrap().bytes)
        })
        .unwrap();
        let copy = TorchCheckpoint::open(&path).unwrap();
        assert_eq!(copy.names().collect::<Vec<_>>(), names);
        for name in &names {
            assert_eq!(copy.stored(name).unwrap(), original.stored(name).unwrap(), "{name}");
        }
        let before = std::fs::read(&path).unwrap();
        let full =
            |_: usize, _: &mut dyn Write| Err(io::Error::new(io::ErrorKind::StorageFull, "no space left"));
        assert!(write_torch(&path, "model", &abouts, full).unwrap_err().to_string().contains("a.pth"));
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
