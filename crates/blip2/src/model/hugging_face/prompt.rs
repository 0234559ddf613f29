//! Whether a text leaves room for an answer, known from a folder's small files.

use std::path::Path;

use serde_json::Value as Json;

use super::config::size;
use super::{Family, TrainedWith, text_config, tokenizer};
use crate::language::context_len;
use crate::model::Given;
use crate::text::Turn;
use crate::{Error, Result};

/// Tokens of the words that are put around a question, at most: a form of its own that is longer is refused when it is read.
const LONGEST_FORM: usize = 256;

/// Refuses what the model in a folder could not read, in the words of the model that reads it.
pub(in crate::model) fn check_prompt(folder: &Path, json: &Json, given: Given<'_>) -> Result<()> {
    // A model that only matches is refused for that.
    if json["architectures"][0] == "Blip2ForImageTextRetrieval" {
        return Ok(());
    }
    check(folder, json, given).map_err(|error| error.in_folder(folder))
}

fn check(folder: &Path, json: &Json, given: Given<'_>) -> Result<()> {
    let text = text_config(json);
    let family = Family::of(&text)?;
    let n_queries = size(json, "config", "num_query_tokens", 32)?;
    // An answer has at least one token.
    let limit = context_len(&text)?.saturating_sub(1);
    let (Given::Text(words) | Given::Question(words)) = given;
    // Most texts are short, and no token is less than a byte: then the tokenizer is read only once, with the model.
    if n_queries.saturating_add(words.len()).saturating_add(LONGEST_FORM) <= limit {
        return Ok(());
    }
    let tokenizer = tokenizer(folder, &text, family)?;
    let TrainedWith { prompt, caption_prompt, .. } = TrainedWith::read(json)?;
    let prompt = match given {
        Given::Text(words) => caption_prompt.unwrap_or_else(|| family.caption()).raw(&tokenizer, words)?,
        Given::Question(words) => {
            prompt.unwrap_or_else(|| family.question()).render(&tokenizer, &[Turn::open(words)], true)?
        }
    };
    let n_tokens = prompt.n_rows(n_queries);
    if n_tokens > limit { Err(Error::TextTooLong { n_tokens, limit }) } else { Ok(()) }
}
