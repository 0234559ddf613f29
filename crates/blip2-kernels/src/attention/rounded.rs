//! The products of attention in bf16, where the machine multiplies these faster: operands are rounded on their way into the
//! register tiles of [`gemm`](crate::gemm), sums are f32.

use crate::amx::{self, Registers};
use crate::gemm::{MatrixRef, NR, Precision, Tile, amx_blocks, bf16_words, tile};
use crate::isa::Isa;
use crate::lanes::LANES;

/// Rows that one register tile takes.
const ROWS: usize = 12;

/// Operands as words of two neighbouring bf16, kept by each thread with the rest of its scratch.
#[derive(Default)]
pub(super) struct Words {
    /// `[n, words]`; with AMX the next instead.
    a: Vec<u32>,
    registers: amx_blocks::Words,
    /// `[panels, words, 32]`.
    b: Vec<u32>,
}

/// Whether products that may be in bf16 are: where the machine multiplies that faster than f32.
pub(super) fn is_faster(isa: Isa, precision: Precision) -> bool {
    precision == Precision::Bf16 && isa.has_avx512()
}

/// `c[i, j] = a[i] · b[j]` for `i < n` and `j < m`, of rows of `d` numbers; those of `a` are `width` apart, `c` is `[n, m']` with
/// `m'` of whole lanes. Columns of `c` from `m` on are zero.
///
/// # Panics
/// When the instruction set is not there, `b` has not `m` rows of `d` numbers, or the others are too small.
pub(super) fn rows_by_rows<'b>(
    isa: Isa,
    [n, m, d]: [usize; 3],
    a: &[f32],
    width: usize,
    b: impl Iterator<Item = &'b [f32]>,
    words: &mut Words,
    c: &mut [f32],
) {
    assert!(isa.has_avx512() && isa.is_available());
    let n_words = n_words(isa, d);
    round_rows(isa, [n, d], a, width, words);
    let n_panels = m.div_ceil(NR);
    resize(&mut words.b, n_panels * n_words * NR);
    let mut b = b.map(|row| &row[..d]).fuse();
    for (p, panel) in words.b.chunks_exact_mut(n_words * NR).take(n_panels).enumerate() {
        for half in 0..NR / LANES {
            let first = p * NR + half * LANES;
            let some: [&[f32]; LANES] = std::array::from_fn(|_| b.next().unwrap_or_default());
            assert!(some.iter().filter(|row| !row.is_empty()).count() == LANES.min(m.saturating_sub(first)));
            // SAFETY: the instruction set is available.
            unsafe { bf16_words::columns(&some, d, &mut panel[half * LANES..]) };
        }
        panel[d.div_ceil(2) * NR..].fill(0);
    }
    multiply(isa, [n, m.next_multiple_of(LANES), n_words], words, c);
}

/// `c[i] = sum over k of a[i, k] * b[k]` for `i < n` and `k < m`, of rows of `b` of `d` numbers; those of `a` are `width` apart,
/// `c` is `[n, d']` with `d'` of whole lanes. Columns of `c` from `d` on are zero.
///
/// # Panics
/// When the instruction set is not there, `b` has not `m` rows of `d` numbers, or the others are too small.
pub(super) fn rows_by_columns<'b>(
    isa: Isa,
    [n, m, d]: [usize; 3],
    a: &[f32],
    width: usize,
    b: impl Iterator<Item = &'b [f32]>,
    words: &mut Words,
    c: &mut [f32],
) {
    assert!(isa.has_avx512() && isa.is_available());
    let n_words = n_words(isa, m);
    round_rows(isa, [n, m], a, width, words);
    let n_panels = d.div_ceil(NR);
    resize(&mut words.b, n_panels * n_words * NR);
    let mut b = b.map(|row| &row[..d]);
    for k in 0..m.div_ceil(2) {
        let low = b.next().expect("`m` rows");
        let high = if 2 * k + 1 < m { b.next().expect("`m` rows") } else { &[] };
        for (p, panel) in words.b.chunks_exact_mut(n_words * NR).take(n_panels).enumerate() {
            let to = panel[k * NR..].first_chunk_mut().expect("a panel's row");
            // SAFETY: the instruction set is available.
            unsafe { bf16_words::neighbours(low, high, p * NR, to) };
        }
    }
    for panel in words.b.chunks_exact_mut(n_words * NR).take(n_panels) {
        panel[m.div_ceil(2) * NR..].fill(0);
    }
    multiply(isa, [n, d.next_multiple_of(LANES), n_words], words, c);
}

/// Words along `k` for so many numbers: whole registers where AMX multiplies them, filled up with zeros.
fn n_words(isa: Isa, n: usize) -> usize {
    let n_words = n.div_ceil(2);
    if isa == Isa::Amx { n_words.next_multiple_of(amx::WORDS) } else { n_words }
}

/// The first `len` numbers of `n` rows, which are `width` apart, into `to`, for a machine that has AVX-512 with bf16.
fn round_rows(isa: Isa, [n, len]: [usize; 2], rows: &[f32], width: usize, words: &mut Words) {
    if isa == Isa::Amx {
        return words
            .registers
            .fill_here([n, len], MatrixRef { data: rows, row_stride: width, col_stride: 1 });
    }
    let to = &mut words.a;
    assert!(Isa::Avx512.is_available());
    let n_words = len.div_ceil(2);
    resize(to, n * n_words);
    for (to, row) in to.chunks_exact_mut(n_words).zip(rows.chunks(width)).take(n) {
        // SAFETY: the instruction set is available.
        unsafe { bf16_words::row(&row[..len], to) };
    }
}

/// `c = a b` on register tiles; `c` is `[n, width]`.
fn multiply(isa: Isa, [n, width, n_words]: [usize; 3], words: &Words, c: &mut [f32]) {
    static ZEROS: [f32; NR] = [0.0; NR];
    let Words { a, registers: a_registers, b } = words;
    assert!(isa == Isa::Amx || a.len() >= n * n_words);
    assert!(b.len() >= width.div_ceil(NR) * n_words * NR && c.len() >= n * width);
    // SAFETY: the machine has them where `isa` says so, as was asserted, and nothing in here waits for another task.
    let mut registers = (isa == Isa::Amx).then(|| unsafe { Registers::take() });
    let rows_a_tile = if isa == Isa::Amx { amx_blocks::ROWS } else { ROWS };
    for (p, panel) in b.chunks_exact(n_words * NR).take(width.div_ceil(NR)).enumerate() {
        let columns = NR.min(width - p * NR);
        for first in (0..n).step_by(rows_a_tile) {
            let tile_of = Tile {
                n_rows: rows_a_tile.min(n - first),
                width: columns,
                from: ZEROS.as_ptr(),
                from_stride: 0,
                c: c[first * width + p * NR..].as_mut_ptr(),
                c_stride: width,
                ahead: &[],
            };
            // SAFETY: `from` is 32 zeros for every row; rows `first` to `first + n_rows` of `c` and these columns lie in it, as was
            // checked above, and so do the rows of `a`.
            unsafe {
                match &mut registers {
                    Some(registers) => {
                        let a = (a_registers, first / amx::ROWS, 0);
                        amx_blocks::tile(registers, a, [panel].into_iter(), None, tile_of);
                    }
                    None => tile(isa, Precision::Bf16, &a[first * n_words..], n_words, panel, tile_of),
                }
            };
        }
    }
}

fn resize(words: &mut Vec<u32>, len: usize) {
    if words.len() < len {
        words.resize(len, 0);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::testing::numbers;

    #[test]
    #[allow(clippy::print_stdout, reason = "what a test leaves out it says")]
    fn products_are_those_of_the_rounded_numbers() {
        let sets: Vec<_> = Isa::all_available().into_iter().filter(|isa| isa.has_avx512()).collect();
        if sets.is_empty() {
            println!("SKIPPED: this machine has no AVX-512 with bf16");
        }
        sets.into_iter().for_each(products_of);
    }

    fn products_of(isa: Isa) {
        let round = |x: f32| bf16::from_f32(x).to_f64();
        for [n, m, d] in [[1, 1, 1], [12, 32, 64], [13, 33, 88], [25, 257, 80], [5, 17, 7], [257, 70, 128]] {
            let (a, b, p) = (numbers(n * (d + 3), 1), numbers(m * d, 2), numbers(n * (m + 5), 3));
            let row = |j: usize| &b[j * d..][..d];
            let rows = || (0..m).map(row);
            let (mut words, m_whole, d_whole) =
                (Words::default(), m.next_multiple_of(LANES), d.next_multiple_of(LANES));
            let mut c = vec![7.0; n * m_whole];
            rows_by_rows(isa, [n, m, d], &a, d + 3, rows(), &mut words, &mut c);
            for (i, c) in c.chunks(m_whole).enumerate() {
                for (j, &found) in c.iter().enumerate() {
                    let term = |l: usize| round(a[i * (d + 3) + l]) * round(row(j)[l]);
                    let sum: f64 = if j < m { (0..d).map(term).sum() } else { 0.0 };
                    assert!((f64::from(found) - sum).abs() < 2e-5, "{n} {m} {d} ({i}, {j}): {found} {sum}");
                }
            }
            let mut c = vec![7.0; n * d_whole];
            rows_by_columns(isa, [n, m, d], &p, m + 5, rows(), &mut words, &mut c);
            for (i, c) in c.chunks(d_whole).enumerate() {
                for (l, &found) in c.iter().enumerate() {
                    let term = |j: usize| round(p[i * (m + 5) + j]) * round(row(j)[l]);
                    let sum: f64 = if l < d { (0..m).map(term).sum() } else { 0.0 };
                    assert!((f64::from(found) - sum).abs() < 4e-5, "{n} {m} {d} ({i}, {l}): {found} {sum}");
                }
            }
        }
    }
}
