//! Traps, callbacks, descriptor tables and debug registers.

use std::mem::offset_of;

use blanket_pv_shim::layout::Data;
use vm_memory::{Bytes, GuestAddress};

use super::{Hypercall, Result};
use crate::pv::abi::{Errno, PAGE_SIZE};
use crate::pv::domain::Trap;
use crate::pv::mmu::Space;

/// Types of callbacks (`callback.h`).
const CALLBACK_EVENT: u64 = 0;
const CALLBACK_FAILSAFE: u64 = 1;
const CALLBACK_SYSCALL: u64 = 2;
/// Flag of a callback: it starts with events masked.
const CALLBACK_MASK_EVENTS: u64 = 1;
/// Vector of page faults.
const PAGE_FAULT: usize = 14;
/// Entries of a descriptor table that the guest may have: the rest is Xen's.
const GDT_ENTRIES: u64 = 14 * 512;
const ENTRIES_PER_PAGE: u64 = 512;

/// A descriptor as the guest may have it: no gates, nothing of ring 0.
fn tame(descriptor: u64) -> u64 {
    const PRESENT: u64 = 1 << 47;
    const SEGMENT: u64 = 1 << 44;
    const RING3: u64 = 3 << 45;
    match descriptor {
        d if d & PRESENT == 0 => d,
        d if d & SEGMENT != 0 => d | RING3,
        // A system segment: Linux makes some and uses none.
        d => d & !PRESENT,
    }
}

impl Hypercall<'_> {
    pub(super) fn set_trap_table(&self) -> Result {
        const ENTRY: u64 = 16;
        const MOST: u64 = 256;
        let part = self.domain.part(self.index);
        let space = self.space();
        let mut state = self.domain.cpus[self.index].state();
        if self.arguments[0] == 0 {
            state.traps.fill(Trap::default());
            return Ok(0);
        }
        for i in 0..=MOST {
            let at = self.arguments[0].wrapping_add(i * ENTRY);
            let [word, address]: [u64; 2] = space.get(at)?;
            if address == 0 {
                return Ok(0);
            }
            let vector = (word & 0xff) as usize;
            state.traps[vector] = Trap {
                flags: (word >> 8) as u8,
                address,
            };
            if vector == PAGE_FAULT {
                part.set(offset_of!(Data, fault_handler), address)
                    .map_err(|_| Errno::Fault)?;
            }
        }
        Err(Errno::Inval)
    }

    fn register(&self, kind: u64, flags: u64, address: u64) -> Result {
        let part = self.domain.part(self.index);
        let set = |field| part.set(field, address).map_err(|_| Errno::Fault);
        match kind {
            CALLBACK_EVENT => set(offset_of!(Data, event_handler))?,
            CALLBACK_FAILSAFE => self.domain.cpus[self.index].state().failsafe = address,
            CALLBACK_SYSCALL => {
                set(offset_of!(Data, syscall_handler))?;
                let masks = (flags & CALLBACK_MASK_EVENTS) as u8;
                part.set8(offset_of!(Data, syscall_masks), masks)
                    .map_err(|_| Errno::Fault)?;
            }
            _ => return Err(Errno::Inval),
        }
        Ok(0)
    }

    pub(super) fn callback_op(&self) -> Result {
        const REGISTER: u64 = 0;
        const UNREGISTER: u64 = 1;
        let [command, argument, ..] = self.arguments;
        match command {
            REGISTER => {
                let [kind, address]: [u64; 2] = self.space().get(argument)?;
                self.register(kind & 0xffff, kind >> 16 & 0xffff, address)
            }
            UNREGISTER => Err(Errno::Inval),
            _ => Err(Errno::NoSys),
        }
    }

    pub(super) fn set_callbacks(&self) -> Result {
        let [event, failsafe, syscall, ..] = self.arguments;
        self.register(CALLBACK_EVENT, 0, event)?;
        self.register(CALLBACK_FAILSAFE, 0, failsafe)?;
        self.register(CALLBACK_SYSCALL, 0, syscall)
    }

    pub(super) fn set_gdt(&self) -> Result {
        let [list, entries, ..] = self.arguments;
        self.load_gdt(&self.space(), list, entries)
    }

    /// Takes over a table whose frames are listed at `list` in `space`.
    pub(super) fn load_gdt(&self, space: &Space<'_>, list: u64, entries: u64) -> Result {
        if entries > GDT_ENTRIES {
            return Err(Errno::Inval);
        }
        let frames = (0..entries.div_ceil(ENTRIES_PER_PAGE))
            .map(|i| space.get::<u64>(list.wrapping_add(i * 8)))
            .collect::<Result<Vec<_>>>()?;
        let part = self.domain.part(self.index);
        for i in 0..entries {
            let frame = frames[(i / ENTRIES_PER_PAGE) as usize];
            let at = frame
                .checked_mul(PAGE_SIZE)
                .ok_or(Errno::Inval)?
                .wrapping_add(i % ENTRIES_PER_PAGE * 8);
            let value = self.domain.ram.read_obj(GuestAddress(at));
            let value = value.map_err(|_| Errno::Inval)?;
            part.set_descriptor(i, tame(value))
                .map_err(|_| Errno::Fault)?;
        }
        let mut state = self.domain.cpus[self.index].state();
        state.gdt = frames;
        state.gdt_entries = entries;
        Ok(0)
    }

    pub(super) fn update_descriptor(&self) -> Result {
        let [address, value, ..] = self.arguments;
        let at = GuestAddress(address & !7);
        if at.0 >= self.domain.memory {
            return Err(Errno::Inval);
        }
        self.domain
            .ram
            .write_obj(value, at)
            .map_err(|_| Errno::Inval)?;
        // It may be in use, by any vCPU.
        for (index, cpu) in self.domain.cpus.iter().enumerate() {
            let state = cpu.state();
            for (i, frame) in (0..).zip(&state.gdt) {
                let slot = i * ENTRIES_PER_PAGE + at.0 % PAGE_SIZE / 8;
                if *frame == at.0 / PAGE_SIZE && slot < state.gdt_entries {
                    self.domain
                        .part(index)
                        .set_descriptor(slot, tame(value))
                        .map_err(|_| Errno::Fault)?;
                }
            }
        }
        Ok(0)
    }

    pub(super) fn set_debugreg(&self) -> Result {
        let [register, value, ..] = self.arguments;
        self.domain
            .set_debug(self.index, register, value)
            .map(|()| 0)
    }

    pub(super) fn get_debugreg(&self) -> Result {
        let state = self.domain.cpus[self.index].state();
        state.debug.get(self.arguments[0])
    }

    /// What the shim leaves: the user code's GS selector.
    pub(super) fn set_segment_base(&self) -> Result {
        const USER_GS_SELECTOR: u64 = 3;
        let [which, selector, ..] = self.arguments;
        if which != USER_GS_SELECTOR {
            return Err(Errno::Inval);
        }
        let base = self.segment_base(selector as u16);
        self.domain
            .part(self.index)
            .set(offset_of!(Data, user_gs), base)
            .map_err(|_| Errno::Fault)?;
        Ok(0)
    }

    /// The base that a data segment of ring 3 has; 0 for any other.
    fn segment_base(&self, selector: u16) -> u64 {
        const LOCAL: u16 = 4;
        let index = u64::from(selector >> 3);
        let state = self.domain.cpus[self.index].state();
        let descriptor: u64 = if selector & LOCAL != 0 {
            let (address, entries) = state.ldt;
            if index >= entries {
                return 0;
            }
            self.space().get(address.wrapping_add(index * 8))
        } else {
            let frame = state.gdt.get((index / ENTRIES_PER_PAGE) as usize).copied();
            let at = frame.and_then(|frame| frame.checked_mul(PAGE_SIZE));
            at.map_or(Err(Errno::Inval), |at| {
                let at = GuestAddress(at.wrapping_add(index % ENTRIES_PER_PAGE * 8));
                self.domain.ram.read_obj(at).map_err(|_| Errno::Inval)
            })
        }
        .unwrap_or(0);
        descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_descriptors_give_no_ring_but_its_own() {
        // Code and data of ring 0 become ring 3's.
        assert_eq!(tame(0x00af_9b00_0000_ffff), 0x00af_fb00_0000_ffff);
        assert_eq!(tame(0x00cf_9300_0000_ffff), 0x00cf_f300_0000_ffff);
        // A call gate and a task state segment are not present.
        assert_eq!(tame(0x0000_8c00_0010_0000) >> 47 & 1, 0);
        assert_eq!(tame(0x0000_8900_0000_0067) >> 47 & 1, 0);
        assert_eq!(tame(0), 0);
    }
}
