//! The data of the default model: manifests made from the raw collections, the same for the same seed.
//!
//! Training manifests go to `train/`, evaluation ones to `eval/`. What is evaluated is set aside here, before any
//! training: a photo of each place, the test split of easy-VQA, the dev split of Flickr8k; paintings and portraits are
//! evaluated on changed copies (a part of the picture, another brightness, strong compression), written below `eval/`.

mod easy_vqa;
mod flickr8k;
mod names;
mod paintings;
mod places;
mod presidents;

use std::fs;
use std::path::{Path, PathBuf};

use image::codecs::jpeg::JpegEncoder;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::data::{Row, read_rows};
use crate::features::Augment;
use crate::questions::{Captioned, questions_from_captions};
use crate::random::Random;
use crate::{Error, Result};

/// A manifest that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The file.
    pub path: PathBuf,
    /// Its rows.
    pub n_rows: usize,
}

/// Changed copies of each painting and portrait to evaluate on.
const COPIES: u64 = 5;

/// What is done to a copy: 70–100 % of the area, nearly the same shape, never mirrored, brightness ±20 %.
const COPY: Augment = Augment { scale: [0.7, 1.0], ratio: [0.9, 1.1], flip: 0.0, brightness: 0.2 };

/// How strongly a copy is compressed.
const COPY_JPEG_QUALITY: u8 = 50;

/// Writes all manifests of the default model below `out`.
///
/// `shared` holds `flickr8k/`, `places/`, `paintings/` and `people/`; `easy_vqa` is the data folder of the easy-VQA
/// Python package (or the package's own folder). Pictures stay where they are: the manifests name them by absolute
/// paths.
///
/// # Errors
/// [`Error::Io`] and [`Error::Manifest`] for collections that are missing or cannot be read, [`Error::File`] for a
/// painting or portrait that does not decode.
pub fn prepare_default_data(
    shared: &Path,
    easy_vqa: Option<&Path>,
    out: &Path,
    seed: u64,
) -> Result<Vec<Written>> {
    let shared = fs::canonicalize(shared).map_err(Error::io(shared))?;
    let mut output = Output { dir: out.to_path_buf(), written: Vec::new() };
    flickr8k::write(&shared.join("flickr8k"), seed, &mut output)?;
    places::write(&shared.join("places"), seed, &mut output)?;
    paintings::write(&shared.join("paintings"), seed, &mut output)?;
    presidents::write(&shared.join("people"), seed, &mut output)?;
    if let Some(folder) = easy_vqa {
        easy_vqa::write(folder, &mut output)?;
    }
    Ok(output.written)
}

/// Rule-made questions for every captioned row of a manifest, written to another.
///
/// # Errors
/// [`Error::Manifest`] for a row that cannot be understood, [`Error::Io`] when a file cannot be read or written.
pub fn write_questions(captions: &Path, questions: &Path, seed: u64) -> Result<Written> {
    let folder = absolute(captions.parent().unwrap_or(Path::new("")))?;
    let rows = question_rows(&captioned(captions, &folder)?, seed);
    write_rows(questions, &rows)
}

struct Output {
    dir: PathBuf,
    written: Vec<Written>,
}

impl Output {
    fn write(&mut self, name: &str, rows: &[Row]) -> Result<()> {
        let written = write_rows(&self.dir.join(name), rows)?;
        self.written.push(written);
        Ok(())
    }
}

fn write_rows(path: &Path, rows: &[Row]) -> Result<Written> {
    let folder = path.parent().unwrap_or(Path::new(""));
    if !folder.as_os_str().is_empty() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let mut text = String::new();
    for row in rows {
        text += &serde_json::to_string(row).expect("strings serialise");
        text.push('\n');
    }
    fs::write(path, text).map_err(Error::io(path))?;
    Ok(Written { path: path.to_path_buf(), n_rows: rows.len() })
}

fn absolute(path: &Path) -> Result<PathBuf> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    fs::canonicalize(path).map_err(Error::io(path))
}

/// A manifest names pictures in UTF-8.
fn text_path(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .ok_or_else(|| Error::file(path, "is not UTF-8, so a manifest cannot name it: rename it"))?;
    Ok(text.to_owned())
}

fn captioned(path: &Path, folder: &Path) -> Result<Vec<Captioned>> {
    read_rows(path)?
        .into_iter()
        .filter_map(|row| {
            let captions = row.captions.or(row.caption.map(|caption| vec![caption]))?;
            Some(text_path(&folder.join(row.image)).map(|image| Captioned { image, captions }))
        })
        .collect()
}

fn question_rows(rows: &[Captioned], seed: u64) -> Vec<Row> {
    questions_from_captions(rows, seed)
        .into_iter()
        .map(|row| Row {
            image: row.image,
            question: Some(row.question),
            answer: Some(row.answer),
            kind: Some(row.kind),
            ..Row::default()
        })
        .collect()
}

/// The rows of a collection that is described by other fields than a training manifest.
fn read_collection<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|error| Error::Manifest {
                path: path.to_path_buf(),
                line: number + 1,
                reason: error.to_string(),
            })
        })
        .collect()
}

/// Writes changed copies of a picture to `folder` and returns `row` for each of them.
fn changed_copies(picture: &Path, folder: &Path, seed: u64, row: &Row) -> Result<Vec<Row>> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let bytes = fs::read(picture).map_err(Error::io(picture))?;
    let whole =
        image::load_from_memory(&bytes).map_err(|error| Error::file(picture, error.to_string()))?.to_rgb8();
    let content = u64::from_le_bytes(Sha256::digest(&bytes)[..8].try_into().expect("eight bytes"));
    let stem = picture.file_stem().unwrap_or_default().to_string_lossy();
    let mut rows = Vec::new();
    for number in 1..=COPIES {
        let copy = COPY.apply(&whole, Random::new(&[seed, 0xc0b1e5, content, number]).next_u64());
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, COPY_JPEG_QUALITY)
            .encode_image(&copy)
            .map_err(|error| Error::file(picture, error.to_string()))?;
        let path = folder.join(format!("{stem}-{number}.jpg"));
        fs::write(&path, jpeg).map_err(Error::io(&path))?;
        rows.push(Row { image: text_path(&absolute(&path)?)?, ..row.clone() });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests;
