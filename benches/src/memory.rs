//! Memory of this process, as Linux counts it in `/proc/self`; 0 where there is no such file.

use std::path::Path;

/// MiB of a field of `/proc/self/status`.
fn status_mib(field: &str) -> u64 {
    let status = storage::read_to_string(Path::new("/proc/self/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// Resident memory now, in MiB.
pub fn resident_mib() -> u64 {
    status_mib("VmRSS")
}

/// The most resident memory since the start or the last [`reset_peak`], in MiB.
pub fn peak_mib() -> u64 {
    status_mib("VmHWM")
}

/// Lets the peak begin anew at what is resident now. What cannot be reset stays as it is: the figure is then too large.
#[allow(clippy::disallowed_methods)] // `storage` writes a new file and renames it, which /proc does not take.
pub fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
