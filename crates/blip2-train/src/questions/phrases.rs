//! The little grammar that the rules need: words of a caption, what stands before a noun or a verb.

use std::collections::BTreeSet;

use super::lexicon::{BOUNDARIES, COLORS, DETERMINERS, MODIFIERS, NUMBERS, PEOPLE, SUBJECTS};

/// A caption as lower-case words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sentence {
    pub(super) words: Vec<String>,
}

/// Who does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Subject {
    pub(super) name: &'static str,
    pub(super) is_single: bool,
}

/// Splits a caption into lower-case words; a comma becomes a word of its own, other punctuation is dropped.
pub(super) fn tokenize(caption: &str) -> Sentence {
    let mut words = Vec::new();
    let mut word = String::new();
    for c in caption.chars().chain([' ']) {
        if c.is_alphanumeric() || c == '\'' {
            word.extend(c.to_lowercase());
            continue;
        }
        if !word.is_empty() {
            // American spelling, so that captions agree.
            words.push(if word == "grey" { "gray".to_owned() } else { std::mem::take(&mut word) });
            word.clear();
        }
        if c == ',' {
            words.push(",".to_owned());
        }
    }
    // A mountain bike is no mountain.
    let is_bike = |words: &[String]| words[0] == "mountain" && words[1].starts_with("bik");
    for at in (1..words.len()).rev() {
        if is_bike(&words[at - 1..=at]) {
            words.remove(at - 1);
        }
    }
    Sentence { words }
}

impl Sentence {
    /// Where a word is.
    pub(super) fn positions(&self, word: &str) -> Vec<usize> {
        (0..self.words.len()).filter(|&at| self.words[at] == word).collect()
    }

    /// Whether any of these words is in it.
    pub(super) fn has_any(&self, words: &[&str]) -> bool {
        self.words.iter().any(|word| words.contains(&word.as_str()))
    }

    fn word(&self, at: usize) -> &str {
        self.words.get(at).map_or("", String::as_str)
    }

    /// Whether the noun at `at` only describes the next word ("dog house").
    pub(super) fn is_modifier(&self, at: usize) -> bool {
        !BOUNDARIES.contains(&self.word(at + 1)) && !looks_like_a_verb(self.word(at + 1))
    }

    /// Whether "one of", "a second" and the like stand before the noun's phrase.
    pub(super) fn is_one_of_many(&self, at: usize) -> bool {
        let begin = self.phrase_begin(at);
        begin > 0 && ["one", "second", "other", "another", "each", "every"].contains(&self.word(begin - 1))
    }

    /// The colours in the phrase before the noun at `at`; empty when "and" joins anything but colours.
    pub(super) fn colors_before(&self, at: usize) -> BTreeSet<&'static str> {
        (self.phrase_begin(at)..at)
            .filter_map(|i| COLORS.iter().find(|color| **color == self.words[i]).copied())
            .collect()
    }

    /// A number before the noun at `at`, with at most adjectives and colours between.
    pub(super) fn number_before(&self, at: usize) -> Option<&'static str> {
        let begin = self.phrase_begin(at);
        let before = self.word(begin.checked_sub(1)?);
        let digits = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"];
        let of_digits = digits.iter().position(|d| *d == before);
        let index = NUMBERS.iter().position(|number| *number == before).or(of_digits)?;
        Some(NUMBERS[index]).filter(|_| index > 0)
    }

    /// Where the adjectives and colours that belong to the noun at `at` begin.
    fn phrase_begin(&self, at: usize) -> usize {
        let is_color = |word: &str| COLORS.contains(&word);
        let mut begin = at;
        while begin > 0 {
            let word = self.word(begin - 1);
            let joins_colors = (word == "and" || word == ",")
                && begin >= 2
                && is_color(self.word(begin - 2))
                && is_color(self.word(begin));
            if !(is_color(word) || MODIFIERS.contains(&word) || joins_colors) {
                break;
            }
            begin -= 1;
        }
        begin
    }

    /// Who does what the verb at `at` says: the nearest subject before it, when nothing that could be another subject
    /// or the beginning of another clause stands between.
    pub(super) fn subject_before(&self, at: usize) -> Option<Subject> {
        for i in (0..at).rev() {
            let word = self.word(i);
            if let Some((name, is_single)) = SUBJECTS.iter().find_map(|(single, plural)| {
                if word == *single {
                    Some((*single, true))
                } else {
                    (word == *plural).then_some((*plural, false))
                }
            }) {
                // "a man and a dog run": both do.
                let joined = (0..i).rev().take(4).any(|j| self.word(j) == "and" && !self.joins_colors(j));
                return (!joined).then_some(Subject { name, is_single });
            }
            if PEOPLE.contains(&word)
                || ["and", "while", "as", "with", "of", ","].contains(&word) && !self.joins_colors(i)
            {
                return None;
            }
        }
        None
    }

    fn joins_colors(&self, at: usize) -> bool {
        at > 0 && COLORS.contains(&self.word(at - 1)) && COLORS.contains(&self.word(at + 1))
    }
}

fn looks_like_a_verb(word: &str) -> bool {
    word.ends_with("ing") || word.ends_with("ed") || word.ends_with('s') || word == "run" || word == "jump"
}

/// The noun of the phrase that begins at `at` ("a mountain bike through" → "bike"); `None` when it is not plain.
pub(super) fn head_noun(sentence: &Sentence, at: usize) -> Option<String> {
    let rest = sentence.words.get(at..)?;
    let determined = rest.first().is_some_and(|word| DETERMINERS.contains(&word.as_str()));
    let phrase: Vec<&str> = rest[usize::from(determined)..]
        .iter()
        .map(String::as_str)
        .take_while(|word| !BOUNDARIES.contains(word) || (COLORS.contains(word)))
        .filter(|word| !COLORS.contains(word) && !MODIFIERS.contains(word))
        .collect();
    // "wearing a red and": what follows is not known.
    let &last = phrase.last()?;
    let plain = phrase.len() <= 2 && last.len() > 2 && last.chars().all(char::is_alphabetic);
    let vague = [
        "something",
        "object",
        "item",
        "thing",
        "things",
        "objects",
        "hand",
        "hands",
        "him",
        "her",
        "them",
        "it",
    ]
    .contains(&last);
    let is_verb =
        last.ends_with("ing") && !["ring", "string", "swing", "railing", "clothing"].contains(&last);
    (determined && plain && !vague && !is_verb).then(|| same_thing(last).to_owned())
}

/// One name for what captions call by several.
fn same_thing(noun: &str) -> &str {
    match noun {
        "bicycle" => "bike",
        "motorbike" => "motorcycle",
        "surf" => "wave",
        "branch" | "twig" => "stick",
        "pup" | "puppy" => "dog",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_lower_case_without_punctuation() {
        let words = tokenize("A Grey dog's ball, wet .").words;
        assert_eq!(words, ["a", "gray", "dog's", "ball", ",", "wet"]);
        assert_eq!(tokenize("mountain bikes on a mountain").words, ["bikes", "on", "a", "mountain"]);
    }

    #[test]
    fn nouns_are_found_behind_a_determiner() {
        let noun = |text: &str| head_noun(&tokenize(text), 0);
        assert_eq!(noun("a large red ball in the grass").as_deref(), Some("ball"));
        assert_eq!(noun("his bicycle").as_deref(), Some("bike"));
        assert_eq!(noun("a tennis racket and a ball").as_deref(), Some("racket"));
        assert_eq!(noun("onto her"), None, "no determiner");
        assert_eq!(noun("a very strange long unknown thing"), None);
        assert_eq!(noun("the"), None);
    }

    #[test]
    fn the_subject_is_the_nearest_one_in_the_clause() {
        let subject = |text: &str, verb: &str| {
            let sentence = tokenize(text);
            let at = sentence.positions(verb)[0];
            sentence.subject_before(at).map(|s| (s.name, s.is_single))
        };
        assert_eq!(subject("a man in a black and red shirt is running", "running"), Some(("man", true)));
        assert_eq!(subject("two dogs run", "run"), Some(("dogs", false)));
        assert_eq!(subject("a man and a dog run", "run"), None);
        assert_eq!(subject("a man watches a player running", "running"), None);
        assert_eq!(subject("running dog", "running"), None);
    }
}
