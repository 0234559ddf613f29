//! Products of bf16 with AMX, which multiplies faster than the second level of the cache is read: what is read most is kept nearest.
//!
//! Rows are rounded once, for all tasks. A task has a group of panels and a block of rows, and takes all of `k`, block by block: a
//! part of a panel's block stays in the first level while it meets all of the task's rows, and the next part comes from memory
//! meanwhile; the sums and the rows' words along one block stay in the second.

use std::cell::RefCell;

use rayon::prelude::*;

use super::micro::Tile;
use super::pack::{Panels, pack_rows};
use super::{Finish, KW, MR, MatrixRef, NR, Output, Part, Precision, Start};
use crate::amx::{self, AHEAD, Aligned, Registers, STEPS, eighth};
use crate::awake::each;
use crate::buffer::{FAR, all_written, keep, put_row};
use crate::isa::Isa;

/// Words of a register.
const STEP: usize = amx::ROWS * amx::WORDS;
/// Rows of a register tile.
pub(crate) const ROWS: usize = 2 * amx::ROWS;
/// Rows of a task at most: 544 KiB of words along a block of `k`.
const ROWS_A_TASK: usize = 17 * ROWS;
/// Panels of a task at most: with as many rows as there can be, a megabyte of sums.
const PANELS_A_TASK: usize = 16;
/// Sums of a register tile.
const TILE: usize = ROWS * NR;

/// Rows of bf16 words as registers read them: 16 rows at a time, and of these 16 words at a time.
#[derive(Default)]
pub(crate) struct Words {
    /// In whole lines of the cache, which registers are loaded by; there may be more than were filled.
    words: Vec<Aligned<[u32; STEP]>>,
    /// Registers along `k`.
    n_steps: usize,
}

thread_local! {
    static WORDS: RefCell<Words> = RefCell::default();
    static SUMS: RefCell<Vec<Aligned<[f32; TILE]>>> = const { RefCell::new(Vec::new()) };
    static TURNED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

impl Words {
    /// Rounds `m` rows of `k` numbers. What is beyond the last row does not matter, beyond the last number are zeros.
    pub(crate) fn fill(&mut self, [m, k]: [usize; 2], a: MatrixRef<'_>) {
        let n_steps = k.div_ceil(2 * amx::WORDS);
        self.room([m, k]).par_chunks_exact_mut(n_steps).with_min_len(2).enumerate().for_each(|(i, words)| {
            Self::fill_rows([m, k], a, i, words);
        });
    }

    /// [`Self::fill`] by this thread alone.
    pub(crate) fn fill_here(&mut self, [m, k]: [usize; 2], a: MatrixRef<'_>) {
        let n_steps = k.div_ceil(2 * amx::WORDS);
        for (i, words) in self.room([m, k]).chunks_exact_mut(n_steps).enumerate() {
            Self::fill_rows([m, k], a, i, words);
        }
    }

    /// The registers that are to be filled.
    fn room(&mut self, [m, k]: [usize; 2]) -> &mut [Aligned<[u32; STEP]>] {
        self.n_steps = k.div_ceil(2 * amx::WORDS);
        let n = m.div_ceil(amx::ROWS) * self.n_steps;
        if self.words.len() < n {
            self.words.resize(n, Aligned([0; STEP]));
        }
        &mut self.words[..n]
    }

    /// The rows of register `i`.
    fn fill_rows([m, k]: [usize; 2], a: MatrixRef<'_>, i: usize, registers: &mut [Aligned<[u32; STEP]>]) {
        let first = amx::ROWS * i;
        let n = amx::ROWS.min(m - first);
        for (step, Aligned(words)) in registers.iter_mut().enumerate() {
            let at = 2 * amx::WORDS * step;
            let k = (k - at).min(2 * amx::WORDS);
            if k < 2 * amx::WORDS {
                words.fill(0);
            }
            let data = &a.data[first * a.row_stride + at * a.col_stride..];
            pack_rows(Isa::Amx, Precision::Bf16, k, n, MatrixRef { data, ..a }, amx::WORDS, words);
        }
    }

    /// The registers of rows `16 i` to `16 i + 16` from step `step` on.
    fn registers(&self, i: usize, step: usize) -> &[Aligned<[u32; STEP]>] {
        &self.words[i * self.n_steps + step..(i + 1) * self.n_steps]
    }
}

/// See [`multiply`](super::multiply).
///
/// # Safety
/// As there; the blocks are of bf16, and the machine has AMX.
pub(super) unsafe fn multiply(
    m: usize,
    a: MatrixRef<'_>,
    blocks: &[Panels<'_>],
    start: Start<'_>,
    out: Output,
    finish: Option<Finish<'_>>,
) {
    let n = blocks[0].n;
    // Taken, not borrowed: a waiting thread may run another task that multiplies too.
    let mut rows = WORDS.take();
    rows.fill([m, blocks.iter().map(|block| block.k_len).sum()], a);
    let (n_tiles, n_panels) = (m.div_ceil(ROWS), n.div_ceil(NR));
    let n_row_blocks = n_tiles.div_ceil(ROWS_A_TASK / ROWS);
    let n_threads = rayon::current_num_threads();
    // As many for each thread, and enough of them to make up for one that is late.
    let n_groups = n_panels.div_ceil(PANELS_A_TASK).max(4).next_multiple_of(n_threads).min(n_panels);
    let is_far = m * n >= FAR;
    let share = |n: usize, i: usize, of: usize| i * n / of..(i + 1) * n / of;
    each(n_groups * n_row_blocks, |task| {
        let group = share(n_panels, task / n_row_blocks, n_groups);
        let tiles = share(n_tiles, task % n_row_blocks, n_row_blocks);
        let (mut all_sums, mut turned) = (SUMS.take(), TURNED.take());
        let n_sums = group.len() * tiles.len();
        if all_sums.len() < n_sums {
            all_sums.resize(n_sums, Aligned([0.0; TILE]));
        }
        // SAFETY: the machine has them, and nothing in here waits for another task.
        let mut registers = unsafe { Registers::take() };
        for (i, block) in blocks.iter().enumerate() {
            for panel in group.clone() {
                let columns = panel * NR..n.min((panel + 1) * NR);
                let words = block.panel(Isa::Amx, panel, &mut turned);
                let following = if panel + 1 < group.end {
                    block.start(panel + 1)
                } else {
                    blocks.get(i + 1).and_then(|block| block.start(group.start))
                };
                let mut row = [0.0; NR];
                if let Start::Row(whole) = start {
                    row[..columns.len()].copy_from_slice(&whole[columns.clone()]);
                }
                let n_steps = words.len().div_ceil(NR * amx::WORDS);
                let part_steps = n_steps.div_ceil(n_steps.div_ceil(STEPS));
                let mut parts = words.chunks(part_steps * NR * amx::WORDS).enumerate().peekable();
                let panel_sums = &mut all_sums[(panel - group.start) * tiles.len()..][..tiles.len()];
                while let Some((p, part)) = parts.next() {
                    let ahead = parts.peek().map(|(_, part)| part.as_ptr().cast()).or(following);
                    for (t, (tile_number, Aligned(sums))) in tiles.clone().zip(&mut *panel_sums).enumerate() {
                        let first = tile_number * ROWS;
                        let n_rows = ROWS.min(m - first);
                        let is_start = i == 0 && p == 0;
                        if is_start && matches!(start, Start::Result) {
                            for (r, row) in sums.chunks_exact_mut(NR).enumerate().take(n_rows) {
                                // SAFETY: this row and these columns lie in `out`, which is m * n and holds something; no other
                                // task has them.
                                let c = unsafe { out.at((first + r) * n + columns.start) };
                                // SAFETY: as above.
                                unsafe { row.as_mut_ptr().copy_from_nonoverlapping(c, columns.len()) };
                            }
                        }
                        let c = sums.as_mut_ptr();
                        let (from, from_stride) = match start {
                            Start::Zero | Start::Row(_) if is_start => (row.as_ptr(), 0),
                            _ => (c.cast_const(), NR),
                        };
                        let n_rows = n_rows.next_multiple_of(amx::ROWS);
                        let a = (&rows, first / amx::ROWS, i * KW / amx::WORDS + p * part_steps);
                        let of = Tile { n_rows, width: NR, from, from_stride, c, c_stride: NR, ahead: &[] };
                        let ahead = ahead.and_then(|ahead| {
                            let n_bytes = eighth(t, tiles.len())? * part_steps * AHEAD;
                            Some(ahead.wrapping_add(n_bytes))
                        });
                        // SAFETY: the sums are 32 rows of 32; `from` are these, or the same row again.
                        unsafe { tile(&mut registers, a, [part].into_iter(), ahead, of) };
                    }
                }
            }
        }
        drop(registers);
        let mut some_sums = all_sums.iter_mut();
        for panel in group.clone() {
            let columns = panel * NR..n.min((panel + 1) * NR);
            for (first, Aligned(sums)) in tiles.clone().map(|tile| tile * ROWS).zip(&mut some_sums) {
                let rows = first..m.min(first + ROWS);
                if let Some(finish) = finish {
                    let (rows, columns, at) = (rows.clone(), columns.clone(), Output(sums.as_mut_ptr()));
                    finish(&mut Part { rows, columns, at, stride: NR });
                }
                for (row, sums) in rows.zip(sums.as_chunks::<NR>().0) {
                    // SAFETY: as above.
                    unsafe { put_row(&sums[..columns.len()], out.at(row * n + columns.start), is_far) };
                }
            }
        }
        if is_far {
            all_written();
        }
        keep(&SUMS, all_sums);
        keep(&TURNED, turned);
    });
    keep(&WORDS, rows);
}

/// [`tile`](super::tile) of up to 32 rows, with pieces of a panel that follow one another along `k`, all but the last of them a
/// multiple of 16 words. `a` are rows from a register of them on, which is given by its number, and from a step along `k` on. What is
/// wanted next is fetched meanwhile.
///
/// # Safety
/// `from` must be readable and `c` writable as [`Tile`] says.
pub(crate) unsafe fn tile<'a>(
    registers: &mut Registers,
    (a, first, mut step): (&Words, usize, usize),
    pieces: impl Iterator<Item = &'a [u32]>,
    mut ahead: Option<*const u8>,
    of: Tile,
) {
    let Tile { n_rows, width, from, from_stride, c, c_stride, .. } = of;
    let n_whole = n_rows.next_multiple_of(amx::ROWS);
    assert!(n_whole <= ROWS);
    if n_rows < n_whole || width < NR {
        // What is beyond the last row or column is computed and dropped.
        let mut whole = [0.0f32; ROWS * NR];
        for (r, row) in whole.chunks_exact_mut(NR).enumerate().take(n_rows) {
            // SAFETY: row `r` of `from` has `width` elements.
            unsafe { row.as_mut_ptr().copy_from_nonoverlapping(from.add(r * from_stride), width) };
        }
        let inside = whole.as_mut_ptr();
        let padded =
            Tile { n_rows: n_whole, width: NR, from: inside, from_stride: NR, c: inside, c_stride: NR, ..of };
        // SAFETY: `whole` has 32 rows of 32 elements.
        unsafe { tile(registers, (a, first, step), pieces, ahead, padded) };
        for (r, row) in whole.chunks_exact(NR).enumerate().take(n_rows) {
            // SAFETY: row `r` of `c` has `width` elements.
            unsafe { c.add(r * c_stride).copy_from_nonoverlapping(row.as_ptr(), width) };
        }
        return;
    }
    let second = first + n_whole / amx::ROWS - 1;
    // SAFETY: whole rows are there.
    unsafe { registers.load(n_rows, from, from_stride) };
    let mut rest: &[u32] = &[];
    for piece in pieces {
        assert!(rest.is_empty(), "only the last piece has a rest");
        let n_steps = piece.len() / (NR * amx::WORDS);
        if n_steps > 0 {
            let a = [first, second].map(|i| a.registers(i, step));
            assert!(a.iter().all(|a| a.len() >= n_steps));
            let panel = piece.as_ptr().cast();
            let a = a.map(|a| a.as_ptr().cast());
            let x = amx::Operands { a, panel, n_steps, ahead: ahead.unwrap_or(panel) };
            ahead = ahead.map(|ahead| ahead.wrapping_add(n_steps * AHEAD));
            // SAFETY: so many steps are in both, as was checked, and in the piece.
            unsafe { registers.add_bf16(n_rows, x) };
        }
        (step, rest) = (step + n_steps, &piece[n_steps * amx::WORDS * NR..]);
    }
    // SAFETY: as above.
    unsafe { registers.store(n_rows, c, c_stride) };
    if !rest.is_empty() {
        // Less than a register along `k`.
        for (i, row) in (first..).zip((0..n_rows).step_by(amx::ROWS)) {
            let rows = row..n_rows.min(row + amx::ROWS);
            for (at, row) in (0..amx::ROWS).zip(rows.clone()).step_by(MR) {
                // SAFETY: row `row` is there.
                let c = unsafe { c.add(row * c_stride) };
                let n_rows = MR.min(rows.end - row);
                let some = Tile { n_rows, from: c, from_stride: c_stride, c, ..of };
                let a = &a.registers(i, step)[0].0[at * amx::WORDS..];
                // SAFETY: these rows of sums are there.
                unsafe { super::tile(Isa::Avx512, Precision::Bf16, a, amx::WORDS, rest, some) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::gemm_with;
    use super::*;
    use crate::testing::numbers;

    /// Several tasks of rows and of panels, several blocks of `k` and a rest, and rows and columns that fill no register.
    #[test]
    #[allow(clippy::print_stdout, reason = "what a test leaves out it says")]
    fn products_are_those_of_avx512_and_a_row_is_the_same_among_any_others() {
        if !Isa::all_available().contains(&Isa::Amx) {
            println!("SKIPPED: this machine has no AMX");
            return;
        }
        let [m, n, k] = [ROWS_A_TASK + 37, 5 * PANELS_A_TASK * NR + 9, 2 * 2 * KW + 77];
        let (a, b, bias, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(n, 3), numbers(m * n, 4));
        let product = |isa, rows: Range<usize>, start: Start<'_>| {
            let a = MatrixRef { data: &a[rows.start * k..], row_stride: k, col_stride: 1 };
            let b = MatrixRef { data: &b, row_stride: n, col_stride: 1 };
            let mut to = c[rows.start * n..rows.end * n].to_vec();
            gemm_with(isa, rows.len(), n, k, a, b, start, &mut to, Precision::Bf16);
            to
        };
        for start in [Start::Zero, Start::Row(&bias), Start::Result] {
            let whole = product(Isa::Amx, 0..m, start);
            let furthest = |(a, b): (&f32, &f32)| (a - b).abs();
            let other = product(Isa::Avx512, 0..m, start);
            let worst = whole.iter().zip(&other).map(furthest).fold(0.0, f32::max);
            assert!(worst < 2e-4, "{start:?}: {worst}");
            for rows in [0..1, 7..24, ROWS_A_TASK - 1..ROWS_A_TASK + 33, m - 1..m] {
                let some = product(Isa::Amx, rows.clone(), start);
                assert!(some == whole[rows.start * n..rows.end * n], "{start:?} {rows:?}");
            }
        }
    }
}
