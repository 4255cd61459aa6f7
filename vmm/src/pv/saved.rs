//! A whole pv machine's state, but for its memory.
//!
//! Guest memory (the hypervisor's area included) is carried by whoever moves
//! the machine, and is in place before the state is restored.
//!
//! A guest that was stopped anywhere goes on as it was, its devices' rings
//! included. One that has suspended itself (`SCHEDOP_shutdown`) finds a new
//! domain when it is restored: event channels, grants, timers and connections
//! are gone, its `start_info` says where the new ones are, and it sets itself up
//! again. Where the very machine in which it suspended itself is resumed, it is
//! told that the suspension was cancelled, and everything is as it was.

use std::mem::offset_of;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blanket_devices::lifecycle::{self, Lifecycle, SavedState};
use blanket_devices::xen::BACKEND;
use blanket_devices::xen::bus::SharedPages;
use blanket_pv_shim::layout;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{SyncReg, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::abi::{PAGE_SIZE, StartInfo};
use super::cpuid::Visible;
use super::domain::CpuState;
use super::events::SavedEvents;
use super::machine::{Machine, SHARED_INFO};
use super::mmu::Space;
use super::time::SavedTime;
use crate::machine::lock;
use crate::vcpu::Vcpu;
use crate::vcpu::state::VcpuState;

const KIND: &str = "pv-machine";
const VERSION: u32 = 1;
/// Where `syscall` leads: the only MSRs of a vCPU that its guest depends on.
const MSRS: [u32; 4] = [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084];
const MSR_TSC: u32 = 0x10;

/// What a guest that has suspended itself finds when it goes on: the result of
/// its hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspension {
    /// A new domain.
    Resumed = 0,
    /// Everything as it was.
    Cancelled = 1,
}

/// The state as it is carried.
#[derive(Serialize, Deserialize)]
struct Saved {
    memory: u64,
    trusted: bool,
    hardware: bool,
    /// Identifies the code that is in the hypervisor's area of guest memory.
    shim: u32,
    /// The frame of `start_info`, if the guest has suspended itself.
    suspended: Option<u64>,
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

/// What two machines have in common between which a guest can move.
#[derive(Serialize, Deserialize)]
struct Look {
    memory: u64,
    cpus: usize,
    trusted: bool,
    hardware: bool,
    shim: u32,
    cpuid: Visible,
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(message: impl ToString) -> lifecycle::Error {
    lifecycle::Error::Device {
        device: KIND.to_owned(),
        message: message.to_string(),
    }
}

impl Machine {
    /// See [`crate::machine::Machine::save`].
    pub(super) fn saved(&self) -> Result<SavedState, lifecycle::Error> {
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
            shim: shim(),
            suspended: *lock(&domain.suspended),
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

    /// Has vCPUs at rest go on a little that wait for a breakpoint's exception.
    ///
    /// KVM does not tell of such an exception, because it is raised again by the
    /// instruction where that is executed again. KVM without hardware has gone
    /// past it already: whoever goes on from the saved registers would never see
    /// it. The shim's ways into ring 0 are such instructions.
    pub(super) fn pass_traps(&self) {
        const TRIES: usize = 500;
        const SLICE: Duration = Duration::from_micros(50);
        for _ in 0..TRIES {
            let waits = |vcpu: &&Vcpu| self.is_behind_trap(vcpu);
            let waiting: Vec<_> = self.vcpus.iter().filter(waits).collect();
            if waiting.is_empty() {
                return;
            }
            for vcpu in &waiting {
                vcpu.resume();
            }
            std::thread::sleep(SLICE);
            for vcpu in waiting {
                vcpu.pause();
                vcpu.wait_paused();
            }
        }
        // A guest that does nothing else; it can be paused, and saved at its risk.
        tracing::warn!("a vCPU meets nothing but breakpoints");
    }

    /// Whether the instruction before a vCPU's next one is a breakpoint.
    fn is_behind_trap(&self, vcpu: &Vcpu) -> bool {
        const BREAKPOINT: u8 = 0xcc;
        let domain = &self.domain;
        let fd = vcpu.paused_fd();
        let (Ok(registers), Ok(special)) = (fd.get_regs(), fd.get_sregs()) else {
            return false;
        };
        if domain.hardware || special.cs.dpl != 3 {
            return false;
        }
        let before = registers.rip.wrapping_sub(1);
        let mut byte = [0];
        let space = Space::new(&domain.ram, special.cr3);
        space.read(before, &mut byte).is_ok() && byte[0] == BREAKPOINT
    }

    /// See [`crate::machine::Machine::check`].
    pub(super) fn fits(&self, state: &SavedState) -> Result<(), lifecycle::Error> {
        self.unpack(state).map(drop)
    }

    /// See [`crate::machine::Machine::restore`].
    pub(super) fn restored(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        let saved = self.unpack(state)?;
        let domain = &self.domain;
        domain.time.restore(&saved.time).map_err(failed)?;
        domain.events.restore(&saved.events).map_err(failed)?;
        domain.given.store(saved.given, Ordering::Relaxed);
        *lock(&domain.uuid) = saved.uuid;
        *lock(&domain.suspended) = None;
        for ((vcpu, cpu), saved) in self.vcpus.iter().zip(domain.cpus.iter()).zip(saved.cpus) {
            let mut fd = vcpu.paused_fd();
            VcpuState::unpack(&saved.registers)?.write(&fd)?;
            if domain.hardware {
                set_tsc(&fd)?;
            }
            fd.set_sync_valid_reg(SyncReg::Register);
            *cpu.state() = saved.monitor;
            // One may have been on its way.
            cpu.interrupt();
        }
        match saved.suspended {
            Some(start_info) => self.renew(start_info, &saved.bus),
            None => self.bus.restore(&saved.bus),
        }
    }

    /// Makes a new domain of it for a guest that has suspended itself.
    fn renew(&mut self, start_info: u64, bus: &SavedState) -> Result<(), lifecycle::Error> {
        let domain = &self.domain;
        domain.events.renew();
        let port = || domain.events.alloc_unbound(BACKEND);
        let port = || port().map_err(|error| failed(format!("event channels: {error:?}")));
        let (store, console) = (port()?, port()?);
        domain
            .tell_timers()
            .map_err(|_| failed("the hypervisor's area is not in memory"))?;
        for frame in 0..u64::from(layout::GRANT_FRAMES) {
            let at = layout::GPA + layout::GRANT_TABLE + frame * PAGE_SIZE;
            let cleared = domain
                .ram
                .write_slice(&[0; PAGE_SIZE as usize], GuestAddress(at));
            cleared.map_err(failed)?;
        }
        for cpu in domain.cpus.iter() {
            let mut state = cpu.state();
            state.deadline = None;
            state.time_area = 0;
        }
        let pages = self.bus.restore_renewed(bus, store, console)?;
        self.tell(start_info, &pages).map_err(failed)?;
        self.answer_suspension(Suspension::Resumed)
    }

    /// Says in the guest's `start_info` what is new, as Xen's tools do.
    fn tell(&self, frame: u64, pages: &SharedPages) -> Result<(), vm_memory::GuestMemoryError> {
        let ram = &self.domain.ram;
        let at = |field: usize| GuestAddress((frame * PAGE_SIZE).wrapping_add(field as u64));
        for (field, value) in [
            (
                offset_of!(StartInfo, nr_pages),
                self.domain.memory / PAGE_SIZE,
            ),
            (offset_of!(StartInfo, shared_info), SHARED_INFO.0),
            (
                offset_of!(StartInfo, store_mfn),
                pages.store.address / PAGE_SIZE,
            ),
            (
                offset_of!(StartInfo, console_mfn),
                pages.console.address / PAGE_SIZE,
            ),
        ] {
            ram.write_obj(value, at(field))?;
        }
        for (field, value) in [
            (offset_of!(StartInfo, flags), 0),
            (offset_of!(StartInfo, store_evtchn), pages.store.port),
            (offset_of!(StartInfo, console_evtchn), pages.console.port),
        ] {
            ram.write_obj(value, at(field))?;
        }
        Ok(())
    }

    /// Gives the guest the result of its suspension. Its first vCPU made it.
    pub(super) fn answer_suspension(&self, result: Suspension) -> Result<(), lifecycle::Error> {
        let fd = self.vcpus[0].paused_fd();
        let mut registers = fd.get_regs().map_err(failed)?;
        registers.rax = result as u64;
        fd.set_regs(&registers).map_err(failed)
    }

    /// A saved state, of a machine like this one.
    fn unpack(&self, state: &SavedState) -> Result<Saved, lifecycle::Error> {
        let saved: Saved = state.unpack(KIND, VERSION)?;
        let domain = &self.domain;
        self.resembles(&Look {
            memory: saved.memory,
            cpus: saved.cpus.len(),
            trusted: saved.trusted,
            hardware: saved.hardware,
            shim: saved.shim,
            cpuid: saved.cpuid.clone(),
        })?;
        let sound = |cpu: &SavedCpu| cpu.monitor.is_sound();
        let frames = domain.memory / PAGE_SIZE;
        if !saved.cpus.iter().all(sound) || saved.suspended.is_some_and(|frame| frame >= frames) {
            return Err(failed("the saved guest's tables have impossible sizes"));
        }
        domain.time.fits(&saved.time).map_err(failed)?;
        Ok(saved)
    }

    /// See [`crate::machine::Machine::likeness`].
    pub(super) fn look(&self) -> Result<SavedState, lifecycle::Error> {
        let domain = &self.domain;
        let look = Look {
            memory: domain.memory,
            cpus: self.vcpus.len(),
            trusted: domain.trusted,
            hardware: domain.hardware,
            shim: shim(),
            cpuid: (*domain.cpuid).clone(),
        };
        SavedState::pack(KIND, VERSION, &look)
    }

    /// See [`crate::machine::Machine::is_like`].
    pub(super) fn compare(&self, likeness: &SavedState) -> Result<(), lifecycle::Error> {
        self.resembles(&likeness.unpack(KIND, VERSION)?)
    }

    fn resembles(&self, look: &Look) -> Result<(), lifecycle::Error> {
        let domain = &self.domain;
        let same = [
            ("memory", look.memory == domain.memory),
            ("vCPUs", look.cpus == self.vcpus.len()),
            ("--trust-guest-user", look.trusted == domain.trusted),
            ("kind of KVM", look.hardware == domain.hardware),
        ];
        if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
            return Err(failed(format!(
                "the saved guest has other {what}; configure this machine like it"
            )));
        }
        if look.shim != shim() {
            return Err(failed(
                "the saved guest has another version of the hypervisor's code in its memory; \
                 restore it with the version that saved it",
            ));
        }
        domain.cpuid.fits(&look.cpuid).map_err(failed)
    }
}

/// Identifies the code that this version has in guest memory.
fn shim() -> u32 {
    crc32fast::hash(blanket_pv_shim::code())
}

/// The guest's counter is the host's, as it is elsewhere.
fn set_tsc(fd: &VcpuFd) -> Result<(), lifecycle::Error> {
    let entry = kvm_msr_entry {
        index: MSR_TSC,
        // SAFETY: every x86-64 processor has this instruction.
        data: unsafe { std::arch::x86_64::_rdtsc() },
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[entry]).map_err(|error| failed(format!("{error:?}")))?;
    fd.set_msrs(&msrs).map(drop).map_err(failed)
}
