//! The data of the default model: manifests made from the raw collections, the same for the same seed.
//!
//! Training manifests go to `train/`, evaluation ones to `eval/`. What is evaluated is set aside here, before any
//! training: a photo of each place, the test split of easy-VQA, the dev split of Flickr8k; paintings and portraits are
//! evaluated on changed copies (a part of the picture, another brightness, strong compression), written below `eval/`.

mod names;

use crate::data::{Row, hex, read_rows};
use crate::features::Augment;
use crate::questions::{Captioned, questions_from_captions};
use crate::random::Random;
use crate::{Error, Result};
use image::codecs::jpeg::JpegEncoder;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

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
    flickr8k(&shared.join("flickr8k"), seed, &mut output)?;
    places(&shared.join("places"), seed, &mut output)?;
    paintings(&shared.join("paintings"), seed, &mut output)?;
    presidents(&shared.join("people"), seed, &mut output)?;
    if let Some(folder) = easy_vqa {
        easy_vqa_questions(folder, &mut output)?;
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

fn flickr8k(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
    for (split, stage) in [("train", "train"), ("dev", "eval")] {
        let rows = captioned(&folder.join(format!("{split}.jsonl")), folder)?;
        let captions: Vec<Row> = rows
            .iter()
            .map(|row| Row {
                image: row.image.clone(),
                captions: Some(row.captions.clone()),
                ..Row::default()
            })
            .collect();
        output.write(&format!("{stage}/flickr8k-captions.jsonl"), &captions)?;
        output.write(&format!("{stage}/flickr8k-questions.jsonl"), &question_rows(&rows, seed))?;
    }
    Ok(())
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

#[derive(Deserialize)]
struct PlacePhoto {
    image: String,
    place: String,
    view: String,
}

fn places(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
    for (collection, asked) in [
        ("landmarks", ["What place is this?", "What landmark is this?", "What is the name of this place?"]),
        ("cities", ["What place is this?", "What city is this?", "Which city is this?"]),
    ] {
        let photos: Vec<PlacePhoto> = read_collection(&folder.join(format!("{collection}.jsonl")))?;
        let kept_aside = photos_kept_aside(folder, &photos, seed)?;
        let (mut captions, mut questions, mut evaluated) = (Vec::new(), Vec::new(), Vec::new());
        for (index, photo) in photos.iter().enumerate() {
            let image = text_path(&folder.join(&photo.image))?;
            let name = names::place(&photo.place);
            if kept_aside.contains(&index) {
                evaluated.push(Row {
                    image,
                    question: Some(asked[0].to_owned()),
                    answer: Some(format!("{name}.")),
                    names: names::of_place(&photo.place),
                    group: Some(format!("place {name}")),
                    kind: Some(collection.to_owned()),
                    ..Row::default()
                });
                continue;
            }
            let group = Some(format!("place {name}"));
            let mut texts = vec![format!("{name}."), format!("A photo of {name}.")];
            texts.extend(names::view(&photo.view, &photo.place));
            captions.push(Row {
                image: image.clone(),
                captions: Some(texts),
                group: group.clone(),
                ..Row::default()
            });
            questions.extend(asked.iter().map(|question| Row {
                image: image.clone(),
                question: Some((*question).to_owned()),
                answer: Some(format!("{name}.")),
                group: group.clone(),
                kind: Some(collection.to_owned()),
                ..Row::default()
            }));
        }
        output.write(&format!("eval/{collection}.jsonl"), &evaluated)?;
        output.write(&format!("train/{collection}-captions.jsonl"), &captions)?;
        output.write(&format!("train/{collection}-questions.jsonl"), &questions)?;
    }
    Ok(())
}

/// For every place one photo, drawn by the seed, whose bytes are not also another photo's.
fn photos_kept_aside(folder: &Path, photos: &[PlacePhoto], seed: u64) -> Result<Vec<usize>> {
    let mut n_copies: HashMap<String, usize> = HashMap::new();
    let mut hashes = Vec::with_capacity(photos.len());
    for photo in photos {
        let path = folder.join(&photo.image);
        let hash = hex(&Sha256::digest(fs::read(&path).map_err(Error::io(&path))?));
        *n_copies.entry(hash.clone()).or_insert(0) += 1;
        hashes.push(hash);
    }
    let mut of_place: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, photo) in photos.iter().enumerate() {
        of_place.entry(&photo.place).or_default().push(index);
    }
    let mut kept = Vec::new();
    for (place, members) in of_place {
        let mut single: Vec<usize> = members.iter().copied().filter(|&i| n_copies[&hashes[i]] == 1).collect();
        // A place with one photo is trained on, not evaluated.
        if members.len() > 1 && !single.is_empty() {
            let purpose: Vec<u64> = [seed, 0x91ace].into_iter().chain(place.bytes().map(u64::from)).collect();
            Random::new(&purpose).shuffle(&mut single);
            kept.push(single[0]);
        }
    }
    kept.sort_unstable();
    Ok(kept)
}

#[derive(Debug, Clone, Deserialize, Serialize)]
struct Painting {
    image: String,
    title: String,
    artist: String,
    #[serde(default)]
    year: Option<i32>,
    #[serde(default)]
    movement: Option<String>,
    #[serde(default)]
    aliases: Vec<String>,
}

fn paintings(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
    let mut famous: Vec<Painting> = read_collection(&folder.join("famous.jsonl"))?;
    famous.iter_mut().for_each(correct_painting);
    let others: Vec<Painting> = read_collection(&folder.join("aic.jsonl"))?;
    for (collection, paintings) in [("famous-paintings", &famous), ("other-paintings", &others)] {
        let (captions, questions) = painting_rows(folder, paintings)?;
        output.write(&format!("train/{collection}-captions.jsonl"), &captions)?;
        output.write(&format!("train/{collection}-questions.jsonl"), &questions)?;
    }

    let mut works: BTreeMap<&str, &Painting> = BTreeMap::new();
    for painting in &famous {
        works.entry(&painting.title).or_insert(painting);
    }
    let mut evaluated = Vec::new();
    for painting in works.into_values() {
        let mut accepted = vec![painting.title.clone(), painting.artist.clone()];
        accepted.extend(painting.aliases.iter().cloned());
        evaluated.extend(changed_copies(
            &folder.join(&painting.image),
            &output.dir.join("eval/paintings"),
            seed,
            &Row {
                question: Some("What painting is this?".to_owned()),
                answer: Some(format!("{} by {}.", painting.title, painting.artist)),
                names: names::with_plain_letters(accepted),
                group: Some(format!("painting {}", painting.title)),
                kind: Some("painting".to_owned()),
                ..Row::default()
            },
        )?);
    }
    output.write("eval/paintings.jsonl", &evaluated)
}

/// The training rows of paintings: what a caption says of each, and questions with their answers.
fn painting_rows(folder: &Path, paintings: &[Painting]) -> Result<(Vec<Row>, Vec<Row>)> {
    let (mut captions, mut questions) = (Vec::new(), Vec::new());
    for painting in paintings {
        let image = text_path(&folder.join(&painting.image))?;
        let title = names::title(&painting.title);
        let artist = names::artist(&painting.artist);
        // Two reproductions of one work are not each other's negatives.
        let group = Some(format!("painting {title} {}", artist.unwrap_or("unknown")));
        let (texts, answers) = describe_painting(painting, &title, artist);
        captions.push(Row {
            image: image.clone(),
            captions: Some(texts),
            group: group.clone(),
            ..Row::default()
        });
        questions.extend(answers.into_iter().map(|(question, answer)| Row {
            image: image.clone(),
            question: Some(question.to_owned()),
            answer: Some(answer),
            group: group.clone(),
            kind: Some("painting".to_owned()),
            ..Row::default()
        }));
    }
    Ok((captions, questions))
}

/// The collection labels one picture wrongly: `las-meninas.jpg` shows Las Meninas, its row says The Last Supper.
fn correct_painting(painting: &mut Painting) {
    if painting.image.ends_with("las-meninas.jpg") && painting.title == "The Last Supper" {
        painting.title = "Las Meninas".to_owned();
        painting.artist = "Diego Velázquez".to_owned();
        painting.year = Some(1656);
        painting.movement = Some("Baroque".to_owned());
        painting.aliases = vec!["Meninas".to_owned(), "The Ladies-in-Waiting".to_owned()];
    }
}

fn describe_painting(
    painting: &Painting,
    title: &str,
    artist: Option<&str>,
) -> (Vec<String>, Vec<(&'static str, String)>) {
    let kind = match title {
        "Vitruvian Man" => "drawing",
        "The Great Wave off Kanagawa" => "woodblock print",
        "The Creation of Adam" => "fresco",
        _ => "painting",
    };
    let Some(artist) = artist else {
        let texts = vec![format!("{title}, a {kind}."), format!("A {kind}: {title}.")];
        return (texts, vec![("What is the title of this painting?", format!("{title}."))]);
    };
    let texts = vec![
        format!("{title}, a {kind} by {artist}."),
        format!("{title} by {artist}."),
        format!("A {kind} by {artist}: {title}."),
    ];
    let mut answers = vec![
        ("What painting is this?", format!("{title} by {artist}.")),
        ("What is the title of this painting?", format!("{title}.")),
        ("Who painted this?", format!("{artist}.")),
        ("Which artist made this?", format!("{artist}.")),
    ];
    if let Some(year) = painting.year {
        answers.push(("When was this painted?", format!("In {year}.")));
    }
    if let Some(movement) = &painting.movement {
        answers.push(("What style is this painting?", format!("{movement}.")));
    }
    (texts, answers)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct President {
    #[serde(rename = "image")]
    image: String,
    order: String,
    #[serde(rename = "Full_Name")]
    full_name: String,
    #[serde(rename = "First_Name")]
    first_name: String,
    #[serde(rename = "Last_Name")]
    last_name: String,
}

fn presidents(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
    let path = folder.join("presidents.jsonl");
    let presidents: Vec<President> = read_collection(&path)?;
    // Who was elected again after another is one man with two numbers.
    let mut numbers: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut short_names: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for president in &presidents {
        let order = president
            .order
            .parse()
            .map_err(|_| Error::file(&path, format!("`Order` of {} is not a number", president.full_name)))?;
        numbers.entry(&president.full_name).or_default().push(names::ordinal(order));
        let holders =
            short_names.entry(format!("{} {}", president.first_name, president.last_name)).or_default();
        if !holders.contains(&president.full_name.as_str()) {
            holders.push(&president.full_name);
        }
    }
    let (mut captions, mut questions, mut evaluated) = (Vec::new(), Vec::new(), Vec::new());
    for president in &presidents {
        let name = &president.full_name;
        let office = format!("the {} president of the United States", numbers[name.as_str()].join(" and "));
        let group = Some(format!("president {name}"));
        let image = text_path(&folder.join(&president.image))?;
        captions.push(Row {
            image: image.clone(),
            captions: Some(vec![
                format!("{name}, {office}."),
                format!("A portrait of {name}."),
                format!("A portrait of {name}, {office}."),
            ]),
            group: group.clone(),
            ..Row::default()
        });
        for (question, answer) in [
            ("Who is this?", format!("{name}, {office}.")),
            ("Who is the person in this portrait?", format!("{name}.")),
            ("Which president is this?", format!("{name}.")),
        ] {
            questions.push(Row {
                image: image.clone(),
                question: Some(question.to_owned()),
                answer: Some(answer),
                group: group.clone(),
                kind: Some("president".to_owned()),
                ..Row::default()
            });
        }
        let mut accepted = vec![name.clone()];
        let short = format!("{} {}", president.first_name, president.last_name);
        if short_names[&short].len() == 1 && short != *name {
            accepted.push(short);
        }
        evaluated.extend(changed_copies(
            &folder.join(&president.image),
            &output.dir.join("eval/presidents"),
            seed,
            &Row {
                question: Some("Who is this?".to_owned()),
                answer: Some(format!("{name}, {office}.")),
                names: accepted,
                group,
                kind: Some("president".to_owned()),
                ..Row::default()
            },
        )?);
    }
    output.write("train/presidents-captions.jsonl", &captions)?;
    output.write("train/presidents-questions.jsonl", &questions)?;
    output.write("eval/presidents.jsonl", &evaluated)
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

/// The questions of easy-VQA, `[question, answer, picture number]` in `questions.json` of each split.
fn easy_vqa_questions(folder: &Path, output: &mut Output) -> Result<()> {
    let inner = folder.join("data");
    let folder = absolute(if inner.is_dir() { &inner } else { folder })?;
    for (split, stage) in [("train", "train"), ("test", "eval")] {
        let path = folder.join(split).join("questions.json");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let questions: Vec<(String, String, u64)> = serde_json::from_str(&text)
            .map_err(|error| Error::file(&path, format!("is not the question file of easy-VQA: {error}")))?;
        let rows: Vec<Row> = questions
            .into_iter()
            .map(|(question, answer, number)| {
                let image = text_path(&folder.join(split).join("images").join(format!("{number}.png")))?;
                let kind = if answer == "yes" || answer == "no" { "yes/no" } else { "shape or color" };
                Ok(Row {
                    image,
                    question: Some(question),
                    answer: Some(answer),
                    kind: Some(kind.to_owned()),
                    ..Row::default()
                })
            })
            .collect::<Result<_>>()?;
        output.write(&format!("{stage}/easy-vqa.jsonl"), &rows)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
