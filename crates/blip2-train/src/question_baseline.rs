//! Answers from the question alone: what a model that sees has to beat.
//!
//! Many questions give their answer away ("what colour is the grass?"). Two predictors that never open a picture say how
//! many: [`FrequencyPrior`] looks questions up, [`BagOfWords`] is a trained linear classifier. The better one is the
//! baseline. Everything is a function of the rows and a seed.

use std::collections::{BTreeMap, HashMap};

use crate::data::{Row, Text};
use crate::metrics::{answer_score, normalise_answer, percent_by_kind, words};
use crate::random::Random;
use crate::{Error, Result};

/// The classifier knows this many answers, the most frequent ones, as classifiers on VQAv2 usually do (theirs is 3,129).
const MAX_ANSWERS: usize = 1000;

/// Passes over the training questions.
const N_EPOCHS: usize = 10;

/// Step size of the first step; it falls linearly to zero.
const LEARNING_RATE: f32 = 0.5;

/// Questions with the answers people gave; answers equal in the official normal form are one.
#[derive(Debug, Clone)]
pub struct Questions {
    /// Words of each question, and its answer's number.
    examples: Vec<(Vec<String>, usize)>,
    /// Each answer as it was first written.
    answers: Vec<String>,
}

impl Questions {
    /// Collects the rows' questions; of several answers each is an example.
    ///
    /// # Errors
    /// When a row is not a question with its answer, or there is no row.
    pub fn from_rows(rows: &[Row]) -> Result<Self> {
        let (mut examples, mut answers, mut numbers) = (Vec::new(), Vec::new(), HashMap::new());
        for row in rows {
            let (question, given) = question_of(row)?;
            for answer in given {
                let number = *numbers.entry(normalise_answer(&answer)).or_insert(answers.len());
                if number == answers.len() {
                    answers.push(answer);
                }
                examples.push((words(&question), number));
            }
        }
        if examples.is_empty() {
            return Err(Error::Training("there is no question to learn from".into()));
        }
        Ok(Self { examples, answers })
    }
}

/// The most frequent training answer: of the same question, else of questions with the same first three words, else
/// the same first two, else of all. Of equally frequent answers, the one that came first in training.
#[derive(Debug, Clone)]
pub struct FrequencyPrior {
    /// Best answer of a question's words, by how many words of it are looked at (all, 3, 2, none).
    tables: [HashMap<Vec<String>, String>; N_LOOKUPS],
}

const N_LOOKUPS: usize = 4;

/// What each look-up goes by, the most exact first.
fn prefixes(question: &[String]) -> [&[String]; N_LOOKUPS] {
    [question, &question[..question.len().min(3)], &question[..question.len().min(2)], &[]]
}

impl FrequencyPrior {
    /// Counts the training answers.
    #[must_use]
    pub fn learn(questions: &Questions) -> Self {
        let mut counts: [HashMap<&[String], BTreeMap<usize, usize>>; N_LOOKUPS] = Default::default();
        for (question, answer) in &questions.examples {
            for (table, prefix) in counts.iter_mut().zip(prefixes(question)) {
                *table.entry(prefix).or_default().entry(*answer).or_default() += 1;
            }
        }
        let best = |counts: &BTreeMap<usize, usize>| -> Option<String> {
            // `max_by_key` takes the last of equals; reversed, that is the first.
            let (&answer, _) = counts.iter().rev().max_by_key(|(_, n)| **n)?;
            Some(questions.answers[answer].clone())
        };
        Self {
            tables: counts.map(|table| {
                let entries = table.iter().filter_map(|(&prefix, n)| Some((prefix.to_vec(), best(n)?)));
                entries.collect()
            }),
        }
    }

    /// The answer to a question.
    #[must_use]
    pub fn answer(&self, question: &str) -> &str {
        let question = words(question);
        let mut found = self.tables.iter().zip(prefixes(&question)).filter_map(|(table, p)| table.get(p));
        found.next().map_or("", String::as_str) // the last table has an entry for everything
    }
}

/// A softmax classifier over the frequent training answers, on the words and word pairs of a question.
#[derive(Debug, Clone)]
pub struct BagOfWords {
    /// Row of `weights` for each word or pair of neighbouring words seen in training.
    features: HashMap<String, usize>,
    /// `[features][answers]`.
    weights: Vec<f32>,
    answers: Vec<String>,
}

impl BagOfWords {
    /// Trains by stochastic gradient descent; the same questions and seed give the same weights.
    #[must_use]
    pub fn train(questions: &Questions, seed: u64) -> Self {
        let classes = Classes::of(questions);
        let mut features = HashMap::new();
        let mut examples: Vec<(Vec<usize>, usize)> = Vec::new();
        for (question, answer) in &questions.examples {
            let Some(&class) = classes.of_answer.get(answer) else { continue };
            let mut rows = Vec::new();
            for feature in terms(question) {
                let next = features.len();
                rows.push(*features.entry(feature).or_insert(next));
            }
            examples.push((rows, class));
        }
        let n_answers = classes.answers.len();
        let mut model =
            Self { weights: vec![0.0; features.len() * n_answers], features, answers: classes.answers };
        let n_steps = (N_EPOCHS * examples.len()) as f32;
        let mut step = 0;
        for epoch in 0..N_EPOCHS {
            Random::new(&[seed, epoch as u64]).shuffle(&mut examples);
            for (rows, class) in &examples {
                let rate = LEARNING_RATE * (1.0 - step as f32 / n_steps);
                model.descend(rows, *class, rate);
                step += 1;
            }
        }
        model
    }

    /// The answer to a question; words never seen in training count for nothing.
    #[must_use]
    pub fn answer(&self, question: &str) -> &str {
        let rows: Vec<usize> =
            terms(&words(question)).filter_map(|term| self.features.get(&term).copied()).collect();
        let logits = self.logits(&rows);
        // Of equals the first, which is the most frequent answer.
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        best.map_or("", |best| &self.answers[best])
    }

    /// The sum of the rows.
    fn logits(&self, rows: &[usize]) -> Vec<f32> {
        let n_answers = self.answers.len();
        let mut logits = vec![0.0; n_answers];
        for &row in rows {
            let weights = &self.weights[row * n_answers..][..n_answers];
            logits.iter_mut().zip(weights).for_each(|(logit, w)| *logit += w);
        }
        logits
    }

    /// One step on one example. The step is shared among its features, so that it does not grow with their number.
    fn descend(&mut self, rows: &[usize], class: usize, rate: f32) {
        let mut gradient = self.logits(rows);
        let max = gradient.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        gradient.iter_mut().for_each(|g| *g = (*g - max).exp());
        let scale = gradient.iter().sum::<f32>().recip();
        gradient.iter_mut().for_each(|g| *g *= scale);
        gradient[class] -= 1.0;
        let rate = rate / rows.len() as f32;
        for &row in rows {
            let weights = &mut self.weights[row * gradient.len()..][..gradient.len()];
            weights.iter_mut().zip(&gradient).for_each(|(w, g)| *w -= rate * g);
        }
    }
}

/// The answers a classifier chooses among, the most frequent first.
struct Classes {
    answers: Vec<String>,
    of_answer: HashMap<usize, usize>,
}

impl Classes {
    fn of(questions: &Questions) -> Self {
        let mut counts = vec![0usize; questions.answers.len()];
        questions.examples.iter().for_each(|(_, answer)| counts[*answer] += 1);
        let mut order: Vec<usize> = (0..counts.len()).collect();
        order.sort_by_key(|&answer| std::cmp::Reverse(counts[answer])); // stable
        order.truncate(MAX_ANSWERS);
        Self {
            answers: order.iter().map(|&answer| questions.answers[answer].clone()).collect(),
            of_answer: order.iter().enumerate().map(|(class, &answer)| (answer, class)).collect(),
        }
    }
}

/// A feature that every question has, its words, and its pairs of neighbours (the start included).
fn terms(question: &[String]) -> impl Iterator<Item = String> {
    let start = std::iter::once("");
    let left = start.chain(question.iter().map(String::as_str));
    let pairs = left.zip(question).map(|(a, b)| format!("{a} {b}"));
    std::iter::once(String::new()).chain(question.iter().cloned()).chain(pairs)
}

/// Accuracy in percent, over all questions and by kind, with the number of each.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct Accuracy {
    /// Over all; not a number without questions.
    pub accuracy: f64,
    /// How many.
    pub questions: usize,
    /// By the rows' `kind`.
    pub kinds: BTreeMap<String, (f64, usize)>,
}

impl Accuracy {
    /// Answers every row's question with `answer` and scores it: several answers by the official VQA rule, a single one
    /// by equality in the official normal form.
    ///
    /// # Errors
    /// When a row is not a question with its answer.
    pub fn of<'a>(rows: &[Row], answer: impl Fn(&str) -> &'a str) -> Result<Self> {
        let mut scores = Vec::with_capacity(rows.len());
        for row in rows {
            let (question, truths) = question_of(row)?;
            scores.push((row.kind.as_deref().unwrap_or_default(), answer_score(answer(&question), &truths)));
        }
        let questions = scores.len();
        let (accuracy, kinds) = percent_by_kind(scores);
        Ok(Self { accuracy, questions, kinds })
    }
}

fn question_of(row: &Row) -> Result<(String, Vec<String>)> {
    match row.text() {
        Ok(Text::QuestionAnswer { question, answers }) => Ok((question, answers)),
        Ok(_) => Err(Error::Training(format!("the row of {} is not a question with its answer", row.image))),
        Err(reason) => Err(Error::Training(format!("the row of {}: {reason}", row.image))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(question: &str, answers: &[&str], kind: &str) -> Row {
        Row {
            image: "a.png".into(),
            question: Some(question.into()),
            answers: Some(answers.iter().map(ToString::to_string).collect()),
            kind: Some(kind.into()),
            ..Row::default()
        }
    }

    fn learned(rows: &[(&str, &str)]) -> Questions {
        Questions::from_rows(&rows.iter().map(|(q, a)| row(q, &[*a], "")).collect::<Vec<_>>()).unwrap()
    }

    const TRAINING: [(&str, &str); 11] = [
        ("What colour is the dog?", "brown"),
        ("What colour is the dog?", "Brown."),
        ("What colour is the dog?", "black"),
        ("What colour is the sky?", "blue"),
        ("What colour is the sea?", "blue"),
        ("What colour is the lake?", "blue"),
        ("What sport is this?", "tennis"),
        ("Is there a dog?", "yes"),
        ("Is there a cat?", "yes"),
        ("Is there a cow?", "yes"),
        ("Is there a hen?", "yes"),
    ];

    #[test]
    fn the_prior_backs_off_word_by_word() {
        let prior = FrequencyPrior::learn(&learned(&TRAINING));
        assert_eq!(prior.answer("what colour is the DOG"), "brown"); // the question itself; "Brown." is the same answer
        assert_eq!(prior.answer("What colour is the roof?"), "blue"); // its first three words
        assert_eq!(prior.answer("What colour are they?"), "blue"); // its first two
        assert_eq!(prior.answer("What sport do they play?"), "tennis");
        assert_eq!(prior.answer("Who?"), "yes"); // all
        assert_eq!(prior.answer("?"), "yes");
    }

    #[test]
    fn of_equally_frequent_answers_the_first_wins() {
        for (first, second) in [("cat", "dog"), ("dog", "cat")] {
            let questions = learned(&[("What is it?", first), ("What is it?", second)]);
            assert_eq!(FrequencyPrior::learn(&questions).answer("what is it"), first);
            // The classifier has no information beyond the counts, whatever the order of its steps.
            assert!([first, second].contains(&BagOfWords::train(&questions, 1).answer("what is it")));
        }
    }

    #[test]
    fn the_classifier_learns_words_wherever_they_stand() {
        let colours = [("grass", "green"), ("snow", "white"), ("coal", "black")];
        let rows: Vec<(String, &str)> = (0..30)
            .flat_map(|i| {
                colours.map(|(thing, colour)| (format!("what colour has {thing} number {i}"), colour))
            })
            .collect();
        let rows: Vec<(&str, &str)> = rows.iter().map(|(q, a)| (q.as_str(), *a)).collect();
        let model = BagOfWords::train(&learned(&rows), 1);
        for (thing, colour) in colours {
            let question = format!("tell me of the {thing} over there");
            assert_eq!(model.answer(&question), colour);
        }
        assert_eq!(model.weights, BagOfWords::train(&learned(&rows), 1).weights);
    }

    #[test]
    fn a_gradient_step_is_the_derivative_of_the_cross_entropy() {
        let questions = learned(&TRAINING);
        let mut model = BagOfWords::train(&questions, 1);
        let (rows, class) = (vec![0, 2, 5], 1);
        let n_answers = model.answers.len();
        let loss = |model: &BagOfWords| {
            let logits = model.logits(&rows);
            logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln() - f64::from(logits[class])
        };
        let before = model.clone();
        model.descend(&rows, class, rows.len() as f32);
        for &row in &rows {
            for answer in 0..n_answers {
                let at = row * n_answers + answer;
                let (mut up, mut down) = (before.clone(), before.clone());
                up.weights[at] += 1e-2;
                down.weights[at] -= 1e-2;
                let derivative = (loss(&up) - loss(&down)) / 2e-2;
                let step = f64::from(before.weights[at] - model.weights[at]);
                assert!((derivative - step).abs() < 1e-4, "{derivative} {step}");
            }
        }
    }

    #[test]
    fn accuracy_is_by_kind_and_by_the_rule_of_the_number_of_answers() {
        let rows = [
            row("a", &["two"], "number"),
            row("a", &["3"], "number"),
            row("a", &["2", "2", "2", "3"], "many"), // 3 people of 4 have 2 or more equal others
        ];
        let found = Accuracy::of(&rows, |_| "2").unwrap();
        let many = 100.0 * (3.0 * 2.0 / 3.0 + 1.0) / 4.0;
        assert_eq!(found.kinds["number"], (50.0, 2));
        assert!((found.kinds["many"].0 - many).abs() < 1e-9);
        assert!((found.accuracy - (100.0 + many) / 3.0).abs() < 1e-9);
        assert_eq!(found.questions, 3);
    }

    #[test]
    fn captions_and_nothing_are_refused() {
        let caption = Row { image: "b.png".into(), caption: Some("a dog".into()), ..Row::default() };
        let error = Questions::from_rows(std::slice::from_ref(&caption)).unwrap_err().to_string();
        assert!(error.contains("b.png") && error.contains("question"), "{error}");
        assert!(Accuracy::of(&[caption], |_| "").is_err());
        assert!(Questions::from_rows(&[]).is_err());
    }
}
