//! Where the server listens, who may ask, and what a request may cost.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::access::Keys;
use crate::error::StartError;

/// Everything that an operator can decide.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen; 127.0.0.1:8080 by default. Port 0 takes a free one.
    pub address: SocketAddr,
    /// Who may ask. Without keys everybody may who can reach the address.
    pub keys: Keys,
    /// Whether to listen on an address that others can reach although there is no key.
    pub allow_no_key: bool,
    /// Names besides this machine's own by which the server may be called when there is no key: a page in somebody's
    /// browser cannot make it answer under another name.
    pub allowed_hosts: Vec<String>,
    /// Domains from which pictures are fetched when a request names them by address: `example.org`, `*.example.org` (all
    /// below it), or `*`. None: nothing is fetched.
    pub image_domains: Vec<String>,
    /// What the model is called; its own name by default.
    pub model_name: Option<String>,
    /// Requests that may wait for the model; more are told to come back later.
    pub queue: usize,
    /// Texts that grow at once: `n`, or the beams, of all requests that are being answered.
    pub batch: usize,
    /// Memory of the keys and values of all texts that grow, in bytes: a request begins when its own, at their longest, fit.
    /// Rows of texts that ended make room when they are more than those that are used, and buffers grow by halves: up to
    /// three times as much may be taken. It is kept for the next texts until less was needed for a while, or nothing came.
    pub kv_bytes: usize,
    /// Memory of the features of pictures seen before, in bytes.
    pub picture_cache_bytes: usize,
    /// Memory of what the language model has read about pictures seen before, in bytes: the next question about such a picture
    /// and the next turn of a conversation read their own words only.
    pub prompt_cache_bytes: usize,
    /// How long what was accepted may take after the server was told to end.
    pub drain: Duration,
    /// How long the server goes on accepting connections after it was told to end, while it says that it is not ready:
    /// what stands before it needs this to notice.
    pub drain_delay: Duration,
    /// What a request may cost.
    pub limits: Limits,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            keys: Keys::default(),
            allow_no_key: false,
            allowed_hosts: Vec::new(),
            image_domains: Vec::new(),
            model_name: None,
            queue: 64,
            batch: 32,
            kv_bytes: 1 << 30,
            picture_cache_bytes: 128 << 20,
            prompt_cache_bytes: 256 << 20,
            drain: Duration::from_secs(60),
            drain_delay: Duration::ZERO,
            limits: Limits::default(),
        }
    }
}

/// What a request may cost, checked before the memory or the time is spent.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Bytes of all bodies that are being read or understood.
    pub all_body_bytes: usize,
    /// Bytes of a picture's file.
    pub picture_bytes: u64,
    /// Pixels of a picture, read in its header.
    pub picture_pixels: u64,
    /// Pictures of a request.
    pub pictures: usize,
    /// Pictures that are decoded at once.
    pub decode_threads: usize,
    /// Memory of all pictures that are being decoded, in bytes: others wait. One that needs more by itself is decoded alone.
    pub decode_bytes: usize,
    /// Bytes of all text of a request.
    pub text_bytes: usize,
    /// Texts or labels of a request.
    pub texts: usize,
    /// Tokens of an answer.
    pub tokens: usize,
    /// Answers of a request (`n`).
    pub answers: usize,
    /// Beams of a search.
    pub beams: usize,
    /// How long a request's headers may take, and how long a connection may be idle.
    pub header: Duration,
    /// How long may pass between two pieces of a body, and how long a client may take nothing of an answer.
    pub idle: Duration,
    /// How long a request may take from its headers to its last byte.
    pub request: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let pictures = blip2::image::Limits::default();
        Self {
            connections: 1024,
            body_bytes: 32 << 20,
            all_body_bytes: 256 << 20,
            picture_bytes: pictures.max_bytes,
            picture_pixels: pictures.max_pixels,
            pictures: 16,
            decode_threads: std::thread::available_parallelism().map_or(1, usize::from).min(4),
            // The largest picture at 12 bytes a pixel, or a handful of a phone's.
            decode_bytes: 1 << 30,
            text_bytes: 8 << 10,
            texts: 64,
            tokens: 512,
            answers: 8,
            beams: 16,
            header: Duration::from_secs(10),
            idle: Duration::from_secs(15),
            request: Duration::from_secs(120),
        }
    }
}

impl ServerConfig {
    /// Checks the values, alone and against each other.
    ///
    /// # Errors
    /// [`StartError::Config`] with what to change.
    pub fn validate(&self) -> Result<(), StartError> {
        if !self.address.ip().is_loopback() && self.keys.is_empty() && !self.allow_no_key {
            return Err(StartError::NoKey { address: self.address });
        }
        let is_domain = |domain: &str| {
            let name = domain.strip_prefix("*.").unwrap_or(domain);
            domain == "*"
                || (!name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)))
        };
        if let Some(domain) = self.image_domains.iter().find(|domain| !is_domain(domain)) {
            let reason = format!("`{domain}` is no domain: give example.org, *.example.org or *");
            return Err(StartError::Config(reason));
        }
        let Limits { connections, decode_threads, texts, tokens, answers, pictures, .. } = self.limits;
        for (name, value) in [
            ("queue", self.queue),
            ("batch", self.batch),
            ("connections", connections),
            ("decode threads", decode_threads),
            ("texts", texts),
            ("tokens", tokens),
            ("answers", answers),
            ("pictures", pictures),
        ] {
            if value == 0 || value > 1 << 20 {
                return Err(StartError::Config(format!("the limit of {name} is {value}: give 1 or more")));
            }
        }
        if self.kv_bytes == 0 {
            return Err(StartError::Config(
                "the memory for keys and values is 0: nothing could be written".into(),
            ));
        }
        if self.limits.decode_bytes == 0 || self.limits.decode_bytes > 1 << 40 {
            return Err(StartError::Config("the memory for decoding pictures is 0 or too large".into()));
        }
        if self.limits.body_bytes > self.limits.all_body_bytes || self.limits.all_body_bytes > 1 << 40 {
            let reason = "the memory for all bodies must hold at least one body of the largest size";
            return Err(StartError::Config(reason.into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_others_reach_needs_a_key() {
        let at = |address: &str| ServerConfig {
            address: address.parse().expect("an address"),
            ..ServerConfig::default()
        };
        for address in ["127.0.0.1:80", "127.8.8.8:0", "[::1]:80"] {
            assert!(at(address).validate().is_ok(), "{address}");
        }
        for address in ["0.0.0.0:80", "[::]:80", "192.168.1.2:80", "[::ffff:127.0.0.1]:80"] {
            let message = at(address).validate().expect_err("refused").to_string();
            assert!(message.contains("key"), "{message}");
            assert!(
                ServerConfig { keys: Keys::new(["k"]).expect("a key"), ..at(address) }.validate().is_ok()
            );
            assert!(ServerConfig { allow_no_key: true, ..at(address) }.validate().is_ok());
        }
    }

    #[test]
    fn limits_that_allow_nothing_are_refused() {
        let config = ServerConfig { queue: 0, ..ServerConfig::default() };
        assert!(config.validate().expect_err("refused").to_string().contains("queue"));
        let config = ServerConfig { kv_bytes: 0, ..ServerConfig::default() };
        assert!(config.validate().expect_err("refused").to_string().contains("keys and values"));
        for limits in [
            Limits { all_body_bytes: 1, ..Limits::default() },
            Limits { decode_bytes: 0, ..Limits::default() },
            Limits { decode_bytes: 1 << 41, ..Limits::default() },
        ] {
            assert!(ServerConfig { limits, ..ServerConfig::default() }.validate().is_err());
        }
    }
}
