//! What the server does not put up with: no key, too much, too slow, gone; and how it ends.

mod support;

use std::io::{Read, Write};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use blip2::generate::GenerationConfig;
use blip2_server::{Keys, Limits, ROUTES, ServerConfig};
use serde_json::{Value as Json, json};
use support::{Response, TestServer, chat, config, text_of};

/// A request that the tiny encoder-decoder model works on for a while.
fn long(i: u32) -> Json {
    chat(
        i,
        "tell me all",
        &json!({"max_tokens": 400, "min_tokens": 400, "n": 4, "temperature": 1, "seed": 1}),
    )
}

#[test]
fn every_address_wants_a_key_but_the_open_ones() {
    let server = TestServer::start(
        "blip2_opt",
        ServerConfig { keys: Keys::new(["right", "other"]).expect("keys"), ..config() },
    );
    let open = ["/", "/docs", "/static/{file}", "/openapi.json", "/health", "/ready"];
    for &(method, path, is_open) in ROUTES {
        assert_eq!(is_open, open.contains(&path), "{path}");
        let path = path.replace("{model}", &server.name).replace("{file}", "style.css");
        let status = |headers: &[(&str, &str)]| {
            let response = server.send(method, &path, headers, b"{}");
            if response.status == 401 && !path.starts_with("/api/") {
                assert_eq!(response.error_code(), "invalid_api_key");
            }
            response.status
        };
        let wrong: [&[(&str, &str)]; 5] = [
            &[],
            &[("authorization", "Bearer wrong")],
            &[("authorization", "Basic right")],
            &[("authorization", "Bearer right"), ("authorization", "Bearer right")],
            &[("authorization", "Bearer right2")],
        ];
        for headers in wrong {
            let status = status(headers);
            assert_eq!(status == 401, !is_open, "{method} {path} {headers:?}: {status}");
        }
        for key in ["Bearer right", "bearer other"] {
            let status = status(&[("authorization", key)]);
            assert!(
                status != 401 && status != 404 && status != 405 && status < 500,
                "{method} {path}: {status}"
            );
        }
    }
    // What is no address is not told to strangers either.
    let refused = server.get("/v2/secret");
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Bearer")));
    assert_eq!(
        server.send("GET", "/v2/secret", &[("authorization", "Bearer right")], b"").error_code(),
        "not_found"
    );
    let wrong_method = server.send("GET", "/v1/caption", &[("authorization", "Bearer right")], b"");
    assert_eq!((wrong_method.status, wrong_method.error_code().as_str()), (405, "method_not_allowed"));
}

#[test]
fn without_a_key_only_this_machines_names_are_answered() {
    let server =
        TestServer::start("blip2_opt", ServerConfig { allowed_hosts: vec!["my.example".into()], ..config() });
    let status = |headers: &[(&str, &str)]| server.send("GET", "/v1/models", headers, b"").status;
    assert_eq!(status(&[]), 200);
    assert_eq!(status(&[("host", "localhost:9")]), 200);
    assert_eq!(status(&[("host", "my.example")]), 200);
    assert_eq!(status(&[("host", "evil.example")]), 403);
    assert_eq!(status(&[("host", "localhost"), ("origin", "https://evil.example")]), 403);
    let refused = server.send("POST", "/v1/caption", &[("host", "evil.example")], &[b'x'; 100_000]);
    assert_eq!(refused.error_code(), "host_not_allowed");
}

#[test]
fn a_client_that_leaves_stops_the_work() {
    let server = TestServer::start("blip2_t5", config());
    let mut asked = long(1);
    let n_all = server.post("/v1/chat/completions", &asked).ok()["usage"]["completion_tokens"]
        .as_u64()
        .expect("a count");
    assert_eq!(n_all, 4 * 400);
    for is_stream in [true, false] {
        asked["stream"] = is_stream.into();
        let before = server.metric("blip2_generated_tokens_total");
        let body = asked.to_string();
        let mut stream = server.begin("POST", "/v1/chat/completions", &[], body.as_bytes());
        if is_stream {
            let mut some = [0; 600];
            stream.read_exact(&mut some).expect("it began");
        }
        server.wait_for("blip2_running_texts", |n| n > 0.0);
        drop(stream);
        server.wait_for("blip2_running_texts", |n| n == 0.0);
        let written = server.metric("blip2_generated_tokens_total") - before;
        // How many depends on when the connection's end is noticed; from then on it is a step: `engine/tests.rs`.
        assert!(written < n_all as f64, "{written} of {n_all} tokens, streamed: {is_stream}");
    }
    let left = "blip2_requests_total{route=\"/v1/chat/completions\",outcome=\"client_disconnected\"}";
    server.wait_for(left, |n| n == 2.0);
}

#[test]
fn heat_maps_whose_clients_left_are_not_computed() {
    let server = TestServer::start("blip2_t5", ServerConfig { batch: 4, ..config() });
    let begin = |path: &str, body: &Json| server.begin("POST", path, &[], body.to_string().as_bytes());
    // One is written, the others wait for its place; whatever comes later waits behind them.
    let chats: Vec<_> = (0..8).map(|i| begin("/v1/chat/completions", &long(i))).collect();
    server.wait_for("blip2_queue_requests", |n| n == 7.0);
    let asked = json!({"image": support::data_url(1), "text": "a red cat", "caption": true});
    let explained: Vec<_> = (0..20).map(|_| begin("/v1/explain", &asked)).collect();
    // All of them: one that has not come yet is not missed either.
    server.wait_for("blip2_queue_requests", |n| n == 27.0);
    drop(explained);
    let left = "blip2_requests_total{route=\"/v1/explain\",outcome=\"client_disconnected\"}";
    server.wait_for(left, |n| n == 20.0);
    drop(chats);
    server.wait_for("blip2_queue_requests", |n| n == 0.0);
    server.wait_for("blip2_running_texts", |n| n == 0.0);
    let n_computed = "blip2_stage_seconds_count{stage=\"compute\"}";
    assert_eq!(server.metric(n_computed), 0.0);
    server.post("/v1/explain", &asked).ok();
    server.wait_for(n_computed, |n| n == 1.0);
}

#[test]
fn a_full_queue_sends_away_and_loses_nothing() {
    let server = TestServer::start("blip2_t5", ServerConfig { queue: 2, batch: 4, ..config() });
    let barrier = Barrier::new(12);
    let responses: Vec<Response> = std::thread::scope(|scope| {
        let ask = |i| {
            let (server, barrier) = (&server, &barrier);
            scope.spawn(move || {
                barrier.wait();
                server.post("/v1/chat/completions", &long(i))
            })
        };
        let threads: Vec<_> = (0..12).map(ask).collect();
        threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    let n_ok = responses.iter().filter(|response| response.status == 200).count();
    // One that is written and two that wait, at the least.
    assert!((3..12).contains(&n_ok), "{n_ok}");
    for refused in responses.iter().filter(|response| response.status != 200) {
        assert_eq!((refused.status, refused.error_code().as_str()), (429, "server_overloaded"));
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    server.post("/v1/chat/completions", &chat(1, "who?", &json!({"max_tokens": 2}))).ok();
}

#[test]
fn a_request_that_can_never_fit_is_told_so() {
    let server = TestServer::start("blip2_t5", ServerConfig { batch: 3, kv_bytes: 100_000, ..config() });
    let response = server.post("/v1/chat/completions", &long(1));
    assert_eq!(response.error_code(), "invalid_value");
    let response = server.post("/v1/chat/completions", &chat(1, "who?", &json!({"max_tokens": 400})));
    assert!(response.text().contains("memory"), "{}", response.text());
    server.post("/v1/chat/completions", &chat(1, "who?", &json!({"max_tokens": 2}))).ok();
}

/// A folder's `max_length` holds in place of the number of new tokens, unless it is turned into one.
#[test]
fn a_folders_lengths_are_no_way_around_the_limits() {
    let model = support::model_with("blip2_t5", &json!({"max_length": 400, "min_length": 400}));
    let caption = |fields: &Json| {
        let mut request = json!({"image": support::data_url(1), "num_beams": 1});
        fields.as_object().expect("fields").iter().for_each(|(name, value)| request[name] = value.clone());
        request
    };
    let server = TestServer::with_model(model.clone(), config());
    let n_tokens =
        |fields: &Json| server.post("/v1/caption", &caption(fields)).ok()["captions"][0]["n_tokens"].clone();
    assert_eq!(n_tokens(&json!({})), 400);
    assert_eq!(n_tokens(&json!({"max_tokens": 7})), 7);
    let free = GenerationConfig { min_new_tokens: 1, max_new_tokens: 300, ..GenerationConfig::default() };
    let features = server.model.encode(&[support::picture(1)]).expect("features").remove(0);
    let expected = server.model.caption(&[&features], &free).expect("a caption")[0][0].token_ids.len();
    assert_eq!(n_tokens(&json!({"min_tokens": 1, "max_tokens": 300})), expected, "the end may come");
    let answer = server.post("/v1/chat/completions", &chat(1, "who?", &json!({"max_tokens": 5}))).ok();
    assert_eq!(answer["usage"]["completion_tokens"], 5);

    let limits = Limits { tokens: 11, ..Limits::default() };
    let server = TestServer::with_model(model.clone(), ServerConfig { limits, ..config() });
    assert_eq!(server.post("/v1/caption", &caption(&json!({}))).ok()["captions"][0]["n_tokens"], 11);

    let server = TestServer::with_model(model, ServerConfig { kv_bytes: 100_000, ..config() });
    let response = server.post("/v1/caption", &caption(&json!({})));
    assert!(response.status == 400 && response.text().contains("memory"), "{}", response.text());
    server.post("/v1/caption", &caption(&json!({"max_tokens": 2}))).ok();
}

fn impatient() -> ServerConfig {
    let limits = Limits {
        header: Duration::from_millis(300),
        idle: Duration::from_millis(300),
        body_bytes: 200_000,
        ..Limits::default()
    };
    ServerConfig { limits, ..config() }
}

#[test]
fn slow_clients_are_cut() {
    let server = TestServer::start("blip2_opt", impatient());
    for half in ["", "POST /v1/caption HTTP/1.1\r\nhost: local", "GET / HTTP/1.1\r\nx: y\r\n"] {
        let start = Instant::now();
        let mut stream = server.connect();
        stream.write_all(half.as_bytes()).expect("sent");
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        let took = start.elapsed();
        assert!((250..3000).contains(&took.as_millis()), "{half:?}: {took:?}");
    }
    // A byte of the headers now and then is not enough.
    let start = Instant::now();
    let mut stream = server.connect();
    for byte in b"GET /health HTTP/1.1\r\nx-a: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" {
        if stream.write_all(&[*byte]).is_err() || start.elapsed() > Duration::from_secs(3) {
            break;
        }
        std::thread::sleep(Duration::from_millis(40));
    }
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    // A body that stops coming.
    let mut stream = server.begin("POST", "/v1/caption", &[("content-length", "1000")], b"{\"image\"");
    let response = Response::read(&mut stream);
    assert_eq!((response.status, response.error_code().as_str()), (408, "body_too_slow"));
    assert_eq!(response.header("x-should-retry"), Some("false"));
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_body_that_is_too_large_is_refused_however_it_comes() {
    let server = TestServer::start("blip2_opt", impatient());
    let body = format!("{{\"image\": \"{}\"}}", "A".repeat(300_000));
    let announced = server.send("POST", "/v1/caption", &[], body.as_bytes());
    assert_eq!((announced.status, announced.error_code().as_str()), (413, "body_too_large"));
    // Chunked bodies announce nothing.
    let mut chunked = Vec::new();
    for piece in body.as_bytes().chunks(1000) {
        chunked.extend(format!("{:x}\r\n", piece.len()).bytes());
        chunked.extend(piece);
        chunked.extend(b"\r\n");
    }
    chunked.extend(b"0\r\n\r\n");
    let response = server.send("POST", "/v1/caption", &[("transfer-encoding", "chunked")], &chunked);
    assert_eq!((response.status, response.error_code().as_str()), (413, "body_too_large"));
    // A million pieces of a byte each are as good as one.
    let crumbs = b"1\r\n \r\n".repeat(100_000);
    let response = server.send(
        "POST",
        "/v1/caption",
        &[("transfer-encoding", "chunked")],
        &[&crumbs[..], b"0\r\n\r\n"].concat(),
    );
    assert_eq!(response.error_code(), "invalid_body");
}

#[test]
fn a_packed_body_is_as_large_as_what_it_unpacks_to() {
    let packed = |text: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(text.as_bytes()).expect("packed");
        encoder.finish().expect("packed")
    };
    let server = TestServer::start("blip2_opt", impatient());
    let asked = chat(1, "who?", &json!({"max_tokens": 3}));
    let send = |encoding: &str, body: &[u8]| {
        server.send("POST", "/v1/chat/completions", &[("content-encoding", encoding)], body)
    };
    let expected = text_of(&server.post("/v1/chat/completions", &asked).ok());
    assert_eq!(text_of(&send("gzip", &packed(&asked.to_string())).ok()), expected);
    let bomb = packed(&" ".repeat(50_000_000));
    assert!(bomb.len() < impatient().limits.body_bytes);
    let refused = send("gzip", &bomb);
    assert_eq!((refused.status, refused.error_code().as_str()), (413, "body_too_large"));
    assert_eq!(send("gzip", asked.to_string().as_bytes()).error_code(), "invalid_body");
    let unknown = send("br", b"{}");
    assert_eq!((unknown.status, unknown.error_code().as_str()), (415, "unsupported_encoding"));
    assert_eq!(unknown.header("accept-encoding"), Some("gzip"));
}

#[test]
fn a_request_that_takes_too_long_ends_with_an_error() {
    let limits = Limits { request: Duration::from_millis(60), ..Limits::default() };
    let server = TestServer::start("blip2_t5", ServerConfig { limits, ..config() });
    let response = server.post("/v1/chat/completions", &long(1));
    assert_eq!((response.status, response.error_code().as_str()), (504, "timeout"));
    let mut asked = long(1);
    asked["stream"] = true.into();
    let events = server.post("/v1/chat/completions", &asked).events();
    let last: Json = serde_json::from_str(events.last().expect("an event")).expect("JSON");
    assert_eq!(last["error"]["code"], "timeout", "an error in the stream, never silence");
    server.wait_for("blip2_running_texts", |n| n == 0.0);
}

#[test]
fn connections_are_bounded() {
    let limits = Limits { connections: 3, header: Duration::from_millis(500), ..Limits::default() };
    let server = TestServer::start("blip2_opt", ServerConfig { limits, ..config() });
    let idle: Vec<_> = (0..3).map(|_| server.connect()).collect();
    let start = Instant::now();
    // It waits until one of the others is cut.
    assert_eq!(server.get("/health").status, 200);
    assert!(start.elapsed() > Duration::from_millis(200), "{:?}", start.elapsed());
    drop(idle);
}

#[test]
fn the_end_finishes_what_was_accepted() {
    let mut server =
        TestServer::start("blip2_t5", ServerConfig { drain_delay: Duration::from_millis(300), ..config() });
    let expected = text_of(&server.post("/v1/chat/completions", &long(1)).ok());
    let body = long(1).to_string();
    let mut streamed = long(1);
    streamed["stream"] = true.into();
    let streamed = streamed.to_string();
    assert_eq!(server.get("/ready").status, 200);
    let mut running: Vec<_> = (0..6)
        .map(|i| {
            let body = if i % 2 == 0 { &body } else { &streamed };
            server.begin("POST", "/v1/chat/completions", &[], body.as_bytes())
        })
        .collect();
    server.wait_for("blip2_running_texts", |n| n > 0.0);
    server.stop();
    // Not ready at once, but still there for those who have not noticed.
    let start = Instant::now();
    while server.get("/ready").status != 503 {
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    assert_eq!(server.get("/health").status, 200);
    for (i, stream) in running.iter_mut().enumerate() {
        let response = Response::read(stream);
        if i % 2 == 0 {
            assert_eq!(text_of(&response.ok()), expected);
        } else {
            assert_eq!(response.events().last().map(String::as_str), Some("[DONE]"));
        }
    }
    server.join();
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
}

#[test]
fn the_end_does_not_wait_for_ever() {
    let mut server =
        TestServer::start("blip2_t5", ServerConfig { drain: Duration::from_millis(50), ..config() });
    let mut asked = long(1);
    asked["n"] = 8.into();
    let mut plain = server.begin("POST", "/v1/chat/completions", &[], asked.to_string().as_bytes());
    asked["stream"] = true.into();
    let mut streamed = server.begin("POST", "/v1/chat/completions", &[], asked.to_string().as_bytes());
    server.wait_for("blip2_running_texts", |n| n > 8.0);
    let start = Instant::now();
    server.stop();
    server.join();
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    let response = Response::read(&mut plain);
    assert_eq!((response.status, response.error_code().as_str()), (503, "shutting_down"));
    let events = Response::read(&mut streamed).events();
    assert!(events.last().expect("an event").contains("shutting_down"), "{events:?}");
}

#[test]
fn an_id_names_a_request_in_answer_and_log() {
    let server = TestServer::start("blip2_opt", config());
    let given = server.send("GET", "/v1/models", &[("x-request-id", "my-id.1")], b"");
    assert_eq!(given.header("x-request-id"), Some("my-id.1"));
    let (one, two) =
        (server.get("/v1/models"), server.send("GET", "/v1/models", &[("x-request-id", "a b\"")], b""));
    assert_ne!(one.header("x-request-id"), two.header("x-request-id"));
    for response in [one, server.get("/"), server.get("/nothing")] {
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"));
        assert!(
            response
                .header("content-security-policy")
                .is_some_and(|policy| policy.starts_with("default-src 'none'"))
        );
        assert_eq!(response.header("access-control-allow-origin"), None);
    }
}

/// A generator of numbers that looks random and is not.
fn numbers() -> impl FnMut(usize) -> usize {
    let mut state = 12345_u64;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    }
}

#[test]
fn damaged_pictures_by_the_hundred_are_refused_or_read() {
    let server = TestServer::start("blip2_opt", config());
    let mut number = numbers();
    let picture = support::picture(1);
    let files = ["png", "jpeg", "gif", "bmp", "webp", "tiff"].map(|kind| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let format = image::ImageFormat::from_extension(kind).expect("a format");
        picture.write_to(&mut bytes, format).expect("written");
        bytes.into_inner()
    });
    let (mut n_read, mut n_refused) = (0, 0);
    for file in &files {
        for i in 0..60 {
            let mut file = file.clone();
            if i % 3 == 0 {
                file.truncate(number(file.len()));
            } else {
                for _ in 0..1 + i % 5 {
                    let at = number(file.len());
                    file[at] ^= 1 << number(8);
                }
            }
            let request = json!({"image": support::base64(&file), "max_tokens": 1, "num_beams": 1});
            let response = server.post("/v1/caption", &request);
            match response.status {
                200 => n_read += 1,
                400 => {
                    assert!(response.error_code().contains("image"), "{}", response.text());
                    n_refused += 1;
                }
                other => panic!("{other}: {}", response.text()),
            }
        }
    }
    assert!(n_read > 30 && n_refused > 100, "{n_read} read, {n_refused} refused");
    assert_eq!(server.metric("blip2_panics_total"), 0.0);
}

#[test]
fn requests_that_break_off_anywhere_leave_nothing_behind() {
    let server = TestServer::start("blip2_t5", config());
    let mut number = numbers();
    for i in 0..200 {
        let mut asked = chat(i % 7, "tell me all", &json!({"max_tokens": 300, "min_tokens": 300}));
        asked["stream"] = (i % 2 == 0).into();
        let body = asked.to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
            server.address,
            body.len()
        );
        let whole = [head.as_bytes(), body.as_bytes()].concat();
        let n_sent = if i % 3 == 0 { whole.len() } else { number(whole.len()) };
        let mut stream = server.connect();
        stream.write_all(&whole[..n_sent]).expect("sent");
        if i % 3 == 0 {
            std::thread::sleep(Duration::from_millis(number(8) as u64));
        }
    }
    server.wait_for("blip2_running_texts", |n| n == 0.0);
    server.wait_for("blip2_queue_requests", |n| n == 0.0);
    // The one that asks.
    server.wait_for("blip2_connections", |n| n == 1.0);
    let answer = server
        .post("/v1/chat/completions", &chat(1, "who?", &json!({"max_tokens": 3, "min_tokens": 3})))
        .ok();
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}
