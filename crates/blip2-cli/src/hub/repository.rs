//! A model's name on the hub, `organisation/name`, and which revision of it.

use std::fmt;

use anyhow::bail;

/// The branch that is meant when none is named.
const DEFAULT_REVISION: &str = "main";

/// The longest name that the hub gives.
const MAX_NAME: usize = 96;

/// `organisation/name@revision`. Both become parts of paths and addresses, so only what the hub itself allows is let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Repository {
    /// `organisation/name`.
    pub(super) id: String,
    /// A branch, a tag or a commit.
    pub(super) revision: String,
}

impl Repository {
    /// Reads what stands behind `--model`; nothing when it has not the form of a name on the hub.
    ///
    /// # Errors
    /// When it has that form but holds what no name or revision may hold.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Option<Self>> {
        let (id, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let Some((organisation, name)) = id.split_once('/') else { return Ok(None) };
        if ![organisation, name].into_iter().all(is_name) || id.len() > MAX_NAME || id.contains("--") {
            return Ok(None);
        }
        if !is_revision(revision) {
            bail!("`{}` is not a branch, tag or commit of a model", revision.escape_default());
        }
        Ok(Some(Self { id: id.into(), revision: revision.into() }))
    }

    /// Whether the revision is a whole commit: what it names never changes.
    pub(super) fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }

    /// The revision as one part of an address.
    pub(super) fn quoted_revision(&self) -> String {
        quoted(&self.revision)
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// The hash of a commit in full.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// One part of an address, with everything escaped that means something in one.
pub(super) fn quoted(text: &str) -> String {
    use fmt::Write as _;
    text.bytes().fold(String::new(), |mut quoted, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            quoted.push(byte.into());
        } else {
            let _ = write!(quoted, "%{byte:02X}"); // writing to a String cannot fail
        }
        quoted
    })
}

fn is_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let outer = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let bytes = name.as_bytes();
    bytes.iter().all(|&byte| inner(byte))
        && outer(bytes.first().copied())
        && outer(bytes.last().copied())
        && !name.contains("..")
        && !name.ends_with(".git")
}

/// As git names branches and tags, without what would lead out of a folder.
fn is_revision(revision: &str) -> bool {
    revision.len() <= 255
        && revision.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._/+".contains(&byte))
        && revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && !part.ends_with('.'))
        && !revision.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        let parse = |text: &str| Repository::parse(text).unwrap();
        let repository = parse("Salesforce/blip2-opt-2.7b").unwrap();
        assert_eq!((&*repository.id, &*repository.revision), ("Salesforce/blip2-opt-2.7b", "main"));
        assert_eq!(repository.to_string(), "Salesforce/blip2-opt-2.7b");
        let commit = parse("a/b@51572668da0eb669e01a189dc22abe6088589a24").unwrap();
        assert!(commit.is_commit() && commit.to_string().starts_with("a/b@51572668"));
        assert_eq!(parse("a/b@refs/pr/7").unwrap().quoted_revision(), "refs%2Fpr%2F7");
        for path in [
            "model", "./a/b", "../a", "/a/b", "a/b/c", "a/", "a/..", "a/.b", "a/b.git", "a--b/c", "a/b c", "",
        ] {
            assert_eq!(parse(path), None, "{path}");
        }
        assert_eq!(parse(&format!("a/{}", "b".repeat(95))), None);
    }

    #[test]
    fn a_revision_leads_nowhere_else() {
        for revision in
            ["", "..", "a/../b", "/a", "a/", "a//b", "a b", "a\nb", "a?b=1", ".git", "a#b", "a\\b"]
        {
            let error = Repository::parse(&format!("a/b@{revision}")).unwrap_err().to_string();
            assert!(error.contains("not a branch, tag or commit"), "{revision}: {error}");
            assert_eq!(error.lines().count(), 1);
        }
    }
}
