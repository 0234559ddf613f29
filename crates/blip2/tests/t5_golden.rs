//! T5 against transformers' own, on tiny random models (`tools/golden_t5.py`).

#[path = "support/golden.rs"]
mod golden;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use blip2::cache::CachedSequence;
use blip2::generate::{
    Continuation, Decoder, GenerationConfig, Request, Session, StopRules, generate, score,
};
use blip2::language::LanguageModel;
use blip2::layers::Precision;
use blip2::weights::safetensors::Safetensors;
use candle_core::Tensor;
use golden::Golden;
use serde_json::Value as Json;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/t5_tiny.safetensors");
const NAMES: [&str; 2] = ["flan", "t5"];

fn open() -> (Golden, Safetensors) {
    let file = Safetensors::open(FILE).expect("a checkpoint");
    (Golden::parse("t5_tiny", include_bytes!("golden/t5_tiny.safetensors")), file)
}

fn load(golden: &Golden, file: &Safetensors, name: &str) -> LanguageModel {
    let configs: BTreeMap<String, Json> = golden.metadata("configs");
    LanguageModel::from_safetensors(&configs[name], file, &format!("{name}."), Precision::F32)
        .expect("a model")
}

fn prompts(golden: &Golden, name: &str) -> Vec<(CachedSequence, Tensor)> {
    let embeds = golden.rows(&format!("{name}.in.embeds"));
    let mut start = 0;
    let lengths: Vec<usize> = golden.metadata("lengths");
    let cut = lengths.into_iter().map(|len| {
        start += len;
        (CachedSequence::new(), embeds.narrow(0, start - len, len).expect("rows"))
    });
    cut.collect()
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
        let first = session.prompt_logits().expect("logits");
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

/// A batch of unequal prompts writes what transformers writes after each alone.
#[test]
fn generation_gives_the_tokens_of_transformers() {
    let (golden, file) = open();
    let expected: BTreeMap<String, BTreeMap<String, Vec<Vec<u32>>>> = golden.metadata("texts");
    let end: Vec<u32> = golden.metadata("end");
    let stop = StopRules::new(&end);
    for name in NAMES {
        let model = load(&golden, &file, name);
        for (num_beams, expected) in &expected[name] {
            let config = GenerationConfig {
                num_beams: num_beams.parse().expect("a number"),
                max_new_tokens: golden.metadata("max_new_tokens"),
                ..GenerationConfig::default()
            };
            let mut cache = model.new_cache();
            // Twice from one cache: what the first session left behind must not be read by the second.
            for _ in 0..2 {
                let mut session =
                    Session::new(&model, &mut cache, prompts(&golden, name)).expect("a session");
                let request = Request { config: &config, stop: &stop, seen: &[] };
                let written =
                    generate(&mut session, request, &mut |_| ControlFlow::Continue(())).expect("texts");
                let ids: Vec<_> = written.iter().map(|best| best[0].token_ids.clone()).collect();
                assert_eq!(&ids, expected, "{name}, {num_beams} beams");
            }
        }
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
    let request = Request { config: &config, stop: &StopRules::new(&[]), seen: &[] };
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
    let models = NAMES.map(|name| load(&golden, &file, name));
    file.ignore(|name| [".in.", ".out."].iter().any(|part| name.contains(part)));
    file.finish().expect("no tensor is left");
    for (name, model) in NAMES.iter().zip(models) {
        let is_weight = |tensor: &&str| {
            tensor.starts_with(&format!("{name}."))
                && ![".in.", ".out."].iter().any(|part| tensor.contains(part))
        };
        let n: usize = file
            .names()
            .filter(is_weight)
            .map(|tensor| file.shape(tensor).expect("a shape").iter().product::<usize>())
            .sum();
        assert_eq!(model.n_parameters(), n, "{name}");
    }
}

#[test]
fn what_t5_cannot_be_is_refused_by_name() {
    let (golden, file) = open();
    let configs: BTreeMap<String, Json> = golden.metadata("configs");
    let refused = |field: &str, value: Json| {
        let mut config = configs["flan"].clone();
        config[field] = value;
        LanguageModel::from_safetensors(&config, &file, "flan.", Precision::F32)
            .expect_err("refused")
            .to_string()
    };
    assert!(refused("dense_act_fn", "tanh".into()).contains("dense_act_fn"));
    assert!(refused("relative_attention_num_buckets", 6.into()).contains("a multiple of 4"));
    assert!(refused("relative_attention_max_distance", 4.into()).contains("half the 8 buckets"));
    assert!(refused("decoder_start_token_id", 53.into()).contains("decoder_start_token_id"));
    assert!(refused("num_decoder_layers", 4.into()).contains("decoder.block.3"));
    assert!(refused("d_kv", 11.into()).contains("SelfAttention.q"));
}
