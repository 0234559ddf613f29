//! Questions made from captions by rules: object, number, colour, and yes/no with balanced negatives.
//!
//! A question is asked only when several captions of a picture support its answer and none contradicts it; pictures
//! the rules are unsure about get none. Yes and no are balanced for every object word, so that the question alone
//! says nothing about the answer. Same captions and seed, same questions.

mod lexicon;
mod phrases;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::random::Random;
use lexicon::{ACTIONS, COLORED, COUNTED, NUMBERS, OBJECTS, PEOPLE, PLACES, SPORTS};
use phrases::{Sentence, head_noun, tokenize};

/// Turns the captions of a picture into questions of one kind.
type Rule = fn(&[Sentence]) -> Vec<Asked>;

/// A picture with its captions: what the rules read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captioned {
    /// The picture, as the manifest names it.
    pub image: String,
    /// Its captions; the rules need at least two that agree.
    pub captions: Vec<String>,
}

/// A question with its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QaRow {
    /// The picture.
    pub image: String,
    /// The question.
    pub question: String,
    /// The answer: a word or two.
    pub answer: String,
    /// What is asked: `yes/no`, `color`, `number`, `object`, `action`, `place`.
    pub kind: String,
}

/// Questions of each kind that one picture may get; yes and no are counted apart.
const MAX_PER_PICTURE: usize = 2;

/// An object word with fewer sure pictures than this is not asked about.
const MIN_POSITIVES: usize = 4;

/// Makes questions for all pictures, in the order of the pictures.
///
/// Needs all rows at once: negatives of an object are drawn from the other pictures.
pub fn questions_from_captions(rows: &[Captioned], seed: u64) -> Vec<QaRow> {
    let pictures: Vec<Vec<Sentence>> =
        rows.iter().map(|row| row.captions.iter().map(|c| tokenize(c)).collect()).collect();
    let mut random = Random::new(&[seed, 0x71]);
    let mut questions: Vec<Vec<QaRow>> = vec![Vec::new(); rows.len()];
    for (picture, (row, captions)) in rows.iter().zip(&pictures).enumerate() {
        let rules: [(&str, Rule); 6] = [
            ("color", colors),
            ("number", numbers),
            ("object", objects),
            ("object", sports),
            ("action", actions),
            ("place", places),
        ];
        for (kind, rule) in rules {
            let mut asked = rule(captions);
            random.shuffle(&mut asked);
            asked.truncate(MAX_PER_PICTURE);
            questions[picture].extend(asked.into_iter().map(|(question, answer)| QaRow {
                image: row.image.clone(),
                question,
                answer,
                kind: kind.to_owned(),
            }));
        }
    }
    thin_out_one_dog(&mut questions, &mut random);
    yes_no(rows, &pictures, &mut questions, &mut random);
    questions.into_iter().flatten().collect()
}

/// A question and its answer.
type Asked = (String, String);

/// The answer that at least two captions give, when it leads over every other.
fn leading(votes: &BTreeMap<String, usize>) -> Option<&str> {
    let (answer, n) = votes.iter().max_by_key(|(_, n)| **n)?;
    let n_equal = votes.values().filter(|other| *other == n).count();
    (*n >= 2 && n_equal == 1).then_some(answer.as_str())
}

/// "What color is the dog?": the noun is one thing in every caption that has it, and all its colours agree.
fn colors(captions: &[Sentence]) -> Vec<Asked> {
    let mut asked = Vec::new();
    for (noun, plurals) in COLORED {
        let is_pair = noun.ends_with('s') && plurals.is_empty() && *noun != "dress";
        let mut sets: BTreeSet<BTreeSet<&str>> = BTreeSet::new();
        let mut n_named = 0;
        let mut sure = true;
        for caption in captions {
            let mentions = caption.positions(noun);
            sure &=
                mentions.len() <= 1 && !caption.has_any(plurals) && !caption.has_any(&["another", "both"]);
            if let [at] = mentions[..] {
                sure &= !caption.is_one_of_many(at) && !caption.is_modifier(at);
                let named = caption.colors_before(at);
                if !named.is_empty() {
                    sets.insert(named);
                    n_named += 1;
                }
            }
        }
        // Colours of what is worn are seldom wrong; of an animal or a car two captions must say them.
        let needed = if is_pair || lexicon::WORN.contains(noun) { 1 } else { 2 };
        if let (true, true, Some(set)) = (sure && n_named >= needed, sets.len() == 1, sets.first())
            && set.len() <= 2
        {
            let be = if is_pair { "are" } else { "is" };
            let answer = set.iter().copied().collect::<Vec<_>>().join(" and ");
            asked.push((format!("What color {be} the {noun}?"), answer));
        }
    }
    asked
}

/// "How many dogs are there?": two captions count the same, none counts otherwise.
fn numbers(captions: &[Sentence]) -> Vec<Asked> {
    let counts = |plurals: &[&str]| -> BTreeMap<String, usize> {
        let mut votes = BTreeMap::new();
        for caption in captions {
            let counted: BTreeSet<&str> = plurals
                .iter()
                .flat_map(|plural| caption.positions(plural))
                .filter_map(|at| caption.number_before(at))
                .collect();
            counted.into_iter().for_each(|number| *votes.entry(number.to_owned()).or_insert(0) += 1);
        }
        votes
    };
    let of_people: Vec<&str> =
        COUNTED.iter().filter(|kind| kind.human).flat_map(|kind| kind.plural).copied().collect();
    let mut asked = Vec::new();
    for kind in COUNTED {
        let votes = counts(kind.plural);
        // "two people" and "three men" in one picture: someone miscounted.
        let contradicted = kind.human && counts(&of_people).len() > 1;
        let answer = match votes.len() {
            1 if !contradicted => leading(&votes).map(str::to_owned),
            0 if !kind.human && is_alone(captions, kind) => Some(NUMBERS[0].to_owned()),
            _ => None,
        };
        if let Some(answer) = answer {
            asked.push((format!("How many {} are there?", kind.plural[0]), answer));
        }
    }
    asked
}

/// Four captions have exactly one of it and none hints at another.
fn is_alone(captions: &[Sentence], kind: &lexicon::Counted) -> bool {
    let n_single =
        captions.iter().filter(|c| kind.singular.iter().map(|s| c.positions(s).len()).sum::<usize>() == 1);
    n_single.count() >= 4
        && !captions.iter().any(|caption| {
            caption.has_any(kind.plural)
                || caption.has_any(&[
                    "another", "other", "both", "each", "pair", "group", "pack", "animals", "two", "three",
                ])
                || kind.singular.iter().map(|s| caption.positions(s).len()).sum::<usize>() > 1
        })
}

/// Most pictures of dogs show one: keeps as many as show more, so that the number has to be looked for.
fn thin_out_one_dog(questions: &mut [Vec<QaRow>], random: &mut Random) {
    for kind in COUNTED.iter().filter(|kind| !kind.human) {
        let question = format!("How many {} are there?", kind.plural[0]);
        let is_one = |row: &QaRow| row.question == question && row.answer == NUMBERS[0];
        let n_more =
            questions.iter().flatten().filter(|row| row.question == question && !is_one(row)).count();
        let mut ones: Vec<usize> =
            (0..questions.len()).filter(|&p| questions[p].iter().any(is_one)).collect();
        random.shuffle(&mut ones);
        for picture in ones.into_iter().skip(n_more) {
            questions[picture].retain(|row| !is_one(row));
        }
    }
}

/// "What is the man holding?", "What is the girl riding?": what follows the verb, when captions agree on it.
fn objects(captions: &[Sentence]) -> Vec<Asked> {
    let mut asked = Vec::new();
    for (forms, question) in [
        (&["holding", "holds", "carrying", "carries"][..], "holding"),
        (&["riding", "rides"][..], "riding"),
        (&["catching", "catches"][..], "catching"),
        (&["wearing", "wears"][..], "wearing"),
    ] {
        // Captions call one person by several words; the object must agree, the subject is what most of them say.
        let mut votes: BTreeMap<String, usize> = BTreeMap::new();
        let mut subjects: BTreeMap<String, BTreeMap<&str, usize>> = BTreeMap::new();
        for caption in captions {
            let mut seen = BTreeMap::new();
            for at in forms.iter().flat_map(|form| caption.positions(form)) {
                let subject = caption.subject_before(at);
                if let (Some(subject), Some(noun)) = (subject, head_noun(caption, at + 1))
                    && subject.is_single
                {
                    seen.insert(noun, subject.name);
                }
            }
            for (noun, subject) in seen {
                *votes.entry(noun.clone()).or_insert(0) += 1;
                *subjects.entry(noun).or_default().entry(subject).or_insert(0) += 1;
            }
        }
        if let Some(noun) = leading(&votes)
            && let Some((subject, _)) = subjects[noun].iter().max_by_key(|(_, n)| **n)
        {
            // Something in a dog's mouth is what a dog holds.
            let question = if *subject == "dog" && question == "holding" {
                "What does the dog have in its mouth?".to_owned()
            } else {
                format!("What is the {subject} {question}?")
            };
            asked.push((question, noun.to_owned()));
        }
    }
    asked
}

/// "What sport is this?": two captions name it and none names another.
fn sports(captions: &[Sentence]) -> Vec<Asked> {
    let mut votes = BTreeMap::new();
    for caption in captions {
        for (sport, words) in SPORTS {
            if caption.has_any(words) {
                *votes.entry((*sport).to_owned()).or_insert(0) += 1;
            }
        }
    }
    match (votes.len(), leading(&votes)) {
        (1, Some(sport)) => vec![("What sport is this?".to_owned(), sport.to_owned())],
        _ => Vec::new(),
    }
}

/// "What is the dog doing?": the verb that two captions give it.
fn actions(captions: &[Sentence]) -> Vec<Asked> {
    let mut votes: BTreeMap<(&str, bool), BTreeMap<String, usize>> = BTreeMap::new();
    for caption in captions {
        let mut seen = BTreeSet::new();
        for (at, word) in caption.words.iter().enumerate() {
            let Some((doing, ..)) =
                ACTIONS.iter().find(|(doing, forms)| doing == word || forms.contains(&word.as_str()))
            else {
                continue;
            };
            if let Some(subject) = caption.subject_before(at) {
                seen.insert(((subject.name, subject.is_single), (*doing).to_owned()));
            }
        }
        for (subject, doing) in seen {
            *votes.entry(subject).or_default().entry(doing).or_insert(0) += 1;
        }
    }
    let mut asked = Vec::new();
    for ((subject, is_single), verbs) in votes {
        if let Some(doing) = leading(&verbs) {
            let be = if is_single { "is" } else { "are" };
            asked.push((format!("What {be} the {subject} doing?"), doing.to_owned()));
        }
    }
    asked
}

/// "Where was this picture taken?": two captions name the place and none names another.
fn places(captions: &[Sentence]) -> Vec<Asked> {
    let mut votes = BTreeMap::new();
    for caption in captions {
        for (answer, words) in PLACES {
            if caption.has_any(words) {
                *votes.entry((*answer).to_owned()).or_insert(0) += 1;
            }
        }
    }
    match (votes.len(), leading(&votes)) {
        (1, Some(place)) => vec![("Where was this picture taken?".to_owned(), place.to_owned())],
        _ => Vec::new(),
    }
}

/// For every object word as many "no" as "yes". A yes has two captions that mention the object; a no has none that
/// mentions it or anything that may be it or include it.
fn yes_no(rows: &[Captioned], pictures: &[Vec<Sentence>], questions: &mut [Vec<QaRow>], random: &mut Random) {
    let mut n_yes = vec![0; rows.len()];
    let mut n_no = vec![0; rows.len()];
    for object in OBJECTS {
        let mentions = |captions: &[Sentence]| captions.iter().filter(|c| c.has_any(object.forms)).count();
        let may_hide = |captions: &[Sentence]| {
            captions
                .iter()
                .any(|c| c.has_any(object.hidden_in) || (object.hidden_in_people && c.has_any(PEOPLE)))
        };
        let mut yes: Vec<usize> =
            (0..rows.len()).filter(|&p| n_yes[p] < MAX_PER_PICTURE && mentions(&pictures[p]) >= 2).collect();
        let mut no: Vec<usize> =
            (0..rows.len()).filter(|&p| mentions(&pictures[p]) == 0 && !may_hide(&pictures[p])).collect();
        random.shuffle(&mut yes);
        random.shuffle(&mut no);
        // Pictures that have few no so far go first, so that all get some.
        no.sort_by_key(|&p| n_no[p]);
        no.retain(|&p| n_no[p] < MAX_PER_PICTURE);
        let n = yes.len().min(no.len());
        if n < MIN_POSITIVES {
            continue;
        }
        let chosen =
            yes.into_iter().take(n).map(|p| (p, "yes")).chain(no.into_iter().take(n).map(|p| (p, "no")));
        for (picture, answer) in chosen {
            let count = if answer == "yes" { &mut n_yes } else { &mut n_no };
            count[picture] += 1;
            let name = object.name;
            let question = match random.below(4) {
                0 => format!("Do you see {name}?"),
                1 => format!("Is there {name} in this photo?"),
                _ => format!("Is there {name} in the picture?"),
            };
            questions[picture].push(QaRow {
                image: rows[picture].image.clone(),
                question,
                answer: answer.to_owned(),
                kind: "yes/no".to_owned(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(captions: &[&str]) -> Vec<(String, String)> {
        let row = Captioned { image: "x".into(), captions: captions.iter().map(|&c| c.to_owned()).collect() };
        questions_from_captions(&[row], 1).into_iter().map(|row| (row.question, row.answer)).collect()
    }

    fn answer<'a>(asked: &'a [(String, String)], question: &str) -> Option<&'a str> {
        asked.iter().find(|(q, _)| q == question).map(|(_, answer)| answer.as_str())
    }

    #[test]
    fn a_color_needs_captions_that_agree() {
        let dog = |captions: &[&str]| answer(&asked(captions), "What color is the dog?").map(str::to_owned);
        let running = "A dog runs .";
        assert_eq!(dog(&["A brown dog runs .", "The small brown dog", running]).as_deref(), Some("brown"));
        assert_eq!(
            dog(&["A white and black dog .", "Small black and white dog", running]).as_deref(),
            Some("black and white")
        );
        assert_eq!(dog(&["A brown dog runs .", "A tan dog runs .", "a tan dog"]), None, "captions disagree");
        assert_eq!(dog(&["A brown dog runs .", running]), None, "one caption is not enough");
        assert_eq!(dog(&["A brown dog and a white dog", "A brown dog"]), None, "two dogs");
        assert_eq!(dog(&["Two dogs", "A brown dog", "A brown dog"]), None, "two dogs");
        assert_eq!(dog(&["A brown dog bites another .", "A brown dog"]), None, "another");
        assert_eq!(dog(&["A brown dog house", "A brown dog house"]), None, "a dog house is no dog");
        let shirts = asked(&["A man in a red shirt", "A man runs", "A man in blue jeans"]);
        assert_eq!(answer(&shirts, "What color is the shirt?"), Some("red"));
        assert_eq!(answer(&shirts, "What color are the jeans?"), Some("blue"));
    }

    #[test]
    fn a_number_needs_two_that_count_and_none_that_contradicts() {
        let dogs =
            |captions: &[&str]| answer(&asked(captions), "How many dogs are there?").map(str::to_owned);
        assert_eq!(dogs(&["Two dogs run", "Two small brown dogs", "dogs running"]).as_deref(), Some("two"));
        assert_eq!(dogs(&["Two dogs run", "Three dogs", "Two dogs"]), None);
        assert_eq!(dogs(&["Two dogs run", "dogs"]), None);
        let people = asked(&["Two people walk", "Two people", "Three men walk"]);
        assert_eq!(answer(&people, "How many people are there?"), None);
    }

    #[test]
    fn one_dog_is_asked_as_often_as_several() {
        let row =
            |image: &str, caption: &str| Captioned { image: image.into(), captions: vec![caption.into(); 5] };
        let mut rows: Vec<Captioned> = (0..20).map(|i| row(&format!("one{i}"), "A dog runs")).collect();
        rows.extend((0..6).map(|i| row(&format!("two{i}"), "Two dogs run")));
        let questions = questions_from_captions(&rows, 1);
        let count = |answer: &str| {
            questions.iter().filter(|row| row.kind == "number" && row.answer == answer).count()
        };
        assert_eq!((count("one"), count("two")), (6, 6));
    }

    #[test]
    fn objects_actions_sports_and_places_need_agreement() {
        let all = asked(&[
            "A man in a red jacket is riding a mountain bike through the forest .",
            "The man rides his bike in the woods",
            "A cyclist",
        ]);
        assert_eq!(answer(&all, "What is the man riding?"), Some("bike"));
        assert_eq!(answer(&all, "What is the man doing?"), Some("riding"));
        assert_eq!(answer(&all, "Where was this picture taken?"), Some("in the forest"));
        let dog = asked(&["A dog carries a large stick in its mouth .", "A dog holding a stick in the snow"]);
        assert_eq!(answer(&dog, "What does the dog have in its mouth?"), Some("stick"));
        let soccer = asked(&["Two boys play soccer", "Boys playing soccer on a field", "boys run"]);
        assert_eq!(answer(&soccer, "What sport is this?"), Some("soccer"));
        assert_eq!(answer(&soccer, "What are the boys doing?"), Some("playing"));
        let unsure = asked(&["A woman is holding a camera", "A woman holds a phone", "A woman smiles"]);
        assert_eq!(answer(&unsure, "What is the woman holding?"), None);
    }

    #[test]
    fn yes_and_no_are_balanced_for_every_word_and_never_contradicted() {
        let subjects = ["dog", "horse", "car", "boat", "man", "guitar", "bird", "motorcycle"];
        let rows: Vec<Captioned> = (0..80)
            .map(|i| Captioned {
                image: i.to_string(),
                captions: vec![format!("A {} stands there", subjects[i % 8]); 3],
            })
            .collect();
        let questions = questions_from_captions(&rows, 5);
        for subject in subjects {
            let of = |answer: &str| -> Vec<usize> {
                let about =
                    |row: &&QaRow| row.kind == "yes/no" && row.question.contains(&format!("a {subject}"));
                questions
                    .iter()
                    .filter(about)
                    .filter(|r| r.answer == answer)
                    .map(|r| r.image.parse().unwrap())
                    .collect()
            };
            let (yes, no) = (of("yes"), of("no"));
            assert_eq!(yes.len(), no.len(), "{subject}");
            assert!(yes.len() >= MIN_POSITIVES, "{subject}: {}", yes.len());
            assert!(yes.iter().all(|i| subjects[i % 8] == subject));
            assert!(no.iter().all(|i| subjects[i % 8] != subject));
        }
        assert_eq!(questions, questions_from_captions(&rows, 5));
        assert_ne!(questions, questions_from_captions(&rows, 6));
    }
}
