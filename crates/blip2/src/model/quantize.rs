//! Making a folder in few bits out of a published one.

use std::path::Path;

use super::{OpenOptions, hugging_face};
use crate::layers::Quantization;
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
        let bytes = match std::fs::read(&path) {
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
