//! Models that do not fit into memory are refused before anything is loaded. Their weights of 4 TiB are holes in files.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

/// A Hugging Face folder with one matrix.
fn too_large(folder: &Path) {
    const N_BYTES: u64 = 4 << 40;
    fs::create_dir(folder).expect("made");
    fs::write(folder.join("config.json"), r#"{"model_type": "blip-2"}"#).expect("written");
    let matrix = json!({"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, N_BYTES]});
    let header = json!({"vision_model.encoder.layers.0.mlp.fc1.weight": matrix}).to_string();
    let mut file = File::create(folder.join("model.safetensors")).expect("made");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("written");
    file.write_all(header.as_bytes()).expect("written");
    file.set_len(8 + header.len() as u64 + N_BYTES).expect("a file with a hole");
}

/// What the command says when it fails.
fn refused(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(arguments)
        .env("BLIP2_FROZEN", golden(""))
        .env_remove("BLIP2_MODEL")
        .output()
        .expect("the command runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for words in ["the model needs about", "are available", "--ignore-memory"] {
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
    said
}

#[test]
fn a_folder_of_either_kind_is_refused() {
    let work = tempfile::tempdir().expect("a folder");
    let (published, own) = (work.path().join("published"), work.path().join("own"));
    too_large(&published);
    let picture = golden("blip2.png");
    let caption = |model: &Path, dtype: &str| {
        let [picture, model] = [picture.as_path(), model].map(|path| path.to_str().expect("UTF-8"));
        refused(&["caption", picture, "--model", model, "--dtype", dtype])
    };
    assert!(caption(&published, "int8").contains("1.39 TB"), "nine bits a number");
    // The image encoder is not in fewer bits.
    let said = caption(&published, "auto");
    assert!(said.contains("--dtype auto: int4, since int8 needs about 1.39 TB of memory"), "{said}");

    // This project's own names its frozen parts.
    fs::create_dir(&own).expect("made");
    fs::rename(&published, own.join("vit")).expect("moved");
    let qformer = blip2::model::qformer_config(golden("blip2_opt")).expect("sizes");
    let config = json!({
        "name": "own",
        "vision": {"kind": "vit_file", "file": "vit"},
        "qformer": qformer,
        "stage2": {
            "weights": ["trained.safetensors"],
            "language_model": "llama_tiny_q8_0.gguf",
            "prompt": {"kind": "chat_ml"},
            "instruction": "Describe it.",
        },
    });
    fs::write(own.join("config.json"), config.to_string()).expect("written");
    fs::copy(golden("vit_tiny.safetensors"), own.join("trained.safetensors")).expect("copied");
    assert!(caption(&own, "int8").contains("1.39 TB"));
    let said = caption(&own, "auto");
    assert!(said.contains("--dtype auto: int8, and the language model as it is stored"), "{said}");
}

#[test]
fn what_cannot_be_held_is_not_quantised() {
    let work = tempfile::tempdir().expect("a folder");
    let [model, out] = ["model", "out"].map(|name| work.path().join(name));
    too_large(&model);
    let [model, to] = [&model, &out].map(|path| path.to_str().expect("UTF-8"));
    refused(&["quantize", model, to, "--dtype", "int4"]);
    assert!(!out.exists());
}
