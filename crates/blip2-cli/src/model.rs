//! Which model and which pictures: what several commands share.

use std::env;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blip2::generate::GenerationConfig;
use blip2::image::{Limits, Pixels, RgbImage};
use blip2::layers::{FrozenFormat, Precision, Quantization};
use blip2::model::{
    Blip2, Compared, FILE_NAME, Given, ImageFeatures, OpenOptions, Preset, check_prompt, check_texts,
    memory_needed,
};

use crate::args::{ComputeArg, GenerationArgs, ModelArgs, PresetArg, SourceArgs};
use crate::generation::{self, Written, WrongUsage};
use crate::hub::{self, Repository, Settings};
use crate::{dtype, frozen, memory};

/// The folder of the default model, in the repository and in an installation.
const DEFAULT_MODEL: &str = "default-model";

/// Which part of a model a command needs; loading the other would cost time and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Matching, embedding, classifying.
    Stage1,
    /// Captions and answers.
    Stage2,
    /// Both, as far as the model has them.
    Both,
}

/// Opens the model that the arguments name, or the default one. A model of the hub and the default model's frozen parts are
/// fetched when they are not here.
///
/// # Errors
/// When there is no such model, a part of it cannot be had, or it needs more memory than there is.
pub(crate) fn open(args: &ModelArgs, part: Part) -> anyhow::Result<Blip2> {
    open_as(args, part, None)
}

/// [`open`], to compute as the implementation of a preset does.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_as(args: &ModelArgs, part: Part, preset: Option<PresetArg>) -> anyhow::Result<Blip2> {
    open_source(&args.source, part, preset, |message| eprintln!("{message}"))
}

/// [`open`], for a command that has its own way of saying things.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_source(
    args: &SourceArgs,
    part: Part,
    preset: Option<PresetArg>,
    say: impl Fn(&str),
) -> anyhow::Result<Blip2> {
    Ok(open_with_format(args, part, preset, say)?.0)
}

/// Opens a model that writes, with the settings that it writes with. They are checked before its weights are read, and so is
/// whether what all texts go on from fits.
///
/// # Errors
/// As [`open`], and when the settings cannot be or the text is too long.
pub(crate) fn open_to_write(
    args: &SourceArgs,
    preset: Option<PresetArg>,
    written: Written,
    given: Option<Given<'_>>,
    generation: &GenerationArgs,
) -> anyhow::Result<(Blip2, GenerationConfig)> {
    generation::check(generation)?;
    let folder = locate(args)?;
    written.check(&folder, preset, generation)?;
    if let Some(given) = given {
        check_prompt(&folder, &frozen::folders()?, given)?;
    }
    let say = |message: &str| eprintln!("{message}");
    let (model, _) = open_folder(folder, args, Part::Stage2, preset, say)?;
    let settings = written.settings(&model, preset, generation);
    Ok((model, settings))
}

/// Opens a model that compares these texts with pictures. Before its weights are read it is known whether it can.
///
/// # Errors
/// As [`open`], and when a text is empty or too long.
pub(crate) fn open_to_compare(
    args: &ModelArgs,
    part: Part,
    preset: Option<PresetArg>,
    texts: &[&str],
    compared: Compared,
) -> anyhow::Result<Blip2> {
    let folder = locate(&args.source)?;
    check_texts(&folder, texts, compared, preset.map(Preset::from))?;
    Ok(open_folder(folder, &args.source, part, preset, |message| eprintln!("{message}"))?.0)
}

/// [`open_source`], with the format that the model's large matrices are in.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_with_format(
    args: &SourceArgs,
    part: Part,
    preset: Option<PresetArg>,
    say: impl Fn(&str),
) -> anyhow::Result<(Blip2, FrozenFormat)> {
    open_folder(locate(args)?, args, part, preset, say)
}

/// The folder of the model that the arguments name, or of the default one. A model of the hub is fetched when it is not here.
fn locate(args: &SourceArgs) -> anyhow::Result<PathBuf> {
    match &args.model {
        Some(model) => find(model, args.dtype, args.ignore_memory),
        None => default_model(),
    }
}

/// Refuses to round the Q-Former alone.
///
/// # Errors
/// [`WrongUsage`].
pub(crate) fn check_quantize_qformer(
    args: &SourceArgs,
    quantization: Option<Quantization>,
) -> anyhow::Result<()> {
    if args.quantize_qformer && quantization.is_none() {
        return WrongUsage::end("--quantize-qformer goes with --dtype int8 or int4");
    }
    Ok(())
}

fn open_folder(
    folder: PathBuf,
    args: &SourceArgs,
    part: Part,
    preset: Option<PresetArg>,
    say: impl Fn(&str),
) -> anyhow::Result<(Blip2, FrozenFormat)> {
    if args.model.is_none() {
        frozen::ensure(part != Part::Stage1)?;
    }
    let is_hugging_face = blip2::model::is_hugging_face(&folder)?;
    let stored = blip2::model::stored_quantization(&folder)?;
    let mut options = OpenOptions {
        frozen: frozen::folders()?,
        image_size: args.image_size,
        quantize_qformer: args.quantize_qformer,
        preset: preset.map(Preset::from),
        vision: true,
        stage1: part != Part::Stage2,
        stage2: part != Part::Stage1,
        ..OpenOptions::default()
    };
    let format = match args.dtype {
        Some(ComputeArg::F32 | ComputeArg::Bf16) if stored.is_some() => {
            bail!("{} is stored in few bits: leave --dtype out, or give the original model", folder.display())
        }
        Some(asked) => asked.format(|| dtype::of_folder(&folder, &options, &say))?,
        None if is_hugging_face => Precision::F32.into(),
        // Rounding the trained weights and the four-bit language model once more costs nothing measurable.
        None => Precision::Bf16.into(),
    };
    (options.precision, options.quantization) = (format.precision, format.quantization);
    check_quantize_qformer(args, format.quantization.or(stored))?;
    let said = memory::check(memory_needed(&folder, &options)?, memory::available(), args.ignore_memory)?;
    // Most of this project's own models are small: of those that fit nothing is said.
    if is_hugging_face {
        say(&said);
    }
    let format = FrozenFormat { quantization: format.quantization.or(stored), ..format };
    Ok((Blip2::open(folder, &options)?, format))
}

/// The folder of a model: the one that is named, if it exists, or that of the model of this name on the hub, which is fetched
/// if it can fit into memory in what is asked for.
///
/// # Errors
/// When it is neither, cannot be had, or is too large.
pub(crate) fn find(model: &Path, asked: Option<ComputeArg>, ignore_memory: bool) -> anyhow::Result<PathBuf> {
    if model.exists() {
        return Ok(model.to_owned());
    }
    let repository = model.to_str().map(Repository::parse).transpose()?.flatten();
    let Some(repository) = repository else {
        bail!(
            "there is no folder {} (one with {FILE_NAME} is a model), and this is not the name of a model on the hub, which \
             looks like organisation/name",
            model.display()
        );
    };
    let n_bits = dtype::least_bits(asked);
    let fits = |n_bytes| memory::check_stored(n_bytes, n_bits, memory::available(), ignore_memory);
    hub::folder(&repository, &Settings::from_env()?, &fits)
        .with_context(|| format!("there is no folder {} here", model.display()))
}

/// Fetches a model of the hub and prints its folder.
pub(crate) fn fetch(name: &str) -> anyhow::Result<()> {
    let repository = Repository::parse(name)?.with_context(|| {
        format!("`{name}` is not the name of a model on the hub, which looks like organisation/name")
    })?;
    // It may be meant for another machine: whether it fits into this one's memory does not matter.
    println!("{}", hub::folder(&repository, &Settings::from_env()?, &|_| Ok(()))?.display());
    Ok(())
}

fn default_model() -> anyhow::Result<PathBuf> {
    let mut candidates = Vec::new();
    if let Some(home) = env::var_os("BLIP2_HOME").filter(|home| !home.is_empty()) {
        candidates.push(Path::new(&home).join(DEFAULT_MODEL));
    }
    if let Ok(executable) = env::current_exe()
        && let Some(folder) = executable.parent()
    {
        candidates.push(folder.join(DEFAULT_MODEL));
        candidates.push(folder.join("../share/blip2").join(DEFAULT_MODEL));
    }
    // Where it was built.
    candidates.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(DEFAULT_MODEL));
    if let Some(found) = candidates.iter().find(|folder| folder.join(FILE_NAME).is_file()) {
        return Ok(found.clone());
    }
    let looked: Vec<_> = candidates.iter().map(|folder| folder.display().to_string()).collect();
    bail!(
        "the default model's trained weights are in none of: {}; give another model with --model, or put the folder \
         assets/{DEFAULT_MODEL} of the source there",
        looked.join(", ")
    )
}

/// Whether a picture's path stands for standard input: `-`.
pub(crate) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Reads a picture, as it is seen or as the implementation of the preset reads it.
///
/// # Errors
/// Says in one line what is wrong with the file.
pub(crate) fn open_picture(path: &Path, preset: Option<PresetArg>) -> anyhow::Result<RgbImage> {
    let limits = Limits::default();
    if !is_stdin(path) {
        return Ok(blip2::image::open(path, &limits, pixels(preset))?);
    }
    let mut bytes = Vec::new();
    // One more than is allowed, so that too much is told from just enough.
    let read = std::io::stdin().lock().take(limits.max_bytes + 1).read_to_end(&mut bytes);
    read.context("standard input cannot be read")?;
    blip2::image::decode(&bytes, &limits, pixels(preset)).context("standard input")
}

/// How pictures are read.
pub(crate) fn pixels(preset: Option<PresetArg>) -> Pixels {
    if preset.is_some() { Pixels::Pillow } else { Pixels::AsSeen }
}

/// Reads a picture and encodes it.
///
/// # Errors
/// As [`open_picture`], and those of the encoder.
pub(crate) fn encode_picture(
    model: &Blip2,
    path: &Path,
    preset: Option<PresetArg>,
) -> anyhow::Result<ImageFeatures> {
    let mut features = model.encode(&[open_picture(path, preset)?])?;
    features.pop().ok_or_else(|| anyhow::anyhow!("the picture gave no features"))
}

impl From<PresetArg> for Preset {
    fn from(preset: PresetArg) -> Self {
        match preset {
            PresetArg::Hf => Self::Hf,
            PresetArg::Lavis => Self::Lavis,
        }
    }
}
