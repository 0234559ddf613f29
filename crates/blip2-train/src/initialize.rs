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
    let mut fresh = Fresh { config, bert, numbers: Random::new(&[seed]), tensors: Tensors::new() };
    fresh.embeddings()?;
    for i in 0..config.num_hidden_layers {
        fresh.layer(i)?;
        if i.is_multiple_of(config.cross_attention_frequency) {
            fresh.cross_attention(i);
        }
    }
    fresh.queries_and_heads();
    Ok(fresh.tensors)
}

/// A Q-Former in the making. Its random numbers are drawn in the order of the calls.
struct Fresh<'a> {
    config: &'a QFormerConfig,
    bert: &'a dyn TensorSource,
    numbers: Random,
    tensors: Tensors,
}

impl Fresh<'_> {
    fn put(&mut self, name: impl Into<String>, shape: &[usize], values: Vec<f32>) {
        self.tensors.insert(name.into(), (shape.to_vec(), values));
    }

    fn draw(&mut self, n: usize, deviation: f64) -> Vec<f32> {
        (0..n).map(|_| (self.numbers.normal() * deviation) as f32).collect()
    }

    fn normal(&mut self, name: impl Into<String>, shape: &[usize], deviation: f64) {
        let values = self.draw(shape.iter().product(), deviation);
        self.put(name, shape, values);
    }

    fn constant(&mut self, name: impl Into<String>, n: usize, value: f32) {
        self.put(name, &[n], vec![value; n]);
    }

    /// A layer norm that changes nothing.
    fn plain_norm(&mut self, name: &str, width: usize) {
        self.constant(format!("{name}.weight"), width, 1.0);
        self.constant(format!("{name}.bias"), width, 0.0);
    }

    /// A linear layer with random weights.
    fn random_linear(&mut self, name: &str, n_in: usize, n_out: usize, deviation: f64) {
        self.normal(format!("{name}.weight"), &[n_out, n_in], deviation);
        self.constant(format!("{name}.bias"), n_out, 0.0);
    }

    /// BERT's tensor `from`.
    fn read(&self, from: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.bert.shape(from) {
            Some(found) if found == shape => Ok(self.bert.read_f32(from)?),
            Some(found) => Err(Error::Training(format!(
                "the BERT checkpoint's `{from}` has shape {found:?}, the Q-Former needs {shape:?}"
            ))),
            None => Err(Error::Training(format!("the BERT checkpoint has no `{from}`"))),
        }
    }

    /// Weight, of this shape, and bias of BERT's module `from`.
    fn copy(&mut self, from: &str, to: &str, shape: &[usize]) -> Result<()> {
        for (part, shape) in [("weight", shape), ("bias", &shape[..1])] {
            let values = self.read(&format!("{from}.{part}"), shape)?;
            self.put(format!("{to}.{part}"), shape, values);
        }
        Ok(())
    }

    fn embeddings(&mut self) -> Result<()> {
        let (width, vocab_size) = (self.config.hidden_size, self.config.vocab_size);
        let words = "embeddings.word_embeddings.weight";
        let bert_vocab = self.bert.shape(words).map_or(0, |shape| shape[0]);
        if bert_vocab > vocab_size {
            return Err(Error::config("qformer.vocab_size", format!("is below BERT's {bert_vocab}")));
        }
        let mut rows = self.read(words, &[bert_vocab, width])?;
        // Rows beyond BERT's vocabulary ([DEC]) start as random vectors.
        rows.extend(self.draw((vocab_size - bert_vocab) * width, INITIALIZER_RANGE));
        self.put(format!("qformer.{words}"), &[vocab_size, width], rows);

        let positions = "embeddings.position_embeddings.weight";
        let shape = [self.config.max_position_embeddings, width];
        let mut rows = self.read(positions, &shape)?;
        let types = "embeddings.token_type_embeddings.weight";
        if self.bert.shape(types).is_some() {
            let types = self.read(types, &[2, width])?;
            for row in rows.chunks_exact_mut(width) {
                row.iter_mut().zip(&types[..width]).for_each(|(p, t)| *p += t);
            }
        }
        self.put(format!("qformer.{positions}"), &shape, rows);
        self.copy("embeddings.LayerNorm", "qformer.layernorm", &[width])
    }

    /// What layer `i` has of BERT; the queries' feed-forward layer is a copy of the text's.
    fn layer(&mut self, i: usize) -> Result<()> {
        let (width, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let (from, to) = (format!("encoder.layer.{i}"), format!("qformer.encoder.layer.{i}"));
        let modules: [(&str, &[&str], &[usize]); 8] = [
            ("attention.self.query", &["attention.attention.query"], &[width, width]),
            ("attention.self.key", &["attention.attention.key"], &[width, width]),
            ("attention.self.value", &["attention.attention.value"], &[width, width]),
            ("attention.output.dense", &["attention.output.dense"], &[width, width]),
            ("attention.output.LayerNorm", &["attention.output.LayerNorm"], &[width]),
            ("intermediate.dense", &["intermediate.dense", "intermediate_query.dense"], &[inner, width]),
            ("output.dense", &["output.dense", "output_query.dense"], &[width, inner]),
            ("output.LayerNorm", &["output.LayerNorm", "output_query.LayerNorm"], &[width]),
        ];
        for (module, copies, shape) in modules {
            for copy in copies {
                self.copy(&format!("{from}.{module}"), &format!("{to}.{copy}"), shape)?;
            }
        }
        Ok(())
    }

    fn cross_attention(&mut self, i: usize) {
        let (width, encoder) = (self.config.hidden_size, self.config.encoder_hidden_size);
        let name = format!("qformer.encoder.layer.{i}.crossattention");
        let parts = ["attention.query", "attention.key", "attention.value", "output.dense"];
        let inputs = [width, encoder, encoder, width];
        for ((part, n_in), gain) in parts.into_iter().zip(inputs).zip(CROSS_ATTENTION_GAINS) {
            self.random_linear(&format!("{name}.{part}"), n_in, width, gain / (n_in as f64).sqrt());
        }
        self.plain_norm(&format!("{name}.output.LayerNorm"), width);
    }

    fn queries_and_heads(&mut self) {
        let QFormerConfig { hidden_size: width, image_text_hidden_size: joint, .. } = *self.config;
        self.normal("query_tokens", &[1, self.config.num_query_tokens, width], QUERY_DEVIATION);
        self.plain_norm("vision_layernorm", self.config.encoder_hidden_size);
        self.random_linear("cls.predictions.transform.dense", width, width, INITIALIZER_RANGE);
        self.plain_norm("cls.predictions.transform.LayerNorm", width);
        self.constant("cls.predictions.bias", self.config.vocab_size, 0.0);
        self.random_linear("vision_projection", width, joint, INITIALIZER_RANGE);
        self.random_linear("text_projection", width, joint, INITIALIZER_RANGE);
        self.random_linear("itm_head", width, 2, INITIALIZER_RANGE);
        self.put("temp", &[], vec![TEMPERATURE]);
    }
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
