//! The part of Xen's public ABI that the machine's own pieces use: numbers and
//! layouts from `xen/include/public` (x86-64).

use vm_memory::ByteValued;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// Why a hypercall fails (`errno.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Errno {
    /// The domain may not do that.
    Perm = 1,
    /// There is no such thing.
    NoEnt = 2,
    /// An address that is not mapped or may not be written.
    Fault = 14,
    /// It is there already, or in use.
    Exist = 17,
    /// An argument makes no sense.
    Inval = 22,
    /// All are taken.
    NoSpc = 28,
    /// There is no such hypercall or command.
    NoSys = 38,
}

impl Errno {
    /// The value that the hypercall returns in RAX.
    #[must_use]
    pub fn rax(self) -> u64 {
        i64::from(-(self as i32)).cast_unsigned()
    }
}

/// Types of ELF notes named `Xen` (`elfnote.h`).
pub mod note {
    /// The virtual address of the entry point.
    pub const ENTRY: u32 = 1;
    /// The virtual address of the page that gets the hypercall stubs.
    pub const HYPERCALL_PAGE: u32 = 2;
    /// The virtual address that the kernel's first page is mapped to.
    pub const VIRT_BASE: u32 = 3;
    /// What to subtract from the physical addresses of the ELF segments.
    pub const PADDR_OFFSET: u32 = 4;
    /// The features that the kernel can do with, and, behind `!`, needs.
    pub const FEATURES: u32 = 10;
    /// Where the table from frame to machine frame numbers shall be mapped.
    pub const INIT_P2M: u32 = 15;
    /// The kernel takes an initrd that its page tables do not map.
    pub const MOD_START_PFN: u32 = 16;
    /// Entry in 32-bit mode, of kernels for PVH.
    pub const PHYS32_ENTRY: u32 = 18;
}

/// The domain may be told its initrd by frame number (`SIF_MOD_START_PFN`).
pub const SIF_MOD_START_PFN: u32 = 1 << 3;

/// Bytes of the command line in [`StartInfo`], its final zero included.
pub const MAX_GUEST_CMDLINE: usize = 1024;

/// Hypercalls in a hypercall page, and the bytes of each one's stub.
pub const HYPERCALL_STUB: usize = 32;
/// `HYPERVISOR_iret`, whose stub does not return.
pub const HYPERCALL_IRET: u32 = 23;

/// What a new domain finds about itself (`struct start_info`).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct StartInfo {
    /// `xen-<version>-<platform>`.
    pub magic: [u8; 32],
    /// Pages of memory.
    pub nr_pages: u64,
    /// Machine address of [`SharedInfo`].
    pub shared_info: u64,
    /// `SIF_*`.
    pub flags: u32,
    /// Unused.
    pub pad0: u32,
    /// Machine frame of the xenstore's ring.
    pub store_mfn: u64,
    /// Event channel of the xenstore.
    pub store_evtchn: u32,
    /// Unused.
    pub pad1: u32,
    /// Machine frame of the console's ring.
    pub console_mfn: u64,
    /// Event channel of the console.
    pub console_evtchn: u32,
    /// Unused.
    pub pad2: u32,
    /// Virtual address of the top page table.
    pub pt_base: u64,
    /// Page-table pages from there on.
    pub nr_pt_frames: u64,
    /// Virtual address of the table from frame to machine frame numbers.
    pub mfn_list: u64,
    /// Frame of the initrd, with [`SIF_MOD_START_PFN`].
    pub mod_start: u64,
    /// Bytes of the initrd.
    pub mod_len: u64,
    /// The command line, with a zero at its end.
    pub cmd_line: [u8; MAX_GUEST_CMDLINE],
    /// First frame of the table from frame to machine frame numbers.
    pub first_p2m_pfn: u64,
    /// Frames of that table.
    pub nr_p2m_frames: u64,
}

// SAFETY: integers and arrays of them in C layout, padding spelled out; all bit patterns are valid.
unsafe impl ByteValued for StartInfo {}

/// The clock of one vCPU (`struct vcpu_time_info`): the time in nanoseconds is
/// `system_time + (((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul >> 32)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VcpuTimeInfo {
    /// Odd while an update is under way.
    pub version: u32,
    /// Unused.
    pub pad0: u32,
    /// Time-stamp counter of the last update.
    pub tsc_timestamp: u64,
    /// Nanoseconds since the domain started, at the last update.
    pub system_time: u64,
    /// Nanoseconds of a shifted tick, times 2^32.
    pub tsc_to_system_mul: u32,
    /// Shift of ticks, to the left if positive.
    pub tsc_shift: i8,
    /// [`TIME_TSC_STABLE`].
    pub flags: u8,
    /// Unused.
    pub pad1: [u8; 2],
}

// SAFETY: as for StartInfo.
unsafe impl ByteValued for VcpuTimeInfo {}

/// All vCPUs' clocks agree (`XEN_PVCLOCK_TSC_STABLE_BIT`).
pub const TIME_TSC_STABLE: u8 = 1;

/// What hypervisor and one vCPU tell each other (`struct vcpu_info`).
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct VcpuInfo {
    /// Not zero: an event is pending that has not been looked at.
    pub evtchn_upcall_pending: u8,
    /// Not zero: no upcalls, please.
    pub evtchn_upcall_mask: u8,
    /// Unused.
    pub pad0: [u8; 6],
    /// Words of [`SharedInfo::evtchn_pending`] that may have bits set.
    pub evtchn_pending_sel: u64,
    /// Address of the last page fault (`arch.cr2`).
    pub cr2: u64,
    /// Unused.
    pub pad1: u64,
    /// The clock.
    pub time: VcpuTimeInfo,
}

/// vCPUs that have their [`VcpuInfo`] in [`SharedInfo`] (`XEN_LEGACY_MAX_VCPUS`).
pub const LEGACY_MAX_VCPUS: usize = 32;

/// What hypervisor and domain tell each other (`struct shared_info`).
#[repr(C)]
pub struct SharedInfo {
    /// Of the first vCPUs, until they register one elsewhere.
    pub vcpu_info: [VcpuInfo; LEGACY_MAX_VCPUS],
    /// One bit per event channel.
    pub evtchn_pending: [u64; 64],
    /// One bit per event channel.
    pub evtchn_mask: [u64; 64],
    /// Odd while the wall clock is being updated.
    pub wc_version: u32,
    /// Seconds since 1970 at system time 0, lower half.
    pub wc_sec: u32,
    /// Nanoseconds to be added.
    pub wc_nsec: u32,
    /// Seconds, upper half.
    pub wc_sec_hi: u32,
    /// Highest frame number (`arch.max_pfn`).
    pub max_pfn: u64,
    /// Frame of the list of lists of frames, for tools.
    pub pfn_to_mfn_frame_list_list: u64,
    /// Reasons of an NMI.
    pub nmi_reason: u64,
}

/// Event channels of the two-level ABI (`EVTCHN_2L_NR_CHANNELS`).
pub const EVENT_CHANNELS: u32 = 4096;

/// Virtual interrupts (`VIRQ_*` in `xen.h`).
pub mod virq {
    /// A vCPU's timer.
    pub const TIMER: u32 = 0;
    /// A request to dump state.
    pub const DEBUG: u32 = 1;
    /// A sample of the profiler.
    pub const XENOPROF: u32 = 7;
    /// A performance counter.
    pub const XENPMU: u32 = 13;
    /// How many numbers there are.
    pub const COUNT: u32 = 24;

    /// Whether each vCPU has its own.
    #[must_use]
    pub fn is_per_vcpu(virq: u32) -> bool {
        matches!(virq, TIMER | DEBUG | XENOPROF | XENPMU)
    }
}

/// What a vCPU has been doing (`struct vcpu_runstate_info` in `vcpu.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VcpuRunstateInfo {
    /// `RUNSTATE_*`.
    pub state: u32,
    /// Unused.
    pub pad0: u32,
    /// System time at which the state was entered.
    pub state_entry_time: u64,
    /// Nanoseconds in each state.
    pub time: [u64; 4],
}

// SAFETY: as for StartInfo.
unsafe impl ByteValued for VcpuRunstateInfo {}

const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<StartInfo>() == 1168);
    assert!(offset_of!(StartInfo, cmd_line) == 128);
    assert!(size_of::<VcpuTimeInfo>() == 32);
    assert!(size_of::<VcpuInfo>() == 64);
    assert!(offset_of!(SharedInfo, evtchn_mask) == 2560);
    assert!(offset_of!(SharedInfo, wc_version) == 3072);
    assert!(size_of::<VcpuRunstateInfo>() == 48);
};
