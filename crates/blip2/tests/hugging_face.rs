//! Tiny BLIP-2 models in Hugging Face folders against transformers' own (`tools/golden_blip2.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::generate::GenerationConfig;
use blip2::image::{self, Limits, Pixels};
use blip2::model::{Blip2, GenerationDefaults, Given, ImageFeatures, OpenOptions, Preset, check_prompt};
use blip2::text::{AnswerForm, Turn};
use blip2::weights::safetensors::{NamedTensor, Safetensors, write_safetensors};
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
    let picture = image::open(golden("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture");
    model.encode(&[picture]).expect("features").remove(0)
}

fn copy(family: &str, to: &Path) {
    for entry in std::fs::read_dir(golden(family)).expect("readable") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
}

/// The golden folder of a family with these values in the tensors of `like`.
fn with_values(family: &str, like: &Safetensors, values: &[(&str, Vec<f32>)]) -> tempfile::TempDir {
    let tensors: Vec<_> = values
        .iter()
        .map(|(name, values)| NamedTensor::f32(*name, like.shape(name).expect("a shape"), values))
        .collect();
    let folder = changed(family, |_| {});
    write_safetensors(folder.path().join("model.safetensors"), &tensors, &BTreeMap::new()).expect("written");
    folder
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
    for family in FAMILIES.into_iter().chain(["blip2_opt_narrow"]) {
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

/// What a folder says of its training holds before its name, and before what its family does.
#[test]
fn a_folder_is_spoken_to_as_it_was_trained() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path().join("not-coco");
    std::fs::create_dir(&folder).expect("made");
    copy("blip2_opt", &folder);
    let path = folder.join("config.json");
    let published: Json = serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
    let open = |trained_with: Json| {
        let mut config = published.clone();
        config["trained_with"] = trained_with;
        std::fs::write(&path, config.to_string()).expect("written");
        Blip2::open(&folder, &OpenOptions::default())
    };
    let stage2 = |model: &Blip2| model.config().stage2.clone().expect("stage 2");
    let usual = stage2(&open(Json::Null).expect("a model"));
    assert_eq!(usual.instruction, "a photo of");
    let prompt = serde_json::json!({"kind": "plain", "template": "{image}{prompt}!", "bos": true, "end_of_answer": ".",
        "between_turns": " "});
    let trained_with = serde_json::json!({"instruction": "", "prompt": prompt, "image_size": 42});
    let model = open(trained_with).expect("a model");
    let found = stage2(&model);
    assert_eq!(found.instruction, "");
    assert_eq!(serde_json::to_value(&found.prompt).expect("JSON")["template"], prompt["template"]);
    assert_eq!((found.chat_prompt, found.caption_prompt), (None, usual.caption_prompt));
    let (features_of_nine, generation) = (features(&model), generation(1, 8));
    assert_eq!(features_of_nine.tokens().dims(), [10, 24], "nine patches and the class token");
    // The end is the format's, not the line break that the folder names.
    let form = model.grammar(&AnswerForm::Regex("ab".into()), &generation).expect("a grammar");
    let answers = model.ask_for(&[(&features_of_nine, "who?")], &generation, Some(&form));
    let dot = model.language_tokenizer().expect("a tokenizer").encode_text(".").expect("tokens");
    assert_eq!(answers.expect("an answer")[0][0].token_ids.last(), dot.last());
    let larger = OpenOptions { image_size: Some(56), ..OpenOptions::default() };
    let model = Blip2::open(&folder, &larger).expect("a model");
    assert_eq!(features(&model).tokens().dims(), [17, 24], "the caller's word is the last");
    for (wrong, expected) in [
        (serde_json::json!({"image_size": 13}), "trained_with.image_size"),
        (serde_json::json!({"instruction": 1}), "trained_with"),
    ] {
        let error = open(wrong).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// The text of LAVIS's demo, for both families; one with an encoder reads all of it at every turn.
#[test]
fn conversations_are_the_text_of_their_turns() {
    for family in FAMILIES {
        let model = Blip2::open(golden(family), &OpenOptions::default()).expect("a model");
        let features = features(&model);
        let generation = generation(1, 4);
        let alone =
            |text: &str| model.complete(&[(&features, text)], &generation).expect("an answer")[0][0].clone();
        let mut chat = model.chat(&features).expect("a chat");
        let mut said = String::new();
        for question in ["who?", "where is it?", "why?"] {
            said += &format!("Question: {question} Answer:");
            let answer = chat
                .ask(question, &generation, &mut |_| std::ops::ControlFlow::Continue(()))
                .expect("an answer");
            assert_eq!(answer.token_ids, alone(&said).token_ids, "{family}: {said}");
            assert!(!answer.text.is_empty(), "{family}");
            said += &format!(" {}. ", answer.text);
        }
    }
}

#[derive(Deserialize)]
struct ExpectedMatches {
    twice_the_size: Vec<Vec<f32>>,
    image_embeds: Vec<Vec<f32>>,
    texts: Vec<ExpectedMatch>,
}

#[derive(Deserialize)]
struct ExpectedMatch {
    text: String,
    itm_logits: [f32; 2],
    itc: f32,
    text_embeds: Vec<f32>,
    relevance: Vec<f32>,
}

#[track_caller]
fn assert_close<'a>(found: impl IntoIterator<Item = &'a f32>, expected: impl IntoIterator<Item = &'a f32>) {
    let (found, expected): (Vec<_>, Vec<_>) = (found.into_iter().collect(), expected.into_iter().collect());
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.into_iter().zip(expected) {
        assert!((found - expected).abs() < 1e-5 * expected.abs().max(1.0), "{found} {expected}");
    }
}

#[test]
fn matches_and_features_are_those_of_transformers() {
    let model = Blip2::open(golden("blip2_itm"), &OpenOptions::default()).expect("a model");
    let text = std::fs::read_to_string(golden("blip2_itm").join("expected.json")).expect("readable");
    let expected: ExpectedMatches = serde_json::from_str(&text).expect("JSON");
    let features = features(&model);
    let texts: Vec<&str> = expected.texts.iter().map(|text| text.text.as_str()).collect();
    assert_close(
        &model.embed_images(&[&features]).expect("features")[0],
        expected.image_embeds.iter().flatten(),
    );
    let logits = model.itm_logits(&features, &texts).expect("logits");
    let scores = model.match_texts(&features, &texts).expect("scores");
    let embeds = model.embed_texts(&texts).expect("features");
    for (i, text) in expected.texts.iter().enumerate() {
        assert_close(&logits[i], &text.itm_logits);
        assert_close(&embeds[i], &text.text_embeds);
        assert_close([&scores[i].itc_similarity], [&text.itc]);
    }
    // The public conversion has dropped the temperature; labels can be compared all the same.
    let labels = model.classify(&features, &["cat", "dog"], "a {label}").expect("scores");
    assert!((labels[0].probability + labels[1].probability - 1.0).abs() < 1e-6);
    let error = model.caption(&[&features], &GenerationConfig::default()).expect_err("refused").to_string();
    assert!(error.contains("stage-2"), "{error}");
}

#[test]
fn pictures_of_another_size_are_seen_as_by_transformers() {
    let open = |image_size| {
        Blip2::open(
            golden("blip2_itm"),
            &OpenOptions { image_size: Some(image_size), ..OpenOptions::default() },
        )
    };
    let text = std::fs::read_to_string(golden("blip2_itm").join("expected.json")).expect("readable");
    let expected: ExpectedMatches = serde_json::from_str(&text).expect("JSON");
    let tokens = features(&open(56).expect("a model")).tokens().flatten_all().expect("rows");
    assert_close(&tokens.to_vec1::<f32>().expect("numbers"), expected.twice_the_size.iter().flatten());
    let error = open(0).expect_err("refused").to_string();
    assert!(error.contains("image_size"), "{error}");
}

/// The norm behind the encoder has another epsilon in LAVIS than in transformers, whatever the folder says of it.
#[test]
fn presets_compute_with_the_epsilons_of_their_source() {
    let soft_tokens = |folder: &Path, preset| {
        let model = Blip2::open(folder, &OpenOptions { preset, ..OpenOptions::default() }).expect("a model");
        let rows = model.soft_tokens(&[&features(&model)]).expect("rows").remove(0);
        rows.flatten_all().and_then(|rows| rows.to_vec1::<f32>()).expect("numbers")
    };
    let eps = |name: &str, eps: f64| changed("blip2_opt", |json| json["vision_config"][name] = eps.into());
    let plain = golden("blip2_opt");
    let lavis = soft_tokens(&plain, Some(Preset::Lavis));
    assert_eq!(soft_tokens(&plain, None), soft_tokens(&plain, Some(Preset::Hf)));
    assert_ne!(lavis, soft_tokens(&plain, None));
    let converted = eps("post_layernorm_eps", 1e-5);
    assert_eq!(lavis, soft_tokens(converted.path(), None));
    assert_eq!(soft_tokens(&plain, None), soft_tokens(converted.path(), Some(Preset::Hf)));
    // An old folder says it of all the encoder's norms.
    let old = eps("layer_norm_eps", 1e-5);
    assert_eq!(lavis, soft_tokens(old.path(), Some(Preset::Lavis)));
    assert_ne!(lavis, soft_tokens(old.path(), None));
}

/// LAVIS cleans what is compared as it cleans captions; transformers compares it as it is.
#[test]
fn presets_prepare_texts_as_their_source_does() {
    let open = |preset| {
        Blip2::open(golden("blip2_itm"), &OpenOptions { preset, ..OpenOptions::default() }).expect("a model")
    };
    let (given, cleaned) = ("Two dogs (running) on the red sofa.", "two dogs running on the red sofa");
    let (own, hf, lavis) = (open(None), open(Some(Preset::Hf)), open(Some(Preset::Lavis)));
    let n_tokens = |model: &Blip2| model.n_matcher_tokens(&[given, cleaned]).expect("tokens");
    let n_tokens_of = |model: &Blip2, text: &str| model.n_matcher_tokens(&[text]).expect("tokens")[0];
    // Two brackets and a full stop.
    assert_eq!(n_tokens(&lavis)[0], n_tokens(&lavis)[1]);
    assert_eq!(n_tokens(&hf)[0], n_tokens(&hf)[1] + 3);
    assert_eq!(n_tokens(&own), n_tokens(&hf));
    let scores = |model: &Blip2, text: &str| model.match_texts(&features(model), &[text]).expect("scores");
    assert_eq!(scores(&lavis, given), scores(&lavis, cleaned));
    assert_ne!(scores(&hf, given), scores(&hf, cleaned));
    assert_eq!(scores(&hf, given), scores(&own, given));
    // Of a text that is matched LAVIS reads the beginning (here what fits), whatever follows; what is embedded is read whole.
    let (begins, goes_on) = ("the cat ".repeat(7), "the cat ".repeat(8) + "a red dog on the sofa");
    assert_eq!(n_tokens_of(&lavis, &begins), 16);
    assert_eq!(scores(&lavis, &goes_on), scores(&lavis, &begins));
    let logits = |text: &str| lavis.itm_logits(&features(&lavis), &[text]).expect("logits");
    assert_eq!(logits(&goes_on), logits(&begins));
    let embed = |text: &str| lavis.embed_candidates(&[text]).expect("a row");
    assert_eq!(embed(&goes_on), embed(&begins));
    assert!(lavis.embed_texts(&[goes_on.as_str()]).is_err());
    assert!(hf.match_texts(&features(&hf), &[goes_on.as_str()]).is_err());
    // A text of which nothing is left is refused.
    assert!(lavis.match_texts(&features(&lavis), &["(...)"]).is_err());
}

/// What a command checks its settings against before it opens the model is what the opened model says.
#[test]
fn the_defaults_of_a_folder_are_those_of_its_model() {
    let dir = changed("blip2_opt", |_| {});
    let settings = r#"{"num_beams": 3, "max_length": 40, "repetition_penalty": 1.2}"#;
    std::fs::write(dir.path().join("generation_config.json"), settings).expect("written");
    let model = Blip2::open(dir.path(), &OpenOptions::default()).expect("a model");
    for preset in [None, Some(Preset::Hf), Some(Preset::Lavis)] {
        let defaults = GenerationDefaults::read(dir.path(), preset).expect("defaults");
        for (found, of_model) in
            [(defaults.captions, model.generation(preset)), (defaults.answers, model.answering(preset))]
        {
            assert_eq!(found, GenerationConfig { eos_token_id: Vec::new(), ..of_model }, "{preset:?}");
        }
    }
}

/// Grad-CAM over the picture's patches; the golden's first token is the class token.
#[test]
fn a_heat_map_is_the_weighted_attention_of_transformers() {
    let model = Blip2::open(golden("blip2_itm"), &OpenOptions::default()).expect("a model");
    let text = std::fs::read_to_string(golden("blip2_itm").join("expected.json")).expect("readable");
    let expected: ExpectedMatches = serde_json::from_str(&text).expect("JSON");
    let features = features(&model);
    for text in &expected.texts {
        let map = model.explain_match(&features, &text.text).expect("a map");
        let largest = text.relevance[1..].iter().copied().fold(0.0, f32::max);
        let scaled: Vec<f32> = text.relevance[1..].iter().map(|x| x / largest).collect();
        assert_eq!(map.side, 2);
        for (found, expected) in map.values.iter().zip(&scaled) {
            assert!((found - expected).abs() < 1e-3, "{}: {:?} {scaled:?}", text.text, map.values);
        }
    }
}

#[test]
fn words_of_an_answer_have_maps_of_their_own() {
    for family in ["blip2_opt", "blip2_t5"] {
        words_have_maps(&Blip2::open(golden(family), &OpenOptions::default()).expect("a model"));
    }
}

fn words_have_maps(model: &Blip2) {
    let features = features(model);
    let question = [Turn::open("what is this?")];
    let map = |word| model.explain_answer(&features, &question, "a red cat", word).expect("a map");
    let (whole, red, cat) = (map(None), map(Some("red".into())), map(Some("CAT".into())));
    for map in [&whole, &red, &cat] {
        assert_eq!(map.values.iter().copied().fold(0.0, f32::max), 1.0, "{map:?}");
    }
    assert!(red != cat && whole != red);
    let caption = model.explain_answer(&features, &[], "a red cat", None).expect("a map");
    let later = [Turn::answered("who?", "a dog"), question[0].clone()];
    let later = model.explain_answer(&features, &later, "a red cat", None).expect("a map");
    assert!(caption != whole && later != whole);
    let error = model.explain_answer(&features, &[], "a red cat", Some("dog".into())).expect_err("refused");
    assert!(error.to_string().contains("dog"), "{error}");
}

/// The tensors of a golden folder stored as `dtype`, and a copy of those values as f32.
fn halved(family: &str, to_half: fn(f32) -> (Vec<u8>, f32), dtype: &str) -> [tempfile::TempDir; 2] {
    let bytes = std::fs::read(golden(family).join("model.safetensors")).expect("readable");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
    [dtype, "F32"].map(|stored| {
        let dir = changed(family, |_| {});
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let data: Vec<u8> = view
                .data()
                .chunks_exact(4)
                .flat_map(|number| {
                    let (half, value) = to_half(f32::from_le_bytes(number.try_into().expect("four bytes")));
                    if stored == "F32" { value.to_le_bytes().to_vec() } else { half }
                })
                .collect();
            (name, view.shape().to_vec(), data)
        });
        let tensors: Vec<_> = tensors.collect();
        let dtype = match stored {
            "F16" => safetensors::Dtype::F16,
            "BF16" => safetensors::Dtype::BF16,
            _ => safetensors::Dtype::F32,
        };
        let views = tensors.iter().map(|(name, shape, data)| {
            let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), data).expect("a view");
            (name.clone(), view)
        });
        let file = safetensors::serialize(views, None).expect("serialised");
        std::fs::write(dir.path().join("model.safetensors"), file).expect("written");
        dir
    })
}

/// Half-precision weights stay half in memory, and their products are those of the same numbers in f32.
#[test]
fn half_precision_weights_are_computed_with_in_f32() {
    let f16 = |x: f32| (half::f16::from_f32(x).to_le_bytes().to_vec(), half::f16::from_f32(x).to_f32());
    let bf16 = |x: f32| (half::bf16::from_f32(x).to_le_bytes().to_vec(), half::bf16::from_f32(x).to_f32());
    for family in FAMILIES {
        for [half, whole] in [halved(family, f16, "F16"), halved(family, bf16, "BF16")] {
            let models =
                [half, whole].map(|dir| Blip2::open(dir.path(), &OpenOptions::default()).expect("a model"));
            let soft = models.each_ref().map(|model| {
                let rows = model.soft_tokens(&[&features(model)]).expect("rows");
                rows[0].flatten_all().expect("rows").to_vec1::<f32>().expect("numbers")
            });
            assert_eq!(soft[0], soft[1], "{family}");
            let texts = models.each_ref().map(|model| {
                let answers = model.caption(&[&features(model)], &generation(2, 8)).expect("a caption");
                (answers[0][0].token_ids.clone(), answers[0][0].text.clone())
            });
            assert_eq!(texts[0], texts[1], "{family}");
            let [half, whole] = models.each_ref().map(|model| model.language_model().expect("one").n_bytes());
            assert!(half * 10 < whole * 7, "{family}: {half} of {whole} bytes");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused_by = |change: &dyn Fn(&mut Json)| refused(&changed("blip2_opt", change));
    for (message, expected) in [
        (refused_by(&|c| c["model_type"] = "llava".into()), "llava"),
        (refused_by(&|c| c["architectures"][0] = "Blip2Model".into()), "Blip2Model"),
        (refused_by(&|c| c["text_config"]["model_type"] = "gpt2".into()), "text_config.model_type"),
        (
            refused_by(&|c| c["vision_config"]["num_hidden_layers"] = 3.into()),
            "vision_model.encoder.layers.2",
        ),
        (
            refused_by(&|c| c["vision_config"]["num_hidden_layers"] = 1.into()),
            "vision_model.encoder.layers.1",
        ),
        (refused_by(&|c| c["vision_config"]["hidden_act"] = "relu".into()), "vision_config.hidden_act"),
        (refused_by(&|c| c["vision_config"]["image_size"] = (-3).into()), "vision_config.image_size"),
        (refused_by(&|c| c["vision_config"]["image_size"] = 42.into()), "preprocessor_config.json"),
        (refused_by(&|c| c["vision_config"]["patch_size"] = 7.into()), "position_embedding"),
        (refused_by(&|c| c["qformer_config"]["hidden_size"] = 33.into()), "qformer.hidden_size"),
        (refused_by(&|c| c["num_query_tokens"] = 6.into()), "query_tokens"),
        (refused_by(&|c| c["text_config"]["vocab_size"] = 263.into()), "embed_tokens"),
    ] {
        assert!(message.contains(expected), "{expected}: {message}");
    }
    // Errors of a configuration name its file.
    let dir = changed("blip2_opt", |c| c["vision_config"]["hidden_act"] = "relu".into());
    let expected = format!("{}: `vision_config.hidden_act` is", dir.path().join("config.json").display());
    assert!(refused(&dir).starts_with(&expected), "{}", refused(&dir));
    let dir = changed("blip2_opt", |_| {});
    std::fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
    assert!(refused(&dir).contains("neither model.safetensors nor model.safetensors.index.json"));
    let file = dir.path().join("tokenizer.json");
    let error = Blip2::open(&file, &OpenOptions::default()).expect_err("refused").to_string();
    assert!(error.contains(&format!("a model is a folder: give {}", dir.path().display())), "{error}");
    let config = std::fs::File::create(dir.path().join("config.json")).expect("made");
    config.set_len(1 << 40).expect("a file with holes");
    assert!(refused(&dir).contains("config.json: has 1099511627776 bytes"), "{}", refused(&dir));
}

/// A golden folder with other tensors: `change` gives the name and shape that each gets, or leaves it out; `more` come on top.
fn with_tensors(
    family: &str,
    change: impl Fn(&str, Vec<usize>) -> Option<(String, Vec<usize>)>,
    more: &[&str],
) -> tempfile::TempDir {
    let whole = Safetensors::open(golden(family)).expect("weights");
    let kept: Vec<_> = whole
        .names()
        .filter_map(|name| {
            let (new, shape) = change(name, whole.shape(name).expect("a shape").to_vec())?;
            Some((new, shape, whole.read_f32(name).expect("values")))
        })
        .collect();
    let mut tensors: Vec<_> =
        kept.iter().map(|(name, shape, values)| NamedTensor::f32(name, shape.as_slice(), values)).collect();
    tensors.extend(more.iter().map(|name| NamedTensor::f32(*name, [1], &[0.0])));
    let dir = changed(family, |_| {});
    write_safetensors(dir.path().join("model.safetensors"), &tensors, &BTreeMap::new()).expect("written");
    dir
}

/// `qkv_bias` false is an encoder whose queries, keys and values have biases of zero.
#[test]
fn an_encoder_may_lack_the_biases_of_attention() {
    let is_bias = |name: &str| name.ends_with("self_attn.qkv.bias");
    let without =
        with_tensors("blip2_opt", |name, shape| (!is_bias(name)).then(|| (name.into(), shape)), &[]);
    assert!(refused(&without).contains("layers.1.self_attn.qkv.bias"), "{}", refused(&without));
    let config = changed("blip2_opt", |c| c["vision_config"]["qkv_bias"] = false.into());
    std::fs::copy(config.path().join("config.json"), without.path().join("config.json")).expect("copied");

    let whole = Safetensors::open(golden("blip2_opt")).expect("weights");
    let values = |name: &str| {
        let values = whole.read_f32(name).expect("values");
        if is_bias(name) { vec![0.0; values.len()] } else { values }
    };
    let all: Vec<_> = whole.names().map(|name| (name, values(name))).collect();
    let zero = with_values("blip2_opt", &whole, &all);

    let tokens = |folder: &Path| {
        let model = Blip2::open(folder, &OpenOptions::default()).expect("a model");
        features(&model).tokens().to_vec2::<f32>().expect("rows")
    };
    assert_eq!(tokens(without.path()), tokens(zero.path()));
    assert_ne!(tokens(without.path()), tokens(&golden("blip2_opt")));
}

#[test]
fn all_tensors_that_are_wrong_are_named_at_once_before_a_weight_is_read() {
    let dir = with_tensors(
        "blip2_opt",
        |name, mut shape| match name {
            "query_tokens" | "language_model.model.decoder.layers.1.fc2.bias" => None,
            "qformer.layernorm.bias" => Some(("qformer.layernorm.offset".into(), shape)),
            "vision_model.encoder.layers.0.mlp.fc1.weight" => {
                shape.reverse();
                Some((name.into(), shape))
            }
            _ => Some((name.into(), shape)),
        },
        &["language_model.model.decoder.layers.2.fc2.bias"],
    );
    // Nothing in the file is a number, which reading would notice.
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("readable");
    let n_header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    bytes[n_header..].fill(0xff);
    std::fs::write(&path, bytes).expect("written");
    let error = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused");
    let message = error.to_string();
    assert!(
        message.starts_with(&format!("{}: ", dir.path().display())) && !message.contains('\n'),
        "{message}"
    );
    let blip2::Error::Folder { source, .. } = error else { panic!("{message}") };
    let blip2::Error::TensorNames { missing, misshapen, unknown } = *source else { panic!("{message}") };
    let of_layer = |i: usize| format!("language_model.model.decoder.layers.{i}.fc2.bias");
    assert_eq!(missing, ["query_tokens".into(), "qformer.layernorm.bias".into(), of_layer(1)]);
    assert_eq!(misshapen, ["vision_model.encoder.layers.0.mlp.fc1.weight is [24, 40], expected [40, 24]"]);
    assert_eq!(unknown, [of_layer(2), "qformer.layernorm.offset".into()]);

    let matching = with_tensors(
        "blip2_itm",
        |name, shape| (!name.starts_with("itm_head.")).then(|| (name.into(), shape)),
        &["temp.scale"],
    );
    let message = refused(&matching);
    assert!(message.contains("missing: itm_head.weight, itm_head.bias; unknown: temp.scale"), "{message}");
    // A model that writes lacks its projection; it is no model that matches.
    let none =
        |name: &str, shape| (!name.starts_with("language_projection")).then(|| (name.to_owned(), shape));
    let message = refused(&with_tensors("blip2_t5", none, &[]));
    assert!(message.contains("missing: language_projection.weight, language_projection.bias"), "{message}");
    assert!(!message.contains("unknown"), "{message}");
}

/// Copies of tied weights, counters, and names that published files have besides or instead.
#[test]
fn what_says_nothing_new_may_be_in_a_file() {
    let same = |name: &str, shape| Some((name.to_owned(), shape));
    let headless = |name: &str, shape| {
        Some((name.replace("language_model.model.decoder.", "language_model.decoder."), shape))
    };
    let counters = ["embeddings.position_ids", "qformer.embeddings.position_ids"];
    let tied = ["language_model.lm_head.weight", counters[0], counters[1]];
    let copies = [
        "language_model.encoder.embed_tokens.weight",
        "language_model.decoder.embed_tokens.weight",
        "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ];
    for dir in [
        with_tensors("blip2_opt", same, &tied),
        with_tensors("blip2_opt", headless, &tied),
        with_tensors("blip2_t5", same, &copies),
        with_tensors("blip2_itm", same, &counters),
    ] {
        Blip2::open(dir.path(), &OpenOptions::default()).expect("a model");
    }
}

fn refused(dir: &tempfile::TempDir) -> String {
    Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string()
}

/// The weights, which take long to read, are not touched when the tokenizer is not theirs.
#[test]
fn a_tokenizer_of_another_model_is_refused_before_the_weights_are_read() {
    let dir = changed("blip2_opt", |_| {});
    let nothing = [&2u64.to_le_bytes()[..], b"{}"].concat(); // a header without a tensor
    std::fs::write(dir.path().join("model.safetensors"), nothing).expect("written");
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: Json = serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
    tokenizer["model"]["vocab"]["another"] = 264.into();
    std::fs::write(&path, tokenizer.to_string()).expect("written");
    let message = refused(&dir);
    assert!(message.contains("265 tokens, the language model knows 264"), "{message}");
    std::fs::remove_file(path).expect("removed");
    assert!(refused(&dir).contains("has no tokenizer"), "{}", refused(&dir));
    // T5's 32,100 tokens are not OPT's 50,265, which its 50,272 rows hold.
    let dir = changed("blip2_opt", |config| config["text_config"]["vocab_size"] = 50_272.into());
    let message = refused(&dir);
    assert!(message.contains("the language model knows 50272"), "{message}");
}

/// In each part one value is no number, wherever that part's tensors are read.
#[test]
fn weights_that_are_no_numbers_are_refused_by_name() {
    for (family, names) in [
        (
            "blip2_opt",
            &[
                "vision_model.embeddings.patch_embedding.weight",
                "vision_model.encoder.layers.1.mlp.fc1.bias",
                "query_tokens",
                "qformer.encoder.layer.0.attention.attention.query.weight",
                "language_projection.weight",
                "language_model.model.decoder.embed_tokens.weight",
                "language_model.model.decoder.embed_positions.weight",
                "language_model.model.decoder.layers.1.fc2.bias",
            ][..],
        ),
        (
            "blip2_t5",
            &[
                "language_model.shared.weight",
                "language_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "language_model.decoder.final_layer_norm.weight",
            ],
        ),
    ] {
        let whole = Safetensors::open(golden(family)).expect("weights");
        let values: Vec<_> =
            whole.names().map(|name| (name, whole.read_f32(name).expect("values"))).collect();
        for (i, damaged) in names.iter().enumerate() {
            let mut values = values.clone();
            let (_, bad) =
                values.iter_mut().find(|(name, _)| name == damaged).expect("a tensor of this name");
            let at = bad.len() / 2;
            bad[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i % 3];
            let dir = with_values(family, &whole, &values);
            let message = refused(&dir);
            assert!(
                message.contains(damaged) && message.contains("infinite or not numbers"),
                "{damaged}: {message}"
            );
        }
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    for family in FAMILIES {
        let model = Blip2::open(golden(family), &OpenOptions::default()).expect("a model");
        let (features, question) = (features(&model), "why is that? ".repeat(400));
        let error = model.ask(&[(&features, &question)], &generation(1, 4)).expect_err("refused");
        assert!(
            matches!(error, blip2::Error::TextTooLong { n_tokens, limit } if n_tokens > limit),
            "{error}"
        );
        let mut chat = model.chat(&features).expect("a chat");
        let error = chat.ask(&question, &generation(1, 4), &mut |_| std::ops::ControlFlow::Continue(()));
        assert!(matches!(error, Err(blip2::Error::TextTooLong { .. })));
    }
}

/// Only the small files are looked at, so that nothing large is read first.
#[test]
fn a_prompt_longer_than_the_context_is_known_before_the_weights() {
    for family in FAMILIES {
        let dir = changed(family, |_| {});
        std::fs::remove_file(dir.path().join("model.safetensors")).expect("removed");
        let long = "why is that? ".repeat(400);
        for given in [Given::Text(&long), Given::Question(&long)] {
            let error = check_prompt(dir.path(), &[], given).expect_err("refused");
            assert!(
                matches!(error, blip2::Error::TextTooLong { n_tokens, limit } if n_tokens > limit),
                "{error}"
            );
            check_prompt(golden("blip2_itm"), &[], given).expect("not asked of a model that does not write");
        }
        check_prompt(dir.path(), &[], Given::Question("why?")).expect("it fits");
    }
    // The last text that fits, in the bytes that the golden tokenizer's tokens are: 120 rows, 5 queries, a mark, an answer.
    for (n_bytes, fits) in [(113, true), (114, false)] {
        let text = "a".repeat(n_bytes);
        assert_eq!(check_prompt(golden("blip2_opt"), &[], Given::Text(&text)).is_ok(), fits, "{n_bytes}");
    }
}

#[test]
fn token_ids_that_the_vocabulary_does_not_have_are_refused_by_name() {
    for family in FAMILIES {
        let config = std::fs::read(golden(family).join("config.json")).expect("readable");
        let config: Json = serde_json::from_slice(&config).expect("JSON");
        let n = config["text_config"]["vocab_size"].as_u64().expect("a number");
        for (field, value) in [
            ("/image_token_index", n),
            ("/text_config/eos_token_id", n),
            ("/text_config/bos_token_id", n + 7),
            ("/text_config/pad_token_id", n),
        ] {
            let dir = changed(family, |json| {
                let (part, name) = field.rsplit_once('/').expect("a path");
                json.pointer_mut(part).expect("a part")[name] = value.into();
            });
            let error = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string();
            let name = field.rsplit('/').next().expect("a name");
            assert!(error.contains(name) && error.contains(&format!("is {value}:")), "{field}: {error}");
        }
        for (name, value) in [
            ("eos_token_id", serde_json::json!([2, n])),
            ("bos_token_id", n.into()),
            ("pad_token_id", (-2).into()),
            ("bos_token_id", (-1).into()),
            ("decoder_start_token_id", n.into()),
            ("forced_bos_token_id", n.into()),
            ("forced_eos_token_id", n.into()),
            ("bad_words_ids", serde_json::json!([[1], [2, n]])),
        ] {
            let dir = changed(family, |_| {});
            let path = dir.path().join("generation_config.json");
            std::fs::write(&path, serde_json::json!({name: value}).to_string()).expect("written");
            let error = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string();
            let id = value.as_i64().filter(|id| *id < 0).map_or_else(|| n.to_string(), |id| id.to_string());
            let said =
                error.contains("generation_config.json") && error.contains(name) && error.contains(&id);
            assert!(said, "{name}: {error}");
        }
        // What cannot be chosen may be suppressed.
        let dir = changed(family, |_| {});
        let path = dir.path().join("generation_config.json");
        std::fs::write(path, serde_json::json!({"suppress_tokens": [n]}).to_string()).expect("written");
        Blip2::open(dir.path(), &OpenOptions::default()).expect("a model");
    }
}

/// As folders of the llama family are published; nothing is padded here.
#[test]
fn a_model_without_a_padding_token_opens_whichever_way_it_says_so() {
    for family in FAMILIES {
        for none in [Json::Null, (-1).into()] {
            let dir = changed(family, |json| json["text_config"]["pad_token_id"] = none.clone());
            let path = dir.path().join("generation_config.json");
            std::fs::write(path, serde_json::json!({"pad_token_id": none}).to_string()).expect("written");
            Blip2::open(dir.path(), &OpenOptions::default()).expect("a model");
        }
        for (field, value) in [("pad_token_id", -2), ("eos_token_id", -1)] {
            let dir = changed(family, |json| json["text_config"][field] = value.into());
            let error = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("refused").to_string();
            assert!(error.contains(&format!("text_config.{field}` is {value}")), "{error}");
        }
    }
}

/// The same of a folder of this project, whose language model is elsewhere.
#[test]
fn a_prompt_too_long_for_a_named_language_model_is_known_before_the_weights() {
    let dir = tempfile::tempdir().expect("a folder");
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/default-model/config.json");
    let mut config: Json = serde_json::from_slice(&std::fs::read(default).expect("read")).expect("JSON");
    config["stage2"]["language_model"] = "blip2_opt".into();
    config["stage2"].as_object_mut().expect("fields").remove("language_model_sha256");
    config["stage2"]["prompt"] = serde_json::json!({"kind": "plain", "template": "{image}{prompt}", "bos": true,
        "end_of_answer": "\n", "between_turns": " "});
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let frozen = golden("blip2_opt").parent().expect("a folder").to_owned();
    let long = "why is that? ".repeat(400);
    for given in [Given::Text(&long), Given::Question(&long)] {
        let error = check_prompt(dir.path(), std::slice::from_ref(&frozen), given).expect_err("refused");
        assert!(
            matches!(error, blip2::Error::TextTooLong { n_tokens, limit: 119 } if n_tokens > 119),
            "{error}"
        );
        check_prompt(dir.path(), &[], given).expect("what is missing is said when it is opened");
    }
    check_prompt(dir.path(), &[frozen], Given::Question("why?")).expect("it fits");
}

/// Folders of Hugging Face's cache are named after commits; what the model is called decides its captions' beginning.
#[test]
fn a_model_in_the_cache_has_its_name_on_the_hub() {
    let dir = tempfile::tempdir().expect("a folder");
    let snapshot = dir.path().join("models--Salesforce--blip2-opt-2.7b-coco/snapshots/0123456789abcdef");
    std::fs::create_dir_all(&snapshot).expect("made");
    copy("blip2_opt", &snapshot);
    let model = Blip2::open(&snapshot, &OpenOptions::default()).expect("a model");
    assert_eq!(model.config().name, "Salesforce/blip2-opt-2.7b-coco");
    assert_eq!(model.config().stage2.as_ref().expect("stage 2").instruction, "a photo of");
}
