//! How texts are read that are compared with pictures, and whether they can be.

use std::path::Path;

use super::{ModelConfig, Preset, hugging_face};
use crate::text::{BertTokenizer, clean_caption};
use crate::{Error, Result};

/// What happens to a text before it is cut into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Texts {
    /// Cleaned as the captions of training were, LAVIS's and those here ([`clean_caption`]).
    Cleaned,
    /// Cleaned, and cut where LAVIS cuts.
    Lavis,
    /// Left as it is, as transformers does.
    AsGiven,
}

/// Tokens that LAVIS's models read of a text that is matched (`max_txt_len`); what they only embed they read whole.
pub(super) const LAVIS_MATCH_TOKENS: usize = 32;

/// Tokens that LAVIS reads of a text in its evaluation of retrieval.
pub(super) const LAVIS_RETRIEVAL_TOKENS: usize = 35;

impl Texts {
    /// What the implementation of a preset does with a text; without a preset what the model does by itself.
    pub(super) fn of(preset: Option<Preset>, own: Self) -> Self {
        match preset {
            Some(Preset::Hf) => Self::AsGiven,
            Some(Preset::Lavis) => Self::Lavis,
            None => own,
        }
    }

    /// What is read of a text.
    ///
    /// # Errors
    /// [`Error::Request`] where that is nothing.
    fn prepare(self, text: &str) -> Result<String> {
        let read = match self {
            Self::Cleaned | Self::Lavis => clean_caption(text),
            Self::AsGiven => text.to_owned(),
        };
        if read.trim().is_empty() { Err(Error::Request(nothing_to_compare(text))) } else { Ok(read) }
    }

    /// How many tokens are read of texts that LAVIS reads so many of; nothing for all.
    fn cut(self, lavis_tokens: Option<usize>) -> Option<usize> {
        lavis_tokens.filter(|_| self == Self::Lavis)
    }
}

/// Makes texts into tokens.
#[derive(Debug)]
pub(super) struct TextReader {
    tokenizer: BertTokenizer,
    texts: Texts,
    /// Tokens that the Q-Former reads.
    limit: usize,
}

impl TextReader {
    pub(super) fn new(tokenizer: BertTokenizer, texts: Texts, limit: usize) -> Self {
        Self { tokenizer, texts, limit }
    }

    /// The tokens of a text that LAVIS reads so many of.
    ///
    /// # Errors
    /// When nothing of it is left to compare, or it is too long.
    pub(super) fn ids(&self, text: &str, lavis_tokens: Option<usize>) -> Result<Vec<u32>> {
        let (read, limit) = (self.texts.prepare(text)?, self.limit);
        // One more than fits, so that a text that is too long is told from one that just fits.
        let n_wanted = self.texts.cut(lavis_tokens).map_or(limit + 1, |cut| cut.min(limit));
        let ids = self.tokenizer.encode(&read, n_wanted)?;
        if ids.len() > limit { Err(Error::TextTooLong { n_tokens: ids.len(), limit }) } else { Ok(ids) }
    }
}

/// What texts are compared with pictures for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    /// [`Blip2::match_texts`](super::Blip2::match_texts).
    Matched,
    /// [`Blip2::embed_texts`](super::Blip2::embed_texts), or labels of [`Blip2::classify`](super::Blip2::classify).
    Embedded,
}

/// Refuses texts that the model in a folder could not compare, before a weight is read: its small files say it. A model that
/// compares nothing refuses nothing here.
///
/// # Errors
/// When nothing of a text is left to compare, or it is too long; or why the small files cannot be read.
pub fn check_texts(
    folder: impl AsRef<Path>,
    texts: &[&str],
    compared: Compared,
    preset: Option<Preset>,
) -> Result<()> {
    let folder = folder.as_ref();
    let Some((own, limit, vocabulary)) = about(folder).map_err(|error| error.in_folder(folder))? else {
        return Ok(());
    };
    let (how, lavis_tokens) =
        (Texts::of(preset, own), (compared == Compared::Matched).then_some(LAVIS_MATCH_TOKENS));
    let mut may_be_long = false;
    for text in texts {
        // No token is less than a byte, and two more stand around them: most texts need no tokenizer here.
        let n_bytes = how.prepare(text)?.len();
        may_be_long |= n_bytes + 2 > limit;
    }
    if !may_be_long || how.cut(lavis_tokens).is_some() {
        return Ok(());
    }
    let reader = TextReader::new(vocabulary()?, how, limit);
    texts.iter().try_for_each(|text| reader.ids(text, lavis_tokens).map(drop))
}

/// Opens a vocabulary.
type Vocabulary = Box<dyn FnOnce() -> Result<BertTokenizer>>;

/// Of a model that compares: what it does with texts by itself, how many tokens it reads, and its vocabulary.
fn about(folder: &Path) -> Result<Option<(Texts, usize, Vocabulary)>> {
    if let Some(json) = hugging_face::read_config(folder)? {
        if !hugging_face::is_retrieval(&json) {
            return Ok(None);
        }
        let (limit, folder) =
            (hugging_face::qformer_config(&json)?.max_position_embeddings, folder.to_owned());
        let open: Vocabulary = Box::new(move || BertTokenizer::from_folder(folder));
        return Ok(Some((Texts::AsGiven, limit, open)));
    }
    let config = ModelConfig::read(folder)?;
    Ok(config.stage1.map(|stage1| {
        let vocabulary = folder.join(stage1.vocabulary);
        let open: Vocabulary = Box::new(move || BertTokenizer::from_vocab(vocabulary));
        (Texts::Cleaned, config.qformer.max_position_embeddings, open)
    }))
}

/// Why a text cannot be compared of which nothing is left.
fn nothing_to_compare(text: &str) -> String {
    if text.trim().is_empty() {
        return "a text to compare with the picture is empty".into();
    }
    format!("the text {text:?} to compare with the picture has nothing but punctuation, which is not read")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of several texts the one that is wrong is told from the others.
    #[test]
    fn a_text_without_words_is_named() {
        assert!(nothing_to_compare(" ").contains("empty"));
        let said = nothing_to_compare("!!!");
        assert!(said.contains("\"!!!\"") && said.contains("punctuation"), "{said}");
    }

    /// The weights of the folder are not there: only its small files are looked at.
    #[test]
    fn a_text_that_is_too_long_is_known_before_the_weights() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let (default, itm) =
            (format!("{root}/assets/default-model"), format!("{root}/crates/blip2/tests/golden/blip2_itm"));
        for (from, files) in [(default, ["config.json", "vocab.txt"]), (itm, ["config.json", "vocab.txt"])] {
            let dir = tempfile::tempdir().unwrap();
            for file in files {
                std::fs::copy(format!("{from}/{file}"), dir.path().join(file)).unwrap();
            }
            let check = |texts: &[&str], compared, preset| check_texts(dir.path(), texts, compared, preset);
            // One word: of a text that is cleaned only so many are read.
            let long = "a-".repeat(600);
            for preset in [None, Some(Preset::Hf)] {
                for compared in [Compared::Matched, Compared::Embedded] {
                    let error = check(&["a cat", &long], compared, preset).unwrap_err();
                    assert!(
                        matches!(error, Error::TextTooLong { n_tokens, limit } if n_tokens > limit),
                        "{error}"
                    );
                    check(&["a cat"], compared, preset).unwrap();
                    assert!(check(&["a cat", " "], compared, preset).is_err());
                }
            }
            check(&[&long], Compared::Matched, Some(Preset::Lavis)).expect("it is cut");
            // The longest that fits, in words of one token: two marks stand around them.
            let limit = about(dir.path()).unwrap().unwrap().1;
            for (n, fits) in [(limit - 2, true), (limit - 1, false)] {
                let text = vec!["a"; n].join(" ");
                assert_eq!(check(&[&text], Compared::Embedded, Some(Preset::Hf)).is_ok(), fits, "{n}");
            }
        }
    }
}
