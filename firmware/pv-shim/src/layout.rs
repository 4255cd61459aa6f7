//! Where everything lies in the hypervisor's area of a guest, and what the
//! shim and the monitor tell each other there.
//!
//! The area is one region of guest memory from [`GPA`] on that every address
//! space of the guest shows at [`VA`]. It is the guest kernel's to read and to
//! write (it runs in the same ring as the shim): the monitor trusts nothing in
//! it. An address space of guest *user* code shows of it only what the
//! processor needs to get out of there, unreadable but for the entry page.

/// Guest-physical address of the area.
pub const GPA: u64 = 0x40_0000_0000;
/// Its virtual address: slot 257 of the top page table, the second of those
/// that Xen keeps for itself.
pub const VA: u64 = 0xffff_8080_0000_0000;
/// Where the shim sees guest memory from address 0 on: slot 258.
pub const DIRECT_MAP: u64 = 0xffff_8100_0000_0000;
/// Slot of the area in a top page table.
pub const SLOT: u64 = 257;
/// Slot of the direct map.
pub const DIRECT_SLOT: u64 = 258;

/// Offset of `shared_info`.
pub const SHARED_INFO: u64 = 0;
/// Offset of the table of doorbells: a byte per event channel, 1 where the
/// other end is a backend that waits at [`DOORBELL_PORT`].
pub const DOORBELLS: u64 = 0x1000;
/// Offset of the grant table.
pub const GRANT_TABLE: u64 = 0x2000;
/// Pages of the grant table.
pub const GRANT_FRAMES: u32 = 32;
/// Offset of the hypervisor's own page tables: see [`PageTables`].
pub const PAGE_TABLES: u64 = 0x10_0000;
/// Bytes kept for them.
pub const PAGE_TABLES_SIZE: u64 = 0x8_0000;
/// Offset of the first vCPU's part.
pub const VCPUS: u64 = 0x20_0000;
/// Bytes of a vCPU's part.
pub const VCPU_SIZE: u64 = 0x4_0000;
/// vCPUs that a pv machine can have.
pub const MAX_VCPUS: u64 = 16;
/// Offset of the table from machine frame to frame number, 8 bytes each.
pub const M2P: u64 = 0x80_0000;

/// Guest-physical address of the local APIC: out of the way of memory.
pub const APIC_GPA: u64 = 0x3f_ffff_f000;

/// Port that the shim writes an event channel's number to.
pub const DOORBELL_PORT: u16 = 0x510;
/// Port that calls the monitor: [`Call`] says what for.
pub const CALL_PORT: u16 = 0xf0;

/// Interrupt vector: look at the event channels.
pub const EVENT_VECTOR: u8 = 0xf2;
/// Interrupt vector: the vCPU's timer.
pub const TIMER_VECTOR: u8 = 0xf3;

/// Parts of a vCPU's part, as offsets from its start.
pub mod vcpu {
    /// The shim's code, the same for all vCPUs but for what it patches.
    pub const CODE: u64 = 0;
    /// Bytes of it at most.
    pub const CODE_SIZE: u64 = 0x4000;
    /// Where `syscall` arrives, in the kernel's address spaces.
    pub const ENTRY: u64 = 0x4000;
    /// [`super::Data`].
    pub const DATA: u64 = 0x5000;
    /// The interrupt descriptors that kernel code meets.
    pub const IDT: u64 = 0x6000;
    /// Those that user code meets, at [`IDT`] in its address spaces.
    pub const USER_IDT: u64 = 0x7000;
    /// Frames of exceptions from the kernel, and landing frames.
    pub const STACK: u64 = 0x8000;
    /// Frames of exceptions from user code, and frames to return to it; at
    /// [`STACK`] in its address spaces.
    pub const USER_STACK: u64 = 0x9000;
    /// The task state segment.
    pub const TSS: u64 = 0xa000;
    /// Where `syscall` arrives in user address spaces, at [`ENTRY`] there.
    pub const USER_ENTRY: u64 = 0xb000;
    /// The local APIC's registers.
    pub const APIC: u64 = 0xc000;
    /// The task state segment of user code, which may not ring doorbells; at
    /// [`TSS`] in its address spaces.
    pub const USER_TSS: u64 = 0xd000;
    /// The global descriptors.
    pub const GDT: u64 = 0x1_0000;
    /// Bytes of them.
    pub const GDT_SIZE: u64 = 0x1_0000;
}

/// Selectors of the hypervisor's own descriptors, in the part of the table
/// that Xen keeps for itself.
pub mod selector {
    /// Code of ring 0.
    pub const CODE0: u16 = 0xe008;
    /// Data of ring 0.
    pub const DATA0: u16 = 0xe010;
    /// 64-bit code of ring 3 (`FLAT_RING3_CS64`).
    pub const CODE3: u16 = 0xe033;
    /// Data of ring 3 (`FLAT_RING3_SS64`).
    pub const DATA3: u16 = 0xe02b;
    /// 32-bit code of ring 3 (`FLAT_RING3_CS32`).
    pub const CODE32: u16 = 0xe023;
    /// The task state segment.
    pub const TSS: u16 = 0xe040;
    /// 64-bit code of ring 3 in every Linux table: what the guest really runs
    /// with.
    pub const LINUX_CODE3: u16 = 0x33;
    /// 32-bit code of ring 3 in every Linux table.
    pub const LINUX_CODE32: u16 = 0x23;
    /// Data of both.
    pub const LINUX_DATA3: u16 = 0x2b;
}

/// Offsets on the stack page of the frames that the processor pushes: five
/// words, before them the error code where there is one.
pub mod frame {
    /// Page fault in the kernel (error code first).
    pub const KERNEL_FAULT: u64 = 0x400 - 48;
    /// `int3` in the kernel; on the user's stack page: frame to return to user
    /// code.
    pub const DOOR: u64 = 0x500 - 40;
    /// Interrupt that ends a halt.
    pub const WOKEN: u64 = 0x600 - 40;
    /// Other exceptions without error code, of both.
    pub const OTHER: u64 = 0x800 - 40;
    /// Page fault in user code (error code first); on the kernel's stack page:
    /// landing frame.
    pub const USER_FAULT: u64 = 0x900 - 48;
    /// `int3` in user code.
    pub const USER_DOOR: u64 = 0xa00 - 40;
    /// Interrupt in user code. (KVM may deliver one twice: the second frame is
    /// [`SECOND`] lower.)
    pub const USER_INTERRUPT: u64 = 0xc00 - 40;
    /// From a frame on the stack of ring 0 to that of the next.
    pub const SECOND: u64 = 48;
    /// Where an interrupt wakes a halted vCPU to (on the kernel's page).
    pub const WAKE: u64 = 0xd00;
    /// Where a kernel page fault lands.
    pub const FAULT_LANDING: u64 = 0xd40;
    /// Where an interrupt of user code lands that shares the kernel's view.
    pub const TRUSTED_LANDING: u64 = 0xdc0;
    /// The top of the page: the shim's own stack.
    pub const TOP: u64 = 0x1000;
}

/// Interrupt stacks: index in the task state segment (1 to 7) and top.
/// That of ring 0 is [`frame::USER_INTERRUPT`]'s.
pub const INTERRUPT_STACKS: [u64; 7] = [
    frame::KERNEL_FAULT + 48,
    frame::DOOR + 40,
    frame::WOKEN + 40,
    frame::OTHER + 40,
    frame::USER_FAULT + 48,
    frame::USER_DOOR + 40,
    0,
];

/// What a call of the monitor is for ([`Data::call`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Call {
    /// A hypercall: number in RAX, arguments in RDI, RSI, RDX, R10, R8, R9.
    Hypercall = 0,
    /// A breakpoint of user code: [`Context`] is complete but for R11, which
    /// is in CR2.
    UserBreakpoint = 1,
    /// The guest's kernel has no usable stack for an exception.
    NoStack = 2,
    /// The shim met something that it has no answer for.
    Broken = 3,
    /// A return to guest code that the shim does not do: to an unusual code
    /// segment, or with flags that need care. [`Context`] is complete.
    Return = 4,
    /// A page fault of the kernel on a present page: [`Context`] is complete,
    /// the error code included. It may be an update of a page table.
    Protection = 5,
    /// User code executed `int 0x80` or `syscall` from 32-bit code.
    Spare = 6,
}

/// A context of the guest: registers that the shim uses itself.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Context {
    /// RAX.
    pub rax: u64,
    /// RCX.
    pub rcx: u64,
    /// R11.
    pub r11: u64,
    /// RIP.
    pub rip: u64,
    /// Code segment.
    pub cs: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RSP.
    pub rsp: u64,
    /// Stack segment.
    pub ss: u64,
    /// Error code of the exception to deliver.
    pub error: u64,
    /// Where the guest's kernel handles what is to be delivered.
    pub handler: u64,
    /// Not zero: push the error code.
    pub has_error: u8,
    /// Not zero: the handler starts with events masked.
    pub mask: u8,
    /// Unused.
    pub pad: [u8; 6],
}

/// What shim and monitor share of one vCPU.
#[repr(C)]
pub struct Data {
    /// Not zero: the guest's kernel runs, not its user code.
    pub kernel_mode: u8,
    /// Not zero: kernel and user code share one address space.
    pub trusted: u8,
    /// Not zero: a multicall is being worked on.
    pub in_multicall: u8,
    /// Not zero: system calls begin with events masked.
    pub syscall_masks: u8,
    /// Not zero: the timer's interrupt ended a halt.
    pub timer_fired: u8,
    /// Not zero: a page table has to be loaded before the kernel runs on.
    pub flush: u8,
    /// Not zero: the vCPU is halted, or otherwise loads its page table before
    /// it runs guest code again.
    pub asleep: u8,
    /// Unused.
    pub pad0: u8,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// Unused.
    pub pad1: u32,
    /// What the monitor is called for: [`Call`].
    pub call: u64,
    /// Virtual address of the vCPU's `vcpu_info`.
    pub vcpu_info: u64,
    /// The kernel's stack for entries from user code.
    pub kernel_sp: u64,
    /// GS base of the kernel.
    pub kernel_gs: u64,
    /// GS base of user code.
    pub user_gs: u64,
    /// Handler of system calls.
    pub syscall_handler: u64,
    /// Handler of page faults.
    pub fault_handler: u64,
    /// Handler of events; 0: none yet.
    pub event_handler: u64,
    /// The kernel's page table.
    pub kernel_cr3: u64,
    /// The user code's page table.
    pub user_cr3: u64,
    /// Bytes of guest memory from address 0 on.
    pub memory: u64,
    /// Entry of [`SLOT`] in top page tables of the kernel.
    pub kernel_slot: u64,
    /// Entry of [`DIRECT_SLOT`] in top page tables of the kernel.
    pub direct_slot: u64,
    /// Entry of [`SLOT`] in top page tables of user code.
    pub user_slot: u64,
    /// Event channel of the timer; 0: none.
    pub timer_port: u64,
    /// R11 for the return to user code, and of what the user's gates left.
    pub r11: u64,
    /// Where a hypercall returns to.
    pub ret: u64,
    /// Where a hypercall returns to that jumped here; 0: none does.
    pub jumps_return: u64,
    /// The jump itself: it faults while the kernel has no base of GS, which
    /// it loads by a hypercall.
    pub jumps_from: u64,
    /// Scratch of the hypercall at work.
    pub scratch: [u64; 4],
    /// Entries of the multicall: the next, and how many are left.
    pub multicall: [u64; 2],
    /// Context of the exception or return at work.
    pub context: Context,
    /// RAX, RCX, R11 of a kernel that met a page fault.
    pub fault: [u64; 3],
    /// RDX, RSI, RDI of it.
    pub fault_scratch: [u64; 3],
    /// RAX and RCX of user code, or of the shim, that was interrupted where
    /// user code shares the kernel's view.
    pub trusted_interrupt: [u64; 2],
    /// RSP of a kernel that halts.
    pub halt_rsp: u64,
    /// Former page tables that KVM has not been told of: direct map.
    pub forget: [u64; 8],
    /// How many there are.
    pub forgotten: u64,
    /// Where the kernel reads its vCPU's run state; 0: nowhere.
    pub runstate: u64,
    /// Bases of FS and of user code's GS that the kernel has set last.
    pub set_bases: [u64; 2],
    /// How often a page table was loaded.
    pub epoch: u64,
    /// Page tables to which a store was slow: see `store` of the shim.
    pub slow_tables: [[u64; 4]; 64],
    /// Counters: see [`COUNTERS`].
    pub counters: [u64; COUNTERS.len()],
    /// Where `syscall` enters ring 0 on hardware that raises the privilege:
    /// frame to ring 3.
    pub hardware: [u64; 5],
}

/// Names of [`Data::counters`].
pub const COUNTERS: [&str; 11] = [
    "hypercalls",
    "mmu_update",
    "update_va_mapping",
    "mmuext",
    "iret",
    "syscalls",
    "user_faults",
    "kernel_faults",
    "user_bits",
    "interrupts",
    "hypercalls_by_syscall",
];

const _: () = {
    assert!(core::mem::size_of::<Data>() <= 0x1000);
    assert!(VCPUS + MAX_VCPUS * VCPU_SIZE <= M2P);
};
