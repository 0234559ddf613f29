//! Whether a model fits into memory, before it is loaded: better a sentence than the system's out-of-memory killer.

use std::fs;
use std::path::Path;

use anyhow::bail;
use indicatif::DecimalBytes;

/// What to say of how much memory a model needs; refuses to load it where that is not there.
///
/// # Errors
/// When it needs more than is available, unless that is to be ignored.
pub(crate) fn check(needed: u64, available: Option<u64>, is_ignored: bool) -> anyhow::Result<String> {
    let need = format!("the model needs about {} of memory", DecimalBytes(needed));
    Ok(match available {
        Some(available) if available < needed && !is_ignored => bail!(
            "{need}, {} are available: close other programs, take a smaller model, or try with --ignore-memory",
            DecimalBytes(available)
        ),
        Some(available) => format!("{need}, {} are available", DecimalBytes(available)),
        None => need,
    })
}

/// Refuses to fetch weights of `n_bytes` of which already the least that they can become does not fit: numbers in single
/// precision that take `n_bits` in memory.
///
/// # Errors
/// When they need more than is available, unless that is to be ignored.
pub(crate) fn check_stored(
    n_bytes: u64,
    n_bits: u64,
    available: Option<u64>,
    is_ignored: bool,
) -> anyhow::Result<()> {
    let least = n_bytes / 32 * n_bits;
    match available {
        Some(available) if available < least && !is_ignored => bail!(
            "its weights have {} and need at least {} of memory, {} are available: close other programs, take a smaller \
             model, or try with --ignore-memory",
            DecimalBytes(n_bytes),
            DecimalBytes(least),
            DecimalBytes(available)
        ),
        _ => Ok(()),
    }
}

/// Memory that this process can still take without anything being written to the swap space: what the system has, or what
/// is left of the limit of the container. Nothing where the system does not tell.
pub(crate) fn available() -> Option<u64> {
    available_below(Path::new("/"))
}

/// Memory that this process holds, in bytes, where the system tells.
pub(crate) fn resident() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// The most memory that this process has held, in bytes, where the system tells.
pub(crate) fn peak() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

fn available_below(root: &Path) -> Option<u64> {
    let in_system = kibibytes(&fs::read_to_string(root.join("proc/meminfo")).ok()?, "MemAvailable:")?;
    Some(container_limits(root).into_iter().fold(in_system, u64::min))
}

/// `key`'s value in a file like `/proc/meminfo`, in bytes.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// What is left of the memory limit of each control group (version 2) that this process is in.
fn container_limits(root: &Path) -> Vec<u64> {
    let Ok(groups) = fs::read_to_string(root.join("proc/self/cgroup")) else { return Vec::new() };
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else { return Vec::new() };
    let mount = root.join("sys/fs/cgroup");
    let group = mount.join(group);
    group.ancestors().take_while(|folder| folder.starts_with(&mount)).filter_map(left_in_group).collect()
}

fn left_in_group(folder: &Path) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (number("memory.max")?, number("memory.current")?);
    let about = fs::read_to_string(folder.join("memory.stat")).ok()?;
    // Pages of files are counted as used, but given back when memory is short.
    let files: u64 = ["inactive_file ", "active_file "]
        .into_iter()
        .filter_map(|key| about.lines().find_map(|line| line.strip_prefix(key))?.trim().parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_does_not_fit_is_refused_with_both_numbers() {
        let check_given = |available, is_ignored| check(8_100_000_000, available, is_ignored);
        let error = check_given(Some(3_250_000_000), false).unwrap_err().to_string();
        for part in ["8.10 GB", "3.25 GB", "--ignore-memory"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(check_given(Some(3_250_000_000), true).is_ok());
        assert!(check_given(Some(8_100_000_000), false).is_ok());
        assert!(check_given(None, false).is_ok());
    }

    #[test]
    fn what_cannot_fit_is_not_even_fetched() {
        let check_given =
            |n_bits, available, is_ignored| check_stored(49_000_000_000, n_bits, available, is_ignored);
        let error = check_given(16, Some(22_000_000_000), false).unwrap_err().to_string();
        for part in ["49.00 GB", "24.50 GB", "22.00 GB", "--ignore-memory"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(check_given(16, Some(22_000_000_000), true).is_ok());
        assert!(check_given(16, Some(25_000_000_000), false).is_ok());
        assert!(check_given(16, None, false).is_ok());
        // In fewer bits more fits.
        assert!(check_given(9, Some(14_000_000_000), false).is_ok());
        assert!(check_given(9, Some(8_000_000_000), false).is_err());
        assert!(check_given(5, Some(8_000_000_000), false).is_ok());
    }

    #[test]
    fn the_tightest_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(available_below(root.path()), None);
        write("proc/meminfo", "MemTotal:  99 kB\nMemFree:  1 kB\nMemAvailable:   5000 kB\n");
        assert_eq!(available_below(root.path()), Some(5000 * 1024));
        write("proc/self/cgroup", "0::/outer/inner\n");
        write("sys/fs/cgroup/outer/inner/memory.max", "max\n");
        write("sys/fs/cgroup/outer/inner/memory.current", "100\n");
        assert_eq!(available_below(root.path()), Some(5000 * 1024));
        write("sys/fs/cgroup/outer/memory.max", "1000\n");
        write("sys/fs/cgroup/outer/memory.current", "700\n");
        write("sys/fs/cgroup/outer/memory.stat", "anon 500\ninactive_file 150\nactive_file 50\n");
        assert_eq!(available_below(root.path()), Some(500), "1000 of which 500 are not files");
    }
}
