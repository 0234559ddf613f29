//! The tokenizer in a Hugging Face folder, in each of the forms in which it is published.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::{
    AddedToken, Tokenizer,
    decoders::{DecoderWrapper, byte_level::ByteLevel as ByteLevelDecoder},
    models::{
        bpe::{BPE, Vocab},
        unigram::Unigram,
    },
    normalizers::Precompiled,
    pre_tokenizers::{
        byte_level::ByteLevel,
        metaspace::{Metaspace, PrependScheme},
        sequence::Sequence,
        whitespace::WhitespaceSplit,
    },
};

use super::sentencepiece::{Pieces, Role};
use super::{Control, LanguageTokenizer, Marks, Spelling, TokenBytes, check_merge};
use crate::{Error, Result};

/// What a role of a token is called in `tokenizer_config.json` and `special_tokens_map.json`.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// What T5 and OPT call them, for a vocabulary without the files that say so; OPT's texts begin with a mark too.
const USUAL: [(&str, &str); 4] =
    [("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>"), ("bos_token", "</s>")];

/// Makes a tokenizer of a folder's files, before tokens are added.
type Build = fn(&Path, &Json) -> std::result::Result<Tokenizer, String>;

impl LanguageTokenizer {
    /// Reads the tokenizer of a Hugging Face folder: `tokenizer.json`; or `vocab.json` with `merges.txt`, a byte-level BPE
    /// that splits as GPT-2 and OPT do; or `spiece.model`, T5's SentencePiece model. Which tokens steer the model and which
    /// were added later is read in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when the folder has none of these, or one that is damaged or contradicts the others.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let has = |name: &str| folder.join(name).is_file();
        if has("tokenizer.json") {
            return Self::from_json(folder.join("tokenizer.json"));
        }
        let (file, build, usual): (_, Build, _) = if has("vocab.json") && has("merges.txt") {
            ("vocab.json", byte_level, &USUAL[..])
        } else if has("spiece.model") {
            ("spiece.model", unigram, &USUAL[..3])
        } else {
            let reason =
                "has no tokenizer: neither tokenizer.json, nor vocab.json with merges.txt, nor spiece.model";
            return Err(Error::File { path: folder.into(), reason: reason.into() });
        };
        let refuse = |reason: String| Error::File { path: folder.join(file), reason };
        let mut config = read_config(folder)?;
        let mut plain = build(folder, &config).map_err(refuse)?;
        for &(role, text) in usual {
            if config[role].is_null() && plain.token_to_id(text).is_some() {
                config[role] = text.into();
            }
        }
        add_tokens(&mut plain, &config).map_err(refuse)?;
        Self::from_tokenizer(plain, &config).map_err(refuse)
    }

    /// Reads a Hugging Face `tokenizer.json`; the roles of tokens and the chat template come from the files beside it, as for
    /// [`from_folder`](Self::from_folder). Truncation and padding that the file asks for are switched off.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when it is not a tokenizer.
    pub fn from_json(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes =
            crate::small_file::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let config = read_config(path.parent().unwrap_or(Path::new("")))?;
        let refuse = |reason: String| Error::File { path: path.into(), reason };
        Self::from_json_bytes(&bytes, &config).map_err(refuse)
    }

    pub(super) fn from_json_bytes(bytes: &[u8], config: &Json) -> std::result::Result<Self, String> {
        let parsed: Json =
            serde_json::from_slice(bytes).map_err(|error| format!("not a tokenizer: {error}"))?;
        check_merges(&parsed)?;
        let mut plain = Tokenizer::from_bytes(bytes)
            .map_err(|error| format!("not a tokenizer that can be read: {error}"))?;
        plain.with_truncation(None).map_err(|error| error.to_string())?;
        plain.with_padding(None);
        Self::from_tokenizer(plain, config)
    }

    fn from_tokenizer(mut plain: Tokenizer, config: &Json) -> std::result::Result<Self, String> {
        // From here on control tokens in a text are text to it.
        plain.set_encode_special_tokens(true);
        let controls: Vec<_> = plain
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| Control { text: token.content, id, strips: [token.lstrip, token.rstrip] })
            .collect();
        let role = |name: &str| content(&config[name]).and_then(|text| plain.token_to_id(text));
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
            let words = match plain.get_decoder() {
                Some(DecoderWrapper::Metaspace(words)) => Some(words),
                _ => None,
            };
            Spelling::Decoder {
                pieces: piece_bytes(&plain, n_tokens),
                begins_with_blank: words.is_some_and(|words| words.prepend_scheme != PrependScheme::Never),
            }
        };
        Ok(Self::new(plain, controls, spelling, ids, n_tokens, chat_template))
    }
}

/// What SentencePiece's pieces are within a text, as the tokenizer's decoder has it; `None` where that is another's.
fn piece_bytes(plain: &Tokenizer, n_tokens: usize) -> Option<TokenBytes> {
    let is_replacement = |step: &DecoderWrapper| {
        // The step keeps its pattern to itself.
        serde_json::to_value(step)
            .is_ok_and(|step| step["pattern"]["String"] == "▁" && step["content"] == " ")
    };
    let (mark, has_bytes) = match plain.get_decoder()? {
        DecoderWrapper::Metaspace(words) => (words.get_replacement(), false),
        // Llama's: `<0x0A>` is a byte.
        DecoderWrapper::Sequence(steps) => {
            let steps = steps.get_decoders();
            let is_known = |step: &DecoderWrapper| match step {
                DecoderWrapper::ByteFallback(_) | DecoderWrapper::Fuse(_) | DecoderWrapper::Strip(_) => true,
                step => is_replacement(step),
            };
            if !steps.iter().any(is_replacement) || !steps.iter().all(is_known) {
                return None;
            }
            ('▁', steps.iter().any(|step| matches!(step, DecoderWrapper::ByteFallback(_))))
        }
        _ => return None,
    };
    let mut pieces = TokenBytes::default();
    for id in 0..n_tokens as u32 {
        let piece = plain.id_to_token(id).unwrap_or_default();
        let byte = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        let byte = byte.filter(|digits| has_bytes && digits.len() == 2);
        match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => pieces.push(&[byte]),
            // Stands for any text, not for its name, also where it is no control token.
            None if piece == "<unk>" => pieces.push(&[]),
            None => pieces.push(piece.replace(mark, " ").as_bytes()),
        }
    }
    Some(pieces)
}

/// The files beside a tokenizer as one: `tokenizer_config.json`, and of `special_tokens_map.json` and `added_tokens.json` what it
/// does not say itself.
fn read_config(folder: &Path) -> Result<Json> {
    let read = |name: &str| -> Result<Json> {
        let path = folder.join(name);
        match crate::small_file::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .ok()
                .filter(Json::is_object)
                .ok_or_else(|| Error::File { path, reason: "is not a JSON object".into() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Json::Object(Default::default()))
            }
            Err(source) => Err(Error::Io { path, source }),
        }
    };
    let (mut config, roles, added) =
        (read("tokenizer_config.json")?, read("special_tokens_map.json")?, read("added_tokens.json")?);
    for name in ROLES.into_iter().chain(["additional_special_tokens"]) {
        if config[name].is_null() {
            config[name] = roles[name].clone();
        }
    }
    if !config["added_tokens_decoder"].is_object() {
        config["added_tokens_decoder"] = Json::Object(Default::default());
    }
    for (text, id) in added.as_object().into_iter().flatten() {
        let known = &mut config["added_tokens_decoder"][id.to_string()];
        if known.is_null() {
            *known = serde_json::json!({"content": text, "special": true});
        }
    }
    Ok(config)
}

/// A token is written as its text, or as an object that holds it.
fn content(token: &Json) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// `vocab.json` and `merges.txt`.
fn byte_level(folder: &Path, config: &Json) -> std::result::Result<Tokenizer, String> {
    let read =
        |name: &str| crate::small_file::read(folder.join(name)).map_err(|error| format!("{name}: {error}"));
    let vocab: BTreeMap<String, u32> = serde_json::from_slice(&read("vocab.json")?)
        .map_err(|error| format!("is not a table of tokens and their numbers: {error}"))?;
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let merges = String::from_utf8(read("merges.txt")?).map_err(|_| "merges.txt is not a text in UTF-8")?;
    let merges = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
        .map(|line| {
            let (left, right) = line
                .split_once(' ')
                .ok_or_else(|| format!("merges.txt has the line `{line}` without a blank"))?;
            check_merge(left, right, longest)?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<std::result::Result<Vec<_>, String>>()?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
        .build()
        .map_err(|error| format!("merges.txt does not fit it: {error}"))?;
    let mut plain = Tokenizer::new(bpe);
    let prefix_space = config["add_prefix_space"].as_bool().unwrap_or(false);
    plain.with_pre_tokenizer(Some(ByteLevel::new(prefix_space, true, true)));
    plain.with_decoder(Some(ByteLevelDecoder::default()));
    Ok(plain)
}

/// `spiece.model`, read as transformers reads T5's: white space only separates words, and every word begins with its mark.
fn unigram(folder: &Path, config: &Json) -> std::result::Result<Tokenizer, String> {
    let bytes = crate::small_file::read(folder.join("spiece.model")).map_err(|error| error.to_string())?;
    let Pieces { pieces, charsmap } = Pieces::parse(&bytes)?;
    let mut texts = HashSet::new();
    if let Some(twice) = pieces.iter().find(|piece| !texts.insert(&piece.text)) {
        return Err(format!("has the piece `{}` twice", twice.text));
    }
    let unknown = pieces.iter().position(|piece| piece.role == Role::Unknown);
    let controls: Vec<_> = pieces
        .iter()
        .filter(|piece| matches!(piece.role, Role::Unknown | Role::Control))
        .map(|piece| AddedToken::from(piece.text.clone(), true).normalized(false))
        .collect();
    let vocab = pieces.into_iter().map(|piece| (piece.text, f64::from(piece.score))).collect();
    let model = Unigram::from(vocab, Some(unknown.ok_or("has no token for what is unknown")?), false)
        .map_err(|error| error.to_string())?;
    let mut plain = Tokenizer::new(model);
    if !charsmap.is_empty() {
        let normalizer =
            Precompiled::from(&charsmap).map_err(|error| format!("has a damaged normaliser: {error}"))?;
        plain.with_normalizer(Some(normalizer)).map_err(|error| error.to_string())?;
    }
    let words = Metaspace::new('▁', PrependScheme::Always, true);
    plain.with_pre_tokenizer(Some(Sequence::new(vec![WhitespaceSplit.into(), words.clone().into()])));
    plain.with_decoder(Some(words));
    plain.add_special_tokens(controls).map_err(|error| error.to_string())?;
    // The sentinels of T5's training come behind the pieces, the last one first, unless they are pieces themselves.
    let n_sentinels = config["extra_ids"].as_u64().unwrap_or(100).min(10_000);
    let sentinels =
        (0..n_sentinels).rev().map(|i| AddedToken::from(format!("<extra_id_{i}>"), true).normalized(false));
    plain.add_special_tokens(sentinels.collect::<Vec<_>>()).map_err(|error| error.to_string())?;
    Ok(plain)
}

/// Adds the tokens that the files beside the vocabulary name. One that is not in the vocabulary must come right behind it.
fn add_tokens(plain: &mut Tokenizer, config: &Json) -> std::result::Result<(), String> {
    let mut added = BTreeMap::new();
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let id: u32 = id.parse().map_err(|_| format!("an added token has the number `{id}`"))?;
        let text = content(token).filter(|text| !text.is_empty());
        let text = text.ok_or_else(|| format!("the added token {id} has no text"))?;
        let strips = |side: &str| token[side].as_bool().unwrap_or(false);
        let made = AddedToken::from(text.to_owned(), token["special"].as_bool().unwrap_or(true))
            .normalized(false)
            .lstrip(strips("lstrip"))
            .rstrip(strips("rstrip"));
        added.insert(id, made);
    }
    for (id, token) in added {
        let (text, special) = (token.content.clone(), token.special);
        let tokens = [token];
        let result = if special { plain.add_special_tokens(tokens) } else { plain.add_tokens(tokens) };
        result.map_err(|error| error.to_string())?;
        match plain.token_to_id(&text) {
            Some(found) if found == id => {}
            found => {
                let found = found.map_or("no number".to_owned(), |found| found.to_string());
                return Err(format!(
                    "the added token `{text}` should be {id}, but gets {found}: it belongs to another vocabulary"
                ));
            }
        }
    }
    // Tokens of the vocabulary that steer the model.
    let named = ROLES.iter().map(|name| &config[*name]);
    let named = named.chain(config["additional_special_tokens"].as_array().into_iter().flatten());
    let known: Vec<_> = named
        .filter_map(content)
        .filter(|text| plain.token_to_id(text).is_some())
        .map(|text| AddedToken::from(text.to_owned(), true).normalized(false))
        .collect();
    plain.add_special_tokens(known).map_err(|error| error.to_string())?;
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
