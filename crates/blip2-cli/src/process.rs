//! The process: its allocator, and what its libraries read of the environment when it starts.

// Training frees and takes tensors of megabytes at every step; the system's allocator returns each to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

use std::num::NonZeroUsize;

/// What is read once when a process starts, by name and value. What somebody has set stays.
type Environment = Vec<(&'static str, String)>;

/// The allocator's milliseconds until freed memory goes back to the system, -1 for never. By itself it waits for a second.
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

/// What suits training with so many threads, or with as many as the machine has cores.
pub(crate) fn for_training(threads: Option<NonZeroUsize>) -> Environment {
    let mut environment = vec![
        // A step may take longer than a second, and would take all of its gradients from the system again, page by page: a sixth
        // of its time with a Q-Former of BERT-base's size.
        (PURGE_DELAY, "-1".to_owned()),
        // The tensor engine adds with threads of its own. By themselves they wait for more by spinning, on the cores that the
        // products need; so they sleep.
        ("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0".to_owned()),
    ];
    environment.extend(threads.map(|n| ("CANDLE_NUM_THREADS", n.to_string())));
    environment
}

/// What suits a server: what one answer frees another takes, and the memory that it has needed once is the memory that it has. Given
/// back after a second it went up and down by a tenth under load.
pub(crate) fn for_serving() -> Environment {
    vec![(PURGE_DELAY, "-1".to_owned())]
}

/// Starts this program anew where it lacks some of `environment`; comes back where it has all, or cannot be started, which costs
/// time only.
pub(crate) fn restart_with(environment: Environment) {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        let is_missing = |(name, _): &(&str, String)| std::env::var_os(name).is_none();
        let missing: Environment = environment.into_iter().filter(is_missing).collect();
        if missing.is_empty() {
            return;
        }
        let Ok(program) = std::env::current_exe() else { return };
        let arguments = std::env::args_os().skip(1);
        let _did_not_start = std::process::Command::new(program).args(arguments).envs(missing).exec();
    }
    #[cfg(not(unix))]
    let _ = environment;
}
