//! The whole model on tiny random parts: what it says in a batch, in turns and from eight-bit weights.

#[path = "../../blip2/tests/support/golden.rs"]
mod golden;
#[path = "support/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use blip2::generate::GenerationConfig;
use blip2::layers::{Loader, Precision, TensorSource, Trainable};
use blip2::model::{
    Blip2, GenerationDefaults, ImageFeatures, ModelConfig, OpenOptions, Preset, Stage1Config, Stage2Config,
    VisionConfig,
};
use blip2::qformer::{QFormer, QFormerConfig, TextSide};
use blip2::text::{PromptFormat, Turn};
use blip2::weights::int8::{Storage, write_trained};
use golden::Golden;

/// A model folder of random weights with every part but the image encoder.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    tiny::write_language_model(&dir.path().join("language"));
    let stage1 = Golden::parse("stage1", include_bytes!("golden/stage1.safetensors"));
    let stage2 = Golden::parse("stage2", include_bytes!("golden/stage2.safetensors"));
    let qformer: QFormerConfig = stage1.metadata("config");
    let names = |golden: &Golden, with_text: bool| -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let trainable = Trainable::default();
        let loader = Loader::trainable(golden, &trainable, Precision::F32);
        let text = if with_text { TextSide::Whole } else { TextSide::None };
        QFormer::load(&qformer, &loader, text).expect("a Q-Former");
        if !with_text {
            loader.linear("language_projection", qformer.hidden_size, 32).expect("a projection");
        }
        let read = |name: String| {
            let tensor = (golden.shape(&name).expect("a shape"), golden.read_f32(&name).expect("values"));
            (name, tensor)
        };
        trainable.into_variables().into_keys().map(read).collect()
    };
    write_trained(dir.path(), "stage1", &names(&stage1, true), Storage::F32, usize::MAX).expect("written");
    write_trained(dir.path(), "stage2", &names(&stage2, false), Storage::F32, usize::MAX).expect("written");
    let mut vocabulary = vec!["[PAD]".to_owned(), "[UNK]".into(), "[CLS]".into(), "[SEP]".into()];
    vocabulary.extend(('a'..='z').flat_map(|c| [c.to_string(), format!("##{c}")]));
    vocabulary.extend((vocabulary.len() + 1..qformer.vocab_size).map(|id| format!("[unused{id}]")));
    std::fs::write(dir.path().join("vocab.txt"), vocabulary.join("\n")).expect("written");
    let config = ModelConfig {
        name: "tiny".into(),
        vision: VisionConfig::EfficientnetLite0 { file: "absent.pth".into(), sha256: None, image_size: None },
        qformer,
        stage1: Some(Stage1Config {
            weights: vec!["stage1.safetensors".into()],
            vocabulary: "vocab.txt".into(),
        }),
        stage2: Some(Stage2Config {
            weights: vec!["stage2.safetensors".into()],
            language_model: "language".into(),
            language_model_sha256: None,
            prompt: PromptFormat::ChatMl,
            caption_prompt: None,
            chat_prompt: None,
            instruction: "Describe it.".into(),
            generation: GenerationConfig { max_new_tokens: 8, ..GenerationConfig::default() },
            answering: None,
        }),
    };
    write_config(dir.path(), &serde_json::to_value(&config).expect("JSON"));
    dir
}

fn write_config(folder: &Path, config: &serde_json::Value) {
    std::fs::write(folder.join("config.json"), config.to_string()).expect("written");
}

fn open(folder: &Path) -> Blip2 {
    let options = OpenOptions { vision: false, ..OpenOptions::default() };
    Blip2::open(folder, &options).expect("a model")
}

/// Features of pictures that differ.
fn pictures() -> Vec<ImageFeatures> {
    (1..=3)
        .map(|i| {
            let rows = (0..7 * 40).map(|j| ((j * i) as f32 * 0.37).sin() * 2.0).collect();
            ImageFeatures::from_rows(rows, 40).expect("whole tokens")
        })
        .collect()
}

/// Most words would be unknown, and nothing would say so.
#[test]
fn a_vocabulary_that_is_cut_short_is_refused() {
    let dir = folder();
    let file = dir.path().join("vocab.txt");
    let whole = std::fs::read_to_string(&file).expect("a vocabulary");
    let lines: Vec<&str> = whole.lines().collect();
    std::fs::write(&file, lines[..lines.len() / 2].join("\n")).expect("written");
    let options = OpenOptions { vision: false, ..OpenOptions::default() };
    let error = Blip2::open(dir.path(), &options).expect_err("half a vocabulary").to_string();
    assert!(error.contains("vocab.txt") && error.contains("cut short"), "{error}");
}

#[test]
fn a_batch_says_what_its_singles_say() {
    let dir = folder();
    let (model, pictures) = (open(dir.path()), pictures());
    let questions = ["What?", "Where is this place, do you know?", "Who"];
    for num_beams in [1, 3] {
        let generation = GenerationConfig { num_beams, max_new_tokens: 8, ..GenerationConfig::default() };
        let all = model.caption(&pictures.iter().collect::<Vec<_>>(), &generation).expect("captions");
        for (picture, together) in pictures.iter().zip(&all) {
            assert_eq!(&model.caption(&[picture], &generation).expect("a caption")[0], together);
        }
        assert_ne!(all[0][0].token_ids, all[1][0].token_ids, "the picture makes a difference");
        let requests: Vec<_> = pictures.iter().zip(questions).collect();
        let all = model.ask(&requests, &generation).expect("answers");
        for (request, together) in requests.iter().zip(&all) {
            assert_eq!(&model.ask(&[*request], &generation).expect("an answer")[0], together);
        }
    }
    let texts = ["a cat", "dogs", "x"];
    let together = model.match_texts(&pictures[0], &texts).expect("scores");
    for (text, score) in texts.iter().zip(together) {
        assert_eq!(model.match_texts(&pictures[0], &[text]).expect("a score")[0], score);
    }
}

#[test]
fn a_conversation_equals_its_dialogue_read_anew() {
    let dir = folder();
    let (model, pictures) = (open(dir.path()), pictures());
    let generation = GenerationConfig { max_new_tokens: 6, ..GenerationConfig::default() };
    let mut chat = model.chat(&pictures[0]).expect("a chat");
    let mut turns: Vec<Turn> = Vec::new();
    // Eight turns are more than the context of 160 holds: the oldest are forgotten on the way.
    for question in ["What?", "Why?", "Which one?", "Who?", "A b c?", "When?", "How?", "And?"] {
        let mut streamed = String::new();
        let answer = chat
            .ask(question, &generation, &mut |text| {
                streamed.push_str(text);
                ControlFlow::Continue(())
            })
            .expect("an answer");
        assert_eq!(streamed.trim(), answer.text);
        let mut anew = model.chat(&pictures[0]).expect("a chat");
        anew.resume(turns.clone());
        let again = anew.ask(question, &generation, &mut |_| ControlFlow::Continue(())).expect("an answer");
        assert_eq!(again.token_ids, answer.token_ids, "{question}");
        turns = chat.turns().to_vec();
    }
    assert!(!turns.is_empty());
}

#[test]
fn a_refused_question_leaves_the_conversation_as_it_was() {
    let dir = folder();
    let (model, pictures) = (open(dir.path()), pictures());
    let mut chat = model.chat(&pictures[0]).expect("a chat");
    let generation = GenerationConfig { max_new_tokens: 4, ..GenerationConfig::default() };
    let quiet = &mut |_: &str| ControlFlow::Continue(());
    for question in ["  ", &"word ".repeat(100)] {
        assert!(chat.ask(question, &generation, quiet).is_err(), "{question}");
        assert!(chat.turns().is_empty());
    }
    chat.ask("What?", &generation, quiet).expect("an answer");
}

#[test]
fn choices_are_ranked_by_their_likelihood() {
    let dir = folder();
    let (model, pictures) = (open(dir.path()), pictures());
    let choices = ["yes", "no", "a long answer of several words"];
    let ranked = model.rank(&pictures[1], "Is it?", &choices).expect("a ranking");
    assert!((ranked.iter().map(|choice| choice.probability).sum::<f32>() - 1.0).abs() < 1e-5);
    assert!(ranked.windows(2).all(|pair| pair[0].log_likelihood >= pair[1].log_likelihood));
    for choice in &ranked {
        let alone = model.rank(&pictures[1], "Is it?", &[&choice.answer]).expect("a score");
        assert!((alone[0].log_likelihood - choice.log_likelihood).abs() < 1e-4);
    }
}

#[test]
fn labels_and_embeddings_agree_with_matching() {
    let dir = folder();
    let (model, pictures) = (open(dir.path()), pictures());
    let labels = ["cat", "dog", "bus"];
    let scores = model.classify(&pictures[2], &labels, "a {label}").expect("labels");
    let queries = &model.embed_images(&[&pictures[2]]).expect("rows")[0];
    for score in &scores {
        let text = &model.embed_texts(&[&format!("a {}", score.label)]).expect("rows")[0];
        let cosine = |query: &[f32]| query.iter().zip(text).map(|(a, b)| a * b).sum::<f32>();
        let best = queries.chunks_exact(16).map(cosine).fold(f32::MIN, f32::max);
        assert!((best - score.itc_similarity).abs() < 1e-5);
    }
    assert!(model.classify(&pictures[2], &labels, "no place").is_err());
    assert!(model.classify(&pictures[2], &[], "a {label}").is_err());
}

/// The captions of training were cleaned, and so is what is compared, unless transformers is to be imitated.
#[test]
fn texts_are_cleaned_but_with_the_preset_of_transformers() {
    let dir = folder();
    let n_tokens = |preset| {
        let options = OpenOptions { vision: false, preset, ..OpenOptions::default() };
        let model = Blip2::open(dir.path(), &options).expect("a model");
        model.n_matcher_tokens(&["a (cat)."]).expect("tokens")[0]
    };
    assert_eq!(n_tokens(None), n_tokens(Some(Preset::Lavis)));
    assert_eq!(n_tokens(Some(Preset::Hf)), n_tokens(None) + 3);
}

#[test]
fn a_wrong_folder_is_refused_by_name() {
    let dir = folder();
    let options = OpenOptions { vision: false, ..OpenOptions::default() };
    let path = dir.path().join("config.json");
    let good: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut config = good.clone();
        change(&mut config);
        write_config(dir.path(), &config);
        Blip2::open(dir.path(), &options).expect_err("refused").to_string()
    };
    assert!(refused(&|config| config["colour"] = "red".into()).contains("colour"));
    assert!(
        refused(&|config| config["stage2"]["instruction"] = " ".into())
            .contains("config.json: `stage2.instruction`")
    );
    assert!(
        refused(&|config| config["stage1"]["weights"][0] = "stage2.safetensors".into())
            .contains("has no tensor `qformer.")
    );
    assert!(
        refused(&|config| config["stage2"]["language_model"] = "nowhere.gguf".into())
            .contains("nowhere.gguf")
    );
    write_config(dir.path(), &good);
    let with_vision = Blip2::open(dir.path(), &OpenOptions::default()).expect_err("no encoder").to_string();
    assert!(with_vision.contains("absent.pth"), "{with_vision}");
    let error = open(dir.path()).encode(&[]).expect_err("no encoder").to_string();
    assert!(error.contains("image encoder"), "{error}");
}

/// A model opens with the frozen file it was trained with, and with no other; it names no file outside its folder.
/// A model says how it answers where that is not how it captions; a preset is the same for both.
#[test]
fn answers_have_their_own_settings() {
    let dir = folder();
    let model = open(dir.path());
    assert_eq!(model.answering(None), model.generation(None));
    let mut config = serde_json::to_value(model.config()).expect("JSON");
    config["stage2"]["answering"] = serde_json::json!({"num_beams": 3, "length_penalty": -1.0});
    write_config(dir.path(), &config);
    let model = open(dir.path());
    let (captions, answers) = (model.generation(None), model.answering(None));
    assert_eq!((captions.num_beams, captions.length_penalty), (1, 1.0));
    assert_eq!((answers.num_beams, answers.length_penalty), (3, -1.0));
    let defaults = GenerationDefaults::read(dir.path(), None).expect("defaults");
    assert_eq!((defaults.captions, defaults.answers), (captions, answers));
    assert_eq!(model.answering(Some(Preset::Lavis)), model.generation(Some(Preset::Lavis)));
    config["stage2"]["answering"]["num_beams"] = 0.into();
    write_config(dir.path(), &config);
    let options = OpenOptions { vision: false, ..OpenOptions::default() };
    let message = Blip2::open(dir.path(), &options).expect_err("refused").to_string();
    assert!(message.contains("num_beams"), "{message}");
}

#[test]
fn other_frozen_files_and_other_folders_are_refused() {
    let dir = folder();
    let path = dir.path().join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).expect("a configuration")).expect("JSON");
    std::fs::write(dir.path().join("absent.pth"), b"no weights").expect("written");
    let message = || Blip2::open(dir.path(), &OpenOptions::default()).expect_err("no encoder").to_string();
    config["vision"]["sha256"] = "00".repeat(32).into();
    write_config(dir.path(), &config);
    assert!(message().contains("not the file that the model was trained with"), "{}", message());
    // SHA-256 of "no weights": now the file itself is the trouble.
    config["vision"]["sha256"] = "c814b209e96a87cf0ca1fed24208a969aec4e530546fc4b7ddf194c72c0fe650".into();
    write_config(dir.path(), &config);
    assert!(!message().contains("SHA-256"), "{}", message());
    config["stage1"]["vocabulary"] = "../vocab.txt".into();
    write_config(dir.path(), &config);
    assert!(message().contains("stage1.vocabulary"), "{}", message());
}
