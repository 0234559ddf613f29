//! The language model's input rows for some pictures, and what is to be learned from which.

use blip2::language::Branched;
use blip2::text::Prompt;

use crate::{Error, Result};

/// The rows of a part of a batch.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// All words, in order.
    pub(super) words: Vec<u32>,
    /// For each input row, its row in the table of soft tokens and then words.
    pub(super) table_rows: Vec<u32>,
    pub(super) texts: Vec<Branched>,
    /// The rows that predict the targets.
    pub(super) predicting: Vec<u32>,
    pub(super) targets: Vec<u32>,
    /// What each target counts.
    pub(super) weights: Vec<f32>,
    /// Rows of the table before the words.
    n_soft_tokens: usize,
}

impl Rows {
    /// Of the prompts of each picture and its weight; `decoder_start` is that of an encoder-decoder model.
    ///
    /// # Errors
    /// When a picture has no prompt, its prompts do not begin alike, or the model cannot read them.
    pub(super) fn of(
        pictures: &[Vec<Prompt>],
        weights: &[f32],
        n_queries: usize,
        decoder_start: Option<u32>,
    ) -> Result<Self> {
        let mut rows = Self { n_soft_tokens: pictures.len() * n_queries, ..Self::default() };
        for (picture, prompts) in pictures.iter().enumerate() {
            if prompts.is_empty() {
                return Err(Error::Training("a picture has no text to learn".into()));
            }
            let soft_tokens = picture * n_queries..(picture + 1) * n_queries;
            let soft_tokens: Vec<u32> = soft_tokens.map(|row| row as u32).collect();
            match decoder_start {
                None => rows.push_text(prompts, &soft_tokens)?,
                Some(start) => rows.push_pairs(prompts, &soft_tokens, start)?,
            }
            rows.weights.resize(rows.targets.len(), weights[picture]);
        }
        Ok(rows)
    }

    /// For a decoder-only model: what the prompts have in common, then the rest of each.
    fn push_text(&mut self, prompts: &[Prompt], soft_tokens: &[u32]) -> Result<()> {
        let first = &prompts[0];
        let start = self.table_rows.len();
        let common = common_length(prompts);
        self.push_words(first.before_image());
        self.table_rows.extend_from_slice(soft_tokens);
        self.push_words(&first.after_image()[..common]);
        let shared = self.table_rows.len() - start;
        let mut continuations = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            if prompt.image_at.is_none() || prompt.before_image() != first.before_image() {
                return Err(Error::Training(
                    "the texts of a picture do not begin alike up to the picture".into(),
                ));
            }
            let own_start = self.table_rows.len();
            self.push_words(&prompt.after_image()[common..]);
            continuations.push(self.table_rows.len() - own_start);
            for (row, token) in prompt.targets(soft_tokens.len()) {
                let row = if row < shared { start + row } else { own_start + row - shared };
                self.predicting.push(row as u32);
                self.targets.push(token);
            }
        }
        self.texts.push(Branched { shared, continuations });
        Ok(())
    }

    /// For an encoder-decoder model: what the encoder reads, then the answers to it; every row of an answer predicts.
    fn push_pairs(&mut self, prompts: &[Prompt], soft_tokens: &[u32], decoder_start: u32) -> Result<()> {
        let mut pairs = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let pair = prompt.image_at.zip(prompt.read_and_written()).ok_or_else(|| {
                Error::Training(
                    "a text has no picture, or not one answer at its end, as an encoder-decoder model reads them: the \
                     `prompt` of such a model is of the kind `plain`, with `eos = true`"
                        .into(),
                )
            })?;
            pairs.push(pair);
        }
        while let Some(&(image_at, (read, _))) = pairs.first() {
            let start = self.table_rows.len();
            self.push_words(&read[..image_at]);
            self.table_rows.extend_from_slice(soft_tokens);
            self.push_words(&read[image_at..]);
            let shared = self.table_rows.len() - start;
            let mut continuations = Vec::new();
            pairs.retain(|&(at, (other, written))| {
                let is_answer = (at, other) == (image_at, read);
                if is_answer {
                    let first = self.table_rows.len() as u32;
                    self.push_words(
                        &[&[decoder_start], &written[..written.len().saturating_sub(1)]].concat(),
                    );
                    self.predicting.extend(first..self.table_rows.len() as u32);
                    self.targets.extend_from_slice(written);
                    continuations.push(written.len());
                }
                !is_answer
            });
            self.texts.push(Branched { shared, continuations });
        }
        Ok(())
    }

    fn push_words(&mut self, ids: &[u32]) {
        let first = self.n_soft_tokens + self.words.len();
        self.table_rows.extend((first..first + ids.len()).map(|row| row as u32));
        self.words.extend_from_slice(ids);
    }
}

/// How many tokens after the picture all `prompts` have in common, leaving each one of its own: the instruction, or more.
fn common_length(prompts: &[Prompt]) -> usize {
    let texts = || prompts.iter().map(Prompt::after_image);
    let most = texts().map(<[u32]>::len).min().unwrap_or(0).saturating_sub(1);
    (0..most).take_while(|&i| texts().all(|ids| ids[i] == prompts[0].after_image()[i])).count()
}
