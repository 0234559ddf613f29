//! Training on one's own frozen parts from the command line, on tiny random models: vision transformers in either layout, OPT and T5,
//! and the model that comes out of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blip2::image::{RgbImage, png};
use blip2::weights::safetensors::{NamedTensor, Safetensors, Values, write_safetensors};
use serde_json::Value as Json;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

fn run(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(arguments.iter().map(|argument| argument.as_ref()));
    command.output().expect("the command runs")
}

/// What a command says on standard output.
fn done(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn refused(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !said.contains("panicked"), "{said}");
    said
}

/// A working folder with pictures of one colour each, their captions and a question.
struct Work(tempfile::TempDir);

impl Work {
    fn new() -> Self {
        let work = Self(tempfile::tempdir().expect("a folder"));
        let (mut captions, mut questions) = (String::new(), String::new());
        for (name, colour) in [("red", [250, 10, 10]), ("green", [10, 240, 20]), ("two dogs", [20, 20, 230])]
        {
            let picture = png(&RgbImage::from_pixel(8, 8, colour.into()));
            std::fs::write(work.path(&format!("{name}.png")), picture).expect("written");
            captions +=
                &format!("{{\"image\": \"{name}.png\", \"captions\": [\"a {name} cat\", \"the {name}\"]}}\n");
            questions +=
                &format!("{{\"image\": \"{name}.png\", \"question\": \"What?\", \"answer\": \"{name}\"}}\n");
        }
        std::fs::write(work.path("captions.jsonl"), &captions).expect("written");
        std::fs::write(work.path("both.jsonl"), captions + &questions).expect("written");
        work
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

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
        let config = format!(
            "output = \"{name}\"\nfeatures = \"features\"\nseed = 1\nmicro_batch = 2\ndropout = 0.0\nprecision = \"f32\"\n\
             {fields}\n[run]\nepochs = 12\nsave_every = 100\n\
             [run.learning_rate]\npeak = 5e-3\nmin = 1e-3\nwarmup_steps = 1\n\
             [[data]]\npath = \"{data}\"\n"
        );
        let file = self.path(&format!("{name}.toml"));
        std::fs::write(&file, config).expect("written");
        PathBuf::from(done(&[&"train", &file]).trim())
    }
}

fn quoted(path: &Path) -> String {
    format!("{path:?}")
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
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, (shape, data))| NamedTensor {
            name: name.clone(),
            shape: shape.clone(),
            values: Values::F32(data),
        })
        .collect();
    write_safetensors(folder.join("model.safetensors"), &tensors, &BTreeMap::new()).expect("written");
    let config: Json =
        serde_json::from_slice(&std::fs::read(blip2.join("config.json")).expect("readable")).expect("JSON");
    std::fs::write(folder.join("config.json"), config["text_config"].to_string()).expect("written");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(blip2.join(name), folder.join(name)).expect("copied");
    }
}

const OPT_PROMPTS: &str = "prompt = { kind = \"plain\", template = \"{image}Question: {prompt} Answer:\", bos = true, \
                           end_of_answer = \"\\n\", between_turns = \". \" }\n\
                           caption_prompt = { kind = \"plain\", template = \"{image}{prompt}\", bos = true, \
                           end_of_answer = \"\\n\", between_turns = \" \" }\n";
const T5_PROMPTS: &str = "prompt = { kind = \"plain\", template = \"{image}Question: {prompt} Short answer:\", bos = false, \
                          eos = true, end_of_answer = \"\", between_turns = \". \" }\n\
                          caption_prompt = { kind = \"plain\", template = \"{image}{prompt}\", bos = false, eos = true, \
                          end_of_answer = \"\", between_turns = \" \" }\n";

fn stage2(encoder: &Path, language_model: &Path, init: &Path, prompts: &str) -> String {
    format!(
        "stage = 2\nencoder = {}\nlanguage_model = {}\ninit = [{}]\nbatch_size = 3\ntexts_per_picture = 2\nmax_rows = 100\n\
         instructions = [\"\"]\ntidy_captions = false\n{prompts}",
        quoted(encoder),
        quoted(language_model),
        quoted(init),
    )
}

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

/// Both stages from parts by themselves: LAVIS's image encoder, OPT's own folder, and a Q-Former with its heads.
#[test]
fn both_stages_train_on_parts_by_themselves() {
    let work = Work::new();
    let (encoder, vocabulary) = (golden("lavis/eva_vit.pth"), golden("lavis/vocab.txt"));
    let start = work.path("start");
    let config = golden("blip2_opt/config.json");
    done(&[
        &"convert",
        &golden("lavis/stage1.pth"),
        &start,
        &"--vocabulary",
        &vocabulary,
        &"--config",
        &config,
    ]);
    let fields = format!(
        "stage = 1\nencoder = {}\nencoder_heads = 3\ninit = {{ weights = [{}] }}\nvocabulary = {}\nbatch_size = 3\n\
         max_text_tokens = 8\n",
        quoted(&encoder),
        quoted(&start),
        quoted(&vocabulary),
    );
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
        let file = work.path("refused.toml");
        let config = format!(
            "output = \"refused\"\nfeatures = \"features\"\nseed = 1\nmicro_batch = 2\ndropout = 0.0\nprecision = \"f32\"\n\
             {fields}\n[run]\nepochs = 1\nsave_every = 9\n[run.learning_rate]\npeak = 1e-3\nmin = 0.0\nwarmup_steps = 1\n\
             [[data]]\npath = \"both.jsonl\"\n"
        );
        std::fs::write(&file, config).expect("written");
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
}
