//! The register tiles: up to 12 rows × 32 columns of sums.

use super::{NR, Precision};
use crate::isa::{Isa, with_isa};

/// Where a tile's result goes, and what it is added to.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// 1 to 12.
    pub(super) n_rows: usize,
    /// Columns, 1 to 32.
    pub(super) width: usize,
    /// The sums that the tile begins with: rows of `width` elements, `from_stride` apart.
    pub(super) from: *const f32,
    pub(super) from_stride: usize,
    /// Rows of `width` elements, `c_stride` apart; `from` may point here.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
}

/// `c = from + a * panel`.
///
/// # Safety
/// `from` must be readable and `c` writable as [`Tile`] says; `a` must hold `n_rows` rows of `panel.len() / NR` words,
/// `a_stride` apart; `isa` must be available.
pub(super) unsafe fn tile(
    isa: Isa,
    precision: Precision,
    a: &[u32],
    a_stride: usize,
    panel: &[u32],
    tile: Tile,
) {
    let Tile { n_rows, width, from, from_stride, c, c_stride } = tile;
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
        let padded = Tile { n_rows, width: NR, from: inside, from_stride: NR, c: inside, c_stride: NR };
        // SAFETY: `whole` has n_rows rows of NR elements.
        unsafe { self::tile(isa, precision, a, a_stride, panel, padded) };
        for r in 0..n_rows {
            // SAFETY: row r of c has `width` elements.
            unsafe { std::ptr::copy_nonoverlapping(inside.add(r * NR), c.add(r * c_stride), width) };
        }
        return;
    }
    macro_rules! rows {
        ($kernel:ident($n_rows:expr, $a:expr, $from:expr, $c:expr): $($n:literal)*) => {
            match $n_rows {
                // SAFETY: the caller's promises, and the instruction set is available.
                $($n => unsafe { $kernel::<$n>($a, a_stride, panel, $from, from_stride, $c, c_stride) },)*
                _ => unreachable!("a tile has 1 to 12 rows"),
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        match precision {
            Precision::F32 => rows!(avx512_f32(n_rows, a, from, c): 1 2 3 4 5 6 7 8 9 10 11 12),
            Precision::Bf16 => rows!(avx512_bf16(n_rows, a, from, c): 1 2 3 4 5 6 7 8 9 10 11 12),
        }
        return;
    }
    // Three rows of 32 sums fill twelve AVX2 registers.
    for first in (0..n_rows).step_by(3) {
        let (a, n_rows) = (&a[first * a_stride..], 3.min(n_rows - first));
        // SAFETY: row `first` lies in both.
        let (from, c) = unsafe { (from.add(first * from_stride), c.add(first * c_stride)) };
        match precision {
            Precision::F32 => with_isa(
                isa,
                #[inline(always)]
                || rows!(portable_f32(n_rows, a, from, c): 1 2 3),
            ),
            Precision::Bf16 => with_isa(
                isa,
                #[inline(always)]
                || rows!(portable_bf16(n_rows, a, from, c): 1 2 3),
            ),
        }
    }
}

#[inline(always)]
unsafe fn load<const R: usize>(from: *const f32, stride: usize) -> [[f32; NR]; R] {
    // SAFETY: the caller's promise: R rows of NR elements.
    std::array::from_fn(|r| unsafe { from.add(r * stride).cast::<[f32; NR]>().read_unaligned() })
}

#[inline(always)]
unsafe fn store<const R: usize>(sums: &[[f32; NR]; R], c: *mut f32, c_stride: usize) {
    for (r, row) in sums.iter().enumerate() {
        // SAFETY: the caller's promise: R rows of NR elements.
        unsafe { c.add(r * c_stride).cast::<[f32; NR]>().write_unaligned(*row) };
    }
}

#[inline(always)]
unsafe fn portable_f32<const R: usize>(
    a: &[u32],
    a_stride: usize,
    panel: &[u32],
    from: *const f32,
    from_stride: usize,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: the caller's promise.
    let mut sums = unsafe { load::<R>(from, from_stride) };
    for (p, b) in panel.as_chunks::<NR>().0.iter().enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = f32::from_bits(a[r * a_stride + p]);
            for j in 0..NR {
                sums[j] += x * f32::from_bits(b[j]);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&sums, c, c_stride) };
}

#[inline(always)]
unsafe fn portable_bf16<const R: usize>(
    a: &[u32],
    a_stride: usize,
    panel: &[u32],
    from: *const f32,
    from_stride: usize,
    c: *mut f32,
    c_stride: usize,
) {
    let low = |word: u32| f32::from_bits(word << 16);
    let high = |word: u32| f32::from_bits(word & 0xffff_0000);
    // SAFETY: the caller's promise.
    let mut sums = unsafe { load::<R>(from, from_stride) };
    for (p, b) in panel.as_chunks::<NR>().0.iter().enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            let word = a[r * a_stride + p];
            for j in 0..NR {
                sums[j] += low(word) * low(b[j]) + high(word) * high(b[j]);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&sums, c, c_stride) };
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// # Safety
/// As [`tile`], with R rows and 32 columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_f32<const R: usize>(
    a: &[u32],
    a_stride: usize,
    panel: &[u32],
    from: *const f32,
    from_stride: usize,
    c: *mut f32,
    c_stride: usize,
) {
    let (a, n_words) = (a.as_ptr().cast::<f32>(), panel.len() / NR);
    let mut b = panel.as_ptr().cast::<f32>();
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = from.add(r * from_stride);
            *sums = [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))];
        }
        for p in 0..n_words {
            let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
            b = b.add(NR);
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a.add(r * a_stride + p));
                sums[0] = _mm512_fmadd_ps(x, b0, sums[0]);
                sums[1] = _mm512_fmadd_ps(x, b1, sums[1]);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(c.add(r * c_stride), sums[0]);
            _mm512_storeu_ps(c.add(r * c_stride + 16), sums[1]);
        }
    }
}

/// # Safety
/// As [`tile`], with R rows and 32 columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16<const R: usize>(
    a: &[u32],
    a_stride: usize,
    panel: &[u32],
    from: *const f32,
    from_stride: usize,
    c: *mut f32,
    c_stride: usize,
) {
    let n_words = panel.len() / NR;
    let (a, mut b) = (a.as_ptr().cast::<i32>(), panel.as_ptr());
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: `from` and c have R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32. The
    // transmutes only name 512 bits as 32 bf16 numbers.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = from.add(r * from_stride);
            *sums = [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))];
        }
        for p in 0..n_words {
            let b0: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.cast()));
            let b1: __m512bh = std::mem::transmute(_mm512_loadu_si512(b.add(16).cast()));
            b = b.add(NR);
            for (r, sums) in sums.iter_mut().enumerate() {
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a.add(r * a_stride + p)));
                sums[0] = _mm512_dpbf16_ps(sums[0], x, b0);
                sums[1] = _mm512_dpbf16_ps(sums[1], x, b1);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(c.add(r * c_stride), sums[0]);
            _mm512_storeu_ps(c.add(r * c_stride + 16), sums[1]);
        }
    }
}
