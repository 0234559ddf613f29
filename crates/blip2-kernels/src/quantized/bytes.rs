//! Where the bytes of a weight are.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::memory::WeightMemory;

/// Bytes of a weight that lie elsewhere, such as in a mapped file.
pub trait StoredBytes: Send + Sync {
    /// The bytes, always the same.
    fn bytes(&self) -> &[u8];

    /// They were copied and are not needed any more; who is still reading them may go on.
    fn release(&self) {}
}

impl StoredBytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// Products after which stored bytes are copied into memory of their own. A file's pages are small, and reading through them takes
/// a fifth more time than through large ones; copying takes as much as ten products of one row. A caption or two do not pay for
/// that, a server does.
const PRODUCTS_BEFORE_COPY: usize = 64;

/// Bytes copied by one task.
const COPIED_AT_ONCE: usize = 1 << 18;

pub(super) enum WeightBytes {
    Own(WeightMemory),
    Stored { stored: Box<dyn StoredBytes>, n_products: AtomicUsize, copy: OnceLock<WeightMemory> },
}

impl WeightBytes {
    pub(super) fn stored(stored: Box<dyn StoredBytes>) -> Self {
        Self::Stored { stored, n_products: AtomicUsize::new(0), copy: OnceLock::new() }
    }

    /// Called before each product with the weight.
    pub(super) fn count_product(&self) {
        let Self::Stored { stored, n_products, copy } = self else { return };
        // One product alone comes to this number; those beside it read what is stored, which is the same.
        let is_due = n_products.fetch_add(1, Ordering::Relaxed) + 1 == PRODUCTS_BEFORE_COPY;
        // Elsewhere memory of its own has no larger pages.
        if !is_due || !cfg!(target_os = "linux") {
            return;
        }
        let from = stored.bytes();
        let mut memory = WeightMemory::zeroed(from.len());
        let pieces = memory.as_mut().par_chunks_mut(COPIED_AT_ONCE).zip(from.par_chunks(COPIED_AT_ONCE));
        pieces.for_each(|(to, from)| to.copy_from_slice(from));
        if copy.set(memory).is_ok() {
            stored.release();
        }
    }
}

impl AsRef<[u8]> for WeightBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Own(memory) => memory.as_ref(),
            Self::Stored { stored, copy, .. } => copy.get().map_or_else(|| stored.bytes(), AsRef::as_ref),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    struct Counted(Vec<u8>, Arc<AtomicUsize>);

    impl StoredBytes for Counted {
        fn bytes(&self) -> &[u8] {
            &self.0
        }

        fn release(&self) {
            self.1.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn bytes_that_are_read_often_are_copied_once() {
        let values: Vec<u8> = (0..3 * COPIED_AT_ONCE + 5).map(|i| (i * 7 + i / 251) as u8).collect();
        let n_released = Arc::new(AtomicUsize::new(0));
        let bytes = WeightBytes::stored(Box::new(Counted(values.clone(), n_released.clone())));
        let at = bytes.as_ref().as_ptr();
        for product in 1..=3 * PRODUCTS_BEFORE_COPY {
            bytes.count_product();
            let is_copied = cfg!(target_os = "linux") && product >= PRODUCTS_BEFORE_COPY;
            assert_eq!(bytes.as_ref().as_ptr() != at, is_copied, "after {product} products");
            assert_eq!(n_released.load(Ordering::Relaxed), usize::from(is_copied));
        }
        assert!(bytes.as_ref() == values);
    }
}
