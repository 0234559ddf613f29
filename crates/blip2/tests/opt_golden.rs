//! OPT against transformers' own, on tiny random models (`tools/golden_opt.py`).

#[path = "support/golden.rs"]
mod golden;

#[path = "support/language.rs"]
mod language;

use blip2::weights::safetensors::Safetensors;
use candle_core::Var;
use golden::Golden;
use language::{check_generation, check_tensors, load, refused};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/opt_tiny.safetensors");
const NAMES: [&str; 2] = ["pre", "post"];

fn open() -> (Golden, Safetensors) {
    let file = Safetensors::open(FILE).expect("a checkpoint");
    (Golden::parse("opt_tiny", include_bytes!("golden/opt_tiny.safetensors")), file)
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

#[test]
fn generation_gives_the_tokens_of_transformers() {
    let (golden, file) = open();
    for name in NAMES {
        check_generation(&golden, &load(&golden, &file, name), name);
    }
}

#[test]
fn every_tensor_is_used_and_counted() {
    let (golden, file) = open();
    check_tensors(&golden, &file, &NAMES);
}

#[test]
fn what_opt_cannot_be_is_refused_by_name() {
    let (golden, file) = open();
    for (field, value, expected) in [
        ("num_attention_heads", 5.into(), "language.hidden_size"),
        ("activation_function", "swish".into(), "relu or gelu"),
        ("layer_norm_elementwise_affine", false.into(), "layer_norm_elementwise_affine"),
        ("model_type", "mamba".into(), "llama, opt or t5"),
        ("vocab_size", 54.into(), "embed_tokens"),
        ("max_position_embeddings", 41.into(), "embed_positions"),
    ] {
        let message = refused(&golden, &file, "pre", field, value);
        assert!(message.contains(expected), "{field}: {message}");
    }
}
