//! The static files, all of them in the binary: a page that is to come, the interface's description, and their style.
//! Nothing on these pages is fetched from anywhere else.

use axum::http::HeaderName;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};

/// A file with its headers.
type File = ([(HeaderName, &'static str); 3], &'static str);

/// What pages may do: load what this server has, show pictures that somebody dropped on them, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The description of every address, as OpenAPI 3.1.
pub(crate) const OPENAPI: &str = include_str!("static/openapi.json");

const fn file(kind: &'static str, text: &'static str) -> File {
    // Asked for again after an hour: a new version may have come.
    let headers = [(CONTENT_TYPE, kind), (CONTENT_SECURITY_POLICY, POLICY), (CACHE_CONTROL, "max-age=3600")];
    (headers, text)
}

pub(crate) async fn index() -> File {
    file("text/html; charset=utf-8", include_str!("static/index.html"))
}

pub(crate) async fn docs() -> File {
    file("text/html; charset=utf-8", include_str!("static/docs.html"))
}

pub(crate) async fn docs_script() -> File {
    file("text/javascript; charset=utf-8", include_str!("static/docs.js"))
}

pub(crate) async fn style() -> File {
    file("text/css; charset=utf-8", include_str!("static/style.css"))
}

pub(crate) async fn openapi() -> File {
    file("application/json", OPENAPI)
}

/// Whether the process lives; whether requests should come is another question (`/ready`).
pub(crate) async fn health() -> &'static str {
    "ok\n"
}
