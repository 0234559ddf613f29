//! The language model and generation against transformers (`tools/golden_llama.py`).
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use blip2::cache::CachedSequence;
use blip2::generate::{
    Continuation, Decoder, Generation, GenerationConfig, Request, Session, StopRules, generate, score,
};
use blip2::language::LanguageModel;
use blip2::layers::Precision;
use blip2::sampling;
use blip2::weights::gguf::Gguf;
use blip2::weights::safetensors::Safetensors;
use candle_core::{Device, Tensor, Var};
use serde_json::Value as Json;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn json(name: &str) -> Json {
    serde_json::from_str(&std::fs::read_to_string(golden(name)).unwrap()).unwrap()
}

/// The tiny model's file, with what its metadata says.
struct Tiny {
    file: Safetensors,
    lengths: Vec<usize>,
    tolerance: Json,
}

impl Tiny {
    fn open() -> Self {
        let file = Safetensors::open(golden("llama_tiny.safetensors")).unwrap();
        let entry = |name: &str| serde_json::from_str::<Json>(&file.metadata()[name]).unwrap();
        let lengths =
            entry("lengths").as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        Self { lengths, tolerance: entry("tolerance"), file }
    }

    fn model(&self) -> LanguageModel {
        let config: Json = serde_json::from_str(&self.file.metadata()["config"]).unwrap();
        LanguageModel::from_safetensors(&config, &self.file, "", Precision::F32).unwrap()
    }

    fn tensor(&self, name: &str) -> Tensor {
        let shape = self.file.shape(name).unwrap();
        Tensor::from_vec(self.file.read_f32(name).unwrap(), shape, &Device::Cpu).unwrap()
    }

    fn prompts(&self) -> Vec<Tensor> {
        let embeds = self.tensor("in.embeds");
        let mut start = 0;
        let prompts = self.lengths.iter().map(|&len| {
            start += len;
            embeds.narrow(0, start - len, len).unwrap()
        });
        prompts.collect()
    }

    fn check(&self, name: &str, found: &Tensor) {
        let tolerance = self.tolerance[name].as_f64().unwrap() as f32;
        let expected = self.tensor(name);
        assert_eq!(found.shape(), expected.shape(), "{name}");
        let worst = worst_difference(found, &expected);
        assert!(worst <= tolerance, "{name}: off by {worst}, tolerance {tolerance}");
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn worst_difference(a: &Tensor, b: &Tensor) -> f32 {
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn start<'a>(
    model: &'a LanguageModel,
    cache: &'a mut blip2::cache::KvCache,
    prompts: &[Tensor],
) -> Session<'a> {
    let prompts = prompts.iter().map(|prompt| (CachedSequence::new(), prompt.clone())).collect();
    Session::new(model, cache, prompts).unwrap()
}

fn run(
    model: &LanguageModel,
    prompts: &[Tensor],
    config: &GenerationConfig,
    end: &[u32],
) -> Vec<Vec<Generation>> {
    let mut cache = model.new_cache();
    let mut session = start(model, &mut cache, prompts);
    let request = Request { config, stop: &StopRules::new(end), seen: &[], constraint: None };
    generate(&mut session, request, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn hidden_states_logits_and_the_input_gradient_are_pytorchs() {
    let tiny = Tiny::open();
    let model = tiny.model();
    let embeds = Var::from_tensor(&tiny.tensor("in.embeds")).unwrap();
    let hidden = model.forward(embeds.as_tensor(), &tiny.lengths).unwrap();
    let logits = model.logits(&hidden).unwrap();
    tiny.check("out.hidden", &hidden);
    tiny.check("out.logits", &logits);
    let loss = (logits * tiny.tensor("in.d_logits")).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    tiny.check("grad.embeds", gradients.get(embeds.as_tensor()).expect("the gradient reaches the input"));
}

#[test]
fn every_tensor_of_the_checkpoint_is_used() {
    let tiny = Tiny::open();
    let model = tiny.model();
    tiny.file.ignore(|name| ["in.", "out.", "grad.", "q8_0."].iter().any(|start| name.starts_with(start)));
    tiny.file.finish().unwrap();
    let n_weights: usize = tiny
        .file
        .names()
        .filter(|name| name.starts_with("model.") || *name == "lm_head.weight")
        .map(|name| tiny.file.shape(name).unwrap().iter().product::<usize>())
        .sum();
    assert_eq!(model.n_parameters(), n_weights);
}

#[test]
fn gguf_files_hold_the_same_model() {
    let tiny = Tiny::open();
    let embeds = tiny.tensor("in.embeds");
    let logits_of =
        |model: &LanguageModel| model.logits(&model.forward(&embeds, &tiny.lengths).unwrap()).unwrap();
    let plain = Gguf::open(golden("llama_tiny_f32.gguf")).unwrap();
    let plain = LanguageModel::from_gguf(&plain, Precision::F32).unwrap();
    assert_eq!(worst_difference(&logits_of(&plain), &logits_of(&tiny.model())), 0.0);
    let quantised = Gguf::open(golden("llama_tiny_q8_0.gguf")).unwrap();
    let quantised = LanguageModel::from_gguf(&quantised, Precision::F32).unwrap();
    tiny.check("q8_0.logits", &logits_of(&quantised));
    assert_eq!((quantised.hidden_size(), quantised.vocab_size(), quantised.context_len()), (96, 97, 64));
}

#[test]
fn bf16_weights_stay_close() {
    let tiny = Tiny::open();
    let file = Gguf::open(golden("llama_tiny_f32.gguf")).unwrap();
    let model = LanguageModel::from_gguf(&file, Precision::Bf16).unwrap();
    let logits = model.logits(&model.forward(&tiny.tensor("in.embeds"), &tiny.lengths).unwrap()).unwrap();
    let expected = tiny.tensor("out.logits");
    let largest = values(&expected).iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    // Rounding to 8 bits of mantissa is 0.4 % at most for a factor; three layers and the head add up to some of those.
    let worst = worst_difference(&logits, &expected) / largest;
    assert!(worst > 0.0 && worst < 0.05, "{worst}");
}

#[test]
fn generation_is_that_of_transformers() {
    let tiny = Tiny::open();
    let model = tiny.model();
    let golden = json("llama_generate.json");
    let tokens = |json: &Json| -> Vec<u32> {
        json.as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
    };
    for case in golden["cases"].as_array().unwrap() {
        let mut config = case["config"].clone();
        let end = config.as_object_mut().unwrap().remove("end_tokens");
        let end = tokens(end.as_ref().unwrap_or(&golden["end_tokens"]));
        let config: GenerationConfig = serde_json::from_value(config).unwrap();
        // One batch of unequal prompts here, one by one there.
        let results = run(&model, &tiny.prompts(), &config, &end);
        for (prompt, (found, expected)) in results.iter().zip(case["results"].as_array().unwrap()).enumerate()
        {
            let context = format!("prompt {prompt} of {}", case["config"]);
            assert_eq!(found.len(), expected.as_array().unwrap().len(), "{context}");
            for (found, expected) in found.iter().zip(expected.as_array().unwrap()) {
                assert_eq!(found.token_ids, tokens(&expected["token_ids"]), "{context}");
                for (found, expected) in found.log_probs.iter().zip(expected["log_probs"].as_array().unwrap())
                {
                    assert!((f64::from(*found) - expected.as_f64().unwrap()).abs() < 1e-4, "{context}");
                }
                if let Some(expected) = expected["score"].as_f64() {
                    assert!((f64::from(found.score) - expected).abs() < 1e-4 * expected.abs(), "{context}");
                }
            }
        }
    }
}

#[test]
fn a_batch_equals_its_singles_bit_for_bit() {
    let tiny = Tiny::open();
    let (model, prompts) = (tiny.model(), tiny.prompts());
    let together = model.logits(&model.forward(&tiny.tensor("in.embeds"), &tiny.lengths).unwrap()).unwrap();
    let mut start = 0;
    for prompt in &prompts {
        let n = prompt.dim(0).unwrap();
        let alone = model.logits(&model.forward(prompt, &[n]).unwrap()).unwrap();
        assert_eq!(values(&alone), values(&together.narrow(0, start, n).unwrap()));
        start += n;
    }
    for config in [
        GenerationConfig { max_new_tokens: 10, ..Default::default() },
        GenerationConfig { max_new_tokens: 10, num_beams: 4, num_return_sequences: 4, ..Default::default() },
        GenerationConfig {
            max_new_tokens: 10,
            do_sample: true,
            num_return_sequences: 3,
            ..Default::default()
        },
    ] {
        let together = run(&model, &prompts, &config, &[1]);
        for (prompt, together) in prompts.iter().zip(&together) {
            assert_eq!(&run(&model, std::slice::from_ref(prompt), &config, &[1])[0], together);
        }
    }
}

#[test]
fn cached_decoding_equals_uncached_bit_for_bit() {
    let tiny = Tiny::open();
    let (model, prompts) = (tiny.model(), tiny.prompts());
    let text: Vec<u32> = vec![17, 3, 88, 88, 42, 9, 60];
    let embeds = Tensor::cat(&[&prompts[2], &model.embed(&text).unwrap()], 0).unwrap();
    let n = embeds.dim(0).unwrap();
    let uncached = model.logits(&model.forward(&embeds, &[n]).unwrap()).unwrap();
    for chunk in [1, 3, text.len()] {
        let mut cache = model.new_cache();
        // Another text in the same cache, so that the rows in question do not start at 0.
        let mut session = start(&model, &mut cache, &[prompts[0].clone(), prompts[2].clone()]);
        let vocab_size = session.vocab_size();
        let mut logits = session.prompt_logits().unwrap()[vocab_size..].to_vec();
        let mut parent = 1;
        for tokens in text.chunks(chunk) {
            logits.extend(session.extend(&[Continuation { parent, tokens }]).unwrap());
            parent = 0;
        }
        let expected = values(&uncached.narrow(0, n - text.len() - 1, text.len() + 1).unwrap());
        assert_eq!(logits, expected, "in steps of {chunk}");
    }
}

#[test]
fn a_conversation_goes_on_from_its_cache() {
    let tiny = Tiny::open();
    let (model, prompts) = (tiny.model(), tiny.prompts());
    let config = GenerationConfig { max_new_tokens: 8, num_beams: 3, ..Default::default() };
    let stop = StopRules::new(&[1]);
    let request = Request { config: &config, stop: &stop, seen: &[], constraint: None };
    let mut cache = model.new_cache();
    let mut session = start(&model, &mut cache, &prompts[..1]);
    let first = generate(&mut session, request, &mut |_| ControlFlow::Continue(())).unwrap()[0][0].clone();
    let history = session.finish().remove(0);
    assert_eq!((history.len(), cache.n_rows()), (5, 5), "what was generated is forgotten");

    let next = Tensor::cat(&[&model.embed(&first.token_ids).unwrap(), &prompts[3]], 0).unwrap();
    let mut session = Session::new(&model, &mut cache, vec![(history, next.clone())]).unwrap();
    let second = generate(&mut session, request, &mut |_| ControlFlow::Continue(())).unwrap();
    let mut history = session.finish().remove(0);
    let whole = Tensor::cat(&[&prompts[0], &next], 0).unwrap();
    let expected = run(&model, &[whole], &config, &[1]);
    assert_eq!(second[0][0].token_ids, expected[0][0].token_ids);
    assert!((second[0][0].score - expected[0][0].score).abs() < 1e-4);

    history.truncate(5);
    cache.trim([&history]);
    assert_eq!(cache.n_rows(), 5);
    let mut session = Session::new(&model, &mut cache, vec![(history, next)]).unwrap();
    assert_eq!(generate(&mut session, request, &mut |_| ControlFlow::Continue(())).unwrap(), second);
}

#[test]
fn scored_answers_have_the_probabilities_of_generated_ones() {
    let tiny = Tiny::open();
    let (model, prompts) = (tiny.model(), tiny.prompts());
    let config =
        GenerationConfig { max_new_tokens: 12, num_beams: 5, num_return_sequences: 5, ..Default::default() };
    let generated = &run(&model, &prompts[..1], &config, &[1])[0];
    let answers: Vec<_> = generated.iter().map(|text| text.token_ids.clone()).collect();
    let mut cache = model.new_cache();
    let scores = score(&mut start(&model, &mut cache, &prompts[..1]), &answers).unwrap();
    for (generated, score) in generated.iter().zip(&scores) {
        for (a, b) in generated.log_probs.iter().zip(&score.log_probs) {
            assert!((a - b).abs() < 2e-5, "{a} {b}");
        }
        assert_eq!(generated.log_probs.len(), score.log_probs.len());
    }
    assert_eq!(cache.n_rows(), 5);
}

#[test]
fn texts_longer_than_the_context_are_refused() {
    let tiny = Tiny::open();
    let model = tiny.model();
    let rows = Tensor::zeros((65, 96), candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut cache = model.new_cache();
    let prompt = vec![(CachedSequence::new(), rows.clone())];
    let expected = "the text needs 65 tokens, the limit is 64: shorten it";
    assert_eq!(Session::new(&model, &mut cache, prompt).unwrap_err().to_string(), expected);
    assert_eq!(model.forward(&rows, &[65]).unwrap_err().to_string(), expected);
    assert!(model.forward(&rows, &[60]).is_err(), "lengths must sum to the rows");
    assert!(model.embed(&[97]).unwrap_err().to_string().contains("token 97 is not in the vocabulary"));
    let config = GenerationConfig { max_new_tokens: 20, ..Default::default() };
    let nearly_full = rows.narrow(0, 0, 60).unwrap();
    let text = &run(&model, &[nearly_full], &config, &[])[0][0];
    assert_eq!((text.token_ids.len(), text.finish), (4, blip2::generate::FinishReason::ContextFull));
}

/// Reading it would never end.
#[cfg(unix)]
#[test]
fn a_device_in_the_place_of_a_folders_configuration_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.path().join("config.json")).unwrap();
    let error = LanguageModel::open(folder.path(), Precision::F32).expect_err("refused").to_string();
    assert!(error.contains("config.json: this is not a regular file"), "{error}");
}

#[test]
fn processors_and_filters_are_those_of_transformers() {
    let golden = json("sampling.json");
    let history: Vec<u32> = serde_json::from_value(golden["history"].clone()).unwrap();
    let logits: Vec<Vec<f32>> = serde_json::from_value(golden["logits"].clone()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let config: GenerationConfig = serde_json::from_value(case["config"].clone()).unwrap();
        let expected: Vec<Vec<Option<f32>>> = serde_json::from_value(case["scores"].clone()).unwrap();
        for (logits, expected) in logits.iter().zip(&expected) {
            let mut scores = logits.clone();
            sampling::repetition_penalty(&mut scores, &history, config.repetition_penalty);
            sampling::no_repeat_ngram(&mut scores, &history, config.no_repeat_ngram_size);
            sampling::temperature(&mut scores, config.temperature);
            sampling::top_k(&mut scores, config.top_k);
            sampling::top_p(&mut scores, config.top_p, 1);
            sampling::min_p(&mut scores, config.min_p, 1);
            for (token, (&found, &expected)) in scores.iter().zip(expected).enumerate() {
                let expected = expected.unwrap_or(f32::NEG_INFINITY);
                let is_same = found == expected || (found - expected).abs() < 1e-5;
                assert!(is_same, "token {token} of {}: {found}, expected {expected}", case["config"]);
            }
        }
    }
}

/// SmolLM2-135M-Instruct, if it is there.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn smollm2() -> Option<PathBuf> {
    let folder = std::env::var_os("BLIP2_FROZEN").map(PathBuf::from);
    let path =
        folder.map(|folder| folder.join("SmolLM2-135M-Instruct.Q4_1.gguf")).filter(|path| path.exists());
    if path.is_none() {
        eprintln!("SKIPPED: set BLIP2_FROZEN to the folder with SmolLM2-135M-Instruct.Q4_1.gguf");
    }
    path
}

#[test]
fn smollm2_computes_what_pytorch_computes() {
    let Some(path) = smollm2() else { return };
    let golden = json("smollm2.json");
    let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let probes: Vec<usize> = serde_json::from_value(golden["probes"].clone()).unwrap();
    let expected: Vec<Vec<f32>> = serde_json::from_value(golden["logits"].clone()).unwrap();
    let sums: Vec<f32> = serde_json::from_value(golden["log_sum_exp"].clone()).unwrap();
    let best: Vec<(u32, f32)> = serde_json::from_value(golden["best"].clone()).unwrap();
    let model = LanguageModel::from_gguf(&Gguf::open(path).unwrap(), Precision::F32).unwrap();
    assert_eq!(model.n_parameters(), 134_515_008);
    let embeds = model.embed(&ids).unwrap();
    let logits =
        model.logits(&model.forward(&embeds, &[ids.len()]).unwrap()).unwrap().to_vec2::<f32>().unwrap();
    for ((row, expected), sum) in logits.iter().zip(&expected).zip(&sums) {
        for (&probe, expected) in probes.iter().zip(expected) {
            assert!(
                (row[probe] - expected).abs() < 2e-3,
                "token {probe}: {}, expected {expected}",
                row[probe]
            );
        }
        assert!((sampling::log_sum_exp(row) - sum).abs() < 2e-3);
    }
    let last = logits.last().unwrap();
    assert_eq!(sampling::argmax(last), Some(best[0].0));
    for (token, expected) in best {
        assert!((last[token as usize] - expected).abs() < 2e-3);
    }
    for num_beams in [1, 5] {
        let config = GenerationConfig { num_beams, max_new_tokens: 20, ..Default::default() };
        let found = run(&model, std::slice::from_ref(&embeds), &config, &[2]);
        let expected: Vec<u32> =
            serde_json::from_value(golden["generated"][num_beams.to_string()].clone()).unwrap();
        assert_eq!(found[0][0].token_ids, expected, "{num_beams} beams");
    }
}
