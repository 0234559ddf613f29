//! The verbs on tiny models in Hugging Face folders: presets, raw prompts, and what is printed as JSON.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value as Json;

fn golden(name: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name);
    path.to_str().expect("UTF-8").to_owned()
}

fn blip2(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blip2")).args(arguments).output().expect("the command runs")
}

fn printed(arguments: &[&str]) -> String {
    let output = blip2(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn rows(arguments: &[&str]) -> Vec<Json> {
    serde_json::from_str(&printed(arguments)).expect("JSON")
}

fn tokens(row: &Json) -> Vec<u64> {
    row["token_ids"].as_array().expect("tokens").iter().map(|id| id.as_u64().expect("a number")).collect()
}

#[test]
fn presets_and_prompts_change_what_is_written() {
    let picture = golden("blip2.png");
    for family in ["blip2_opt", "blip2_t5"] {
        let model = golden(family);
        let caption =
            |more: &[&str]| rows(&[&["caption", "--json", "--model", &model, &picture], more].concat());
        let hf = caption(&["--preset", "hf"]);
        assert!(hf.len() == 1 && tokens(&hf[0]).len() <= 20, "{hf:?}");
        // The same by hand, with the names of transformers.
        let by_hand = caption(&["--num-beams", "1", "--max-new-tokens", "20"]);
        assert_eq!(tokens(&by_hand[0]), tokens(&hf[0]));
        assert_eq!(
            tokens(&caption(&["--preset", "hf", "--prompt="])[0]),
            tokens(&hf[0]),
            "the model's own is empty"
        );
        let begun = caption(&["--preset", "hf", "--prompt", "a photo of"]);
        assert_ne!(tokens(&begun[0]), tokens(&hf[0]));
        assert!(!begun[0]["caption"].as_str().expect("a caption").starts_with("a photo of"));
        let lavis = caption(&["--preset", "lavis", "--num-captions", "3"]);
        assert!(lavis.len() == 3 && lavis.iter().all(|row| tokens(row).len() <= 30));
        let all = ["--preset", "hf", "--num-beams", "3", "--max-new-tokens", "6", "--min-new-tokens", "6"];
        let more = ["--length-penalty", "-1", "--repetition-penalty", "1.2", "--early-stopping", "never"];
        assert_eq!(tokens(&caption(&[&all[..], &more].concat())[0]).len(), 6);
        let drawn = [
            "--preset",
            "hf",
            "--temperature",
            "1.5",
            "--top-k",
            "9",
            "--top-p",
            "0.9",
            "--num-captions",
            "2",
        ];
        let alone = |seed| caption(&[&drawn[..], &["--seed", seed]].concat());
        assert_eq!(alone("1"), alone("1"));
        assert!(alone("1") != alone("2") || alone("1") != alone("3"));
        // Beams and draws together: their texts differ, and come with the best first.
        let beams = |seed| caption(&[&drawn[..], &["--num-beams", "3", "--seed", seed]].concat());
        let texts = beams("1");
        assert_eq!(texts, beams("1"));
        assert!(texts != beams("2") || texts != beams("3"));
        assert!(texts.len() == 2 && tokens(&texts[0]) != tokens(&texts[1]), "{texts:?}");
        let ask =
            rows(&["ask", "--json", "--preset", "hf", "--model", &model, &picture, "which city is this?"]);
        assert!(tokens(&ask[0]).len() <= 20);
        let refused =
            blip2(&["caption", "--model", &model, &picture, "--preset", "hf", "--num-captions", "2"]);
        assert!(String::from_utf8_lossy(&refused.stderr).contains("greedy search has one result"));
        assert_eq!(refused.status.code(), Some(2));
    }
}

/// Published checkpoints are computed in f32: the command's tokens are the library's, which are transformers'.
#[test]
fn the_preset_of_transformers_gives_its_tokens_after_every_prompt() {
    let picture = golden("blip2.png");
    for family in ["opt", "t5"] {
        let model = golden(&format!("blip2_{family}"));
        let text = std::fs::read_to_string(golden(&format!("generate_{family}.json"))).expect("readable");
        let expected: Json = serde_json::from_str(&text).expect("JSON");
        let cases = expected["cases"].as_array().expect("cases");
        let find = |config: Json| cases.iter().find(|case| case["config"] == config).expect("a case");
        let greedy = find(serde_json::json!({"max_new_tokens": 20}));
        let penalised = find(serde_json::json!({"max_new_tokens": 14, "repetition_penalty": 1.5}));
        let unseen =
            find(serde_json::json!({"max_new_tokens": 14, "repetition_penalty": 1.5, "sees_prompt": false}));
        let penalty = ["--max-new-tokens", "14", "--repetition-penalty", "1.5"];
        for (i, prompt) in expected["prompts"].as_array().expect("prompts").iter().enumerate() {
            let prompt = format!("--prompt={}", prompt.as_str().expect("a text"));
            let caption = |more: &[&str]| {
                let all = ["caption", "--json", "--model", &model, &picture, &prompt];
                rows(&[&all[..], more].concat())[0]["token_ids"].clone()
            };
            assert_eq!(caption(&["--preset", "hf"]), greedy["results"][i][0], "{family} {prompt}");
            let hf = caption(&[&["--preset", "hf"][..], &penalty].concat());
            assert_eq!(hf, penalised["results"][i][0], "{family} {prompt}");
            let lavis = caption(&[&["--preset", "lavis", "--num-beams", "1"][..], &penalty].concat());
            assert_eq!(lavis, unseen["results"][i][0], "{family} {prompt}");
        }
    }
}

/// A picture whose camera was held sideways, and one whose pixels are as that one's are stored.
fn turned(folder: &Path) -> [String; 2] {
    let text = std::fs::read_to_string(golden("pictures.json")).expect("readable");
    let pictures: Json = serde_json::from_str(&text).expect("JSON");
    let digits = pictures["png_orientation_6"]["file"].as_str().expect("a file");
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("a byte");
    let bytes: Vec<u8> = (0..digits.len()).step_by(2).map(byte).collect();
    let [turned, stored] = ["turned.png", "stored.png"].map(|name| folder.join(name));
    std::fs::write(&turned, bytes).expect("written");
    let limits = blip2::image::Limits::default();
    let picture = blip2::image::open(&turned, &limits, blip2::image::Pixels::Pillow).expect("a picture");
    std::fs::write(&stored, blip2::image::png(&picture)).expect("written");
    [turned, stored].map(|path| path.to_str().expect("UTF-8").to_owned())
}

/// transformers reads pictures as they are stored; it and LAVIS differ in an epsilon, and LAVIS cleans texts.
#[test]
fn presets_change_what_is_compared() {
    let (dir, model) = (tempfile::tempdir().expect("a folder"), golden("blip2_itm"));
    let [turned, stored] = turned(dir.path());
    let say = |picture: &str, text: &str, preset: &[&str]| {
        let verbs = [
            vec!["match", picture, text],
            vec!["classify", picture, text, "sofa"],
            vec!["embed", "--image", picture],
            vec!["embed", "--text", text],
        ];
        let model = ["--json", "--model", &model];
        verbs.map(|verb| {
            let said = printed(&[&verb[..], &model, preset].concat());
            said.replace(picture, "the picture").replace(text, "the text")
        })
    };
    let (given, cleaned) = ("Two DOGS (on the sofa)!", "two dogs on the sofa");
    let hf = ["--preset", "hf"];
    let lavis = ["--preset", "lavis"];
    assert_eq!(say(&turned, given, &hf), say(&stored, given, &[]));
    assert_eq!(say(&turned, given, &lavis), say(&stored, cleaned, &lavis));
    let (own, hf, lavis) = (say(&turned, given, &[]), say(&turned, given, &hf), say(&turned, given, &lavis));
    for of_picture in 0..3 {
        assert_ne!(own[of_picture], hf[of_picture]);
        assert_ne!(lavis[of_picture], hf[of_picture]);
    }
    assert_eq!(own[3], hf[3], "a text is as it is given");
    assert_ne!(lavis[3], hf[3]);
}

#[test]
fn every_stage_can_be_written_to_a_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("stages.safetensors");
    let file = file.to_str().expect("UTF-8");
    let picture = golden("blip2.png");
    for (family, n_rows) in [("blip2_opt", 5 + 1 + 4), ("blip2_t5", 1)] {
        let model = golden(family);
        let arguments =
            ["embed", "--model", &model, "--image", &picture, "--image", &picture, "--output", file];
        assert_eq!(printed(&[&arguments[..], &["--prompt", "a ph"]].concat()), "");
        let stages = blip2::weights::safetensors::Safetensors::open(file).expect("a file");
        let shape = |name: &str| stages.shape(name).expect("a stage").to_vec();
        assert_eq!(shape("pixel_values"), [2, 3, 28, 28]);
        assert_eq!(shape("vision.out"), [2, 5, 24]);
        assert_eq!(shape("qformer.out"), [2, 5, 32]);
        assert_eq!(shape("language_projection.out"), [2, 5, 32]);
        assert_eq!(shape("logits")[..2], [2, n_rows]);
    }
    // Which of two pictures and two texts is which.
    let (model, [turned, stored]) = (golden("blip2_itm"), turned(dir.path()));
    let arguments = ["embed", "--model", &model, "--output", file, "--image", &stored, "--text", "a cat"];
    printed(&arguments);
    let stages = blip2::weights::safetensors::Safetensors::open(file).expect("a file");
    let [text, pair] = ["text.out", "multimodal.out"].map(|name| stages.read_f32(name).expect("numbers"));
    assert_eq!((text.len(), pair.len()), (4 * 32, 5 * 32));
    printed(&[&arguments[..], &["--text", "two dogs", "--image", &turned]].concat());
    let stages = blip2::weights::safetensors::Safetensors::open(file).expect("a file");
    let shape = |name: &str| stages.shape(name).expect("a stage").to_vec();
    assert_eq!((shape("text.out"), shape("multimodal.out")), (vec![4 + 5, 32], vec![2 * 2, 5, 32]));
    assert_eq!(stages.read_f32("text.lengths").expect("numbers"), [4.0, 5.0]);
    assert_eq!(stages.read_f32("text.out").expect("numbers")[..4 * 32], text);
    let pairs = stages.read_f32("multimodal.out").expect("numbers");
    let of_pair: Vec<_> = pairs.chunks_exact(5 * 32).collect();
    assert_eq!(of_pair[0], pair);
    printed(&["embed", "--model", &model, "--output", file, "--image", &turned, "--text", "a cat"]);
    let stages = blip2::weights::safetensors::Safetensors::open(file).expect("a file");
    assert_eq!(stages.read_f32("multimodal.out").expect("numbers"), of_pair[2]);
    assert_ne!(of_pair[0], of_pair[2]);
    // A model that only writes reads no texts beside pictures.
    let arguments = ["embed", "--image", &picture, "--text", "a cat", "--output", file, "--model"];
    let writer = golden("blip2_opt");
    let refused = blip2(&[&arguments[..], &[writer.as_str()]].concat());
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("stage-1"));
    for wrong in
        [&["--output", file][..], &["--image", "a.png", "--prompt", "a"], &["--text", "a", "--output", file]]
    {
        assert_eq!(blip2(&[&["embed"][..], wrong].concat()).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn features_are_printed_a_picture_or_text_a_line() {
    let (model, picture) = (golden("blip2_itm"), golden("blip2.png"));
    let lines = printed(&["embed", "--json", "--model", &model, "--image", &picture, "--text", "a cat"]);
    let lines: Vec<Json> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(
        (lines[0]["path"].as_str(), lines[1]["text"].as_str()),
        (Some(picture.as_str()), Some("a cat"))
    );
    for (line, n_rows) in lines.iter().zip([5, 1]) {
        let rows: Vec<Vec<f64>> = serde_json::from_value(line["embeds"].clone()).expect("rows");
        assert_eq!(rows.len(), n_rows);
        for row in rows {
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!((length - 1.0).abs() < 1e-5, "{length}");
        }
    }
}

#[test]
fn answers_of_a_form_are_written() {
    let (picture, model) = (golden("blip2.png"), golden("blip2_opt"));
    let ask = |more: &[&str]| {
        printed(&[&["ask", &picture, "which?", "--model", &model, "--max-new-tokens", "40"], more].concat())
    };
    let text = ask(&["--regex", "[xyz]{3}"]);
    assert!(text.trim_end().len() == 3 && text.trim_end().bytes().all(|b| b"xyz".contains(&b)), "{text}");
    let folder = tempfile::tempdir().expect("a folder");
    let schema = folder.path().join("schema.json");
    let schema_text = r#"{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
        "additionalProperties": false}"#;
    std::fs::write(&schema, schema_text).expect("written");
    let schema = schema.to_str().expect("UTF-8");
    for beams in ["1", "3"] {
        let json: Json =
            serde_json::from_str(&ask(&["--json-schema", schema, "--num-beams", beams])).expect("JSON");
        assert!(json["n"] == 1 || json["n"] == 2, "{json}");
    }
    let output = blip2(&["ask", &picture, "which?", "--model", &model, "--regex", "("]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("regular expression"));
}
