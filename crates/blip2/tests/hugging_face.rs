//! Tiny BLIP-2 models in Hugging Face folders against transformers' own (`tools/golden_blip2.py`).

use std::path::{Path, PathBuf};

use blip2::generate::GenerationConfig;
use blip2::image::{self, Limits, Orientation};
use blip2::model::{Blip2, ImageFeatures, OpenOptions};
use serde::Deserialize;
use serde_json::Value as Json;

const FAMILIES: [&str; 2] = ["blip2_opt", "blip2_t5"];

#[derive(Deserialize)]
struct Expected {
    image_tokens: Vec<Vec<f32>>,
    soft_tokens: Vec<Vec<f32>>,
    max_new_tokens: usize,
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Text {
    prompt: String,
    num_beams: usize,
    token_ids: Vec<u32>,
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn expected(family: &str) -> Expected {
    let text = std::fs::read_to_string(golden(family).join("expected.json")).expect("readable");
    serde_json::from_str(&text).expect("JSON")
}

fn features(model: &Blip2) -> ImageFeatures {
    let picture =
        image::open(golden("blip2.png"), &Limits::default(), Orientation::AsStored).expect("a picture");
    model.encode(&[picture]).expect("features").remove(0)
}

fn copy(family: &str, to: &Path) {
    for entry in std::fs::read_dir(golden(family)).expect("readable") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
}

/// A copy of a golden folder whose configuration is changed.
fn changed(family: &str, change: impl Fn(&mut Json)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    copy(family, dir.path());
    let path = dir.path().join("config.json");
    let mut config: Json = serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
    change(&mut config);
    std::fs::write(&path, config.to_string()).expect("written");
    dir
}

fn generation(num_beams: usize, max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig { num_beams, max_new_tokens, ..GenerationConfig::default() }
}

/// Captions and answers; what else the file has is for the models that begin their captions.
fn check_texts(model: &Blip2, expected: &Expected) {
    let features = features(model);
    let mut n_compared = 0;
    for text in expected.texts.iter().filter(|text| text.prompt != "a photo of") {
        let generation = generation(text.num_beams, expected.max_new_tokens);
        let answers = if text.prompt.is_empty() {
            model.caption(&[&features], &generation)
        } else {
            model.ask(&[(&features, "which city is this?")], &generation)
        };
        let answers = answers.expect("an answer");
        assert_eq!(answers[0][0].token_ids, text.token_ids, "{:?}, {} beams", text.prompt, text.num_beams);
        n_compared += 1;
    }
    assert_eq!(n_compared, 4);
}

#[test]
fn pictures_become_the_tokens_of_transformers() {
    for family in FAMILIES {
        let (model, expected) =
            (Blip2::open(golden(family), &OpenOptions::default()).expect("a model"), expected(family));
        let tokens = features(&model).tokens().to_vec2::<f32>().expect("rows");
        assert_eq!(tokens.len(), expected.image_tokens.len());
        for (found, expected) in tokens.iter().flatten().zip(expected.image_tokens.iter().flatten()) {
            assert!((found - expected).abs() < 1e-4, "{family}: {found} {expected}");
        }
        let soft = model.soft_tokens(&[&features(&model)]).expect("soft tokens");
        let soft = soft[0].to_vec2::<f32>().expect("rows");
        for (found, expected) in soft.iter().flatten().zip(expected.soft_tokens.iter().flatten()) {
            assert!((found - expected).abs() < 1e-4, "{family}: {found} {expected}");
        }
        check_texts(&model, &expected);
    }
}

/// An old revision has no image token; the text is the same.
#[test]
fn old_and_new_layout_write_the_same() {
    for family in FAMILIES {
        let old = changed(family, |config| {
            for field in ["image_token_index", "image_token_id"] {
                config.as_object_mut().expect("an object").remove(field);
            }
        });
        let options = OpenOptions { stage1: false, ..OpenOptions::default() };
        let model = Blip2::open(old.path(), &options).expect("a model");
        let expected = expected(family);
        let answers =
            model.caption(&[&features(&model)], &generation(1, expected.max_new_tokens)).expect("a caption");
        assert_eq!(answers[0][0].token_ids, expected.texts[0].token_ids, "{family}");
    }
}

#[test]
fn a_coco_model_begins_its_captions() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path().join("blip2-opt-2.7b-coco");
    std::fs::create_dir(&folder).expect("made");
    copy("blip2_opt", &folder);
    let model = Blip2::open(&folder, &OpenOptions::default()).expect("a model");
    let expected = expected("blip2_opt");
    for text in expected.texts.iter().filter(|text| text.prompt == "a photo of") {
        let generation = generation(text.num_beams, expected.max_new_tokens);
        let answers = model.caption(&[&features(&model)], &generation).expect("a caption");
        assert_eq!(answers[0][0].token_ids, text.token_ids);
    }
}

/// A conversation with an encoder-decoder model reads its whole prompt at every turn.
#[test]
fn conversations_equal_their_questions_asked_alone() {
    for family in FAMILIES {
        let model = Blip2::open(golden(family), &OpenOptions::default()).expect("a model");
        let features = features(&model);
        let generation = generation(1, 4);
        let alone = model.ask(&[(&features, "who?")], &generation).expect("an answer")[0][0].clone();
        let mut chat = model.chat(&features).expect("a chat");
        let first =
            chat.ask("who?", &generation, &mut |_| std::ops::ControlFlow::Continue(())).expect("an answer");
        assert_eq!(first.token_ids, alone.token_ids, "{family}");
        chat.ask("where?", &generation, &mut |_| std::ops::ControlFlow::Continue(())).expect("an answer");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Json)| {
        let dir = changed("blip2_opt", change);
        Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string()
    };
    for (message, expected) in [
        (refused(&|c| c["model_type"] = "llava".into()), "llava"),
        (refused(&|c| c["text_config"]["model_type"] = "gpt2".into()), "text_config.model_type"),
        (refused(&|c| c["vision_config"]["num_hidden_layers"] = 3.into()), "vision_model.encoder.layers.2"),
        (refused(&|c| c["vision_config"]["num_hidden_layers"] = 1.into()), "vision_model.encoder.layers.1"),
        (refused(&|c| c["vision_config"]["hidden_act"] = "relu".into()), "vision_config.hidden_act"),
        (refused(&|c| c["vision_config"]["image_size"] = (-3).into()), "vision_config.image_size"),
        (refused(&|c| c["vision_config"]["image_size"] = 42.into()), "preprocessor_config.json"),
        (refused(&|c| c["qformer_config"]["hidden_size"] = 33.into()), "qformer.hidden_size"),
        (refused(&|c| c["num_query_tokens"] = 6.into()), "query_tokens"),
        (refused(&|c| c["text_config"]["vocab_size"] = 200.into()), "embed_tokens"),
    ] {
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let dir = changed("blip2_opt", |_| {});
    std::fs::remove_file(dir.path().join("tokenizer.json")).expect("removed");
    let message = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string();
    assert!(message.contains("tokenizer.json"), "{message}");
    std::fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    let message = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string();
    assert!(message.contains("model.safetensors"), "{message}");
}
