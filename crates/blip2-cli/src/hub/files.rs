//! Which of a model's files are needed: the weights once, as safetensors, and what describes them.

use std::path::Path;

use anyhow::bail;
use blip2::text::TOKENIZER_FILES;
use blip2::weights::safetensors::{INDEX_NAME, SINGLE_NAME, shards};

pub(super) const CONFIG: &str = "config.json";

/// What describes a model, of which each has some.
const DESCRIPTIONS: [&str; 4] =
    [CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json"];

/// Any of these files is a tokenizer, with its companions.
const TOKENIZERS: [&[&str]; 4] =
    [&["tokenizer.json"], &["vocab.json", "merges.txt"], &["spiece.model"], &["vocab.txt"]];

/// The files beside the weights that are needed of those that the hub lists.
///
/// # Errors
/// When the model lacks one that every model has.
pub(super) fn descriptions(listed: &[String]) -> anyhow::Result<Vec<String>> {
    let has = |name: &str| listed.iter().any(|listed| listed == name);
    if !has(CONFIG) {
        bail!("it has no {CONFIG}: it is no model in Hugging Face's layout");
    }
    if !TOKENIZERS.iter().any(|files| files.iter().all(|name| has(name))) {
        bail!("it has no tokenizer (tokenizer.json, vocab.json with merges.txt, spiece.model or vocab.txt)");
    }
    let index = (!has(SINGLE_NAME)).then_some(INDEX_NAME);
    let names = DESCRIPTIONS.into_iter().chain(TOKENIZER_FILES).chain(index).filter(|name| has(name));
    Ok(names.map(String::from).collect())
}

/// The weight files that are needed of those that the hub lists; of two copies the one in one file, as transformers takes
/// it. `snapshot` holds the index where there is one.
///
/// # Errors
/// When there are none, or the index names others.
pub(super) fn weights(listed: &[String], snapshot: &Path) -> anyhow::Result<Vec<String>> {
    let has = |name: &str| listed.iter().any(|listed| listed == name);
    if has(SINGLE_NAME) {
        return Ok(vec![SINGLE_NAME.into()]);
    }
    if !has(INDEX_NAME) {
        let pickles = listed.iter().any(|name| name.ends_with(".bin"));
        let instead = if pickles {
            ", only PyTorch's .bin files, which can hold programs: another revision may have them, or fetch it with `hf \
             download`, and `blip2 convert FOLDER NEW-FOLDER` makes safetensors of them and runs nothing"
        } else {
            ""
        };
        bail!("it has no weights as safetensors{instead}");
    }
    let mut names = Vec::new();
    for shard in shards(&snapshot.join(INDEX_NAME))? {
        let Some(name) = shard.file_name().and_then(|name| name.to_str()).filter(|name| has(name)) else {
            bail!("its {INDEX_NAME} names {}, which the hub does not have", shard.display());
        };
        names.push(name.to_owned());
    }
    Ok(names)
}

/// What a folder lacks to be a model, by name.
pub(super) fn missing(folder: &Path) -> Vec<String> {
    let has = |name: &str| folder.join(name).exists();
    let mut missing = Vec::new();
    if !has(CONFIG) {
        missing.push(CONFIG.into());
    }
    if !TOKENIZERS.iter().any(|files| files.iter().all(|name| has(name))) {
        missing.push("tokenizer.json".into());
    }
    if !has(SINGLE_NAME) {
        match shards(&folder.join(INDEX_NAME)) {
            Err(_) => missing.push(SINGLE_NAME.into()),
            Ok(shards) => missing.extend(shards.iter().filter(|shard| !shard.exists()).map(|shard| {
                shard.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
            })),
        }
    }
    missing
}

/// Whether a folder says how pictures are prepared. Models are published with that, but not everyone who filled a cache
/// asked for it.
pub(super) fn is_described(folder: &Path) -> bool {
    DESCRIPTIONS[2..].iter().any(|name| folder.join(name).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn weights_are_fetched_once_and_never_as_pickles() {
        let folder = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#;
        std::fs::write(folder.path().join(INDEX_NAME), index).unwrap();
        let shards = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"];
        let mut names = vec![
            "config.json",
            "tokenizer.json",
            "pytorch_model.bin",
            "model.onnx",
            "flax_model.msgpack",
            INDEX_NAME,
        ];
        names.extend(shards);
        let listed = list(&names);
        assert_eq!(descriptions(&listed).unwrap(), ["config.json", "tokenizer.json", INDEX_NAME]);
        assert_eq!(weights(&listed, folder.path()).unwrap(), shards);
        let both = list(&[&names[..], &[SINGLE_NAME]].concat());
        assert_eq!(descriptions(&both).unwrap(), ["config.json", "tokenizer.json"]);
        assert_eq!(weights(&both, folder.path()).unwrap(), [SINGLE_NAME]);
        let error = weights(&list(&[INDEX_NAME, shards[0]]), folder.path()).unwrap_err().to_string();
        assert!(error.contains(shards[1]), "{error}");
        let error = weights(&list(&["pytorch_model.bin"]), folder.path()).unwrap_err().to_string();
        assert!(error.contains("no weights as safetensors, only PyTorch's .bin"), "{error}");
        assert!(error.contains("blip2 convert FOLDER NEW-FOLDER"), "{error}");
    }

    #[test]
    fn what_every_model_has_is_asked_for() {
        for (names, expected) in [
            (&["tokenizer.json"][..], "config.json"),
            (&["config.json", "vocab.json"], "tokenizer"),
            (&["config.json"], "tokenizer"),
        ] {
            let error = descriptions(&list(names)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(missing(folder.path()), ["config.json", "tokenizer.json", SINGLE_NAME]);
        for name in ["config.json", "spiece.model", SINGLE_NAME] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        assert!(missing(folder.path()).is_empty());
    }
}
