//! Stage 2 through T5 against transformers' `Blip2ForConditionalGeneration` (`tools/golden_stage2_t5.py`): the gradient passes the
//! decoder, its attention to the encoder's output, and the encoder, to the projection and the query path.

#[path = "../../blip2/tests/support/golden.rs"]
mod golden;
#[path = "support/stage2.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::Path;

use blip2::cache::CachedSequence;
use blip2::language::Branched;
use blip2::layers::DropoutRng;
use blip2_train::stage2::{Batch, StepOptions, gradients};
use candle_core::{Device, Tensor};
use golden::Golden;
use support::{Stage2, difference};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/stage2_t5.safetensors");
/// Flan-T5 as BLIP-2 runs it, and a T5 with the approximate GELU and a tied, scaled head.
const NAMES: [&str; 2] = ["flan", "t5"];

fn open(name: &str) -> (Golden, Stage2) {
    let golden = Golden::parse("stage2_t5", include_bytes!("golden/stage2_t5.safetensors"));
    let configs: BTreeMap<String, serde_json::Value> = golden.metadata("language_configs");
    let stage2 = Stage2::open(&golden, Path::new(FILE), &configs[name], &format!("{name}."));
    (golden, stage2)
}

#[test]
fn rows_and_loss_agree() {
    for name in NAMES {
        let (golden, stage2) = open(name);
        let n = stage2.batch.prompts.len();
        let pass = stage2.bridge().forward(&stage2.batch, 0..n, &mut DropoutRng::off()).expect("rows");
        // The rows that write, one a token of the answer; before them those that the encoder read.
        let n_queries = stage2.qformer.config().num_query_tokens;
        let (mut start, mut writing) = (0, Vec::new());
        for prompt in stage2.batch.prompts.iter().flatten() {
            let (read, written) = prompt.read_and_written().expect("a pair");
            start += n_queries + read.len();
            writing.extend((start..start + written.len()).map(|row| row as u32));
            start += written.len();
        }
        let writing = Tensor::from_slice(&writing, writing.len(), &Device::Cpu).expect("rows");
        let hidden = pass.hidden.index_select(&writing, 0).expect("rows");
        let mut comparison = golden.comparison();
        comparison.tensor(&format!("{name}.out.soft_tokens"), &pass.soft_tokens);
        comparison
            .tensor(&format!("{name}.out.logits"), &stage2.language_model.logits(&hidden).expect("logits"));
        comparison.slice(&format!("{name}.loss"), &[stage2.gradients().1]);
        comparison.finish(3);
    }
}

/// Every gradient in the file is compared, and nothing is trained that the file lacks.
#[test]
fn every_gradient_agrees() {
    for name in NAMES {
        let (golden, stage2) = open(name);
        let (gradients, _) = stage2.gradients();
        let prefix = format!("{name}.grad.");
        let names: Vec<&str> = golden.expected().filter_map(|name| name.strip_prefix(&prefix)).collect();
        assert_eq!(names, stage2.variables.keys().collect::<Vec<_>>());
        let mut comparison = golden.comparison();
        for name in &names {
            comparison.slice(&format!("{prefix}{name}"), gradients.get(name).expect("a gradient"));
        }
        comparison.finish(names.len());
    }
}

/// Answers to one question are read with one pass of the encoder, and another question has its own: as with copies of the
/// picture. A batch cut into parts gives the gradients of the whole.
#[test]
fn shared_pictures_and_parts_equal_copies() {
    let (_, stage2) = open("flan");
    let n_image_tokens = stage2.batch.image_embeds.dim(0).expect("rows") / stage2.batch.prompts.len();
    let first = stage2.batch.image_embeds.narrow(0, 0, n_image_tokens).expect("a picture");
    let one = stage2.batch.prompts[0][0].clone();
    let (mut answer, mut question) = (one.clone(), one.clone());
    let last = answer.ids.len() - 1;
    answer.ids[last] = 7;
    question.ids[0] = 9;
    let texts = [one.clone(), question, answer, one];
    let shared = Batch { image_embeds: first.clone(), prompts: vec![texts.to_vec()], weights: vec![1.0] };
    let copies = Batch {
        image_embeds: Tensor::cat(&[&first; 4], 0).expect("copies"),
        prompts: texts.iter().map(|text| vec![text.clone()]).collect(),
        weights: vec![1.0; 4],
    };
    let (a, a_values) = stage2.gradients_of(&shared, usize::MAX);
    for micro_batch in [usize::MAX, 3] {
        let (b, b_values) = stage2.gradients_of(&copies, micro_batch);
        assert_eq!(a_values.n_tokens, b_values.n_tokens);
        assert!((a_values.loss - b_values.loss).abs() < 1e-5, "{a_values:?} {b_values:?}");
        let difference = difference(&a, &b, stage2.variables.keys());
        assert!(difference < 1e-5, "{difference}");
    }
}

/// What is taught is what is written: the rows of a given answer are those of the same answer generated.
#[test]
fn teaching_equals_generating() {
    let (_, stage2) = open("t5");
    let model = &stage2.language_model;
    let start = model.decoder_start().expect("an encoder-decoder model");
    let prompt = model.embed(&[4, 9, 1]).expect("rows");
    let answers = [vec![start, 5, 6, 7], vec![start, 8]];
    let words = model.embed(&answers.concat()).expect("rows");
    let given = Tensor::cat(&[&prompt, &words], 0).expect("rows");
    let text = Branched { shared: 3, continuations: vec![4, 2] };
    let taught = model.forward_branched(&given, &[text]).expect("rows").narrow(0, 3, 6).expect("answers");

    let mut cache = model.new_cache();
    let mut sequence = [CachedSequence::new()];
    let mut written = vec![model.read_prompts(&prompt, &mut cache, &mut sequence, &[3]).expect("a row")];
    let begun = sequence[0].clone();
    for answer in &answers {
        let mut sequence = [begun.clone()];
        for &token in &answer[1..] {
            let row = model.embed(&[token]).expect("a row");
            written.push(model.forward_cached(&row, &mut cache, &mut sequence, &[1]).expect("a row"));
        }
    }
    // The second answer begins as the first does.
    written.insert(4, written[0].clone());
    let written = Tensor::cat(&written, 0).expect("rows");
    let bits = |rows: &Tensor| -> Vec<u32> {
        let rows = rows.flatten_all().expect("rows");
        rows.to_vec1::<f32>().expect("numbers").into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(&taught), bits(&written));
}

#[test]
fn texts_that_such_a_model_cannot_learn_are_refused() {
    let (_, stage2) = open("flan");
    let options = StepOptions { micro_batch: 9, dropout: 0.0, seed: 0, step: 0 };
    let whole = stage2.batch.prompts[0][0].clone();
    let mut without_picture = whole.clone();
    without_picture.image_at = None;
    let mut dialogue = whole.clone();
    dialogue.answers.insert(0, 0..1);
    for prompt in [without_picture, dialogue] {
        let mut batch = stage2.batch.clone();
        batch.prompts[1].push(prompt);
        let error = gradients(&stage2.bridge(), &stage2.variables, &batch, options).expect_err("refused");
        assert!(error.to_string().contains("encoder-decoder"), "{error}");
    }
}
