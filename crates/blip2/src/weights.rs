//! Weight files: memory-mapped readers that hand out rows as f32, and the atomic writer.
//!
//! Flow: file → [`Safetensors`](safetensors::Safetensors) or [`Gguf`](gguf::Gguf) → [`TensorRows`] →
//! packed weights of a layer; PyTorch's own files through [`torch_pickle`]; a [`Checkpoint`] is either, to be carried into
//! another file. Nothing here knows a model: names, shapes and bytes only. Every reader treats the file
//! as hostile (sizes are checked before memory is spent) and remembers which tensors were asked for, so that a
//! checkpoint of another model is noticed instead of half used.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

mod blocks;
mod checkpoint;
pub mod gguf;
pub mod int8;
pub(crate) mod quantized;
pub(crate) mod random;
pub mod safetensors;
pub mod torch_pickle;

pub use blocks::Encoding;
pub use checkpoint::Checkpoint;
pub use random::RandomWeights;

/// A read-only view of a whole file, shared by the readers that hand out parts of it.
#[derive(Debug, Clone)]
pub struct MappedFile {
    path: PathBuf,
    map: Arc<memmap2::Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// The file must not be cut short by another process while it is mapped (the operating system would end this
    /// one); files that this project writes are replaced by renaming, never rewritten in place.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened, [`Error::File`] when it is a directory or empty.
    #[allow(unsafe_code)]
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io_error = |source| Error::Io { path: path.into(), source };
        // Asked before it is opened: opening a pipe waits for who writes to it.
        let about = std::fs::metadata(path).map_err(io_error)?;
        if !about.is_file() {
            return Err(refuse(path, "this is not a regular file: give the path of the weight file itself"));
        }
        if about.len() == 0 {
            return Err(refuse(path, "the file is empty: fetch it again"));
        }
        let file = File::open(path).map_err(io_error)?;
        // SAFETY: the mapping is private and read-only, and its bytes are only ever read as `u8` (any value is valid)
        // with every range checked against its length. What no check here can exclude is another process that
        // changes the file meanwhile: parsed headers are copied out before they are judged, so changed bytes give
        // wrong numbers, not wrong addresses; truncation ends the process, as documented above.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io_error)?;
        Ok(Self { path: path.into(), map: Arc::new(map) })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets go of the memory behind `part` of [`bytes`](Self::bytes); reading it again fetches it from the file again.
    #[allow(unsafe_code)]
    fn release(&self, part: &[u8]) {
        #[cfg(unix)]
        {
            let offset = part.as_ptr() as usize - self.map.as_ptr() as usize;
            // SAFETY: the mapping is of a file and never written to, so a page that is dropped comes back with the same
            // bytes. Failing is harmless: the memory stays taken.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, part.len())
            };
        }
        #[cfg(not(unix))]
        let _ = part;
    }
}

/// SHA-256 in hexadecimal, by which frozen files are known.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The rows of one stored tensor, decoded to f32 on request.
///
/// A tensor of shape `[d0, d1, …, dn]` is `d0·…·d(n-1)` rows of `dn` values; a vector is one row. Reading needs no
/// `Result`: everything was checked when the view was made, so a packing loop on several threads can use it.
#[derive(Debug, Clone)]
pub struct TensorRows<'a> {
    shape: Vec<usize>,
    encoding: Encoding,
    file: &'a MappedFile,
    bytes: &'a [u8],
}

impl<'a> TensorRows<'a> {
    /// Checks that the bytes in `range` of the file are exactly a tensor of `shape` in `encoding`; the reason is for an
    /// error message.
    fn new(
        shape: Vec<usize>,
        encoding: Encoding,
        file: &'a MappedFile,
        range: Range<usize>,
    ) -> std::result::Result<Self, String> {
        let bytes = file.bytes().get(range).ok_or("lies outside the file")?;
        let expected = encoding.n_bytes(&shape)?;
        if expected != bytes.len() {
            return Err(format!("holds {} bytes where its shape needs {expected}", bytes.len()));
        }
        Ok(Self { shape, encoding, file, bytes })
    }

    /// Its shape, slowest dimension first (as PyTorch writes it).
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How its values are stored.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Values in a row: the last dimension, 1 for a scalar.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// How many rows there are.
    pub fn n_rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The stored bytes of all rows.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The same numbers with all dimensions but the first in a row.
    pub fn flattened(mut self) -> Self {
        if self.shape.len() > 2 {
            self.shape = vec![self.shape[0], self.shape[1..].iter().product()];
        }
        self
    }

    /// Lets go of the file's pages that the bytes are on, after they were copied; reading them again works.
    pub fn release(&self) {
        self.file.release(self.bytes);
    }

    /// The stored bytes of row `row`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_bytes(&self, row: usize) -> &'a [u8] {
        assert!(row < self.n_rows(), "row {row} of a tensor with {} rows", self.n_rows());
        let n_bytes = self.bytes.len() / self.n_rows();
        &self.bytes[row * n_bytes..(row + 1) * n_bytes]
    }

    /// Decodes row `row` into `into`.
    ///
    /// # Panics
    /// When there is no such row or `into` is not of length [`row_len`](Self::row_len).
    pub fn read_row(&self, row: usize, into: &mut [f32]) {
        assert_eq!(into.len(), self.row_len(), "the buffer must hold exactly one row");
        self.encoding.decode(self.row_bytes(row), into);
    }

    /// Decodes all rows, in order.
    pub fn to_vec(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.iter().product()];
        self.encoding.decode(self.bytes, &mut values);
        values
    }

    /// Checks the shape that a configuration asks for.
    ///
    /// # Errors
    /// [`Error::TensorShape`] with `name` in it.
    pub fn expect_shape(self, name: &str, expected: &[usize]) -> Result<Self> {
        if self.shape == expected {
            return Ok(self);
        }
        Err(Error::TensorShape { name: name.into(), expected: expected.into(), found: self.shape })
    }
}

/// A tensor as a file holds it, to be carried into another file without a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor<'a> {
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub encoding: Encoding,
    /// The elements, the last dimension fastest.
    pub bytes: Cow<'a, [u8]>,
}

/// Whether all values are numbers and none is infinite. Without a branch a value: it costs nothing beside decoding.
pub(crate) fn is_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    !values.iter().fold(false, |found, value| found | (value.to_bits() & EXPONENT == EXPONENT))
}

/// Writes a file so that its readers see all of it or the one that was there before, also after a power cut.
///
/// `write` fills a new file beside `path`; that is flushed to the disk, renamed over `path`, and the folder is flushed
/// too. When anything fails the new file is removed and `path` is untouched.
///
/// # Errors
/// [`Error::Io`] that names `path`, whatever step failed (a full disk included).
pub fn write_atomically(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    replace_file(path, write).map_err(|source| Error::Io { path: path.into(), source })
}

fn replace_file(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "this path does not end in a file name")
    })?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if path.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::IsADirectory,
            "a folder is in the way: give the path of a file",
        ));
    }
    let (temporary, file) = TemporaryFile::create(folder, name)?;
    let mut writer = BufWriter::with_capacity(1 << 18, file);
    write(&mut writer)?;
    writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(&temporary.path, path)?; // nothing is left under the temporary name for the drop to remove
    // The name is safe only when the folder is on the disk too. Not every platform can open a folder.
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// A file that is removed when it goes out of scope.
struct TemporaryFile {
    path: PathBuf,
}

impl TemporaryFile {
    fn create(folder: &Path, name: &std::ffi::OsStr) -> io::Result<(Self, File)> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let mut own_name = std::ffi::OsString::from(".");
            own_name.push(name);
            own_name.push(format!(".{}-{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
            let path = folder.join(own_name);
            match File::create_new(&path) {
                Ok(file) => return Ok((Self { path }, file)),
                // Left by a killed process that had this number: take the next one.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // nothing more can be done, and the first error is already on its way
    }
}

fn refuse(path: &Path, reason: impl Into<String>) -> Error {
    Error::File { path: path.into(), reason: reason.into() }
}

/// [`Error::UnusedTensors`] with the names whose mark is not set.
fn no_unused<'a>(tensors: impl Iterator<Item = (&'a String, &'a AtomicBool)>) -> Result<()> {
    let names: Vec<_> =
        tensors.filter(|(_, used)| !used.load(Ordering::Relaxed)).map(|(name, _)| name.clone()).collect();
    if names.is_empty() { Ok(()) } else { Err(Error::UnusedTensors { names }) }
}

/// What a file that is not of the expected format most likely is, with the remedy.
fn recognise(bytes: &[u8]) -> Option<&'static str> {
    let start = &bytes[..bytes.len().min(512)];
    let text = String::from_utf8_lossy(start).trim_start().to_ascii_lowercase();
    let is_json = text.starts_with('{');
    let is_header = start.len() > 8 && start[8] == b'{' && start[4..8] == [0; 4];
    Some(if start.starts_with(b"version https://git-lfs") {
        "this is a Git LFS pointer, not the file itself: run `git lfs pull` or download the file"
    } else if text.starts_with("<!doctype") || text.starts_with("<html") || text.starts_with("<?xml") {
        "this is a web page, not a weight file: the download gave an error or login page, fetch it again"
    } else if start.starts_with(b"GGUF") {
        "this is a GGUF file: give it as the language model"
    } else if is_header {
        "this looks like a safetensors file"
    } else if start.starts_with(b"PK\x03\x04") {
        "this is a zip archive (a PyTorch checkpoint or a wheel): `blip2 convert` makes safetensors of a checkpoint; unpack a wheel"
    } else if start.starts_with(b"\x80\x02")
        || start.starts_with(b"\x80\x03")
        || start.starts_with(b"\x80\x04")
    {
        "this is a Python pickle (a PyTorch checkpoint): `blip2 convert` makes safetensors of it"
    } else if start.starts_with(b"\x1f\x8b") {
        "this is gzip-compressed: unpack it first"
    } else if is_json {
        "this is JSON text, not a weight file"
    } else {
        return None;
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_no_number_is_found_wherever_it_stands() {
        let sound = vec![f32::MAX, f32::MIN, 0.0, -0.0, f32::MIN_POSITIVE, 1e-45, 1.0];
        assert!(is_finite(&sound) && is_finite(&[]));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for i in 0..sound.len() {
                let mut values = sound.clone();
                values[i] = bad;
                assert!(!is_finite(&values), "{bad} at {i}");
            }
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.bin");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(b"new, but not all of it")?;
            Err(io::Error::new(io::ErrorKind::StorageFull, "no space left"))
        })
        .unwrap_err();
        assert!(
            error.to_string().contains("weights.bin") && error.to_string().contains("no space left"),
            "{error}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file was left behind");
        write_atomically(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn writing_to_an_impossible_place_names_it() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("missing/weights.bin"), folder.path().into()] {
            let error = write_atomically(&path, |file| file.write_all(b"x")).unwrap_err();
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn folders_and_empty_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty");
        fs::write(&empty, b"").unwrap();
        assert!(MappedFile::open(&empty).unwrap_err().to_string().contains("empty: the file is empty"));
        assert!(MappedFile::open(folder.path()).unwrap_err().to_string().contains("not a regular file"));
        assert!(MappedFile::open(folder.path().join("absent")).unwrap_err().to_string().contains("absent"));
    }

    /// Nobody writes to it: waiting for its bytes would never end.
    #[cfg(unix)]
    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        if std::process::Command::new("mkfifo").arg(&pipe).status().is_ok_and(|status| status.success()) {
            assert!(MappedFile::open(&pipe).unwrap_err().to_string().contains("not a regular file"));
        }
    }
}
