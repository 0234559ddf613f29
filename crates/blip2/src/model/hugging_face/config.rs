//! What the small files of a Hugging Face folder say: sizes, and how pictures are prepared.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::image::{Geometry, ImageProcessor};
use crate::model::preset::{NO_PAD_TOKEN, OneOrMore, PAD_TOKEN};
use crate::qformer::QFormerConfig;
use crate::vision::vit::{VitActivation, VitConfig};
use crate::{Error, Result};

/// The longest configuration that is read; published ones have some thousand bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

pub(super) fn wrong(field: &str, reason: &str) -> Error {
    Error::Config { field: field.into(), reason: reason.into() }
}

/// The folder's `config.json`, whatever it is of.
///
/// # Errors
/// When there is none, it is too long or no JSON.
pub(in crate::model) fn read_json(folder: &Path) -> Result<Json> {
    let path = folder.join(crate::model::FILE_NAME);
    let unreadable = |source| unreadable(folder, &path, source);
    let about = std::fs::metadata(&path).map_err(unreadable)?;
    if !about.is_file() {
        return Err(Error::File { path, reason: "this is not a regular file".into() });
    }
    let n_bytes = about.len();
    if n_bytes > MAX_CONFIG_BYTES {
        return Err(Error::File {
            path,
            reason: format!("has {n_bytes} bytes: no configuration is that long"),
        });
    }
    let bytes = std::fs::read(&path).map_err(unreadable)?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::File { path: path.clone(), reason: error.to_string() })
}

/// Why a folder's configuration cannot be read; of what is no model's folder, what makes one of it.
fn unreadable(folder: &Path, path: &Path, source: std::io::Error) -> Error {
    let refuse = |path: &Path, reason: String| Error::File { path: path.into(), reason };
    if folder.is_file() {
        let parent = folder.parent().filter(|parent| parent.join(crate::model::FILE_NAME).is_file());
        let remedy = match parent {
            Some(parent) if parent.as_os_str().is_empty() => "give the folder that it is in".into(),
            Some(parent) => format!("give {}", parent.display()),
            None => {
                format!("`blip2 convert {} NEW-FOLDER` makes one of a LAVIS checkpoint", folder.display())
            }
        };
        return refuse(folder, format!("this is a file, and a model is a folder: {remedy}"));
    }
    if source.kind() == std::io::ErrorKind::NotFound && folder.is_dir() {
        let reason = "there is no such file, so this is no model's folder: give one that is, or let `blip2 convert \
                      CHECKPOINT NEW-FOLDER` make one of a checkpoint";
        return refuse(path, reason.into());
    }
    Error::Io { path: path.into(), source }
}

/// A whole number of `part`, or the value that Hugging Face has for it.
pub(super) fn size(json: &Json, part: &str, field: &str, default: usize) -> Result<usize> {
    match &json[field] {
        Json::Null => Ok(default),
        value => value.as_u64().and_then(|value| usize::try_from(value).ok()).ok_or_else(|| {
            wrong(&format!("{part}.{field}"), &format!("is {value}, expected a whole number"))
        }),
    }
}

/// Token ids of `part`, if it names any.
pub(super) fn tokens(json: &Json, part: &str, field: &str) -> Result<Option<Vec<u32>>> {
    if json[field].is_null() || (field == PAD_TOKEN && json[field] == NO_PAD_TOKEN) {
        return Ok(None);
    }
    let read: std::result::Result<OneOrMore, _> = serde_json::from_value(json[field].clone());
    let refuse =
        |_| wrong(&format!("{part}.{field}"), &format!("is {}, expected a token's number", json[field]));
    read.map(|tokens| Some(tokens.list())).map_err(refuse)
}

/// Refuses token ids that a vocabulary does not have, where these fields name any: nothing of them would be seen before a text is
/// written, or ever.
pub(super) fn check_tokens(json: &Json, part: &str, fields: &[&str], n_tokens: usize) -> Result<()> {
    for field in fields {
        let found = tokens(json, part, field)?.unwrap_or_default();
        if let Some(token) = found.iter().find(|&&token| token as usize >= n_tokens) {
            let reason =
                format!("is {token}: the language model's vocabulary has {n_tokens} tokens, from 0 on");
            return Err(wrong(&format!("{part}.{field}"), &reason));
        }
    }
    Ok(())
}

/// The first of them.
pub(super) fn token(json: &Json, part: &str, field: &str) -> Result<Option<u32>> {
    Ok(tokens(json, part, field)?.and_then(|tokens| tokens.first().copied()))
}

fn number(json: &Json, part: &str, field: &str, default: f64) -> Result<f64> {
    match &json[field] {
        Json::Null => Ok(default),
        value => value
            .as_f64()
            .ok_or_else(|| wrong(&format!("{part}.{field}"), &format!("is {value}, expected a number"))),
    }
}

pub(in crate::model) fn vit_config(json: &Json) -> Result<VitConfig> {
    let part = "vision_config";
    let base = VitConfig::eva_clip_g(224);
    let config = VitConfig {
        hidden_size: size(json, part, "hidden_size", base.hidden_size)?,
        intermediate_size: size(json, part, "intermediate_size", base.intermediate_size)?,
        num_hidden_layers: size(json, part, "num_hidden_layers", base.num_hidden_layers)?,
        num_attention_heads: size(json, part, "num_attention_heads", base.num_attention_heads)?,
        image_size: size(json, part, "image_size", base.image_size)?,
        patch_size: size(json, part, "patch_size", base.patch_size)?,
        layer_norm_eps: number(json, part, "layer_norm_eps", base.layer_norm_eps)?,
        hidden_act: match json["hidden_act"].as_str().unwrap_or("gelu") {
            "gelu" => VitActivation::Gelu,
            "quick_gelu" => VitActivation::QuickGelu,
            other => {
                return Err(wrong(
                    "vision_config.hidden_act",
                    &format!("is `{other}`, expected gelu or quick_gelu"),
                ));
            }
        },
        // Only what `layout` wrote has these: Hugging Face has no CLIP encoder for BLIP-2.
        pre_norm: json["pre_norm"].as_bool().unwrap_or(base.pre_norm),
        patch_bias: json["patch_bias"].as_bool().unwrap_or(base.patch_bias),
        qkv_bias: json["qkv_bias"].as_bool().unwrap_or(base.qkv_bias),
    };
    config.validate()?;
    Ok(config)
}

pub(in crate::model) fn qformer_config(json: &Json) -> Result<QFormerConfig> {
    let (part, qformer) = ("qformer_config", &json["qformer_config"]);
    if let Some(other) = qformer["hidden_act"].as_str().filter(|act| *act != "gelu") {
        return Err(wrong("qformer_config.hidden_act", &format!("is `{other}`, expected gelu")));
    }
    // Hugging Face gives the norm after the encoder the encoder's epsilon, LAVIS its own, which a converted folder says.
    let vision = &json["vision_config"];
    let encoder_eps = number(vision, "vision_config", "layer_norm_eps", 1e-6)?;
    Ok(QFormerConfig {
        vocab_size: size(qformer, part, "vocab_size", 30522)?,
        hidden_size: size(qformer, part, "hidden_size", 768)?,
        num_hidden_layers: size(qformer, part, "num_hidden_layers", 12)?,
        num_attention_heads: size(qformer, part, "num_attention_heads", 12)?,
        intermediate_size: size(qformer, part, "intermediate_size", 3072)?,
        max_position_embeddings: size(qformer, part, "max_position_embeddings", 512)?,
        layer_norm_eps: number(qformer, part, "layer_norm_eps", 1e-12)?,
        cross_attention_frequency: size(qformer, part, "cross_attention_frequency", 2)?,
        encoder_hidden_size: size(qformer, part, "encoder_hidden_size", 1408)?,
        num_query_tokens: size(json, "config", "num_query_tokens", 32)?,
        image_text_hidden_size: size(json, "config", "image_text_hidden_size", 256)?,
        vision_layer_norm_eps: number(vision, "vision_config", "post_layernorm_eps", encoder_eps)?,
    })
}

/// What a folder says of how pictures are prepared, and in which file: a part of `processor_config.json`, as transformers 5 saves
/// it and looks for it first, or else `preprocessor_config.json`.
pub(in crate::model) fn image_processor(folder: &Path) -> Result<Option<(PathBuf, Json)>> {
    let read = |name: &str| -> Result<Option<(PathBuf, Json)>> {
        let path = folder.join(name);
        let bytes = match crate::small_file::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Io { path, source }),
        };
        let json = serde_json::from_slice(&bytes)
            .map_err(|error| Error::File { path: path.clone(), reason: error.to_string() })?;
        Ok(Some((path, json)))
    };
    match read("processor_config.json")? {
        Some((path, mut json)) if json["image_processor"].is_object() => {
            Ok(Some((path, json["image_processor"].take())))
        }
        _ => read("preprocessor_config.json"),
    }
}

/// How pictures are prepared: BLIP-2's way, with the numbers that the folder has for it.
pub(super) fn processor(folder: &Path, image_size: usize) -> Result<ImageProcessor> {
    let mut processor = ImageProcessor::blip2(image_size);
    let Some((path, json)) = image_processor(folder)? else { return Ok(processor) };
    let refuse = |reason: String| Error::File { path: path.clone(), reason };
    let numbers = |field: &str, default: [f64; 3]| -> Result<[f64; 3]> {
        if json[field].is_null() {
            return Ok(default);
        }
        serde_json::from_value(json[field].clone())
            .map_err(|_| refuse(format!("`{field}` is not three numbers")))
    };
    processor.image_mean = numbers("image_mean", processor.image_mean)?;
    processor.image_std = numbers("image_std", processor.image_std)?;
    if !json["rescale_factor"].is_null() {
        let refuse = || refuse(format!("`rescale_factor` is {}, expected a number", json["rescale_factor"]));
        processor.rescale_factor = json["rescale_factor"].as_f64().ok_or_else(refuse)?;
    }
    processor.geometry = Geometry::Squash;
    let sides = json["size"].as_object();
    let other = sides.and_then(|sides| sides.keys().find(|key| !["height", "width"].contains(&key.as_str())));
    if let Some(other) = other {
        return Err(refuse(format!(
            "`size` has `{other}`, BLIP-2's pictures are squares of `height` and `width`"
        )));
    }
    for side in ["height", "width"] {
        let found = json["size"][side].as_u64();
        if found.is_some_and(|found| found != image_size as u64) {
            let found = &json["size"][side];
            return Err(refuse(format!("makes pictures of {side} {found}, the encoder sees {image_size}")));
        }
    }
    for (field, expected) in
        [("do_resize", true), ("do_rescale", true), ("do_normalize", true), ("do_center_crop", false)]
    {
        if json[field].as_bool().is_some_and(|found| found != expected) {
            return Err(refuse(format!("`{field}` is {}, BLIP-2's is {expected}", !expected)));
        }
    }
    // 3 is Pillow's name of the bicubic filter.
    if json["resample"].as_u64().is_some_and(|filter| filter != 3) {
        return Err(refuse(format!("`resample` is {}, BLIP-2's is 3, bicubic", json["resample"])));
    }
    Ok(processor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_prepared_as_the_files_of_either_age_say() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let mean = || processor(folder.path(), 28).map(|processor| processor.image_mean);
        assert_eq!(mean().unwrap(), ImageProcessor::blip2(28).image_mean);
        write("processor_config.json", r#"{"num_query_tokens": 32}"#);
        write("preprocessor_config.json", r#"{"image_mean": [0.1, 0.2, 0.3]}"#);
        assert_eq!(mean().unwrap(), [0.1, 0.2, 0.3]);
        // What transformers 5 saves holds where both are there.
        write("processor_config.json", r#"{"image_processor": {"image_mean": [0.5, 0.5, 0.5]}}"#);
        assert_eq!(mean().unwrap(), [0.5; 3]);
        write("processor_config.json", r#"{"image_processor": {"size": {"height": 30, "width": 28}}}"#);
        let error = mean().unwrap_err().to_string();
        assert!(error.contains("processor_config.json: makes pictures of height 30"), "{error}");
        write("processor_config.json", r#"{"image_processor": {"size": {"shortest_edge": 28}}}"#);
        let error = mean().unwrap_err().to_string();
        assert!(error.contains("`size` has `shortest_edge`"), "{error}");
        write("processor_config.json", r#"{"image_processor": {"rescale_factor": "1/255"}}"#);
        let error = mean().unwrap_err().to_string();
        assert!(error.contains("`rescale_factor` is \"1/255\", expected a number"), "{error}");
    }
}
