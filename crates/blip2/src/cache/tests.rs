use super::*;

/// Appends rows whose value is their row number.
fn append(cache: &mut KvCache, sequences: &mut [CachedSequence], lengths: &[usize]) -> Appended {
    let first = cache.n_rows();
    let n: usize = lengths.iter().sum();
    cache
        .append(sequences, lengths, |layers, _, appended| {
            for layer in layers {
                let rows: Vec<f32> = (first..first + n).map(|row| row as f32).collect();
                layer.push(&rows, &rows);
            }
            Ok(Appended {
                positions: appended.positions.clone(),
                plan: appended.plan.clone(),
                memory_plan: appended.memory_plan.clone(),
            })
        })
        .unwrap()
}

fn numbers(layer: &LayerRows) -> &KeysAndValues<f32> {
    let LayerRows::F32(rows) = layer else { panic!("it is in f32") };
    rows
}

fn rows(sequence: &CachedSequence) -> Vec<usize> {
    sequence.rows().collect()
}

#[test]
fn beams_share_their_prompt_and_part_ways() {
    let mut cache = KvCache::new(2, 1, Precision::F32);
    let mut prompts = [CachedSequence::new(), CachedSequence::new()];
    let first = append(&mut cache, &mut prompts, &[3, 2]);
    assert_eq!(*first.positions, [0, 1, 2, 0, 1]);
    assert_eq!(first.plan[1].queries, [Span { start: 3, len: 2 }]);
    assert_eq!(first.plan[1].keys, [Span { start: 3, len: 2 }]);

    let mut beams = [prompts[0].clone(), prompts[0].clone(), prompts[1].clone()];
    append(&mut cache, &mut beams, &[1, 1, 1]);
    assert_eq!(beams.each_ref().map(rows), [vec![0, 1, 2, 5], vec![0, 1, 2, 6], vec![3, 4, 7]]);
    // The second beam's text goes on twice, the first beam's is dropped.
    let mut beams = [beams[1].clone(), beams[1].clone()];
    let step = append(&mut cache, &mut beams, &[1, 1]);
    assert_eq!(*step.positions, [4, 4]);
    assert_eq!(beams.each_ref().map(rows), [vec![0, 1, 2, 6, 8], vec![0, 1, 2, 6, 9]]);
    assert_eq!(step.plan[0].keys.len(), 3);
    assert_eq!(cache.n_rows(), 10);

    cache.trim(&prompts);
    assert_eq!(cache.n_rows(), 5);
    let error = cache.append(&mut beams, &[1, 1], |_, _, _| Ok(())).unwrap_err();
    assert!(error.to_string().contains("trimmed"), "{error}");
}

#[test]
fn truncation_cuts_across_spans() {
    let mut sequence = CachedSequence::new();
    for (start, len) in [(0, 3), (3, 1), (7, 2), (9, 0), (12, 1)] {
        sequence.push(Span { start, len });
    }
    assert_eq!((sequence.spans.len(), sequence.len()), (3, 7));
    sequence.truncate(99);
    assert_eq!(sequence.len(), 7);
    sequence.truncate(5);
    assert_eq!(rows(&sequence), [0, 1, 2, 3, 7]);
    sequence.truncate(0);
    assert!(sequence.is_empty() && sequence.spans.is_empty());
}

#[test]
fn a_failed_pass_leaves_no_trace() {
    let mut cache = KvCache::new(2, 1, Precision::F32);
    let mut sequences = [CachedSequence::new()];
    append(&mut cache, &mut sequences, &[2]);
    let before = sequences.clone();
    let failed: Result<()> = cache.append(&mut sequences, &[1], |layers, _, _| {
        layers[0].push(&[9.0], &[9.0]);
        Err(Error::Request("cancelled".into()))
    });
    assert!(failed.is_err());
    assert_eq!(sequences, before);
    append(&mut cache, &mut sequences, &[1]);
    assert_eq!(numbers(&cache.layers[0]).keys, [0.0, 1.0, 2.0]);
    assert_eq!(rows(&sequences[0]), [0, 1, 2]);
}

#[test]
fn compaction_keeps_what_is_used_and_puts_it_side_by_side() {
    let mut cache = KvCache::new(2, 1, Precision::F32);
    let mut prompts = [CachedSequence::new(), CachedSequence::new()];
    append(&mut cache, &mut prompts, &[2, 3]);
    // Two texts take turns; one forks.
    append(&mut cache, &mut prompts, &[1, 1]);
    let mut texts = [prompts[1].clone(), prompts[1].clone()];
    append(&mut cache, &mut texts, &[1, 1]);
    assert_eq!(texts.each_ref().map(rows), [vec![2, 3, 4, 6, 7], vec![2, 3, 4, 6, 8]]);
    assert_eq!((cache.n_rows(), cache.n_rows_of(&texts)), (9, 6));
    let values = |cache: &KvCache, text: &CachedSequence| -> Vec<f32> {
        text.rows().map(|row| numbers(&cache.layers[1]).values[row]).collect()
    };
    let before = texts.each_ref().map(|text| values(&cache, text));
    cache.compact(&mut texts);
    assert_eq!(texts.each_ref().map(rows), [vec![0, 1, 2, 3, 4], vec![0, 1, 2, 3, 5]]);
    assert_eq!(texts[0].spans.len(), 1, "side by side");
    assert_eq!(texts.each_ref().map(|text| values(&cache, text)), before);
    assert_eq!(cache.n_rows(), 6);
    append(&mut cache, &mut texts, &[1, 1]);
    assert_eq!(texts.each_ref().map(rows), [vec![0, 1, 2, 3, 4, 6], vec![0, 1, 2, 3, 5, 7]]);
}

#[test]
fn room_is_kept_for_as_many_rows_as_were_needed_lately() {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut cache = KvCache::with_memory(2, 3, precision);
        // Two texts of `n` rows, of which one goes on.
        let mut turn = |n: usize| {
            let mut texts = [CachedSequence::new(), CachedSequence::new()];
            let append = |layers: &mut [LayerRows], _: &[LayerRows], _: &Appended| {
                let rows: Vec<f32> = (0..2 * n * 3).map(|i| (i % 200) as f32).collect();
                layers.iter_mut().for_each(|layer| layer.push(&rows, &rows));
                Ok(())
            };
            cache.append(&mut texts, &[n, n], append).unwrap();
            let memory = Tensor::zeros((n, 3), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
            let layer = [memory.clone(), memory];
            cache.remember(&mut texts[1..], &[n], &[layer.clone(), layer]).unwrap();
            cache.compact(&mut texts[1..]);
            with_rows!(&cache.layers[1], rows => {
                assert!(rows.keys.iter().zip(3 * n..).all(|(x, i)| x.widen() == (i % 200) as f32));
            });
            cache.compact(&mut []);
            assert_eq!((cache.n_rows(), cache.n_memory_rows()), (0, 0));
            cache.n_bytes()
        };
        let few = turn(60);
        assert!(few > 0 && (0..50).all(|_| turn(60) == few && turn(50) == few));
        let many = turn(5000);
        assert!(many > 20 * few);
        assert!((0..20).all(|_| turn(60) == many), "there may be as many again");
        let after: Vec<usize> = (0..1000).map(|_| turn(60)).collect();
        assert!(after.is_sorted_by(|a, b| a >= b));
        assert!(after[999] <= 3 * few, "{} bytes are still held, {few} were enough", after[999]);
    }
}

#[test]
fn a_beginning_is_copied_out_and_in() {
    let mut cache = KvCache::new(2, 1, Precision::F32);
    let mut texts = [CachedSequence::new(), CachedSequence::new()];
    append(&mut cache, &mut texts, &[2, 3]);
    append(&mut cache, &mut texts, &[2, 0]);
    assert_eq!(rows(&texts[0]), [0, 1, 5, 6]);
    let beginning = cache.beginning(&texts[0], 3).unwrap();
    assert_eq!((beginning.len(), beginning.n_bytes()), (3, 3 * 2 * 2 * 4));
    assert!(cache.beginning(&texts[0], 5).is_none(), "it has four tokens");

    let mut other = KvCache::new(2, 1, Precision::F32);
    append(&mut other, &mut [CachedSequence::new()], &[1]);
    let mut text = [other.begin(&beginning, 3).unwrap()];
    assert_eq!((rows(&text[0]), other.n_rows()), (vec![1, 2, 3], 4));
    assert_eq!(numbers(&other.layers[1]).keys, [0.0, 0.0, 1.0, 5.0]);
    let next = append(&mut other, &mut text, &[1]);
    assert_eq!((*next.positions).to_vec(), [3]);
    assert_eq!(rows(&text[0]), [1, 2, 3, 4]);
    // Another text begins with a part of it.
    let part = other.begin(&beginning, 2).unwrap();
    assert_eq!((rows(&part), other.n_rows()), (vec![5, 6], 7));
    assert_eq!(numbers(&other.layers[1]).values[5..], [0.0, 1.0]);
    assert!(other.begin(&beginning, 4).is_err(), "it has three tokens");
    assert_eq!(other.n_rows(), 7);
    assert!(KvCache::new(3, 1, Precision::F32).begin(&beginning, 3).is_err());
    assert!(KvCache::new(2, 1, Precision::Bf16).begin(&beginning, 3).is_err());
}

#[test]
fn a_cache_in_bf16_takes_half_the_memory() {
    let mut cache = KvCache::new(2, 1, Precision::Bf16);
    let mut texts = [CachedSequence::new()];
    append(&mut cache, &mut texts, &[3]);
    let LayerRows::Bf16(rows) = &cache.layers[1] else { panic!("it is in bf16") };
    assert_eq!(rows.keys, [0.0, 1.0, 2.0].map(bf16::from_f32));
    assert_eq!((cache.row_bytes(), KvCache::new(2, 1, Precision::F32).row_bytes()), (8, 16));
    let beginning = cache.beginning(&texts[0], 2).expect("two tokens");
    assert_eq!(beginning.n_bytes(), 2 * 8);
    let mut other = KvCache::new(2, 1, Precision::Bf16);
    assert_eq!(other.begin(&beginning, 2).expect("a like cache").len(), 2);
}

#[test]
fn growing_rarely_moves_the_rows() {
    let mut cache = KvCache::new(1, 4, Precision::F32);
    let mut sequences = [CachedSequence::new()];
    let mut n_moves = 0;
    for _ in 0..1000 {
        let before = cache.layers[0].capacity();
        let grow = |layers: &mut [LayerRows], _: &[LayerRows], _: &Appended| {
            layers[0].push(&[0.0; 4], &[0.0; 4]);
            Ok(())
        };
        cache.append(&mut sequences, &[1], grow).unwrap();
        n_moves += usize::from(cache.layers[0].capacity() != before);
    }
    assert!(n_moves <= 8, "{n_moves}");
    assert_eq!((sequences[0].len(), sequences[0].spans.len()), (1000, 1));
}
