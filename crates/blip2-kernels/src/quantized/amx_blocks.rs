//! The sums of [`sums`](super::sums) over long blocks with AMX, a panel for all rows of a task: the integers of a block are what one
//! product of registers takes.
//!
//! Some blocks are multiplied, then their sums are scaled: for a while after an instruction of AMX a core takes half as many
//! operations on wide registers as else, so the two do not take turns block by block.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::avx512;
use super::format::{Int8LongBlocks, Layout, WIDTH};
use super::rows::Rows;
use super::sums::with_count;
use crate::amx::{self, Aligned, Operands, Registers};
use crate::buffer::keep;
use crate::isa::Isa;

/// Rows of sums that registers hold.
const ROWS: usize = 2 * amx::ROWS;
/// Blocks that are multiplied before their sums are scaled: 64 KiB of sums, in the second level of the cache.
const TOGETHER: usize = 16;
/// Rows that are scaled at a time: their sums stay in registers.
const ROWS_AT_A_TIME: usize = 8;

/// Sums of a block: of integers, 32 rows with a panel.
type Integers = Aligned<[[i32; WIDTH]; ROWS]>;
type Row = [f32; WIDTH];

thread_local!(static SUMS: RefCell<(Vec<Integers>, Vec<Row>)> = const { RefCell::new((Vec::new(), Vec::new())) });

/// The sums of some rows with a panel.
pub(super) struct AmxBlocks<'a> {
    rows: &'a Rows,
    some: Range<usize>,
    /// Block by block.
    integers: Vec<Integers>,
    /// Row by row.
    sums: Vec<Row>,
    registers: Registers,
}

impl<'a> AmxBlocks<'a> {
    /// For a task, which must not wait for others while this lives.
    ///
    /// # Panics
    /// When the first row is none of a register, or AMX does not read these rows.
    pub(super) fn new(rows: &'a Rows, some: Range<usize>) -> Self {
        assert!(some.start.is_multiple_of(amx::ROWS) && rows.registers().is_some());
        let (mut integers, mut sums) = SUMS.take();
        integers.resize(TOGETHER, Aligned([[0; WIDTH]; ROWS]));
        sums.resize(some.len(), [0.0; WIDTH]);
        // SAFETY: rows that AMX reads are made where it is there; the caller keeps the rest.
        let registers = unsafe { Registers::take() };
        Self { rows, some, integers, sums, registers }
    }

    /// `Σ scale (Σ x q)` over the blocks of a panel. Meanwhile the bytes `ahead` are fetched.
    ///
    /// # Panics
    /// When the blocks of the panel are not as many as the rows have.
    pub(super) fn fill(&mut self, panel: &[u8], ahead: &[u8]) {
        type L = Int8LongBlocks;
        let (registers, n_blocks) = self.rows.registers().expect("was checked");
        assert!(panel.len() == n_blocks * L::GROUP && n_blocks == self.rows.n_blocks);
        let n_parts = n_blocks.div_ceil(TOGETHER) * self.some.len().div_ceil(ROWS_AT_A_TIME);
        let mut ahead = ahead.chunks(ahead.len().div_ceil(n_parts).next_multiple_of(64).max(64));
        self.sums.fill([0.0; WIDTH]);
        for (i, groups) in panel.chunks(TOGETHER * L::GROUP).enumerate() {
            let first_block = i * TOGETHER;
            for tile in tiles(self.some.clone()) {
                let first = tile.start / amx::ROWS;
                let second = first + usize::from(tile.len() > amx::ROWS);
                let groups_and_sums = groups.chunks_exact(L::GROUP).zip(&mut self.integers);
                for (b, (group, Aligned(integers))) in (first_block..).zip(groups_and_sums) {
                    let a = [first, second].map(|i| registers[i * n_blocks + b].0.as_ptr().cast());
                    let panel = group[L::HEAD..].as_ptr();
                    let integers = integers.as_mut_ptr().cast::<i32>();
                    // SAFETY: a register of each 16 rows and 16 rows of quads are there; the sums are 32 rows of 32.
                    unsafe {
                        self.registers.clear();
                        let operands = Operands { a, panel, n_steps: 1, ahead: panel };
                        self.registers.add_int8(tile.len(), operands);
                        self.registers.store(tile.len(), integers, WIDTH);
                    }
                }
                let integers = &self.integers[..groups.len() / L::GROUP];
                let summed = Summed { rows: self.rows, first_row: tile.start, first_block, integers, groups };
                for first in tile.clone().step_by(ROWS_AT_A_TIME) {
                    let some = first..tile.end.min(first + ROWS_AT_A_TIME);
                    let sums = &mut self.sums[first - self.some.start..][..some.len()];
                    summed.add_scaled(some, ahead.next().unwrap_or_default(), sums);
                }
            }
        }
    }

    /// The rows of this task, tile by tile, and the sums of each.
    pub(super) fn tiles(&self) -> impl Iterator<Item = (usize, &[Row])> {
        let first = self.some.start;
        tiles(self.some.clone())
            .map(move |tile| (tile.start, &self.sums[tile.start - first..tile.end - first]))
    }
}

/// Blocks whose integers are summed, for the rows of a tile.
#[derive(Clone, Copy)]
struct Summed<'a> {
    rows: &'a Rows,
    first_row: usize,
    first_block: usize,
    /// Block by block, without what the sums of a row begin with.
    integers: &'a [Integers],
    /// Those of the panel.
    groups: &'a [u8],
}

impl Summed<'_> {
    /// Adds what the integers are scaled to, to the sums of some of the rows. Meanwhile the bytes `ahead` are fetched.
    ///
    /// # Panics
    /// When these are no rows of the tile, or more than are scaled at a time, or something is missing.
    fn add_scaled(self, some: Range<usize>, ahead: &[u8], sums: &mut [Row]) {
        assert!(
            self.first_row <= some.start && some.end <= self.first_row + ROWS && sums.len() == some.len()
        );
        assert!(self.first_block + self.integers.len() <= self.rows.n_blocks);
        assert!(self.groups.len() == self.integers.len() * Int8LongBlocks::GROUP);
        let n = some.len() * self.rows.n_blocks;
        assert!(some.start * self.rows.n_blocks + n <= self.rows.scales.len().min(self.rows.starts.len()));
        with_count!(some.len(), [1 2 3 4 5 6 7 8], R => {
            // SAFETY: everything is there, as was asserted, and a machine with AMX has AVX-512.
            unsafe { self.add_rows::<R>(some.start, ahead, sums) }
        });
    }

    /// # Safety
    /// As the assertions say, for R rows from `first` on.
    #[target_feature(enable = "avx512f")]
    unsafe fn add_rows<const R: usize>(self, first: usize, ahead: &[u8], sums: &mut [Row]) {
        let n_blocks = self.rows.n_blocks;
        let at = first * n_blocks + self.first_block;
        let (starts, scales) = (&self.rows.starts[at..], &self.rows.scales[at..]);
        let n = self.integers.len();
        let mut ahead = ahead.chunks(ahead.len().div_ceil(n).next_multiple_of(64).max(64));
        // SAFETY: of R rows there are 32 sums, and in each block 32 integers, a start and a scale; of each block 32 scales.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; R];
            for (acc, sums) in acc.iter_mut().zip(&*sums) {
                *acc = [0, 16].map(|o| _mm512_loadu_ps(sums.as_ptr().add(o)));
            }
            let groups = self.groups.chunks_exact(Int8LongBlocks::GROUP);
            for (b, (Aligned(integers), group)) in self.integers.iter().zip(groups).enumerate() {
                if let Some(lines) = ahead.next() {
                    avx512::fetch(Isa::Amx, lines);
                }
                let of_outputs = [0, 1].map(|half| avx512::scales(group.as_ptr(), 0, half, false));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let row = integers.as_ptr().add(first - self.first_row + r).cast::<i32>();
                    let start = _mm512_set1_epi32(*starts.as_ptr().add(r * n_blocks + b));
                    let scale = _mm512_set1_ps(*scales.as_ptr().add(r * n_blocks + b));
                    for half in 0..2 {
                        let sum = _mm512_add_epi32(_mm512_load_si512(row.add(16 * half).cast()), start);
                        let scale = _mm512_mul_ps(of_outputs[half], scale);
                        acc[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[half]);
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                (0..2).for_each(|half| _mm512_storeu_ps(sums.as_mut_ptr().add(16 * half), acc[half]));
            }
        }
    }
}

fn tiles(some: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = some.end;
    some.step_by(ROWS).map(move |first| first..end.min(first + ROWS))
}

impl Drop for AmxBlocks<'_> {
    fn drop(&mut self) {
        keep(&SUMS, (std::mem::take(&mut self.integers), std::mem::take(&mut self.sums)));
    }
}
