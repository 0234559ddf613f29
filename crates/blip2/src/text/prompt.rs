//! What the language model reads: instruction, image and answers in the order it was trained with.
//!
//! One renderer serves training (answers given, marked as loss targets) and inference (the last answer is open), so the
//! two cannot drift apart. The image itself is not here: a [`Prompt`] says between which tokens its vectors go.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::LanguageTokenizer;
use crate::{Error, Result};

/// How a language model wants to be spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PromptFormat {
    /// Chat models with the marks `<|im_start|>` and `<|im_end|>`, without a system turn:
    /// `<|im_start|>user\n` image `\n{question}<|im_end|>\n<|im_start|>assistant\n` answer `<|im_end|>`; later turns
    /// follow after `\n`, without the image.
    ChatMl,
    /// Models that were not trained to chat: what `template` says, then the answer.
    Plain {
        /// The text around the image and the question, such as `{image}{prompt}` or
        /// `{image}Question: {prompt} Answer:`. In later turns `{image}` is left out.
        template: String,
        /// Whether the file's first-token mark follows the image (OPT in BLIP-2).
        bos: bool,
        /// Whether the file's end mark closes what is read before the last answer (T5: its encoder reads that, its decoder
        /// writes the answer).
        #[serde(default)]
        eos: bool,
        /// What ends an answer; the mark of the file when empty. OPT in BLIP-2: `\n`.
        end_of_answer: String,
        /// What stands between an answer and the next turn, instead of the end of the answer.
        between_turns: String,
    },
}

/// A question (or instruction) and its answer; only the last answer of a dialogue may be open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// What the user says.
    pub question: String,
    /// What the model said or should say.
    pub answer: Option<String>,
}

impl Turn {
    /// A turn that waits for its answer.
    pub fn open(question: impl Into<String>) -> Self {
        Self { question: question.into(), answer: None }
    }

    /// A turn with its answer.
    pub fn answered(question: impl Into<String>, answer: impl Into<String>) -> Self {
        Self { question: question.into(), answer: Some(answer.into()) }
    }
}

/// Token ids, where the image goes between them, and which of them are to be learned.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// All text tokens, in order.
    pub ids: Vec<u32>,
    /// The image's vectors go before `ids[image_at]` (or after the last token when equal to the length).
    pub image_at: Option<usize>,
    /// Ranges of `ids` that are answers with their end mark: the loss is on these.
    pub answers: Vec<Range<usize>>,
}

impl Prompt {
    /// The tokens before the image; all when there is none.
    pub fn before_image(&self) -> &[u32] {
        &self.ids[..self.image_at.unwrap_or(self.ids.len())]
    }

    /// The tokens after the image.
    pub fn after_image(&self) -> &[u32] {
        &self.ids[self.image_at.unwrap_or(self.ids.len())..]
    }

    /// For an encoder-decoder model: the ids that the encoder reads, the image's place among them being this prompt's, and
    /// those that the decoder learns to write. Nothing where the answer is not one, at the end and behind the image.
    pub fn read_and_written(&self) -> Option<(&[u32], &[u32])> {
        let [answer] = &self.answers[..] else { return None };
        let is_behind = self.image_at.is_none_or(|at| at <= answer.start);
        (is_behind && !answer.is_empty() && answer.end == self.ids.len())
            .then(|| self.ids.split_at(answer.start))
    }

    /// Rows of the language model's input when the image takes `n_image_rows`.
    pub fn n_rows(&self, n_image_rows: usize) -> usize {
        self.ids.len() + self.image_at.map_or(0, |_| n_image_rows)
    }

    /// The row of the language model's input that holds token `idx`.
    pub fn row_of(&self, idx: usize, n_image_rows: usize) -> usize {
        match self.image_at {
            Some(at) if idx >= at => idx + n_image_rows,
            _ => idx,
        }
    }

    /// For the loss: which row's logits predict a token of an answer, and that token. A row predicts the token after
    /// it; an answer's first token is predicted by the last row before it, be it text or image.
    pub fn targets(&self, n_image_rows: usize) -> impl Iterator<Item = (usize, u32)> {
        self.answers.iter().cloned().flatten().filter_map(move |idx| {
            // A token in the very first row is predicted by nothing.
            Some((self.row_of(idx, n_image_rows).checked_sub(1)?, self.ids[idx]))
        })
    }
}

/// A stretch of a prompt, before it is made of ids.
enum Part {
    Text(String),
    Control(&'static str),
    Bos,
    Eos,
    Image,
    Answer(String),
    /// The mark that ends an answer and belongs to it.
    EndOfAnswer,
}

const IM_START: &str = "<|im_start|>";
const IM_END: &str = "<|im_end|>";

impl PromptFormat {
    /// BLIP-2's prompt for language models that were only pre-trained: the image, then the text as it is.
    pub fn plain() -> Self {
        Self::Plain {
            template: "{image}{prompt}".into(),
            bos: false,
            eos: false,
            end_of_answer: String::new(),
            between_turns: " ".into(),
        }
    }

    /// The format for a language model, by the chat template in its file; [`plain`](Self::plain) when that is absent or
    /// not ChatML.
    pub fn for_model(tokenizer: &LanguageTokenizer) -> Self {
        match tokenizer.chat_template() {
            Some(template) if template.contains(IM_START) && template.contains(IM_END) => Self::ChatMl,
            _ => Self::plain(),
        }
    }

    /// Makes a dialogue into ids, with the image in its first turn if `with_image`.
    ///
    /// White space around questions and answers is left out. What users typed is encoded as text, whatever marks it
    /// imitates. The last turn's answer may be open: the ids then end where the model goes on. Where the end mark closes what
    /// is read, the last answer alone is one to be learned; those before it are read.
    ///
    /// # Errors
    /// [`Error::Request`] when there is no turn or an earlier answer is open; [`Error::Config`] when the template is
    /// none; [`Error::Tokenizer`] when the tokenizer lacks this format's marks.
    pub fn render(&self, tokenizer: &LanguageTokenizer, turns: &[Turn], with_image: bool) -> Result<Prompt> {
        let Some((last, earlier)) = turns.split_last() else {
            return Err(Error::Request("there is nothing to say: give a question".into()));
        };
        if earlier.iter().any(|turn| turn.answer.is_none())
            || last.answer.as_deref().is_some_and(|a| a.trim().is_empty())
        {
            return Err(Error::Request("a turn of the dialogue has no answer".into()));
        }
        let mut parts = Vec::new();
        for (turn_idx, turn) in turns.iter().enumerate() {
            let is_last = turn_idx + 1 == turns.len();
            self.push_turn(&mut parts, turn, turn_idx, with_image, is_last, last.answer.is_none())?;
        }
        self.assemble(tokenizer, parts)
    }

    /// The ids of an open prompt that is `text` as it stands, after the image and between the marks of the format. Models that
    /// chat read it as what the user says in the only turn, without white space around it.
    ///
    /// # Errors
    /// As [`render`](Self::render); [`Error::Request`] when a model that chats is told nothing.
    pub fn raw(&self, tokenizer: &LanguageTokenizer, text: &str) -> Result<Prompt> {
        match self {
            Self::ChatMl if text.trim().is_empty() => {
                let reason = "the prompt is empty: this model has to be told what to do with the picture";
                Err(Error::Request(reason.into()))
            }
            Self::ChatMl => self.render(tokenizer, &[Turn::open(text)], true),
            Self::Plain { bos, eos, .. } => {
                let mut parts = vec![Part::Image];
                parts.extend(bos.then_some(Part::Bos));
                parts.push(Part::Text(text.into()));
                parts.extend(eos.then_some(Part::Eos));
                self.assemble(tokenizer, parts)
            }
        }
    }

    /// [`render`](Self::render), leaving out the oldest turns until the prompt takes at most `limit` rows.
    ///
    /// # Errors
    /// Those of `render`; [`Error::TextTooLong`] when the last turn alone does not fit.
    pub fn render_within(
        &self,
        tokenizer: &LanguageTokenizer,
        turns: &[Turn],
        n_image_rows: Option<usize>,
        limit: usize,
    ) -> Result<Prompt> {
        let mut kept = turns;
        loop {
            let prompt = self.render(tokenizer, kept, n_image_rows.is_some())?;
            let n_rows = prompt.n_rows(n_image_rows.unwrap_or(0));
            if n_rows <= limit {
                return Ok(prompt);
            }
            if kept.len() == 1 {
                return Err(Error::TextTooLong { n_tokens: n_rows, limit });
            }
            kept = &kept[1..];
        }
    }

    /// The ids of an answer as the model would write it after an open prompt, with its end mark: for training and for
    /// ranking given answers.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn answer_ids(
        &self,
        tokenizer: &LanguageTokenizer,
        question: &str,
        answer: &str,
    ) -> Result<Vec<u32>> {
        let prompt = self.render(tokenizer, &[Turn::answered(question, answer)], false)?;
        Ok(prompt.answers.iter().cloned().flatten().map(|idx| prompt.ids[idx]).collect())
    }

    /// Whether an answer begins with a blank, as after `Answer:`.
    pub(crate) fn begins_answers_with_blank(&self) -> bool {
        match self {
            Self::ChatMl => false,
            Self::Plain { template, .. } => !template.ends_with(char::is_whitespace),
        }
    }

    /// Whether answers end with the same text or mark in both formats.
    pub(crate) fn ends_answers_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::ChatMl, Self::ChatMl) => true,
            (Self::Plain { end_of_answer: one, .. }, Self::Plain { end_of_answer: two, .. }) => one == two,
            _ => false,
        }
    }

    /// The ids that end an answer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer lacks the mark.
    pub fn end_of_answer(&self, tokenizer: &LanguageTokenizer) -> Result<Vec<u32>> {
        match self {
            Self::ChatMl => Ok(vec![control(tokenizer, IM_END)?]),
            Self::Plain { end_of_answer, .. } if end_of_answer.is_empty() => {
                Ok(vec![named(tokenizer.eos_id(), "end of a text")?])
            }
            Self::Plain { end_of_answer, .. } => tokenizer.encode_text(end_of_answer),
        }
    }

    fn push_turn(
        &self,
        parts: &mut Vec<Part>,
        turn: &Turn,
        turn_idx: usize,
        with_image: bool,
        is_last: bool,
        is_open: bool,
    ) -> Result<()> {
        let question = turn.question.trim();
        let answer = turn.answer.as_deref().map(str::trim);
        match self {
            Self::ChatMl => {
                if turn_idx > 0 {
                    parts.push(Part::Text("\n".into()));
                }
                parts.extend([Part::Control(IM_START), Part::Text("user\n".into())]);
                if turn_idx == 0 && with_image {
                    parts.extend([Part::Image, Part::Text("\n".into())]);
                }
                parts.extend([Part::Text(question.into()), Part::Control(IM_END), Part::Text("\n".into())]);
                parts.extend([Part::Control(IM_START), Part::Text("assistant\n".into())]);
                if let Some(answer) = answer {
                    parts.extend([Part::Answer(answer.into()), Part::EndOfAnswer]);
                }
            }
            Self::Plain { template, bos, eos, between_turns, .. } => {
                let refuse = || Error::Config {
                    field: "prompt.template".into(),
                    reason: format!("`{template}` needs {{image}} once, and {{prompt}} once behind it"),
                };
                let (before, behind) = template.split_once("{image}").ok_or_else(refuse)?;
                let (between, after) = behind.split_once("{prompt}").ok_or_else(refuse)?;
                if [before, between, after]
                    .iter()
                    .any(|text| text.contains("{image}") || text.contains("{prompt}"))
                {
                    return Err(refuse());
                }
                parts.push(Part::Text(before.into()));
                if turn_idx == 0 {
                    parts.extend(with_image.then_some(Part::Image));
                    parts.extend(bos.then_some(Part::Bos));
                }
                let text = format!("{between}{question}{after}");
                if let Some(answer) = answer.filter(|_| *eos && is_last) {
                    // Another part of the model writes it than has read the text: there is no blank between them.
                    parts.extend([
                        Part::Text(text),
                        Part::Eos,
                        Part::Answer(answer.into()),
                        Part::EndOfAnswer,
                    ]);
                } else if let Some(answer) = answer {
                    // A blank before a word belongs to the word's token.
                    let blank = if text.is_empty() || text.ends_with(char::is_whitespace) { "" } else { " " };
                    if is_open || *eos {
                        // Nothing is to be learned: the dialogue is one text, and its tokens may reach across answers.
                        parts.push(Part::Text(format!("{text}{blank}{answer}{between_turns}")));
                        return Ok(());
                    }
                    parts.extend([Part::Text(text), Part::Answer(format!("{blank}{answer}"))]);
                    parts.push(if is_last { Part::EndOfAnswer } else { Part::Text(between_turns.clone()) });
                } else {
                    parts.push(Part::Text(text));
                    parts.extend(eos.then_some(Part::Eos));
                }
            }
        }
        Ok(())
    }

    /// Encodes the parts. Neighbouring texts are encoded as one, since tokens may reach across; answers alone, as the
    /// model writes them after the prompt's last token.
    fn assemble(&self, tokenizer: &LanguageTokenizer, parts: Vec<Part>) -> Result<Prompt> {
        let mut prompt = Prompt::default();
        let mut text = String::new();
        for part in parts {
            if let Part::Text(more) = &part {
                text.push_str(more);
                continue;
            }
            prompt.ids.extend(tokenizer.encode_text(&text)?);
            text.clear();
            match part {
                Part::Text(_) => {}
                Part::Control(mark) => prompt.ids.push(control(tokenizer, mark)?),
                Part::Bos => prompt.ids.push(named(tokenizer.bos_id(), "beginning of a text")?),
                Part::Eos => prompt.ids.push(named(tokenizer.eos_id(), "end of a text")?),
                Part::Image => prompt.image_at = Some(prompt.ids.len()),
                Part::Answer(answer) => {
                    let start = prompt.ids.len();
                    prompt.ids.extend(tokenizer.encode_text(&answer)?);
                    prompt.answers.push(start..prompt.ids.len());
                }
                Part::EndOfAnswer => {
                    prompt.ids.extend(self.end_of_answer(tokenizer)?);
                    if let Some(answer) = prompt.answers.last_mut() {
                        answer.end = prompt.ids.len();
                    }
                }
            }
        }
        prompt.ids.extend(tokenizer.encode_text(&text)?);
        Ok(prompt)
    }
}

fn control(tokenizer: &LanguageTokenizer, mark: &str) -> Result<u32> {
    tokenizer.control_id(mark).ok_or_else(|| {
        Error::Tokenizer(format!("the language model has no `{mark}`: its prompt format is another"))
    })
}

fn named(id: Option<u32>, role: &str) -> Result<u32> {
    id.ok_or_else(|| Error::Tokenizer(format!("the language model's file names no token for the {role}")))
}

#[cfg(test)]
mod tests;
