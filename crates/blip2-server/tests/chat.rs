//! Chat completions, whole and streamed, over real sockets.

mod support;

use blip2::generate::GenerationConfig;
use blip2::text::{AnswerForm, Prompt, Turn};
use blip2_server::ServerConfig;
use serde_json::{Value as Json, json};
use support::{TestServer, base64, chat, config, data_url, picture, png, text_of};

fn greedy(max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens, ..GenerationConfig::default() }
}

#[test]
fn an_answer_is_the_librarys() {
    for name in ["blip2_opt", "blip2_t5"] {
        let server = TestServer::start(name, config());
        let features = server.model.encode(&[picture(1)]).expect("features").remove(0);
        let expected =
            server.model.ask(&[(&features, "which city?")], &greedy(9)).expect("an answer")[0][0].clone();
        let response =
            server.post("/v1/chat/completions", &chat(1, "which city?", &json!({"max_tokens": 9}))).ok();
        assert_eq!(text_of(&response), expected.text);
        assert_eq!(response["object"], "chat.completion");
        assert_eq!(response["model"], server.name.as_str());
        assert!(response["id"].as_str().expect("an id").starts_with("chatcmpl-"));
        let choice = &response["choices"][0];
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!(choice["message"]["refusal"], Json::Null);
        assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().expect("a reason")));
        let usage = &response["usage"];
        assert_eq!(usage["completion_tokens"], expected.token_ids.len());
        let prompt = server.model.prompt(&[Turn::open("which city?")]).expect("a prompt");
        assert_eq!(usage["prompt_tokens"], prompt.n_rows(5));
        assert_eq!(usage["prompt_tokens_details"]["image_tokens"], 5);
    }
}

#[test]
fn pictures_come_in_several_forms_and_alone_they_are_described() {
    let server = TestServer::start("blip2_opt", config());
    let features = server.model.encode(&[picture(2)]).expect("features").remove(0);
    let expected = server.model.caption(&[&features], &greedy(7)).expect("a caption")[0][0].text.clone();
    let raw = base64(&png(&picture(2)));
    for image in [
        json!({"url": data_url(2)}),
        json!({"url": data_url(2), "detail": "low"}),
        json!(data_url(2)),
        json!(raw),
        json!(raw.trim_end_matches('=')),
        json!(format!("data:;base64,{raw}")),
        json!(format!("DATA:image/jpeg;name=x;base64,{}\n{}", &raw[..8], &raw[8..])),
    ] {
        let request = json!({"max_tokens": 7,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": image}]}]});
        assert_eq!(text_of(&server.post("/v1/chat/completions", &request).ok()), expected, "{request}");
    }
    assert!(server.metric("blip2_picture_cache_hits_total") >= 6.0, "one picture, seen once");
    assert_eq!(server.metric("blip2_picture_cache_misses_total"), 1.0);
}

#[test]
fn a_conversation_goes_on_about_its_picture() {
    let server = TestServer::start("blip2_opt", config());
    let features = server.model.encode(&[picture(3)]).expect("features").remove(0);
    let mut conversation = server.model.chat(&features).expect("a chat");
    conversation.resume(vec![Turn::answered("who?", "a cat")]);
    let expected = conversation
        .ask("why?", &greedy(6), &mut |_| std::ops::ControlFlow::Continue(()))
        .expect("an answer");
    let mut request = chat(3, "who?", &json!({"max_tokens": 6}));
    let messages = request["messages"].as_array_mut().expect("messages");
    messages.push(json!({"role": "assistant", "content": "a cat"}));
    messages.push(json!({"role": "user", "content": "why?"}));
    assert_eq!(text_of(&server.post("/v1/chat/completions", &request).ok()), expected.text);
}

/// The text of each choice of a stream, with what every chunk has to have.
fn streamed(server: &TestServer, request: &Json) -> (Vec<String>, Vec<Json>) {
    let mut request = request.clone();
    request["stream"] = true.into();
    let events = server.post("/v1/chat/completions", &request).events();
    let (done, chunks) = events.split_last().expect("events");
    assert_eq!(done, "[DONE]");
    let chunks: Vec<Json> = chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("JSON")).collect();
    let n = request["n"].as_u64().unwrap_or(1) as usize;
    let (mut texts, mut reasons) = (vec![String::new(); n], vec![0; n]);
    for (at, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        for choice in chunk["choices"].as_array().expect("choices") {
            let index = choice["index"].as_u64().expect("an index") as usize;
            assert_eq!(
                choice["delta"]["role"] == "assistant",
                at < n,
                "the first chunk has the role: {chunk}"
            );
            texts[index] += choice["delta"]["content"].as_str().unwrap_or("");
            reasons[index] += usize::from(!choice["finish_reason"].is_null());
        }
    }
    assert_eq!(reasons, vec![1; n], "every choice ends once");
    (texts, chunks)
}

#[test]
fn a_stream_is_the_whole_answer_cut_up() {
    for name in ["blip2_opt", "blip2_t5"] {
        let server = TestServer::start(name, config());
        for fields in [
            json!({"max_tokens": 12}),
            json!({"max_tokens": 12, "n": 3, "seed": 7, "temperature": 1.3}),
            json!({"max_tokens": 12, "num_beams": 3, "n": 2}),
            json!({"max_tokens": 30, "temperature": 1.5, "seed": 3, "stop": ["e", "ab"]}),
            json!({"max_tokens": 12, "stop": "zzz"}),
        ] {
            let request = chat(4, "what is it?", &fields);
            let whole = server.post("/v1/chat/completions", &request).ok();
            let (texts, _) = streamed(&server, &request);
            for (index, text) in texts.iter().enumerate() {
                assert_eq!(
                    *text,
                    whole["choices"][index]["message"]["content"].as_str().expect("text"),
                    "{fields}"
                );
                for stop in fields["stop"].as_array().into_iter().flatten() {
                    assert!(!text.contains(stop.as_str().expect("text")), "{text:?} has {stop}");
                }
            }
        }
    }
}

#[test]
fn a_stream_tells_the_usage_when_asked() {
    let server = TestServer::start("blip2_opt", config());
    let request = chat(5, "who?", &json!({"max_tokens": 5, "stream_options": {"include_usage": true}}));
    // The first reads the picture for both that follow.
    server.post("/v1/chat/completions", &request).ok();
    let whole = server.post("/v1/chat/completions", &request).ok();
    let (_, chunks) = streamed(&server, &request);
    let (last, others) = chunks.split_last().expect("chunks");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], whole["usage"]);
    assert!(others.iter().all(|chunk| chunk.get("usage") == Some(&Json::Null)));
    let (_, chunks) = streamed(&server, &chat(5, "who?", &json!({"max_tokens": 5})));
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
}

#[test]
fn log_probabilities_are_those_of_the_tokens() {
    let server = TestServer::start("blip2_opt", config());
    let fields = json!({"max_tokens": 8, "logprobs": true, "top_logprobs": 4});
    let response = server.post("/v1/chat/completions", &chat(6, "who?", &fields)).ok();
    let content = response["choices"][0]["logprobs"]["content"].as_array().expect("tokens").clone();
    assert!(!content.is_empty());
    for token in &content {
        let top = token["top_logprobs"].as_array().expect("the likeliest");
        assert_eq!(top.len(), 4);
        // Greedy: the chosen one is the likeliest.
        assert_eq!(token["token"], top[0]["token"]);
        let close =
            token["logprob"].as_f64().expect("a number") - top[0]["logprob"].as_f64().expect("a number");
        assert!(close.abs() < 1e-5);
        assert!(token["logprob"].as_f64().is_some_and(|value| value < 0.0));
    }
    let (_, chunks) = streamed(&server, &chat(6, "who?", &fields));
    let streamed: Vec<Json> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(streamed, content);
    let response = server.post("/v1/chat/completions", &chat(6, "who?", &json!({"max_tokens": 2}))).ok();
    assert_eq!(response["choices"][0]["logprobs"], Json::Null);
}

#[test]
fn answers_have_the_form_that_was_asked_for() {
    let server = TestServer::start("blip2_opt", config());
    let ask = |seed: u32, fields: &Json| {
        let mut fields = fields.clone();
        fields["max_tokens"] = 60.into();
        if seed > 0 {
            fields["seed"] = seed.into();
            fields["temperature"] = json!(2.0);
        }
        let request = chat(seed % 3, "which city?", &fields);
        let response = server.post("/v1/chat/completions", &request).ok();
        assert_eq!(response["choices"][0]["finish_reason"], "stop", "{response}");
        let (texts, _) = streamed(&server, &request);
        assert_eq!(texts[0], text_of(&response), "streamed");
        texts[0].clone()
    };
    let schema = json!({"type": "object", "required": ["n", "kind"], "additionalProperties": false, "properties":
        {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "kind": {"enum": ["cat", "dog"]}}});
    let fits = |text: &str| {
        let json: Json = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        json["n"].as_u64().is_some_and(|n| n <= 9) && (json["kind"] == "cat" || json["kind"] == "dog")
    };
    for seed in 0..6 {
        for fields in [
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}),
            json!({"structured_outputs": {"json": schema}}),
            json!({"guided_json": schema.to_string()}),
        ] {
            let text = ask(seed, &fields);
            assert!(fits(&text), "{text}");
        }
        for fields in [
            json!({"guided_choice": ["yes", "no"]}),
            json!({"structured_outputs": {"choice": ["yes", "no"]}}),
        ] {
            let text = ask(seed, &fields);
            assert!(["yes", "no"].contains(&text.as_str()), "{text}");
        }
        let text = ask(seed, &json!({"guided_regex": "[xyz]{4}"}));
        assert!(text.len() == 4 && text.bytes().all(|b| b"xyz".contains(&b)), "{text}");
    }
    let beams = chat(1, "which?", &json!({"guided_choice": ["yes", "no"], "num_beams": 3, "n": 2}));
    let response = server.post("/v1/chat/completions", &beams).ok();
    let texts: Vec<_> = (0..2).map(|i| response["choices"][i]["message"]["content"].clone()).collect();
    assert!(texts.contains(&json!("yes")) && texts.contains(&json!("no")), "{texts:?}");
    // In the other interfaces too.
    for (path, text) in [("/api/generate", "/response"), ("/api/chat", "/message/content")] {
        let image = base64(&png(&picture(1)));
        let request = json!({"prompt": "which?", "images": [image], "stream": false, "format": schema,
            "messages": [{"role": "user", "content": "which?", "images": [image]}]});
        let response = server.post(path, &request).ok();
        assert!(fits(response.pointer(text).and_then(Json::as_str).expect("text")), "{response}");
    }
    let request = json!({"image": data_url(1), "question": "which?", "guided_choice": ["yes", "no"]});
    let answer = server.post("/v1/vqa", &request).ok()["answers"][0]["text"].clone();
    assert!(answer == "yes" || answer == "no", "{answer}");
    assert_eq!(server.metric("blip2_panics_total"), 0.0);
}

fn cached(response: &Json) -> u64 {
    response["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number")
}

/// How many tokens two texts have in common at the beginning.
fn n_same(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

#[test]
fn the_next_question_about_a_picture_reads_its_own_words_only() {
    let server = TestServer::start("blip2_opt", config());
    let small = ServerConfig { prompt_cache_bytes: 0, ..config() };
    let forgetful = TestServer::with_model(server.model.clone(), small);
    let (mut earlier, mut n_known) = (Vec::<Prompt>::new(), 0);
    for question in ["who?", "which city is it?", "who?"] {
        let fields = json!({"max_tokens": 9, "logprobs": true, "top_logprobs": 3});
        let request = chat(5, question, &fields);
        let response = server.post("/v1/chat/completions", &request).ok();
        let prompt = server.model.prompt(&[Turn::open(question)]).expect("a prompt");
        // The picture, the words that it begins with as another did, but not its last one.
        let n_words = |other: &Prompt| n_same(other.after_image(), prompt.after_image());
        let longest = earlier.iter().map(n_words).max();
        let known =
            longest.map_or(0, |n| prompt.before_image().len() + 5 + n.min(prompt.after_image().len() - 1));
        assert_eq!(cached(&response), known as u64);
        n_known += known;
        let expected = forgetful.post("/v1/chat/completions", &request).ok();
        assert_eq!(cached(&expected), 0);
        assert_eq!(response["choices"], expected["choices"], "log-probabilities and all");
        earlier.push(prompt.clone());
        for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(response["usage"][field], expected["usage"][field]);
        }
    }
    assert_eq!(server.metric("blip2_cached_prompt_tokens_total"), n_known as f64);
    assert!(server.metric("blip2_prompt_cache_bytes") > 0.0);
    assert_eq!(forgetful.metric("blip2_prompt_cache_bytes"), 0.0);
}

/// The second turn after an answer.
fn next_turn(i: u32, answer: &str, fields: &Json) -> Json {
    let mut request = chat(i, "who?", fields);
    let messages = request["messages"].as_array_mut().expect("messages");
    messages.push(json!({"role": "assistant", "content": answer}));
    messages.push(json!({"role": "user", "content": "why?"}));
    request
}

#[test]
fn the_next_turn_of_a_conversation_reads_what_is_new_only() {
    let server = TestServer::start("blip2_opt", config());
    let forgetful =
        TestServer::with_model(server.model.clone(), ServerConfig { prompt_cache_bytes: 0, ..config() });
    let fields = json!({"max_tokens": 9, "logprobs": true, "top_logprobs": 3});
    let mut first = fields.clone();
    first["guided_regex"] = "[xyz]{4}".into();
    let response = server.post("/v1/chat/completions", &chat(5, "who?", &first)).ok();
    assert_eq!(cached(&response), 0);
    let answer = text_of(&response);

    // What the library writes there, token by token; the last one was never read.
    let model = &server.model;
    let features = model.encode(&[picture(5)]).expect("features").remove(0);
    let form = model.grammar(&AnswerForm::Regex("[xyz]{4}".into()), &greedy(9)).expect("a grammar");
    let written = model.ask_for(&[(&features, "who?")], &greedy(9), Some(&form)).expect("answers");
    let written = &written[0][0];
    assert_eq!(written.text, answer);
    let first = model.prompt(&[Turn::open("who?")]).expect("a prompt");
    let read = [first.after_image(), &written.token_ids[..written.token_ids.len() - 1]].concat();
    let turns = [Turn::answered("who?", answer.as_str()), Turn::open("why?")];
    let prompt = model.prompt(&turns).expect("a prompt");
    let n_known = prompt.before_image().len() + 5 + n_same(&read, prompt.after_image());
    assert!(n_known > first.n_rows(5), "the answer too");

    let request = next_turn(5, &answer, &fields);
    let response = server.post("/v1/chat/completions", &request).ok();
    assert_eq!(cached(&response), n_known as u64);
    assert_eq!(server.metric("blip2_cached_prompt_tokens_total"), n_known as f64);
    let expected = forgetful.post("/v1/chat/completions", &request).ok();
    assert_eq!(cached(&expected), 0);
    assert_eq!(response["choices"], expected["choices"], "log-probabilities and all");
    // Streamed, and with beams, which begin with it too.
    let again = server.post("/v1/chat/completions", &request).ok();
    assert_eq!(cached(&again), prompt.n_rows(5) as u64 - 1);
    assert_eq!(streamed(&server, &request).0, [text_of(&expected)]);
    let beams = next_turn(5, &answer, &json!({"max_tokens": 9, "num_beams": 3, "n": 2}));
    let response = server.post("/v1/chat/completions", &beams).ok();
    assert_eq!(cached(&response), prompt.n_rows(5) as u64 - 1);
    assert_eq!(response["choices"], forgetful.post("/v1/chat/completions", &beams).ok()["choices"]);
    // The same words about another picture have nothing in common.
    let request = next_turn(6, &answer, &fields);
    let response = server.post("/v1/chat/completions", &request).ok();
    assert_eq!(cached(&response), 0);
    let expected = forgetful.post("/v1/chat/completions", &request).ok();
    assert_eq!(response["choices"], expected["choices"]);
}

#[test]
fn conversations_are_forgotten_by_the_bound_of_their_memory() {
    let model = support::model("blip2_opt");
    let row = model.language_model().expect("a language model").new_cache().row_bytes();
    let n_first = model.prompt(&[Turn::open("who?")]).expect("a prompt").n_rows(5);
    // One question with an answer of five tokens, a blank among them, of which four are read; and another picture.
    let bound = (n_first + 4 + 5) * row;
    let server = TestServer::with_model(model, ServerConfig { prompt_cache_bytes: bound, ..config() });
    let fields = json!({"max_tokens": 5, "guided_regex": "[xyz]{4}"});
    let answers = [5, 6].map(|i| {
        let response = server.post("/v1/chat/completions", &chat(i, "who?", &fields)).ok();
        assert_eq!(cached(&response), 0);
        text_of(&response)
    });
    let held = server.wait_for("blip2_prompt_cache_bytes", |bytes| bytes == ((n_first + 4) * row) as f64);
    assert!(held <= bound as f64);
    // The first was forgotten for the second.
    let [first, second] = [(5, &answers[0]), (6, &answers[1])]
        .map(|(i, answer)| server.post("/v1/chat/completions", &next_turn(i, answer, &fields)).ok());
    assert_eq!(cached(&first), 0);
    assert!(cached(&second) >= n_first as u64, "{second}");
    assert!(server.metric("blip2_prompt_cache_bytes") <= bound as f64);
}

#[test]
fn a_seed_decides_and_without_one_answers_differ() {
    let server = TestServer::start("blip2_opt", config());
    let ask = |fields: &Json| {
        let response = server.post("/v1/chat/completions", &chat(7, "who?", fields)).ok();
        response["choices"]
            .as_array()
            .expect("choices")
            .iter()
            .map(|c| c["message"]["content"].to_string())
            .collect::<Vec<_>>()
    };
    let seeded = json!({"max_tokens": 20, "temperature": 1.5, "seed": 5, "n": 3});
    assert_eq!(ask(&seeded), ask(&seeded));
    let free = json!({"max_tokens": 20, "temperature": 1.5});
    assert!((0..5).any(|_| ask(&free) != ask(&free)));
}

#[test]
fn penalties_are_the_librarys_in_every_interface() {
    let server = TestServer::start("blip2_opt", config());
    let features = server.model.encode(&[picture(1)]).expect("features").remove(0);
    let mut texts = Vec::new();
    // Below 0 a token that came a few times comes for ever; above it, none does.
    for penalty in [0.0, 2.0, -2.0] {
        let expected = |min_new_tokens| {
            let config = GenerationConfig {
                presence_penalty: penalty,
                frequency_penalty: penalty,
                min_new_tokens,
                ..greedy(40)
            };
            let answers = server.model.ask(&[(&features, "which city?")], &config).expect("an answer");
            answers[0][0].text.clone()
        };
        let mut options =
            json!({"presence_penalty": penalty, "frequency_penalty": penalty, "num_predict": 40});
        let mut fields = json!({"max_tokens": 40, "min_tokens": 40, "num_beams": 1, "question": "which city?",
            "presence_penalty": penalty, "frequency_penalty": penalty});
        texts.push(expected(40));
        let response = server.post("/v1/chat/completions", &chat(1, "which city?", &fields)).ok();
        assert_eq!(text_of(&response), texts[texts.len() - 1]);
        fields["image"] = data_url(1).into();
        let response = server.post("/v1/vqa", &fields).ok();
        assert_eq!(response["answers"][0]["text"], texts[texts.len() - 1]);
        // Ollama knows no shortest answer.
        let image = base64(&png(&picture(1)));
        options["temperature"] = 0.into();
        let request =
            json!({"prompt": "which city?", "images": [image], "stream": false, "options": options});
        assert_eq!(server.post("/api/generate", &request).ok()["response"], expected(0));
    }
    assert!(texts.iter().any(|text| *text != texts[0]), "they make a difference");
}

#[test]
fn every_mistake_has_its_code() {
    let server = TestServer::start("blip2_opt", config());
    let with = |fields: Json| chat(8, "who?", &fields);
    let message = |content: Json| json!({"messages": [{"role": "user", "content": content}]});
    let image = |url: &str| message(json!([{"type": "image_url", "image_url": {"url": url}}]));
    let mut tiff = b"II*\0".to_vec();
    tiff.extend([0xff; 64]);
    let damaged = format!("data:image/tiff;base64,{}", base64(&tiff));
    let whole = png(&picture(8));
    let cut = format!("data:image/png;base64,{}", base64(&whole[..whole.len() - 9]));
    // A header that announces more pixels than are allowed.
    let mut bomb = whole.clone();
    bomb[16..24].copy_from_slice(&[0, 0, 0x7f, 0xff, 0, 0, 0x7f, 0xff]);
    let crc = crc32fast::hash(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    let bomb = format!("data:image/png;base64,{}", base64(&bomb));
    for (request, status, code) in [
        (with(json!({"model": "gpt-4o"})), 404, "model_not_found"),
        (with(json!({"n": 0})), 400, "invalid_value"),
        (with(json!({"n": -1})), 400, "invalid_body"),
        (with(json!({"n": 1_000_000})), 400, "invalid_value"),
        (with(json!({"n": "two"})), 400, "invalid_body"),
        (with(json!({"max_tokens": 0})), 400, "invalid_value"),
        (with(json!({"max_tokens": 100_000})), 400, "invalid_value"),
        (with(json!({"temperature": -0.5})), 400, "invalid_value"),
        (with(json!({"top_logprobs": 3})), 400, "invalid_value"),
        (with(json!({"logprobs": true, "top_logprobs": 21})), 400, "invalid_value"),
        (with(json!({"logprobs": true, "top_logprobs": 2, "num_beams": 2})), 400, "invalid_value"),
        (with(json!({"presence_penalty": 3})), 400, "invalid_value"),
        (with(json!({"logit_bias": {"50256": -100}})), 400, "unsupported_value"),
        (with(json!({"response_format": {"type": "xml"}})), 400, "unsupported_value"),
        (with(json!({"guided_choice": [], "max_tokens": 3})), 400, "invalid_constraint"),
        (with(json!({"guided_regex": "("})), 400, "invalid_constraint"),
        (with(json!({"guided_json": {"type": "colour"}})), 400, "invalid_constraint"),
        (with(json!({"guided_regex": "(".repeat(300) + &")".repeat(300)})), 400, "invalid_constraint"),
        (with(json!({"structured_outputs": {"regex": "a".repeat(70_000)}})), 400, "invalid_constraint"),
        (
            with(json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema":
            {"$ref": "https://example.org/s.json"}}}})),
            400,
            "invalid_constraint",
        ),
        (with(json!({"stream": "yes"})), 400, "invalid_body"),
        (json!([]), 400, "invalid_body"),
        (json!({}), 400, "invalid_body"),
        (json!({"messages": []}), 400, "invalid_value"),
        (json!({"messages": "hello"}), 400, "invalid_body"),
        // A list of a structure's values is not the structure.
        (json!({"messages": [["user", "who?"]]}), 400, "invalid_body"),
        (message(json!([["text", "who?", null]])), 400, "invalid_body"),
        (with(json!({"stream_options": [true]})), 400, "invalid_body"),
        (with(json!({"early_stopping": 5})), 400, "invalid_body"),
        (with(json!({"stop": vec!["a"; 100_001]})), 400, "invalid_body"),
        (message(json!("no picture")), 400, "invalid_value"),
        (message(json!(5)), 400, "invalid_body"),
        (message(json!([{"type": "video", "video": "x"}])), 400, "invalid_value"),
        (message(json!([{"type": "image_url"}])), 400, "invalid_value"),
        (image("https://example.org/cat.jpg"), 400, "invalid_image_url"),
        (image("file:///etc/passwd"), 400, "invalid_image_url"),
        (image("data:image/png;base64"), 400, "invalid_image_url"),
        (image("data:image/png,abc"), 400, "invalid_image_url"),
        (image("data:image/png;base64,!!!"), 400, "invalid_image_url"),
        (image(""), 400, "invalid_image"),
        (image("data:text/plain;base64,aGVsbG8gd29ybGQ="), 400, "invalid_image_format"),
        (image(&cut), 400, "invalid_image"),
        (image(&damaged), 400, "invalid_image"),
        (image(&bomb), 400, "image_too_large"),
        (chat(8, &"word ".repeat(200), &json!({})), 400, "context_length_exceeded"),
        (chat(8, &"word ".repeat(3000), &json!({})), 400, "invalid_value"),
    ] {
        let response = server.post("/v1/chat/completions", &request);
        let short: String = request.to_string().chars().take(300).collect();
        assert_eq!(
            (response.status, response.error_code().as_str()),
            (status, code),
            "{short}: {}",
            response.text()
        );
        let text = response.text();
        for word in [
            "Error",
            "panicked",
            "usize",
            "struct ",
            "enum ",
            "variant",
            "do_sample",
            "Tiff",
            "ImageError",
            "/work",
            "src/",
        ] {
            assert!(!text.contains(word), "the library's own words reach a client: {text}");
        }
    }
    for body in ["", "   ", "{", "null", "[1,2", "{\"messages\":\"\u{0}\"", "\"\\ud800\""] {
        let response = server.send("POST", "/v1/chat/completions", &[], body.as_bytes());
        assert_eq!((response.status, response.error_code().as_str()), (400, "invalid_body"), "{body:?}");
    }
    let invalid_utf8 = server.send("POST", "/v1/chat/completions", &[], b"{\"messages\": \"\xff\xfe\"}");
    assert_eq!(invalid_utf8.error_code(), "invalid_body");
    let deep = server.send("POST", "/v1/chat/completions", &[], "[".repeat(1 << 20).as_bytes());
    assert_eq!(deep.error_code(), "invalid_body");
    // After all that it still answers.
    server.post("/v1/chat/completions", &with(json!({"max_tokens": 2}))).ok();
    assert_eq!(server.metric("blip2_panics_total"), 0.0);
}
