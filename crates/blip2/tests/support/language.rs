//! What the golden tests of the language models share: packed texts of a golden file, and what is generated after them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use blip2::cache::CachedSequence;
use blip2::generate::{GenerationConfig, Request, Session, StopRules, generate};
use blip2::language::LanguageModel;
use blip2::layers::Precision;
use blip2::weights::safetensors::Safetensors;
use candle_core::Tensor;
use serde_json::Value as Json;

use crate::golden::Golden;

/// The model that the file keeps under the prefix `name`, with one field of its configuration changed.
pub(crate) fn load_with(
    golden: &Golden,
    file: &Safetensors,
    name: &str,
    change: Option<(&str, Json)>,
) -> blip2::Result<LanguageModel> {
    let mut config = golden.metadata::<BTreeMap<String, Json>>("configs")[name].clone();
    if let Some((field, value)) = change {
        config[field] = value;
    }
    LanguageModel::from_safetensors(&config, file, &format!("{name}."), Precision::F32)
}

/// The model that the file keeps under the prefix `name`.
pub(crate) fn load(golden: &Golden, file: &Safetensors, name: &str) -> LanguageModel {
    load_with(golden, file, name, None).expect("a model")
}

/// Why the model `name` is refused when a field of its configuration is another.
pub(crate) fn refused(golden: &Golden, file: &Safetensors, name: &str, field: &str, value: Json) -> String {
    load_with(golden, file, name, Some((field, value))).expect_err("refused").to_string()
}

/// The file's texts, each a new sequence and its embeddings.
pub(crate) fn prompts(golden: &Golden, name: &str) -> Vec<(CachedSequence, Tensor)> {
    let embeds = golden.rows(&format!("{name}.in.embeds"));
    let mut start = 0;
    let lengths: Vec<usize> = golden.metadata("lengths");
    let cut = lengths.into_iter().map(|len| {
        start += len;
        (CachedSequence::new(), embeds.narrow(0, start - len, len).expect("rows"))
    });
    cut.collect()
}

/// A batch of the file's unequal texts gives the tokens that transformers gives after each alone, greedily and with beams.
pub(crate) fn check_generation(golden: &Golden, model: &LanguageModel, name: &str) {
    let expected: BTreeMap<String, BTreeMap<String, Vec<Vec<u32>>>> = golden.metadata("texts");
    let end: Vec<u32> = golden.metadata("end");
    let stop = StopRules::new(&end);
    for (num_beams, expected) in &expected[name] {
        let config = GenerationConfig {
            num_beams: num_beams.parse().expect("a number"),
            max_new_tokens: golden.metadata("max_new_tokens"),
            ..GenerationConfig::default()
        };
        let mut cache = model.new_cache();
        // Twice from one cache: what the first session left behind must not be read by the second.
        for _ in 0..2 {
            let mut session = Session::new(model, &mut cache, prompts(golden, name)).expect("a session");
            let request = Request { config: &config, stop: &stop, seen: &[], constraint: None };
            let written = generate(&mut session, request, &mut |_| ControlFlow::Continue(())).expect("texts");
            let ids: Vec<_> = written.iter().map(|best| best[0].token_ids.clone()).collect();
            assert_eq!(&ids, expected, "{name}, {num_beams} beams");
        }
    }
}

/// Every tensor of the models in the file is used, and each model counts its own: those under its prefix that are neither
/// input nor result.
pub(crate) fn check_tensors(golden: &Golden, file: &Safetensors, names: &[&str]) {
    let is_weight = |tensor: &str| ![".in.", ".out.", ".grad."].iter().any(|part| tensor.contains(part));
    let models: Vec<_> = names.iter().map(|name| load(golden, file, name)).collect();
    file.ignore(|tensor| !is_weight(tensor));
    file.finish().expect("no tensor is left");
    for (name, model) in names.iter().zip(models) {
        let own = file.names().filter(|tensor| is_weight(tensor) && tensor.starts_with(&format!("{name}.")));
        let n: usize = own.map(|tensor| file.shape(tensor).expect("a shape").iter().product::<usize>()).sum();
        assert_eq!(model.n_parameters(), n, "{name}");
    }
}
