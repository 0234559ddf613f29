//! What is remembered about pictures, one thing or several of each, within a bound of memory.

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
    by_key: HashMap<Key, Vec<Entry<T>>>,
    n_bytes: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry<T> {
    value: Arc<T>,
    n_bytes: usize,
    /// When it was used last; no two entries at once.
    used: u64,
}

impl<T> Entries<T> {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Forgets those of a picture that `is_forgotten`.
    fn forget(&mut self, key: &Key, is_forgotten: impl Fn(&Entry<T>) -> bool) {
        let Some(of_key) = self.by_key.get_mut(key) else { return };
        of_key.retain(|entry| {
            let stays = !is_forgotten(entry);
            if !stays {
                self.n_bytes -= entry.n_bytes;
            }
            stays
        });
        if of_key.is_empty() {
            self.by_key.remove(key);
        }
    }

    /// The one that was not used for the longest time: its picture, and when it was used.
    fn oldest(&self) -> Option<(Key, u64)> {
        let used = self.by_key.iter().flat_map(|(key, of_key)| of_key.iter().map(|entry| (*key, entry.used)));
        used.min_by_key(|(_, used)| *used)
    }
}

impl<T> Recent<T> {
    pub(crate) fn new(max_bytes: usize) -> Self {
        let entries = Entries { by_key: HashMap::new(), n_bytes: 0, clock: 0 };
        Self { max_bytes, entries: Mutex::new(entries) }
    }

    fn lock(&self) -> MutexGuard<'_, Entries<T>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something of `n_bytes` can be remembered at all.
    pub(crate) fn fits(&self, n_bytes: usize) -> bool {
        n_bytes <= self.max_bytes
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<T>> {
        self.best(key, |_| 1)
    }

    /// Of what is remembered of a picture, what is worth most, and of equals the last one used; nothing that is worth 0.
    pub(crate) fn best(&self, key: &Key, worth: impl Fn(&T) -> usize) -> Option<Arc<T>> {
        let mut entries = self.lock();
        let clock = entries.tick();
        let of_key = entries.by_key.get_mut(key)?.iter_mut();
        let worth_it = of_key.map(|entry| (worth(&entry.value), entry)).filter(|(worth, _)| *worth > 0);
        let (_, best) = worth_it.max_by_key(|(worth, entry)| (*worth, entry.used))?;
        best.used = clock;
        Some(best.value.clone())
    }

    /// Remembers `value`, which takes `n_bytes`, in the place of all that was remembered of this picture.
    pub(crate) fn insert(&self, key: Key, value: Arc<T>, n_bytes: usize) {
        self.insert_for(key, value, n_bytes, |_| true);
    }

    /// Remembers `value`, which takes `n_bytes`, in the place of what `is_replaced` of this picture, and beside the rest.
    pub(crate) fn insert_for(
        &self,
        key: Key,
        value: Arc<T>,
        n_bytes: usize,
        is_replaced: impl Fn(&T) -> bool,
    ) {
        if !self.fits(n_bytes) {
            return;
        }
        let mut entries = self.lock();
        entries.forget(&key, |old| is_replaced(&old.value));
        let used = entries.tick();
        entries.n_bytes += n_bytes;
        entries.by_key.entry(key).or_default().push(Entry { value, n_bytes, used });
        while entries.n_bytes > self.max_bytes {
            let Some((key, used)) = entries.oldest() else { break };
            entries.forget(&key, |entry| entry.used == used);
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

    #[test]
    fn several_things_of_a_picture_are_told_apart_and_share_the_bound() {
        let recent = Recent::new(10);
        let (one, other) = ([1; 32], [2; 32]);
        let begins =
            |text: &'static str| move |known: &&str| usize::from(text.starts_with(*known)) * known.len();
        let insert = |key, text: &'static str| {
            recent.insert_for(key, Arc::new(text), text.len(), |known: &&str| text.starts_with(*known));
        };
        insert(one, "ab");
        insert(one, "xyz");
        assert_eq!(recent.n_bytes(), 5, "neither begins the other");
        assert_eq!(recent.best(&one, begins("abc")).as_deref(), Some(&"ab"));
        assert!(recent.best(&other, begins("abc")).is_none(), "of another picture");
        insert(one, "abcd");
        assert_eq!(recent.n_bytes(), 7, "what it begins with is part of it");
        assert_eq!(recent.best(&one, begins("abcde")).as_deref(), Some(&"abcd"));
        assert!(recent.best(&one, begins("abc")).is_none());
        insert(other, "abcd");
        assert_eq!(recent.n_bytes(), 8, "the least recently used is gone");
        assert!(recent.best(&one, begins("xyz")).is_none());
        insert(other, "pqrstuvwxyz");
        assert_eq!(recent.n_bytes(), 8, "larger than everything");
        insert(other, "0123456789");
        assert_eq!(recent.n_bytes(), 10);
        assert!(recent.get(&one).is_none());
    }
}
