//! The loops on decoders whose logits are known.

use std::collections::BTreeMap;

use super::*;

const VOCAB: usize = 6;
const END: u32 = 5;

/// A decoder whose logits are a function of the text; prompts are texts as well.
struct Mock<F> {
    prompts: Vec<Vec<u32>>,
    live: Vec<Vec<u32>>,
    logits: F,
    last: Vec<f32>,
    room: usize,
    /// Tokens read, over all calls.
    n_read: usize,
}

impl<F: Fn(&[u32]) -> [f32; VOCAB]> Mock<F> {
    fn new(prompts: &[&[u32]], logits: F) -> Self {
        let prompts: Vec<_> = prompts.iter().map(|p| p.to_vec()).collect();
        Self { live: prompts.clone(), prompts, logits, last: Vec::new(), room: 1000, n_read: 0 }
    }
}

impl<F: Fn(&[u32]) -> [f32; VOCAB]> Decoder for Mock<F> {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn n_prompts(&self) -> usize {
        self.prompts.len()
    }

    fn room(&self, _: usize) -> usize {
        self.room
    }

    fn prompt_logits(&mut self) -> Result<&[f32]> {
        self.last = self.prompts.iter().flat_map(|prompt| (self.logits)(prompt)).collect();
        Ok(&self.last)
    }

    fn extend(&mut self, continuations: &[Continuation<'_>]) -> Result<&[f32]> {
        self.last.clear();
        let mut next = Vec::new();
        for continuation in continuations {
            let mut text = self.live[continuation.parent].clone();
            for &token in continuation.tokens {
                text.push(token);
                self.last.extend((self.logits)(&text));
                self.n_read += 1;
            }
            next.push(text);
        }
        self.live = next;
        Ok(&self.last)
    }
}

/// Every token equally likely, whatever came before.
fn uniform(_: &[u32]) -> [f32; VOCAB] {
    [0.0; VOCAB]
}

/// Scores that depend on the whole text and look random.
fn scrambled(text: &[u32]) -> [f32; VOCAB] {
    let seed =
        text.iter().fold(17_u64, |hash, &token| hash.wrapping_mul(31).wrapping_add(u64::from(token) + 1));
    let mut rng = crate::sampling::SampleRng::new(seed, 0);
    std::array::from_fn(|_| 4.0 * rng.next_unit() as f32)
}

fn run<D: Decoder>(decoder: &mut D, config: &GenerationConfig) -> Vec<Vec<Generation>> {
    let request = Request { config, stop: &StopRules::new(&[END]), seen: &[], constraint: None };
    generate(decoder, request, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn sampling(seed: u64) -> GenerationConfig {
    GenerationConfig { do_sample: true, max_new_tokens: 12, seed, ..Default::default() }
}

#[test]
fn a_seed_decides_all_draws() {
    let draws = |seed| run(&mut Mock::new(&[&[1], &[2, 3]], uniform), &sampling(seed));
    assert_eq!(draws(1), draws(1));
    let distinct: std::collections::BTreeSet<_> =
        (0..50).map(|seed| draws(seed)[0][0].token_ids.clone()).collect();
    // A text of four tokens or more is one of over a thousand; ends after one token are a sixth of all.
    assert!(distinct.len() > 30, "{} different texts from 50 seeds", distinct.len());
}

#[test]
fn returned_sequences_are_drawn_independently() {
    let config = GenerationConfig { num_return_sequences: 8, ..sampling(3) };
    let together = &run(&mut Mock::new(&[&[1]], scrambled), &config)[0];
    assert_eq!(together.len(), 8);
    assert!(together.iter().any(|text| text.token_ids != together[0].token_ids));
    let first = &run(&mut Mock::new(&[&[1]], scrambled), &sampling(3))[0][0];
    assert_eq!(first, &together[0], "the first sequence does not depend on how many there are");
}

#[test]
fn draws_follow_the_model() {
    let config = GenerationConfig { max_new_tokens: 1, num_return_sequences: 200, ..sampling(0) };
    let mut counts = BTreeMap::new();
    for seed in 0..50 {
        let config = GenerationConfig { seed, ..config.clone() };
        for text in
            &run(&mut Mock::new(&[&[1]], |_| [1.0, 2.0, 0.0, f32::NEG_INFINITY, 0.0, 0.0]), &config)[0]
        {
            *counts.entry(text.token_ids[0]).or_insert(0) += 1;
            let expected = [1.0_f32, 2.0, 0.0, 0.0, 0.0, 0.0][text.token_ids[0] as usize];
            let norm = (1_f32.exp() + 2_f32.exp() + 3.0).ln();
            assert!((text.log_probs[0] - (expected - norm)).abs() < 1e-5);
        }
    }
    let share = |token| f64::from(*counts.get(&token).unwrap_or(&0)) / 10_000.0;
    assert!((share(1) - 0.5637).abs() < 0.025 && (share(0) - 0.2074).abs() < 0.021, "{counts:?}");
    assert_eq!(share(3), 0.0);
}

#[test]
fn a_batch_gives_the_single_results() {
    let prompts: [&[u32]; 4] = [&[1], &[2, 3, 4], &[4, 4], &[0]];
    let beams = |num_beams| GenerationConfig { num_beams, num_return_sequences: 2, ..Default::default() };
    let configs = [
        GenerationConfig::default(),
        GenerationConfig { repetition_penalty: 1.3, no_repeat_ngram_size: 2, ..Default::default() },
        GenerationConfig { presence_penalty: 0.7, frequency_penalty: 0.4, ..Default::default() },
        sampling(5),
        GenerationConfig { num_return_sequences: 3, top_p: 0.8, ..sampling(6) },
        GenerationConfig { num_beams: 3, num_return_sequences: 2, top_k: 4, ..sampling(7) },
        beams(2),
        GenerationConfig { early_stopping: EarlyStopping::Immediate, ..beams(4) },
        GenerationConfig { early_stopping: EarlyStopping::Never, length_penalty: -1.0, ..beams(3) },
    ];
    for config in configs {
        let config = GenerationConfig { max_new_tokens: 9, ..config };
        let batch = run(&mut Mock::new(&prompts, scrambled), &config);
        for (prompt, together) in prompts.iter().zip(&batch) {
            assert_eq!(together, &run(&mut Mock::new(&[prompt], scrambled), &config)[0], "{config:?}");
        }
    }
}

/// Every text up to `n` tokens that beam search could return, by score.
fn all_texts(prompt: &[u32], n: usize, length_penalty: f32) -> Vec<(f32, Vec<u32>)> {
    let mut open = vec![(0.0_f32, Vec::new())];
    let mut complete = Vec::new();
    for len in 1..=n {
        let mut longer = Vec::new();
        for (sum, text) in &open {
            let logits = scrambled(&[prompt, text].concat());
            let norm = log_sum_exp(&logits);
            for (token, logit) in (0..).zip(logits) {
                let sum = sum + logit - norm;
                let text: Vec<u32> = text.iter().copied().chain([token]).collect();
                if token == END || len == n {
                    complete.push((normalised(sum, len, length_penalty), text));
                } else {
                    longer.push((sum, text));
                }
            }
        }
        open = longer;
    }
    complete.sort_by(|a, b| b.0.total_cmp(&a.0));
    complete
}

#[test]
fn enough_beams_find_the_best_texts_of_all() {
    // 125 unfinished texts of three tokens at most: 200 beams hold them all, so nothing is pruned.
    for length_penalty in [0.0, 1.0, -1.0] {
        let config = GenerationConfig {
            num_beams: 200,
            num_return_sequences: 5,
            length_penalty,
            max_new_tokens: 4,
            early_stopping: EarlyStopping::Never,
            ..Default::default()
        };
        let found = &run(&mut Mock::new(&[&[3]], scrambled), &config)[0];
        for (found, (score, text)) in found.iter().zip(all_texts(&[3], 4, length_penalty)) {
            assert_eq!(found.token_ids, text);
            assert!((found.score - score).abs() < 1e-5);
        }
    }
}

#[test]
fn cold_beam_sampling_is_beam_search() {
    for length_penalty in [0.0, 1.0, -1.0] {
        for early_stopping in [EarlyStopping::Heuristic, EarlyStopping::Immediate, EarlyStopping::Never] {
            let beams = GenerationConfig {
                num_beams: 4,
                num_return_sequences: 4,
                max_new_tokens: 9,
                length_penalty,
                early_stopping,
                ..Default::default()
            };
            let cold = GenerationConfig { do_sample: true, temperature: 1e-6, seed: 11, ..beams.clone() };
            let expected = &run(&mut Mock::new(&[&[1]], scrambled), &beams)[0];
            let drawn = &run(&mut Mock::new(&[&[1]], scrambled), &cold)[0];
            for (drawn, expected) in drawn.iter().zip(expected) {
                assert_eq!(drawn.token_ids, expected.token_ids, "{beams:?}");
                assert_eq!(drawn.log_probs, expected.log_probs, "the model's own");
                let score = drawn.score * 1e-6;
                assert!((score - expected.score).abs() < 1e-4 * expected.score.abs(), "{score} {expected:?}");
            }
        }
    }
}

#[test]
fn beam_sampling_draws_different_texts_and_ranks_them() {
    let config = |seed| GenerationConfig { num_beams: 4, num_return_sequences: 4, ..sampling(seed) };
    let texts = |seed| run(&mut Mock::new(&[&[1], &[2, 3]], scrambled), &config(seed));
    assert_eq!(texts(1), texts(1));
    // So few tokens have one likeliest text, which nearly every draw holds: the others tell the draws apart.
    let token_ids =
        |texts: &[Generation]| texts.iter().map(|text| text.token_ids.clone()).collect::<Vec<_>>();
    let drawn: std::collections::BTreeSet<_> = (0..50).map(|seed| token_ids(&texts(seed)[0])).collect();
    assert!(drawn.len() > 10, "{} different results from 50 seeds", drawn.len());
    for seed in 0..50 {
        for of_prompt in texts(seed) {
            assert!(of_prompt.windows(2).all(|pair| pair[0].score >= pair[1].score));
            let different: std::collections::BTreeSet<_> =
                of_prompt.iter().map(|text| &text.token_ids).collect();
            assert_eq!(different.len(), 4, "nothing is put back");
            for text in of_prompt {
                // Nothing was filtered, so that the score is the model's.
                let own = normalised(text.log_probs.iter().sum(), text.token_ids.len(), 1.0);
                assert!((text.score - own).abs() < 1e-5);
            }
        }
    }
}

/// The probability that one of some weights is drawn last, where nothing is put back.
fn drawn_last(weight: f64, others: &[f64]) -> f64 {
    if others.is_empty() {
        return 1.0;
    }
    let total = weight + others.iter().sum::<f64>();
    let first = |i: usize| others[i] / total * drawn_last(weight, &[&others[..i], &others[i + 1..]].concat());
    (0..others.len()).map(first).sum()
}

/// Two beams and an end token: four of five possible continuations are drawn, and the best of them is returned.
#[test]
fn beams_are_drawn_by_the_probabilities_of_their_texts() {
    let logits = [0.3, 0.6, 0.0, f32::NEG_INFINITY, 0.0, 0.0];
    let n_seeds = 4000_u16;
    let config = |seed| GenerationConfig { num_beams: 2, max_new_tokens: 1, ..sampling(seed) };
    let n_without_best = (0..n_seeds)
        .filter(|&seed| {
            let text = &run(&mut Mock::new(&[&[1]], |_: &[u32]| logits), &config(seed.into()))[0][0];
            assert!([0, 1].contains(&text.token_ids[0]), "only one is left out");
            text.token_ids[0] == 0
        })
        .count();
    let expected = drawn_last(0.6_f64.exp(), &[0.3_f64.exp(), 1.0, 1.0, 1.0]);
    let share = n_without_best as f64 / f64::from(n_seeds);
    // Five standard deviations.
    let tolerance = 5.0 * (expected * (1.0 - expected) / f64::from(n_seeds)).sqrt();
    assert!((share - expected).abs() < tolerance, "{share}, expected {expected}");
}

#[test]
fn filters_leave_a_token_that_goes_on() {
    // The end is so likely that a filter alone would leave nothing else.
    let logits: [f32; VOCAB] = [0.0, 1.0, 0.0, 0.0, 0.0, 50.0];
    for filter in [
        GenerationConfig { top_k: 1, ..sampling(3) },
        GenerationConfig { top_p: 0.1, ..sampling(3) },
        GenerationConfig { min_p: 0.9, ..sampling(3) },
    ] {
        let config = GenerationConfig { num_beams: 2, num_return_sequences: 2, max_new_tokens: 3, ..filter };
        let texts = run(&mut Mock::new(&[&[1]], |_: &[u32]| logits), &config).remove(0);
        let tokens: Vec<_> = texts.iter().map(|text| text.token_ids.clone()).collect();
        assert_eq!(tokens, [vec![END], vec![1, END]], "{config:?}");
    }
}

#[test]
fn one_beam_more_than_greedy_is_never_less_likely() {
    let likelihood = |config: &GenerationConfig| -> f32 {
        run(&mut Mock::new(&[&[2]], scrambled), config)[0][0].log_probs.iter().sum()
    };
    let end_impossible = GenerationConfig { max_new_tokens: 6, min_new_tokens: 6, ..Default::default() };
    let greedy = likelihood(&end_impossible);
    let beams = likelihood(&GenerationConfig { num_beams: 200, ..end_impossible.clone() });
    assert!(beams >= greedy, "{beams} < {greedy}");
}

#[test]
fn limits_and_end_tokens_say_why_a_text_ends() {
    let ends_after =
        |n: usize| move |text: &[u32]| std::array::from_fn(|i| ((i == 5) == (text.len() > n)) as u8 as f32);
    for num_beams in [1, 3] {
        let config = GenerationConfig { num_beams, max_new_tokens: 4, ..Default::default() };
        let text = &run(&mut Mock::new(&[&[0]], ends_after(99)), &config)[0][0];
        assert_eq!((text.token_ids.len(), text.finish), (4, FinishReason::MaxNewTokens));
        let mut cramped = Mock::new(&[&[0]], ends_after(99));
        cramped.room = 2;
        let text = &run(&mut cramped, &config)[0][0];
        assert_eq!((text.token_ids.len(), text.finish), (2, FinishReason::ContextFull));
    }
    let text = &run(&mut Mock::new(&[&[0]], ends_after(2)), &GenerationConfig::default())[0][0];
    assert_eq!((text.token_ids.as_slice(), text.finish), (&[0, 0, END][..], FinishReason::EndOfText));
    let mut full = Mock::new(&[&[0]], uniform);
    full.room = 0;
    let config = GenerationConfig::default();
    let request = Request { config: &config, stop: &StopRules::default(), seen: &[], constraint: None };
    let error = generate(&mut full, request, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
}

/// What transformers gives for the same, but for the copies that it has of other texts or of nothing.
#[test]
fn as_many_texts_come_back_as_are_asked_for() {
    let beams = |n, max_new_tokens| GenerationConfig {
        num_beams: n,
        num_return_sequences: n,
        max_new_tokens,
        ..Default::default()
    };
    let texts = |config: &GenerationConfig| run(&mut Mock::new(&[&[1]], scrambled), config).remove(0);
    // One text is possible.
    let only_two = GenerationConfig { suppress_tokens: vec![0, 1, 3, 4, END], ..beams(5, 3) };
    let found = texts(&only_two);
    assert!(found.len() == 5 && found.iter().all(|text| text.token_ids == [2, 2, 2]), "{found:?}");
    assert!(found[0].score > -100.0);
    assert!(found[1..].iter().all(|text| text.score == -333_333_344.0), "{found:?}");
    // One token is, which ends the text.
    let ended = GenerationConfig { forced_eos_token_id: vec![END], ..beams(3, 1) };
    let found = texts(&ended);
    let scores: Vec<f32> = found.iter().map(|text| text.score).collect();
    assert_eq!(scores, [0.0, -1e9, -1e9]);
    assert!(found.iter().all(|text| text.token_ids == [END]));
    // A text can end only before its first token, and the other beams come to where nothing may follow.
    let stuck = GenerationConfig {
        bad_words_ids: (0..END).map(|token| vec![token, END]).collect(),
        no_repeat_ngram_size: 1,
        ..beams(8, 12)
    };
    let found = texts(&stuck);
    assert!(found.len() == 8 && found.iter().all(|text| text.token_ids == [END]), "{found:?}");
}

#[test]
fn scores_that_are_not_numbers_are_an_error() {
    for num_beams in [1, 2] {
        let config = GenerationConfig { num_beams, ..Default::default() };
        let request = Request { config: &config, stop: &StopRules::default(), seen: &[], constraint: None };
        let mut broken = Mock::new(&[&[0]], |_| [f32::NAN; VOCAB]);
        let error = generate(&mut broken, request, &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(error.to_string().contains("no usable score"), "{error}");
    }
}

#[test]
fn a_stop_string_ends_a_text_wherever_tokens_split_it() {
    let decode = |ids: &[u32]| -> Result<String> {
        Ok(ids.iter().map(|&id| ["a", "b", ".\n", "c", "\n", ""][id as usize]).collect())
    };
    let stop = StopRules::new(&[END]).with_text(&decode);
    // The likeliest text is a b a b …, and "\n" "\n" from the fifth token on.
    let logits = |text: &[u32]| {
        let best = if text.len() > 4 { 4 } else { (text.len() - 1) % 2 };
        std::array::from_fn(|i| if i == best { 9.0 } else { 0.0 })
    };
    for num_beams in [1, 3] {
        for (strings, expected) in [(&["\n\n"][..], 6), (&["bab", "zz"], 4), (&["c"], 10)] {
            let config = GenerationConfig {
                num_beams,
                max_new_tokens: 10,
                length_penalty: 0.0,
                early_stopping: EarlyStopping::Never,
                stop_strings: strings.iter().map(ToString::to_string).collect(),
                ..Default::default()
            };
            let request = Request { config: &config, stop: &stop, seen: &[], constraint: None };
            let results =
                generate(&mut Mock::new(&[&[0]], logits), request, &mut |_| ControlFlow::Continue(()));
            let text = &results.unwrap()[0][0];
            assert_eq!(text.token_ids.len(), expected, "{num_beams} beams, {strings:?}: {text:?}");
            let by_string = text.finish == FinishReason::StopString;
            assert_eq!(by_string, expected < 10);
        }
    }
    let config = GenerationConfig { stop_strings: vec!["x".into()], ..Default::default() };
    let request = Request { config: &config, stop: &StopRules::new(&[END]), seen: &[], constraint: None };
    let error =
        generate(&mut Mock::new(&[&[0]], uniform), request, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("stop_strings"), "{error}");
}

#[test]
fn the_callback_sees_every_token_and_can_stop() {
    let stop = StopRules::new(&[END]);
    let config = GenerationConfig { num_return_sequences: 2, max_new_tokens: 6, ..sampling(1) };
    let request = Request { config: &config, stop: &stop, seen: &[], constraint: None };
    let prompts: [&[u32]; 2] = [&[1], &[2]];
    let mut streamed = BTreeMap::<_, Vec<u32>>::new();
    let results = generate(&mut Mock::new(&prompts, scrambled), request, &mut |event| {
        let Event::Token { prompt, sequence, token, .. } = event else { panic!("{event:?}") };
        streamed.entry((prompt, sequence)).or_default().push(token);
        ControlFlow::Continue(())
    })
    .unwrap();
    for (&(prompt, sequence), tokens) in &streamed {
        assert_eq!(tokens, &results[prompt][sequence].token_ids);
    }
    assert_eq!(streamed.len(), 4);

    for num_beams in [1, 3] {
        let config =
            GenerationConfig { num_beams, min_new_tokens: 10, max_new_tokens: 10, ..Default::default() };
        let request = Request { config: &config, stop: &stop, seen: &[], constraint: None };
        let mut n_events = 0;
        let mut decoder = Mock::new(&[&[1]], scrambled);
        let results = generate(&mut decoder, request, &mut |_| {
            n_events += 1;
            if n_events == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert_eq!(n_events, 4);
        let text = &results[0][0];
        assert_eq!((text.token_ids.len(), text.finish), (4, FinishReason::Cancelled));
        assert_eq!(decoder.n_read, 3 * num_beams, "nothing is read after the stop");
    }
}

#[test]
fn penalties_see_the_prompt_only_when_asked() {
    let config = GenerationConfig { no_repeat_ngram_size: 1, max_new_tokens: 2, ..Default::default() };
    let prefer_zero = |_: &[u32]| [5.0, 4.0, 3.0, 2.0, 1.0, 0.0];
    let generated = |seen: &[Vec<u32>]| {
        let request = Request { config: &config, stop: &StopRules::new(&[END]), seen, constraint: None };
        let results =
            generate(&mut Mock::new(&[&[0]], prefer_zero), request, &mut |_| ControlFlow::Continue(()));
        results.unwrap()[0][0].token_ids.clone()
    };
    assert_eq!(generated(&[]), [0, 1]);
    assert_eq!(generated(&[vec![0, 2]]), [1, 3]);
}

#[test]
fn openais_penalties_see_generated_tokens_only() {
    let logits: [f32; VOCAB] = [5.0, 4.0, 3.5, 2.0, 1.0, 0.0];
    let generated = |presence_penalty, frequency_penalty, num_beams| {
        let config = GenerationConfig {
            presence_penalty,
            frequency_penalty,
            num_beams,
            max_new_tokens: 4,
            ..Default::default()
        };
        let (stop, seen) = (StopRules::new(&[END]), [vec![0, 0, 1]]);
        let request = Request { config: &config, stop: &stop, seen: &seen, constraint: None };
        let mut decoder = Mock::new(&[&[0]], |_: &[u32]| logits);
        let text = generate(&mut decoder, request, &mut |_| ControlFlow::Continue(())).unwrap()[0][0].clone();
        let own = logits[text.token_ids[0] as usize] - log_sum_exp(&logits);
        assert!((text.log_probs[0] - own).abs() < 1e-6, "the model's own");
        text.token_ids
    };
    assert_eq!(generated(0.0, 0.0, 1), [0, 0, 0, 0]);
    // Once for however often: 0 has 3.25 from its first time on, 1 has 2.25, 2 has 1.75.
    assert_eq!(generated(1.75, 0.0, 1), [0, 1, 2, 0]);
    // Each time anew: 0 has 5, 3.75, 2.5; 1 has 4, 2.75; 2 has 3.5.
    assert_eq!(generated(0.0, 1.25, 1), [0, 1, 0, 2]);
    assert_eq!(generated(-2.0, 0.0, 1), [0, 0, 0, 0]);
    assert_eq!(generated(0.0, 0.0, 2), [0, 0, 0, 0]);
    assert_ne!(generated(1.75, 1.25, 2), [0, 0, 0, 0], "beams are held to them too");
}

#[test]
fn answers_are_scored_token_by_token_from_one_reading_of_the_prompt() {
    let answers: Vec<Vec<u32>> =
        (0..40).map(|i| (0..1 + i % 5).map(|j| (i + j) as u32 % 6).collect()).collect();
    let mut decoder = Mock::new(&[&[3, 1]], scrambled);
    let scores = score(&mut decoder, &answers).unwrap();
    for (answer, score) in answers.iter().zip(&scores) {
        let mut text = vec![3, 1];
        for (&token, log_prob) in answer.iter().zip(&score.log_probs) {
            let logits = scrambled(&text);
            assert!((logits[token as usize] - log_sum_exp(&logits) - log_prob).abs() < 1e-6);
            text.push(token);
        }
        assert_eq!(score.log_probs.len(), answer.len());
        assert!((score.log_likelihood() - score.log_probs.iter().sum::<f32>()).abs() < 1e-6);
    }
    assert_eq!(decoder.n_read, answers.iter().map(|answer| answer.len() - 1).sum::<usize>());
    for (answers, expected) in [(vec![vec![]], "empty"), (vec![vec![6]], "not in the vocabulary")] {
        let error = score(&mut decoder, &answers).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = score(&mut Mock::new(&[&[0], &[1]], uniform), &[vec![1]]).unwrap_err();
    assert!(error.to_string().contains("one prompt"), "{error}");
}
