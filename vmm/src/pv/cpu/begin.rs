//! A vCPU's registers when it begins.

use std::mem::offset_of;

use blanket_pv_shim::Label;
use blanket_pv_shim::layout::{self, Data, selector, vcpu};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_xcrs};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::{PvCpu, Step, Stop};
use crate::pv::domain::Begin;
use crate::pv::shim::{TSS_LIMIT, label, part_va};

const CR0: u64 = 0x8005_0033;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
/// System calls, long mode, no-execute.
const EFER: u64 = 0xd01;
const APIC_ENABLED: u64 = 1 << 11;
const MSR_TSC: u32 = 0x10;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SYSCALL_MASK: u32 = 0xc000_0084;
/// What real hardware clears on `syscall`: the shim's ring 0 entry must not be
/// interrupted or single-stepped. (It finds the flags in R11.)
const HARDWARE_MASK: u64 = 0x4_7700;

fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: if code { 11 } else { 3 },
        present: 1,
        dpl: 3,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

impl PvCpu {
    pub(super) fn begin(&self, fd: &mut VcpuFd, begin: &Begin) -> Step {
        let va = part_va(self.index);
        let mut sregs = fd.get_sregs()?;
        let data = segment(selector::LINUX_DATA3, false);
        sregs.cs = segment(selector::LINUX_CODE3, true);
        (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
        sregs.fs = kvm_segment {
            base: begin.fs_base,
            ..data
        };
        sregs.gs = kvm_segment {
            base: begin.gs_base,
            ..data
        };
        sregs.tr = kvm_segment {
            base: va + vcpu::TSS,
            limit: TSS_LIMIT as u32,
            selector: selector::TSS,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        // Nobody loads a local table.
        sregs.ldt = kvm_segment {
            unusable: 1,
            ..Default::default()
        };
        sregs.gdt.base = va + vcpu::GDT;
        sregs.gdt.limit = 0xffff;
        sregs.idt.base = va + vcpu::IDT;
        sregs.idt.limit = 0xfff;
        sregs.cr0 = CR0;
        sregs.cr3 = begin.cr3;
        sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE;
        let sets_state = self.domain.hardware && self.domain.cpuid.has_xsave();
        if sets_state {
            sregs.cr4 |= CR4_OSXSAVE;
        }
        sregs.efer = EFER;
        sregs.apic_base = layout::APIC_GPA | APIC_ENABLED | sregs.apic_base & (1 << 8);
        fd.set_sregs(&sregs)?;
        if sets_state {
            let mut xcrs = kvm_xcrs {
                nr_xcrs: 1,
                ..Default::default()
            };
            xcrs.xcrs[0].value = self.domain.cpuid.xcr0();
            fd.set_xcrs(&xcrs)?;
        }
        fd.set_vcpu_events(&kvm_bindings::kvm_vcpu_events::default())?;
        self.set_entry(fd)?;
        self.set_apic(fd)?;
        fd.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 0 })?;
        let regs = kvm_regs {
            rflags: 0x202,
            ..begin.regs
        };
        fd.set_regs(&regs)?;
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.sync_regs_mut().regs = regs;
        self.part()
            .set(offset_of!(Data, kernel_gs), begin.gs_base)?;
        self.part().set8(offset_of!(Data, kernel_mode), 1)?;
        self.part().set8(offset_of!(Data, asleep), 0)?;
        self.domain.write_time(self.index);
        Ok(())
    }

    /// Where `syscall` goes to.
    fn set_entry(&self, fd: &VcpuFd) -> Step {
        const SYSRET_BASE: u64 = (selector::LINUX_DATA3 - 8) as u64;
        let (entry, mask) = if self.domain.hardware {
            (label(self.index, Label::HardwareEntry), HARDWARE_MASK)
        } else {
            (part_va(self.index) + vcpu::ENTRY, 0)
        };
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        if self.domain.hardware {
            // The guest's counter is the host's, as it is elsewhere.
            // SAFETY: every x86-64 processor has this instruction.
            let now = unsafe { std::arch::x86_64::_rdtsc() };
            let cstar = label(self.index, Label::Entry32);
            let own = Msrs::from_entries(&[msr(MSR_TSC, now), msr(MSR_CSTAR, cstar)]);
            fd.set_msrs(&own.map_err(|_| Stop::Broken("no room"))?)?;
        }
        let msrs = Msrs::from_entries(&[
            msr(
                MSR_STAR,
                SYSRET_BASE << 48 | u64::from(selector::CODE0) << 32,
            ),
            msr(MSR_LSTAR, entry),
            msr(MSR_SYSCALL_MASK, mask),
        ])
        .map_err(|_| Stop::Broken("no room"))?;
        fd.set_msrs(&msrs)?;
        Ok(())
    }

    /// The local APIC: on, its timer in TSC-deadline mode.
    fn set_apic(&self, fd: &VcpuFd) -> Step {
        const IN_SERVICE: usize = 0x100;
        const VECTORS: usize = 0x80;
        const SPURIOUS: usize = 0xf0;
        const TIMER: usize = 0x320;
        const ON: u32 = 1 << 8;
        const DEADLINE_MODE: u32 = 2 << 17;
        let mut apic = fd.get_lapic()?;
        // What the last life of the guest left in service or requested.
        apic.regs[IN_SERVICE..IN_SERVICE + 3 * VECTORS].fill(0);
        for (register, value) in [
            (SPURIOUS, ON | 0xff),
            (TIMER, DEADLINE_MODE | u32::from(layout::TIMER_VECTOR)),
        ] {
            for (byte, value) in apic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
                *byte = value.cast_signed();
            }
        }
        fd.set_lapic(&apic)?;
        Ok(())
    }
}
