//! A vCPU of a pv machine: what the shim calls the monitor for.
//!
//! Every exit finds the vCPU in ring 0 behind an `out`, with a frame of five
//! words at its stack pointer: the context that called. Going on is an `iretq`
//! from there; what has to be done on the way (push a frame for the guest's
//! kernel, change the address space) the shim does.

mod begin;
mod exception;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blanket_pv_shim::Label;
use blanket_pv_shim::layout::{self, Call, Data};
use kvm_bindings::{Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vm_memory::GuestMemoryError;

use super::debug::Debug;
use super::domain::{Domain, Online};
use super::hypercall::{Answer, Hypercall};
use super::runstate::State;
use super::shim::{Part, label};
use crate::vcpu::{Counters, Event, Outcome, Processor, complete_access, exits, interrupted};

/// A vCPU that is down looks at its life at least so often.
const DOWN_CHECK: Duration = Duration::from_secs(1);
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// A guest that leaves often is told its run states no more often than this, in
/// nanoseconds: it reads them at its ticks.
const ACCOUNT_EVERY: u64 = 1_000_000;

/// What a vCPU's thread works with.
pub(crate) struct PvCpu {
    domain: Arc<Domain>,
    index: usize,
    attached: bool,
    /// The system time at which its guest was told its run states.
    accounted: u64,
}

/// Why a guest cannot go on.
enum Stop {
    /// The machine has something to do.
    Event(Event),
    /// The hypervisor's area is not what it must be.
    Broken(&'static str),
}

impl From<GuestMemoryError> for Stop {
    fn from(_: GuestMemoryError) -> Self {
        Self::Broken("its memory is gone")
    }
}

impl From<kvm_ioctls::Error> for Stop {
    fn from(error: kvm_ioctls::Error) -> Self {
        Self::Event(Event::Failed(format!(
            "KVM refuses a vCPU's registers: {error}"
        )))
    }
}

type Step<T = ()> = Result<T, Stop>;

impl PvCpu {
    /// vCPU `index` of `domain`.
    #[must_use]
    pub(crate) fn new(domain: Arc<Domain>, index: usize) -> Self {
        Self {
            domain,
            index,
            attached: false,
            accounted: 0,
        }
    }

    fn part(&self) -> Part<'_> {
        self.domain.part(self.index)
    }

    /// Whether it is to run: one that begins gets its registers.
    fn online(&mut self, fd: &mut VcpuFd) -> Step<bool> {
        let cpu = &self.domain.cpus[self.index];
        if !self.attached {
            cpu.attach();
            self.attached = true;
        }
        let mut state = cpu.state();
        if state.online != Online::Up {
            let running = state.run.state() != State::Offline;
            drop(state);
            if running {
                self.domain.enter(self.index, State::Offline);
            }
            cpu.sleep(DOWN_CHECK);
            return Ok(false);
        }
        if state.run.state() == State::Offline {
            drop(state);
            self.domain.enter(self.index, State::Running);
            state = cpu.state();
        }
        if let Some(begin) = state.begin.take() {
            drop(state);
            self.begin(fd, &begin)?;
        }
        Ok(true)
    }

    fn answer(&mut self, fd: &mut VcpuFd, port: u16) -> Step {
        let mut regs = fd.sync_regs().regs;
        match port {
            layout::CALL_PORT => self.called(fd, &mut regs)?,
            0..32 => self.exception(fd, port as u8, &mut regs)?,
            _ => return Err(Stop::Broken("it uses a port that nobody has")),
        }
        fd.sync_regs_mut().regs = regs;
        fd.set_sync_dirty_reg(SyncReg::Register);
        Ok(())
    }

    fn called(&mut self, fd: &mut VcpuFd, regs: &mut kvm_regs) -> Step {
        regs.rip = label(self.index, Label::Iret);
        let call = self.part().get(offset_of!(Data, call))?;
        match call {
            c if c == Call::Hypercall as u64 => self.hypercall(fd, regs),
            c if c == Call::UserBreakpoint as u64 => {
                let mut context = self.part().context()?;
                context.r11 = fd.get_sregs()?.cr2;
                self.aim(&mut context, 3, None)?;
                self.part().set_context(context)?;
                Ok(())
            }
            c if c == Call::Protection as u64 => Ok(()),
            c if c == Call::NoStack as u64 => Err(Stop::Event(Event::Failed(format!(
                "the guest's kernel has no stack for an exception ({:x?})",
                self.part().context()?
            )))),
            _ => Err(Stop::Broken("it calls for nothing that exists")),
        }
    }

    fn hypercall(&mut self, fd: &mut VcpuFd, regs: &mut kvm_regs) -> Step {
        let hypercall = Hypercall {
            domain: &self.domain,
            index: self.index,
            number: regs.rax,
            arguments: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
        };
        match hypercall.call() {
            Answer::Value(value) => regs.rax = value,
            Answer::Down => regs.rax = 0,
            Answer::Event(event) => {
                regs.rax = 0;
                fd.sync_regs_mut().regs = *regs;
                fd.set_sync_dirty_reg(SyncReg::Register);
                return Err(Stop::Event(event));
            }
        }
        Ok(())
    }

    /// Tells the guest its run states now and then.
    fn account(&mut self) {
        let now = self.domain.time.now();
        // A guest that starts anew has a new clock.
        if now.abs_diff(self.accounted) >= ACCOUNT_EVERY {
            self.accounted = now;
            self.domain.enter(self.index, State::Running);
        }
    }

    /// Loads the debug registers if the guest has set its own.
    fn load_debug(&self, fd: &VcpuFd) -> Step {
        let (db, dr7) = {
            let mut state = self.domain.cpus[self.index].state();
            if !std::mem::take(&mut state.debug.reload) {
                return Ok(());
            }
            state.debug.registers()
        };
        fd.set_debug_regs(&kvm_debugregs {
            db,
            dr6: Debug::CLEAR,
            dr7,
            ..Default::default()
        })?;
        Ok(())
    }

    /// Sets the local APIC's timer if the guest has set its own.
    fn arm(&self, fd: &VcpuFd) -> Step {
        let deadline = {
            let mut state = self.domain.cpus[self.index].state();
            if !std::mem::take(&mut state.rearm) {
                return Ok(());
            }
            state.deadline
        };
        let data = deadline.map_or(0, |at| self.domain.time.tsc_at(at).max(1));
        let entry = kvm_msr_entry {
            index: MSR_TSC_DEADLINE,
            data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| Stop::Broken("no room"))?;
        fd.set_msrs(&msrs)?;
        Ok(())
    }
}

impl Processor for PvCpu {
    fn step(&mut self, fd: &mut VcpuFd, counters: &Counters) -> Outcome {
        let result = self.online(fd).and_then(|online| {
            if !online {
                return Ok(Outcome::Continue);
            }
            // A pause may have moved its clock.
            self.arm(fd)?;
            self.load_debug(fd)?;
            let cpu = &self.domain.cpus[self.index];
            let in_guest = &cpu.in_guest;
            cpu.entries.fetch_add(1, Ordering::SeqCst);
            in_guest.store(true, Ordering::SeqCst);
            let exit = fd.run();
            in_guest.store(false, Ordering::SeqCst);
            self.account();
            let port = match exit {
                Ok(VcpuExit::IoOut(port, _)) => port,
                Ok(VcpuExit::Intr) => return Ok(interrupted(counters)),
                Ok(VcpuExit::InternalError) => {
                    return Ok(Outcome::Event(Event::Failed(exits::internal(fd))));
                }
                Ok(VcpuExit::Shutdown) => return Err(Stop::Broken("a fault met a fault")),
                Ok(other) => return Ok(exits::other(&other)),
                Err(error) => return Ok(exits::failed_run(error, counters)),
            };
            counters.io.add();
            self.answer(fd, port).map(|()| Outcome::Continue)
        });
        result.unwrap_or_else(|stop| {
            Outcome::Event(match stop {
                Stop::Event(event) => event,
                Stop::Broken(why) => {
                    Event::Failed(format!("the guest has broken its hypervisor's area: {why}"))
                }
            })
        })
    }

    fn stop(&mut self, fd: &mut VcpuFd) {
        complete_access(fd);
    }
}
