//! What is remembered about pictures, within a bound of memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::picture::Key;

/// Remembers what belongs to pictures, the least recently used forgotten first.
#[derive(Debug)]
pub(crate) struct Recent<T> {
    max_bytes: usize,
    entries: Mutex<Entries<T>>,
}

#[derive(Debug)]
struct Entries<T> {
    by_key: HashMap<Key, Entry<T>>,
    n_bytes: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry<T> {
    value: Arc<T>,
    n_bytes: usize,
    used: u64,
}

impl<T> Recent<T> {
    pub(crate) fn new(max_bytes: usize) -> Self {
        let entries = Entries { by_key: HashMap::new(), n_bytes: 0, clock: 0 };
        Self { max_bytes, entries: Mutex::new(entries) }
    }

    fn lock(&self) -> MutexGuard<'_, Entries<T>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<T>> {
        let mut entries = self.lock();
        entries.clock += 1;
        let clock = entries.clock;
        let entry = entries.by_key.get_mut(key)?;
        entry.used = clock;
        Some(entry.value.clone())
    }

    /// Remembers `value`, which takes `n_bytes`, in the place of what was remembered of this picture.
    pub(crate) fn insert(&self, key: Key, value: Arc<T>, n_bytes: usize) {
        if n_bytes > self.max_bytes {
            return;
        }
        let mut entries = self.lock();
        entries.clock += 1;
        entries.n_bytes += n_bytes;
        let entry = Entry { value, n_bytes, used: entries.clock };
        if let Some(old) = entries.by_key.insert(key, entry) {
            entries.n_bytes -= old.n_bytes;
        }
        while entries.n_bytes > self.max_bytes {
            let oldest = entries.by_key.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| *key);
            let Some(forgotten) = oldest.and_then(|key| entries.by_key.remove(&key)) else { break };
            entries.n_bytes -= forgotten.n_bytes;
        }
    }

    pub(crate) fn n_bytes(&self) -> usize {
        self.lock().n_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_is_forgotten_and_the_bound_is_kept() {
        let recent = Recent::new(10);
        let key = |i: u8| [i; 32];
        recent.insert(key(1), Arc::new(1), 4);
        recent.insert(key(2), Arc::new(2), 4);
        assert_eq!(recent.get(&key(1)).as_deref(), Some(&1));
        recent.insert(key(3), Arc::new(3), 4);
        assert!(recent.get(&key(2)).is_none() && recent.get(&key(1)).is_some());
        assert_eq!(recent.n_bytes(), 8);
        recent.insert(key(1), Arc::new(10), 6);
        assert_eq!((recent.get(&key(1)).as_deref(), recent.n_bytes()), (Some(&10), 10));
        recent.insert(key(4), Arc::new(4), 11);
        assert!(recent.get(&key(4)).is_none(), "larger than everything");
        recent.insert(key(5), Arc::new(5), 10);
        assert_eq!(recent.n_bytes(), 10);
        assert!(recent.get(&key(1)).is_none() && recent.get(&key(5)).is_some());
    }
}
