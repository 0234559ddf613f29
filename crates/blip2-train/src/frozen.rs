//! The proof that training leaves the frozen parts as they were.

use std::fs::File;
use std::io;
use std::path::Path;

use blip2::language::Branched;
use blip2::weights::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::run::stage2::Language;
use crate::{Error, Result};

/// The file of a run folder that holds the proof.
pub const FILE_NAME: &str = "frozen.json";

/// What the language model reads for the proof.
const TEXT: &str = "A picture is worth a thousand words, and a frozen model forgets none of them.";

/// The frozen parts at one moment: two equal proofs mean that no bit of them changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrozenProof {
    /// File names (of a folder, those in it) and the SHA-256 of their contents.
    pub files: Vec<(String, String)>,
    /// SHA-256 of the language model's logits after every token of a fixed text without a picture, bit by bit.
    pub text_only_logits: String,
}

impl FrozenProof {
    /// Takes the proof: hashes the files and runs the language model as it is in memory.
    ///
    /// # Errors
    /// When a file cannot be read or the model fails.
    pub fn take(files: &[&Path], language: Language<'_>) -> Result<Self> {
        let mut hashes = Vec::new();
        for path in files {
            if path.is_dir() {
                let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
                let mut inner = entries
                    .map(|entry| Ok(entry?.path()))
                    .collect::<io::Result<Vec<_>>>()
                    .map_err(Error::io(path))?;
                inner.retain(|path| path.is_file());
                inner.sort();
                for path in inner {
                    hashes.push(hash_file(&path)?);
                }
            } else {
                hashes.push(hash_file(path)?);
            }
        }
        let mut ids = language.tokenizer.encode_text(TEXT)?;
        let mut text = Branched { shared: ids.len(), continuations: Vec::new() };
        // An encoder reads it, and a decoder writes it.
        if let Some(start) = language.model.decoder_start() {
            ids = [&ids[..], &[start], &ids].concat();
            text.continuations.push(text.shared + 1);
        }
        let hidden = language.model.forward_branched(&language.model.embed(&ids)?, &[text])?;
        let logits = language.model.logits(&hidden)?.flatten_all()?.to_vec1::<f32>()?;
        let mut hasher = Sha256::new();
        logits.iter().for_each(|logit| hasher.update(logit.to_bits().to_le_bytes()));
        Ok(Self { files: hashes, text_only_logits: hex(&hasher.finalize()) })
    }

    /// Says what differs from a later proof.
    ///
    /// # Errors
    /// [`Error::Training`] naming the part that changed.
    pub fn compare(&self, after: &Self) -> Result<()> {
        if self.text_only_logits != after.text_only_logits {
            return Err(Error::Training(
                "the language model's logits changed during training: it is not frozen".into(),
            ));
        }
        match self.files.iter().zip(&after.files).find(|(before, after)| before != after) {
            None if self.files.len() == after.files.len() => Ok(()),
            Some((before, _)) => {
                Err(Error::Training(format!("the frozen file {} changed during training", before.0)))
            }
            None => {
                Err(Error::Training("files were added to the frozen parts or removed during training".into()))
            }
        }
    }

    /// Writes it to `frozen.json` of a run folder.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        let path = run_dir.join(FILE_NAME);
        let json = serde_json::to_vec_pretty(self).map_err(|e| Error::file(&path, e.to_string()))?;
        blip2::weights::write_atomically(&path, |file| io::Write::write_all(file, &json))?;
        Ok(())
    }
}

fn hash_file(path: &Path) -> Result<(String, String)> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut block = vec![0; 1 << 20];
    loop {
        match io::Read::read(&mut file, &mut block).map_err(Error::io(path))? {
            0 => break,
            n => hasher.update(&block[..n]),
        }
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, hex(&hasher.finalize())))
}
