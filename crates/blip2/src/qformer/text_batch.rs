//! Texts for the Q-Former.

use std::ops::Range;

/// Texts as token ids, packed: `ids` of all texts one after the other.
#[derive(Debug, Clone, Default)]
pub struct TextBatch {
    ids: Vec<u32>,
    spans: Vec<Range<usize>>,
}

impl TextBatch {
    /// Packs token id lists.
    pub fn new<T: AsRef<[u32]>>(texts: impl IntoIterator<Item = T>) -> Self {
        let mut batch = Self::default();
        for text in texts {
            let start = batch.ids.len();
            batch.ids.extend_from_slice(text.as_ref());
            batch.spans.push(start..batch.ids.len());
        }
        batch
    }

    /// The number of texts.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The rows of every text.
    pub(super) fn spans(&self) -> &[Range<usize>] {
        &self.spans
    }

    /// The rows of text `i`.
    pub fn span(&self, i: usize) -> Range<usize> {
        self.spans[i].clone()
    }

    /// The token ids of text `i`.
    pub fn text(&self, i: usize) -> &[u32] {
        &self.ids[self.spans[i].clone()]
    }

    /// All token ids, packed.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}
