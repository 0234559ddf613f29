//! The small files of a Hugging Face folder: configuration, tokenizer, what is done to a picture.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::FrozenParts;
use super::folder::NewFolder;
use super::language::{Family, Language};
use super::sizes;
use super::table::{Architecture, Head};
use crate::image::ImageProcessor;
use crate::model::hugging_face::{self, TrainedWith};
use crate::text::{BertTokenizer, LanguageTokenizer, TOKENIZER_FILES};
use crate::{Error, Result};

/// What else stands beside the weights.
const OTHER_FILES: [&str; 4] =
    ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"];

/// Makes of a language model's configuration the one that it has inside BLIP-2: LAVIS runs Flan-T5 with the exact GELU, and
/// lets OPT end at a line break.
///
/// # Errors
/// Those of the tokenizer.
pub(super) fn adapt_text_config(json: &mut Json, folder: &Path, language: &Language) -> Result<()> {
    if let Some(fields) = json.as_object_mut() {
        for field in
            ["architectures", "_name_or_path", "torch_dtype", "dtype", "transformers_version", "prefix"]
        {
            fields.remove(field);
        }
    }
    match language.family {
        Family::Opt => {
            let ids = tokenizer(folder)?.encode_text("\n")?;
            let [line_break] = ids.as_slice() else {
                let reason = format!(
                    "has no token for a line break (it becomes {ids:?}): this is not OPT's tokenizer"
                );
                return Err(Error::File { path: folder.into(), reason });
            };
            json["eos_token_id"] = (*line_break).into();
        }
        Family::T5 => {
            json["dense_act_fn"] = "gelu".into();
            // What transformers begins an empty prompt with.
            json["bos_token_id"] = json["eos_token_id"].clone();
        }
    }
    Ok(())
}

fn tokenizer(folder: &Path) -> Result<LanguageTokenizer> {
    LanguageTokenizer::from_folder(folder)
}

/// Writes all but the weights.
///
/// # Errors
/// [`Error::Request`] when the vocabulary is not given or another model's; [`Error::Io`], [`Error::File`].
pub(super) fn write(
    new: &NewFolder,
    model: &Architecture,
    text: Option<&Json>,
    parts: &FrozenParts,
    dtype: &str,
    trained_with: &TrainedWith,
) -> Result<()> {
    let image_token = match (&model.head, &parts.language_model, &parts.vocabulary) {
        (Head::Language(language), Some(folder), _) => {
            copy_existing(new, folder, &TOKENIZER_FILES)?;
            // The first row of the embeddings that no token has stands for a picture, as in the published folders.
            // A folder of a whole model says which it is.
            let named = hugging_face::read_json(folder)?["image_token_index"].as_u64();
            let n_tokens = tokenizer(folder)?.n_tokens();
            let first_unused = (n_tokens < language.vocab_size).then_some(n_tokens);
            named.and_then(|token| usize::try_from(token).ok()).or(first_unused)
        }
        (Head::Matching, _, Some(vocabulary)) => Some(write_bert(new, model, vocabulary)?),
        (Head::Matching, _, None) => {
            let reason = "a model of stage 1 reads texts with BERT's vocabulary, which the checkpoint does not hold: give \
                          vocab.txt of bert-base-uncased";
            return Err(Error::Request(reason.into()));
        }
        (Head::Language(_), None, _) => {
            return Err(Error::Request("the language model's folder is missing".into()));
        }
    };
    let mut config = sizes::config_json(model, text, image_token, dtype);
    trained_with.write(&mut config);
    new.write_json("config.json", &config)?;
    if let Some(text) = text {
        let fields = ["bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"];
        let known = fields.into_iter().filter(|field| !text[*field].is_null());
        let ids: serde_json::Map<_, _> = known.map(|field| (field.to_owned(), text[field].clone())).collect();
        new.write_json("generation_config.json", &Json::Object(ids))?;
    }
    let side = model.vision.image_size;
    let processor = ImageProcessor::blip2(side);
    new.write_json(
        "preprocessor_config.json",
        &json!({
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "Blip2Processor",
            "do_convert_rgb": true,
            "do_normalize": true,
            "do_rescale": true,
            "do_resize": true,
            "image_mean": processor.image_mean,
            "image_std": processor.image_std,
            "resample": 3,
            "rescale_factor": processor.rescale_factor,
            "size": {"height": side, "width": side},
        }),
    )?;
    let processor =
        json!({"processor_class": "Blip2Processor", "num_query_tokens": model.qformer.num_query_tokens});
    new.write_json("processor_config.json", &processor)
}

/// BERT's vocabulary with the token that BLIP-2 adds to it; gives the first one after them, which stands for a picture and may
/// have a row of its own.
fn write_bert(new: &NewFolder, model: &Architecture, vocabulary: &PathBuf) -> Result<usize> {
    let tokenizer = BertTokenizer::from_vocab(vocabulary)?;
    let n_tokens = tokenizer.n_tokens();
    if ![n_tokens, n_tokens + 1].contains(&model.qformer.vocab_size) {
        let reason = format!(
            "has {} tokens with [DEC], the checkpoint's Q-Former has {}: it is another model's vocabulary",
            n_tokens, model.qformer.vocab_size
        );
        return Err(Error::File { path: vocabulary.clone(), reason });
    }
    let bytes = crate::small_file::read(vocabulary)
        .map_err(|source| Error::Io { path: vocabulary.clone(), source })?;
    crate::weights::write_atomically(new.inside("vocab.txt"), |file| {
        std::io::Write::write_all(file, &bytes)
    })?;
    let dec = tokenizer.dec_id();
    let added = json!({"content": "[DEC]", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true});
    new.write_json(
        "tokenizer_config.json",
        &json!({
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": true,
            "model_max_length": model.qformer.max_position_embeddings,
            "bos_token": "[DEC]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
            "pad_token": "[PAD]",
            "sep_token": "[SEP]",
            "unk_token": "[UNK]",
            "added_tokens_decoder": {dec.to_string(): added},
        }),
    )?;
    new.write_json("added_tokens.json", &json!({"[DEC]": dec}))?;
    Ok(n_tokens)
}

/// Copies all but the weights.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn copy(new: &NewFolder, from: &Path) -> Result<()> {
    copy_existing(new, from, &TOKENIZER_FILES)?;
    copy_existing(new, from, &OTHER_FILES)
}

/// Copies those of the named files that are there.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn copy_existing(new: &NewFolder, from: &Path, names: &[&str]) -> Result<()> {
    names.iter().map(|name| from.join(name)).filter(|file| file.exists()).try_for_each(|file| new.copy(&file))
}
