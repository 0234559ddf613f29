//! `/v1/explain` is the library's heat map.

mod support;

use blip2::model::{HeatMap, Word};
use blip2::text::Turn;
use serde_json::{Value as Json, json};
use support::{TestServer, config, data_url, picture};

fn assert_is(response: &Json, expected: &HeatMap) {
    assert_eq!(response["object"], "heat_map");
    assert_eq!(response["side"], expected.side);
    let values: Vec<f32> = response["values"]
        .as_array()
        .expect("values")
        .iter()
        .map(|value| value.as_f64().expect("a number") as f32)
        .collect();
    assert_eq!(values, expected.values);
}

#[test]
fn captions_answers_and_their_words_are_explained() {
    for model in ["blip2_opt", "blip2_t5"] {
        written_texts_are_explained(&TestServer::start(model, config()));
    }
}

fn written_texts_are_explained(server: &TestServer) {
    let features = server.model.encode(&[picture(1)]).expect("features").remove(0);
    let text = "a red cat and a red dog";
    let who = || Turn::open("who?");
    let maps = [
        (json!({"caption": true}), vec![], None),
        (json!({"caption": true, "word": "red"}), vec![], Some(Word::from("red"))),
        (json!({"question": "who?"}), vec![who()], None),
        (
            json!({"question": "who?", "word": "red", "occurrence": 2}),
            vec![who()],
            Some(Word { text: "red", occurrence: 2 }),
        ),
        (
            json!({"question": "who?", "history": [{"question": "is it?", "answer": "yes"}]}),
            vec![Turn::answered("is it?", "yes"), who()],
            None,
        ),
    ]
    .map(|(mut request, turns, word)| {
        request["image"] = data_url(1).into();
        request["text"] = text.into();
        let expected = server.model.explain_answer(&features, &turns, text, word).expect("a map");
        assert_is(&server.post("/v1/explain", &request).ok(), &expected);
        expected
    });
    assert!(maps.iter().enumerate().all(|(i, map)| !maps[..i].contains(map)), "each has its own");
}

#[test]
fn matched_texts_are_explained() {
    let server = TestServer::start("blip2_itm", config());
    let features = server.model.encode(&[picture(1)]).expect("features").remove(0);
    let expected = server.model.explain_match(&features, "a red cat").expect("a map");
    let request = json!({"image": data_url(1), "text": "a red cat"});
    assert_is(&server.post("/v1/explain", &request).ok(), &expected);
    let capabilities = &server.get("/v1/models").ok()["data"][0]["capabilities"];
    assert_eq!(*capabilities, json!(["match", "explain_match", "classify", "embeddings"]));
}

#[test]
fn what_cannot_be_explained_is_said() {
    let refused = |server: &TestServer, fields: &Json| {
        let mut request = json!({"image": data_url(1), "text": "a red cat"});
        for (name, value) in fields.as_object().expect("fields") {
            request[name] = value.clone();
        }
        let response = server.post("/v1/explain", &request);
        assert_eq!(response.status, 400, "{fields}: {}", response.text());
        (response.error_code(), response.json()["error"]["param"].as_str().unwrap_or_default().to_owned())
    };
    let opt = TestServer::start("blip2_opt", config());
    for (fields, code, param) in [
        (json!({}), "model_part_missing", ""),
        (json!({"word": "cat"}), "invalid_value", "word"),
        (json!({"caption": true, "question": "who?"}), "invalid_value", "caption"),
        (json!({"caption": true, "word": "dog"}), "invalid_value", "text"),
        (json!({"caption": true, "word": "cat", "occurrence": 2}), "invalid_value", "text"),
        (json!({"caption": true, "word": "cat", "occurrence": 0}), "invalid_value", "occurrence"),
        (json!({"history": [{"question": "a", "answer": "b"}]}), "invalid_value", "history"),
        (
            json!({"question": "who?", "history": [{"question": "a", "answer": " "}]}),
            "invalid_value",
            "history",
        ),
        (json!({"question": "who?", "history": [["a", "b"]]}), "invalid_body", "history[0]"),
        (json!({"question": "who?", "history": [{"question": "a"}]}), "invalid_body", "history[0].answer"),
        (json!({"caption": true, "text": " "}), "invalid_value", "text"),
        (json!({"question": " "}), "invalid_value", "question"),
        (json!({"question": "who?", "text": "a ".repeat(100)}), "context_length_exceeded", "text"),
        (json!({"question": "who?", "text": "a ".repeat(4000)}), "context_length_exceeded", "text"),
        (json!({"question": "who?", "text": "a ".repeat(5000)}), "invalid_value", "text"),
        (json!({"caption": true, "image": "!"}), "invalid_image_url", "image"),
        (json!({"caption": true, "text": 5}), "invalid_body", "text"),
    ] {
        assert_eq!(refused(&opt, &fields), (code.to_owned(), param.to_owned()), "{fields}");
    }
    let itm = TestServer::start("blip2_itm", config());
    assert_eq!(refused(&itm, &json!({"caption": true})).0, "model_part_missing");
    assert_eq!(refused(&itm, &json!({"text": " "})).0, "invalid_value");
}
