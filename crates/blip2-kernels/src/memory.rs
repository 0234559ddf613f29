//! The memory of a weight, and asking for memory ahead.

use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::sync::{Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};

/// Fewest bytes that get whole pages.
const WHOLE_PAGES: usize = 1 << 20;

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Bytes that weights are laid out in, one after another. What none has been put into is an address and no memory.
#[cfg(target_os = "linux")]
const REGION: usize = 1 << 30;

/// A multiple of the size of a page, everywhere.
#[cfg(target_os = "linux")]
const PAGE: usize = 64 << 10;

/// Memory of exactly the size of a weight, at a multiple of 64 bytes, so that no load crosses two lines of the cache.
///
/// An allocator rounds large sizes up, by up to an eighth, and where huge pages back them the rest is memory too: an eighth of a
/// gigabyte of every gigabyte of weights.
#[derive(Debug)]
pub(crate) enum WeightMemory {
    Lines(Vec<Line>, usize),
    Part(Part),
}

/// Bytes of a region that are one weight's alone.
///
/// Huge pages are of two megabytes, at multiples of that. In a mapping of its own a weight would have small pages at its two ends,
/// which for four megabytes are half of it, and those are read little more than half as fast. So weights share mappings.
#[derive(Debug)]
pub(crate) struct Part {
    region: Arc<MmapRaw>,
    start: usize,
    n_bytes: usize,
}

/// The region that the next weight goes into, and what is used of it.
#[cfg(target_os = "linux")]
static OPEN: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);

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
        if n_bytes >= WHOLE_PAGES
            && let Some(part) = Part::zeroed(n_bytes)
        {
            return Self::Part(part);
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
            Self::Part(part) => part.as_ref(),
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
            Self::Part(part) => part.as_mut(),
        }
    }
}

impl Part {
    /// So many bytes, all zero; `None` where the system has no such memory.
    fn zeroed(n_bytes: usize) -> Option<Self> {
        #[cfg(target_os = "linux")]
        if n_bytes <= REGION / 4
            && let Some(part) = Self::of_open_region(n_bytes)
        {
            return Some(part);
        }
        Some(Self { region: Arc::new(map(n_bytes)?), start: 0, n_bytes })
    }

    /// What comes next in the open region, or in a new one where that is too little.
    #[cfg(target_os = "linux")]
    fn of_open_region(n_bytes: usize) -> Option<Self> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_none_or(|(_, used)| n_bytes > REGION - used) {
            *open = Some((Arc::new(map(REGION)?), 0));
        }
        let (region, used) = open.as_mut()?;
        let part = Self { region: region.clone(), start: *used, n_bytes };
        *used += n_bytes.next_multiple_of(LINE);
        Some(part)
    }
}

/// Memory that is all zero, and taken once it is touched.
fn map(n_bytes: usize) -> Option<MmapRaw> {
    let map = MmapOptions::new().len(n_bytes).no_reserve_swap().map_anon().ok()?;
    // Products read all of it again and again. It is as right without.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Some(map.into())
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: these bytes of the region are this part's alone, which is borrowed; the region lives as long as the part.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().add(self.start), self.n_bytes) }
    }
}

impl AsMut<[u8]> for Part {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_ref`, with the exclusive borrow of the part.
        unsafe { std::slice::from_raw_parts_mut(self.region.as_mut_ptr().add(self.start), self.n_bytes) }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Part {
    /// Gives the memory back while others of the region are kept; no part begins there again.
    fn drop(&mut self) {
        let first = self.start.next_multiple_of(PAGE);
        let end = (self.start + self.n_bytes) / PAGE * PAGE;
        if first < end {
            // SAFETY: whole pages of this part, which nothing refers to any more. Failing is harmless: the memory stays taken until
            // the region goes.
            let _ = unsafe {
                self.region.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, end - first)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_memory_is_zero_aligned_and_of_its_size() {
        for n_bytes in [0, 1, 63, 64, 130, WHOLE_PAGES - 4, WHOLE_PAGES, WHOLE_PAGES + 4] {
            let mut memory = WeightMemory::zeroed(n_bytes);
            assert!(memory.as_ref().len() == n_bytes && memory.as_ref().iter().all(|byte| *byte == 0));
            assert!(memory.as_ref().as_ptr().addr().is_multiple_of(LINE));
            assert_eq!(memory.words().len(), n_bytes / 4);
            memory.words_mut().fill(0x0403_0201);
            assert!(memory.as_ref()[..n_bytes / 4 * 4].chunks(4).all(|word| word == [1, 2, 3, 4]));
        }
    }

    #[test]
    fn weights_of_one_region_keep_their_bytes_when_others_come_and_go() {
        let sizes = [WHOLE_PAGES, 3 * WHOLE_PAGES + 68, 2 * WHOLE_PAGES + 4, WHOLE_PAGES + 12];
        let filled = |(i, n_bytes)| {
            let mut memory = WeightMemory::zeroed(n_bytes);
            memory.as_mut().fill(i);
            memory
        };
        let mut all: Vec<_> = (1..).zip(sizes).map(filled).collect();
        drop(all.remove(1));
        let fresh = WeightMemory::zeroed(5 * WHOLE_PAGES);
        assert!(fresh.as_ref().iter().all(|byte| *byte == 0));
        for (i, memory) in [1, 3, 4].into_iter().zip(&all) {
            assert!(memory.as_ref().iter().all(|byte| *byte == i), "those of weight {i}");
        }
    }
}
