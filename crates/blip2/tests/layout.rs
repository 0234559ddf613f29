//! LAVIS checkpoints into Hugging Face folders and back (`tools/golden_lavis.py`): the same tensors, and the texts of
//! transformers' modules with the same weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blip2::Error;
use blip2::generate::GenerationConfig;
use blip2::image::{self, Limits, Pixels};
use blip2::layers::{Loader, Precision};
use blip2::model::layout::{self, ConvertOptions, Converted, FrozenParts, Layout};
use blip2::model::{Blip2, OpenOptions};
use blip2::vision::vit::{AlignCorners, Vit, VitConfig};
use blip2::weights::safetensors::{Safetensors, TensorAbout, stream_safetensors};
use blip2::weights::torch_pickle::write_torch;
use blip2::weights::{Checkpoint, StoredTensor};
use serde_json::Value as Json;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn lavis(name: &str) -> PathBuf {
    golden("lavis").join(name)
}

fn expected() -> Json {
    serde_json::from_slice(&fs::read(lavis("expected.json")).expect("readable")).expect("JSON")
}

fn read_json(path: PathBuf) -> Json {
    serde_json::from_slice(&fs::read(path).expect("readable")).expect("JSON")
}

/// The language model of a golden folder, as a folder of its own.
fn language_model(family: &str, at: &Path) {
    fs::create_dir(at).expect("made");
    let source = golden(&format!("blip2_{family}"));
    let config = read_json(source.join("config.json"));
    let mut text = config["text_config"].clone();
    // As published: neither knows what BLIP-2 makes of it.
    text["eos_token_id"] = if family == "opt" { 2 } else { 1 }.into();
    text.as_object_mut().expect("fields").remove("dense_act_fn");
    fs::write(at.join("config.json"), text.to_string()).expect("written");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(source.join(file), at.join(file)).expect("copied");
    }
    let checkpoint = Checkpoint::open(&source).expect("a checkpoint");
    write(&at.join("model.safetensors"), &checkpoint, |name| {
        Some(name.strip_prefix("language_model.")?.to_owned())
    });
}

/// Writes tensors of a checkpoint under other names.
fn write(path: &Path, checkpoint: &Checkpoint, rename: impl Fn(&str) -> Option<String>) {
    let names: Vec<(&str, String)> =
        checkpoint.names().into_iter().filter_map(|name| Some((name, rename(name)?))).collect();
    let about = |(name, new): &(&str, String)| {
        let StoredTensor { shape, encoding, .. } = checkpoint.stored(name).expect("a tensor");
        TensorAbout { name: new.clone(), shape, encoding }
    };
    let abouts: Vec<_> = names.iter().map(about).collect();
    let bytes = |i: usize, file: &mut dyn std::io::Write| {
        file.write_all(&checkpoint.stored(names[i].0).expect("a tensor").bytes)
    };
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        stream_safetensors(path, &abouts, &BTreeMap::new(), bytes).expect("written");
    } else {
        write_torch(path, "model", &abouts, bytes).expect("written");
    }
}

/// What `family`'s checkpoint needs beside it; the folder of the language model is made in `work`.
fn parts(family: &str, work: &Path) -> FrozenParts {
    let is_stage2 = family != "stage1";
    let folder = work.join(format!("language-model-{family}"));
    if is_stage2 && !folder.exists() {
        language_model(family, &folder);
    }
    FrozenParts {
        vision: (family == "opt").then(|| lavis("eva_vit.pth")),
        language_model: is_stage2.then_some(folder),
        vocabulary: (!is_stage2).then(|| lavis("vocab.txt")),
        // Four heads of eight, three of eight.
        config: Some(golden("blip2_opt").join("config.json")),
    }
}

fn convert(family: &str, work: &Path) -> (PathBuf, Converted) {
    let out = work.join(format!("blip2-{family}"));
    let converted = layout::to_hugging_face(
        lavis(&format!("{family}.pth")),
        &out,
        &parts(family, work),
        &ConvertOptions::default(),
    )
    .expect("converted");
    (out, converted)
}

fn refusal(from: &Path, parts: &FrozenParts) -> Error {
    let work = tempfile::tempdir().expect("a folder");
    let out = work.path().join("out");
    let error = layout::to_hugging_face(from, &out, parts, &ConvertOptions::default()).expect_err("refused");
    assert_eq!(fs::read_dir(work.path()).expect("readable").count(), 0, "something was left behind");
    error
}

#[test]
fn converted_models_write_the_texts_of_transformers() {
    let work = tempfile::tempdir().expect("a folder");
    let expected = expected();
    for family in ["opt", "t5"] {
        let (folder, converted) = convert(family, work.path());
        // The norm and the head behind the blocks of the encoder's own file.
        let left_out = if family == "opt" { &["head.weight", "norm.bias", "norm.weight"][..] } else { &[] };
        assert_eq!(converted.left_out, left_out);
        assert_eq!(converted.has_pretraining_heads, None);
        let model = Blip2::open(&folder, &OpenOptions::default()).expect("a model");
        let picture =
            image::open(golden("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture");
        let features = model.encode(&[picture]).expect("features").remove(0);
        let texts = expected[family].as_array().expect("texts");
        assert_eq!(texts.len(), 4);
        for text in texts {
            let generation = GenerationConfig {
                num_beams: text["num_beams"].as_u64().expect("a number") as usize,
                max_new_tokens: expected["max_new_tokens"].as_u64().expect("a number") as usize,
                ..GenerationConfig::default()
            };
            let answers = if text["prompt"] == "" {
                model.caption(&[&features], &generation)
            } else {
                model.ask(&[(&features, "which city is this?")], &generation)
            };
            let found = serde_json::json!(answers.expect("an answer")[0][0].token_ids);
            assert_eq!(found, text["token_ids"], "{family}, {text}");
        }
        let config = read_json(folder.join("config.json"));
        assert_eq!(config["image_token_index"], if family == "opt" { 260 } else { 259 });
        assert_eq!(config["vision_config"]["post_layernorm_eps"], 1e-5);
        assert_eq!(config["text_config"]["eos_token_id"], if family == "opt" { 202 } else { 1 });
    }
}

/// Nothing in a checkpoint says that it was taught to begin its captions, but for the size of its pictures.
#[test]
fn a_model_that_was_tuned_on_coco_begins_its_captions_in_any_folder() {
    let work = tempfile::tempdir().expect("a folder");
    let (positions, n_tokens) = ("model.visual_encoder.pos_embed", 26 * 26 + 1);
    let checkpoint = Checkpoint::open(lavis("t5.pth")).expect("a checkpoint");
    let names: Vec<&str> = checkpoint.names().into_iter().collect();
    let about = |name: &&str| {
        let StoredTensor { mut shape, encoding, .. } = checkpoint.stored(name).expect("a tensor");
        if *name == positions {
            shape[1] = n_tokens;
        }
        TensorAbout { name: name.strip_prefix("model.").expect("a state dict").into(), shape, encoding }
    };
    let abouts: Vec<_> = names.iter().map(about).collect();
    let tuned = work.path().join("tuned.pth");
    write_torch(&tuned, "model", &abouts, |i, file| {
        let bytes = checkpoint.stored(names[i]).expect("a tensor").bytes;
        if names[i] != positions {
            return file.write_all(&bytes);
        }
        let row = bytes.len() / checkpoint.shape(positions).expect("a shape")[1];
        (0..n_tokens).try_for_each(|_| file.write_all(&bytes[..row]))
    })
    .expect("written");
    let instruction = |from: &Path, name: &str| {
        let out = work.path().join(name);
        layout::to_hugging_face(from, &out, &parts("t5", work.path()), &ConvertOptions::default())
            .expect("converted");
        let model = Blip2::open(&out, &OpenOptions::default()).expect("a model");
        model.config().stage2.as_ref().expect("stage 2").instruction.clone()
    };
    assert_eq!(instruction(&tuned, "tuned"), "a photo of");
    assert_eq!(instruction(&lavis("t5.pth"), "plain"), "");
}

#[test]
fn a_stage_1_folder_has_the_names_of_transformers_and_the_dropped_heads() {
    let work = tempfile::tempdir().expect("a folder");
    let (folder, converted) = convert("stage1", work.path());
    assert_eq!(converted.has_pretraining_heads, Some(true));
    let checkpoint = Checkpoint::open(&folder).expect("a checkpoint");
    let extra = |name: &&str| *name == "temp" || name.starts_with("cls.predictions.");
    let names: Vec<_> = checkpoint.names().into_iter().filter(|name| !extra(name)).collect();
    assert_eq!(serde_json::json!(names), expected()["stage1"]["names"]);
    assert_eq!(checkpoint.names().iter().filter(|name| extra(name)).count(), 6);
    assert_eq!(checkpoint.stored("temp").expect("temp").bytes, 0.043f32.to_le_bytes().as_slice());
    let config = read_json(folder.join("config.json"));
    assert_eq!(config["architectures"][0], "Blip2ForImageTextRetrieval");
    assert_eq!(config["qformer_config"]["use_qformer_text_input"], true);
    assert_eq!(config["qformer_config"]["vocab_size"], 19);
    assert_eq!(config["image_text_hidden_size"], 12);

    let model = Blip2::open(&folder, &OpenOptions::default()).expect("a model");
    let picture = image::open(golden("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture");
    let features = model.encode(&[picture]).expect("features").remove(0);
    let expected = &expected()["stage1"];
    let score =
        model.match_texts(&features, &[expected["text"].as_str().expect("a text")]).expect("a score")[0];
    for (field, found) in
        [("itm_probability", score.itm_probability), ("itc_similarity", score.itc_similarity)]
    {
        let expected = expected[field].as_f64().expect("a number");
        assert!((f64::from(found) - expected).abs() < 1e-4, "{field}: {found}, not {expected}");
    }
    let temperature = model.matcher().expect("a Q-Former").temperature().expect("a text side");
    assert_eq!(temperature.expect("a temperature").to_scalar::<f32>().expect("a scalar"), 0.043);
}

/// Every tensor of the LAVIS file is there again, with the same bits, in either container.
#[test]
fn there_and_back_no_bit_changes() {
    let work = tempfile::tempdir().expect("a folder");
    for family in ["opt", "t5", "stage1"] {
        let (folder, _) = convert(family, work.path());
        let original = Checkpoint::open(lavis(&format!("{family}.pth"))).expect("a checkpoint");
        for (extension, prefix) in [("pth", "model."), ("safetensors", "")] {
            let back = work.path().join(format!("{family}.{extension}"));
            layout::to_lavis(&folder, &back, &ConvertOptions::default()).expect("converted");
            let back = Checkpoint::open(&back).expect("a checkpoint");
            assert_eq!(Layout::of(&back), Some(Layout::Lavis));
            let mut n_compared = 0;
            for name in original.names() {
                let name_back = name.strip_prefix("model.").expect("a state dict");
                let found = back.stored(&format!("{prefix}{name_back}")).expect("a tensor");
                assert_eq!(found, original.stored(name).expect("a tensor"), "{family}: {name}");
                n_compared += 1;
            }
            assert!(n_compared > 70);
            if family == "stage1" {
                assert_eq!(back.names().len(), n_compared, "something was made up");
            }
            if family == "opt" {
                let encoder = Checkpoint::open(lavis("eva_vit.pth")).expect("a checkpoint");
                for name in encoder.names().into_iter().filter(|name| !name.starts_with(['h', 'n'])) {
                    let found = back.stored(&format!("{prefix}visual_encoder.{name}")).expect("a tensor");
                    assert_eq!(found, encoder.stored(name).expect("a tensor"), "{name}");
                }
            }
            // And once more: what was written is as good as the original.
            let again = work.path().join(format!("again-{family}-{extension}"));
            let mut parts = parts(family, work.path());
            parts.vision = None;
            let source = work.path().join(format!("{family}.{extension}"));
            layout::to_hugging_face(&source, &again, &parts, &ConvertOptions::default()).expect("converted");
            same_tensors(&folder, &again);
        }
    }
}

fn same_tensors(a: &Path, b: &Path) {
    let (a, b) = (Checkpoint::open(a).expect("a checkpoint"), Checkpoint::open(b).expect("a checkpoint"));
    assert_eq!(a.names(), b.names());
    for name in a.names() {
        assert_eq!(a.stored(name).expect("a tensor"), b.stored(name).expect("a tensor"), "{name}");
    }
}

/// A folder from elsewhere whose keys have biases, which LAVIS has no place for: they are kept under a name of their own.
#[test]
fn a_hugging_face_folder_comes_back_to_the_bit() {
    let work = tempfile::tempdir().expect("a folder");
    for family in ["opt", "t5"] {
        let folder = golden(&format!("blip2_{family}"));
        let there = work.path().join(format!("{family}.pth"));
        layout::to_lavis(&folder, &there, &ConvertOptions::default()).expect("converted");
        let lavis = Checkpoint::open(&there).expect("a checkpoint");
        assert!(lavis.contains("model.visual_encoder.blocks.1.attn.k_bias"));
        let back = work.path().join(format!("back-{family}"));
        let parts = FrozenParts { vision: None, ..parts(family, work.path()) };
        layout::to_hugging_face(&there, &back, &parts, &ConvertOptions::default()).expect("converted");
        same_tensors(&folder, &back);

        // The folder that it came from says as much as the language model's own, and has its weights too.
        let parts = FrozenParts { language_model: Some(folder.clone()), ..parts };
        let without = work.path().join(format!("without-{family}.pth"));
        let is_trained =
            |name: &str| !name.starts_with("model.opt_model.") && !name.starts_with("model.t5_model.");
        write(&without, &lavis, |name| {
            is_trained(name).then(|| name.strip_prefix("model.").expect("a state dict").to_owned())
        });
        for (from, to) in [(&there, "from-whole"), (&without, "from-trained")] {
            let back = work.path().join(format!("{to}-{family}"));
            layout::to_hugging_face(from, &back, &parts, &ConvertOptions::default()).expect("converted");
            same_tensors(&folder, &back);
            let text = |folder: &Path| read_json(folder.join("config.json"))["text_config"].clone();
            let (found, expected) = (text(&back), text(&folder));
            for field in ["eos_token_id", "bos_token_id", "dense_act_fn", "vocab_size"] {
                assert_eq!(found[field], expected[field], "{family}: {field}");
            }
        }
    }
}

/// Folders of newer revisions may have a row for the token that stands for a picture, which no vocabulary has.
#[test]
fn a_matching_checkpoint_may_have_a_row_for_the_image_token() {
    let work = tempfile::tempdir().expect("a folder");
    let parts = parts("stage1", work.path());
    let original = Checkpoint::open(lavis("stage1.pth")).expect("a checkpoint");
    let convert = |n_more: usize| {
        let grown: Vec<(TensorAbout, Vec<u8>)> = original
            .names()
            .into_iter()
            .map(|name| {
                let StoredTensor { mut shape, encoding, bytes } = original.stored(name).expect("a tensor");
                let (name, mut bytes) =
                    (name.strip_prefix("model.").expect("a state dict"), bytes.into_owned());
                if ["word_embeddings.weight", "predictions.bias", "decoder.weight", "decoder.bias"]
                    .iter()
                    .any(|by_word| name.ends_with(by_word))
                {
                    let n_row_bytes = bytes.len() / shape[0];
                    bytes.extend(vec![0; n_more * n_row_bytes]);
                    shape[0] += n_more;
                }
                (TensorAbout { name: name.into(), shape, encoding }, bytes)
            })
            .collect();
        let (abouts, values): (Vec<_>, Vec<_>) = grown.into_iter().unzip();
        let file = work.path().join(format!("{n_more}.pth"));
        let bytes = |i: usize, file: &mut dyn std::io::Write| file.write_all(&values[i]);
        write_torch(&file, "model", &abouts, bytes).expect("written");
        let out = work.path().join(format!("out-{n_more}"));
        layout::to_hugging_face(&file, &out, &parts, &ConvertOptions::default())
            .map(|_| read_json(out.join("config.json")))
    };
    let (none, one) = (convert(0).expect("converted"), convert(1).expect("converted"));
    assert_eq!(one["image_token_index"], none["image_token_index"]);
    let vocab_size = |config: &Json| config["qformer_config"]["vocab_size"].as_u64();
    assert_eq!(vocab_size(&one), vocab_size(&none).map(|n| n + 1));
    assert!(convert(2).expect_err("refused").to_string().contains("another model's vocabulary"));
}

#[test]
fn a_matching_folder_without_the_dropped_heads_converts_without_them() {
    let work = tempfile::tempdir().expect("a folder");
    let (folder, _) = convert("stage1", work.path());
    let public = work.path().join("public");
    fs::create_dir(&public).expect("made");
    fs::copy(folder.join("config.json"), public.join("config.json")).expect("copied");
    let is_public = |name: &str| name != "temp" && !name.starts_with("cls.");
    let checkpoint = Checkpoint::open(&folder).expect("a checkpoint");
    write(&public.join("model.safetensors"), &checkpoint, |name| is_public(name).then(|| name.to_owned()));
    let out = work.path().join("public.pth");
    let converted = layout::to_lavis(&public, &out, &ConvertOptions::default()).expect("converted");
    assert_eq!(converted.has_pretraining_heads, Some(false));
    let lavis = Checkpoint::open(&out).expect("a checkpoint");
    assert!(!lavis.names().iter().any(|name| name.contains("cls.") || name.contains("temp")));
    let again = work.path().join("again");
    let parts = parts("stage1", work.path());
    layout::to_hugging_face(&out, &again, &parts, &ConvertOptions::default()).expect("converted");
    same_tensors(&public, &again);
    // Half a head is a mistake.
    write(&public.join("model.safetensors"), &checkpoint, |name| {
        (name != "cls.predictions.bias").then(|| name.to_owned())
    });
    let error = layout::to_lavis(&public, &out, &ConvertOptions::default()).expect_err("refused").to_string();
    assert!(error.contains("missing: cls.predictions.bias"), "{error}");
}

/// Old revisions are PyTorch files, with tied weights and counters stored.
#[test]
fn pytorch_weights_of_a_folder_become_safetensors() {
    let work = tempfile::tempdir().expect("a folder");
    let source = work.path().join("old");
    fs::create_dir(&source).expect("made");
    for file in ["config.json", "tokenizer.json", "preprocessor_config.json"] {
        fs::copy(golden("blip2_opt").join(file), source.join(file)).expect("copied");
    }
    let head = "language_model.lm_head.weight";
    let words = "language_model.model.decoder.embed_tokens.weight";
    let checkpoint = Checkpoint::open(golden("blip2_opt")).expect("a checkpoint");
    let mut names: Vec<(String, &str)> =
        checkpoint.names().into_iter().map(|name| (name.to_owned(), name)).collect();
    names.push((head.into(), words));
    let about = |(name, from): &(String, &str)| {
        let StoredTensor { shape, encoding, .. } = checkpoint.stored(from).expect("a tensor");
        TensorAbout { name: name.clone(), shape, encoding }
    };
    let abouts: Vec<_> = names.iter().map(about).collect();
    // What container it is shows in the bytes, not in the name.
    stream_safetensors(source.join("pytorch_model.bin"), &abouts, &BTreeMap::new(), |i, file| {
        file.write_all(&checkpoint.stored(names[i].1).expect("a tensor").bytes)
    })
    .expect("written");

    let out = work.path().join("new");
    let small = ConvertOptions { max_shard_bytes: 100_000, ..ConvertOptions::default() };
    let converted =
        layout::to_hugging_face(&source, &out, &FrozenParts::default(), &small).expect("converted");
    assert_eq!(converted.n_tensors, names.len() - 1);
    let shards = fs::read_dir(&out).expect("readable").filter(|entry| {
        entry
            .as_ref()
            .expect("an entry")
            .path()
            .extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    assert!(shards.count() > 2);
    same_tensors(&golden("blip2_opt"), &out);
    Blip2::open(&out, &OpenOptions::default()).expect("a model");
}

#[test]
fn what_is_missing_misshapen_and_unknown_is_listed_at_once() {
    let work = tempfile::tempdir().expect("a folder");
    let path = work.path().join("damaged.pth");
    let checkpoint = Checkpoint::open(lavis("t5.pth")).expect("a checkpoint");
    let mut parts = parts("t5", work.path());
    write(&path, &checkpoint, |name| match name.strip_prefix("model.")? {
        "Qformer.bert.encoder.layer.1.output_query.dense.bias" => None,
        "visual_encoder.blocks.0.norm1.bias" => Some("visual_encoder.blocks.0.mlp.fc1.bias".into()),
        "visual_encoder.blocks.0.mlp.fc1.bias" => Some("visual_encoder.blocks.0.norm1.bias".into()),
        "ln_vision.bias" => Some("ln_vision.offset".into()),
        name => Some(name.to_owned()),
    });
    let error = refusal(&path, &parts);
    let Error::TensorNames { missing, misshapen, unknown } = &error else { panic!("{error}") };
    assert_eq!(missing, &["ln_vision.bias", "Qformer.bert.encoder.layer.1.output_query.dense.bias"]);
    assert_eq!(misshapen.len(), 2, "{misshapen:?}");
    assert_eq!(unknown, &["ln_vision.offset"]);
    assert!(!error.to_string().contains('\n'));

    // The unknown may be allowed, the rest may not.
    write(&path, &checkpoint, |name| Some(name.strip_prefix("model.")?.to_owned()));
    let extended = Checkpoint::open(&path).expect("a checkpoint");
    let more = work.path().join("more.pth");
    write(&more, &extended, |name| {
        let name = name.strip_prefix("model.")?;
        Some(if name.ends_with("position_ids") { "Qformer.bert.pooler".into() } else { name.to_owned() })
    });
    assert!(refusal(&more, &parts).to_string().contains("unknown: Qformer.bert.pooler"));
    let options = ConvertOptions { allow_unknown: true, ..ConvertOptions::default() };
    let out = work.path().join("allowed");
    let converted = layout::to_hugging_face(&more, &out, &parts, &options).expect("converted");
    assert_eq!(converted.left_out, ["Qformer.bert.pooler"]);

    parts.vision = Some(lavis("eva_vit.pth"));
    assert!(refusal(&lavis("t5.pth"), &parts).to_string().contains("give no other"));
}

#[test]
fn frozen_parts_that_are_missing_or_wrong_are_named() {
    let work = tempfile::tempdir().expect("a folder");
    let complete = || parts("opt", work.path());
    let opt = lavis("opt.pth");
    for (parts, expected) in [
        (FrozenParts { vision: None, ..complete() }, "eva_vit_g.pth"),
        (FrozenParts { language_model: None, ..complete() }, "Hugging Face folder"),
        (FrozenParts { vision: Some(opt.clone()), ..complete() }, "no image encoder as LAVIS loads it"),
        (FrozenParts { config: None, ..complete() }, "vision_config.num_attention_heads"),
        (FrozenParts { language_model: Some(golden("lavis")), ..complete() }, "config.json"),
    ] {
        let error = refusal(&opt, &parts).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let _ = parts("t5", work.path());
    let other = FrozenParts { language_model: Some(work.path().join("language-model-t5")), ..complete() };
    let error = refusal(&opt, &other).to_string();
    assert!(error.contains("language-model-t5") && error.contains("family Opt"), "{error}");
    let narrow = work.path().join("narrow");
    language_model("opt", &narrow);
    let mut config = read_json(narrow.join("config.json"));
    config["hidden_size"] = 64.into();
    config["word_embed_proj_dim"] = 64.into();
    fs::write(narrow.join("config.json"), config.to_string()).expect("written");
    let error = refusal(&opt, &FrozenParts { language_model: Some(narrow), ..complete() }).to_string();
    assert!(error.contains("width 32") && error.contains("has 64"), "{error}");
    let stage1 = FrozenParts { vocabulary: None, ..parts("stage1", work.path()) };
    assert!(refusal(&lavis("stage1.pth"), &stage1).to_string().contains("vocab.txt"));
    let vocabulary = work.path().join("vocab.txt");
    fs::write(&vocabulary, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n").expect("written");
    let stage1 = FrozenParts { vocabulary: Some(vocabulary), ..parts("stage1", work.path()) };
    assert!(refusal(&lavis("stage1.pth"), &stage1).to_string().contains("another model's vocabulary"));
    // A tied copy that is none.
    let path = work.path().join("untied.pth");
    let checkpoint = Checkpoint::open(&opt).expect("a checkpoint");
    let names: Vec<_> = checkpoint.names().into_iter().collect();
    let about = |name: &&str| {
        let StoredTensor { shape, encoding, .. } = checkpoint.stored(name).expect("a tensor");
        TensorAbout { name: name.strip_prefix("model.").expect("a state dict").into(), shape, encoding }
    };
    let abouts: Vec<_> = names.iter().map(about).collect();
    write_torch(&path, "model", &abouts, |i, file| {
        let mut bytes = checkpoint.stored(names[i]).expect("a tensor").bytes.into_owned();
        if names[i] == "model.opt_model.lm_head.weight" {
            bytes[7] ^= 1;
        }
        file.write_all(&bytes)
    })
    .expect("written");
    let error = refusal(&path, &complete()).to_string();
    assert!(error.contains("opt_model.lm_head.weight") && error.contains("no copy"), "{error}");
}

#[test]
fn what_is_no_blip2_is_refused() {
    let work = tempfile::tempdir().expect("a folder");
    let none = FrozenParts::default();
    assert!(
        refusal(&golden("torch_zip.pth"), &none).to_string().contains("not the tensors of a BLIP-2 model")
    );
    assert!(refusal(&golden("torch_payload.pth"), &none).to_string().contains("nothing was run"));
    assert!(refusal(&lavis("eva_vit.pth"), &none).to_string().contains("image encoder alone"));
    let file = golden("blip2_opt").join("model.safetensors");
    assert!(refusal(&file, &none).to_string().contains("give the folder"));
    let out = work.path().join("out.pth");
    let error = layout::to_lavis(lavis("opt.pth"), &out, &ConvertOptions::default()).expect_err("refused");
    assert!(error.to_string().contains("LAVIS's names already"), "{error}");
    // A folder that is in the way.
    let taken = work.path().join("taken");
    fs::create_dir(&taken).expect("made");
    fs::write(taken.join("file"), "").expect("written");
    let parts = parts("t5", work.path());
    let error = layout::to_hugging_face(lavis("t5.pth"), &taken, &parts, &ConvertOptions::default());
    assert!(error.expect_err("refused").to_string().contains("not empty"));
}

/// Sizes that a configuration claims are compared with the file before anything is made of them.
#[test]
fn configurations_that_contradict_the_weights_are_refused() {
    let work = tempfile::tempdir().expect("a folder");
    for (part, field, value, expected) in [
        ("text_config", "num_hidden_layers", 1 << 24, "language.num_hidden_layers"),
        ("vision_config", "num_hidden_layers", 60_000, "vision_config.num_hidden_layers"),
        ("qformer_config", "num_hidden_layers", 1 << 20, "qformer_config.num_hidden_layers"),
        (
            "vision_config",
            "num_hidden_layers",
            3,
            "missing: vision_model.encoder.layers.2.layer_norm1.weight",
        ),
        ("vision_config", "num_hidden_layers", 1, "unknown: vision_model.encoder.layers.1.layer_norm1.bias"),
        (
            "qformer_config",
            "intermediate_size",
            49,
            "of another shape: qformer.encoder.layer.0.intermediate_query",
        ),
    ] {
        let mut config = read_json(golden("blip2_opt").join("config.json"));
        config[part][field] = value.into();
        let folder = work.path().join(format!("{field}-{value}"));
        fs::create_dir(&folder).expect("made");
        fs::write(folder.join("config.json"), config.to_string()).expect("written");
        fs::copy(golden("blip2_opt").join("model.safetensors"), folder.join("model.safetensors"))
            .expect("copied");
        let error = refusal(&folder, &FrozenParts::default()).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        let out = work.path().join("out.pth");
        layout::to_lavis(&folder, &out, &ConvertOptions::default()).expect_err("refused");
        assert!(!out.exists());
    }
}

#[test]
fn a_file_is_copied_as_it_is() {
    let work = tempfile::tempdir().expect("a folder");
    let out = work.path().join("copy.safetensors");
    let converted = layout::copy_tensors(lavis("eva_vit.pth"), &out).expect("copied");
    assert_eq!(converted.n_tensors, 33);
    same_tensors(&lavis("eva_vit.pth"), &out);
}

/// LAVIS's name and shape of a tensor of CLIP's encoder.
fn clip_name(name: &str, shape: &[usize]) -> (String, Vec<usize>) {
    let name = name.strip_prefix("clip.").expect("CLIP's");
    for (ours, theirs) in [
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding", "positional_embedding"),
        ("embeddings.patch_embedding", "conv1"),
        ("pre_layernorm", "ln_pre"),
    ] {
        if let Some(rest) = name.strip_prefix(ours) {
            // Hugging Face has these for a batch of one.
            let n_leading = shape.iter().take_while(|extent| **extent == 1).count();
            return (format!("{theirs}{rest}"), shape[n_leading..].to_vec());
        }
    }
    let name = name
        .replace("encoder.layers", "transformer.resblocks")
        .replace("self_attn.qkv.", "attn.in_proj_")
        .replace("self_attn.projection", "attn.out_proj")
        .replace("layer_norm", "ln_")
        .replace("fc1", "c_fc")
        .replace("fc2", "c_proj");
    (name, shape.to_vec())
}

/// Hugging Face has no such model: the folder is this project's own, with the names of the others.
#[test]
fn a_clip_encoder_is_converted_and_opened() {
    let work = tempfile::tempdir().expect("a folder");
    let tiny = Safetensors::open(golden("vit_tiny.safetensors")).expect("a checkpoint");
    let source = Checkpoint::open(golden("vit_tiny.safetensors")).expect("a checkpoint");
    let names: Vec<_> = source
        .names()
        .into_iter()
        .filter(|name| name.starts_with("clip.") && !name.starts_with("clip.out."))
        .collect();
    let about = |name: &&str| {
        let StoredTensor { shape, encoding, .. } = source.stored(name).expect("a tensor");
        let (name, shape) = clip_name(name, &shape);
        TensorAbout { name, shape, encoding }
    };
    let mut abouts: Vec<_> = names.iter().map(about).collect();
    // The projection to texts, which CLIP has and BLIP-2 has not.
    abouts.push(TensorAbout { name: "proj".into(), shape: vec![1], encoding: abouts[0].encoding });
    let vision = work.path().join("clip.safetensors");
    stream_safetensors(&vision, &abouts, &BTreeMap::new(), |i, file| match names.get(i) {
        Some(name) => file.write_all(&source.stored(name).expect("a tensor").bytes),
        None => file.write_all(&[0; 4]),
    })
    .expect("written");

    let parts = FrozenParts { vision: Some(vision.clone()), ..parts("opt", work.path()) };
    let folder = work.path().join("blip2-clip");
    let converted = layout::to_hugging_face(lavis("opt.pth"), &folder, &parts, &ConvertOptions::default());
    assert_eq!(converted.expect("converted").left_out, ["proj"]);
    let model = Blip2::open(&folder, &OpenOptions::default()).expect("a model");
    let picture = image::open(golden("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture");
    let pixels = model.vision().expect("an encoder").processor().pixels(&picture);
    let config = VitConfig {
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 3,
        num_attention_heads: 3,
        image_size: 12,
        patch_size: 4,
        ..VitConfig::clip_l(224)
    };
    let loader = Loader::frozen(&tiny, Precision::F32).at("clip");
    let expected = Vit::load(config, &loader, AlignCorners::No).expect("an encoder").forward(&pixels);
    let expected = expected.expect("tokens").to_vec2::<f32>().expect("rows");
    let found = model.encode(&[picture]).expect("features").remove(0).tokens().to_vec2::<f32>();
    assert_eq!(found.expect("rows"), expected);

    let back = work.path().join("back.pth");
    layout::to_lavis(&folder, &back, &ConvertOptions::default()).expect("converted");
    let (back, original) = (Checkpoint::open(&back), Checkpoint::open(&vision).expect("a checkpoint"));
    let back = back.expect("a checkpoint");
    for name in original.names().into_iter().filter(|name| *name != "proj") {
        let found = back.stored(&format!("model.visual_encoder.{name}")).expect("a tensor");
        assert_eq!(found, original.stored(name).expect("a tensor"), "{name}");
    }
}
