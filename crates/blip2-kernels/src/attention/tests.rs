use super::*;

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
        attention(&q, &k, &v, &plan, SHAPE, None, &mut out);
        let total: f64 = wide(&out).iter().zip(wide(&d_out)).map(|(o, d)| o * d).sum();
        assert!((total - objective(&inputs[0], &inputs[1], &inputs[2], &wide(&d_out), &plan)).abs() < 1e-5);
        let (mut d_q, mut d_k, mut d_v) = (vec![9.0; q.len()], vec![9.0; k.len()], vec![9.0; v.len()]);
        attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, None, &mut d_q, &mut d_k, &mut d_v);
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
        attention(&q, &k, &v, sequences, SHAPE, None, &mut out);
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
    attention(&q, &k, &v, &[sequence(&[span(0, 7)], &[span(0, 7)], true)], SHAPE, None, &mut whole);
    attention(&q, &k, &v, &[sequence(&[span(6, 1)], &[span(0, 7)], true)], SHAPE, None, &mut last);
    assert_eq!(whole[6 * 24..], last[6 * 24..]);
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
            attention(&q, &k, v, &plan, SHAPE, dropout, &mut out);
            out.iter().zip(&d_out).map(|(o, d)| f64::from(*o) * f64::from(*d)).sum::<f64>()
        };
        let (mut d_q, mut d_k, mut d_v) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, dropout, &mut d_q, &mut d_k, &mut d_v);
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
        let (mut d_q, mut d_k, mut d_v) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        pool.install(|| {
            attention_backward(&q, &k, &v, &d_out, &plan, SHAPE, None, &mut d_q, &mut d_k, &mut d_v)
        });
        (d_q, d_k, d_v)
    };
    assert_eq!(run(1), run(3));
}

#[test]
#[should_panic(expected = "two sequences")]
fn a_query_row_in_two_sequences_is_refused() {
    let s = sequence(&[span(0, 1)], &[span(0, 1)], false);
    attention(&[0.0; 24], &[0.0; 12], &[0.0; 12], &[s.clone(), s], SHAPE, None, &mut [0.0; 24]);
}
