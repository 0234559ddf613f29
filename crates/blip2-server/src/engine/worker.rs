//! The model's thread: between two tokens it lets requests in and out, encodes their pictures, reads their prompts, long ones
//! in parts.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use blip2::generate::GenerationConfig;
use blip2::image::RgbImage;
use blip2::language::LanguageModel;
use blip2::model::{AnswerBatch, Answered, Ask, Blip2, ImageFeatures, Piece, ReadText};
use blip2::sampling::log_sum_exp;
use tokio::sync::mpsc::UnboundedSender;

use super::queue::{Next, Queue};
use super::{Event, Job, Token, Work, Write, Written, kv_bytes, n_texts};
use crate::error::ApiError;
use crate::metrics::{Metrics, Stage};
use crate::picture::{Key, Picture, SeenPicture};
use crate::recent::Recent;

/// What one round between two tokens may take on, so that answers in progress do not wait long for newcomers.
const PICTURES_A_ROUND: usize = 8;
const PROMPT_ROWS_A_ROUND: usize = 768;

pub(super) struct Worker {
    pub(super) model: Arc<Blip2>,
    pub(super) queue: Arc<Queue>,
    pub(super) cache: Arc<Recent<SeenPicture>>,
    /// What the language model has read about pictures.
    pub(super) read: Recent<ReadText>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) batch: usize,
    pub(super) kv_budget: usize,
    pub(super) row_bytes: usize,
    /// Rows of a long prompt that are read between two tokens.
    pub(super) prompt_rows: usize,
}

/// A request for writing that was taken from the queue.
struct NewWrite {
    write: Box<Write>,
    events: UnboundedSender<Event>,
    accepted: Instant,
    span: tracing::Span,
}

/// A request that is being answered.
struct Writing {
    id: usize,
    events: UnboundedSender<Event>,
    accepted: Instant,
    last_token: Option<Instant>,
    top_log_probs: usize,
    picture: Key,
    /// Tokens of its prompt that were read before.
    n_cached: usize,
    /// What is set aside for it of the batch and of the memory.
    n_texts: usize,
    kv_bytes: usize,
    span: tracing::Span,
}

/// Runs every part of the model once, so that the first request is not the first to find a mistake or to wait for memory.
pub(super) fn warm_up(model: &Blip2) -> blip2::Result<()> {
    if model.vision().is_none() {
        return Ok(());
    }
    let features = model.encode(&[RgbImage::new(32, 32)])?;
    if model.language_model().is_some() {
        let generation = GenerationConfig { max_new_tokens: 2, ..GenerationConfig::default() };
        model.caption(&[&features[0]], &generation)?;
    }
    if model.matcher().is_some() {
        model.match_texts(&features[0], &["a"])?;
    }
    Ok(())
}

impl Worker {
    pub(super) fn run(&self) {
        let mut batch = self.new_batch();
        let mut writing: Vec<Writing> = Vec::new();
        loop {
            match self.queue.next(writing.is_empty(), self.admission(&writing)) {
                Next::Closed => return,
                Next::Aborted => {
                    self.queue.drain().into_iter().for_each(|job| job.refuse(ApiError::shutting_down()));
                    let end =
                        |writing: Writing| writing.events.send(Event::Done(Err(ApiError::shutting_down())));
                    return writing.into_iter().for_each(|writing| drop(end(writing)));
                }
                // Memory that the next requests would have used goes to others.
                Next::Nothing => batch.iter_mut().for_each(AnswerBatch::rest),
                Next::Jobs(jobs) => {
                    // A panic is a mistake of the program: whoever was part of it gets an error, the server goes on.
                    let round = AssertUnwindSafe(|| self.round(jobs, batch.as_mut(), &mut writing));
                    if catch_unwind(round).is_err() {
                        self.metrics.panics.fetch_add(1, Ordering::Relaxed);
                        tracing::error!("the model's thread met a mistake of the program and starts anew");
                        for lost in writing.drain(..) {
                            let _ = lost.events.send(Event::Done(Err(ApiError::internal())));
                        }
                        batch = self.new_batch();
                    }
                }
            }
            let kv_bytes = batch.as_ref().map_or(0, AnswerBatch::n_bytes);
            let n_texts = batch.as_ref().map_or(0, AnswerBatch::n_texts);
            self.metrics.kv_bytes.store(kv_bytes, Ordering::Relaxed);
            self.metrics.running_texts.store(n_texts, Ordering::Relaxed);
            self.metrics.cached_picture_bytes.store(self.cache.n_bytes(), Ordering::Relaxed);
            self.metrics.cached_prompt_bytes.store(self.read.n_bytes(), Ordering::Relaxed);
        }
    }

    fn new_batch(&self) -> Option<AnswerBatch<'_>> {
        Some(self.model.answer_batch().ok()?.with_prompt_rows(self.prompt_rows))
    }

    /// Which requests can begin beside those that are being answered.
    fn admission(&self, writing: &[Writing]) -> impl FnMut(&Job) -> bool {
        let mut texts_left = self.batch.saturating_sub(writing.iter().map(|writing| writing.n_texts).sum());
        let mut kv_left = self.kv_budget.saturating_sub(writing.iter().map(|writing| writing.kv_bytes).sum());
        let (mut pictures_left, mut rows_left) = (PICTURES_A_ROUND, PROMPT_ROWS_A_ROUND);
        let mut is_first = true;
        let (mut do_texts_grow, mut is_computing) = (!writing.is_empty(), false);
        move |job| {
            let (n_pictures, n_rows, n_texts, kv_bytes) = match &job.work {
                Work::Write { write, .. } => (
                    usize::from(write.picture.is_new()),
                    self.n_first_rows(write),
                    n_texts(&write.generation),
                    kv_bytes(write, &self.model, self.row_bytes),
                ),
                Work::Compute { pictures, .. } => {
                    (pictures.iter().filter(|picture| picture.is_new()).count(), 0, 0, 0)
                }
            };
            let is_computation = matches!(job.work, Work::Compute { .. });
            // Texts that grow wait for as long as it takes, so they wait for one at a time.
            if is_computation && is_computing && do_texts_grow {
                return false;
            }
            let has_place = n_texts <= texts_left && kv_bytes <= kv_left;
            let is_short = n_pictures <= pictures_left && n_rows <= rows_left;
            // The first may be longer than a round should be: it has to begin some time.
            if !has_place || !(is_short || is_first) {
                return false;
            }
            texts_left -= n_texts;
            kv_left -= kv_bytes;
            pictures_left = pictures_left.saturating_sub(n_pictures);
            rows_left = rows_left.saturating_sub(n_rows);
            is_first = false;
            is_computing |= is_computation;
            do_texts_grow |= !is_computation;
            true
        }
    }

    /// Lets newcomers in and leavers out, then reads on in long prompts and gives every text a token.
    fn round<'m>(&self, jobs: Vec<Job>, mut batch: Option<&mut AnswerBatch<'m>>, writing: &mut Vec<Writing>) {
        if !jobs.is_empty() {
            self.begin(jobs, batch.as_deref_mut(), writing);
        }
        let Some(batch) = batch else { return };
        writing.retain(|writing| {
            let is_wanted = !writing.events.is_closed();
            if !is_wanted {
                batch.leave(writing.id);
            }
            is_wanted
        });
        if !batch.is_empty() {
            self.step(batch, writing);
        }
    }

    fn begin(&self, jobs: Vec<Job>, batch: Option<&mut AnswerBatch<'_>>, writing: &mut Vec<Writing>) {
        let now = Instant::now();
        jobs.iter().for_each(|job| self.metrics.stage(Stage::Wait, now - job.accepted));
        let seen = match self.see(&jobs) {
            Ok(seen) => seen,
            Err(error) => {
                let error = ApiError::library(&error, "image");
                return jobs.into_iter().for_each(|job| job.refuse(error.clone()));
            }
        };
        let mut writes = Vec::new();
        for job in jobs {
            match job.work {
                Work::Write { write, events } => {
                    writes.push(NewWrite { write, events, accepted: job.accepted, span: job.span });
                }
                Work::Compute { pictures, run, is_wanted } => {
                    // Those before it took their time: its client may have left by now.
                    if !is_wanted() {
                        continue;
                    }
                    let start = Instant::now();
                    let _entered = job.span.enter();
                    let pictures: Vec<_> = pictures.iter().map(|picture| seen.of(picture)).collect();
                    let features: Vec<&ImageFeatures> =
                        pictures.iter().map(|picture| &picture.features).collect();
                    run(Ok((&self.model, &features)));
                    self.metrics.stage(Stage::Compute, start.elapsed());
                }
            }
        }
        if let Some(batch) = batch.filter(|_| !writes.is_empty()) {
            self.begin_writing(writes, &seen, batch, writing);
        }
    }

    /// Reads the first rows of newcomers' prompts; who is refused hears of it, the others begin.
    fn begin_writing(
        &self,
        writes: Vec<NewWrite>,
        seen: &Seen,
        batch: &mut AnswerBatch<'_>,
        writing: &mut Vec<Writing>,
    ) {
        let start = Instant::now();
        let (mut asks, mut asking) = (Vec::new(), Vec::new());
        for new in writes {
            let NewWrite { write, events, .. } = &new;
            let Some(soft_tokens) = seen.of(&write.picture).soft_tokens.get().cloned() else {
                let _ = events.send(Event::Done(Err(ApiError::internal())));
                continue;
            };
            asks.push(Ask {
                prompt: write.prompt.clone(),
                soft_tokens,
                read: self.read.best(write.picture.key(), |read| read.n_shared(&write.prompt)),
                generation: write.generation.clone(),
                constraint: write.constraint.clone(),
                keep: self.read.fits(self.n_prompt_rows(write) * self.row_bytes),
            });
            asking.push(new);
        }
        let joined = join(batch, &asks);
        self.metrics.stage(Stage::Prompt, start.elapsed());
        for ((joined, ask), new) in joined.into_iter().zip(&asks).zip(asking) {
            let NewWrite { write, events, accepted, span } = new;
            let id = match joined {
                Ok(id) => id,
                Err(error) => {
                    let _entered = span.enter();
                    let error = ApiError::library(&error, "messages");
                    let _ = events.send(Event::Done(Err(error)));
                    continue;
                }
            };
            let picture = *write.picture.key();
            self.remember_picture(batch, id, ask, picture);
            let n_rows = self.n_prompt_rows(&write);
            let n_cached = ask.n_known();
            self.metrics.prompt_tokens.fetch_add(n_rows as u64, Ordering::Relaxed);
            self.metrics.cached_prompt_tokens.fetch_add(n_cached as u64, Ordering::Relaxed);
            writing.push(Writing {
                id,
                events,
                accepted,
                last_token: None,
                top_log_probs: write.top_log_probs,
                picture,
                n_cached,
                n_texts: n_texts(&write.generation),
                kv_bytes: kv_bytes(&write, &self.model, self.row_bytes),
                span,
            });
        }
    }

    /// What is read of its prompt at most in the round that it begins in.
    fn n_first_rows(&self, write: &Write) -> usize {
        let n_rows = self.n_prompt_rows(write);
        let is_whole = self.model.language_model().is_some_and(LanguageModel::reads_prompts_whole);
        if is_whole { n_rows } else { n_rows.min(self.prompt_rows) }
    }

    fn n_prompt_rows(&self, write: &Write) -> usize {
        write.prompt.n_rows(self.model.config().qformer.num_query_tokens)
    }

    /// Keeps what was read of a picture, unless it was known, for those who ask before this answer is complete.
    fn remember_picture(&self, batch: &AnswerBatch<'_>, id: usize, ask: &Ask, key: Key) {
        if ask.n_known() > 0 || self.read.best(&key, |read| read.n_shared(&ask.prompt)).is_some() {
            return;
        }
        if let Some(read) = batch.read_picture(id, ask) {
            self.remember(key, read);
        }
    }

    /// Keeps what was read about a picture, in the place of its beginnings.
    fn remember(&self, key: Key, read: ReadText) {
        if self.read.best(&key, |known| usize::from(known.begins_with(&read))).is_some() {
            return;
        }
        let n_bytes = read.n_bytes();
        let read = Arc::new(read);
        self.read.insert_for(key, read.clone(), n_bytes, |known| read.begins_with(known));
    }

    /// Encodes the pictures that are new, each once, and makes the soft tokens of those that are written about.
    fn see(&self, jobs: &[Job]) -> blip2::Result<Seen> {
        let start = Instant::now();
        let pictures = jobs.iter().flat_map(|job| match &job.work {
            Work::Write { write, .. } => std::slice::from_ref(&write.picture),
            Work::Compute { pictures, .. } => pictures.as_slice(),
        });
        let mut seen = Seen::default();
        let mut new: Vec<(Key, &[f32])> = Vec::new();
        for picture in pictures {
            let Picture::New { key, pixels } = picture else { continue };
            if seen.0.contains_key(key) || new.iter().any(|(known, _)| known == key) {
                continue;
            }
            match self.cache.get(key) {
                Some(known) => drop(seen.0.insert(*key, known)),
                None => new.push((*key, pixels.as_slice())),
            }
        }
        let n_new = new.len();
        let n_bytes = self.picture_bytes();
        for group in new.chunks(PICTURES_A_ROUND) {
            let Some(vision) = self.model.vision() else { break };
            let pixels: Vec<f32> = group.iter().flat_map(|(_, pixels)| *pixels).copied().collect();
            let rows = vision.encode(&pixels)?;
            for ((key, _), rows) in group.iter().zip(rows.chunks_exact(vision.n_tokens() * vision.width())) {
                let features = ImageFeatures::from_rows(rows.to_vec(), vision.width())?;
                let picture = Arc::new(SeenPicture { key: *key, features, soft_tokens: OnceLock::new() });
                self.cache.insert(*key, picture.clone(), n_bytes);
                seen.0.insert(*key, picture);
            }
        }
        let mut without: Vec<Arc<SeenPicture>> = Vec::new();
        for job in jobs {
            let Work::Write { write, .. } = &job.work else { continue };
            let picture = seen.of(&write.picture);
            if picture.soft_tokens.get().is_none()
                && !without.iter().any(|known| Arc::ptr_eq(known, &picture))
            {
                without.push(picture);
            }
        }
        if !without.is_empty() {
            let features: Vec<&ImageFeatures> = without.iter().map(|picture| &picture.features).collect();
            for (picture, soft_tokens) in without.iter().zip(self.model.soft_tokens(&features)?) {
                let _ = picture.soft_tokens.set(soft_tokens);
            }
        }
        if n_new + without.len() > 0 {
            self.metrics.stage(Stage::Encode, start.elapsed());
        }
        Ok(seen)
    }

    /// Memory of what was seen in a picture: its features and its soft tokens.
    fn picture_bytes(&self) -> usize {
        let features = self.model.vision().map_or(0, |vision| vision.n_tokens() * vision.width());
        let hidden_size = self.model.language_model().map_or(0, LanguageModel::hidden_size);
        let soft_tokens = self.model.config().qformer.num_query_tokens * hidden_size;
        (features + soft_tokens) * size_of::<f32>()
    }

    fn step(&self, batch: &mut AnswerBatch<'_>, writing: &mut Vec<Writing>) {
        let start = Instant::now();
        // There are none while the only prompts are long ones that are being read.
        if batch.n_texts() > 0 {
            self.metrics.batch(batch.n_texts());
        }
        let answered = batch.step(&mut |piece| {
            self.metrics.generated_tokens.fetch_add(1, Ordering::Relaxed);
            if let Some(writing) = writing.iter_mut().find(|writing| writing.id == piece.id) {
                if piece.sequence == 0 {
                    writing.count(&self.metrics);
                }
                let _ = writing.events.send(Event::Token(token(piece, writing.top_log_probs)));
            }
        });
        self.metrics.stage(Stage::Step, start.elapsed());
        match answered {
            Ok(answered) => {
                for Answered { id, result, read } in answered {
                    let Some(at) = writing.iter().position(|writing| writing.id == id) else { continue };
                    let mut done = writing.swap_remove(at);
                    let _entered = done.span.clone().entered();
                    if let (None, Ok(answers)) = (done.last_token, &result) {
                        // Beams show nothing before their end.
                        done.count(&self.metrics);
                        let n_tokens = answers.iter().map(|answer| answer.token_ids.len()).sum::<usize>();
                        self.metrics.generated_tokens.fetch_add(n_tokens as u64, Ordering::Relaxed);
                    }
                    // Before its client can send the next turn.
                    if let Some(read) = read {
                        self.remember(done.picture, read);
                    }
                    let result = result.map_err(|error| ApiError::library(&error, "messages"));
                    let result = result.map(|answers| Written { answers, n_cached: done.n_cached });
                    let _ = done.events.send(Event::Done(result));
                }
            }
            Err(error) => {
                tracing::error!(%error, "the language model failed");
                for lost in writing.drain(..) {
                    let _ = lost.events.send(Event::Done(Err(ApiError::internal())));
                }
            }
        }
    }
}

impl Writing {
    /// A token came.
    fn count(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => metrics.first_token(now - self.accepted),
            Some(last) => metrics.next_token(now - last),
        }
    }
}

/// The pictures of a round.
#[derive(Default)]
struct Seen(HashMap<Key, Arc<SeenPicture>>);

impl Seen {
    fn of(&self, picture: &Picture) -> Arc<SeenPicture> {
        match picture {
            Picture::Seen(seen) => seen.clone(),
            Picture::New { key, .. } => self.0[key].clone(),
        }
    }
}

/// Reads the first rows of newcomers' prompts, all in one pass; gives the name of each. A pass that fails lets none in: then
/// each is read alone, so that a prompt that is refused is nobody else's affair.
fn join(batch: &mut AnswerBatch<'_>, asks: &[Ask]) -> Vec<blip2::Result<usize>> {
    match batch.join(asks) {
        Ok(ids) => ids.into_iter().map(Ok).collect(),
        Err(error) if asks.len() == 1 => vec![Err(error)],
        Err(_) => asks.iter().flat_map(|ask| join(batch, std::slice::from_ref(ask))).collect(),
    }
}

fn token(piece: Piece<'_>, top_log_probs: usize) -> Token {
    let Piece { sequence, token: id, text, log_prob, logits, .. } = piece;
    Token { sequence, id, text, log_prob, top: likeliest(logits, top_log_probs) }
}

/// The `n` likeliest tokens and their log-probabilities, the likeliest first.
fn likeliest(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    if n == 0 {
        return Vec::new();
    }
    let norm = log_sum_exp(logits);
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    for (token, &logit) in (0..).zip(logits) {
        if best.len() < n || best.last().is_some_and(|&(_, least)| logit > least) {
            let at = best.partition_point(|&(_, other)| other >= logit);
            best.insert(at, (token, logit));
            best.truncate(n);
        }
    }
    best.into_iter().map(|(token, logit)| (token, logit - norm)).collect()
}

// A request is handed from its handler to this thread.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Job>();
    is_send::<Write>();
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_sum_to_one() {
        let logits = [0.0, 3.0, 1.0, 3.0, f32::NEG_INFINITY];
        let top = likeliest(&logits, 2);
        assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3]);
        let sum: f32 = likeliest(&logits, 9).iter().map(|(_, log_prob)| log_prob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        assert!(likeliest(&logits, 0).is_empty());
    }
}
