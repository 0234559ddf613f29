//! Portraits of the presidents of the United States.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Output, changed_copies, names, read_collection, text_path};
use crate::data::Row;
use crate::{Error, Result};

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

/// The manifests of the portraits; all are evaluated on, in changed copies.
pub(super) fn write(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
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
