//! When a text is complete.

use super::FinishReason;
use crate::Result;

/// Turns token ids into text.
pub(super) type DecodeText<'a> = &'a (dyn Fn(&[u32]) -> Result<String> + 'a);

/// The tokens and strings that end a text.
#[derive(Clone, Copy, Default)]
pub struct StopRules<'a> {
    end_tokens: &'a [u32],
    decode: Option<DecodeText<'a>>,
}

impl std::fmt::Debug for StopRules<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StopRules").field("end_tokens", &self.end_tokens).finish_non_exhaustive()
    }
}

impl<'a> StopRules<'a> {
    /// Texts end with any of `end_tokens`.
    pub fn new(end_tokens: &'a [u32]) -> Self {
        Self { end_tokens, decode: None }
    }

    /// With the decoder that stop strings are looked for with.
    pub fn with_text(self, decode: DecodeText<'a>) -> Self {
        Self { decode: Some(decode), ..self }
    }

    pub(super) fn end_tokens(&self) -> &'a [u32] {
        self.end_tokens
    }

    pub(super) fn can_decode(&self) -> bool {
        self.decode.is_some()
    }

    /// Whether the last token of `tokens` completes the text.
    pub(super) fn check(&self, tokens: &[u32], stop_strings: &[String]) -> Result<Option<FinishReason>> {
        if tokens.last().is_some_and(|token| self.end_tokens.contains(token)) {
            return Ok(Some(FinishReason::EndOfText));
        }
        let (Some(decode), Some(longest)) = (self.decode, stop_strings.iter().map(String::len).max()) else {
            return Ok(None);
        };
        // Every token is at least a byte, so a string that the last token completes lies within this many tokens; some
        // more, for a decoder that treats the first one specially and for tokens that are not shown.
        let tail = &tokens[tokens.len().saturating_sub(longest + 8)..];
        let text = decode(tail)?;
        let is_there = stop_strings.iter().any(|stop| text.contains(stop.as_str()));
        Ok(is_there.then_some(FinishReason::StopString))
    }
}
