//! What a process must not reach: addresses of the kernel and of what is under it, and
//! instructions for the kernel alone. Every attempt has to end in a signal, and the machine has
//! to go on.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::mem;
use std::ptr;

use serde_json::json;

use crate::Report;
use crate::memory::{PAGE, Pages};
use crate::process::{self, End};

std::arch::global_asm!(include_str!("probe.s"));

type Code = unsafe extern "C" fn();

unsafe extern "C" {
    fn guest_check_try(code: Code, argument: u64) -> i32;
    fn guest_check_landing();
    fn guest_check_load();
    fn guest_check_store();
    fn guest_check_jump();
}

/// Signals that an attempt may end in.
const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGBUS,
    libc::SIGFPE,
];

/// The single-step flag, which an attempt may leave set.
const TRAP_FLAG: i64 = 0x100;

/// Linux's segment of 64-bit code, which an attempt may leave.
const CODE_SEGMENT: i64 = 0x33;

/// Seconds that one attempt in a process of its own may take.
const LIMIT: u32 = 10;

/// Where a kernel is, or what is under it: start, length and step in bytes.
const PLACES: &[(u64, u64, u64)] = &[
    // Linux: text, direct map, vmalloc, page structures, modules, per-CPU entry area, fixmap.
    (0xffff_ffff_8100_0000, 0x200_0000, 0x1_0000),
    (0xffff_8880_0000_0000, 0x2000_0000, 0x8_0000),
    (0xffff_c900_0000_0000, 0x100_0000, 0x1_0000),
    (0xffff_ea00_0000_0000, 0x100_0000, 0x1_0000),
    (0xffff_ffff_c000_0000, 0x100_0000, 0x1_0000),
    (0xffff_fe00_0000_0000, 0x10_0000, 0x1000),
    (0xffff_ffff_ff20_0000, 0x10_0000, 0x1000),
    // Xen's range begins with the machine-to-physical table.
    (0xffff_8000_0000_0000, 0x20_0000, 0x1000),
    // The hypervisor's area page by page, then its direct map, then what follows.
    (0xffff_8080_0000_0000, 0x400_0000, 0x1000),
    (0xffff_8100_0000_0000, 0x8000_0000, 0x8_0000),
    (0xffff_8180_0000_0000, 0x780_0000_0000, 0x10_0000_0000),
    // The first address that is none.
    (0x0000_8000_0000_0000, 0x2000, 0x1000),
    (0xffff_7fff_ffff_e000, 0x2000, 0x1000),
];

/// Instructions, as bytes, that only a kernel may use.
const PRIVILEGED: &[(&str, &[u8])] = &[
    ("hlt", &[0xf4]),
    ("cli", &[0xfa]),
    ("sti", &[0xfb]),
    ("in al, dx", &[0xec]),
    ("out dx, al", &[0xee]),
    ("in al, 0x80", &[0xe4, 0x80]),
    ("out 0xe9, al", &[0xe6, 0xe9]),
    ("insb", &[0x6c]),
    ("outsb", &[0x6e]),
    ("rdmsr", &[0x0f, 0x32]),
    ("wrmsr", &[0x0f, 0x30]),
    ("clts", &[0x0f, 0x06]),
    ("invd", &[0x0f, 0x08]),
    ("wbinvd", &[0x0f, 0x09]),
    ("mov rax, cr0", &[0x0f, 0x20, 0xc0]),
    ("mov rax, cr3", &[0x0f, 0x20, 0xd8]),
    ("mov cr3, rax", &[0x0f, 0x22, 0xd8]),
    ("mov cr4, rax", &[0x0f, 0x22, 0xe0]),
    ("mov rax, cr8", &[0x44, 0x0f, 0x20, 0xc0]),
    ("mov rax, dr7", &[0x0f, 0x21, 0xf8]),
    ("mov dr7, rax", &[0x0f, 0x23, 0xf8]),
    ("lgdt [rsp]", &[0x0f, 0x01, 0x14, 0x24]),
    ("lidt [rsp]", &[0x0f, 0x01, 0x1c, 0x24]),
    ("lldt ax", &[0x0f, 0x00, 0xd0]),
    ("ltr ax", &[0x0f, 0x00, 0xd8]),
    ("lmsw ax", &[0x0f, 0x01, 0xf0]),
    ("invlpg [rsp]", &[0x0f, 0x01, 0x3c, 0x24]),
    ("swapgs", &[0x0f, 0x01, 0xf8]),
    ("sysretq", &[0x48, 0x0f, 0x07]),
    ("sysexit", &[0x48, 0x0f, 0x35]),
    ("xsetbv", &[0x0f, 0x01, 0xd1]),
    ("vmrun", &[0x0f, 0x01, 0xd8]),
    ("stgi", &[0x0f, 0x01, 0xdc]),
    ("ud2", &[0x0f, 0x0b]),
    ("icebp", &[0xf1]),
    ("int3", &[0xcc]),
    // Returns to segments of the kernel and of Xen; the frame: SS, RSP, flags, CS, RIP.
    ("iretq to 0xe033", &IRET_TO_XEN),
    ("iretq to ring 0", &IRET_TO_RING_0),
    (
        "far return to ring 0",
        &[0x6a, 0x08, 0x6a, 0x00, 0x48, 0xcb],
    ),
    ("mov ss, 0", &[0x31, 0xc0, 0x8e, 0xd0]),
    // Single-stepping: push the flags with TF, pop them.
    (
        "popfq with TF",
        &[0x68, 0x02, 0x01, 0x00, 0x00, 0x9d, 0x90, 0x90],
    ),
    // lea rax, [rip + 5]; push 0x23; push rax; retfq; syscall
    (
        "syscall in 32-bit code",
        &[
            0x48, 0x8d, 0x05, 5, 0, 0, 0, 0x6a, 0x23, 0x50, 0x48, 0xcb, 0x0f, 0x05,
        ],
    ),
    // mov eax, 7; mov gs, ax
    ("local descriptor", &[0xb8, 7, 0, 0, 0, 0x8e, 0xe8]),
];

/// What may do something for processes too: KVM answers hypercalls from ring 3 with an error, and
/// Xen's prefix for an emulated CPUID works there. FS may go to an address that is none where
/// QEMU emulates the processor.
const HARMLESS: &[(&str, &[u8])] = &[
    ("vmcall", &[0x0f, 0x01, 0xc1]),
    ("vmmcall", &[0x0f, 0x01, 0xd9]),
    ("xen cpuid", &[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2]),
    (
        "wrfsbase",
        &[
            0x48, 0xb8, 0, 0, 0, 0, 0, 0x80, 0, 0, 0xf3, 0x48, 0x0f, 0xae, 0xd0,
        ],
    ),
];

/// `push 0xe02b; push rsp; push 0x202; push 0xe033; push -1; iretq`
const IRET_TO_XEN: [u8; 20] = [
    0x68, 0x2b, 0xe0, 0, 0, 0x54, 0x68, 0x02, 0x02, 0, 0, 0x68, 0x33, 0xe0, 0, 0, 0x6a, 0xff, 0x48,
    0xcf,
];

/// `push 0x18; push rsp; push 0x202; push 0x10; push -1; iretq`
const IRET_TO_RING_0: [u8; 14] = [
    0x6a, 0x18, 0x54, 0x68, 0x02, 0x02, 0, 0, 0x6a, 0x10, 0x6a, 0xff, 0x48, 0xcf,
];

/// What lies between pieces of code: zeros, breakpoints, or instructions that do nothing.
const PADDING: [u8; 3] = [0, 0xcc, 0x90];

/// The one vector that processes may call and go on: the 32-bit system call.
const SYSTEM_CALL: u8 = 0x80;

/// KVM without hardware virtualization answers this itself, as a CPUID: neither the guest's kernel
/// nor the monitor ever sees it. CPUID is no privilege.
const KVM_CPUID: u8 = 0x1a;

/// Called by the kernel, on the alternative stack: lets `guest_check_try` return the signal.
extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let landing: unsafe extern "C" fn() = guest_check_landing;
    // SAFETY: the kernel passes a `ucontext_t` to handlers with SA_SIGINFO; nothing else refers
    // to it.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    registers[libc::REG_RIP as usize] = landing as usize as i64;
    registers[libc::REG_RAX as usize] = i64::from(signal);
    registers[libc::REG_EFL as usize] &= !TRAP_FLAG;
    let segments = &mut registers[libc::REG_CSGSFS as usize];
    *segments = *segments & !0xffff | CODE_SEGMENT;
}

fn install_handlers() -> io::Result<()> {
    // For as long as the process lives.
    let stack = mem::ManuallyDrop::new(Pages::map(16)?);
    let alternative = libc::stack_t {
        ss_sp: stack.page(0).cast(),
        ss_flags: 0,
        ss_size: 16 * PAGE,
    };
    // SAFETY: the stack is memory of ours that is never unmapped.
    if unsafe { libc::sigaltstack(&raw const alternative, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for signal in SIGNALS {
        // SAFETY: a handler without signals to block, flags or restorer is all zeros.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the handler only writes to the context that the kernel passes.
        if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Runs code of this file; 0, or the signal that it ended in.
fn attempt(code: Code, argument: u64) -> i32 {
    // SAFETY: the handlers are installed. Whatever the code does to registers and to the stack
    // below this frame is undone; what it stores to is not ours.
    unsafe { guest_check_try(code, argument) }
}

/// A page of the hypervisor or kernel that can be read.
struct Readable {
    address: u64,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Findings {
    attempts: u64,
    signals: BTreeMap<i32, u64>,
    violations: Vec<String>,
    /// What may do something for processes, and did.
    returned: Vec<String>,
}

impl Findings {
    fn expect_signal(&mut self, signal: i32, what: impl FnOnce() -> String) {
        self.attempts += 1;
        *self.signals.entry(signal).or_default() += 1;
        if signal == 0 {
            self.violations.push(what());
        }
    }
}

/// Tries everything.
pub(crate) fn run() -> io::Result<Report> {
    install_handlers()?;
    let mut findings = Findings::default();
    let readable = addresses(&mut findings);
    eprintln!("instructions");
    instructions(&mut findings)?;
    eprintln!("{} readable pages", readable.len());
    let changed = secrets(&readable)?;
    let int80 = isolated(|| i32::from(!is_system_call()))?;
    for page in &readable {
        jumps(page, &mut findings)?;
    }
    if changed > 0 {
        let problem = format!("{changed} readable pages show what the kernel does");
        findings.violations.push(problem);
    }
    let pages: Vec<_> = readable.iter().map(describe).collect();
    Ok(Report {
        good: findings.violations.is_empty(),
        json: json!({
            "attempts": findings.attempts,
            "signals": findings.signals,
            "violations": findings.violations,
            "returned": findings.returned,
            "readable": pages,
            "int80": int80 == End::Exited(0),
        }),
    })
}

fn describe(page: &Readable) -> serde_json::Value {
    let mut hasher = DefaultHasher::new();
    page.bytes.hash(&mut hasher);
    json!({ "address": format!("{:#x}", page.address), "hash": hasher.finish().to_string() })
}

/// Reads, writes and jumps. A page that can be read and holds no secrets may be there: the one
/// where processes enter the kernel.
fn addresses(findings: &mut Findings) -> Vec<Readable> {
    let mut readable = Vec::new();
    for (start, len, step) in PLACES {
        for address in (0..*len).step_by(*step as usize).map(|at| start + at) {
            let load = attempt(guest_check_load, address);
            findings.attempts += 1;
            *findings.signals.entry(load).or_default() += 1;
            if load == 0 {
                readable.push(Readable {
                    address,
                    bytes: copy(address),
                });
            }
            let store = attempt(guest_check_store, address);
            findings.expect_signal(store, || format!("{address:#x} can be written"));
            if load != 0 {
                let jump = attempt(guest_check_jump, address);
                findings.expect_signal(jump, || format!("{address:#x} can be executed"));
            }
        }
    }
    readable
}

/// The bytes of a page that can be read.
fn copy(address: u64) -> Vec<u8> {
    let byte = |at| {
        // SAFETY: the page was just read from; a byte that cannot be read ends the process.
        unsafe { ptr::with_exposed_provenance::<u8>(address as usize + at).read_volatile() }
    };
    (0..PAGE).map(byte).collect()
}

/// How many of the pages change while another process has its registers full of something.
fn secrets(readable: &[Readable]) -> io::Result<u32> {
    let busy = process::fork(|| {
        loop {
            if let Ok(pages) = Pages::map(1) {
                let address = pages.page(0) as u64;
                attempt(guest_check_store, address);
            }
            attempt(guest_check_load, 0xffff_8880_dead_beef);
        }
    })?;
    let mut changed = 0;
    for page in readable {
        let differs = (0..200).any(|_| {
            // SAFETY: takes no arguments and cannot fail.
            unsafe { libc::sched_yield() };
            copy(page.address) != page.bytes
        });
        changed += u32::from(differs);
    }
    // SAFETY: the process is a child of ours that has not been waited for.
    unsafe { libc::kill(busy, libc::SIGKILL) };
    process::wait(busy)?;
    Ok(changed)
}

/// Privileged instructions, and every software interrupt, each in a process of its own: what
/// leaves its process in disorder must not disturb the rest.
fn instructions(findings: &mut Findings) -> io::Result<()> {
    let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    // Where 32-bit code can be.
    let mut page = Pages::map_with(1, all, libc::MAP_32BIT)?;
    let mut one = |name: &str, bytes: &[u8], may_return: bool| -> io::Result<()> {
        let code = page.bytes();
        code.fill(0xc3);
        code[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: the page holds code that ends with a return.
        let code = unsafe { mem::transmute::<*mut u8, Code>(page.page(0)) };
        let end = isolated(|| attempt(code, 0))?;
        findings.attempts += 1;
        match end {
            End::Exited(0) if !may_return => {
                findings.violations.push(format!("{name} does something"));
            }
            End::Exited(0) => findings.returned.push(name.to_owned()),
            End::Signaled(libc::SIGALRM) => findings.violations.push(format!("{name} hangs")),
            End::Exited(signal) | End::Signaled(signal) => {
                *findings.signals.entry(signal).or_default() += 1;
            }
        }
        Ok(())
    };
    for (name, bytes) in PRIVILEGED {
        one(name, bytes, false)?;
    }
    for (name, bytes) in HARMLESS {
        one(name, bytes, true)?;
    }
    // The I/O privilege level cannot be raised; trying is no fault.
    one(
        "popfq with IOPL 3",
        &[0x68, 0x02, 0x30, 0, 0, 0x9d, 0xfa],
        false,
    )?;
    for vector in 0..=u8::MAX {
        let name = format!("int {vector:#x}");
        let may_return = vector == SYSTEM_CALL || (vector == KVM_CPUID && is_cpuid()?);
        one(&name, &[0xcd, vector], may_return)?;
    }
    Ok(())
}

/// Whether 32-bit Linux's system call tells the process's number.
fn is_system_call() -> bool {
    const GETPID: u64 = 20;
    let mut rax = GETPID;
    // SAFETY: without arguments; should it not be there, the process has nothing else to do.
    unsafe {
        std::arch::asm!(
            "int 0x80", inout("rax") rax,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    u32::try_from(rax) == Ok(std::process::id())
}

/// Whether `int 0x1a` is a CPUID, with its answers and nothing else.
fn is_cpuid() -> io::Result<bool> {
    let same = |leaf: u32| {
        let [mut eax, mut ebx, mut ecx, mut edx] = [u64::from(leaf), 1, 0, 3];
        // SAFETY: if it is a CPUID it changes these registers; if not, the process, which has
        // nothing else to do, may end here.
        unsafe {
            std::arch::asm!(
                "mov {rbx}, rbx",
                "int 0x1a",
                "xchg {rbx}, rbx",
                rbx = inout(reg) ebx, inout("rax") eax, inout("rcx") ecx, inout("rdx") edx,
            );
        }
        let real = std::arch::x86_64::__cpuid_count(leaf, 0);
        [eax, ebx, ecx, edx] == [real.eax, real.ebx, real.ecx, real.edx].map(u64::from)
    };
    // The processor's name.
    let leaves = [0x8000_0002, 0x8000_0003, 0x8000_0004];
    let end = isolated(|| i32::from(!leaves.into_iter().all(same)))?;
    Ok(end == End::Exited(0))
}

/// Runs an attempt in a process of its own that has a time limit.
fn isolated(work: impl FnOnce() -> i32) -> io::Result<End> {
    let pid = process::fork(|| {
        // SAFETY: only sets a timer.
        unsafe { libc::alarm(LIMIT) };
        work()
    })?;
    process::wait(pid)
}

/// Jumps into a page that can be read, to every third byte of what is there. What the page does
/// for the kernel it may do for a process that calls it, as any system call; the machine has to
/// go on.
fn jumps(page: &Readable, findings: &mut Findings) -> io::Result<()> {
    let code = page.bytes.iter().enumerate().step_by(3);
    for (at, _) in code.filter(|(_, byte)| !PADDING.contains(byte)) {
        let address = page.address + at as u64;
        let end = isolated(|| attempt(guest_check_jump, address))?;
        findings.attempts += 1;
        if end == End::Signaled(libc::SIGALRM) {
            findings
                .violations
                .push(format!("a jump to {address:#x} hangs"));
        }
    }
    Ok(())
}
