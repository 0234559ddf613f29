//! Generation after a picture and a text against transformers, for many settings (`tools/golden_generate.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::generate::GenerationConfig;
use blip2::image::{self, Limits, Pixels, RgbImage};
use blip2::model::{Blip2, ImageFeatures, OpenOptions, Preset};
use serde::Deserialize;
use serde_json::Value as Json;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<String>,
    /// What each stage makes of the picture and the second prompt; of the logits the last rows.
    stages: BTreeMap<String, Vec<Vec<f32>>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    config: Json,
    /// For each prompt the tokens of each returned text.
    results: Vec<Vec<Vec<u32>>>,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn golden(family: &str) -> Golden {
    let text = std::fs::read_to_string(folder(&format!("generate_{family}.json"))).expect("readable");
    serde_json::from_str(&text).expect("JSON")
}

fn picture() -> RgbImage {
    image::open(folder("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture")
}

fn open(folder: &Path) -> (Blip2, ImageFeatures) {
    let model = Blip2::open(folder, &OpenOptions::default()).expect("a model");
    let features = model.encode(&[picture()]).expect("features").remove(0);
    (model, features)
}

/// The new tokens of every text that is returned for each prompt.
fn tokens(
    model: &Blip2,
    features: &ImageFeatures,
    prompts: &[String],
    config: &GenerationConfig,
) -> Vec<Vec<Vec<u32>>> {
    let requests: Vec<_> = prompts.iter().map(|prompt| (features, prompt.as_str())).collect();
    let answers = model.complete(&requests, config).expect("texts");
    answers.into_iter().map(|texts| texts.into_iter().map(|text| text.token_ids).collect()).collect()
}

/// One batch of unequal prompts, which transformers reads alone and (where lengths do not count the padding) left-padded.
#[test]
fn every_setting_writes_what_transformers_writes() {
    for family in ["opt", "t5"] {
        let golden = golden(family);
        assert!(golden.cases.len() >= 50, "{}", golden.cases.len());
        let (model, features) = open(&folder(&format!("blip2_{family}")));
        let mut wrong = Vec::new();
        for case in &golden.cases {
            let config: GenerationConfig = serde_json::from_value(case.config.clone()).expect("a setting");
            let sees_prompt = case.config["sees_prompt"].as_bool().unwrap_or(true);
            let config = GenerationConfig { sees_prompt, ..config };
            let together = tokens(&model, &features, &golden.prompts, &config);
            if together != case.results {
                wrong.push(format!("{}: {together:?}, expected {:?}", case.config, case.results));
            }
            for (prompt, together) in golden.prompts.iter().zip(together) {
                let alone = tokens(&model, &features, std::slice::from_ref(prompt), &config);
                assert_eq!(alone[0], together, "{family}: {} after {prompt:?}", case.config);
            }
        }
        assert!(wrong.is_empty(), "{family}: {} settings differ:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// transformers' defaults are greedy search and 20 tokens, LAVIS's five beams and 30; both with rules that see what theirs see.
#[test]
fn presets_write_what_their_source_writes() {
    for family in ["opt", "t5"] {
        let golden = golden(family);
        let (model, features) = open(&folder(&format!("blip2_{family}")));
        let hf = model.generation(Some(Preset::Hf));
        assert_eq!((hf.num_beams, hf.max_new_tokens, hf.top_k, hf.sees_prompt), (1, 20, 50, true));
        let greedy =
            golden.cases.iter().find(|case| case.config == serde_json::json!({"max_new_tokens": 20}));
        assert_eq!(
            tokens(&model, &features, &golden.prompts, &hf),
            greedy.expect("a case").results,
            "{family}"
        );
        let lavis = model.generation(Some(Preset::Lavis));
        assert_eq!((lavis.num_beams, lavis.max_new_tokens, lavis.sees_prompt), (5, 30, false));
        let case = golden
            .cases
            .iter()
            .find(|case| case.config["max_new_tokens"] == 30 && case.config["sees_prompt"] == false);
        let case = case.expect("a case");
        let end = serde_json::from_value(case.config["eos_token_id"].clone()).expect("tokens");
        let lavis = GenerationConfig { repetition_penalty: 1.5, eos_token_id: end, ..lavis };
        assert_eq!(tokens(&model, &features, &golden.prompts, &lavis), case.results, "{family}");
        assert!(model.generation(None).sees_prompt);
    }
}

#[test]
fn every_stage_gives_what_transformers_gives() {
    for family in ["opt", "t5"] {
        let golden = golden(family);
        let (model, _) = open(&folder(&format!("blip2_{family}")));
        let stages = model.stages(&[picture(), picture()], Some(&golden.prompts[1]), &[]).expect("stages");
        let names: Vec<_> = stages.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["pixel_values", "vision.out", "qformer.out", "language_projection.out", "logits"]);
        for (name, tensor) in &stages[1..] {
            let expected = &golden.stages[*name];
            let rows = tensor.get(1).and_then(|rows| rows.to_vec2::<f32>()).expect("rows");
            // All rows, but for the logits, of which the file has the last ones.
            let last = &rows[rows.len() - expected.len()..];
            assert!(last.len() == rows.len() || *name == "logits");
            for (found, expected) in last.iter().flatten().zip(expected.iter().flatten()) {
                assert!((found - expected).abs() < 1e-4, "{family}: {name}: {found} {expected}");
            }
        }
        let own = model.stages(&[picture()], None, &[]).expect("stages");
        assert_eq!(own[4].1.dim(2).expect("a width"), stages[4].1.dim(2).expect("a width"));
    }
}

#[test]
fn the_folders_generation_configuration_is_followed() {
    let golden = golden("opt");
    let dir = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(folder("blip2_opt")).expect("readable") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, dir.path().join(path.file_name().expect("a name"))).expect("copied");
    }
    let case = golden.cases.iter().find(|case| {
        case.config["num_beams"] == 5
            && case.config["length_penalty"] == -1.0
            && case.config["sees_prompt"].is_null()
    });
    let case = case.expect("a case");
    let mut written = case.config.clone();
    written["transformers_version"] = "5.24.0".into();
    std::fs::write(dir.path().join("generation_config.json"), written.to_string()).expect("written");
    let (model, features) = open(dir.path());
    for preset in [None, Some(Preset::Hf)] {
        assert_eq!(tokens(&model, &features, &golden.prompts, &model.generation(preset)), case.results);
    }
    std::fs::write(dir.path().join("generation_config.json"), r#"{"dola_layers": "high"}"#).expect("written");
    let error = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string();
    assert!(error.contains("dola_layers") && error.contains("generation_config.json"), "{error}");
}

#[test]
fn texts_that_leave_no_room_are_refused() {
    let (model, features) = open(&folder("blip2_opt"));
    let long = "x".repeat(200);
    let error = model.complete(&[(&features, &long)], &GenerationConfig::default()).expect_err("too long");
    assert!(error.to_string().contains("206 tokens"), "{error}");
    let config = GenerationConfig { max_length: Some(6), sees_prompt: true, ..GenerationConfig::default() };
    let error = model.complete(&[(&features, "")], &config).expect_err("no room");
    assert!(error.to_string().contains("max_length"), "{error}");
}
