//! The allocator, and how long it keeps what was freed.

// Training frees and takes tensors of megabytes at every step; the system's allocator returns each to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What the allocator reads when a process starts: milliseconds until freed memory goes back to the system, -1 for never.
#[cfg(unix)]
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

/// Starts this program anew as one that keeps freed memory for itself; comes back where it is one, somebody else has set how long,
/// or it cannot be done, which costs time only.
///
/// A second is what the allocator waits by itself. A step of training may take longer, and would then take all of its gradients
/// from the system again, page by page: a sixth of its time with a Q-Former of BERT-base's size.
pub(crate) fn keep_freed_memory() {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        if std::env::var_os(PURGE_DELAY).is_some() {
            return;
        }
        let Ok(program) = std::env::current_exe() else { return };
        let arguments = std::env::args_os().skip(1);
        let _did_not_start =
            std::process::Command::new(program).args(arguments).env(PURGE_DELAY, "-1").exec();
    }
}
