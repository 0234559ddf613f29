//! WebDataset tar shards, read in place: nothing is unpacked, member names never become paths.
//!
//! Members whose names agree up to the first dot of the last part are one sample: a picture (`.jpg`, `.png`, …) and what
//! is said about it. That is in the `.json` where it is a manifest row ([`Row`]), and else in the `.txt`, one caption a line:
//! shards of img2dataset have both, and their `.json` tells where the picture came from, with a caption or without one.
//!
//! A sample of which neither can be used is left out by name, like a picture that does not decode: among millions from the web
//! some are broken, and one must not end a run. A damaged archive does, and so does data of which nothing can be used.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::folder::{PICTURE_EXTENSIONS, captions, extension};
use super::{Builder, ImageSource, Row, Text};
use crate::{Error, Result};

/// A text member longer than this is not a caption.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// The parts that an archive is made of.
const BLOCK_BYTES: u64 = 512;

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

/// What a member says about its picture.
struct Said {
    text: Text,
    group: Option<String>,
    names: Vec<String>,
}

/// That, or why it cannot be used.
type Parsed = std::result::Result<Said, String>;

/// What was found so far for one key.
#[derive(Default)]
struct Pending {
    key: String,
    picture: Option<ImageSource>,
    json: Option<Parsed>,
    txt: Option<Parsed>,
}

fn read_shard(path: &Path, builder: &mut Builder) -> Result<()> {
    // The reader quotes what it cannot read, whatever bytes that are.
    let damaged = |error: std::io::Error| {
        let printable: String =
            error.to_string().chars().filter(|c| c.is_ascii() && !c.is_control()).collect();
        Error::file(path, format!("is not a whole tar archive: {printable}"))
    };
    let (file, n_bytes) = open_shard(path)?;
    let archive_path: Arc<Path> = Arc::from(path);
    let mut archive = tar::Archive::new(BufReader::new(file));
    let mut pending = Pending::default();
    let mut end = 0;
    for entry in archive.entries_with_seek().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        // A sparse file is larger than what is stored of it.
        let n_stored = entry.header().entry_size().map_err(damaged)?.min(entry.size());
        end = entry.raw_file_position().saturating_add(n_stored);
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
            let parsed = if len > MAX_TEXT_BYTES {
                Err(format!("{len} bytes are too long for a text"))
            } else {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).map_err(damaged)?;
                if kind == "txt" { parse_txt(&bytes) } else { parse_json(&bytes) }
            };
            let slot = if kind == "txt" { &mut pending.txt } else { &mut pending.json };
            // Of several (`1.json`, `1.exif.json`) the first that can be used.
            if !matches!(slot, Some(Ok(_))) {
                *slot = Some(parsed.map_err(|reason| format!("{shown}: {reason}")));
            }
        }
    }
    // The reader takes any whole block behind a member for another one, or for the end if it is empty. Where the first of the two
    // empty ones is there nothing is lost.
    if n_bytes < end.saturating_add(BLOCK_BYTES) {
        return Err(Error::file(
            path,
            "ends without the two empty blocks that end a tar archive, so members may be missing: copy the archive again; if it \
             was never ended, `tar --append` or `truncate --size=+1024` ends it",
        ));
    }
    finish(pending, path, builder);
    Ok(())
}

/// An archive and its length; one that is compressed is refused.
fn open_shard(path: &Path) -> Result<(File, u64)> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut magic = [0; 2];
    if file.read(&mut magic).map_err(Error::io(path))? == 2 && magic == [0x1f, 0x8b] {
        return Err(Error::file(
            path,
            "is compressed, and pictures are read from where they are: unpack it with gunzip",
        ));
    }
    file.rewind().map_err(Error::io(path))?;
    let n_bytes = file.metadata().map_err(Error::io(path))?.len();
    Ok((file, n_bytes))
}

/// `"a/b.c.jpg"` → (`"a/b"`, `"jpg"`): the key ends at the first dot of the last part.
fn split_key(name: &str) -> (&str, String) {
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let key = name[last..].find('.').map_or(name, |dot| &name[..last + dot]);
    let kind = name[last..].rsplit_once('.').map(|(_, kind)| kind.to_ascii_lowercase()).unwrap_or_default();
    (key, kind)
}

fn parse_txt(bytes: &[u8]) -> Parsed {
    Ok(Said { text: Text::Captions(captions(bytes)?), group: None, names: Vec::new() })
}

fn parse_json(bytes: &[u8]) -> Parsed {
    let mut fields: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    // The picture is the member beside the text, whatever the text calls it.
    fields.insert("image".into(), "".into());
    let row: Row = serde_json::from_value(fields.into()).map_err(|error| error.to_string())?;
    Ok(Said { text: row.text()?, group: row.group, names: row.names })
}

fn finish(pending: Pending, path: &Path, builder: &mut Builder) {
    let Pending { key, picture, json, txt } = pending;
    let Some(picture) = picture else {
        if json.is_some() || txt.is_some() {
            let name = format!("{}:{}", path.display(), key.escape_debug());
            builder.skip(name, "has a text but no picture");
        }
        return;
    };
    match (json, txt) {
        (Some(Ok(said)), _) | (_, Some(Ok(said))) => {
            builder.add(picture, said.group, said.text, said.names);
        }
        (None, None) => builder.skip(picture.to_string(), "has no .txt or .json beside it"),
        (json, txt) => {
            let reasons: Vec<String> = [json, txt].into_iter().flatten().filter_map(Parsed::err).collect();
            builder.skip(picture.to_string(), reasons.join("; "));
        }
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

    /// A shard as img2dataset writes it: a caption that was empty is an empty `.txt` and a null in the `.json`.
    #[test]
    fn shards_of_img2dataset_are_read() {
        let about = |caption: &str| {
            format!(
                r#"{{"caption":{caption},"url":"https://example.org/1.jpg","key":"000000000","status":"success",
                "error_message":null,"width":256,"height":256,"original_width":1000,"original_height":750,"exif":"{{}}",
                "sha256":"00"}}"#
            )
        };
        let (with, without) = (about("\"two\\nlines\""), about("null"));
        let dir = tempfile::tempdir().unwrap();
        let shard = tar_of(&[
            ("000000000.jpg", b"a"),
            ("000000000.json", with.as_bytes()),
            ("000000000.txt", b"two\nlines"),
            ("000000001.jpg", b"b"),
            ("000000001.json", without.as_bytes()),
            ("000000001.txt", b"a cat"),
            ("000000002.jpg", b"c"),
            ("000000002.json", without.as_bytes()),
            ("000000002.txt", b""),
        ]);
        fs::write(dir.path().join("00000.tar"), shard).unwrap();
        let dataset = Dataset::load(&[DataConfig::new("")], dir.path()).unwrap();
        let texts: Vec<&Text> = dataset.samples().iter().map(|sample| &sample.text).collect();
        let caption = |text: &str| Text::Captions(vec![text.to_owned()]);
        assert_eq!(texts, [&caption("two\nlines"), &caption("a cat")]);
        let skipped: Vec<String> = dataset.skipped().iter().map(ToString::to_string).collect();
        assert_eq!(skipped.len(), 1, "{skipped:?}");
        for words in
            ["00000.tar:000000002.jpg: ", "000000002.json: the row has neither", "000000002.txt: holds no"]
        {
            assert!(skipped[0].contains(words), "{skipped:?}");
        }
    }

    #[test]
    fn a_row_comes_before_captions_and_what_cannot_be_used_is_left_out_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let long = vec![b'x'; MAX_TEXT_BYTES as usize + 1];
        let shard = tar_of(&[
            ("0.txt", b"a dog"),
            ("0.json", br#"{"question":"q","answer":"r","group":"g"}"#),
            ("0.exif.json", br#"{"caption":"no, later"}"#),
            ("0.jpg", b"p"),
            // A column of that name, but of another kind, is no row.
            ("1.jpg", b"p"),
            ("1.json", br#"{"caption":7}"#),
            ("1.txt", b"a cat"),
            ("2.jpg", b"p"),
            ("2.json", b"{not JSON"),
            ("2.txt", b"a bird"),
            ("3.jpg", b"p"),
            ("3.json", b"{not JSON"),
            ("4.jpg", b"p"),
            ("4.txt", b"\xff"),
            ("5.jpg", b"p"),
            ("5.txt", &long),
            ("6.json", b"{}"),
        ]);
        fs::write(dir.path().join("s.tar"), shard).unwrap();
        let dataset = Dataset::load(&[DataConfig::new("s.tar")], dir.path()).unwrap();
        let texts: Vec<&Text> = dataset.samples().iter().map(|sample| &sample.text).collect();
        let caption = |text: &str| Text::Captions(vec![text.to_owned()]);
        let question = Text::QuestionAnswer { question: "q".into(), answers: vec!["r".into()] };
        assert_eq!(texts, [&question, &caption("a cat"), &caption("a bird")]);
        let skipped: Vec<String> = dataset.skipped().iter().map(ToString::to_string).collect();
        assert_eq!(skipped.len(), 4, "{skipped:?}");
        let expected = [
            ("s.tar:3.jpg: 3.json: ", "line 1"),
            ("4.txt: ", "UTF-8"),
            ("5.txt: ", "too long"),
            ("6: ", "no picture"),
        ];
        for (said, (name, reason)) in skipped.iter().zip(expected) {
            assert!(said.contains(name) && said.contains(reason), "{said}");
        }
    }

    #[test]
    fn a_compressed_shard_is_told_to_be_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("s.tar"), b"\x1f\x8b\x08 and so on").unwrap();
        let error = Dataset::load(&[DataConfig::new("s.tar")], dir.path()).unwrap_err().to_string();
        assert!(error.contains("s.tar") && error.contains("gunzip"), "{error}");
        // Bytes that a terminal would obey are not in the message.
        fs::write(dir.path().join("s.tar"), [0x1b; 512]).unwrap();
        let error = Dataset::load(&[DataConfig::new("s.tar")], dir.path()).unwrap_err().to_string();
        assert!(error.contains("not a whole tar archive") && !error.contains('\u{1b}'), "{error}");
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
    fn damaged_shards_and_those_of_no_use_are_errors_that_name_them() {
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

    /// What is missing leaves no other trace: the members that are there are whole.
    #[test]
    fn a_shard_that_was_cut_between_members_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let whole = tar_of(&[("1.jpg", &[7; 512]), ("1.txt", b"one"), ("2.jpg", b"p"), ("2.txt", b"two")]);
        let load = |content: &[u8]| {
            fs::write(dir.path().join("t.tar"), content).unwrap();
            let dataset = Dataset::load(&[DataConfig::new("t.tar")], dir.path());
            dataset.map(|dataset| dataset.samples().len()).map_err(|error| error.to_string())
        };
        assert_eq!(load(&whole), Ok(2));
        assert_eq!(load(&whole[..whole.len() - 512]), Ok(2), "one of the two empty blocks");
        for n_blocks in [0, 2, 4, 6, 8] {
            let error = load(&whole[..512 * n_blocks]).unwrap_err();
            let says = error.contains("t.tar: ") && error.contains("two empty blocks");
            assert!(says && error.contains("copy the archive again"), "{n_blocks}: {error}");
        }
        // A folder and its name in an extension have no picture, but are members.
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        builder.append_data(&mut header, "x".repeat(120), &b""[..]).unwrap();
        let mut ended = whole[..whole.len() - 1024].to_vec();
        ended.extend(builder.into_inner().unwrap());
        assert_eq!(load(&ended), Ok(2));
        assert!(load(&ended[..ended.len() - 1024]).unwrap_err().contains("two empty blocks"));
    }

    #[test]
    fn keys_end_at_the_first_dot_of_the_last_part() {
        assert_eq!(split_key("a.b/c.d.JPG"), ("a.b/c", "jpg".into()));
        assert_eq!(split_key("plain"), ("plain", String::new()));
    }
}
