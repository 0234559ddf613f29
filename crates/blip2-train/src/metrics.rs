//! What an evaluation measures: captions, answers, recognised names, retrieval.
//!
//! Everything here is a pure function of texts or scores; who generated them is not its business.
//! The caption metrics equal `pycocoevalcap` on the same words, the VQA rule equals the official
//! evaluator, both down to their constants, so scores compare with published ones. One thing does
//! not: published captions were tokenised by the Java `PTBTokenizer`, ours are by [`words`].

mod answers;
mod bleu;
mod cider;
mod ngrams;
mod recognition;
mod retrieval;
mod rouge;

pub use answers::{VqaRule, answer_matches, answer_score, normalise_answer, percent_by_kind, vqa_accuracy};
pub use bleu::{Bleu, bleu};
pub use cider::cider_d;
pub use recognition::names_any;
pub use retrieval::{Candidates, Recall, Rescoring, RetrievalScores, rerank, retrieval};
pub use rouge::rouge_l;

/// The words of a text as all our caption scores see them: lower-cased `[a-z0-9']+`.
#[must_use]
pub fn words(text: &str) -> Vec<String> {
    text.to_lowercase()
        .split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '\''))
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A generated caption beside what people wrote about the same picture, as words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionPair {
    candidate: Vec<String>,
    references: Vec<Vec<String>>,
}

impl CaptionPair {
    /// A pair of texts already split into words.
    ///
    /// # Panics
    /// Without a reference: no caption metric is defined then.
    #[must_use]
    pub fn new(candidate: Vec<String>, references: Vec<Vec<String>>) -> Self {
        assert!(!references.is_empty(), "a caption is scored against at least one reference");
        Self { candidate, references }
    }

    /// A pair of plain texts, split by [`words`].
    ///
    /// # Panics
    /// As [`CaptionPair::new`].
    #[must_use]
    pub fn from_text(candidate: &str, references: &[impl AsRef<str>]) -> Self {
        Self::new(words(candidate), references.iter().map(|text| words(text.as_ref())).collect())
    }
}

/// One metric over a corpus and for each of its items, in the order given.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The mean over items; not a number for an empty corpus.
    pub mean: f64,
    /// One score per item.
    pub each: Vec<f64>,
}

impl Scores {
    fn of(each: Vec<f64>) -> Self {
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        Self { mean, each }
    }
}

/// All caption metrics of a corpus, as usually reported (BLEU and ROUGE-L as fractions, CIDEr-D times 10,
/// so that papers print 100 times these numbers).
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CaptionScores {
    /// BLEU-1 to BLEU-4.
    pub bleu: [f64; 4],
    /// ROUGE-L.
    pub rouge_l: f64,
    /// CIDEr-D.
    pub cider_d: f64,
}

impl CaptionScores {
    /// Scores a corpus. CIDEr-D's document frequencies come from its references.
    #[must_use]
    pub fn of(pairs: &[CaptionPair]) -> Self {
        Self { bleu: bleu(pairs).corpus, rouge_l: rouge_l(pairs).mean, cider_d: cider_d(pairs).mean }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Golden {
        tolerance: f64,
        cases: Vec<Case>,
        corpora: Vec<Corpus>,
    }

    #[derive(Deserialize)]
    struct Case {
        candidate: String,
        references: Vec<String>,
    }

    #[derive(Deserialize)]
    struct Corpus {
        name: String,
        cases: Vec<usize>,
        bleu: [f64; 4],
        rouge_l: f64,
        cider_d: f64,
        bleu_each: Vec<[f64; 4]>,
        rouge_l_each: Vec<f64>,
        cider_d_each: Vec<f64>,
    }

    fn check(what: &str, found: f64, expected: f64, tolerance: f64) {
        let error = (found - expected).abs();
        assert!(error <= tolerance * expected.abs(), "{what}: {found} instead of {expected}");
    }

    #[test]
    fn caption_scores_equal_pycocoevalcap() {
        let golden: Golden =
            serde_json::from_str(include_str!("../tests/golden/captions.json")).expect("golden file");
        assert!(golden.cases.len() >= 60 && golden.corpora.len() >= 4);
        for corpus in &golden.corpora {
            let pairs: Vec<_> = corpus
                .cases
                .iter()
                .map(|&i| CaptionPair::from_text(&golden.cases[i].candidate, &golden.cases[i].references))
                .collect();
            let check = |what: &str, found, expected| {
                check(&format!("{} of {:?}", what, corpus.name), found, expected, golden.tolerance);
            };
            let (bleu, rouge, cider) = (bleu(&pairs), rouge_l(&pairs), cider_d(&pairs));
            for n in 0..4 {
                check("BLEU", bleu.corpus[n], corpus.bleu[n]);
            }
            check("ROUGE-L", rouge.mean, corpus.rouge_l);
            check("CIDEr-D", cider.mean, corpus.cider_d);
            for (i, &case) in corpus.cases.iter().enumerate() {
                for n in 0..4 {
                    check(&format!("BLEU-{} of case {case}", n + 1), bleu.each[i][n], corpus.bleu_each[i][n]);
                }
                check(&format!("ROUGE-L of case {case}"), rouge.each[i], corpus.rouge_l_each[i]);
                check(&format!("CIDEr-D of case {case}"), cider.each[i], corpus.cider_d_each[i]);
            }
            let all = CaptionScores::of(&pairs);
            assert_eq!((all.bleu, all.rouge_l, all.cider_d), (bleu.corpus, rouge.mean, cider.mean));
        }
    }

    /// One human caption of each photo against the other four, as a scale for what a model reaches.
    #[test]
    fn human_captions_of_flickr8k_score_as_in_pycocoevalcap() {
        #[derive(Deserialize)]
        struct Photo {
            captions: Vec<String>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/flickr8k/dev.jsonl");
        let Ok(rows) = std::fs::read_to_string(path) else {
            println!("SKIPPED: {path} is absent");
            return;
        };
        let photos: Vec<Photo> = rows.lines().map(|row| serde_json::from_str(row).expect("a row")).collect();
        let pairs: Vec<_> =
            photos.iter().map(|p| CaptionPair::from_text(&p.captions[0], &p.captions[1..])).collect();
        let scores = CaptionScores::of(&pairs);
        // pycocoevalcap 1.2 on the same words.
        let expected = [0.6283162595218782, 0.444161691947586, 0.30753589506624435, 0.2117379952234458];
        for (found, expected) in scores.bleu.into_iter().zip(expected) {
            check("BLEU", found, expected, 1e-9);
        }
        check("ROUGE-L", scores.rouge_l, 0.4919050983382492, 1e-9);
        check("CIDEr-D", scores.cider_d, 0.8081522137052262, 1e-9);
    }

    #[test]
    fn words_are_lower_case_runs_of_letters_digits_and_apostrophes() {
        assert_eq!(
            words("A man's DOG, on-top of 2 (two) rocks ."),
            ["a", "man's", "dog", "on", "top", "of", "2", "two", "rocks"]
        );
        assert_eq!(words("Café\tcrème\n"), ["caf", "cr", "me"]);
        assert!(words(" .,!? ").is_empty());
    }

    #[test]
    fn an_empty_corpus_has_no_mean() {
        let scores = CaptionScores::of(&[]);
        assert!(scores.rouge_l.is_nan() && scores.cider_d.is_nan());
    }
}
