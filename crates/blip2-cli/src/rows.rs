//! A file of captions that grows: JSON lines, which are a training manifest, or CSV.

use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::generation::WrongUsage;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Jsonl,
    Csv,
}

/// Makes sure that there can be a file, before hours are spent on what it is to hold; nothing is left there.
///
/// # Errors
/// When its folder cannot be written to, or is none.
pub(crate) fn check_writable(path: &Path) -> anyhow::Result<()> {
    if path.is_dir() {
        bail!("cannot write {}: it is a folder", path.display());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A file without a name is gone whatever happens.
    let file = tempfile::tempfile_in(folder);
    file.map(drop).with_context(|| format!("cannot write {}", path.display()))
}

/// What a row of JSON lines says; the names are those of a training manifest.
#[derive(Serialize, Deserialize)]
struct JsonRow {
    image: String,
    captions: Vec<String>,
    /// How well each caption fits the picture, where that was measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    scores: Vec<f32>,
}

/// A row of a CSV file, one caption each.
#[derive(Serialize, Deserialize)]
struct CsvRow {
    image: String,
    caption: String,
}

/// The file, the pictures that it has, and the rows that it is to get.
pub(crate) struct RowsFile {
    path: PathBuf,
    /// Where the file is; pictures are named relative to it.
    folder: PathBuf,
    /// There is none before its first row: what fails until then leaves nothing.
    file: Option<File>,
    layout: Layout,
    /// What is in the file goes when the first rows come.
    replaces: bool,
    has: HashSet<String>,
    unsaved: Vec<u8>,
}

impl RowsFile {
    /// Opens the file for adding to it, or makes sure that there can be one. A row that was cut short, by a crash or a full
    /// disk, is taken out. With `overwrite` what is there is replaced when the first rows are written.
    ///
    /// # Errors
    /// When the name ends in neither `.jsonl` nor `.csv`, the file holds something else, or another process writes it.
    pub(crate) fn open(path: &Path, overwrite: bool) -> anyhow::Result<Self> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        let layout = match extension.as_deref() {
            Some("jsonl") => Layout::Jsonl,
            Some("csv") => Layout::Csv,
            _ => {
                return WrongUsage::end(format!(
                    "--out {}: the name must end in .jsonl or .csv",
                    path.display()
                ));
            }
        };
        let cannot = || format!("cannot write {}", path.display());
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = std::fs::canonicalize(folder).with_context(cannot)?;
        let mut rows = Self {
            path: path.to_owned(),
            folder,
            file: None,
            layout,
            replaces: overwrite,
            has: HashSet::new(),
            unsaved: Vec::new(),
        };
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => {
                rows.lock(&file)?;
                if !overwrite {
                    rows.has = rows.read(&file)?;
                }
                rows.file = Some(file);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => check_writable(path)?,
            Err(error) => return Err(error).with_context(cannot),
        }
        Ok(rows)
    }

    fn lock(&self, file: &File) -> anyhow::Result<()> {
        match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => bail!("another process is writing {}", self.path.display()),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| self.cannot()),
        }
    }

    fn cannot(&self) -> String {
        format!("cannot write {}", self.path.display())
    }

    /// The pictures that the file has; it is left at its end, behind a whole row.
    fn read(&self, mut file: &File) -> anyhow::Result<HashSet<String>> {
        let path = &self.path;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| self.cannot())?;
        // Every row ends with a newline, and a caption has none.
        let n_whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let has = match self.layout {
            Layout::Jsonl => json_pictures(path, &bytes[..n_whole])?,
            Layout::Csv => csv_pictures(path, &bytes[..n_whole])?,
        };
        if n_whole < bytes.len() {
            // A file without any whole row may be anything: it is not ours to cut.
            if n_whole == 0 {
                bail!("{} does not hold captions: give --out another name, or --overwrite", path.display());
            }
            file.set_len(n_whole as u64).with_context(|| self.cannot())?;
        }
        Ok(has)
    }

    /// Whether it has a row of this picture.
    pub(crate) fn has(&self, picture: &Path) -> bool {
        self.name(picture).is_ok_and(|name| self.has.contains(&name))
    }

    /// Adds a picture's row, to be written by [`save`](Self::save); only JSON lines have the scores.
    ///
    /// # Errors
    /// When the picture's name is not UTF-8.
    pub(crate) fn push(
        &mut self,
        picture: &Path,
        captions: Vec<String>,
        scores: Vec<f32>,
    ) -> anyhow::Result<()> {
        let image = self.name(picture)?;
        match self.layout {
            Layout::Jsonl => {
                serde_json::to_writer(
                    &mut self.unsaved,
                    &JsonRow { image: image.clone(), captions, scores },
                )?;
                self.unsaved.push(b'\n');
            }
            Layout::Csv => {
                let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(&mut self.unsaved);
                for caption in captions {
                    writer.serialize(CsvRow { image: image.clone(), caption })?;
                }
                writer.flush()?;
            }
        }
        self.has.insert(image);
        Ok(())
    }

    /// Writes the rows that were added, to the disk; with the first of them the file is made, or what is in it replaced.
    ///
    /// # Errors
    /// When that fails; rows that did not fit are not begun.
    pub(crate) fn save(&mut self) -> anyhow::Result<()> {
        if self.unsaved.is_empty() {
            return Ok(());
        }
        let is_new = self.file.is_none();
        if is_new {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&self.path);
            let file = file.with_context(|| self.cannot())?;
            self.lock(&file)?;
            if file.metadata().with_context(|| self.cannot())?.len() > 0 {
                bail!("another process has written {} meanwhile", self.path.display());
            }
            self.file = Some(file);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let rows = std::mem::take(&mut self.unsaved);
        let header = if self.layout == Layout::Csv { &b"image,caption\n"[..] } else { b"" };
        let mut write = || {
            if std::mem::take(&mut self.replaces) {
                file.set_len(0)?;
            }
            let before = file.seek(SeekFrom::End(0))?;
            let begun = if before == 0 { file.write_all(header) } else { Ok(()) };
            let written = begun.and_then(|()| file.write_all(&rows)).and_then(|()| file.sync_data());
            if written.is_err() {
                // The reason is the one to report.
                let _ = file.set_len(before);
            }
            written
        };
        let written = write();
        if written.is_err() && is_new {
            // Empty again, and there was none before.
            let _ = std::fs::remove_file(&self.path);
        }
        written.with_context(|| self.cannot())
    }

    /// Takes out what was to be replaced, where there is no row in its place.
    ///
    /// # Errors
    /// When that fails.
    pub(crate) fn replace_by_nothing(&mut self) -> anyhow::Result<()> {
        let Some(file) = self.file.as_ref().filter(|_| self.replaces) else { return Ok(()) };
        self.replaces = false;
        file.set_len(0).and_then(|()| file.sync_data()).with_context(|| self.cannot())
    }

    /// How the file names a picture: relative to itself where the picture is below it.
    fn name(&self, picture: &Path) -> anyhow::Result<String> {
        let whole = std::fs::canonicalize(picture).unwrap_or_else(|_| picture.to_owned());
        let name = whole.strip_prefix(&self.folder).unwrap_or(&whole);
        let name = name.to_str().ok_or_else(|| {
            anyhow!("the name of {} is not UTF-8, so a row cannot have it: rename it", picture.display())
        })?;
        Ok(name.to_owned())
    }
}

fn json_pictures(path: &Path, bytes: &[u8]) -> anyhow::Result<HashSet<String>> {
    let mut pictures = HashSet::new();
    for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let row: JsonRow = serde_json::from_slice(line).with_context(|| {
            let line = number + 1;
            format!(
                "{}, line {line} is not a picture with captions: give --out another name, or --overwrite",
                path.display()
            )
        })?;
        pictures.insert(row.image);
    }
    Ok(pictures)
}

fn csv_pictures(path: &Path, bytes: &[u8]) -> anyhow::Result<HashSet<String>> {
    csv::Reader::from_reader(bytes)
        .deserialize()
        .map(|row: csv::Result<CsvRow>| Ok(row?.image))
        .collect::<csv::Result<_>>()
        .with_context(|| {
            format!("{} does not hold captions: give --out another name, or --overwrite", path.display())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, "x").unwrap();
        path
    }

    fn add(path: &Path, picture: &Path, caption: &str) {
        let mut rows = RowsFile::open(path, false).unwrap();
        assert!(!rows.has(picture));
        rows.push(picture, vec![caption.into()], Vec::new()).unwrap();
        rows.save().unwrap();
        assert!(rows.has(picture));
    }

    #[test]
    fn what_was_cut_short_is_written_again_and_the_rest_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (picture(dir.path(), "a, \"1\".jpg"), picture(dir.path(), "b.jpg"));
        for name in ["rows.jsonl", "rows.csv"] {
            let path = dir.path().join(name);
            add(&path, &a, "a dog, \"Rex\"");
            let kept = std::fs::read(&path).unwrap();
            add(&path, &b, "a cat");
            let whole = std::fs::read(&path).unwrap();
            for cut in kept.len()..whole.len() {
                std::fs::write(&path, &whole[..cut]).unwrap();
                let rows = RowsFile::open(&path, false).unwrap();
                assert!(rows.has(&a) && !rows.has(&b), "{name} {cut}");
                drop(rows);
                assert_eq!(std::fs::read(&path).unwrap(), kept);
            }
            add(&path, &b, "a cat");
            assert_eq!(std::fs::read(&path).unwrap(), whole);
            let mut rows = RowsFile::open(&path, true).unwrap();
            assert!(!rows.has(&a));
            rows.push(&a, vec!["another".into()], Vec::new()).unwrap();
            rows.save().unwrap();
        }
        let manifest = blip2_train::data::read_rows(&dir.path().join("rows.jsonl")).unwrap();
        assert_eq!(manifest[0].image, "a, \"1\".jpg");
        assert_eq!(manifest[0].captions.as_deref(), Some(&["another".to_owned()][..]));
    }

    #[test]
    fn files_of_others_are_left_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("a.jsonl", "{\"url\": 1}\n"),
            ("b.csv", "x,y\n1,2\n"),
            ("c.jsonl", "no newline"),
            ("d.csv", "one"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            let message = format!("{:#}", RowsFile::open(&path, false).err().expect("refused"));
            assert!(message.contains("--overwrite") && message.contains(name), "{message}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
        let message = RowsFile::open(&dir.path().join("rows.txt"), false).err().expect("refused").to_string();
        assert!(message.contains(".jsonl or .csv"), "{message}");
    }

    #[test]
    fn a_file_that_is_being_written_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let picture = picture(dir.path(), "a.jpg");
        let row = |rows: &mut RowsFile| {
            rows.push(&picture, vec!["a".into()], Vec::new())?;
            rows.save()
        };
        let (mut first, mut second) =
            (RowsFile::open(&path, false).unwrap(), RowsFile::open(&path, false).unwrap());
        row(&mut first).unwrap();
        for message in [
            row(&mut second).expect_err("refused").to_string(),
            RowsFile::open(&path, false).err().expect("refused").to_string(),
        ] {
            assert!(message.contains("another process"), "{message}");
        }
    }

    #[test]
    fn nothing_is_there_before_the_first_row_and_nothing_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let picture = picture(dir.path(), "a.jpg");
        for name in ["rows.jsonl", "rows.csv"] {
            let path = dir.path().join(name);
            RowsFile::open(&path, false).unwrap().save().unwrap();
            RowsFile::open(&path, true).unwrap();
            assert!(!path.exists(), "{name}");
            add(&path, &picture, "old");
            let before = std::fs::read(&path).unwrap();
            let mut rows = RowsFile::open(&path, true).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), before);
            rows.push(&picture, vec!["new".into()], Vec::new()).unwrap();
            rows.save().unwrap();
            drop(rows);
            let after = std::fs::read_to_string(&path).unwrap();
            assert_eq!(after, String::from_utf8(before).unwrap().replace("old", "new"));
            let mut rows = RowsFile::open(&path, true).unwrap();
            rows.save().unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after, "no row came");
            rows.replace_by_nothing().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"");
            rows.push(&picture, vec!["old".into()], Vec::new()).unwrap();
            rows.save().unwrap();
            rows.replace_by_nothing().unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after.replace("new", "old"));
        }
    }
}
