//! The sums of integers of [`sums`](super::sums) with AMX, panel by panel for all rows of a task.
//!
//! Part by part of `k`: that of a panel stays in the first level of the cache while it meets all rows, and the next one comes from
//! memory meanwhile. Long rows are divided into blocks of `k`, so that those of all rows stay in the second level, with the sums of
//! some panels.

use std::cell::RefCell;
use std::ops::Range;

use super::format::{QUAD, WIDTH};
use super::rows::Rows;
use crate::amx::{self, AHEAD, Aligned, Operands, Registers, STEPS, eighth};
use crate::buffer::keep;

/// Rows of sums that registers hold.
const ROWS: usize = 2 * amx::ROWS;
/// Products along a block of `k` at most.
const STEPS_A_BLOCK: usize = 24;
/// Rows of a task at most: 0.8 MiB of integers along a block, which leaves as much of the second level to the sums.
const ROWS_A_TASK: usize = 17 * ROWS;
/// Tiles of sums at most that are kept while the rows are read block by block: 640 KiB.
const TILES_TOGETHER: usize = 160;

type Tile = Aligned<[[i32; WIDTH]; ROWS]>;

thread_local!(static SUMS: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) });

/// Rows of a task, of `n` that it could have.
pub(super) fn rows_a_task(n: usize) -> usize {
    n.div_ceil(n.div_ceil(ROWS_A_TASK)).next_multiple_of(ROWS)
}

/// The sums of some rows with some panels.
pub(super) struct AmxSums<'a> {
    rows: &'a Rows,
    some: Range<usize>,
    /// Panel by panel.
    sums: Vec<Tile>,
    registers: Registers,
}

impl<'a> AmxSums<'a> {
    /// For a task, which must not wait for others while this lives.
    ///
    /// # Panics
    /// When the first row is none of a register, or AMX does not read these rows.
    pub(super) fn new(rows: &'a Rows, some: Range<usize>) -> Self {
        assert!(some.start.is_multiple_of(amx::ROWS) && rows.registers().is_some());
        // SAFETY: rows that AMX reads are made where it is there; the caller keeps the rest.
        let registers = unsafe { Registers::take() };
        Self { rows, some, sums: SUMS.take(), registers }
    }

    fn n_tiles(&self) -> usize {
        self.some.len().div_ceil(ROWS)
    }

    /// How many panels are [filled](Self::fill) together.
    pub(super) fn panels_together(&self) -> usize {
        let (_, n_steps) = self.rows.registers().expect("was checked");
        if n_steps > STEPS_A_BLOCK { (TILES_TOGETHER / self.n_tiles()).max(1) } else { 1 }
    }

    /// `Σ x q` over the quads of each of these panels. The last of `quads` is fetched meanwhile, if there is one more than panels.
    ///
    /// # Panics
    /// When the quads of a panel are not as many as the rows have.
    pub(super) fn fill(&mut self, n_panels: usize, quads: &[&[[u8; QUAD]]]) {
        let (_, n_steps) = self.rows.registers().expect("was checked");
        assert!(quads.len() >= n_panels && quads.iter().all(|quads| quads.len() == n_steps * amx::WORDS));
        let n_sums = n_panels * self.n_tiles();
        if self.sums.len() < n_sums {
            self.sums.resize(n_sums, Aligned([[0; WIDTH]; ROWS]));
        }
        let mut parts = parts(n_panels, n_steps).peekable();
        while let Some((panel, steps)) = parts.next() {
            let (next, first) = parts.peek().map_or((n_panels, 0), |(panel, steps)| (*panel, steps.start));
            let ahead = quads.get(next).map(|quads| quads[first * amx::WORDS..].as_ptr().cast());
            self.add(
                panel,
                steps.clone(),
                &quads[panel][steps.start * amx::WORDS..steps.end * amx::WORDS],
                ahead,
            );
        }
    }

    /// Adds what these steps along `k` are to all sums of a panel.
    fn add(&mut self, panel: usize, steps: Range<usize>, quads: &[[u8; QUAD]], ahead: Option<*const u8>) {
        let (registers, n_steps) = self.rows.registers().expect("was checked");
        let (n, n_tiles) = (steps.len(), self.n_tiles());
        assert!(steps.end <= n_steps && quads.len() == n * amx::WORDS);
        let panel_start: *const u8 = quads.as_ptr().cast();
        let sums = self.sums[panel * n_tiles..][..n_tiles].iter_mut();
        for (i, Aligned(sums)) in sums.enumerate() {
            let first = self.some.start / amx::ROWS + 2 * i;
            let n_rows = ROWS.min(self.some.end - first * amx::ROWS);
            let second = first + usize::from(n_rows > amx::ROWS);
            let a = [first, second].map(|i| {
                let some: &[_] = &registers[i * n_steps + steps.start..][..n];
                some.as_ptr().cast()
            });
            let ahead = ahead.and_then(|ahead| Some(ahead.wrapping_add(eighth(i, n_tiles)? * n * AHEAD)));
            let ahead = ahead.unwrap_or(panel_start);
            let sums = sums.as_mut_ptr().cast::<i32>();
            // SAFETY: so many registers of rows and quads are there; the sums are 32 rows of 32.
            unsafe {
                if steps.start == 0 {
                    self.registers.clear();
                } else {
                    self.registers.load(n_rows, sums, WIDTH);
                }
                self.registers.add_int8(n_rows, Operands { a, panel: panel_start, n_steps: n, ahead });
                self.registers.store(n_rows, sums, WIDTH);
            }
        }
    }

    /// The sums of `n` rows, which are of one tile, from `first` on, with one of the panels.
    pub(super) fn rows(&self, panel: usize, first: usize, n: usize) -> &[[i32; WIDTH]] {
        let at = first - self.some.start;
        &self.sums[panel * self.n_tiles() + at / ROWS].0[at % ROWS..][..n]
    }

    /// The rows of this task, tile by tile.
    pub(super) fn tiles(&self) -> impl Iterator<Item = Range<usize>> {
        let end = self.some.end;
        self.some.clone().step_by(ROWS).map(move |first| first..end.min(first + ROWS))
    }
}

impl Drop for AmxSums<'_> {
    fn drop(&mut self) {
        keep(&SUMS, std::mem::take(&mut self.sums));
    }
}

/// Panels and steps along `k`, in the order in which they are multiplied.
fn parts(n_panels: usize, n_steps: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let share = |range: Range<usize>, most: usize| {
        let (n, of) = (range.len(), range.len().div_ceil(most));
        (0..of).map(move |i| range.start + i * n / of..range.start + (i + 1) * n / of)
    };
    share(0..n_steps, STEPS_A_BLOCK).flat_map(move |block| {
        (0..n_panels).flat_map(move |panel| share(block.clone(), STEPS).map(move |steps| (panel, steps)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even_and_a_block_is_taken_with_all_panels() {
        let few: Vec<_> = parts(2, 22).collect();
        assert_eq!(few, [(0, 0..7), (0, 7..14), (0, 14..22), (1, 0..7), (1, 7..14), (1, 14..22)]);
        let many: Vec<_> = parts(3, 96).collect();
        assert_eq!(many.len(), 3 * 12);
        assert_eq!(many[2..5], [(0, 16..24), (1, 0..8), (1, 8..16)]);
        assert_eq!(many[8..10], [(2, 16..24), (0, 24..32)]);
        assert_eq!(many[35], (2, 88..96));
    }

    #[test]
    fn tasks_have_as_many_rows_as_each_other_and_whole_tiles() {
        assert_eq!([1, 257, 544, 545, 1028].map(rows_a_task), [32, 288, 544, 288, 544]);
    }
}
