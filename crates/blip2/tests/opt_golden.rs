//! OPT against transformers' own, on tiny random models (`tools/golden_opt.py`).

#[path = "support/golden.rs"]
mod golden;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use blip2::cache::CachedSequence;
use blip2::generate::{GenerationConfig, Request, Session, StopRules, generate};
use blip2::language::LanguageModel;
use blip2::layers::Precision;
use blip2::weights::safetensors::Safetensors;
use candle_core::{Tensor, Var};
use golden::Golden;
use serde_json::Value as Json;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/opt_tiny.safetensors");
const NAMES: [&str; 2] = ["pre", "post"];

fn open() -> (Golden, Safetensors) {
    let file = Safetensors::open(FILE).expect("a checkpoint");
    (Golden::parse("opt_tiny", include_bytes!("golden/opt_tiny.safetensors")), file)
}

fn load(golden: &Golden, file: &Safetensors, name: &str) -> LanguageModel {
    let configs: BTreeMap<String, Json> = golden.metadata("configs");
    LanguageModel::from_safetensors(&configs[name], file, &format!("{name}."), Precision::F32)
        .expect("a model")
}

/// The texts' embeddings, one tensor each.
fn texts(golden: &Golden, name: &str) -> Vec<Tensor> {
    let embeds = golden.rows(&format!("{name}.in.embeds"));
    let mut start = 0;
    let lengths: Vec<usize> = golden.metadata("lengths");
    let cut = lengths.into_iter().map(|len| {
        start += len;
        embeds.narrow(0, start - len, len).expect("rows")
    });
    cut.collect()
}

#[test]
fn hidden_states_logits_and_the_input_gradient_are_pytorchs() {
    let (golden, file) = open();
    let mut comparison = golden.comparison();
    let lengths: Vec<usize> = golden.metadata("lengths");
    for name in NAMES {
        let model = load(&golden, &file, name);
        let embeds = Var::from_tensor(&golden.rows(&format!("{name}.in.embeds"))).expect("a variable");
        let hidden = model.forward(embeds.as_tensor(), &lengths).expect("hidden states");
        let logits = model.logits(&hidden).expect("logits");
        comparison.tensor(&format!("{name}.out.hidden"), &hidden);
        comparison.tensor(&format!("{name}.out.logits"), &logits);
        let loss = (logits * golden.rows(&format!("{name}.in.d_logits"))).and_then(|x| x.sum_all());
        let gradients = loss.and_then(|loss| loss.backward()).expect("gradients");
        let gradient = gradients.get(embeds.as_tensor()).expect("the gradient reaches the input");
        comparison.tensor(&format!("{name}.grad.embeds"), gradient);
    }
    comparison.finish(6);
}

/// A batch of unequal texts, through the cache, writes what transformers writes after each alone.
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
            let prompts =
                texts(&golden, name).into_iter().map(|text| (CachedSequence::new(), text)).collect();
            let mut session = Session::new(&model, &mut cache, prompts).expect("a session");
            let request = Request { config: &config, stop: &stop, seen: &[] };
            let written = generate(&mut session, request, &mut |_| ControlFlow::Continue(())).expect("texts");
            let ids: Vec<_> = written.iter().map(|best| best[0].token_ids.clone()).collect();
            assert_eq!(&ids, expected, "{name}, {num_beams} beams");
        }
    }
}

#[test]
fn every_tensor_is_used_and_counted() {
    let (golden, file) = open();
    let models = NAMES.map(|name| load(&golden, &file, name));
    file.ignore(|name| [".in.", ".out.", ".grad."].iter().any(|part| name.contains(part)));
    file.finish().expect("no tensor is left");
    for (name, model) in NAMES.iter().zip(models) {
        let is_weight = |tensor: &&str| tensor.starts_with(&format!("{name}.model."));
        let n: usize = file
            .names()
            .filter(is_weight)
            .map(|tensor| file.shape(tensor).expect("a shape").iter().product::<usize>())
            .sum();
        assert_eq!(model.n_parameters(), n, "{name}");
    }
}

#[test]
fn what_opt_cannot_be_is_refused_by_name() {
    let (golden, file) = open();
    let configs: BTreeMap<String, Json> = golden.metadata("configs");
    let refused = |field: &str, value: Json| {
        let mut config = configs["pre"].clone();
        config[field] = value;
        LanguageModel::from_safetensors(&config, &file, "pre.", Precision::F32)
            .expect_err("refused")
            .to_string()
    };
    assert!(refused("num_attention_heads", 5.into()).contains("language.hidden_size"));
    assert!(refused("activation_function", "swish".into()).contains("relu or gelu"));
    assert!(refused("layer_norm_elementwise_affine", false.into()).contains("layer_norm_elementwise_affine"));
    assert!(refused("model_type", "mamba".into()).contains("llama, opt or t5"));
    assert!(refused("vocab_size", 54.into()).contains("embed_tokens"));
    assert!(refused("max_position_embeddings", 41.into()).contains("embed_positions"));
}
