//! `blip2 caption` over folders and `blip2 data filter`: files beside pictures, files of rows, going on where it ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

/// A folder with two pictures, one below it, and a file that only looks like a picture.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    fs::create_dir(dir.path().join("below")).expect("made");
    for name in ["a.png", "b.PNG", "below/c.png"] {
        fs::copy(golden("blip2.png"), dir.path().join(name)).expect("copied");
    }
    fs::write(dir.path().join("broken.jpg"), "no picture").expect("written");
    fs::write(dir.path().join("notes.md"), "no picture either").expect("written");
    dir
}

fn caption(arguments: &[&str], folder: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(["caption", "--beams", "1", "--max-new-tokens", "4", "--min-new-tokens", "2", "--model"]);
    command.arg(golden("blip2_opt")).arg("--folder").arg(folder).args(arguments);
    command.current_dir(folder).output().expect("the command runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn captions_are_written_beside_their_pictures_once() {
    let dir = folder();
    let output = caption(&["--sidecar"], dir.path());
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(
        said(&output).contains("broken.jpg") && said(&output).contains("2 described"),
        "{}",
        said(&output)
    );
    assert!(output.stdout.is_empty());
    let text = fs::read_to_string(dir.path().join("a.txt")).expect("a caption");
    assert!(text.ends_with('\n') && !text.trim().is_empty(), "{text:?}");
    assert_eq!(text, fs::read_to_string(dir.path().join("b.txt")).expect("a caption"));
    assert!(!dir.path().join("below/c.txt").exists() && !dir.path().join("broken.txt").exists());

    // What a person wrote stays; what is missing is added.
    fs::write(dir.path().join("a.txt"), "mine\n").expect("written");
    fs::remove_file(dir.path().join("broken.jpg")).expect("removed");
    let output = caption(&["--sidecar", "--recursive"], dir.path());
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("1 described, 2 described already"), "{}", said(&output));
    assert_eq!(fs::read_to_string(dir.path().join("a.txt")).expect("a caption"), "mine\n");
    assert_eq!(fs::read_to_string(dir.path().join("below/c.txt")).expect("a caption"), text);
    let output = caption(&["--sidecar", "--overwrite"], dir.path());
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(fs::read_to_string(dir.path().join("a.txt")).expect("a caption"), text);
}

#[test]
fn rows_go_on_where_they_ended_and_are_a_manifest() {
    let dir = folder();
    fs::remove_file(dir.path().join("broken.jpg")).expect("removed");
    let (jsonl, csv) = (dir.path().join("captions.jsonl"), dir.path().join("captions.csv"));
    for (name, file) in [("captions.jsonl", &jsonl), ("captions.csv", &csv)] {
        let output = caption(&["--out", name], dir.path());
        assert!(output.status.success(), "{}", said(&output));
        let first = fs::read(file).expect("rows");
        // The last row was being written when the machine failed.
        fs::write(file, &first[..first.len() - 3]).expect("written");
        let output = caption(&["--out", name, "--recursive"], dir.path());
        assert!(said(&output).contains("2 described, 1 described already"), "{}", said(&output));
        assert!(fs::read(file).expect("rows").starts_with(&first));
    }
    let rows = blip2_train::data::read_rows(&jsonl).expect("a manifest");
    let images: Vec<&str> = rows.iter().map(|row| row.image.as_str()).collect();
    assert_eq!(images, ["a.png", "b.PNG", "below/c.png"]);
    let table = fs::read_to_string(&csv).expect("rows");
    assert!(table.starts_with("image,caption\na.png,"), "{table}");
    assert_eq!(table.lines().count(), 4);
}

/// A picture that cannot be read has its place among the rows; when none can, the command failed.
#[test]
fn rows_of_json_are_in_the_order_of_the_pictures() {
    let dir = folder();
    let run = |pictures: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.args(["caption", "--json", "--beams", "1", "--max-new-tokens", "4", "--model"]);
        command.arg(golden("blip2_opt")).args(pictures).current_dir(dir.path());
        command.output().expect("the command runs")
    };
    let rows = |output: &Output| -> Vec<serde_json::Value> {
        serde_json::from_slice(&output.stdout).expect("an array")
    };
    let pictures = ["a.png", "broken.jpg", "b.PNG", "absent.png", "below/c.png"];
    let output = run(&pictures);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let found = rows(&output);
    let paths: Vec<_> = found.iter().map(|row| row["path"].as_str().expect("a path")).collect();
    assert_eq!(paths, pictures);
    let failed: Vec<_> = found.iter().map(|row| row["error"].is_string()).collect();
    assert_eq!(failed, [false, true, false, true, false]);
    for pictures in [&["broken.jpg"][..], &["absent.png", "broken.jpg"]] {
        let output = run(pictures);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert_eq!(rows(&output).len(), pictures.len());
        assert!(pictures.iter().all(|picture| said(&output).contains(picture)), "{}", said(&output));
    }
    assert!(run(&["a.png"]).status.success());
}

#[test]
fn what_cannot_be_right_is_said_first() {
    let dir = folder();
    fs::copy(golden("blip2.png"), dir.path().join("a.gif")).expect("copied");
    let empty = tempfile::tempdir().expect("a folder");
    for (arguments, folder, status, expected) in [
        (&["--sidecar"][..], dir.path(), 1, "would have the same file beside them"),
        (&["--sidecar=.txt"], dir.path(), 2, "without a dot"),
        (&["--out", "captions.txt"], dir.path(), 2, ".jsonl or .csv"),
        (&["--overwrite"], dir.path(), 2, "--overwrite is for"),
        (&[], empty.path(), 1, "holds no pictures"),
        (&["--folder", "absent"], dir.path(), 1, "cannot list absent"),
    ] {
        let output = caption(arguments, folder);
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
        assert!(said(&output).contains(expected), "{}", said(&output));
    }
    let output = caption(&["--sidecar", "--json"], dir.path());
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
}

/// Names may hold line breaks and tabs: a row stays one line of two fields, and a message one line.
#[cfg(unix)]
#[test]
fn a_name_of_several_lines_has_one_row() {
    let dir = folder();
    fs::remove_file(dir.path().join("broken.jpg")).expect("removed");
    fs::rename(dir.path().join("a.png"), dir.path().join("a\n\tb.png")).expect("renamed");
    fs::write(dir.path().join("c\n.png"), "no picture").expect("written");
    let output = caption(&[], dir.path());
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let rows = String::from_utf8(output.stdout.clone()).expect("text");
    let names: Vec<&str> = rows.lines().map(|row| row.split_once('\t').expect("two fields").0).collect();
    let folder = dir.path().display();
    assert_eq!(names, [format!(r#""{folder}/a\n\tb.png""#), format!("{folder}/b.PNG")]);
    let messages = said(&output);
    let of_pictures: Vec<&str> = messages.lines().filter(|line| line.contains(".png")).collect();
    assert!(of_pictures.len() == 1 && of_pictures[0].contains(r"c\n.png: is not a picture"), "{messages}");
}

/// The matching model judges, and the other writes candidates; the rows are a manifest with the best first.
#[test]
fn captions_that_fit_best_are_kept() {
    let dir = folder();
    let manifest = dir.path().join("web.jsonl");
    let rows = r#"{"image": "a.png", "captions": ["a cat", "two dogs", "A  cat"]}
{"image": "below/c.png", "caption": "a red car"}
{"image": "broken.jpg", "caption": "nothing"}
"#;
    fs::write(&manifest, rows).expect("written");
    let filter = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.args(["data", "filter", "web.jsonl", "best.jsonl", "--matcher"]).arg(golden("blip2_itm"));
        command.args(more).current_dir(dir.path()).output().expect("the command runs")
    };
    let read = || fs::read_to_string(dir.path().join("best.jsonl")).expect("rows");
    let output = filter(&[]);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("2 written") && said(&output).contains("1 failed"), "{}", said(&output));
    let first: serde_json::Value = serde_json::from_str(read().lines().next().expect("a row")).expect("JSON");
    let scores: Vec<f64> = serde_json::from_value(first["scores"].clone()).expect("scores");
    assert_eq!(first["captions"].as_array().map(Vec::len), Some(2), "the copy counts once: {first}");
    assert!(scores[0] >= scores[1], "{first}");
    assert_eq!(blip2_train::data::read_rows(&dir.path().join("best.jsonl")).expect("a manifest").len(), 2);

    let before = read();
    assert!(said(&filter(&[])).contains("2 there already"));
    assert_eq!(read(), before);
    let writer = golden("blip2_opt");
    let writer = writer.to_str().expect("UTF-8");
    let output = filter(&[
        "--overwrite",
        "--model",
        writer,
        "--generate",
        "4",
        "--keep",
        "9",
        "--max-new-tokens",
        "5",
    ]);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let first: serde_json::Value = serde_json::from_str(read().lines().next().expect("a row")).expect("JSON");
    assert!(first["captions"].as_array().expect("captions").len() > 2, "{first}");
    let output = filter(&["--overwrite", "--min-score", "1.5"]);
    assert!(said(&output).contains("2 without a caption that fits"), "{}", said(&output));
    assert_eq!(read(), "", "nothing is in the place of what was there");
    filter(&[]);
    assert_eq!(read(), before);
    fs::write(&manifest, "{\"image\": \"broken.jpg\", \"caption\": \"nothing\"}\n").expect("written");
    let output = filter(&["--overwrite"]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert_eq!(read(), before, "nothing was judged");
}

/// A picture on standard input is one among the others, in its place.
#[test]
fn a_picture_comes_from_standard_input() {
    let dir = folder();
    let caption = |arguments: &[&str], from: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.args([
            "caption",
            "--beams",
            "1",
            "--max-new-tokens",
            "4",
            "--min-new-tokens",
            "2",
            "--model",
        ]);
        command.arg(golden("blip2_opt")).args(arguments).current_dir(dir.path());
        command.stdin(fs::File::open(from).expect("a file")).output().expect("the command runs")
    };
    let output = caption(&["--json", "broken.jpg", "-", "a.png"], &golden("blip2.png"));
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!([&rows[0]["path"], &rows[1]["path"], &rows[2]["path"]], ["broken.jpg", "-", "a.png"]);
    assert!(rows[0]["error"].is_string(), "{rows}");
    assert_eq!(rows[1]["token_ids"], rows[2]["token_ids"]);

    let output = caption(&["-"], &dir.path().join("notes.md"));
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("standard input: is not a picture"), "{}", said(&output));
    let output = caption(&["-", "a.png", "-"], &golden("blip2.png"));
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    let output = caption(&["-", "--sidecar"], &golden("blip2.png"));
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
}
