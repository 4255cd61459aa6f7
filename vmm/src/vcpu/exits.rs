//! Counting exits, and explaining the bad ones.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Event, Outcome, interrupted};

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Its value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Exits of one vCPU to the monitor.
#[derive(Debug, Default)]
pub struct Counters {
    /// Accesses to ports.
    pub io: Counter,
    /// Accesses to device memory.
    pub mmio: Counter,
    /// Interruptions by the monitor.
    pub kicks: Counter,
    /// Times at which its dirty ring was full.
    pub ring_full: Counter,
}

/// Why KVM gave up on a guest.
pub(crate) fn internal(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, whose part of the
    // union this is; any bits are valid integers.
    let detail = unsafe { run.__bindgen_anon_1.internal };
    let what = match detail.suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "an exception while another was delivered",
        3 => "an exit while an event was delivered",
        _ => "an internal error of KVM",
    };
    let rip = fd
        .get_regs()
        .map_or_else(|_| "unknown".to_owned(), |regs| format!("{:#x}", regs.rip));
    format!(
        "the guest met {what} (suberror {}) at {rip}",
        detail.suberror
    )
}

/// What becomes of a vCPU after an exit that is no machine's business.
pub(crate) fn other(exit: &VcpuExit) -> Outcome {
    if let VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) = exit {
        return Outcome::RingFull;
    }
    Outcome::Event(Event::Failed(match exit {
        VcpuExit::FailEntry(reason, cpu) => {
            format!("the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}")
        }
        other => format!("unexpected exit {other:?}"),
    }))
}

/// What becomes of it after KVM_RUN has failed.
pub(crate) fn failed_run(error: kvm_ioctls::Error, counters: &Counters) -> Outcome {
    match error.errno() {
        libc::EINTR => interrupted(counters),
        libc::EAGAIN => Outcome::Continue,
        _ => Outcome::Event(Event::Failed(format!("KVM_RUN: {error}"))),
    }
}
