//! The frozen encoder's output, computed once and kept on disk.
//!
//! The image encoder does not change in training, so its features are computed for every picture (and for a fixed
//! number of augmented views of it) before the first step; training then reads them through a memory map and never
//! runs the encoder. A cache folder holds one folder for each encoder (weights and preprocessing), in which two files
//! grow: `features.bin`, slots of `[P, D]` half-precision numbers, and `index.bin`, one checksummed record a slot. A slot
//! is written before its record, so a process that is killed leaves at most a slot that nothing refers to; a slot is
//! checked against its record's checksum before it is first used, and computed again when it does not match.

mod augment;
mod store;

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use image::RgbImage;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::data::{Dataset, Image, ImageSource};
use crate::random::Random;
use crate::{Error, Result};
use store::{Key, Store};

pub use augment::Augment;

/// Turns pictures into features; what a [`FeatureCache`] asks of the frozen encoder.
pub trait FeatureEncoder: Sync {
    /// Names everything that the numbers depend on: the weights' fingerprint and the preprocessing settings.
    fn key(&self) -> String;

    /// Image tokens of a picture (P).
    fn n_tokens(&self) -> usize;

    /// Width of a token (D).
    fn width(&self) -> usize;

    /// Decodes an encoded picture.
    ///
    /// # Errors
    /// Why the bytes are not a usable picture, in a few words.
    fn decode(&self, bytes: &[u8]) -> std::result::Result<RgbImage, String>;

    /// Preprocesses and encodes a batch: `[B, P, D]` in order.
    ///
    /// # Errors
    /// Whatever the encoder reports; it ends the computation.
    fn encode(&self, pictures: &[RgbImage]) -> Result<Vec<f32>>;
}

/// How far the computation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Views that were computed.
    pub done: usize,
    /// Views that have to be computed.
    pub total: usize,
}

/// Pictures encoded at once: enough to keep all cores busy, few enough for a small memory.
const ENCODE_BATCH: usize = 16;

/// The features of a dataset's pictures, memory-mapped.
#[derive(Debug)]
pub struct FeatureCache {
    store: Store,
    n_tokens: usize,
    width: usize,
    /// For each picture the slot of each view; empty for pictures that could not be used.
    slots: Vec<Vec<u32>>,
}

/// What [`FeatureCache::compute`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Computed {
    /// Views that were on disk already.
    pub n_reused: usize,
    /// Views that were computed now.
    pub n_computed: usize,
    /// Views whose bytes on disk were damaged; they were computed again.
    pub n_damaged: usize,
    /// Pictures that cannot be used, with reasons, for [`Dataset::skip_images`].
    pub unusable: Vec<(usize, String)>,
    /// Pictures whose files have the bytes of an earlier one, each with that one, for [`Dataset::join_groups`].
    pub copies: Vec<(usize, usize)>,
}

impl FeatureCache {
    /// Makes sure that the features of every picture and view of `dataset` are in the cache folder `dir`, and opens them.
    ///
    /// `progress` is called after every batch; when it says [`ControlFlow::Break`] the computation stops and what was
    /// done stays on disk. Several processes may use one folder; they compute one after the other.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder that cannot be written, [`Error::Stopped`] when `progress` says so, [`Error::Training`] when the encoder
    /// gives numbers that half precision cannot hold, and the encoder's own.
    pub fn compute(
        dir: &Path,
        dataset: &Dataset,
        encoder: &dyn FeatureEncoder,
        mut progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(Self, Computed)> {
        let (n_tokens, width) = (encoder.n_tokens(), encoder.width());
        let mut store = Store::open(dir, &encoder.key(), n_tokens * width)?;
        let mut report = Computed::default();
        let views = Views::of(dataset.images(), &mut report);
        report.copies = views.copies();
        let needed: Vec<Key> = views.keys.iter().flatten().copied().collect();
        report.n_damaged = store.drop_damaged(&needed)?;
        let work = views.missing_in(&store);
        let mut state = Progress { done: 0, total: work.iter().map(|(_, views)| views.len()).sum() };
        report.n_reused = needed.len() - state.total;
        if state.total > 0 && progress(state).is_break() {
            return Err(stopped(state));
        }
        for pictures in batches(work) {
            let (mut batch_keys, mut batch) = (Vec::new(), Vec::new());
            for ((index, missing), result) in pictures.iter().zip(views.decode(&pictures, encoder)) {
                state.done += missing.len();
                match result {
                    Ok(of_picture) => {
                        batch_keys.extend(missing.iter().map(|&view| views.keys[*index][view as usize]));
                        batch.extend(of_picture);
                    }
                    Err(reason) => report.unusable.push((*index, reason)),
                }
            }
            if !batch.is_empty() {
                let features = to_half(&encoder.encode(&batch)?, batch.len() * n_tokens * width)?;
                report.n_computed += batch.len();
                store.append(&batch_keys, &features)?;
            }
            if progress(state).is_break() {
                return Err(stopped(state));
            }
        }
        let store = store.finish()?;
        let slots = views.slots_in(&store, &mut report);
        report.unusable.sort();
        Ok((Self { store, n_tokens, width, slots }, report))
    }

    /// Image tokens of a picture (P).
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Width of a token (D).
    pub fn width(&self) -> usize {
        self.width
    }

    /// The features of some (picture, view) pairs.
    ///
    /// # Shapes
    /// Returns `[B, P, D]`, in order. A view that a picture does not have is taken modulo the views it has.
    ///
    /// # Errors
    /// [`Error::Training`] for a picture that is not in the cache (it could not be used, see [`Computed::unusable`]).
    pub fn gather(&self, views: &[(usize, u32)]) -> Result<Vec<f32>> {
        self.gather_tokens(views, self.n_tokens, |_| (0..self.n_tokens).collect())
    }

    /// The features of some (picture, view) pairs, of each the share `kept` of its tokens, drawn for each pair by `seed`: the
    /// others are as if the encoder had not seen that part of the picture. At least one token is kept, and all for 1.
    ///
    /// # Shapes
    /// Returns `[B, round(kept * P), D]`; the tokens of a picture keep their order.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    pub fn gather_some(&self, views: &[(usize, u32)], kept: f64, seed: &[u64]) -> Result<Vec<f32>> {
        let n_kept = ((kept * self.n_tokens as f64).round() as usize).clamp(1, self.n_tokens);
        if n_kept == self.n_tokens {
            return self.gather(views);
        }
        self.gather_tokens(views, n_kept, |number| {
            let mut tokens: Vec<usize> = (0..self.n_tokens).collect();
            Random::new(&[seed, &[number as u64]].concat()).shuffle(&mut tokens);
            tokens.truncate(n_kept);
            tokens.sort_unstable();
            tokens
        })
    }

    /// `tokens_of` says which `n` tokens of a pair are taken.
    fn gather_tokens(
        &self,
        views: &[(usize, u32)],
        n: usize,
        tokens_of: impl Fn(usize) -> Vec<usize> + Sync,
    ) -> Result<Vec<f32>> {
        let slots: Vec<u32> =
            views.iter().map(|&(image, view)| self.slot(image, view)).collect::<Result<_>>()?;
        let mut features = vec![0.0; slots.len() * n * self.width];
        features.par_chunks_mut(n * self.width).zip(slots).enumerate().for_each(|(number, (out, slot))| {
            let picture = self.store.read(slot);
            for (out, token) in out.chunks_exact_mut(self.width).zip(tokens_of(number)) {
                picture[token * self.width..][..self.width].convert_to_f32_slice(out);
            }
        });
        Ok(features)
    }

    fn slot(&self, image: usize, view: u32) -> Result<u32> {
        let of_image = self.slots.get(image).map_or(&[][..], Vec::as_slice);
        if of_image.is_empty() {
            return Err(Error::Training(format!(
                "picture {image} has no features: it was skipped as unusable"
            )));
        }
        Ok(of_image[view as usize % of_image.len()])
    }
}

/// A picture and some of its views.
type SomeViews = (usize, Vec<u32>);

/// The views of a data set's pictures, by their keys.
struct Views<'a> {
    images: &'a [Image],
    /// For each picture the key of each view; empty for pictures whose bytes cannot be read.
    keys: Vec<Vec<Key>>,
}

impl<'a> Views<'a> {
    /// Reads all pictures' bytes; those that cannot be read are noted in `report`.
    fn of(images: &'a [Image], report: &mut Computed) -> Self {
        let hashes: Vec<std::result::Result<[u8; 32], String>> =
            images.par_iter().map(|image| content_hash(&image.source)).collect();
        let keys = images.iter().zip(hashes).enumerate().map(|(index, (image, hash))| match hash {
            Ok(hash) => (0..=image.views).map(|view| Key::new(&hash, view, &image.augment)).collect(),
            Err(reason) => {
                report.unusable.push((index, reason));
                Vec::new()
            }
        });
        Self { images, keys: keys.collect() }
    }

    /// Pictures that are in the data under another name already: the key of the plain view is that of the bytes.
    fn copies(&self) -> Vec<(usize, usize)> {
        let mut first = HashMap::new();
        let plain = self.keys.iter().enumerate().filter_map(|(index, keys)| Some((index, keys.first()?)));
        plain
            .filter_map(|(index, key)| {
                let original = *first.entry(key).or_insert(index);
                (original != index).then_some((index, original))
            })
            .collect()
    }

    /// What has to be computed. A picture may be in the data under two names: its features are computed once.
    fn missing_in(&self, store: &Store) -> Vec<SomeViews> {
        let mut planned = HashSet::new();
        let mut work = Vec::new();
        for (index, keys) in self.keys.iter().enumerate() {
            let missing: Vec<u32> = (0u32..)
                .zip(keys)
                .filter(|(_, key)| store.slot(key).is_none() && planned.insert(**key))
                .map(|(view, _)| view)
                .collect();
            if !missing.is_empty() {
                work.push((index, missing));
            }
        }
        work
    }

    /// Decodes pictures, each once for all of its views, or says why one cannot be used.
    fn decode(
        &self,
        pictures: &[SomeViews],
        encoder: &dyn FeatureEncoder,
    ) -> Vec<std::result::Result<Vec<RgbImage>, String>> {
        let decode_one = |(index, missing): &SomeViews| -> std::result::Result<Vec<RgbImage>, String> {
            let Image { source, augment, .. } = &self.images[*index];
            let picture = encoder.decode(&source.read().map_err(|error| error.to_string())?)?;
            let seen = |&view: &u32| match view {
                0 => picture.clone(),
                _ => augment.apply(&picture, self.keys[*index][view as usize].seed()),
            };
            Ok(missing.iter().map(seen).collect())
        };
        pictures.par_iter().map(decode_one).collect()
    }

    /// The slots of each picture's views; none for a picture that cannot be used.
    fn slots_in(&self, store: &Store, report: &mut Computed) -> Vec<Vec<u32>> {
        let mut slots = Vec::with_capacity(self.keys.len());
        for (index, keys) in self.keys.iter().enumerate() {
            let found: Option<Vec<u32>> = keys.iter().map(|key| store.slot(key)).collect();
            if found.is_none() && !report.unusable.iter().any(|(unusable, _)| *unusable == index) {
                // A copy of a picture that does not decode.
                report
                    .unusable
                    .push((index, "has the same bytes as another picture that cannot be used".to_owned()));
            }
            slots.push(found.unwrap_or_default());
        }
        slots
    }
}

/// Groups pictures so that each group has about [`ENCODE_BATCH`] views.
fn batches(work: Vec<SomeViews>) -> Vec<Vec<SomeViews>> {
    let mut batches = Vec::new();
    let mut batch = Vec::new();
    let mut n_views = 0;
    for (index, views) in work {
        // A picture of many views is decoded once for each part.
        for part in views.chunks(ENCODE_BATCH) {
            if n_views + part.len() > ENCODE_BATCH {
                batches.push(std::mem::take(&mut batch));
                n_views = 0;
            }
            n_views += part.len();
            batch.push((index, part.to_vec()));
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

fn content_hash(source: &ImageSource) -> std::result::Result<[u8; 32], String> {
    let bytes = source.read().map_err(|error| error.to_string())?;
    Ok(Sha256::digest(&bytes).into())
}

fn to_half(features: &[f32], expected: usize) -> Result<Vec<f16>> {
    if features.len() != expected {
        let n = features.len();
        return Err(Error::Training(format!(
            "the image encoder gave {n} numbers where {expected} were expected"
        )));
    }
    let half: Vec<f16> = features.iter().map(|&x| f16::from_f32(x)).collect();
    if half.iter().all(|x| x.is_finite()) {
        return Ok(half);
    }
    Err(Error::Training("the image encoder gave numbers that are not finite in half precision".to_owned()))
}

fn stopped(at: Progress) -> Error {
    Error::Stopped { done: at.done, total: at.total }
}

#[cfg(test)]
mod tests;
