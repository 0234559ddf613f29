//! A BLIP-2 model in a Hugging Face folder, as `Salesforce/blip2-opt-2.7b`, `-flan-t5-xl` or `-itm-vit-g` are published.
//!
//! Old revisions have no image token and put the queries before the text; new ones have 32 image tokens there, which the
//! queries replace. Here the queries are rows between words in either case, so both are the same model.

mod config;
mod generation;
mod trained_with;

use std::borrow::Borrow;
use std::path::{Path, PathBuf};

use blip2_kernels::quantized::QuantizedWeight;
use serde_json::Value as Json;

pub(super) use self::config::{image_processor, qformer_config, read_json, vit_config};
use self::config::{processor, size, token, wrong};
pub(super) use self::trained_with::TrainedWith;
use super::config::{ModelConfig, Stage1Config, VisionConfig};
use super::given::{Given, Reader};
use super::layout;
use super::parts;
use super::preset::Preset;
use super::stage1::Stage1;
use super::texts::{TextReader, Texts};
use super::{Blip2, OpenOptions};
use crate::image::ImageProcessor;
use crate::language::{LanguageModel, context_len};
use crate::layers::{FrozenFormat, FrozenWeight, Loader, Precision, Quantization, TensorSource};
use crate::qformer::{LN_VISION_EPS, QFormer, QFormerConfig, TextSide};
use crate::text::{BertTokenizer, LanguageTokenizer, PromptFormat};
use crate::vision::VisionEncoder;
use crate::vision::vit::{AlignCorners, Vit, VitConfig};
use crate::weights::safetensors::Safetensors;
use crate::weights::{StoredTensor, TensorRows};
use crate::{Error, Result};

/// What the names of the language model's tensors begin with.
pub(super) const LANGUAGE_MODEL: &str = "language_model.";

/// The Q-Former of a published model is computed in f32 whatever the rest is in, as transformers does
/// (`_keep_in_fp32_modules`): it is a twentieth of the work.
pub(super) const BRIDGE_PRECISION: Precision = Precision::F32;

/// How the models that were fine-tuned on COCO's captions were taught to begin one.
pub(super) const COCO_INSTRUCTION: &str = "a photo of";

/// Reads `config.json` if it is that of a BLIP-2 model from Hugging Face; nothing if it is this project's.
pub(super) fn read_config(folder: &Path) -> Result<Option<Json>> {
    let json = read_json(folder)?;
    match json["model_type"].as_str() {
        None => Ok(None),
        Some("blip-2") => Ok(Some(json)),
        Some(other) => Err(Error::File {
            path: folder.join(super::FILE_NAME),
            reason: format!("is the configuration of a model of type `{other}`; this reads `blip-2`"),
        }),
    }
}

/// Opens a model of either kind.
///
/// # Errors
/// When the configuration asks for what is not there, a file is missing, or the tensors are not exactly those of the model:
/// [`Error::Folder`] then has all of their names, and no weight was read.
pub(super) fn open(folder: &Path, json: &Json, options: &OpenOptions) -> Result<Blip2> {
    let file = Safetensors::open(folder)?;
    if let (Some(stored), Some(wanted)) = (file.quantization(), options.quantization)
        && stored != wanted
    {
        let reason = format!("is stored in {stored:?}: open the original to hold it in {wanted:?}");
        return Err(Error::File { path: folder.into(), reason });
    }
    load(folder, json, &file, options)
}

/// [`open`] with the checkpoint opened.
pub(super) fn load(folder: &Path, json: &Json, file: &Safetensors, options: &OpenOptions) -> Result<Blip2> {
    let field = "architectures";
    let opened = match json[field][0].as_str() {
        // A configuration that was made by hand may not say; captions are what most models are for.
        None | Some("Blip2ForConditionalGeneration") => generation::open(folder, json, file, options),
        Some("Blip2ForImageTextRetrieval") => open_retrieval(folder, json, file, options),
        Some(other) => Err(wrong(
            field,
            &format!("is `{other}`, expected Blip2ForConditionalGeneration or Blip2ForImageTextRetrieval"),
        )),
    };
    opened.map_err(|error| error.in_folder(folder))
}

/// Says all that is wrong with the tensors' names and shapes before the first is read. What is stored in few bits was made by a
/// model that was opened.
fn check_tensors(file: &Safetensors, json: &Json, writes: bool) -> Result<()> {
    if file.quantization().is_some() { Ok(()) } else { layout::check_tensors(file, json, writes) }
}

/// Opens a model for matching and features (`Blip2ForImageTextRetrieval`).
fn open_retrieval(folder: &Path, json: &Json, file: &Safetensors, options: &OpenOptions) -> Result<Blip2> {
    let (vit, qformer) = sizes(json, options.preset)?;
    let tokenizer = BertTokenizer::from_folder(folder)?;
    if tokenizer.n_tokens() > qformer.vocab_size {
        let reason = format!(
            "has {} tokens with [DEC], the Q-Former knows {}: it belongs to another model",
            tokenizer.n_tokens(),
            qformer.vocab_size
        );
        return Err(Error::File { path: folder.into(), reason: format!("the vocabulary {reason}") });
    }
    let pictures = Pictures::of(folder, json, &vit, options.image_size)?;
    check_tensors(file, json, false)?;
    let source = Renamed(file);
    let loader = Loader::frozen(&source, options.precision);
    let encoder = load_vision(&vit, &pictures, &loader, options.quantization)?;
    let bridge = options.bridge_loader(&source, BRIDGE_PRECISION, file.quantization());
    let bridge = QFormer::load(&qformer, &bridge, TextSide::Matching)?;
    file.ignore(|name| name.ends_with(".position_ids"));
    file.finish()?;
    let name = model_name(folder, file);
    let is_trained =
        |name: &&str| !name.starts_with("vision_model.") || name.starts_with("vision_model.post_layernorm.");
    let shapes = file.names().filter(is_trained).filter_map(|name| file.shape(name).ok());
    let n_parameters = shapes.map(|shape| shape.iter().product::<usize>()).sum();
    let stage1 = Stage1Config { weights: file_names(file), vocabulary: "vocab.txt".into() };
    let limit = qformer.max_position_embeddings;
    let reader = TextReader::new(tokenizer, Texts::of(options.preset, Texts::AsGiven), limit);
    let loaded = options.stage1.then(|| Stage1::new(bridge, reader, n_parameters));
    let config = ModelConfig {
        vision: VisionConfig::Vit(pictures.vit.clone()),
        name,
        qformer,
        stage1: Some(stage1),
        stage2: None,
    };
    let vision = vision(options, encoder, pictures, &config.name)?;
    Ok(Blip2 { config, vision, stage1: loaded, stage2: None })
}

/// The sizes of encoder and Q-Former, with the epsilons of an implementation.
fn sizes(json: &Json, preset: Option<Preset>) -> Result<(VitConfig, QFormerConfig)> {
    let mut vit = vit_config(&json["vision_config"])?;
    let mut qformer = qformer_config(json)?;
    qformer.encoder_hidden_size = vit.hidden_size;
    match preset {
        // One for all norms of the encoder, and it passes over what a converted folder says besides.
        Some(Preset::Hf) => qformer.vision_layer_norm_eps = vit.layer_norm_eps,
        Some(Preset::Lavis) => {
            // EVA's is its own, CLIP's PyTorch's default, as that of `ln_vision`. Old folders say 1e-5 of EVA's, too.
            let published = if vit.pre_norm { VitConfig::clip_l(224) } else { VitConfig::eva_clip_g(224) };
            vit.layer_norm_eps = published.layer_norm_eps;
            qformer.vision_layer_norm_eps = LN_VISION_EPS;
        }
        None => {}
    }
    Ok((vit, qformer))
}

/// The pictures that an encoder sees, known before any weight is read.
struct Pictures {
    /// The encoder's sizes for them.
    vit: VitConfig,
    /// How they are prepared.
    processor: ImageProcessor,
}

impl Pictures {
    /// Of the size that the caller wants, or else of the one that the model was trained with.
    fn of(folder: &Path, json: &Json, stored: &VitConfig, wanted: Option<usize>) -> Result<Self> {
        let mut processor = processor(folder, stored.image_size)?;
        let mut vit = stored.clone();
        let trained = TrainedWith::read(json)?.image_size;
        if let Some(side) = wanted.or(trained) {
            (vit.image_size, processor.image_side) = (side, side);
            vit.validate().map_err(|error| match wanted {
                Some(_) => Error::Request(format!("pictures of {side} pixels: {error}")),
                None => {
                    let reason = format!("is {side}: no size for patches of {} pixels", vit.patch_size);
                    wrong("trained_with.image_size", &reason)
                }
            })?;
        }
        Ok(Self { vit, processor })
    }
}

/// The encoder, whose tensors are those of the sizes in `stored`, for pictures of another size maybe.
fn load_vision(
    stored: &VitConfig,
    pictures: &Pictures,
    loader: &Loader<'_>,
    quantization: Option<Quantization>,
) -> Result<Vit> {
    let loader = loader.at("vision_model").quantizing(quantization);
    let expected = vec![1, stored.n_tokens(), stored.hidden_size];
    if let Some(found) = loader.shape("embeddings.position_embedding").filter(|found| *found != expected) {
        let name = "vision_model.embeddings.position_embedding".into();
        return Err(Error::TensorShape { name, expected, found });
    }
    Vit::load(pictures.vit.clone(), &loader, AlignCorners::of(stored))
}

/// The encoder of a folder by itself.
pub(super) fn open_encoder(
    folder: &Path,
    json: &Json,
    file: &Safetensors,
    image_size: Option<usize>,
    format: FrozenFormat,
) -> Result<VisionEncoder> {
    let stored = vit_config(&json["vision_config"])?;
    let pictures = Pictures::of(folder, json, &stored, image_size)?;
    let source = Renamed(file);
    let loader = Loader::frozen(&source, format.precision);
    let encoder = load_vision(&stored, &pictures, &loader, format.quantization)?;
    let is_of_it =
        |name: &&str| name.starts_with("vision_model.") && !name.starts_with("vision_model.post_layernorm.");
    let tensors = file.names().filter(is_of_it).map(|name| {
        let rows = file.tensor(name)?;
        let (shape, encoding) = (rows.shape().to_vec(), rows.encoding());
        Ok((name, StoredTensor { shape, encoding, bytes: rows.bytes().into() }))
    });
    VisionEncoder::vit(encoder, pictures.processor, parts::fingerprint(tensors)?)
}

/// The language model of a folder by itself.
pub(super) fn open_language_model(
    folder: &Path,
    json: &Json,
    file: &Safetensors,
    format: FrozenFormat,
) -> Result<(LanguageModel, LanguageTokenizer)> {
    let text = text_config(json);
    let tokenizer = tokenizer(folder, &text, Family::of(&text)?)?;
    Ok((LanguageModel::from_safetensors(&text, file, LANGUAGE_MODEL, format)?, tokenizer))
}

/// The folder's name, or that of the folder whose model was quantised into this one.
pub(super) fn model_name(folder: &Path, file: &Safetensors) -> String {
    file.original_name().map_or_else(|| folder_name(folder), Into::into)
}

fn file_names(file: &Safetensors) -> Vec<PathBuf> {
    file.files().iter().filter_map(|file| file.path().file_name().map(Into::into)).collect()
}

fn vision(
    options: &OpenOptions,
    encoder: Vit,
    pictures: Pictures,
    name: &str,
) -> Result<Option<VisionEncoder>> {
    let fingerprint = format!("{name}, {} pixels", pictures.vit.image_size);
    options.vision.then(|| VisionEncoder::vit(encoder, pictures.processor, fingerprint)).transpose()
}

/// Refuses what the model in a folder could not read.
pub(super) fn check_prompt(folder: &Path, json: &Json, given: Given<'_>) -> Result<()> {
    // A model that only matches is refused for that.
    if is_retrieval(json) {
        return Ok(());
    }
    let text = text_config(json);
    let family = Family::of(&text)?;
    let TrainedWith { prompt, caption_prompt, .. } = TrainedWith::read(json)?;
    let reader = Reader {
        n_queries: size(json, "config", "num_query_tokens", 32)?,
        context_len: context_len(&text)?,
        prompt: prompt.unwrap_or_else(|| family.question()),
        caption_prompt: caption_prompt.unwrap_or_else(|| family.caption()),
    };
    reader.check(given, || tokenizer(folder, &text, family))
}

/// Whether a configuration is that of a model for matching and features.
pub(super) fn is_retrieval(json: &Json) -> bool {
    json["architectures"][0] == "Blip2ForImageTextRetrieval"
}

/// The language model's configuration; OPT where it does not say what it is.
pub(super) fn text_config(json: &Json) -> Json {
    let mut fields = json["text_config"].as_object().cloned().unwrap_or_default();
    fields.entry("model_type").or_insert_with(|| "opt".into());
    Json::Object(fields)
}

/// The tokenizer, which must be that of the language model. Read before the weights, which take long.
pub(super) fn tokenizer(folder: &Path, text: &Json, family: Family) -> Result<LanguageTokenizer> {
    let mark = |field: &str| token(text, "text_config", field);
    let tokenizer = LanguageTokenizer::from_folder(folder)?
        .with_usual_marks(mark("bos_token_id")?, mark("eos_token_id")?);
    let (found, known) = (tokenizer.n_tokens(), vocab_size(text, family)?);
    // Published models round the size up by less than a hundred; tiny ones for tests are rounder.
    if found > known || known - found > (known / 8).max(1024) {
        let reason = format!(
            "has a tokenizer of {found} tokens, the language model knows {known}: it belongs to another model"
        );
        return Err(Error::File { path: folder.into(), reason });
    }
    Ok(tokenizer)
}

/// Tokens that the language model knows.
fn vocab_size(text: &Json, family: Family) -> Result<usize> {
    let default = if family == Family::Opt { 50272 } else { 32128 };
    size(text, "text_config", "vocab_size", default)
}

/// What people call the model: its folder's name, or in the cache of Hugging Face's tools, where folders are named after
/// commits, the name on the hub.
fn folder_name(folder: &Path) -> String {
    let file_name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let on_the_hub = || {
        let snapshots = folder.parent().filter(|parent| parent.ends_with("snapshots"))?;
        Some(file_name(snapshots.parent()?)?.strip_prefix("models--")?.replacen("--", "/", 1))
    };
    on_the_hub().or_else(|| file_name(folder)).unwrap_or_else(|| "blip-2".into())
}

/// The two families of language models that BLIP-2 was published with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Opt,
    T5,
}

impl Family {
    /// Of the language model's configuration.
    ///
    /// # Errors
    /// [`Error::Config`] when it is another.
    pub(super) fn of(text: &Json) -> Result<Self> {
        match text["model_type"].as_str().unwrap_or_default() {
            "opt" => Ok(Self::Opt),
            "t5" => Ok(Self::T5),
            other => Err(wrong("text_config.model_type", &format!("is `{other}`, expected opt or t5"))),
        }
    }

    /// What is said as it is: the beginning of a caption.
    pub(super) fn caption(self) -> PromptFormat {
        self.format("{image}{prompt}", " ")
    }

    /// How BLIP-2's authors talk about a picture, with either family.
    fn turn(self) -> PromptFormat {
        self.format("{image}Question: {prompt} Answer:", ". ")
    }

    /// How BLIP-2's authors ask a question.
    pub(super) fn question(self) -> PromptFormat {
        match self {
            Self::Opt => self.format("{image}Question: {prompt} Answer:", ". "),
            Self::T5 => self.format("{image}Question: {prompt} Short answer:", ". "),
        }
    }

    fn format(self, template: &str, between_turns: &str) -> PromptFormat {
        PromptFormat::Plain {
            template: template.into(),
            bos: self == Self::Opt,
            eos: self == Self::T5,
            // OPT learned captions that end with a line break.
            end_of_answer: if self == Self::Opt { "\n".into() } else { String::new() },
            between_turns: between_turns.into(),
        }
    }
}

/// The checkpoint under the names of this project, which differ where Hugging Face keeps a part elsewhere.
pub(super) struct Renamed<F>(pub(super) F);

impl<F> Renamed<F> {
    pub(super) fn name(name: &str) -> String {
        // LAVIS's `ln_vision` normalises the encoder's output for the Q-Former; Hugging Face made it the encoder's last norm.
        if let Some(part) = name.strip_prefix("vision_layernorm.") {
            return format!("vision_model.post_layernorm.{part}");
        }
        // And the text side's embeddings are a module of their own.
        match name.strip_prefix("qformer.embeddings.") {
            Some(part) => format!("embeddings.{part}"),
            None => name.to_owned(),
        }
    }
}

impl<F: Borrow<Safetensors>> TensorSource for Renamed<F> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        TensorSource::shape(self.0.borrow(), &Self::name(name))
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        self.0.borrow().read_f32(&Self::name(name))
    }

    fn rows(&self, name: &str) -> Result<Option<TensorRows<'_>>> {
        self.0.borrow().rows(&Self::name(name))
    }

    fn quantized(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        self.0.borrow().quantized(&Self::name(name))
    }

    fn note_quantized(&self, name: &str, weight: &FrozenWeight) {
        self.0.borrow().note_quantized(&Self::name(name), weight);
    }
}
