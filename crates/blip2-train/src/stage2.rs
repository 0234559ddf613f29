//! Stage 2: the queries learn to speak to a frozen language model (BLIP-2 §3.3).
//!
//! The query outputs, projected to the width of the language model's embeddings, stand in the prompt where the picture
//! belongs; the loss is that of the answers' tokens alone. What is trained is the query path and the projection: the
//! gradient passes through the language model and leaves it as it is.
//!
//! Several texts about one picture share its vectors, and as much as they have in common after it: these rows are
//! computed, and read by the language model, once. Through an encoder-decoder model this is prefix language modelling: the
//! encoder reads the vectors with what belongs before the answer, the decoder learns to write it.

mod rows;

use std::collections::BTreeMap;
use std::ops::Range;

use blip2::language::LanguageModel;
use blip2::layers::{DropoutRng, Linear, linear_cross_entropy};
use blip2::qformer::QFormer;
use blip2::text::Prompt;
use candle_core::{Device, Tensor, Var};

use crate::gradients::Gradients;
use crate::health::query_cosine;
use crate::random::Random;
use crate::{Error, Result};
use rows::Rows;

/// A stage-2 batch of B pictures.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The frozen encoder's tokens, `[B * P, encoder_hidden_size]`.
    pub image_embeds: Tensor,
    /// For each picture its prompts with answers, at least one; all begin alike up to the picture.
    pub prompts: Vec<Vec<Prompt>>,
    /// For each picture how much a token of its answers counts in the mean that is the loss; above zero.
    pub weights: Vec<f32>,
}

/// What a step needs besides the batch.
#[derive(Debug, Clone, Copy)]
pub struct StepOptions {
    /// Pictures computed at once; the batch is cut into parts of this size.
    pub micro_batch: usize,
    /// Dropout probability of the Q-Former.
    pub dropout: f32,
    /// The run's seed.
    pub seed: u64,
    /// The step, which with the seed determines dropout.
    pub step: u64,
}

/// The values a step reports.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Values {
    /// Mean loss of an answer's token, weighted as [`Batch::weights`] says.
    pub loss: f32,
    /// Tokens that the loss is the mean of.
    pub n_tokens: usize,
    /// Mean cosine between different query outputs of one picture: 1 is collapse.
    pub query_cosine: f32,
}

/// The trained bridge in front of a frozen language model.
#[derive(Debug)]
pub struct Bridge<'a> {
    /// The query path of the Q-Former.
    pub qformer: &'a QFormer,
    /// Query outputs to the language model's embeddings.
    pub language_projection: &'a Linear,
    /// The frozen language model.
    pub language_model: &'a LanguageModel,
}

/// The passes of one part of a batch.
#[derive(Debug)]
pub struct Pass {
    /// Query outputs, `[pictures * Q, D]`.
    pub queries: Tensor,
    /// What stands for the pictures in the prompts, `[pictures * Q, L]`.
    pub soft_tokens: Tensor,
    /// The language model's last hidden states, packed text by text: beginning, then each continuation
    /// ([`LanguageModel::forward_branched`]).
    pub hidden: Tensor,
    /// The weighted sum over the answers' tokens.
    pub loss_sum: Tensor,
}

/// Computes the loss of `batch` and the gradients of `variables`, the bridge's own.
///
/// # Errors
/// When a picture has no prompt or no weight, its prompts do not begin alike or are not such as the language model reads, no token is to be learned, a prompt is longer than
/// the language model's context, or the tensor engine fails.
pub fn gradients(
    bridge: &Bridge<'_>,
    variables: &BTreeMap<String, Var>,
    batch: &Batch,
    options: StepOptions,
) -> Result<(Gradients, Values)> {
    if batch.weights.len() != batch.prompts.len() {
        return Err(Error::Training("a batch must have a weight for each of its pictures".into()));
    }
    let (mut n_tokens, mut weight) = (0, 0.0);
    for (prompts, &of_picture) in batch.prompts.iter().zip(&batch.weights) {
        let n: usize = prompts.iter().flat_map(|prompt| &prompt.answers).map(Range::len).sum();
        n_tokens += n;
        weight += n as f64 * f64::from(of_picture);
    }
    if n_tokens == 0 {
        return Err(Error::Training("no text of the batch has an answer to learn".into()));
    }
    let (mut gradients, mut values) = (Gradients::default(), Values { n_tokens, ..Values::default() });
    let n = batch.prompts.len();
    values.query_cosine = query_cosine(bridge.qformer, &batch.image_embeds, n)?;
    for start in (0..n).step_by(options.micro_batch.max(1)) {
        let part = start..(start + options.micro_batch.max(1)).min(n);
        let seed = Random::new(&[options.seed, options.step, start as u64]).next_u64();
        let pass = bridge.forward(batch, part, &mut DropoutRng::new(options.dropout, seed))?;
        let loss = (pass.loss_sum / weight)?;
        values.loss += loss.to_scalar::<f32>()?;
        gradients.backward(variables, &loss)?;
    }
    Ok((gradients, values))
}

impl Bridge<'_> {
    /// Reads the prompts of some pictures of a batch.
    ///
    /// # Errors
    /// As [`gradients`].
    pub fn forward(&self, batch: &Batch, part: Range<usize>, dropout: &mut DropoutRng) -> Result<Pass> {
        let n_image_tokens = batch.image_embeds.dim(0)? / batch.prompts.len().max(1);
        let (start, n) = (part.start * n_image_tokens, part.len() * n_image_tokens);
        let image = self.qformer.image_keys(&batch.image_embeds.narrow(0, start, n)?, part.len())?;
        let (queries, _) = self.qformer.encode_queries(&image, dropout)?;
        let soft_tokens = self.language_projection.forward(&queries)?;

        let n_queries = self.qformer.config().num_query_tokens;
        let (prompts, weights) = (&batch.prompts[part.clone()], &batch.weights[part]);
        let rows = Rows::of(prompts, weights, n_queries, self.language_model.decoder_start())?;
        // One table, soft tokens first, and for each place in the texts the row that stands there.
        let table = Tensor::cat(&[&soft_tokens, &self.language_model.embed(&rows.words)?], 0)?;
        let embeds = table.index_select(&index(&rows.table_rows)?, 0)?;
        let hidden = self.language_model.forward_branched(&embeds, &rows.texts)?;
        let predicting = hidden.index_select(&index(&rows.predicting)?, 0)?;
        let losses = linear_cross_entropy(&predicting, self.language_model.head(), &rows.targets, 0.0)?;
        let weights = Tensor::from_slice(&rows.weights, losses.shape(), losses.device())?;
        Ok(Pass { queries, soft_tokens, hidden, loss_sum: (losses * weights)?.sum_all()? })
    }
}

fn index(rows: &[u32]) -> candle_core::Result<Tensor> {
    Tensor::from_slice(rows, rows.len(), &Device::Cpu)
}
