//! Opening a model for captions and answers: what its small files say, its weights, and the two put together.

use std::path::Path;

use serde_json::Value as Json;

use super::config::{check_tokens, token, tokens};
use super::{
    BRIDGE_PRECISION, COCO_INSTRUCTION, Family, LANGUAGE_MODEL, Pictures, Renamed, TrainedWith,
    check_tensors, file_names, load_vision, model_name, sizes, text_config, tokenizer, vision, vocab_size,
};
use crate::Result;
use crate::language::LanguageModel;
use crate::layers::{Linear, Loader};
use crate::model::config::{ModelConfig, Stage2Config, VisionConfig};
use crate::model::preset::{FolderGeneration, PAD_TOKEN};
use crate::model::stage2::{Source, Stage2};
use crate::model::{Blip2, OpenOptions};
use crate::qformer::{QFormer, QFormerConfig, TextSide};
use crate::text::{LanguageTokenizer, PromptFormat};
use crate::vision::vit::{Vit, VitConfig};
use crate::weights::safetensors::Safetensors;

/// Opens a model for captions and answers (`Blip2ForConditionalGeneration`).
pub(super) fn open(folder: &Path, json: &Json, file: &Safetensors, options: &OpenOptions) -> Result<Blip2> {
    let said = Said::read(folder, json, options)?;
    check_tensors(file, json, true)?;
    let weights = GenerationWeights::load(file, &said, options)?;
    let name = model_name(folder, file);
    let stage2 = said.stage2_config(folder, file, &name);
    let source = said.source(json, &stage2.prompt)?;
    let Said { qformer, tokenizer, pictures, .. } = said;
    let GenerationWeights { encoder, bridge, language_model, language_projection } = weights;
    let loaded = options
        .stage2
        .then(|| Stage2::new(bridge, language_projection, language_model, tokenizer, &stage2, source))
        .transpose()?;
    let config = ModelConfig {
        vision: VisionConfig::Vit(pictures.vit.clone()),
        name,
        qformer,
        stage1: None,
        stage2: Some(stage2),
    };
    let vision = vision(options, encoder, pictures, &config.name)?;
    Ok(Blip2 { config, vision, stage1: None, stage2: loaded })
}

/// What the small files of a model for captions and answers say. What is wrong with them is known before any weight is read.
struct Said {
    /// The encoder's sizes as its tensors are stored.
    vit: VitConfig,
    qformer: QFormerConfig,
    /// The language model's configuration.
    text: Json,
    family: Family,
    trained_with: TrainedWith,
    tokenizer: LanguageTokenizer,
    generation: FolderGeneration,
    pictures: Pictures,
}

impl Said {
    fn read(folder: &Path, json: &Json, options: &OpenOptions) -> Result<Self> {
        let (vit, qformer) = sizes(json, options.preset)?;
        let text = text_config(json);
        let family = Family::of(&text)?;
        let n_tokens = vocab_size(&text, family)?;
        check_tokens(json, "config", &["image_token_index", "image_token_id"], n_tokens)?;
        let marks = ["bos_token_id", "eos_token_id", PAD_TOKEN, "decoder_start_token_id"];
        check_tokens(&text, "text_config", &marks, n_tokens)?;
        let trained_with = TrainedWith::read(json)?;
        let tokenizer = tokenizer(folder, &text, family)?;
        let generation = FolderGeneration::read(folder)?;
        generation.check_tokens(folder, n_tokens)?;
        let pictures = Pictures::of(folder, json, &vit, options.image_size)?;
        Ok(Self { vit, qformer, text, family, trained_with, tokenizer, generation, pictures })
    }

    /// How a model of this name is spoken to.
    fn stage2_config(&self, folder: &Path, file: &Safetensors, name: &str) -> Stage2Config {
        let Self { family, trained_with, .. } = self;
        let prompt = trained_with.prompt.clone().unwrap_or_else(|| family.question());
        // Of published folders the name alone says it.
        let published = if name.contains("coco") { COCO_INSTRUCTION } else { "" };
        Stage2Config {
            weights: file_names(file),
            language_model: folder.into(),
            language_model_sha256: None,
            // Who was taught another way to ask was not taught the authors' way to talk.
            chat_prompt: (prompt == family.question()).then(|| family.turn()),
            prompt,
            caption_prompt: Some(trained_with.caption_prompt.clone().unwrap_or_else(|| family.caption())),
            instruction: trained_with.instruction.clone().unwrap_or_else(|| published.into()),
            generation: self.generation.own(),
            answering: None,
        }
    }

    /// What decides besides how a model asked by `prompt` writes.
    fn source(&self, json: &Json, prompt: &PromptFormat) -> Result<Source> {
        let end_tokens = match self.generation.end_tokens() {
            // The configurations of the language model know how the family's answers end.
            _ if !prompt.ends_answers_as(&self.family.question()) => None,
            Some(tokens) => Some(tokens),
            None => tokens(&self.text, "text_config", "eos_token_id")?,
        };
        let image_token =
            token(json, "config", "image_token_index")?.or(token(json, "config", "image_token_id")?);
        Ok(Source { image_token, end_tokens, generation: self.generation.clone() })
    }
}

/// All parts of a model for captions and answers.
struct GenerationWeights {
    encoder: Vit,
    bridge: QFormer,
    language_model: LanguageModel,
    language_projection: Linear,
}

impl GenerationWeights {
    /// Loads every part, asked for or not: what is left over then is a mistake.
    fn load(file: &Safetensors, said: &Said, options: &OpenOptions) -> Result<Self> {
        let source = Renamed(file);
        let loader = Loader::frozen(&source, options.precision);
        let encoder = load_vision(&said.vit, &said.pictures, &loader, options.quantization)?;
        let bridge = options.bridge_loader(&source, BRIDGE_PRECISION, file.quantization());
        let bridge = QFormer::load(&said.qformer, &bridge, TextSide::None)?;
        let language_model =
            LanguageModel::from_safetensors(&said.text, file, LANGUAGE_MODEL, options.frozen_format())?;
        // Of an OPT with narrower embeddings than layers it may have either width, which was checked.
        let projected = loader.shape("language_projection.weight").and_then(|shape| shape.first().copied());
        let language_projection =
            options.bridge_loader(&source, options.precision, file.quantization()).linear(
                "language_projection",
                said.qformer.hidden_size,
                projected.unwrap_or_else(|| language_model.hidden_size()),
            )?;
        // Buffers of old revisions: positions count from 0.
        file.ignore(|name| name.ends_with(".position_ids"));
        file.finish()?;
        Ok(Self { encoder, bridge, language_model, language_projection })
    }
}
