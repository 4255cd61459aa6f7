//! Returns from a signal's handler to what is no place for a process: the process gets a signal,
//! and the kernel goes on.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::json;

use crate::Report;
use crate::process::{self, End};

/// Linux's own segments of a 64-bit process.
const CODE: u16 = 0x33;
const DATA: u16 = 0x2b;
/// Xen's segment of 64-bit code: there it is as good as Linux's, whatever is with it.
const XEN_CODE: u16 = 0xe033;
/// Those of Linux's kernel: a PV kernel has them in ring 3 as well.
const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;

/// What a return loads: code segment, stack segment, instruction pointer (0: as it was).
static CODE_SEGMENT: AtomicU64 = AtomicU64::new(0);
static STACK_SEGMENT: AtomicU64 = AtomicU64::new(0);
static INSTRUCTION: AtomicU64 = AtomicU64::new(0);

/// Code segments: none, data, ring 0's, 32-bit code, Xen's, gates, a local one, beyond the table.
const CODES: [u16; 14] = [
    0,
    3,
    DATA,
    KERNEL_CODE,
    KERNEL_DATA,
    0x23,
    XEN_CODE,
    0xe008,
    0xe010,
    0xe02b,
    0xe040,
    7,
    0x43,
    0xffff,
];
/// Stack segments: none, code, ring 0's, Xen's, a local one, beyond the table.
const STACKS: [u16; 10] = [
    0,
    3,
    CODE,
    KERNEL_CODE,
    KERNEL_DATA,
    XEN_CODE,
    0xe010,
    0xe040,
    7,
    0xffff,
];
/// Addresses that are none, and the kernel's.
const INSTRUCTIONS: [u64; 4] = [
    1 << 47,
    0x8000_0000_0000_0000,
    0xffff_8080_0000_0000,
    0xffff_ffff_8100_0000,
];

extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const SEGMENTS: usize = libc::REG_CSGSFS as usize;
    // SAFETY: the kernel passes a `ucontext_t` to handlers with SA_SIGINFO; nothing else refers
    // to it.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    let kept = registers[SEGMENTS].cast_unsigned() & 0x0000_ffff_ffff_0000;
    let segments = kept | CODE_SEGMENT.load(Relaxed) | STACK_SEGMENT.load(Relaxed) << 48;
    registers[SEGMENTS] = segments.cast_signed();
    match INSTRUCTION.load(Relaxed) {
        0 => {}
        rip => registers[libc::REG_RIP as usize] = rip.cast_signed(),
    }
}

/// Returns there, in a process of its own.
fn attempt(code: u16, stack: u16, rip: u64) -> io::Result<End> {
    const LIMIT: u32 = 10;
    let pid = process::fork(|| {
        CODE_SEGMENT.store(code.into(), Relaxed);
        STACK_SEGMENT.store(stack.into(), Relaxed);
        INSTRUCTION.store(rip, Relaxed);
        // SAFETY: a handler without signals to block or restorer is all zeros; it only writes to
        // the context that the kernel passes.
        unsafe {
            libc::alarm(LIMIT);
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut());
            libc::raise(libc::SIGUSR1);
        }
        ring() - 3
    })?;
    process::wait(pid)
}

/// The ring that the caller is in.
fn ring() -> i32 {
    let code: u64;
    // SAFETY: reads a register.
    unsafe { std::arch::asm!("mov {}, cs", out(reg) code, options(nomem, nostack)) };
    (code & 3) as i32
}

/// Runs all.
pub(crate) fn run() -> io::Result<Report> {
    let mut ends = BTreeMap::<String, u64>::new();
    let mut violations = Vec::new();
    let mut one = |code, stack, rip, may_return: bool| -> io::Result<()> {
        let end = attempt(code, stack, rip)?;
        *ends.entry(format!("{end:?}")).or_default() += 1;
        let good = match end {
            End::Exited(status) => may_return && status == 0,
            End::Signaled(signal) => signal != libc::SIGALRM,
        };
        if !good {
            violations.push(format!("{code:#x} {stack:#x} {rip:#x}: {end:?}"));
        }
        Ok(())
    };
    // KVM that interprets a return takes any segment that is there for the stack, which means
    // nothing to 64-bit code.
    let is_there = |stack| [DATA, CODE, KERNEL_CODE, KERNEL_DATA, XEN_CODE].contains(&stack);
    for code in CODES {
        for stack in [DATA].into_iter().chain(STACKS) {
            let good = code == XEN_CODE || (code == KERNEL_CODE && is_there(stack));
            one(code, stack, 0, good)?;
        }
    }
    for stack in STACKS {
        one(CODE, stack, 0, is_there(stack))?;
    }
    for rip in INSTRUCTIONS {
        one(CODE, DATA, rip, false)?;
    }
    if attempt(CODE, DATA, 0)? != End::Exited(0) {
        violations.push("a good one does not return".to_owned());
    }
    Ok(Report {
        good: violations.is_empty(),
        json: json!({ "ends": ends, "violations": violations }),
    })
}
