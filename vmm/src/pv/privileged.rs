//! The registers that privileged instructions of the guest's kernel reach.

use std::mem::offset_of;

use blanket_pv_shim::layout::Data;
use vm_memory::{Bytes, GuestAddress};

use super::domain::Domain;
use super::emulate::Privileged;

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_PLATFORM_ID: u32 = 0x17;
const MSR_FEATURE_CONTROL: u32 = 0x3a;
const MSR_MICROCODE: u32 = 0x8b;
const MSR_SYSENTER: std::ops::RangeInclusive<u32> = 0x174..=0x176;
const MSR_PAT: u32 = 0x277;
const MSR_EFER: u32 = 0xc000_0080;
const MSR_SYSCALL_MASK: u32 = 0xc000_0084;
const MSR_FS_BASE: u32 = 0xc000_0100;
const MSR_GS_BASE: u32 = 0xc000_0101;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
const MSR_TSC_AUX: u32 = 0xc000_0103;
const MSR_AMD_PATCH: u32 = 0xc001_0015;
const MSR_AMD_DE_CFG: u32 = 0xc001_1029;
/// Long mode, system calls, no-execute.
const EFER: u64 = 0xd01;
/// What Xen has: the page attributes that Linux expects of it.
const PAT: u64 = 0x0501_0007_0406;
const CR0: u64 = 0x8005_0033;
/// `lfence` serializes.
const DE_CFG: u64 = 1 << 1;

/// Bases of FS and of user code's GS that the kernel has set.
const SET_BASES: usize = offset_of!(Data, set_bases);

/// The registers of a vCPU.
pub(crate) struct Registers<'a> {
    domain: &'a Domain,
    index: usize,
    /// A new FS base, for the processor.
    pub fs_base: Option<u64>,
    /// A new GS base.
    pub gs_base: Option<u64>,
}

impl<'a> Registers<'a> {
    /// Of vCPU `index`.
    #[must_use]
    pub(crate) fn new(domain: &'a Domain, index: usize) -> Self {
        Self {
            domain,
            index,
            fs_base: None,
            gs_base: None,
        }
    }

    fn get(&self, field: usize) -> u64 {
        self.domain.part(self.index).get(field).unwrap_or(0)
    }

    fn set(&self, field: usize, value: u64) -> bool {
        self.domain.part(self.index).set(field, value).is_ok()
    }
}

impl Privileged for Registers<'_> {
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.domain.cpuid.cpuid(self.index, leaf, subleaf)
    }

    fn read_msr(&mut self, index: u32) -> Option<u64> {
        match index {
            MSR_GS_BASE => Some(self.get(offset_of!(Data, kernel_gs))),
            MSR_KERNEL_GS_BASE => Some(self.get(offset_of!(Data, user_gs))),
            MSR_EFER => Some(EFER),
            MSR_PAT => Some(PAT),
            MSR_AMD_DE_CFG => Some(DE_CFG),
            MSR_APIC_BASE | MSR_PLATFORM_ID | MSR_FEATURE_CONTROL | MSR_MICROCODE
            | MSR_AMD_PATCH => Some(0),
            _ => None,
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        match index {
            MSR_FS_BASE => {
                self.fs_base = Some(value);
                self.set(SET_BASES, value)
            }
            MSR_GS_BASE => {
                self.gs_base = Some(value);
                self.set(offset_of!(Data, kernel_gs), value)
            }
            MSR_KERNEL_GS_BASE => {
                self.set(offset_of!(Data, user_gs), value) && self.set(SET_BASES + 8, value)
            }
            // Xen ignores these.
            MSR_EFER..=MSR_SYSCALL_MASK | MSR_PAT | MSR_TSC_AUX | MSR_MICROCODE => true,
            _ => MSR_SYSENTER.contains(&index) || index == MSR_APIC_BASE,
        }
    }

    fn read_cr(&mut self, register: u8) -> Option<u64> {
        match register {
            0 => Some(CR0),
            2 => {
                const CR2: u64 = 16;
                let info = self.domain.events.vcpu_info(self.index)?;
                let at = GuestAddress(info.0 + CR2);
                self.domain.ram.read_obj(at).ok()
            }
            3 => Some(self.get(offset_of!(Data, kernel_cr3))),
            4 => Some(self.domain.cpus[self.index].state().cr4),
            8 => Some(0),
            _ => None,
        }
    }

    fn write_cr(&mut self, register: u8, value: u64) -> bool {
        match register {
            // Task switches of the FPU: the kernel saves it eagerly.
            0 => true,
            4 => {
                self.domain.cpus[self.index].state().cr4 = value;
                true
            }
            _ => false,
        }
    }

    fn read_dr(&mut self, register: u8) -> Option<u64> {
        let state = self.domain.cpus[self.index].state();
        state.debug.get(register.into()).ok()
    }

    fn write_dr(&mut self, register: u8, value: u64) -> bool {
        let set = self.domain.set_debug(self.index, register.into(), value);
        set.is_ok()
    }

    /// There are no devices behind ports.
    fn port_in(&mut self, port: u16, size: u8) -> u32 {
        /// The third counter of a PC's timer. Linux waits for its output to
        /// change when it looks for a clock.
        const PIT_COUNTER: u16 = 0x42;
        if port == PIT_COUNTER {
            return 0;
        }
        u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)))
    }

    fn port_out(&mut self, _port: u16, _size: u8, _value: u32) {}

    fn xsetbv(&mut self, index: u32, value: u64) -> bool {
        // User code has the host's components whatever the kernel wants: it
        // must manage exactly those.
        index == 0 && value == self.domain.cpuid.xcr0()
    }

    fn halt(&mut self) {}
}
