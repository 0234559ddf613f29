//! Answers that are written while others come and go are the answers that each question gets alone.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use blip2::generate::{FinishReason, GenerationConfig, PROMPT_ROWS_A_STEP};
use blip2::image::RgbImage;
use blip2::model::{Answer, AnswerBatch, Answered, Ask, Blip2, ImageFeatures, OpenOptions, ReadText};
use blip2::text::{AnswerForm, Turn};
use serde_json::json;

/// Tiny random models: a decoder-only and an encoder-decoder language model.
const MODELS: [&str; 2] = ["blip2_opt", "blip2_t5"];

fn open(name: &str) -> (Blip2, Vec<ImageFeatures>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let model = Blip2::open(folder, &OpenOptions::default()).expect("a model");
    let picture = |i: u32| {
        RgbImage::from_fn(30, 20, |x, y| {
            image::Rgb([(x * 7 * (i + 1)) as u8, (y * 11) as u8, (i * 60) as u8])
        })
    };
    let pictures: Vec<_> = (0..4).map(picture).collect();
    let features = model.encode(&pictures).expect("features");
    (model, features)
}

/// A question of every kind of generation.
fn generation(i: usize) -> GenerationConfig {
    let greedy = GenerationConfig { max_new_tokens: 3 + i % 9, ..GenerationConfig::default() };
    match i % 4 {
        0 => greedy,
        1 => GenerationConfig {
            do_sample: true,
            seed: i as u64,
            num_return_sequences: 1 + i % 3,
            top_p: 0.9,
            ..greedy
        },
        2 => GenerationConfig { num_beams: 2 + i % 3, num_return_sequences: 2, ..greedy },
        _ => GenerationConfig { no_repeat_ngram_size: 2, repetition_penalty: 1.2, ..greedy },
    }
}

fn ask(model: &Blip2, features: &[ImageFeatures], i: usize) -> Ask {
    let question = "what is this? ".repeat(1 + i % 3) + &i.to_string();
    let features = &features[i % features.len()];
    Ask {
        prompt: model.prompt(&[Turn::open(question)]).expect("a prompt"),
        soft_tokens: model.soft_tokens(&[features]).expect("soft tokens").remove(0),
        generation: generation(i),
        read: None,
        constraint: None,
        keep: false,
    }
}

/// What an answer has to be, of every kind and small enough for a short answer.
fn form(i: usize) -> AnswerForm {
    match i % 3 {
        0 => AnswerForm::Choice(["yes", "no", "a dog"].map(String::from).to_vec()),
        1 => AnswerForm::Regex("[ab]{2}[0-9]".into()),
        _ => AnswerForm::JsonSchema(json!({"enum": [1, true, "x"]})),
    }
}

/// Whether a text is of that form.
fn is_of_form(text: &str, i: usize) -> bool {
    match i % 3 {
        0 => ["yes", "no", "a dog"].contains(&text),
        1 => {
            let bytes = text.as_bytes();
            bytes.len() == 3 && bytes[..2].iter().all(|b| b"ab".contains(b)) && bytes[2].is_ascii_digit()
        }
        _ => ["1", "true", "\"x\""].contains(&text),
    }
}

fn alone(model: &Blip2, ask: &Ask) -> Vec<Answer> {
    answered(model, ask).result.expect("an answer")
}

fn answered(model: &Blip2, ask: &Ask) -> Answered {
    let mut batch = model.answer_batch().expect("a batch");
    batch.join(std::slice::from_ref(ask)).expect("joined");
    loop {
        if let Some(answered) = batch.step(&mut |_| ()).expect("a step").pop() {
            assert!(batch.is_empty());
            return answered;
        }
    }
}

/// Steps a batch and keeps what comes of it.
#[derive(Default)]
struct Log {
    answers: BTreeMap<usize, Vec<Answer>>,
    streamed: BTreeMap<(usize, usize), String>,
}

impl Log {
    fn step(&mut self, batch: &mut AnswerBatch<'_>) {
        let answered = batch
            .step(&mut |piece| {
                *self.streamed.entry((piece.id, piece.sequence)).or_default() += &piece.text;
            })
            .expect("a step");
        for answered in answered {
            self.answers.insert(answered.id, answered.result.expect("an answer"));
        }
    }
}

#[test]
fn who_is_beside_an_answer_makes_no_difference() {
    for name in MODELS {
        let (model, features) = open(name);
        let asks: Vec<_> = (0..32).map(|i| ask(&model, &features, i)).collect();
        let expected: Vec<_> = asks.iter().map(|ask| alone(&model, ask)).collect();
        // Every prompt is read at once, in several parts, or row by row.
        for rows in [PROMPT_ROWS_A_STEP, 16, 1] {
            compare_with_those_alone(name, &model, &asks, &expected, rows);
        }
    }
}

fn compare_with_those_alone(name: &str, model: &Blip2, asks: &[Ask], expected: &[Vec<Answer>], rows: usize) {
    let mut batch = model.answer_batch().expect("a batch").with_prompt_rows(rows);
    let (mut log, mut of) = (Log::default(), BTreeMap::new());
    let mut gone = Vec::new();
    // They come by ones, twos and threes, a step apart; every seventh leaves before or after its first tokens.
    let mut next = 0;
    while next < asks.len() || !batch.is_empty() {
        let group = &asks[next..asks.len().min(next + 1 + next % 3)];
        let ids = batch.join(group).expect("joined");
        of.extend(ids.iter().copied().zip(next..));
        if next % 7 == 6 {
            batch.leave(ids[0]);
            gone.push(ids[0]);
        }
        next += group.len();
        log.step(&mut batch);
        if next % 7 == 3
            && let Some(&id) = ids.first().filter(|id| !log.answers.contains_key(id))
        {
            batch.leave(id);
            gone.push(id);
        }
    }
    assert_eq!(batch.n_texts(), 0);
    assert!(gone.len() >= 3, "{gone:?}");
    for (id, i) in of {
        if gone.contains(&id) {
            assert!(!log.answers.contains_key(&id), "{name}: it left");
            continue;
        }
        let (together, expected) = (&log.answers[&id], &expected[i]);
        assert_eq!(together, expected, "{name}, question {i}, {rows} rows at once");
        if asks[i].generation.num_beams == 1 {
            for (sequence, answer) in expected.iter().enumerate() {
                let streamed = &log.streamed[&(id, sequence)];
                assert!(
                    streamed.trim() == answer.text
                        || streamed.contains(char::REPLACEMENT_CHARACTER)
                        || answer.text.contains(char::REPLACEMENT_CHARACTER),
                    "{name}: {streamed:?} {answer:?}"
                );
            }
        }
    }
}

#[test]
fn a_batch_writes_what_ask_and_caption_write() {
    for name in MODELS {
        let (model, features) = open(name);
        for (i, features) in features.iter().take(4).enumerate() {
            let config = generation(i);
            let ask = Ask {
                prompt: model.prompt(&[Turn::open("which city is this?")]).expect("a prompt"),
                soft_tokens: model.soft_tokens(&[features]).expect("soft tokens").remove(0),
                generation: config.clone(),
                read: None,
                constraint: None,
                keep: false,
            };
            let expected = model.ask(&[(features, "which city is this?")], &config).expect("answers");
            assert_eq!(alone(&model, &ask), expected[0], "{name}");
            let caption = Ask { prompt: model.prompt(&[]).expect("a prompt"), ..ask };
            let expected = model.caption(&[features], &config).expect("captions");
            assert_eq!(alone(&model, &caption), expected[0], "{name}");
        }
    }
}

#[test]
fn an_answer_of_a_form_is_the_same_in_a_batch_and_of_that_form() {
    for name in MODELS {
        let (model, features) = open(name);
        let constrained = |i: usize| {
            // Two tokens for every character are room enough for what has to be said.
            let generation = GenerationConfig { max_new_tokens: 16, min_new_tokens: i % 5, ..generation(i) };
            let grammar = model.grammar(&form(i), &generation).expect("a grammar");
            Ask { constraint: Some(Box::new(grammar)), generation, ..ask(&model, &features, i) }
        };
        let asks: Vec<_> =
            (0..24).map(|i| if i % 4 == 3 { ask(&model, &features, i) } else { constrained(i) }).collect();
        let mut batch = model.answer_batch().expect("a batch");
        let mut log = Log::default();
        for group in asks.chunks(5) {
            batch.join(group).expect("joined");
            log.step(&mut batch);
        }
        while !batch.is_empty() {
            log.step(&mut batch);
        }
        for (i, ask) in asks.iter().enumerate() {
            assert_eq!(log.answers[&i], alone(&model, ask), "{name}, question {i}");
            for answer in log.answers[&i].iter().filter(|_| ask.constraint.is_some()) {
                assert!(is_of_form(&answer.text, i), "{name}, question {i}: {answer:?}");
                assert_eq!(answer.finish, FinishReason::EndOfText);
            }
        }
        // The same through the call for one question.
        let config = GenerationConfig { max_new_tokens: 16, ..generation(0) };
        let grammar = model.grammar(&form(2), &config).expect("a grammar");
        let answers = model.ask_for(&[(&features[0], "what?")], &config, Some(&grammar)).expect("answers");
        assert!(is_of_form(&answers[0][0].text, 2), "{answers:?}");
    }
}

#[test]
fn what_was_read_of_a_picture_is_not_read_again_and_changes_nothing() {
    let (model, features) = open("blip2_opt");
    let n_queries = model.config().qformer.num_query_tokens;
    let mut batch = model.answer_batch().expect("a batch");
    let mut log = Log::default();
    for i in 0..12 {
        let fresh = ask(&model, &features, i);
        let expected = alone(&model, &fresh);
        // What one about the same picture has read, somewhere in the middle of a busy batch.
        let first = Ask { prompt: model.prompt(&[Turn::open("first?")]).expect("a prompt"), ..fresh.clone() };
        let id = batch.join(std::slice::from_ref(&first)).expect("joined")[0];
        if i % 2 == 1 {
            log.step(&mut batch);
        }
        let read = batch.read_picture(id, &first).expect("it was read");
        let row = model.language_model().expect("a language model").new_cache().row_bytes();
        let n_known = first.prompt.before_image().len() + n_queries;
        assert_eq!(read.n_bytes(), n_known * row);
        let known = Ask { read: Some(Arc::new(read)), ..fresh };
        assert_eq!(known.n_known(), n_known);
        assert_eq!(alone(&model, &known), expected, "question {i}");
        let id = batch.join(std::slice::from_ref(&known)).expect("joined")[0];
        while !log.answers.contains_key(&id) {
            log.step(&mut batch);
        }
        assert_eq!(log.answers[&id], expected, "question {i}, beside others");
        // A prompt that begins otherwise, or ends with its picture, is read whole.
        let mut other = known.clone();
        other.prompt.ids.insert(0, 5);
        other.prompt.image_at = other.prompt.image_at.map(|at| at + 1);
        assert_eq!(other.n_known(), 0);
        other.prompt.ids.truncate(other.prompt.image_at.expect("a picture"));
        assert_eq!(other.n_known(), 0);
        assert_eq!(alone(&model, &other), alone(&model, &Ask { read: None, ..other.clone() }));
    }
    // An encoder sees a prompt as a whole: there is nothing to keep of it.
    let (model, features) = open("blip2_t5");
    let ask = ask(&model, &features, 0);
    let mut batch = model.answer_batch().expect("a batch");
    let id = batch.join(std::slice::from_ref(&ask)).expect("joined")[0];
    assert!(batch.read_picture(id, &ask).is_none());
}

#[test]
fn what_was_read_for_an_answer_is_not_read_again_and_changes_nothing() {
    let (model, features) = open("blip2_opt");
    let n_queries = model.config().qformer.num_query_tokens;
    let row = model.language_model().expect("a language model").new_cache().row_bytes();
    let mut batch = model.answer_batch().expect("a batch");
    let mut log = Log::default();
    for i in 0..8 {
        let question = "what is this? ".repeat(1 + i % 3) + &i.to_string();
        let single = GenerationConfig { num_beams: 1, num_return_sequences: 1, ..generation(i) };
        let config = GenerationConfig { max_new_tokens: 9, ..single.clone() };
        let grammar = model.grammar(&AnswerForm::Regex("[xyz]{4}".into()), &config).expect("a grammar");
        let fresh = Ask { generation: config, ..ask(&model, &features, i) };
        let first = Ask { constraint: Some(Box::new(grammar)), keep: true, ..fresh.clone() };
        let kept = answered(&model, &first);
        let answer = kept.result.expect("an answer").remove(0);
        let read = kept.read.expect("it was to be kept");
        let n_prompt = first.prompt.n_rows(n_queries);
        let tokens = &answer.token_ids[..answer.token_ids.len() - 1];
        assert_eq!(read.n_bytes(), (n_prompt + tokens.len()) * row, "all but the last token");
        let read = Some(Arc::new(read));

        let turns = [Turn::answered(question, answer.text.as_str()), Turn::open("and now?")];
        let prompt = model.prompt(&turns).expect("a prompt");
        let second = Ask { prompt, generation: single, ..fresh.clone() };
        let expected = alone(&model, &second);
        let was_read = [first.prompt.after_image(), tokens].concat();
        let is_same = |(a, b): &(&u32, &u32)| a == b;
        let n_same = was_read.iter().zip(second.prompt.after_image()).take_while(is_same).count();
        let known = Ask { read: read.clone(), ..second.clone() };
        assert_eq!(known.n_known(), n_queries + n_same);
        assert!(known.n_known() > n_prompt, "the answer's tokens too: {} of {n_prompt}", known.n_known());
        assert_eq!(alone(&model, &known), expected, "question {i}");
        let id = batch.join(&[first.clone(), known.clone()]).expect("joined")[1];
        while !log.answers.contains_key(&id) {
            log.step(&mut batch);
        }
        assert_eq!(log.answers[&id], expected, "question {i}, beside others");
        // The same answer in other tokens is the same up to the first of them.
        let mut other = known.clone();
        let at = other.prompt.ids.len() - other.prompt.after_image().len() + first.prompt.after_image().len();
        other.prompt.ids[at] = 7;
        assert_eq!(other.n_known(), n_prompt);
        assert_eq!(alone(&model, &other), alone(&model, &Ask { read: None, ..other.clone() }));
        // The same prompt again begins with all of it but the row that its answer starts from.
        let again = Ask { read, ..fresh.clone() };
        assert_eq!(again.n_known(), n_prompt - 1);
        assert_eq!(alone(&model, &again), alone(&model, &fresh));
    }
    let ask = ask(&model, &features, 0);
    let greedy = GenerationConfig { max_new_tokens: 4, ..GenerationConfig::default() };
    for generation in [
        GenerationConfig { num_beams: 2, ..greedy.clone() },
        GenerationConfig { do_sample: true, num_return_sequences: 2, ..greedy.clone() },
    ] {
        let several = Ask { generation, keep: true, ..ask.clone() };
        assert!(answered(&model, &several).read.is_none(), "which of them?");
    }
    assert!(answered(&model, &ask).read.is_none(), "nobody wants it");
    let (model, features) = open("blip2_t5");
    let whole = Ask { generation: greedy, keep: true, ..self::ask(&model, &features, 0) };
    assert!(answered(&model, &whole).read.is_none(), "an encoder reads a prompt as a whole");
}

/// The answers to a prompt of which `rows` are read at once, and how many steps end before it is read to its end.
fn read_in_parts(model: &Blip2, ask: &Ask, rows: usize) -> (Answered, usize) {
    let mut batch = model.answer_batch().expect("a batch").with_prompt_rows(rows);
    batch.join(std::slice::from_ref(ask)).expect("joined");
    let mut n_before = 0;
    loop {
        let is_read = batch.n_texts() > 0;
        if let Some(answered) = batch.step(&mut |_| ()).expect("a step").pop() {
            return (answered, n_before);
        }
        n_before += usize::from(!is_read && batch.n_texts() == 0);
    }
}

#[test]
fn a_prompt_that_is_read_in_parts_is_answered_as_one_that_is_read_whole() {
    for name in MODELS {
        let (model, features) = open(name);
        let n_queries = model.config().qformer.num_query_tokens;
        for i in 0..8 {
            let ask = Ask { keep: true, ..ask(&model, &features, i) };
            let n = ask.prompt.n_rows(n_queries);
            let whole = answered(&model, &ask);
            let n_bytes = whole.read.as_ref().map(ReadText::n_bytes);
            let expected = whole.result.expect("an answer");
            for rows in [1, 7, n / 2, n - 1, n, n + 1] {
                let (found, n_before) = read_in_parts(&model, &ask, rows);
                // The first part is read before the first step, the last one in the step that begins the answer. An
                // encoder reads all at once.
                let n_parts = if name == "blip2_t5" { 1 } else { n.div_ceil(rows) };
                assert_eq!(n_before, n_parts - 1, "{name}: {rows} rows of {n} at once");
                assert_eq!(found.result.expect("an answer"), expected, "{name}: {rows} rows of {n} at once");
                assert_eq!(found.read.as_ref().map(ReadText::n_bytes), n_bytes);
            }
        }
    }
}

#[test]
fn a_prompt_goes_on_in_parts_from_what_was_read_before() {
    let (model, features) = open("blip2_opt");
    let n_queries = model.config().qformer.num_query_tokens;
    let row = model.language_model().expect("a language model").new_cache().row_bytes();
    for i in 0..8 {
        let fresh = ask(&model, &features, i);
        let expected = alone(&model, &fresh);
        // The picture is known to others as soon as its own rows are read, long before the prompt is.
        let mut batch = model.answer_batch().expect("a batch").with_prompt_rows(2);
        let id = batch.join(std::slice::from_ref(&fresh)).expect("joined")[0];
        assert!(batch.read_picture(id, &fresh).is_none(), "two rows are less than a picture");
        let picture = loop {
            assert_eq!(batch.n_texts(), 0, "it is being read");
            batch.step(&mut |_| ()).expect("a step");
            if let Some(picture) = batch.read_picture(id, &fresh) {
                break picture;
            }
        };
        assert_eq!(picture.n_bytes(), (fresh.prompt.before_image().len() + n_queries) * row);
        let known = Ask { read: Some(Arc::new(picture)), ..fresh.clone() };
        let n_rest = fresh.prompt.n_rows(n_queries) - known.n_known();
        for rows in [1, 3, n_rest - 1, n_rest] {
            let (found, n_before) = read_in_parts(&model, &known, rows);
            assert_eq!(n_before, n_rest.div_ceil(rows) - 1, "only the rest is read");
            assert_eq!(found.result.expect("an answer"), expected, "question {i}, {rows} rows at once");
        }
        let id = batch.join(std::slice::from_ref(&known)).expect("joined")[0];
        let mut log = Log::default();
        while !log.answers.contains_key(&id) {
            log.step(&mut batch);
        }
        assert_eq!(log.answers[&id], expected, "question {i}, beside the one that is being read");
    }
}

#[test]
fn long_prompts_share_what_is_read_between_two_tokens() {
    let (model, features) = open("blip2_opt");
    let n_queries = model.config().qformer.num_query_tokens;
    let long = long_ask(&model, &features);
    let expected = alone(&model, &long);
    let n = long.prompt.n_rows(n_queries);
    let mut batch = model.answer_batch().expect("a batch").with_prompt_rows(8);
    batch.join(&[long.clone(), long.clone()]).expect("joined");
    let (mut log, mut n_before) = (Log::default(), 0);
    while log.answers.len() < 2 {
        let is_read = batch.n_texts() > 0;
        log.step(&mut batch);
        n_before += usize::from(!is_read && batch.n_texts() == 0);
    }
    // Eight rows of each before the first step, none in it, then four of each.
    assert_eq!(n_before, (n - 8).div_ceil(4));
    assert!(log.answers.values().all(|answers| *answers == expected));
}

#[test]
fn texts_grow_beside_a_long_prompt_and_its_rows_are_free_when_it_leaves() {
    let (model, features) = open("blip2_opt");
    let greedy = GenerationConfig { min_new_tokens: 30, max_new_tokens: 30, ..GenerationConfig::default() };
    let prompt = model.prompt(&[Turn::open("?")]).expect("a prompt");
    let short = Ask { prompt, generation: greedy, ..ask(&model, &features, 0) };
    let long = long_ask(&model, &features);
    let mut batch = model.answer_batch().expect("a batch").with_prompt_rows(10);
    let growing = batch.join(std::slice::from_ref(&short)).expect("joined")[0];
    let mut log = Log::default();
    while batch.n_texts() == 0 {
        log.step(&mut batch);
    }
    let leaving = batch.join(std::slice::from_ref(&long)).expect("joined")[0];
    for _ in 0..8 {
        let mut n_tokens = 0;
        let answered = batch.step(&mut |piece| {
            assert_eq!(piece.id, growing);
            n_tokens += 1;
        });
        assert!(answered.expect("a step").is_empty());
        assert_eq!((n_tokens, batch.n_texts()), (1, 1), "one token beside each part of the prompt");
    }
    let n_bytes = batch.n_bytes();
    batch.leave(leaving);
    for _ in 0..9 {
        let next = batch.join(std::slice::from_ref(&long)).expect("joined")[0];
        batch.leave(next);
        assert_eq!(batch.n_bytes(), n_bytes, "its room is the next one's");
    }
    while !batch.is_empty() {
        log.step(&mut batch);
    }
    assert_eq!(log.answers.keys().collect::<Vec<_>>(), [&growing]);
    assert_eq!(log.answers[&growing], alone(&model, &short));

    // Alone, with nobody to make room for.
    let leaving = batch.join(std::slice::from_ref(&long)).expect("joined")[0];
    log.step(&mut batch);
    log.step(&mut batch);
    assert!(batch.n_bytes() > 0 && batch.n_texts() == 0 && !batch.is_empty());
    batch.rest();
    assert!(batch.n_bytes() > 0, "it is still being read");
    batch.leave(leaving);
    assert!(batch.is_empty() && batch.n_bytes() > 0, "kept for the next one");
    batch.rest();
    assert_eq!(batch.n_bytes(), 0);
    // What cannot be answered is refused before a row of it is read.
    let generation =
        GenerationConfig { max_length: Some(6), sees_prompt: true, ..GenerationConfig::default() };
    let refused = batch.join(&[Ask { generation, ..long }]).expect_err("refused");
    assert!(refused.to_string().contains("max_length") && batch.is_empty(), "{refused}");
}

/// A question that nearly fills the context.
fn long_ask(model: &Blip2, features: &[ImageFeatures]) -> Ask {
    let prompt = model.prompt(&[Turn::open("what is this? ".repeat(5))]).expect("a prompt");
    assert!(prompt.n_rows(model.config().qformer.num_query_tokens) > 90);
    Ask { prompt, ..ask(model, features, 0) }
}

/// A server runs for months: rows of answers that are done are given back, and memory does not grow with their number.
#[test]
fn memory_follows_what_is_being_written() {
    let (model, features) = open("blip2_opt");
    let long = GenerationConfig { min_new_tokens: 60, max_new_tokens: 60, ..GenerationConfig::default() };
    let short = GenerationConfig { min_new_tokens: 4, max_new_tokens: 4, ..GenerationConfig::default() };
    let mut batch = model.answer_batch().expect("a batch");
    let base = ask(&model, &features, 0);
    batch.join(&[Ask { generation: long, ..base.clone() }]).expect("joined");
    let mut log = Log::default();
    let mut largest = 0;
    // Always someone new beside the long answer, so the batch is never empty.
    while !log.answers.contains_key(&0) {
        batch.join(&[Ask { generation: short.clone(), ..base.clone() }]).expect("joined");
        log.step(&mut batch);
        largest = largest.max(batch.n_bytes());
    }
    let row = model.language_model().expect("a language model").new_cache().row_bytes();
    let n_rows = base.prompt.n_rows(model.config().qformer.num_query_tokens);
    let live = (n_rows + 60 + 5 * (n_rows + 4)) * row;
    assert!(largest < 4 * live, "{largest} bytes held, {live} needed at once");
    assert_eq!(log.answers[&0][0].finish, FinishReason::MaxNewTokens);
}

#[test]
fn who_does_not_fit_is_told_and_the_others_do_not_notice() {
    let (model, features) = open("blip2_opt");
    let good = ask(&model, &features, 0);
    let expected = alone(&model, &good);
    let mut batch = model.answer_batch().expect("a batch");
    batch.join(std::slice::from_ref(&good)).expect("joined");
    let broken = GenerationConfig { num_beams: 0, ..GenerationConfig::default() };
    let refused =
        batch.join(&[good.clone(), Ask { generation: broken, ..good.clone() }]).expect_err("refused");
    assert!(refused.to_string().contains("num_beams"), "{refused}");
    let mut log = Log::default();
    while !batch.is_empty() {
        log.step(&mut batch);
    }
    assert_eq!(log.answers.into_values().collect::<Vec<_>>(), [expected]);
    let long = model.prompt(&[Turn::open("word ".repeat(5000))]).expect_err("too long");
    assert!(matches!(long, blip2::Error::TextTooLong { .. }), "{long}");
    assert!(model.prompt(&[Turn::open("  ")]).is_err());
}
