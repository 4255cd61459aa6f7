//! From the builder of Xen PV domains to Rust, hypercalls, and exceptions.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::{FAULTS, STEP, calls, run};

/// Exceptions that get a handler.
const VECTORS: usize = 32;
/// `CALLBACKOP_register`, and the callback for a return that failed.
const REGISTER: u64 = 0;
const FAILSAFE: u32 = 1;

// The notes: entry, virtual address of memory, place of the table of frames,
// initrd by frame number.
global_asm!(
    r#"
.section .note.xen, "a", @note
.balign 4
.long 4, 8, 1
.asciz "Xen"
.quad pv_start
.long 4, 8, 3
.asciz "Xen"
.quad 0
.long 4, 8, 15
.asciz "Xen"
.quad 0x8000000000
.long 4, 4, 16
.asciz "Xen"
.long 1

.section .bss.pv, "aw", @nobits
.balign 16
pv_stack: .skip 64 * 1024
pv_stack_top:

.section .text.pv, "ax"
.globl pv_start
pv_start:
    cld
    leaq pv_stack_top(%rip), %rsp
    movq %rsi, %rdi
    call pv_enter
    ud2
.globl pv_trap
pv_trap:
    cld
    leaq pv_stack_top(%rip), %rsp
    call pv_trapped
    ud2
"#,
    options(att_syntax)
);

unsafe extern "C" {
    fn pv_trap();
}

/// What the builder tells a domain (`struct start_info` in `xen.h`).
#[repr(C)]
pub(crate) struct Info {
    magic: [u8; 32],
    /// Pages of memory.
    pub(crate) pages: u64,
    shared_info: u64,
    flags: u32,
    /// Machine frame of the xenstore's ring.
    pub(crate) store: u64,
    store_channel: u32,
    /// Machine frame of the console's ring.
    pub(crate) console: u64,
    console_channel: u32,
    /// Virtual address of the top page table.
    pub(crate) tables: u64,
    /// Page-table pages from there on.
    pub(crate) table_pages: u64,
    frames: u64,
    module: u64,
    module_len: u64,
    line: [u8; 1024],
}

impl Info {
    /// The command line.
    pub(crate) fn command_line(&self) -> &[u8] {
        let len = self.line.iter().position(|byte| *byte == 0);
        &self.line[..len.unwrap_or(self.line.len())]
    }
}

static INFO: AtomicPtr<Info> = AtomicPtr::new(core::ptr::null_mut());

// SAFETY: called once, by the stub above, with the builder's RSI.
#[unsafe(no_mangle)]
unsafe extern "C" fn pv_enter(info: *mut Info) -> ! {
    INFO.store(info, Ordering::Relaxed);
    // SAFETY: the builder has mapped it, and nothing else refers to it.
    run(unsafe { &*info })
}

// SAFETY: called by the stub above only.
#[unsafe(no_mangle)]
unsafe extern "C" fn pv_trapped() -> ! {
    FAULTS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: set before the first handler was registered; the garbage in it,
    // if any, is only read.
    let info = unsafe { &*INFO.load(Ordering::Relaxed) };
    // Without end if nothing works any more.
    STEP.fetch_add(1, Ordering::Relaxed);
    run(info)
}

/// Makes a hypercall.
pub(crate) fn hypercall(number: u64, arguments: [u64; 6]) -> u64 {
    let [a, b, c, d, e, f] = arguments;
    let result: u64;
    // SAFETY: what it may do to this program is the program's purpose. An
    // exception in it does not come back here.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r10") d => _,
            inlateout("r8") e => _,
            inlateout("r9") f => _,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

#[repr(C)]
struct Trap {
    vector: u8,
    flags: u8,
    segment: u16,
    address: u64,
}

#[repr(C)]
struct Callback {
    kind: u16,
    flags: u16,
    address: u64,
}

/// Has every exception, and every return that fails, begin the next step.
pub(crate) fn set_up() {
    const MASK_EVENTS: u8 = 4;
    const CODE: u16 = 0xe033;
    let handler = pv_trap as *const () as u64;
    let traps: [Trap; VECTORS + 1] = core::array::from_fn(|vector| Trap {
        vector: vector as u8,
        flags: MASK_EVENTS,
        segment: CODE,
        // The last one ends the table.
        address: if vector < VECTORS { handler } else { 0 },
    });
    hypercall(
        calls::SET_TRAP_TABLE,
        [traps.as_ptr() as u64, 0, 0, 0, 0, 0],
    );
    let callback = Callback {
        kind: FAILSAFE as u16,
        flags: 0,
        address: handler,
    };
    let arguments = [REGISTER, &raw const callback as u64, 0, 0, 0, 0];
    hypercall(calls::CALLBACK_OP, arguments);
}
