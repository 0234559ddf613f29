//! `blip2 eval` on tiny random models in Hugging Face folders.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value as Json, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

/// Runs `blip2 eval TASK MANIFEST --model MODEL --json` in `folder`.
fn eval(folder: &Path, task: &str, manifest: &str, model: &str, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(["eval", task, manifest, "--json", "--model"]).arg(golden(model)).args(more);
    command.current_dir(folder).output().expect("the command runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn report(output: &Output) -> Json {
    assert!(output.status.success(), "{}", said(output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// One photo as eight cameras write it: the same pixels, each with another note of which side is up.
const PICTURES: [&str; 8] = ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg", "7.jpg", "8.jpg"];

/// A folder with the pictures.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let text = std::fs::read_to_string(golden("pictures.json")).expect("readable");
    let pictures: Json = serde_json::from_str(&text).expect("JSON");
    for (name, orientation) in PICTURES.iter().zip(1..) {
        let golden = &pictures[format!("jpeg_orientation_{orientation}")];
        let digits = golden["file"].as_str().expect("a file");
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("a byte");
        let bytes: Vec<u8> = (0..digits.len()).step_by(2).map(byte).collect();
        std::fs::write(dir.path().join(name), bytes).expect("written");
    }
    dir
}

fn write_rows(folder: &Path, name: &str, rows: impl IntoIterator<Item = Json>) {
    let lines: String = rows.into_iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(folder.join(name), lines).expect("written");
}

/// A manifest of all pictures, each with a caption of its own.
fn captioned(folder: &Path) {
    const CAPTIONS: [&str; 8] = [
        "a cat dog",
        "cat the two",
        "dog two on",
        "on cat running",
        "the on dog",
        "sofa running red",
        "red dog cat",
        "two red a",
    ];
    let rows = PICTURES.iter().zip(CAPTIONS);
    write_rows(folder, "captions.jsonl", rows.map(|(image, text)| json!({"image": image, "caption": text})));
}

/// What the model wrote, by row.
fn predictions(folder: &Path, name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join(name)).expect("predictions");
    let rows = text.lines().map(|line| serde_json::from_str::<Json>(line).expect("JSON"));
    rows.map(|row| row["prediction"].as_str().expect("a text").to_owned()).collect()
}

/// To transformers and LAVIS the eight pictures are one; to a person they are not.
#[test]
fn presets_decide_how_the_pictures_are_read() {
    let dir = folder();
    captioned(dir.path());
    let found = |preset: &[&str]| {
        let more = [&["--rerank", "none"][..], preset].concat();
        report(&eval(dir.path(), "retrieval", "captions.jsonl", "blip2_itm", &more))["itc"]["image"].clone()
    };
    // Answers that tie rank last.
    for preset in ["hf", "lavis"] {
        assert_eq!(found(&["--preset", preset])["at_5"], 0.0);
    }
    assert!(found(&[])["at_5"].as_f64().expect("a number") > 0.0);

    let captions = |preset: &[&str]| {
        let greedy = ["--num-beams", "1", "--max-new-tokens", "12", "--out", "said.jsonl"];
        report(&eval(dir.path(), "captions", "captions.jsonl", "blip2_opt", &[&greedy, preset].concat()));
        predictions(dir.path(), "said.jsonl")
    };
    let (hf, own) = (captions(&["--preset", "hf"]), captions(&[]));
    assert!(hf.iter().all(|caption| *caption == hf[0]), "{hf:?}");
    assert!(own.iter().any(|caption| *caption != own[0]), "{own:?}");
}
