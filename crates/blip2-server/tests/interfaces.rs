//! The other interfaces: this server's own, embeddings, Ollama's; and their description.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use blip2::generate::GenerationConfig;
use blip2::model::{Blip2, OpenOptions};
use blip2_server::{ROUTES, ServerConfig};
use serde_json::{Value as Json, json};
use support::{TestServer, base64, config, data_url, picture, png};

fn greedy(max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens, ..GenerationConfig::default() }
}

#[test]
fn captions_and_answers_are_written_as_the_model_does_by_itself() {
    let server = TestServer::start("blip2_opt", config());
    let features = server.model.encode(&[picture(1)]).expect("features").remove(0);
    let own = server.model.config().stage2.as_ref().expect("stage 2").generation.clone();
    assert!(own.num_beams > 1, "published captions are searched with beams");
    let expected = server.model.caption(&[&features], &own).expect("a caption")[0][0].clone();
    let response = server.post("/v1/caption", &json!({"image": data_url(1)})).ok();
    assert_eq!(response["captions"][0]["text"], expected.text);
    assert_eq!(response["captions"][0]["n_tokens"], expected.token_ids.len());
    // The picture's file as the body.
    let file = png(&picture(1));
    let as_file = server.send("POST", "/v1/caption", &[("content-type", "image/png")], &file).ok();
    assert_eq!(as_file, response);
    for kind in ["IMAGE/PNG", "application/octet-stream; a=b"] {
        assert_eq!(server.send("POST", "/v1/caption", &[("content-type", kind)], &file).ok(), response);
    }
    let no_picture = server.send("POST", "/v1/caption", &[("content-type", "image/png")], b"hello");
    assert_eq!(no_picture.error_code(), "invalid_image_format");

    let several = json!({"image": data_url(1), "n": 3, "num_beams": 4, "max_tokens": 5});
    assert_eq!(server.post("/v1/caption", &several).ok()["captions"].as_array().map(Vec::len), Some(3));

    let expected = server.model.ask(&[(&features, "who?")], &greedy(6)).expect("an answer")[0][0].clone();
    let question = json!({"image": data_url(1), "question": "who?", "num_beams": 1, "max_tokens": 6});
    assert_eq!(server.post("/v1/vqa", &question).ok()["answers"][0]["text"], expected.text);
    let choices = ["yes", "no", "perhaps"];
    let ranked = server.model.rank(&features, "who?", &choices).expect("a ranking");
    let response =
        server.post("/v1/vqa", &json!({"image": data_url(1), "question": "who?", "choices": choices})).ok();
    for (row, expected) in response["choices"].as_array().expect("choices").iter().zip(&ranked) {
        assert_eq!(row["answer"], expected.answer);
        assert!(
            (row["probability"].as_f64().expect("a number") - f64::from(expected.probability)).abs() < 1e-5
        );
    }
    for (request, code) in [
        (json!({"image": data_url(1)}), "invalid_body"),
        (json!({"image": data_url(1), "question": " "}), "invalid_value"),
        (json!({"image": data_url(1), "question": "q", "choices": []}), "invalid_value"),
        (json!({"image": data_url(1), "question": "q", "choices": vec!["a"; 65]}), "invalid_value"),
        (json!({"image": 5, "question": "q"}), "invalid_body"),
    ] {
        assert_eq!(server.post("/v1/vqa", &request).error_code(), code, "{request}");
    }
}

#[test]
fn captions_and_answers_grow_when_asked() {
    let server = TestServer::start("blip2_opt", config());
    for (path, rows, request) in [
        ("/v1/caption", "captions", json!({"num_beams": 1, "max_tokens": 9})),
        ("/v1/caption", "captions", json!({"temperature": 1, "seed": 3, "n": 3, "max_tokens": 9})),
        ("/v1/vqa", "answers", json!({"question": "who?", "num_beams": 1, "max_tokens": 9})),
        // Beams are known at the end.
        ("/v1/caption", "captions", json!({"num_beams": 4, "n": 2, "max_tokens": 9})),
    ] {
        let mut request = request;
        request["image"] = data_url(1).into();
        request["stream"] = false.into();
        let whole = server.post(path, &request).ok();
        request["stream"] = true.into();
        let mut events = server.post(path, &request).events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        let mut events: Vec<Json> =
            events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect();
        assert_eq!(events.pop().as_ref(), Some(&whole), "{path}");
        let expected: Vec<&str> = whole[rows]
            .as_array()
            .expect("texts")
            .iter()
            .map(|row| row["text"].as_str().expect("a text"))
            .collect();
        let mut texts = vec![String::new(); expected.len()];
        for event in &events {
            assert_eq!(event["object"], format!("{}.chunk", whole["object"].as_str().expect("a kind")));
            let index = event["index"].as_u64().expect("an index") as usize;
            texts[index] += event["text"].as_str().expect("a text");
        }
        assert_eq!(texts, expected, "{path}");
    }
    let choose = json!({"image": data_url(1), "question": "who?", "choices": ["a", "b"], "stream": true});
    assert_eq!(server.post("/v1/vqa", &choose).error_code(), "unsupported_value");
    assert_eq!(
        server.post("/v1/caption", &json!({"image": data_url(1), "stream": "yes"})).error_code(),
        "invalid_body"
    );
}

#[test]
fn what_the_model_lacks_is_said() {
    let server = TestServer::start("blip2_opt", config());
    for (path, request) in [
        ("/v1/embeddings", json!({"input": "a cat"})),
        ("/v1/match", json!({"image": data_url(1), "texts": "a cat"})),
        ("/v1/classify", json!({"image": data_url(1), "labels": ["cat"]})),
    ] {
        let response = server.post(path, &request);
        assert_eq!((response.status, response.error_code().as_str()), (400, "model_part_missing"), "{path}");
    }
    let response = server.post("/api/embed", &json!({"input": "a cat"}));
    assert_eq!(response.status, 400);
    assert!(response.json()["error"].as_str().is_some_and(|message| message.contains("compare")));

    let server = TestServer::start("blip2_itm", config());
    for (path, request) in [
        ("/v1/chat/completions", support::chat(1, "who?", &json!({}))),
        ("/v1/caption", json!({"image": data_url(1)})),
        ("/v1/vqa", json!({"image": data_url(1), "question": "who?", "choices": ["a"]})),
    ] {
        let response = server.post(path, &request);
        assert_eq!((response.status, response.error_code().as_str()), (400, "model_part_missing"), "{path}");
    }
    assert_eq!(
        server.get("/v1/models").ok()["data"][0]["capabilities"],
        json!(["match", "explain_match", "classify", "embeddings"])
    );
}

#[test]
fn models_are_told_in_both_interfaces() {
    let server = TestServer::start("blip2_opt", config());
    let list = server.get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], server.name.as_str());
    assert_eq!(list["data"][0]["architecture"]["input_modalities"], json!(["text", "image"]));
    assert_eq!(server.get(&format!("/v1/models/{}", server.name)).ok(), list["data"][0]);
    assert_eq!(server.get("/v1/models/other").error_code(), "model_not_found");
    // No UTF-8: an error like the others, not the router's own words.
    for path in ["/v1/models/%ff", "/static/%ff"] {
        assert_eq!(server.get(path).error_code(), "not_found", "{path}");
    }
    assert_eq!(server.get("/api/tags").ok()["models"][0]["name"], server.name.as_str());
    let shown = server.post("/api/show", &json!({"model": server.name})).ok();
    assert_eq!(shown["capabilities"], json!(["completion", "vision"]));
    assert_eq!(shown["model_info"]["blip2.context_length"], 120);
    // All of the model, and not its language model alone.
    let n_parameters = server.model.n_parameters();
    assert!(n_parameters > server.model.language_model().expect("a language model").n_parameters());
    assert_eq!(shown["model_info"]["general.parameter_count"], n_parameters);
    let running = server.get("/api/ps").ok()["models"][0].clone();
    assert_eq!(running["name"], server.name.as_str());
    assert!(running["expires_at"].as_str().is_some_and(|time| time.ends_with('Z')), "{running}");
    // How clients find out that it is there.
    for path in ["/", "/api/version", "/api/tags"] {
        let head = server.send("HEAD", path, &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
    assert!(server.get("/api/version").ok()["version"].is_string());
}

#[test]
fn a_model_is_known_by_its_name_on_the_hub_however_it_is_written() {
    let name = "Salesforce/blip2-opt-2.7b";
    let config = ServerConfig { model_name: Some(name.into()), ..config() };
    let server = TestServer::start("blip2_opt", config);
    assert_eq!(server.name, name);
    let described = server.get("/v1/models").ok()["data"][0].clone();
    assert_eq!(described["id"], name);
    for path in [name, "salesforce/BLIP2-OPT-2.7b", "Salesforce%2Fblip2-opt-2.7b"] {
        assert_eq!(server.get(&format!("/v1/models/{path}")).ok(), described, "{path}");
    }
    for asked in [name, "salesforce/blip2-opt-2.7b", "SALESFORCE/blip2-opt-2.7b:latest"] {
        let request = support::chat(1, "who?", &json!({"model": asked, "max_tokens": 2}));
        assert_eq!(server.post("/v1/chat/completions", &request).ok()["model"], name, "{asked}");
    }
    for path in ["Salesforce", "Salesforce/blip2-opt-2.7b/x", "blip2-opt-2.7b", "Salesforce//blip2-opt-2.7b"]
    {
        assert_eq!(server.get(&format!("/v1/models/{path}")).error_code(), "model_not_found", "{path}");
    }
    let told = "blip2_requests_total{route=\"/v1/models/{model}\",outcome=\"ok\"}";
    server.wait_for(told, |n| n == 3.0);
}

#[test]
fn ollamas_conversations_are_lines_of_json() {
    let server = TestServer::start("blip2_t5", config());
    let features = server.model.encode(&[picture(2)]).expect("features").remove(0);
    let expected = server.model.ask(&[(&features, "who?")], &greedy(9)).expect("an answer")[0][0].clone();
    let image = base64(&png(&picture(2)));
    let options = json!({"num_predict": 9, "temperature": 0, "num_ctx": 4096});
    let chat = json!({"model": format!("{}:latest", server.name), "options": options, "keep_alive": "5m",
        "messages": [{"role": "user", "content": "who?", "images": [image]}]});
    let generate = json!({"model": server.name, "prompt": "who?", "images": [image], "options": options});
    for (path, request) in [("/api/chat", chat), ("/api/generate", generate.clone())] {
        let text = |line: &Json| {
            let text = if path == "/api/chat" { &line["message"]["content"] } else { &line["response"] };
            text.as_str().unwrap_or_else(|| panic!("{line}")).to_owned()
        };
        let streamed = server.post(path, &request);
        assert_eq!(streamed.header("content-type"), Some("application/x-ndjson"));
        let lines: Vec<Json> =
            streamed.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.iter().map(text).collect::<String>(), expected.text, "{path}");
        let (last, others) = lines.split_last().expect("lines");
        assert!(others.iter().all(|line| line["done"] == false));
        assert_eq!(last["done"], true);
        assert!(["stop", "length"].contains(&last["done_reason"].as_str().expect("a reason")));
        assert_eq!(last["eval_count"], expected.token_ids.len());
        let mut whole = request.clone();
        whole["stream"] = false.into();
        let whole = server.post(path, &whole).ok();
        assert_eq!((text(&whole), &whole["done"]), (expected.text.clone(), &json!(true)));
        for line in [&whole, last] {
            let time = |name: &str| line[name].as_u64().unwrap_or_else(|| panic!("{name}: {line}"));
            assert!(time("prompt_eval_duration") > 0, "{path}: the prompt took no time: {line}");
            assert!(time("prompt_eval_duration") + time("eval_duration") <= time("total_duration"), "{line}");
        }
    }
    // Clients that write out what they leave unset.
    let unset =
        json!({"prompt": "who?", "images": [image], "stream": false, "options": null, "format": null});
    assert_eq!(server.post("/api/generate", &unset).ok()["done"], true);
    let unset = json!({"prompt": null, "images": [image], "stream": false});
    assert_eq!(server.post("/api/generate", &unset).ok()["done"], true);
    let said = json!({"role": "user", "content": "who?", "images": [image]});
    let unset =
        json!({"messages": [said, {"role": "assistant", "content": null, "images": null}], "stream": false});
    assert!(server.post("/api/chat", &unset).text().contains("the last message must be the user's"));
    // The bound of an answer: 0 and below is none but the server's own, and so is what lies beyond that.
    let longest = ServerConfig::default().limits.tokens;
    let free = server.model.ask(&[(&features, "who?")], &greedy(longest)).expect("an answer")[0][0].clone();
    for (n, expected) in [
        (json!(0), &free),
        (json!(-1), &free),
        (json!(-2), &free),
        (json!(100_000), &free),
        (json!(9.0), &expected),
    ] {
        let mut asked = generate.clone();
        asked["stream"] = false.into();
        asked["options"]["num_predict"] = n.clone();
        let answer = server.post("/api/generate", &asked).ok();
        assert_eq!(answer["eval_count"], expected.token_ids.len(), "{n}");
    }
    for n in [json!(9.5), json!("9"), json!(1e300)] {
        let asked = json!({"prompt": "who?", "images": [image], "options": {"num_predict": n}});
        assert_eq!(server.post("/api/generate", &asked).status, 400, "{n}");
    }
    let load = server.post("/api/generate", &json!({"model": server.name})).ok();
    assert_eq!((&load["done"], &load["done_reason"]), (&json!(true), &json!("load")));
}

#[test]
fn ollamas_errors_are_in_its_own_shape() {
    let server = TestServer::start("blip2_opt", config());
    let image = base64(&png(&picture(3)));
    let message = json!([{"role": "user", "content": "who?", "images": [image]}]);
    for (path, request, status) in [
        ("/api/chat", json!({"model": "llava", "messages": message}), 404),
        ("/api/chat", json!({"messages": [{"role": "user", "content": "who?"}]}), 400),
        ("/api/chat", json!({"messages": [{"role": "user", "content": "who?", "images": ["!"]}]}), 400),
        ("/api/chat", json!({"messages": message, "format": "xml"}), 400),
        ("/api/chat", json!({"messages": message, "tools": [{}]}), 400),
        ("/api/chat", json!({"messages": [["user", "who?", [image]]]}), 400),
        ("/api/chat", json!({"messages": message, "options": [0.5]}), 400),
        ("/api/chat", json!({"messages": message, "options": {"temperature": -1}}), 400),
        ("/api/chat", json!({}), 400),
        ("/api/generate", json!({"prompt": "who?", "images": [image], "raw": true}), 400),
        ("/api/show", json!({"model": "llava"}), 404),
        ("/api/nothing", json!({}), 404),
    ] {
        let response = server.post(path, &request);
        assert_eq!(response.status, status, "{path} {}", response.text());
        let json = response.json();
        assert!(json["error"].as_str().is_some_and(|message| !message.is_empty()), "{path}: {json}");
        assert_eq!(json.as_object().map(serde_json::Map::len), Some(1));
    }
}

/// Every address is described, and what is described is there.
#[test]
fn the_description_is_of_this_server() {
    let server = TestServer::start("blip2_opt", config());
    let description = server.get("/openapi.json").ok();
    let described: BTreeSet<(String, String)> = description["paths"]
        .as_object()
        .expect("paths")
        .iter()
        .flat_map(|(path, operations)| {
            operations
                .as_object()
                .expect("operations")
                .keys()
                .map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect();
    let there: BTreeSet<(String, String)> =
        ROUTES.iter().map(|&(method, path, _)| (method.to_owned(), path.to_owned())).collect();
    assert_eq!(described, there);
    for &(method, path, is_open) in ROUTES {
        let response = server.send(
            method,
            &path.replace("{model}", &server.name).replace("{file}", "style.css"),
            &[],
            b"{}",
        );
        assert!(![404, 405].contains(&response.status) && response.status < 500, "{method} {path}");
        let operation = &description["paths"][path][method.to_lowercase()];
        assert_eq!(operation["security"] == json!([]), is_open, "{path}");
        if method == "GET" {
            let kind = response.header("content-type").expect("a type").split(';').next().expect("a type");
            assert!(!operation["responses"]["200"]["content"][kind].is_null(), "{path} is {kind}");
        }
    }
    // This server has no keys.
    assert_eq!(description["security"], json!([{"key": []}, {}]));
    for page in ["/", "/docs"] {
        let text = server.get(page).text();
        assert!(
            text.starts_with("<!doctype html>") && !text.contains("http"),
            "{page} names nothing elsewhere"
        );
    }
}

/// The default model, where its frozen parts are at hand.
fn default_model() -> Option<Arc<Blip2>> {
    let Some(frozen) = std::env::var_os("BLIP2_FROZEN") else {
        #[allow(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: BLIP2_FROZEN does not name the folder of the frozen models");
        }
        return None;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/default-model");
    let options = OpenOptions { frozen: vec![frozen.into()], ..OpenOptions::default() };
    Some(Arc::new(Blip2::open(folder, &options).expect("the default model")))
}

/// Whichever way it is asked for, a picture's description is the caption that the library writes, and an answer its answer: also
/// where a model has settings of its own for each, as the default model.
#[test]
fn one_picture_and_the_same_settings_give_one_text() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/pictures/cat.jpg");
    let file = std::fs::read(file).expect("a sample picture");
    for model in [Some(support::model("blip2_t5")), default_model()].into_iter().flatten() {
        let server = TestServer::with_model(model, config());
        let limits = blip2::image::Limits::default();
        let picture = blip2::image::decode(&file, &limits, blip2::image::Pixels::AsSeen).expect("a picture");
        let features = server.model.encode(&[picture]).expect("features").remove(0);
        let stage2 = server.model.config().stage2.as_ref().expect("stage 2");
        let image = base64(&file);
        for num_beams in [1, 3] {
            let settings = |own: &GenerationConfig| GenerationConfig {
                num_beams,
                max_new_tokens: 20,
                max_length: None,
                ..own.clone()
            };
            let caption = server.model.caption(&[&features], &settings(&stage2.generation));
            let answer = server.model.ask(&[(&features, "what is it?")], &settings(stage2.answering()));
            for (question, expected) in [("", caption), ("what is it?", answer)] {
                let expected = expected.expect("a text")[0][0].text.clone();
                let mut own = json!({"image": image, "num_beams": num_beams, "max_tokens": 20});
                let (path, rows) =
                    if question.is_empty() { ("/v1/caption", "captions") } else { ("/v1/vqa", "answers") };
                if !question.is_empty() {
                    own["question"] = question.into();
                }
                assert_eq!(server.post(path, &own).ok()[rows][0]["text"], expected, "{path}");
                let chat = json!({"num_beams": num_beams, "max_tokens": 20, "messages": [{"role": "user", "content":
                    [{"type": "image_url", "image_url": image}, {"type": "text", "text": question}]}]});
                let said = server.post("/v1/chat/completions", &chat).ok();
                assert_eq!(support::text_of(&said), expected, "chat: {question}");
                let generate = json!({"prompt": question, "images": [image], "stream": false,
                    "options": {"num_beams": num_beams, "num_predict": 20}});
                assert_eq!(server.post("/api/generate", &generate).ok()["response"], expected, "{question}");
            }
        }
    }
}

#[test]
fn pictures_and_texts_are_compared() {
    for model in [Some(support::model("blip2_itm")), default_model()].into_iter().flatten() {
        compare(&TestServer::with_model(model, config()));
    }
}

fn compare(server: &TestServer) {
    let features = server.model.encode(&[picture(1)]).expect("features").remove(0);
    let texts = ["a cat", "a dog runs in the snow"];
    let expected = server.model.match_texts(&features, &texts).expect("scores");
    let response = server.post("/v1/match", &json!({"image": data_url(1), "texts": texts})).ok();
    let close =
        |found: &Json, expected: f32| (found.as_f64().unwrap_or(f64::NAN) - f64::from(expected)).abs() < 1e-5;
    for (row, expected) in response["scores"].as_array().expect("scores").iter().zip(&expected) {
        assert!(close(&row["itm_probability"], expected.itm_probability), "{row} {expected:?}");
        assert!(close(&row["itc_similarity"], expected.itc_similarity), "{row} {expected:?}");
    }
    let one = server.post("/v1/match", &json!({"image": data_url(1), "text": texts[0]})).ok();
    assert_eq!(one["scores"][0], response["scores"][0]);
    let response = server.post("/v1/classify", &json!({"image": data_url(1), "labels": ["cat", "dog"]})).ok();
    let expected = server.model.classify(&features, &["cat", "dog"], "a photo of {label}").expect("labels");
    assert_eq!(response["labels"][0]["label"], expected[0].label);
    for (path, request, code) in [
        ("/v1/match", json!({"image": data_url(1), "texts": []}), "invalid_value"),
        ("/v1/match", json!({"image": data_url(1), "texts": [" "]}), "invalid_value"),
        ("/v1/classify", json!({"image": data_url(1), "labels": ["a"], "template": "none"}), "invalid_value"),
        ("/v1/classify", json!({"image": data_url(1), "labels": []}), "invalid_value"),
        // Short each, a megabyte together.
        (
            "/v1/classify",
            json!({"image": data_url(1), "labels": vec!["a".repeat(100); 60], "template": "{label}".repeat(200)}),
            "invalid_value",
        ),
        ("/v1/embeddings", json!({"input": []}), "invalid_value"),
        ("/v1/embeddings", json!({"input": [1, 2, 3]}), "invalid_body"),
        ("/v1/embeddings", json!({"input": {"text": "a cat", "image": data_url(1)}}), "invalid_value"),
        (
            "/v1/embeddings",
            json!({"input": ["x", {"image": data_url(1), "image_url": data_url(2)}]}),
            "invalid_value",
        ),
        ("/v1/embeddings", json!({"input": {}}), "invalid_value"),
        ("/v1/embeddings", json!({"input": "x", "dimensions": 5}), "invalid_value"),
        ("/v1/embeddings", json!({"input": "x", "pooling": ["mean"]}), "invalid_body"),
        ("/v1/embeddings", json!({"input": "x", "encoding_format": "hex"}), "invalid_body"),
        ("/v1/embeddings", json!({"input": vec![json!({"image": data_url(1)}); 17]}), "invalid_value"),
    ] {
        assert_eq!(server.post(path, &request).error_code(), code, "{path} {code}");
    }

    let rows = server.model.embed_images(&[&features]).expect("rows").remove(0);
    let text = server.model.embed_texts(&texts[..1]).expect("rows").remove(0);
    let request = json!({"input": [texts[0], {"image": data_url(1)}, {"text": texts[0]}]});
    let response = server.post("/v1/embeddings", &request).ok();
    let vector = |row: &Json| -> Vec<f32> {
        row["embedding"]
            .as_array()
            .expect("numbers")
            .iter()
            .map(|x| x.as_f64().expect("a number") as f32)
            .collect()
    };
    assert_eq!(vector(&response["data"][0]), text);
    assert_eq!(response["data"][2]["embedding"], response["data"][0]["embedding"]);
    let mean = vector(&response["data"][1]);
    assert!((mean.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);
    assert!(
        response["usage"]["prompt_tokens"].as_u64().is_some_and(|n| n > server
            .model
            .config()
            .qformer
            .num_query_tokens as u64)
    );
    // Clients that write out what they leave unset.
    let mut request = request;
    request["pooling"] = Json::Null;
    request["encoding_format"] = Json::Null;
    assert_eq!(server.post("/v1/embeddings", &request).ok(), response);
    request["encoding_format"] = "base64".into();
    request["pooling"] = "none".into();
    let response = server.post("/v1/embeddings", &request).ok();
    let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(response["data"][1]["embedding"], base64(&bytes));
    let response = server.post("/api/embed", &json!({"input": texts, "keep_alive": 0})).ok();
    assert_eq!(vector(&json!({"embedding": response["embeddings"][0]})), text);
    assert_eq!(vector(&server.post("/api/embeddings", &json!({"prompt": texts[0]})).ok()), text);
    for (path, request) in [
        ("/api/embed", json!({"input": ""})),
        ("/api/embed", json!({"input": []})),
        ("/api/embeddings", json!({})),
    ] {
        let response = server.post(path, &request).ok();
        assert!(
            response["embeddings"] == json!([]) || response["embedding"] == json!([]),
            "{path} {response}"
        );
    }
    assert_eq!(server.post("/api/embed", &json!({"input": "x", "dimensions": 5})).status, 400);
}
