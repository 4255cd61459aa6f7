//! What runs inside the address space of a pv machine's guest, between its
//! kernel and its processor: system calls, page faults and the frequent
//! hypercalls are served there without leaving the guest.
//!
//! The guest's kernel runs in ring 3, and so does nearly all of the shim: it
//! protects nothing but user code from user code, as the kernel itself does.
//! The monitor copies [`code`] into each vCPU's part of the hypervisor's area
//! ([`layout`]), and gives each its own data.

#![no_std]

pub mod layout;

use core::arch::global_asm;
use core::mem::offset_of;

use layout::{Context, Data, frame, selector, vcpu};

/// Major version in the upper, minor in the lower 16 bits, as the guest reads.
pub const XEN_VERSION: u32 = 4 << 16 | 17;

/// Event channels of the two-level ABI.
const EVENT_CHANNELS: u32 = 4096;

global_asm!(
    include_str!("asm/ring0.s"),
    include_str!("asm/entry.s"),
    include_str!("asm/mmu.s"),
    include_str!("asm/leave.s"),
    include_str!("asm/user.s"),
    include_str!("asm/kernel.s"),
    DATA = const vcpu::DATA,
    STACK = const vcpu::STACK,
    USER_STACK = const vcpu::USER_STACK,
    IDT = const vcpu::IDT,
    APIC = const vcpu::APIC,
    ENTRY = const vcpu::ENTRY,
    CODE_SIZE = const vcpu::CODE_SIZE,
    kernel_mode = const offset_of!(Data, kernel_mode),
    trusted = const offset_of!(Data, trusted),
    in_multicall = const offset_of!(Data, in_multicall),
    syscall_masks = const offset_of!(Data, syscall_masks),
    timer_fired = const offset_of!(Data, timer_fired),
    flush = const offset_of!(Data, flush),
    asleep = const offset_of!(Data, asleep),
    vcpus = const offset_of!(Data, vcpus),
    call = const offset_of!(Data, call),
    vcpu_info = const offset_of!(Data, vcpu_info),
    kernel_sp = const offset_of!(Data, kernel_sp),
    kernel_gs = const offset_of!(Data, kernel_gs),
    user_gs = const offset_of!(Data, user_gs),
    syscall_handler = const offset_of!(Data, syscall_handler),
    fault_handler = const offset_of!(Data, fault_handler),
    event_handler = const offset_of!(Data, event_handler),
    kernel_cr3 = const offset_of!(Data, kernel_cr3),
    user_cr3 = const offset_of!(Data, user_cr3),
    memory = const offset_of!(Data, memory),
    kernel_slot = const offset_of!(Data, kernel_slot),
    direct_slot = const offset_of!(Data, direct_slot),
    user_slot = const offset_of!(Data, user_slot),
    timer_port = const offset_of!(Data, timer_port),
    r11 = const offset_of!(Data, r11),
    ret = const offset_of!(Data, ret),
    jumps_return = const offset_of!(Data, jumps_return),
    jumps_from = const offset_of!(Data, jumps_from),
    scratch = const offset_of!(Data, scratch),
    multicall = const offset_of!(Data, multicall),
    context = const offset_of!(Data, context),
    c_rax = const offset_of!(Context, rax),
    c_rcx = const offset_of!(Context, rcx),
    c_r11 = const offset_of!(Context, r11),
    c_rip = const offset_of!(Context, rip),
    c_cs = const offset_of!(Context, cs),
    c_rflags = const offset_of!(Context, rflags),
    c_rsp = const offset_of!(Context, rsp),
    c_ss = const offset_of!(Context, ss),
    c_error = const offset_of!(Context, error),
    c_handler = const offset_of!(Context, handler),
    c_has_error = const offset_of!(Context, has_error),
    c_mask = const offset_of!(Context, mask),
    fault = const offset_of!(Data, fault),
    fault_scratch = const offset_of!(Data, fault_scratch),
    trusted_interrupt = const offset_of!(Data, trusted_interrupt),
    halt_rsp = const offset_of!(Data, halt_rsp),
    forget = const offset_of!(Data, forget),
    forgotten = const offset_of!(Data, forgotten),
    runstate = const offset_of!(Data, runstate),
    set_bases = const offset_of!(Data, set_bases),
    counters = const offset_of!(Data, counters),
    epoch = const offset_of!(Data, epoch),
    slow_tables = const offset_of!(Data, slow_tables),
    hardware = const offset_of!(Data, hardware),
    KERNEL_FAULT = const frame::KERNEL_FAULT,
    DOOR = const frame::DOOR,
    OTHER = const frame::OTHER,
    USER_FAULT = const frame::USER_FAULT,
    USER_DOOR = const frame::USER_DOOR,
    USER_INTERRUPT = const frame::USER_INTERRUPT,
    TRUSTED_LANDING = const frame::TRUSTED_LANDING,
    WAKE = const frame::WAKE,
    FAULT_LANDING = const frame::FAULT_LANDING,
    DIRECT_MAP = const layout::DIRECT_MAP,
    SHARED_INFO = const layout::VA + layout::SHARED_INFO,
    DOORBELLS = const layout::VA + layout::DOORBELLS,
    DOORBELL_PORT = const layout::DOORBELL_PORT,
    CALL_PORT = const layout::CALL_PORT,
    EVENT_VECTOR = const layout::EVENT_VECTOR,
    TIMER_VECTOR = const layout::TIMER_VECTOR,
    EVENT_CHANNELS = const EVENT_CHANNELS,
    XEN_VERSION = const XEN_VERSION,
    CODE0 = const selector::CODE0,
    CODE3 = const selector::CODE3,
    KERNEL_CS = const selector::CODE3 & !3,
    KERNEL_SS = const selector::DATA3,
    LINUX_CODE3 = const selector::LINUX_CODE3,
    LINUX_CODE32 = const selector::LINUX_CODE32,
    LINUX_DATA3 = const selector::LINUX_DATA3,
    options(att_syntax),
);

unsafe extern "C" {
    static pv_shim_start: u8;
    static pv_shim_end: u8;
    static pv_shim_user_entry: u8;
    static pv_shim_user_entry_end: u8;
}

/// The bytes between two labels of the shim.
macro_rules! bytes {
    ($start:ident, $end:ident) => {{
        // SAFETY: both labels are in the one read-only section of the shim, in
        // this order; nothing ever writes there.
        unsafe {
            let start = &raw const $start;
            let len = (&raw const $end).offset_from_unsigned(start);
            core::slice::from_raw_parts(start, len)
        }
    }};
}

/// The shim's code, for the start of each vCPU's part.
#[must_use]
pub fn code() -> &'static [u8] {
    bytes!(pv_shim_start, pv_shim_end)
}

/// What the views of user code show at [`vcpu::ENTRY`].
#[must_use]
pub fn user_entry() -> &'static [u8] {
    bytes!(pv_shim_user_entry, pv_shim_user_entry_end)
}

macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident = $label:ident;)*) => {
        /// Places in the shim's code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Label { $($(#[$doc])* $name,)* }

        impl Label {
            /// Its offset from the start of a vCPU's part.
            #[must_use]
            pub fn offset(self) -> u64 {
                unsafe extern "C" { $(static $label: u8;)* }
                let label = match self { $(Self::$name => &raw const $label,)* };
                // SAFETY: both are in the shim's section, `label` behind.
                (unsafe { label.offset_from_unsigned(&raw const pv_shim_start) }) as u64
            }
        }
    };
}

labels! {
    /// Stubs of 8 bytes for the vectors 0 to 31: they call the monitor by the
    /// port of the vector's number.
    Vectors = pv_shim_vectors;
    /// The return from a call of the monitor.
    Iret = pv_shim_iret;
    /// The return to user code: its fault is the user's.
    IretUser = pv_shim_iret_user;
    /// The return to user code after a system call.
    IretSyscall = pv_shim_iret_syscall;
    /// The same where user code shares the kernel's view, in ring 3.
    IretTrusted = pv_shim_iret_trusted;
    /// Loads R11 as page table, then R11, then returns.
    Return = pv_shim_return;
    /// Gate of an event that ends a halt.
    WakeEvent = pv_shim_wake_event;
    /// Gate of a timer that ends a halt.
    WakeTimer = pv_shim_wake_timer;
    /// Where those land.
    Woken = pv_shim_woken;
    /// Gate of `int3` in user code.
    UserDoor = pv_shim_user_door;
    /// Gate of events in user code.
    UserEvent = pv_shim_user_event;
    /// Gate of the timer in user code.
    UserTimer = pv_shim_user_timer;
    /// Gate of page faults in user code.
    UserFault = pv_shim_user_fault;
    /// Gate of page faults in the kernel.
    KernelFault = pv_shim_kernel_fault;
    /// Where `syscall` arrives on hardware that raises the privilege.
    HardwareEntry = pv_shim_hardware_entry;
    /// Where it arrives from 32-bit code.
    Entry32 = pv_shim_entry32;
    /// Delivers the context.
    Deliver = pv_shim_deliver;
    /// Delivers an event to the context.
    Upcall = pv_shim_upcall;
    /// A hypercall's end, its result in RAX.
    Done = pv_shim_done;
    /// A hypercall's end with EINVAL.
    Invalid = pv_shim_invalid;
    /// `out` to a doorbell: event channel in RAX.
    Doorbell = pv_shim_doorbell;
    /// Behind it.
    Rung = pv_shim_rung;
    /// Where `int3` in user code lands.
    LandingDoor = pv_shim_landing_door;
    /// Where page faults of user code land.
    LandingFault = pv_shim_landing_fault;
    /// Where interrupts of user code land.
    LandingEvent = pv_shim_landing_event;
    /// Where they land if it shares the kernel's view.
    LandingTrusted = pv_shim_landing_trusted;
    /// Where page faults of the kernel land.
    LandingKernelFault = pv_shim_landing_kernel_fault;
    /// Gate of the timer in the kernel.
    Timer = pv_shim_timer;
    /// Gate of events in the kernel.
    Event = pv_shim_event;
    /// `syscall` in the kernel.
    Entry = pv_shim_entry;
    /// Where the kernel's hypercalls jump to, without `syscall`.
    Jumped = pv_shim_jumped;
    /// The first of what handles `iret`: behind it, no fault is a hypercall's.
    IretHypercall = pv_shim_iret_hypercall;
    /// Kernel page table in the gate of `int3`.
    ImmediateDoor = pv_shim_imm_door;
    /// Kernel page table in the gate of interrupts.
    ImmediateEvent = pv_shim_imm_event;
    /// Kernel page table in the gate of page faults.
    ImmediateFault = pv_shim_imm_fault;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_ends_with_the_entry_and_fits_into_its_pages() {
        let entry = vcpu::ENTRY as usize;
        assert!(code().len() > entry, "the entry is part of it");
        assert!(code().len() <= vcpu::DATA as usize);
        // A jump with a 32-bit displacement, to the handler.
        assert_eq!(code()[entry], 0xe9);
        let mut jump = [0; 4];
        jump.copy_from_slice(&code()[entry + 1..entry + 5]);
        let target = (vcpu::ENTRY + 5) as i64 + i64::from(i32::from_le_bytes(jump));
        assert_eq!(target, Label::Entry.offset() as i64);
    }

    #[test]
    fn user_codes_entry_is_a_breakpoint() {
        assert_eq!(user_entry()[0], 0xcc);
    }

    #[test]
    fn the_stubs_of_vectors_call_by_their_number() {
        for vector in 0..32u8 {
            let at = Label::Vectors.offset() as usize + 8 * usize::from(vector);
            assert_eq!(code()[at..at + 2], [0xe6, vector]);
        }
    }
}
