//! Texts that grow together while prompts come and go: continuous batching.

use std::ops::ControlFlow;
use std::sync::Arc;

use candle_core::Tensor;

use super::session::{extend, read_prompts};
use super::{
    Constraint, Event, Generation, GenerationConfig, Growth, Limit, OnEvent, Rules, StopRules, check, place,
};
use crate::Result;
use crate::cache::{Beginning, CachedSequence, KvCache};
use crate::language::LanguageModel;

/// Texts that grow together, a token a [`step`](Self::step). Between steps prompts [`join`](Self::join) and
/// [`leave`](Self::leave), each with a configuration of its own. What is written after a prompt is what
/// [`generate`](super::generate) writes after it alone, whoever is beside it.
#[derive(Debug)]
pub struct Batch<'a> {
    model: &'a LanguageModel,
    cache: KvCache,
    members: Vec<Member>,
    /// The running texts of all members, in their order.
    live: Vec<CachedSequence>,
    /// The last members, whose texts have no token yet.
    n_joined: usize,
    /// The logits that their texts begin with, a row a text.
    joined: Vec<f32>,
    next_id: usize,
}

/// A prompt and its texts.
struct Member {
    id: usize,
    config: GenerationConfig,
    seen: Vec<u32>,
    limit: Limit,
    growth: Growth,
    keep: bool,
}

/// A prompt that joins.
#[derive(Debug)]
pub struct Newcomer {
    /// What was read before, from [`Batch::beginning`] or [`Finished::read`], and how many of its rows this prompt begins
    /// with.
    pub beginning: Option<(Arc<Beginning>, usize)>,
    /// Its rows, `[n, hidden_size]`, but for those of its beginning; at least one.
    pub embeds: Tensor,
    /// Its own configuration.
    pub config: GenerationConfig,
    /// Tokens that the rules of generation see before the generated ones.
    pub seen: Vec<u32>,
    /// What its texts have to be.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whether what was read comes back at the end, in [`Finished::read`].
    pub keep: bool,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").field("id", &self.id).field("config", &self.config).finish_non_exhaustive()
    }
}

/// A prompt that left by itself: its texts are complete.
#[derive(Debug)]
pub struct Finished {
    /// What [`Batch::join`] called it.
    pub id: usize,
    /// Its texts, as [`generate`](super::generate) orders them; an error when the model's scores are not numbers.
    pub result: Result<Vec<Generation>>,
    /// What was read, where that was to be kept: the prompt and its text but for the last token, which nothing was asked of.
    /// `None` when there were several texts or beams, it failed, or the model reads prompts as a whole.
    pub read: Option<Beginning>,
}

impl<'a> Batch<'a> {
    /// Nobody's yet.
    pub fn new(model: &'a LanguageModel) -> Self {
        Self {
            model,
            cache: model.new_cache(),
            members: Vec::new(),
            live: Vec::new(),
            joined: Vec::new(),
            n_joined: 0,
            next_id: 0,
        }
    }

    /// How many prompts it has.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// How many texts grow: what one step computes.
    pub fn n_texts(&self) -> usize {
        self.members.iter().map(|member| member.growth.n_running()).sum()
    }

    /// Memory of its keys and values, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.cache.n_bytes()
    }

    /// Reads prompts, all in one pass; gives the names of the new members.
    ///
    /// # Errors
    /// As [`generate`](super::generate) and [`Session::new`](super::Session::new); then none has joined, and the others
    /// have not noticed.
    pub fn join(&mut self, prompts: Vec<Newcomer>, stop: &StopRules<'_>) -> Result<Vec<usize>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        prompts.iter().try_for_each(|prompt| check(&prompt.config, stop))?;
        let embeds: Vec<_> = prompts.iter().map(|prompt| prompt.embeds.clone()).collect();
        let (n_rows, n_memory_rows) = (self.cache.n_rows(), self.cache.n_memory_rows());
        let mut sequences = Vec::new();
        let read = self.begin(&prompts, &mut sequences).and_then(|()| {
            let logits = read_prompts(self.model, &mut self.cache, &mut sequences, &embeds)?;
            let room = |sequence: &CachedSequence| self.model.context_len() - sequence.len();
            let limits = prompts
                .iter()
                .zip(&sequences)
                .map(|(prompt, read)| Limit::new(&prompt.config, prompt.seen.len(), room(read)));
            Ok((logits, limits.collect::<Result<Vec<_>>>()?))
        });
        let (logits, limits) = read.inspect_err(|_| {
            self.cache.rewind(n_rows);
            self.cache.rewind_memory(n_memory_rows);
        })?;
        let first = self.next_id;
        let rows = logits.chunks_exact(self.model.vocab_size());
        for (((prompt, limit), sequence), row) in prompts.into_iter().zip(limits).zip(sequences).zip(rows) {
            let Newcomer { config, seen, constraint, keep, .. } = prompt;
            let growth = Growth::new(&config, self.live.len(), constraint);
            // Draws part at their first token, each from a copy; beams are one text until then.
            let n = growth.n_running();
            self.live.extend(std::iter::repeat_n(sequence, n));
            (0..n).for_each(|_| self.joined.extend(row));
            self.members.push(Member { id: self.next_id, config, seen, limit, growth, keep });
            self.next_id += 1;
            self.n_joined += 1;
        }
        Ok((first..self.next_id).collect())
    }

    /// A sequence for each prompt, with the rows of its beginning.
    fn begin(&mut self, prompts: &[Newcomer], sequences: &mut Vec<CachedSequence>) -> Result<()> {
        for prompt in prompts {
            sequences.push(match &prompt.beginning {
                Some((beginning, n_rows)) => self.cache.begin(beginning, *n_rows)?,
                None => CachedSequence::new(),
            });
        }
        Ok(())
    }

    /// A copy of what was read of the first `n_rows` rows of a prompt, for other prompts that begin alike. `None` when it is
    /// not here or has fewer, or the model reads prompts as a whole.
    pub fn beginning(&self, id: usize, n_rows: usize) -> Option<Beginning> {
        let at = self.members.iter().position(|member| member.id == id)?;
        let row = self.members[at].growth.unread().first()?.parent;
        self.cache.beginning(&self.live[row], n_rows)
    }

    /// Forgets a prompt and what was written after it; nothing when it is not here.
    pub fn leave(&mut self, id: usize) {
        let Some(at) = self.members.iter().position(|member| member.id == id) else { return };
        let first_joined = self.members.len() - self.n_joined;
        if at >= first_joined {
            let n_texts = |members: &[Member]| members.iter().map(|m| m.growth.n_running()).sum::<usize>();
            let vocab_size = self.model.vocab_size();
            let start = n_texts(&self.members[first_joined..at]) * vocab_size;
            let end = start + self.members[at].growth.n_running() * vocab_size;
            self.joined.drain(start..end);
            self.n_joined -= 1;
        }
        self.members.remove(at);
        self.rearrange();
        self.tidy();
    }

    /// Gives every text one more token; `on_event` names prompts by their ids. Gives the members that are complete, which
    /// leave.
    ///
    /// # Errors
    /// When the model fails: the batch is then empty.
    pub fn step(
        &mut self,
        stop: &StopRules<'_>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<Finished>> {
        let logits =
            self.read().inspect_err(|_| *self = Self { next_id: self.next_id, ..Self::new(self.model) })?;
        let vocab_size = self.model.vocab_size();
        let on_event: OnEvent<'_> = &mut |event| {
            on_event(event);
            ControlFlow::Continue(())
        };
        let mut finished = Vec::new();
        let mut kept = Vec::with_capacity(self.members.len());
        for mut member in std::mem::take(&mut self.members) {
            let Member { id, ref config, ref seen, limit, ref mut growth, keep } = member;
            let rules = Rules { prompt: id, config, stop, seen, limit };
            // A complete text has no row any more.
            let row = growth.only_row().filter(|_| keep);
            match growth.step(&logits, vocab_size, &rules, on_event, &mut false) {
                Err(error) => finished.push(Finished { id, result: Err(error), read: None }),
                Ok(()) if growth.n_running() > 0 => kept.push(member),
                Ok(()) => {
                    let texts = member.growth.into_texts(&member.config);
                    let read = row.map(|row| &self.live[row]);
                    let read = read.and_then(|text| self.cache.beginning(text, text.len()));
                    finished.push(Finished { id, result: Ok(texts), read });
                }
            }
        }
        self.members = kept;
        if !finished.is_empty() {
            self.rearrange();
            self.tidy();
        }
        Ok(finished)
    }

    /// Reads the last tokens of all texts that have one, and gives the logits of all: a row for each of `live`.
    fn read(&mut self) -> Result<Vec<f32>> {
        let unread: Vec<_> = self.members.iter().flat_map(|member| member.growth.unread()).collect();
        let mut logits = extend(self.model, &mut self.cache, &mut self.live, &unread)?;
        logits.append(&mut self.joined);
        self.n_joined = 0;
        place(self.members.iter_mut().map(|member| &mut member.growth));
        Ok(logits)
    }

    /// After members left: `live` is what the others go on from.
    fn rearrange(&mut self) {
        let mut parents = Vec::new();
        for member in &mut self.members {
            // Texts that part from one row keep sharing it.
            let rows: Vec<usize> = member.growth.unread().iter().map(|text| text.parent).collect();
            member.growth.place(parents.len());
            parents.extend(rows);
        }
        self.live = parents.into_iter().map(|row| self.live[row].clone()).collect();
    }

    /// Gives back the memory of texts that are no more.
    fn tidy(&mut self) {
        if self.members.is_empty() {
            self.cache = self.model.new_cache();
        } else if 2 * self.cache.n_rows_of(&self.live) < self.cache.n_rows() {
            self.cache.compact(&mut self.live);
        }
    }
}
