//! A server on loopback that behaves like the Hugging Face hub, with the faults that a test asks for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The one model that it has.
pub(crate) const MODEL: &str = "org/tiny-blip2";

/// What its branch `main` is.
pub(crate) const COMMIT: &str = "51572668da0eb669e01a189dc22abe6088589a24";

/// A file that it has.
#[derive(Clone)]
pub(crate) struct Content {
    pub(crate) bytes: Vec<u8>,
    /// Kept in large-file storage, which another host delivers.
    is_large: bool,
    pub(crate) etag: String,
    /// The size that it claims.
    pub(crate) size: u64,
}

/// What goes wrong once, with a request whose line holds some text.
#[derive(Clone)]
pub(crate) enum Fault {
    /// Another answer.
    Status(u16, &'static str),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The whole file, whatever part was asked for.
    NoRange,
    /// The body comes late.
    Late(Duration),
}

/// A request that came, as `METHOD /path`, and what of its headers matters.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) line: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
    pub(crate) is_at_hub: bool,
}

struct State {
    files: Mutex<BTreeMap<String, Content>>,
    faults: Mutex<Vec<(String, Fault)>>,
    seen: Mutex<Vec<Seen>>,
    /// Without this token nothing is given.
    token: Mutex<Option<String>>,
    delivery: String,
}

pub(crate) struct Hub {
    /// For `HF_ENDPOINT`.
    pub(crate) address: String,
    state: Arc<State>,
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("text");
        text
    })
}

impl Content {
    pub(crate) fn new(bytes: Vec<u8>, is_large: bool) -> Self {
        let etag = if is_large {
            hexadecimal(&Sha256::digest(&bytes))
        } else {
            hexadecimal(&Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat()))
        };
        Self { size: bytes.len() as u64, bytes, is_large, etag }
    }
}

impl Hub {
    /// Serves the files of a folder, and some that nobody needs.
    pub(crate) fn start(folder: &Path) -> Self {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
            let is_large = name.ends_with(".safetensors");
            files.insert(name, Content::new(std::fs::read(path).expect("readable"), is_large));
        }
        for name in ["pytorch_model.bin", "flax_model.msgpack", "onnx/model.onnx", "README.md"] {
            files.insert(name.into(), Content::new(b"nobody needs this".to_vec(), true));
        }
        let [hub, delivery] = [(), ()].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let address =
            |listener: &TcpListener| format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(State {
            files: Mutex::new(files),
            faults: Mutex::default(),
            seen: Mutex::default(),
            token: Mutex::default(),
            delivery: address(&delivery),
        });
        let this = Self { address: address(&hub), state: state.clone() };
        for (listener, is_at_hub) in [(hub, true), (delivery, false)] {
            let state = state.clone();
            thread::spawn(move || {
                for connection in listener.incoming().flatten() {
                    let state = state.clone();
                    // A client that goes away is no fault of the server.
                    thread::spawn(move || drop(answer(&state, connection, is_at_hub)));
                }
            });
        }
        this
    }

    /// Changes what it has.
    pub(crate) fn files(&self, change: impl FnOnce(&mut BTreeMap<String, Content>)) {
        change(&mut self.state.files.lock().expect("no panic"));
    }

    /// Lets the next request whose line holds `text` fail.
    pub(crate) fn fault(&self, text: &str, fault: Fault) {
        self.state.faults.lock().expect("no panic").push((text.into(), fault));
    }

    pub(crate) fn require_token(&self, token: &str) {
        *self.state.token.lock().expect("no panic") = Some(token.into());
    }

    /// The requests whose line holds `text`, in order; they are forgotten.
    pub(crate) fn take_seen(&self, text: &str) -> Vec<Seen> {
        let mut seen = self.state.seen.lock().expect("no panic");
        let all = std::mem::take(&mut *seen);
        all.into_iter().filter(|seen| seen.line.contains(text)).collect()
    }
}

/// Serves `address` encrypted, with a certificate of `tests/tls/authority.pem` for 127.0.0.1 and localhost. That authority's
/// own key was thrown away when it had signed this one.
pub(crate) fn encrypted(address: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls");
    let certificates = CertificateDer::pem_file_iter(folder.join("server.pem")).expect("readable");
    let certificates = certificates.collect::<Result<Vec<_>, _>>().expect("certificates");
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("known versions")
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .expect("a certificate and its key");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let plain = address.trim_start_matches("http://").to_owned();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let (config, plain) = (config.clone(), plain.clone());
            thread::spawn(move || -> std::io::Result<()> {
                let session = ServerConnection::new(config).expect("a session");
                let mut client = StreamOwned::new(session, connection);
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\r\n\r\n") {
                    client.read_exact(&mut byte)?;
                    request.push(byte[0]);
                }
                let mut server = TcpStream::connect(plain)?;
                server.write_all(&request)?;
                std::io::copy(&mut server, &mut client)?;
                client.conn.send_close_notify();
                client.flush()
            });
        }
    });
    format!("https://127.0.0.1:{port}")
}

fn answer(state: &State, mut connection: TcpStream, is_at_hub: bool) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let line = lines.next().transpose()?.unwrap_or_default();
    let line = line.trim_end_matches(" HTTP/1.1").to_owned();
    let mut headers = BTreeMap::new();
    for header in lines {
        let header = header?;
        let Some((name, value)) = header.split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let (range, authorization) = (headers.remove("range"), headers.remove("authorization"));
    let seen =
        Seen { line: line.clone(), range: range.clone(), authorization: authorization.clone(), is_at_hub };
    state.seen.lock().expect("no panic").push(seen);
    let fault = {
        let mut faults = state.faults.lock().expect("no panic");
        let first = faults.iter().position(|(text, _)| line.contains(text.as_str()));
        first.map(|i| faults.remove(i).1)
    };
    let mut respond = |status: u16, headers: &str, body: &[u8]| -> std::io::Result<()> {
        write!(connection, "HTTP/1.1 {status} -\r\nConnection: close\r\n{headers}")?;
        if !headers.to_ascii_lowercase().contains("content-length") {
            write!(connection, "Content-Length: {}\r\n", body.len())?;
        }
        connection.write_all(b"\r\n")?;
        if line.starts_with("HEAD") {
            return Ok(());
        }
        match &fault {
            Some(Fault::Cut(at)) => connection.write_all(&body[..*at]),
            Some(Fault::Late(wait)) => {
                thread::sleep(*wait);
                connection.write_all(body)
            }
            _ => connection.write_all(body),
        }
    };
    if let Some(Fault::Status(status, headers)) = &fault {
        return respond(*status, headers, b"");
    }
    let path = line.split_once(' ').map_or("", |(_, path)| path);
    if !is_at_hub {
        // As signed addresses do: who also brings a token is turned away.
        if authorization.is_some() {
            return respond(400, "", b"");
        }
        let name = path.trim_start_matches("/signed/").trim_end_matches("?signature=1");
        let content = state.files.lock().expect("no panic")[name].clone();
        let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        return match from {
            Some(from) if !matches!(fault, Some(Fault::NoRange)) => {
                let n = content.bytes.len();
                let headers = format!("Content-Range: bytes {from}-{}/{n}\r\n", n - 1);
                respond(206, &headers, &content.bytes[from..])
            }
            _ => respond(200, "", &content.bytes),
        };
    }
    if let Some(token) = &*state.token.lock().expect("no panic") {
        match authorization {
            None => return respond(401, "X-Error-Code: GatedRepo\r\n", b""),
            Some(given) if given != format!("Bearer {token}") => return respond(401, "", b""),
            Some(_) => {}
        }
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{MODEL}/revision/")) {
        if !["main", COMMIT, "refs%2Fpr%2F1"].contains(&revision) {
            return respond(404, "X-Error-Code: RevisionNotFound\r\n", b"");
        }
        let files = state.files.lock().expect("no panic");
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"id": MODEL, "sha": COMMIT, "siblings": siblings, "private": false});
        return respond(200, "Content-Type: application/json\r\n", body.to_string().as_bytes());
    }
    let near = format!("/api/resolve-cache/models/{MODEL}/{COMMIT}/");
    let is_near = path.starts_with(&near);
    let prefixes = [near.clone(), format!("/{MODEL}/resolve/{COMMIT}/"), format!("/{MODEL}/resolve/main/")];
    let Some(name) = prefixes.iter().find_map(|prefix| path.strip_prefix(prefix)) else {
        // The hub does not tell strangers what exists.
        return respond(401, "X-Error-Code: RepoNotFound\r\n", b"");
    };
    let Some(content) = state.files.lock().expect("no panic").get(name).cloned() else {
        return respond(404, "X-Error-Code: EntryNotFound\r\n", b"");
    };
    let (etag, size) = (&content.etag, content.size);
    if content.is_large {
        let to = format!("{}/signed/{name}?signature=1", state.delivery);
        let headers = format!(
            "Location: {to}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nETag: \"of-the-link\"\r\n"
        );
        return respond(302, &headers, b"Found. Redirecting");
    }
    if !is_near {
        return respond(307, &format!("Location: {near}{name}\r\nX-Repo-Commit: {COMMIT}\r\n"), b"");
    }
    let headers = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{etag}\"\r\nContent-Length: {size}\r\n");
    respond(200, &headers, &content.bytes)
}
