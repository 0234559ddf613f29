//! The language model's tokenizer, built from what its own file says.

mod gguf;
mod hugging_face;
mod sentencepiece;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::Tokenizer;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;

use super::tokenizer_error;
use crate::{Error, Result};

/// Token ids of a language model: its own vocabulary, merges and control tokens.
#[derive(Debug)]
pub struct LanguageTokenizer {
    /// Knows no control tokens.
    plain: Tokenizer,
    controls: Vec<Control>,
    spelling: Spelling,
    ids: Marks,
    n_tokens: usize,
    chat_template: Option<String>,
}

/// A token that steers the model and stands for no text.
#[derive(Debug)]
struct Control {
    text: String,
    id: u32,
    /// Whether it swallows white space before and after it.
    strips: [bool; 2],
}

/// The ids that a tokenizer gives a role.
#[derive(Debug, Default)]
struct Marks {
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
}

/// How ids become text again.
#[derive(Debug)]
enum Spelling {
    /// A token is bytes, whatever stands around it.
    Bytes(TokenBytes),
    /// The tokenizer has its own decoder (SentencePiece: blanks depend on the place in the text).
    Decoder {
        /// What the tokens are within a text, where that is known.
        pieces: Option<TokenBytes>,
        /// Whether the decoder leaves out a blank at the beginning, which every text has.
        begins_with_blank: bool,
    },
}

/// The bytes of all tokens: those of token `i` are `bytes[ends[i - 1]..ends[i]]`.
#[derive(Debug, Default)]
struct TokenBytes {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl LanguageTokenizer {
    fn new(
        plain: Tokenizer,
        mut controls: Vec<Control>,
        spelling: Spelling,
        ids: Marks,
        n_tokens: usize,
        chat_template: Option<String>,
    ) -> Self {
        // Where two begin at one place, the longer is meant.
        controls.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        Self { plain, controls, spelling, ids, n_tokens, chat_template }
    }

    /// For models with random weights: token `i` is the word `i`, in digits.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub(crate) fn numbered(n_tokens: usize) -> Result<Self> {
        let words: Vec<String> = (0..n_tokens).map(|id| id.to_string()).collect();
        let ids = words.iter().zip(0..).map(|(word, id)| (word.clone(), id)).collect();
        let model = WordLevel::builder().vocab(ids).unk_token("0".into()).build().map_err(tokenizer_error)?;
        let mut plain = Tokenizer::new(model);
        plain.with_pre_tokenizer(Some(WhitespaceSplit));
        let texts: Vec<String> = words.iter().map(|word| format!("{word} ")).collect();
        let spelling = Spelling::bytes(texts.iter().map(|text| (text.as_str(), false)));
        Ok(Self::new(plain, Vec::new(), spelling, Marks::default(), n_tokens, None))
    }

    /// The ids of a text that somebody typed. Nothing in it becomes a control token: `<|im_end|>` gives the ids of its
    /// characters.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_piece(text)?;
        if !ids.iter().any(|&id| self.is_control(id)) {
            return Ok(ids);
        }
        // Some vocabularies spell control tokens like ordinary ones and find them in a text (Unigram, and BPE that
        // looks up whole words). Cut behind the first character of each, they are not found.
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((at, control)) = self.next_control(rest) {
            let first = control.text.chars().next().map_or(0, char::len_utf8);
            let (before, behind) = rest.split_at(at + first);
            ids.extend(self.encode_piece(before)?);
            rest = behind;
        }
        ids.extend(self.encode_piece(rest)?);
        Ok(ids)
    }

    /// The ids of a text in which control tokens are written out, such as a chat template's output. Never for text
    /// that came from outside.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode_with_controls(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((at, control)) = self.next_control(rest) {
            let (mut before, mut behind) = (&rest[..at], &rest[at + control.text.len()..]);
            if control.strips[0] {
                before = before.trim_end();
            }
            if control.strips[1] {
                behind = behind.trim_start();
            }
            ids.extend(self.encode_piece(before)?);
            ids.push(control.id);
            rest = behind;
        }
        ids.extend(self.encode_piece(rest)?);
        Ok(ids)
    }

    fn encode_piece(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        // A normaliser is a table from a file, which its reader trusts: should it point nowhere, only this text is lost.
        let encoded = catch_unwind(AssertUnwindSafe(|| self.plain.encode_fast(text, false)));
        let damaged =
            |_| Error::Tokenizer("the tokenizer's file is damaged: it cannot read this text".into());
        Ok(encoded.map_err(damaged)?.map_err(tokenizer_error)?.get_ids().to_vec())
    }

    /// The first control token that is written out in `text`, and where.
    fn next_control(&self, text: &str) -> Option<(usize, &Control)> {
        // Few tokens and short texts: one search for each is cheap. The longest comes first in `controls`.
        self.controls
            .iter()
            .filter_map(|control| Some((text.find(&control.text)?, control)))
            .min_by_key(|&(at, control)| (at, std::cmp::Reverse(control.text.len())))
    }

    /// The text of `ids`, control tokens left out. Bytes that are not UTF-8 become `�`.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.decode_stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// A decoder that is fed one id at a time and gives text as soon as its characters are complete.
    pub fn decode_stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, bytes: Vec::new(), context: Vec::new(), pending: Vec::new() }
    }

    /// The id of a token by its text: a control token, or a vocabulary entry as the file spells it.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        let control = self.controls.iter().find(|control| control.text == text).map(|control| control.id);
        control.or_else(|| self.plain.token_to_id(text))
    }

    /// The id of the control token that is written `text`; unlike [`token_id`](Self::token_id), never an ordinary token.
    pub fn control_id(&self, text: &str) -> Option<u32> {
        self.controls.iter().find(|control| control.text == text).map(|control| control.id)
    }

    /// Whether `id` is a control token.
    pub fn is_control(&self, id: u32) -> bool {
        self.controls.iter().any(|control| control.id == id)
    }

    /// The token before a text, if the file names one.
    pub fn bos_id(&self) -> Option<u32> {
        self.ids.bos
    }

    /// The token that ends what the model says, if the file names one.
    pub fn eos_id(&self) -> Option<u32> {
        self.ids.eos
    }

    /// The filler, if the file names one; nothing here is padded.
    pub fn pad_id(&self) -> Option<u32> {
        self.ids.pad
    }

    /// Fills the roles that the tokenizer's own files leave open, from the configuration of its model.
    pub(crate) fn with_usual_marks(mut self, bos: Option<u32>, eos: Option<u32>) -> Self {
        self.ids.bos = self.ids.bos.or(bos);
        self.ids.eos = self.ids.eos.or(eos);
        self
    }

    /// The bytes that a token stands for within a text, or `None` where only the tokenizer's decoder knows them.
    pub(crate) fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        match &self.spelling {
            Spelling::Bytes(tokens) | Spelling::Decoder { pieces: Some(tokens), .. } => Some(tokens.get(id)),
            Spelling::Decoder { pieces: None, .. } => None,
        }
    }

    /// Whether every text begins with a blank that is no part of it (T5's `▁`).
    pub(crate) fn begins_texts_with_blank(&self) -> bool {
        matches!(self.spelling, Spelling::Decoder { begins_with_blank: true, .. })
    }

    /// How many ids there are. The model's embedding may have more rows than this.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// The file's chat template (Jinja), as it stands there.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}

/// Turns ids into text one by one; made by [`LanguageTokenizer::decode_stream`].
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a LanguageTokenizer,
    /// With [`Spelling::Bytes`]: the beginning of a character.
    bytes: Vec<u8>,
    /// With [`Spelling::Decoder`]: the ids given out last, which the spelling of the next may depend on, and those
    /// not given out yet.
    context: Vec<u32>,
    pending: Vec<u32>,
}

impl StreamDecoder<'_> {
    /// The text that `id` completes: often a word's part, nothing within a character of several tokens.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_control(id) {
            return String::new();
        }
        match self.tokenizer.spelling.token(id) {
            Some(bytes) => {
                self.bytes.extend_from_slice(bytes);
                take_characters(&mut self.bytes)
            }
            None => {
                self.pending.push(id);
                let text = self.pending_text();
                if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
                    return String::new();
                }
                self.context = std::mem::take(&mut self.pending);
                text
            }
        }
    }

    /// What is left at the end: an incomplete character, as `�`.
    pub fn finish(self) -> String {
        let mut text = String::from_utf8_lossy(&self.bytes).into_owned();
        text.push_str(&self.pending_text());
        text
    }

    fn pending_text(&self) -> String {
        if self.pending.is_empty() {
            return String::new();
        }
        // Decoding fails for no id: unknown ones have no text.
        let decode = |ids: &[u32]| self.tokenizer.plain.decode(ids, true).unwrap_or_default();
        let before = decode(&self.context);
        let all = decode(&[self.context.as_slice(), &self.pending].concat());
        all.get(before.len()..).unwrap_or_default().into()
    }
}

/// Takes whole characters from the front of `bytes`, leaving the beginning of one; what can become none is `�`.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    while done < bytes.len() {
        let (valid, bad) = match std::str::from_utf8(&bytes[done..]) {
            Ok(valid) => (valid.len(), Some(0)),
            Err(error) => (error.valid_up_to(), error.error_len()),
        };
        text.push_str(&String::from_utf8_lossy(&bytes[done..done + valid]));
        done += valid;
        match bad {
            Some(0) => {}
            Some(n) => {
                text.push(char::REPLACEMENT_CHARACTER);
                done += n;
            }
            None => break,
        }
    }
    bytes.drain(..done);
    text
}

impl Spelling {
    /// From each token's text and whether it is spelled in GPT-2's stand-ins for bytes.
    fn bytes<'a>(tokens: impl Iterator<Item = (&'a str, bool)>) -> Self {
        let byte_of: HashMap<char, u8> = (0..=255).map(|byte| (stand_in(byte), byte)).collect();
        let mut all = TokenBytes::default();
        for (text, is_mapped) in tokens {
            let bytes = &mut all.bytes;
            let start = bytes.len();
            // A text with a character that stands for no byte was not mapped after all.
            let mapped =
                is_mapped && text.chars().all(|c| byte_of.get(&c).map(|&byte| bytes.push(byte)).is_some());
            if !mapped {
                bytes.truncate(start);
                bytes.extend_from_slice(text.as_bytes());
            }
            all.ends.push(bytes.len());
        }
        Self::Bytes(all)
    }

    /// A token's bytes, or `None` when the decoder has to be asked.
    fn token(&self, id: u32) -> Option<&[u8]> {
        match self {
            Self::Bytes(tokens) => Some(tokens.get(id)),
            Self::Decoder { .. } => None,
        }
    }
}

impl TokenBytes {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
    }

    /// A token's bytes, none for an unknown id.
    fn get(&self, id: u32) -> &[u8] {
        let end = |id: usize| self.ends.get(id).copied().unwrap_or(self.bytes.len());
        let id = id as usize;
        &self.bytes[if id == 0 { 0 } else { end(id - 1) }..end(id)]
    }
}

/// GPT-2's printable stand-in for a byte: itself where it prints, else the characters from U+0100 on, in order.
fn stand_in(byte: u8) -> char {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if prints(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|&other| !prints(other)).count() as u32;
    char::from_u32(0x100 + nth).expect("U+0100 to U+0143 are characters")
}

/// The tokenizers crate panics on a merge that is longer than every token.
fn check_merge(left: &str, right: &str, longest: usize) -> std::result::Result<(), String> {
    if left.len() + right.len() > longest {
        return Err(format!("merges `{left}` and `{right}` to something that is not in its vocabulary"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
