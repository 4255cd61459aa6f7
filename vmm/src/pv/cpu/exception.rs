//! Exceptions that the shim does not deliver itself.

use std::mem::offset_of;

use blanket_pv_shim::Label;
use blanket_pv_shim::layout::{Context, Data, frame, selector, vcpu};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use std::sync::atomic::Ordering;

use super::{PvCpu, Step, Stop};
use crate::pv::emulate::{self, Emulated};
use crate::pv::mmu::Space;
use crate::pv::shim::{label, part_va};
use crate::vcpu::Event;

const DEBUG: u8 = 1;
const INVALID_OPCODE: u8 = 6;
const GENERAL_PROTECTION: u8 = 13;
/// Vector of 32-bit Linux's system calls.
const INT80: u8 = 0x80;

/// Flags of the shim's code in ring 0: bit 1 is always set.
const RING0_FLAGS: u64 = 2;

/// Whether the processor pushes an error code.
fn has_error(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// An exception that came to the monitor.
struct Exception {
    vector: u8,
    error: Option<u64>,
    /// RIP, CS, RFLAGS, RSP, SS.
    frame: [u64; 5],
    /// It came in an address space of user code.
    user_view: bool,
}

impl PvCpu {
    pub(super) fn exception(&mut self, fd: &mut VcpuFd, vector: u8, regs: &mut kvm_regs) -> Step {
        self.domain.cpus[self.index]
            .exceptions
            .fetch_add(1, Ordering::Relaxed);
        let exception = self.read(fd, vector, regs)?;
        let [rip, cs, ..] = exception.frame;
        let offset = rip.wrapping_sub(part_va(self.index));
        if vector == DEBUG {
            let mut state = self.domain.cpus[self.index].state();
            let ring0 = cs as u16 == selector::CODE0;
            if ring0 || (offset < vcpu::DATA && !exception.user_view) {
                // The shim has used memory that the guest watches, or makes
                // single steps for user code, and goes on.
                state.debug.reload = true;
                return Ok(());
            }
            state.debug.hit(fd.get_debug_regs()?.dr6);
        }
        if cs as u16 == selector::CODE0 {
            return self.failed_return(&exception, regs);
        }
        if exception.user_view && (vcpu::ENTRY..vcpu::DATA).contains(&offset) {
            // The way back from a system call: it is where RCX says.
            let mut exception = exception;
            exception.frame[0] = regs.rcx;
            return self.of_user(&exception, regs);
        }
        if offset < vcpu::DATA {
            return self.in_shim(&exception, regs);
        }
        if self.part().get8(offset_of!(Data, kernel_mode))? != 0 {
            self.of_kernel(fd, &exception, regs)
        } else {
            self.of_user(&exception, regs)
        }
    }

    fn read(&self, fd: &VcpuFd, vector: u8, regs: &kvm_regs) -> Step<Exception> {
        let part = self.part();
        let stack = part_va(self.index) + vcpu::STACK;
        let mut at = regs.rsp.wrapping_sub(stack);
        if at > frame::TOP - 48 {
            return Err(Stop::Broken("its stack is elsewhere"));
        }
        let user = part.get8(offset_of!(Data, kernel_mode))? == 0
            && part.get8(offset_of!(Data, trusted))? == 0;
        let user_view = user && fd.get_sregs()?.cr3 != part.get(offset_of!(Data, kernel_cr3))?;
        let page = if user_view {
            vcpu::USER_STACK
        } else {
            vcpu::STACK
        };
        let mut error = None;
        if has_error(vector) {
            error = Some(part.read_frame(page, at)?[0]);
            at += 8;
        }
        Ok(Exception {
            vector,
            error,
            frame: part.read_frame(page, at)?,
            user_view,
        })
    }

    /// Goes on in the shim, in the kernel's address space.
    fn go(&self, regs: &mut kvm_regs, user_view: bool, words: [u64; 5]) -> Step {
        let part = self.part();
        part.write_frame(vcpu::STACK, frame::OTHER, words)?;
        regs.rsp = part_va(self.index) + vcpu::STACK + frame::OTHER;
        // Ring 0 is not interrupted: some gates lead from ring 3 to ring 3.
        regs.rflags = RING0_FLAGS;
        if user_view {
            part.set(offset_of!(Data, r11), regs.r11)?;
            regs.r11 = part.get(offset_of!(Data, kernel_cr3))?;
            regs.rip = label(self.index, Label::Return);
        } else {
            regs.rip = label(self.index, Label::Iret);
        }
        Ok(())
    }

    /// Points a context to the guest's handler of a vector.
    pub(super) fn aim(&self, context: &mut Context, vector: u8, error: Option<u64>) -> Step {
        const MASKS_EVENTS: u8 = 4;
        let trap = self.domain.cpus[self.index]
            .state()
            .traps
            .get(usize::from(vector))
            .copied()
            .unwrap_or_default();
        if trap.address == 0 {
            return Err(Stop::Event(Event::Failed(format!(
                "the guest met exception {vector} (error code {error:x?}) at {:#x} and has no handler for it",
                context.rip
            ))));
        }
        context.handler = trap.address;
        context.mask = u8::from(trap.flags & MASKS_EVENTS != 0);
        context.has_error = u8::from(error.is_some());
        context.error = error.unwrap_or(0);
        Ok(())
    }

    fn deliver(&self, regs: &mut kvm_regs, user_view: bool, context: Context) -> Step {
        self.part().set_context(context)?;
        let landing = self.part().landing(Label::Deliver);
        self.go(regs, user_view, landing)
    }

    fn context(regs: &kvm_regs, [rip, cs, rflags, rsp, ss]: [u64; 5]) -> Context {
        Context {
            rax: regs.rax,
            rcx: regs.rcx,
            r11: regs.r11,
            rip,
            cs,
            rflags,
            rsp,
            ss,
            ..Context::default()
        }
    }

    /// The kernel's: privileged instructions are emulated.
    fn of_kernel(&mut self, fd: &VcpuFd, exception: &Exception, regs: &mut kvm_regs) -> Step {
        let [rip, cs, rflags, rsp, ss] = exception.frame;
        if matches!(exception.vector, INVALID_OPCODE | GENERAL_PROTECTION) {
            let mut code = [0; 15];
            let len = self.read_code(rip, &mut code);
            let mut guest = kvm_regs {
                rip,
                rflags,
                rsp,
                ..*regs
            };
            let mut privileged = super::super::privileged::Registers::new(&self.domain, self.index);
            if emulate::privileged(&mut guest, &code[..len], &mut privileged) == Emulated::Done {
                if privileged.fs_base.is_some() || privileged.gs_base.is_some() {
                    let mut sregs = fd.get_sregs()?;
                    sregs.fs.base = privileged.fs_base.unwrap_or(sregs.fs.base);
                    sregs.gs.base = privileged.gs_base.unwrap_or(sregs.gs.base);
                    fd.set_sregs(&sregs)?;
                }
                if emulate::does_nothing(code[0]) {
                    // It would come here each time: some early code of Linux
                    // does thousands of times.
                    let _ = self.domain.space(self.index).write(rip, &[emulate::NOP]);
                }
                *regs = guest;
                let frame = [guest.rip, cs, guest.rflags, guest.rsp, ss];
                return self.go(regs, false, frame);
            }
        }
        let mut context = Self::context(regs, exception.frame);
        context.cs = u64::from(selector::CODE3 & !3);
        context.ss = u64::from(selector::DATA3);
        self.aim(&mut context, exception.vector, exception.error)?;
        self.deliver(regs, exception.user_view, context)
    }

    /// Up to 15 bytes of code.
    fn read_code(&self, rip: u64, code: &mut [u8; 15]) -> usize {
        let space: Space<'_> = self.domain.space(self.index);
        // A page may end in between.
        let room = (4096 - rip % 4096).min(15) as usize;
        if space.read(rip, code).is_ok() {
            15
        } else if space.read(rip, &mut code[..room]).is_ok() {
            room
        } else {
            0
        }
    }

    fn of_user(&mut self, exception: &Exception, regs: &mut kvm_regs) -> Step {
        let mut context = Self::context(regs, exception.frame);
        let (mut vector, mut error) = (exception.vector, exception.error);
        if matches!(vector, INVALID_OPCODE | GENERAL_PROTECTION) {
            // Where KVM does not know `int` it says so by the first exception; a processor finds
            // no gate and says so by the second.
            let mut code = [0; 15];
            let len = self.read_code(context.rip, &mut code);
            if let [0xcd, number, ..] = code[..len] {
                let dpl = {
                    let state = self.domain.cpus[self.index].state();
                    state
                        .traps
                        .get(usize::from(number))
                        .map_or(0, |t| t.flags & 3)
                };
                if number == INT80 && dpl == 3 {
                    context.rip += 2;
                    (vector, error) = (number, None);
                } else {
                    const IN_TABLE: u64 = 2;
                    vector = GENERAL_PROTECTION;
                    error = Some((u64::from(number) * 8) | IN_TABLE);
                }
            }
        }
        self.aim(&mut context, vector, error)?;
        self.deliver(regs, exception.user_view, context)
    }

    /// Ring 0 code of the shim faults only when it returns to segments or
    /// addresses that do not exist: the fault is then the user code's.
    fn failed_return(&mut self, exception: &Exception, regs: &mut kvm_regs) -> Step {
        let at = exception.frame[0];
        let returns = [Label::IretUser, Label::IretSyscall];
        if !returns.iter().any(|r| label(self.index, *r) == at) {
            return Err(Stop::Event(Event::Failed(format!(
                "exception {} (error code {:x?}) in ring 0 of the shim, at {at:#x}",
                exception.vector, exception.error
            ))));
        }
        let frame = self.part().read_frame(vcpu::USER_STACK, frame::DOOR)?;
        let mut context = Self::context(regs, frame);
        self.aim(&mut context, GENERAL_PROTECTION, Some(0))?;
        self.deliver(regs, true, context)
    }

    /// The shim's ring 3 code faults on values of the guest only.
    fn in_shim(&mut self, exception: &Exception, regs: &mut kvm_regs) -> Step {
        let offset = exception.frame[0].wrapping_sub(part_va(self.index));
        if exception.vector == GENERAL_PROTECTION && offset == Label::Doorbell.offset() {
            // QEMU's emulated processor refuses ports to ring 3 of a guest with
            // a 64-bit task state segment that is busy, as any in use is.
            let _ = self.domain.events.send(regs.rax as u32);
            let mut frame = exception.frame;
            frame[0] = label(self.index, Label::Rung);
            return self.go(regs, exception.user_view, frame);
        }
        if offset == Label::IretTrusted.offset() {
            // As where ring 0 returns to user code.
            let stack = self.domain.space(self.index).get(exception.frame[3]);
            let frame = stack.map_err(|_| Stop::Broken("its kernel's stack is gone"))?;
            let mut context = Self::context(regs, frame);
            self.aim(&mut context, GENERAL_PROTECTION, Some(0))?;
            return self.deliver(regs, false, context);
        }
        let hypercalls = Label::Entry.offset()..Label::IretHypercall.offset();
        if exception.vector == GENERAL_PROTECTION && hypercalls.contains(&offset) {
            let mut frame = exception.frame;
            frame[0] = label(self.index, Label::Invalid);
            return self.go(regs, exception.user_view, frame);
        }
        Err(Stop::Event(Event::Failed(format!(
            "exception {} (error code {:x?}) in the shim, at offset {offset:#x}: the guest gave it a value that no kernel gives",
            exception.vector, exception.error
        ))))
    }
}
