//! Results that are written once, so that no pass zeroes them first, and memory that threads keep.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::thread::LocalKey;

use rayon::prelude::*;

/// Puts memory that a thread keeps for its next task back to where it was taken from. Tests do not keep it: all memory is as
/// large as its use needs, so that a sanitiser sees where a kernel goes beyond it.
pub(crate) fn keep<T: Default>(place: &'static LocalKey<RefCell<T>>, memory: T) {
    place.set(if cfg!(test) { T::default() } else { memory });
}

/// From so many numbers on, results leave the second level of the cache before they are read again.
#[cfg(target_arch = "x86_64")]
pub(crate) const FAR: usize = 1 << 18;

/// Asks for 32 numbers from `at` on, which are read soon and lie where no processor looks by itself.
#[inline(always)]
pub(crate) fn fetch_row(from: &[f32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in [at, at + 16] {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: nothing is read.
        #[allow(unused_unsafe, reason = "safe in later versions of the language")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(line).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, at);
}

/// Copies 32 results or fewer to their place, past the caches where `is_far`: else each line that is written is first read. Before
/// other threads may read them, [`all_written`] must be called.
///
/// # Safety
/// So many numbers must be writable at `to`, and the machine must have AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn put_row(row: &[f32], to: *mut f32, is_far: bool) {
    use std::arch::x86_64::{_mm512_loadu_ps, _mm512_storeu_ps, _mm512_stream_ps};
    let Some(row) = row.first_chunk::<32>() else {
        // SAFETY: the caller's promise.
        return unsafe { to.copy_from_nonoverlapping(row.as_ptr(), row.len()) };
    };
    // SAFETY: 32 numbers are there, at a whole line of the cache where they go past it.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(16)));
        if is_far && to.addr().is_multiple_of(64) {
            _mm512_stream_ps(to, low);
            _mm512_stream_ps(to.add(16), high);
        } else {
            _mm512_storeu_ps(to, low);
            _mm512_storeu_ps(to.add(16), high);
        }
    }
}

/// What [`put_row`] wrote past the caches is seen by whoever sees what this thread writes from now on.
#[cfg(target_arch = "x86_64")]
pub(crate) fn all_written() {
    // SAFETY: every x86-64 has the instruction.
    #[allow(unused_unsafe, reason = "safe in later versions of the language")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Memory that is to be written.
pub(crate) type Unwritten = [MaybeUninit<f32>];

/// Writes `value(i)` to every element. Inside `with_isa`, `value` must be `#[inline(always)]` too.
#[inline(always)]
pub(crate) fn fill(to: &mut Unwritten, value: impl Fn(usize) -> f32) -> &mut [f32] {
    for (i, to) in to.iter_mut().enumerate() {
        to.write(value(i));
    }
    // SAFETY: the loop wrote every element, and `MaybeUninit<f32>` is laid out as `f32`.
    unsafe { &mut *(std::ptr::from_mut(to) as *mut [f32]) }
}

/// Vectors of `n` elements that `write` fills chunk by chunk, in parallel; what it returns beside, in the order of the
/// chunks. It is given the index of a chunk's first element and, of each vector, the chunk.
///
/// # Panics
/// When `write` returns other memory than it was given; that it returns it as `f32` shows that it wrote it.
pub(crate) fn in_chunks<const N: usize, R: Send>(
    n: usize,
    chunk: usize,
    write: impl for<'a> Fn(usize, [&'a mut Unwritten; N]) -> ([&'a mut [f32]; N], R) + Sync,
) -> ([Vec<f32>; N], Vec<R>) {
    let mut vectors: [Vec<f32>; N] = std::array::from_fn(|_| Vec::with_capacity(n));
    let mut chunks: Vec<[&mut Unwritten; N]> = Vec::with_capacity(n.div_ceil(chunk));
    let mut rest = vectors.each_mut().map(|vector| &mut vector.spare_capacity_mut()[..n]);
    while !rest[0].is_empty() {
        let mid = chunk.min(rest[0].len());
        chunks.push(rest.each_mut().map(|rest| {
            let (head, tail) = std::mem::take(rest).split_at_mut(mid);
            *rest = tail;
            head
        }));
    }
    let results = chunks
        .into_par_iter()
        .enumerate()
        .map(|(i, mut to)| {
            let given = to.each_mut().map(|to| (to.as_ptr().cast::<f32>(), to.len()));
            let (written, result) = write(i * chunk, to);
            let written = written.map(|written| (written.as_ptr(), written.len()));
            assert!(written == given, "a kernel did not write the memory it was given");
            result
        })
        .collect();
    for vector in &mut vectors {
        // SAFETY: each of the chunks, which together are the first `n` elements, came back initialised.
        unsafe { vector.set_len(n) };
    }
    (vectors, results)
}

/// One vector of `n` elements that `write` fills chunk by chunk, in parallel; see [`in_chunks`].
pub(crate) fn one_in_chunks(
    n: usize,
    chunk: usize,
    write: impl for<'a> Fn(usize, &'a mut Unwritten) -> &'a mut [f32] + Sync,
) -> Vec<f32> {
    let ([vector], _) = in_chunks(n, chunk, |start, [to]| ([write(start, to)], ()));
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_written_at_its_place() {
        for n in [0, 1, 6, 7, 8, 50] {
            let ([a, b], starts) = in_chunks(n, 7, |start, [a, b]| {
                ([fill(a, |i| (start + i) as f32), fill(b, |i| -((start + i) as f32))], start)
            });
            assert!(a.iter().enumerate().all(|(i, x)| *x == i as f32) && a.len() == n);
            assert!(b.iter().enumerate().all(|(i, x)| *x == -(i as f32)) && b.len() == n);
            assert_eq!(starts, (0..n).step_by(7).collect::<Vec<_>>());
        }
    }

    #[test]
    #[should_panic(expected = "did not write")]
    fn memory_that_is_not_all_written_is_refused() {
        one_in_chunks(5, 5, |_, to| &mut fill(to, |i| i as f32)[1..]);
    }
}
