//! Times one stage-1 training step of the default model's Q-Former on made-up data, to compare with
//! `bench/train_step.py`: batch 64, 49 picture tokens of width 1280, texts of 8 to 24 tokens.
//! `cargo run --release -p blip2-train --example train_step`

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints")]

use std::time::Instant;

use blip2::config::QFormerConfig;
use blip2::layers::{Loader, Precision, Trainable};
use blip2::qformer::QFormer;
use blip2_train::initialize::{Tensors, from_bert};
use blip2_train::optimizer::{Optimizer, OptimizerConfig};
use blip2_train::random::Random;
use blip2_train::stage1::{Batch, StepOptions, gradients};
use candle_core::{Device, Tensor};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const N_PAIRS: usize = 64;
const N_STEPS: u64 = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = QFormerConfig {
        vocab_size: 30_523,
        hidden_size: 384,
        num_hidden_layers: 6,
        num_attention_heads: 12,
        intermediate_size: 1536,
        max_position_embeddings: 512,
        layer_norm_eps: 1e-12,
        cross_attention_frequency: 2,
        encoder_hidden_size: 1280,
        num_query_tokens: 32,
        image_text_hidden_size: 256,
        vision_layer_norm_eps: 1e-5,
    };
    let tensors = from_bert(&config, &random_bert(&config), 1)?;
    let mut random = Random::new(&[2]);
    let image: Vec<f32> = (0..N_PAIRS * 49 * 1280).map(|_| random.unit() as f32).collect();
    let batch = Batch {
        image_embeds: Tensor::from_vec(image, (N_PAIRS * 49, 1280), &Device::Cpu)?,
        image_ids: (0..N_PAIRS as u64).collect(),
        texts: (0..N_PAIRS)
            .map(|_| {
                // Mostly short, a few long: 14 tokens on average, as captions are.
                let length = 8 + (random.unit().powi(2) * 17.0) as usize;
                (0..length).map(|_| 1000 + random.below(29_000) as u32).collect()
            })
            .collect(),
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let trainable = Trainable::default();
        let qformer = QFormer::load(&config, &Loader::trainable(&tensors, &trainable, precision), true)?;
        let variables = trainable.into_variables();
        let mut optimizer = Optimizer::new(OptimizerConfig::default(), &variables);
        let mut times = Vec::new();
        for step in 0..N_STEPS {
            let start = Instant::now();
            let options =
                StepOptions { micro_batch: N_PAIRS, dropout: 0.1, seed: 3, step, decoder_start: 30_522 };
            let (gradients, values) = gradients(&qformer, &variables, &batch, options)?;
            let computed = start.elapsed().as_secs_f64();
            optimizer.step(&variables, &gradients, 3e-4)?;
            times.push(start.elapsed().as_secs_f64());
            eprintln!("{precision:?} step {step}: loss {:.3}, {computed:.2} s + update", values.loss());
        }
        times.sort_by(f64::total_cmp);
        println!("{{\"precision\": \"{precision:?}\", \"median_seconds\": {:.3}}}", times[times.len() / 2]);
    }
    Ok(())
}

/// A BERT checkpoint of the right sizes with random weights.
fn random_bert(config: &QFormerConfig) -> Tensors {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let mut random = Random::new(&[1]);
    let mut out = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let n = shape.iter().product();
        let centre = f32::from(u8::from(name.ends_with("LayerNorm.weight")));
        let data = (0..n).map(|_| centre + (random.normal() * 0.02) as f32).collect();
        out.insert(name, (shape.to_vec(), data));
    };
    add("embeddings.word_embeddings.weight".into(), &[config.vocab_size - 1, width]);
    add("embeddings.position_embeddings.weight".into(), &[config.max_position_embeddings, width]);
    let mut norms = vec!["embeddings.LayerNorm".to_owned()];
    for i in 0..config.num_hidden_layers {
        let layer = format!("encoder.layer.{i}");
        let square =
            ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"];
        let matrices = square.map(|name| (name, width, width));
        for (name, n_out, n_in) in
            matrices.into_iter().chain([("intermediate.dense", inner, width), ("output.dense", width, inner)])
        {
            add(format!("{layer}.{name}.weight"), &[n_out, n_in]);
            add(format!("{layer}.{name}.bias"), &[n_out]);
        }
        norms.push(format!("{layer}.attention.output.LayerNorm"));
        norms.push(format!("{layer}.output.LayerNorm"));
    }
    for norm in norms {
        add(format!("{norm}.weight"), &[width]);
        add(format!("{norm}.bias"), &[width]);
    }
    out
}
