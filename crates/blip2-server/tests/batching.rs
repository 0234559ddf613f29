//! Batching changes nothing: requests together give what they give one by one.

mod support;

use std::sync::Barrier;

use serde_json::{Value as Json, json};
use support::{TestServer, chat, config, text_of};

fn requests() -> Vec<Json> {
    (0..32)
        .map(|i| {
            let question = "what is this? ".repeat(1 + i % 3) + &i.to_string();
            let fields = match i % 4 {
                0 | 1 => json!({"max_tokens": 3 + i, "temperature": 0}),
                2 => json!({"max_tokens": 20, "temperature": 1.2, "seed": i}),
                _ if i % 8 == 7 => json!({"max_tokens": 8, "num_beams": 3, "temperature": 1.2, "seed": i}),
                _ => json!({"max_tokens": 8, "num_beams": 2 + i % 3}),
            };
            chat(i as u32 % 5, &question, &fields)
        })
        .collect()
}

#[test]
fn thirty_two_at_once_answer_as_one_by_one() {
    for name in ["blip2_opt", "blip2_t5"] {
        let requests = requests();
        let alone = TestServer::start(name, config());
        let expected: Vec<String> = requests
            .iter()
            .map(|request| text_of(&alone.post("/v1/chat/completions", request).ok()))
            .collect();
        let server = TestServer::with_model(alone.model.clone(), config());
        let barrier = Barrier::new(requests.len());
        let together: Vec<String> = std::thread::scope(|scope| {
            let ask = |request| {
                let (server, barrier) = (&server, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    text_of(&server.post("/v1/chat/completions", request).ok())
                })
            };
            let threads: Vec<_> = requests.iter().map(ask).collect();
            threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
        });
        assert_eq!(together, expected, "{name}");
        let (steps, texts) =
            (server.metric("blip2_batch_texts_count"), server.metric("blip2_batch_texts_sum"));
        assert!(texts / steps > 2.0, "they did share steps: {texts} texts in {steps} steps");
        assert_eq!(server.metric("blip2_running_texts"), 0.0);
    }
}
