//! T5 against transformers' own, on tiny random models (`tools/golden_t5.py`).

#[path = "support/golden.rs"]
mod golden;

#[path = "support/language.rs"]
mod language;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use blip2::generate::{
    Continuation, Decoder, GenerationConfig, Request, Session, StopRules, generate, score,
};
use blip2::language::LanguageModel;
use blip2::weights::safetensors::Safetensors;
use golden::Golden;
use language::{check_generation, check_tensors, load, prompts, refused};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/t5_tiny.safetensors");
const NAMES: [&str; 2] = ["flan", "t5"];

fn open() -> (Golden, Safetensors) {
    let file = Safetensors::open(FILE).expect("a checkpoint");
    (Golden::parse("t5_tiny", include_bytes!("golden/t5_tiny.safetensors")), file)
}

#[test]
fn the_encoder_and_the_decoders_logits_are_pytorchs() {
    let (golden, file) = open();
    let mut comparison = golden.comparison();
    let lengths: Vec<usize> = golden.metadata("lengths");
    let answers: BTreeMap<String, Vec<Vec<u32>>> = golden.metadata("answers");
    for name in NAMES {
        let model = load(&golden, &file, name);
        let LanguageModel::T5(t5) = &model else { panic!("{name} is no T5") };
        let encoded = t5.encode(&golden.rows(&format!("{name}.in.embeds")), &lengths).expect("encoded");
        comparison.tensor(&format!("{name}.out.encoded"), &encoded);

        let mut cache = model.new_cache();
        let mut session = Session::new(&model, &mut cache, prompts(&golden, name)).expect("a session");
        let first = session.prompt_logits().expect("logits").to_vec();
        let continuations: Vec<_> = answers[name]
            .iter()
            .enumerate()
            .map(|(parent, tokens)| Continuation { parent, tokens })
            .collect();
        let rest = session.extend(&continuations).expect("logits");
        // The golden has, for each prompt, the logits after the start token and after each of the answer's.
        let mut rest = rest.chunks_exact(model.vocab_size());
        let mut logits = Vec::new();
        for (first, answer) in first.chunks_exact(model.vocab_size()).zip(&answers[name]) {
            logits.extend_from_slice(first);
            rest.by_ref().take(answer.len()).for_each(|row| logits.extend_from_slice(row));
        }
        comparison.slice(&format!("{name}.out.logits"), &logits);
    }
    comparison.finish(4);
}

#[test]
fn generation_gives_the_tokens_of_transformers() {
    let (golden, file) = open();
    for name in NAMES {
        check_generation(&golden, &load(&golden, &file, name), name);
    }
}

/// Greedy tokens, scored as a given answer, have the probabilities they were generated with; a prompt is never continued.
#[test]
fn answers_are_scored_and_prompts_are_read_whole() {
    let (golden, file) = open();
    let model = load(&golden, &file, "flan");
    let config = GenerationConfig { max_new_tokens: 6, ..GenerationConfig::default() };
    let prompt = || vec![prompts(&golden, "flan").remove(2)];
    let mut cache = model.new_cache();
    let mut session = Session::new(&model, &mut cache, prompt()).expect("a session");
    let request = Request { config: &config, stop: &StopRules::new(&[]), seen: &[], constraint: None };
    let written = generate(&mut session, request, &mut |_| ControlFlow::Continue(())).expect("a text");
    let scored = score(&mut session, &[written[0][0].token_ids.clone()]).expect("a score");
    for (a, b) in scored[0].log_probs.iter().zip(&written[0][0].log_probs) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    let read = session.finish();
    assert!(model.reads_prompts_whole());
    let again = vec![(read[0].clone(), prompt().remove(0).1)];
    let error = Session::new(&model, &mut cache, again).expect_err("read already").to_string();
    assert!(error.contains("as a whole"), "{error}");
    let rows = golden.rows("flan.in.embeds");
    assert!(model.forward(&rows, &[rows.dim(0).expect("rows")]).is_err());
}

#[test]
fn every_tensor_is_used_and_counted() {
    let (golden, file) = open();
    check_tensors(&golden, &file, &NAMES);
}

#[test]
fn what_t5_cannot_be_is_refused_by_name() {
    let (golden, file) = open();
    for (field, value, expected) in [
        ("dense_act_fn", "tanh".into(), "dense_act_fn"),
        ("relative_attention_num_buckets", 6.into(), "a multiple of 4"),
        ("relative_attention_max_distance", 4.into(), "half the 8 buckets"),
        ("decoder_start_token_id", 53.into(), "decoder_start_token_id"),
        ("num_decoder_layers", 4.into(), "decoder.block.3"),
        ("d_kv", 11.into(), "SelfAttention.q"),
    ] {
        let message = refused(&golden, &file, "flan", field, value);
        assert!(message.contains(expected), "{field}: {message}");
    }
}
