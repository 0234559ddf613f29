//! WebDataset tar shards, read in place: nothing is unpacked, member names never become paths.
//!
//! Members whose names agree up to the first dot of the last part are one sample: a picture (`.jpg`, `.png`, …) with a
//! `.txt` (one caption a line) or a `.json` (the fields of a manifest row).

use super::folder::{PICTURE_EXTENSIONS, captions, extension};
use super::{Builder, ImageSource, Row, Text};
use crate::{Error, Result};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A text member longer than this is not a caption.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// The tar files of a folder, in the order of names.
pub(super) fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if extension(&path) == "tar" {
            shards.push(path);
        }
    }
    shards.sort();
    Ok(shards)
}

/// Reads a shard, or all shards of a folder.
pub(super) fn read(path: &Path, builder: &mut Builder) -> Result<()> {
    if path.is_dir() {
        return shards(path)?.iter().try_for_each(|shard| read_shard(shard, builder));
    }
    read_shard(path, builder)
}

/// What was found so far for one key.
#[derive(Default)]
struct Pending {
    key: String,
    picture: Option<ImageSource>,
    row: Option<Row>,
}

fn read_shard(path: &Path, builder: &mut Builder) -> Result<()> {
    let damaged = |error: std::io::Error| Error::file(path, format!("is not a whole tar archive: {error}"));
    let file = File::open(path).map_err(Error::io(path))?;
    let n_bytes = file.metadata().map_err(Error::io(path))?.len();
    let archive_path: Arc<Path> = Arc::from(path);
    let mut archive = tar::Archive::new(BufReader::new(file));
    let mut pending = Pending::default();
    for entry in archive.entries_with_seek().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        if !entry.header().entry_type().is_file() {
            continue; // folders, links and sparse files hold no picture
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let shown = name.escape_debug().to_string();
        let (offset, len) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(len).is_none_or(|end| end > n_bytes) {
            return Err(Error::file(path, format!("ends inside its member {shown}: copy the archive again")));
        }
        let (key, kind) = split_key(&name);
        if pending.key != key {
            finish(std::mem::take(&mut pending), path, builder);
            pending.key = key.to_owned();
        }
        if PICTURE_EXTENSIONS.contains(&kind.as_str()) {
            pending.picture =
                Some(ImageSource::TarMember { archive: archive_path.clone(), offset, len, name: shown });
        } else if kind == "txt" || kind == "json" {
            let wrong = |reason: String| Error::file(path, format!("member {shown}: {reason}"));
            if len > MAX_TEXT_BYTES {
                return Err(wrong(format!("{len} bytes are too long for a text")));
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(damaged)?;
            pending.row = Some(parse_text(&kind, &bytes).map_err(wrong)?);
        }
    }
    finish(pending, path, builder);
    Ok(())
}

/// `"a/b.c.jpg"` → (`"a/b"`, `"jpg"`): the key ends at the first dot of the last part.
fn split_key(name: &str) -> (&str, String) {
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let key = name[last..].find('.').map_or(name, |dot| &name[..last + dot]);
    let kind = name[last..].rsplit_once('.').map(|(_, kind)| kind.to_ascii_lowercase()).unwrap_or_default();
    (key, kind)
}

fn parse_text(kind: &str, bytes: &[u8]) -> std::result::Result<Row, String> {
    if kind == "txt" {
        return Ok(Row { captions: Some(captions(bytes)?), ..Row::default() });
    }
    let mut fields: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    // The picture is the member beside the text, whatever the text calls it.
    fields.insert("image".into(), "".into());
    let row: Row = serde_json::from_value(fields.into()).map_err(|error| error.to_string())?;
    row.text()?;
    Ok(row)
}

fn finish(pending: Pending, path: &Path, builder: &mut Builder) {
    match (pending.picture, pending.row) {
        (Some(picture), Some(row)) => {
            let text: Text = row.text().expect("the text was checked when it was read");
            builder.add(picture, row.group, text, row.names);
        }
        (Some(picture), None) => builder.skip(picture.to_string(), "has no .txt or .json beside it"),
        (None, Some(_)) => {
            let name = format!("{}:{}", path.display(), pending.key.escape_debug());
            builder.skip(name, "has a text but no picture");
        }
        (None, None) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DataConfig, Dataset};
    use super::*;
    use std::fs;

    fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in members {
            let mut header = tar::Header::new_ustar();
            // Written by hand: the safe setter refuses the hostile names that this is about.
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn members_are_paired_and_read_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let first = tar_of(&[
            ("s/001.jpg", b"picture one"),
            ("s/001.txt", b"one\nuno"),
            ("s/002.json", br#"{"question":"q","answer":"r","image":"ignored"}"#),
            ("s/002.png", b"picture two"),
            ("s/003.jpg", b"alone"),
            ("s/004.txt", b"text alone"),
            ("s/005.cls", b"3"),
        ]);
        fs::write(dir.path().join("a-000.tar"), &first).unwrap();
        fs::write(dir.path().join("a-001.tar"), tar_of(&[("x.seg.jpg", b"three"), ("x.txt", b"tre")]))
            .unwrap();
        let dataset = Dataset::load(&[DataConfig::new("")], dir.path()).unwrap();
        let pictures: Vec<Vec<u8>> =
            dataset.images().iter().map(|image| image.source.read().unwrap()).collect();
        assert_eq!(pictures, [&b"picture one"[..], b"picture two", b"three"]);
        assert_eq!(dataset.samples()[0].text, Text::Captions(vec!["one".into(), "uno".into()]));
        assert_eq!(
            dataset.samples()[1].text,
            Text::QuestionAnswer { question: "q".into(), answers: vec!["r".into()] }
        );
        let skipped: Vec<String> = dataset.skipped().iter().map(ToString::to_string).collect();
        assert_eq!(skipped.len(), 2, "{skipped:?}");
        assert!(skipped[0].contains("s/003.jpg") && skipped[1].contains("s/004"), "{skipped:?}");

        // A shard that shrank after it was indexed is an error, not a short picture.
        fs::write(dir.path().join("a-000.tar"), &first[..600]).unwrap();
        assert!(dataset.images()[1].source.read().is_err());
    }

    #[test]
    fn hostile_names_are_only_labels() {
        let dir = tempfile::tempdir().unwrap();
        let members: [(&str, &[u8]); 4] = [
            ("../../evil.jpg", b"x"),
            ("../../evil.txt", b"t"),
            ("/abs\u{1b}[2J.jpg", b"y"),
            ("/abs\u{1b}[2J.txt", b"t"),
        ];
        fs::write(dir.path().join("e.tar"), tar_of(&members)).unwrap();
        let dataset = Dataset::load(&[DataConfig::new("e.tar")], dir.path()).unwrap();
        assert_eq!(dataset.images().len(), 2);
        assert_eq!(dataset.images()[0].source.read().unwrap(), b"x");
        assert!(!dataset.images()[1].source.to_string().contains('\u{1b}'));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is unpacked");
    }

    #[test]
    fn damaged_shards_are_errors_that_name_them() {
        let dir = tempfile::tempdir().unwrap();
        let whole = tar_of(&[("1.jpg", &[7; 2000]), ("1.txt", b"t")]);
        let long = vec![b'x'; MAX_TEXT_BYTES as usize + 1];
        let mut garbage_header = whole.clone();
        garbage_header[3] ^= 0xff;
        for (content, says) in [
            (whole[..1000].to_vec(), "t.tar"),
            (garbage_header, "t.tar"),
            (tar_of(&[("1.jpg", b"p"), ("1.txt", &long)]), "too long"),
            (tar_of(&[("1.jpg", b"p"), ("1.txt", b"\xff")]), "UTF-8"),
            (tar_of(&[("1.jpg", b"p"), ("1.json", b"{}")]), "neither"),
        ] {
            fs::write(dir.path().join("t.tar"), &content).unwrap();
            let message = Dataset::load(&[DataConfig::new("t.tar")], dir.path()).unwrap_err().to_string();
            assert!(message.contains("t.tar") && message.contains(says), "{message}");
        }
    }

    #[test]
    fn keys_end_at_the_first_dot_of_the_last_part() {
        assert_eq!(split_key("a.b/c.d.JPG"), ("a.b/c", "jpg".into()));
        assert_eq!(split_key("plain"), ("plain", String::new()));
    }
}
