//! The static files, all of them in the binary: the page, the interface's description and what both are made of. Nothing
//! on these pages is fetched from anywhere else, and nothing in them is code but the scripts here.

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::HeaderName;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};

use crate::error::ApiError;

/// A file with its headers.
type File = ([(HeaderName, &'static str); 4], &'static str);

/// What pages may do: load what this server has, show pictures that somebody dropped on them, and nothing else. Text
/// never becomes markup (trusted types).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

/// The description of every address, as OpenAPI 3.1.
pub(crate) const OPENAPI: &str = include_str!("static/openapi.json");

/// What the pages refer to, at `/static/NAME`.
const FILES: &[(&str, &str, &str)] = &[
    ("api.mjs", SCRIPT, include_str!("static/api.mjs")),
    ("conversation.mjs", SCRIPT, include_str!("static/conversation.mjs")),
    ("csv.mjs", SCRIPT, include_str!("static/csv.mjs")),
    ("docs.js", SCRIPT, include_str!("static/docs.js")),
    ("dom.mjs", SCRIPT, include_str!("static/dom.mjs")),
    ("heat.mjs", SCRIPT, include_str!("static/heat.mjs")),
    ("history.mjs", SCRIPT, include_str!("static/history.mjs")),
    ("icon.svg", "image/svg+xml", include_str!("static/icon.svg")),
    ("main.mjs", SCRIPT, include_str!("static/main.mjs")),
    ("page.css", STYLE, include_str!("static/page.css")),
    ("picture.mjs", SCRIPT, include_str!("static/picture.mjs")),
    ("settings.mjs", SCRIPT, include_str!("static/settings.mjs")),
    ("sse.mjs", SCRIPT, include_str!("static/sse.mjs")),
    ("style.css", STYLE, include_str!("static/style.css")),
    ("table.mjs", SCRIPT, include_str!("static/table.mjs")),
    ("theme.js", SCRIPT, include_str!("static/theme.js")),
    ("turns.mjs", SCRIPT, include_str!("static/turns.mjs")),
    ("words.mjs", SCRIPT, include_str!("static/words.mjs")),
];

const fn with_headers(kind: &'static str, text: &'static str) -> File {
    let headers = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (REFERRER_POLICY, "no-referrer"),
        // Modules of two versions do not go together.
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}

pub(crate) async fn index() -> File {
    with_headers(HTML, include_str!("static/index.html"))
}

pub(crate) async fn docs() -> File {
    with_headers(HTML, include_str!("static/docs.html"))
}

pub(crate) async fn file(name: Result<Path<String>, PathRejection>) -> Result<File, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::not_found())?;
    let found = FILES.iter().find(|(known, ..)| *known == name);
    found.map(|(_, kind, text)| with_headers(kind, text)).ok_or_else(ApiError::not_found)
}

pub(crate) async fn openapi() -> File {
    with_headers("application/json", OPENAPI)
}

/// Whether the process lives; whether requests should come is another question (`/ready`).
pub(crate) async fn health() -> &'static str {
    "ok\n"
}
