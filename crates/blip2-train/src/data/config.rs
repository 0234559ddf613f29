//! The `[[data]]` entries of a training configuration.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{folder, webdataset};
use crate::features::Augment;
use crate::{Error, Result};

/// One `[[data]]` entry of a training configuration.
///
/// ```toml
/// [[data]]
/// path = "train.jsonl"     # relative to the configuration file
/// max_per_epoch = 8000     # every epoch deals the next 8,000 rows of a shuffled round
/// views = 4                # augmented views of each picture beside the plain one
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The manifest, folder, tar shard, folder of tar shards, or COCO caption file.
    pub path: PathBuf,
    /// How to read `path`; without it the name decides (`.jsonl`, `.tar`, `.json`, a folder with or without tar files).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// COCO only: the folder of the pictures; without it the folder of the caption file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// How many times an epoch deals each sample; fractions deal that part of the samples.
    #[serde(default = "once")]
    pub repeat: f64,
    /// The most samples of this entry in one epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_epoch: Option<usize>,
    /// Stage 2: how much a token of this entry's answers counts beside those of others. Answers of one word have few
    /// tokens among captions of a dozen, and hardly move a mean over all of them.
    #[serde(default = "once")]
    pub weight: f64,
    /// Augmented views of each picture beside the plain one.
    #[serde(default)]
    pub views: u32,
    /// What an augmented view does to a picture.
    #[serde(default)]
    pub augment: Augment,
}

fn once() -> f64 {
    1.0
}

impl DataConfig {
    /// An entry with everything but the path at its default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: None,
            images: None,
            repeat: once(),
            max_per_epoch: None,
            weight: once(),
            views: 0,
            augment: Augment::default(),
        }
    }

    /// Checks the values; `field` is the entry's name in messages.
    pub(super) fn validate(&self, field: &str) -> Result<()> {
        for (name, value) in [("repeat", self.repeat), ("weight", self.weight)] {
            if !(value.is_finite() && value > 0.0 && value <= 1e6) {
                let reason = "must be a positive number, at most a million";
                return Err(Error::config(format!("{field}.{name}"), reason));
            }
        }
        if self.max_per_epoch == Some(0) {
            return Err(Error::config(format!("{field}.max_per_epoch"), "must be at least 1"));
        }
        if self.images.is_some() && !matches!(self.format, None | Some(Format::Coco)) {
            return Err(Error::config(format!("{field}.images"), "is only for format = \"coco\""));
        }
        self.augment.validate(&format!("{field}.augment"))
    }

    /// How to read the entry, which is at `path`.
    pub(super) fn format_of(&self, path: &Path) -> Result<Format> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        if metadata.is_dir() {
            return Ok(if webdataset::shards(path)?.is_empty() {
                Format::Folder
            } else {
                Format::Webdataset
            });
        }
        match folder::extension(path).as_str() {
            "jsonl" | "ndjson" => Ok(Format::Jsonl),
            "tar" => Ok(Format::Webdataset),
            "json" => Ok(Format::Coco),
            _ => Err(Error::file(
                path,
                "cannot tell the format from the name: set `format` to jsonl, folder, webdataset or coco",
            )),
        }
    }
}

/// The layouts of training data that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object a line, see [`Row`](super::Row).
    Jsonl,
    /// Pictures with a `.txt` of the same name beside each, one caption a line.
    Folder,
    /// WebDataset tar shards, those of img2dataset too: members that share a name up to the first dot belong together, a picture
    /// with a `.json` that is a [`Row`](super::Row) or a `.txt`, one caption a line.
    Webdataset,
    /// COCO caption annotations (`images` and `annotations`).
    Coco,
}
