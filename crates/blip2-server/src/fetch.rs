//! Pictures from the network: off unless an operator names the domains, and never from an address that is not public.
//!
//! A server that fetches what strangers name can be made to ask its own network. So: one parser for addresses, whose
//! result is what the connection uses; a name is resolved once, every answer has to be public, and the connection goes to
//! those answers; every redirect goes through the same door. Nothing in a request's text is ever fetched.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::http::Uri;
use ureq::http::header::LOCATION;
use ureq::http::uri::Scheme;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use crate::error::ApiError;

/// All hops together, names and bodies included.
const LONGEST: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 3;

/// Fetches pictures from allowed domains.
#[derive(Debug)]
pub(crate) struct Fetcher {
    /// `example.org`, `*.example.org` (all below it), or `*`.
    domains: Vec<String>,
    max_bytes: u64,
    /// Of http and of https.
    ports: [u16; 2],
    longest: Duration,
    agent: ureq::Agent,
}

/// Why an address is not asked, or did not give a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Malformed,
    Domain,
    Unreachable,
    Status,
    TooLarge,
    Redirects,
}

impl Refusal {
    fn message(self) -> &'static str {
        match self {
            Self::Malformed => "the picture's address is not a plain http or https one of the usual ports",
            Self::Domain => "this server fetches no pictures from that domain",
            // Whether there is no such host, no public one, or no answer is nobody's business.
            Self::Unreachable => "the picture's host gave no answer in time, or is not a public one",
            Self::Status => "the picture's host answered without a picture",
            Self::TooLarge => "the picture's file is larger than this server allows",
            Self::Redirects => "the picture's host sent this server on too often, or to where it does not go",
        }
    }
}

impl Fetcher {
    pub(crate) fn new(domains: &[String], max_bytes: u64) -> Self {
        Self::with_resolver(domains, max_bytes, PublicResolver { is_allowed: is_public, look_up })
    }

    fn with_resolver(domains: &[String], max_bytes: u64, resolver: PublicResolver) -> Self {
        let config = Config::builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            // A proxy of the environment would resolve names by itself.
            .proxy(None)
            .max_idle_connections(0)
            .user_agent(concat!("blip2/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent = ureq::Agent::with_parts(config, DefaultConnector::default(), resolver);
        let domains = domains.iter().map(|domain| domain.to_ascii_lowercase()).collect();
        Self { domains, max_bytes, ports: [80, 443], longest: LONGEST, agent }
    }

    /// The bytes at an address. Blocks; takes no longer than ten seconds.
    pub(crate) fn fetch(&self, url: &str, param: &str) -> Result<Vec<u8>, ApiError> {
        self.follow(url).map_err(|refusal| {
            tracing::info!(?refusal, "a picture's address was refused");
            let code = if refusal == Refusal::TooLarge { "image_too_large" } else { "invalid_image_url" };
            ApiError { code, ..ApiError::invalid(param, refusal.message()) }
        })
    }

    fn follow(&self, url: &str) -> Result<Vec<u8>, Refusal> {
        let deadline = Instant::now() + self.longest;
        let mut uri = self.check(url)?;
        for _ in 0..=MAX_REDIRECTS {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Refusal::Unreachable);
            }
            let request = self.agent.get(uri.clone()).config().timeout_global(Some(left)).build();
            let mut response = request.call().map_err(|_| Refusal::Unreachable)?;
            match response.status().as_u16() {
                200 => {
                    // One byte more, so that a file that just fits is told from one that does not.
                    let limit = self.max_bytes.saturating_add(1);
                    let body = response.body_mut().with_config().limit(limit).read_to_vec();
                    return match body {
                        Ok(bytes) if bytes.len() as u64 <= self.max_bytes => Ok(bytes),
                        Ok(_) | Err(ureq::Error::BodyExceedsLimit(_)) => Err(Refusal::TooLarge),
                        Err(_) => Err(Refusal::Unreachable),
                    };
                }
                301 | 302 | 303 | 307 | 308 => {
                    let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
                    let next = self.check(&absolute(&uri, target.ok_or(Refusal::Redirects)?)?)?;
                    // What was asked for in secret is not asked for in public.
                    if uri.scheme() == Some(&Scheme::HTTPS) && next.scheme() != Some(&Scheme::HTTPS) {
                        return Err(Refusal::Redirects);
                    }
                    uri = next;
                }
                _ => return Err(Refusal::Status),
            }
        }
        Err(Refusal::Redirects)
    }

    /// An address that may be asked, as far as its text tells.
    fn check(&self, url: &str) -> Result<Uri, Refusal> {
        // Characters that parsers disagree about.
        let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"\\\"<>^`{|}".contains(&byte);
        if url.len() > 2048 || !url.bytes().all(is_plain) {
            return Err(Refusal::Malformed);
        }
        // A fragment is not sent.
        let uri: Uri = url.split('#').next().unwrap_or(url).parse().map_err(|_| Refusal::Malformed)?;
        let port = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => self.ports[0],
            Some(scheme) if *scheme == Scheme::HTTPS => self.ports[1],
            _ => return Err(Refusal::Malformed),
        };
        let host = uri.host().unwrap_or_default().to_ascii_lowercase();
        // Nothing but host and port: no user, nothing behind a bracket.
        let authority = uri.authority().ok_or(Refusal::Malformed)?.as_str().to_ascii_lowercase();
        if authority != host && authority != format!("{host}:{port}") {
            return Err(Refusal::Malformed);
        }
        let is_literal = host.starts_with('[') && host.ends_with(']');
        let is_name = !host.is_empty() && !host.starts_with('.') && !host.ends_with('.');
        if !is_name || host.contains('%') || (!is_literal && host.contains(['[', ']'])) {
            return Err(Refusal::Malformed);
        }
        let is_allowed = |domain: &String| match domain.strip_prefix('*') {
            Some("") => true,
            Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
            None => *domain == host,
        };
        if self.domains.iter().any(is_allowed) { Ok(uri) } else { Err(Refusal::Domain) }
    }
}

/// Where a redirect leads.
fn absolute(from: &Uri, target: &str) -> Result<String, Refusal> {
    let scheme = from.scheme_str().ok_or(Refusal::Redirects)?;
    let authority = from.authority().ok_or(Refusal::Redirects)?;
    if target.starts_with("//") {
        Ok(format!("{scheme}:{target}"))
    } else if target.starts_with('/') {
        Ok(format!("{scheme}://{authority}{target}"))
    } else if target.contains("://") {
        Ok(target.to_owned())
    } else {
        Err(Refusal::Redirects)
    }
}

/// Resolves names whose every address is allowed, and no others; the connection goes to what it returns.
#[derive(Debug, Clone, Copy)]
struct PublicResolver {
    is_allowed: fn(IpAddr) -> bool,
    /// The addresses of `host:port`.
    look_up: fn(&str) -> io::Result<Vec<SocketAddr>>,
}

impl Resolver for PublicResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let refused = || ureq::Error::Io(io::ErrorKind::PermissionDenied.into());
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else { return Err(refused()) };
        let name = DefaultResolver::host_and_port(scheme, authority).ok_or_else(refused)?;
        let found = look_up_within(*timeout.after, self.look_up, name)?;
        let found = found.ok_or(ureq::Error::Timeout(timeout.reason))?;
        if found.iter().any(|address| !(self.is_allowed)(address.ip())) {
            return Err(refused());
        }
        let mut addresses = self.empty();
        // The list holds sixteen.
        found.iter().take(16).for_each(|&address| addresses.push(address));
        if found.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(addresses) }
    }
}

fn look_up(name: &str) -> io::Result<Vec<SocketAddr>> {
    name.to_socket_addrs().map(Iterator::collect)
}

/// The addresses of a name; `None` when they are not known in time. The operating system gives its answer no deadline, and half
/// a minute is usual where a name's servers say nothing: a thread waits for it, and ends when it comes.
fn look_up_within(
    longest: Duration,
    look_up: fn(&str) -> io::Result<Vec<SocketAddr>>,
    name: String,
) -> io::Result<Option<Vec<SocketAddr>>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("blip2-resolver".into()).spawn(move || {
        // Nobody listens any more when it comes too late.
        let _ = sender.send(look_up(&name));
    })?;
    receiver.recv_timeout(longest).ok().transpose()
}

/// Whether an address is one of the public network, by IANA's registries of special addresses.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    // First address and length of the prefix.
    const SPECIAL: [([u8; 4], u32); 16] = [
        ([0, 0, 0, 0], 8),
        ([10, 0, 0, 0], 8),
        ([100, 64, 0, 0], 10),
        ([127, 0, 0, 0], 8),
        ([169, 254, 0, 0], 16),
        ([172, 16, 0, 0], 12),
        ([192, 0, 0, 0], 24),
        ([192, 0, 2, 0], 24),
        ([192, 31, 196, 0], 24),
        ([192, 52, 193, 0], 24),
        ([192, 88, 99, 0], 24),
        ([192, 168, 0, 0], 16),
        ([198, 18, 0, 0], 15),
        ([198, 51, 100, 0], 24),
        ([203, 0, 113, 0], 24),
        // Multicast, reserved, broadcast.
        ([224, 0, 0, 0], 3),
    ];
    let bits = address.to_bits();
    !SPECIAL.iter().any(|&(prefix, len)| (bits ^ u32::from_be_bytes(prefix)) >> (32 - len) == 0)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.segments();
    // Only 2000::/3 is given out; all that embeds an IPv4 address elsewhere (::a.b.c.d, 64:ff9b::, ::ffff:) is outside.
    let is_given_out = first & 0xe000 == 0x2000;
    let is_special = match first {
        // Protocols (Teredo, ORCHID, benchmarks) and documentation.
        0x2001 => second < 0x0200 || second == 0x0db8,
        // 6to4, which embeds IPv4.
        0x2002 => true,
        0x2620 => second == 0x004f,
        0x3fff => second < 0x1000,
        _ => false,
    };
    is_given_out && !is_special
}

#[cfg(test)]
mod tests;
