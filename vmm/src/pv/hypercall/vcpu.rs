//! vCPUs: bringing them up and down, their information areas, their timers.

use std::mem::offset_of;

use blanket_pv_shim::Label;
use blanket_pv_shim::layout::{self, Data};
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Answer, Hypercall, Result};
use crate::pv::abi::{Errno, PAGE_SIZE};
use crate::pv::domain::{Cpu, Online, Trap};
use crate::pv::runstate::State;
use crate::pv::shim::label;
use crate::pv::shortcut;

const INITIALISE: u64 = 0;
const UP: u64 = 1;
const DOWN: u64 = 2;
const IS_UP: u64 = 3;
const GET_RUNSTATE: u64 = 4;
const REGISTER_RUNSTATE: u64 = 5;
const SET_PERIODIC_TIMER: u64 = 6;
const STOP_PERIODIC_TIMER: u64 = 7;
const SET_SINGLESHOT_TIMER: u64 = 8;
const STOP_SINGLESHOT_TIMER: u64 = 9;
const REGISTER_INFO: u64 = 10;
const SEND_NMI: u64 = 11;
const GET_PHYSID: u64 = 12;
const REGISTER_TIME: u64 = 13;

/// Offsets in `struct vcpu_guest_context` (`arch-x86/xen.h`).
mod context {
    pub(super) const REGISTERS: u64 = 520;
    pub(super) const RIP: u64 = REGISTERS + 128;
    pub(super) const RFLAGS: u64 = REGISTERS + 144;
    pub(super) const RSP: u64 = REGISTERS + 152;
    pub(super) const TRAPS: u64 = 720;
    pub(super) const LDT: u64 = 4816;
    pub(super) const GDT_FRAMES: u64 = 4832;
    pub(super) const GDT_ENTRIES: u64 = 4960;
    pub(super) const KERNEL_SP: u64 = 4976;
    pub(super) const CONTROL: u64 = 4984;
    pub(super) const DEBUG: u64 = 5048;
    pub(super) const EVENT: u64 = 5112;
    pub(super) const FAILSAFE: u64 = 5120;
    pub(super) const SYSCALL: u64 = 5128;
    pub(super) const FS_BASE: u64 = 5144;
    pub(super) const KERNEL_GS: u64 = 5152;
    pub(super) const USER_GS: u64 = 5160;
}

impl Hypercall<'_> {
    pub(super) fn vcpu_op(&self) -> Result<Answer> {
        let [command, vcpu, argument, ..] = self.arguments;
        let target = usize::try_from(vcpu)
            .ok()
            .filter(|target| *target < self.domain.cpus.len())
            .ok_or(Errno::NoEnt)?;
        let result = match command {
            INITIALISE => self.initialise(target, argument),
            UP => self.up(target),
            DOWN => return Ok(self.down(target)),
            IS_UP => Ok(u64::from(
                self.domain.cpus[target].state().online == Online::Up,
            )),
            GET_RUNSTATE => {
                let info = self.domain.runstate(target);
                self.space().put(argument, info).map(|()| 0)
            }
            REGISTER_RUNSTATE => self.register_runstate(target, argument),
            STOP_PERIODIC_TIMER => Ok(0),
            SET_SINGLESHOT_TIMER if target == self.index => {
                self.set_timer(Some(self.space().get(argument)?))
            }
            STOP_SINGLESHOT_TIMER if target == self.index => self.set_timer(None),
            REGISTER_INFO => self.register_info(target, argument),
            GET_PHYSID => {
                let id = target as u64;
                self.space().put(argument, id | id << 32).map(|()| 0)
            }
            REGISTER_TIME => {
                let area: u64 = self.space().get(argument)?;
                // 0: none any more, as before a suspension.
                if area != 0 {
                    self.space().put(area, self.domain.time.info())?;
                }
                self.domain.cpus[target].state().time_area = area;
                Ok(0)
            }
            SET_PERIODIC_TIMER | SEND_NMI => Err(Errno::NoSys),
            _ => Err(Errno::NoSys),
        };
        result.map(Answer::Value)
    }

    /// Gives a vCPU that has not been up the registers to begin with.
    fn initialise(&self, target: usize, at: u64) -> Result {
        let space = self.space();
        let word = |offset: u64| space.get::<u64>(at.wrapping_add(offset));
        let cpu = &self.domain.cpus[target];
        if cpu.state().online != Online::Never {
            return Err(Errno::Exist);
        }
        let part = self.domain.part(target);
        let mut traps = vec![Trap::default(); 256];
        for (i, trap) in (0..).zip(&mut traps) {
            let flags = word(context::TRAPS + i * 16)? >> 8;
            trap.flags = flags as u8;
            trap.address = word(context::TRAPS + i * 16 + 8)?;
        }
        let set = |field, value| part.set(field, value).map_err(|_| Errno::Fault);
        set(offset_of!(Data, fault_handler), traps[14].address)?;
        set(offset_of!(Data, event_handler), word(context::EVENT)?)?;
        set(offset_of!(Data, syscall_handler), word(context::SYSCALL)?)?;
        set(offset_of!(Data, kernel_sp), word(context::KERNEL_SP)?)?;
        set(offset_of!(Data, kernel_gs), word(context::KERNEL_GS)?)?;
        set(offset_of!(Data, user_gs), word(context::USER_GS)?)?;
        let cr3 = word(context::CONTROL + 3 * 8)? & !(PAGE_SIZE - 1);
        self.domain.set_kernel_table(target, cr3)?;
        let entries = word(context::GDT_ENTRIES)?;
        Hypercall {
            domain: self.domain,
            index: target,
            number: super::number::SET_GDT,
            arguments: [0; 6],
        }
        .load_gdt(&space, at.wrapping_add(context::GDT_FRAMES), entries)?;
        let register = |i: u64| word(context::REGISTERS + i * 8);
        let regs = kvm_regs {
            r15: register(0)?,
            r14: register(1)?,
            r13: register(2)?,
            r12: register(3)?,
            rbp: register(4)?,
            rbx: register(5)?,
            r11: register(6)?,
            r10: register(7)?,
            r9: register(8)?,
            r8: register(9)?,
            rax: register(10)?,
            rcx: register(11)?,
            rdx: register(12)?,
            rsi: register(13)?,
            rdi: register(14)?,
            rip: word(context::RIP)?,
            rsp: word(context::RSP)?,
            rflags: word(context::RFLAGS)?,
        };
        for register in [0, 1, 2, 3, 6, 7] {
            let value = word(context::DEBUG + register * 8)?;
            self.domain.set_debug(target, register, value)?;
        }
        let mut state = cpu.state();
        state.traps = traps;
        state.failsafe = word(context::FAILSAFE)?;
        state.ldt = (word(context::LDT)?, word(context::LDT + 8)?);
        state.begin = Some(super::super::domain::Begin {
            regs,
            cr3,
            fs_base: word(context::FS_BASE)?,
            gs_base: word(context::KERNEL_GS)?,
        });
        state.online = Online::Down;
        state.run.begin(self.domain.time.now(), State::Offline);
        Ok(0)
    }

    /// From now on the guest finds a vCPU's run states at an address of its
    /// kernel's; 0: nowhere.
    fn register_runstate(&self, target: usize, argument: u64) -> Result {
        let area: u64 = self.space().get(argument)?;
        if area != 0 {
            self.space().put(area, self.domain.runstate(target))?;
        }
        self.domain.cpus[target].state().run.area = area;
        self.domain
            .part(target)
            .set(offset_of!(Data, runstate), area)
            .map_err(|_| Errno::Fault)?;
        Ok(0)
    }

    fn up(&self, target: usize) -> Result {
        let cpu = &self.domain.cpus[target];
        {
            let mut state = cpu.state();
            match state.online {
                Online::Never => return Err(Errno::Inval),
                Online::Up => return Ok(0),
                Online::Down => state.online = Online::Up,
            }
        }
        cpu.kick();
        Ok(0)
    }

    fn down(&self, target: usize) -> Answer {
        self.domain.cpus[target].state().online = Online::Down;
        if target == self.index {
            Answer::Down
        } else {
            self.domain.cpus[target].kick();
            Answer::Value(0)
        }
    }

    /// `struct vcpu_register_vcpu_info`: a frame and an offset in it.
    fn register_info(&self, target: usize, argument: u64) -> Result {
        let frame: u64 = self.space().get(argument)?;
        let offset: u32 = self.space().get(argument.wrapping_add(8))?;
        let at = frame
            .checked_mul(PAGE_SIZE)
            .and_then(|page| page.checked_add(u64::from(offset)))
            .ok_or(Errno::Inval)?;
        self.domain.events.set_vcpu_info(target, GuestAddress(at))?;
        let enter = label(target, Label::Jumped);
        self.domain
            .ram
            .write_obj(enter, GuestAddress(at + shortcut::WORD))
            .map_err(|_| Errno::Fault)?;
        let va = if at < self.domain.memory {
            layout::DIRECT_MAP + at
        } else {
            layout::VA + at.checked_sub(layout::GPA).ok_or(Errno::Inval)?
        };
        self.domain
            .part(target)
            .set(offset_of!(Data, vcpu_info), va)
            .map_err(|_| Errno::Fault)?;
        self.domain.write_time(target);
        if target == self.index {
            // A kernel that does not look as expected goes on as it is.
            let _ = self.take_shortcut(at);
        }
        Ok(0)
    }

    /// Lets the kernel's hypercalls jump to the shim, while it is alone. Its
    /// information area has its final place, at `at`.
    fn take_shortcut(&self, at: u64) -> Result<()> {
        let up = |cpu: &Cpu| cpu.state().online == Online::Up;
        if self.domain.cpus.iter().filter(|cpu| up(cpu)).count() > 1 {
            return Ok(());
        }
        let part = self.domain.part(self.index);
        let field = |field| part.get(field).map_err(|_| Errno::Fault);
        let (space, gs) = (self.space(), field(offset_of!(Data, kernel_gs))?);
        // Linux's per-CPU variables are contiguous: `at` has one address there.
        let info = gs.wrapping_add(at.wrapping_sub(space.translate(gs)?.0));
        let ret = field(offset_of!(Data, ret))?;
        if space.translate(info)?.0 != at {
            return Ok(());
        }
        let Some(from) = shortcut::take(&space, ret, gs, info)? else {
            return Ok(());
        };
        for index in 0..self.domain.cpus.len() {
            let part = self.domain.part(index);
            let set = |field, value| part.set(field, value).map_err(|_| Errno::Fault);
            set(offset_of!(Data, jumps_return), ret)?;
            set(offset_of!(Data, jumps_from), from)?;
        }
        tracing::debug!("the kernel's hypercalls jump to the shim");
        Ok(())
    }

    /// Sets the caller's timer to a system time.
    pub(super) fn set_timer(&self, deadline: Option<u64>) -> Result {
        let mut state = self.domain.cpus[self.index].state();
        state.deadline = deadline;
        state.rearm = true;
        Ok(0)
    }
}

impl super::super::domain::Domain {
    /// Sets the page table that the kernel of a vCPU uses, in a shim that does
    /// not run.
    pub(crate) fn set_kernel_table(&self, index: usize, cr3: u64) -> Result<()> {
        let part = self.part(index);
        let set = |field, value| part.set(field, value).map_err(|_| Errno::Fault);
        set(offset_of!(Data, kernel_cr3), cr3)?;
        for label in [
            Label::ImmediateDoor,
            Label::ImmediateEvent,
            Label::ImmediateFault,
        ] {
            let at = super::super::shim::part_gpa(index) + label.offset();
            self.ram
                .write_obj(cr3, GuestAddress(at))
                .map_err(|_| Errno::Fault)?;
        }
        // Its slots: another kernel's page table has them, or gets them here,
        // as long as nobody uses it.
        for (slot, field) in [
            (layout::SLOT, offset_of!(Data, kernel_slot)),
            (layout::DIRECT_SLOT, offset_of!(Data, direct_slot)),
        ] {
            let entry = part.get(field).map_err(|_| Errno::Fault)?;
            let at = GuestAddress(cr3 + slot * 8);
            if !self.ram.address_in_range(at) || at.0 >= self.memory {
                return Err(Errno::Inval);
            }
            if self.ram.read_obj::<u64>(at).ok() != Some(entry) {
                self.ram.write_obj(entry, at).map_err(|_| Errno::Inval)?;
            }
        }
        Ok(())
    }
}
