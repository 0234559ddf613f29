//! A conversation about one picture.

use std::ops::ControlFlow;

use candle_core::Tensor;

use super::stage2::Stage2;
use super::{Answer, Blip2, ImageFeatures};
use crate::cache::{CachedSequence, KvCache};
use crate::generate::{Event, GenerationConfig, Session};
use crate::text::{Prompt, Turn};
use crate::{Error, Result};

/// A conversation: it remembers its turns, and what the language model has read of them.
#[derive(Debug)]
pub struct Chat<'a> {
    stage2: &'a Stage2,
    soft_tokens: Tensor,
    turns: Vec<Turn>,
    cache: KvCache,
    /// What the cache holds: the rows of this prompt.
    read: (Prompt, CachedSequence),
}

impl Blip2 {
    /// Begins a conversation about a picture.
    ///
    /// # Errors
    /// When the model has no stage-2 part.
    pub fn chat(&self, features: &ImageFeatures) -> Result<Chat<'_>> {
        let stage2 = self.stage2()?;
        Ok(Chat {
            stage2,
            soft_tokens: stage2.soft_tokens(&[features])?.remove(0),
            turns: Vec::new(),
            cache: stage2.language_model().new_cache(),
            read: (Prompt::default(), CachedSequence::new()),
        })
    }
}

impl Chat<'_> {
    /// The turns so far.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// Goes on from turns that were had before (another session, another process); what was said so far is replaced.
    pub fn resume(&mut self, turns: Vec<Turn>) {
        self.turns = turns;
    }

    /// Asks something; `on_text` receives the answer's text as it grows (with beams, only when it is complete) and may
    /// break it off. Turns that no longer fit the language model's context are forgotten, the oldest first.
    ///
    /// # Errors
    /// When the question is empty or too long, or more than one answer is asked for; the conversation is then as it was.
    pub fn ask(
        &mut self,
        question: &str,
        generation: &GenerationConfig,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        if generation.num_return_sequences != 1 {
            return Err(Error::Request("a conversation goes on with one answer: ask for one".into()));
        }
        self.turns.push(Turn::open(question));
        let answer = self.answer(generation, on_text);
        match &answer {
            Ok(answer) if !answer.text.is_empty() => {
                if let Some(turn) = self.turns.last_mut() {
                    turn.answer = Some(answer.text.clone());
                }
            }
            // A turn without an answer cannot be part of a dialogue.
            _ => drop(self.turns.pop()),
        }
        answer
    }

    fn answer(
        &mut self,
        generation: &GenerationConfig,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        // Room for the answer, but never so much that no question would fit.
        let room = generation.max_new_tokens.min(self.stage2.language_model().context_len() / 2);
        let prompt = self.stage2.conversation(&self.turns, room)?;
        let rows = self.stage2.embed(&prompt, &self.soft_tokens)?;
        let (read, mut sequence) = std::mem::take(&mut self.read);
        // Only what the cache does not hold yet is read; at least one row, since the answer starts from its logits.
        let mut n_same = shared_rows(&read, &prompt, self.stage2.n_queries()).min(rows.dim(0)? - 1);
        if self.stage2.language_model().reads_prompts_whole() {
            (n_same, sequence) = (0, CachedSequence::new());
        }
        sequence.truncate(n_same);
        let new_rows = rows.narrow(0, n_same, rows.dim(0)? - n_same)?;
        self.cache.trim([&sequence]);
        let mut session =
            Session::new(self.stage2.language_model(), &mut self.cache, vec![(sequence, new_rows)])?;
        let mut decoder = self.stage2.tokenizer().decode_stream();
        let mut streamed = false;
        let prompts = std::slice::from_ref(&prompt);
        let mut answers = self.stage2.continue_prompts(
            &mut session,
            prompts,
            generation,
            None,
            &mut |event| match event {
                Event::Token { token, .. } if !self.stage2.tokenizer().is_control(token) => {
                    streamed = true;
                    on_text(&decoder.push(token))
                }
                _ => ControlFlow::Continue(()),
            },
        )?;
        let sequence = session.finish().pop().unwrap_or_default();
        self.read = (prompt, sequence);
        let answer = answers.pop().and_then(|mut of_prompt| of_prompt.pop());
        let answer = answer.ok_or_else(|| Error::Request("the language model gave no answer".into()))?;
        if streamed {
            let _ = on_text(&decoder.finish());
        } else {
            let _ = on_text(&answer.text);
        }
        Ok(answer)
    }
}

/// How many rows two prompts have in common at the beginning.
fn shared_rows(read: &Prompt, next: &Prompt, n_queries: usize) -> usize {
    if read.image_at != next.image_at {
        return 0;
    }
    let n = read.ids.iter().zip(&next.ids).take_while(|(a, b)| a == b).count();
    match next.image_at {
        // The picture's rows are the same, so they count as soon as all words before them do.
        Some(at) if n >= at => n + n_queries,
        _ => n,
    }
}
