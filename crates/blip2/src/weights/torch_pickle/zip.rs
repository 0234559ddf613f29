//! The zip container of `torch.save` since 1.6: `NAME/data.pkl`, the pickle; `NAME/data/KEY`, a storage each;
//! `NAME/byteorder`. Nothing in it is compressed, so every storage is a range of the mapped file.
//!
//! The archive's directory is read by the `zip` crate; entries are used where they lie. Two readers that take different
//! entries of one name could see different weights, so duplicates are refused.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive, result::ZipError};

use super::{MAX_TENSORS, View, machine, named_tensors, storages};

/// Finds the tensors of a checkpoint; the error is the reason alone.
pub(super) fn index(bytes: &[u8]) -> Result<BTreeMap<String, View>, String> {
    let entries = Entries::read(bytes)?;
    let pickle =
        entries.get("data.pkl")?.ok_or("this zip archive is no PyTorch checkpoint: it has no data.pkl")?;
    if let Some(order) = entries.get("byteorder")?
        && bytes[order] != *b"little"
    {
        return Err("it was written on a big-endian machine: save it again on a common one".into());
    }
    let checkpoint = machine::read(&bytes[..pickle.end], pickle.start)?;
    let mut places = HashMap::new();
    for (key, storage) in storages(&checkpoint)? {
        let expected = storage.n_bytes()?;
        let place = entries.get(&format!("data/{key}"))?.ok_or_else(|| {
            format!("it lacks the storage `{}` of a tensor: the file is damaged", machine::printable(key))
        })?;
        if place.len() != expected {
            return Err(format!(
                "the storage `{}` has {} bytes and is described as having {expected}: the file is damaged",
                machine::printable(key),
                place.len()
            ));
        }
        places.insert(key, place);
    }
    named_tensors(&checkpoint, &places)
}

/// Where the entries of an archive lie in it.
struct Entries {
    /// The folder that `torch.save` puts everything in, with its slash.
    folder: String,
    places: HashMap<String, Place>,
}

enum Place {
    Stored(Range<usize>),
    /// Compressed or encrypted: no use to anybody who maps the file.
    Packed,
}

impl Entries {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut archive = ZipArchive::new(io::Cursor::new(bytes)).map_err(|error| explain(&error))?;
        if archive.has_duplicate_names() {
            return Err("this zip archive holds two entries of one name: refused, the file is damaged".into());
        }
        if archive.len() > MAX_TENSORS {
            return Err(format!("this zip archive has {} entries: no checkpoint has so many", archive.len()));
        }
        let mut folders = Vec::new();
        let mut places = HashMap::with_capacity(archive.len());
        for i in 0..archive.len() {
            let entry = archive.by_index_raw(i).map_err(|error| explain(&error))?;
            let name = entry.name().map_err(|error| explain(&error))?.into_owned();
            if let Some(folder) = name.strip_suffix("data.pkl")
                && (folder.is_empty() || folder.ends_with('/'))
            {
                folders.push(folder.to_owned());
            }
            let place = if entry.compression() == CompressionMethod::Stored && !entry.encrypted() {
                let range = entry.data_start().and_then(|start| {
                    let start = usize::try_from(start).ok()?;
                    let end = start.checked_add(usize::try_from(entry.size()).ok()?)?;
                    (end <= bytes.len() && entry.size() == entry.compressed_size()).then_some(start..end)
                });
                Place::Stored(
                    range.ok_or("an entry of this zip archive reaches outside of it: the file is damaged")?,
                )
            } else {
                Place::Packed
            };
            places.insert(name, place);
        }
        match folders.as_slice() {
            [folder] => Ok(Self { folder: folder.clone(), places }),
            [] => Err("this zip archive is no PyTorch checkpoint: it has no data.pkl".into()),
            _ => {
                Err("this zip archive holds more than one data.pkl: refused, no PyTorch checkpoint does"
                    .into())
            }
        }
    }

    fn get(&self, name: &str) -> Result<Option<Range<usize>>, String> {
        match self.places.get(&format!("{}{name}", self.folder)) {
            None => Ok(None),
            Some(Place::Stored(range)) => Ok(Some(range.clone())),
            Some(Place::Packed) => Err(format!(
                "its entry `{}` is compressed or encrypted, which PyTorch never writes: save the checkpoint again with \
                 torch.save",
                machine::printable(name)
            )),
        }
    }
}

fn explain(error: &ZipError) -> String {
    format!("this zip archive cannot be read, it is cut short or damaged ({error}): fetch it again")
}

#[cfg(test)]
mod tests;
