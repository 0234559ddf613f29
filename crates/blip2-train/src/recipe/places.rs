//! Photos of landmarks and cities; one photo of each place that has several is evaluated on.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use blip2::weights::sha256;
use serde::Deserialize;

use super::{Output, names, read_collection, text_path};
use crate::data::Row;
use crate::random::Random;
use crate::{Error, Result};

#[derive(Deserialize)]
struct PlacePhoto {
    image: String,
    place: String,
    view: String,
}

/// The manifests of landmarks and cities.
pub(super) fn write(folder: &Path, seed: u64, output: &mut Output) -> Result<()> {
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
        let hash = sha256(&fs::read(&path).map_err(Error::io(&path))?);
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
