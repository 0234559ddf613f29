use super::*;
use crate::testing::{assert_near, numbers as random};

fn numbers(n: usize, seed: f32) -> Vec<f32> {
    (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
}

fn span(start: usize, len: usize) -> Span {
    Span { start, len }
}

fn sequence(queries: &[Span], keys: &[Span], causal: bool) -> Sequence {
    Sequence { queries: queries.to_vec(), keys: keys.to_vec(), causal }
}

const SHAPE: AttentionShape = AttentionShape { n_heads: 4, n_kv_heads: 2, head_dim: 6, scale: 0.4 };

/// `sum(d_out * attention)` in double precision.
fn objective(q: &[f64], k: &[f64], v: &[f64], d_out: &[f64], sequences: &[Sequence]) -> f64 {
    let AttentionShape { n_heads, n_kv_heads, head_dim: d, scale } = SHAPE;
    let mut total = 0.0;
    for s in sequences {
        let (queries, keys): (Vec<_>, Vec<_>) = (rows(&s.queries).collect(), rows(&s.keys).collect());
        for h in 0..n_heads {
            let g = h * n_kv_heads / n_heads;
            for (i, &row) in queries.iter().enumerate() {
                let seen = if s.causal { &keys[..keys.len() + i + 1 - queries.len()] } else { &keys[..] };
                let key = |j: usize, c: usize| k[(j * n_kv_heads + g) * d + c];
                let query = |c: usize| q[(row * n_heads + h) * d + c];
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|&j| ((0..d).map(|c| query(c) * key(j, c)).sum::<f64>() * f64::from(scale)).exp())
                    .collect();
                let sum: f64 = scores.iter().sum();
                for c in 0..d {
                    let mixed: f64 = seen
                        .iter()
                        .zip(&scores)
                        .map(|(&j, s)| s / sum * v[(j * n_kv_heads + g) * d + c])
                        .sum();
                    total += mixed * d_out[(row * n_heads + h) * d + c];
                }
            }
        }
    }
    total
}

fn plans() -> Vec<Vec<Sequence>> {
    vec![
        vec![sequence(&[span(0, 5)], &[span(0, 7)], false)],
        vec![sequence(&[span(0, 5)], &[span(0, 7)], true)],
        // Shared keys, and spans in pieces.
        vec![
            sequence(&[span(3, 2)], &[span(1, 3), span(5, 2)], false),
            sequence(&[span(0, 1), span(2, 1)], &[span(0, 5)], true),
            sequence(&[span(1, 1)], &[span(6, 1)], true),
        ],
    ]
}

#[test]
fn values_and_gradients_equal_the_definition() {
    let (q, d_out) = (numbers(5 * 24, 0.0), numbers(5 * 24, 2.0));
    let (k, v) = (numbers(7 * 12, 3.0), numbers(7 * 12, 4.0));
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let inputs = [wide(&q), wide(&k), wide(&v)];
    for plan in plans() {
        let mut out = vec![0.0; q.len()];
        attention(&q, &k, &v, &plan, SHAPE, None, None, &mut out);
        let total: f64 = wide(&out).iter().zip(wide(&d_out)).map(|(o, d)| o * d).sum();
        assert!((total - objective(&inputs[0], &inputs[1], &inputs[2], &wide(&d_out), &plan)).abs() < 1e-5);
        let [d_q, d_k, d_v] = attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, None, None);
        for (which, gradient) in [&d_q, &d_k, &d_v].into_iter().enumerate() {
            for (i, found) in gradient.iter().enumerate() {
                let at = |h: f64| {
                    let mut inputs = inputs.clone();
                    inputs[which][i] += h;
                    objective(&inputs[0], &inputs[1], &inputs[2], &wide(&d_out), &plan)
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((f64::from(*found) - slope).abs() < 1e-5, "input {which}, {i}: {found} {slope}");
            }
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_the_others() {
    let (q, k, v) = (numbers(5 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0));
    let plan = plans().pop().expect("the last plan");
    let run = |sequences: &[Sequence]| {
        let mut out = vec![0.0; q.len()];
        attention(&q, &k, &v, sequences, SHAPE, None, None, &mut out);
        out
    };
    let all = run(&plan);
    for s in &plan {
        let alone = run(std::slice::from_ref(s));
        for row in rows(&s.queries) {
            assert_eq!(alone[row * 24..(row + 1) * 24], all[row * 24..(row + 1) * 24]);
        }
    }
}

#[test]
fn decoding_the_last_row_equals_the_whole_causal_pass() {
    let (q, k, v) = (numbers(7 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0));
    let (mut whole, mut last) = (vec![0.0; q.len()], vec![0.0; q.len()]);
    attention(&q, &k, &v, &[sequence(&[span(0, 7)], &[span(0, 7)], true)], SHAPE, None, None, &mut whole);
    attention(&q, &k, &v, &[sequence(&[span(6, 1)], &[span(0, 7)], true)], SHAPE, None, None, &mut last);
    assert_eq!(whole[6 * 24..], last[6 * 24..]);
}

/// A step of generation has code of its own; its sums run in the order of the whole pass.
#[test]
fn decoding_equals_the_whole_pass_for_every_number_of_keys() {
    for (m, head_dim) in
        (1..=70).map(|m| (m, 6)).chain((1..=40).map(|d| (9, d))).chain([(200, 64), (130, 80)])
    {
        let shape = AttentionShape { n_heads: 6, n_kv_heads: 3, head_dim, scale: 0.3 };
        let (q, k, v) =
            (random(m * 6 * head_dim, 1), random(m * 3 * head_dim, 2), random(m * 3 * head_dim, 3));
        let values = random(6 * (m + 3), 4);
        for bias in [None, Some(RelativeBias { values: &values, n_before: m })] {
            let run = |queries: Span, dropout| {
                let mut out = vec![0.0; q.len()];
                let plan = [sequence(&[queries], &[span(0, 1), span(1, m - 1)], true)];
                attention(&q, &k, &v, &plan, shape, bias, dropout, &mut out);
                out
            };
            let (whole, last) = (run(span(0, m), None), run(span(m - 1, 1), None));
            let row = (m - 1) * 6 * head_dim;
            assert_eq!(whole[row..], last[row..], "{m} {head_dim}");
            // Dropout of nothing takes the other way.
            let nothing = Some(Dropout { p: 0.0, seed: 1 });
            assert_eq!(run(span(m - 1, 1), nothing)[row..], last[row..], "{m} {head_dim}");
        }
    }
}

#[test]
fn steps_depend_neither_on_each_other_nor_on_the_number_of_threads() {
    let shape = AttentionShape { n_heads: 9, n_kv_heads: 3, head_dim: 10, scale: 0.3 };
    let (q, k, v) = (random(40 * 90, 1), random(90 * 30, 2), random(90 * 30, 3));
    let step = |i: usize| sequence(&[span(i, 1)], &[span(i, 3), span(45, i + 1)], true);
    let run = |sequences: &[Sequence]| {
        let mut out = vec![0.0; q.len()];
        attention(&q, &k, &v, sequences, shape, None, None, &mut out);
        out
    };
    let alone: Vec<Vec<f32>> = (0..40).map(|i| run(&[step(i)])[i * 90..][..90].to_vec()).collect();
    for n_threads in [1, 2, 3, 16] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
        for n in [1, 3, 5, 40] {
            let steps: Vec<Sequence> = (0..n).map(step).collect();
            let together = pool.install(|| run(&steps));
            assert!(together.chunks(90).zip(&alone).take(n).all(|(a, b)| a == b), "{n_threads} {n}");
        }
    }
}

#[test]
fn a_step_is_spoilt_by_what_it_sees_only() {
    let shape = AttentionShape { head_dim: 20, ..SHAPE };
    let (q, k, v) = (random(80, 1), random(100 * 40, 2), random(100 * 40, 3));
    // Key 7, in the first of two blocks, is not seen.
    let plan = [sequence(&[span(0, 1)], &[span(0, 7), span(8, 92)], true)];
    let run = |k: &[f32], v: &[f32]| {
        let mut out = vec![0.0; 80];
        attention(&q, k, v, &plan, shape, None, None, &mut out);
        out
    };
    let clean = run(&k, &v);
    for special in [f32::NAN, f32::INFINITY] {
        for (key, is_seen) in [(7, false), (3, true), (99, true)] {
            let spoilt = |seed| random(100 * 40, seed).with(key * 40, special);
            for out in [run(&spoilt(2), &v), run(&k, &spoilt(3))] {
                assert_eq!(out[..40].iter().any(|x| !x.is_finite()), is_seen, "{special} {key}");
                assert_eq!(out[40..], clean[40..], "{special} {key}");
                assert!(is_seen || out == clean);
            }
        }
    }
}

#[test]
#[should_panic(expected = "no keys")]
fn queries_without_keys_are_refused() {
    let plan = [sequence(&[span(0, 1)], &[], false)];
    attention(&[0.0; 24], &[0.0; 12], &[0.0; 12], &plan, SHAPE, None, None, &mut [0.0; 24]);
}

#[test]
fn keys_and_values_in_bf16_are_read_as_their_numbers() {
    let shape = AttentionShape { n_heads: 4, n_kv_heads: 2, head_dim: 20, scale: 0.3 };
    let round = |x: &[f32]| -> Vec<half::bf16> { x.iter().map(|&x| half::bf16::from_f32(x)).collect() };
    let (q, k, v) = (random(37 * 80, 1), round(&random(90 * 40, 2)), round(&random(90 * 40, 3)));
    let wide = |x: &[half::bf16]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
    assert_eq!(k, wide(&k).into_iter().map(half::bf16::narrow).collect::<Vec<_>>());
    for queries in [span(0, 37), span(36, 1)] {
        let plan = [sequence(&[queries], &[span(0, 50), span(53, 37)], true)];
        let (mut narrow, mut as_f32) = (vec![0.0; q.len()], vec![0.0; q.len()]);
        attention(&q, &k, &v, &plan, shape, None, None, &mut narrow);
        attention(&q, &wide(&k), &wide(&v), &plan, shape, None, None, &mut as_f32);
        assert_eq!(narrow, as_f32);
    }
}

#[test]
fn gradients_match_the_masks_of_the_forward_pass() {
    // With dropout the output is linear in v: its slope along a direction is exact.
    let (q, k, v, d_out) =
        (numbers(5 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0), numbers(5 * 24, 2.0));
    let dropout = Some(Dropout { p: 0.4, seed: 7 });
    for plan in plans() {
        let total = |v: &[f32]| {
            let mut out = vec![0.0; q.len()];
            attention(&q, &k, v, &plan, SHAPE, None, dropout, &mut out);
            out.iter().zip(&d_out).map(|(o, d)| f64::from(*o) * f64::from(*d)).sum::<f64>()
        };
        let [_, _, d_v] = attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, None, dropout);
        let expected: f64 = v.iter().zip(&d_v).map(|(v, d)| f64::from(*v) * f64::from(*d)).sum();
        assert!((total(&v) - expected).abs() < 1e-4, "{} {expected}", total(&v));
        assert!(total(&v) != 0.0);
    }
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let (q, k, v, d_out) =
        (numbers(5 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0), numbers(5 * 24, 2.0));
    let plan = plans().pop().expect("the last plan");
    let run = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
        pool.install(|| attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, None, None))
    };
    assert_eq!(run(1), run(3));
}

#[test]
#[should_panic(expected = "two sequences")]
fn a_query_row_in_two_sequences_is_refused() {
    let s = sequence(&[span(0, 1)], &[span(0, 1)], false);
    attention(&[0.0; 24], &[0.0; 12], &[0.0; 12], &[s.clone(), s], SHAPE, None, None, &mut [0.0; 24]);
}

/// With a bias, the scores of every head are shifted by how far the key stands from the query.
#[test]
fn a_relative_bias_shifts_the_scores() {
    let (q, k, v, d_out) =
        (numbers(5 * 24, 0.0), numbers(7 * 12, 3.0), numbers(7 * 12, 4.0), numbers(5 * 24, 2.0));
    let values = numbers(4 * 13, 5.0);
    let bias = RelativeBias { values: &values, n_before: 6 };
    for causal in [false, true] {
        let plan = [sequence(&[span(0, 5)], &[span(0, 7)], causal)];
        // The definition, in double precision; the last query stands at the last key.
        let expected = |q: &[f32], k: &[f32], v: &[f32]| -> Vec<f64> {
            let mut out = vec![0.0; 5 * 24];
            for (i, h) in (0..5).flat_map(|i| (0..4).map(move |h| (i, h))) {
                let place = i + 2;
                let seen = if causal { place + 1 } else { 7 };
                let weights: Vec<f64> = (0..seen)
                    .map(|j| {
                        let score: f64 = (0..6)
                            .map(|c| f64::from(q[i * 24 + h * 6 + c]) * f64::from(k[j * 12 + h / 2 * 6 + c]))
                            .sum();
                        (score * f64::from(SHAPE.scale) + f64::from(values[h * 13 + 6 + j - place])).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for c in 0..6 {
                    out[i * 24 + h * 6 + c] = weights
                        .iter()
                        .enumerate()
                        .map(|(j, w)| w / sum * f64::from(v[j * 12 + h / 2 * 6 + c]))
                        .sum();
                }
            }
            out
        };
        let mut out = vec![0.0; q.len()];
        attention(&q, &k, &v, &plan, SHAPE, Some(bias), None, &mut out);
        assert!(out.iter().zip(expected(&q, &k, &v)).all(|(o, e)| (f64::from(*o) - e).abs() < 1e-5));
        let [d_q, _, _] = attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, Some(bias), None);
        for i in 0..q.len() {
            let total = |by: f32| -> f64 {
                let mut q = q.clone();
                q[i] += by;
                expected(&q, &k, &v).iter().zip(&d_out).map(|(o, d)| o * f64::from(*d)).sum()
            };
            let slope = (total(1e-2) - total(-1e-2)) / 2e-2;
            assert!((f64::from(d_q[i]) - slope).abs() < 1e-3, "{i}: {} {slope}", d_q[i]);
        }
    }
}

#[test]
#[should_panic(expected = "does not reach back")]
fn a_bias_that_is_too_short_is_refused() {
    let values = [0.0; 4 * 12];
    let bias = RelativeBias { values: &values, n_before: 5 };
    let plan = [sequence(&[span(0, 5)], &[span(0, 7)], true)];
    attention(
        &[0.0; 5 * 24],
        &[0.0; 7 * 12],
        &[0.0; 7 * 12],
        &plan,
        SHAPE,
        Some(bias),
        None,
        &mut [0.0; 5 * 24],
    );
}

/// Attention of every query over the keys that it sees, in double precision.
fn reference(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    n: usize,
    m: usize,
    causal: bool,
    shape: AttentionShape,
) -> Vec<f64> {
    let AttentionShape { n_heads, n_kv_heads, head_dim: d, scale } = shape;
    let mut out = vec![0.0; q.len()];
    for (i, h) in (0..n).flat_map(|i| (0..n_heads).map(move |h| (i, h))) {
        let (seen, g) = (if causal { m + i + 1 - n } else { m }, h * n_kv_heads / n_heads);
        let query = &q[(i * n_heads + h) * d..][..d];
        let of_key = |x: &'_ [f32], j: usize, c: usize| f64::from(x[(j * n_kv_heads + g) * d + c]);
        let scores: Vec<f64> = (0..seen)
            .map(|j| (0..d).map(|c| f64::from(query[c]) * of_key(k, j, c)).sum::<f64>() * f64::from(scale))
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        for c in 0..d {
            out[(i * n_heads + h) * d + c] = (0..seen).map(|j| weights[j] / total * of_key(v, j, c)).sum();
        }
    }
    out
}

#[test]
fn every_tail_of_keys_and_heads_equals_the_definition() {
    let mut sizes: Vec<(usize, usize, usize)> = (1..=70).map(|m| (3.min(m), m, 6)).collect();
    sizes.extend((1..=70).map(|d| (2, 9, d)));
    // ViT-g and ViT-L, the Q-Former's queries over them, OPT and T5.
    sizes.extend([(17, 257, 88), (33, 257, 64), (32, 257, 64), (40, 72, 80), (5, 130, 64)]);
    for (n, m, head_dim) in sizes {
        for causal in [false, true] {
            let shape =
                AttentionShape { n_heads: 4, n_kv_heads: 2, head_dim, scale: 3.0 / (head_dim as f32).sqrt() };
            let (q, k, v) =
                (random(n * 4 * head_dim, 1), random(m * 2 * head_dim, 2), random(m * 2 * head_dim, 3));
            let plan = [sequence(&[span(0, n)], &[span(0, m)], causal)];
            let mut out = vec![0.0; q.len()];
            attention(&q, &k, &v, &plan, shape, None, None, &mut out);
            assert_near(&out, &reference(&q, &k, &v, n, m, causal, shape), 1e-5, (n, m, head_dim, causal));
        }
    }
}

#[test]
fn what_is_not_finite_reaches_those_who_see_it() {
    let shape = AttentionShape { head_dim: 20, ..SHAPE };
    let plan = [sequence(&[span(0, 37)], &[span(0, 37)], true)];
    let (q, clean_k, v) = (random(37 * 80, 1), random(37 * 40, 2), random(37 * 40, 3));
    let run = |k: &[f32], v: &[f32]| {
        let mut out = vec![0.0; q.len()];
        attention(&q, k, v, &plan, shape, None, None, &mut out);
        out
    };
    let clean = run(&clean_k, &v);
    for special in [f32::NAN, f32::INFINITY] {
        // The first key head of key 30: queries from 30 on, heads 0 and 1. A value reaches the queries that are mixed together
        // with one that sees it: see `product`.
        let (bad_k, bad_v) =
            (random(37 * 40, 2).with(30 * 40, special), random(37 * 40, 3).with(30 * 40, special));
        for (out, first) in [(run(&bad_k, &v), 30), (run(&clean_k, &bad_v), 28)] {
            for (at, (out, clean)) in out.iter().zip(&clean).enumerate() {
                let (query, head) = (at / 80, at / 20 % 4);
                if query < first || head > 1 {
                    assert_eq!(out, clean, "{special} {query} {head}");
                }
            }
            let seen = out[30 * 80..].chunks(80).any(|row| row[..40].iter().any(|x| !x.is_finite()));
            assert!(seen, "{special}");
        }
    }
}

#[test]
fn what_stands_side_by_side_is_what_stands_apart() {
    let shape = AttentionShape { n_kv_heads: 4, ..SHAPE };
    let (width, n) = (24, 7);
    let qkv = numbers(3 * n * width, 0.3);
    let part = |i: usize| -> Vec<f32> {
        qkv.chunks(3 * width).flat_map(|row| &row[i * width..(i + 1) * width]).copied().collect()
    };
    for sequences in plans() {
        let (mut joint, mut apart) = (vec![0.5; n * width], vec![0.5; n * width]);
        attention_joint(&qkv, &sequences, shape, Precision::F32, &mut joint);
        attention(&part(0), &part(1), &part(2), &sequences, shape, None, None, &mut apart);
        assert_eq!(joint, apart);
    }
}

/// ViT-g's heads and tokens: what bf16 costs, and that a picture does not depend on the one beside it.
#[test]
fn products_may_be_rounded() {
    let (shape, n) = (AttentionShape::multi_head(2, 88), 257);
    let width = 2 * 88;
    let qkv = random(2 * n * 3 * width, 5).times(2.0);
    let picture = |i: usize| Sequence::mutual(vec![span(i * n, n)]);
    let run = |isa: Isa, precision: Precision, sequences: &[Sequence]| {
        let mut out = vec![0.0; 2 * n * width];
        let part = |i: usize| Rows { values: &qkv[i * width..], stride: 3 * width };
        let offsets = vec![0; sequences.len()];
        mix(isa, precision, part(0), [part(1), part(2)], sequences, &offsets, shape, None, None, &mut out);
        out
    };
    let exact: Vec<f64> =
        run(Isa::Scalar, Precision::F32, &[picture(0), picture(1)]).into_iter().map(f64::from).collect();
    for isa in Isa::all_available() {
        let rounded = run(isa, Precision::Bf16, &[picture(0), picture(1)]);
        assert_near(&rounded, &exact, 8e-3, isa);
        assert_eq!(run(isa, Precision::Bf16, &[picture(1)])[n * width..], rounded[n * width..], "{isa:?}");
    }
}
