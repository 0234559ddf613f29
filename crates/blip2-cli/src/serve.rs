//! `blip2 serve`: the arguments of the server, each of which is an environment variable too.

use std::env;
use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use blip2_server::{Keys, Limits, ServerConfig};
use clap::builder::BoolishValueParser;

use crate::args::SourceArgs;
use crate::model::{Part, open_source};

// Keys are never arguments: others on the machine can see those.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Keys are read from --api-key-file and from BLIP2_API_KEY (several with commas between them)."
)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// What the model is called in requests; its own name by default.
    #[arg(long, env = "BLIP2_MODEL_NAME", value_name = "NAME")]
    model_name: Option<String>,
    /// The address to listen on, or the name of one; one that other machines reach needs a key.
    #[arg(long, env = "BLIP2_HOST", default_value = "127.0.0.1", value_name = "ADDRESS")]
    host: String,
    /// The port to listen on; 0 takes a free one.
    #[arg(long, env = "BLIP2_PORT", default_value_t = 8080)]
    port: u16,
    /// A file with the keys that clients send, one a line.
    #[arg(long, env = "BLIP2_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Let everybody in who reaches the address.
    #[arg(long, env = "BLIP2_ALLOW_NO_KEY", value_parser = BoolishValueParser::new())]
    allow_no_key: bool,
    /// Another name by which a server without keys may be called; may be given several times.
    #[arg(long = "allowed-host", env = "BLIP2_ALLOWED_HOSTS", value_delimiter = ',', value_name = "NAME")]
    allowed_hosts: Vec<String>,
    /// Fetch pictures that requests name by address, from these domains only (`example.org`, `*.example.org`, or `*`).
    #[arg(long, env = "BLIP2_ALLOW_IMAGE_URLS", value_delimiter = ',', value_name = "DOMAIN")]
    allow_image_urls: Vec<String>,
    /// Requests that may wait for the model.
    #[arg(long, env = "BLIP2_QUEUE", default_value_t = 64, value_name = "N")]
    queue: usize,
    /// Texts that are written at once.
    #[arg(long, env = "BLIP2_BATCH", default_value_t = 32, value_name = "N")]
    batch: usize,
    /// Memory for the keys and values of all texts being written: a request begins when its own, at their longest, fit. Those
    /// of texts that ended make room by and by, and buffers grow by halves, so that up to three times as much may be taken
    /// (`blip2_kv_cache_bytes` says how much is); it is kept for the next texts, and given back when none come.
    #[arg(long, env = "BLIP2_KV_MIB", default_value_t = 1024, value_name = "MIB")]
    kv_mib: usize,
    /// Memory for what the model saw in earlier pictures.
    #[arg(long, env = "BLIP2_PICTURE_CACHE_MIB", default_value_t = 128, value_name = "MIB")]
    picture_cache_mib: usize,
    /// Memory for what the language model has read of earlier pictures and turns.
    #[arg(long, env = "BLIP2_PROMPT_CACHE_MIB", default_value_t = 256, value_name = "MIB")]
    prompt_cache_mib: usize,
    /// How long what was accepted may take after SIGTERM.
    #[arg(long, env = "BLIP2_DRAIN_SECONDS", default_value_t = 60, value_name = "SECONDS")]
    drain_seconds: u64,
    /// How long to go on accepting after SIGTERM, already not ready: until a load balancer has noticed.
    #[arg(long, env = "BLIP2_DRAIN_DELAY_SECONDS", default_value_t = 0, value_name = "SECONDS")]
    drain_delay_seconds: u64,
    /// How log lines look.
    #[arg(long, env = "BLIP2_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(flatten)]
    limits: LimitArgs,
}

/// What a request may cost.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Connections at once.
    #[arg(long, env = "BLIP2_MAX_CONNECTIONS", default_value_t = 1024, value_name = "N")]
    max_connections: usize,
    /// Size of a request's body.
    #[arg(long, env = "BLIP2_MAX_BODY_MIB", default_value_t = 32, value_name = "MIB")]
    max_body_mib: usize,
    /// Size of all bodies that are being read.
    #[arg(long, env = "BLIP2_MAX_BODIES_MIB", default_value_t = 256, value_name = "MIB")]
    max_bodies_mib: usize,
    /// Size of a picture's file.
    #[arg(long, env = "BLIP2_MAX_PICTURE_MIB", default_value_t = 25, value_name = "MIB")]
    max_picture_mib: u64,
    /// Pixels of a picture.
    #[arg(long, env = "BLIP2_MAX_PIXELS", default_value_t = 89_478_485, value_name = "N")]
    max_pixels: u64,
    /// Memory for pictures that are being decoded; others wait for it.
    #[arg(long, env = "BLIP2_MAX_DECODE_MIB", default_value_t = 1024, value_name = "MIB")]
    max_decode_mib: usize,
    /// Pictures of a request.
    #[arg(long, env = "BLIP2_MAX_PICTURES", default_value_t = 16, value_name = "N")]
    max_pictures: usize,
    /// Bytes of all text of a request.
    #[arg(long, env = "BLIP2_MAX_TEXT_BYTES", default_value_t = 8192, value_name = "N")]
    max_text_bytes: usize,
    /// Texts or labels of a request.
    #[arg(long, env = "BLIP2_MAX_TEXTS", default_value_t = 64, value_name = "N")]
    max_texts: usize,
    /// Tokens of an answer.
    #[arg(long, env = "BLIP2_MAX_TOKENS", default_value_t = 512, value_name = "N")]
    max_tokens: usize,
    /// Answers of a request.
    #[arg(long, env = "BLIP2_MAX_ANSWERS", default_value_t = 8, value_name = "N")]
    max_answers: usize,
    /// Beams of a search.
    #[arg(long, env = "BLIP2_MAX_BEAMS", default_value_t = 16, value_name = "N")]
    max_beams: usize,
    /// How long a request may take.
    #[arg(long, env = "BLIP2_REQUEST_SECONDS", default_value_t = 120, value_name = "SECONDS")]
    request_seconds: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// A JSON object a line.
    Json,
}

pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    log_to_standard_error(args.log_format);
    let config = config(&args)?;
    // Before the model is loaded: a mistake in the arguments should not take its time.
    config.validate()?;
    let model = open_source(&args.source, Part::Both, None, |message| tracing::info!("{message}"))?;
    Ok(blip2_server::serve(model, config)?)
}

fn config(args: &ServeArgs) -> anyhow::Result<ServerConfig> {
    let mut keys = match &args.api_key_file {
        Some(path) => Keys::read(path)?,
        None => Keys::default(),
    };
    if let Some(given) = env::var("BLIP2_API_KEY").ok().filter(|given| !given.is_empty()) {
        keys = keys.and(Keys::new(given.split(',').map(str::trim))?);
    }
    let LimitArgs {
        max_connections,
        max_body_mib,
        max_bodies_mib,
        max_picture_mib,
        max_pixels,
        max_decode_mib,
        max_pictures,
        max_text_bytes,
        max_texts,
        max_tokens,
        max_answers,
        max_beams,
        request_seconds,
    } = args.limits;
    Ok(ServerConfig {
        address: address(&args.host, args.port)?,
        keys,
        allow_no_key: args.allow_no_key,
        allowed_hosts: args.allowed_hosts.clone(),
        image_domains: args.allow_image_urls.clone(),
        model_name: args.model_name.clone(),
        queue: args.queue,
        batch: args.batch,
        kv_bytes: args.kv_mib << 20,
        picture_cache_bytes: args.picture_cache_mib << 20,
        prompt_cache_bytes: args.prompt_cache_mib << 20,
        drain: Duration::from_secs(args.drain_seconds),
        drain_delay: Duration::from_secs(args.drain_delay_seconds),
        limits: Limits {
            connections: max_connections,
            body_bytes: max_body_mib << 20,
            all_body_bytes: max_bodies_mib << 20,
            picture_bytes: max_picture_mib << 20,
            picture_pixels: max_pixels,
            decode_bytes: max_decode_mib << 20,
            pictures: max_pictures,
            text_bytes: max_text_bytes,
            texts: max_texts,
            tokens: max_tokens,
            answers: max_answers,
            beams: max_beams,
            request: Duration::from_secs(request_seconds),
            // They are decoded beside the model's threads.
            decode_threads: Limits::default().decode_threads.min(rayon::current_num_threads()),
            ..Limits::default()
        },
    })
}

/// An address, or what a name stands for: of several the first of IPv4, which every client of `localhost` tries.
fn address(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let wrong = || format!("--host {host} is neither an address nor a name that stands for one");
    let found: Vec<_> = (host, port).to_socket_addrs().with_context(wrong)?.collect();
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.copied().with_context(wrong)
}

fn log_to_standard_error(format: LogFormat) {
    let logger = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .with_target(false);
    match format {
        LogFormat::Text => logger.with_ansi(std::io::stderr().is_terminal()).compact().init(),
        LogFormat::Json => logger.json().flatten_event(true).with_span_list(false).init(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;

    #[test]
    fn every_argument_is_an_environment_variable_too() {
        let command = ServeArgs::augment_args(clap::Command::new("serve"));
        let mut names = Vec::new();
        for argument in command.get_arguments() {
            let name = argument.get_env().and_then(|name| name.to_str()).unwrap_or_default();
            assert!(name.starts_with("BLIP2_"), "--{} has no environment variable", argument.get_id());
            assert!(!names.contains(&name), "{name} stands for two arguments");
            names.push(name);
        }
        assert!(names.contains(&"BLIP2_MODEL") && names.len() > 20, "{names:?}");
    }

    #[test]
    fn a_host_is_an_address_or_its_name() {
        for (host, expected) in
            [("127.0.0.1", "127.0.0.1:80"), ("0.0.0.0", "0.0.0.0:80"), ("::", "[::]:80"), ("::1", "[::1]:80")]
        {
            assert_eq!(address(host, 80).expect(host).to_string(), expected);
        }
        assert!(address("localhost", 80).expect("localhost").ip().is_loopback());
        // Longer than a name can be, so that nobody is asked for it.
        let error = address(&"a".repeat(300), 80).expect_err("refused");
        assert!(error.to_string().contains("--host aaa"), "{error}");
    }
}
