//! Models from the Hugging Face hub, through the cache that its own tools use.
//!
//! A small client of our own on `ureq`, not the crate `hf-hub`: that one brings an asynchronous runtime, and it leaves to
//! others what matters here, checking each content against its hash and going on from the byte where a connection broke.
//! What the hub says becomes names of files and addresses, so all of it is checked before it is used.

mod cache;
mod checksum;
mod client;
mod files;
mod progress;
mod repository;
mod settings;
mod transfer;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use indicatif::DecimalBytes;

use cache::Cache;
use client::{Client, LIST_ATTEMPTS, Listing, RemoteFile};
use progress::Progress;
pub(crate) use repository::Repository;
pub(crate) use settings::Settings;
use transfer::Transfer;

/// The folder of a model, whose files are fetched as far as they are not in the cache. Before weights are fetched,
/// `approve` is asked with the size of all of them in bytes.
///
/// # Errors
/// When it is not there and cannot be had; the message says what stands in the way.
pub(crate) fn folder(
    repository: &Repository,
    settings: &Settings,
    approve: &dyn Fn(u64) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let cache = Cache::new(&settings.cache, repository);
    let known = if repository.is_commit() {
        Some(repository.revision.clone())
    } else {
        cache.commit_of(&repository.revision)
    };
    let kept = known.map(|commit| cache.snapshot(&commit)).filter(|folder| folder.is_dir());
    let missing = kept.as_ref().map(|folder| files::missing(folder));
    let is_whole = missing.as_ref().is_some_and(Vec::is_empty);
    if settings.is_offline {
        return match (kept, missing) {
            (Some(folder), Some(missing)) if missing.is_empty() => Ok(folder),
            (Some(folder), Some(missing)) => bail!(
                "of {repository} the cache lacks {} (looked in {}), and HF_HUB_OFFLINE forbids to fetch anything",
                missing.join(", "),
                folder.display()
            ),
            _ => bail!(
                "{repository} is not in the cache (looked in {}), and HF_HUB_OFFLINE forbids to fetch anything",
                cache.folder().display()
            ),
        };
    }
    if let Some(folder) =
        kept.as_ref().filter(|folder| is_whole && repository.is_commit() && files::is_described(folder))
    {
        return Ok(folder.clone()); // a commit never changes
    }
    let client = Client::new(settings)?;
    match client.list(repository, if is_whole { 1 } else { LIST_ATTEMPTS }) {
        Ok(listing) => {
            let fetch = Fetch { client: &client, cache: &cache, repository, settings, listing: &listing };
            fetch.all(approve).with_context(|| format!("the model {repository}"))
        }
        Err(failure) => match kept.filter(|_| is_whole) {
            Some(folder) => {
                eprintln!("using {repository} as it is in the cache: {}", anyhow::Error::from(failure));
                Ok(folder)
            }
            None => Err(failure.into()),
        },
    }
}

/// One model at one commit on its way into the cache.
struct Fetch<'a> {
    client: &'a Client,
    cache: &'a Cache,
    repository: &'a Repository,
    settings: &'a Settings,
    listing: &'a Listing,
}

impl Fetch<'_> {
    /// Fetches what is not there: what describes the model first, since it says which weights are needed.
    fn all(&self, approve: &dyn Fn(u64) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
        let Listing { commit, files: listed } = self.listing;
        let folder = self.cache.snapshot(commit);
        let descriptions = self.absent(&files::descriptions(listed)?)?;
        self.fetch(&descriptions)?;
        if !blip2::model::is_hugging_face(&folder)? {
            bail!("it is not a BLIP-2 model in Hugging Face's layout");
        }
        let weights = self.absent(&files::weights(listed, &folder)?)?;
        if !weights.is_empty() {
            approve(weights.iter().fold(0, |n_bytes, file| n_bytes.saturating_add(file.size)))?;
        }
        self.fetch(&weights)?;
        // Last, so that a branch in the cache is a whole model.
        match self.cache.set_commit(&self.repository.revision, commit) {
            // A cache that cannot be written to may still have everything.
            Err(_) if descriptions.is_empty() && weights.is_empty() => Ok(folder),
            result => result.map(|()| folder),
        }
    }

    /// Those of `names` that are not in the commit's folder.
    fn absent(&self, names: &[String]) -> anyhow::Result<Vec<RemoteFile>> {
        let Listing { commit, .. } = self.listing;
        let snapshot = self.cache.snapshot(commit);
        let absent = names.iter().filter(|name| !snapshot.join(name).exists());
        absent.map(|name| self.client.describe(self.repository, commit, name)).collect()
    }

    fn fetch(&self, absent: &[RemoteFile]) -> anyhow::Result<()> {
        let Listing { commit, .. } = self.listing;
        let (n_bytes, n_here) = self.sizes(absent);
        check_disk(n_bytes - n_here, self.cache.free_bytes(), self.cache.folder())?;
        if n_bytes > 0 {
            eprintln!("fetching {} of {} ({})", list(absent), self.repository, DecimalBytes(n_bytes));
        }
        let mut progress = Progress::new(n_bytes, self.settings.shows_progress);
        let transfer =
            Transfer { client: self.client, cache: self.cache, repository: self.repository, commit };
        for remote in absent {
            let waiting =
                || progress.note(&format!("another process is fetching {}: waiting for it", remote.name));
            let _lock = self.cache.lock(&remote.etag, waiting)?;
            if !self.cache.blob(&remote.etag).exists() {
                transfer.fetch(remote, &mut progress)?;
            }
            self.cache.link(commit, &remote.name, &remote.etag)?;
        }
        Ok(())
    }

    /// Bytes of those contents that are not in the cache, and how many of them an earlier run left.
    fn sizes(&self, files: &[RemoteFile]) -> (u64, u64) {
        let absent = files.iter().filter(|file| !self.cache.blob(&file.etag).exists());
        absent.fold((0, 0), |(n_bytes, n_here), file| {
            let here = self.cache.incomplete(&file.etag).metadata().map_or(0, |about| about.len());
            (n_bytes.saturating_add(file.size), n_here + here.min(file.size))
        })
    }
}

fn list(files: &[RemoteFile]) -> String {
    match files {
        [file] => file.name.clone(),
        files => format!("{} files", files.len()),
    }
}

/// Refuses to begin what the disk has no room for.
fn check_disk(needed: u64, free: Option<u64>, folder: &Path) -> anyhow::Result<()> {
    match free {
        Some(free) if free < needed => bail!(
            "{} are to be fetched and {} are free at {}: make room, or let HF_HUB_CACHE name a folder on another disk",
            DecimalBytes(needed),
            DecimalBytes(free),
            folder.display()
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_noticed_before() {
        let check = |needed, free| check_disk(needed, free, Path::new("/cache"));
        assert!(check(10, Some(10)).is_ok() && check(10, None).is_ok());
        let error = check(15_000_000_000, Some(3_200_000_000)).unwrap_err().to_string();
        for part in ["15.00 GB", "3.20 GB", "/cache", "HF_HUB_CACHE"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
