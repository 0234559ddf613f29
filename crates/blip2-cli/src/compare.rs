//! `blip2 match`, `blip2 embed` and `blip2 classify`.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use blip2::model::{Compared, LABEL, labelled};
use blip2::weights::safetensors::{NamedTensor, Values, write_safetensors};
use serde_json::json;

use crate::Done;
use crate::args::{ClassifyArgs, EmbedArgs, MatchArgs};
use crate::generation::WrongUsage;
use crate::model::{Part, encode_picture, open_picture, open_to_compare};

pub(crate) fn match_texts(args: &MatchArgs) -> anyhow::Result<Done> {
    none_is_empty(&args.texts, "text to compare with the picture")?;
    let texts: Vec<&str> = args.texts.iter().map(String::as_str).collect();
    let model = open_to_compare(&args.model, Part::Stage1, args.preset, &texts, Compared::Matched)?;
    let features = encode_picture(&model, &args.picture, args.preset)?;
    let scores = model.match_texts(&features, &texts)?;
    let mut out = std::io::stdout().lock();
    if args.model.json {
        let rows: Vec<_> = texts
            .iter()
            .zip(&scores)
            .map(|(text, score)| {
                json!({"path": args.picture.display().to_string(), "text": text,
                    "itm_probability": score.itm_probability, "itc_similarity": score.itc_similarity})
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        writeln!(out, "itm\titc\ttext")?;
        for (text, score) in texts.iter().zip(scores) {
            writeln!(out, "{:.3}\t{:.3}\t{text}", score.itm_probability, score.itc_similarity)?;
        }
    }
    Ok(Done::All)
}

pub(crate) fn classify(args: &ClassifyArgs) -> anyhow::Result<Done> {
    none_is_empty(&args.labels, "label")?;
    if !args.template.contains(LABEL) {
        return WrongUsage::end(format!("--template {:?} has no {LABEL}", args.template));
    }
    let labels = distinct(&args.labels);
    let texts = labelled(&args.template, &labels);
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let model = open_to_compare(&args.model, Part::Stage1, args.preset, &texts, Compared::Embedded)?;
    let features = encode_picture(&model, &args.picture, args.preset)?;
    let scores = model.classify(&features, &labels, &args.template)?;
    let mut out = std::io::stdout().lock();
    if args.model.json {
        let rows: Vec<_> = scores
            .iter()
            .map(|score| {
                json!({"path": args.picture.display().to_string(), "label": score.label,
                    "probability": score.probability, "itc_similarity": score.itc_similarity})
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        for score in scores {
            writeln!(out, "{:.3}\t{}", score.probability, score.label)?;
        }
    }
    Ok(Done::All)
}

pub(crate) fn embed(args: &EmbedArgs) -> anyhow::Result<Done> {
    none_is_empty(&args.text, "text to embed")?;
    if let Some(path) = &args.output {
        return write_stages(args, path).map(|()| Done::All);
    }
    let texts: Vec<&str> = args.text.iter().map(String::as_str).collect();
    let model = open_to_compare(&args.model, Part::Stage1, args.preset, &texts, Compared::Embedded)?;
    let of_texts = model.embed_texts(&texts)?;
    let of_picture = |path: &Path| -> anyhow::Result<Vec<f32>> {
        let features = encode_picture(&model, path, args.preset)?;
        Ok(model.embed_images(&[&features])?.concat())
    };
    let width = model.config().qformer.image_text_hidden_size;
    if let Some(file) = &args.npy {
        // An array says only by its places whose rows they are: it has all of them or is not written.
        let mut values =
            args.image.iter().map(|path| of_picture(path)).collect::<anyhow::Result<Vec<_>>>()?;
        values.extend(of_texts);
        return write_npy(file, &values.concat(), width).map(|()| Done::All);
    }
    let mut out = std::io::stdout().lock();
    let mut n_failed = 0;
    for path in &args.image {
        let name = path.display().to_string();
        let row = match of_picture(path) {
            Ok(values) => json!({"path": name, "embeds": values.chunks_exact(width).collect::<Vec<_>>()}),
            Err(error) => {
                n_failed += 1;
                let message = crate::message(&error);
                eprintln!("blip2: {message}");
                json!({"path": name, "error": message})
            }
        };
        writeln!(out, "{row}")?;
    }
    for (text, values) in texts.iter().zip(of_texts) {
        writeln!(out, "{}", json!({"text": text, "embeds": values.chunks_exact(width).collect::<Vec<_>>()}))?;
    }
    Ok(Done::of(n_failed, args.image.len() + texts.len()))
}

/// Refuses a text of which nothing can be read, before a model is opened for it.
fn none_is_empty(texts: &[String], what: &str) -> anyhow::Result<()> {
    if texts.iter().any(|text| text.trim().is_empty()) {
        return WrongUsage::end(format!("a {what} is empty"));
    }
    Ok(())
}

/// Each of the texts once, without the spaces around it: a text that came twice would have its share of the probability twice,
/// and a space before a word (`yes, no`) makes it another one.
pub(crate) fn distinct(texts: &[String]) -> Vec<&str> {
    let mut seen = HashSet::new();
    texts.iter().map(|text| text.trim()).filter(|text| seen.insert(*text)).collect()
}

/// What every stage makes of the pictures and texts, as a safetensors file.
fn write_stages(args: &EmbedArgs, path: &Path) -> anyhow::Result<()> {
    let texts: Vec<&str> = args.text.iter().map(String::as_str).collect();
    let model = open_to_compare(&args.model, Part::Both, args.preset, &texts, Compared::Embedded)?;
    let pictures =
        args.image.iter().map(|path| open_picture(path, args.preset)).collect::<anyhow::Result<Vec<_>>>()?;
    let stages = model.stages(&pictures, args.prompt.as_deref(), &texts)?;
    let values = stages
        .iter()
        .map(|(_, tensor)| Ok(tensor.flatten_all()?.to_vec1::<f32>()?))
        .collect::<anyhow::Result<Vec<_>>>()?;
    // A model without a text side is asked nothing where there are no texts.
    let lengths = if texts.is_empty() { Vec::new() } else { model.n_matcher_tokens(&texts)? };
    let lengths: Vec<i64> = lengths.into_iter().map(|n| n as i64).collect();
    let mut tensors: Vec<_> = stages
        .iter()
        .zip(&values)
        .map(|((name, tensor), values)| NamedTensor {
            name: (*name).to_owned(),
            shape: tensor.dims().to_vec(),
            values: Values::F32(values),
        })
        .collect();
    if !lengths.is_empty() {
        let (name, shape) = ("text.lengths".to_owned(), vec![lengths.len()]);
        tensors.push(NamedTensor { name, shape, values: Values::I64(&lengths) });
    }
    Ok(write_safetensors(path, &tensors, &BTreeMap::new())?)
}

/// NumPy's format, version 1.0: little-endian f32 rows of `width`.
fn write_npy(path: &Path, values: &[f32], width: usize) -> anyhow::Result<()> {
    let n_rows = values.len() / width;
    let mut header =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({n_rows}, {width}), }}").into_bytes();
    // Magic, version and length take ten bytes; the data begins at a multiple of 64, the header ends with a newline.
    header.resize((10 + header.len() + 1).next_multiple_of(64) - 11, b' ');
    header.push(b'\n');
    let length = u16::try_from(header.len()).context("a header of an impossible length")?;
    Ok(blip2::weights::write_atomically(path, |file| {
        file.write_all(b"\x93NUMPY\x01\x00")?;
        file.write_all(&length.to_le_bytes())?;
        file.write_all(&header)?;
        values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))
    })?)
}

#[cfg(test)]
mod tests {
    use super::distinct;

    #[test]
    fn texts_to_choose_from_are_taken_once_and_without_spaces() {
        let texts = ["yes", " no", "yes ", "No", ""].map(String::from);
        assert_eq!(distinct(&texts), ["yes", "no", "No", ""]);
    }
}
