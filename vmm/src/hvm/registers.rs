//! A vCPU's registers at its first instruction.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::boot::{Entry, GDT_ADDRESS, PAGE_TABLES_ADDRESS, START_INFO_ADDRESS, ZERO_PAGE_ADDRESS};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

/// A flat segment: 4 GiB from 0 on.
fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The general registers for `entry`.
#[must_use]
pub(super) fn general(entry: Entry) -> kvm_regs {
    match entry {
        Entry::Linux64(rip) => kvm_regs {
            rip,
            rsi: ZERO_PAGE_ADDRESS,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        },
        Entry::Pvh(rip) => kvm_regs {
            rip,
            rbx: START_INFO_ADDRESS,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        },
    }
}

/// The special registers for `entry`, on top of those after power-on.
#[must_use]
pub(super) fn special(entry: Entry, power_on: &kvm_sregs) -> kvm_sregs {
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    const BUSY_TSS: u8 = 0xb;
    let mut sregs = *power_on;
    let long = matches!(entry, Entry::Linux64(_));
    let (code, data) = if long { (0x10, 0x18) } else { (0x8, 0x10) };
    sregs.cs = flat(code, CODE, long);
    let segment = kvm_segment {
        db: 1,
        ..flat(data, DATA, false)
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) =
        (segment, segment, segment, segment, segment);
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: BUSY_TSS,
        present: 1,
        ..Default::default()
    };
    if long {
        sregs.gdt.base = GDT_ADDRESS;
        sregs.gdt.limit = 31;
        sregs.cr3 = PAGE_TABLES_ADDRESS;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    } else {
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
    }
    sregs
}
