//! Sums of products of a few rows with a panel: which instructions take them, and the scalar reference.
//!
//! Sums of integers are exact, so they are equal on all instruction sets; what follows is computed in one order and with
//! fused multiply-adds on all of them, so that results are equal too, bit for bit.

use super::format::{Format, Layout, QUAD, WIDTH, with_layout};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::rows::Rows;
#[cfg(target_arch = "x86_64")]
use super::{avx_vnni, avx2, avx512};
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

/// Calls `$body` with the number of rows as the constant `$N`.
macro_rules! with_count {
    ($n:expr, [$($count:literal)*], $N:ident => $body:expr) => {
        match $n {
            $($count => {
                const $N: usize = $count;
                $body
            })*
            _ => unreachable!("`check` bounds the rows of a tile"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) use with_count;

/// `Σ x (q - 128)` over the quads of an [`Int8`](Format::Int8) panel, for each row.
pub(super) fn integer_sums(isa: Isa, x: Activations<'_>, quads: &[[u8; QUAD]], sums: &mut Tile<i32>) {
    x.check(MAX_ROWS, 4 * quads.len());
    assert!(isa.is_available());
    let (n_rows, stride) = (x.n_rows, x.stride);
    // Calls a kernel for as many rows at a time as its registers hold.
    #[allow(unused_macros, reason = "not every architecture has one")]
    macro_rules! rows_at_a_time {
        ($most:literal, $values:ident, $sums:ident => $body:expr) => {
            for first in (0..n_rows).step_by($most) {
                let ($values, n) = (&x.values[first * stride..], $most.min(n_rows - first));
                let $sums = &mut sums[first..first + n];
                $body
            }
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => with_count!(n_rows, [1 2 3 4 5 6 7 8 9 10 11 12], R => {
            // SAFETY: `check` was called, and the instruction set is available.
            unsafe { avx512::integer_sums::<R>(x, quads, sums) }
        }),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => {
            for first in (0..n_rows).step_by(6) {
                let sums = &mut sums[first..n_rows.min(first + 6)];
                with_count!(sums.len(), [1 2 3 4 5 6], R => {
                    // SAFETY: as above.
                    unsafe { avx_vnni::integer_sums::<R>(x, first, quads, sums) }
                });
            }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => rows_at_a_time!(4, values, sums => with_count!(sums.len(), [1 2 3 4], R => {
            // SAFETY: as above.
            unsafe { avx2::integer_sums::<R>(values, stride, quads, sums) }
        })),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm if n_rows > 1 => rows_at_a_time!(6, values, sums => {
            with_count!(sums.len().div_ceil(2), [1 2 3], P => {
                // SAFETY: as above; rows are padded to a multiple of eight.
                unsafe { neon::i8mm::integer_sums::<P>(values, stride, quads, sums) }
            })
        }),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot | Isa::NeonI8mm => rows_at_a_time!(6, values, sums => {
            with_count!(sums.len(), [1 2 3 4 5 6], R => {
                // SAFETY: as above.
                unsafe { neon::dot::integer_sums::<R>(values, stride, quads, sums) }
            })
        }),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => rows_at_a_time!(4, values, sums => with_count!(sums.len(), [1 2 3 4], R => {
            // SAFETY: as above.
            unsafe { neon::base::integer_sums::<R>(values, stride, quads, sums) }
        })),
        _ => {
            for (r, sums) in sums.iter_mut().enumerate().take(n_rows) {
                *sums = [0; WIDTH];
                for (quad, x) in quads.iter().zip(x.values[r * stride..].as_chunks::<4>().0) {
                    add_quad(quad, x, 128, sums);
                }
            }
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
/// Meanwhile the bytes `ahead` are fetched, where the instructions have that.
pub(super) fn block_sums(
    isa: Isa,
    format: Format,
    x: Activations<'_>,
    panel: &[u8],
    ahead: &[u8],
    sums: &mut Tile<f32>,
) {
    with_layout!(format, L => {
        assert!(panel.len() == x.n_blocks.div_ceil(L::BLOCKS) * L::GROUP && x.n_blocks.is_multiple_of(L::BLOCKS));
        x.check(format.rows_a_tile(), x.n_blocks * L::INPUTS);
        sums_of_blocks::<L>(isa, x, panel, ahead, sums)
    }, unreachable!("{format:?} has no blocks"));
}

/// The sizes were checked.
fn sums_of_blocks<L: Layout>(isa: Isa, x: Activations<'_>, panel: &[u8], ahead: &[u8], sums: &mut Tile<f32>) {
    assert!(isa.is_available());
    let n_rows = x.n_rows;
    let _ = ahead;
    // As in `integer_sums`.
    #[allow(unused_macros, reason = "not every architecture has one")]
    macro_rules! rows_at_a_time {
        ($most:literal, $x:ident, $sums:ident => $body:expr) => {
            for first in (0..n_rows).step_by($most) {
                let n = $most.min(n_rows - first);
                let scales = first * x.n_blocks;
                let $x = Activations {
                    n_rows: n,
                    values: &x.values[first * x.stride..],
                    scales: &x.scales[scales..],
                    starts: &x.starts[scales..],
                    totals: &x.totals[scales..],
                    ..x
                };
                let $sums = &mut sums[first..first + n];
                $body
            }
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => with_count!(n_rows, [1 2 3 4 5 6], R => {
            // SAFETY: the sizes were checked, and the instruction set is available.
            unsafe { avx512::block_sums::<R, L>(isa, x, panel, ahead, sums) }
        }),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => rows_at_a_time!(3, x, sums => with_count!(x.n_rows, [1 2 3], R => {
            // SAFETY: as above.
            unsafe { avx_vnni::block_sums::<R, L>(x, panel, sums) }
        })),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => rows_at_a_time!(3, x, sums => with_count!(x.n_rows, [1 2 3], R => {
            // SAFETY: as above.
            unsafe { avx2::block_sums::<R, L>(x, panel, sums) }
        })),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm if n_rows > 1 => with_count!(n_rows.div_ceil(2), [1 2 3], P => {
            // SAFETY: as above.
            unsafe { neon::i8mm::block_sums::<P, L>(x, panel, &mut sums[..n_rows]) }
        }),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot | Isa::NeonI8mm => rows_at_a_time!(3, x, sums => with_count!(x.n_rows, [1 2 3], R => {
            // SAFETY: as above.
            unsafe { neon::dot::block_sums::<R, L>(x, panel, sums) }
        })),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => rows_at_a_time!(3, x, sums => with_count!(x.n_rows, [1 2 3], R => {
            // SAFETY: as above.
            unsafe { neon::base::block_sums::<R, L>(x, panel, sums) }
        })),
        _ => {
            for (r, sums) in sums.iter_mut().enumerate().take(n_rows) {
                scalar_block_sums::<L>(x, r, panel, sums);
            }
        }
    }
}

/// The sums of row `r`.
fn scalar_block_sums<L: Layout>(x: Activations<'_>, r: usize, panel: &[u8], sums: &mut [f32; WIDTH]) {
    *sums = [0.0; WIDTH];
    for b in 0..x.n_blocks {
        let (head, bodies) = panel[b / L::BLOCKS * L::GROUP..].split_at(L::HEAD);
        let (i, body) = (b % L::BLOCKS, &bodies[b % L::BLOCKS * L::BODY..][..L::BODY]);
        let values = &x.values[r * x.stride + b * L::INPUTS..][..L::INPUTS];
        let (x_scale, total) = (x.scales[r * x.n_blocks + b], x.totals[r * x.n_blocks + b]);
        let mut integers = [0; WIDTH];
        for (p, x) in values.as_chunks::<4>().0.iter().enumerate() {
            let quad = std::array::from_fn(|at| L::value(body, at / 4, 4 * p + at % 4));
            add_quad(&quad, x, L::ZERO_POINT, &mut integers);
        }
        for (o, sum) in sums.iter_mut().enumerate() {
            *sum = (integers[o] as f32).mul_add(L::scale(head, i, o) * x_scale, *sum);
            if L::OFFSET {
                *sum = L::minimum(head, i, o).mul_add(total, *sum);
            }
        }
    }
}
