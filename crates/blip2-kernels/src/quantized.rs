//! Weights in eight or four bits, multiplied as integers.
//!
//! Activations are rounded to eight bits as they come, so that a product is one of bytes: twice the speed of bf16 where
//! arithmetic is the limit, half or a quarter of its memory traffic where reading weights is. Sums of integers are exact;
//! scales, bias, activation and residual are applied to a tile of results while it is in the cache. A result is the
//! same, bit for bit, for every instruction set and number of threads, and whatever other rows there are.
//!
//! A row of activations with a NaN or an infinity gives NaN in all of its outputs, and so do the weights of an output
//! that are not finite (with blocks: where a block of them is not).

#[cfg(target_arch = "x86_64")]
mod amx_blocks;
#[cfg(target_arch = "x86_64")]
mod amx_sums;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
mod format;
mod gguf;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
mod results;
mod rounding;
mod rows;
mod sums;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
use std::ops::Range;

use rayon::prelude::*;

use crate::awake::each;
#[cfg(target_arch = "x86_64")]
use crate::buffer::{FAR, all_written};
use crate::gemm::{MatrixRef, Output, Precision, Start, gemm, product};
use crate::isa::{Isa, with_isa};
use crate::linear::Epilogue;
use crate::memory::WeightMemory;
#[cfg(target_arch = "x86_64")]
use amx_blocks::AmxBlocks;
#[cfg(target_arch = "x86_64")]
use amx_sums::AmxSums;
pub use format::{BLOCK, Format, SUPER_BLOCK};
use format::{QUAD, WIDTH};
use results::{Results, TileSums};
use rows::Rows;
use sums::{Activations, MAX_ROWS, Tile, block_sums, integer_sums};

/// How far ahead of the products of a few rows weights are fetched, into the first level of the cache and into the second.
#[cfg(target_arch = "x86_64")]
const AHEAD: [usize; 2] = [8 << 10, 16 << 10];

/// Output rows widened at a time by the input gradient: a megabyte or so, not the whole matrix.
const ROWS_A_GRADIENT_BLOCK: usize = 1024;

/// A frozen weight `[out, in]` in few bits. Its bytes are in memory, or wherever else a slice can come from, such as a
/// mapped file.
pub struct QuantizedWeight {
    bytes: Box<dyn AsRef<[u8]> + Send + Sync>,
    format: Format,
    out_features: usize,
    in_features: usize,
}

impl std::fmt::Debug for QuantizedWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantizedWeight({:?}, [{}, {}])", self.format, self.out_features, self.in_features)
    }
}

impl QuantizedWeight {
    /// Rounds a matrix given row by row: `row(i, into)` fills row `i` of `in_features` numbers.
    ///
    /// # Panics
    /// When a size is zero, the input is larger than the format allows, or the format is none of [`Format::ROUNDED`].
    pub fn quantize(
        out_features: usize,
        in_features: usize,
        format: Format,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        Self::quantize_with(Isa::detect(), out_features, in_features, format, row)
    }

    fn quantize_with(
        isa: Isa,
        out_features: usize,
        in_features: usize,
        format: Format,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        Self::fill(out_features, in_features, format, |panel, first, n| {
            rounding::clear(format, panel);
            let mut values = vec![0.0; in_features];
            for o in 0..n {
                row(first + o, &mut values);
                with_isa(
                    isa,
                    #[inline(always)]
                    || rounding::write_row(format, panel, o, &values),
                );
            }
        })
    }

    /// Rearranges the blocks of a GGUF tensor (Q8_0, Q4_0, Q4_1, Q4_K, Q5_K or Q6_K, as the format says): `row(i)` gives
    /// those of row `i`. The numbers stay what they are.
    ///
    /// # Panics
    /// When a size is zero, a row of `in_features` is not whole blocks, the format is none of [`Format::STORED`], or a
    /// row is of another length.
    pub fn from_gguf_blocks<'a>(
        out_features: usize,
        in_features: usize,
        format: Format,
        row: &(dyn Fn(usize) -> &'a [u8] + Sync),
    ) -> Self {
        assert!(in_features.is_multiple_of(BLOCK), "a row of whole blocks");
        Self::fill(out_features, in_features, format, |panel, first, n| {
            rounding::clear(format, panel);
            (0..n).for_each(|o| gguf::write_row(format, panel, o, row(first + o)));
        })
    }

    /// `write(panel, first, n)` fills the panel of outputs `first` to `first + n`.
    fn fill(
        out_features: usize,
        in_features: usize,
        format: Format,
        write: impl Fn(&mut [u8], usize, usize) + Sync,
    ) -> Self {
        assert!(in_features <= format.max_in_features(), "{format:?} of {in_features} inputs");
        let n_bytes = format.n_bytes(out_features, in_features).expect("a weight that fits into memory");
        let mut bytes = WeightMemory::zeroed(n_bytes);
        let panel_bytes = n_bytes / out_features.div_ceil(WIDTH);
        bytes.as_mut().par_chunks_exact_mut(panel_bytes).enumerate().for_each(|(i, panel)| {
            write(panel, i * WIDTH, WIDTH.min(out_features - i * WIDTH));
        });
        Self::from_bytes(out_features, in_features, format, Box::new(bytes))
    }

    /// A weight whose [`bytes`](Self::bytes) were stored. They are used where they are; any bytes are some weight.
    ///
    /// # Panics
    /// When a size is zero, the input is larger than the format allows or no multiple of what it takes, or the number of bytes is
    /// not [`Format::n_bytes`].
    pub fn from_bytes(
        out_features: usize,
        in_features: usize,
        format: Format,
        bytes: Box<dyn AsRef<[u8]> + Send + Sync>,
    ) -> Self {
        assert!(out_features > 0 && in_features > 0, "an empty weight");
        assert!(in_features <= format.max_in_features(), "{format:?} of {in_features} inputs");
        assert!(
            in_features.is_multiple_of(format.in_features_multiple()),
            "{format:?} of {in_features} inputs"
        );
        let expected = format.n_bytes(out_features, in_features);
        assert_eq!(Some((*bytes).as_ref().len()), expected, "the bytes of a weight");
        Self { bytes, format, out_features, in_features }
    }

    /// Its panels, as [`Format`] describes them.
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs of the map.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Inputs of the map.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// `activation(x Wᵀ + bias) + residual`; `x` is `[n_rows, in]`, the result `[n_rows, out]`.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn forward(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>) -> Vec<f32> {
        self.forward_with(Isa::detect(), x, n_rows, epilogue)
    }

    /// [`Self::forward`] into `y`.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn forward_into(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>, y: &mut [f32]) {
        assert_eq!(y.len(), n_rows * self.out_features, "y must be [n_rows, out]");
        // SAFETY: `y` has n_rows * out elements.
        unsafe { self.forward_to(Isa::detect(), x, n_rows, epilogue, Output(y.as_mut_ptr())) };
    }

    /// [`Self::forward`] of several weights to the same `x`, which is rounded once where they have one format, in one
    /// parallel pass.
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn forward_all(products: &[(&Self, Epilogue<'_>)], x: &[f32], n_rows: usize) -> Vec<Vec<f32>> {
        let isa = Isa::detect();
        let Some((first, _)) = products.first() else { return Vec::new() };
        let alike = |w: &Self| w.format == first.format && w.in_features == first.in_features;
        if n_rows == 0 || !products.iter().all(|(weight, _)| alike(weight)) {
            return products.iter().map(|(weight, epilogue)| weight.forward(x, n_rows, *epilogue)).collect();
        }
        products.iter().for_each(|(weight, epilogue)| weight.check(x, n_rows, *epilogue));
        let mut results: Vec<Vec<f32>> =
            products.iter().map(|(weight, _)| Vec::with_capacity(n_rows * weight.out_features)).collect();
        let outputs: Vec<_> = results.iter_mut().map(|result| Output(result.as_mut_ptr())).collect();
        Rows::with(isa, x, n_rows, first.format, |rows| {
            let tasks: Vec<_> =
                products.iter().map(|(weight, _)| weight.tasks(rows, n_rows, products.len())).collect();
            let which: Vec<_> = tasks
                .iter()
                .enumerate()
                .flat_map(|(i, tasks)| (0..tasks.n()).map(move |task| (i, task)))
                .collect();
            each(which.len(), |at| {
                let (i, task) = which[at];
                let (weight, epilogue) = products[i];
                // SAFETY: result `i` has capacity for n_rows * out elements.
                unsafe { weight.task(isa, rows, n_rows, epilogue, outputs[i], &tasks[i], task) };
            });
        });
        for (result, (weight, _)) in results.iter_mut().zip(products) {
            // SAFETY: the tasks of weight `i` have written all of result `i`.
            unsafe { result.set_len(n_rows * weight.out_features) };
        }
        results
    }

    fn forward_with(&self, isa: Isa, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>) -> Vec<f32> {
        let n = n_rows * self.out_features;
        let mut y = Vec::with_capacity(n);
        // SAFETY: the capacity is n_rows * out, and all of it is written.
        unsafe {
            self.forward_to(isa, x, n_rows, epilogue, Output(y.as_mut_ptr()));
            y.set_len(n);
        }
        y
    }

    /// # Safety
    /// `y` must point to `n_rows * out_features` elements, which are all written.
    unsafe fn forward_to(&self, isa: Isa, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>, y: Output) {
        self.check(x, n_rows, epilogue);
        if n_rows == 0 {
            return;
        }
        Rows::with(isa, x, n_rows, self.format, |rows| {
            let tasks = self.tasks(rows, n_rows, 1);
            each(tasks.n(), |task| {
                // SAFETY: the caller's promise.
                unsafe { self.task(isa, rows, n_rows, epilogue, y, &tasks, task) };
            });
        });
    }

    fn check(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>) {
        let (n_out, n_in) = (self.out_features, self.in_features);
        assert_eq!(x.len(), n_rows * n_in, "x must be [n_rows, in]");
        assert!(epilogue.bias.is_none_or(|bias| bias.len() == n_out), "the bias must be [out]");
        assert!(
            epilogue.residual.is_none_or(|residual| residual.len() == n_rows * n_out),
            "the residual must be [n_rows, out]"
        );
    }

    /// How the work is divided, where `n_weights` are multiplied in one pass.
    fn tasks(&self, rows: &Rows, n_rows: usize, n_weights: usize) -> Tasks {
        let n_panels = self.out_features.div_ceil(WIDTH);
        // A panel is read from memory once by a task, which keeps it in its cache for all of its rows. Rows are divided only
        // where there are not panels enough for the threads.
        let rows_a_tile = self.format.rows_a_tile();
        let wanted = (rows.tasks_a_thread() * rayon::current_num_threads()).div_ceil(n_weights);
        let n_groups = wanted.min(n_panels);
        let n_tiles = n_rows.div_ceil(rows_a_tile);
        let tiles_a_task = n_tiles.div_ceil(wanted / n_groups);
        let rows_a_task = rows.rows_a_task(tiles_a_task * rows_a_tile);
        Tasks { n_panels, n_groups, rows_a_task, n_row_groups: n_rows.div_ceil(rows_a_task) }
    }

    /// One of the [`tasks`](Self::tasks).
    ///
    /// # Safety
    /// `y` must point to `n_rows * out_features` elements, and no task may run twice at once.
    #[allow(clippy::too_many_arguments, reason = "a part of a product")]
    unsafe fn task(
        &self,
        isa: Isa,
        rows: &Rows,
        n_rows: usize,
        epilogue: Epilogue<'_>,
        y: Output,
        tasks: &Tasks,
        task: usize,
    ) {
        let Tasks { n_panels, n_groups, rows_a_task, n_row_groups } = *tasks;
        let (group, row_group) = (task / n_row_groups, task % n_row_groups);
        let panels = group * n_panels / n_groups..(group + 1) * n_panels / n_groups;
        let some = row_group * rows_a_task..n_rows.min((row_group + 1) * rows_a_task);
        #[cfg(target_arch = "x86_64")]
        if rows.registers().is_some() {
            // SAFETY: the caller's promise.
            return unsafe {
                if self.format == Format::Int8 {
                    self.amx_task(rows, n_rows, epilogue, y, panels, some);
                } else {
                    self.amx_blocks_task(rows, epilogue, y, panels, some);
                }
            };
        }
        let rows_a_tile = self.format.rows_a_tile();
        let mut sums = Sums { tile: [[0.0; WIDTH]; MAX_ROWS], integers: [[0; WIDTH]; MAX_ROWS] };
        for p in panels {
            let panel = self.panel(p);
            for first in some.clone().step_by(rows_a_tile) {
                let x = Activations::of(rows, first, rows_a_tile.min(some.end - first));
                #[cfg(target_arch = "x86_64")]
                let ahead = self.ahead(isa, p, &some, x.n_rows, first);
                #[cfg(not(target_arch = "x86_64"))]
                let ahead = &[];
                let of = if self.format == Format::Int8 {
                    let quads = panel[4 * WIDTH..].as_chunks::<QUAD>().0;
                    integer_sums(isa, x, quads, &mut sums.integers);
                    let sums = &sums.integers[..x.n_rows];
                    TileSums::Integers { sums, starts: &[0; MAX_ROWS], scales: x.scales }
                } else {
                    block_sums(isa, self.format, x, panel, ahead, &mut sums.tile);
                    TileSums::Scaled(&sums.tile[..x.n_rows])
                };
                let results = Results {
                    epilogue,
                    n_out: self.out_features,
                    y,
                    #[cfg(target_arch = "x86_64")]
                    is_far: false,
                };
                // SAFETY: these rows and columns lie in `y`; no other task has them.
                unsafe { results.finish(isa, of, panel, [first, p * WIDTH], None) };
            }
        }
    }

    /// [`Self::task`] with AMX.
    ///
    /// # Safety
    /// As there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn amx_task(
        &self,
        rows: &Rows,
        n_rows: usize,
        epilogue: Epilogue<'_>,
        y: Output,
        panels: Range<usize>,
        some: Range<usize>,
    ) {
        let n_out = self.out_features;
        // Of one picture's the next operation finds enough in the caches.
        let results = Results { epilogue, n_out, y, is_far: n_rows * n_out >= 8 * FAR };
        let mut sums = AmxSums::new(rows, some);
        let together = sums.panels_together();
        for first in panels.clone().step_by(together) {
            let n = together.min(panels.end - first);
            let quads: Vec<_> = (first..panels.end.min(first + n + 1))
                .map(|p| self.panel(p)[4 * WIDTH..].as_chunks::<QUAD>().0)
                .collect();
            sums.fill(n, &quads);
            let all = (first..).zip(0..n).flat_map(|(p, i)| sums.tiles().map(move |tile| (p, i, tile)));
            let mut all = all.peekable();
            while let Some((p, i, tile)) = all.next() {
                let (starts, scales) = (&rows.starts[tile.clone()], &rows.scales[tile.clone()]);
                let of = TileSums::Integers { sums: sums.rows(i, tile.start, tile.len()), starts, scales };
                let next = all.peek().map(|(p, _, tile)| [tile.start, p * WIDTH]);
                // SAFETY: these rows and columns lie in `y`; no other task has them.
                unsafe { results.finish(Isa::Amx, of, self.panel(p), [tile.start, p * WIDTH], next) };
            }
        }
        if results.is_far {
            all_written();
        }
    }

    /// [`Self::task`] of long blocks with AMX.
    ///
    /// # Safety
    /// As there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn amx_blocks_task(
        &self,
        rows: &Rows,
        epilogue: Epilogue<'_>,
        y: Output,
        panels: Range<usize>,
        some: Range<usize>,
    ) {
        let results = Results { epilogue, n_out: self.out_features, y, is_far: false };
        let mut sums = AmxBlocks::new(rows, some);
        for p in panels.clone() {
            let panel = self.panel(p);
            let ahead = if p + 1 < panels.end { self.panel(p + 1) } else { &[] };
            sums.fill(panel, ahead);
            for (first, sums) in sums.tiles() {
                // SAFETY: these rows and columns lie in `y`; no other task has them.
                unsafe { results.finish(Isa::Amx, TileSums::Scaled(sums), panel, [first, p * WIDTH], None) };
            }
        }
    }

    fn panel(&self, p: usize) -> &[u8] {
        let n_bytes = self.bytes().len() / self.out_features.div_ceil(WIDTH);
        &self.bytes()[p * n_bytes..(p + 1) * n_bytes]
    }

    /// Bytes that are fetched while `n` rows of a task's, from `first` on, meet panel `p`.
    #[cfg(target_arch = "x86_64")]
    fn ahead(&self, isa: Isa, p: usize, some: &Range<usize>, n: usize, first: usize) -> &[u8] {
        let (bytes, n_bytes) = (self.bytes(), self.panel(p).len());
        let at = p * n_bytes..(p + 1) * n_bytes;
        let up_to = |start: usize, end: usize| &bytes[start.min(bytes.len())..end.min(bytes.len())];
        if some.len() > self.format.rows_a_tile() {
            if isa != Isa::Amx {
                return &[];
            }
            // While all rows meet this panel, the next comes, a part with each tile.
            let part = |row: usize| at.end + (row - some.start) * at.len() / some.len();
            return up_to(part(first), part(first + n));
        }
        // On AMD's processors this makes weights below eight bits a fifth faster with five rows; with one row, and with eight bits,
        // they read far ahead by themselves, and asking for it costs more than it gains. Intel's, which have AMX, read a token's
        // weights of four bits a quarter faster with it.
        let is_narrow = !matches!(self.format, Format::Int8 | Format::Int8Blocks | Format::Int8LongBlocks);
        if isa == Isa::Amx || is_narrow && (2..6).contains(&n) {
            let ahead = AHEAD[usize::from(isa == Isa::Amx)];
            up_to(at.start + ahead, at.end + ahead)
        } else {
            &[]
        }
    }

    /// `d_y W`; `d_y` is `[n_rows, out]`, the result `[n_rows, in]`. The weights are widened some rows at a time, and the products
    /// taken in `precision`.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn input_gradient(&self, d_y: &[f32], n_rows: usize, precision: Precision) -> Vec<f32> {
        let (n_out, n_in) = (self.out_features, self.in_features);
        assert_eq!(d_y.len(), n_rows * n_out, "d_y must be [n_rows, out]");
        if n_rows == 0 {
            return Vec::new();
        }
        let mut d_x: Option<Vec<f32>> = None;
        let mut rows = vec![0.0; ROWS_A_GRADIENT_BLOCK.min(n_out) * n_in];
        for first in (0..n_out).step_by(ROWS_A_GRADIENT_BLOCK) {
            let n = ROWS_A_GRADIENT_BLOCK.min(n_out - first);
            let rows = &mut rows[..n * n_in];
            rows.par_chunks_exact_mut(n_in).enumerate().for_each(|(i, row)| self.row(first + i, row));
            let a = MatrixRef { data: &d_y[first..], row_stride: n_out, col_stride: 1 };
            let b = MatrixRef { data: rows, row_stride: n_in, col_stride: 1 };
            match &mut d_x {
                Some(d_x) => gemm(n_rows, n_in, n, a, b, Start::Result, d_x, precision),
                None => d_x = Some(product(n_rows, n_in, n, a, b, None, precision)),
            }
        }
        d_x.unwrap_or_default()
    }

    /// Row `output` of the matrix, as it was rounded.
    ///
    /// # Panics
    /// When there is no such row or `into` is not of length `in`.
    pub fn row(&self, output: usize, into: &mut [f32]) {
        assert!(output < self.out_features, "row {output} of {}", self.out_features);
        assert_eq!(into.len(), self.in_features, "a row has `in` elements");
        format::read_row(self.format, self.panel(output / WIDTH), output % WIDTH, into);
    }
}

/// What a task sums in, made once for all of its tiles.
struct Sums {
    tile: Tile<f32>,
    integers: Tile<i32>,
}

/// How a product is divided: groups of panels times groups of rows.
#[derive(Debug, Clone, Copy)]
struct Tasks {
    n_panels: usize,
    n_groups: usize,
    rows_a_task: usize,
    n_row_groups: usize,
}

impl Tasks {
    fn n(&self) -> usize {
        self.n_groups * self.n_row_groups
    }
}
