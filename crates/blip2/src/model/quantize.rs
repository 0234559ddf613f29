//! Making a folder in few bits out of a published one.

use std::path::{Path, PathBuf};

use super::{ModelConfig, OpenOptions, find_frozen, hugging_face};
use crate::layers::{FrozenWeight, Quantization};
use crate::weights::gguf::Gguf;
use crate::weights::quantized::write_quantized;
use crate::weights::safetensors::Safetensors;
use crate::weights::write_atomically;
use crate::{Error, Result};

/// What a model folder has beside its weights and its configuration.
const COMPANIONS: [&str; 11] = [
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
];

/// Writes the model of `from`, a folder of Hugging Face, to the folder `to` with its large matrices in few bits. Opening
/// that is the same as opening `from` with this [`quantization`](OpenOptions::quantization), bit for bit, but its matrices
/// are used where they are in the file.
///
/// # Errors
/// When `from` cannot be opened, is not of Hugging Face or is in few bits already; when `to` holds a model, or cannot be
/// written.
pub fn quantize(from: impl AsRef<Path>, to: impl AsRef<Path>, quantization: Quantization) -> Result<()> {
    let (from, to) = (from.as_ref(), to.as_ref());
    let refuse = |path: &Path, reason: &str| Err(Error::File { path: path.into(), reason: reason.into() });
    let Some(json) = hugging_face::read_config(from)? else {
        return refuse(
            from,
            "is not a model of Hugging Face; models packed here are stored in few bits already (blip2 pack --dtype int8)",
        );
    };
    if to.join(super::FILE_NAME).exists() {
        return refuse(to, "is a model already: choose another folder");
    }
    let checkpoint = Safetensors::open(from)?.noting();
    if checkpoint.quantization().is_some() {
        return refuse(from, "is in few bits already: quantise the original");
    }
    let options = OpenOptions { quantization: Some(quantization), ..OpenOptions::default() };
    // The checkpoint notes the rounded matrices; nothing else of the model is needed.
    drop(hugging_face::load(from, &json, &checkpoint, &options)?);

    let io = |path: &Path, source| Error::Io { path: path.into(), source };
    std::fs::create_dir_all(to).map_err(|source| io(to, source))?;
    let name = hugging_face::model_name(from, &checkpoint);
    write_quantized(&to.join("model.safetensors"), &checkpoint, quantization, &name)?;
    // The configuration last, so that a folder with one is a whole model.
    for file in COMPANIONS.into_iter().chain([super::FILE_NAME]) {
        let path = from.join(file);
        let bytes = match crate::small_file::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(source) => return Err(io(&path, source)),
        };
        write_atomically(to.join(file), |file| std::io::Write::write_all(file, &bytes))?;
    }
    Ok(())
}

/// In how few bits the matrices of a folder are stored, where they are.
///
/// # Errors
/// When the folder holds no model, or its files are damaged.
pub fn stored_quantization(folder: impl AsRef<Path>) -> Result<Option<Quantization>> {
    let folder = folder.as_ref();
    if hugging_face::read_config(folder)?.is_none() {
        return Ok(None);
    }
    Ok(Safetensors::open(folder)?.quantization())
}

/// Whether the language model that a folder of this project names is a GGUF file with matrices in few bits: opened in
/// [eight](Quantization::Int8), it is used as it is stored.
///
/// # Errors
/// When the folder holds no model, or the file is not there or damaged.
pub fn has_stored_blocks(folder: impl AsRef<Path>, frozen: &[PathBuf]) -> Result<bool> {
    let folder = folder.as_ref();
    if hugging_face::read_config(folder)?.is_some() {
        return Ok(false);
    }
    let Some(stage2) = ModelConfig::read(folder)?.stage2 else { return Ok(false) };
    let path = find_frozen(folder, frozen, &stage2.language_model)?;
    if path.is_dir() {
        return Ok(false);
    }
    let file = Gguf::open(path)?;
    let kept = |name: &str| -> Result<bool> {
        let encoding = file.tensor(name)?.encoding();
        Ok(FrozenWeight::kept(encoding, Quantization::Int8.language()).is_some())
    };
    file.names().map(kept).find(|kept| !matches!(kept, Ok(false))).unwrap_or(Ok(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_bits_of_a_named_language_model_are_noticed() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let qformer = crate::model::qformer_config(golden.join("blip2_opt")).unwrap();
        let has = |language_model: &str| {
            let folder = tempfile::tempdir().unwrap();
            let config = serde_json::json!({
                "name": "mine",
                "vision": {"kind": "vit_file", "file": "none"},
                "qformer": qformer,
                "stage2": {
                    "weights": ["none.safetensors"],
                    "language_model": language_model,
                    "prompt": {"kind": "chat_ml"},
                    "instruction": "Describe it.",
                },
            });
            std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
            has_stored_blocks(folder.path(), std::slice::from_ref(&golden))
        };
        assert!(has("llama_tiny_q8_0.gguf").unwrap());
        assert!(!has("llama_tiny_f32.gguf").unwrap());
        assert!(!has("blip2_opt").unwrap());
        assert!(has("nowhere.gguf").unwrap_err().to_string().contains("nowhere.gguf"));
        assert!(!has_stored_blocks(golden.join("blip2_opt"), &[]).unwrap());
    }
}
