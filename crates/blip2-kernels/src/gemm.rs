//! Matrix products of strided f32 views.
//!
//! `B` is packed into panels of 32 columns, `A` into rows of one block of `k`; a micro-kernel keeps up to 12 × 32 sums in
//! registers, or 32 × 32 in those of AMX. With [`Precision::Bf16`] both are rounded to bf16 while packing and multiplied in pairs
//! along `k` (`vdpbf16ps`, `tdpbf16ps`). Each sum runs over `k` in order whatever the sizes, so a row of the result does not depend on the
//! number of rows.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx_blocks;
#[cfg(target_arch = "x86_64")]
pub(crate) mod bf16_words;
mod micro;
mod pack;

use std::cell::RefCell;
use std::ops::Range;

use crate::awake::each;
use crate::buffer::keep;
use crate::isa::Isa;
pub(crate) use micro::{Tile, tile};
pub(crate) use pack::{Panels, Source, bf16_bits, pack_panel, pack_panels};

/// Precision of the products; sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Operands as they are.
    F32,
    /// Operands rounded to the nearest bf16.
    Bf16,
}

impl Precision {
    /// Elements along `k` that one packed 32-bit word holds.
    pub(crate) fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }
}

/// A view whose element `(r, c)` is `data[r * row_stride + c * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct MatrixRef<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

impl MatrixRef<'_> {
    fn check(&self, rows: usize, cols: usize) {
        if rows > 0 && cols > 0 {
            let last = (rows - 1) * self.row_stride + (cols - 1) * self.col_stride;
            assert!(
                last < self.data.len(),
                "a {rows} x {cols} view reaches beyond its {} elements",
                self.data.len()
            );
        }
    }
}

/// Columns of a panel of `B`: two AVX-512 registers.
pub(crate) const NR: usize = 32;
/// Packed words along `k` in a block: a 32-column panel is 32 KiB, which stays in the first two cache levels.
pub(crate) const KW: usize = 256;
/// Rows of the register tile: 12 × 2 sums, 2 registers of `B` and one of `A` out of 32.
const MR: usize = 12;
/// Words between rows of packed `A`: not a power of two, so that twelve rows do not share cache sets.
const A_STRIDE: usize = KW + 16;
/// Tiles of rows of `A` that a task packs at most.
const TILES_A_TASK: usize = 8;
/// From so many tasks a thread on, it does not matter how evenly they are divided.
const MANY_TASKS: usize = 8;

/// Words of `B` that are packed together, where that gains something: 16 MiB, and in tests so few that they are packed in turns too.
const WORDS_TOGETHER: usize = if cfg!(test) { 1_400_000 } else { 1 << 22 };

/// What a product is added to.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// Nothing: the result is the product.
    Zero,
    /// This row, to every row of the product.
    Row(&'a [f32]),
    /// What the result holds.
    Result,
}

/// What sums begin with where that is nothing.
static ZEROS: [f32; NR] = [0.0; NR];

/// A rectangle of a product whose sums are complete.
pub(crate) struct Part {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    /// Its first element; nobody else has the part.
    at: Output,
    /// Between its rows, where it is.
    stride: usize,
}

impl Part {
    /// A row of it, by its number in the product.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(self.rows.contains(&row));
        // SAFETY: rows of the part are there and initialised, and it is borrowed for as long as this one is.
        unsafe {
            let at = self.at.at((row - self.rows.start) * self.stride);
            std::slice::from_raw_parts_mut(at, self.columns.len())
        }
    }
}

/// What is done with a part of a product once its sums are complete, while it is in the cache.
pub(crate) type Finish<'a> = &'a (dyn Fn(&mut Part) + Sync);

/// `c = a b`, or added to what `start` says; `a`: `m × k`, `b`: `k × n`, `c`: `m × n` row-major.
///
/// # Panics
/// When a view does not hold its elements, `c` is not of length `m * n` or a row is not of length `n`.
#[allow(clippy::too_many_arguments, reason = "the operands of a matrix product")]
pub fn gemm(
    m: usize,
    n: usize,
    k: usize,
    a: MatrixRef<'_>,
    b: MatrixRef<'_>,
    start: Start<'_>,
    c: &mut [f32],
    precision: Precision,
) {
    gemm_with(Isa::detect(), m, n, k, a, b, start, c, precision);
}

/// [`gemm`] into a new vector: `a b`, plus `row` in every row.
///
/// # Panics
/// As [`gemm`].
pub fn product(
    m: usize,
    n: usize,
    k: usize,
    a: MatrixRef<'_>,
    b: MatrixRef<'_>,
    row: Option<&[f32]>,
    precision: Precision,
) -> Vec<f32> {
    let mut c = Vec::with_capacity(m * n);
    let start = row.map_or(Start::Zero, Start::Row);
    // SAFETY: the capacity is m * n, and all of it is written: `start` is not `Result`.
    unsafe {
        gemm_to(Isa::detect(), m, n, k, a, b, start, Output(c.as_mut_ptr()), precision);
        c.set_len(m * n);
    }
    c
}

#[allow(clippy::too_many_arguments, reason = "the operands of a matrix product")]
fn gemm_with(
    isa: Isa,
    m: usize,
    n: usize,
    k: usize,
    a: MatrixRef<'_>,
    b: MatrixRef<'_>,
    start: Start<'_>,
    c: &mut [f32],
    precision: Precision,
) {
    assert_eq!(c.len(), m * n, "c must be m * n");
    // SAFETY: `c` has m * n elements.
    unsafe { gemm_to(isa, m, n, k, a, b, start, Output(c.as_mut_ptr()), precision) };
}

/// # Safety
/// `c` must point to `m * n` elements; they are read where `start` is `Result`, and all written otherwise.
#[allow(clippy::too_many_arguments, reason = "the operands of a matrix product")]
unsafe fn gemm_to(
    isa: Isa,
    m: usize,
    n: usize,
    k: usize,
    a: MatrixRef<'_>,
    b: MatrixRef<'_>,
    start: Start<'_>,
    c: Output,
    precision: Precision,
) {
    a.check(m, k);
    b.check(k, n);
    if m == 0 || n == 0 {
        return;
    }
    thread_local!(static PANELS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) });
    // Taken, not borrowed: a waiting thread may run another task that multiplies too.
    let mut buffer = PANELS.take();
    let block = KW * precision.per_word();
    let block_words = n.div_ceil(NR) * NR * block.min(k).div_ceil(precision.per_word());
    // With AMX the sums of several blocks stay near; without it each block is multiplied as soon as it is packed.
    let n_together = if isa == Isa::Amx { (WORDS_TOGETHER / block_words.max(1)).max(1) } else { 1 };
    // An empty `k` is one empty block, which writes what `start` says.
    for first in (0..k.max(1)).step_by(n_together * block) {
        let end = k.min(first + n_together * block);
        let n_words = block_words * (end - first).div_ceil(block);
        if buffer.len() < n_words {
            buffer.resize(n_words, 0);
        }
        // No words are a block too.
        let starts = (first..end.max(first + 1)).step_by(block);
        let panels: Vec<_> = starts
            .zip(buffer.chunks_mut(block_words.max(1)).chain([Default::default()]))
            .map(|(k_start, words)| {
                let b = MatrixRef { data: &b.data[(k_start * b.row_stride).min(b.data.len())..], ..b };
                pack_panels(isa, precision, block.min(end - k_start), n, b, words)
            })
            .collect();
        let a = MatrixRef { data: &a.data[(first * a.col_stride).min(a.data.len())..], ..a };
        let start = if first == 0 { start } else { Start::Result };
        // SAFETY: the caller's promise; after the first blocks all of `c` is written.
        unsafe { multiply(isa, m, a, &panels, start, c, None) };
    }
    keep(&PANELS, buffer);
}

/// How a product is cut into tasks: blocks of rows times groups of panels, each as even as it can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cuts {
    n_tiles: usize,
    row_blocks: usize,
    n_panels: usize,
    groups: usize,
}

impl Cuts {
    /// Few rows are cut along the columns too, until the tasks are as many for each thread: rows are packed once a group.
    fn new(m: usize, n: usize, n_threads: usize) -> Self {
        let (n_tiles, n_panels) = (m.div_ceil(MR), n.div_ceil(NR));
        let row_blocks = n_tiles.div_ceil(TILES_A_TASK);
        let is_even = |groups: &usize| {
            let tasks = row_blocks * groups;
            tasks >= MANY_TASKS * n_threads || (tasks >= 2 * n_threads && tasks.is_multiple_of(n_threads))
        };
        let groups = (1..=n_panels).find(is_even).unwrap_or(n_panels);
        Self { n_tiles, row_blocks, n_panels, groups }
    }

    fn n(&self) -> usize {
        self.row_blocks * self.groups
    }

    /// The tiles of rows and the panels of a task. Those of one group follow each other, so that a thread that takes tasks in
    /// turn reads its panels again from the cache.
    fn task(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let (group, block) = (task / self.row_blocks, task % self.row_blocks);
        let share = |n: usize, i: usize, of: usize| i * n / of..(i + 1) * n / of;
        (share(self.n_tiles, block, self.row_blocks), share(self.n_panels, group, self.groups))
    }
}

/// `c = a b`, added to what `start` says, then `finish` of every part of it; `b` is given block by block of `k`, all but the last
/// of which are whole.
///
/// # Safety
/// `c` must point to `m * n` elements, where `n` is what the blocks say; they are read where `start` is `Result`, and all written
/// otherwise.
///
/// # Panics
/// When there are no blocks.
pub(crate) unsafe fn multiply(
    isa: Isa,
    m: usize,
    a: MatrixRef<'_>,
    blocks: &[Panels<'_>],
    mut start: Start<'_>,
    c: Output,
    finish: Option<Finish<'_>>,
) {
    let (last, precision) = (blocks.len() - 1, blocks[0].precision);
    if let Start::Row(row) = start {
        assert_eq!(row.len(), blocks[0].n, "the row that is added must have n elements");
    }
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx && precision == Precision::Bf16 && blocks[0].k_len > 0 {
        assert!(isa.is_available());
        // SAFETY: the caller's promise; the machine has AMX.
        return unsafe { amx_blocks::multiply(m, a, blocks, start, c, finish) };
    }
    thread_local!(static TURNED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) });
    let mut turned = TURNED.take();
    for (i, panels) in blocks.iter().enumerate() {
        let k = i * KW * precision.per_word();
        let a = MatrixRef { data: &a.data[(k * a.col_stride).min(a.data.len())..], ..a };
        let panels = panels.stored(isa, &mut turned);
        // SAFETY: the caller's promise; from the second block on the first has written all of `c`.
        unsafe { multiply_block(isa, m, a, panels, start, c, finish.filter(|_| i == last)) };
        start = Start::Result;
    }
    keep(&TURNED, turned);
}

/// [`multiply`] of one block of `k`.
///
/// # Safety
/// As [`multiply`].
unsafe fn multiply_block(
    isa: Isa,
    m: usize,
    a: MatrixRef<'_>,
    panels: Panels<'_>,
    start: Start<'_>,
    out: Output,
    finish: Option<Finish<'_>>,
) {
    let n = panels.n;
    let cuts = Cuts::new(m, n, rayon::current_num_threads());
    each(cuts.n(), |task| {
        thread_local! {
            static ROWS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
            static WIDE: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
        }
        let (tiles, some_panels) = cuts.task(task);
        let rows = tiles.start * MR..(tiles.end * MR).min(m);
        let (mut packed, mut wide) = (ROWS.take(), WIDE.take());
        let precision = panels.precision;
        packed.resize(TILES_A_TASK * MR * A_STRIDE, 0);
        let data = &a.data[(rows.start * a.row_stride).min(a.data.len())..];
        pack::pack_rows(
            isa,
            precision,
            panels.k_len,
            rows.len(),
            MatrixRef { data, ..a },
            A_STRIDE,
            &mut packed,
        );
        let last = some_panels.end;
        for panel in some_panels {
            let words = panels.panel(isa, panel, &mut wide);
            let columns = panel * NR..n.min((panel + 1) * NR);
            // On Intel's processors rows that are few meet weights that come from memory a fifth faster; elsewhere it was not tried.
            let next = (isa == Isa::Amx && panel + 1 < last).then(|| panels.in_f32(panel + 1)).flatten();
            for (i, first) in (0..rows.len()).step_by(MR).enumerate() {
                let ahead = next.map_or(Default::default(), |next| part_of(next, i, rows.len().div_ceil(MR)));
                let n_rows = MR.min(rows.len() - first);
                // SAFETY: rows `rows.start + first ..+ n_rows` and these columns lie in `c`, which is m * n; no other task has
                // this row block and panel.
                let c = unsafe { out.at((rows.start + first) * n + columns.start) };
                let (from, from_stride) = match start {
                    Start::Zero => (ZEROS.as_ptr(), 0),
                    Start::Row(row) => (row[columns.start..].as_ptr(), 0),
                    Start::Result => (c.cast_const(), n),
                };
                let a = &packed[first * A_STRIDE..];
                // SAFETY: as above; `a` holds `n_rows` rows of A_STRIDE words and `words` is a whole panel; `from` has as many
                // elements as there are columns, in the same row again or in the rows of `c`, which hold something where
                // `start` is `Result`.
                unsafe {
                    let sums =
                        Tile { n_rows, width: columns.len(), from, from_stride, c, c_stride: n, ahead };
                    tile(isa, precision, a, A_STRIDE, words, sums);
                }
            }
            if let Some(finish) = finish {
                // SAFETY: these rows and columns lie in `c`.
                let at = Output(unsafe { out.at(rows.start * n + columns.start) });
                finish(&mut Part { rows: rows.clone(), columns, at, stride: n });
            }
        }
        keep(&ROWS, packed);
        keep(&WIDE, wide);
    });
}

/// What of a panel is fetched while tile `i` of `n` meets the one before it: all of it in time for the first.
fn part_of(panel: &[u32], i: usize, n: usize) -> &[u32] {
    // A line with each row of the panel, if there are two tiles.
    let parts = n.min(2);
    let at = |i: usize| i.min(parts) * panel.len() / parts;
    &panel[at(i)..at(i + 1)]
}

/// A pointer that tasks write disjoint parts through.
#[derive(Clone, Copy)]
pub(crate) struct Output(pub(crate) *mut f32);

// SAFETY: every user writes disjoint parts from different tasks, as the comment at each use shows.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// `offset` must lie inside the allocation.
    #[inline(always)]
    pub(crate) unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_next_panel_is_fetched_once() {
        let panel: Vec<u32> = (0..7 * NR as u32).collect();
        for n in 1..=8 {
            let parts: Vec<u32> = (0..n).flat_map(|i| part_of(&panel, i, n)).copied().collect();
            assert_eq!(parts, panel, "{n} tiles");
        }
    }

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn round(x: f32, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => f64::from(x),
            Precision::Bf16 => half::bf16::from_f32(x).to_f64(),
        }
    }

    fn check(m: usize, n: usize, k: usize, transposed: (bool, bool), precision: Precision, isa: Isa) {
        // Unaligned: one element into their memory, which ends with them.
        let (a, b) = (numbers(m * k + 1, 1), numbers(k * n + 1, 2));
        let (a, b) = (&a[1..], &b[1..]);
        let view = |data, cols: usize, rows: usize, transposed| {
            let (row_stride, col_stride) = if transposed { (1, rows) } else { (cols, 1) };
            MatrixRef { data, row_stride, col_stride }
        };
        let (a, b) = (view(a, k, m, transposed.0), view(b, n, k, transposed.1));
        let mut c = numbers(m * n, 3);
        let before = c.clone();
        gemm_with(isa, m, n, k, a, b, Start::Result, &mut c, precision);
        for i in 0..m {
            for j in 0..n {
                let (mut expected, mut magnitude) = (f64::from(before[i * n + j]), 1.0);
                for l in 0..k {
                    let x = round(a.data[i * a.row_stride + l * a.col_stride], precision);
                    let y = round(b.data[l * b.row_stride + j * b.col_stride], precision);
                    expected += x * y;
                    magnitude += (x * y).abs();
                }
                // k sums, each with half an ulp of the running magnitude.
                let tolerance = magnitude * f64::from(f32::EPSILON) * (k as f64).sqrt().max(4.0);
                let found = f64::from(c[i * n + j]);
                assert!(
                    (found - expected).abs() <= tolerance,
                    "{isa:?} {precision:?} {m}x{n}x{k} {transposed:?} ({i}, {j}): {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn products_equal_the_reference_for_all_strides_and_tails() {
        let sizes = [
            (1, 1, 1),
            (1, 33, 3),
            (12, 32, 2),
            (13, 31, 5),
            (25, 64, 67),
            (97, 70, 33),
            (5, 100, 513),
            (50, 7, 1030),
        ];
        for isa in Isa::all_available() {
            for precision in [Precision::F32, Precision::Bf16] {
                for (m, n, k) in sizes {
                    for transposed in [(false, false), (true, false), (false, true), (true, true)] {
                        check(m, n, k, transposed, precision, isa);
                    }
                }
            }
        }
    }

    #[test]
    fn products_equal_the_reference_for_the_widths_of_the_models() {
        for isa in Isa::all_available() {
            for precision in [Precision::F32, Precision::Bf16] {
                for width in crate::testing::WIDTHS {
                    check(2, width, 9, (false, true), precision, isa);
                    check(3, 9, width, (false, true), precision, isa);
                }
                for n in crate::testing::TAILS {
                    check(n % 13 + 1, n, n / 2 + 1, (false, false), precision, isa);
                }
            }
        }
    }

    #[test]
    fn tasks_are_the_whole_product_once_and_even() {
        for (m, n, n_threads) in
            [(1, 32, 2), (1, 2560, 2), (257, 1408, 2), (257, 6144, 4), (1028, 1408, 2), (25, 70, 3)]
        {
            let cuts = Cuts::new(m, n, n_threads);
            let mut is_taken = vec![false; cuts.n_tiles * cuts.n_panels];
            for (tiles, panels) in (0..cuts.n()).map(|task| cuts.task(task)) {
                assert!(tiles.len() <= TILES_A_TASK && !panels.is_empty());
                for (tile, panel) in tiles.flat_map(|tile| panels.clone().map(move |panel| (tile, panel))) {
                    assert!(!std::mem::replace(&mut is_taken[tile * cuts.n_panels + panel], true));
                }
            }
            assert!(is_taken.iter().all(|&taken| taken), "{m} x {n}");
        }
        let of_half = |m, n, half: usize| -> usize {
            let cuts = Cuts::new(m, n, 2);
            let tasks = half * cuts.n() / 2..(half + 1) * cuts.n() / 2;
            tasks.map(|task| cuts.task(task)).map(|(tiles, panels)| tiles.len() * panels.len()).sum()
        };
        for (m, n) in [(257, 1408), (257, 4224), (257, 6144), (1028, 1408), (40, 2560), (1, 10240)] {
            assert_eq!(of_half(m, n, 0), of_half(m, n, 1), "{m} x {n}");
        }
    }

    #[test]
    fn a_product_starts_from_nothing_or_from_a_row() {
        let sizes = [(13, 31, 5), (25, 64, 1030), (3, 40, 0)];
        for ((m, n, k), precision) in
            sizes.into_iter().flat_map(|sizes| [(sizes, Precision::F32), (sizes, Precision::Bf16)])
        {
            let (a, b, row) = (numbers(m * k, 1), numbers(k * n, 2), numbers(n, 3));
            let a = MatrixRef { data: &a, row_stride: k, col_stride: 1 };
            let b = MatrixRef { data: &b, row_stride: n, col_stride: 1 };
            let mut onto = row.repeat(m);
            gemm(m, n, k, a, b, Start::Result, &mut onto, precision);
            assert_eq!(product(m, n, k, a, b, Some(&row), precision), onto);
            let mut from_zero = vec![0.0; m * n];
            gemm(m, n, k, a, b, Start::Result, &mut from_zero, precision);
            assert_eq!(product(m, n, k, a, b, None, precision), from_zero);
        }
    }

    #[test]
    fn not_a_number_and_infinity_reach_the_result() {
        for isa in Isa::all_available() {
            for precision in [Precision::F32, Precision::Bf16] {
                let a = [1.0, f32::from_bits(0x7fff_ffff), 1.0, f32::INFINITY];
                let b = [1.0; 4];
                let mut c = [0.0; 4];
                let view = |data| MatrixRef { data, row_stride: 2, col_stride: 1 };
                gemm_with(isa, 2, 2, 2, view(&a), view(&b), Start::Zero, &mut c, precision);
                assert!(c[0].is_nan() && c[1].is_nan(), "{isa:?} {precision:?} {c:?}");
                assert_eq!((c[2], c[3]), (f32::INFINITY, f32::INFINITY), "{isa:?} {precision:?}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "reaches beyond")]
    fn a_view_that_is_too_short_is_refused() {
        let view = MatrixRef { data: &[0.0; 5], row_stride: 3, col_stride: 1 };
        gemm(2, 3, 3, view, view, Start::Zero, &mut [0.0; 6], Precision::F32);
    }
}
