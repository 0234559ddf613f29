//! The memory of a packed weight.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Fewest bytes that get pages of their own.
const OWN_PAGES: usize = 1 << 20;

/// Words in memory of exactly their size.
///
/// An allocator rounds large sizes up, by up to an eighth, and where huge pages back them the rest is memory too: an eighth of a
/// gigabyte of every gigabyte of weights.
#[derive(Debug)]
pub(super) enum Words {
    Few(Vec<u32>),
    Pages(MmapMut),
}

impl Words {
    pub(super) fn zeroed(n: usize) -> Self {
        if let Some(n_bytes) = n.checked_mul(4).filter(|n_bytes| *n_bytes >= OWN_PAGES)
            && let Ok(pages) = MmapMut::map_anon(n_bytes)
        {
            // Products read all of it again and again. It is as right without.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
            return Self::Pages(pages);
        }
        Self::Few(vec![0; n])
    }
}

impl Deref for Words {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            Self::Few(words) => words,
            // SAFETY: pages are aligned for words, which may have any bits; the length is a whole number of them.
            Self::Pages(pages) => unsafe {
                std::slice::from_raw_parts(pages.as_ptr().cast(), pages.len() / 4)
            },
        }
    }
}

impl DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u32] {
        match self {
            Self::Few(words) => words,
            // SAFETY: as in `deref`; the exclusive borrow of the pages is that of the words.
            Self::Pages(pages) => unsafe {
                std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), pages.len() / 4)
            },
        }
    }
}
