//! One file from the hub into the cache: resumed where it broke off, whole and right before it has its name.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, bail};

use super::cache::Cache;
use super::checksum::Checksum;
use super::client::{Client, Failure, MAX_ATTEMPTS, RemoteFile, wait_after};
use super::progress::Progress;
use super::repository::Repository;

/// Bytes read at a time.
const CHUNK: usize = 1 << 18;

/// What is fetched from where to where.
pub(super) struct Transfer<'a> {
    pub(super) client: &'a Client,
    pub(super) cache: &'a Cache,
    pub(super) repository: &'a Repository,
    pub(super) commit: &'a str,
}

/// The part of a file that is here.
struct Part {
    file: File,
    len: u64,
    checksum: Option<Checksum>,
}

impl Transfer<'_> {
    /// Fetches the content of `remote` unless it is there. The caller holds its lock.
    ///
    /// # Errors
    /// When the hub cannot be reached for long, the disk is full, or the content has another hash than the hub says.
    pub(super) fn fetch(&self, remote: &RemoteFile, progress: &mut Progress) -> anyhow::Result<()> {
        let path = self.cache.incomplete(&remote.etag);
        let on_disk = || format!("cannot write {}", path.display());
        progress.name(&remote.name);
        let mut part = self.begun(&path, remote, progress).with_context(on_disk)?;
        let mut was_resumed = part.len > 0;
        loop {
            self.complete(&mut part, &path, remote, progress)?;
            let Some(found) = part.checksum.take().map(Checksum::finish) else {
                progress.note(&format!(
                    "{}: the hub gives no hash of it, only its size is known to be right",
                    remote.name
                ));
                break;
            };
            if found.eq_ignore_ascii_case(remote.etag.as_str()) {
                break;
            }
            part.restart(remote, progress).with_context(on_disk)?;
            if !was_resumed {
                drop(part);
                fs::remove_file(&path).with_context(on_disk)?;
                bail!(
                    "{} of {} came damaged: its hash is {found}, the hub says {}; nothing of it was kept",
                    remote.name,
                    self.repository,
                    remote.etag.as_str()
                );
            }
            progress
                .note(&format!("what was here of {} was damaged: all of it is fetched again", remote.name));
            was_resumed = false;
        }
        part.file.sync_all().with_context(on_disk)?;
        let blob = self.cache.blob(&remote.etag);
        fs::rename(&path, &blob).with_context(on_disk)?;
        // The name is safe only when the folder is on the disk too. Not every platform can open a folder.
        #[cfg(unix)]
        if let Some(folder) = blob.parent() {
            File::open(folder).and_then(|folder| folder.sync_all()).with_context(on_disk)?;
        }
        Ok(())
    }

    /// What an earlier run left.
    fn begun(&self, path: &Path, remote: &RemoteFile, progress: &mut Progress) -> io::Result<Part> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut part = Part { file, len: 0, checksum: remote.etag.checksum(remote.size) };
        if part.file.metadata()?.len() > remote.size {
            part.restart(remote, progress)?;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = part.file.read(&mut chunk)?;
            if n == 0 {
                return Ok(part);
            }
            part.note(&chunk[..n], progress);
        }
    }

    /// Fetches what is missing, with as many connections as it takes.
    fn complete(
        &self,
        part: &mut Part,
        path: &Path,
        remote: &RemoteFile,
        progress: &mut Progress,
    ) -> anyhow::Result<()> {
        let mut n_failed = 0;
        while part.len < remote.size {
            let before = part.len;
            let (reason, asked) = match self.receive(part, path, remote, progress) {
                Ok(()) => continue,
                Err(Failure::Passing(reason, asked)) => (reason, asked),
                Err(Failure::Final(error)) => {
                    return Err(error.context(format!("{} of {}", remote.name, self.repository)));
                }
            };
            // Only failures in a row count: a connection that brings something is worth another.
            n_failed = if part.len > before { 1 } else { n_failed + 1 };
            if n_failed >= MAX_ATTEMPTS {
                bail!(
                    "{} of {} breaks off at byte {} of {}: {reason}; run the command again to go on from there",
                    remote.name,
                    self.repository,
                    part.len,
                    remote.size
                );
            }
            let wait: Duration = wait_after(n_failed, asked);
            let at = format!("{} at byte {} of {}", remote.name, part.len, remote.size);
            progress.note(&format!("{at}: {reason}; going on in {:.1} s", wait.as_secs_f32()));
            sleep(wait);
        }
        Ok(())
    }

    /// Takes what one connection brings.
    fn receive(
        &self,
        part: &mut Part,
        path: &Path,
        remote: &RemoteFile,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let on_disk = || format!("cannot write {}", path.display());
        let mut opened = self.client.open(self.repository, self.commit, remote, part.len)?;
        if opened.from != part.len {
            part.restart(remote, progress).with_context(on_disk)?;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = match opened.bytes.read(&mut chunk) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::Passing(error.to_string(), None)),
            };
            if n == 0 && part.len < remote.size {
                return Err(Failure::Passing("the connection ended".into(), None));
            }
            if n == 0 {
                return Ok(());
            }
            if part.len + n as u64 > remote.size {
                let reason = format!("more than the {} bytes come that the hub spoke of", remote.size);
                return Err(anyhow::Error::msg(reason).into());
            }
            part.file.write_all(&chunk[..n]).with_context(on_disk)?;
            part.note(&chunk[..n], progress);
        }
    }
}

impl Part {
    /// Counts bytes that were read or written at the end.
    fn note(&mut self, bytes: &[u8], progress: &mut Progress) {
        self.len += bytes.len() as u64;
        if let Some(checksum) = &mut self.checksum {
            checksum.update(bytes);
        }
        progress.add(bytes.len() as u64);
    }

    /// Forgets all of it.
    fn restart(&mut self, remote: &RemoteFile, progress: &mut Progress) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        progress.take_back(self.len);
        self.len = 0;
        self.checksum = remote.etag.checksum(remote.size);
        Ok(())
    }
}
