//! Training from the command line on tiny random models: a folder with data, configurations, and what the command says.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blip2::image::{RgbImage, png};

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

pub(crate) fn command(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(arguments.iter().map(|argument| argument.as_ref()));
    command
}

pub(crate) fn run(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    command(arguments).output().expect("the command runs")
}

/// What a command says on standard output.
pub(crate) fn done(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A working folder with pictures of one colour each, their captions and a question.
pub(crate) struct Work(tempfile::TempDir);

impl Work {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a configuration whose output is the folder `name`; `fields` are those of its stage, `run` those of the loop.
    pub(crate) fn config(&self, name: &str, data: &str, fields: &str, run: &str) -> PathBuf {
        let config = format!(
            "output = \"{name}\"\nfeatures = \"features\"\nseed = 1\nmicro_batch = 2\nprecision = \"f32\"\n\
             {fields}\n[run]\n{run}\n[run.learning_rate]\npeak = 5e-3\nmin = 1e-3\nwarmup_steps = 1\n\
             [[data]]\npath = \"{data}\"\n"
        );
        let file = self.path(&format!("{name}.toml"));
        std::fs::write(&file, config).expect("written");
        file
    }

    /// The folder of a Q-Former with its heads, out of LAVIS's checkpoint of stage 1.
    pub(crate) fn converted_stage1(&self) -> PathBuf {
        let start = self.path("start");
        let (vocabulary, config) = (golden("lavis/vocab.txt"), golden("blip2_opt/config.json"));
        let checkpoint = golden("lavis/stage1.pth");
        done(&[&"convert", &checkpoint, &start, &"--vocabulary", &vocabulary, &"--config", &config]);
        start
    }
}

pub(crate) fn quoted(path: &Path) -> String {
    format!("{path:?}")
}

pub(crate) const OPT_PROMPTS: &str = "prompt = { kind = \"plain\", template = \"{image}Question: {prompt} Answer:\", bos = true, \
                                      end_of_answer = \"\\n\", between_turns = \". \" }\n\
                                      caption_prompt = { kind = \"plain\", template = \"{image}{prompt}\", bos = true, \
                                      end_of_answer = \"\\n\", between_turns = \" \" }\n";

/// The fields of stage 1 on LAVIS's image encoder.
pub(crate) fn stage1(init: &Path) -> String {
    format!(
        "stage = 1\nencoder = {}\nencoder_heads = 3\ninit = {{ weights = [{}] }}\nvocabulary = {}\nbatch_size = 3\n\
         max_text_tokens = 8\n",
        quoted(&golden("lavis/eva_vit.pth")),
        quoted(init),
        quoted(&golden("lavis/vocab.txt")),
    )
}

pub(crate) fn stage2(encoder: &Path, language_model: &Path, init: &Path, prompts: &str) -> String {
    format!(
        "stage = 2\nencoder = {}\nlanguage_model = {}\ninit = [{}]\nbatch_size = 3\ntexts_per_picture = 2\nmax_rows = 100\n\
         instructions = [\"\"]\ntidy_captions = false\n{prompts}",
        quoted(encoder),
        quoted(language_model),
        quoted(init),
    )
}
