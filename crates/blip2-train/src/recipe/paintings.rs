//! Paintings: what they are called, who painted them and when.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Output, changed_copies, names, read_collection, text_path};
use crate::Result;
use crate::data::Row;

#[derive(Deserialize)]
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

/// The manifests of famous and of other paintings; famous works are evaluated on, in changed copies.
pub(super) fn write(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
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
