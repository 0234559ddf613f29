//! Texts that grow together while prompts come and go: continuous batching.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use candle_core::Tensor;

use super::session::{check_length, extend, read_prompts};
use super::{
    Constraint, Event, Generation, GenerationConfig, Growth, Limit, OnEvent, Rules, StopRules, check, place,
};
use crate::Result;
use crate::cache::{Beginning, CachedSequence, KvCache};
use crate::language::LanguageModel;

/// Rows of a prompt that a [`Batch`] reads between two tokens, unless it was told [otherwise](Batch::with_prompt_rows): the
/// picture and a question of ordinary length at once, and few enough that nobody waits long.
pub const PROMPT_ROWS_A_STEP: usize = 256;

/// Texts that grow together, a token a [`step`](Self::step). Between steps prompts [`join`](Self::join) and
/// [`leave`](Self::leave), each with a configuration of its own. What is written after a prompt is what
/// [`generate`](super::generate) writes after it alone, whoever is beside it.
///
/// A long prompt is read in parts, so that the texts beside it grow meanwhile and it can leave before it is read; an
/// encoder-decoder model's is read whole, as each of its rows sees all others.
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
    /// The logits that texts go on from, a row for each of `live`.
    logits: Vec<f32>,
    /// Prompts of which more is to be read, in the order they came.
    readers: Vec<Reader>,
    /// How many rows of a prompt are read at once.
    prompt_rows: usize,
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

/// A prompt that is being read.
#[derive(Debug)]
struct Reader {
    id: usize,
    prompt: Newcomer,
    /// What was read of it.
    sequence: CachedSequence,
    /// Rows of its `embeds` that were read.
    n_read: usize,
    limit: Limit,
    /// It came after the last step.
    is_new: bool,
}

impl Reader {
    fn n_rows(&self) -> usize {
        self.prompt.embeds.dims()[0]
    }

    /// The next rows, `n` of them if there are as many.
    fn next_rows(&self, n: usize) -> Result<Tensor> {
        Ok(self.prompt.embeds.narrow(0, self.n_read, n.min(self.n_rows() - self.n_read))?)
    }
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
            logits: Vec::new(),
            n_joined: 0,
            readers: Vec::new(),
            prompt_rows: PROMPT_ROWS_A_STEP,
            next_id: 0,
        }
    }

    /// Reads `n` rows of a prompt at once, at least one.
    #[must_use]
    pub fn with_prompt_rows(self, n: usize) -> Self {
        Self { prompt_rows: n.max(1), ..self }
    }

    /// How many prompts it has.
    pub fn len(&self) -> usize {
        self.members.len() + self.readers.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many texts grow; none of a prompt that is not read to its end.
    pub fn n_texts(&self) -> usize {
        self.members.iter().map(|member| member.growth.n_running()).sum()
    }

    /// Memory of its keys and values, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.cache.n_bytes()
    }

    /// Lets prompts in and reads their first rows, all in one pass; gives the names of the new members. Steps read the
    /// rest of those that are longer.
    ///
    /// # Errors
    /// As [`generate`](super::generate) and [`Session::new`](super::Session::new); then none has joined, and the others
    /// have not noticed.
    pub fn join(&mut self, prompts: Vec<Newcomer>, stop: &StopRules<'_>) -> Result<Vec<usize>> {
        let (n_rows, n_memory_rows) = (self.cache.n_rows(), self.cache.n_memory_rows());
        let (n_readers, first) = (self.readers.len(), self.next_id);
        let begun = prompts.into_iter().try_for_each(|prompt| self.begin(prompt, stop));
        let read = begun.and_then(|()| self.read_on(n_readers..self.readers.len(), self.prompt_rows));
        read.inspect_err(|_| {
            self.readers.truncate(n_readers);
            self.next_id = first;
            self.cache.rewind(n_rows);
            self.cache.rewind_memory(n_memory_rows);
        })?;
        Ok((first..self.next_id).collect())
    }

    /// Lets a prompt in, with the rows of its beginning. What is wrong with its configuration or its length is found here,
    /// before a row of it is read.
    fn begin(&mut self, mut prompt: Newcomer, stop: &StopRules<'_>) -> Result<()> {
        check(&prompt.config, stop)?;
        let sequence = match prompt.beginning.take() {
            Some((beginning, n_rows)) => self.cache.begin(&beginning, n_rows)?,
            None => CachedSequence::new(),
        };
        let n_new = prompt.embeds.dims2()?.0;
        check_length(self.model, &sequence, n_new)?;
        // An encoder's rows are not among those of the answer, which begins with a token of its own.
        let is_whole = self.model.reads_prompts_whole();
        let n_before_answer = if is_whole { 1 } else { sequence.len() + n_new };
        let room = self.model.context_len() - n_before_answer;
        let limit = Limit::new(&prompt.config, prompt.seen.len(), room)?;
        self.readers.push(Reader { id: self.next_id, prompt, sequence, n_read: 0, limit, is_new: true });
        self.next_id += 1;
        Ok(())
    }

    /// Reads the next rows of these readers, at most `n_rows` of each and all in one pass; texts begin to grow after
    /// those that are then read. When the model fails nothing has changed.
    fn read_on(&mut self, which: Range<usize>, n_rows: usize) -> Result<()> {
        if which.is_empty() {
            return Ok(());
        }
        let n_rows = if self.model.reads_prompts_whole() { usize::MAX } else { n_rows };
        let readers = &self.readers[which.clone()];
        let mut sequences: Vec<_> = readers.iter().map(|reader| reader.sequence.clone()).collect();
        let embeds = readers.iter().map(|reader| reader.next_rows(n_rows)).collect::<Result<Vec<_>>>()?;
        let logits = read_prompts(self.model, &mut self.cache, &mut sequences, &embeds)?;
        let later = self.readers.split_off(which.end);
        let read = self.readers.split_off(which.start);
        let rows = logits.chunks_exact(self.model.vocab_size());
        for (((mut reader, sequence), embeds), row) in read.into_iter().zip(sequences).zip(embeds).zip(rows) {
            reader.sequence = sequence;
            reader.n_read += embeds.dims()[0];
            if reader.n_read == reader.n_rows() {
                self.grow(reader, row);
            } else {
                self.readers.push(reader);
            }
        }
        self.readers.extend(later);
        Ok(())
    }

    /// Texts that go on after a prompt that was read, with the scores of their first token.
    fn grow(&mut self, reader: Reader, logits: &[f32]) {
        let Reader { id, prompt, sequence, limit, .. } = reader;
        let Newcomer { config, seen, constraint, keep, .. } = prompt;
        let growth = Growth::new(&config, self.live.len(), constraint);
        // Draws part at their first token, each from a copy; beams are one text until then.
        let n = growth.n_running();
        self.live.extend(std::iter::repeat_n(sequence, n));
        (0..n).for_each(|_| self.joined.extend(logits));
        self.members.push(Member { id, config, seen, limit, growth, keep });
        self.n_joined += 1;
    }

    /// A copy of what was read of the first `n_rows` rows of a prompt, for other prompts that begin alike. `None` when it is
    /// not here, has fewer or these are not all read yet, or the model reads prompts as a whole.
    pub fn beginning(&self, id: usize, n_rows: usize) -> Option<Beginning> {
        if let Some(reader) = self.readers.iter().find(|reader| reader.id == id) {
            return self.cache.beginning(&reader.sequence, n_rows);
        }
        let at = self.members.iter().position(|member| member.id == id)?;
        let row = self.members[at].growth.unread().first()?.parent;
        self.cache.beginning(&self.live[row], n_rows)
    }

    /// Forgets a prompt, read to its end or not, and what was written after it; nothing when it is not here.
    pub fn leave(&mut self, id: usize) {
        if let Some(at) = self.readers.iter().position(|reader| reader.id == id) {
            self.readers.remove(at);
            return self.tidy();
        }
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

    /// Reads on in the prompts that were longer than what is read at once, all of them together as many rows as one of
    /// them alone; then gives every text one more token. `on_event` names prompts by their ids. Gives the members that
    /// are complete, which leave.
    ///
    /// # Errors
    /// When the model fails: the batch is then empty.
    pub fn step(
        &mut self,
        stop: &StopRules<'_>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<Finished>> {
        self.read().inspect_err(|_| {
            *self =
                Self { next_id: self.next_id, ..Self::new(self.model).with_prompt_rows(self.prompt_rows) };
        })?;
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
            match growth.step(&self.logits, vocab_size, &rules, on_event, &mut false) {
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

    /// Reads on in prompts, then the last tokens of all texts that have one, for the logits of all.
    fn read(&mut self) -> Result<()> {
        // The new ones, which are the last, have had their part.
        let n_due = self.readers.iter().take_while(|reader| !reader.is_new).count();
        self.readers.iter_mut().for_each(|reader| reader.is_new = false);
        let share = (self.prompt_rows / n_due.max(1)).max(1);
        self.read_on(0..n_due, share)?;
        let unread: Vec<_> = self.members.iter().flat_map(|member| member.growth.unread()).collect();
        extend(self.model, &mut self.cache, &mut self.live, &unread, &mut self.logits)?;
        self.logits.append(&mut self.joined);
        self.n_joined = 0;
        place(self.members.iter_mut().map(|member| &mut member.growth));
        Ok(())
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

    /// Gives back the memory that is kept for the next prompts; nothing while there are any.
    pub fn rest(&mut self) {
        if self.is_empty() {
            self.cache = self.model.new_cache();
            self.logits = Vec::new();
        }
    }

    /// Forgets the keys and values of texts that are no more, where they are as many as the others'.
    fn tidy(&mut self) {
        let unread = self.readers.iter().map(|reader| &reader.sequence);
        let mut held: Vec<_> = self.live.iter().chain(unread).cloned().collect();
        if self.is_empty() || 2 * self.cache.n_rows_of(&held) < self.cache.n_rows() {
            self.cache.compact(&mut held);
            let unread = self.readers.iter_mut().map(|reader| &mut reader.sequence);
            self.live.iter_mut().chain(unread).zip(held).for_each(|(text, moved)| *text = moved);
        }
    }
}
