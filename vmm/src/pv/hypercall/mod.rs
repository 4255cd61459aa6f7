//! The hypercalls that the shim does not serve itself.
//!
//! Every argument is the guest's: addresses are walked through its page tables
//! with bounds, counts are bounded, and what is wrong is answered with an error
//! number. What is unknown is answered with ENOSYS and counted.

mod event;
mod grant;
mod memory;
mod mmu;
mod sched;
#[cfg(test)]
mod tests;
mod traps;
mod vcpu;
mod version;

use std::sync::atomic::Ordering;

use super::abi::Errno;
use super::domain::Domain;
use super::mmu::Space;
use crate::vcpu::Event;

/// Numbers of hypercalls (`__HYPERVISOR_*` in `xen.h`).
pub(crate) mod number {
    pub(crate) const SET_TRAP_TABLE: u64 = 0;
    pub(crate) const MMU_UPDATE: u64 = 1;
    pub(crate) const SET_GDT: u64 = 2;
    pub(crate) const STACK_SWITCH: u64 = 3;
    pub(crate) const SET_CALLBACKS: u64 = 4;
    pub(crate) const FPU_TASKSWITCH: u64 = 5;
    pub(crate) const SET_DEBUGREG: u64 = 8;
    pub(crate) const GET_DEBUGREG: u64 = 9;
    pub(crate) const UPDATE_DESCRIPTOR: u64 = 10;
    pub(crate) const MEMORY_OP: u64 = 12;
    pub(crate) const UPDATE_VA_MAPPING: u64 = 14;
    pub(crate) const SET_TIMER_OP: u64 = 15;
    pub(crate) const XEN_VERSION: u64 = 17;
    pub(crate) const CONSOLE_IO: u64 = 18;
    pub(crate) const GRANT_TABLE_OP: u64 = 20;
    pub(crate) const VM_ASSIST: u64 = 21;
    pub(crate) const VCPU_OP: u64 = 24;
    pub(crate) const SET_SEGMENT_BASE: u64 = 25;
    pub(crate) const MMUEXT_OP: u64 = 26;
    pub(crate) const SCHED_OP: u64 = 29;
    pub(crate) const CALLBACK_OP: u64 = 30;
    pub(crate) const EVENT_CHANNEL_OP: u64 = 32;
    pub(crate) const PHYSDEV_OP: u64 = 33;
}

/// What a hypercall comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The result, for RAX.
    Value(u64),
    /// The vCPU does not run on until somebody brings it up.
    Down,
    /// The machine has something to do.
    Event(Event),
}

/// What hypercalls return within.
type Result<T = u64> = std::result::Result<T, Errno>;

/// A hypercall of vCPU `index`.
pub(crate) struct Hypercall<'a> {
    /// The domain.
    pub domain: &'a Domain,
    /// The vCPU that calls.
    pub index: usize,
    /// The call's number.
    pub number: u64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

impl Hypercall<'_> {
    /// Carries it out.
    #[must_use]
    pub(crate) fn call(&self) -> Answer {
        let cpu = &self.domain.cpus[self.index];
        cpu.hypercalls.fetch_add(1, Ordering::Relaxed);
        let result = match self.number {
            number::SCHED_OP => match self.sched_op() {
                Ok(answer) => return answer,
                Err(error) => Err(error),
            },
            number::VCPU_OP => match self.vcpu_op() {
                Ok(answer) => return answer,
                Err(error) => Err(error),
            },
            _ => self.simple(),
        };
        if result == Err(Errno::NoSys) {
            cpu.unknown.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(number = self.number, arguments = ?self.arguments, "unknown hypercall");
        }
        Answer::Value(result.unwrap_or_else(Errno::rax))
    }

    /// Those that only have a result.
    fn simple(&self) -> Result {
        match self.number {
            number::SET_TRAP_TABLE => self.set_trap_table(),
            number::SET_GDT => self.set_gdt(),
            number::SET_CALLBACKS => self.set_callbacks(),
            number::CALLBACK_OP => self.callback_op(),
            number::STACK_SWITCH | number::FPU_TASKSWITCH => Ok(0),
            number::SET_DEBUGREG => self.set_debugreg(),
            number::GET_DEBUGREG => self.get_debugreg(),
            number::UPDATE_DESCRIPTOR => self.update_descriptor(),
            number::MEMORY_OP => self.memory_op(),
            number::UPDATE_VA_MAPPING => self.update_va_mapping(),
            number::MMUEXT_OP => self.mmuext_op(),
            // The shim leaves only what has no requests.
            number::MMU_UPDATE => Ok(0),
            number::SET_TIMER_OP => self.set_timer(Some(self.arguments[0]).filter(|t| *t != 0)),
            number::XEN_VERSION => self.xen_version(),
            number::CONSOLE_IO => self.console_io(),
            number::GRANT_TABLE_OP => self.grant_table_op(),
            number::VM_ASSIST => self.vm_assist(),
            number::SET_SEGMENT_BASE => self.set_segment_base(),
            number::EVENT_CHANNEL_OP => self.event_channel_op(),
            number::PHYSDEV_OP => self.physdev_op(),
            _ => Err(Errno::NoSys),
        }
    }

    /// The caller's address space.
    fn space(&self) -> Space<'_> {
        self.domain.space(self.index)
    }
}
