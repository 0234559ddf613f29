//! `blip2 pack`: training checkpoints become a model folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blip2::generate::GenerationConfig;
use blip2::layers::Precision;
use blip2::model::layout::{ConvertOptions, Trained, TrainedPrompts, trained_to_hugging_face};
use blip2::model::{
    EncoderOptions, FILE_NAME, ModelConfig, Stage1Config, Stage2Config, VisionConfig, open_encoder,
};
use blip2::weights::int8::{Storage, write_trained};
use blip2::weights::{MappedFile, sha256};
use blip2_train::checkpoint;
use blip2_train::initialize::Tensors;
use blip2_train::run::{Stage1Config as Stage1Run, Stage2Config as Stage2Run};

use crate::Done;
use crate::args::{PackArgs, StorageArg};
use crate::generation::WrongUsage;

/// Files stay below what code hosts take.
const MAX_SHARD_BYTES: usize = 45_000_000;

pub(crate) fn run(args: &PackArgs) -> anyhow::Result<Done> {
    if args.hugging_face {
        return hugging_face(args);
    }
    let storage = match args.dtype {
        Some(StorageArg::F32) => Storage::F32,
        Some(StorageArg::F16) | None => Storage::F16,
        Some(StorageArg::Int8) => Storage::Int8,
    };
    if args.out.join(FILE_NAME).exists() {
        bail!("{} is a model already: choose another folder", args.out.display());
    }
    let is_new = !args.out.exists();
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let packed = model_folder(args, storage);
    if packed.is_err() && is_new {
        // The error is the one to report; what others have put there meanwhile stays.
        let _ = fs::remove_dir(&args.out);
    }
    packed?;
    println!("{}", args.out.display());
    eprintln!("the frozen parts are looked for in this folder, in BLIP2_FROZEN and in the cache");
    Ok(Done::All)
}

/// Writes this project's own folder: all of its files, or none.
fn model_folder(args: &PackArgs, storage: Storage) -> anyhow::Result<()> {
    // Inside the folder: the same disk, so that the last step is to rename.
    let work = tempfile::Builder::new()
        .prefix(".pack-")
        .tempdir_in(&args.out)
        .with_context(|| format!("cannot write to {}", args.out.display()))?;
    let write = |stem: &str, tensors: &Tensors| -> anyhow::Result<Vec<PathBuf>> {
        let files = write_trained(work.path(), stem, tensors, storage, MAX_SHARD_BYTES)?;
        Ok(files.iter().filter_map(|path| path.file_name().map(PathBuf::from)).collect())
    };
    let (mut stage1, mut stage2) = (None, None);
    let mut shared = None;
    if let Some((path, settings, tensors)) = mean(&args.stage1)? {
        let run = stage1_run(&settings, path)?;
        let weights = write("stage1", &tensors)?;
        fs::copy(&run.vocabulary, work.path().join("vocab.txt"))
            .with_context(|| format!("cannot copy {}", run.vocabulary.display()))?;
        stage1 = Some(Stage1Config { weights, vocabulary: "vocab.txt".into() });
        shared = Some((vision(&run.encoder, run.encoder_options())?, run.qformer));
    }
    if let Some((path, settings, tensors)) = mean(&args.stage2)? {
        let run = stage2_run(&settings, path)?;
        let weights = write("stage2", &tensors)?;
        let vision = vision(&run.encoder, run.encoder_options())?;
        if let Some((of_stage1, qformer)) = &shared {
            if *qformer != run.qformer {
                bail!("the two checkpoints are of Q-Formers of different sizes");
            }
            if *of_stage1 != vision {
                bail!(
                    "the two checkpoints were trained with different image encoders or another `image_size`: a model sees a \
                     picture once, for both stages"
                );
            }
        }
        stage2 = Some(Stage2Config {
            weights,
            language_model_sha256: if run.language_model.is_file() {
                Some(sha256(MappedFile::open(&run.language_model)?.bytes()))
            } else {
                None
            },
            language_model: name_of(&run.language_model)?,
            prompt: run.prompt.clone(),
            caption_prompt: run.caption_prompt.clone(),
            chat_prompt: None,
            instruction: run.instructions.first().cloned().unwrap_or_default(),
            // A small language model falls into a rut, and at 1 adds a second sentence to pictures that it does not know.
            generation: GenerationConfig {
                num_beams: 5,
                length_penalty: 0.8,
                no_repeat_ngram_size: 3,
                ..GenerationConfig::default()
            },
            // Where a word is wanted a long text is not the better one, and names have several words: between the 0 of LAVIS's
            // answers and the 1 of captions.
            answering: Some(GenerationConfig {
                num_beams: 5,
                length_penalty: 0.5,
                ..GenerationConfig::default()
            }),
        });
        shared = Some((vision, run.qformer));
    }
    let (vision, qformer) = shared.context("no checkpoint was given")?;
    let config = ModelConfig { name: args.name.clone(), vision, qformer, stage1, stage2 };
    let json = serde_json::to_vec_pretty(&config)?;
    for entry in fs::read_dir(work.path())? {
        let entry = entry?;
        let to = args.out.join(entry.file_name());
        fs::rename(entry.path(), &to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    // Last, so that a folder with a configuration is a whole model.
    Ok(blip2::weights::write_atomically(args.out.join(FILE_NAME), |file| {
        std::io::Write::write_all(file, &json)
    })?)
}

/// The mean of some checkpoints' weights (Wortsman et al. 2022, "Model soups", the uniform one), with the last one's path and
/// settings; nothing of none.
fn mean(checkpoints: &[PathBuf]) -> anyhow::Result<Option<(&Path, String, Tensors)>> {
    let Some((last, others)) = checkpoints.split_last() else { return Ok(None) };
    let (state, mut tensors, _) = checkpoint::load(last)?;
    for path in others {
        let (_, mut other, _) = checkpoint::load(path)?;
        for (name, (shape, sum)) in &mut tensors {
            let Some((_, values)) = other.remove(name).filter(|(found, _)| found == shape) else {
                bail!(
                    "{} has no `{name}` of shape {shape:?}, as {} has: there is a mean of checkpoints of one model only",
                    path.display(),
                    last.display()
                );
            };
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }
    let n = checkpoints.len() as f32;
    tensors.values_mut().flat_map(|(_, sum)| sum).for_each(|value| *value /= n);
    Ok(Some((last, state.config, tensors)))
}

/// The encoder as a model folder names it.
fn vision(path: &Path, options: EncoderOptions) -> anyhow::Result<VisionConfig> {
    // Only its fingerprint is asked for, which is the same in every format.
    let encoder = open_encoder(path, options, Precision::F32).context("the image encoder")?;
    let (file, sha256) = (name_of(path)?, Some(encoder.fingerprint().to_owned()));
    let EncoderOptions { image_size, num_attention_heads } = options;
    if !encoder.is_vit() {
        return Ok(VisionConfig::EfficientnetLite0 { file, sha256, image_size });
    }
    Ok(VisionConfig::VitFile { file, sha256, image_size, num_attention_heads })
}

/// Packs one stage with its frozen parts.
fn hugging_face(args: &PackArgs) -> anyhow::Result<Done> {
    let (checkpoint, is_stage2) = match (&args.stage1[..], &args.stage2[..]) {
        ([path], []) => (path, false),
        ([], [path]) => (path, true),
        _ => {
            return WrongUsage::end(
                "a Hugging Face folder holds one checkpoint of one stage: give --stage1 or --stage2 once, and pack the other one by \
                 itself",
            );
        }
    };
    let (state, ..) = checkpoint::load(checkpoint)?;
    let weights = checkpoint.join("model.safetensors");
    let options = ConvertOptions { max_shard_bytes: args.max_shard_bytes, ..ConvertOptions::default() };
    let image_size = if is_stage2 {
        let run = stage2_run(&state.config, checkpoint)?;
        let trained = Trained {
            weights: &weights,
            qformer: &run.qformer,
            encoder: &run.encoder,
            encoder_options: run.encoder_options(),
            language_model: Some(&run.language_model),
            prompts: Some(TrainedPrompts {
                instruction: run.instructions.first().map_or("", String::as_str),
                prompt: &run.prompt,
                caption_prompt: run.caption_prompt(),
            }),
            vocabulary: None,
        };
        trained_to_hugging_face(&trained, &args.out, &options)?;
        run.image_size
    } else {
        let run = stage1_run(&state.config, checkpoint)?;
        let trained = Trained {
            weights: &weights,
            qformer: &run.qformer,
            encoder: &run.encoder,
            encoder_options: run.encoder_options(),
            language_model: None,
            prompts: None,
            vocabulary: Some(&run.vocabulary),
        };
        trained_to_hugging_face(&trained, &args.out, &options)?;
        run.image_size
    };
    println!("{}", args.out.display());
    if let Some(side) = image_size {
        eprintln!(
            "it was trained with pictures of {side} pixels and opens with them here; transformers needs that size of its image \
             processor, and interpolate_pos_encoding=True"
        );
    }
    Ok(Done::All)
}

fn stage1_run(config: &str, checkpoint: &Path) -> anyhow::Result<Stage1Run> {
    is_of_stage(1, config, checkpoint)?;
    toml::from_str(config).context("the configuration inside the stage-1 checkpoint")
}

fn stage2_run(config: &str, checkpoint: &Path) -> anyhow::Result<Stage2Run> {
    is_of_stage(2, config, checkpoint)?;
    toml::from_str(config).context("the configuration inside the stage-2 checkpoint")
}

/// Refuses a checkpoint of the other stage in words of the arguments: its configuration would miss fields, too.
fn is_of_stage(wanted: i64, config: &str, checkpoint: &Path) -> anyhow::Result<()> {
    let config = config.parse::<toml::Table>().ok();
    match config.and_then(|config| config.get("stage")?.as_integer()) {
        Some(stage) if stage != wanted => {
            bail!("{} is a checkpoint of stage {stage}: give it as --stage{stage}", checkpoint.display())
        }
        _ => Ok(()),
    }
}

fn name_of(path: &Path) -> anyhow::Result<PathBuf> {
    path.file_name().map(PathBuf::from).with_context(|| format!("{} is not a file's path", path.display()))
}
