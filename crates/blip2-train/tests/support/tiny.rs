//! A tiny random language model in Hugging Face's layout: one llama layer over the 256 bytes and three marks.

use std::collections::BTreeMap;
use std::path::Path;

use blip2::weights::safetensors::{NamedTensor, write_safetensors};
use blip2_train::random::Random;

/// Width of its embeddings, for which the stage-2 golden has a projection.
const WIDTH: usize = 32;
const N_TOKENS: usize = 256 + 3;

/// Writes weights, configuration and tokenizer into `folder`.
pub(crate) fn write_language_model(folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder");
    write_tensors(&folder.join("model.safetensors"), &tensors());
    let write = |name: &str, json: serde_json::Value| {
        std::fs::write(folder.join(name), json.to_string()).expect("written");
    };
    write(
        "config.json",
        serde_json::json!({
            "model_type": "llama", "vocab_size": N_TOKENS, "hidden_size": WIDTH, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "hidden_act": "silu", "max_position_embeddings": 160, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
            "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
            "bos_token_id": 256, "eos_token_id": 257,
        }),
    );
    let marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];
    let mut vocab: serde_json::Map<_, _> =
        (0..=255u8).map(|byte| (spelling(byte).to_string(), u32::from(byte).into())).collect();
    vocab.extend(marks.iter().zip(256u32..).map(|(mark, id)| ((*mark).to_owned(), id.into())));
    let added: Vec<_> = marks
        .iter()
        .zip(256u32..)
        .map(|(mark, id)| {
            serde_json::json!({"id": id, "content": mark, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    write(
        "tokenizer.json",
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                "merges": []},
        }),
    );
    write(
        "tokenizer_config.json",
        serde_json::json!({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}),
    );
}

/// Writes named f32 tensors.
pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) {
    let named: Vec<_> =
        tensors.iter().map(|(name, (shape, data))| NamedTensor::f32(name, shape.as_slice(), data)).collect();
    write_safetensors(path, &named, &BTreeMap::new()).expect("written");
}

fn tensors() -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let mut numbers = Random::new(&[7]);
    let mut tensors = BTreeMap::new();
    let mut add = |name: &str, shape: &[usize], around: f64| {
        let n = shape.iter().product();
        let data = (0..n).map(|_| (around + 0.2 * numbers.normal()) as f32).collect();
        tensors.insert(name.to_owned(), (shape.to_vec(), data));
    };
    add("model.embed_tokens.weight", &[N_TOKENS, WIDTH], 0.0);
    add("model.norm.weight", &[WIDTH], 1.0);
    for (name, shape) in [
        ("self_attn.q_proj", [32, WIDTH]),
        ("self_attn.k_proj", [16, WIDTH]),
        ("self_attn.v_proj", [16, WIDTH]),
        ("self_attn.o_proj", [WIDTH, 32]),
        ("mlp.gate_proj", [48, WIDTH]),
        ("mlp.up_proj", [48, WIDTH]),
        ("mlp.down_proj", [WIDTH, 48]),
    ] {
        add(&format!("model.layers.0.{name}.weight"), &shape, 0.0);
    }
    add("model.layers.0.input_layernorm.weight", &[WIDTH], 1.0);
    add("model.layers.0.post_attention_layernorm.weight", &[WIDTH], 1.0);
    tensors
}

/// GPT-2's spelling of a byte: printable ones as themselves, the others as the characters from U+0100 on.
fn spelling(byte: u8) -> char {
    let is_printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if is_printable(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|&b| !is_printable(b)).count() as u32;
    char::from_u32(256 + place).expect("a character")
}
