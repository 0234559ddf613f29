//! What a language model has read about a picture, for the next prompts about it.

use std::sync::Arc;

use crate::cache::Beginning;
use crate::text::Prompt;

/// What a language model has read about a picture. A prompt about the same picture goes on from as much of it as it begins with,
/// token by token: what is equal as text only is read again.
#[derive(Debug)]
pub struct ReadText {
    /// The tokens before the picture.
    before: Vec<u32>,
    /// Those behind it, of the prompt and of its answer.
    after: Vec<u32>,
    rows: Arc<Beginning>,
}

impl ReadText {
    /// The rows of tokens before a picture, of the picture, and of tokens behind it.
    pub(super) fn new(before: &[u32], after: Vec<u32>, rows: Beginning) -> Self {
        Self { before: before.to_vec(), after, rows: Arc::new(rows) }
    }

    /// Its memory, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.rows.n_bytes()
    }

    /// How many rows a prompt about the same picture begins with. An answer starts from the row that is read last, so one is
    /// left; nothing is shared where the picture's own rows are not.
    pub fn n_shared(&self, prompt: &Prompt) -> usize {
        let begins_alike = prompt.image_at.is_some() && self.before == prompt.before_image();
        let Some((_, words)) = prompt.after_image().split_last().filter(|_| begins_alike) else { return 0 };
        let n_words = self.after.iter().zip(words).take_while(|(read, word)| read == word).count();
        self.n_rows_to_image() + n_words
    }

    /// Whether this is `other`, what was read about the same picture, or goes on from it.
    pub fn begins_with(&self, other: &Self) -> bool {
        self.before == other.before && self.after.starts_with(&other.after)
    }

    /// Rows up to the end of the picture.
    pub(super) fn n_rows_to_image(&self) -> usize {
        self.rows.len() - self.after.len()
    }

    pub(super) fn rows(&self) -> &Arc<Beginning> {
        &self.rows
    }
}
