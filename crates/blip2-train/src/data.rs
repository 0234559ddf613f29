//! What a model is trained on: pictures with captions, questions or dialogues.
//!
//! A [`Dataset`] is read once from the `[[data]]` entries of a training configuration ([`DataConfig`]); pictures stay
//! where they are (a file, a member of a tar shard) and only their texts are held. A [`Loader`] then deals batches of
//! sample numbers in an order that is a function of seed and epoch, so that a run resumes from two integers.
//! Pictures are decoded in [`crate::features`], not here.

mod builder;
mod coco;
mod config;
mod folder;
mod loader;
mod manifest;
mod webdataset;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blip2::weights::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::features::Augment;
use crate::{Error, Result, one_line};
use builder::Builder;

pub use config::{DataConfig, Format};
pub use folder::pictures;
pub use loader::{Batch, Item, Loader, LoaderConfig, LoaderState};
pub use manifest::{Row, read_rows};

/// Where the bytes of a picture are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageSource {
    /// A file.
    File(PathBuf),
    /// A member of a tar archive, read in place.
    TarMember {
        /// The archive.
        archive: Arc<Path>,
        /// Where the member's bytes begin.
        offset: u64,
        /// How many there are.
        len: u64,
        /// The member's name, control characters escaped: for messages only, never used as a path.
        name: String,
    },
}

impl ImageSource {
    /// Reads the whole encoded picture.
    ///
    /// # Errors
    /// The operating system's, when the file is missing, unreadable, or shorter than when its archive was indexed.
    pub fn read(&self) -> std::io::Result<Vec<u8>> {
        match self {
            Self::File(path) => std::fs::read(path),
            Self::TarMember { archive, offset, len, .. } => {
                let mut file = File::open(archive)?;
                file.seek(SeekFrom::Start(*offset))?;
                let mut bytes = Vec::new();
                file.take(*len).read_to_end(&mut bytes)?;
                if bytes.len() as u64 != *len {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                Ok(bytes)
            }
        }
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::TarMember { archive, name, .. } => write!(f, "{}:{name}", archive.display()),
        }
    }
}

/// A picture of the dataset.
#[derive(Debug, Clone)]
pub struct Image {
    /// Where its bytes are.
    pub source: ImageSource,
    /// Pictures of one group show the same thing (by default each picture is its own group): the texts of one are not
    /// negatives of another.
    pub group: u32,
    /// How many augmented views it has beside the plain one.
    pub views: u32,
    /// What an augmented view does.
    pub augment: Augment,
}

/// One question and its answer in a dialogue about a picture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turn {
    /// What the user says.
    pub question: String,
    /// What the model should say.
    pub answer: String,
}

/// What is said about a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// Captions, each of which describes the picture; never empty.
    Captions(Vec<String>),
    /// A question with its acceptable answers; never empty.
    QuestionAnswer {
        /// The question.
        question: String,
        /// The answers people gave.
        answers: Vec<String>,
    },
    /// A dialogue; never empty.
    Turns(Vec<Turn>),
}

impl Text {
    /// How many alternatives [`Item::choice`] picks from: captions or answers; a dialogue is one.
    pub fn n_choices(&self) -> usize {
        match self {
            Self::Captions(captions) => captions.len(),
            Self::QuestionAnswer { answers, .. } => answers.len(),
            Self::Turns(_) => 1,
        }
    }
}

/// A text about a picture: what the loader deals.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Index into [`Dataset::images`].
    pub image: usize,
    /// What is said.
    pub text: Text,
    /// Names that count as a recognition when an answer contains one (evaluation manifests).
    pub names: Vec<String>,
    /// Index of the `[[data]]` entry it comes from.
    pub entry: usize,
}

/// Something that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The picture (or tar member).
    pub name: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A list has a line for each.
        f.write_str(&one_line(&format!("{}: {}", self.name, self.reason)))
    }
}

/// Pictures and what is said about them.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    images: Vec<Image>,
    samples: Vec<Sample>,
    entries: Vec<DataConfig>,
    skipped: Vec<Skipped>,
}

impl Dataset {
    /// Reads all entries; relative paths are relative to `base` (the folder of the configuration file).
    ///
    /// A picture that several rows or entries name is held once; it takes the augmentation of the first entry that
    /// names it and the most views any entry asks for. Missing pictures are skipped and listed in [`Self::skipped`].
    ///
    /// # Errors
    /// [`Error::Manifest`] with file and line for a row that cannot be understood, [`Error::Config`] for a wrong
    /// entry, [`Error::File`] for an archive or annotation file that is damaged or an entry that yields no sample.
    pub fn load(entries: &[DataConfig], base: &Path) -> Result<Self> {
        let mut builder = Builder::default();
        for (number, entry) in entries.iter().enumerate() {
            entry.validate(&format!("data[{number}]"))?;
            let path = base.join(&entry.path);
            builder.begin(entry);
            let n_before = builder.dataset.samples.len();
            match entry.format_of(&path)? {
                Format::Jsonl => manifest::read(&path, &mut builder)?,
                Format::Folder => folder::read(&path, &mut builder)?,
                Format::Webdataset => webdataset::read(&path, &mut builder)?,
                Format::Coco => {
                    let parent = path.parent().unwrap_or(Path::new("")).to_path_buf();
                    let images = entry.images.as_ref().map_or(parent, |images| base.join(images));
                    coco::read(&path, &images, &mut builder)?;
                }
            }
            if builder.dataset.samples.len() == n_before {
                let reason = match builder.dataset.skipped.last() {
                    Some(skipped) => {
                        format!("no usable picture with text in it; the last one skipped was {skipped}")
                    }
                    None => "no picture with text in it".to_owned(),
                };
                return Err(Error::file(&path, reason));
            }
        }
        Ok(builder.dataset)
    }

    /// The pictures; an index into this list is a picture's number everywhere.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The samples; an index into this list is what the loader deals.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The entries the samples come from.
    pub fn entries(&self) -> &[DataConfig] {
        &self.entries
    }

    /// Everything that was left out so far, with reasons.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Leaves out pictures that turned out to be unusable (they do not decode), and their samples.
    ///
    /// Pictures keep their numbers; samples are renumbered, so call it before a [`Loader`] is made.
    pub fn skip_images(&mut self, unusable: &[(usize, String)]) {
        let reasons: HashMap<usize, &str> =
            unusable.iter().map(|(i, reason)| (*i, reason.as_str())).collect();
        self.samples.retain(|sample| !reasons.contains_key(&sample.image));
        for (image, reason) in unusable {
            let name = self.images[*image].source.to_string();
            self.skipped.push(Skipped { name, reason: reason.clone() });
        }
    }

    /// Makes one group of the groups of each of these pairs of pictures: copies under two names show the same thing.
    pub fn join_groups(&mut self, pairs: &[(usize, usize)]) {
        fn root(joined_to: &[u32], mut group: u32) -> u32 {
            while joined_to[group as usize] != group {
                group = joined_to[group as usize];
            }
            group
        }
        let n_groups = self.images.iter().map(|image| image.group + 1).max().unwrap_or(0);
        let mut joined_to: Vec<u32> = (0..n_groups).collect();
        for (one, other) in pairs {
            let [one, other] = [one, other].map(|index| root(&joined_to, self.images[*index].group));
            joined_to[one.max(other) as usize] = one.min(other);
        }
        // A group is joined to a smaller one only, whose root is known by then.
        for group in 0..joined_to.len() {
            joined_to[group] = joined_to[joined_to[group] as usize];
        }
        for image in &mut self.images {
            image.group = joined_to[image.group as usize];
        }
    }

    /// SHA-256 (hex) over the samples' texts, pictures' names and entries' dealing rules: two datasets with the same
    /// fingerprint are dealt in the same order.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        let mut put = |text: &str| {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        for entry in &self.entries {
            put(&format!("{} {:?} {}", entry.repeat, entry.max_per_epoch, entry.views));
        }
        for sample in &self.samples {
            // The picture's own name: a dataset that moved to another folder is still the same.
            match &self.images[sample.image].source {
                ImageSource::File(path) => put(&path.file_name().unwrap_or_default().to_string_lossy()),
                ImageSource::TarMember { name, .. } => put(name),
            }
            put(&format!("{} {:?}", sample.entry, sample.text));
        }
        hex(&hasher.finalize())
    }
}

/// What a model is measured on: the rows of a manifest, or of a COCO caption file, which ends in `.json` as in training; and what
/// was left out of them. Rows name their pictures relative to the folder that holds these.
///
/// # Errors
/// [`Error::Manifest`] with file and line for a row that cannot be understood, [`Error::File`] for a damaged annotation file,
/// [`Error::Io`] for a file that cannot be read.
pub fn read_test_set(path: &Path) -> Result<(Vec<Row>, Vec<Skipped>)> {
    if folder::extension(path) == "json" {
        return coco::rows(path);
    }
    Ok((read_rows(path)?, Vec::new()))
}

#[cfg(test)]
mod tests;
