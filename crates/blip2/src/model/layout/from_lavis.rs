//! From LAVIS's checkpoint of what was trained, and the frozen parts beside it, to a Hugging Face folder.

use std::path::Path;

use super::folder::NewFolder;
use super::language::{Family, Language};
use super::language_folder::LanguageFolder;
use super::state::State;
use super::table::{Architecture, Head, Table};
use super::{
    ConvertOptions, Converted, FrozenParts, add_vision, allowed, converted, output, read_json, sizes,
    small_files,
};
use crate::model::hugging_face::{self, TrainedWith};
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// [`to_hugging_face`](super::to_hugging_face) of a checkpoint with LAVIS's names.
pub(super) fn to_hugging_face(
    checkpoint: &Checkpoint,
    out: &Path,
    parts: &FrozenParts,
    options: &ConvertOptions,
) -> Result<Converted> {
    let vision = parts.vision.as_ref().map(Checkpoint::open).transpose()?;
    let mut state = State::of(checkpoint, without_dictionary)?;
    let mut left_out = add_frozen_vision(&mut state, checkpoint, vision.as_ref())?;

    let folder = language_folder(checkpoint, &state, parts)?;
    let frozen = folder.as_ref().map(|folder| frozen_language_model(&state, folder)).transpose()?.flatten();
    let (mut head, mut text) = (Head::Matching, None);
    if let Some(folder) = &folder {
        if let Some(frozen) = &frozen {
            state.add(frozen, |name| named_by_lavis(folder, name))?;
        }
        let language = language(checkpoint, &state, folder)?;
        text = Some(folder.adapted(&language)?);
        head = Head::Language(language);
    }

    let model = architecture(&state, head, parts.config.as_deref())?;
    let table = Table::of(&model);
    left_out.extend(allowed(&mut state, options, |state| state.check_lavis(&table))?);
    let outputs = output::hugging_face(&table, &state)?;

    let trained_with =
        TrainedWith { instruction: caption_instruction(&model).map(Into::into), ..TrainedWith::default() };
    let new = NewFolder::create(out)?;
    let dtype = output::widest_dtype(&outputs);
    small_files::write(&new, &model, text.as_ref(), parts, dtype, &trained_with)?;
    new.write_tensors(&outputs, &state, options.max_shard_bytes)?;
    new.finish()?;
    Ok(converted(&model, &table, &state, outputs.len(), left_out))
}

/// A LAVIS tensor's name without the dictionary it may be in. A training checkpoint has nothing else to carry over.
fn without_dictionary(name: &str) -> Option<String> {
    match name.split_once('.') {
        Some(("model", rest)) => Some(rest.to_owned()),
        Some(("optimizer" | "scaler" | "config", _)) => None,
        _ => Some(name.to_owned()),
    }
}

/// Adds the image encoder where it was frozen, and says what was left out of it. Where it was trained it is in the checkpoint.
fn add_frozen_vision<'a>(
    state: &mut State<'a>,
    checkpoint: &Checkpoint,
    vision: Option<&'a Checkpoint>,
) -> Result<Vec<String>> {
    let path = checkpoint.path().display();
    let is_trained = state.names().any(|name| name.starts_with("visual_encoder."));
    match (vision, is_trained) {
        (Some(vision), false) => add_vision(state, vision),
        (None, true) => Ok(Vec::new()),
        (Some(_), true) => Err(Error::Request(format!(
            "{path} holds the image encoder that was trained with it: give no other"
        ))),
        (None, false) => Err(Error::Request(format!(
            "{path} holds no image encoder, since it was frozen: give the file it was trained with (eva_vit_g.pth for ViT-g, \
             clip_vit_L.pth for ViT-L)"
        ))),
    }
}

/// The folder of the language model that a checkpoint was trained with; nothing for one of stage 1.
fn language_folder<'a>(
    checkpoint: &Checkpoint,
    state: &State<'_>,
    parts: &'a FrozenParts,
) -> Result<Option<LanguageFolder<'a>>> {
    let Some(family) = family(checkpoint, state)? else { return Ok(None) };
    let path = checkpoint.path().display();
    let Some(folder) = &parts.language_model else {
        return Err(Error::Request(format!(
            "{path} holds no tokenizer and no configuration of its language model: give the model's Hugging Face folder"
        )));
    };
    let folder = LanguageFolder::read(folder)?;
    if folder.family != family {
        return Err(Error::Request(format!(
            "{path} was trained with a model of the family {family:?}, {} is another",
            folder.path.display()
        )));
    }
    Ok(Some(folder))
}

fn family(checkpoint: &Checkpoint, state: &State<'_>) -> Result<Option<Family>> {
    let [opt, t5] = ["opt_proj.weight", "t5_proj.weight"].map(|name| state.contains(name));
    match (opt, t5) {
        (true, true) => {
            let reason = "it has projections for OPT and for T5: no model has both".into();
            Err(Error::File { path: checkpoint.path().into(), reason })
        }
        (true, false) => Ok(Some(Family::Opt)),
        (false, true) => Ok(Some(Family::T5)),
        (false, false) => Ok(None),
    }
}

/// The weights of the folder's language model where it was frozen; where it was trained they are in the checkpoint, and the folder
/// need not have any.
fn frozen_language_model(state: &State<'_>, folder: &LanguageFolder<'_>) -> Result<Option<Checkpoint>> {
    let is_trained = state.contains(&lavis_name(folder.family, folder.family.telling_tensor()));
    if is_trained { Ok(None) } else { Checkpoint::open(folder.path).map(Some) }
}

/// LAVIS's name of a tensor of the language model.
fn lavis_name(family: Family, name: &str) -> String {
    format!("{}_model.{name}", family.lavis_prefix())
}

/// The same of a tensor as the folder names it; nothing for what LAVIS's language model does not have.
fn named_by_lavis(folder: &LanguageFolder<'_>, name: &str) -> Option<String> {
    let own = if folder.is_whole { name.strip_prefix(hugging_face::LANGUAGE_MODEL)? } else { name };
    Some(lavis_name(folder.family, &folder.family.own_name(own)?))
}

/// The language model's tensors, which must be those that the checkpoint was trained with.
fn language(checkpoint: &Checkpoint, state: &State<'_>, folder: &LanguageFolder<'_>) -> Result<Language> {
    let has = |name: &str| state.contains(&lavis_name(folder.family, name));
    let language = Language::of(&folder.text, state.names().count(), has)
        .map_err(|error| error.in_folder(folder.path))?;
    check_projection(checkpoint, state, &language, folder.path)?;
    Ok(language)
}

/// The width of the projection is the language model's: another size of the same family shows here.
fn check_projection(
    checkpoint: &Checkpoint,
    state: &State<'_>,
    language: &Language,
    folder: &Path,
) -> Result<()> {
    let found = state.shape(&format!("{}_proj.weight", language.family.lavis_prefix()))?;
    if found.first() == Some(&language.width) {
        return Ok(());
    }
    Err(Error::Request(format!(
        "{} projects to a language model of width {}, that in {} has {}: give the one it was trained with",
        checkpoint.path().display(),
        found.first().unwrap_or(&0),
        folder.display(),
        language.width
    )))
}

/// A model's sizes: from its tensors, or from a `config.json` that is given.
fn architecture(state: &State<'_>, head: Head, config: Option<&Path>) -> Result<Architecture> {
    let json = config.map(read_json).transpose()?;
    let heads = |part: &str| json.as_ref().and_then(|json| json[part]["num_attention_heads"].as_u64());
    let heads = |part: &str| heads(part).and_then(|n| usize::try_from(n).ok());
    Ok(Architecture {
        vision: sizes::vision(state, heads("vision_config"))?,
        qformer: sizes::qformer(state, heads("qformer_config"))?,
        head,
    })
}

/// How the models that LAVIS fine-tuned on COCO's captions were taught to begin one. Nothing in a checkpoint says it; of those
/// that write they alone see pictures of 364 pixels.
fn caption_instruction(model: &Architecture) -> Option<&'static str> {
    let is_tuned = matches!(model.head, Head::Language(_)) && model.vision.image_size == 364;
    is_tuned.then_some(hugging_face::COCO_INSTRUCTION)
}
