//! Activations in eight bits: -127 to 127 and a scale for the row, or for 32 of its elements.

use std::cell::RefCell;

use rayon::prelude::*;

use super::format::Format;
#[cfg(target_arch = "x86_64")]
use super::format::{BLOCK, LONG_BLOCK};
#[cfg(target_arch = "x86_64")]
use super::{amx_sums, avx512};
#[cfg(target_arch = "x86_64")]
use crate::amx::{self, Aligned};
use crate::buffer::keep;
use crate::isa::{Isa, with_isa};
use crate::lanes::round;

/// Below this no scale can be inverted; such activations are zero.
const SMALLEST: f32 = 1e-36;

/// The distance between rows is a multiple of this, and not of a power of two that would put many rows into the same
/// sets of the cache.
const LINE: usize = 64;

/// Up to so many rows the products of AVX-512 take less time than those of AMX.
#[cfg(target_arch = "x86_64")]
const FEW_ROWS: usize = 4;
/// The same of rows in long blocks, where a product of registers is stored before it is scaled.
#[cfg(target_arch = "x86_64")]
const FEW_ROWS_OF_BLOCKS: usize = 12;

/// 64 integers of each of 16 rows.
#[cfg(target_arch = "x86_64")]
pub(super) type RegisterOfRows = Aligned<[i8; amx::BYTES]>;

/// Rounded rows. A scale's elements are one *block*; it is the whole row where rows are scaled as a whole.
///
/// Where a block has a NaN or an infinity, its integers are zero and its scale is NaN, which makes all outputs of the
/// row NaN.
#[derive(Default)]
pub(super) struct Rows {
    /// Rows of `stride` integers; from the end of a row to that of its last block they are zero.
    pub(super) values: Vec<i8>,
    pub(super) stride: usize,
    /// The same as AMX reads them, where it does: 16 rows at a time, and of these 64 integers at a time. What is beyond the last row
    /// does not matter.
    #[cfg(target_arch = "x86_64")]
    registers: Vec<RegisterOfRows>,
    /// Registers along a row; none where AMX does not multiply these rows.
    #[cfg(target_arch = "x86_64")]
    n_steps: usize,
    pub(super) n_blocks: usize,
    /// Per row and block: an element is its integer times this.
    pub(super) scales: Vec<f32>,
    /// Per row and block: minus the weights' zero point times the integers' sum, which is where a sum of products begins.
    pub(super) starts: Vec<i32>,
    /// Per row and block: the sum of the elements, as they were rounded.
    pub(super) totals: Vec<f32>,
}

thread_local!(static ROWS: RefCell<Rows> = RefCell::default());

impl Rows {
    /// Calls `f` with `n_rows` rows of `x` in eight bits, as weights of `format` are multiplied, in memory that this thread keeps.
    pub(super) fn with<R>(
        isa: Isa,
        x: &[f32],
        n_rows: usize,
        format: Format,
        f: impl FnOnce(&Self) -> R,
    ) -> R {
        // Taken, not borrowed: a waiting thread may run another task that quantises too.
        let mut rows = ROWS.take();
        rows.fill(isa, x, n_rows, format.block(), format.zero_point());
        let result = f(&rows);
        keep(&ROWS, rows);
        result
    }

    /// In blocks, or in one scale for a whole row.
    fn fill(&mut self, isa: Isa, x: &[f32], n_rows: usize, block: Option<usize>, zero_point: i32) {
        let width = x.len() / n_rows;
        let is_by_row = block.is_none();
        let block = block.unwrap_or(width);
        self.n_blocks = width.div_ceil(block);
        self.stride = width.next_multiple_of(LINE);
        if self.stride.is_multiple_of(4 * LINE) {
            self.stride += LINE;
        }
        let n_scales = n_rows * self.n_blocks;
        self.scales.resize(n_scales, 0.0);
        self.starts.resize(n_scales, 0);
        self.totals.resize(n_scales, 0.0);
        #[cfg(target_arch = "x86_64")]
        {
            // Whole registers along a row; few rows would leave most of a register empty.
            let (is_whole, is_long) = (width.is_multiple_of(LINE), block == LONG_BLOCK);
            let is_many = n_rows > if is_by_row { FEW_ROWS } else { FEW_ROWS_OF_BLOCKS };
            self.n_steps = 0;
            if isa == Isa::Amx && is_many && is_whole && (is_by_row || is_long) {
                self.values.clear();
                return self.fill_registers(x, n_rows, block, zero_point);
            }
        }
        self.values.resize(n_rows * self.stride, 0);
        self.values
            .par_chunks_exact_mut(self.stride)
            .zip(self.scales.par_chunks_exact_mut(self.n_blocks))
            .zip(self.starts.par_chunks_exact_mut(self.n_blocks))
            .zip(self.totals.par_chunks_exact_mut(self.n_blocks))
            .zip(x.par_chunks_exact(width))
            .with_min_len((1 << 14) / width + 1)
            .for_each(|((((values, scales), starts), totals), x)| {
                values[width..].fill(0);
                with_isa(
                    isa,
                    #[inline(always)]
                    || {
                        for (i, (x, values)) in x.chunks(block).zip(values.chunks_mut(block)).enumerate() {
                            let (scale, sum) = round_block(isa, x, values);
                            scales[i] = scale;
                            starts[i] = -zero_point * sum;
                            totals[i] = scale * sum as f32;
                        }
                    },
                );
            });
    }

    /// Rows of blocks of whole registers, to where AMX reads them.
    #[cfg(target_arch = "x86_64")]
    fn fill_registers(&mut self, x: &[f32], n_rows: usize, block: usize, zero_point: i32) {
        let (width, n_blocks) = (x.len() / n_rows, self.n_blocks);
        let n_steps = width / LINE;
        let n = n_rows.div_ceil(amx::ROWS) * n_steps;
        self.n_steps = n_steps;
        if self.registers.len() < n {
            self.registers.resize(n, Aligned([0; amx::BYTES]));
        }
        self.registers[..n]
            .par_chunks_exact_mut(n_steps)
            .zip(self.scales.par_chunks_mut(amx::ROWS * n_blocks))
            .zip(self.starts.par_chunks_mut(amx::ROWS * n_blocks))
            .zip(self.totals.par_chunks_mut(amx::ROWS * n_blocks))
            .zip(x.par_chunks(amx::ROWS * width))
            .for_each(|((((registers, scales), starts), totals), x)| {
                with_isa(
                    Isa::Amx,
                    #[inline(always)]
                    || {
                        for (i, x) in x.chunks_exact(block).enumerate() {
                            let (row, steps) = (i / n_blocks, block / LINE);
                            let registers = &mut registers[i % n_blocks * steps..][..steps];
                            let (scale, inverse) = scale_of(largest(x));
                            let mut sum = 0;
                            for (x, Aligned(to)) in x.as_chunks::<LINE>().0.iter().zip(registers) {
                                let line = &mut to.as_chunks_mut::<LINE>().0[row];
                                match inverse {
                                    // SAFETY: a machine with AMX has AVX-512.
                                    Some(inverse) => sum += unsafe { avx512::round_all(x, inverse, line) },
                                    None => *line = [0; LINE],
                                }
                            }
                            scales[i] = scale;
                            starts[i] = -zero_point * sum;
                            totals[i] = scale * sum as f32;
                        }
                    },
                );
            });
    }

    /// Tasks for each thread: enough to even out their times. With AMX each reads all rows into its cache once more.
    pub(super) fn tasks_a_thread(&self) -> usize {
        #[cfg(target_arch = "x86_64")]
        if self.registers().is_some() {
            return 2;
        }
        4
    }

    /// How many rows a task has that could have so many: with AMX no more than stay in the cache while it reads panel after panel.
    pub(super) fn rows_a_task(&self, n: usize) -> usize {
        #[cfg(target_arch = "x86_64")]
        if self.registers().is_some() {
            return amx_sums::rows_a_task(n);
        }
        n
    }

    /// The registers of 16 rows after another, and how many each has; nothing where AMX does not multiply them.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn registers(&self) -> Option<(&[RegisterOfRows], usize)> {
        (self.n_steps > 0).then_some((&*self.registers, self.n_steps))
    }
}

/// The bits of the largest magnitude; they order as magnitudes do, infinity and NaN last.
#[inline(always)]
fn largest(x: &[f32]) -> u32 {
    x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff))
}

/// The scale of elements of which the [`largest`] is given, and what they are multiplied with to be rounded; where that is nothing,
/// their integers are zero.
#[inline(always)]
fn scale_of(largest: u32) -> (f32, Option<f32>) {
    let largest = f32::from_bits(largest);
    if !largest.is_finite() || largest < SMALLEST {
        return (if largest.is_finite() { 0.0 } else { f32::NAN }, None);
    }
    (largest / 127.0, Some(127.0 / largest))
}

/// [`round_block`] of `N` elements, where there are just so many. The compiler takes half as long again for a block whose length it
/// does not know.
///
/// # Safety
/// The machine must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn round_whole_block<const N: usize>(x: &[f32], values: &mut [i8]) -> Option<(f32, i32)> {
    let (x, values) = (<&[f32; N]>::try_from(x).ok()?, values.first_chunk_mut::<N>()?);
    // SAFETY: the caller's promise.
    let (scale, inverse) = scale_of(unsafe { avx512::largest(x) });
    let Some(inverse) = inverse else {
        *values = [0; N];
        return Some((scale, 0));
    };
    // SAFETY: as above.
    Some((scale, unsafe { avx512::round_all(x, inverse, values) }))
}

/// The scale and the sum of the integers.
#[inline(always)]
fn round_block(isa: Isa, x: &[f32], values: &mut [i8]) -> (f32, i32) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512 | Isa::Amx) {
        // SAFETY: the machine has AVX-512.
        let rounded = unsafe {
            round_whole_block::<BLOCK>(x, values).or_else(|| round_whole_block::<LONG_BLOCK>(x, values))
        };
        if let Some(rounded) = rounded {
            return rounded;
        }
    }
    let _ = isa;
    let (scale, inverse) = scale_of(largest(x));
    let Some(inverse) = inverse else {
        values[..x.len()].fill(0);
        return (scale, 0);
    };
    let mut sum = 0i32;
    for (x, value) in x.iter().zip(values) {
        let rounded = round(x * inverse);
        *value = rounded as i8;
        sum += rounded;
    }
    (scale, sum)
}

#[cfg(test)]
mod tests {
    use super::super::format::{BLOCK, LONG_BLOCK};
    use super::*;

    #[test]
    fn elements_are_within_half_a_step_on_every_instruction_set() {
        let (n_rows, width) = (3, 75);
        let mut x: Vec<f32> = (0..n_rows * width).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        x[width..width + 64].fill(0.0);
        x[2 * width + 40] = f32::NEG_INFINITY;
        for block in [Some(BLOCK), Some(LONG_BLOCK), None] {
            let mut first = Rows::default();
            first.fill(Isa::Scalar, &x, n_rows, block, 128);
            for isa in Isa::all_available() {
                let mut rows = Rows::default();
                rows.fill(isa, &x, n_rows, block, 128);
                assert_eq!(rows.values, first.values, "{isa:?}");
                assert_eq!(rows.starts, first.starts, "{isa:?}");
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&rows.scales), bits(&first.scales), "{isa:?}");
            }
            let block = block.unwrap_or(width);
            for (i, row) in x.chunks_exact(width).enumerate() {
                for (b, x) in row.chunks(block).enumerate() {
                    let at = i * first.n_blocks + b;
                    let values = &first.values[i * first.stride + b * block..][..x.len()];
                    let scale = first.scales[at];
                    assert_eq!(scale.is_nan(), x.iter().any(|x| !x.is_finite()));
                    let sum: i32 = values.iter().map(|&q| i32::from(q)).sum();
                    assert_eq!(first.starts[at], -128 * sum);
                    for (x, &q) in x.iter().zip(values).filter(|_| !scale.is_nan()) {
                        assert!((x - scale * f32::from(q)).abs() <= scale * 0.5001, "{x} {q} {scale}");
                    }
                }
                assert!(
                    first.values[i * first.stride + width..][..first.stride - width].iter().all(|&q| q == 0)
                );
            }
        }
    }

    #[test]
    fn the_smallest_and_the_largest_numbers_have_a_scale() {
        let mut values = [0; 2];
        assert_eq!(round_block(Isa::Scalar, &[f32::MIN_POSITIVE, 0.0], &mut values), (0.0, 0));
        assert_eq!(round_block(Isa::Scalar, &[f32::MAX, f32::MIN], &mut values), (f32::MAX / 127.0, 0));
        assert_eq!(values, [127, -127]);
        assert_eq!(round_block(Isa::Scalar, &[-1e-35, 0.0], &mut values).1, -127);
    }
}
