//! T5 and Flan-T5 (arXiv 1910.10683, 2210.11416; HF `T5ForConditionalGeneration`): an encoder that reads the prompt and a
//! decoder that writes the answer, RMS norm before each sublayer, no biases, no scaling of the scores, positions as a bias on
//! the scores by distance.

mod config;

use std::sync::Arc;

use candle_core::{Device, Tensor};

pub use self::config::T5Config;
use super::Branched;
use super::loading::{File, Loader, Table, on_a_worker};
use crate::cache::{CachedSequence, KvCache};
use crate::layers::{
    Activation, AttentionShape, FrozenFormat, Linear, MatrixSize, Plan, Precision, RelativeBias, RmsNorm,
    Sequence, Span, Weight, attention, attention_biased, attention_cached, attention_to, gated,
};
use crate::weights::safetensors::Safetensors;
use crate::{Error, Result};

/// Rows that are read or written at most. T5 has no limit of its own: it was trained on 512 and gets worse beyond.
pub(super) const MAX_ROWS: usize = 4096;

/// A frozen T5 model.
#[derive(Debug, Clone)]
pub struct T5 {
    config: T5Config,
    /// `[vocab_size, d_model]`.
    shared: Table,
    encoder: Stack,
    decoder: Stack,
    lm_head: Linear,
    n_parameters: usize,
    n_bytes: usize,
    cache_precision: Precision,
}

/// The layers of encoder or decoder.
#[derive(Debug, Clone)]
struct Stack {
    layers: Arc<[Layer]>,
    /// `[buckets, heads]`, of the first layer and used by all.
    relative_attention_bias: Arc<[f32]>,
    final_layer_norm: RmsNorm,
}

#[derive(Debug)]
struct Layer {
    self_attention: Attention,
    /// The decoder's attention to the encoder's output.
    cross_attention: Option<Attention>,
    feed_forward_norm: RmsNorm,
    wi: Widening,
    wo: Linear,
}

/// The first half of a feed-forward layer.
#[derive(Debug)]
enum Widening {
    /// T5: `activation(wi x)`.
    Plain(Linear),
    /// T5 v1.1 and Flan-T5: `activation(gate x) * (up x)`, `wi_0` and `wi_1` in a checkpoint.
    Gated { gate: Linear, up: Linear },
}

#[derive(Debug)]
struct Attention {
    layer_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
}

impl T5 {
    /// Loads a model from the tensors of a Hugging Face checkpoint whose names start with `prefix`.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn from_safetensors(
        config: T5Config,
        file: &Safetensors,
        prefix: &str,
        format: FrozenFormat,
    ) -> Result<Self> {
        config.validate()?;
        let model = Self::load(config, &File::HuggingFace { file, prefix }, format)?;
        // Copies of the shared table, and a leftover of the first conversions.
        file.ignore(|name| {
            name.strip_prefix(prefix).is_some_and(|name| {
                matches!(
                    name,
                    "encoder.embed_tokens.weight"
                        | "decoder.embed_tokens.weight"
                        | "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
                )
            })
        });
        Ok(model)
    }

    pub(super) fn load(config: T5Config, file: &File<'_>, format: FrozenFormat) -> Result<Self> {
        let mut loader = Loader::new(file, format);
        let shared = loader.table("shared.weight", config.vocab_size, config.d_model)?;
        let encoder = Stack::load(&config, &mut loader, false)?;
        let decoder = Stack::load(&config, &mut loader, true)?;
        // The head of its own wins over the table, whatever the configuration says of tying.
        let lm_head = if file.has("lm_head.weight") {
            loader.table("lm_head.weight", config.vocab_size, config.d_model)?
        } else {
            shared.clone()
        };
        Ok(Self {
            shared: Table(shared),
            encoder,
            decoder,
            lm_head: Linear::new(Weight::Frozen(lm_head), None),
            n_parameters: loader.n_parameters,
            n_bytes: loader.n_bytes,
            cache_precision: format.cache_precision(),
            config,
        })
    }

    /// Its structure.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// How many parameters it has; a tied head counts once.
    pub fn n_parameters(&self) -> usize {
        self.n_parameters
    }

    /// Memory of its weights, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The output head, `d_model` to `vocab_size`; the hidden states it is given are scaled already.
    pub fn head(&self) -> &Linear {
        &self.lm_head
    }

    /// The matrices that a row of the prompt passes: the encoder, and what the decoder keeps of its output.
    pub(super) fn prompt_matrices(&self) -> MatrixSize {
        let kept =
            self.decoder.layers.iter().flat_map(|layer| &layer.cross_attention).flat_map(|c| [&c.k, &c.v]);
        self.encoder.matrices().chain(kept).map(Linear::matrix).sum()
    }

    /// The matrices that a row of the answer passes, without the head.
    pub(super) fn answer_matrices(&self) -> MatrixSize {
        let cross =
            self.decoder.layers.iter().flat_map(|layer| &layer.cross_attention).flat_map(|c| [&c.q, &c.o]);
        self.decoder.matrices().chain(cross).map(Linear::matrix).sum()
    }

    /// The longest prompt, and the longest answer.
    pub fn context_len(&self) -> usize {
        MAX_ROWS
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> KvCache {
        let width = self.config.num_heads * self.config.d_kv;
        KvCache::with_memory(self.decoder.layers.len(), width, self.cache_precision)
    }

    /// The embeddings of tokens, `[ids.len(), d_model]`.
    ///
    /// # Errors
    /// [`Error::Request`] when a token is not in the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.shared.rows(ids)
    }

    /// The encoder: reads packed texts of `lengths` rows, each row seeing its whole text.
    ///
    /// # Shapes
    /// - `embeds`: `[sum of lengths, d_model]`, and so is the result, normed
    ///
    /// # Errors
    /// When the lengths do not sum to the rows, or a text is too long.
    pub fn encode(&self, embeds: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let (n_rows, width) = embeds.dims2()?;
        if width != self.config.d_model || n_rows != lengths.iter().sum::<usize>() {
            return Err(Error::Request(format!(
                "the language model was given {n_rows} rows of {width} values for texts of {lengths:?} rows of {}",
                self.config.d_model
            )));
        }
        let longest = check_longest(lengths.iter().copied())?;
        let mut start = 0;
        let plan: Plan = lengths
            .iter()
            .map(|&len| {
                start += len;
                Sequence::mutual(vec![Span { start: start - len, len }])
            })
            .collect();
        let (shape, bias) = (self.attention_shape(), self.encoder.bias(&self.config, longest, false));
        on_a_worker(|| {
            let mut x = embeds.clone();
            for layer in self.encoder.layers.iter() {
                x = layer
                    .self_attention
                    .residual(&x, |q, k, v| attention_biased(q, k, v, &plan, shape, &bias))?;
                x = layer.feed_forward(&x, &self.config)?;
            }
            Ok(self.encoder.final_layer_norm.forward(&x)?)
        })
    }

    /// Reads prompts and given answers, differentiable to `embeds`: of each text the encoder reads the beginning, and the
    /// decoder each continuation, which begins with the start token and sees all of the beginning. A row equals that of the
    /// same answer generated.
    ///
    /// # Shapes
    /// - `embeds`: `[sum of rows, d_model]`, text by text: the beginning, then its continuations
    /// - returns the same shape: the encoder's rows as it gives them, the decoder's ready for the head
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn forward(&self, embeds: &Tensor, texts: &[Branched]) -> Result<Tensor> {
        let pairs = Pairs::of(texts);
        check_longest(texts.iter().flat_map(|text| text.continuations.iter().copied()))?;
        let (n_rows, n_needed) = (embeds.dim(0)?, pairs.encoder_rows.len() + pairs.decoder_rows.len());
        if n_rows != n_needed {
            let reason = format!("the language model was given {n_rows} rows for texts of {n_needed}");
            return Err(Error::Request(reason));
        }
        let rows = |of: &[u32]| embeds.index_select(&Tensor::from_slice(of, of.len(), &Device::Cpu)?, 0);
        let encoded = self.encode(&rows(&pairs.encoder_rows)?, &pairs.lengths)?;
        if pairs.decoder_rows.is_empty() {
            return Ok(encoded);
        }
        let longest = texts.iter().flat_map(|text| &text.continuations).copied().max().unwrap_or(0);
        let (shape, bias) = (self.attention_shape(), self.decoder.bias(&self.config, longest, true));
        let decoded = self.decode(
            &rows(&pairs.decoder_rows)?,
            |_, q, k, v| attention_biased(q, k, v, &pairs.answers, shape, &bias),
            |_, cross, q| {
                let (k, v) = (cross.k.forward(&encoded)?, cross.v.forward(&encoded)?);
                attention(q, &k, &v, &pairs.prompts, shape, None)
            },
        )?;
        // Back to the order that the rows came in.
        let mut places = vec![0; n_rows];
        let order = pairs.encoder_rows.iter().chain(&pairs.decoder_rows);
        order.zip(0u32..).for_each(|(&row, place)| places[row as usize] = place);
        let all = Tensor::cat(&[&encoded, &decoded], 0)?;
        Ok(all.index_select(&Tensor::from_vec(places, n_rows, &Device::Cpu)?, 0)?)
    }

    /// The decoder's layers over packed rows. `attend` gets the layer's number, and queries, keys and values of these rows;
    /// `look` the layer's number, its cross-attention, and the queries of that.
    fn decode(
        &self,
        embeds: &Tensor,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor> + Send,
        mut look: impl FnMut(usize, &Attention, &Tensor) -> candle_core::Result<Tensor> + Send,
    ) -> Result<Tensor> {
        on_a_worker(|| {
            let mut x = embeds.clone();
            for (i, layer) in self.decoder.layers.iter().enumerate() {
                x = layer.self_attention.residual(&x, |q, k, v| attend(i, q, k, v))?;
                if let Some(cross) = &layer.cross_attention {
                    let q = cross.q.forward(&cross.layer_norm.forward(&x)?)?;
                    x = cross.o.forward_then(&look(i, cross, &q)?, Activation::Identity, Some(&x))?;
                }
                x = layer.feed_forward(&x, &self.config)?;
            }
            let x = self.decoder.final_layer_norm.forward(&x)?;
            if self.config.scale_decoder_outputs {
                return Ok((x * (self.config.d_model as f64).powf(-0.5))?);
            }
            Ok(x)
        })
    }

    /// Reads prompts: encodes them, `lengths[i]` rows of `embeds` `[sum of lengths, d_model]` for `sequences[i]`, into the cache's
    /// memory and begins an answer to each. `sequences` must be empty; the decoder's hidden states after the start token come
    /// back, `[prompts, d_model]`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode), and when a sequence is not empty.
    pub fn begin(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
    ) -> Result<Tensor> {
        if sequences.iter().any(|sequence| !sequence.is_empty()) {
            return Err(Error::Request("an encoder-decoder model reads a prompt as a whole".into()));
        }
        let encoded = self.encode(embeds, lengths)?;
        let crosses = self.decoder.layers.iter().filter_map(|layer| layer.cross_attention.as_ref());
        let keep = |cross: &Attention| Ok([cross.k.forward(&encoded)?, cross.v.forward(&encoded)?]);
        cache.remember(sequences, lengths, &crosses.map(keep).collect::<Result<Vec<_>>>()?)?;
        let starts = vec![self.config.decoder_start_token_id; sequences.len()];
        self.forward_cached(&self.embed(&starts)?, cache, sequences, &vec![1; sequences.len()])
    }

    /// The decoder: reads packed rows that continue answers of a cache, `lengths[i]` rows of `embeds` for `sequences[i]`; its
    /// hidden states come back in their shape, `[sum of lengths, d_model]`.
    ///
    /// # Errors
    /// When the shapes do not agree, an answer is too long or a sequence is not of this cache; then nothing has changed.
    pub fn forward_cached(
        &self,
        embeds: &Tensor,
        cache: &mut KvCache,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
    ) -> Result<Tensor> {
        let longest =
            check_longest(sequences.iter().zip(lengths).map(|(sequence, len)| sequence.len() + len))?;
        let (shape, bias) = (self.attention_shape(), self.decoder.bias(&self.config, longest, true));
        cache.append(sequences, lengths, |rows, memory, new| {
            self.decode(
                embeds,
                |i, q, k, v| attention_cached(q, k, v, &mut rows[i], &new.plan, shape, Some(&bias)),
                |i, _, q| attention_to(q, &memory[i], &new.memory_plan, shape, None),
            )
        })
    }

    fn attention_shape(&self) -> AttentionShape {
        let n_heads = self.config.num_heads;
        AttentionShape { scale: 1.0, ..AttentionShape::multi_head(n_heads, self.config.d_kv) }
    }
}

/// The longest of some texts.
///
/// # Errors
/// [`Error::TextTooLong`].
fn check_longest(lengths: impl Iterator<Item = usize>) -> Result<usize> {
    let longest = lengths.max().unwrap_or(0);
    if longest > MAX_ROWS {
        return Err(Error::TextTooLong { n_tokens: longest, limit: MAX_ROWS });
    }
    Ok(longest)
}

/// Prompts and answers among packed rows.
struct Pairs {
    /// Rows of each prompt.
    lengths: Vec<usize>,
    /// Where the prompts' rows are among all rows, and the answers'.
    encoder_rows: Vec<u32>,
    decoder_rows: Vec<u32>,
    /// Each answer sees itself, among the answers' rows,
    answers: Plan,
    /// and its prompt among the prompts' rows.
    prompts: Plan,
}

impl Pairs {
    fn of(texts: &[Branched]) -> Self {
        let (mut encoder_rows, mut decoder_rows) = (Vec::new(), Vec::new());
        let (mut answers, mut prompts) = (Vec::new(), Vec::new());
        let mut row = 0;
        let mut rows = |len: usize, rows: &mut Vec<u32>| {
            let span = Span { start: rows.len(), len };
            rows.extend(row..row + len as u32);
            row += len as u32;
            vec![span]
        };
        for text in texts {
            let prompt = rows(text.shared, &mut encoder_rows);
            for &len in text.continuations.iter().filter(|len| **len > 0) {
                let answer = rows(len, &mut decoder_rows);
                answers.push(Sequence { queries: answer.clone(), keys: answer.clone(), causal: true });
                prompts.push(Sequence { queries: answer, keys: prompt.clone(), causal: false });
            }
        }
        let lengths = texts.iter().map(|text| text.shared).collect();
        Self { lengths, encoder_rows, decoder_rows, answers: answers.into(), prompts: prompts.into() }
    }
}

impl Stack {
    fn load(config: &T5Config, loader: &mut Loader<'_>, is_decoder: bool) -> Result<Self> {
        let (name, n_layers) =
            if is_decoder { ("decoder", config.num_decoder_layers) } else { ("encoder", config.num_layers) };
        let (d, inner, eps) = (config.d_model, config.num_heads * config.d_kv, config.layer_norm_epsilon);
        let attention = |loader: &mut Loader<'_>, at: &str, module: &str| -> Result<Attention> {
            let mut linear = |part: &str, n_out, n_in| {
                loader.linear(&format!("{at}.{module}.{part}"), n_out, n_in, false, None)
            };
            let (q, k, v, o) = (
                linear("q", inner, d)?,
                linear("k", inner, d)?,
                linear("v", inner, d)?,
                linear("o", d, inner)?,
            );
            Ok(Attention { layer_norm: loader.norm(&format!("{at}.layer_norm"), d, eps)?, q, k, v, o })
        };
        let mut layers = Vec::with_capacity(n_layers);
        for i in 0..n_layers {
            let at = |layer: usize| format!("{name}.block.{i}.layer.{layer}");
            let self_attention = attention(loader, &at(0), "SelfAttention")?;
            let cross_attention =
                if is_decoder { Some(attention(loader, &at(1), "EncDecAttention")?) } else { None };
            let feed_forward = at(if is_decoder { 2 } else { 1 });
            let dense = |part: &str| format!("{feed_forward}.DenseReluDense.{part}");
            let mut widening = |part: &str| loader.linear(&dense(part), config.d_ff, d, false, None);
            let wi = if config.is_gated_act {
                Widening::Gated { gate: widening("wi_0")?, up: widening("wi_1")? }
            } else {
                Widening::Plain(widening("wi")?)
            };
            layers.push(Layer {
                self_attention,
                cross_attention,
                wi,
                wo: loader.linear(&dense("wo"), d, config.d_ff, false, None)?,
                feed_forward_norm: loader.norm(&format!("{feed_forward}.layer_norm"), d, eps)?,
            });
        }
        let bias = format!("{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        let bias = loader.matrix(&bias, config.relative_attention_num_buckets, config.num_heads)?;
        Ok(Self {
            layers: layers.into(),
            relative_attention_bias: bias.flatten_all()?.to_vec1::<f32>()?.into(),
            final_layer_norm: loader.norm(&format!("{name}.final_layer_norm"), d, eps)?,
        })
    }

    /// Those of self-attention and feed-forward layers.
    fn matrices(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| {
            let Attention { q, k, v, o, .. } = &layer.self_attention;
            let (first, gated) = match &layer.wi {
                Widening::Plain(wi) => (wi, None),
                Widening::Gated { gate, up } => (gate, Some(up)),
            };
            [q, k, v, o, &layer.wo, first].into_iter().chain(gated)
        })
    }

    /// The bias of every head for texts of up to `longest` rows.
    fn bias(&self, config: &T5Config, longest: usize, is_decoder: bool) -> RelativeBias {
        let (n_heads, n_before) = (config.num_heads, longest.max(1) - 1);
        let n_after = if is_decoder { 0 } else { n_before };
        let distances = -(n_before as i64)..=n_after as i64;
        let buckets: Vec<usize> = distances.map(|distance| config.bucket(distance, is_decoder)).collect();
        let of_head = |head: usize| {
            buckets.iter().map(move |bucket| self.relative_attention_bias[bucket * n_heads + head])
        };
        RelativeBias { values: (0..n_heads).flat_map(of_head).collect(), n_before }
    }
}

impl Attention {
    /// `x + attention(norm(x))`; `attend` gets queries, keys and values.
    fn residual(
        &self,
        x: &Tensor,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let normed = self.layer_norm.forward(x)?;
        let [q, k, v] = Linear::forward_all([&self.q, &self.k, &self.v], &normed)?;
        Ok(self.o.forward_then(&attend(&q, &k, &v)?, Activation::Identity, Some(x))?)
    }
}

impl Layer {
    fn feed_forward(&self, x: &Tensor, config: &T5Config) -> Result<Tensor> {
        let normed = self.feed_forward_norm.forward(x)?;
        let inner = match &self.wi {
            Widening::Plain(wi) => wi.forward_then(&normed, config.activation, None)?,
            Widening::Gated { gate, up } => {
                let [gate, up] = Linear::forward_all([gate, up], &normed)?;
                gated(&gate, &up, config.activation)?
            }
        };
        Ok(self.wo.forward_then(&inner, Activation::Identity, Some(x))?)
    }
}
