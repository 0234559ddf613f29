//! What was trained here, with the frozen parts that it was trained with, as a Hugging Face folder.

use std::path::Path;

use serde_json::Value as Json;

use super::encoder::LavisEncoder;
use super::folder::NewFolder;
use super::language::Language;
use super::language_folder::LanguageFolder;
use super::output::Output;
use super::state::State;
use super::table::{Architecture, Head, Table};
use super::{ConvertOptions, Converted, FrozenParts, Layout, add_vision, converted, output, small_files};
use crate::model::hugging_face::{self, Renamed, TrainedWith};
use crate::model::parts::EncoderOptions;
use crate::qformer::QFormerConfig;
use crate::text::PromptFormat;
use crate::vision::vit::VitConfig;
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// A checkpoint of training, and what it was trained with.
#[derive(Debug, Clone, Copy)]
pub struct Trained<'a> {
    /// Its safetensors file.
    pub weights: &'a Path,
    /// The Q-Former's sizes.
    pub qformer: &'a QFormerConfig,
    /// The image encoder: a vision transformer as LAVIS loads it, or the folder of a BLIP-2 model.
    pub encoder: &'a Path,
    /// How the encoder was opened. Its position embeddings are written as they are stored, for pictures of the size that it was
    /// made for; another size that it was trained with stands in the configuration, and the folder opens with it.
    pub encoder_options: EncoderOptions,
    /// Of stage 2 the language model: its Hugging Face folder, or that of a BLIP-2 model.
    pub language_model: Option<&'a Path>,
    /// Of stage 2 how the language model was spoken to, which the folder then does as well.
    pub prompts: Option<TrainedPrompts<'a>>,
    /// Of stage 1 BERT's vocabulary.
    pub vocabulary: Option<&'a Path>,
}

/// How a language model was spoken to in training.
#[derive(Debug, Clone, Copy)]
pub struct TrainedPrompts<'a> {
    /// What asked for a caption, or how one began; may be empty.
    pub instruction: &'a str,
    /// How questions were asked.
    pub prompt: &'a PromptFormat,
    /// How captions were asked for.
    pub caption_prompt: &'a PromptFormat,
}

impl TrainedPrompts<'_> {
    /// What of it the language model's family does not say by itself.
    fn trained_with(&self, text: &Json) -> Result<TrainedWith> {
        let family = hugging_face::Family::of(text)?;
        let unusual = |format: &PromptFormat, usual| (*format != usual).then(|| format.clone());
        Ok(TrainedWith {
            instruction: Some(self.instruction.into()),
            prompt: unusual(self.prompt, family.question()),
            caption_prompt: unusual(self.caption_prompt, family.caption()),
            image_size: None,
        })
    }
}

/// Makes a Hugging Face folder of a checkpoint of training and its frozen parts. All tensors keep their bits. `out` appears only
/// when it is complete.
///
/// # Errors
/// [`Error::Request`] when the encoder is no vision transformer, or the language model neither OPT nor T5: Hugging Face has no
/// BLIP-2 of others; [`Error::TensorNames`] with all tensors that are missing, misshapen or unknown; [`Error::File`],
/// [`Error::Io`], [`Error::Config`].
pub fn trained_to_hugging_face(
    trained: &Trained<'_>,
    out: impl AsRef<Path>,
    options: &ConvertOptions,
) -> Result<Converted> {
    let weights = Checkpoint::open(trained.weights)?;
    let encoder = Encoder::open(trained.encoder)?;
    let language = trained.language_model.map(OpenedLanguage::open).transpose()?;

    let mut state = State::of(&weights, |name| Some(Renamed::<()>::name(name)))?;
    let (mut head, mut text) = (Head::Matching, None);
    if let Some(opened) = &language {
        state.add(&opened.checkpoint, |name| opened.name(name))?;
        let folder = &opened.folder;
        let has = |name: &str| state.contains(&format!("{}{name}", hugging_face::LANGUAGE_MODEL));
        let language = Language::of(&folder.text, state.names().count(), has)
            .map_err(|error| error.in_folder(folder.path))?;
        text = Some(folder.adapted(&language)?);
        head = Head::Language(language);
    }
    let (vision, vision_table) = encoder.sizes(trained.encoder_options.num_attention_heads)?;
    let spoken = trained.prompts.zip(language.as_ref());
    let spoken = spoken.map(|(prompts, language)| prompts.trained_with(&language.folder.text)).transpose()?;
    let trained_with = TrainedWith {
        image_size: encoder.image_size(trained.encoder_options)?.filter(|side| *side != vision.image_size),
        ..spoken.unwrap_or_default()
    };
    let model = Architecture { vision, qformer: trained.qformer.clone(), head };
    let table = Table::without_encoder(&model);
    state.check_hugging_face(&table)?;
    encoder.add_to(&mut state)?;
    let mut outputs = encoder.outputs(&vision_table, &state)?;
    outputs.extend(renamed(&table, &state)?);

    let new = NewFolder::create(out.as_ref())?;
    let parts = FrozenParts {
        language_model: trained.language_model.map(Into::into),
        vocabulary: trained.vocabulary.map(Into::into),
        ..FrozenParts::default()
    };
    let dtype = output::widest_dtype(&outputs);
    small_files::write(&new, &model, text.as_ref(), &parts, dtype, &trained_with)?;
    if encoder.json.is_some()
        && let Some((_, pictures)) = hugging_face::image_processor(trained.encoder)?
    {
        // Whichever file has it there; the other things in `processor_config.json` are of the Q-Former.
        new.write_json("preprocessor_config.json", &pictures)?;
    }
    if let Some(folder) =
        trained.language_model.filter(|_| language.as_ref().is_some_and(|opened| opened.folder.is_whole))
    {
        small_files::copy_existing(&new, folder, &["generation_config.json"])?;
    }
    new.write_tensors(&outputs, &state, options.max_shard_bytes)?;
    new.finish()?;
    Ok(converted(&model, &table, &state, outputs.len(), Vec::new()))
}

fn renamed(table: &Table, state: &State<'_>) -> Result<Vec<Output>> {
    let there = table.entries.iter().filter(|entry| state.contains(&entry.name));
    there.map(|entry| Output::renamed(state, &entry.name, &entry.name, &entry.shape)).collect()
}

/// An image encoder's checkpoint in either layout.
struct Encoder {
    checkpoint: Checkpoint,
    /// The configuration of the folder that it is in.
    json: Option<Json>,
}

impl Encoder {
    fn open(path: &Path) -> Result<Self> {
        let json = if path.is_dir() { hugging_face::read_config(path)? } else { None };
        let checkpoint = Checkpoint::open(path)?;
        if json.is_none() && Layout::of(&checkpoint) != Some(Layout::ImageEncoder) {
            return Err(Error::Request(format!(
                "{} is no vision transformer: Hugging Face has no BLIP-2 with another image encoder",
                path.display()
            )));
        }
        Ok(Self { checkpoint, json })
    }

    /// Its sizes and its tensors, which are checked.
    fn sizes(&self, heads: Option<usize>) -> Result<(VitConfig, Table)> {
        let config = match &self.json {
            Some(json) => hugging_face::vit_config(&json["vision_config"])?,
            None => LavisEncoder::of(&self.checkpoint, heads)?.config().clone(),
        };
        let table = Table::of_encoder(&config);
        if self.json.is_some() {
            State::of(&self.checkpoint, inside)?.check_hugging_face(&table)?;
        }
        Ok((config, table))
    }

    /// Side of the pictures, where the options or the encoder's folder name one.
    fn image_size(&self, options: EncoderOptions) -> Result<Option<usize>> {
        let of_folder = self.json.as_ref().map(TrainedWith::read).transpose()?;
        Ok(options.image_size.or(of_folder.and_then(|trained_with| trained_with.image_size)))
    }

    fn add_to<'a>(&'a self, state: &mut State<'a>) -> Result<()> {
        match self.json {
            Some(_) => state.add(&self.checkpoint, inside),
            None => add_vision(state, &self.checkpoint).map(drop),
        }
    }

    fn outputs(&self, table: &Table, state: &State<'_>) -> Result<Vec<Output>> {
        if self.json.is_some() { renamed(table, state) } else { output::hugging_face(table, state) }
    }
}

/// The encoder's tensors in a folder of a whole model; the norm behind it is trained with the Q-Former.
fn inside(name: &str) -> Option<String> {
    let is_encoder = name.starts_with("vision_model.") && !name.starts_with("vision_model.post_layernorm.");
    is_encoder.then(|| name.to_owned())
}

/// A language model's folder and the weights in it.
struct OpenedLanguage<'a> {
    folder: LanguageFolder<'a>,
    checkpoint: Checkpoint,
}

impl<'a> OpenedLanguage<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::Request(format!(
                "{} is no folder: Hugging Face's BLIP-2 has a language model of the family OPT or T5, in a folder",
                path.display()
            )));
        }
        Ok(Self { folder: LanguageFolder::read(path)?, checkpoint: Checkpoint::open(path)? })
    }

    fn name(&self, name: &str) -> Option<String> {
        if self.folder.is_whole {
            return name.starts_with(hugging_face::LANGUAGE_MODEL).then(|| name.to_owned());
        }
        self.folder.family.own_name(name).map(|name| format!("{}{name}", hugging_face::LANGUAGE_MODEL))
    }
}
