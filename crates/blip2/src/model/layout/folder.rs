//! A folder that is whole or absent.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::output::{Output, write_safetensors};
use super::state::State;
use crate::weights::write_atomically;
use crate::{Error, Result};

/// A new folder that appears under its name only when all of it is written.
#[derive(Debug)]
pub(super) struct NewFolder {
    path: PathBuf,
    temporary: tempdir::Temporary,
}

impl NewFolder {
    /// # Errors
    /// [`Error::File`] when something is there already; [`Error::Io`].
    pub(super) fn create(path: &Path) -> Result<Self> {
        if fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Error::File {
                path: path.into(),
                reason: "this folder is not empty: choose another".into(),
            });
        }
        if path.is_file() {
            return Err(Error::File { path: path.into(), reason: "this is a file: choose a folder".into() });
        }
        let temporary =
            tempdir::Temporary::beside(path).map_err(|source| Error::Io { path: path.into(), source })?;
        Ok(Self { path: path.into(), temporary })
    }

    /// Where the files are written meanwhile.
    pub(super) fn inside(&self, name: &str) -> PathBuf {
        self.temporary.path().join(name)
    }

    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write_json(&self, name: &str, json: &Json) -> Result<()> {
        let text = serde_json::to_string_pretty(json).unwrap_or_default() + "\n";
        write_atomically(self.inside(name), |file| file.write_all(text.as_bytes()))
    }

    /// Copies a file, under its own name.
    ///
    /// # Errors
    /// [`Error::Io`] that names the file.
    pub(super) fn copy(&self, from: &Path) -> Result<()> {
        let io_error = |source| Error::Io { path: from.into(), source };
        let name = from.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let bytes = crate::small_file::read(from).map_err(io_error)?;
        write_atomically(self.inside(&name), |file| file.write_all(&bytes))
    }

    /// Writes `model.safetensors`, or shards of at most `max_shard_bytes` (more only where one tensor is larger) with the index
    /// that Hugging Face has for them.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`].
    pub(super) fn write_tensors(
        &self,
        outputs: &[Output],
        state: &State<'_>,
        max_shard_bytes: u64,
    ) -> Result<()> {
        let metadata = BTreeMap::from([("format".into(), "pt".into())]);
        let mut shards: Vec<(u64, Vec<&Output>)> = Vec::new();
        for output in outputs {
            let n_bytes = output.about.n_bytes() as u64;
            match shards.last_mut() {
                Some((total, shard)) if *total + n_bytes <= max_shard_bytes => {
                    *total += n_bytes;
                    shard.push(output);
                }
                _ => shards.push((n_bytes, vec![output])),
            }
        }
        if let [(_, all)] = shards.as_slice() {
            return write_safetensors(&self.inside("model.safetensors"), all, state, &metadata);
        }
        let mut weight_map = BTreeMap::new();
        for (i, (_, shard)) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            write_safetensors(&self.inside(&name), shard, state, &metadata)?;
            weight_map.extend(shard.iter().map(|output| (output.about.name.clone(), name.clone())));
        }
        let total_size: u64 = shards.iter().map(|(n_bytes, _)| n_bytes).sum();
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        self.write_json("model.safetensors.index.json", &index)
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn finish(self) -> Result<()> {
        self.temporary.rename_to(&self.path).map_err(|source| Error::Io { path: self.path, source })
    }
}

/// A folder that is removed when it goes out of scope, unless it got its name.
mod tempdir {
    use std::fs;
    use std::io;
    use std::path::{Path, PathBuf};

    #[derive(Debug)]
    pub(super) struct Temporary(PathBuf);

    impl Temporary {
        pub(super) fn beside(path: &Path) -> io::Result<Self> {
            let name = path.file_name().ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "this path does not end in a folder's name")
            })?;
            let mut own_name = std::ffi::OsString::from(".");
            own_name.push(name);
            own_name.push(format!(".{}.tmp", std::process::id()));
            let temporary = path.with_file_name(own_name);
            if let Some(parent) = temporary.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::create_dir(&temporary)?;
            Ok(Self(temporary))
        }

        pub(super) fn path(&self) -> &Path {
            &self.0
        }

        pub(super) fn rename_to(self, path: &Path) -> io::Result<()> {
            if path.is_dir() {
                fs::remove_dir(path)?; // only an empty one goes
            }
            #[cfg(unix)]
            fs::File::open(&self.0)?.sync_all()?;
            fs::rename(&self.0, path)?; // nothing is left under the temporary name for the drop to remove
            #[cfg(unix)]
            match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => fs::File::open(parent)?.sync_all()?,
                _ => fs::File::open(".")?.sync_all()?,
            }
            Ok(())
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0); // nothing more can be done, and the first error is already on its way
        }
    }
}
