//! Answers that are written together while questions come and go: what a server needs.

use std::sync::Arc;

use candle_core::Tensor;

use super::read_text::ReadText;
use super::stage2::Stage2;
use super::{Answer, Blip2};
use crate::cache::Beginning;
use crate::generate::{
    Batch, Constraint, Event, Finished, Generation, GenerationConfig, Newcomer, StopRules,
};
use crate::text::{Prompt, StreamDecoder, Turn};
use crate::{Error, Result};

/// What to write.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What was said, from [`Blip2::prompt`].
    pub prompt: Prompt,
    /// The picture's projected queries, from [`Blip2::soft_tokens`].
    pub soft_tokens: Tensor,
    /// What was read about the same picture before, from [`AnswerBatch::read_picture`] or [`Answered::read`].
    pub read: Option<Arc<ReadText>>,
    /// How to answer.
    pub generation: GenerationConfig,
    /// What the answer has to be, from [`Blip2::grammar`].
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whether what was read comes back with the answer, in [`Answered::read`].
    pub keep: bool,
}

impl Ask {
    /// Rows of the prompt that were read before and are not read again.
    pub fn n_known(&self) -> usize {
        self.read.as_ref().map_or(0, |read| read.n_shared(&self.prompt))
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
    /// What was read, the prompt and the answer, where that was to be kept. `None` when there were several answers or beams, or
    /// the model reads prompts as a whole.
    pub read: Option<ReadText>,
}

/// Answers that grow together, a token a [`step`](Self::step). Each is what it would be alone, whoever is beside it.
#[derive(Debug)]
pub struct AnswerBatch<'a> {
    stage2: &'a Stage2,
    batch: Batch<'a>,
    members: Vec<Member<'a>>,
}

/// Who waits for an answer.
#[derive(Debug)]
struct Member<'a> {
    id: usize,
    /// One for each of its answers.
    decoders: Vec<StreamDecoder<'a>>,
    /// What it asked, where what was read is to be kept.
    prompt: Option<Prompt>,
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
        Ok(AnswerBatch { stage2, batch: Batch::new(stage2.language_model()), members: Vec::new() })
    }
}

impl<'a> AnswerBatch<'a> {
    /// Whether nobody waits for an answer.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Reads `n` rows of a prompt at once (see [`Batch::with_prompt_rows`]).
    #[must_use]
    pub fn with_prompt_rows(self, n: usize) -> Self {
        Self { batch: self.batch.with_prompt_rows(n), ..self }
    }

    /// How many texts grow; none of a prompt that is not read to its end.
    pub fn n_texts(&self) -> usize {
        self.batch.n_texts()
    }

    /// Memory of the keys and values, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.batch.n_bytes()
    }

    /// Gives back the memory that is kept for the next answers (see [`Batch::rest`]).
    pub fn rest(&mut self) {
        self.batch.rest();
    }

    /// Reads the first rows of newcomers' prompts, all in one pass; gives the name of each. Steps read the rest of those
    /// that are longer.
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
                let n_known = ask.n_known();
                let known = ask.read.as_ref().filter(|_| n_known > 0);
                let embeds = match known {
                    Some(read) => {
                        let words = &ask.prompt.after_image()[n_known - read.n_rows_to_image()..];
                        self.stage2.language_model().embed(words)?
                    }
                    None => self.stage2.embed(&ask.prompt, &ask.soft_tokens)?,
                };
                Ok(Newcomer {
                    beginning: known.map(|read| (read.rows().clone(), n_known)),
                    embeds,
                    config: ask.generation.clone(),
                    seen: self.stage2.seen(&ask.prompt, &ask.generation),
                    constraint: ask.constraint.clone(),
                    keep: ask.keep,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let stage2 = self.stage2;
        let ids = with_rules(stage2, |stop| self.batch.join(prompts, stop))?;
        for (&id, ask) in ids.iter().zip(asks) {
            let decoder = |_| stage2.tokenizer().decode_stream();
            let decoders = (0..ask.generation.num_return_sequences).map(decoder).collect();
            let prompt = ask.keep.then(|| ask.prompt.clone());
            self.members.push(Member { id, decoders, prompt });
        }
        Ok(ids)
    }

    /// What was read for a member up to the end of its picture; `ask` is what it joined with. `None` when it has left, that
    /// is not all read yet, or the model reads prompts as a whole.
    pub fn read_picture(&self, id: usize, ask: &Ask) -> Option<ReadText> {
        let n_rows = ask.prompt.image_at? + ask.soft_tokens.dim(0).ok()?;
        let rows = self.batch.beginning(id, n_rows)?;
        Some(ReadText::new(ask.prompt.before_image(), Vec::new(), rows))
    }

    /// Stops an answer that nobody wants any more.
    pub fn leave(&mut self, id: usize) {
        self.batch.leave(id);
        self.members.retain(|member| member.id != id);
    }

    /// Reads on in long prompts, then gives every answer one more token, as [`Batch::step`] does; gives those that are
    /// complete, which leave.
    ///
    /// # Errors
    /// When the model fails: the batch is then empty.
    pub fn step(&mut self, on_piece: &mut dyn FnMut(Piece<'_>)) -> Result<Vec<Answered>> {
        let (stage2, batch, members) = (self.stage2, &mut self.batch, &mut self.members);
        let on_event = &mut |event: Event<'_>| {
            let Event::Token { prompt: id, sequence, token, log_prob, logits } = event else { return };
            let member = members.iter_mut().find(|member| member.id == id);
            let text = match member.and_then(|member| member.decoders.get_mut(sequence)) {
                Some(decoder) if !stage2.tokenizer().is_control(token) => decoder.push(token),
                _ => String::new(),
            };
            on_piece(Piece { id, sequence, token, text, log_prob, logits });
        };
        let finished = with_rules(stage2, |stop| batch.step(stop, on_event));
        let finished = finished.inspect_err(|_| members.clear())?;
        let answered = finished.into_iter().map(|Finished { id, result, read }| {
            let at = members.iter().position(|member| member.id == id);
            let prompt = at.and_then(|at| members.remove(at).prompt);
            let read = match (prompt, read, &result) {
                (Some(prompt), Some(rows), Ok(texts)) => read_text(&prompt, texts, rows),
                _ => None,
            };
            let answers = result.map(|texts| {
                texts.into_iter().map(|text| stage2.answer(text, stage2.end_tokens(&[]))).collect()
            });
            Answered { id, result: answers, read }
        });
        Ok(answered.collect())
    }
}

/// What was read for the only text after a prompt: all but the text's last token.
fn read_text(prompt: &Prompt, texts: &[Generation], rows: Beginning) -> Option<ReadText> {
    let ([text], Some(_)) = (texts, prompt.image_at) else { return None };
    let (_, read) = text.token_ids.split_last()?;
    Some(ReadText::new(prompt.before_image(), [prompt.after_image(), read].concat(), rows))
}

/// With the rules by which this model's answers end.
fn with_rules<T>(stage2: &Stage2, run: impl FnOnce(&StopRules<'_>) -> T) -> T {
    let decode = |ids: &[u32]| Ok(stage2.tokenizer().decode(ids));
    run(&StopRules::new(stage2.end_tokens(&[])).with_text(&decode))
}
