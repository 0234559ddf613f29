//! The process: its allocator, and what its libraries read of the environment when it starts.

// Training frees and takes tensors of megabytes at every step; the system's allocator returns each to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What suits training, and is read once when a process starts.
#[cfg(unix)]
const FOR_TRAINING: [(&str, &str); 2] = [
    // The allocator's milliseconds until freed memory goes back to the system, -1 for never. By itself it waits for a second: a
    // step may take longer, and would take all of its gradients from the system again, page by page, which was a sixth of its time
    // with a Q-Former of BERT-base's size.
    ("MIMALLOC_PURGE_DELAY", "-1"),
    // The tensor engine has threads of its own for sums, which wait for more of them by spinning: on the cores that the products
    // need. Its sums were 4 % of a step, and are as fast in one thread.
    ("CANDLE_NUM_THREADS", "1"),
];

/// Starts this program anew with the environment that suits training; comes back where that is so, or it cannot be done, which
/// costs time only. What somebody has set stays.
pub(crate) fn restart_for_training() {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        let mut missing =
            FOR_TRAINING.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).peekable();
        if missing.peek().is_none() {
            return;
        }
        let Ok(program) = std::env::current_exe() else { return };
        let arguments = std::env::args_os().skip(1);
        let _did_not_start = std::process::Command::new(program).args(arguments).envs(missing).exec();
    }
}
