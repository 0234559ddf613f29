//! Training on one's own frozen parts from the command line, on tiny random models: vision transformers in either layout, OPT and T5,
//! and the model that comes out of it.

#[path = "support/training.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use blip2::weights::safetensors::{NamedTensor, Safetensors, write_safetensors};
use serde_json::Value as Json;
use support::{OPT_PROMPTS, Work, done, golden, run, stage1, stage2};

fn refused(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !said.contains("panicked"), "{said}");
    said
}

impl Work {
    /// Runs `fields` as a configuration and gives the last checkpoint; the loss must fall.
    fn learn(&self, name: &str, data: &str, fields: &str) -> PathBuf {
        let checkpoint = self.train(name, data, fields);
        let log = std::fs::read_to_string(self.path(name).join("log.jsonl")).expect("a log");
        let losses: Vec<f64> = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Json>(line).expect("JSON")["loss"].as_f64())
            .collect();
        let (first, last) = (&losses[..3], &losses[losses.len() - 3..]);
        assert!(last.iter().sum::<f64>() < 0.97 * first.iter().sum::<f64>(), "{name}: {losses:?}");
        checkpoint
    }

    /// Runs `fields` as a configuration and gives the last checkpoint.
    fn train(&self, name: &str, data: &str, fields: &str) -> PathBuf {
        let fields = format!("dropout = 0.0\n{fields}");
        let file = self.config(name, data, &fields, "epochs = 12\nsave_every = 100");
        PathBuf::from(done(&[&"train", &file]).trim())
    }
}

fn captions(model: &Path, picture: &Path) -> Vec<Json> {
    let rows: Json = serde_json::from_str(&done(&[
        &"caption",
        &picture,
        &"--model",
        &model,
        &"--json",
        &"--dtype",
        &"f32",
        &"--beams",
        &"1",
        &"--max-new-tokens",
        &"8",
    ]))
    .expect("JSON");
    rows.as_array().expect("rows").iter().map(|row| row["token_ids"].clone()).collect()
}

/// Asserts that the image encoders of two models give the same tokens of a picture in whatever they are asked to compute in, and
/// others in each.
fn same_encoders(work: &Work, models: [&Path; 2]) {
    let tokens = |model: &Path, dtype: &str| {
        let (picture, out) = (work.path("red.png"), work.path("stages.safetensors"));
        done(&[&"embed", &"--image", &picture, &"--output", &out, &"--model", &model, &"--dtype", &dtype]);
        Safetensors::open(&out).expect("tensors").read_f32("vision.out").expect("numbers")
    };
    let [f32, bf16, int8] = ["f32", "bf16", "int8"].map(|dtype| {
        let [one, other] = models.map(|model| tokens(model, dtype));
        assert!(one == other, "{dtype}: {models:?}");
        one
    });
    assert!(f32 != bf16 && f32 != int8 && bf16 != int8, "{models:?}");
}

/// A folder of the language model alone, as its authors publish it.
fn write_language_model(blip2: &Path, folder: &Path, named: impl Fn(&str) -> String) {
    std::fs::create_dir_all(folder).expect("a folder");
    let file = Safetensors::open(blip2).expect("tensors");
    let tensors: BTreeMap<String, _> = file
        .names()
        .filter_map(|name| Some((named(name.strip_prefix("language_model.")?), name)))
        .map(|(own, name)| {
            (own, (file.shape(name).expect("a shape").to_vec(), file.read_f32(name).expect("numbers")))
        })
        .collect();
    let tensors: Vec<_> =
        tensors.iter().map(|(name, (shape, data))| NamedTensor::f32(name, shape.as_slice(), data)).collect();
    write_safetensors(folder.join("model.safetensors"), &tensors, &BTreeMap::new()).expect("written");
    let config: Json =
        serde_json::from_slice(&std::fs::read(blip2.join("config.json")).expect("readable")).expect("JSON");
    std::fs::write(folder.join("config.json"), config["text_config"].to_string()).expect("written");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(blip2.join(name), folder.join(name)).expect("copied");
    }
}

const T5_PROMPTS: &str = "prompt = { kind = \"plain\", template = \"{image}Question: {prompt} Short answer:\", bos = false, \
                          eos = true, end_of_answer = \"\", between_turns = \". \" }\n\
                          caption_prompt = { kind = \"plain\", template = \"{image}{prompt}\", bos = false, eos = true, \
                          end_of_answer = \"\", between_turns = \" \" }\n";

/// Fine-tuning of a published folder, whose parts are all in it, and back into such a folder.
#[test]
fn a_published_model_is_fine_tuned_and_written_back() {
    let work = Work::new();
    let picture = work.path("red.png");
    for (family, prompts) in
        [("t5", format!("{T5_PROMPTS}split_captions = true\n")), ("opt", OPT_PROMPTS.to_owned())]
    {
        let published = golden(&format!("blip2_{family}"));
        let fields = stage2(&published, &published, &published, &prompts);
        let checkpoint = work.learn(family, "both.jsonl", &fields);
        let proof = std::fs::read_to_string(work.path(family).join("frozen.json")).expect("a proof");
        assert!(proof.contains("model.safetensors"), "{proof}");

        let tuned = work.path(&format!("tuned-{family}"));
        done(&[&"pack", &"--stage2", &checkpoint, &"--out", &tuned, &"--hugging-face"]);
        let written = captions(&tuned, &picture);
        assert_ne!(written, captions(&published, &picture), "{family} learned");
        // What is frozen is in it to the bit, what is not is what was trained; nothing else is.
        let [before, after] = [&published, &tuned].map(|folder| Safetensors::open(folder).expect("tensors"));
        let trained = Safetensors::open(checkpoint.join("model.safetensors")).expect("tensors");
        assert_eq!(before.names().collect::<Vec<_>>(), after.names().collect::<Vec<_>>());
        for name in after.names() {
            let source = name.replace("vision_model.post_layernorm.", "vision_layernorm.");
            let from = if trained.contains(&source) { &trained } else { &before };
            let source = if trained.contains(&source) { &source } else { name };
            assert_eq!(after.read_f32(name).expect("a"), from.read_f32(source).expect("b"), "{name}");
        }

        // As this project's own folder, which finds the frozen parts by their names, it writes the same.
        let own = work.path(&format!("own-{family}"));
        done(&[&"pack", &"--stage2", &checkpoint, &"--out", &own, &"--dtype", &"f32"]);
        let frozen = own.join(format!("blip2_{family}"));
        std::fs::create_dir(&frozen).expect("a folder");
        for entry in std::fs::read_dir(&published).expect("readable") {
            let entry = entry.expect("a file");
            std::fs::copy(entry.path(), frozen.join(entry.file_name())).expect("copied");
        }
        assert_eq!(captions(&own, &picture), written);
        same_encoders(&work, [&own, &tuned]);
    }
}

/// The folder of an OPT as transformers 5 saves it: what is done to pictures is in `processor_config.json`.
fn saved_by_transformers_5(work: &Work) -> PathBuf {
    let folder = work.path("blip2_opt");
    std::fs::create_dir(&folder).expect("a folder");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden("blip2_opt").join(name), folder.join(name)).expect("copied");
    }
    let pictures = std::fs::read(golden("blip2_opt").join("preprocessor_config.json")).expect("readable");
    let mut pictures: Json = serde_json::from_slice(&pictures).expect("JSON");
    pictures["image_mean"] = serde_json::json!([0.1, 0.2, 0.3]);
    pictures["image_processor_type"] = "BlipImageProcessor".into();
    let processor = serde_json::json!({"processor_class": "Blip2Processor", "image_processor": pictures});
    std::fs::write(folder.join("processor_config.json"), processor.to_string()).expect("written");
    folder
}

/// A packed folder is spoken to as it was trained, and sees pictures of that size, whatever its name.
#[test]
fn a_packed_folder_opens_with_what_it_was_trained_with() {
    let work = Work::new();
    let published = saved_by_transformers_5(&work);
    let prompts = OPT_PROMPTS.replacen("Question: {prompt} Answer:", "Q: {prompt} A:", 1);
    let fields = stage2(&published, &published, &published, &prompts)
        .replace("instructions = [\"\"]", "instructions = [\"a photo of\"]");
    let checkpoint = work.train("run", "both.jsonl", &format!("{fields}image_size = 42\n"));
    let tuned = work.path("tuned");
    done(&[&"pack", &"--stage2", &checkpoint, &"--out", &tuned, &"--hugging-face"]);
    let config = |folder: &Path| -> Json {
        let printed = done(&[&"info", &"--json", &"--model", &folder]);
        serde_json::from_str::<Json>(&printed).expect("JSON")["config"].take()
    };
    let opened = config(&tuned);
    assert_eq!(opened["stage2"]["instruction"], "a photo of");
    assert_eq!(opened["stage2"]["prompt"]["template"], "{image}Q: {prompt} A:");
    assert_eq!(opened["stage2"]["caption_prompt"], config(&published)["stage2"]["caption_prompt"]);
    assert_eq!(opened["vision"]["image_size"], 42);
    // Pictures are prepared as those of the encoder were.
    let small = |name: &str| -> Json {
        serde_json::from_slice(&std::fs::read(tuned.join(name)).expect("readable")).expect("JSON")
    };
    let pictures = small("preprocessor_config.json");
    assert_eq!(pictures["image_mean"], serde_json::json!([0.1, 0.2, 0.3]));
    assert_eq!(pictures["image_processor_type"], "BlipImageProcessor");
    assert_eq!(small("processor_config.json")["num_query_tokens"], 5);

    // It writes what this project's own folder of the run writes, which has always known all of this.
    let own = work.path("own");
    done(&[&"pack", &"--stage2", &checkpoint, &"--out", &own, &"--dtype", &"f32"]);
    let frozen = own.join("blip2_opt");
    std::fs::create_dir(&frozen).expect("a folder");
    for entry in std::fs::read_dir(&published).expect("readable") {
        let entry = entry.expect("a file");
        std::fs::copy(entry.path(), frozen.join(entry.file_name())).expect("copied");
    }
    let greedy = ["--dtype", "f32", "--num-beams", "1", "--max-new-tokens", "8", "--no-repeat-ngram", "0"];
    let said = |model: &Path, verb: &str, words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.arg(verb).arg(work.path("red.png")).args(words).args(greedy).arg("--json");
        let output = command.arg("--model").arg(model).output().expect("the command runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let rows: Json = serde_json::from_slice(&output.stdout).expect("JSON");
        rows[0]["token_ids"].clone()
    };
    for (verb, words) in [("caption", &[][..]), ("ask", &["What?"])] {
        assert_eq!(said(&tuned, verb, words), said(&own, verb, words), "{verb}");
    }

    // As the encoder of another run it sees pictures of that size again, and what comes of that says so.
    let checkpoint = work.train("again", "both.jsonl", &stage2(&tuned, &tuned, &tuned, &prompts));
    let again = work.path("again-tuned");
    done(&[&"pack", &"--stage2", &checkpoint, &"--out", &again, &"--hugging-face"]);
    let opened = config(&again);
    assert_eq!(opened["vision"]["image_size"], 42);
    assert_eq!(opened["stage2"]["instruction"], "");
}

#[test]
fn several_checkpoints_are_packed_as_their_mean() {
    let work = Work::new();
    let fields = stage1(&work.converted_stage1()) + "dropout = 0.0\n";
    let file = work.config("run", "captions.jsonl", &fields, "epochs = 3\nsave_every = 1");
    done(&[&"train", &file]);
    let checkpoints = [1, 2, 3].map(|step| work.path("run").join(format!("step-{step:08}")));
    let kept: Vec<_> = checkpoints.iter().filter(|checkpoint| checkpoint.is_dir()).collect();
    let [.., one, other] = kept[..] else { panic!("two checkpoints are kept: {kept:?}") };
    let out = work.path("mean");
    done(&[&"pack", &"--stage1", one, &"--stage1", other, &"--out", &out, &"--dtype", &"f32"]);
    let open = |file: PathBuf| Safetensors::open(&file).expect("tensors");
    let [one, other] = [one, other].map(|checkpoint| open(checkpoint.join("model.safetensors")));
    let (mean, mut n_moved) = (open(out.join("stage1.safetensors")), 0);
    for name in one.names() {
        let [a, b, c] = [&one, &other, &mean].map(|file| file.read_f32(name).expect("numbers"));
        n_moved += usize::from(a != b);
        assert!(a.iter().zip(&b).zip(&c).all(|((a, b), c)| (a + b) / 2.0 == *c), "{name}");
    }
    assert!(n_moved > 8, "the checkpoints differ");

    let opt = golden("blip2_opt");
    let stage2 = work.train("stage2", "both.jsonl", &stage2(&opt, &opt, &opt, OPT_PROMPTS));
    let wrong = [&checkpoints[2], &stage2];
    let said = refused(&[&"pack", &"--stage1", wrong[0], &"--stage1", wrong[1], &"--out", &work.path("no")]);
    assert!(said.contains("one model only"), "{said}");
}

/// Both stages from parts by themselves: LAVIS's image encoder, OPT's own folder, and a Q-Former with its heads.
#[test]
fn both_stages_train_on_parts_by_themselves() {
    let work = Work::new();
    let encoder = golden("lavis/eva_vit.pth");
    let fields = stage1(&work.converted_stage1());
    let checkpoint = work.learn("stage1", "captions.jsonl", &fields);
    let itm = work.path("itm");
    done(&[&"pack", &"--stage1", &checkpoint, &"--out", &itm, &"--hugging-face"]);
    let scores =
        done(&[&"match", &work.path("red.png"), &"a red cat", &"the green", &"--model", &itm, &"--json"]);
    assert_eq!(serde_json::from_str::<Json>(&scores).expect("JSON").as_array().expect("rows").len(), 2);

    // Old conversions of OPT have no head, and so no `model.` before their names.
    let language_model = work.path("opt-own");
    write_language_model(&golden("blip2_opt"), &language_model, |name| {
        name.trim_start_matches("model.").to_owned()
    });
    let fields = stage2(&encoder, &language_model, &itm, OPT_PROMPTS) + "encoder_heads = 3\n";
    let checkpoint = work.learn("stage2", "both.jsonl", &fields);
    let model = work.path("blip2-mine");
    done(&[&"pack", &"--stage2", &checkpoint, &"--out", &model, &"--hugging-face"]);
    let answer = done(&[&"ask", &work.path("red.png"), &"What?", &"--model", &model]);
    assert!(!answer.is_empty());
    assert_eq!(captions(&model, &work.path("red.png")).len(), 1);

    // The same in this project's own folder, with the encoder in LAVIS's file.
    let own = work.path("own");
    done(&[&"pack", &"--stage2", &checkpoint, &"--out", &own, &"--dtype", &"f32"]);
    std::fs::copy(&encoder, own.join("eva_vit.pth")).expect("copied");
    std::fs::rename(&language_model, own.join("opt-own")).expect("moved");
    same_encoders(&work, [&own, &model]);

    // The encoder in the folder is the one of the file: its features are those that training had.
    let fields = stage2(&model, &model, &model, OPT_PROMPTS);
    work.train("again", "both.jsonl", &fields);
    let caches = std::fs::read_dir(work.path("features")).expect("readable").count();
    assert_eq!(caches, 1, "one encoder, one cache");
}

#[test]
fn what_does_not_fit_is_said() {
    let work = Work::new();
    let (opt, t5) = (golden("blip2_opt"), golden("blip2_t5"));
    let train = |fields: String, words: &str| {
        let fields = format!("dropout = 0.0\n{fields}");
        let file = work.config("refused", "both.jsonl", &fields, "epochs = 1\nsave_every = 9");
        let said = refused(&[&"train", &file]);
        assert!(said.contains(words), "{words}: {said}");
    };
    // Prompts of the other family.
    train(stage2(&t5, &t5, &t5, OPT_PROMPTS), "eos = true");
    train(stage2(&opt, &opt, &opt, OPT_PROMPTS) + "split_captions = true\n", "split_captions");
    train(stage2(&golden("lavis/eva_vit.pth"), &opt, &opt, OPT_PROMPTS), "num_attention_heads");
    train(stage2(&golden("tiny_bpe"), &opt, &opt, OPT_PROMPTS), "config.json");
    // A folder beside other weights, of another language model's width, or none.
    let two = stage2(&opt, &opt, &opt, OPT_PROMPTS).replace("]\nbatch_size", ", \"more\"]\nbatch_size");
    train(two, "qformer");
    // Half a vocabulary reads half of the words as unknown.
    let vocabulary = std::fs::read_to_string(golden("lavis/vocab.txt")).expect("readable");
    let lines: Vec<&str> = vocabulary.lines().collect();
    std::fs::write(work.path("half.txt"), lines[..lines.len() / 2].join("\n")).expect("written");
    let fields = stage1(&work.converted_stage1());
    let whole = support::quoted(&golden("lavis/vocab.txt"));
    train(fields.replace(&whole, &support::quoted(&work.path("half.txt"))), "half.txt has");
}

/// Stage 1 with BERT's part held still and half of each picture out of sight: the rest learns, and the switches of one run are
/// checked before anything is read.
#[test]
fn berts_own_part_learns_at_its_own_rate() {
    let work = Work::new();
    let init = work.converted_stage1();
    let options = "bert_learning_rate = 0.0\nimage_tokens_kept = 0.5\ntext_tokens_kept = 0.5\n";
    let checkpoint = work.train("still", "captions.jsonl", &(stage1(&init) + options));
    let [before, after] = [&init, &checkpoint]
        .map(|folder| Safetensors::open(folder.join("model.safetensors")).expect("tensors"));
    let (mut n_still, mut n_learned) = (0, 0);
    // Both layouts call the encoder's tensors the same.
    for name in after.names().filter(|name| before.names().any(|other| other == *name)) {
        let (old, new) = (before.read_f32(name).expect("numbers"), after.read_f32(name).expect("numbers"));
        let is_berts = name.contains(".attention.attention.");
        let is_new = name.contains(".crossattention.") || name.contains("_query.") || name == "query_tokens";
        assert!(!is_berts || old == new, "{name} is BERT's");
        // A key's bias shifts all scores of a query alike: its gradient is nothing but rounding.
        assert!(!is_new || old != new || name.ends_with("key.bias"), "{name} learns");
        n_still += usize::from(is_berts);
        n_learned += usize::from(is_new);
    }
    assert!(n_still > 8 && n_learned > 8, "{n_still} {n_learned}");

    for (option, field) in [
        ("bert_learning_rate = 1.5", "bert_learning_rate"),
        ("image_tokens_kept = 0.0", "image_tokens_kept"),
        ("text_tokens_kept = 1.1", "text_tokens_kept"),
    ] {
        let fields = format!("dropout = 0.0\n{}{option}\n", stage1(&init));
        let file = work.config("refused", "captions.jsonl", &fields, "epochs = 1\nsave_every = 9");
        let said = refused(&[&"train", &file]);
        assert!(said.contains(field), "{said}");
    }
}

/// What cannot be packed leaves nothing behind that looks like a model, or like a part of one.
#[test]
fn a_checkpoint_that_cannot_be_packed_leaves_no_folder() {
    let work = Work::new();
    let fields = stage1(&work.converted_stage1());
    let (checkpoint, out) = (work.train("stage1", "captions.jsonl", &fields), work.path("packed"));
    let said = refused(&[&"pack", &"--stage2", &checkpoint, &"--out", &out]);
    assert!(said.contains("is a checkpoint of stage 1: give it as --stage1"), "{said}");
    assert!(!out.exists());
    // The folder of the run is what one has at hand.
    let run_dir = checkpoint.parent().expect("a run's folder").to_owned();
    for layout in [&[][..], &["--hugging-face"]] {
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"pack", &"--stage1", &run_dir, &"--out", &out];
        arguments.extend(layout.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
        let said = refused(&arguments);
        let names = said.contains(&format!("give {}", checkpoint.display()));
        assert!(names && said.contains("is the folder of a run"), "{said}");
        assert!(!out.exists());
    }
    let gone = work.path("step-00000001");
    refused(&[&"pack", &"--stage1", &checkpoint, &"--stage2", &gone, &"--out", &out]);
    assert!(!out.exists());
    // A folder that was there keeps what it has.
    std::fs::create_dir(&out).expect("made");
    std::fs::write(out.join("notes.txt"), "mine").expect("written");
    refused(&[&"pack", &"--stage1", &checkpoint, &"--stage2", &gone, &"--out", &out]);
    assert_eq!(std::fs::read_dir(&out).expect("readable").count(), 1);
    done(&[&"pack", &"--stage1", &checkpoint, &"--out", &out]);
    let names = std::fs::read_dir(&out).expect("readable").map(|entry| entry.expect("an entry").file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with('.')));
    assert!(out.join("config.json").is_file() && out.join("vocab.txt").is_file());
}

/// A model sees a picture once, for both of its stages.
#[test]
fn stages_that_saw_pictures_of_other_sizes_are_not_packed_together() {
    let work = Work::new();
    let (init, opt) = (work.converted_stage1(), golden("blip2_opt"));
    let stage1 = work.train("stage1", "captions.jsonl", &stage1(&init));
    let sizes = blip2::model::qformer_config(&init).expect("readable").expect("sizes");
    let sizes = toml::Value::try_from(&sizes).expect("TOML");
    let encoder = golden("lavis/eva_vit.pth");
    let fields = stage2(&encoder, &opt, &stage1.join("model.safetensors"), OPT_PROMPTS)
        + &format!("encoder_heads = 3\nqformer = {sizes}\n");
    let [same, larger] = [("same", ""), ("larger", "image_size = 42\n")]
        .map(|(name, size)| work.train(name, "both.jsonl", &format!("{fields}{size}")));
    let pack = |stage2: &PathBuf, out: &PathBuf| -> std::process::Output {
        run(&[&"pack", &"--stage1", &stage1, &"--stage2", stage2, &"--out", out])
    };
    let (packed, refused) = (work.path("packed"), work.path("refused"));
    assert!(pack(&same, &packed).status.success());
    let output = pack(&larger, &refused);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("another `image_size`"), "{said}");
    assert!(!refused.exists());
}

/// It is said before the features of all pictures are computed.
#[test]
fn stage_1_refuses_questions_at_once_and_names_their_file() {
    let work = Work::new();
    let fields = stage1(&work.converted_stage1()) + "dropout = 0.0\n";
    let file = work.config("refused", "both.jsonl", &fields, "epochs = 1\nsave_every = 9");
    let said = refused(&[&"train", &file]);
    assert!(said.contains("both.jsonl: has questions or dialogues"), "{said}");
    assert!(!work.path("features").exists());
}

/// Features may take hours: what contradicts the parts or the data is said before them.
#[test]
fn what_cannot_be_trained_is_said_before_the_features_are_computed() {
    let work = Work::new();
    let opt = golden("blip2_opt");
    let fields = stage2(&opt, &opt, &opt, OPT_PROMPTS) + "dropout = 0.0\n";
    let rows = std::fs::read_to_string(work.path("both.jsonl")).expect("readable");
    let long = format!("{rows}{{\"image\": \"two dogs.png\", \"caption\": \"{}\"}}\n", "a dog ".repeat(90));
    std::fs::write(work.path("long.jsonl"), long).expect("written");
    let mut sizes = blip2::model::qformer_config(&opt).expect("readable").expect("sizes");
    sizes.encoder_hidden_size += 8;
    let wrong_sizes = format!("[qformer]\n{}", toml::to_string(&sizes).expect("TOML"));
    for (name, data, from, to, more, expected) in [
        (
            "sizes",
            "both.jsonl",
            "",
            "",
            &*wrong_sizes,
            "`qformer.encoder_hidden_size` must be the image encoder's",
        ),
        ("batch", "both.jsonl", "batch_size = 3", "batch_size = 99", "", "fewer than a batch of 99"),
        ("rows", "both.jsonl", "max_rows = 100", "max_rows = 4096", "", "`max_rows` must be at most"),
        ("few", "both.jsonl", "max_rows = 100", "max_rows = 5", "", "`max_rows` is too small"),
        ("long", "long.jsonl", "", "", "", "two dogs.png: the text needs"),
    ] {
        let file = work.config(name, data, &fields, "epochs = 1\nsave_every = 9");
        let config = std::fs::read_to_string(&file).expect("readable").replacen(from, to, 1) + more;
        std::fs::write(&file, config).expect("written");
        let said = refused(&[&"train", &file]);
        assert!(said.contains(expected), "{name}: {said}");
        assert!(!work.path("features").exists(), "{name}");
    }
}

/// A run is trained in slices until it is done; what was changed between two of them is said.
#[test]
fn a_run_that_is_continued_says_what_changed_and_ends_well_when_it_is_done() {
    let work = Work::new();
    let opt = golden("blip2_opt");
    let fields = |dropout: &str| stage2(&opt, &opt, &opt, OPT_PROMPTS) + &format!("dropout = {dropout}\n");
    let file = work.config("slices", "both.jsonl", &fields("0.0"), "epochs = 2\nsave_every = 9");
    let first = done(&[&"train", &file]);
    let again = run(&[&"train", &file, &"--resume"]);
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success() && said.contains("finished"), "{said}");
    assert_eq!(String::from_utf8_lossy(&again.stdout), first, "the same checkpoint");
    assert!(said.contains("continuing after step 4") && !said.contains("since its checkpoint"), "{said}");

    let file = work.config("slices", "both.jsonl", &fields("0.1"), "epochs = 3\nsave_every = 9");
    let more = run(&[&"train", &file, &"--resume"]);
    let said = String::from_utf8_lossy(&more.stderr);
    assert!(more.status.success(), "{said}");
    for changed in ["run.epochs is 3, was 2", "dropout is 0.1"] {
        assert!(said.contains(&format!("since its checkpoint {changed}")), "{changed}: {said}");
    }
    assert_eq!(said.matches("since its checkpoint").count(), 2, "{said}");
    assert!(String::from_utf8_lossy(&more.stdout).trim().ends_with("step-00000006"), "{more:?}");
}

/// Weights that overflow are found when the next step looks at its similarities; that is not the fault of the batch.
#[test]
fn stage_1_that_stops_being_finite_says_so_and_keeps_its_checkpoint() {
    let work = Work::new();
    let fields = stage1(&work.converted_stage1()) + "dropout = 0.0\n";
    let file = work.config("high", "captions.jsonl", &fields, "epochs = 9\nsave_every = 1");
    let config = std::fs::read_to_string(&file).expect("readable").replace("peak = 5e-3", "peak = 1e30");
    std::fs::write(&file, config).expect("written");
    let said = refused(&[&"train", &file]);
    assert!(said.contains("is not finite") && said.contains("lower learning rate"), "{said}");
    assert!(!said.contains("batch_size"), "{said}");
    assert!(work.path("high/step-00000001/state.json").is_file(), "the last checkpoint is kept");
}

/// The first of them are named at once, all in a file, and the file at the end again.
#[test]
fn pictures_that_cannot_be_used_are_listed_in_the_run_folder() {
    let work = Work::new();
    let mut rows = std::fs::read_to_string(work.path("captions.jsonl")).expect("readable");
    for i in 0..24 {
        rows += &format!("{{\"image\": \"gone-{i}.png\", \"caption\": \"a cat\"}}\n");
    }
    rows += "{\"image\": \"broken.png\", \"caption\": \"a cat\"}\n";
    std::fs::write(work.path("broken.png"), "no picture").expect("written");
    std::fs::write(work.path("holes.jsonl"), rows).expect("written");
    let opt = golden("blip2_opt");
    let fields = stage2(&opt, &opt, &opt, OPT_PROMPTS) + "dropout = 0.0\n";
    let file = work.config("holes", "holes.jsonl", &fields, "epochs = 3\nsave_every = 9");
    let output = run(&[&"train", &file]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let list = work.path("holes/skipped.txt");
    let listed = std::fs::read_to_string(&list).expect("a list");
    assert_eq!(listed.lines().count(), 25, "{listed}");
    assert!(listed.contains("gone-23.png: ") && listed.contains("broken.png: "), "{listed}");
    assert!(said.contains("gone-19.png") && !said.contains("gone-20.png"), "{said}");
    assert!(said.contains("and 5 more"), "{said}");
    let end = format!("25 pictures could not be used: {}", list.display());
    assert!(said.rfind(&end).is_some_and(|at| at > said.find("and 5 more").expect("said")), "{said}");
}
