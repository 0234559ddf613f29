//! Rearranging operands into the words that the micro-kernels read.
//!
//! A word is one f32, or two neighbours along `k` rounded to bf16 (the lower half first).

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::bf16_words;
use super::{KW, MatrixRef, NR, Precision};
use crate::isa::{Isa, with_isa};
#[cfg(target_arch = "x86_64")]
use crate::lanes::LANES;
use crate::linear::{Format, PackedWeight};

/// One block of `k` of `B`: panels of NR columns, each `k` words × NR.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub(crate) source: Source<'a>,
    pub(crate) precision: Precision,
    pub(crate) k_len: usize,
    pub(crate) n: usize,
}

/// Where panels come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Memory, where they follow one another.
    Stored(&'a [u32], Format),
    /// A weight that is multiplied by from the other side: `k` are its outputs, from this one on.
    Turned(&'a PackedWeight, usize),
}

impl<'a> Panels<'a> {
    /// Panel `i` as the micro-kernels read it, in `room` where it is not stored so.
    pub(super) fn panel<'b>(&self, isa: Isa, i: usize, room: &'b mut Vec<u32>) -> &'b [u32]
    where
        'a: 'b,
    {
        match self.source {
            Source::Stored(words, format) => {
                let len = format.panel_words(self.k_len);
                format.widen(isa, &words[i * len..(i + 1) * len], room)
            }
            Source::Turned(weight, first) => {
                let n_words = self.k_len.div_ceil(self.precision.per_word()) * NR;
                // A whole line of the cache is read at a time.
                room.resize(n_words + LINE, 0);
                let skipped = room.as_ptr().align_offset(4 * LINE).min(LINE);
                let panel = &mut room[skipped..skipped + n_words];
                weight.turn_panel(isa, first..first + self.k_len, i, panel);
                panel
            }
        }
    }

    /// Panel `i`, if it is in memory and in f32.
    pub(super) fn in_f32(&self, i: usize) -> Option<&'a [u32]> {
        match self.source {
            Source::Stored(words, Format::F32) => {
                let len = Format::F32.panel_words(self.k_len);
                words.get(i * len..(i + 1) * len)
            }
            _ => None,
        }
    }

    /// Where panel `i` begins in memory, if it is there as it is read.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn start(&self, i: usize) -> Option<*const u8> {
        match self.source {
            Source::Stored(words, Format::Bf16) => {
                words.get(i * Format::Bf16.panel_words(self.k_len)..).map(|words| words.as_ptr().cast())
            }
            _ => None,
        }
    }

    /// The same panels, all of them in memory.
    pub(super) fn stored<'b>(&self, isa: Isa, buffer: &'b mut Vec<u32>) -> Panels<'b>
    where
        'a: 'b,
    {
        let Source::Turned(weight, first) = self.source else { return *self };
        let n_words = self.k_len.div_ceil(self.precision.per_word()) * NR;
        buffer.resize(buffer.len().max(self.n.div_ceil(NR) * n_words), 0);
        let words = &mut buffer[..self.n.div_ceil(NR) * n_words];
        words.par_chunks_mut(n_words).enumerate().for_each(|(i, panel)| {
            weight.turn_panel(isa, first..first + self.k_len, i, panel);
        });
        Panels { source: Source::Stored(words, self.precision.into()), ..*self }
    }
}

/// Words of a line of the cache.
pub(super) const LINE: usize = 16;

/// The bits of `x` rounded to the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    bf16_bits(low) | (bf16_bits(high) << 16)
}

/// Packs the `k_len × n` view `b` (`k_len` at most one block) into the first words of `buffer`; tails are zero.
pub(crate) fn pack_panels<'a>(
    isa: Isa,
    precision: Precision,
    k_len: usize,
    n: usize,
    b: MatrixRef<'_>,
    buffer: &'a mut [u32],
) -> Panels<'a> {
    let n_words = k_len.div_ceil(precision.per_word());
    debug_assert!(n_words <= KW);
    let n_panels = n.div_ceil(NR);
    let words = &mut buffer[..n_panels * n_words * NR];
    words.par_chunks_mut((n_words * NR).max(1)).with_min_len(4).enumerate().for_each(|(i, panel)| {
        let width = NR.min(n - i * NR);
        let data = &b.data[(i * NR * b.col_stride).min(b.data.len())..];
        with_isa(
            isa,
            #[inline(always)]
            || pack_panel(isa, precision, k_len, width, MatrixRef { data, ..b }, panel),
        );
    });
    Panels { source: Source::Stored(words, precision.into()), precision, k_len, n }
}

/// [`pack_panels`] of one panel. Inside `with_isa`.
#[inline(always)]
pub(crate) fn pack_panel(
    isa: Isa,
    precision: Precision,
    k_len: usize,
    width: usize,
    b: MatrixRef<'_>,
    panel: &mut [u32],
) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && precision == Precision::Bf16 {
        assert!(isa.is_available());
        if b.col_stride == 1 {
            let row = |k: usize| if k < k_len { &b.data[k * b.row_stride..][..width] } else { &[] };
            for (p, to) in panel.as_chunks_mut::<NR>().0.iter_mut().enumerate() {
                // SAFETY: the instruction set is available.
                unsafe { bf16_words::neighbours(row(2 * p), row(2 * p + 1), 0, to) };
            }
            return;
        }
        if b.row_stride == 1 {
            for first in (0..NR).step_by(LANES) {
                let column = |j: usize| if j < width { &b.data[j * b.col_stride..][..k_len] } else { &[] };
                let columns: [&[f32]; LANES] = std::array::from_fn(|j| column(first + j));
                // SAFETY: as above.
                unsafe { bf16_words::columns(&columns, k_len, &mut panel[first..]) };
            }
            return;
        }
    }
    let _ = isa;
    if width < NR {
        panel.fill(0);
    }
    let (rows, _) = panel.as_chunks_mut::<NR>();
    if b.col_stride == 1 && width == NR {
        let row = |k: usize| &b.data[k * b.row_stride..][..NR];
        match precision {
            Precision::F32 => {
                for (k, out) in rows.iter_mut().enumerate() {
                    out.iter_mut().zip(row(k)).for_each(|(o, x)| *o = x.to_bits());
                }
            }
            Precision::Bf16 => {
                for (p, out) in rows.iter_mut().enumerate() {
                    let low = row(2 * p);
                    if 2 * p + 1 < k_len {
                        let high = row(2 * p + 1);
                        for j in 0..NR {
                            out[j] = pair(low[j], high[j]);
                        }
                    } else {
                        out.iter_mut().zip(low).for_each(|(o, &x)| *o = bf16_bits(x));
                    }
                }
            }
        }
        return;
    }
    let at = |k: usize, j: usize| b.data[k * b.row_stride + j * b.col_stride];
    // Eight words at a time along k: a column's neighbours lie in one cache line where k is contiguous.
    for start in (0..rows.len()).step_by(8) {
        let end = (start + 8).min(rows.len());
        for j in 0..width {
            for (p, out) in rows[start..end].iter_mut().enumerate() {
                let p = start + p;
                out[j] = match precision {
                    Precision::F32 => at(p, j).to_bits(),
                    Precision::Bf16 if 2 * p + 1 < k_len => pair(at(2 * p, j), at(2 * p + 1, j)),
                    Precision::Bf16 => bf16_bits(at(2 * p, j)),
                };
            }
        }
    }
}

/// Packs the `m × k_len` view `a` row by row, `stride` words a row.
pub(super) fn pack_rows(
    isa: Isa,
    precision: Precision,
    k_len: usize,
    m: usize,
    a: MatrixRef<'_>,
    stride: usize,
    packed: &mut [u32],
) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && precision == Precision::Bf16 {
        assert!(isa.is_available());
        if a.col_stride == 1 {
            for (i, to) in packed.chunks_exact_mut(stride).take(m).enumerate() {
                // SAFETY: the instruction set is available.
                unsafe { bf16_words::row(&a.data[i * a.row_stride..][..k_len], to) };
            }
            return;
        }
        if a.row_stride == 1 {
            for (first, to) in (0..m).step_by(LANES).zip(packed.chunks_mut(LANES * stride)) {
                let n = LANES.min(m - first);
                let row = |k: usize| &a.data[first + k * a.col_stride..][..n];
                // SAFETY: as above.
                unsafe { bf16_words::rows_of_columns(row, k_len, &mut to[..n * stride], stride) };
            }
            return;
        }
    }
    with_isa(
        isa,
        #[inline(always)]
        || {
            if a.col_stride == 1 {
                for (i, out) in packed.chunks_exact_mut(stride).take(m).enumerate() {
                    let row = &a.data[i * a.row_stride..][..k_len];
                    match precision {
                        Precision::F32 => out.iter_mut().zip(row).for_each(|(o, x)| *o = x.to_bits()),
                        Precision::Bf16 => {
                            let (pairs, rest) = row.as_chunks::<2>();
                            out.iter_mut().zip(pairs).for_each(|(o, p)| *o = pair(p[0], p[1]));
                            if let [last] = rest {
                                out[pairs.len()] = bf16_bits(*last);
                            }
                        }
                    }
                }
                return;
            }
            let at = |i: usize, k: usize| a.data[i * a.row_stride + k * a.col_stride];
            let n_words = k_len.div_ceil(precision.per_word());
            let word = |i: usize, p: usize| match precision {
                Precision::F32 => at(i, p).to_bits(),
                Precision::Bf16 if 2 * p + 1 < k_len => pair(at(i, 2 * p), at(i, 2 * p + 1)),
                Precision::Bf16 => bf16_bits(at(i, 2 * p)),
            };
            // Sixteen rows at a time: where rows are contiguous (a transposed operand) they are one register.
            const ROWS: usize = 16;
            for start in (0..m).step_by(ROWS) {
                let rows = ROWS.min(m - start);
                let whole = if a.row_stride == 1 && rows == ROWS { k_len / precision.per_word() } else { 0 };
                for p in 0..whole {
                    let column = |k: usize| -> &[f32; ROWS] {
                        let at = start + k * a.col_stride;
                        a.data[at..at + ROWS].first_chunk().expect("sixteen elements")
                    };
                    let words: [u32; ROWS] = match precision {
                        Precision::F32 => column(p).map(f32::to_bits),
                        Precision::Bf16 => {
                            let (low, high) = (column(2 * p), column(2 * p + 1));
                            std::array::from_fn(|i| pair(low[i], high[i]))
                        }
                    };
                    for (out, word) in packed[start * stride..].chunks_exact_mut(stride).zip(words) {
                        out[p] = word;
                    }
                }
                for p in whole..n_words {
                    for i in start..start + rows {
                        packed[i * stride + p] = word(i, p);
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let mut bits = 1u32;
        for _ in 0..100_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(bits);
            let expected = half::bf16::from_f32(x);
            if x.is_nan() {
                assert!(half::bf16::from_bits(bf16_bits(x) as u16).is_nan());
            } else {
                assert_eq!(bf16_bits(x), u32::from(expected.to_bits()), "{x:e}");
            }
        }
    }
}
