use std::fs;

use super::*;

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn load(dir: &Path, path: &str) -> Result<Dataset> {
    Dataset::load(&[DataConfig::new(path)], dir)
}

#[test]
fn jsonl_rows_of_every_kind_are_read() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "images/a.jpg", "a");
    write(dir.path(), "images/b.jpg", "b");
    let rows = [
        r#"{"image":"images/a.jpg","captions":["one","two"],"license":"CC0"}"#,
        r#"{"image":"images/b.jpg","caption":"three"}"#,
        "",
        r#"{"image":"images/a.jpg","question":"What?","answer":"a"}"#,
        r#"{"image":"images/a.jpg","question":"What?","answers":["a","an a"],"names":["a"]}"#,
        r#"{"image":"images/b.jpg","turns":[{"question":"q","answer":"r"}]}"#,
    ];
    write(dir.path(), "rows.jsonl", rows.join("\n"));
    let dataset = load(dir.path(), "rows.jsonl").unwrap();
    assert_eq!(dataset.images().len(), 2, "a picture named by several rows is held once");
    assert_eq!(dataset.samples().iter().map(|s| s.image).collect::<Vec<_>>(), [0, 1, 0, 0, 1]);
    assert_eq!(dataset.samples()[0].text, Text::Captions(vec!["one".into(), "two".into()]));
    assert_eq!(
        dataset.samples()[3].text,
        Text::QuestionAnswer { question: "What?".into(), answers: vec!["a".into(), "an a".into()] }
    );
    assert_eq!(dataset.samples()[3].names, ["a"]);
    assert_ne!(dataset.images()[0].group, dataset.images()[1].group);
    assert_eq!(dataset.images()[1].source.read().unwrap(), b"b");
}

#[test]
fn wrong_lines_are_errors_with_file_and_line() {
    let good = r#"{"image":"a.jpg","caption":"x"}"#;
    for (bad, says) in [
        ("{\"image\":\"a.jpg\"", "EOF"),
        (r#"{"caption":"x"}"#, "missing field `image`"),
        (r#"{"image":"a.jpg"}"#, "neither"),
        (r#"{"image":"a.jpg","captions":[]}"#, "empty"),
        (r#"{"image":"a.jpg","caption":"  "}"#, "empty"),
        (r#"{"image":"a.jpg","question":"x"}"#, "answer"),
        (r#"{"image":"a.jpg","answer":"x"}"#, "question"),
        (r#"{"image":"a.jpg","caption":"x","question":"y","answer":"z"}"#, "more than one"),
        (r#"{"image":"a.jpg","turns":[{"question":"x"}]}"#, "answer"),
        (r#"{"image":"","caption":"x"}"#, "image"),
        (r#"["a.jpg"]"#, "not a JSON object"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a.jpg", "a");
        write(dir.path(), "rows.jsonl", format!("{good}\n\n{bad}\n{good}\n"));
        let message = load(dir.path(), "rows.jsonl").unwrap_err().to_string();
        assert!(message.contains("rows.jsonl:3: "), "{message}");
        assert!(message.contains(says), "{bad}: {message}");
    }
}

#[test]
fn a_line_that_is_not_utf8_is_an_error_with_its_number() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.jpg", "a");
    write(
        dir.path(),
        "rows.jsonl",
        b"{\"image\":\"a.jpg\",\"caption\":\"x\"}\n{\"image\":\"a.jpg\",\"caption\":\"\xff\"}\n",
    );
    let message = load(dir.path(), "rows.jsonl").unwrap_err().to_string();
    assert!(message.contains("rows.jsonl:2: "), "{message}");
}

#[test]
fn missing_pictures_are_skipped_once_and_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.jpg", "a");
    fs::create_dir(dir.path().join("d.jpg")).unwrap();
    let rows: Vec<String> = ["a.jpg", "gone.jpg", "gone.jpg", "d.jpg"]
        .map(|name| format!(r#"{{"image":"{name}","caption":"x"}}"#))
        .to_vec();
    write(dir.path(), "rows.jsonl", rows.join("\n"));
    let dataset = load(dir.path(), "rows.jsonl").unwrap();
    assert_eq!(dataset.samples().len(), 1);
    let skipped: Vec<String> = dataset.skipped().iter().map(ToString::to_string).collect();
    assert_eq!(skipped.len(), 2, "{skipped:?}");
    assert!(skipped[0].contains("gone.jpg"), "{skipped:?}");
    assert!(skipped[1].contains("d.jpg: is not a file"), "{skipped:?}");

    write(dir.path(), "none.jsonl", r#"{"image":"gone.jpg","caption":"x"}"#);
    let message = load(dir.path(), "none.jsonl").unwrap_err().to_string();
    assert!(message.contains("none.jsonl") && message.contains("gone.jpg"), "{message}");
}

#[test]
fn groups_are_shared_by_name_and_across_entries() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.jpg", "b.jpg", "c.jpg"] {
        write(dir.path(), name, name);
    }
    write(
        dir.path(),
        "1.jsonl",
        "{\"image\":\"a.jpg\",\"caption\":\"x\",\"group\":\"g\"}\n{\"image\":\"c.jpg\",\"caption\":\"x\"}",
    );
    write(dir.path(), "2.jsonl", r#"{"image":"b.jpg","caption":"x","group":"g"}"#);
    let dataset =
        Dataset::load(&[DataConfig::new("1.jsonl"), DataConfig::new("2.jsonl")], dir.path()).unwrap();
    let groups: Vec<u32> = dataset.images().iter().map(|image| image.group).collect();
    assert_eq!(groups[0], groups[2]);
    assert_ne!(groups[0], groups[1]);
    assert_eq!(dataset.samples().iter().map(|s| s.entry).collect::<Vec<_>>(), [0, 0, 1]);
}

#[test]
fn joined_groups_are_one_whatever_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<String> = ["a", "b", "a", "b", "c", "d"]
        .iter()
        .enumerate()
        .map(|(number, group)| {
            write(dir.path(), &format!("{number}.jpg"), "p");
            format!(r#"{{"image":"{number}.jpg","caption":"x","group":"{group}"}}"#)
        })
        .collect();
    write(dir.path(), "rows.jsonl", rows.join("\n"));
    let joined = |pairs: &[(usize, usize)]| {
        let mut dataset = load(dir.path(), "rows.jsonl").unwrap();
        dataset.join_groups(pairs);
        dataset.images().iter().map(|image| image.group).collect::<Vec<_>>()
    };
    assert_eq!(joined(&[]), [0, 1, 0, 1, 2, 3]);
    assert_eq!(joined(&[(3, 2)]), [0, 0, 0, 0, 2, 3]);
    assert_eq!(joined(&[(5, 4), (4, 1), (2, 0)]), [0, 1, 0, 1, 1, 1]);
    assert_eq!(joined(&[(5, 4), (3, 2), (4, 1)]), [0; 6]);
}

#[test]
fn skipping_pictures_removes_their_samples_and_changes_the_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.jpg", "a");
    write(dir.path(), "b.jpg", "b");
    write(
        dir.path(),
        "rows.jsonl",
        "{\"image\":\"a.jpg\",\"caption\":\"x\"}\n{\"image\":\"b.jpg\",\"caption\":\"y\"}",
    );
    let mut dataset = load(dir.path(), "rows.jsonl").unwrap();
    let before = dataset.fingerprint();
    assert_eq!(before, load(dir.path(), "rows.jsonl").unwrap().fingerprint());
    dataset.skip_images(&[(0, "does not decode".into())]);
    assert_eq!(dataset.samples().len(), 1);
    assert_eq!(dataset.samples()[0].image, 1);
    assert_eq!(dataset.skipped()[0].reason, "does not decode");
    assert_ne!(before, dataset.fingerprint());
}

#[test]
fn configuration_refuses_unknown_fields_and_wrong_values() {
    let parse = |text: &str| toml::from_str::<DataConfig>(text);
    assert_eq!(parse("path = \"x\"").unwrap(), DataConfig::new("x"));
    assert!(parse("path = \"x\"\nrepaet = 2").unwrap_err().to_string().contains("repaet"));
    assert!(parse("path = \"x\"\naugment = { zoom = 2 }").unwrap_err().to_string().contains("zoom"));
    for (text, field) in [
        ("repeat = 0.0", "data[0].repeat"),
        ("repeat = nan", "data[0].repeat"),
        ("weight = 0.0", "data[0].weight"),
        ("weight = inf", "data[0].weight"),
        ("max_per_epoch = 0", "data[0].max_per_epoch"),
        ("augment = { scale = [0.0, 1.0] }", "data[0].augment.scale"),
        ("format = \"jsonl\"\nimages = \"y\"", "data[0].images"),
    ] {
        let config = parse(&format!("path = \"x\"\n{text}")).unwrap();
        let message = Dataset::load(&[config], Path::new("")).unwrap_err().to_string();
        assert!(message.contains(field), "{message}");
    }
}

#[test]
fn a_name_that_tells_no_format_asks_for_one() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "rows.txt", "x");
    assert!(load(dir.path(), "rows.txt").unwrap_err().to_string().contains("set `format`"));
    assert!(load(dir.path(), "absent.jsonl").unwrap_err().to_string().contains("absent.jsonl"));
}
