//! Measuring a tiny random model in a Hugging Face folder (`tools/golden_blip2.py` of the library makes it).

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use blip2::image::{Limits, Pixels, RgbImage};
use blip2::model::{Blip2, OpenOptions};
use blip2_train::data::Row;
use blip2_train::evaluation::{RetrievalConfig, RetrievalReport, TestSet, retrieve};
use blip2_train::metrics::{Rescoring, RetrievalScores, retrieval};

const N_IMAGES: usize = 12;
const N_TEXTS: usize = 2 * N_IMAGES;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

fn matcher() -> Blip2 {
    Blip2::open(golden("blip2_itm"), &OpenOptions::default()).expect("a model")
}

/// Texts that differ, of the model's few words.
fn caption(text: usize) -> String {
    const WORDS: [&str; 9] = ["a", "cat", "dog", "on", "the", "sofa", "red", "two", "running"];
    let words = [text, text / 9 + 3 * text + 1, 5 * text + 2].map(|word| WORDS[word % WORDS.len()]);
    words.join(" ")
}

/// Pictures that differ, with two captions each.
fn manifest() -> (tempfile::TempDir, Vec<Row>) {
    let dir = tempfile::tempdir().expect("a folder");
    let rows = (0..N_IMAGES).map(|i| {
        let row = Row {
            image: format!("{i}.png"),
            captions: Some(vec![caption(2 * i), caption(2 * i + 1)]),
            ..Row::default()
        };
        let n = i as u32;
        let value = |x: u32, y: u32| [x * (n + 1) * 7, y * (3 * n + 2) * 5, 20 * n].map(|value| value as u8);
        let picture = RgbImage::from_fn(24, 18, |x, y| value(x, y).into());
        std::fs::write(dir.path().join(&row.image), blip2::image::png(&picture)).expect("written");
        row
    });
    let rows = rows.collect();
    (dir, rows)
}

/// The definition: every pair goes through the model by itself. Similarities and matching logits, `[N_IMAGES, N_TEXTS]`.
fn all_pairs(model: &Blip2, base: &Path, rows: &[Row]) -> [Vec<f32>; 2] {
    let (mut similarities, mut logits) = (Vec::new(), Vec::new());
    for row in rows {
        let picture = blip2::image::open(base.join(&row.image), &Limits::default(), Pixels::AsSeen);
        let features = model.encode(&[picture.expect("a picture")]).expect("features").remove(0);
        for text in (0..N_TEXTS).map(caption) {
            similarities.push(model.match_texts(&features, &[&text]).expect("a score")[0].itc_similarity);
            logits.push(model.itm_logits(&features, &[&text]).expect("logits")[0][1]);
        }
    }
    [similarities, logits]
}

fn report(model: &Blip2, base: &Path, rows: &[Row], config: RetrievalConfig) -> RetrievalReport {
    let test_set = TestSet { rows, base, pixels: Pixels::AsSeen };
    retrieve(model, test_set, config, &mut |_, _| {}).expect("scores")
}

fn config(rescoring: Option<Rescoring>, n_candidates: usize) -> RetrievalConfig {
    let n_candidates = NonZeroUsize::new(n_candidates).expect("some");
    RetrievalConfig { all_captions: true, rescoring, n_candidates }
}

/// LAVIS orders candidates by the sum, the paper's text by the matching head alone.
#[test]
fn candidates_are_ordered_by_what_was_asked_for() {
    let (dir, rows) = manifest();
    let model = matcher();
    let [similarities, logits] = all_pairs(&model, dir.path(), &rows);
    let sums: Vec<f32> = similarities.iter().zip(&logits).map(|(cosine, logit)| cosine + logit).collect();
    let image_of_text: Vec<usize> = (0..N_TEXTS).map(|text| text / 2).collect();
    let scores = |of: &[f32]| -> RetrievalScores { retrieval(of, N_IMAGES, &image_of_text) };
    let all = |rescoring| report(&model, dir.path(), &rows, config(rescoring, N_TEXTS));
    assert_eq!(all(None).itc, scores(&similarities));
    assert_eq!(all(None).reranked, None);
    assert_eq!(all(Some(Rescoring::ItmPlusItc)).reranked, Some(scores(&sums)));
    assert_eq!(all(Some(Rescoring::Itm)).reranked, Some(scores(&logits)));
    // The model tells the three apart.
    assert_ne!(scores(&sums), scores(&logits));
    assert_ne!(scores(&sums), scores(&similarities));
    // What is no candidate is not found.
    let few = report(&model, dir.path(), &rows, config(Some(Rescoring::Itm), 3));
    let few = few.reranked.expect("scores");
    assert_eq!(few.text.at_5, few.text.at_10);
    assert!(few.text.at_10 < scores(&logits).text.at_10, "{few:?}");
}
