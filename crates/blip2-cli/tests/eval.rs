//! `blip2 eval` on tiny random models in Hugging Face folders.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value as Json, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

/// Runs `blip2 eval TASK MANIFEST --model MODEL` in `folder`.
fn eval(folder: &Path, task: &str, manifest: &str, model: &str, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(["eval", task, manifest, "--model"]).arg(golden(model)).args(more);
    command.current_dir(folder).output().expect("the command runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn printed(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8")
}

/// The numbers of a measurement that went well, as JSON.
fn report(folder: &Path, task: &str, manifest: &str, model: &str, more: &[&str]) -> Json {
    let output = eval(folder, task, manifest, model, &[&["--json"], more].concat());
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_str(printed(&output)).expect("JSON")
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

/// A caption for each picture.
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

/// Writes the captions as a manifest.
fn captioned(folder: &Path) {
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
        let more = [&["--rerank", "none"], preset].concat();
        report(dir.path(), "retrieval", "captions.jsonl", "blip2_itm", &more)["itc"]["image"].clone()
    };
    // Answers that tie rank last.
    for preset in ["hf", "lavis"] {
        assert_eq!(found(&["--preset", preset])["at_5"], 0.0);
    }
    assert!(found(&[])["at_5"].as_f64().expect("a number") > 0.0);

    let captions = |preset: &[&str]| {
        let greedy = ["--num-beams", "1", "--max-new-tokens", "12", "--out", "said.jsonl"];
        let more = [&greedy[..], preset].concat();
        report(dir.path(), "captions", "captions.jsonl", "blip2_opt", &more);
        predictions(dir.path(), "said.jsonl")
    };
    let (hf, own) = (captions(&["--preset", "hf"]), captions(&[]));
    assert!(hf.iter().all(|caption| *caption == hf[0]), "{hf:?}");
    assert!(own.iter().any(|caption| *caption != own[0]), "{own:?}");
}

/// What orders the candidates, and how many there are, is said with the scores.
#[test]
fn retrieval_says_what_it_re_ranked_by() {
    let dir = folder();
    captioned(dir.path());
    let table = |more: &[&str]| {
        let output = eval(dir.path(), "retrieval", "captions.jsonl", "blip2_itm", more);
        assert!(output.status.success(), "{}", said(&output));
        printed(&output).to_owned()
    };
    let label = |table: &str| table.lines().nth(3).map(|line| line[..12].trim_end().to_owned());
    assert_eq!(label(&table(&[])).as_deref(), Some("ITC+ITM 16"));
    assert_eq!(label(&table(&["--rerank", "itm", "--candidates", "3"])).as_deref(), Some("ITM 3"));
    assert_eq!(label(&table(&["--rerank", "none"])), None);
    let json = |more: &[&str]| report(dir.path(), "retrieval", "captions.jsonl", "blip2_itm", more);
    let (sum, none) = (json(&["--candidates", "128"]), json(&["--rerank", "none"]));
    assert_eq!((&sum["rerank"], &sum["candidates"]), (&json!("sum"), &json!(128)));
    assert!(sum["reranked"]["text"]["at_10"].is_number(), "{sum}");
    assert_eq!((&none["rerank"], &none["candidates"]), (&json!("none"), &Json::Null));
    assert_eq!((&none["reranked"], &none["itc"]), (&Json::Null, &sum["itc"]));
}

/// Each picture is matched with its own caption and with the one before; what was said is what the shares are of.
#[test]
fn matching_says_what_is_told_right() {
    let dir = folder();
    captioned(dir.path());
    let found = report(dir.path(), "matching", "captions.jsonl", "blip2_itm", &["--out", "said.jsonl"]);
    let n = PICTURES.len();
    assert_eq!((&found["pictures"], &found["texts_of_others"]), (&json!(n), &json!(n - 1)));
    let text = std::fs::read_to_string(dir.path().join("said.jsonl")).expect("pairs");
    let pairs: Vec<Json> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(pairs.len(), 2 * n - 1);
    for is_own in [true, false] {
        let some: Vec<&Json> = pairs.iter().filter(|pair| pair["own"] == is_own).collect();
        let right = some.iter().filter(|pair| (pair["itm_probability"].as_f64() > Some(0.5)) == is_own);
        let share = found[if is_own { "own" } else { "others" }].as_f64().expect("a share");
        assert!((share - 100.0 * right.count() as f64 / some.len() as f64).abs() < 1e-9, "{found}");
    }
    // The second picture's pairs, in the captions' order.
    assert_eq!((&pairs[1]["image"], &pairs[1]["text"]), (&json!(PICTURES[1]), &json!(CAPTIONS[1])));
    assert_eq!((&pairs[2]["image"], &pairs[2]["text"]), (&json!(PICTURES[1]), &json!(CAPTIONS[0])));
}

/// Asserts that it failed with a last line that holds all of `words`, and printed nothing.
fn refused(output: &Output, words: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(printed(output), "");
    let last = said.trim_end().lines().last().unwrap_or_default();
    words.iter().for_each(|word| assert!(last.contains(word), "`{word}` is not in: {said}"));
}

#[test]
fn nothing_to_measure_on_is_an_error() {
    let dir = folder();
    let tasks = [("captions", "blip2_opt"), ("questions", "blip2_opt"), ("retrieval", "blip2_itm")];
    std::fs::write(dir.path().join("empty.jsonl"), "\n").expect("written");
    std::fs::write(dir.path().join("text.jpg"), "no picture").expect("written");
    let unreadable = ["absent.jpg", "text.jpg"];
    let captions = unreadable.map(|image| json!({"image": image, "caption": "a cat"}));
    let questions = unreadable.map(|image| json!({"image": image, "question": "What?", "answer": "a cat"}));
    write_rows(dir.path(), "unreadable-captions.jsonl", captions);
    write_rows(dir.path(), "questions.jsonl", questions);
    for (task, model) in tasks {
        let empty = eval(dir.path(), task, "empty.jsonl", model, &[]);
        refused(&empty, &["empty.jsonl", "it has no row"]);
        assert_eq!(said(&empty).lines().count(), 1, "before the model is loaded");
        let name = if task == "questions" { "questions.jsonl" } else { "unreadable-captions.jsonl" };
        let output = eval(dir.path(), task, name, model, &[]);
        refused(&output, &["nothing to measure on", "no picture can be read", "absent.jpg"]);
    }
    let baseline = ["--train", "questions.jsonl"];
    refused(&eval(dir.path(), "question-baseline", "empty.jsonl", "blip2_opt", &baseline), &["no row"]);
    // One that can be read is enough, and the others are named.
    captioned(dir.path());
    let both = ["unreadable-captions.jsonl", "captions.jsonl"]
        .map(|name| std::fs::read_to_string(dir.path().join(name)).expect("rows"));
    std::fs::write(dir.path().join("both.jsonl"), both.concat()).expect("written");
    let output = eval(dir.path(), "captions", "both.jsonl", "blip2_opt", &["--max-new-tokens", "4"]);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(printed(&output).starts_with("8 pictures\n"), "{}", printed(&output));
    assert!(unreadable.iter().all(|name| said(&output).contains(name)), "{}", said(&output));
}

/// Groups are counted where rows name one.
#[test]
fn questions_without_groups_have_no_line_of_groups() {
    let dir = folder();
    let rows = |group: Option<&str>| {
        let row =
            move |image| json!({"image": image, "question": "What?", "answer": "a cat", "group": group});
        PICTURES.map(row)
    };
    write_rows(dir.path(), "questions.jsonl", rows(None));
    write_rows(dir.path(), "groups.jsonl", rows(Some("cats")));
    let table = |name| {
        let output = eval(dir.path(), "questions", name, "blip2_opt", &["--max-new-tokens", "4"]);
        assert!(output.status.success(), "{}", said(&output));
        printed(&output).to_owned()
    };
    let plain = table("questions.jsonl");
    assert!(plain.starts_with("8 questions\n") && !plain.contains("groups"), "{plain}");
    assert!(table("groups.jsonl").contains("0 of 1 groups"));
}

/// COCO's captions measure what the same captions in a manifest do.
#[test]
fn captions_may_be_those_of_coco() {
    let dir = folder();
    captioned(dir.path());
    let images: Vec<_> =
        PICTURES.iter().zip(1..).map(|(name, id)| json!({"id": id, "file_name": name})).collect();
    let annotations: Vec<_> =
        CAPTIONS.iter().zip(1..).map(|(text, id)| json!({"image_id": id, "caption": text})).collect();
    std::fs::create_dir(dir.path().join("annotations")).expect("made");
    let write = |annotations: &[Json]| {
        let file = json!({"images": images, "annotations": annotations}).to_string();
        std::fs::write(dir.path().join("annotations/captions.json"), file).expect("written");
    };
    write(&annotations);
    for (task, model) in [("captions", "blip2_opt"), ("retrieval", "blip2_itm")] {
        let more = ["--max-new-tokens", "4", "--images", "."];
        let coco = report(dir.path(), task, "annotations/captions.json", model, &more);
        assert_eq!(coco, report(dir.path(), task, "captions.jsonl", model, &more[..2]));
    }
    // Without --images they are beside the file.
    let output = eval(dir.path(), "captions", "annotations/captions.json", "blip2_opt", &[]);
    refused(&output, &["no picture can be read", "1.jpg"]);
    write(&annotations[1..]);
    let more = ["--max-new-tokens", "4", "--images", "."];
    let output = eval(dir.path(), "captions", "annotations/captions.json", "blip2_opt", &more);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("1.jpg: has no caption"), "{}", said(&output));
    write(&[]);
    let output = eval(dir.path(), "captions", "annotations/captions.json", "blip2_opt", &more);
    refused(&output, &["captions.json: there is nothing to measure on", "has no caption"]);
}
