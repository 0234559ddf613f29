//! Models in eight and four bits: how near they are to the same in f32, and that a stored one is the same as one that was
//! rounded when it was opened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::cache::CachedSequence;
use blip2::generate::GenerationConfig;
use blip2::image::{self, Limits, Pixels};
use blip2::language::LanguageModel;
use blip2::layers::{FrozenFormat, Loader, Precision, Quantization};
use blip2::model::{Blip2, OpenOptions, quantize, stored_quantization};
use blip2::vision::vit::{AlignCorners, Vit, VitActivation, VitConfig};
use blip2::weights::gguf::Gguf;
use blip2::weights::safetensors::{NamedTensor, Safetensors, Values, write_safetensors};
use candle_core::{Device, Tensor, Var};
use serde_json::json;

const BOTH: [Quantization; 2] = [Quantization::Int8, Quantization::Int4];

/// Random tensors of a checkpoint.
#[derive(Default)]
struct Random {
    state: u64,
    /// What one channel of a norm is scaled by, where trained models have such channels.
    outlier: Option<f32>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Random {
    /// Roughly normal, variance 1.
    fn numbers(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.state =
                self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (next() + next() + next() + next()) * 1.73).collect()
    }

    fn add(&mut self, name: &str, shape: &[usize], scale: f32, shift: f32) {
        let values = self.numbers(shape.iter().product());
        let values = values.into_iter().map(|x| x * scale + shift).collect();
        self.tensors.insert(name.into(), (shape.into(), values));
    }

    /// Products of numbers of variance 1 have variance 1.
    fn matrix(&mut self, name: &str, n_out: usize, n_in: usize) {
        self.add(name, &[n_out, n_in], (n_in as f32).powf(-0.5), 0.0);
    }

    fn linear(&mut self, name: &str, n_out: usize, n_in: usize) {
        self.matrix(&format!("{name}.weight"), n_out, n_in);
        self.add(&format!("{name}.bias"), &[n_out], 0.1, 0.0);
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width], 0.1, 1.0);
        if let (Some(outlier), Some((_, values))) =
            (self.outlier, self.tensors.get_mut(&format!("{name}.weight")))
        {
            values[width / 3] = outlier;
        }
    }

    fn layer_norm(&mut self, name: &str, width: usize) {
        self.norm(name, width);
        self.add(&format!("{name}.bias"), &[width], 0.1, 0.0);
    }

    fn store(&self) -> (tempfile::TempDir, Safetensors) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("model.safetensors");
        let tensors: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| NamedTensor {
                name: name.clone(),
                shape: shape.clone(),
                values: Values::F32AsF16(values),
            })
            .collect();
        write_safetensors(&path, &tensors, &BTreeMap::new()).expect("written");
        (dir, Safetensors::open(&path).expect("a checkpoint"))
    }
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().and_then(|x| x.to_vec1()).expect("numbers")
}

/// The smallest cosine of two rows.
fn cosine(a: &Tensor, b: &Tensor) -> f64 {
    let width = a.dims()[a.dims().len() - 1];
    let (a, b) = (values(a), values(b));
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
    a.chunks_exact(width)
        .zip(b.chunks_exact(width))
        .map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt())
        .fold(1.0, f64::min)
}

fn format(quantization: Option<Quantization>) -> FrozenFormat {
    FrozenFormat { precision: Precision::F32, quantization }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A channel twenty times as large as the others costs a row that is scaled as a whole some of its bits.
#[test]
fn a_vision_transformer_in_eight_bits_is_near_its_f32() {
    for (outlier, least) in [(None, 0.999), (Some(20.0), 0.995)] {
        let cosine = cosine_of_a_vision_transformer(outlier);
        assert!((least..0.999_999_9).contains(&cosine), "{outlier:?}: {cosine}");
    }
}

fn cosine_of_a_vision_transformer(outlier: Option<f32>) -> f64 {
    let config = VitConfig {
        hidden_size: 256,
        intermediate_size: 1024,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        image_size: 56,
        patch_size: 14,
        layer_norm_eps: 1e-6,
        hidden_act: VitActivation::Gelu,
        pre_norm: false,
        patch_bias: true,
        qkv_bias: true,
    };
    let (d, inner) = (config.hidden_size, config.intermediate_size);
    let mut random = Random { outlier, ..Random::default() };
    random.add("embeddings.position_embedding", &[1, config.n_tokens(), d], 0.5, 0.0);
    random.add("embeddings.class_embedding", &[1, 1, d], 0.5, 0.0);
    random.add("embeddings.patch_embedding.weight", &[d, 3, 14, 14], 0.05, 0.0);
    random.add("embeddings.patch_embedding.bias", &[d], 0.1, 0.0);
    for i in 0..config.num_hidden_layers {
        let at = |name: &str| format!("encoder.layers.{i}.{name}");
        random.layer_norm(&at("layer_norm1"), d);
        random.linear(&at("self_attn.qkv"), 3 * d, d);
        random.linear(&at("self_attn.projection"), d, d);
        random.layer_norm(&at("layer_norm2"), d);
        random.linear(&at("mlp.fc1"), inner, d);
        random.linear(&at("mlp.fc2"), d, inner);
    }
    let pixels = random.numbers(2 * 56 * 56 * 3);
    let encode = |quantization| {
        let loader = Loader::frozen(&random.tensors, Precision::F32).quantizing(quantization);
        let vit = Vit::load(config.clone(), &loader, AlignCorners::No).expect("an encoder");
        vit.forward(&pixels).expect("tokens")
    };
    let (plain, quantised) = (encode(None), encode(Some(Quantization::Int8)));
    cosine(&plain, &quantised)
}

fn random_opt(outlier: Option<f32>) -> (Random, serde_json::Value) {
    let config = json!({
        "model_type": "opt", "vocab_size": 500, "hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    });
    let mut random = Random { outlier, ..Random::default() };
    random.matrix("model.decoder.embed_tokens.weight", 500, 256);
    random.add("model.decoder.embed_positions.weight", &[66, 256], 0.5, 0.0);
    for i in 0..4 {
        let at = |name: &str| format!("model.decoder.layers.{i}.{name}");
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            random.linear(&at(&format!("self_attn.{projection}")), 256, 256);
        }
        random.layer_norm(&at("self_attn_layer_norm"), 256);
        random.linear(&at("fc1"), 1024, 256);
        random.linear(&at("fc2"), 256, 1024);
        random.layer_norm(&at("final_layer_norm"), 256);
    }
    random.layer_norm("model.decoder.final_layer_norm", 256);
    (random, config)
}

#[test]
fn a_decoder_in_few_bits_is_near_its_f32_and_has_its_gradient() {
    let (int8, int4) = (Quantization::Int8, Quantization::Int4);
    decoder_is_near(None, &[(int8, [0.999, 0.999, 0.994], 0.56), (int4, [0.97, 0.97, 0.9], 0.33)]);
    // An outlier costs the 63 neighbours of its block, which are a quarter of so narrow a row.
    decoder_is_near(Some(20.0), &[(int8, [0.97, 0.97, 0.88], 0.56)]);
}

/// The least cosines of hidden states, logits and gradient, and the largest share of the memory.
fn decoder_is_near(outlier: Option<f32>, expected: &[(Quantization, [f64; 3], f64)]) {
    let (mut random, config) = random_opt(outlier);
    let (_dir, file) = random.store();
    let embeds = random.numbers(24 * 256);
    let run = |quantization| {
        let model =
            LanguageModel::from_safetensors(&config, &file, "", format(quantization)).expect("a model");
        let embeds = Var::from_vec(embeds.clone(), (24, 256), &Device::Cpu).expect("a variable");
        let hidden = model.forward(embeds.as_tensor(), &[10, 14]).expect("hidden states");
        let logits = model.logits(&hidden).expect("logits");
        let gradients = logits.sqr().and_then(|x| x.sum_all()).and_then(|x| x.backward()).expect("gradients");
        let gradient = gradients.get(embeds.as_tensor()).expect("the gradient reaches the input").clone();
        (hidden, logits, gradient, model.n_bytes())
    };
    let (hidden, logits, gradient, n_bytes) = run(None);
    for &(quantization, least, share) in expected {
        let (found_hidden, found_logits, found_gradient, found_bytes) = run(Some(quantization));
        let found = [
            cosine(&hidden, &found_hidden),
            cosine(&logits, &found_logits),
            cosine(&gradient, &found_gradient),
        ];
        assert!(found.iter().zip(&least).all(|(found, least)| found > least), "{quantization:?}: {found:?}");
        // The stored numbers, which f32 products keep, have 16 bits.
        assert!((found_bytes as f64) < share * n_bytes as f64, "{quantization:?}: {found_bytes} {n_bytes}");
    }
}

/// Keys and values are rounded before any query attends to them, so it does not matter how a text was cut.
#[test]
fn a_cache_in_bf16_is_near_the_pass_without_and_the_same_for_every_cut() {
    let (mut random, config) = random_opt(None);
    let (_dir, file) = random.store();
    let embeds = Tensor::from_vec(random.numbers(19 * 256), (19, 256), &Device::Cpu).expect("rows");
    let open = |quantization| {
        LanguageModel::from_safetensors(&config, &file, "", format(quantization)).expect("a model")
    };
    let row_bytes = open(None).new_cache().row_bytes();
    for quantization in [Quantization::Int8, Quantization::Int4] {
        let model = open(Some(quantization));
        assert_eq!(2 * model.new_cache().row_bytes(), row_bytes);
        let cut = |step: usize| {
            let (mut cache, mut text) = (model.new_cache(), [CachedSequence::new()]);
            let parts: Vec<Tensor> = (0..19)
                .step_by(step)
                .map(|start| {
                    let len = step.min(19 - start);
                    let rows = embeds.narrow(0, start, len).expect("rows");
                    model.forward_cached(&rows, &mut cache, &mut text, &[len]).expect("hidden states")
                })
                .collect();
            Tensor::cat(&parts, 0).expect("hidden states")
        };
        let whole = cut(19);
        for step in [1, 3] {
            let (found, expected) = (cut(step), &whole);
            assert_eq!(
                found.to_vec2::<f32>().expect("rows"),
                expected.to_vec2::<f32>().expect("rows"),
                "{step}"
            );
        }
        let cosine = cosine(&whole, &model.forward(&embeds, &[19]).expect("hidden states"));
        assert!((0.999..0.999_999_99).contains(&cosine), "{quantization:?}: {cosine}");
    }
}

#[test]
fn an_encoder_decoder_in_few_bits_is_near_its_f32() {
    let config = json!({
        "model_type": "t5", "vocab_size": 500, "d_model": 256, "d_kv": 64, "d_ff": 640, "num_layers": 3, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false,
    });
    let mut random = Random { outlier: Some(20.0), ..Random::default() };
    random.matrix("shared.weight", 500, 256);
    random.matrix("lm_head.weight", 500, 256);
    for (stack, last) in [("encoder", 1), ("decoder", 2)] {
        for i in 0..3 {
            let at = |layer: usize, name: &str| format!("{stack}.block.{i}.layer.{layer}.{name}");
            for (layer, module) in [(0, "SelfAttention"), (1, "EncDecAttention")].into_iter().take(last) {
                random.norm(&at(layer, "layer_norm"), 256);
                // T5 does not scale the products of queries and keys.
                random.add(&at(layer, &format!("{module}.q.weight")), &[256, 256], 0.01, 0.0);
                for part in ["k", "v", "o"] {
                    random.matrix(&at(layer, &format!("{module}.{part}.weight")), 256, 256);
                }
            }
            random.norm(&at(last, "layer_norm"), 256);
            random.matrix(&at(last, "DenseReluDense.wi_0.weight"), 640, 256);
            random.matrix(&at(last, "DenseReluDense.wi_1.weight"), 640, 256);
            random.matrix(&at(last, "DenseReluDense.wo.weight"), 256, 640);
        }
        let bias = format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        random.add(&bias, &[32, 4], 0.3, 0.0);
        random.norm(&format!("{stack}.final_layer_norm"), 256);
    }
    let (_dir, file) = random.store();
    let embeds = Tensor::from_vec(random.numbers(12 * 256), (12, 256), &Device::Cpu).expect("rows");
    let logits = |quantization| {
        let model =
            LanguageModel::from_safetensors(&config, &file, "", format(quantization)).expect("a model");
        let mut cache = model.new_cache();
        let mut sequences = vec![CachedSequence::new(), CachedSequence::new()];
        let hidden = model.read_prompts(&embeds, &mut cache, &mut sequences, &[5, 7]).expect("hidden states");
        model.logits(&hidden).expect("logits")
    };
    let plain = logits(None);
    for (quantization, least) in [(Quantization::Int8, 0.999), (Quantization::Int4, 0.95)] {
        let cosine = cosine(&plain, &logits(Some(quantization)));
        assert!(cosine > least, "{quantization:?}: {cosine}");
    }
}

/// Blocks of a GGUF file that have as few bits are taken as they are.
#[test]
fn gguf_blocks_are_not_rounded_again() {
    let file = Gguf::open(golden("llama_tiny_q8_0.gguf")).expect("a file");
    let open = |quantization| LanguageModel::from_gguf(&file, format(quantization)).expect("a model");
    let (plain, quantised) = (open(None), open(Some(Quantization::Int8)));
    let ids: Vec<u32> = (0..plain.vocab_size() as u32).collect();
    let embeds = plain.embed(&ids).expect("embeddings");
    assert_eq!(values(&embeds), values(&quantised.embed(&ids).expect("embeddings")));
    let run = |model: &LanguageModel| {
        let embeds = embeds.narrow(0, 0, 8).expect("rows");
        model.forward(&embeds, &[8]).expect("hidden states")
    };
    let cosine = cosine(&run(&plain), &run(&quantised));
    assert!(cosine > 0.999, "{cosine}");
}

/// Keys and values in bf16 are what a prompt that is read whole attends to as well.
#[test]
fn a_prompt_that_is_read_in_parts_gives_the_same_rows() {
    let file = Gguf::open(golden("llama_tiny_q8_0.gguf")).expect("a file");
    for quantization in [None, Some(Quantization::Int8), Some(Quantization::Int4)] {
        let model = LanguageModel::from_gguf(&file, format(quantization)).expect("a model");
        let embeds = model.embed(&(0..40).collect::<Vec<u32>>()).expect("embeddings");
        let read = |parts: &[usize]| {
            let (mut cache, mut text) = (model.new_cache(), [CachedSequence::new()]);
            let mut rows = Vec::new();
            for &len in parts {
                let part = embeds.narrow(0, text[0].len(), len).expect("rows");
                let hidden =
                    model.forward_cached(&part, &mut cache, &mut text, &[len]).expect("hidden states");
                rows.extend(values(&hidden));
            }
            rows
        };
        let whole = read(&[40]);
        for parts in [&[1; 40][..], &[16, 16, 8], &[7, 30, 3], &[39, 1]] {
            assert!(read(parts) == whole, "{quantization:?} in parts of {parts:?} rows");
        }
    }
}

/// Tokens and their log-probabilities.
type Written = (Vec<u32>, Vec<f32>);

/// What a model makes of the golden picture, to the bit: its tokens, and those of a caption with their probabilities.
fn answers(model: &Blip2) -> (Vec<f32>, Option<Written>) {
    let picture = image::open(golden("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture");
    let features = model.encode(&[picture]).expect("features").remove(0);
    let generation = GenerationConfig { num_beams: 3, max_new_tokens: 6, ..GenerationConfig::default() };
    let caption = model.language_model().map(|_| {
        let caption = model.caption(&[&features], &generation).expect("a caption").concat().remove(0);
        (caption.token_ids, caption.log_probs)
    });
    (values(features.tokens()), caption)
}

#[test]
fn a_stored_model_is_the_model_that_was_rounded_at_opening() {
    for family in ["blip2_opt", "blip2_t5", "blip2_itm"] {
        for quantization in BOTH {
            let dir = tempfile::tempdir().expect("a folder");
            let to = dir.path().join("few-bits");
            quantize(golden(family), &to, quantization).expect("quantised");
            assert_eq!(stored_quantization(&to).expect("a model"), Some(quantization));
            assert_eq!(stored_quantization(golden(family)).expect("a model"), None);
            let options = OpenOptions { quantization: Some(quantization), ..OpenOptions::default() };
            let rounded = Blip2::open(golden(family), &options).expect("a model");
            let stored = Blip2::open(&to, &OpenOptions::default()).expect("a model");
            assert_eq!(answers(&stored), answers(&rounded), "{family} {quantization:?}");
            assert_eq!(stored.config().name, family);
            let plain = Blip2::open(golden(family), &OpenOptions::default()).expect("a model");
            assert_ne!(answers(&plain).0, answers(&stored).0, "{family} {quantization:?}");
            // The asked-for number of bits is the one that is there, or it is an error.
            Blip2::open(&to, &options).expect("the same bits");
            let other = BOTH[usize::from(quantization == Quantization::Int8)];
            let error =
                Blip2::open(&to, &OpenOptions { quantization: Some(other), ..OpenOptions::default() });
            assert!(error.expect_err("refused").to_string().contains("open the original"));
            for (from, to, expected) in [
                (to.as_path(), dir.path().join("again"), "already"),
                (&golden(family), to.clone(), "choose another folder"),
            ] {
                let error = quantize(from, &to, quantization).expect_err("refused").to_string();
                assert!(error.contains(expected), "{error}");
            }
        }
    }
}

/// The Q-Former is left as it is unless it is asked for, and then it is near to what it was; also in a model that was stored in few
/// bits, which opens as the one that is rounded now.
#[test]
fn a_qformer_is_rounded_when_asked() {
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let picture = image::open(golden("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture");
    for (quantization, least) in [(Quantization::Int8, 0.999), (Quantization::Int4, 0.97)] {
        let dir = tempfile::tempdir().expect("a folder");
        let stored = dir.path().join("few-bits");
        quantize(golden("blip2_itm"), &stored, quantization).expect("quantised");
        let embed = |folder: &Path, quantization, quantize_qformer| {
            let options = OpenOptions { quantization, quantize_qformer, ..OpenOptions::default() };
            let model = Blip2::open(folder, &options).expect("a model");
            let features = model.encode(std::slice::from_ref(&picture)).expect("features");
            model.embed_images(&[&features[0]]).expect("vectors").concat()
        };
        let original = golden("blip2_itm");
        let large_ones = embed(&original, Some(quantization), false);
        let all = embed(&original, Some(quantization), true);
        let found = cosine(&large_ones, &all);
        assert!(all != large_ones && found > least, "{quantization:?}: {found}");
        assert_eq!(embed(&stored, None, true), all, "{quantization:?}");
        assert_eq!(embed(&original, None, true), embed(&original, None, false));
    }
}

#[test]
fn damaged_panels_are_refused_and_never_read_beyond() {
    let dir = tempfile::tempdir().expect("a folder");
    let to = dir.path().join("few-bits");
    quantize(golden("blip2_opt"), &to, Quantization::Int4).expect("quantised");
    let path = to.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("readable");
    // Any bytes of panels are some numbers.
    let header_len = u64::from_le_bytes(*bytes.first_chunk().expect("a header")) as usize;
    assert!((8 + header_len).is_multiple_of(64), "panels start at a multiple of 64");
    let mut damaged = bytes.clone();
    damaged[8 + header_len..][..4096].fill(0xff);
    std::fs::write(&path, &damaged).expect("written");
    let model = Blip2::open(&to, &OpenOptions::default()).expect("a model");
    let picture = image::open(golden("blip2.png"), &Limits::default(), Pixels::Pillow).expect("a picture");
    let features = model.encode(&[picture]).expect("features").remove(0);
    // Whatever they make of the picture, or an error where that is no number.
    let _ = model.caption(&[&features], &GenerationConfig::default());
    std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("written");
    assert!(Blip2::open(&to, &OpenOptions::default()).is_err());
}
