//! The register tiles: up to 12 rows × 32 columns of sums.

use super::{NR, Precision};
use crate::isa::{Isa, with_isa};

/// `c += a * panel` for `n_rows` (1 to 12) rows and `width` (1 to 32) columns.
///
/// # Safety
/// `c` must be valid for `n_rows` rows of `width` elements, `ldc` apart; `a` must hold `n_rows` rows of `panel.len() / NR`
/// words, `a_stride` apart; `isa` must be available.
#[allow(clippy::too_many_arguments, reason = "a tile's operands and their strides")]
pub(super) unsafe fn tile(
    isa: Isa,
    precision: Precision,
    n_rows: usize,
    a: &[u32],
    a_stride: usize,
    panel: &[u32],
    c: *mut f32,
    ldc: usize,
    width: usize,
) {
    let n_words = panel.len() / NR;
    assert!((n_rows - 1) * a_stride + n_words <= a.len());
    if width < NR {
        // The tile's columns beyond the matrix are computed and dropped.
        let mut whole = [0.0f32; 12 * NR];
        for r in 0..n_rows {
            // SAFETY: row r of c has `width` elements, `whole` has 12 rows of NR.
            unsafe { std::ptr::copy_nonoverlapping(c.add(r * ldc), whole.as_mut_ptr().add(r * NR), width) };
        }
        // SAFETY: `whole` has n_rows rows of NR elements.
        unsafe { tile(isa, precision, n_rows, a, a_stride, panel, whole.as_mut_ptr(), NR, NR) };
        for r in 0..n_rows {
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(whole.as_ptr().add(r * NR), c.add(r * ldc), width) };
        }
        return;
    }
    macro_rules! rows {
        ($kernel:ident($n_rows:expr, $a:expr, $c:expr): $($n:literal)*) => {
            match $n_rows {
                // SAFETY: the caller's promises, and the instruction set is available.
                $($n => unsafe { $kernel::<$n>($a, a_stride, panel, $c, ldc) },)*
                _ => unreachable!("a tile has 1 to 12 rows"),
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        match precision {
            Precision::F32 => rows!(avx512_f32(n_rows, a, c): 1 2 3 4 5 6 7 8 9 10 11 12),
            Precision::Bf16 => rows!(avx512_bf16(n_rows, a, c): 1 2 3 4 5 6 7 8 9 10 11 12),
        }
        return;
    }
    // Three rows of 32 sums fill twelve AVX2 registers.
    for first in (0..n_rows).step_by(3) {
        let (a, n_rows) = (&a[first * a_stride..], 3.min(n_rows - first));
        // SAFETY: row `first` lies in c.
        let c = unsafe { c.add(first * ldc) };
        match precision {
            Precision::F32 => with_isa(
                isa,
                #[inline(always)]
                || rows!(portable_f32(n_rows, a, c): 1 2 3),
            ),
            Precision::Bf16 => with_isa(
                isa,
                #[inline(always)]
                || rows!(portable_bf16(n_rows, a, c): 1 2 3),
            ),
        }
    }
}

#[inline(always)]
unsafe fn load<const R: usize>(c: *const f32, ldc: usize) -> [[f32; NR]; R] {
    // SAFETY: the caller's promise: R rows of NR elements.
    std::array::from_fn(|r| unsafe { c.add(r * ldc).cast::<[f32; NR]>().read_unaligned() })
}

#[inline(always)]
unsafe fn store<const R: usize>(sums: &[[f32; NR]; R], c: *mut f32, ldc: usize) {
    for (r, row) in sums.iter().enumerate() {
        // SAFETY: the caller's promise: R rows of NR elements.
        unsafe { c.add(r * ldc).cast::<[f32; NR]>().write_unaligned(*row) };
    }
}

#[inline(always)]
unsafe fn portable_f32<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], c: *mut f32, ldc: usize) {
    // SAFETY: the caller's promise.
    let mut sums = unsafe { load::<R>(c, ldc) };
    for (p, b) in panel.as_chunks::<NR>().0.iter().enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = f32::from_bits(a[r * a_stride + p]);
            for j in 0..NR {
                sums[j] += x * f32::from_bits(b[j]);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&sums, c, ldc) };
}

#[inline(always)]
unsafe fn portable_bf16<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], c: *mut f32, ldc: usize) {
    let low = |word: u32| f32::from_bits(word << 16);
    let high = |word: u32| f32::from_bits(word & 0xffff_0000);
    // SAFETY: the caller's promise.
    let mut sums = unsafe { load::<R>(c, ldc) };
    for (p, b) in panel.as_chunks::<NR>().0.iter().enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            let word = a[r * a_stride + p];
            for j in 0..NR {
                sums[j] += low(word) * low(b[j]) + high(word) * high(b[j]);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&sums, c, ldc) };
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// # Safety
/// As [`tile`], with R rows and 32 columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_f32<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], c: *mut f32, ldc: usize) {
    let (a, n_words) = (a.as_ptr().cast::<f32>(), panel.len() / NR);
    let mut b = panel.as_ptr().cast::<f32>();
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: c has R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            *sums = [_mm512_loadu_ps(c.add(r * ldc)), _mm512_loadu_ps(c.add(r * ldc + 16))];
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
            _mm512_storeu_ps(c.add(r * ldc), sums[0]);
            _mm512_storeu_ps(c.add(r * ldc + 16), sums[1]);
        }
    }
}

/// # Safety
/// As [`tile`], with R rows and 32 columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], c: *mut f32, ldc: usize) {
    let n_words = panel.len() / NR;
    let (a, mut b) = (a.as_ptr().cast::<i32>(), panel.as_ptr());
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: c has R rows of 32 elements; a has R rows of n_words words; b walks the panel's n_words rows of 32. The
    // transmutes only name 512 bits as 32 bf16 numbers.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            *sums = [_mm512_loadu_ps(c.add(r * ldc)), _mm512_loadu_ps(c.add(r * ldc + 16))];
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
            _mm512_storeu_ps(c.add(r * ldc), sums[0]);
            _mm512_storeu_ps(c.add(r * ldc + 16), sums[1]);
        }
    }
}
