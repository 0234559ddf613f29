//! The register tiles in plain Rust: the reference.

use super::{NR, Tile};

/// # Safety
/// `from` must have R rows of NR elements, `stride` apart.
#[inline(always)]
unsafe fn load<const R: usize>(from: *const f32, stride: usize) -> [[f32; NR]; R] {
    // SAFETY: the caller's promise: R rows of NR elements.
    std::array::from_fn(|r| unsafe { from.add(r * stride).cast::<[f32; NR]>().read_unaligned() })
}

/// # Safety
/// `c` must have R rows of NR elements, `c_stride` apart.
#[inline(always)]
unsafe fn store<const R: usize>(sums: &[[f32; NR]; R], c: *mut f32, c_stride: usize) {
    for (r, row) in sums.iter().enumerate() {
        // SAFETY: the caller's promise: R rows of NR elements.
        unsafe { c.add(r * c_stride).cast::<[f32; NR]>().write_unaligned(*row) };
    }
}

/// # Safety
/// As [`tile`](super::tile), with R rows and 32 columns.
pub(super) unsafe fn f32<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, .. } = tile;
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

/// # Safety
/// As [`tile`](super::tile), with R rows and 32 columns.
pub(super) unsafe fn bf16<const R: usize>(a: &[u32], a_stride: usize, panel: &[u32], tile: Tile<'_>) {
    let Tile { from, from_stride, c, c_stride, .. } = tile;
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
