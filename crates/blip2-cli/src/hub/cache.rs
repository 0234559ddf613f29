//! The cache that Hugging Face's tools share: one copy of a model for all of them.
//!
//! ```text
//! hub/models--org--name/refs/main              the commit that `main` was when it was last asked for
//!                      /snapshots/COMMIT/FILE  a link to its content
//!                      /blobs/ETAG             contents, by hash
//!                      /blobs/ETAG.incomplete  the part that has come so far
//! hub/.locks/models--org--name/ETAG.lock       held by the process that fetches this content
//! ```

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::checksum::Etag;
use super::repository::{Repository, is_commit};

/// A model's part of the cache.
pub(super) struct Cache {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub(super) fn new(root: &Path, repository: &Repository) -> Self {
        let name = format!("models--{}", repository.id.replace('/', "--"));
        Self { locks: root.join(".locks").join(&name), folder: root.join(name) }
    }

    /// Where the model is.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit that a branch or tag was when it was last asked for.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes which commit a branch or tag is now.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> anyhow::Result<()> {
        if revision == commit || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        make_folder(path.parent().context("a revision has a name")?)?;
        Ok(blip2::weights::write_atomically(path, |file| io::Write::write_all(file, commit.as_bytes()))?)
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &Etag) -> PathBuf {
        self.folder.join("blobs").join(etag.as_str())
    }

    /// What has come so far of a content.
    pub(super) fn incomplete(&self, etag: &Etag) -> PathBuf {
        self.folder.join("blobs").join(format!("{}.incomplete", etag.as_str()))
    }

    /// Makes this process the only one that fetches a content, once the others have; `on_wait` is called before waiting.
    /// The lock ends with the file that is returned, or with the process.
    pub(super) fn lock(&self, etag: &Etag, on_wait: impl FnOnce()) -> anyhow::Result<File> {
        make_folder(&self.locks)?;
        make_folder(&self.folder.join("blobs"))?;
        let path = self.locks.join(format!("{}.lock", etag.as_str()));
        let lock = || -> io::Result<File> {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    on_wait();
                    file.lock()?;
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            Ok(file)
        };
        lock().with_context(|| format!("cannot lock {} (HF_HUB_CACHE can name another disk)", path.display()))
    }

    /// Makes `name` in a commit's folder be a content.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &Etag) -> anyhow::Result<()> {
        let path = self.snapshot(commit).join(name);
        make_folder(&self.snapshot(commit))?;
        let link = || -> io::Result<()> {
            if path.exists() {
                return Ok(());
            }
            #[cfg(unix)]
            {
                // Under another name first: a link that leads nowhere may be in the way.
                let temporary = self.snapshot(commit).join(format!(".{name}.{}.tmp", std::process::id()));
                let _ = fs::remove_file(&temporary); // of a process that ended with this number
                std::os::unix::fs::symlink(Path::new("../../blobs").join(etag.as_str()), &temporary)?;
                fs::rename(&temporary, &path)
            }
            // Links are a privilege on other systems: the file itself, as Python does there.
            #[cfg(not(unix))]
            fs::rename(self.blob(etag), &path)
        };
        link().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Bytes that fit on the cache's disk, where the system tells.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        let existing = self.folder.ancestors().find(|folder| folder.exists())?;
        free_bytes(existing)
    }
}

#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let about = rustix::fs::statvfs(folder).ok()?;
    about.f_bavail.checked_mul(about.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_folder: &Path) -> Option<u64> {
    None
}

fn make_folder(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache(root: &Path) -> Cache {
        Cache::new(root, &Repository::parse("org/name").unwrap().unwrap())
    }

    #[test]
    fn a_revision_is_kept_as_python_keeps_it() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path());
        assert_eq!(cache.commit_of("main"), None);
        cache.set_commit("refs/pr/1", COMMIT).unwrap();
        let kept = root.path().join("models--org--name/refs/refs/pr/1");
        assert_eq!(fs::read_to_string(&kept).unwrap(), COMMIT);
        assert_eq!(cache.commit_of("refs/pr/1").unwrap(), COMMIT);
        cache.set_commit(COMMIT, COMMIT).unwrap();
        assert!(!root.path().join("models--org--name/refs").join(COMMIT).exists(), "a commit is no branch");
        fs::write(kept, "../../elsewhere").unwrap();
        assert_eq!(cache.commit_of("refs/pr/1"), None, "what is no commit leads nowhere");
    }

    #[cfg(unix)]
    #[test]
    fn a_broken_link_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path());
        let etag = Etag::parse("abc").unwrap();
        drop(cache.lock(&etag, || panic!("nobody holds it")).unwrap());
        fs::write(cache.blob(&etag), "content").unwrap();
        fs::create_dir_all(cache.snapshot(COMMIT)).unwrap();
        let path = cache.snapshot(COMMIT).join("config.json");
        std::os::unix::fs::symlink("../../blobs/gone", &path).unwrap();
        cache.link(COMMIT, "config.json", &etag).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "content");
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("../../blobs/abc"));
    }

    #[test]
    fn the_disk_of_a_folder_to_be_has_room() {
        let root = tempfile::tempdir().unwrap();
        assert!(cache(&root.path().join("not/yet")).free_bytes().is_none_or(|free| free > 0));
    }
}
