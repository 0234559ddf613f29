//! Text to token ids and back.
//!
//! Two tokenizers meet in a BLIP-2: [`BertTokenizer`] for what the Q-Former reads and writes, [`LanguageTokenizer`] for
//! the language model behind it. [`prompt`] puts instruction, image and answer in the order that the language model was
//! trained with. A [`Grammar`] says what an answer has to be. What a user typed never becomes a control token: only this crate's own prompt parts do.

mod bert;
mod grammar;
mod language;
pub mod prompt;

pub use bert::BertTokenizer;
pub use grammar::{AnswerForm, Grammar, Grammars};
pub use language::{LanguageTokenizer, StreamDecoder};
pub use prompt::{Prompt, PromptFormat, Turn};

/// What the tokenizers of Hugging Face folders are kept in; none has all of them.
pub const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "vocab.txt",
];

/// A caption as the Q-Former reads it, in training and afterwards: lower case, punctuation to spaces, at most 50 words
/// (LAVIS `blip_caption`).
pub fn clean_caption(caption: &str) -> String {
    let spaced = caption.to_lowercase().replace(['.', '!', '"', '(', ')', '*', '#', ':', ';', '~'], " ");
    spaced.split_whitespace().take(50).collect::<Vec<_>>().join(" ")
}

/// An error of the `tokenizers` crate in this crate's terms.
fn tokenizer_error(error: impl std::fmt::Display) -> crate::Error {
    crate::Error::Tokenizer(error.to_string())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::LanguageTokenizer;
    use crate::weights::gguf::Gguf;

    type IdsOfText = Vec<(String, Vec<u32>)>;

    #[test]
    fn captions_are_cleaned_as_lavis_does() {
        assert_eq!(super::clean_caption("A dog (brown) runs; it's fast !"), "a dog brown runs it's fast");
        assert_eq!(super::clean_caption(&"word ".repeat(60)).split(' ').count(), 50);
    }

    fn parse(json: &str, column: &str) -> IdsOfText {
        let rows: Vec<serde_json::Value> = serde_json::from_str(json).unwrap();
        rows.iter()
            .map(|row| {
                let ids = row[column].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
                (row["text"].as_str().unwrap().into(), ids.collect())
            })
            .collect()
    }

    /// Texts with the ids that another implementation gives them.
    pub(crate) fn golden_texts(column: &str) -> IdsOfText {
        parse(include_str!("../tests/golden/tokens.json"), column)
    }

    /// More of them, where the shared data is at hand.
    pub(crate) fn shared_golden_texts(column: &str) -> IdsOfText {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/tokenizers/golden.json");
        match std::fs::read_to_string(path) {
            Ok(json) => parse(&json, column),
            Err(_) => {
                skipped("the shared tokenizer goldens are not here");
                Vec::new()
            }
        }
    }

    /// A tokenizer of a few hundred tokens in the default model's format.
    pub(crate) fn tiny_tokenizer() -> LanguageTokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny_tokenizer.gguf");
        LanguageTokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap()
    }

    /// The default language model's own, where its file is at hand.
    pub(crate) fn frozen_tokenizer() -> Option<LanguageTokenizer> {
        let Some(folder) = std::env::var_os("BLIP2_FROZEN") else {
            skipped("BLIP2_FROZEN does not name the folder of the frozen models");
            return None;
        };
        let path = std::path::Path::new(&folder).join("SmolLM2-135M-Instruct.Q4_1.gguf");
        Some(LanguageTokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap())
    }

    #[allow(clippy::print_stderr)] // the one way a test can say that it did not run
    fn skipped(why: &str) {
        eprintln!("SKIPPED: {why}");
    }
}
