//! A server on a socket of its own with a tiny random model, and a client that shows the bytes.
#![allow(dead_code, reason = "every test file uses its part")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blip2::image::RgbImage;
use blip2::model::{Blip2, OpenOptions};
use blip2_server::{Server, ServerConfig};
use serde_json::{Value as Json, json};

/// Reading longer than this is a failed test.
const PATIENCE: Duration = Duration::from_secs(60);

/// The tiny models of the library's own tests: `blip2_opt` with a context of 120 tokens, `blip2_t5` with more.
pub(crate) fn model(name: &str) -> Arc<Blip2> {
    Arc::new(Blip2::open(folder(name), &OpenOptions::default()).expect("a model"))
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

/// The same with a `generation_config.json` in its folder.
pub(crate) fn model_with(name: &str, generation: &Json) -> Arc<Blip2> {
    let copy = tempfile::tempdir().expect("a folder");
    for file in std::fs::read_dir(folder(name)).expect("a folder") {
        let file = file.expect("a file");
        std::fs::copy(file.path(), copy.path().join(file.file_name())).expect("copied");
    }
    std::fs::write(copy.path().join("generation_config.json"), generation.to_string()).expect("written");
    Arc::new(Blip2::open(copy.path(), &OpenOptions::default()).expect("a model"))
}

/// A configuration for tests: a free port.
pub(crate) fn config() -> ServerConfig {
    ServerConfig { address: "127.0.0.1:0".parse().expect("an address"), ..ServerConfig::default() }
}

/// A running server; it ends when this is dropped.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) model: Arc<Blip2>,
    pub(crate) name: String,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    pub(crate) fn start(name: &str, config: ServerConfig) -> Self {
        Self::with_model(model(name), config)
    }

    pub(crate) fn with_model(model: Arc<Blip2>, config: ServerConfig) -> Self {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (started, address) = std::sync::mpsc::channel();
        let of_server = model.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let server = Server::bind(of_server, config).await.expect("a server");
                started.send((server.address(), server.model_name().to_owned())).expect("someone waits");
                server
                    .run(async {
                        let _ = stopped.await;
                    })
                    .await;
            });
        });
        let (address, name) = address.recv().expect("started");
        Self { address, model, name, stop: Some(stop), thread: Some(thread) }
    }

    /// Tells it to end.
    pub(crate) fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Waits for its end.
    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it ended well");
        }
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Json) -> Response {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    pub(crate) fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let mut stream = self.begin(method, path, headers, body);
        Response::read(&mut stream)
    }

    /// Sends a request without waiting for its answer.
    pub(crate) fn begin(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "host") {
            head += &format!("host: {}\r\n", self.address);
        }
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        if method == "POST"
            && !headers.iter().any(|(name, _)| *name == "content-length" || *name == "transfer-encoding")
        {
            head += &format!("content-length: {}\r\n", body.len());
        }
        head += "\r\n";
        stream.write_all(head.as_bytes()).expect("sent");
        // A server that has refused by now may have closed.
        let _ = stream.write_all(body);
        stream
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        stream
    }

    /// A number of `/metrics`.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line =
            text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
    }

    /// Waits until a number of `/metrics` is what it should be.
    pub(crate) fn wait_for(&self, name: &str, is_right: impl Fn(f64) -> bool) -> f64 {
        let start = Instant::now();
        loop {
            let value = self.metric(name);
            if is_right(value) {
                return value;
            }
            assert!(start.elapsed() < PATIENCE, "{name} is still {value}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the server met a mistake");
        }
    }
}

/// What came back.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// Reads to the end of the connection.
    pub(crate) fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("an answer");
        Self::parse(&bytes)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| {
            panic!("no head in {:?}", String::from_utf8_lossy(bytes));
        });
        let head = std::str::from_utf8(&bytes[..end]).expect("a head");
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
        let headers: Vec<_> = lines
            .map(|line| line.split_once(": ").expect("a header"))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let mut body = bytes[end + 4..].to_vec();
        if headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked") {
            body = unchunk(&body);
        }
        Self { status, headers, body }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    pub(crate) fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    /// Its JSON, if it is a success.
    pub(crate) fn ok(&self) -> Json {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// The `data:` lines of server-sent events.
    pub(crate) fn events(&self) -> Vec<String> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let text = self.text();
        text.split("\n\n").filter_map(|event| event.strip_prefix("data: ").map(str::to_owned)).collect()
    }

    /// Asserts that it is an error in OpenAI's shape; gives its code.
    pub(crate) fn error_code(&self) -> String {
        assert!(self.status >= 400, "{} {}", self.status, self.text());
        assert_eq!(self.header("content-type"), Some("application/json"));
        assert!(self.header("x-request-id").is_some_and(|id| !id.is_empty()));
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("no error: {json}"));
        let mut fields: Vec<_> = error.keys().map(String::as_str).collect();
        fields.sort_unstable();
        assert_eq!(fields, ["code", "message", "param", "type"]);
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
        assert!(error["type"].as_str().is_some_and(|kind| kind.ends_with("_error")));
        error["code"].as_str().expect("a code").to_owned()
    }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    // A connection that broke ends anywhere.
    while let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).expect("a size"), 16)
            .expect("hexadecimal");
        let rest = &bytes[end + 2..];
        if size == 0 || rest.len() < size {
            break;
        }
        whole.extend(&rest[..size]);
        bytes = rest.get(size + 2..).unwrap_or_default();
    }
    whole
}

/// A picture of its own for every number.
pub(crate) fn picture(i: u32) -> RgbImage {
    RgbImage::from_fn(30 + i % 5, 20, |x, y| {
        image::Rgb([(x * 7 * (i + 1)) as u8, (y * 11) as u8, (i * 37) as u8])
    })
}

/// Its file.
pub(crate) fn png(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).expect("written");
    bytes.into_inner()
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

pub(crate) fn data_url(i: u32) -> String {
    format!("data:image/png;base64,{}", base64(&png(&picture(i))))
}

/// A chat about a picture with one question.
pub(crate) fn chat(i: u32, question: &str, fields: &Json) -> Json {
    let mut request = json!({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": data_url(i)}}, {"type": "text", "text": question}]}]});
    for (name, value) in fields.as_object().expect("fields") {
        request[name] = value.clone();
    }
    request
}

/// The text of a chat's answer.
pub(crate) fn text_of(response: &Json) -> String {
    response["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{response}")).to_owned()
}
