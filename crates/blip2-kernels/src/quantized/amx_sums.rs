//! The sums of integers of [`sums`](super::sums) with AMX, panel by panel for all rows of a task.
//!
//! Part by part of `k`: that of a panel stays in the first level of the cache while it meets all rows, the sums stay in the second.

use std::cell::RefCell;
use std::ops::Range;

use super::format::{QUAD, WIDTH};
use super::rows::{RegisterOfRows, Rows};
use crate::amx::{self, Aligned, Operands, Registers};
use crate::buffer::keep;
use crate::isa::{Isa, with_isa};

/// Rows of sums that registers hold.
pub(super) const ROWS: usize = 2 * amx::ROWS;
/// Products along `k` before sums are put back: 32 KiB of a panel.
const STEPS: usize = 16;

type Tile = Aligned<[[i32; WIDTH]; ROWS]>;

thread_local!(static SUMS: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) });

/// Rows of a task at most: their integers are half of a second level of the cache.
pub(super) fn rows_a_task(row_bytes: usize) -> usize {
    ((1 << 20) / row_bytes / ROWS * ROWS).max(ROWS)
}

/// The sums of some rows with a panel.
pub(super) struct AmxSums<'a> {
    rows: &'a Rows,
    some: Range<usize>,
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
        let mut sums = SUMS.take();
        sums.resize(some.len().div_ceil(ROWS), Aligned([[0; WIDTH]; ROWS]));
        // SAFETY: rows that AMX reads are made where it is there; the caller keeps the rest.
        let registers = unsafe { Registers::take() };
        Self { rows, some, sums, registers }
    }

    /// `Σ x q` over the quads of a panel.
    ///
    /// # Panics
    /// When the quads are not whole registers, or more than the rows are long.
    pub(super) fn fill(&mut self, quads: &[[u8; QUAD]]) {
        let (registers, n_steps) = self.rows.registers().expect("was checked");
        assert!(quads.len().is_multiple_of(amx::WORDS) && quads.len() / amx::WORDS <= n_steps);
        for (part, quads) in quads.chunks(STEPS * amx::WORDS).enumerate() {
            for (i, Aligned(sums)) in self.sums.iter_mut().enumerate() {
                let first = self.some.start / amx::ROWS + 2 * i;
                let n_rows = ROWS.min(self.some.end - first * amx::ROWS);
                let second = first + usize::from(n_rows > amx::ROWS);
                let n = quads.len() / amx::WORDS;
                let a = [first, second].map(|i| {
                    let some: &[RegisterOfRows] = &registers[i * n_steps + part * STEPS..][..n];
                    some.as_ptr().cast()
                });
                let sums = sums.as_mut_ptr().cast::<i32>();
                // SAFETY: so many registers of rows and quads are there; the sums are 32 rows of 32.
                unsafe {
                    if part == 0 {
                        self.registers.clear();
                    } else {
                        self.registers.load(n_rows, sums, WIDTH);
                    }
                    self.registers.add_int8(n_rows, Operands { a, panel: quads.as_ptr().cast(), n_steps: n });
                    self.registers.store(n_rows, sums, WIDTH);
                }
            }
        }
    }

    /// The sums of the rows from `first` on, `Σ x (q - zero point)`.
    pub(super) fn read(&self, first: usize, to: &mut [[i32; WIDTH]]) {
        with_isa(
            Isa::Amx,
            #[inline(always)]
            || {
                for (to, row) in to.iter_mut().zip(first..) {
                    let (at, start) = (row - self.some.start, self.rows.starts[row]);
                    let sums = &self.sums[at / ROWS].0[at % ROWS];
                    to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum + start);
                }
            },
        );
    }
}

impl Drop for AmxSums<'_> {
    fn drop(&mut self) {
        keep(&SUMS, std::mem::take(&mut self.sums));
    }
}
