//! How much memory a model takes, known from what its files say of themselves.

use std::path::{Path, PathBuf};

use super::hugging_face::BRIDGE_PRECISION;
use super::parts::is_blip2_folder;
use super::{ModelConfig, OpenOptions, VisionConfig, find_frozen, is_hugging_face};
use crate::language::weight_files;
use crate::layers::{FrozenFormat, FrozenWeight, Precision, Quantization};
use crate::weights::gguf::Gguf;
use crate::weights::safetensors::Safetensors;
use crate::weights::{Checkpoint, Encoding};
use crate::{Error, Result};

/// Bytes of memory that the model in a folder takes when it is opened with these options: the weights, and an eighth of them
/// for what a picture and several beams need. Only the headers of the weight files are read.
///
/// # Errors
/// When the configuration, a part that it names or a weight file is missing or damaged.
pub fn memory_needed(folder: impl AsRef<Path>, options: &OpenOptions) -> Result<u64> {
    let folder = folder.as_ref();
    let weights = if is_hugging_face(folder)? {
        // Every part is loaded, asked for or not.
        of_safetensors(&Safetensors::open(folder)?, "", Part::of, options.frozen_format())?
    } else {
        of_named_parts(folder, options)?
    };
    Ok(BASE + weights + weights / 8)
}

/// What a process takes without any model.
const BASE: u64 = 64 << 20;

/// What a tensor is part of: to how many bits it is rounded depends on that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Vision,
    Language,
    /// Q-Former, projection and heads.
    Bridge,
}

impl Part {
    /// Of a tensor in the checkpoint of a whole model.
    fn of(name: &str) -> Self {
        match name.split_once('.') {
            Some(("vision_model", _)) => Self::Vision,
            Some(("language_model", _)) => Self::Language,
            _ => Self::Bridge,
        }
    }
}

/// The weights of a folder of this project, whose frozen parts may be elsewhere.
fn of_named_parts(folder: &Path, options: &OpenOptions) -> Result<u64> {
    let (config, format) = (ModelConfig::read(folder)?, options.frozen_format());
    let find = |file: &Path| find_frozen(folder, &options.frozen, file);
    let mut weights = 0;
    if options.vision {
        weights += match &config.vision {
            // Convolutions are kept as they are stored, in f32.
            VisionConfig::EfficientnetLite0 { file, .. } => of_file(&find(file)?)?,
            VisionConfig::VitFile { file, .. } => of_encoder(&find(file)?, format)?,
            VisionConfig::Vit(_) => 0,
        };
    }
    if let Some(stage1) = config.stage1.filter(|_| options.stage1) {
        weights += of_trained(folder, &stage1.weights, format)?;
    }
    if let Some(stage2) = config.stage2.filter(|_| options.stage2) {
        weights += of_trained(folder, &stage2.weights, format)?;
        weights += of_language_model(&find(&stage2.language_model)?, format)?;
    }
    Ok(weights)
}

fn of_file(path: &Path) -> Result<u64> {
    let about = std::fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
    Ok(about.len())
}

/// A vision transformer in any form that [`open_encoder`](super::open_encoder) knows.
fn of_encoder(path: &Path, format: FrozenFormat) -> Result<u64> {
    if path.is_dir() {
        return of_safetensors(&Safetensors::open(path)?, "vision_model.", Part::of, format);
    }
    let file = Checkpoint::open(path)?;
    let shapes = file.names().into_iter().filter_map(|name| file.shape(name));
    // LAVIS's tensors are widened on their way.
    Ok(shapes.map(|shape| n_bytes(Part::Vision, shape, Encoding::F32, format)).sum())
}

/// What was trained here, which is widened on its way, too.
fn of_trained(folder: &Path, files: &[PathBuf], format: FrozenFormat) -> Result<u64> {
    let paths: Vec<_> = files.iter().map(|file| folder.join(file)).collect();
    let file = Safetensors::open_files(&paths)?;
    file.names().map(|name| Ok(n_bytes(Part::Bridge, file.shape(name)?, Encoding::F32, format))).sum()
}

/// A language model in any form that [`open_language_model`](super::open_language_model) knows.
fn of_language_model(path: &Path, format: FrozenFormat) -> Result<u64> {
    if is_blip2_folder(path)? {
        return of_safetensors(&Safetensors::open(path)?, "language_model.", Part::of, format);
    }
    if path.is_dir() {
        let file = Safetensors::open_files(&weight_files(path)?)?;
        return of_safetensors(&file, "", |_| Part::Language, format);
    }
    let file = Gguf::open(path)?;
    let of_tensor = |name: &str| -> Result<u64> {
        let rows = file.tensor(name)?;
        let (shape, encoding) = (rows.shape(), rows.encoding());
        let kept = format.quantization.and_then(|wanted| FrozenWeight::kept(encoding, wanted.language()));
        Ok(match kept {
            Some(_) => rows.bytes().len() as u64,
            None => n_bytes(Part::Language, shape, encoding, format),
        })
    };
    file.names().map(of_tensor).sum()
}

/// The tensors of a checkpoint whose names begin with `prefix`.
fn of_safetensors(
    file: &Safetensors,
    prefix: &str,
    part_of: impl Fn(&str) -> Part,
    format: FrozenFormat,
) -> Result<u64> {
    let of_tensor = |name: &str| -> Result<u64> {
        // What is stored as the kernels read it takes what it takes in the file.
        if let Some(n) = file.quantized_bytes(name) {
            return Ok(n as u64);
        }
        let (rows, part) = (file.tensor(name)?, part_of(name));
        let precision = if part == Part::Bridge { BRIDGE_PRECISION } else { format.precision };
        Ok(n_bytes(part, rows.shape(), rows.encoding(), FrozenFormat { precision, ..format }))
    };
    file.names().filter(|name| name.starts_with(prefix)).map(of_tensor).sum()
}

/// Bytes of a tensor in memory.
fn n_bytes(part: Part, shape: &[usize], encoding: Encoding, format: FrozenFormat) -> u64 {
    let n_values: u64 = shape.iter().map(|&size| size as u64).product();
    let n_bits = match (part, format.quantization) {
        _ if shape.len() < 2 => 32, // vectors are kept in f32
        // With their scales.
        (Part::Language, Some(Quantization::Int4)) => 5,
        (Part::Language | Part::Vision, Some(_)) => 9,
        // Matrices of half-precision numbers stay as they are, and all products in bf16 read half-precision numbers.
        _ if matches!(encoding, Encoding::F16 | Encoding::Bf16) || format.precision == Precision::Bf16 => 16,
        _ => 32,
    };
    n_values * n_bits / 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::language::LanguageModel;
    use crate::model::{EncoderOptions, open_encoder, qformer_config};

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    fn formats() -> [FrozenFormat; 4] {
        let few_bits =
            |quantization| FrozenFormat { precision: Precision::F32, quantization: Some(quantization) };
        [
            Precision::F32.into(),
            Precision::Bf16.into(),
            few_bits(Quantization::Int8),
            few_bits(Quantization::Int4),
        ]
    }

    #[test]
    fn matrices_count_as_they_are_kept_and_vectors_in_full() {
        let [f32, bf16, int8, int4] = formats();
        for (part, shape, encoding, format, n_bits) in [
            (Part::Language, &[16, 20][..], Encoding::F32, f32, 32),
            (Part::Language, &[16, 20], Encoding::F32, bf16, 16),
            (Part::Language, &[16, 20], Encoding::F16, f32, 16),
            (Part::Language, &[16, 20], Encoding::Bf16, bf16, 16),
            (Part::Language, &[16, 20], Encoding::F16, int8, 9),
            (Part::Language, &[16, 20], Encoding::F16, int4, 5),
            (Part::Vision, &[16, 5, 2, 2], Encoding::F16, int4, 9),
            (Part::Bridge, &[16, 20], Encoding::F32, int4, 32),
            (Part::Language, &[320], Encoding::F16, FrozenFormat { precision: Precision::Bf16, ..int4 }, 32),
        ] {
            let found = n_bytes(part, shape, encoding, format);
            assert_eq!(found, 320 * n_bits / 8, "{part:?} {shape:?} {encoding:?} {format:?}");
        }
        for (name, part) in [
            ("vision_model.embeddings.class_embedding", Part::Vision),
            ("language_model.lm_head.weight", Part::Language),
            ("qformer.encoder.layer.0.output.dense.weight", Part::Bridge),
            ("query_tokens", Part::Bridge),
        ] {
            assert_eq!(Part::of(name), part, "{name}");
        }
    }

    /// Panics unless a number of bytes is within three tenths of what there are: panels and blocks are filled up with zeros, many in
    /// so small a model, and scales are counted in whole bits.
    #[track_caller]
    fn assert_near(said: u64, there_are: usize, of: impl std::fmt::Debug) {
        assert!((said as f64 / there_are as f64 - 1.0).abs() < 0.3, "{of:?}: {said} of {there_are}");
    }

    #[test]
    fn parts_take_what_was_said() {
        for format in formats() {
            for name in ["llama_tiny_f32.gguf", "llama_tiny_q8_0.gguf"] {
                let said = of_language_model(&golden(name), format).unwrap();
                let model = LanguageModel::from_gguf(&Gguf::open(golden(name)).unwrap(), format).unwrap();
                assert_near(said, model.n_bytes(), (name, format));
            }
        }
        for name in ["blip2_opt", "lavis/eva_vit.pth"] {
            let heads = name.ends_with(".pth").then_some(3);
            let options = EncoderOptions { num_attention_heads: heads, ..EncoderOptions::default() };
            let encoder = open_encoder(golden(name), options, Precision::F32).unwrap();
            let [f32, bf16, int8, int4] = formats().map(|format| of_encoder(&golden(name), format).unwrap());
            assert_near(f32, 4 * encoder.n_parameters(), name);
            assert!(int4 == int8 && int8 < bf16 && bf16 < f32, "{name}");
        }
    }

    /// A folder of this project takes what the parts take that are opened, wherever they are.
    #[test]
    fn a_folder_takes_what_its_parts_take() {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "name": "mine",
            "vision": {"kind": "vit_file", "file": "blip2_opt"},
            "qformer": qformer_config(golden("blip2_opt")).unwrap(),
            "stage2": {
                "weights": ["trained.safetensors"],
                "language_model": "llama_tiny_q8_0.gguf",
                "prompt": {"kind": "chat_ml"},
                "instruction": "Describe it.",
            },
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(golden("vit_tiny.safetensors"), folder.path().join("trained.safetensors")).unwrap();
        let all = OpenOptions { frozen: vec![golden("")], ..OpenOptions::default() };
        let needed = |options: &OpenOptions| memory_needed(folder.path(), options).unwrap();
        let format = all.frozen_format();
        let vision = of_encoder(&golden("blip2_opt"), format).unwrap();
        let trained = of_trained(folder.path(), &["trained.safetensors".into()], format).unwrap();
        let language = of_language_model(&golden("llama_tiny_q8_0.gguf"), format).unwrap();
        assert!(vision > 0 && trained > 0 && language > 0);
        let total = |weights: u64| BASE + weights + weights / 8;
        assert_eq!(needed(&all), total(vision + trained + language));
        assert_eq!(needed(&OpenOptions { vision: false, ..all.clone() }), total(trained + language));
        assert_eq!(needed(&OpenOptions { stage2: false, ..all.clone() }), total(vision));
        let in_few_bits = OpenOptions { quantization: Some(Quantization::Int4), ..all.clone() };
        assert!(needed(&in_few_bits) < needed(&all));
        let nowhere = OpenOptions { frozen: Vec::new(), ..all };
        let error = memory_needed(folder.path(), &nowhere).unwrap_err().to_string();
        assert!(error.contains("blip2_opt") && error.contains("BLIP2_FROZEN"), "{error}");
    }
}
