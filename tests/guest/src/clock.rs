//! Processes and the kernel agree on the time.

use std::io;

use serde_json::json;

use crate::Report;

fn nanoseconds(time: &libc::timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

fn empty() -> libc::timespec {
    // SAFETY: all zeros is a time.
    unsafe { std::mem::zeroed() }
}

/// The monotonic clock, from the kernel itself.
fn kernel() -> io::Result<i128> {
    let mut time = empty();
    // SAFETY: the kernel writes one time, which `time` is.
    let done = unsafe {
        libc::syscall(
            libc::SYS_clock_gettime,
            libc::CLOCK_MONOTONIC,
            &raw mut time,
        )
    };
    match done {
        0 => Ok(nanoseconds(&time)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The same, as programs read it: without the kernel where that can be.
fn library() -> io::Result<i128> {
    let mut time = empty();
    // SAFETY: one time is written, which `time` is.
    match unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) } {
        0 => Ok(nanoseconds(&time)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads both in turns for some seconds: neither goes back, nor one ahead of the other.
pub(crate) fn run(seconds: u32) -> io::Result<Report> {
    let end = kernel()? + i128::from(seconds) * 1_000_000_000;
    let (mut last, mut reads, mut back) = (kernel()?, 0u64, 0i128);
    while last < end {
        for now in [library()?, kernel()?] {
            back = back.max(last - now);
            last = now;
            reads += 1;
        }
    }
    Ok(Report {
        good: back == 0,
        json: json!({ "reads": reads, "went_back_ns": back as i64 }),
    })
}
