//! The vision transformers against transformers' own, on tiny random models (`tools/golden_vit.py`).

#[path = "support/golden.rs"]
mod golden;

use blip2::layers::{Loader, Precision};
use blip2::vision::vit::{AlignCorners, Vit, VitConfig};
use golden::Golden;
use serde::Deserialize;

#[derive(Deserialize)]
struct Sizes {
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_hidden_layers: usize,
    image_size: usize,
    patch_size: usize,
}

fn open() -> Golden {
    Golden::parse("vit_tiny", include_bytes!("golden/vit_tiny.safetensors"))
}

/// The tiny EVA or CLIP of the file, with so many blocks.
fn load(golden: &Golden, name: &str, num_hidden_layers: usize) -> Vit {
    let sizes: Sizes = golden.metadata("sizes");
    let family = if name == "eva" { VitConfig::eva_clip_g(224) } else { VitConfig::clip_l(224) };
    let config = VitConfig {
        hidden_size: sizes.hidden_size,
        intermediate_size: sizes.intermediate_size,
        num_attention_heads: sizes.num_attention_heads,
        num_hidden_layers,
        image_size: sizes.image_size,
        patch_size: sizes.patch_size,
        ..family
    };
    let loader = Loader::frozen(golden, Precision::F32).at(name);
    Vit::load(config, &loader, AlignCorners::No).expect("a vision transformer")
}

#[test]
fn every_block_agrees() {
    let golden = open();
    let sizes: Sizes = golden.metadata("sizes");
    let (_, pixels) = &golden.tensors["in.pixels"];
    let mut comparison = golden.comparison();
    for name in ["eva", "clip"] {
        for i in 0..sizes.num_hidden_layers {
            let tokens = load(&golden, name, i + 1).forward(pixels).expect("tokens");
            comparison.tensor(&format!("{name}.out.{i}"), &tokens);
        }
    }
    comparison.finish(2 * sizes.num_hidden_layers);
}

#[test]
fn a_batch_equals_its_pictures() {
    let golden = open();
    let (_, pixels) = &golden.tensors["in.pixels"];
    let vit = load(&golden, "clip", 3);
    let rows = |pixels: &[f32]| vit.forward(pixels).expect("tokens").to_vec2::<f32>().expect("rows");
    let singles: Vec<_> = pixels.chunks(pixels.len() / 2).flat_map(rows).collect();
    assert_eq!(rows(pixels), singles);
    assert!(vit.forward(&pixels[1..]).is_err() && vit.forward(&[]).is_err());
}

#[test]
fn position_embeddings_of_another_size_are_resized() {
    let golden = open();
    let sizes: Sizes = golden.metadata("sizes");
    let (_, pixels) = &golden.tensors["in.pixels"];
    let mut config = load(&golden, "eva", 1).config().clone();
    let loader = Loader::frozen(&golden, Precision::F32).at("eva");
    config.image_size = 5 * sizes.patch_size;
    let larger = Vit::load(config.clone(), &loader, AlignCorners::No).expect("a vision transformer");
    assert_eq!((config.n_tokens(), larger.config().grid()), (26, 5));
    let n = config.image_size * config.image_size * 3;
    let picture: Vec<f32> = pixels.iter().copied().cycle().take(n).collect();
    assert_eq!(larger.forward(&picture).expect("tokens").dims(), [26, sizes.hidden_size]);
    let corners = Vit::load(config, &loader, AlignCorners::Yes).expect("a vision transformer");
    let difference = (larger.forward(&picture).expect("tokens") - corners.forward(&picture).expect("tokens"))
        .and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>())
        .expect("a number");
    assert!(difference > 1e-4, "the conventions differ");
}

#[test]
fn wrong_sizes_are_named() {
    let golden = open();
    let loader = Loader::frozen(&golden, Precision::F32).at("eva");
    let good = load(&golden, "eva", 1).config().clone();
    let refused = |change: &dyn Fn(&mut VitConfig)| {
        let mut config = good.clone();
        change(&mut config);
        Vit::load(config, &loader, AlignCorners::No).expect_err("refused").to_string()
    };
    assert!(refused(&|c| c.num_attention_heads = 5).contains("vision.hidden_size"));
    assert!(refused(&|c| c.patch_size = 200).contains("vision.patch_size"));
    assert!(refused(&|c| c.num_hidden_layers = 9).contains("encoder.layers.3."));
    assert!(refused(&|c| c.intermediate_size = 41).contains("mlp.fc1"));
    assert!(refused(&|c| c.pre_norm = true).contains("pre_layernorm"));
}
