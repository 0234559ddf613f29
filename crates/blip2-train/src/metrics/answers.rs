//! When a generated answer is right: the official rule of the VQA challenges, and exact match.

use std::collections::BTreeMap;

/// Which evaluator's handling of the ground truth to follow. Both compare a prediction with every annotator's
/// answer and grant full marks from three agreeing annotators on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VqaRule {
    /// The VQA API: prediction and ground truths are normalised alike, and only when annotators disagree.
    #[default]
    Official,
    /// LAVIS, which the published BLIP-2 numbers come from: the prediction is always fully normalised, the ground
    /// truths only of punctuation, when annotators disagree. So a unanimous "two" is never matched, as the
    /// prediction becomes "2".
    Lavis,
}

/// VQA accuracy of one answer, 0 to 1: the mean over annotators of `min(1, equal answers among the others / 3)`.
///
/// With a single annotator there are no others and the accuracy is 0; such data is for [`answer_matches`]. No
/// annotator at all gives 0.
#[must_use]
pub fn vqa_accuracy(answer: &str, ground_truths: &[impl AsRef<str>], rule: VqaRule) -> f64 {
    let raw = ground_truths.iter().map(AsRef::as_ref);
    let answer = trim(answer);
    let (answer, truths): (String, Vec<String>) = match rule {
        VqaRule::Official => {
            let truths: Vec<String> = raw.map(trim).collect();
            if disagree(&truths) {
                (normalise(&answer), truths.iter().map(|truth| normalise(truth)).collect())
            } else {
                (answer, truths)
            }
        }
        VqaRule::Lavis => {
            let truths: Vec<String> = raw.map(str::to_owned).collect();
            let truths = if disagree(&truths) {
                truths.iter().map(|t| strip_punctuation(t)).collect()
            } else {
                truths
            };
            (normalise(&answer), truths)
        }
    };
    if truths.is_empty() {
        return 0.0;
    }
    let n_equal = truths.iter().filter(|truth| **truth == answer).count();
    let marks = |equal: bool| (to_f64(n_equal - usize::from(equal)) / 3.0).min(1.0);
    truths.iter().map(|truth| marks(*truth == answer)).sum::<f64>() / to_f64(truths.len())
}

/// Whether an answer equals any ground truth after normalising both: the rule for one annotator (GQA, easy-VQA).
#[must_use]
pub fn answer_matches(answer: &str, ground_truths: &[impl AsRef<str>]) -> bool {
    let answer = normalise_answer(answer);
    ground_truths.iter().any(|truth| normalise_answer(truth.as_ref()) == answer)
}

/// The score of one answer, 0 to 1: by the official VQA rule where several people answered, and [equal](answer_matches) or not
/// where one did.
#[must_use]
pub fn answer_score(answer: &str, ground_truths: &[impl AsRef<str>]) -> f64 {
    if ground_truths.len() > 1 {
        return vqa_accuracy(answer, ground_truths, VqaRule::Official);
    }
    f64::from(u8::from(answer_matches(answer, ground_truths)))
}

/// The mean of scores in percent, over all (not a number of none) and for each kind with the number of its scores.
#[must_use]
pub fn percent_by_kind<'a>(
    scores: impl IntoIterator<Item = (&'a str, f64)>,
) -> (f64, BTreeMap<String, (f64, usize)>) {
    let mut kinds: BTreeMap<String, (f64, usize)> = BTreeMap::new();
    for (kind, score) in scores {
        let (sum, n) = kinds.entry(kind.to_owned()).or_default();
        *sum += score;
        *n += 1;
    }
    let (sum, n) = kinds.values().fold((0.0, 0), |(sum, n), (s, m)| (sum + s, n + m));
    kinds.values_mut().for_each(|(sum, n)| *sum *= 100.0 / to_f64(*n));
    (100.0 * sum / to_f64(n), kinds)
}

/// An answer in the official normal form: no punctuation, lower case, number words as digits, no articles,
/// contractions with their apostrophe, single blanks.
#[must_use]
pub fn normalise_answer(answer: &str) -> String {
    normalise(&trim(answer))
}

fn trim(answer: &str) -> String {
    answer.replace(['\n', '\t'], " ").trim().to_owned()
}

fn disagree(truths: &[String]) -> bool {
    truths.iter().any(|truth| *truth != truths[0])
}

fn normalise(text: &str) -> String {
    let text = strip_punctuation(text).to_lowercase();
    let words = text.split_whitespace().map(digit).filter(|word| !matches!(*word, "a" | "an" | "the"));
    words.map(with_apostrophe).collect::<Vec<_>>().join(" ")
}

/// Handled one after the other in this order, each looking at the original text.
const PUNCTUATION: &str = ";/[]\"{}()=+\\_-><@`,?!";

/// The official evaluator passes a flag (`re.UNICODE`, 32) where Python expects the largest number of
/// replacements, so it removes this many full stops.
const MAX_FULL_STOPS: usize = 32;

/// Removes a mark that touches a blank (all marks, when the text has a number with a comma like 1,000) and turns it
/// into a blank otherwise; removes full stops unless a digit follows.
fn strip_punctuation(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let has_digit_comma =
        characters.windows(3).any(|c| c[0].is_numeric() && c[1] == ',' && c[2].is_numeric());
    let touches_blank = |mark: char| characters.windows(2).any(|c| *c == [mark, ' '] || *c == [' ', mark]);
    let mut stripped = String::with_capacity(text.len());
    for &c in &characters {
        if !PUNCTUATION.contains(c) {
            stripped.push(c);
        } else if !has_digit_comma && !touches_blank(c) {
            stripped.push(' ');
        }
    }
    let mut n_removed = 0;
    let mut result = String::with_capacity(stripped.len());
    let mut rest = stripped.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '.' && n_removed < MAX_FULL_STOPS && !rest.peek().is_some_and(|next| next.is_numeric()) {
            n_removed += 1;
        } else {
            result.push(c);
        }
    }
    result
}

fn digit(word: &str) -> &str {
    match word {
        "none" | "zero" => "0",
        "one" => "1",
        "two" => "2",
        "three" => "3",
        "four" => "4",
        "five" => "5",
        "six" => "6",
        "seven" => "7",
        "eight" => "8",
        "nine" => "9",
        "ten" => "10",
        _ => word,
    }
}

fn with_apostrophe(word: &str) -> &str {
    CONTRACTIONS.binary_search_by_key(&word, |entry| entry.0).map_or(word, |i| CONTRACTIONS[i].1)
}

fn to_f64(count: usize) -> f64 {
    count as f64
}

/// Part of the official rule, oddities included ("somebody'd" loses its apostrophe). Sorted by the first column;
/// entries that cannot occur in lower-cased text or change nothing are left out.
#[rustfmt::skip]
const CONTRACTIONS: &[(&str, &str)] = &[
    ("'ow'sat", "'ow's'at"), ("'ows'at", "'ow's'at"), ("aint", "ain't"), ("arent", "aren't"), ("cant", "can't"),
    ("couldn'tve", "couldn't've"), ("couldnt", "couldn't"), ("couldnt've", "couldn't've"), ("couldve", "could've"),
    ("didnt", "didn't"), ("doesnt", "doesn't"), ("dont", "don't"), ("hadn'tve", "hadn't've"), ("hadnt", "hadn't"),
    ("hadnt've", "hadn't've"), ("hasnt", "hasn't"), ("havent", "haven't"), ("he'dve", "he'd've"), ("hed", "he'd"),
    ("hed've", "he'd've"), ("hes", "he's"), ("howd", "how'd"), ("howll", "how'll"), ("hows", "how's"),
    ("isnt", "isn't"), ("it'dve", "it'd've"), ("itd", "it'd"), ("itd've", "it'd've"), ("itll", "it'll"),
    ("maam", "ma'am"), ("mightn'tve", "mightn't've"), ("mightnt", "mightn't"), ("mightnt've", "mightn't've"),
    ("mightve", "might've"), ("mustnt", "mustn't"), ("mustve", "must've"), ("neednt", "needn't"), ("notve", "not've"),
    ("oclock", "o'clock"), ("oughtnt", "oughtn't"), ("ow's'at", "'ow's'at"), ("shant", "shan't"),
    ("she'dve", "she'd've"), ("shed've", "she'd've"), ("shouldn'tve", "shouldn't've"), ("shouldnt", "shouldn't"),
    ("shouldnt've", "shouldn't've"), ("shouldve", "should've"), ("somebody'd", "somebodyd"),
    ("somebody'dve", "somebody'd've"), ("somebodyd've", "somebody'd've"), ("somebodyll", "somebody'll"),
    ("somebodys", "somebody's"), ("someone'dve", "someone'd've"), ("someoned", "someone'd"),
    ("someoned've", "someone'd've"), ("someonell", "someone'll"), ("someones", "someone's"),
    ("something'dve", "something'd've"), ("somethingd", "something'd"), ("somethingd've", "something'd've"),
    ("somethingll", "something'll"), ("thats", "that's"), ("there'dve", "there'd've"), ("thered", "there'd"),
    ("thered've", "there'd've"), ("therere", "there're"), ("theres", "there's"), ("they'dve", "they'd've"),
    ("theyd", "they'd"), ("theyd've", "they'd've"), ("theyll", "they'll"), ("theyre", "they're"),
    ("theyve", "they've"), ("twas", "'twas"), ("wasnt", "wasn't"), ("we'dve", "we'd've"), ("wed've", "we'd've"),
    ("werent", "weren't"), ("weve", "we've"), ("whatll", "what'll"), ("whatre", "what're"), ("whats", "what's"),
    ("whatve", "what've"), ("whens", "when's"), ("whered", "where'd"), ("wheres", "where's"), ("whereve", "where've"),
    ("who'dve", "who'd've"), ("whod", "who'd"), ("whod've", "who'd've"), ("wholl", "who'll"), ("whos", "who's"),
    ("whove", "who've"), ("whyll", "why'll"), ("whyre", "why're"), ("whys", "why's"), ("wont", "won't"),
    ("wouldn'tve", "wouldn't've"), ("wouldnt", "wouldn't"), ("wouldnt've", "wouldn't've"), ("wouldve", "would've"),
    ("y'all'dve", "y'all'd've"), ("y'alld've", "y'all'd've"), ("y'allll", "y'all'll"), ("yall", "y'all"),
    ("yall'd've", "y'all'd've"), ("yall'll", "y'all'll"), ("you'dve", "you'd've"), ("youd", "you'd"),
    ("youd've", "you'd've"), ("youll", "you'll"), ("youre", "you're"), ("youve", "you've"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Golden {
        normalised: Vec<Normalised>,
        annotations: Vec<Annotation>,
    }

    #[derive(Deserialize)]
    struct Normalised {
        text: String,
        punctuation: String,
        all: String,
    }

    #[derive(Deserialize)]
    struct Annotation {
        answer: String,
        truths: Vec<String>,
        /// Percent.
        official: f64,
        /// Percent.
        lavis: f64,
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("../../tests/golden/vqa.json")).expect("golden file")
    }

    #[test]
    fn normal_form_equals_the_official_evaluator() {
        let golden = golden();
        assert!(golden.normalised.len() > 250);
        for case in golden.normalised {
            assert_eq!(strip_punctuation(&case.text), case.punctuation, "of {:?}", case.text);
            assert_eq!(normalise(&case.text), case.all, "of {:?}", case.text);
        }
    }

    #[test]
    fn accuracy_equals_both_evaluators() {
        let golden = golden();
        assert!(golden.annotations.len() > 15);
        for case in golden.annotations {
            for (rule, expected) in [(VqaRule::Official, case.official), (VqaRule::Lavis, case.lavis)] {
                let found = 100.0 * vqa_accuracy(&case.answer, &case.truths, rule);
                // The evaluators round to ten digits after the point.
                assert!(
                    (found - expected).abs() < 1e-9,
                    "{:?} {rule:?}: {found}, not {expected}",
                    case.answer
                );
            }
        }
    }

    #[test]
    fn contractions_are_sorted_for_the_search() {
        assert!(CONTRACTIONS.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn one_annotator_is_matched_exactly_after_normalising() {
        assert!(answer_matches("The Dog.", &["dog"]));
        assert!(answer_matches("2", &["one", "two"]));
        assert!(!answer_matches("dogs", &["dog"]));
        assert!(!answer_matches("dog", &[] as &[&str]));
        assert!(vqa_accuracy("dog", &[] as &[&str], VqaRule::Official).abs() < f64::EPSILON);
    }
}
