//! The register tiles: up to 12 rows × 32 columns of sums.

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::{NR, Precision};
use crate::isa::Isa;

/// Where a tile's result goes, and what it is added to.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// 1 to 12.
    pub(crate) n_rows: usize,
    /// Columns, 1 to 32.
    pub(crate) width: usize,
    /// The sums that the tile begins with: rows of `width` elements, `from_stride` apart.
    pub(crate) from: *const f32,
    pub(crate) from_stride: usize,
    /// Rows of `width` elements, `c_stride` apart; `from` may point here.
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    /// What is read next, which a kernel may fetch meanwhile.
    pub(crate) ahead: &'a [u32],
}

/// `c = from + a * panel`.
///
/// # Safety
/// `from` must be readable and `c` writable as [`Tile`] says; `a` must hold `n_rows` rows of `panel.len() / NR` words,
/// `a_stride` apart.
pub(crate) unsafe fn tile(
    isa: Isa,
    precision: Precision,
    a: &[u32],
    a_stride: usize,
    panel: &[u32],
    tile: Tile<'_>,
) {
    let Tile { n_rows, width, from, from_stride, c, c_stride, .. } = tile;
    let n_words = panel.len() / NR;
    assert!((n_rows - 1) * a_stride + n_words <= a.len());
    if width < NR {
        // The tile's columns beyond the matrix are computed and dropped.
        let mut whole = [0.0f32; 12 * NR];
        let inside = whole.as_mut_ptr();
        for r in 0..n_rows {
            // SAFETY: row r of `from` has `width` elements, `whole` has 12 rows of NR.
            unsafe { std::ptr::copy_nonoverlapping(from.add(r * from_stride), inside.add(r * NR), width) };
        }
        let padded = Tile { width: NR, from: inside, from_stride: NR, c: inside, c_stride: NR, ..tile };
        // SAFETY: `whole` has n_rows rows of NR elements.
        unsafe { self::tile(isa, precision, a, a_stride, panel, padded) };
        for r in 0..n_rows {
            // SAFETY: row r of c has `width` elements.
            unsafe { std::ptr::copy_nonoverlapping(inside.add(r * NR), c.add(r * c_stride), width) };
        }
        return;
    }
    assert!(isa.is_available());
    // Calls a kernel for as many rows at a time as its registers hold.
    macro_rules! tiles {
        ($most:literal: $module:ident $kernel:ident $($n:literal)*) => {
            for first in (0..n_rows).step_by($most) {
                let a = &a[first * a_stride..];
                // SAFETY: row `first` lies in both.
                let (from, c) = unsafe { (from.add(first * from_stride), c.add(first * c_stride)) };
                let some = Tile { from, c, ..tile };
                match $most.min(n_rows - first) {
                    // SAFETY: the caller's promises, and the instruction set is available.
                    $($n => unsafe { $module::$kernel::<$n>(a, a_stride, panel, some) },)*
                    _ => unreachable!("a tile has 1 to 12 rows"),
                }
            }
        };
    }
    match (isa, precision) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, Precision::F32) => tiles!(12: x86 avx512_f32 1 2 3 4 5 6 7 8 9 10 11 12),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Amx, Precision::Bf16) => tiles!(12: x86 avx512_bf16 1 2 3 4 5 6 7 8 9 10 11 12),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::AvxVnni, Precision::F32) => tiles!(3: x86 avx2_f32 1 2 3),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2 | Isa::AvxVnni, Precision::Bf16) => tiles!(3: x86 avx2_bf16 1 2 3),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Precision::F32) => tiles!(6: neon f32 1 2 3 4 5 6),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon | Isa::NeonDot | Isa::NeonI8mm, Precision::Bf16) => tiles!(4: neon bf16 1 2 3 4),
        (_, Precision::F32) => tiles!(3: portable f32 1 2 3),
        (_, Precision::Bf16) => tiles!(3: portable bf16 1 2 3),
    }
}
