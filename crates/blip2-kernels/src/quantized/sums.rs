//! Sums of products of a few rows with a panel: which instructions take them, and the scalar reference.
//!
//! Sums of integers are exact, so they are equal on all instruction sets; what follows is computed in one order and with
//! fused multiply-adds on all of them, so that results are equal too, bit for bit.

use super::format::{BLOCK, Format, QUAD, WIDTH, f16_at};
use super::rows::Rows;
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::isa::Isa;

/// The most rows of a tile: 12 × 32 sums and what they are made from fill the 32 registers of AVX-512.
pub(super) const MAX_ROWS: usize = 12;

/// Sums of a tile.
pub(super) type Tile<T> = [[T; WIDTH]; MAX_ROWS];

/// Rows of activations for a tile.
#[derive(Clone, Copy)]
pub(super) struct Activations<'a> {
    /// 1 to 12; 1 to 6 where there are blocks.
    pub(super) n_rows: usize,
    pub(super) values: &'a [i8],
    pub(super) stride: usize,
    pub(super) n_blocks: usize,
    /// Row by row, `n_blocks` each, as in [`Rows`].
    pub(super) scales: &'a [f32],
    pub(super) starts: &'a [i32],
    pub(super) totals: &'a [f32],
}

impl<'a> Activations<'a> {
    pub(super) fn of(rows: &'a Rows, first: usize, n_rows: usize) -> Self {
        let scales = first * rows.n_blocks..(first + n_rows) * rows.n_blocks;
        Self {
            n_rows,
            values: &rows.values[first * rows.stride..(first + n_rows) * rows.stride],
            stride: rows.stride,
            n_blocks: rows.n_blocks,
            scales: &rows.scales[scales.clone()],
            starts: &rows.starts[scales.clone()],
            totals: &rows.totals[scales],
        }
    }

    /// Panics unless the rows hold `n_values` integers each, and their scales: what the kernels rely on.
    fn check(&self, most_rows: usize, n_values: usize) {
        let (n, scales) = (self.n_rows, self.n_rows * self.n_blocks);
        assert!(
            (1..=most_rows).contains(&n) && n_values <= self.stride && n * self.stride <= self.values.len()
        );
        assert!(scales <= self.scales.len() && scales <= self.starts.len() && scales <= self.totals.len());
    }
}

impl Format {
    /// Rows of a tile. With blocks, a row has sums of integers and sums of what they are scaled to.
    pub(super) fn rows_a_tile(self) -> usize {
        if self == Self::Int8 { MAX_ROWS } else { MAX_ROWS / 2 }
    }
}

/// Calls a kernel with the number of rows as a constant, and the bits and the offset of a format.
macro_rules! for_n_rows {
    ($n_rows:expr, $kernel:ident $arguments:tt: $($n:literal)*) => {
        match $n_rows {
            // SAFETY: `check` was called, and the instruction set is available.
            $($n => unsafe { x86::$kernel::<$n> $arguments },)*
            _ => unreachable!("`check` bounds the rows of a tile"),
        }
    };
    ($n_rows:expr, $kernel:ident $format:expr, $arguments:tt: $($n:literal)*) => {
        match ($format, $n_rows) {
            // SAFETY: as above.
            $((Format::Int4, $n) => unsafe { x86::$kernel::<$n, 4, false> $arguments },
            // SAFETY: as above.
            (Format::Int4Offset, $n) => unsafe { x86::$kernel::<$n, 4, true> $arguments },
            // SAFETY: as above.
            (Format::Int8Blocks, $n) => unsafe { x86::$kernel::<$n, 8, false> $arguments },)*
            _ => unreachable!("`check` bounds the rows of a tile, and the format has blocks"),
        }
    };
}

/// `Σ x (q - 128)` over the quads of an [`Int8`](Format::Int8) panel, for each row.
pub(super) fn integer_sums(isa: Isa, x: Activations<'_>, quads: &[[u8; QUAD]], sums: &mut Tile<i32>) {
    x.check(MAX_ROWS, 4 * quads.len());
    assert!(isa.is_available());
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::Avx512 => {
            return for_n_rows!(x.n_rows, avx512_integer_sums(x, quads, sums): 1 2 3 4 5 6 7 8 9 10 11 12);
        }
        Isa::Avx2 | Isa::AvxVnni => {
            for first in (0..x.n_rows).step_by(4) {
                let n = 4.min(x.n_rows - first);
                let values = &x.values[first * x.stride..];
                let sums = &mut sums[first..first + n];
                for_n_rows!(n, avx2_integer_sums(values, x.stride, quads, sums): 1 2 3 4);
            }
            return;
        }
        _ => {}
    }
    for (r, sums) in sums.iter_mut().enumerate().take(x.n_rows) {
        *sums = [0; WIDTH];
        for (quad, x) in quads.iter().zip(x.values[r * x.stride..].as_chunks::<4>().0) {
            add_quad(quad, x, 128, sums);
        }
    }
}

/// `Σ x (q - zero point)` of one quad.
fn add_quad(quad: &[u8; QUAD], x: &[i8; 4], zero_point: i32, sums: &mut [i32; WIDTH]) {
    for (q, sum) in quad.as_chunks::<4>().0.iter().zip(sums) {
        for (&x, &q) in x.iter().zip(q) {
            *sum += i32::from(x) * (i32::from(q) - zero_point);
        }
    }
}

/// `Σ scale (Σ x (q - zero point)) + minimum Σ x` over the blocks of a panel, the sum inside a block in integers.
pub(super) fn block_sums(isa: Isa, format: Format, x: Activations<'_>, panel: &[u8], sums: &mut Tile<f32>) {
    let Some(block_bytes) = format.block_bytes() else { unreachable!("{format:?} has no blocks") };
    x.check(format.rows_a_tile(), x.n_blocks * BLOCK);
    assert!(isa.is_available() && panel.len() == x.n_blocks * block_bytes);
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::Avx512 => {
            return for_n_rows!(x.n_rows, avx512_block_sums format, (x, panel, sums): 1 2 3 4 5 6);
        }
        Isa::Avx2 | Isa::AvxVnni => {
            for first in (0..x.n_rows).step_by(3) {
                let n = 3.min(x.n_rows - first);
                let scales = first * x.n_blocks;
                let x = Activations {
                    n_rows: n,
                    values: &x.values[first * x.stride..],
                    scales: &x.scales[scales..],
                    starts: &x.starts[scales..],
                    totals: &x.totals[scales..],
                    ..x
                };
                let sums = &mut sums[first..first + n];
                for_n_rows!(n, avx2_block_sums format, (x, panel, sums): 1 2 3);
            }
            return;
        }
        _ => {}
    }
    for (r, sums) in sums.iter_mut().enumerate().take(x.n_rows) {
        *sums = [0.0; WIDTH];
        for (b, block) in panel.chunks_exact(block_bytes).enumerate() {
            let values = &x.values[r * x.stride + b * BLOCK..][..BLOCK];
            let (scale, total) = (x.scales[r * x.n_blocks + b], x.totals[r * x.n_blocks + b]);
            let integers = block_integers(format, block, values);
            for (o, sum) in sums.iter_mut().enumerate() {
                *sum = (integers[o] as f32).mul_add(f16_at(block, o) * scale, *sum);
                if format == Format::Int4Offset {
                    *sum = f16_at(&block[2 * WIDTH..], o).mul_add(total, *sum);
                }
            }
        }
    }
}

/// `Σ x (q - zero point)` over a block, for each output.
fn block_integers(format: Format, block: &[u8], x: &[i8]) -> [i32; WIDTH] {
    let n_quads = if format == Format::Int8Blocks { 8 } else { 4 };
    let quads = block[block.len() - n_quads * QUAD..].as_chunks::<QUAD>().0;
    let (x, zero_point, mut sums) = (x.as_chunks::<4>().0, format.zero_point(), [0; WIDTH]);
    for (i, quad) in quads.iter().enumerate() {
        if format == Format::Int8Blocks {
            add_quad(quad, &x[i], zero_point, &mut sums);
        } else {
            add_quad(&quad.map(|byte| byte & 15), &x[i], zero_point, &mut sums);
            add_quad(&quad.map(|byte| byte >> 4), &x[i + 4], zero_point, &mut sums);
        }
    }
    sums
}
