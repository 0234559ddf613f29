use super::format::{Layout, with_layout};
use super::*;
use crate::activation::Activation;
use half::f16;

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// A mapped file's bytes: at an odd address, with nothing behind them.
struct Odd(Vec<u8>);

impl AsRef<[u8]> for Odd {
    fn as_ref(&self) -> &[u8] {
        &self.0[1..]
    }
}

fn odd(w: &QuantizedWeight) -> QuantizedWeight {
    let bytes = Box::new(Odd([&[0], w.bytes()].concat()));
    QuantizedWeight::from_bytes(w.out_features(), w.in_features(), w.format(), bytes)
}

/// Any weight of a format. `n_in` must be what the format takes.
fn weight(format: Format, n_out: usize, n_in: usize) -> QuantizedWeight {
    if !Format::ROUNDED.contains(&format) {
        let stored = stored_rows(format, n_out, n_in);
        let row_bytes = stored.len() / n_out;
        return odd(&QuantizedWeight::from_gguf_blocks(n_out, n_in, format, &|i| {
            &stored[i * row_bytes..(i + 1) * row_bytes]
        }));
    }
    let w = numbers(n_out * n_in, 11);
    odd(&QuantizedWeight::quantize(n_out, n_in, format, &|i, row| {
        row.copy_from_slice(&w[i * n_in..(i + 1) * n_in]);
    }))
}

/// Inputs and bytes of a block in GGUF, and where in it numbers in half precision are.
fn stored_block(format: Format) -> (usize, usize, &'static [usize]) {
    match format {
        Format::Int8 | Format::Int8LongBlocks => panic!("GGUF does not have it"),
        Format::Int8Blocks => (32, 34, &[0]),
        Format::Int4 => (32, 18, &[0]),
        Format::Int4Offset => (32, 20, &[0, 2]),
        Format::Q4K => (256, 144, &[0, 2]),
        Format::Q5K => (256, 176, &[0, 2]),
        Format::Q6K => (256, 210, &[208]),
    }
}

/// Rows of GGUF blocks of random bytes, their numbers in half precision within 0.001 to 0.005 either way.
fn stored_rows(format: Format, n_out: usize, n_in: usize) -> Vec<u8> {
    let (inputs, size, halves) = stored_block(format);
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 24
    };
    let mut stored: Vec<u8> = (0..n_out * n_in / inputs * size).map(|_| random() as u8).collect();
    for block in stored.chunks_exact_mut(size) {
        for &at in halves {
            let half = f16::from_f32(0.001 + random() as f32 / 255.0 * 0.004);
            let half = if random() < 128 { half } else { -half };
            block[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    stored
}

fn bits(y: &[f32]) -> Vec<u32> {
    // One NaN is as good as another.
    y.iter().map(|y| if y.is_nan() { f32::NAN.to_bits() } else { y.to_bits() }).collect()
}

/// A row of activations as the kernels round it, block by block, in f64.
fn rounded(x: &[f32], block: usize) -> Vec<f64> {
    x.chunks(block)
        .flat_map(|x| {
            let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            x.iter().map(move |&x| {
                let step = f64::from(largest / 127.0);
                f64::from((x * (127.0 / largest)).round_ties_even()) * step
            })
        })
        .collect()
}

#[test]
fn products_equal_the_reference_for_all_tails_and_the_widths_of_the_models() {
    // Outputs that fill no panel, inputs that fill no quad and no block, rows that fill no tile.
    let mut sizes: Vec<(usize, usize, usize)> = (1..=70).map(|n_in| (n_in % 15 + 1, 33, n_in)).collect();
    sizes.extend((1..=70).map(|n_out| (n_out % 13 + 1, n_out, 40)));
    sizes.extend([(3, 88, 257), (13, 384, 576), (2, 31, 2560), (7, 96, 1408), (1, 33, 10_240)]);
    // Rows of whole registers that fill none, one and more of them, and blocks that fill no turn of AMX.
    sizes.extend([(13, 33, 64), (16, 64, 1024), (40, 70, 1088), (49, 33, 320)]);
    for width in [88, 257, 384, 576, 768, 1280, 1408, 2560, 6144, 10_240, 50_272] {
        sizes.extend([(2, 33, width), (2, width, 36)]);
    }
    for format in Format::ALL {
        // Formats without blocks in part take the next input that they can.
        let mut sizes: Vec<_> = sizes
            .iter()
            .map(|&(n_rows, n_out, n_in)| {
                (n_rows, n_out, n_in.next_multiple_of(format.in_features_multiple()))
            })
            .collect();
        sizes.sort();
        sizes.dedup();
        for &(n_rows, n_out, n_in) in &sizes {
            let (w, bias) = (weight(format, n_out, n_in), numbers(n_out, 3));
            // Unaligned: one element into its memory.
            let x = &numbers(n_rows * n_in + 1, 7)[1..];
            let residual = numbers(n_rows * n_out, 5);
            let epilogue =
                Epilogue { bias: Some(&bias), activation: Activation::Relu, residual: Some(&residual) };
            let y = w.forward_with(Isa::Scalar, x, n_rows, epilogue);
            let mut row = vec![0.0; n_in];
            let block = format.block().unwrap_or(n_in);
            let x_rounded: Vec<Vec<f64>> = x.chunks_exact(n_in).map(|x| rounded(x, block)).collect();
            for (o, &bias) in bias.iter().enumerate() {
                w.row(o, &mut row);
                for (i, x) in x_rounded.iter().enumerate() {
                    let product: f64 = x.iter().zip(&row).map(|(x, w)| x * f64::from(*w)).sum();
                    let at = i * n_out + o;
                    let expected = (product + f64::from(bias)).max(0.0) + f64::from(residual[at]);
                    let magnitude: f64 = x.iter().zip(&row).map(|(x, w)| (x * f64::from(*w)).abs()).sum();
                    let tolerance = 4.0 * f64::from(f32::EPSILON) * (magnitude + 2.0);
                    let found = f64::from(y[at]);
                    assert!(
                        (found - expected).abs() <= tolerance,
                        "{format:?} {n_rows}x{n_out}x{n_in} ({i}, {o}): {found} {expected}"
                    );
                }
            }
            for isa in Isa::all_available() {
                let found = w.forward_with(isa, x, n_rows, epilogue);
                assert_eq!(bits(&found), bits(&y), "{format:?} {isa:?} {n_rows}x{n_out}x{n_in}");
            }
        }
    }
}

/// Every integer there is, in weights and activations: where AVX2 could saturate.
#[test]
fn extreme_integers_do_not_saturate() {
    let (n_out, n_in) = (32, 256);
    for format in Format::ALL {
        let n_bytes = format.n_bytes(n_out, n_in).unwrap();
        for byte in [0x00, 0x01, 0x7f, 0x80, 0x88, 0xf0, 0xff] {
            let mut bytes = vec![byte; n_bytes];
            let one = f16::ONE.to_le_bytes();
            with_layout!(format, L => for group in bytes.chunks_exact_mut(L::GROUP) {
                group[..L::BLOCK_SCALES].as_chunks_mut().0.fill(one);
                group[L::BLOCK_SCALES..L::HEAD].fill(1);
            }, bytes[..4 * WIDTH].as_chunks_mut().0.fill(1.0f32.to_le_bytes()));
            let w = QuantizedWeight::from_bytes(n_out, n_in, format, Box::new(bytes));
            let mut row = vec![0.0; n_in];
            w.row(5, &mut row);
            for x in [127.0, -127.0] {
                let alternating: Vec<f32> =
                    (0..n_in).map(|i| if i % 3 == 0 { x } else { -x * 126.0 / 127.0 }).collect();
                for x in [vec![x; n_in], alternating] {
                    // Integers below 2^24: exact in f32 too.
                    let expected: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(w * x.round())).sum();
                    for (isa, n_rows) in Isa::all_available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)])
                    {
                        let y = w.forward_with(isa, &x.repeat(n_rows), n_rows, Epilogue::bias(None));
                        for y in y.chunks_exact(n_out) {
                            assert_eq!(f64::from(y[5]), expected, "{format:?} {isa:?} {n_rows} {byte:#x}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_depends_neither_on_other_rows_nor_on_the_number_of_threads() {
    let (n_out, n_rows) = (75, 100);
    let bias = numbers(n_out, 3);
    for format in Format::ALL {
        let n_in = 700usize.next_multiple_of(format.in_features_multiple());
        let w = weight(format, n_out, n_in);
        let mut x = numbers(n_rows * n_in, 7);
        let epilogue = Epilogue { activation: Activation::GeluErf, ..Epilogue::bias(Some(&bias)) };
        let all = w.forward(&x, n_rows, epilogue);
        for some in [1, 2, 5, 13, 97] {
            let y = w.forward(&x[..some * n_in], some, epilogue);
            assert_eq!(y, all[..some * n_out], "{format:?} {some}");
        }
        for n_threads in [1, 3, 16] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            assert_eq!(pool.install(|| w.forward(&x, n_rows, epilogue)), all, "{format:?} {n_threads}");
        }
        // Nor on a neighbour that is not a number.
        for (not_finite, row) in [(f32::NAN, 3), (f32::INFINITY, 7), (f32::NEG_INFINITY, 98)] {
            x[row * n_in + row] = not_finite;
        }
        for isa in Isa::all_available() {
            let y = w.forward_with(isa, &x, n_rows, Epilogue::bias(Some(&bias)));
            let plain = w.forward(&numbers(n_rows * n_in, 7), n_rows, Epilogue::bias(Some(&bias)));
            for (i, (y, plain)) in y.chunks_exact(n_out).zip(plain.chunks_exact(n_out)).enumerate() {
                if [3, 7, 98].contains(&i) {
                    assert!(y.iter().all(|y| y.is_nan()), "{format:?} {isa:?} {i}");
                } else {
                    assert_eq!(y, plain, "{format:?} {isa:?} {i}");
                }
            }
        }
    }
}

#[test]
fn weights_come_back_within_their_step() {
    let (n_out, n_in) = (70, 1027);
    let w = numbers(n_out * n_in, 11);
    // Largest error of weights in -1 to 1: half a step, and what half precision rounds off scale and smallest value. The
    // scale of four symmetric bits gives up the end of the range where the sum of squares gains by it.
    for (format, largest) in [
        (Format::Int8, 0.5 / 127.0),
        (Format::Int8Blocks, 0.57 / 127.0),
        (Format::Int8LongBlocks, 0.57 / 127.0),
        (Format::Int4, 0.2),
        (Format::Int4Offset, 0.5 * 2.0 / 15.0 + 0.005),
    ] {
        let packed = weight(format, n_out, n_in);
        let mut row = vec![0.0; n_in];
        let (mut error, mut square) = (0.0, 0.0);
        for i in 0..n_out {
            packed.row(i, &mut row);
            for (a, b) in row.iter().zip(&w[i * n_in..]) {
                assert!((a - b).abs() <= largest + 1e-6, "{format:?}: {a} {b}");
                (error, square) = (error + f64::from((a - b) * (a - b)), square + f64::from(b * b));
            }
        }
        let bound = if largest < 0.01 { 0.005 } else { 0.08 };
        assert!((error / square).sqrt() < bound, "{format:?}: {}", (error / square).sqrt());
    }
}

#[test]
fn weights_that_are_not_finite_show() {
    for format in Format::ROUNDED {
        let w = QuantizedWeight::quantize(3, 64, format, &|i, row| {
            row.fill(0.5);
            row[40] = [0.5, f32::NAN, f32::NEG_INFINITY][i];
        });
        for isa in Isa::all_available() {
            let y = w.forward_with(isa, &[1.0; 64], 1, Epilogue::bias(None));
            assert!((y[0] - 32.0).abs() < 0.1 && y[1].is_nan() && y[2].is_nan(), "{format:?} {isa:?} {y:?}");
        }
    }
    // Zeros, and weights too small for a scale in half precision, are zero and not NaN.
    for format in Format::ROUNDED {
        let w = QuantizedWeight::quantize(2, 64, format, &|i, row| row.fill([0.0, 1e-30][i]));
        let y = w.forward(&[1.0; 64], 1, Epilogue::bias(None));
        assert!(y.iter().all(|y| y.abs() < 1e-6), "{format:?} {y:?}");
    }
}

/// A scale that is no number makes the output no number, and no other.
#[test]
fn stored_scales_that_are_not_finite_show() {
    let (n_out, n_in) = (35, 512);
    for format in Format::STORED {
        let mut stored = stored_rows(format, n_out, n_in);
        let row_bytes = stored.len() / n_out;
        let (_, size, halves) = stored_block(format);
        for (output, half) in [(3, f16::NAN), (33, f16::INFINITY)] {
            let at = output * row_bytes + size + halves[halves.len() - 1];
            stored[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
        let w = QuantizedWeight::from_gguf_blocks(n_out, n_in, format, &|i| {
            &stored[i * row_bytes..(i + 1) * row_bytes]
        });
        for isa in Isa::all_available() {
            let y = w.forward_with(isa, &numbers(2 * n_in, 1), 2, Epilogue::bias(None));
            for (i, y) in y.iter().enumerate() {
                assert_eq!(!y.is_finite(), [3, 33].contains(&(i % n_out)), "{format:?} {isa:?} {i}: {y}");
            }
        }
    }
}

/// Blocks as ggml defines them, dequantised value by value.
#[test]
fn gguf_blocks_keep_their_numbers() {
    let (n_out, n_in) = (35, 512);
    for format in Format::STORED {
        let (inputs, size, _) = stored_block(format);
        let stored = stored_rows(format, n_out, n_in);
        let row_bytes = stored.len() / n_out;
        let w = QuantizedWeight::from_gguf_blocks(n_out, n_in, format, &|i| {
            &stored[i * row_bytes..(i + 1) * row_bytes]
        });
        let mut row = vec![0.0; n_in];
        for (o, stored) in stored.chunks_exact(row_bytes).enumerate() {
            w.row(o, &mut row);
            for (block, row) in stored.chunks_exact(size).zip(row.chunks_exact(inputs)) {
                for (i, &w) in row.iter().enumerate() {
                    assert_eq!(w, stored_value(format, block, i), "{format:?} ({o}, {i})");
                }
            }
        }
    }
}

/// Value `i` of a GGUF block.
fn stored_value(format: Format, block: &[u8], i: usize) -> f32 {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    // Of 256 values: run `i / 32`, of which two share the bytes of nibbles, low ones first.
    let (run, j) = (i / 32, i % 32);
    match format {
        Format::Int8 | Format::Int8LongBlocks => panic!("GGUF does not have it"),
        Format::Int8Blocks => half(0) * f32::from(block[2 + i] as i8),
        Format::Int4 | Format::Int4Offset => {
            let byte = block[block.len() - 16 + i % 16];
            let q = f32::from(if i < 16 { byte & 15 } else { byte >> 4 });
            if format == Format::Int4 { half(0) * (q - 8.0) } else { half(0) * q + half(2) }
        }
        Format::Q4K | Format::Q5K => {
            let s = &block[4..16];
            let (scale, minimum) = match run {
                0..4 => (s[run] % 64, s[run + 4] % 64),
                _ => (s[run + 4] % 16 + s[run - 4] / 64 * 16, s[run + 4] / 16 + s[run] / 64 * 16),
            };
            let byte = block[block.len() - 128 + run / 2 * 32 + j];
            let mut q = if run % 2 == 0 { byte % 16 } else { byte / 16 };
            if format == Format::Q5K && block[16 + j] & (1 << run) != 0 {
                q += 16;
            }
            half(0) * f32::from(scale) * f32::from(q) - half(2) * f32::from(minimum)
        }
        Format::Q6K => {
            // Of 128 values: the low nibbles of 64 bytes, then the high ones; two bits each of 32 bytes, from the lowest.
            let (half_of, run) = (run / 4, run % 4);
            let low = block[half_of * 64 + run % 2 * 32 + j];
            let low = if run < 2 { low % 16 } else { low / 16 };
            let high = block[128 + half_of * 32 + j] / [1, 4, 16, 64][run] % 4;
            let scale = block[192 + i / 16] as i8;
            half(208) * f32::from(scale) * (f32::from(low + 16 * high) - 32.0)
        }
    }
}

#[test]
fn stored_bytes_are_the_same_weight() {
    for format in Format::ALL {
        let n_in = 100usize.next_multiple_of(format.in_features_multiple());
        let (w, x) = (weight(format, 40, n_in), numbers(2 * n_in, 7));
        let again = odd(&odd(&w));
        for isa in Isa::all_available() {
            let epilogue = Epilogue::bias(None);
            assert_eq!(again.forward_with(isa, &x, 2, epilogue), w.forward_with(isa, &x, 2, epilogue));
        }
    }
}

#[test]
#[should_panic(expected = "the bytes of a weight")]
fn bytes_that_are_too_few_are_refused() {
    QuantizedWeight::from_bytes(33, 5, Format::Int8, Box::new(vec![0u8; 100]));
}

#[test]
fn the_input_gradient_is_the_product_with_the_weight() {
    let (n_out, n_rows) = (1100, 3);
    let d_y = numbers(n_rows * n_out, 9);
    for format in Format::ALL {
        let n_in = 37usize.next_multiple_of(format.in_features_multiple());
        let w = weight(format, n_out, n_in);
        let d_x = w.input_gradient(&d_y, n_rows, Precision::F32);
        let mut expected = vec![0.0f64; n_rows * n_in];
        let mut row = vec![0.0; n_in];
        for o in 0..n_out {
            w.row(o, &mut row);
            for (i, expected) in expected.iter_mut().enumerate() {
                *expected += f64::from(d_y[i / n_in * n_out + o]) * f64::from(row[i % n_in]);
            }
        }
        for (d_x, expected) in d_x.iter().zip(expected) {
            assert!((f64::from(*d_x) - expected).abs() < 1e-3, "{format:?}: {d_x} {expected}");
        }
    }
}

#[test]
fn weights_that_share_their_input_give_what_each_gives_alone() {
    let (n_in, bias) = (70, vec![0.5; 75]);
    let row = |i: usize, row: &mut [f32]| {
        row.iter_mut().enumerate().for_each(|(j, w)| *w = ((i * n_in + j) as f32 * 0.618).fract() - 0.5);
    };
    for format in Format::ROUNDED {
        let [a, b, c] = [75, 33, 64].map(|n_out| QuantizedWeight::quantize(n_out, n_in, format, &row));
        let other = QuantizedWeight::quantize(40, n_in, Format::Int4, &row);
        for n_rows in [0, 1, 5, 13, 40] {
            let x: Vec<f32> = (0..n_rows * n_in).map(|i| (i as f32 * 0.37).sin()).collect();
            let none = Epilogue::bias(None);
            let biased = Epilogue { activation: Activation::Relu, ..Epilogue::bias(Some(&bias)) };
            for products in
                [vec![(&a, biased), (&b, none), (&c, none)], vec![(&c, none), (&other, none)], vec![]]
            {
                let alone: Vec<_> =
                    products.iter().map(|(w, epilogue)| w.forward(&x, n_rows, *epilogue)).collect();
                assert_eq!(QuantizedWeight::forward_all(&products, &x, n_rows), alone, "{format:?} {n_rows}");
            }
        }
    }
}

#[test]
fn every_instruction_set_rounds_to_the_same_bytes() {
    for format in Format::ROUNDED {
        for n_in in [1, 31, 32, 33, 64, 200] {
            let mut w = numbers(35 * n_in, 5);
            // A row of subnormal numbers, one beyond half precision, one of zeros and a block that is not a number.
            w[..n_in].iter_mut().for_each(|x| *x *= 1e-40);
            w[n_in..2 * n_in].iter_mut().for_each(|x| *x = (*x - 3.0) * 1e7);
            w[2 * n_in..3 * n_in].fill(0.0);
            w[4 * n_in - 1] = f32::NAN;
            let bytes = |isa| {
                let row = |i: usize, row: &mut [f32]| row.copy_from_slice(&w[i * n_in..(i + 1) * n_in]);
                QuantizedWeight::quantize_with(isa, 35, n_in, format, &row).bytes().to_vec()
            };
            let expected = bytes(Isa::Scalar);
            for isa in Isa::all_available() {
                assert_eq!(bytes(isa), expected, "{isa:?} {format:?} {n_in}");
            }
        }
    }
}
