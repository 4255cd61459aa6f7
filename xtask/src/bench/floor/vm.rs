//! The machine that the `floor` payload runs in: `firmware/src/bin/floor.rs`
//! says how its memory looks.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blanket_memory::{Backing, GuestRam, Spec};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const MEMORY: u64 = 32 << 20;
/// Where the payload sees the descriptors and stacks of ring 0.
const VIEW: u64 = 0x40_0000;
/// Where the kernel's lie, and those of user code.
const KERNEL_VIEW: u64 = 0x60_0000;
const USER_VIEW: u64 = VIEW;
const OTHER: u64 = 0x80_0000;
const GATES: u64 = 0xa0_0000;
const KERNEL: u64 = 0xc0_0000;
const ENTRY: u64 = 0xe0_0000;
const KERNEL_STACK: u64 = 0xd0_0000;
const RESULTS: u64 = 0x21_0000;
/// Within a view.
const TSS: u64 = 0x2000;
const GDT: u64 = 0x6000;
const TOP_CALL: u64 = 0x8400;
const TOP_FAULT: u64 = 0x8600;
const TOP_BACK: u64 = 0x8800;
const TOP_OTHER: u64 = 0x8a00;

/// Offsets of the gates that user code reaches.
const GATE_CALL: u64 = 0;
const GATE_FAULT: u64 = 0x40;
const GATE_OTHER: u64 = 0x80;

const CODE0: u16 = 0x10;
const DATA3: u16 = 0x2b;
const CODE3: u16 = 0x33;
const TASK: u16 = 0x40;

const PORT_END: u16 = 0xf1;
const PORT_EXIT: u16 = 0xf2;

/// Page table entry: present, writable, accessed and dirty; for user code; a
/// page of 2 MiB.
const RING0: u64 = 0x63;
const USER: u64 = 0x67;
const LARGE: u64 = 0x80;

/// What the payload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Operation {
    /// A system call that does nothing.
    SystemCall = 0,
    /// The first access to a page.
    PageFault = 1,
    /// Two system calls, between them a page with its page tables: map, touch,
    /// unmap.
    OnePage = 2,
    /// To another process and back, with two system calls each.
    TwoProcesses = 3,
    /// A new address space with page tables for two regions, a page of each
    /// touched, its end: two system calls.
    AddressSpace = 4,
    /// A system call that loads the kernel's page table anew.
    Flush = 5,
    /// A system call that flushes an address from the kernel's page table.
    Invalidation = 6,
    /// An exit, for whoever has the machine to answer.
    Exit = 7,
}

/// The machine, with a payload that has not begun.
pub(super) struct Machine {
    // The VM has to end before its memory.
    vcpu: VcpuFd,
    _vm: VmFd,
    ram: GuestRam,
}

impl Machine {
    /// One whose payload at `path` will do `operation`, `rounds` times in each of
    /// `batches`.
    ///
    /// # Errors
    /// There is no KVM, or no payload.
    pub(super) fn new(
        path: &Path,
        operation: Operation,
        batches: u64,
        rounds: u64,
    ) -> Result<Self> {
        let (ram, entry) = loaded(path)?;
        Self::with(ram, entry, operation, batches, rounds)
    }

    fn with(
        ram: GuestRam,
        entry: u64,
        operation: Operation,
        batches: u64,
        rounds: u64,
    ) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = kvm.create_vm()?;
        for (slot, region) in ram.iter().enumerate() {
            let mapping = kvm_userspace_memory_region {
                slot: u32::try_from(slot)?,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: `ram` is kept for as long as the VM is.
            unsafe { vm.set_user_memory_region(mapping) }?;
        }
        let vcpu = vcpu(&kvm, &vm)?;
        vcpu.set_regs(&kvm_regs {
            rip: entry,
            rflags: 2,
            rdi: operation as u64,
            rsi: batches,
            r12: rounds,
            r13: RESULTS,
            ..Default::default()
        })?;
        Ok(Self { vcpu, _vm: vm, ram })
    }

    /// Lets the payload go on to its next exit; false: it has ended.
    ///
    /// # Errors
    /// KVM or the payload does not do what it must.
    pub(super) fn go_on(&mut self) -> Result<bool> {
        let exit = match self.vcpu.run()? {
            VcpuExit::IoOut(PORT_END, _) => return Ok(false),
            VcpuExit::IoOut(PORT_EXIT, _) => return Ok(true),
            other => format!("{other:?}"),
        };
        let at = self.vcpu.get_regs()?.rip;
        bail!("the floor payload ends with {exit} at {at:#x}");
    }
}

/// The memory of a machine with the payload at `path`, and where it begins.
fn loaded(path: &Path) -> Result<(GuestRam, u64)> {
    let ram = blanket_memory::build(&Spec {
        size: MEMORY,
        backing: Backing::Transparent,
        shared: false,
    })?;
    let mut file = File::open(path).with_context(|| format!("{}", path.display()))?;
    let entry = Elf::load(&ram, None, &mut file, None)?.kernel_load.0;
    page_tables(&ram)?;
    view(&ram, USER_VIEW, true)?;
    view(&ram, KERNEL_VIEW, false)?;
    Ok((ram, entry))
}

/// What it takes from nothing but memory to a guest's first exit: a VM, its
/// memory, a vCPU, and nothing else.
///
/// # Errors
/// KVM or the payload does not do what it must.
pub(super) fn first_exit(path: &Path) -> Result<Duration> {
    let (ram, entry) = loaded(path)?;
    let start = Instant::now();
    let mut machine = Machine::with(ram, entry, Operation::Exit, 1, 1)?;
    machine.go_on()?;
    Ok(start.elapsed())
}

/// Runs `operation`, `rounds` times in each of `batches`; the nanoseconds that
/// one took in each batch.
///
/// # Errors
/// KVM or the payload at `path` does not do what it must.
pub(super) fn run(
    path: &Path,
    operation: Operation,
    batches: u64,
    rounds: u64,
) -> Result<Vec<f64>> {
    let mut machine = Machine::new(path, operation, batches, rounds)?;
    while machine.go_on()? {}
    let khz = f64::from(machine.vcpu.get_tsc_khz()?);
    let batch = |index: u64| -> Result<f64> {
        let ticks: u64 = machine.ram.read_obj(GuestAddress(RESULTS + 8 * index))?;
        ensure!(ticks > 0, "{operation:?}: batch {index} took no time");
        Ok(ticks as f64 * 1e6 / khz / rounds as f64)
    };
    (0..batches).map(batch).collect()
}

fn page_tables(ram: &GuestRam) -> Result<()> {
    let entry =
        |table: u64, index: u64, value: u64| ram.write_obj(value, GuestAddress(table + 8 * index));
    // Top tables, and what they share.
    for (top, third) in [
        (0x1000, 0x2000),
        (0xa000, 0x2000),
        (0x5000, 0x6000),
        (0xb000, 0x6000),
    ] {
        entry(top, 0, third | USER)?;
        entry(top, 1, 0xd000 | USER)?;
    }
    entry(0xd000, 0, 0xe000 | USER)?;
    entry(0xe000, 0, 0x9000 | USER)?;
    for (third, second, first, kernel) in [
        (0x2000, 0x3000, 0x4000, true),
        (0x6000, 0x7000, 0x8000, false),
    ] {
        entry(third, 0, second | USER)?;
        let both = [
            (0x20_0000, 0x20_0000 | USER),
            (
                VIEW,
                if kernel {
                    KERNEL_VIEW | USER
                } else {
                    USER_VIEW | RING0
                },
            ),
            (GATES, GATES | if kernel { USER } else { RING0 }),
        ];
        let its_own = [
            (0, USER),
            (OTHER, USER_VIEW | USER),
            (KERNEL, KERNEL | USER),
        ];
        for (at, value) in both.iter().chain(its_own.iter().filter(|_| kernel)) {
            entry(second, at >> 21, value | LARGE)?;
        }
        if !kernel {
            entry(second, ENTRY >> 21, first | USER)?;
            // User code reads and executes it only.
            entry(first, 0, ENTRY | USER & !2)?;
        }
    }
    Ok(())
}

/// Descriptors and stacks of ring 0, as user code or the kernel meets them.
fn view(ram: &GuestRam, at: u64, user: bool) -> Result<()> {
    let word = |offset: u64, value: u64| ram.write_obj(value, GuestAddress(at + offset));
    let gate = |vector: u64, handler: u64, stack: u64| {
        let low = handler & 0xffff | u64::from(CODE0) << 16 | stack << 32 | 0xee00 << 32;
        word(16 * vector, low | (handler >> 16 & 0xffff) << 48)?;
        word(16 * vector + 8, handler >> 32)
    };
    for vector in 0..256 {
        gate(vector, GATES + GATE_OTHER, 4)?;
    }
    if user {
        gate(3, GATES + GATE_CALL, 1)?;
        gate(14, GATES + GATE_FAULT, 2)?;
    } else {
        // Where to is the payload's business.
        gate(3, GATES, 3)?;
    }
    for (index, top) in [TOP_CALL, TOP_FAULT, TOP_BACK, TOP_OTHER]
        .into_iter()
        .enumerate()
    {
        word(TSS + 0x24 + 8 * index as u64, VIEW + top)?;
    }
    // The permission map begins at the end: ring 3 may use every port.
    ram.write_obj(0x68u16, GuestAddress(at + TSS + 0x66))?;
    ram.write_obj(0xffu8, GuestAddress(at + TSS + 0x2068))?;
    word(GDT + u64::from(CODE0), 0x00af_9b00_0000_ffff)?;
    word(GDT + u64::from(DATA3 & !7), 0x00cf_f300_0000_ffff)?;
    word(GDT + u64::from(CODE3 & !7), 0x00af_fb00_0000_ffff)?;
    word(
        GDT + u64::from(TASK),
        0x0000_8900_0000_2068 | (VIEW + TSS) << 16 & 0xff_ffff_0000,
    )?;
    // Frames to ring 3: on the kernel's view to the kernel, on the user code's
    // what the kernel completes.
    let frame = |offset: u64, rip: u64| {
        let words = [rip, CODE3.into(), 2, KERNEL_STACK, DATA3.into()];
        (0..5).try_for_each(|i| word(offset + 8 * i, words[i as usize]))
    };
    if user {
        frame(TOP_BACK - 40, 0)?;
    } else {
        frame(TOP_CALL - 40, KERNEL)?;
        // Lower by the error code and r11.
        frame(TOP_FAULT - 56, KERNEL + 8)?;
    }
    Ok(())
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

fn vcpu(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(CODE3, 0xb, true);
    let data = segment(DATA3, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: VIEW + TSS,
        limit: 0x2068,
        selector: TASK,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (VIEW + GDT, 0x4f);
    (sregs.idt.base, sregs.idt.limit) = (VIEW, 0xfff);
    sregs.cr3 = 0x5000;
    // PAE, OSFXSR; system calls, long mode; protection, ET, NE, WP, paging.
    sregs.cr4 = 1 << 5 | 1 << 9;
    sregs.efer = 1 | 1 << 8 | 1 << 10;
    sregs.cr0 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    vcpu.set_sregs(&sregs)?;
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    // STAR, LSTAR, and no flag is masked.
    let star = 0x23 << 48 | u64::from(CODE0) << 32;
    let msrs = [
        msr(0xc000_0081, star),
        msr(0xc000_0082, ENTRY),
        msr(0xc000_0084, 0),
    ];
    let msrs = Msrs::from_entries(&msrs).context("model-specific registers")?;
    ensure!(
        vcpu.set_msrs(&msrs)? == 3,
        "KVM refuses where system calls arrive"
    );
    Ok(vcpu)
}
