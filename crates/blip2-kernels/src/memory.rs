//! The memory of a weight, and asking for memory ahead.

use memmap2::MmapMut;

/// Fewest bytes that get pages of their own.
const OWN_PAGES: usize = 1 << 20;

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Memory of exactly the size of a weight, at a multiple of 64 bytes, so that no load crosses two lines of the cache.
///
/// An allocator rounds large sizes up, by up to an eighth, and where huge pages back them the rest is memory too: an eighth of a
/// gigabyte of every gigabyte of weights.
#[derive(Debug)]
pub(crate) enum WeightMemory {
    Lines(Vec<Line>, usize),
    Pages(MmapMut),
}

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; LINE]);

/// Asks for memory that is read soon, where processors do not guess it: in pieces that lie far apart.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(values)).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which accesses nothing; the address is one of the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().cast::<i8>().add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

impl WeightMemory {
    /// So many bytes, all zero.
    pub(crate) fn zeroed(n_bytes: usize) -> Self {
        if n_bytes >= OWN_PAGES
            && let Ok(pages) = MmapMut::map_anon(n_bytes)
        {
            // Products read all of it again and again. It is as right without.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
            return Self::Pages(pages);
        }
        Self::Lines(vec![Line([0; LINE]); n_bytes.div_ceil(LINE)], n_bytes)
    }

    /// Its bytes as words, whatever is left of the last word not among them.
    pub(crate) fn words(&self) -> &[u32] {
        let bytes = self.as_ref();
        // SAFETY: lines and pages are aligned for words, which may have any bits, and so many whole words are in the bytes.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / 4) }
    }

    /// [`Self::words`] to write to.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        let bytes = self.as_mut();
        // SAFETY: as in `words`; the exclusive borrow of the bytes is that of the words.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / 4) }
    }
}

impl AsRef<[u8]> for WeightMemory {
    fn as_ref(&self) -> &[u8] {
        match self {
            // SAFETY: `Line` is 64 bytes without padding, and there are at least `n_bytes` of them.
            Self::Lines(lines, n_bytes) => unsafe {
                std::slice::from_raw_parts(lines.as_ptr().cast(), *n_bytes)
            },
            Self::Pages(pages) => pages,
        }
    }
}

impl AsMut<[u8]> for WeightMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            // SAFETY: as in `as_ref`, with the exclusive borrow of the lines.
            Self::Lines(lines, n_bytes) => unsafe {
                std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), *n_bytes)
            },
            Self::Pages(pages) => pages,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_memory_is_zero_aligned_and_of_its_size() {
        for n_bytes in [0, 1, 63, 64, 130, OWN_PAGES - 4, OWN_PAGES, OWN_PAGES + 4] {
            let mut memory = WeightMemory::zeroed(n_bytes);
            assert!(memory.as_ref().len() == n_bytes && memory.as_ref().iter().all(|byte| *byte == 0));
            assert!(memory.as_ref().as_ptr().addr().is_multiple_of(LINE));
            assert_eq!(memory.words().len(), n_bytes / 4);
            memory.words_mut().fill(0x0403_0201);
            assert!(memory.as_ref()[..n_bytes / 4 * 4].chunks(4).all(|word| word == [1, 2, 3, 4]));
        }
    }
}
