//! The two files of a feature cache: fixed slots and their checksummed records.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use blip2::weights::{MappedFile, hex};
use half::f16;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::Augment;
use crate::{Error, Result};

/// Names a view of a picture: SHA-256 of the picture's bytes, the view's number and what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key([u8; 32]);

impl Key {
    pub(super) fn new(content_hash: &[u8; 32], view: u32, augment: &Augment) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(content_hash);
        hasher.update(view.to_le_bytes());
        if view > 0 {
            // The plain picture is the same whatever the other views do.
            let Augment { scale, ratio, flip, brightness } = augment;
            for number in scale.iter().chain(ratio).chain([flip, brightness]) {
                hasher.update(number.to_le_bytes());
            }
        }
        Self(hasher.finalize().into())
    }

    /// What the view draws its values from: the same picture and view always give the same numbers.
    pub(super) fn seed(&self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().expect("eight bytes"))
    }
}

/// Key, CRC-32 of the slot, CRC-32 of these 36 bytes.
const RECORD_BYTES: usize = 40;

/// Bumped when the files' layout changes; part of the folder's name, so old caches are left alone.
const LAYOUT: u32 = 1;

#[derive(Debug)]
pub(super) struct Store {
    data_path: PathBuf,
    index_path: PathBuf,
    data: File,
    /// Locked for as long as this process may write.
    index: File,
    /// Numbers a slot.
    slot_len: usize,
    /// Slots that have a record, valid or not: the next one is written behind them.
    n_slots: u32,
    slots: HashMap<Key, (u32, u32)>,
    map: Option<MappedFile>,
}

impl Store {
    /// Opens or creates the files for one encoder below `dir` and waits for any other process that writes them.
    pub(super) fn open(dir: &Path, encoder_key: &str, slot_len: usize) -> Result<Self> {
        if slot_len == 0 {
            return Err(Error::Training("the image encoder gives no features".to_owned()));
        }
        let description = format!("layout {LAYOUT}\n{slot_len} f16 a slot\n{encoder_key}\n");
        let folder = dir.join(hex(&Sha256::digest(&description)[..8]));
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let (data_path, index_path) = (folder.join("features.bin"), folder.join("index.bin"));
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(path).map_err(Error::io(path))
        };
        let (data, mut index) = (open(&data_path)?, open(&index_path)?);
        index.lock().map_err(Error::io(&index_path))?;
        // For people who wonder what the folder is; nothing reads it.
        let about = folder.join("about.txt");
        std::fs::write(&about, description).map_err(Error::io(&about))?;

        let mut records = Vec::new();
        index.read_to_end(&mut records).map_err(Error::io(&index_path))?;
        let n_whole_slots = data.metadata().map_err(Error::io(&data_path))?.len() / (2 * slot_len as u64);
        let mut slots = HashMap::new();
        let (whole, torn) = records.as_chunks::<RECORD_BYTES>();
        for (slot, record) in (0u32..).zip(whole) {
            let (body, check) = record.split_at(RECORD_BYTES - 4);
            if u64::from(slot) < n_whole_slots && crc32fast::hash(body).to_le_bytes() == *check {
                let (key, checksum) = body.split_at(32);
                let key = Key(key.try_into().expect("32 bytes"));
                slots.insert(key, (slot, u32::from_le_bytes(checksum.try_into().expect("four bytes"))));
            }
        }
        if !torn.is_empty() {
            index.set_len((records.len() - torn.len()) as u64).map_err(Error::io(&index_path))?;
        }
        let n_slots = u32::try_from(whole.len()).map_err(|_| {
            Error::file(&index_path, "has too many records: delete the folder, it is rebuilt")
        })?;
        let mut store = Self { data_path, index_path, data, index, slot_len, n_slots, slots, map: None };
        store.remap()?;
        Ok(store)
    }

    pub(super) fn slot(&self, key: &Key) -> Option<u32> {
        self.slots.get(key).map(|&(slot, _)| slot)
    }

    /// Checks the slots of `keys` against their checksums, forgets the damaged ones and says how many they were.
    pub(super) fn drop_damaged(&mut self, keys: &[Key]) -> Result<usize> {
        let mut known: Vec<(u32, u32, Key)> = keys
            .iter()
            .filter_map(|key| self.slots.get(key).map(|&(slot, checksum)| (slot, checksum, *key)))
            .collect();
        known.sort_unstable_by_key(|&(slot, ..)| slot);
        known.dedup_by_key(|&mut (slot, ..)| slot);
        let damaged: Vec<Key> = known
            .par_iter()
            .filter(|&&(slot, checksum, _)| {
                crc32fast::hash(bytemuck::cast_slice(self.read(slot))) != checksum
            })
            .map(|&(.., key)| key)
            .collect();
        for key in &damaged {
            self.slots.remove(key);
        }
        Ok(damaged.len())
    }

    /// Writes slots, then their records.
    pub(super) fn append(&mut self, keys: &[Key], features: &[f16]) -> Result<()> {
        assert_eq!(keys.len() * self.slot_len, features.len(), "one slot a key");
        let offset = u64::from(self.n_slots) * 2 * self.slot_len as u64;
        let bytes: &[u8] = bytemuck::cast_slice(features);
        self.data.seek(SeekFrom::Start(offset)).map_err(Error::io(&self.data_path))?;
        self.data.write_all(bytes).map_err(Error::io(&self.data_path))?;
        let mut records = Vec::with_capacity(keys.len() * RECORD_BYTES);
        for (key, slot_bytes) in keys.iter().zip(bytes.chunks_exact(2 * self.slot_len)) {
            let checksum = crc32fast::hash(slot_bytes);
            let begin = records.len();
            records.extend(key.0);
            records.extend(checksum.to_le_bytes());
            records.extend(crc32fast::hash(&records[begin..]).to_le_bytes());
            self.slots.insert(*key, (self.n_slots, checksum));
            self.n_slots = self
                .n_slots
                .checked_add(1)
                .ok_or_else(|| Error::file(&self.index_path, "is full: use another cache folder"))?;
        }
        self.index.seek(SeekFrom::End(0)).map_err(Error::io(&self.index_path))?;
        self.index.write_all(&records).map_err(Error::io(&self.index_path))
    }

    /// Brings everything to the disk, maps it and lets other processes write.
    pub(super) fn finish(mut self) -> Result<Self> {
        self.data.sync_data().map_err(Error::io(&self.data_path))?;
        self.index.sync_data().map_err(Error::io(&self.index_path))?;
        self.remap()?;
        self.index.unlock().map_err(Error::io(&self.index_path))?;
        Ok(self)
    }

    /// The numbers of a slot that has a record.
    pub(super) fn read(&self, slot: u32) -> &[f16] {
        let bytes = self.map.as_ref().expect("a store with slots is mapped").bytes();
        let n_bytes = 2 * self.slot_len;
        let begin = slot as usize * n_bytes;
        // Slots begin at even offsets of a page-aligned map: the cast cannot fail.
        bytemuck::cast_slice(&bytes[begin..begin + n_bytes])
    }

    /// Maps what is in the file by now. The file only grows, behind every slot that has a record, so a map stays good
    /// while this or another process appends.
    fn remap(&mut self) -> Result<()> {
        if self.data.metadata().map_err(Error::io(&self.data_path))?.len() > 0 {
            self.map = Some(MappedFile::open(&self.data_path)?);
        }
        Ok(())
    }
}
