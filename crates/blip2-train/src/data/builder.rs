//! A data set in the making.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::{DataConfig, Dataset, Image, ImageSource, Sample, Skipped, Text};

/// Collects what the readers find.
#[derive(Default)]
pub(super) struct Builder {
    pub(super) dataset: Dataset,
    by_source: HashMap<ImageSource, usize>,
    by_group: HashMap<String, u32>,
    n_groups: u32,
    /// Pictures known to be missing, so that each is listed once.
    missing: HashSet<ImageSource>,
}

impl Builder {
    /// Begins an entry, whose samples come next.
    pub(super) fn begin(&mut self, entry: &DataConfig) {
        self.dataset.entries.push(entry.clone());
    }

    /// Notes what is left out.
    pub(super) fn skip(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.dataset.skipped.push(Skipped { name: name.into(), reason: reason.into() });
    }

    /// Adds a sample unless its picture is missing.
    pub(super) fn add(&mut self, source: ImageSource, group: Option<String>, text: Text, names: Vec<String>) {
        if self.missing.contains(&source) {
            return;
        }
        let entry = self.dataset.entries.len() - 1;
        let (views, augment) = {
            let config = &self.dataset.entries[entry];
            (config.views, config.augment.clone())
        };
        let image = match self.by_source.get(&source) {
            Some(&image) => {
                let known = &mut self.dataset.images[image];
                known.views = known.views.max(views);
                image
            }
            None => {
                if let ImageSource::File(path) = &source
                    && let Err(reason) = readable_file(path)
                {
                    self.skip(path.display().to_string(), reason);
                    self.missing.insert(source);
                    return;
                }
                let group = self.group(group);
                self.dataset.images.push(Image { source: source.clone(), group, views, augment });
                self.by_source.insert(source, self.dataset.images.len() - 1);
                self.dataset.images.len() - 1
            }
        };
        self.dataset.samples.push(Sample { image, text, names, entry });
    }

    /// The number of a named group, or a new one.
    fn group(&mut self, name: Option<String>) -> u32 {
        let next = self.n_groups;
        let group = match name {
            Some(name) => *self.by_group.entry(name).or_insert(next),
            None => next,
        };
        self.n_groups = next.max(group + 1);
        group
    }
}

fn readable_file(path: &Path) -> std::result::Result<(), String> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err("is not a file".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
