//! Threads that wait for the next operation without going to sleep.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::Yield;

/// Looks for work, one after another without any, before a thread goes to sleep after all: some milliseconds.
const MOST_LOOKS: usize = 2000;
/// Pauses between them, which leave the processor's units to a thread that shares them.
const PAUSES: usize = 32;

thread_local!(static IS_AWAKE: Cell<bool> = const { Cell::new(false) });

/// Runs `work`, a series of parallel operations with little between them, on a thread of the pool, while the other threads stay
/// awake for its next operation. Threads of rayon's sleep where there is nothing to do for some microseconds, and waking them takes
/// longer than a product of a few rows.
///
/// Inside another call of it this is the work alone. What it returns, and what is computed, is the same without it.
///
/// # Panics
/// When `work` does.
pub fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if IS_AWAKE.get() {
        return work();
    }
    let is_done = AtomicBool::new(false);
    let is_done = &is_done;
    rayon::scope(|scope| {
        let this = rayon::current_thread_index();
        scope.spawn_broadcast(move |_, context| {
            if Some(context.index()) != this {
                wait(is_done);
            }
        });
        // Whatever the work does: the others wait for it.
        let _done = Done(is_done);
        inside(work)
    })
}

struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What `work` gives, with all calls of [`awake`] in it the work alone.
fn inside<R>(work: impl FnOnce() -> R) -> R {
    struct Outside(bool);
    impl Drop for Outside {
        fn drop(&mut self) {
            IS_AWAKE.set(self.0);
        }
    }
    let _outside = Outside(IS_AWAKE.replace(true));
    work()
}

/// Takes part in whatever there is to do, until the work is done or nothing has come for a while.
fn wait(is_done: &AtomicBool) {
    inside(|| {
        let mut n_looks = 0;
        while n_looks < MOST_LOOKS && !is_done.load(Ordering::Relaxed) {
            if rayon::yield_now() == Some(Yield::Executed) {
                n_looks = 0;
                continue;
            }
            n_looks += 1;
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
        }
    });
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_is_done_once_whoever_calls() {
        for n_threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
            let sum = || awake(|| (0..1000u64).into_par_iter().map(|i| i * i).sum::<u64>());
            let expected = 999 * 1000 * 1999 / 6;
            // From a thread of the pool, from several at once, and inside itself.
            assert_eq!(pool.install(sum), expected);
            pool.install(|| (0..20).into_par_iter().for_each(|_| assert_eq!(sum(), expected)));
            assert_eq!(pool.install(|| awake(|| awake(sum))), expected);
            assert!(
                !IS_AWAKE.get() && pool.broadcast(|_| IS_AWAKE.get()).into_iter().all(|is_awake| !is_awake)
            );
        }
        // And from one that is not.
        std::thread::spawn(|| assert!(awake(|| rayon::current_thread_index().is_some()))).join().unwrap();
    }

    #[test]
    fn work_that_panics_lets_the_others_go() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("threads");
        let panics = || pool.install(|| awake(|| panic!("as it should")));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics));
        assert!(result.is_err());
        assert!(pool.broadcast(|_| IS_AWAKE.get()).into_iter().all(|is_awake| !is_awake));
    }
}
