//! The Q-Former against an independent PyTorch implementation: every layer's rows in every attention mode
//! (`tools/golden_qformer.py`).

#[path = "support/golden.rs"]
mod golden;

use std::collections::BTreeMap;

use blip2::layers::{DropoutRng, Loader, Precision, Trainable};
use blip2::model::{Blip2, ImageFeatures, ModelConfig, OpenOptions, Stage1Config, VisionConfig};
use blip2::qformer::{QFormer, QFormerConfig, TextBatch, TextSide};
use blip2::weights::int8::{Storage, write_trained};
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

/// A model of the golden weights, to which a token's number is its word.
fn model(golden: &Golden, texts: &[Vec<u32>]) -> Blip2 {
    let dir = tempfile::tempdir().expect("a folder");
    let qformer: QFormerConfig = golden.metadata("config");
    let trainable = Trainable::default();
    let loader = Loader::trainable(golden, &trainable, Precision::F32);
    QFormer::load(&qformer, &loader, TextSide::Whole).expect("a Q-Former");
    let names = trainable.into_variables().into_keys();
    let tensors: BTreeMap<_, _> = names.map(|name| (name.clone(), golden.tensors[&name].clone())).collect();
    write_trained(dir.path(), "stage1", &tensors, Storage::F32, usize::MAX).expect("written");
    let n_pieces: u32 = golden.metadata("dec_token_id");
    let mut pieces: Vec<String> = (0..n_pieces).map(|id| id.to_string()).collect();
    let unused = (3..).find(|id| texts.iter().all(|text| !text.contains(id))).expect("a number") as usize;
    let (first, last) = (texts[0][0] as usize, texts[0][texts[0].len() - 1] as usize);
    for (id, mark) in [(0, "[PAD]"), (first, "[CLS]"), (last, "[SEP]"), (unused, "[UNK]")] {
        pieces[id] = mark.into();
    }
    std::fs::write(dir.path().join("vocab.txt"), pieces.join("\n")).expect("written");
    let config = ModelConfig {
        name: "golden".into(),
        vision: VisionConfig::EfficientnetLite0 { file: "absent.pth".into(), sha256: None, image_size: None },
        qformer,
        stage1: Some(Stage1Config {
            weights: vec!["stage1.safetensors".into()],
            vocabulary: "vocab.txt".into(),
        }),
        stage2: None,
    };
    let config = serde_json::to_string(&config).expect("JSON");
    std::fs::write(dir.path().join("config.json"), config).expect("written");
    let options = OpenOptions { vision: false, ..OpenOptions::default() };
    Blip2::open(dir.path(), &options).expect("a model")
}

/// The features that the whole model gives of texts, and of pictures with texts, are the last rows of those passes.
#[test]
fn the_models_raw_features_are_the_rows_of_its_passes() {
    let golden = open();
    let ids: Vec<Vec<u32>> = golden.lists("in.text_ids", "in.text_lengths");
    let model = model(&golden, &ids);
    let words = |ids: &Vec<u32>| ids[1..ids.len() - 1].iter().map(u32::to_string).collect::<Vec<_>>();
    let texts: Vec<String> = ids.iter().map(|ids| words(ids).join(" ")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    assert_eq!(model.n_matcher_tokens(&texts).expect("tokens"), golden.integers::<usize>("in.text_lengths"));

    let tokens = golden.rows("in.image_embeds").to_vec2::<f32>().expect("rows");
    let (n_tokens, width) = (tokens.len() / texts.len(), tokens[0].len());
    let features: Vec<ImageFeatures> = tokens
        .chunks_exact(n_tokens)
        .map(|tokens| ImageFeatures::from_rows(tokens.concat(), width).expect("whole tokens"))
        .collect();

    let last = format!("layer_{:02}", model.config().qformer.num_hidden_layers - 1);
    let mut comparison = golden.comparison();
    let of_texts = model.text_features(&texts).expect("rows");
    comparison.tensor(&format!("text.{last}"), &Tensor::cat(&of_texts, 0).expect("rows"));
    let pairs = features.iter().zip(&texts);
    let mut rows: Vec<Tensor> = pairs
        .map(|(features, text)| model.multimodal_features(features, &[text]).expect("rows"))
        .map(|queries| queries.squeeze(0).expect("of one text"))
        .collect();
    // The file has the texts' rows of this pass behind those of all queries.
    let expected = golden.rows(&format!("pairs.{last}"));
    let n_queries = texts.len() * model.config().qformer.num_query_tokens;
    rows.push(expected.narrow(0, n_queries, expected.dim(0).expect("rows") - n_queries).expect("rows"));
    comparison.tensor(&format!("pairs.{last}"), &Tensor::cat(&rows, 0).expect("rows"));
    comparison.finish(2);

    // All texts with one picture are each text with it.
    let together = model.multimodal_features(&features[1], &texts).expect("rows");
    for (i, text) in texts.iter().enumerate() {
        let alone = model.multimodal_features(&features[1], &[text]).expect("rows");
        let values = |rows: Tensor| rows.to_vec2::<f32>().expect("numbers");
        assert_eq!(values(together.get(i).expect("a text")), values(alone.get(0).expect("the text")));
    }
    assert!(model.text_features(&[]).expect("nothing").is_empty());
    assert!(model.multimodal_features(&features[0], &[]).is_err());
}
