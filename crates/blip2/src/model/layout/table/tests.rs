//! The number of parameters of every published part, as LAVIS stores it.

use super::*;
use crate::model::random::RandomModel;

/// Parameters under names that `is_counted`; the biases of EVA's keys are no tensor of LAVIS.
fn count(table: &Table, is_counted: impl Fn(&str) -> bool) -> usize {
    let counted = table.entries.iter().filter(|entry| is_counted(&entry.name));
    let n = counted.map(|entry| match &entry.lavis {
        Lavis::Same(_, shape) => shape.iter().product::<usize>(),
        Lavis::QueryValueBias(_) => entry.shape.iter().product::<usize>() / 3 * 2,
    });
    n.sum()
}

/// The sizes of a published model that is known by name.
fn published(name: &str) -> (VitConfig, QFormerConfig, Option<serde_json::Value>) {
    let RandomModel { vit, qformer, language, .. } = RandomModel::named(name).unwrap();
    (vit.unwrap(), qformer, language)
}

#[test]
fn image_encoders_have_their_published_numbers_of_parameters() {
    for (config, n) in [
        (VitConfig::eva_clip_g(224), 985_894_528),
        (VitConfig::eva_clip_g(364), 986_485_888),
        (VitConfig::clip_l(224), 290_581_504),
    ] {
        let table = Table::of_encoder(&config);
        assert_eq!((count(&table, |_| true), config.n_parameters()), (n, n), "{config:?}");
    }
}

/// The whole with ViT-g is what MMPretrain reports of the model for retrieval, whose pictures have 364 pixels.
#[test]
fn stage_1_has_its_published_numbers_of_parameters() {
    let (_, qformer, _) = published("blip2-itm-vit-g");
    for (vision, n_whole, n_trained, n_query_path) in [
        (VitConfig::eva_clip_g(364), 1_173_191_358, 186_705_470, 105_137_664),
        (VitConfig::clip_l(224), 473_747_262, 183_165_758, 101_598_720),
    ] {
        let width = vision.hidden_size;
        let qformer = QFormerConfig { encoder_hidden_size: width, ..qformer.clone() };
        let model = Architecture { vision, qformer: qformer.clone(), head: Head::Matching };
        assert_eq!(count(&Table::of(&model), |_| true), n_whole, "width {width}");
        assert_eq!(count(&Table::without_encoder(&model), |_| true), n_trained, "width {width}");
        let mut query_path = Table::default();
        query_path.qformer(&qformer, false);
        assert_eq!(count(&query_path, |name| name.starts_with("qformer.")), n_query_path, "width {width}");
        // With the queries and the norm of the picture's tokens.
        let with_queries = n_query_path + 32 * 768 + 2 * width;
        assert_eq!(qformer.n_query_parameters(), with_queries, "width {width}");
    }
}

/// OPT's embeddings have 50272 rows; the newer folders of Hugging Face, whose sizes are known by name, have 50304.
#[test]
fn stage_2_has_its_published_numbers_of_parameters() {
    for (name, vocab_size, n_trained, n_language) in [
        ("blip2-opt-2.7b", 50272, 107_133_696, 2_651_596_800),
        ("blip2-opt-6.7b", 50272, 108_314_880, 6_658_473_984),
        ("blip2-flan-t5-xl", 32128, 106_739_968, 2_849_757_184),
        ("blip2-flan-t5-xxl", 32128, 108_314_880, 11_135_332_352),
    ] {
        let (vision, qformer, language) = published(name);
        let mut language = language.unwrap();
        language["vocab_size"] = vocab_size.into();
        let language = Language::of(&language, usize::MAX, |_| true).unwrap();
        let n_projection = (qformer.hidden_size + 1) * language.width;
        assert_eq!(qformer.n_query_parameters() + n_projection, n_trained, "{name}");
        let model = Architecture { vision, qformer, head: Head::Language(language) };
        let table = Table::without_encoder(&model);
        let is_language = |name: &str| name.starts_with("language_model.");
        assert_eq!(count(&table, |name| !is_language(name)), n_trained, "{name}");
        assert_eq!(count(&table, is_language), n_language, "{name}");
    }
}
