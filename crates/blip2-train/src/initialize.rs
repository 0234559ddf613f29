//! A fresh Q-Former from a BERT checkpoint (BLIP-2 §3.1).
//!
//! Self-attention, feed-forward layers and embeddings are BERT's; each query feed-forward starts as a copy of
//! the text one; queries, cross-attention and heads are random. BERT's token-type embedding of type 0 is added
//! to the positions, since the Q-Former has none.

use std::collections::BTreeMap;

use blip2::layers::TensorSource;
use blip2::qformer::QFormerConfig;

use crate::random::Random;
use crate::{Error, Result};

/// Named tensors: shape and elements.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// BERT's initializer range, the standard deviation of every random weight.
const INITIALIZER_RANGE: f64 = 0.02;

/// Standard deviation of the query tokens. Their layer norm makes every scale the same function, but the gradient goes
/// with its inverse: at 0.02 the queries' gradient was the whole of the clipped one.
const QUERY_DEVIATION: f64 = 0.2;

/// Standard deviation of a cross-attention weight times the square root of its inputs: query, key, value and output.
///
/// BERT's 0.02 makes the attention over picture tokens uniform at the start (entropy 3.88 of the 3.89 of 49 tokens with
/// the default model), so every query is handed the same mean of the picture; trained that way for some hundred steps,
/// the 32 queries were one vector (mean cosine 0.9999). These gains begin with about a dozen tokens a query (entropy 2.5).
const CROSS_ATTENTION_GAINS: [f64; 4] = [4.0, 1.0, 0.7, 0.7];

/// The temperature's start (BLIP-2's `temp`).
const TEMPERATURE: f32 = 0.07;

/// Whether a variable of the Q-Former is BERT's own: what reads texts. Queries, their feed-forward layers (copies, which go their
/// own way), cross-attention and heads are not.
pub fn is_berts(name: &str) -> bool {
    name.starts_with("qformer.") && !name.contains("_query.") && !name.contains(".crossattention.")
}

/// Builds the tensors of a Q-Former with its stage-1 heads from `bert`, a plain `BertModel` checkpoint.
///
/// # Errors
/// When `bert` lacks a tensor or has other sizes than `config`.
pub fn from_bert(config: &QFormerConfig, bert: &dyn TensorSource, seed: u64) -> Result<Tensors> {
    let mut numbers = Random::new(&[seed]);
    let mut out = Tensors::new();
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let mut normal = |name: &str, shape: &[usize], deviation: f64| {
        let n = shape.iter().product();
        let data = (0..n).map(|_| (numbers.normal() * deviation) as f32).collect();
        (name.to_owned(), (shape.to_vec(), data))
    };
    let constant = |name: &str, n: usize, value: f32| (name.to_owned(), (vec![n], vec![value; n]));
    let copy = |from: &str, shape: &[usize]| -> Result<(Vec<usize>, Vec<f32>)> {
        match bert.shape(from) {
            Some(found) if found == shape => Ok((found, bert.read_f32(from)?)),
            Some(found) => Err(Error::Training(format!(
                "the BERT checkpoint's `{from}` has shape {found:?}, the Q-Former needs {shape:?}"
            ))),
            None => Err(Error::Training(format!("the BERT checkpoint has no `{from}`"))),
        }
    };

    // Word embeddings: rows beyond BERT's vocabulary ([DEC]) start as random vectors.
    let bert_vocab = bert.shape("embeddings.word_embeddings.weight").map_or(0, |shape| shape[0]);
    if bert_vocab > config.vocab_size {
        return Err(Error::config("qformer.vocab_size", format!("is below BERT's {bert_vocab}")));
    }
    let (_, mut words) = copy("embeddings.word_embeddings.weight", &[bert_vocab, width])?;
    let (_, (_, added)) = normal("", &[config.vocab_size - bert_vocab, width], INITIALIZER_RANGE);
    words.extend(added);
    out.insert("qformer.embeddings.word_embeddings.weight".into(), (vec![config.vocab_size, width], words));
    let n_positions = config.max_position_embeddings;
    let (shape, mut positions) = copy("embeddings.position_embeddings.weight", &[n_positions, width])?;
    if bert.shape("embeddings.token_type_embeddings.weight").is_some() {
        let (_, types) = copy("embeddings.token_type_embeddings.weight", &[2, width])?;
        for row in positions.chunks_exact_mut(width) {
            row.iter_mut().zip(&types[..width]).for_each(|(p, t)| *p += t);
        }
    }
    out.insert("qformer.embeddings.position_embeddings.weight".into(), (shape, positions));
    for part in ["weight", "bias"] {
        out.insert(
            format!("qformer.layernorm.{part}"),
            copy(&format!("embeddings.LayerNorm.{part}"), &[width])?,
        );
    }

    for i in 0..config.num_hidden_layers {
        let (from, to) = (format!("encoder.layer.{i}"), format!("qformer.encoder.layer.{i}"));
        for part in ["query", "key", "value"] {
            let name = format!("{from}.attention.self.{part}");
            let to = format!("{to}.attention.attention.{part}");
            out.insert(format!("{to}.weight"), copy(&format!("{name}.weight"), &[width, width])?);
            out.insert(format!("{to}.bias"), copy(&format!("{name}.bias"), &[width])?);
        }
        let mut block =
            |from_part: &str, to_parts: &[&str], n_out: usize, n_in: Option<usize>| -> Result<()> {
                for to_part in to_parts {
                    let shape = n_in.map_or(vec![n_out], |n_in| vec![n_out, n_in]);
                    let tensor = copy(&format!("{from}.{from_part}.weight"), &shape)?;
                    out.insert(format!("{to}.{to_part}.weight"), tensor);
                    out.insert(
                        format!("{to}.{to_part}.bias"),
                        copy(&format!("{from}.{from_part}.bias"), &[n_out])?,
                    );
                }
                Ok(())
            };
        block("attention.output.dense", &["attention.output.dense"], width, Some(width))?;
        block("attention.output.LayerNorm", &["attention.output.LayerNorm"], width, None)?;
        block("intermediate.dense", &["intermediate.dense", "intermediate_query.dense"], inner, Some(width))?;
        block("output.dense", &["output.dense", "output_query.dense"], width, Some(inner))?;
        block("output.LayerNorm", &["output.LayerNorm", "output_query.LayerNorm"], width, None)?;
        if i.is_multiple_of(config.cross_attention_frequency) {
            let cross = format!("{to}.crossattention");
            let parts = ["attention.query", "attention.key", "attention.value", "output.dense"];
            let encoder = config.encoder_hidden_size;
            let inputs = [width, encoder, encoder, width];
            for ((part, n_in), gain) in parts.into_iter().zip(inputs).zip(CROSS_ATTENTION_GAINS) {
                let deviation = gain / (n_in as f64).sqrt();
                out.extend([
                    normal(&format!("{cross}.{part}.weight"), &[width, n_in], deviation),
                    constant(&format!("{cross}.{part}.bias"), width, 0.0),
                ]);
            }
            out.extend([
                constant(&format!("{cross}.output.LayerNorm.weight"), width, 1.0),
                constant(&format!("{cross}.output.LayerNorm.bias"), width, 0.0),
            ]);
        }
    }

    out.extend([normal("query_tokens", &[1, config.num_query_tokens, width], QUERY_DEVIATION)]);
    let mut random = |name: &str, shape: &[usize]| normal(name, shape, INITIALIZER_RANGE);
    let (encoder, joint) = (config.encoder_hidden_size, config.image_text_hidden_size);
    out.extend([
        constant("vision_layernorm.weight", encoder, 1.0),
        constant("vision_layernorm.bias", encoder, 0.0),
        random("cls.predictions.transform.dense.weight", &[width, width]),
        constant("cls.predictions.transform.dense.bias", width, 0.0),
        constant("cls.predictions.transform.LayerNorm.weight", width, 1.0),
        constant("cls.predictions.transform.LayerNorm.bias", width, 0.0),
        constant("cls.predictions.bias", config.vocab_size, 0.0),
        random("vision_projection.weight", &[joint, width]),
        constant("vision_projection.bias", joint, 0.0),
        random("text_projection.weight", &[joint, width]),
        constant("text_projection.bias", joint, 0.0),
        random("itm_head.weight", &[2, width]),
        constant("itm_head.bias", 2, 0.0),
        ("temp".to_owned(), (vec![], vec![TEMPERATURE])),
    ]);
    Ok(out)
}

/// The projection of the query outputs to a language model's embeddings, `[language_width, width]`: that of `trained`,
/// or where it has none, a random one.
///
/// # Errors
/// When `trained` has a projection of other sizes: it belongs to another language model.
pub fn language_projection(
    trained: &dyn TensorSource,
    width: usize,
    language_width: usize,
    seed: u64,
) -> Result<Tensors> {
    let (weight, bias) = ("language_projection.weight", "language_projection.bias");
    let tensors = match trained.shape(weight) {
        Some(shape) if shape == [language_width, width] => [
            (weight, shape, trained.read_f32(weight)?),
            (bias, vec![language_width], trained.read_f32(bias)?),
        ],
        Some(shape) => {
            return Err(Error::config(
                "init",
                format!(
                    "has a projection of shape {shape:?}, but this language model needs [{language_width}, {width}]"
                ),
            ));
        }
        None => {
            let mut numbers = Random::new(&[seed, 0x1a]);
            let data =
                (0..language_width * width).map(|_| (numbers.normal() * INITIALIZER_RANGE) as f32).collect();
            [
                (weight, vec![language_width, width], data),
                (bias, vec![language_width], vec![0.0; language_width]),
            ]
        }
    };
    Ok(tensors.into_iter().map(|(name, shape, data)| (name.to_owned(), (shape, data))).collect())
}
