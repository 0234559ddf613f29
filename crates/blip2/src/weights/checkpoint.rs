//! A checkpoint in any container: safetensors or PyTorch, one file or shards.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{
    Encoding, StoredTensor, refuse,
    safetensors::{INDEX_NAME, SINGLE_NAME, Safetensors, shards},
    torch_pickle::TorchCheckpoint,
};
use crate::{Error, Result};

/// The names under which a Hugging Face folder may hold PyTorch's files.
pub(super) const TORCH_FILES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// The names under which a folder may hold a checkpoint, in the order in which they are looked for.
const FILES: [&str; 4] = [SINGLE_NAME, INDEX_NAME, TORCH_FILES[0], TORCH_FILES[1]];

/// Tensors by name, whatever file they are in; the files are memory-mapped.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    parts: Vec<Part>,
    /// Which part holds a tensor.
    places: BTreeMap<String, usize>,
}

#[derive(Debug)]
enum Part {
    Safetensors(Safetensors),
    Torch(TorchCheckpoint),
}

impl Checkpoint {
    /// Opens a safetensors or PyTorch file (known by its first bytes, not by its name), the index of shards of either kind,
    /// or a folder with one of these under Hugging Face's names.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`]: those of [`Safetensors::open`] and [`TorchCheckpoint::open`]; also when the folder
    /// holds no checkpoint, two shards hold one tensor, or a shard lacks what the index says it holds.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let found = FILES.iter().map(|name| path.join(name)).find(|file| file.exists());
            let found = found
                .ok_or_else(|| refuse(path, format!("this folder has none of: {}", FILES.join(", "))))?;
            return Self::open(found);
        }
        let mut checkpoint = Self { path: path.into(), parts: Vec::new(), places: BTreeMap::new() };
        if path.extension().is_some_and(|extension| extension == "json") {
            for shard in shards(path)? {
                checkpoint.add(&shard)?;
            }
        } else {
            checkpoint.add(path)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let part = if is_torch(path)? {
            Part::Torch(TorchCheckpoint::open(path)?)
        } else {
            Part::Safetensors(Safetensors::open_files(&[path])?)
        };
        let names: Vec<String> = match &part {
            Part::Safetensors(file) => file.names().map(str::to_owned).collect(),
            Part::Torch(file) => file.names().map(str::to_owned).collect(),
        };
        for name in names {
            if self.places.contains_key(&name) {
                return Err(refuse(path, format!("the tensor `{name}` is also in another shard")));
            }
            self.places.insert(name, self.parts.len());
        }
        self.parts.push(part);
        Ok(())
    }

    /// The file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> BTreeSet<&str> {
        self.places.keys().map(String::as_str).collect()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// A tensor's shape, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        match self.part(name)? {
            Part::Safetensors(file) => file.shape(name).ok(),
            Part::Torch(file) => file.shape(name).ok(),
        }
    }

    /// How a tensor's elements are stored.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::File`] when it holds numbers of a kind that is not read here.
    pub fn encoding(&self, name: &str) -> Result<Encoding> {
        match self.part(name) {
            Some(Part::Safetensors(file)) => Ok(file.tensor(name)?.encoding()),
            Some(Part::Torch(file)) => file.encoding(name),
            None => Err(Error::MissingTensor { name: name.into() }),
        }
    }

    /// A tensor as it is stored.
    ///
    /// # Errors
    /// As [`encoding`](Self::encoding).
    pub fn stored(&self, name: &str) -> Result<StoredTensor<'_>> {
        match self.part(name) {
            Some(Part::Safetensors(file)) => {
                let rows = file.tensor(name)?;
                let (shape, encoding) = (rows.shape().to_vec(), rows.encoding());
                Ok(StoredTensor { shape, encoding, bytes: rows.bytes().into() })
            }
            Some(Part::Torch(file)) => file.stored(name),
            None => Err(Error::MissingTensor { name: name.into() }),
        }
    }

    /// Lets go of the memory behind a tensor, which comes back from the file when it is read again: a checkpoint larger than
    /// memory can be carried over tensor by tensor.
    pub fn release(&self, name: &str) {
        match self.part(name) {
            Some(Part::Safetensors(file)) => drop(file.tensor(name).map(|rows| rows.release())),
            Some(Part::Torch(file)) => file.release(name),
            None => {}
        }
    }

    fn part(&self, name: &str) -> Option<&Part> {
        self.places.get(name).map(|&part| &self.parts[part])
    }
}

/// Whether a file is a zip archive or a pickle, which is what PyTorch writes.
fn is_torch(path: &Path) -> Result<bool> {
    let io_error = |source| Error::Io { path: path.into(), source };
    let mut start = Vec::new();
    std::fs::File::open(path).map_err(io_error)?.take(16).read_to_end(&mut start).map_err(io_error)?;
    // A safetensors header of 128 bytes and so on begins alike: its ninth byte is `{`.
    Ok((start.starts_with(b"PK\x03\x04") || start.starts_with(b"\x80")) && start.get(8) != Some(&b'{'))
}

#[cfg(test)]
mod tests {
    use super::super::safetensors::{NamedTensor, write_safetensors};
    use super::*;

    fn write(path: &Path, name: &str, values: &[f32]) {
        let tensor = NamedTensor::f32(name, [values.len()], values);
        write_safetensors(path, &[tensor], &BTreeMap::new()).unwrap();
    }

    #[test]
    fn folders_and_shards_are_one_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            Checkpoint::open(folder.path()).unwrap_err().to_string().contains("pytorch_model.bin.index.json")
        );
        // The kind is in the bytes: shards of a PyTorch index may be either.
        for (file, value) in [("one.bin", 1.0), ("two.bin", 2.0)] {
            write(&folder.path().join(file), file.split('.').next().unwrap(), &[value]);
        }
        let index = folder.path().join("pytorch_model.bin.index.json");
        std::fs::write(&index, r#"{"weight_map": {"one": "one.bin", "two": "two.bin"}}"#).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.names().into_iter().collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(checkpoint.stored("two").unwrap().bytes, 2f32.to_le_bytes().as_slice());
        assert_eq!(checkpoint.shape("one"), Some(&[1][..]));
        assert!(matches!(checkpoint.stored("three"), Err(Error::MissingTensor { .. })));
        write(&folder.path().join("two.bin"), "one", &[2.0]);
        assert!(Checkpoint::open(folder.path()).unwrap_err().to_string().contains("another shard"));
        std::fs::remove_file(folder.path().join("two.bin")).unwrap();
        assert!(Checkpoint::open(folder.path()).unwrap_err().to_string().contains("two.bin"));
    }

    #[test]
    fn a_safetensors_header_is_no_pickle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        // The header's length begins with the byte 0x80, as a pickle does.
        let metadata = |n: usize| BTreeMap::from([("pad".to_owned(), "x".repeat(n))]);
        let found = (0..400).any(|n| {
            let tensor = NamedTensor::f32("a", [1], &[1.0]);
            write_safetensors(&path, &[tensor], &metadata(n)).unwrap();
            std::fs::read(&path).unwrap()[0] == 0x80
        });
        assert!(found);
        assert!(Checkpoint::open(&path).unwrap().contains("a"));
    }
}
