//! What a program in ring 3 needs around it, to be a guest of its own.

use blanket_memory::GuestRam;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const PAGE_TABLES: u64 = 0x9000;
const TSS: u64 = 0x2_0000;
const GDT: u64 = 0x500;

/// Gives a VM its memory, which has to live as long as its vCPUs.
pub(crate) fn map(vm: &VmFd, ram: &GuestRam, flags: u32) {
    for (slot, region) in ram.iter().enumerate() {
        let mapping = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the caller keeps the memory.
        unsafe { vm.set_user_memory_region(mapping) }.unwrap();
    }
}

/// The tables of the processor.
pub(crate) fn tables(ram: &GuestRam) {
    page_tables(ram);
    task_state(ram);
}

/// Maps the first GiB to itself for user code, with 2 MiB pages.
fn page_tables(ram: &GuestRam) {
    const USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let entry = |value: u64, at: u64| ram.write_obj(value, GuestAddress(at)).unwrap();
    entry((PAGE_TABLES + 0x1000) | USER, PAGE_TABLES);
    entry((PAGE_TABLES + 0x2000) | USER, PAGE_TABLES + 0x1000);
    for page in 0..512 {
        entry(page << 21 | USER | LARGE, PAGE_TABLES + 0x2000 + 8 * page);
    }
}

/// A task state segment whose permission map allows every port.
fn task_state(ram: &GuestRam) {
    const MAP: u16 = 0x68;
    ram.write_slice(&[0; 0x2068], GuestAddress(TSS)).unwrap();
    ram.write_obj(MAP, GuestAddress(TSS + 0x66)).unwrap();
    ram.write_obj(0xffu8, GuestAddress(TSS + 0x2067)).unwrap();
    // Null, kernel code and data, user data and code: flat.
    let descriptors = [
        0u64,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (i, descriptor) in descriptors.iter().enumerate() {
        let at = GuestAddress(GDT + 8 * i as u64);
        ram.write_obj(*descriptor, at).unwrap();
    }
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 3,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    }
}

/// Has a vCPU go on in ring 3, with these registers.
pub(crate) fn enter(fd: &VcpuFd, regs: &kvm_regs) {
    let mut sregs = fd.get_sregs().unwrap();
    sregs.cs = segment(0x23, 0xb, true);
    let data = segment(0x1b, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x2067,
        selector: 0x28,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 39;
    sregs.cr3 = PAGE_TABLES;
    // PAE, OSFXSR; long mode; protection, ET, NE, WP, paging.
    sregs.cr4 = 1 << 5 | 1 << 9;
    sregs.efer = 1 << 8 | 1 << 10;
    sregs.cr0 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    fd.set_sregs(&sregs).unwrap();
    fd.set_regs(&kvm_regs { rflags: 2, ..*regs }).unwrap();
}
