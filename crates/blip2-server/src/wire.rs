//! What the interfaces have in common: values that come in several forms, and conversations.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

use blip2::generate::{Constraint, FinishReason, GenerationConfig};
use blip2::model::{Answer, Stage2Config};
use blip2::text::Turn;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::answer_form::Form;
use crate::app::App;
use crate::body::Memory;
use crate::engine::{Event, Token, Write, Written};
use crate::error::ApiError;
use crate::generation::Manner;
use crate::picture::Source;

/// A value, or a list of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected one value or a list, each of the right type")]
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(crate) fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }

    pub(crate) fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// What has to be a JSON object. Where a structure is wanted serde would take a list of its values too, in an order that nobody
/// has promised.
#[derive(Debug, Clone)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }

        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// One of several words, or nothing: for `deserialize_with`. In the place of a word alone, serde_json calls every other kind of
/// value malformed.
pub(crate) fn choice<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let word: Option<String> = Option::deserialize(deserializer)?;
    word.map(|word| T::deserialize(word.into_deserializer())).transpose()
}

/// A picture, as `{"url": …}` or as the URL or base64 itself.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a text or {\"url\": …}")]
pub(crate) enum ImageField {
    Text(String),
    Object { url: String },
}

impl ImageField {
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { url: text } => text,
        }
    }
}

/// A message of a conversation, whichever interface it came through.
#[derive(Debug, Default)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) text: String,
    pub(crate) pictures: Vec<String>,
}

/// A conversation about a picture that waits for an answer.
#[derive(Debug)]
pub(crate) struct Dialogue {
    /// None: the picture is to be described.
    pub(crate) turns: Vec<Turn>,
    pub(crate) picture: Source,
}

impl Dialogue {
    /// A conversation from its messages: one picture, in what the user says first; system messages, for which the models
    /// here have no place, are said before the first question.
    pub(crate) fn new(messages: Vec<Message>, max_text_bytes: usize) -> Result<Self, ApiError> {
        let invalid = |message: &str| ApiError::invalid("messages", message);
        if messages.iter().map(|message| message.text.len()).sum::<usize>() > max_text_bytes {
            return Err(invalid(&format!("the text of all messages has more than {max_text_bytes} bytes")));
        }
        let mut turns: Vec<Turn> = Vec::new();
        let mut pictures = Vec::new();
        let mut system = Vec::new();
        for mut message in messages {
            let n_before = pictures.len();
            pictures.append(&mut message.pictures);
            if pictures.len() > n_before
                && (message.role != "user" || turns.iter().any(|turn| turn.answer.is_some()))
            {
                return Err(invalid("the picture belongs into the first message of the user"));
            }
            let text = message.text.trim();
            match (message.role.as_str(), turns.last_mut()) {
                ("system" | "developer", _) => system.push(text.to_owned()),
                ("user", Some(turn)) if turn.answer.is_none() => append(&mut turn.question, text),
                ("user", _) => turns.push(Turn::open(text)),
                ("assistant", Some(Turn { answer, .. })) => append(answer.get_or_insert_default(), text),
                ("assistant", None) => {
                    return Err(invalid("the first message is the assistant's, expected the user's"));
                }
                (role, _) => {
                    let role: String = role.chars().take(40).collect();
                    let message =
                        format!("a message has the role `{role}`, expected system, user or assistant");
                    return Err(invalid(&message));
                }
            }
        }
        if turns.last().is_none_or(|turn| turn.answer.is_some()) {
            return Err(invalid("the last message must be the user's"));
        }
        let picture = match (pictures.pop(), pictures.len()) {
            (Some(picture), 0) => picture,
            (None, _) => {
                return Err(invalid("there is no picture: send one in the first message of the user"));
            }
            (Some(_), others) => {
                let n = others + 1;
                return Err(invalid(&format!("there are {n} pictures: a conversation is about one")));
            }
        };
        if let Some(first) = turns.first_mut().filter(|_| !system.is_empty()) {
            let mut question = system.join("\n");
            append(&mut question, &first.question);
            first.question = question;
        }
        if turns.len() == 1 && turns[0].question.is_empty() {
            turns.clear();
        }
        Ok(Self { turns, picture: Source::Text(picture) })
    }
}

/// Adds a paragraph.
fn append(text: &mut String, more: &str) {
    if !text.is_empty() && !more.is_empty() {
        text.push('\n');
    }
    text.push_str(more);
}

/// A request that was accepted for writing.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) events: UnboundedReceiver<Event>,
    pub(crate) generation: GenerationConfig,
    /// Tokens of the prompt, the picture's among them.
    pub(crate) n_prompt: usize,
    pub(crate) n_image: usize,
}

impl App {
    /// The model's own way of writing captions.
    pub(crate) fn own_generation(&self) -> Result<&GenerationConfig, ApiError> {
        self.stage2().map(|stage2| &stage2.generation)
    }

    /// The model's own way of answering.
    pub(crate) fn own_answering(&self) -> Result<&GenerationConfig, ApiError> {
        self.stage2().map(Stage2Config::answering)
    }

    /// The model's own way of going on with a conversation: a picture alone is described as captions are, a question is
    /// answered as answers are.
    pub(crate) fn own_manner(&self, dialogue: &Dialogue) -> Result<&GenerationConfig, ApiError> {
        if dialogue.turns.is_empty() { self.own_generation() } else { self.own_answering() }
    }

    /// What messages say.
    pub(crate) fn dialogue(&self, messages: Vec<Message>) -> Result<Dialogue, ApiError> {
        Dialogue::new(messages, self.config.limits.text_bytes)
    }

    fn stage2(&self) -> Result<&Stage2Config, ApiError> {
        let stage2 = self.model.config().stage2.as_ref().filter(|_| self.model.language_model().is_some());
        stage2.ok_or_else(|| ApiError::part_missing("write captions and answers"))
    }

    /// Goes on with a conversation, through whichever interface it came. Its body's memory is free once the picture is
    /// decoded.
    pub(crate) async fn converse(
        self: &Arc<Self>,
        dialogue: Dialogue,
        manner: Manner,
        top_log_probs: usize,
        memory: Memory,
    ) -> Result<Accepted, ApiError> {
        let accepted = self.write(dialogue, manner, top_log_probs, "messages").await;
        drop(memory);
        accepted
    }

    /// Hands a conversation to the model.
    pub(crate) async fn write(
        self: &Arc<Self>,
        dialogue: Dialogue,
        manner: Manner,
        top_log_probs: usize,
        param: &str,
    ) -> Result<Accepted, ApiError> {
        let Manner { generation, form } = manner;
        let prompt = self.model.prompt(&dialogue.turns).map_err(|error| ApiError::library(&error, param))?;
        let constraint = match form {
            Some(form) => Some(self.compile(form, &generation).await?),
            None => None,
        };
        let picture = self.pictures.read(dialogue.picture, param).await?;
        let n_image = self.model.config().qformer.num_query_tokens;
        let n_prompt = prompt.n_rows(n_image);
        let write = Write { picture, prompt, generation: generation.clone(), constraint, top_log_probs };
        Ok(Accepted { events: self.engine.write(write)?, generation, n_prompt, n_image })
    }

    /// Makes of what an answer has to be what watches over its tokens. That takes milliseconds, and more for the first.
    async fn compile(
        self: &Arc<Self>,
        Form { form, param }: Form,
        generation: &GenerationConfig,
    ) -> Result<Box<dyn Constraint>, ApiError> {
        let _slot = self.forms.acquire().await.map_err(|_| ApiError::internal())?;
        let (model, generation) = (self.model.clone(), generation.clone());
        let work = move || model.grammar(&form, &generation);
        let compiled = tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?;
        Ok(Box::new(compiled.map_err(|error| ApiError::library(&error, param))?))
    }
}

/// Answers with the tokens that they came in.
#[derive(Debug)]
pub(crate) struct Complete {
    pub(crate) answers: Vec<Answer>,
    /// Tokens of the prompt that had been read before.
    pub(crate) n_cached: usize,
    /// Of each answer; none with beams.
    pub(crate) tokens: Vec<Vec<Token>>,
    /// When the first of them came.
    pub(crate) first: Option<Instant>,
}

impl Accepted {
    /// Waits for the whole.
    pub(crate) async fn complete(&mut self) -> Result<Complete, ApiError> {
        let mut tokens = vec![Vec::new(); self.generation.num_return_sequences];
        let mut first = None;
        loop {
            match self.events.recv().await {
                Some(Event::Token(token)) => {
                    first.get_or_insert_with(Instant::now);
                    if let Some(tokens) = tokens.get_mut(token.sequence) {
                        tokens.push(token);
                    }
                }
                Some(Event::Done(written)) => {
                    let Written { answers, n_cached } = written?;
                    return Ok(Complete { answers, n_cached, tokens, first });
                }
                // The model's thread met a mistake.
                None => return Err(ApiError::internal()),
            }
        }
    }
}

/// OpenAI's and Ollama's word for why a text ends.
pub(crate) fn finish_reason(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::MaxNewTokens | FinishReason::ContextFull => "length",
        _ => "stop",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, text: &str, n_pictures: usize) -> Message {
        Message { role: role.into(), text: text.into(), pictures: vec!["p".into(); n_pictures] }
    }

    fn dialogue(messages: &[(&str, &str, usize)]) -> Result<Dialogue, ApiError> {
        Dialogue::new(messages.iter().map(|&(role, text, n)| message(role, text, n)).collect(), 100)
    }

    #[test]
    fn messages_become_turns() {
        let turns = |messages| dialogue(messages).expect("a dialogue").turns;
        assert_eq!(turns(&[("user", "Who?", 1)]), [Turn::open("Who?")]);
        assert!(turns(&[("user", " ", 1)]).is_empty(), "a picture alone is to be described");
        assert_eq!(
            turns(&[
                ("system", "Be brief.", 0),
                ("user", "", 1),
                ("user", "Who?", 0),
                ("assistant", "A cat.", 0),
                ("user", "Why?", 0)
            ]),
            [Turn::answered("Be brief.\nWho?", "A cat."), Turn::open("Why?")]
        );
        assert_eq!(turns(&[("developer", "Say a word.", 0), ("user", "", 1)]), [Turn::open("Say a word.")]);
    }

    #[test]
    fn what_is_no_conversation_about_a_picture_is_said() {
        for (messages, word) in [
            (&[][..], "last message"),
            (&[("user", "Who?", 0)], "no picture"),
            (&[("user", "Who?", 2)], "2 pictures"),
            (&[("user", "a", 1), ("assistant", "b", 0)], "last message"),
            (&[("assistant", "b", 0), ("user", "a", 1)], "first message"),
            (&[("user", "a", 0), ("assistant", "b", 0), ("user", "c", 1)], "first message of the user"),
            (&[("system", "a", 1), ("user", "b", 0)], "first message of the user"),
            (&[("tool", "a", 0), ("user", "b", 1)], "role `tool`"),
            (&[("user", "a".repeat(101).leak(), 1)], "more than 100 bytes"),
        ] {
            let error = dialogue(messages).expect_err("refused");
            assert!(error.message.contains(word), "{error:?}");
        }
    }
}
