//! The least that things can cost here, whoever does them: what figures are to
//! be seen beside.
//!
//! [`measure`]: the least that this machine's KVM lets a guest's system calls, page faults
//! and processes cost, whose kernel runs in ring 3 in address spaces of its
//! own.
//!
//! A payload without a real kernel does, natively, what no kernel can do
//! without. [`answers`]: an answer of somebody who sleeps. [`started`]: a new
//! VM's first exit.

mod answer;
mod vm;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

pub use answer::{Answerer, answers};
use vm::Operation;

/// Batches of each measurement. Each is shorter than a time slice, so that on a
/// busy machine too some are not interrupted.
const BATCHES: u64 = 200;

/// Floors in nanoseconds; each is the smallest of [`BATCHES`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floors {
    /// A system call.
    pub system_call: f64,
    /// The first access to a page.
    pub page_fault: f64,
    /// Mapping, touching and unmapping a page whose three page tables are new
    /// too, as those of a mapping far from all others are.
    pub one_page: f64,
    /// A byte through a pipe to another process and one back: four system
    /// calls, two of which switch.
    pub pipe: f64,
    /// A process, its end, and its parent's notice: an address space, faults,
    /// system calls, two more switches.
    pub fork: f64,
}

/// What a guest's counters say of the least C program that forks, whose child
/// ends at once, and waits: its page faults (stack and data, in parent and in
/// child; two more of the kernel are not counted here) and its system calls.
const FORK_FAULTS: f64 = 6.0;
const FORK_CALLS: f64 = 4.0;
/// What Linux flushes for it, beside the two switches: all of the parent when
/// its pages have become read-only, and of the child before its page tables are
/// taken apart; an address for each page that is copied.
const FORK_FLUSHES: f64 = 2.0;
const FORK_INVALIDATIONS: f64 = 4.0;

/// The time from nothing but memory to the first exit of a new VM's guest, which
/// has no devices.
///
/// # Errors
/// As [`measure`].
pub fn started(payloads: &Path) -> Result<Duration> {
    vm::first_exit(&payloads.join("floor"))
}

/// Measures them with the payload in the folder `payloads`, natively.
///
/// # Errors
/// The payload is not built, or KVM does not carry it out.
pub fn measure(payloads: &Path) -> Result<Floors> {
    let payload = payloads.join("floor");
    let smallest = |operation, rounds| -> Result<f64> {
        let batches = vm::run(&payload, operation, BATCHES, rounds)?;
        Ok(batches.into_iter().fold(f64::INFINITY, f64::min))
    };
    let system_call = smallest(Operation::SystemCall, 20)?;
    let page_fault = smallest(Operation::PageFault, 32)?;
    let pipe = smallest(Operation::TwoProcesses, 8)?;
    // Two system calls are in it.
    let space = smallest(Operation::AddressSpace, 4)?;
    let switches = pipe - 4.0 * system_call;
    let flush = smallest(Operation::Flush, 20)? - system_call;
    let invalidation = smallest(Operation::Invalidation, 20)? - system_call;
    Ok(Floors {
        system_call,
        page_fault,
        one_page: smallest(Operation::OnePage, 8)?,
        pipe,
        fork: space
            + FORK_FAULTS * page_fault
            + (FORK_CALLS - 2.0) * system_call
            + switches
            + FORK_FLUSHES * flush
            + FORK_INVALIDATIONS * invalidation,
    })
}

#[cfg(test)]
mod tests {

    use std::time::Duration;

    use super::*;

    #[test]
    fn what_does_more_takes_longer() {
        let Some(payloads) = std::env::var_os("BLANKET_FIRMWARE_DIR") else {
            eprintln!("not run: the payloads are not built: run `cargo xtask test`");
            return;
        };
        if kvm_ioctls::Kvm::new().is_err() {
            eprintln!("not run: /dev/kvm cannot be used");
            return;
        }
        let floors = measure(Path::new(&payloads)).unwrap();
        assert!(floors.page_fault > floors.system_call, "{floors:?}");
        assert!(floors.pipe > 3.0 * floors.system_call, "{floors:?}");
        let parts = 2.0 * floors.system_call + floors.page_fault;
        assert!(floors.one_page > 0.7 * parts, "{floors:?}");
        assert!(floors.fork > 2.0 * parts, "{floors:?}");
        let smallest = |operation| {
            let path = Path::new(&payloads).join("floor");
            let batches = vm::run(&path, operation, BATCHES, 20).unwrap();
            batches.into_iter().fold(f64::INFINITY, f64::min)
        };
        for operation in [Operation::Flush, Operation::Invalidation] {
            let flushed = smallest(operation);
            eprintln!("{operation:?}: {flushed:.0} ns, of {floors:?}");
            assert!(flushed > floors.system_call, "{operation:?}: {flushed} ns");
        }
        let least = |answerer| {
            let runs = (0..5).map(|_| answers(answerer, 100, Duration::ZERO).unwrap());
            runs.fold(f64::INFINITY, f64::min)
        };
        let guest = least(Answerer::Guest(Path::new(&payloads)));
        let thread = least(Answerer::Thread);
        eprintln!("an answer: {guest:.1} us, by a thread {thread:.1} us");
        assert!(guest > thread, "{guest} us, by a thread {thread} us");
    }
}
