//! A weight matrix packed once for the kernels.

mod format;

use std::ops::Range;

use rayon::prelude::*;

use crate::activation::{Activation, activate_few};
use crate::buffer::fetch_row;
use crate::gemm::{
    Finish, KW, MatrixRef, NR, Output, Panels, Part, Precision, Source, Start, multiply, pack_panels,
};
use crate::isa::{Isa, with_isa};
use crate::memory::WeightMemory;

pub use format::Format;

/// Panels packed in parallel before they are put in their places.
const PANELS_AT_A_TIME: usize = 64;

/// What is done with a product before it is given out: `activation(x Wᵀ + bias) + residual`.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a> {
    /// `[out]`.
    pub bias: Option<&'a [f32]>,
    /// Applied to product and bias.
    pub activation: Activation,
    /// `[n_rows, out]`, added last.
    pub residual: Option<&'a [f32]>,
}

impl<'a> Epilogue<'a> {
    /// The bias alone.
    pub fn bias(bias: Option<&'a [f32]>) -> Self {
        Self { bias, activation: Activation::Identity, residual: None }
    }

    /// Activation and residual of some results of one row, the first of which is element `at` of the whole. Inside `with_isa`.
    #[inline(always)]
    pub(crate) fn finish(&self, y: &mut [f32], at: usize) {
        activate_few(y, self.activation);
        if let Some(residual) = self.residual {
            y.iter_mut().zip(&residual[at..]).for_each(|(y, x)| *y += x);
        }
    }
}

/// A frozen weight `[out, in]`, stored in the panels that the matrix product reads.
#[derive(Debug)]
pub struct PackedWeight {
    /// Block of `k` by block the panels of all outputs.
    memory: WeightMemory,
    out_features: usize,
    in_features: usize,
    format: Format,
}

impl PackedWeight {
    /// Packs a matrix given row by row: `row(i, into)` fills row `i` of `in_features` numbers, which are rounded where
    /// `format` holds less.
    ///
    /// # Panics
    /// When a size is zero.
    pub fn pack(
        out_features: usize,
        in_features: usize,
        format: Format,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        assert!(out_features > 0 && in_features > 0, "an empty weight");
        let block = KW * format.precision().per_word();
        let k_lens: Vec<usize> =
            (0..in_features).step_by(block).map(|k| block.min(in_features - k)).collect();
        let n_panels = out_features.div_ceil(NR);
        let panel_words: Vec<usize> = k_lens.iter().map(|&k_len| format.panel_words(k_len)).collect();
        let n_words = n_panels * panel_words.iter().sum::<usize>();
        let mut memory = WeightMemory::zeroed(4 * n_words);
        let words = memory.words_mut();
        // Each panel is filled from its own 32 rows; some at a time, so that the matrix is not in memory twice.
        for first in (0..n_panels).step_by(PANELS_AT_A_TIME) {
            let panels: Vec<Vec<Vec<u32>>> = (first..n_panels.min(first + PANELS_AT_A_TIME))
                .into_par_iter()
                .map(|panel| {
                    let width = NR.min(out_features - panel * NR);
                    let mut rows = vec![0.0; width * in_features];
                    rows.chunks_exact_mut(in_features)
                        .enumerate()
                        .for_each(|(i, out)| row(panel * NR + i, out));
                    let mut start = 0;
                    k_lens
                        .iter()
                        .map(|&k_len| {
                            let view =
                                MatrixRef { data: &rows[start..], row_stride: 1, col_stride: in_features };
                            start += k_len;
                            let mut words = vec![0; k_len.div_ceil(format.precision().per_word()) * NR];
                            pack_panels(Isa::detect(), format.precision(), k_len, width, view, &mut words);
                            format.narrow(words)
                        })
                        .collect()
                })
                .collect();
            for (panel, packed) in (first..).zip(panels) {
                let mut block = 0;
                for (n_words, packed) in panel_words.iter().zip(packed) {
                    words[block + panel * n_words..][..*n_words].copy_from_slice(&packed);
                    block += n_panels * n_words;
                }
            }
        }
        Self { memory, out_features, in_features, format }
    }

    /// `activation(x Wᵀ + bias) + residual`; `x` is `[n_rows, in]`, the result `[n_rows, out]`.
    ///
    /// A row of the result is the same, bit for bit, whatever `n_rows` is.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn forward(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>) -> Vec<f32> {
        let n = n_rows * self.out_features;
        let mut y = Vec::with_capacity(n);
        // SAFETY: the capacity is n_rows * out, and all of it is written.
        unsafe {
            self.forward_to(x, n_rows, epilogue, Output(y.as_mut_ptr()));
            y.set_len(n);
        }
        y
    }

    /// [`Self::forward`] into `y`.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn forward_into(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>, y: &mut [f32]) {
        assert_eq!(y.len(), n_rows * self.out_features, "y must be [n_rows, out]");
        // SAFETY: `y` has n_rows * out elements.
        unsafe { self.forward_to(x, n_rows, epilogue, Output(y.as_mut_ptr())) };
    }

    /// # Safety
    /// `y` must point to `n_rows * out_features` elements, which are all written.
    unsafe fn forward_to(&self, x: &[f32], n_rows: usize, epilogue: Epilogue<'_>, y: Output) {
        assert_eq!(x.len(), n_rows * self.in_features, "x must be [n_rows, in]");
        if n_rows == 0 {
            return;
        }
        let (isa, n_out) = (Isa::detect(), self.out_features);
        let is_whole = |residual: &[f32]| residual.len() == n_rows * n_out;
        assert!(epilogue.residual.is_none_or(is_whole), "the residual must be [n_rows, out]");
        let finish = |part: &mut Part| {
            with_isa(
                isa,
                #[inline(always)]
                || {
                    let n = part.rows.len();
                    for row in part.rows.clone() {
                        let at = row * n_out + part.columns.start;
                        if let Some(residual) = epilogue.residual {
                            // Of the rows after these, which come next.
                            fetch_row(residual, at + n * n_out);
                        }
                        epilogue.finish(part.row(row), at);
                    }
                },
            );
        };
        let needs_finish = epilogue.activation != Activation::Identity || epilogue.residual.is_some();
        let start = epilogue.bias.map_or(Start::Zero, Start::Row);
        let a = MatrixRef { data: x, row_stride: self.in_features, col_stride: 1 };
        let blocks: Vec<_> = (0..self.n_blocks()).map(|i| self.panels(i)).collect();
        let finish = needs_finish.then_some(&finish as Finish<'_>);
        // SAFETY: the caller's promise.
        unsafe { multiply(isa, n_rows, a, &blocks, start, y, finish) };
    }

    /// `d_x = d_y W`; `d_y` is `[n_rows, out]`, the result `[n_rows, in]`. Reads the packed form.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn input_gradient(&self, d_y: &[f32], n_rows: usize) -> Vec<f32> {
        assert_eq!(d_y.len(), n_rows * self.out_features, "d_y must be [n_rows, out]");
        let (block, precision) = (self.block_len(), self.format.precision());
        let blocks: Vec<_> = (0..self.out_features)
            .step_by(block)
            .map(|first| {
                let k_len = block.min(self.out_features - first);
                Panels { source: Source::Turned(self, first), precision, k_len, n: self.in_features }
            })
            .collect();
        let a = MatrixRef { data: d_y, row_stride: self.out_features, col_stride: 1 };
        let n = n_rows * self.in_features;
        let mut d_x = Vec::with_capacity(n);
        if n_rows > 0 {
            // SAFETY: the capacity is n_rows * in, and all of it is written.
            unsafe {
                multiply(Isa::detect(), n_rows, a, &blocks, Start::Zero, Output(d_x.as_mut_ptr()), None);
                d_x.set_len(n);
            }
        }
        d_x
    }

    /// Panel `panel` of the transpose, 32 inputs of some outputs, which begin a panel of the matrix itself.
    pub(crate) fn turn_panel(&self, isa: Isa, outputs: Range<usize>, panel: usize, to: &mut [u32]) {
        let precision = self.format.precision();
        let inputs = panel * NR..self.in_features.min((panel + 1) * NR);
        // 32 inputs follow one another in one block.
        let (block, at) = (inputs.start / self.block_len(), inputs.start % self.block_len());
        let stored = self.stored(block);
        let panel_words = self.format.panel_words(self.k_len(block));
        for (first, to) in outputs.clone().step_by(NR).zip(to.chunks_mut(NR * NR / precision.per_word())) {
            let words = &stored[first / NR * panel_words..][..panel_words];
            let words = &words[self.format.panel_words(at)..self.format.panel_words(at + inputs.len())];
            self.format.turn(isa, words, NR.min(outputs.end - first), inputs.len(), to);
        }
    }

    /// Row `output` of the matrix, as it was rounded.
    ///
    /// # Panics
    /// When there is no such row or `into` is not of length `in`.
    pub fn row(&self, output: usize, into: &mut [f32]) {
        assert!(output < self.out_features, "row {output} of {}", self.out_features);
        assert_eq!(into.len(), self.in_features, "a row has `in` elements");
        for (i, into) in into.chunks_mut(self.block_len()).enumerate() {
            let n_words = self.format.panel_words(self.k_len(i));
            let words = &self.stored(i)[output / NR * n_words..][..n_words];
            self.format.column(words, output % NR, into);
        }
    }

    /// Outputs of the map.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Inputs of the map.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The precision of its products.
    pub fn precision(&self) -> Precision {
        self.format.precision()
    }

    /// Memory of the packed weight.
    pub fn n_bytes(&self) -> usize {
        self.memory.as_ref().len()
    }

    fn block_len(&self) -> usize {
        KW * self.format.precision().per_word()
    }

    fn n_blocks(&self) -> usize {
        self.in_features.div_ceil(self.block_len())
    }

    /// Inputs of block `i` of `k`. All blocks but the last are of one size.
    fn k_len(&self, i: usize) -> usize {
        self.block_len().min(self.in_features - i * self.block_len())
    }

    /// The words of block `i` of `k`: the panels of all outputs.
    fn stored(&self, i: usize) -> &[u32] {
        let n_panels = self.out_features.div_ceil(NR);
        let n_words = |k_len: usize| n_panels * self.format.panel_words(k_len);
        let start = i * n_words(self.block_len());
        &self.memory.words()[start..start + n_words(self.k_len(i))]
    }

    /// The panels of block `i` of `k`.
    fn panels(&self, i: usize) -> Panels<'_> {
        let (source, precision) = (Source::Stored(self.stored(i), self.format), self.format.precision());
        Panels { source, precision, k_len: self.k_len(i), n: self.out_features }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TAILS, WIDTHS, assert_near, numbers};

    fn number(i: usize) -> f32 {
        ((i as f32 * 0.618_034).fract() - 0.5) * 2.0
    }

    const FORMATS: [Format; 4] = [Format::F32, Format::Bf16, Format::WideF16, Format::WideBf16];

    fn weight(out: usize, inn: usize, format: Format) -> PackedWeight {
        PackedWeight::pack(out, inn, format, &|i, row| {
            row.iter_mut().enumerate().for_each(|(j, w)| *w = number(i * inn + j));
        })
    }

    #[test]
    fn rows_come_back_rounded() {
        for (format, tolerance) in FORMATS.into_iter().zip([0.0, 1.0 / 256.0, 1.0 / 2048.0, 1.0 / 256.0]) {
            let (out, inn) = (70, 1027);
            let packed = weight(out, inn, format);
            let mut row = vec![0.0; inn];
            for i in [0, 31, 32, 69] {
                packed.row(i, &mut row);
                for (j, w) in row.iter().enumerate() {
                    let expected = number(i * inn + j);
                    assert!((w - expected).abs() <= tolerance * expected.abs(), "{format:?} ({i}, {j})");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_number_of_rows() {
        for format in FORMATS {
            let (out, inn, n) = (75, 700, 100);
            let packed = weight(out, inn, format);
            let x: Vec<f32> = (0..n * inn).map(|i| number(i + 7)).collect();
            let bias: Vec<f32> = (0..out).map(number).collect();
            let epilogue = Epilogue { activation: Activation::GeluErf, ..Epilogue::bias(Some(&bias)) };
            let all = packed.forward(&x, n, epilogue);
            for n_rows in [1, 2, 5, 13, 97] {
                let some = packed.forward(&x[..n_rows * inn], n_rows, epilogue);
                assert_eq!(some, all[..n_rows * out], "{format:?} {n_rows}");
            }
        }
    }

    #[test]
    fn forward_equals_the_reference_for_every_tail_and_width() {
        let sizes = WIDTHS.iter().flat_map(|&width| [(2, 33, width), (1, width, 24)]);
        let tails = TAILS.flat_map(|n| [(n % 14 + 1, n, 20), (1, 20, n)]);
        for (n, out, inn) in sizes.chain(tails) {
            let (x, bias, residual) = (numbers(n * inn, 1), numbers(out, 2), numbers(n * out, 3));
            for format in FORMATS {
                let packed = weight(out, inn, format);
                let epilogue =
                    Epilogue { bias: Some(&bias), activation: Activation::Relu, residual: Some(&residual) };
                let round = |x: f32| match format.precision() {
                    Precision::F32 => f64::from(x),
                    Precision::Bf16 => half::bf16::from_f32(x).to_f64(),
                };
                let mut row = vec![0.0; inn];
                let mut expected = vec![0.0; n * out];
                for o in 0..out {
                    packed.row(o, &mut row);
                    for (i, x) in x.chunks_exact(inn).enumerate() {
                        let product: f64 = x.iter().zip(&row).map(|(x, w)| round(*x) * f64::from(*w)).sum();
                        let sum = product + f64::from(bias[o]);
                        expected[i * out + o] = sum.max(0.0) + f64::from(residual[i * out + o]);
                    }
                }
                // Sums of `inn` products of numbers below one.
                let tolerance = f64::from(f32::EPSILON) * (inn as f64).max(8.0);
                assert_near(&packed.forward(&x, n, epilogue), &expected, tolerance, (format, n, out, inn));
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        let (n, out, inn) = (14, 35, 70);
        for format in FORMATS {
            let packed = weight(out, inn, format);
            let clean = packed.forward(&numbers(n * inn, 1), n, Epilogue::bias(None));
            for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let x = numbers(n * inn, 1).with(5 * inn + 69, special);
                let y = packed.forward(&x, n, Epilogue::bias(None));
                for (i, (y, clean)) in y.chunks_exact(out).zip(clean.chunks_exact(out)).enumerate() {
                    if i == 5 {
                        assert!(y.iter().all(|y| !y.is_finite()), "{format:?} {special}: {y:?}");
                    } else {
                        assert_eq!(y, clean, "{format:?} {special} {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_residual_is_added_last() {
        let (out, inn, n) = (75, 70, 300);
        let packed = weight(out, inn, Format::F32);
        let x: Vec<f32> = (0..n * inn).map(|i| number(i + 7)).collect();
        let residual: Vec<f32> = (0..n * out).map(|i| number(5 * i)).collect();
        let relu = Epilogue { activation: Activation::Relu, ..Epilogue::bias(None) };
        let mut expected = packed.forward(&x, n, relu);
        expected.iter_mut().zip(&residual).for_each(|(y, x)| *y += x);
        let found = packed.forward(&x, n, Epilogue { residual: Some(&residual), ..relu });
        assert_eq!(found, expected);
    }

    #[test]
    fn the_input_gradient_is_the_product_with_the_weight() {
        let (out, inn, n) = (1100, 37, 3);
        let packed = weight(out, inn, Format::F32);
        let d_y: Vec<f32> = (0..n * out).map(|i| number(3 * i)).collect();
        let d_x = packed.input_gradient(&d_y, n);
        for i in 0..n {
            for j in 0..inn {
                let expected: f64 =
                    (0..out).map(|o| f64::from(d_y[i * out + o]) * f64::from(number(o * inn + j))).sum();
                assert!((f64::from(d_x[i * inn + j]) - expected).abs() < 1e-3, "({i}, {j})");
            }
        }
    }

    /// In every format, and at every tail of panels and blocks.
    #[test]
    fn the_gradient_of_one_output_is_its_row() {
        for (out, inn) in [(1100, 37), (75, 1400), (33, 96), (5, 31), (64, 32)] {
            for format in FORMATS {
                let packed = weight(out, inn, format);
                let mut d_y = vec![0.0; out * out];
                (0..out).for_each(|o| d_y[o * out + o] = 1.0);
                let d_x = packed.input_gradient(&d_y, out);
                let mut row = vec![0.0; inn];
                for (o, found) in d_x.chunks(inn).enumerate() {
                    packed.row(o, &mut row);
                    assert_eq!(found, row, "{format:?} {out} x {inn}, output {o}");
                }
            }
        }
    }

    #[test]
    fn a_half_weight_gives_the_products_of_its_f32_copy() {
        let (out, inn, n) = (75, 700, 14);
        let x: Vec<f32> = (0..n * inn).map(|i| number(i + 7)).collect();
        for format in [Format::WideF16, Format::WideBf16] {
            let half = weight(out, inn, format);
            let copy = PackedWeight::pack(out, inn, Format::F32, &|i, row| half.row(i, row));
            let [half_y, copy_y] = [&half, &copy].map(|w| w.forward(&x, n, Epilogue::bias(None)));
            assert_eq!(half_y, copy_y, "{format:?}");
            let [half_d, copy_d] = [half.input_gradient(&half_y, n), copy.input_gradient(&copy_y, n)];
            assert_eq!(half_d, copy_d, "{format:?}");
            assert!(half.n_bytes() * 19 < copy.n_bytes() * 10, "it is half as large");
        }
    }
}
