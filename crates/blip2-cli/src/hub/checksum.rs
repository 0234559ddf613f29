//! What the hub says a file's content is: its `ETag` is the content's hash.

use std::fmt;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The name of a file's content in the hub's cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Etag(String);

impl Etag {
    /// Reads the header. It becomes the name of a file: nothing that leads out of a folder is one.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let text = header.strip_prefix("W/").unwrap_or(header).trim_matches('"');
        let is_name =
            (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        is_name.then(|| Self(text.to_owned()))
    }

    /// The hash that content of `size` bytes under this tag must have, if the tag is one.
    pub(super) fn checksum(&self, size: u64) -> Option<Checksum> {
        if !self.0.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        match self.0.len() {
            64 => Some(Checksum::Sha256(Sha256::new())),
            40 => Some(Checksum::GitBlob(Sha1::new_with_prefix(format!("blob {size}\0")))),
            _ => None,
        }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A hash of a file under way.
#[derive(Clone)]
pub(super) enum Checksum {
    /// Of the bytes: files in large-file storage.
    Sha256(Sha256),
    /// Of the bytes behind git's header: files in the repository itself.
    GitBlob(Sha1),
}

impl Checksum {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::GitBlob(hash) => hash.update(bytes),
        }
    }

    /// In hexadecimal, as tags have it.
    pub(super) fn finish(self) -> String {
        use fmt::Write as _;
        let bytes = match self {
            Self::Sha256(hash) => hash.finalize().to_vec(),
            Self::GitBlob(hash) => hash.finalize().to_vec(),
        };
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
            text
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tag: &str, content: &[u8]) -> String {
        let mut checksum = Etag::parse(tag).unwrap().checksum(content.len() as u64).unwrap();
        content.chunks(2).for_each(|part| checksum.update(part));
        checksum.finish()
    }

    #[test]
    fn hashes_are_those_of_git_and_of_large_file_storage() {
        // `printf 'hello\n' | git hash-object --stdin` and `printf 'hello\n' | sha256sum`.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let large = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(of(git, b"hello\n"), git);
        assert_eq!(of(&format!("W/\"{large}\""), b"hello\n"), large);
        assert!(Etag::parse("\"5f363e0e58a95f06cbe9bbc662c5dfb6-3\"").unwrap().checksum(1).is_none());
    }

    #[test]
    fn a_tag_is_a_plain_name() {
        for tag in ["", "\"\"", "../x", "a/b", "a.b", "a b", "\\", &"a".repeat(129)] {
            assert_eq!(Etag::parse(tag), None, "{tag}");
        }
    }
}
