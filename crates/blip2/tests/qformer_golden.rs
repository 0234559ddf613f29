//! The Q-Former against an independent PyTorch implementation: every layer's rows in every attention mode
//! (`tools/golden_qformer.py`).

#[path = "support/golden.rs"]
mod golden;

use blip2::config::QFormerConfig;
use blip2::layers::{DropoutRng, Loader, Precision, Trainable};
use blip2::qformer::{QFormer, TextBatch, TextSide};
use candle_core::Tensor;
use golden::{Comparison, Golden};

fn open() -> Golden {
    Golden::parse("qformer_tiny", include_bytes!("golden/qformer_tiny.safetensors"))
}

/// The results of one model in all modes, packed as in the golden file.
struct Modes {
    queries: Tensor,
    text: Tensor,
    pairs: Tensor,
    causal: Tensor,
}

fn run(golden: &Golden, qformer: &QFormer) -> blip2::Result<Modes> {
    let texts: Vec<Vec<u32>> = golden.lists("in.text_ids", "in.text_lengths");
    let dec: u32 = golden.metadata("dec_token_id");
    let to_generate = texts.iter().cloned().map(|mut ids| {
        ids[0] = dec;
        ids
    });
    let (to_generate, texts) = (TextBatch::new(to_generate), TextBatch::new(&texts));
    let images: Vec<usize> = (0..texts.len()).collect();
    let off = &mut DropoutRng::off();

    let image = qformer.image_keys(&golden.rows("in.image_embeds"), images.len())?;
    let (queries, keys) = qformer.encode_queries(&image, off)?;
    let text = qformer.encode_text(&texts, off)?;
    let (pair_queries, pair_texts) = qformer.encode_pairs(&image, &images, &texts, off)?;
    let pairs = Tensor::cat(&[pair_queries, pair_texts], 0)?;
    let causal = qformer.decode_text(&keys, &to_generate, off)?;
    Ok(Modes { queries, text, pairs, causal })
}

fn compare_modes(comparison: &mut Comparison<'_>, layer: &str, modes: &Modes) {
    comparison.tensor(&format!("queries.{layer}"), &modes.queries);
    comparison.tensor(&format!("text.{layer}"), &modes.text);
    comparison.tensor(&format!("pairs.{layer}"), &modes.pairs);
    comparison.tensor(&format!("causal.{layer}"), &modes.causal);
}

fn compare_heads(
    comparison: &mut Comparison<'_>,
    golden: &Golden,
    qformer: &QFormer,
    modes: &Modes,
) -> blip2::Result<()> {
    let texts = TextBatch::new(golden.lists::<u32>("in.text_ids", "in.text_lengths"));
    let n_query_rows = texts.len() * qformer.config().num_query_tokens;
    comparison.tensor("out.image_features", &qformer.project_image(&modes.queries)?);
    comparison.tensor("out.text_features", &qformer.project_text(&modes.text, &texts)?);
    comparison.tensor("out.match_logits", &qformer.match_logits(&modes.pairs.narrow(0, 0, n_query_rows)?)?);
    let (rows, vocabulary) = qformer.language_head(&modes.causal)?;
    comparison.tensor("out.language_logits", &vocabulary.forward(&rows)?);
    Ok(())
}

/// A model cut after its n-th layer gives that layer's rows.
fn every_layer_agrees(load: impl Fn(&Golden, &QFormerConfig) -> blip2::Result<QFormer>) {
    let golden = open();
    let full: QFormerConfig = golden.metadata("config");
    let mut comparison = golden.comparison();
    for n_layers in 1..=full.num_hidden_layers {
        let config = QFormerConfig { num_hidden_layers: n_layers, ..full.clone() };
        let qformer = load(&golden, &config).expect("a model");
        let modes = run(&golden, &qformer).expect("rows");
        compare_modes(&mut comparison, &format!("layer_{:02}", n_layers - 1), &modes);
        if n_layers == full.num_hidden_layers {
            compare_heads(&mut comparison, &golden, &qformer, &modes).expect("heads");
        }
    }
    comparison.finish(4 * full.num_hidden_layers + 4);
}

#[test]
fn frozen_model_agrees_in_every_layer_and_mode() {
    every_layer_agrees(|golden, config| {
        QFormer::load(config, &Loader::frozen(golden, Precision::F32), TextSide::Whole)
    });
}

#[test]
fn trainable_model_agrees_in_every_layer_and_mode() {
    every_layer_agrees(|golden, config| {
        QFormer::load(
            config,
            &Loader::trainable(golden, &Trainable::default(), Precision::F32),
            TextSide::Whole,
        )
    });
}

#[test]
fn query_path_alone_needs_no_text_weights() {
    let mut golden = open();
    let is_text = |name: &str| {
        let stage1_head = ["text_projection", "vision_projection", "itm_head", "cls", "temp"];
        let text_layer = [".intermediate.", ".output.dense", ".output.LayerNorm"];
        let in_layer = name.split("encoder.layer.").nth(1).map(|rest| &rest[1..]);
        stage1_head.iter().any(|part| name.starts_with(part))
            || name.contains(".embeddings.")
            || in_layer.is_some_and(|name| text_layer.iter().any(|part| name.starts_with(part)))
    };
    let names: Vec<String> = golden.tensors.keys().filter(|name| is_text(name)).cloned().collect();
    assert_eq!(names.len(), 32, "{names:#?}");
    for name in names {
        golden.tensors.remove(&name);
    }
    let config: QFormerConfig = golden.metadata("config");
    let n_images = golden.integers::<u64>("in.image_ids").len();
    let qformer =
        QFormer::load(&config, &Loader::frozen(&golden, Precision::F32), TextSide::None).expect("a model");
    let image = qformer.image_keys(&golden.rows("in.image_embeds"), n_images).expect("keys");
    let (queries, _) = qformer.encode_queries(&image, &mut DropoutRng::off()).expect("rows");
    let mut comparison = golden.comparison();
    comparison.tensor(&format!("queries.layer_{:02}", config.num_hidden_layers - 1), &queries);
    comparison.finish(1);
}
