//! `blip2 serve` as a process: how it starts, refuses to start, and ends.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

fn serve(arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden/blip2_t5");
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.arg("serve").arg("--model").arg(model).args(arguments).env_clear();
    command.env("HOME", "/nonexistent").envs(environment.iter().copied());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).stdin(Stdio::null());
    command
}

/// A server that listens.
struct Running {
    child: Child,
    address: String,
    log: BufReader<ChildStderr>,
}

impl Running {
    #[allow(clippy::zombie_processes, reason = "who is given it waits for it; a test that fails ends it too")]
    fn start(environment: &[(&str, &str)]) -> Self {
        let mut child =
            serve(&["--port", "0", "--log-format", "json"], environment).spawn().expect("started");
        let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
        loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).expect("readable") > 0, "it ended before it listened");
            let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            if line["message"] == "listening" {
                let address = line["address"].as_str().expect("an address").to_owned();
                return Self { child, address, log };
            }
        }
    }

    /// Sends a request.
    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("connected");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).expect("sent");
        stream
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(name).arg(self.child.id().to_string()).status();
        assert!(status.expect("kill is there").success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answer(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

/// A red square.
const PICTURE: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAEElEQVR4nGP4z8AARAwQCgAf7gP9i18U1AAAAABJRU5ErkJggg==";

#[test]
fn a_signal_ends_it_when_all_is_answered() {
    for signal in ["-TERM", "-INT"] {
        let mut server = Running::start(&[]);
        let body = format!(
            r#"{{"max_tokens": 300, "min_tokens": 300, "n": 4, "temperature": 1, "messages": [{{"role": "user",
                "content": [{{"type": "image_url", "image_url": "{PICTURE}"}}, {{"type": "text", "text": "a secret?"}}]}}]}}"#
        );
        let running: Vec<_> =
            (0..4).map(|_| server.send("POST", "/v1/chat/completions", "", &body)).collect();
        while answer(server.send("GET", "/metrics", "", "")).contains("blip2_batch_texts_count 0") {}
        server.signal(signal);
        for stream in running {
            let answer = answer(stream);
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            assert!(answer.contains("finish_reason"), "whole: {answer}");
        }
        assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
        let mut log = String::new();
        server.log.read_to_string(&mut log).expect("readable");
        assert!(log.contains("shutting down") && log.contains("\"outcome\":\"ok\""), "{log}");
        assert!(
            !log.contains("secret") && !log.contains(&PICTURE[..20]),
            "the log tells what was asked: {log}"
        );
    }
}

fn decoded(base64: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = base64
        .trim_end_matches('=')
        .bytes()
        .map(|byte| DIGITS.iter().position(|digit| *digit == byte).expect("base64") as u32);
    let digits: Vec<u32> = digits.collect();
    let group = |group: &[u32]| {
        let bits = group.iter().enumerate().map(|(i, digit)| digit << (18 - 6 * i)).sum::<u32>();
        bits.to_be_bytes()[1..group.len()].to_vec()
    };
    digits.chunks(4).flat_map(group).collect()
}

/// The command line and both ways to ask the server, with the same settings.
#[test]
fn the_command_line_and_the_server_say_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("red.png");
    std::fs::write(&file, decoded(PICTURE)).expect("written");
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden/blip2_t5");
    let output = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(["caption", "--json", "--num-beams", "3", "--max-new-tokens", "9", "--model"])
        .arg(&model)
        .arg(&file)
        .output()
        .expect("it ends");
    let written: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let expected =
        written[0]["caption"].as_str().unwrap_or_else(|| panic!("{written} {output:?}")).to_owned();
    let server = Running::start(&[]);
    let settings = r#""num_beams": 3, "max_tokens": 9"#;
    for (path, place, body) in [
        ("/v1/caption", "/captions/0/text", format!(r#"{{{settings}, "image": "{PICTURE}"}}"#)),
        (
            "/v1/chat/completions",
            "/choices/0/message/content",
            format!(
                r#"{{{settings}, "messages": [{{"role": "user", "content": [{{"type": "image_url", "image_url": "{PICTURE}"}}]}}]}}"#
            ),
        ),
    ] {
        let answer = answer(server.send("POST", path, "", &body));
        let json = answer.split_once("\r\n\r\n").expect("a body").1;
        let json: serde_json::Value = serde_json::from_str(json).expect("JSON");
        assert_eq!(json.pointer(place), Some(&expected.clone().into()), "{path}: {json}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn freed_memory_stays_with_it_unless_somebody_has_said_how_long() {
    for (given, expected) in [(&[][..], "-1"), (&[("MIMALLOC_PURGE_DELAY", "500")][..], "500")] {
        let server = Running::start(given);
        let environment = std::fs::read(format!("/proc/{}/environ", server.child.id())).expect("readable");
        let expected = format!("MIMALLOC_PURGE_DELAY={expected}");
        assert!(environment.split(|&byte| byte == 0).any(|found| found == expected.as_bytes()));
    }
}

#[test]
fn keys_come_from_the_environment() {
    let server = Running::start(&[("BLIP2_API_KEY", "one, two")]);
    let status = |headers: &str| answer(server.send("GET", "/v1/models", headers, ""))[9..12].to_owned();
    assert_eq!(status(""), "401");
    assert_eq!(status("authorization: Bearer two\r\n"), "200");
}

#[test]
fn switches_and_names_of_hosts_come_from_the_environment() {
    let open = [("BLIP2_HOST", "0.0.0.0"), ("BLIP2_ALLOW_NO_KEY", "1"), ("BLIP2_IGNORE_MEMORY", "yes")];
    let server = Running::start(&open);
    assert!(server.address.starts_with("0.0.0.0:"), "{}", server.address);
    let server = Running::start(&[("BLIP2_HOST", "localhost"), ("BLIP2_ALLOW_NO_KEY", "false")]);
    assert!(server.address.starts_with("127.0.0.1:") || server.address.starts_with("[::1]:"));
    // A misspelt word does not open the door.
    let output = serve(&[], &[("BLIP2_ALLOW_NO_KEY", "flase")]).output().expect("it ends");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn what_is_not_safe_or_not_possible_does_not_start() {
    for (arguments, environment, word) in [
        (&["--host", "0.0.0.0"][..], &[][..], "key"),
        (&[], &[("BLIP2_HOST", "::")], "key"),
        (&["--host", "0.0.0.0"], &[("BLIP2_ALLOW_NO_KEY", "0")], "key"),
        (&["--api-key-file", "/nonexistent/keys"], &[], "/nonexistent/keys"),
        (&["--queue", "0"], &[], "queue"),
        (&["--max-bodies-mib", "1"], &[], "bodies"),
        (&[], &[("BLIP2_MAX_DECODE_MIB", "0")], "decoding"),
    ] {
        let output = serve(arguments, environment).output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains(word), "{arguments:?}: {said}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let output = serve(&["--port", &port], &[]).output().expect("it ends");
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot listen"), "{output:?}");
}
