//! Whether a text leaves room for an answer, known from a folder's small files.

use std::path::{Path, PathBuf};

use super::hugging_face;
use super::parts::{language_context_len, language_tokenizer};
use super::{ModelConfig, find_frozen};
use crate::text::{LanguageTokenizer, PromptFormat, Turn};
use crate::{Error, Result};

/// What a model that writes is to go on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given<'a> {
    /// A text as it stands, for [`Blip2::complete`](super::Blip2::complete).
    Text(&'a str),
    /// A question, for [`Blip2::ask`](super::Blip2::ask).
    Question(&'a str),
}

/// Refuses a text that leaves no room for an answer, before a weight is read: the small files of a folder say it. Of a folder of
/// this project the language model is looked for in `frozen`, too; where it is not, nothing is refused.
///
/// # Errors
/// [`Error::TextTooLong`], or why the small files cannot be read.
pub fn check_prompt(folder: impl AsRef<Path>, frozen: &[PathBuf], given: Given<'_>) -> Result<()> {
    let folder = folder.as_ref();
    let checked = match hugging_face::read_config(folder)? {
        Some(json) => hugging_face::check_prompt(folder, &json, given),
        None => check_own(folder, frozen, given),
    };
    checked.map_err(|error| error.in_folder(folder))
}

/// Of a folder of this project.
fn check_own(folder: &Path, frozen: &[PathBuf], given: Given<'_>) -> Result<()> {
    // No language model reads so little; its vocabulary, which a file has before its sizes, need not be read for it.
    const SHORT: usize = 256;
    let (Given::Text(words) | Given::Question(words)) = given;
    if words.len() <= SHORT {
        return Ok(());
    }
    let config = ModelConfig::read(folder)?;
    let Some(stage2) = config.stage2 else { return Ok(()) };
    let Ok(path) = find_frozen(folder, frozen, &stage2.language_model) else { return Ok(()) };
    let reader = Reader {
        n_queries: config.qformer.num_query_tokens,
        context_len: language_context_len(&path)?,
        caption_prompt: stage2.caption_prompt.unwrap_or_else(|| stage2.prompt.clone()),
        prompt: stage2.prompt,
    };
    reader.check(given, || language_tokenizer(&path))
}

/// Tokens of the words that are put around a question, at most: a form of its own that is longer is refused when it is read.
const LONGEST_FORM: usize = 256;

/// What reads a prompt.
pub(super) struct Reader {
    pub(super) n_queries: usize,
    pub(super) context_len: usize,
    /// How questions are asked.
    pub(super) prompt: PromptFormat,
    /// How captions are asked for.
    pub(super) caption_prompt: PromptFormat,
}

impl Reader {
    /// Refuses what it could not read; `tokenizer` is asked for where the text's length alone does not say it.
    pub(super) fn check(
        &self,
        given: Given<'_>,
        tokenizer: impl FnOnce() -> Result<LanguageTokenizer>,
    ) -> Result<()> {
        // An answer has at least one token.
        let limit = self.context_len.saturating_sub(1);
        let (Given::Text(words) | Given::Question(words)) = given;
        // Most texts are short, and no token is less than a byte: then the tokenizer is read only once, with the model.
        if self.n_queries.saturating_add(words.len()).saturating_add(LONGEST_FORM) <= limit {
            return Ok(());
        }
        let tokenizer = tokenizer()?;
        let prompt = match given {
            Given::Text(words) => self.caption_prompt.raw(&tokenizer, words)?,
            Given::Question(words) => self.prompt.render(&tokenizer, &[Turn::open(words)], true)?,
        };
        let n_tokens = prompt.n_rows(self.n_queries);
        if n_tokens > limit { Err(Error::TextTooLong { n_tokens, limit }) } else { Ok(()) }
    }
}
