//! A checkpoint in a Hugging Face folder through the command: tiny random ones from the library's golden files.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blip2::weights::safetensors::Safetensors;
use serde_json::Value as Json;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

fn blip2(arguments: &[&str], model: &str) -> Json {
    let output = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(arguments)
        .args(["--json", "--model"])
        .arg(golden(model))
        .output()
        .expect("the command runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn expected(model: &str) -> Json {
    let bytes = std::fs::read(golden(model).join("expected.json")).expect("readable");
    serde_json::from_slice(&bytes).expect("JSON")
}

#[test]
fn a_caption_has_the_tokens_of_transformers() {
    let picture = golden("blip2.png");
    let picture = picture.to_str().expect("UTF-8");
    for model in ["blip2_opt", "blip2_t5"] {
        let expected = expected(model);
        let max = expected["max_new_tokens"].to_string();
        for text in expected["texts"].as_array().expect("texts").iter().filter(|text| text["prompt"] == "") {
            let beams = text["num_beams"].to_string();
            let rows = blip2(&["caption", picture, "--beams", &beams, "--max-new-tokens", &max], model);
            assert_eq!(rows[0]["token_ids"], text["token_ids"], "{model}, {beams} beams");
            assert_eq!(rows[0]["path"], picture);
        }
    }
}

#[test]
fn a_match_has_the_scores_of_transformers_and_bf16_is_near_them() {
    let picture = golden("blip2.png");
    let picture = picture.to_str().expect("UTF-8");
    let expected = expected("blip2_itm");
    let texts: Vec<&Json> = expected["texts"].as_array().expect("texts").iter().collect();
    let words: Vec<&str> = texts.iter().map(|text| text["text"].as_str().expect("a text")).collect();
    for (dtype, tolerance) in [("f32", 1e-5), ("bf16", 0.05)] {
        let rows = blip2(&[&["match", "--dtype", dtype, picture][..], &words].concat(), "blip2_itm");
        for (row, text) in rows.as_array().expect("rows").iter().zip(&texts) {
            let number = |value: &Json| value.as_f64().expect("a number");
            assert!(
                (number(&row["itc_similarity"]) - number(&text["itc"])).abs() < tolerance,
                "{row} {text}"
            );
            let logits = &text["itm_logits"];
            let probability = 1.0 / (1.0 + (number(&logits[0]) - number(&logits[1])).exp());
            assert!((number(&row["itm_probability"]) - probability).abs() < tolerance, "{row} {text}");
        }
    }
}

/// Parts are counted as they were published: EVA's keys have no biases, which are zeros in a folder.
#[test]
fn the_parts_have_their_numbers_of_parameters() {
    let file = Safetensors::open(golden("blip2_opt")).expect("tensors");
    let size = |name: &str| file.shape(name).expect("a shape").iter().product::<usize>();
    let is_bridge =
        |name: &str| name.starts_with("vision_model.post_layernorm.") || !name.starts_with("vision_model.");
    let own = || file.names().filter(|name| !name.starts_with("language_model."));
    let n_bridge: usize = own().filter(|name| is_bridge(name)).map(size).sum();
    let n_zeros: usize = own().filter(|name| name.ends_with(".qkv.bias")).map(|name| size(name) / 3).sum();
    let n_encoder = own().filter(|name| !is_bridge(name)).map(size).sum::<usize>() - n_zeros;
    let parts = blip2(&["info"], "blip2_opt")["parameters"].clone();
    assert!(n_zeros > 0);
    assert_eq!(parts["image encoder (frozen)"], n_encoder);
    assert_eq!(parts["Q-Former of stage 2 with projection"], n_bridge);
}

#[test]
fn a_heat_map_is_written_as_a_picture() {
    let dir = tempfile::tempdir().expect("a folder");
    let (heat, picture) = (dir.path().join("heat.png"), golden("blip2.png"));
    let arguments =
        ["explain", picture.to_str().expect("UTF-8"), "a cat", "-o", heat.to_str().expect("UTF-8")];
    let row = blip2(&arguments, "blip2_itm");
    assert_eq!(row["heat"].as_array().map(Vec::len), Some(2));
    let size = |path: &Path| {
        let limits = blip2::image::Limits::default();
        blip2::image::open(path, &limits, blip2::image::Pixels::Pillow).expect("a picture").dimensions()
    };
    assert_eq!(size(&heat), size(&picture));
}

#[test]
fn a_quantised_folder_captions_as_the_original_does_in_as_few_bits() {
    let dir = tempfile::tempdir().expect("a folder");
    let (picture, few_bits) = (golden("blip2.png"), dir.path().join("few-bits"));
    let picture = picture.to_str().expect("UTF-8");
    let run = |arguments: &[&str], model: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.args(arguments).args(["--json", "--model"]).arg(model).output().expect("the command runs")
    };
    let quantised = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(["quantize", "--dtype", "int4"])
        .args([&golden("blip2_opt"), &few_bits])
        .output()
        .expect("the command runs");
    assert!(quantised.status.success(), "{}", String::from_utf8_lossy(&quantised.stderr));
    let stored = run(&["caption", picture], &few_bits);
    assert!(stored.status.success(), "{}", String::from_utf8_lossy(&stored.stderr));
    let refused = run(&["caption", picture, "--quantize-qformer"], &golden("blip2_opt"));
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--dtype int8"), "{refused:?}");
    let rounded = run(&["caption", picture, "--dtype", "int4"], &golden("blip2_opt"));
    assert_eq!(stored.stdout, rounded.stdout);
    // `auto` takes what is stored, and rounds what is not; both say what and why.
    for (model, same, why) in [
        (&few_bits, &stored, "--dtype auto: int4, as the model is stored"),
        (
            &golden("blip2_opt"),
            &run(&["caption", picture, "--dtype", "int8"], &golden("blip2_opt")),
            "--dtype auto: int8, which needs",
        ),
    ] {
        let chosen = run(&["caption", picture, "--dtype", "auto"], model);
        let said = String::from_utf8_lossy(&chosen.stderr);
        assert!(chosen.status.success() && chosen.stdout == same.stdout, "{said}");
        assert_eq!(said.lines().filter(|line| line.starts_with(why)).count(), 1, "{said}");
    }
    // What is not there any more is not pretended.
    let refused = run(&["caption", picture, "--dtype", "f32"], &few_bits);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("stored in few bits"), "{said}");
}

/// A picture that cannot be read costs its own row; an array, whose rows have no names, is whole or not written.
#[test]
fn features_of_the_readable_pictures_are_printed_and_the_others_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let (broken, array) = (dir.path().join("broken.jpg"), dir.path().join("rows.npy"));
    std::fs::write(&broken, "no picture").expect("written");
    let embed = |more: &[&std::ffi::OsStr]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command
            .args(["embed", "--text", "a cat", "--image"])
            .arg(&broken)
            .arg("--image")
            .arg(golden("blip2.png"));
        command.arg("--model").arg(golden("blip2_itm")).args(more).output().expect("the command runs")
    };
    let output = embed(&[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert_eq!(said.matches("broken.jpg: is not a picture").count(), 1, "{said}");
    let lines = String::from_utf8(output.stdout).expect("text");
    let rows: Vec<Json> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(rows[0]["error"].is_string() && rows[0]["embeds"].is_null(), "{lines}");
    assert!(rows[1]["embeds"].is_array() && rows[2]["text"] == "a cat", "{lines}");
    let output = embed(&["--npy".as_ref(), array.as_ref()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty() && !array.exists());
}

/// `--choices "yes, no"` is how people write it; the space would be part of the answer, and make it another one.
#[test]
fn spaces_and_doubles_among_choices_and_labels_do_not_count() {
    let picture = golden("blip2.png");
    let picture = picture.to_str().expect("UTF-8");
    let ask = |choices: &str| blip2(&["ask", picture, "a", "--choices", choices], "blip2_opt");
    assert_eq!(ask("a, b ,b"), ask("a,b"));
    let labels = |labels: &[&str]| blip2(&[&["classify", picture][..], labels].concat(), "blip2_itm");
    assert_eq!(labels(&["cat", "dog ", "cat"]), labels(&["cat", "dog"]));
}

/// A conversation goes on after a question that cannot be asked; where none could be, the command failed.
#[test]
fn a_question_that_is_not_text_does_not_end_the_conversation() {
    use std::io::Write;

    let chat = |questions: &[u8]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.arg("chat").arg(golden("blip2.png")).args(["--max-new-tokens", "4", "--json", "--model"]);
        command.arg(golden("blip2_opt")).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut chat = command.spawn().expect("the command runs");
        chat.stdin.take().expect("a pipe").write_all(questions).expect("written");
        chat.wait_with_output().expect("it ends")
    };
    for (questions, status, n_answers) in
        [(&b"a\xff\n\na\n"[..], 3, 1), (b"a\xff", 1, 0), (b" \r\n", 0, 0), (b"a\n /quit \na\n", 0, 1)]
    {
        let output = chat(questions);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert_eq!(said.contains("not text in UTF-8"), status != 0, "{said}");
        assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), n_answers, "{said}");
    }
}

/// How sure the model was, for those who want to leave out what it was not sure of.
#[test]
fn the_probabilities_of_tokens_come_with_them_where_they_are_wanted() {
    let picture = golden("blip2.png");
    let picture = picture.to_str().expect("UTF-8");
    for (verb, text) in [(&["caption", picture][..], "caption"), (&["ask", picture, "a"], "answer")] {
        let settings = [verb, &["--beams", "2", "--max-new-tokens", "4"]].concat();
        let plain = blip2(&settings, "blip2_opt");
        let row = &blip2(&[&settings[..], &["--log-probs"]].concat(), "blip2_opt")[0];
        assert!(plain[0]["log_probs"].is_null());
        assert_eq!(plain[0][text], row[text]);
        let log_probs = row["log_probs"].as_array().expect("numbers");
        assert_eq!(log_probs.len(), row["token_ids"].as_array().expect("ids").len());
        assert!(log_probs.iter().all(|value| value.as_f64().is_some_and(|value| value <= 0.0)), "{row}");
    }
}
