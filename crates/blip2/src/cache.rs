//! The key-value cache of a language model, owned by the caller.
//!
//! The cache holds rows; a [`CachedSequence`] says which rows, in order, are a text. Rows are only ever appended, so
//! sequences can share them: the beams of a search share their prompt, and reordering beams copies a few spans, never
//! keys or values. A conversation keeps its [`CachedSequence`] from turn to turn and may cut its end off.
//!
//! A model in few bits keeps keys and values in bf16: their reading takes as much time a token as the weights' where a text
//! is long.
//!
//! An encoder-decoder model also keeps what its decoder reads of the encoder's output, the *memory*: its rows come when a
//! prompt is read, and all continuations of the prompt share them.

use std::sync::Arc;

use candle_core::Tensor;
use half::bf16;

use crate::layers::{Element, Plan, Precision, Sequence, Span, keep_rows};
use crate::{Error, Result};

/// Keys and values of every token the model has read, one row a token and layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerRows>,
    /// Keys and values of encoded prompts, for each decoder layer; empty for decoder-only models.
    memory: Vec<LayerRows>,
    width: usize,
    precision: Precision,
    n_rows: usize,
    n_memory_rows: usize,
    /// How many rows there were at most lately, which is what room is kept for.
    lately: usize,
    memory_lately: usize,
}

/// One layer's rows in the cache's precision.
#[derive(Debug, Clone)]
pub(crate) enum LayerRows {
    F32(KeysAndValues<f32>),
    Bf16(KeysAndValues<bf16>),
}

/// Rows of keys and of values, `[n_rows, n_kv_heads * head_dim]` each.
#[derive(Debug, Clone)]
pub(crate) struct KeysAndValues<E> {
    pub(crate) keys: Vec<E>,
    pub(crate) values: Vec<E>,
}

/// The rows of a [`KvCache`] that make up one text. Belongs to the cache it was made with.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CachedSequence {
    spans: Vec<Span>,
    len: usize,
    /// The rows of the cache's memory that it attends to.
    memory: Option<Span>,
}

impl CachedSequence {
    /// A text of no tokens yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many tokens it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens but the first `len`; nothing when there are not more.
    pub fn truncate(&mut self, len: usize) {
        let mut left = len;
        self.spans.retain_mut(|span| {
            span.len = span.len.min(left);
            left -= span.len;
            span.len > 0
        });
        self.len = self.len.min(len);
    }

    fn push(&mut self, span: Span) {
        if span.len == 0 {
            return;
        }
        self.len += span.len;
        match self.spans.last_mut() {
            Some(last) if last.start + last.len == span.start => last.len += span.len,
            _ => self.spans.push(span),
        }
    }

    /// Its rows, in order.
    fn rows(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().copied().flat_map(rows_of)
    }

    fn end(&self) -> usize {
        self.spans.iter().map(|span| span.start + span.len).max().unwrap_or(0)
    }
}

impl<E: Element> KeysAndValues<E> {
    fn new() -> Self {
        Self { keys: Vec::new(), values: Vec::new() }
    }

    fn both(&mut self) -> [&mut Vec<E>; 2] {
        [&mut self.keys, &mut self.values]
    }

    fn push(&mut self, keys: &[f32], values: &[f32]) {
        self.keys.extend(keys.iter().map(|&x| E::narrow(x)));
        self.values.extend(values.iter().map(|&x| E::narrow(x)));
    }

    fn append(&mut self, other: &Self, n_values: usize) {
        self.keys.extend_from_slice(&other.keys[..n_values]);
        self.values.extend_from_slice(&other.values[..n_values]);
    }

    fn copy(&self, rows: &[usize], width: usize) -> Self {
        let copy = |buffer: &[E]| {
            let mut copied = Vec::with_capacity(rows.len() * width);
            copy_rows(buffer, &mut copied, rows, width);
            copied
        };
        Self { keys: copy(&self.keys), values: copy(&self.values) }
    }

    /// Forgets all rows but these, which come in this order; buffers then have room for `n_values` numbers. Where they had
    /// just that, what was the keys' becomes the values', so that little is taken from the allocator and given back.
    fn keep_only(&mut self, rows: &[usize], width: usize, n_values: usize) {
        let mut other = Vec::new();
        for buffer in self.both() {
            if other.capacity() != n_values {
                other = Vec::with_capacity(n_values);
            }
            other.clear();
            copy_rows(buffer, &mut other, rows, width);
            std::mem::swap(buffer, &mut other);
        }
    }
}

/// Calls `$body` with the rows, whatever their precision.
macro_rules! with_rows {
    ($layer:expr, $rows:ident => $body:expr) => {
        match $layer {
            $crate::cache::LayerRows::F32($rows) => $body,
            $crate::cache::LayerRows::Bf16($rows) => $body,
        }
    };
}
pub(crate) use with_rows;

impl LayerRows {
    fn new(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(KeysAndValues::new()),
            Precision::Bf16 => Self::Bf16(KeysAndValues::new()),
        }
    }

    /// Appends rows of keys and values.
    pub(crate) fn push(&mut self, keys: &[f32], values: &[f32]) {
        with_rows!(self, rows => rows.push(keys, values));
    }

    /// Appends the first rows of another cache, `n_values` numbers of their keys and as many of their values; false, and
    /// nothing is done, where they are of another precision.
    fn append(&mut self, other: &Self, n_values: usize) -> bool {
        match (self, other) {
            (Self::F32(rows), Self::F32(other)) => rows.append(other, n_values),
            (Self::Bf16(rows), Self::Bf16(other)) => rows.append(other, n_values),
            _ => return false,
        }
        true
    }

    /// These rows, in this order.
    fn copy(&self, rows: &[usize], width: usize) -> Self {
        match self {
            Self::F32(from) => Self::F32(from.copy(rows, width)),
            Self::Bf16(from) => Self::Bf16(from.copy(rows, width)),
        }
    }

    /// Forgets all rows but these; see [`KeysAndValues::keep_only`].
    fn keep_only(&mut self, rows: &[usize], width: usize, n_values: usize) {
        with_rows!(self, layer => layer.keep_only(rows, width, n_values));
    }

    fn truncate(&mut self, n_values: usize) {
        with_rows!(self, rows => rows.both().into_iter().for_each(|buffer| buffer.truncate(n_values)));
    }

    fn holds(&self, n_values: usize) -> bool {
        with_rows!(self, rows => rows.keys.len() == n_values && rows.values.len() == n_values)
    }

    /// Numbers that there is room for, of keys and values together.
    fn capacity(&self) -> usize {
        with_rows!(self, rows => rows.keys.capacity() + rows.values.capacity())
    }

    /// Grows to hold `needed` numbers by whole chunks, so that a decode step as good as never copies what is already there.
    fn reserve(&mut self, needed: usize, chunk: usize) {
        with_rows!(self, rows => for buffer in rows.both() {
            if buffer.capacity() < needed {
                let wanted = needed.max(buffer.capacity() * 3 / 2).next_multiple_of(chunk);
                buffer.reserve_exact(wanted - buffer.len());
            }
        });
    }
}

/// Bytes of a number in `precision`.
fn n_bytes(precision: Precision) -> usize {
    match precision {
        Precision::F32 => size_of::<f32>(),
        Precision::Bf16 => size_of::<bf16>(),
    }
}

/// Appends these rows of `from`, in this order.
fn copy_rows<E: Element>(from: &[E], to: &mut Vec<E>, rows: &[usize], width: usize) {
    rows.iter().for_each(|row| to.extend_from_slice(&from[row * width..(row + 1) * width]));
}

/// Forgets all rows of `layers` but these, and keeps the room that is there for the next ones; half of it goes where `lately`
/// not even half was used.
fn keep_only(layers: &mut [LayerRows], rows: &[usize], width: usize, lately: usize) {
    for layer in layers {
        let room = layer.capacity() / 2;
        layer.keep_only(rows, width, if room > 2 * lately * width { room / 2 } else { room });
    }
}

fn rows_of(span: Span) -> std::ops::Range<usize> {
    span.start..span.start + span.len
}

/// Where rows move that stay.
struct Places {
    /// The old place of each.
    old: Vec<usize>,
    /// The new place of each old row; of one that does not stay, nothing that means anything.
    new: Vec<usize>,
}

impl Places {
    /// Rows in the order of their first use.
    fn of(used: impl Iterator<Item = usize>, n_rows: usize) -> Self {
        let (mut old, mut new) = (Vec::new(), vec![usize::MAX; n_rows]);
        for row in used {
            if new[row] == usize::MAX {
                new[row] = old.len();
                old.push(row);
            }
        }
        Self { old, new }
    }
}

/// What a model has read of a text's beginning, outside every cache: texts of other caches can go on from it.
#[derive(Debug)]
pub struct Beginning {
    layers: Vec<LayerRows>,
    width: usize,
    precision: Precision,
    n_rows: usize,
}

impl Beginning {
    /// How many tokens it has.
    pub fn len(&self) -> usize {
        self.n_rows
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.n_rows == 0
    }

    /// Its memory, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.layers.len() * self.n_rows * self.width * 2 * n_bytes(self.precision)
    }
}

/// New rows on their way into the cache: what one forward pass needs to know.
#[derive(Debug)]
pub(crate) struct Appended {
    /// Position in its text of each new row.
    pub(crate) positions: Arc<[u32]>,
    /// Each sequence's new rows attend to all rows before them.
    pub(crate) plan: Plan,
    /// Each sequence's new rows attend to all of its memory.
    pub(crate) memory_plan: Plan,
}

impl KvCache {
    /// An empty cache for a model of `n_layers` layers with keys of `width` values, which it keeps in `precision`.
    pub fn new(n_layers: usize, width: usize, precision: Precision) -> Self {
        let layers = vec![LayerRows::new(precision); n_layers];
        Self {
            layers,
            memory: Vec::new(),
            width,
            precision,
            n_rows: 0,
            n_memory_rows: 0,
            lately: 0,
            memory_lately: 0,
        }
    }

    /// An empty cache with memory for the decoder of an encoder-decoder model.
    pub(crate) fn with_memory(n_layers: usize, width: usize, precision: Precision) -> Self {
        let memory = vec![LayerRows::new(precision); n_layers];
        Self { memory, ..Self::new(n_layers, width, precision) }
    }

    /// Keeps encoded prompts of `lengths` rows, whose keys and values in every layer are `layers`, as what `sequences`
    /// attend to.
    pub(crate) fn remember(
        &mut self,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
        layers: &[[Tensor; 2]],
    ) -> Result<()> {
        assert_eq!(layers.len(), self.memory.len(), "one memory a layer");
        let kept: Result<()> = self
            .memory
            .iter_mut()
            .zip(layers)
            .try_for_each(|(memory, [keys, values])| Ok(keep_rows(memory, keys, values)?));
        if let Err(error) = kept {
            self.rewind_memory(self.n_memory_rows);
            return Err(error);
        }
        let n_values = (self.n_memory_rows + lengths.iter().sum::<usize>()) * self.width;
        assert!(self.memory.iter().all(|layer| layer.holds(n_values)), "a layer did not keep its rows");
        for (sequence, &len) in sequences.iter_mut().zip(lengths) {
            sequence.memory = Some(Span { start: self.n_memory_rows, len });
            self.n_memory_rows += len;
        }
        Ok(())
    }

    /// Copies the rows of the first `n_rows` tokens of a text; `None` when it has fewer, or attends to a memory, which
    /// depends on all of its prompt.
    pub(crate) fn beginning(&self, sequence: &CachedSequence, n_rows: usize) -> Option<Beginning> {
        if n_rows > sequence.len() || sequence.memory.is_some() || sequence.end() > self.n_rows {
            return None;
        }
        let rows: Vec<usize> = sequence.rows().take(n_rows).collect();
        let layers = self.layers.iter().map(|layer| layer.copy(&rows, self.width)).collect();
        Some(Beginning { layers, width: self.width, precision: self.precision, n_rows })
    }

    /// Begins a text with the first `n_rows` tokens of what was read before.
    ///
    /// # Errors
    /// When that has fewer, or was read by a model of another size or precision.
    pub(crate) fn begin(&mut self, beginning: &Beginning, n_rows: usize) -> Result<CachedSequence> {
        let is_alike = beginning.width == self.width
            && beginning.precision == self.precision
            && beginning.layers.len() == self.layers.len();
        if !is_alike {
            let reason = "the beginning of the text was read by another language model";
            return Err(Error::Request(reason.into()));
        }
        if n_rows > beginning.n_rows {
            let reason = format!("the text cannot begin with {n_rows} tokens of {}", beginning.n_rows);
            return Err(Error::Request(reason));
        }
        self.reserve(n_rows);
        for (layer, read) in self.layers.iter_mut().zip(&beginning.layers) {
            assert!(layer.append(read, n_rows * self.width), "layers of one precision");
        }
        let mut sequence = CachedSequence::new();
        sequence.push(Span { start: self.n_rows, len: n_rows });
        self.n_rows += n_rows;
        Ok(sequence)
    }

    /// Rows of memory held.
    pub(crate) fn n_memory_rows(&self) -> usize {
        self.n_memory_rows
    }

    /// Forgets all rows of memory but the first `n_rows`.
    pub(crate) fn rewind_memory(&mut self, n_rows: usize) {
        self.n_memory_rows = self.n_memory_rows.min(n_rows);
        for memory in &mut self.memory {
            memory.truncate(self.n_memory_rows * self.width);
        }
    }

    /// Rows held, shared ones counted once.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Bytes of a row in all layers.
    pub fn row_bytes(&self) -> usize {
        self.layers.len().max(self.memory.len()) * self.width * 2 * n_bytes(self.precision)
    }

    /// Memory held, in bytes.
    pub fn n_bytes(&self) -> usize {
        let all = self.layers.iter().chain(&self.memory);
        all.map(LayerRows::capacity).sum::<usize>() * n_bytes(self.precision)
    }

    /// Forgets the rows that none of `sequences` needs any more, where they are the last ones. Every other
    /// [`CachedSequence`] of this cache is invalid afterwards.
    pub fn trim<'a>(&mut self, sequences: impl IntoIterator<Item = &'a CachedSequence>) {
        let (mut end, mut memory_end) = (0, 0);
        for sequence in sequences {
            end = end.max(sequence.end());
            memory_end = memory_end.max(sequence.memory.map_or(0, |span| span.start + span.len));
        }
        self.rewind(end);
        self.rewind_memory(memory_end);
    }

    /// How many rows `sequences` have, shared ones counted once.
    pub(crate) fn n_rows_of(&self, sequences: &[CachedSequence]) -> usize {
        let mut is_used = vec![false; self.n_rows];
        sequences.iter().flat_map(CachedSequence::rows).for_each(|row| is_used[row] = true);
        is_used.into_iter().filter(|is_used| *is_used).count()
    }

    /// Forgets all rows but those of `sequences`, wherever they are, and moves these together, each text's side by side
    /// as far as they are not shared. Every other [`CachedSequence`] of this cache is invalid afterwards.
    ///
    /// The memory stays for the rows that come next, as far as as many were needed lately: a cache that took it anew at
    /// each turn would hold what it has, what it had and what the allocator has not yet given back.
    pub(crate) fn compact(&mut self, sequences: &mut [CachedSequence]) {
        let rows = Places::of(sequences.iter().flat_map(CachedSequence::rows), self.n_rows);
        let memory = sequences.iter().filter_map(|sequence| sequence.memory).flat_map(rows_of);
        let memory = Places::of(memory, self.n_memory_rows);
        for sequence in sequences {
            let mut moved = CachedSequence::new();
            sequence.rows().for_each(|row| moved.push(Span { start: rows.new[row], len: 1 }));
            // A memory is one span that texts share whole, so it stays one.
            moved.memory = sequence.memory.map(|span| Span { start: memory.new[span.start], ..span });
            *sequence = moved;
        }
        // A few small turns are no reason to give back what a large one takes again: half is forgotten in some ninety.
        let lately = |before: usize, now: usize| now.max(before - before.div_ceil(128));
        self.lately = lately(self.lately, self.n_rows);
        self.memory_lately = lately(self.memory_lately, self.n_memory_rows);
        keep_only(&mut self.layers, &rows.old, self.width, self.lately);
        keep_only(&mut self.memory, &memory.old, self.width, self.memory_lately);
        (self.n_rows, self.n_memory_rows) = (rows.old.len(), memory.old.len());
    }

    /// Forgets all rows but the first `n_rows`.
    pub(crate) fn rewind(&mut self, n_rows: usize) {
        self.n_rows = self.n_rows.min(n_rows);
        self.discard_unfinished();
    }

    /// Lengthens `sequences[i]` by `lengths[i]` tokens whose rows, packed in this order, come next. `compute` must
    /// append exactly these rows to every layer; when it fails the cache and the sequences are as before.
    pub(crate) fn append<T>(
        &mut self,
        sequences: &mut [CachedSequence],
        lengths: &[usize],
        compute: impl FnOnce(&mut [LayerRows], &[LayerRows], &Appended) -> Result<T>,
    ) -> Result<T> {
        assert_eq!(sequences.len(), lengths.len(), "one length a sequence");
        if sequences.iter().any(|sequence| sequence.end() > self.n_rows) {
            let reason = "the text is not in this key-value cache: it belongs to another one, or was trimmed";
            return Err(Error::Request(reason.into()));
        }
        let mut positions = Vec::new();
        let (mut plan, mut memory_plan) = (Vec::with_capacity(sequences.len()), Vec::new());
        let mut longer = Vec::with_capacity(sequences.len());
        let mut row = 0;
        for (sequence, &len) in sequences.iter().zip(lengths) {
            let mut sequence = sequence.clone();
            positions.extend((sequence.len..sequence.len + len).map(|position| position as u32));
            sequence.push(Span { start: self.n_rows + row, len });
            if len > 0 {
                let queries = vec![Span { start: row, len }];
                if let Some(memory) = sequence.memory {
                    memory_plan.push(Sequence {
                        queries: queries.clone(),
                        keys: vec![memory],
                        causal: false,
                    });
                }
                plan.push(Sequence { queries, keys: sequence.spans.clone(), causal: true });
            }
            longer.push(sequence);
            row += len;
        }
        let appended =
            Appended { positions: positions.into(), plan: plan.into(), memory_plan: memory_plan.into() };
        self.reserve(row);
        let result = compute(&mut self.layers, &self.memory, &appended);
        if result.is_ok() {
            let n_values = (self.n_rows + row) * self.width;
            assert!(self.layers.iter().all(|layer| layer.holds(n_values)), "a layer did not append its rows");
            self.n_rows += row;
            sequences.clone_from_slice(&longer);
        } else {
            self.discard_unfinished();
        }
        result
    }

    fn reserve(&mut self, n_rows: usize) {
        /// A picture, a few words and five beams of 30 tokens. To grow meanwhile takes tens of milliseconds for a large model,
        /// whose new pages come one by one, and what was there is in memory twice until the allocator gives it back.
        const CHUNK: usize = 192;
        let needed = (self.n_rows + n_rows) * self.width;
        self.layers.iter_mut().for_each(|layer| layer.reserve(needed, CHUNK * self.width.max(1)));
    }

    fn discard_unfinished(&mut self) {
        for layer in &mut self.layers {
            layer.truncate(self.n_rows * self.width);
        }
    }
}

#[cfg(test)]
mod tests;
