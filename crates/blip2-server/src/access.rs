//! Who may ask: keys, and the names under which the server answers without one.

use std::net::IpAddr;
use std::path::Path;

use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, Uri};
use sha2::{Digest, Sha256};

use crate::error::{ApiError, StartError};

/// The keys that open the server. Kept as SHA-256: comparing digests in constant time tells nothing of a key, not even
/// its length.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl Keys {
    /// Keys as they are sent.
    ///
    /// # Errors
    /// When one is empty, or has characters that a header cannot carry.
    pub fn new(keys: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self, StartError> {
        let digest = |key: &str| {
            if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                let reason = "a key is empty or has characters other than visible ASCII ones";
                return Err(StartError::Config(reason.into()));
            }
            Ok(sha256(key.as_bytes()))
        };
        keys.into_iter().map(|key| digest(key.as_ref())).collect::<Result<_, _>>().map(Self)
    }

    /// Keys from a file, one a line; empty lines and lines that begin with `#` are left out.
    ///
    /// # Errors
    /// When the file cannot be read, has no key, or one that is none.
    pub fn read(path: &Path) -> Result<Self, StartError> {
        let wrong = |reason: String| StartError::Keys { path: path.display().to_string(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys = Self::new(lines).map_err(|error| wrong(error.to_string()))?;
        if keys.is_empty() { Err(wrong("the file has no key".into())) } else { Ok(keys) }
    }

    /// These and others.
    #[must_use]
    pub fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// Whether there is none, so that nobody is asked for one.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request carries one of the keys. All are compared to the end, whichever fits.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.is_empty() {
            return Ok(());
        }
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let (Some(given), None) = (given.next(), given.next()) else { return Err(ApiError::unauthorised()) };
        let key = given
            .as_bytes()
            .split_at_checked(7)
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
        let Some((_, key)) = key else { return Err(ApiError::unauthorised()) };
        let digest = sha256(key.trim_ascii());
        let fits = self.0.iter().fold(false, |fits, known| fits | are_equal(known, &digest));
        if fits { Ok(()) } else { Err(ApiError::unauthorised()) }
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// In a time that does not depend on where they differ.
fn are_equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b));
    std::hint::black_box(difference) == 0
}

/// Whether a request without a key comes from this machine's own programs, or from a page that the server itself sent. A
/// page of somebody else's in a browser on this machine names another host or origin: it could otherwise use the server
/// behind its user's back (DNS rebinding).
pub(crate) fn check_host(headers: &HeaderMap, uri: &Uri, allowed: &[String]) -> Result<(), ApiError> {
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (None, _) => uri.host(),
        (Some(host), None) => host.to_str().ok(),
        _ => None,
    };
    // An opaque origin is nobody's.
    let origin = headers
        .get(ORIGIN)
        .map(|origin| origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host));
    let is_known = |host: &str| {
        let name = without_port(host);
        is_this_machine(name) || allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
    };
    if host.is_some_and(is_known) && origin.is_none_or(|origin| origin.is_some_and(is_known)) {
        Ok(())
    } else {
        Err(ApiError::host_not_allowed())
    }
}

fn without_port(host: &str) -> &str {
    if let Some(inner) = host.strip_prefix('[') {
        return inner.split_once(']').map_or(inner, |(name, _)| name);
    }
    host.split_once(':').map_or(host, |(name, _)| name)
}

fn is_this_machine(name: &str) -> bool {
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(axum::http::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().expect("a value"))).collect()
    }

    #[test]
    fn only_a_whole_key_opens() {
        let keys = Keys::new(["first-key", "second"]).expect("keys");
        let check = |value: &str| keys.check(&headers(&[(AUTHORIZATION, value)])).is_ok();
        for value in ["Bearer first-key", "bearer second", "BEARER  second"] {
            assert!(check(value), "{value}");
        }
        for value in [
            "Bearer first-ke",
            "Bearer first-key2",
            "Bearer",
            "Bearer ",
            "Basic second",
            "second",
            "Bearer SECOND",
        ] {
            assert!(!check(value), "{value}");
        }
        assert!(keys.check(&HeaderMap::new()).is_err());
        let mut twice = headers(&[(AUTHORIZATION, "Bearer second")]);
        twice.append(AUTHORIZATION, "Bearer second".parse().expect("a value"));
        assert!(keys.check(&twice).is_err(), "two keys are no key");
        assert!(Keys::default().check(&HeaderMap::new()).is_ok());
        assert!(Keys::new(["a b"]).is_err() && Keys::new([""]).is_err());
        assert!(!format!("{keys:?}").contains("first"));
    }

    #[test]
    fn a_key_file_has_lines_and_remarks() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("keys");
        std::fs::write(&path, "# of the page\n\n  one \ntwo\n").expect("written");
        let keys = Keys::read(&path).expect("keys");
        assert!(keys.check(&headers(&[(AUTHORIZATION, "Bearer one")])).is_ok());
        std::fs::write(&path, "# none\n").expect("written");
        assert!(Keys::read(&path).expect_err("refused").to_string().contains("no key"));
    }

    #[test]
    fn a_page_elsewhere_cannot_ask() {
        let allowed = ["example.org".to_owned()];
        let check = |pairs: &[(axum::http::HeaderName, &str)]| {
            check_host(&headers(pairs), &Uri::from_static("/"), &allowed).is_ok()
        };
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.3.2.1", "[::1]:80", "example.org:443"]
        {
            assert!(check(&[(HOST, host)]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "192.168.0.1", "127.0.0.1.nip.io", "", "[::2]"]
        {
            assert!(!check(&[(HOST, host)]), "{host}");
        }
        assert!(!check(&[]));
        assert!(check(&[(HOST, "localhost:8080"), (ORIGIN, "http://localhost:8080")]));
        for origin in ["https://evil.example", "null", "http://localhost.evil.example"] {
            assert!(!check(&[(HOST, "localhost:8080"), (ORIGIN, origin)]), "{origin}");
        }
    }
}
