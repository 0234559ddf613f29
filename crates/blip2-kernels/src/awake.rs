//! Threads that wait for the next operation without going to sleep.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rayon::Yield;
use rayon::prelude::*;

/// Looks for work, one after another without any, before a thread goes to sleep after all: some milliseconds.
const MOST_LOOKS: usize = 2000;
/// Pauses between them, which leave the processor's units to a thread that shares them.
const PAUSES: usize = 32;
/// Requests to a thread to stay awake that it has not come to; more are not made. A thread of the pool that waits for something else
/// comes to none.
const MOST_REQUESTS: usize = 64;

/// Requests that no thread has come to.
static N_REQUESTS: AtomicUsize = AtomicUsize::new(0);

thread_local!(static IS_AWAKE: Cell<bool> = const { Cell::new(false) });

/// Runs `work`, a series of parallel operations with little between them, on a thread of the pool, while the other threads stay
/// awake for its next operation. Threads of rayon's sleep where there is nothing to do for some microseconds, and waking them takes
/// longer than a product of a few rows.
///
/// Inside another call of it this is the work alone. What it returns, and what is computed, is the same without it; it waits for no
/// thread that the work does not wait for.
///
/// # Panics
/// When `work` does.
pub fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if IS_AWAKE.get() {
        return work();
    }
    rayon::scope(|_| {
        let n_threads = rayon::current_num_threads();
        let done = Done(Arc::new(AtomicBool::new(false)));
        if n_threads > 1 && N_REQUESTS.load(Ordering::Relaxed) < MOST_REQUESTS * n_threads {
            N_REQUESTS.fetch_add(n_threads, Ordering::Relaxed);
            let (this, is_done) = (rayon::current_thread_index(), done.0.clone());
            rayon::spawn_broadcast(move |context| {
                N_REQUESTS.fetch_sub(1, Ordering::Relaxed);
                if Some(context.index()) != this && !IS_AWAKE.get() {
                    wait(&is_done);
                }
            });
        }
        inside(work)
    })
}

/// Calls `task` with each number below `n_tasks`, on all threads. Inside [`awake`] whoever is done takes the next one, and waits for
/// the last without going to sleep: a product of a few rows takes a few hundred microseconds, and rayon's threads, which divide
/// the numbers among them at first, sleep when the other has some tens of them more to do.
pub(crate) fn each(n_tasks: usize, task: impl Fn(usize) + Sync) {
    if n_tasks < 2 || !IS_AWAKE.get() {
        return (0..n_tasks).into_par_iter().for_each(&task);
    }
    let (next, n_done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n_tasks {
                return;
            }
            task(i);
            n_done.fetch_add(1, Ordering::Relaxed);
        }
    };
    rayon::scope(|scope| {
        for _ in 1..n_tasks.min(rayon::current_num_threads()) {
            scope.spawn(|_| work());
        }
        work();
        // The end of the scope waits for the others, who have begun all that there is, and sees what they have written.
        for _ in 0..MOST_LOOKS {
            if n_done.load(Ordering::Relaxed) == n_tasks {
                break;
            }
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
        }
    });
}

/// Lets the others go, whatever the work does.
struct Done(Arc<AtomicBool>);

impl Drop for Done {
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

    /// Whether no thread stays awake for work that is done. One that has not yet seen that may look for other work meanwhile, and
    /// find this question.
    fn none_stays_awake(pool: &rayon::ThreadPool) -> bool {
        (0..10_000).any(|_| pool.broadcast(|_| IS_AWAKE.get()).into_iter().all(|is_awake| !is_awake))
    }

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
            assert!(!IS_AWAKE.get() && none_stays_awake(&pool));
        }
        // And from one that is not.
        std::thread::spawn(|| assert!(awake(|| rayon::current_thread_index().is_some()))).join().unwrap();
    }

    #[test]
    fn each_number_comes_once() {
        for (n_threads, n_tasks) in [(1, 5), (2, 1), (2, 2), (2, 33), (3, 2), (3, 100)] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
            let counts: Vec<_> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
            let count = |i: usize| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            };
            pool.install(|| awake(|| each(n_tasks, count)));
            pool.install(|| each(n_tasks, count));
            let is_right = |count: &AtomicUsize| count.load(Ordering::Relaxed) == 2;
            assert!(counts.iter().all(is_right), "{n_tasks} tasks, {n_threads} threads");
        }
    }

    /// As the main thread of a program does that made itself part of the pool.
    #[test]
    fn a_thread_of_the_pool_may_wait_for_work_of_another_thread() {
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(2).use_current_thread().build().expect("threads");
        std::thread::scope(|scope| {
            let sums = scope.spawn(|| {
                let sum = || awake(|| (0..1000u64).into_par_iter().sum::<u64>());
                (0..200).all(|_| pool.install(sum) == 499_500)
            });
            assert!(sums.join().unwrap());
        });
    }

    #[test]
    fn work_that_panics_lets_the_others_go() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("threads");
        let panics = || pool.install(|| awake(|| panic!("as it should")));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics));
        assert!(result.is_err());
        assert!(none_stays_awake(&pool));
    }
}
