//! The language model's tokenizer, built from what its own file says.

use std::{collections::HashMap, path::Path};

use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer,
    decoders::DecoderWrapper,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::tokenizer_error;
use crate::{Error, Result, weights::gguf::Gguf};

/// How Llama 3 splits text before merging, `{n}` digits at a time at most; Qwen 2 does the same digit by digit.
/// From the models' `tokenizer.json`.
const CASELESS_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{n}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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
    /// A token is bytes, whatever stands around it: token `i` is `bytes[ends[i - 1]..ends[i]]`.
    Bytes { bytes: Vec<u8>, ends: Vec<usize> },
    /// The tokenizer has its own decoder (SentencePiece: blanks depend on the place in the text).
    Decoder,
}

impl LanguageTokenizer {
    /// Builds the tokenizer from a GGUF file's metadata. Byte-level BPE is read, split as GPT-2, SmolLM, Llama 3 or Qwen 2
    /// do it.
    ///
    /// # Errors
    /// [`Error::File`] when the file has no tokenizer, one of another kind, or one that contradicts itself.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let refuse = |reason: String| Error::File { path: file.file().path().into(), reason };
        let kind = file.string("tokenizer.ggml.model")?;
        if kind != "gpt2" {
            return Err(refuse(format!(
                "its tokenizer is of the kind `{kind}`; of GGUF files only `gpt2` (byte-level BPE) is read"
            )));
        }
        let splitter = match file.get("tokenizer.ggml.pre") {
            Some(_) => file.string("tokenizer.ggml.pre")?,
            None => "default",
        };
        let tokens = file.strings("tokenizer.ggml.tokens")?;
        let types = match file.get("tokenizer.ggml.token_type") {
            Some(_) => file.integers("tokenizer.ggml.token_type")?,
            None => vec![TokenType::NORMAL; tokens.len()],
        };
        if types.len() != tokens.len() {
            return Err(refuse(format!("has {} tokens but {} token types", tokens.len(), types.len())));
        }
        let optional_id = |key: &str| match file.get(key) {
            None => Ok(None),
            Some(_) => match file.u32(key)? {
                id if (id as usize) < tokens.len() => Ok(Some(id)),
                id => Err(refuse(format!("metadata `{key}` is {id}, but there are {} tokens", tokens.len()))),
            },
        };
        let ids = Marks {
            bos: optional_id("tokenizer.ggml.bos_token_id")?,
            eos: optional_id("tokenizer.ggml.eos_token_id")?,
            pad: optional_id("tokenizer.ggml.padding_token_id")?,
        };
        let prefix_space = file
            .get("tokenizer.ggml.add_space_prefix")
            .map_or(Ok(false), |_| file.bool("tokenizer.ggml.add_space_prefix"))?;
        let chat_template = match file.get("tokenizer.chat_template") {
            Some(_) => Some(file.string("tokenizer.chat_template")?.to_owned()),
            None => None,
        };
        let merges = file.strings("tokenizer.ggml.merges")?;
        let (split, ignore_merges) = byte_level_split(splitter, prefix_space).map_err(&refuse)?;
        let bpe = byte_level_bpe(tokens, &types, merges, ignore_merges).map_err(&refuse)?;
        let mut plain = Tokenizer::new(bpe);
        plain.with_pre_tokenizer(Some(split));
        let whole = |wanted: i64| tokens.iter().zip(&types).filter(move |&(_, &kind)| kind == wanted);
        plain
            .add_tokens(
                whole(TokenType::USER_DEFINED)
                    .map(|(text, _)| AddedToken::from(text.clone(), false).normalized(false)),
            )
            .map_err(tokenizer_error)?;
        let controls = (0..)
            .zip(tokens.iter().zip(&types))
            .filter(|&(_, (_, &kind))| kind == TokenType::CONTROL)
            .map(|(id, (text, _))| Control { text: text.clone(), id, strips: [false; 2] })
            .collect();
        let spelling = Spelling::bytes(
            tokens.iter().zip(&types).map(|(text, &kind)| (text.as_str(), kind == TokenType::NORMAL)),
        );
        Ok(Self::new(plain, controls, spelling, ids, tokens.len(), chat_template))
    }

    /// Reads a Hugging Face `tokenizer.json`; the roles of tokens and the chat template come from the
    /// `tokenizer_config.json` beside it, if there is one. Truncation and padding that the file asks for are switched off.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when it is not a tokenizer.
    pub fn from_json(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let read =
            |path: &Path| std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source });
        let refuse = |reason: String| Error::File { path: path.into(), reason };
        let bytes = read(path)?;
        let config_path = path.with_file_name("tokenizer_config.json");
        let config: serde_json::Value = if config_path.exists() {
            serde_json::from_slice(&read(&config_path)?)
                .map_err(|error| Error::File { path: config_path, reason: error.to_string() })?
        } else {
            serde_json::Value::Null
        };
        Self::from_json_bytes(&bytes, &config).map_err(refuse)
    }

    fn from_json_bytes(bytes: &[u8], config: &serde_json::Value) -> std::result::Result<Self, String> {
        let parsed: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|error| format!("not a tokenizer: {error}"))?;
        check_merges(&parsed)?;
        let mut plain = Tokenizer::from_bytes(bytes)
            .map_err(|error| format!("not a tokenizer that can be read: {error}"))?;
        plain.with_truncation(None).map_err(|error| error.to_string())?;
        plain.with_padding(None);
        // From here on control tokens in a text are text to it.
        plain.set_encode_special_tokens(true);
        let controls: Vec<_> = plain
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| Control { text: token.content, id, strips: [token.lstrip, token.rstrip] })
            .collect();
        // A role is written as the token's text, or as an object that holds it.
        let role = |name: &str| {
            let value = &config[name];
            value.as_str().or_else(|| value["content"].as_str()).and_then(|text| plain.token_to_id(text))
        };
        let ids = Marks { bos: role("bos_token"), eos: role("eos_token"), pad: role("pad_token") };
        let chat_template = config["chat_template"].as_str().map(String::from);
        let n_tokens = plain.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let spelling = if matches!(plain.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            let added = plain.get_added_tokens_decoder();
            let tokens: Vec<_> = (0..n_tokens as u32)
                .map(|id| (plain.id_to_token(id).unwrap_or_default(), !added.contains_key(&id)))
                .collect();
            Spelling::bytes(tokens.iter().map(|(text, is_mapped)| (text.as_str(), *is_mapped)))
        } else {
            Spelling::Decoder
        };
        Ok(Self::new(plain, controls, spelling, ids, n_tokens, chat_template))
    }

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
        Ok(self.plain.encode_fast(text, false).map_err(tokenizer_error)?.get_ids().to_vec())
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
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for (text, is_mapped) in tokens {
            let start = bytes.len();
            // A text with a character that stands for no byte was not mapped after all.
            let mapped =
                is_mapped && text.chars().all(|c| byte_of.get(&c).map(|&byte| bytes.push(byte)).is_some());
            if !mapped {
                bytes.truncate(start);
                bytes.extend_from_slice(text.as_bytes());
            }
            ends.push(bytes.len());
        }
        Self::Bytes { bytes, ends }
    }

    /// A token's bytes (none for an unknown id), or `None` when only the decoder knows.
    fn token(&self, id: u32) -> Option<&[u8]> {
        match self {
            Self::Bytes { bytes, ends } => {
                let id = id as usize;
                let start = if id == 0 { 0 } else { ends.get(id - 1).copied().unwrap_or(bytes.len()) };
                Some(&bytes[start..ends.get(id).copied().unwrap_or(bytes.len())])
            }
            Self::Decoder => None,
        }
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

/// The numbers of `tokenizer.ggml.token_type`. Types 2 (unknown) and 5 (unused) stand for no text.
struct TokenType;

impl TokenType {
    const NORMAL: i64 = 1;
    const CONTROL: i64 = 3;
    const USER_DEFINED: i64 = 4;
    const BYTE: i64 = 6;
}

/// How text is cut before merging, by llama.cpp's name for it; and whether whole words are looked up first.
fn byte_level_split(
    name: &str,
    prefix_space: bool,
) -> std::result::Result<(PreTokenizerWrapper, bool), String> {
    let byte_level = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(prefix_space, true, use_regex));
    let caseless = |digits: &str| -> std::result::Result<PreTokenizerWrapper, String> {
        let pattern = SplitPattern::Regex(CASELESS_SPLIT.replace("{n}", digits));
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| error.to_string())?;
        Ok(Sequence::new(vec![split.into(), byte_level(false)]).into())
    };
    Ok(match name {
        "default" | "gpt-2" => (byte_level(true), false),
        "smollm" | "starcoder" | "refact" | "command-r" => {
            (Sequence::new(vec![Digits::new(true).into(), byte_level(true)]).into(), false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => (caseless("{1,3}")?, true),
        "qwen2" => (caseless("")?, false),
        other => return Err(format!("splits text in the way `{other}`, which is not known here")),
    })
}

/// The merging model. Control tokens are left out of it, so that no text can merge into one.
fn byte_level_bpe(
    tokens: &[String],
    types: &[i64],
    merges: &[String],
    ignore_merges: bool,
) -> std::result::Result<BPE, String> {
    let vocab: Vocab = (0..)
        .zip(tokens.iter().zip(types))
        .filter(|&(_, (_, &kind))| {
            [TokenType::NORMAL, TokenType::USER_DEFINED, TokenType::BYTE].contains(&kind)
        })
        .map(|(id, (text, _))| (text.clone(), id))
        .collect();
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let merges = merges
        .iter()
        .map(|merge| {
            // Tokens hold no plain blank (its stand-in is Ġ), so there is just one way to cut.
            let (left, right) =
                merge.split_once(' ').ok_or_else(|| format!("has the merge `{merge}` without a blank"))?;
            check_merge(left, right, longest)?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<std::result::Result<Vec<_>, String>>()?;
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|error| format!("its merges do not fit its vocabulary: {error}"))
}

/// The tokenizers crate panics on a merge that is longer than every token.
fn check_merge(left: &str, right: &str, longest: usize) -> std::result::Result<(), String> {
    if left.len() + right.len() > longest {
        return Err(format!("merges `{left}` and `{right}` to something that is not in its vocabulary"));
    }
    Ok(())
}

/// [`check_merge`] for the merges of a `tokenizer.json`, written `"a b"` or `["a", "b"]`.
fn check_merges(tokenizer: &serde_json::Value) -> std::result::Result<(), String> {
    let model = &tokenizer["model"];
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
        return Ok(()); // not BPE
    };
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let prefix_len = model["continuing_subword_prefix"].as_str().map_or(0, str::len);
    for merge in merges {
        let (left, right) = match merge {
            serde_json::Value::String(merge) => merge.split_once(' ').unwrap_or_default(),
            pair => (pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()),
        };
        check_merge(left, right, longest)?;
        if right.len() < prefix_len {
            return Err(format!("merges `{right}`, which lacks the prefix of a continued word"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
