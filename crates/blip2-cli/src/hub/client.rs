//! The hub's side of a transfer: requests, redirects, and what its refusals mean.

use std::io::{self, Read};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::checksum::Etag;
use super::repository::{Repository, is_commit, quoted};
use super::settings::Settings;

/// How often something is asked for before its failure is believed.
pub(super) const MAX_ATTEMPTS: u32 = 5;

/// How often for the list of files, with which everything begins: where there is no network that is to be said soon.
pub(super) const LIST_ATTEMPTS: u32 = 3;

/// The longest wait that is taken from a `Retry-After`.
const MAX_WAIT: Duration = Duration::from_secs(60);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest silence within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

const MAX_REDIRECTS: usize = 8;

/// The largest list of files that is read.
const MAX_LISTING_BYTES: u64 = 16 << 20;

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// It may succeed later: the network, or a hub that is busy. With the wait that the hub asked for.
    Passing(String, Option<Duration>),
    /// Asking again does not help.
    Final(anyhow::Error),
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Passing(reason, _) => anyhow::Error::msg(reason),
            Failure::Final(error) => error,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

/// What the hub has of a model at a revision.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// A file on the hub.
pub(super) struct RemoteFile {
    pub(super) name: String,
    pub(super) etag: Etag,
    pub(super) size: u64,
}

/// The bytes of a file from some byte on.
pub(super) struct Opened {
    /// The first byte that comes: the one that was asked for, or 0 from a server that cannot skip.
    pub(super) from: u64,
    pub(super) bytes: Box<dyn Read>,
}

/// Asks the hub. Its token goes to no other host: redirects are followed here, one by one.
pub(super) struct Client {
    agent: Agent,
    endpoint: Uri,
    address: String,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(settings: &Settings) -> anyhow::Result<Self> {
        let endpoint: Uri =
            settings.endpoint.parse().with_context(|| format!("HF_ENDPOINT is `{}`", settings.endpoint))?;
        let visible = |token: &String| token.bytes().all(|byte| byte.is_ascii_graphic());
        if !settings.token.as_ref().is_none_or(visible) {
            bail!("the hub's token (HF_TOKEN or its file) holds characters that no token has");
        }
        let roots = match &settings.certificates {
            None => RootCerts::WebPki,
            Some(file) => {
                let pem =
                    std::fs::read(file).with_context(|| format!("the certificates in {}", file.display()))?;
                let found = parse_pem(&pem).filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                });
                let found: Vec<_> = found.collect();
                if found.is_empty() {
                    bail!("{} (SSL_CERT_FILE or REQUESTS_CA_BUNDLE) holds no certificates", file.display());
                }
                RootCerts::new_with_certs(&found)
            }
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .user_agent(concat!("blip2/", env!("CARGO_PKG_VERSION")))
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .build();
        let (address, token) = (settings.endpoint.clone(), settings.token.clone());
        Ok(Self { agent: Agent::new_with_config(config), endpoint, address, token })
    }

    /// The files of a model, and the commit that its revision is now; asked for up to `attempts` times.
    pub(super) fn list(&self, repository: &Repository, attempts: u32) -> Result<Listing, Failure> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let address = format!(
            "{}/api/models/{}/revision/{}",
            self.address,
            repository.id,
            repository.quoted_revision()
        );
        retry(attempts, || {
            let response = self.follow(Method::GET, &address, None, |_| false)?;
            let mut body = refuse(response, repository, self)?.into_body();
            let bytes = body.with_config().limit(MAX_LISTING_BYTES).read_to_vec().map_err(passing)?;
            let answer: Answer = serde_json::from_slice(&bytes).with_context(|| {
                format!("{} does not answer like a hub (check HF_ENDPOINT and the proxy)", self.address)
            })?;
            if !is_commit(&answer.sha) {
                return Err(
                    anyhow::anyhow!("the hub names `{}` as a commit", answer.sha.escape_default()).into()
                );
            }
            let files = answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
            Ok(Listing { commit: answer.sha, files })
        })
    }

    /// What the hub says about a file: its hash and its size.
    pub(super) fn describe(
        &self,
        repository: &Repository,
        commit: &str,
        name: &str,
    ) -> anyhow::Result<RemoteFile> {
        let address = self.file_address(repository, commit, name);
        let about = retry(MAX_ATTEMPTS, || {
            // The hub itself tells hash and size of a file that another host delivers; that one is not asked.
            let is_enough = |headers: &HeaderMap| headers.contains_key("x-linked-etag");
            let response = self.follow(Method::HEAD, &address, None, is_enough)?;
            let response =
                if is_enough(response.headers()) { response } else { refuse(response, repository, self)? };
            Ok(response.into_parts().0.headers)
        })
        .map_err(|failure| anyhow::Error::from(failure).context(format!("{name} of {repository}")))?;
        let text = |names: [&str; 2]| names.into_iter().find_map(|name| about.get(name)?.to_str().ok());
        if let Some(found) = text(["x-repo-commit"; 2]).filter(|found| *found != commit) {
            bail!("the hub gives {name} of commit {} for {commit}", found.escape_default());
        }
        let etag = text(["x-linked-etag", "etag"]).and_then(Etag::parse);
        let size = text(["x-linked-size", "content-length"]).and_then(|size| size.parse().ok());
        match (etag, size) {
            (Some(etag), Some(size)) => Ok(RemoteFile { name: name.into(), etag, size }),
            _ => bail!(
                "{} does not tell hash and size of {name} as a hub does (check HF_ENDPOINT and the proxy)",
                self.address
            ),
        }
    }

    /// Opens a file from byte `from` on.
    pub(super) fn open(
        &self,
        repository: &Repository,
        commit: &str,
        file: &RemoteFile,
        from: u64,
    ) -> Result<Opened, Failure> {
        let address = self.file_address(repository, commit, &file.name);
        let response = self.follow(Method::GET, &address, (from > 0).then_some(from), |_| false)?;
        if from > 0 && response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return self.open(repository, commit, file, 0);
        }
        let response = refuse(response, repository, self)?;
        let start = if response.status() == StatusCode::PARTIAL_CONTENT {
            match content_range(response.headers()) {
                Some(range) if range == (from, file.size) => from,
                _ => {
                    return Err(
                        anyhow::anyhow!("the hub sent another part of the file than was asked for").into()
                    );
                }
            }
        } else {
            0
        };
        Ok(Opened { from: start, bytes: Box::new(response.into_body().into_reader()) })
    }

    fn file_address(&self, repository: &Repository, commit: &str, name: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.address, repository.id, quoted(name))
    }

    /// Sends a request and goes where the answers lead, until one is `enough` or leads no further.
    fn follow(
        &self,
        method: Method,
        address: &str,
        from: Option<u64>,
        is_enough: impl Fn(&HeaderMap) -> bool,
    ) -> Result<Response<Body>, Failure> {
        let mut uri: Uri = address.parse().with_context(|| format!("`{address}` is not an address"))?;
        for _ in 0..MAX_REDIRECTS {
            let mut request = Request::builder()
                .method(method.clone())
                .uri(&uri)
                // A compressed answer has another length than the file.
                .header(header::ACCEPT_ENCODING, "identity");
            if let Some(from) = from {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| has_same_origin(&uri, &self.endpoint)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let request = request.body(()).context("the request")?;
            let host = uri.authority().map_or("", |authority| authority.as_str());
            let response = self.agent.run(request).map_err(|error| match passing(error) {
                Failure::Passing(reason, wait) => {
                    Failure::Passing(format!("{host} cannot be reached: {reason}"), wait)
                }
                Failure::Final(error) => Failure::Final(error.context(format!("{host} cannot be reached"))),
            })?;
            let status = response.status();
            if status.is_client_error() && !has_same_origin(&uri, &self.endpoint) {
                // The address that the hub gave has expired: it gives a new one.
                return Err(Failure::Passing(
                    format!("{host} does not deliver the file (status {})", status.as_u16()),
                    None,
                ));
            }
            if !status.is_redirection() || is_enough(response.headers()) {
                return Ok(response);
            }
            let location =
                response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
            uri = redirected(&uri, location.context("the hub redirects to nowhere")?)?;
        }
        Err(anyhow::anyhow!("the hub redirects again and again").into())
    }
}

/// Where a redirect leads: to a whole address, or to a path on the same host. Never from an encrypted connection to a plain
/// one.
fn redirected(from: &Uri, location: &str) -> anyhow::Result<Uri> {
    let (scheme, host) = (from.scheme_str().unwrap_or("https"), from.authority().map_or("", |a| a.as_str()));
    let whole = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{host}{location}")
    } else {
        location.to_owned()
    };
    let to: Uri =
        whole.parse().with_context(|| format!("the hub redirects to `{}`", location.escape_default()))?;
    match to.scheme_str() {
        Some("https") => Ok(to),
        Some("http") if scheme == "http" => Ok(to),
        _ => bail!("the hub redirects to `{}`, which is not encrypted", location.escape_default()),
    }
}

/// Whether two addresses are of one scheme, host and port.
fn has_same_origin(a: &Uri, b: &Uri) -> bool {
    let origin = |uri: &Uri| {
        let port = uri.port_u16().or(match uri.scheme_str() {
            Some("https") => Some(443),
            Some("http") => Some(80),
            _ => None,
        });
        (uri.scheme_str().map(str::to_ascii_lowercase), uri.host().map(str::to_ascii_lowercase), port)
    };
    origin(a) == origin(b)
}

/// The first byte and the size of the whole of `Content-Range: bytes 5-9/10`.
fn content_range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, size) = range.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, size.parse().ok()?))
}

/// A fault of the network passes; one of the request does not.
fn passing(error: ureq::Error) -> Failure {
    match error {
        // What is said is wrong, such as a certificate; it will be next time.
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => Failure::Final(error.into()),
        ureq::Error::Io(_)
        | ureq::Error::Timeout(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Protocol(_) => Failure::Passing(error.to_string(), None),
        error => Failure::Final(error.into()),
    }
}

/// Does something until it succeeds, fails for good, or has failed `attempts` times.
fn retry<T>(attempts: u32, mut ask: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    let mut n_failed = 0;
    loop {
        match ask() {
            Err(Failure::Passing(reason, wait)) => {
                n_failed += 1;
                if n_failed >= attempts {
                    return Err(Failure::Passing(reason, wait));
                }
                let wait = wait_after(n_failed, wait);
                eprintln!("{reason}; trying again in {:.1} s", wait.as_secs_f32());
                sleep(wait);
            }
            result => return result,
        }
    }
}

/// How long to wait after so many failures: longer each time, or as long as the hub asked.
pub(super) fn wait_after(n_failed: u32, asked: Option<Duration>) -> Duration {
    asked.unwrap_or(Duration::from_millis(250) * 2_u32.pow(n_failed.min(6))).min(MAX_WAIT)
}

/// Turns a refusal into what it means for the user.
fn refuse(
    response: Response<Body>,
    repository: &Repository,
    client: &Client,
) -> Result<Response<Body>, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
        let wait = text("retry-after").and_then(|wait| wait.parse().ok()).map(Duration::from_secs);
        return Err(Failure::Passing(format!("the hub is busy (status {})", status.as_u16()), wait));
    }
    let Repository { id, revision } = repository;
    let page = format!("{}/{id}", client.address);
    let has_token = client.token.is_some();
    let reason = match (status.as_u16(), text("x-error-code")) {
        (401 | 403, Some("GatedRepo")) if has_token => {
            format!(
                "{id} is gated: accept its terms on {page} with the account that the token (HF_TOKEN) belongs to"
            )
        }
        (401 | 403, Some("GatedRepo")) => {
            format!("{id} is gated: accept its terms on {page} and set HF_TOKEN to a token of that account")
        }
        (401, _) if has_token => {
            format!("the hub has no {id}, or the token (HF_TOKEN or its file) may not see it or has expired")
        }
        (401, _) => {
            format!("the hub has no {id}, or it is private: set HF_TOKEN to a token that may read it")
        }
        (403, _) => format!("the token (HF_TOKEN or its file) may not read {id}"),
        (404, Some("RevisionNotFound")) => format!("{id} has no branch, tag or commit `{revision}`"),
        (404, Some("EntryNotFound")) => format!("a file that the hub listed for {id} is not there any more"),
        (404, _) => format!("the hub has no {id}"),
        (status, _) => {
            let said: String =
                text("x-error-message").unwrap_or("").chars().filter(|c| !c.is_control()).take(200).collect();
            format!("the hub refuses {id} (status {status}) {said}").trim_end().to_owned()
        }
    };
    Err(Failure::Final(anyhow::Error::msg(reason)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn redirects_stay_encrypted() {
        let from = uri("https://hub.example:8443/a/resolve/b");
        for (location, expected) in [
            ("/api/x?y=1", "https://hub.example:8443/api/x?y=1"),
            ("//cdn.example/x", "https://cdn.example/x"),
            ("https://cdn.example/x", "https://cdn.example/x"),
        ] {
            assert_eq!(redirected(&from, location).unwrap(), uri(expected));
        }
        for location in ["http://hub.example:8443/x", "file:///etc/passwd", "x/y", "ftp://a/b", ""] {
            assert!(redirected(&from, location).is_err(), "{location}");
        }
        let plain = redirected(&uri("http://127.0.0.1:1/a"), "http://127.0.0.1:2/b").unwrap();
        assert_eq!(plain, uri("http://127.0.0.1:2/b"));
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let hub = uri("https://huggingface.co");
        for same in ["https://huggingface.co/x", "https://HuggingFace.co:443/x"] {
            assert!(has_same_origin(&uri(same), &hub), "{same}");
        }
        for other in [
            "http://huggingface.co/x",
            "https://huggingface.co:8443/x",
            "https://huggingface.co.evil.example/x",
            "https://cdn.huggingface.co/x",
        ] {
            assert!(!has_same_origin(&uri(other), &hub), "{other}");
        }
    }

    #[test]
    fn ranges_are_read() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_RANGE, text.parse().unwrap());
            content_range(&headers)
        };
        assert_eq!(of("bytes 5-9/10"), Some((5, 10)));
        for wrong in ["bytes */10", "bytes 5-9/*", "5-9/10", "bytes"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }
}
