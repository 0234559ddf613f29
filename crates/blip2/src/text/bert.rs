//! WordPiece of `bert-base-uncased`, with the `[DEC]` token that BLIP-2 adds to it.

use std::collections::HashMap;
use std::path::Path;

use tokenizers::{
    Tokenizer,
    decoders::wordpiece::cleanup,
    models::{bpe::Vocab, wordpiece::WordPiece},
    normalizers::BertNormalizer,
    pre_tokenizers::bert::BertPreTokenizer,
};

use super::tokenizer_error;
use crate::{Error, Result};

/// The tokenizer of the Q-Former's text side.
///
/// Words are lower-cased, freed of accents, split at punctuation and Chinese characters, then cut into the longest
/// pieces that the vocabulary has. Text such as `[SEP]` in the input is text: it is split like any other word.
#[derive(Debug)]
pub struct BertTokenizer {
    tokenizer: Tokenizer,
    pieces: Vec<String>,
    cls: u32,
    sep: u32,
    pad: u32,
    unk: u32,
}

/// What BLIP-2 adds behind BERT's pieces: the mark of text to write and, in newer revisions, that of the image.
const ADDED: [&str; 2] = ["[DEC]", "<image>"];

impl BertTokenizer {
    /// Reads a `vocab.txt`: one piece a line, its id the line's number from 0.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when this is not a BERT vocabulary.
    pub fn from_vocab(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes =
            crate::small_file::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
        Self::from_bytes(&bytes).map_err(|error| match error {
            Error::Tokenizer(reason) => Error::File { path: path.into(), reason },
            other => other,
        })
    }

    /// Reads the vocabulary of a model folder: `vocab.txt`, or the pieces in `tokenizer.json`. The tokens that BLIP-2 adds behind
    /// them may be there or not.
    ///
    /// # Errors
    /// [`Error::File`] when there is neither, or it is not BERT's.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let [vocab, json] = ["vocab.txt", "tokenizer.json"].map(|name| folder.as_ref().join(name));
        if vocab.exists() {
            return Self::from_vocab(vocab);
        }
        if !json.exists() {
            let reason = "this folder has neither vocab.txt nor tokenizer.json, which matching needs".into();
            return Err(Error::File { path: folder.as_ref().into(), reason });
        }
        let refuse = |reason: String| Error::File { path: json.clone(), reason };
        let bytes =
            crate::small_file::read(&json).map_err(|source| Error::Io { path: json.clone(), source })?;
        let parsed: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?;
        let pieces = parsed["model"]["vocab"].as_object().filter(|_| parsed["model"]["type"] == "WordPiece");
        let pieces = pieces
            .ok_or_else(|| refuse("is not the tokenizer of a BERT: it has no WordPiece vocabulary".into()))?;
        if parsed["normalizer"]["lowercase"] == false {
            return Err(refuse("tells capitals from small letters, BLIP-2's does not".into()));
        }
        let mut by_id = vec![None; pieces.len()];
        for (piece, id) in pieces {
            let id = id.as_u64().and_then(|id| by_id.get_mut(usize::try_from(id).ok()?));
            let place = id.ok_or_else(|| refuse(format!("the id of the piece `{piece}` is out of order")))?;
            *place = Some(piece.clone());
        }
        let pieces = by_id.into_iter().collect::<Option<Vec<_>>>();
        Self::from_pieces(pieces.ok_or_else(|| refuse("two pieces have one id".into()))?).map_err(|error| {
            match error {
                Error::Tokenizer(reason) => refuse(reason),
                other => other,
            }
        })
    }

    /// Reads the contents of a `vocab.txt`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when this is not a BERT vocabulary.
    pub fn from_bytes(vocab: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(vocab)
            .map_err(|error| Error::Tokenizer(format!("not a BERT vocabulary: {error}")))?;
        Self::from_pieces(text.lines().map(String::from).collect())
    }

    /// For models with random weights: the marks, and words made of their ids.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub(crate) fn numbered(n_pieces: usize) -> Result<Self> {
        let marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"].map(String::from);
        let words = (marks.len()..n_pieces).map(|id| id.to_string());
        Self::from_pieces(marks.iter().cloned().chain(words).collect())
    }

    /// From the pieces in the order of their ids.
    fn from_pieces(mut pieces: Vec<String>) -> Result<Self> {
        while pieces.last().is_some_and(|piece| ADDED.contains(&piece.as_str())) {
            pieces.pop();
        }
        let refuse = |reason: String| Error::Tokenizer(format!("not a BERT vocabulary: {reason}"));
        let mut ids = HashMap::with_capacity(pieces.len());
        for (id, piece) in (0..).zip(&pieces) {
            if let Some(other) = ids.insert(piece.clone(), id) {
                return Err(refuse(format!("lines {} and {} are the same", other + 1, id + 1)));
            }
        }
        let [cls, sep, pad, unk] = ["[CLS]", "[SEP]", "[PAD]", "[UNK]"]
            .map(|name| ids.get(name).copied().ok_or_else(|| refuse(format!("it has no line {name}"))));
        let (cls, sep, pad, unk): (u32, u32, u32, u32) = (cls?, sep?, pad?, unk?);
        let model = WordPiece::builder()
            .vocab::<Vocab>(ids.into_iter().collect())
            .unk_token("[UNK]".into())
            .continuing_subword_prefix("##".into())
            .max_input_chars_per_word(100)
            .build()
            .map_err(tokenizer_error)?;
        let mut tokenizer = Tokenizer::new(model);
        let normalizer = BertNormalizer::new(true, true, None, true); // clean, split Chinese, lower case, no accents
        tokenizer.with_normalizer(Some(normalizer)).map_err(tokenizer_error)?;
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        Ok(Self { tokenizer, pieces, cls, sep, pad, unk })
    }

    /// `[CLS]`, the text's pieces, `[SEP]`; at most `max_len` ids, for which pieces are left out at the end.
    ///
    /// # Errors
    /// [`Error::Request`] when `max_len` has no room for the two marks.
    pub fn encode(&self, text: &str, max_len: usize) -> Result<Vec<u32>> {
        let Some(max_pieces) = max_len.checked_sub(2) else {
            return Err(Error::Request(format!(
                "a text of at most {max_len} tokens has no room for [CLS] and [SEP]"
            )));
        };
        let encoding = self.tokenizer.encode_fast(text, false).map_err(tokenizer_error)?;
        let pieces = encoding.get_ids();
        let kept = &pieces[..pieces.len().min(max_pieces)];
        Ok([&[self.cls], kept, &[self.sep]].concat())
    }

    /// The text of `ids`: pieces joined to words, marks left out, no blanks before punctuation.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut text = String::new();
        for &id in ids.iter().filter(|&&id| ![self.cls, self.sep, self.pad, self.unk].contains(&id)) {
            // `[DEC]` and ids beyond it have no text.
            let Some(piece) = self.pieces.get(id as usize) else { continue };
            match piece.strip_prefix("##") {
                Some(rest) if !text.is_empty() => text.push_str(rest),
                _ => {
                    if !text.is_empty() {
                        text.push(' ');
                    }
                    text.push_str(piece);
                }
            }
        }
        cleanup(&text)
    }

    /// Rows that a word embedding needs: the vocabulary and `[DEC]`.
    pub fn n_tokens(&self) -> usize {
        self.pieces.len() + 1
    }

    /// Why this is not the vocabulary of a Q-Former whose word embedding has `n_rows`, if it is not: one that was cut short would
    /// read most words as unknown and say nothing. The embedding may have a row more, for BLIP-2's `<image>`.
    ///
    /// # Errors
    /// The reason, of [`Error::File`] for whoever knows the file.
    pub fn check_rows(&self, n_rows: usize) -> std::result::Result<(), String> {
        let n = self.n_tokens();
        if (n..=n + 1).contains(&n_rows) {
            return Ok(());
        }
        Err(format!(
            "has {n} tokens with [DEC], the Q-Former has {n_rows}: it is cut short, or another model's vocabulary"
        ))
    }

    /// The mark before a text.
    pub fn cls_id(&self) -> u32 {
        self.cls
    }

    /// The mark after a text.
    pub fn sep_id(&self) -> u32 {
        self.sep
    }

    /// The filler of files that have one; nothing here is padded.
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// `[DEC]`, which stands in `[CLS]`'s place when the Q-Former is to write text: the id after the vocabulary.
    pub fn dec_id(&self) -> u32 {
        self.pieces.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tests::{golden_texts, shared_golden_texts};

    fn bert() -> BertTokenizer {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        BertTokenizer::from_vocab(format!("{root}/assets/default-model/vocab.txt")).unwrap()
    }

    #[test]
    fn ids_are_those_of_hugging_face() {
        let bert = bert();
        let mut texts = golden_texts("bert");
        assert_eq!(texts.len(), 17);
        texts.extend(shared_golden_texts("bert_cls_sep"));
        for (text, ids) in texts {
            assert_eq!(bert.encode(&text, usize::MAX).unwrap(), ids, "{text:?}");
        }
    }

    #[test]
    fn marks_have_the_ids_of_the_checkpoints() {
        let bert = bert();
        assert_eq!((bert.cls_id(), bert.sep_id(), bert.pad_id(), bert.dec_id()), (101, 102, 0, 30522));
        assert_eq!(bert.n_tokens(), 30523);
    }

    #[test]
    fn a_long_text_loses_its_end_but_not_its_mark() {
        let bert = bert();
        let full = bert.encode("a dog runs on the beach", 100).unwrap();
        assert_eq!(bert.encode("a dog runs on the beach", full.len()).unwrap(), full);
        let short = bert.encode("a dog runs on the beach", 5).unwrap();
        assert_eq!(short, [&full[..4], &[102]].concat());
        assert_eq!(bert.encode("a dog", 2).unwrap(), [101, 102]);
        assert!(bert.encode("a dog", 1).is_err());
    }

    #[test]
    fn decoding_joins_pieces_and_leaves_marks_out() {
        let bert = bert();
        let ids = bert.encode("Antidisestablishmentarianism isn't \"easy\", is it?", 100).unwrap();
        assert_eq!(bert.decode(&ids), "antidisestablishmentarianism isn't \" easy \", is it?");
        assert_eq!(bert.decode(&[30522, 1037, 3899, 102, 0, 0, 99_999]), "a dog");
        assert_eq!(bert.decode(&[]), "");
        // A piece that continues nothing is a word of its own.
        assert_eq!(
            bert.decode(&[101, bert.pieces.iter().position(|p| p == "##ing").unwrap() as u32]),
            "##ing"
        );
    }

    #[test]
    fn tokens_that_blip2_adds_may_be_in_the_file() {
        let lines = "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n";
        for added in ["", "[DEC]\n", "[DEC]\n<image>\n"] {
            let bert = BertTokenizer::from_bytes(format!("{lines}{added}").as_bytes()).unwrap();
            assert_eq!((bert.dec_id(), bert.n_tokens()), (5, 6), "{added}");
        }
    }

    #[test]
    fn what_is_no_vocabulary_is_refused() {
        for (vocab, reason) in [
            (&b"[PAD]\n[UNK]\n[CLS]\n"[..], "no line [SEP]"),
            (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n", "lines 5 and 7 are the same"),
            (b"\xff\xfe", "utf-8"),
            (b"", "no line [CLS]"),
        ] {
            let error = BertTokenizer::from_bytes(vocab).unwrap_err().to_string();
            assert!(error.contains(reason), "expected {reason:?}: {error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let error = BertTokenizer::from_folder(&folder).unwrap_err().to_string();
        assert!(error.contains("neither vocab.txt nor tokenizer.json"), "{error}");
        for (json, reason) in [
            (r#"{"model": {"type": "BPE", "vocab": {}}}"#, "no WordPiece vocabulary"),
            (r#"{"model": {"type": "WordPiece", "vocab": {"a": 1}}}"#, "out of order"),
            (r#"{"model": {"type": "WordPiece", "vocab": {"a": 0, "b": 0}}}"#, "one id"),
            (r#"{"model": {"type": "WordPiece", "vocab": {"a": 0}}}"#, "no line [CLS]"),
            (
                r#"{"normalizer": {"lowercase": false}, "model": {"type": "WordPiece", "vocab": {"a": 0}}}"#,
                "capitals",
            ),
        ] {
            std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
            let error = BertTokenizer::from_folder(&folder).unwrap_err().to_string();
            assert!(
                error.contains(reason) && error.contains("tokenizer.json"),
                "expected {reason:?}: {error}"
            );
        }
        let error = BertTokenizer::from_vocab("no-such-vocab.txt").unwrap_err().to_string();
        assert!(error.contains("no-such-vocab.txt"), "{error}");
    }
}
