//! The tokenizer in a GGUF file's metadata.

use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::super::tokenizer_error;
use super::{Control, LanguageTokenizer, Marks, Spelling, check_merge};
use crate::{Error, Result, weights::gguf::Gguf};

/// How Llama 3 splits text before merging, `{n}` digits at a time at most; Qwen 2 does the same digit by digit.
/// From the models' `tokenizer.json`.
const CASELESS_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{n}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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
}

/// The numbers of `tokenizer.ggml.token_type`. Types 2 (unknown) and 5 (unused) stand for no text.
pub(super) struct TokenType;

impl TokenType {
    pub(super) const NORMAL: i64 = 1;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
    pub(super) const BYTE: i64 = 6;
}

/// How text is cut before merging, by llama.cpp's name for it; and whether whole words are looked up first.
pub(super) fn byte_level_split(
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
pub(super) fn byte_level_bpe(
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
