//! A whole pv machine's state, but for its memory.
//!
//! Guest memory (the hypervisor's area included) is carried by whoever moves
//! the machine, and is in place before [`Machine::restore`].

use std::sync::atomic::Ordering;

use blanket_devices::lifecycle::{self, Lifecycle, SavedState};
use blanket_memory::GuestRam;
use kvm_ioctls::SyncReg;
use serde::{Deserialize, Serialize};

use super::cpuid::Visible;
use super::domain::CpuState;
use super::events::SavedEvents;
use super::machine::Machine;
use super::time::SavedTime;
use crate::machine::lock;
use crate::vcpu::state::VcpuState;

const KIND: &str = "pv-machine";
const VERSION: u32 = 1;
/// Where `syscall` leads: the only MSRs of a vCPU that its guest depends on.
const MSRS: [u32; 4] = [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084];

/// The state as it is carried.
#[derive(Serialize, Deserialize)]
struct Saved {
    memory: u64,
    trusted: bool,
    hardware: bool,
    uuid: [u8; 16],
    given: u64,
    cpuid: Visible,
    time: SavedTime,
    events: SavedEvents,
    cpus: Vec<SavedCpu>,
    bus: SavedState,
}

#[derive(Serialize, Deserialize)]
struct SavedCpu {
    /// What KVM knows of it.
    registers: SavedState,
    /// What only the monitor knows.
    monitor: CpuState,
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(message: impl ToString) -> lifecycle::Error {
    lifecycle::Error::Device {
        device: KIND.to_owned(),
        message: message.to_string(),
    }
}

impl Machine {
    /// The guest's memory, the hypervisor's area included.
    #[must_use]
    pub fn memory(&self) -> &GuestRam {
        &self.domain.ram
    }

    /// The state of a paused machine.
    ///
    /// # Errors
    /// KVM or a device does not tell its own.
    pub fn save(&self) -> Result<SavedState, lifecycle::Error> {
        let domain = &self.domain;
        let mut cpus = Vec::new();
        for (vcpu, cpu) in self.vcpus.iter().zip(domain.cpus.iter()) {
            cpus.push(SavedCpu {
                registers: VcpuState::read(&vcpu.paused_fd(), &MSRS)?.pack()?,
                monitor: cpu.state().clone(),
            });
        }
        let saved = Saved {
            memory: domain.memory,
            trusted: domain.trusted,
            hardware: domain.hardware,
            uuid: *lock(&domain.uuid),
            given: domain.given.load(Ordering::Relaxed),
            cpuid: (*domain.cpuid).clone(),
            time: domain.time.save(),
            events: domain.events.save(),
            cpus,
            bus: self.bus.save()?,
        };
        SavedState::pack(KIND, VERSION, &saved)
    }

    /// Takes over a saved state, on an equally configured machine that is paused
    /// or has not been started, with the saved guest's memory in place. It is
    /// paused then.
    ///
    /// # Errors
    /// The state is damaged, too new, or of a machine or processor that differs:
    /// nothing has been touched then. Or KVM or a device refuses its part: the
    /// machine must be reset then.
    pub fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        let saved: Saved = state.unpack(KIND, VERSION)?;
        self.check(&saved)?;
        let domain = &self.domain;
        domain.time.restore(&saved.time).map_err(failed)?;
        domain.events.restore(&saved.events).map_err(failed)?;
        domain.given.store(saved.given, Ordering::Relaxed);
        *lock(&domain.uuid) = saved.uuid;
        for ((vcpu, cpu), saved) in self.vcpus.iter().zip(domain.cpus.iter()).zip(saved.cpus) {
            let mut fd = vcpu.paused_fd();
            VcpuState::unpack(&saved.registers)?.write(&fd)?;
            fd.set_sync_valid_reg(SyncReg::Register);
            *cpu.state() = saved.monitor;
        }
        self.bus.restore(&saved.bus)
    }

    /// Whether a saved machine is like this one.
    fn check(&self, saved: &Saved) -> Result<(), lifecycle::Error> {
        let domain = &self.domain;
        let same = [
            ("memory", saved.memory == domain.memory),
            ("vCPUs", saved.cpus.len() == self.vcpus.len()),
            ("--trust-guest-user", saved.trusted == domain.trusted),
            ("kind of KVM", saved.hardware == domain.hardware),
        ];
        if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
            return Err(failed(format!(
                "the saved guest has other {what}; configure this machine like it"
            )));
        }
        if saved.cpus.iter().any(|cpu| !cpu.monitor.is_sound()) {
            return Err(failed("the saved guest's tables have impossible sizes"));
        }
        domain.cpuid.fits(&saved.cpuid).map_err(failed)
    }
}
