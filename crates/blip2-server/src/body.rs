//! A request's body, read within limits and within a memory budget of all requests; and what such a budget is.

mod arriving;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_LENGTH;
use hyper::body::Body as _;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use self::arriving::Arriving;
use crate::config::Limits;
use crate::error::ApiError;

/// Values of a body's JSON: understanding one takes many times the memory of its bytes, which the budget counts.
const MAX_VALUES: usize = 100_000;

/// How much memory one permit stands for: a semaphore counts to 2²⁹ at most.
const PERMIT_BYTES: usize = 4 << 10;

/// Memory that all requests share, for one thing: their bodies, or pictures that are decoded.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    permits: Arc<Semaphore>,
    n_permits: u32,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        let n_permits = u32::try_from(bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX);
        Self { permits: Arc::new(Semaphore::new(n_permits as usize)), n_permits }
    }

    /// Takes a share, if it is free.
    fn try_take(&self, n_permits: usize) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().try_acquire_many_owned(u32::try_from(n_permits).ok()?).ok()
    }

    /// Waits for a share, first come first served. What would need more than there is takes all of it.
    pub(crate) async fn take(&self, bytes: u64) -> Memory {
        let wanted = u32::try_from(bytes.div_ceil(PERMIT_BYTES as u64)).unwrap_or(u32::MAX);
        // Nobody closes the semaphore, so that there is no error.
        let permit = self.permits.clone().acquire_many_owned(wanted.min(self.n_permits)).await;
        Memory { _permit: permit.ok() }
    }
}

/// A whole body, and its share of the budget.
#[derive(Debug)]
pub(crate) struct RequestBody {
    bytes: Vec<u8>,
    memory: Memory,
}

/// A share of the budget, held as long as what takes the memory.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    _permit: Option<OwnedSemaphorePermit>,
}

impl RequestBody {
    /// Reads it; memory is taken as it arrives, so that a client who announces much and sends nothing holds nothing.
    pub(crate) async fn read(
        headers: &HeaderMap,
        mut body: Body,
        limits: &Limits,
        budget: &Budget,
    ) -> Result<Self, ApiError> {
        let limit = limits.body_bytes;
        let announced =
            headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|announced| announced > limit as u64) {
            discard(body).await;
            return Err(ApiError::body_too_large(limit));
        }
        let mut arriving = match Arriving::new(headers, limit, budget) {
            Ok(arriving) => arriving,
            Err(error) => {
                discard(body).await;
                return Err(error);
            }
        };
        loop {
            let next = std::future::poll_fn(|context| std::pin::Pin::new(&mut body).poll_frame(context));
            let frame = match timeout(limits.idle, next).await {
                Err(_) => return Err(ApiError::body_too_slow()),
                Ok(None) => return arriving.finish(),
                Ok(Some(Err(_))) => {
                    return Err(ApiError::body("the request's body ended early or is malformed"));
                }
                Ok(Some(Ok(frame))) => frame,
            };
            let Ok(data) = frame.into_data() else { continue };
            if let Err(error) = arriving.add(&data) {
                drop(arriving);
                discard(body).await;
                return Err(error);
            }
        }
    }

    /// The bytes, and the memory that they take.
    pub(crate) fn into_parts(self) -> (Vec<u8>, Memory) {
        (self.bytes, self.memory)
    }

    /// Frees the bytes; what was made of them takes the same memory until it is dropped.
    pub(crate) fn understood(self) -> Memory {
        self.memory
    }

    /// Reads it as a JSON object. Unknown fields are left alone: clients send new ones all the time.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        match self.bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
            None => return Err(ApiError::body("the request's body is empty, it should be a JSON object")),
            // Where a structure is wanted a list of its values would do too, in an order that nobody has promised.
            Some(b'{') => {}
            Some(_) => return Err(ApiError::body("the request's body is not a JSON object")),
        }
        if has_more_values(&self.bytes, MAX_VALUES) {
            return Err(ApiError::body(format!("the request's body has more than {MAX_VALUES} values")));
        }
        let mut json = serde_json::Deserializer::from_slice(&self.bytes);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            // A field's name is the client's word too.
            let path: String = error.path().to_string().chars().take(100).collect();
            in_words(&path, error.inner())
        })?;
        json.end().map_err(|error| in_words(".", &error))?;
        Ok(value)
    }
}

/// Whether JSON has more values than this: each but the first follows a comma or begins a list or an object.
fn has_more_values(json: &[u8], limit: usize) -> bool {
    // A value takes a byte at least.
    if json.len() <= limit {
        return false;
    }
    let mut n_values = 1;
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b',' | b'[' | b'{' => n_values += 1,
            b'"' => skip_text(&mut bytes),
            _ => {}
        }
        if n_values > limit {
            return true;
        }
    }
    false
}

/// Goes behind the end of a text.
fn skip_text(bytes: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => drop(bytes.next()),
            _ => {}
        }
    }
}

/// What is wrong with a body, in the words of JSON and not of the program that reads it, and the field where it is.
fn in_words(path: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    let (what, place) = message.rsplit_once(" at line ").unwrap_or((message.as_str(), ""));
    if error.classify() != serde_json::error::Category::Data {
        return ApiError::body(format!("the request's body is not JSON: {what} at line {place}"));
    }
    let what = what.rsplit_once(", expected ").map_or_else(
        || what.to_owned(),
        |(found, expected)| format!("{found}, expected {}", kind_in_words(expected)),
    );
    // The message may quote what it did not expect, and that may be a picture.
    let short: String = what.chars().take(160).collect();
    let short = if short.len() < what.len() { short + "…" } else { short };
    let missing = what.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
    let param = match (path, missing) {
        (".", None) => return ApiError::body(short),
        (".", Some(field)) => field.to_owned(),
        (path, None) => path.to_owned(),
        (path, Some(field)) => format!("{path}.{field}"),
    };
    let message = if missing.is_some() { short } else { format!("`{param}`: {short}") };
    ApiError { param: Some(param), ..ApiError::body(message) }
}

/// What the program calls a kind of value, as its clients call it.
fn kind_in_words(expected: &str) -> &str {
    match expected {
        "usize" | "u8" | "u16" | "u32" | "u64" => "a whole number that is not negative",
        "i8" | "i16" | "i32" | "i64" => "a whole number",
        "f32" | "f64" => "a number",
        "a sequence" => "a list",
        "a map" => "an object",
        "a boolean" => "true or false",
        "a string" => "a text",
        structure if structure.starts_with("struct ") => "an object",
        other => other,
    }
}

/// Takes what a client still sends, for a moment: to close while it sends would lose the answer that says why.
pub(crate) async fn discard(mut body: Body) {
    const LONGEST: Duration = Duration::from_secs(2);
    let all = async {
        while let Some(Ok(_)) =
            std::future::poll_fn(|context| std::pin::Pin::new(&mut body).poll_frame(context)).await
        {}
    };
    let _ = timeout(LONGEST, all).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: usize, limits: &Limits, budget: &Budget) -> Result<RequestBody, ApiError> {
        RequestBody::read(&HeaderMap::new(), Body::from(vec![b' '; bytes]), limits, budget).await
    }

    #[tokio::test]
    async fn bodies_share_their_memory() {
        let limits = Limits { body_bytes: 100_000, ..Limits::default() };
        let budget = Budget::new(300_000);
        let first = read(100_000, &limits, &budget).await.expect("read");
        assert_eq!(first.bytes.len(), 100_000);
        assert_eq!(read(100_001, &limits, &budget).await.expect_err("too large").status, 413);
        assert_eq!(read(100_000, &limits, &budget).await.expect_err("no memory").status, 429);
        drop(first);
        assert!(read(100_000, &limits, &budget).await.is_ok());
    }

    #[tokio::test]
    async fn shares_are_waited_for_and_never_larger_than_all() {
        let budget = Budget::new(300_000);
        let is_free = async |bytes| timeout(Duration::from_millis(20), budget.take(bytes)).await.is_ok();
        let small = budget.take(200_000).await;
        assert!(is_free(100_000).await && !is_free(200_000).await);
        assert!(!is_free(u64::MAX).await, "it waits for all");
        drop(small);
        let all = budget.take(u64::MAX).await;
        assert!(!is_free(1).await);
        drop(all);
        assert!(is_free(300_000).await);
    }

    #[tokio::test]
    async fn a_message_never_quotes_a_picture() {
        let json = format!("{{\"n\": \"{}\"}}", "A".repeat(10_000));
        let body = RequestBody { bytes: json.into_bytes(), memory: Memory::default() };
        let error = body.json::<std::collections::BTreeMap<String, u32>>().expect_err("no number");
        assert!(error.message.len() < 400 && error.message.ends_with('…'), "{}", error.message);
        let deep = format!("{{\"a\": {}", "[".repeat(100_000));
        let deep = RequestBody { bytes: deep.into_bytes(), memory: Memory::default() };
        assert_eq!(deep.json::<serde_json::Value>().expect_err("too deep").status, 400);
    }

    #[test]
    fn values_are_counted_before_they_take_memory() {
        let many =
            |value: &str, n: usize| format!("{{\"a\": [{}{value}]}}", format!("{value},").repeat(n - 1));
        for value in ["0", "[]", "{}", r#""a\"b""#, r#""\\""#] {
            for (n, is_refused) in [(MAX_VALUES + 1, true), (MAX_VALUES / 3, false)] {
                let body = RequestBody { bytes: many(value, n).into_bytes(), memory: Memory::default() };
                let read = body.json::<serde_json::Value>();
                let message = read.as_ref().err().map(|error| error.message.as_str());
                let expected = is_refused.then_some("the request's body has more than 100000 values");
                assert_eq!(message, expected, "{n} times {value}");
            }
        }
        // A picture is one value, whatever is in it.
        let text = format!("{{\"a\": \"{}\"}}", ",[{".repeat(MAX_VALUES));
        assert!(!has_more_values(text.as_bytes(), MAX_VALUES));
        assert!(!has_more_values(br#"{"a": "never ended \"#, 3));
    }

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_json() {
        use crate::wire::{ImageField, Object, OneOrMany, choice};

        #[derive(Debug, serde::Deserialize)]
        struct Asked {
            #[serde(rename = "image")]
            _image: ImageField,
            #[serde(rename = "n")]
            _n: Option<usize>,
            #[serde(rename = "stop")]
            _stop: Option<OneOrMany<String>>,
            #[serde(rename = "turns", default)]
            _turns: Vec<Object<Turn>>,
            #[serde(rename = "form", default, deserialize_with = "choice")]
            _form: Option<Form>,
            #[serde(rename = "early", default)]
            _early: Option<blip2::generate::EarlyStopping>,
        }
        #[derive(Debug, serde::Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Form {
            Round,
            Square,
        }
        #[derive(Debug, serde::Deserialize)]
        struct Turn {
            #[serde(rename = "role")]
            _role: String,
        }

        for (json, param, message) in [
            (
                r#"{"image": "", "n": -1}"#,
                Some("n"),
                "`n`: invalid value: integer `-1`, expected a whole number that is not negative",
            ),
            (
                r#"{"image": "", "n": "2"}"#,
                Some("n"),
                "`n`: invalid type: string \"2\", expected a whole number that is not negative",
            ),
            (
                r#"{"image": "", "stop": 5}"#,
                Some("stop"),
                "`stop`: expected one value or a list, each of the right type",
            ),
            (r#"{"image": 5}"#, Some("image"), "`image`: expected a text or {\"url\": …}"),
            (r#"{"n": 5}"#, Some("image"), "missing field `image`"),
            (r#"{"image": "", "turns": [{"role": "a"}, {}]}"#, Some("turns[1].role"), "missing field `role`"),
            (
                r#"{"image": "", "turns": [3]}"#,
                Some("turns[0]"),
                "`turns[0]`: invalid type: integer `3`, expected an object",
            ),
            // A list of its values is no turn, though it could be taken for one.
            (
                r#"{"image": "", "turns": [["a"]]}"#,
                Some("turns[0]"),
                "`turns[0]`: invalid type: sequence, expected an object",
            ),
            (
                r#"{"image": "", "form": ["round"]}"#,
                Some("form"),
                "`form`: invalid type: sequence, expected a text",
            ),
            (
                r#"{"image": "", "form": "oval"}"#,
                Some("form"),
                "`form`: unknown variant `oval`, expected `round` or `square`",
            ),
            (r#"{"image": "", "early": 5}"#, Some("early"), "`early`: expected true, false or \"never\""),
            (
                r#"{"image": "", "n": ", expected a lot"}"#,
                Some("n"),
                "`n`: invalid type: string \", expected a lot\", expected a whole number that is not negative",
            ),
            (r#"["", 5]"#, None, "the request's body is not a JSON object"),
            ("null", None, "the request's body is not a JSON object"),
            ("", None, "the request's body is empty, it should be a JSON object"),
            (
                r#"{"image": "", "n": NaN}"#,
                None,
                "the request's body is not JSON: expected value at line 1 column 20",
            ),
            (
                r#"{"image": ""} x"#,
                None,
                "the request's body is not JSON: trailing characters at line 1 column 15",
            ),
        ] {
            let body = RequestBody { bytes: json.into(), memory: Memory::default() };
            let error = body.json::<Asked>().expect_err(json);
            assert_eq!((error.param.as_deref(), error.message.as_str()), (param, message), "{json}");
            assert_eq!((error.status.as_u16(), error.code), (400, "invalid_body"));
        }
        let whole = r#" {"image": {"url": ""}, "n": 2, "stop": ["a"], "turns": [{"role": "a"}], "form": null, "later": 1} "#;
        for form in ["round", "square"] {
            let body = format!(r#"{{"image": "", "form": "{form}"}}"#).into_bytes();
            assert!(RequestBody { bytes: body, memory: Memory::default() }.json::<Asked>().is_ok(), "{form}");
        }
        assert!(RequestBody { bytes: whole.into(), memory: Memory::default() }.json::<Asked>().is_ok());
    }
}
