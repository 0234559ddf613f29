//! The two layouts in which BLIP-2 is published, and the way from one to the other.
//!
//! LAVIS (the authors' library) saves a PyTorch state dict of what was trained; the frozen image encoder and language model
//! are files of their own. Hugging Face has all of it in one folder under other names. [`to_hugging_face`] and [`to_lavis`]
//! carry every tensor over as it is, to the bit, one at a time. Two things that Hugging Face's own conversion drops are kept
//! under the names `temp` (the temperature of the contrastive loss) and `cls.predictions.…` (the Q-Former's
//! language-modelling head), which transformers passes over.
//!
//! `table` has the names; a checkpoint must hold exactly the tensors of its table, in their shapes.

mod check;
mod encoder;
mod folder;
mod from_lavis;
mod language;
mod language_folder;
mod output;
mod sizes;
mod small_files;
mod state;
mod table;
mod trained;

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use self::check::Check;
pub(super) use self::encoder::LavisEncoder;
use self::folder::NewFolder;
use self::language::{Language, check_layers};
use self::output::Output;
use self::state::State;
use self::table::{Architecture, Head, Table};
pub use self::trained::{Trained, TrainedPrompts, trained_to_hugging_face};
use super::hugging_face;
use crate::weights::Checkpoint;
use crate::weights::safetensors::Safetensors;
use crate::{Error, Result};

/// The layout that a checkpoint's tensor names are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// LAVIS's BLIP-2: `Qformer.bert.…`, `ln_vision`, maybe under `model.`.
    Lavis,
    /// Hugging Face's: `qformer.…`, `vision_model.…`.
    HuggingFace,
    /// An image encoder alone, as LAVIS loads it (`eva_vit_g.pth`, `clip_vit_L.pth`).
    ImageEncoder,
}

impl Layout {
    /// Recognises a checkpoint by its names; nothing when it is none of the three.
    pub fn of(checkpoint: &Checkpoint) -> Option<Self> {
        if is_lavis(checkpoint) {
            Some(Self::Lavis)
        } else if checkpoint.contains("query_tokens") && checkpoint.contains("qformer.layernorm.weight") {
            Some(Self::HuggingFace)
        } else {
            let is_encoder = ["cls_token", "class_embedding"].iter().any(|name| checkpoint.contains(name));
            is_encoder.then_some(Self::ImageEncoder)
        }
    }
}

/// What a LAVIS checkpoint does not hold itself.
#[derive(Debug, Default)]
pub struct FrozenParts {
    /// The image encoder's checkpoint, where it was frozen.
    pub vision: Option<PathBuf>,
    /// The language model's Hugging Face folder, or that of a BLIP-2 model that has it, for its configuration, its tokenizer, and
    /// its weights where it was frozen.
    pub language_model: Option<PathBuf>,
    /// BERT's `vocab.txt`, for a model of stage 1.
    pub vocabulary: Option<PathBuf>,
    /// A BLIP-2 `config.json` of a model of the same sizes. Only models of unpublished widths need one, since the number of
    /// attention heads leaves no trace in the weights.
    pub config: Option<PathBuf>,
}

/// How a conversion is done.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Where a folder's weights are larger they are split into files of at most this size.
    pub max_shard_bytes: u64,
    /// Leave out tensors that the model does not have instead of refusing them, as LAVIS does when it loads.
    pub allow_unknown: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self { max_shard_bytes: 5_000_000_000, allow_unknown: false }
    }
}

/// What a conversion wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Converted {
    /// Tensors written.
    pub n_tensors: usize,
    /// Tensors left out on purpose: other blocks of an image encoder, and what [`ConvertOptions::allow_unknown`] allows.
    pub left_out: Vec<String>,
    /// Whether it holds the temperature and the Q-Former's language-modelling head; nothing for a model of stage 2, which has
    /// neither.
    pub has_pretraining_heads: Option<bool>,
}

/// Makes a Hugging Face folder of a LAVIS checkpoint, or of a Hugging Face one whose weights are in another container
/// (`pytorch_model.bin`). `out` appears only when it is complete.
///
/// # Errors
/// [`Error::TensorNames`] with all tensors that are missing, misshapen or unknown; [`Error::Request`] when a frozen part is
/// neither in the checkpoint nor among `parts`; [`Error::File`], [`Error::Io`], [`Error::Config`].
pub fn to_hugging_face(
    from: impl AsRef<Path>,
    out: impl AsRef<Path>,
    parts: &FrozenParts,
    options: &ConvertOptions,
) -> Result<Converted> {
    let (from, out) = (from.as_ref(), out.as_ref());
    let checkpoint = Checkpoint::open(from)?;
    match Layout::of(&checkpoint) {
        Some(Layout::Lavis) => from_lavis::to_hugging_face(&checkpoint, out, parts, options),
        Some(Layout::HuggingFace) => repack_hugging_face(&checkpoint, from, out, options),
        Some(Layout::ImageEncoder) => Err(Error::Request(format!(
            "{} is an image encoder alone: convert the LAVIS checkpoint that was trained with it, and give this one as its \
             image encoder",
            from.display()
        ))),
        None => Err(unknown_layout(&checkpoint)),
    }
}

/// Makes a LAVIS state dict of a Hugging Face folder: a `.pth` file as LAVIS loads it, or safetensors, by the name of `out`.
/// The frozen parts are in it.
///
/// # Errors
/// As [`to_hugging_face`].
pub fn to_lavis(
    folder: impl AsRef<Path>,
    out: impl AsRef<Path>,
    options: &ConvertOptions,
) -> Result<Converted> {
    let (folder, out) = (folder.as_ref(), out.as_ref());
    let checkpoint = Checkpoint::open(folder)?;
    if Layout::of(&checkpoint) != Some(Layout::HuggingFace) {
        return Err(match Layout::of(&checkpoint) {
            Some(Layout::Lavis) => Error::Request(format!("{} has LAVIS's names already", folder.display())),
            _ => unknown_layout(&checkpoint),
        });
    }
    let json = json_of(folder)?;
    let model = read_architecture(&checkpoint, &json).map_err(|error| error.in_folder(folder))?;
    let table = Table::of(&model);
    let mut state = State::of(&checkpoint, |name| Some(name.to_owned()))?;
    let left_out = allowed(&mut state, options, |state| state.check_hugging_face(&table))?;
    let outputs = output::lavis(&table, &state)?;
    output::write_lavis(out, &outputs, &state)?;
    Ok(converted(&model, &table, &state, outputs.len(), left_out))
}

/// Copies all tensors of a checkpoint into one safetensors file, under the names they have.
///
/// # Errors
/// [`Error::File`], [`Error::Io`].
pub fn copy_tensors(from: impl AsRef<Path>, out: impl AsRef<Path>) -> Result<Converted> {
    let checkpoint = Checkpoint::open(from)?;
    let state = State::of(&checkpoint, |name| Some(name.to_owned()))?;
    let outputs = state
        .names()
        .map(|name| Output::renamed(&state, name, name, state.shape(name)?))
        .collect::<Result<Vec<_>>>()?;
    let layout = match Layout::of(&checkpoint) {
        Some(Layout::Lavis | Layout::ImageEncoder) => "lavis",
        Some(Layout::HuggingFace) => "huggingface",
        None => "unknown",
    };
    output::write_safetensors_file(out.as_ref(), &outputs, &state, layout)?;
    Ok(Converted { n_tensors: outputs.len(), ..Converted::default() })
}

fn repack_hugging_face(
    checkpoint: &Checkpoint,
    from: &Path,
    out: &Path,
    options: &ConvertOptions,
) -> Result<Converted> {
    if !from.is_dir() {
        let reason = format!(
            "{} is the weights of a Hugging Face folder: give the folder, which has the configuration, or write to a \
             .safetensors file",
            from.display()
        );
        return Err(Error::Request(reason));
    }
    let json = json_of(from)?;
    let model = read_architecture(checkpoint, &json).map_err(|error| error.in_folder(from))?;
    let table = Table::of(&model);
    let mut state = State::of(checkpoint, |name| Some(name.to_owned()))?;
    let left_out = allowed(&mut state, options, |state| state.check_hugging_face(&table))?;
    let outputs = table
        .entries
        .iter()
        .filter(|entry| state.contains(&entry.name))
        .map(|entry| Output::renamed(&state, &entry.name, &entry.name, &entry.shape))
        .collect::<Result<Vec<_>>>()?;
    let new = NewFolder::create(out)?;
    small_files::copy(&new, from)?;
    new.write_tensors(&outputs, &state, options.max_shard_bytes)?;
    new.finish()?;
    Ok(converted(&model, &table, &state, outputs.len(), left_out))
}

fn converted(
    model: &Architecture,
    table: &Table,
    state: &State<'_>,
    n_tensors: usize,
    left_out: Vec<String>,
) -> Converted {
    let is_there = |entry: &table::Entry| state.contains(&entry.name) || state.contains(entry.lavis_name());
    let has_pretraining_heads = matches!(model.head, Head::Matching)
        .then(|| table.entries.iter().filter(|entry| entry.is_extra).all(is_there));
    Converted { n_tensors, left_out, has_pretraining_heads }
}

/// Runs `check`; where unknown tensors are allowed and are all that is wrong, removes them and says which they were.
fn allowed(
    state: &mut State<'_>,
    options: &ConvertOptions,
    check: impl Fn(&State<'_>) -> Result<()>,
) -> Result<Vec<String>> {
    match check(state) {
        Err(Error::TensorNames { missing, misshapen, unknown })
            if options.allow_unknown && missing.is_empty() && misshapen.is_empty() =>
        {
            unknown.iter().for_each(|name| state.remove(name));
            Ok(unknown)
        }
        result => result.map(|()| Vec::new()),
    }
}

fn unknown_layout(checkpoint: &Checkpoint) -> Error {
    let names = checkpoint.names();
    let reason = if names.iter().any(|name| name.contains("llm_proj.")) {
        "this is a checkpoint of InstructBLIP, which is another model: BLIP-2's are read".into()
    } else {
        let some: Vec<_> = names.into_iter().take(3).collect();
        format!(
            "these are not the tensors of a BLIP-2 model, neither by LAVIS's nor by Hugging Face's names (the first are {})",
            some.join(", ")
        )
    };
    Error::File { path: checkpoint.path().into(), reason }
}

/// Whether a checkpoint has the names of LAVIS's BLIP-2 with one of the heads that are read here.
fn is_lavis(checkpoint: &Checkpoint) -> bool {
    let has = |name: &str| checkpoint.contains(name) || checkpoint.contains(&format!("model.{name}"));
    has("query_tokens")
        && has("Qformer.bert.embeddings.LayerNorm.weight")
        && ["opt_proj.weight", "t5_proj.weight", "itm_head.weight", "vision_proj.weight"]
            .iter()
            .any(|name| has(name))
}

/// Adds an image encoder's own checkpoint; what BLIP-2 does not have of it (its last block, its head) is named.
fn add_vision<'a>(state: &mut State<'a>, checkpoint: &'a Checkpoint) -> Result<Vec<String>> {
    if Layout::of(checkpoint) != Some(Layout::ImageEncoder) {
        let reason = "this is no image encoder as LAVIS loads it: EVA's begin with cls_token and blocks.0, CLIP's with \
                      class_embedding and transformer.resblocks.0";
        return Err(Error::File { path: checkpoint.path().into(), reason: reason.into() });
    }
    let is_clip = checkpoint.contains("class_embedding");
    let (token, blocks) =
        if is_clip { ("class_embedding", "transformer.resblocks.") } else { ("cls_token", "blocks.") };
    let width = checkpoint.shape(token).and_then(|shape| shape.last().copied()).unwrap_or(0);
    let block = |name: &str| name.strip_prefix(blocks)?.split('.').next()?.parse::<usize>().ok();
    let n_stored = checkpoint.names().into_iter().filter_map(block).max().map_or(0, |last| last + 1);
    let n_blocks = sizes::n_blocks(is_clip, width, n_stored);
    // What follows the blocks, and what EVA was pre-trained with: no part of the features.
    let after: &[&str] =
        if is_clip { &["ln_post.", "proj"] } else { &["norm.", "fc_norm.", "head.", "mask_token"] };
    let is_kept = |name: &str| {
        block(name).is_none_or(|i| i < n_blocks) && !after.iter().any(|prefix| name.starts_with(prefix))
    };
    state.add(checkpoint, |name| is_kept(name).then(|| format!("visual_encoder.{name}")))?;
    Ok(checkpoint.names().into_iter().filter(|name| !is_kept(name)).map(str::to_owned).collect())
}

/// Whether the tensors of a Hugging Face folder have the names and shapes of the model that its configuration describes, one that
/// writes or one that matches. Only the headers of its files are read. What loading passes over is passed over: copies of tied
/// weights, counters of positions, a leftover of T5's first conversions.
///
/// # Errors
/// [`Error::TensorNames`] with all that is missing, misshapen or unknown; [`Error::Config`].
pub(super) fn check_tensors(file: &Safetensors, json: &Json, writes: bool) -> Result<()> {
    let mut model = architecture_of(json, writes, file.names().count(), |name| file.contains(name))?;
    if let Head::Language(language) = &mut model.head {
        // Where the two differ, transformers' own models project to the layers' width: what is stored decides.
        let stored = file.shape("language_projection.weight").ok().and_then(|shape| shape.first().copied());
        if stored == Some(language.inner_width) && language.inner_width > language.width {
            language.width = language.inner_width;
        }
    }
    let table = Table::of(&model);
    let prefix = hugging_face::LANGUAGE_MODEL;
    let usual_name = |name: &str| match (&model.head, name.strip_prefix(prefix)) {
        (Head::Language(language), Some(own)) => {
            language.family.own_name(own).map(|own| format!("{prefix}{own}"))
        }
        _ => Some(name.to_owned()),
    };
    let named = file.names().filter_map(|name| Some((usual_name(name)?, file.shape(name).ok()?)));
    let mut check = Check::of(named);
    check.hugging_face(&table);
    check.pass_over_all(|name| name.ends_with(".position_ids"));
    for (name, _) in &table.derived_hugging_face {
        check.pass_over(name);
    }
    check.finish()
}

/// The sizes that a Hugging Face folder's configuration says.
fn read_architecture(checkpoint: &Checkpoint, json: &Json) -> Result<Architecture> {
    let contains = |name: &str| checkpoint.contains(name);
    architecture_of(json, contains("language_projection.weight"), checkpoint.names().len(), contains)
}

/// As [`read_architecture`], of a model that writes or one that matches, with `n_tensors` tensors.
fn architecture_of(
    json: &Json,
    writes: bool,
    n_tensors: usize,
    contains: impl Fn(&str) -> bool,
) -> Result<Architecture> {
    let vision = hugging_face::vit_config(&json["vision_config"])?;
    let mut qformer = hugging_face::qformer_config(json)?;
    qformer.encoder_hidden_size = vision.hidden_size;
    qformer.validate()?;
    check_layers("vision_config.num_hidden_layers", vision.num_hidden_layers, n_tensors)?;
    check_layers("qformer_config.num_hidden_layers", qformer.num_hidden_layers, n_tensors)?;
    let head = if writes {
        let has = |name: &str| contains(&format!("{}{name}", hugging_face::LANGUAGE_MODEL));
        Head::Language(Language::of(&hugging_face::text_config(json), n_tensors, has)?)
    } else {
        Head::Matching
    };
    Ok(Architecture { vision, qformer, head })
}

fn json_of(folder: &Path) -> Result<Json> {
    read_json(&folder.join(super::FILE_NAME))
}

fn read_json(path: &Path) -> Result<Json> {
    let bytes = crate::small_file::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::File { path: path.into(), reason: format!("is not JSON: {error}") })
}
