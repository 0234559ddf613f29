use image::RgbImage;

use super::*;
use crate::data::{DataConfig, Dataset};

fn line(path: &Path, rows: &[serde_json::Value]) {
    fs::create_dir_all(path.parent().unwrap().join("images")).unwrap();
    let text: Vec<String> = rows.iter().map(ToString::to_string).collect();
    fs::write(path, text.join("\n")).unwrap();
}

fn picture(folder: &Path, name: &str, red: u8) {
    fs::create_dir_all(folder.join("images")).unwrap();
    let picture = RgbImage::from_fn(64, 48, |x, y| image::Rgb([red, x as u8, y as u8]));
    picture.save(folder.join(name)).unwrap();
}

/// A collection of everything, as small as it can be.
fn collection(dir: &Path) -> (PathBuf, PathBuf) {
    use serde_json::json;
    let shared = dir.join("shared");
    for split in ["train", "dev"] {
        let mut rows = Vec::new();
        for i in 0..16u8 {
            let name = format!("images/{split}{i}.png");
            picture(&shared.join("flickr8k"), &name, i);
            let thing = ["A brown dog runs .", "A man rides a horse ."][usize::from(i) % 2];
            rows.push(json!({"image": name, "captions": vec![thing; 5]}));
        }
        line(&shared.join(format!("flickr8k/{split}.jsonl")), &rows);
    }
    let places = shared.join("places");
    for (collection, place) in [("landmarks", "Hadrians Wall"), ("cities", "Paris")] {
        let mut rows = Vec::new();
        for i in 0..4u8 {
            let name = format!("images/{collection}-{i}.png");
            // Two photos are the same file: neither may be kept aside.
            picture(&places, &name, 50 + i.min(2) + if collection == "cities" { 100 } else { 0 });
            rows.push(json!({"image": name, "place": place, "view": format!("view {i}"), "license": "CC0"}));
        }
        line(&places.join(format!("{collection}.jsonl")), &rows);
    }
    let paintings = shared.join("paintings");
    for (name, red) in [("las-meninas", 1), ("the-last-supper", 2), ("supper-again", 3), ("aic-1", 4)] {
        picture(&paintings, &format!("images/{name}.jpg"), red);
    }
    let supper = |name: &str| {
        json!({"image": format!("images/{name}.jpg"), "title": "The Last Supper", "artist": "Leonardo da Vinci",
            "year": 1495, "movement": "Renaissance", "aliases": ["Il Cenacolo"]})
    };
    line(&paintings.join("famous.jsonl"), &["las-meninas", "the-last-supper", "supper-again"].map(supper));
    line(
        &paintings.join("aic.jsonl"),
        &[
            json!({"image": "images/aic-1.jpg", "title": "Paris", "artist": "Italian; Tuscany", "date": "1200"}),
        ],
    );
    let president = |order: &str, full: &str, first: &str, last: &str| {
        json!({"image": format!("images/{order}.jpg"), "Order": order, "Full_Name": full, "First_Name": first,
            "Last_Name": last, "Party": "x"})
    };
    let people = shared.join("people");
    (1..=4).for_each(|i| picture(&people, &format!("images/{i}.jpg"), 200 + i));
    line(
        &people.join("presidents.jsonl"),
        &[
            president("1", "Grover Cleveland", "Grover", "Cleveland"),
            president("2", "James K. Polk", "James", "Polk"),
            president("3", "Grover Cleveland", "Grover", "Cleveland"),
            president("4", "George W. Bush", "George", "Bush"),
        ],
    );
    let easy = dir.join("easy_vqa");
    for split in ["train", "test"] {
        let folder = easy.join("data").join(split);
        picture(&folder, "images/0.png", 9);
        fs::write(
            folder.join("questions.json"),
            r#"[["what color is the shape?", "blue", 0], ["is it red?", "no", 0]]"#,
        )
        .unwrap();
    }
    (shared, easy)
}

#[test]
fn every_manifest_loads_and_nothing_evaluated_is_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let (shared, easy) = collection(dir.path());
    let out = dir.path().join("out");
    let written = prepare_default_data(&shared, Some(&easy), &out, 1).unwrap();
    assert_eq!(written.len(), 2 * 2 + 6 + 5 + 3 + 2);
    let load = |stage: &str| -> Dataset {
        let entries: Vec<DataConfig> = written
            .iter()
            .filter(|file| file.path.parent().unwrap().ends_with(stage))
            .map(|file| DataConfig::new(&file.path))
            .collect();
        Dataset::load(&entries, &out).unwrap()
    };
    let contents = |dataset: &Dataset| -> Vec<Vec<u8>> {
        dataset.images().iter().map(|image| image.source.read().unwrap()).collect()
    };
    let (train, eval) = (load("train"), load("eval"));
    assert!(train.skipped().is_empty() && eval.skipped().is_empty());
    let (mut train_bytes, eval_bytes) = (contents(&train), contents(&eval));
    // The tiny collection uses one picture for both splits of easy-VQA, and the same reds in both of Flickr8k.
    let shared_by_design: Vec<Vec<u8>> = eval
        .images()
        .iter()
        .filter(|image| {
            image.source.to_string().contains("easy_vqa") || image.source.to_string().contains("flickr8k")
        })
        .map(|image| image.source.read().unwrap())
        .collect();
    train_bytes.retain(|bytes| !shared_by_design.contains(bytes));
    assert!(eval_bytes.iter().all(|bytes| !train_bytes.contains(bytes)));
}

#[test]
fn the_same_seed_prepares_the_same_data() {
    let dir = tempfile::tempdir().unwrap();
    let (shared, easy) = collection(dir.path());
    let out = dir.path().join("out");
    let contents = |seed: u64| -> Vec<Vec<u8>> {
        let written = prepare_default_data(&shared, Some(&easy), &out, seed).unwrap();
        written.iter().map(|file| fs::read(&file.path).unwrap()).collect()
    };
    assert_eq!(contents(1), contents(1));
    let kept_aside: std::collections::BTreeSet<Vec<u8>> =
        (0..20).map(|seed| contents(seed)[4].clone()).collect();
    assert_eq!(kept_aside.len(), 2, "either of the two photos that are single files");
}

#[test]
fn rows_say_what_the_pictures_show() {
    let dir = tempfile::tempdir().unwrap();
    let (shared, _) = collection(dir.path());
    let out = dir.path().join("out");
    prepare_default_data(&shared, None, &out, 1).unwrap();
    let rows = |name: &str| read_rows(&out.join(name)).unwrap();

    let landmarks = rows("eval/landmarks.jsonl");
    assert_eq!(landmarks.len(), 1);
    assert_eq!(landmarks[0].answer.as_deref(), Some("Hadrian's Wall."));
    assert!(landmarks[0].names.contains(&"Hadrians Wall".to_owned()));
    assert_eq!(rows("train/landmarks-captions.jsonl").len(), 3);

    let captions = rows("train/famous-paintings-captions.jsonl");
    assert_eq!(captions[0].captions.as_ref().unwrap()[0], "Las Meninas, a painting by Diego Velázquez.");
    assert_eq!(captions[1].group, captions[2].group, "two reproductions of one work");
    assert_ne!(captions[0].group, captions[1].group);
    let others = rows("train/other-paintings-captions.jsonl");
    assert_eq!(others[0].captions.as_ref().unwrap()[0], "Paris, a painting.");
    let copies = rows("eval/paintings.jsonl");
    assert_eq!(copies.len(), 2 * COPIES as usize, "each work once");
    assert!(copies[0].names.contains(&"Diego Velazquez".to_owned()));
    for copy in &copies {
        let decoded = image::open(&copy.image).unwrap().to_rgb8();
        let area = f64::from(decoded.width() * decoded.height()) / (64.0 * 48.0);
        assert!((0.65..=1.0).contains(&area), "{area}");
    }

    let questions = rows("train/presidents-questions.jsonl");
    assert_eq!(
        questions[0].answer.as_deref(),
        Some("Grover Cleveland, the 1st and 3rd president of the United States.")
    );
    let portraits = rows("eval/presidents.jsonl");
    assert_eq!(portraits[5].names, ["James K. Polk", "James Polk"]);
    assert_eq!(portraits[0].names, ["Grover Cleveland"]);
}

#[test]
fn a_missing_collection_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (shared, _) = collection(dir.path());
    fs::remove_file(shared.join("people/presidents.jsonl")).unwrap();
    let message = prepare_default_data(&shared, None, &dir.path().join("out"), 1).unwrap_err().to_string();
    assert!(message.contains("presidents.jsonl"), "{message}");
    let message = prepare_default_data(&dir.path().join("no"), None, &dir.path().join("out"), 1)
        .unwrap_err()
        .to_string();
    assert!(message.contains("no:"), "{message}");
}
