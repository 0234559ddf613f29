//! A folder of pictures, each with a `.txt` of the same name beside it, one caption a line.

use std::path::{Path, PathBuf};

use super::{Builder, ImageSource, Text};
use crate::{Error, Result};

/// Extensions that are taken for pictures, in folders and in tar shards.
pub(super) const PICTURE_EXTENSIONS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

/// The extension in lower case.
pub(super) fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

/// The pictures of a folder and, where `recursive`, of its subfolders, in the order of names; links to folders are not followed.
///
/// # Errors
/// [`Error::Io`] when a folder cannot be listed.
pub fn pictures(path: &Path, recursive: bool) -> Result<Vec<PathBuf>> {
    let mut entries: Vec<(PathBuf, std::fs::FileType)> = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        entries.push((entry.path(), entry.file_type().map_err(Error::io(path))?));
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let mut found = Vec::new();
    for (path, kind) in entries {
        if kind.is_dir() {
            if recursive {
                found.extend(pictures(&path, true)?);
            }
        } else if PICTURE_EXTENSIONS.contains(&extension(&path).as_str()) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Reads a folder and its subfolders.
pub(super) fn read(path: &Path, builder: &mut Builder) -> Result<()> {
    for path in pictures(path, true)? {
        let text_path = path.with_extension("txt");
        match std::fs::read(&text_path) {
            Ok(bytes) => match captions(&bytes) {
                Ok(captions) => {
                    builder.add(ImageSource::File(path), None, Text::Captions(captions), Vec::new())
                }
                Err(reason) => return Err(Error::file(&text_path, reason)),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                builder.skip(path.display().to_string(), "has no .txt beside it");
            }
            Err(source) => return Err(Error::Io { path: text_path, source }),
        }
    }
    Ok(())
}

/// The non-empty lines of a text file.
pub(super) fn captions(bytes: &[u8]) -> std::result::Result<Vec<String>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| format!("is not UTF-8: {error}"))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let captions: Vec<String> =
        text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
    if captions.is_empty() { Err("holds no caption".to_owned()) } else { Ok(captions) }
}

#[cfg(test)]
mod tests {
    use super::super::{DataConfig, Dataset, Text};
    use std::fs;

    #[test]
    fn pictures_with_text_are_read_in_order_and_others_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        for (name, content) in [
            ("b.PNG", "b"),
            ("b.txt", "\u{feff}second\n\n  again \n"),
            ("a.jpg", "a"),
            ("a.txt", "first"),
            ("c.jpg", "c"),
            ("notes.md", "x"),
            ("sub/d.webp", "d"),
            ("sub/d.txt", "third\r\n"),
        ] {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let dataset = Dataset::load(&[DataConfig::new("")], dir.path()).unwrap();
        let texts: Vec<&Text> = dataset.samples().iter().map(|sample| &sample.text).collect();
        let captions = |texts: &[&str]| Text::Captions(texts.iter().map(|&t| t.to_owned()).collect());
        assert_eq!(texts, [&captions(&["first"]), &captions(&["second", "again"]), &captions(&["third"])]);
        assert_eq!(dataset.skipped().len(), 1);
        assert!(dataset.skipped()[0].name.ends_with("c.jpg"));

        fs::write(dir.path().join("a.txt"), b"\xff").unwrap();
        let message = Dataset::load(&[DataConfig::new("")], dir.path()).unwrap_err().to_string();
        assert!(message.contains("a.txt: is not UTF-8"), "{message}");
    }
}
