//! Answers that are written together while questions come and go: what a server needs.

use std::sync::Arc;

use candle_core::Tensor;

use super::stage2::Stage2;
use super::{Answer, Blip2};
use crate::cache::Beginning;
use crate::generate::{Batch, Constraint, Event, Finished, GenerationConfig, Newcomer, StopRules};
use crate::text::{Prompt, StreamDecoder, Turn};
use crate::{Error, Result};

/// What to write.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What was said, from [`Blip2::prompt`].
    pub prompt: Prompt,
    /// The picture's projected queries, from [`Blip2::soft_tokens`].
    pub soft_tokens: Tensor,
    /// What was read of an earlier prompt about the same picture, from [`AnswerBatch::read_picture`].
    pub read: Option<Arc<ReadPicture>>,
    /// How to answer.
    pub generation: GenerationConfig,
    /// What the answer has to be, from [`Blip2::grammar`].
    pub constraint: Option<Box<dyn Constraint>>,
}

impl Ask {
    /// Rows of the prompt that were read before and are not read again.
    pub fn n_known(&self) -> usize {
        self.known().map_or(0, |read| read.rows.len())
    }

    /// What was read before, where this prompt begins with it. The answer starts from the row that is read last, so one has to
    /// be left.
    fn known(&self) -> Option<&ReadPicture> {
        let begins_alike =
            |read: &&ReadPicture| self.prompt.image_at.is_some() && read.ids == self.prompt.before_image();
        self.read.as_deref().filter(begins_alike).filter(|_| !self.prompt.after_image().is_empty())
    }
}

/// What a language model has read of a prompt up to the end of its picture, for the next prompts about that picture.
#[derive(Debug)]
pub struct ReadPicture {
    /// The tokens before the picture.
    ids: Vec<u32>,
    rows: Arc<Beginning>,
}

impl ReadPicture {
    /// Its memory, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.rows.n_bytes()
    }
}

/// A token that was just written; with beams there is none before the end.
#[derive(Debug)]
pub struct Piece<'a> {
    /// Whose answer it is: what [`AnswerBatch::join`] returned.
    pub id: usize,
    /// Which of its answers.
    pub sequence: usize,
    /// The token.
    pub token: u32,
    /// The characters that it completes; none for a token that stands for no text.
    pub text: String,
    /// The natural logarithm of its probability.
    pub log_prob: f32,
    /// The model's scores of every token in this place.
    pub logits: &'a [f32],
}

/// Answers that are complete.
#[derive(Debug)]
pub struct Answered {
    /// Whose they are.
    pub id: usize,
    /// As many as were asked for, the best first where beams rank them.
    pub result: Result<Vec<Answer>>,
}

/// Answers that grow together, a token a [`step`](Self::step). Each is what it would be alone, whoever is beside it.
#[derive(Debug)]
pub struct AnswerBatch<'a> {
    stage2: &'a Stage2,
    batch: Batch<'a>,
    decoders: Vec<(usize, Vec<StreamDecoder<'a>>)>,
}

impl Blip2 {
    /// What the language model reads to answer the last of `turns` about a picture; without turns, to describe it.
    ///
    /// # Errors
    /// When the model has no stage-2 part, a turn is empty, or all of it does not fit the context
    /// ([`Error::TextTooLong`]).
    pub fn prompt(&self, turns: &[Turn]) -> Result<Prompt> {
        self.stage2()?.render_whole(turns, self.instruction())
    }

    /// A batch of nobody's answers yet.
    ///
    /// # Errors
    /// When the model has no stage-2 part.
    pub fn answer_batch(&self) -> Result<AnswerBatch<'_>> {
        let stage2 = self.stage2()?;
        Ok(AnswerBatch { stage2, batch: Batch::new(stage2.language_model()), decoders: Vec::new() })
    }
}

impl<'a> AnswerBatch<'a> {
    /// Whether nobody waits for an answer.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// How many texts grow: what one step computes.
    pub fn n_texts(&self) -> usize {
        self.batch.n_texts()
    }

    /// Memory of the keys and values, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.batch.n_bytes()
    }

    /// Reads the prompts of newcomers, all in one pass; gives the name of each.
    ///
    /// # Errors
    /// When a configuration contradicts itself or a prompt leaves no room; then none has joined, and the others have not
    /// noticed.
    pub fn join(&mut self, asks: &[Ask]) -> Result<Vec<usize>> {
        let prompts = asks
            .iter()
            .map(|ask| {
                if !ask.generation.eos_token_id.is_empty() {
                    let reason = "cannot be another for one of several answers: leave it out";
                    return Err(Error::Config {
                        field: "generation.eos_token_id".into(),
                        reason: reason.into(),
                    });
                }
                let known = ask.known();
                let embeds = match known {
                    Some(_) => self.stage2.language_model().embed(ask.prompt.after_image())?,
                    None => self.stage2.embed(&ask.prompt, &ask.soft_tokens)?,
                };
                Ok(Newcomer {
                    beginning: known.map(|read| read.rows.clone()),
                    embeds,
                    config: ask.generation.clone(),
                    seen: self.stage2.seen(&ask.prompt, &ask.generation),
                    constraint: ask.constraint.clone(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let stage2 = self.stage2;
        let ids = with_rules(stage2, |stop| self.batch.join(prompts, stop))?;
        for (&id, ask) in ids.iter().zip(asks) {
            let decoder = |_| stage2.tokenizer().decode_stream();
            self.decoders.push((id, (0..ask.generation.num_return_sequences).map(decoder).collect()));
        }
        Ok(ids)
    }

    /// What was read for a member up to the end of its picture; `ask` is what it joined with. `None` when it has left, or the
    /// model reads prompts as a whole.
    pub fn read_picture(&self, id: usize, ask: &Ask) -> Option<ReadPicture> {
        let n_rows = ask.prompt.image_at? + ask.soft_tokens.dim(0).ok()?;
        let rows = Arc::new(self.batch.beginning(id, n_rows)?);
        Some(ReadPicture { ids: ask.prompt.before_image().to_vec(), rows })
    }

    /// Stops an answer that nobody wants any more.
    pub fn leave(&mut self, id: usize) {
        self.batch.leave(id);
        self.decoders.retain(|(of, _)| *of != id);
    }

    /// Gives every answer one more token; gives those that are complete, which leave.
    ///
    /// # Errors
    /// When the model fails: the batch is then empty.
    pub fn step(&mut self, on_piece: &mut dyn FnMut(Piece<'_>)) -> Result<Vec<Answered>> {
        let (stage2, batch, decoders) = (self.stage2, &mut self.batch, &mut self.decoders);
        let on_event = &mut |event: Event<'_>| {
            let Event::Token { prompt: id, sequence, token, log_prob, logits } = event else { return };
            let decoder = decoders.iter_mut().find(|(of, _)| *of == id);
            let text = match decoder.and_then(|(_, decoders)| decoders.get_mut(sequence)) {
                Some(decoder) if !stage2.tokenizer().is_control(token) => decoder.push(token),
                _ => String::new(),
            };
            on_piece(Piece { id, sequence, token, text, log_prob, logits });
        };
        let finished = with_rules(stage2, |stop| batch.step(stop, on_event));
        if batch.is_empty() {
            decoders.clear();
        }
        let answered = finished?.into_iter().map(|Finished { id, result }| {
            self.decoders.retain(|(of, _)| *of != id);
            let answers = result.map(|texts| {
                texts.into_iter().map(|text| stage2.answer(text, stage2.end_tokens(&[]))).collect()
            });
            Answered { id, result: answers }
        });
        Ok(answered.collect())
    }
}

/// With the rules by which this model's answers end.
fn with_rules<T>(stage2: &Stage2, run: impl FnOnce(&StopRules<'_>) -> T) -> T {
    let decode = |ids: &[u32]| Ok(stage2.tokenizer().decode(ids));
    run(&StopRules::new(stage2.end_tokens(&[])).with_text(&decode))
}
