//! Bases of FS and GS that a process sets itself, without its kernel's knowledge, stay its own.

use std::io;
use std::mem;

use serde_json::json;

use crate::Report;
use crate::process::{self, End};

std::arch::global_asm!(include_str!("bases.s"));

unsafe extern "C" {
    fn guest_check_bases_victim(rounds: u64) -> !;
    fn guest_check_bases_other(rounds: u64) -> !;
}

/// How often each of the two gives way to the other.
const ROUNDS: u64 = 2000;

/// Both on one processor, which they pass to each other.
pub(crate) fn run() -> io::Result<Report> {
    // SAFETY: a set of processors is a bitmap, which the call only reads.
    unsafe {
        let mut first: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(0, &mut first);
        if libc::sched_setaffinity(0, mem::size_of_val(&first), &raw const first) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the child does nothing else, and ends there.
    let other = process::fork(|| unsafe { guest_check_bases_other(ROUNDS) })?;
    // SAFETY: as before.
    let victim = process::fork(|| unsafe { guest_check_bases_victim(ROUNDS) })?;
    let (victim, other) = (process::wait(victim)?, process::wait(other)?);
    let found = match victim {
        End::Exited(0) => "none",
        End::Exited(1) => "FS",
        End::Exited(2) => "GS",
        _ => "an end",
    };
    Ok(Report {
        good: (victim, other) == (End::Exited(0), End::Exited(0)),
        json: json!({ "rounds": ROUNDS, "found": found }),
    })
}
