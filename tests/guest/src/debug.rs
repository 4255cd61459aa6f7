//! A debugger's tools: breakpoints and watchpoints of the processor, and single steps.

use std::io;
use std::mem::{self, offset_of};

use serde_json::json;

use crate::Report;
use crate::memory::Pages;
use crate::process::{self, End};

std::arch::global_asm!(include_str!("debug.s"));

unsafe extern "C" {
    fn guest_check_debug(words: *mut u64);
    fn guest_check_debug_target();
    fn guest_check_debug_stored();
    fn guest_check_debug_called();
}

/// How often the traced code passes its breakpoint and stores to the watched word.
const ROUNDS: u64 = 5;
/// Single steps that lead from a child's first stop to the end of the code, and more.
const STEPS: u32 = 10_000;
/// DR6: the first breakpoint, the second, a single step.
const FIRST: u64 = 1;
const SECOND: u64 = 2;
const STEP: u64 = 1 << 14;
/// DR7: the first is an instruction; the second a store to eight bytes.
const BOTH: u64 = 0x90_0005;
/// DR7: the first is a store to eight bytes.
const STORE: u64 = 0x9_0001;
const STATUS: usize = 6;
const CONTROL: usize = 7;

/// A child that has stopped.
struct Traced(libc::pid_t);

impl Traced {
    /// Starts one that stops before it does `work`.
    fn start(work: impl FnOnce() -> i32) -> io::Result<Self> {
        let pid = process::fork(|| {
            // SAFETY: it asks to be traced by its parent, and stops.
            unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                libc::raise(libc::SIGSTOP);
            }
            work()
        })?;
        let child = Self(pid);
        match child.wait()? {
            Some(libc::SIGSTOP) => Ok(child),
            other => Err(io::Error::other(format!("it did not stop: {other:?}"))),
        }
    }

    fn request(&self, request: libc::c_uint, at: usize, data: usize) -> io::Result<()> {
        // SAFETY: the child has stopped; what the request writes to is its, or the caller's
        // structure of the right type.
        match unsafe { libc::ptrace(request, self.0, at, data) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    fn set(&self, register: usize, value: u64) -> io::Result<()> {
        let at = offset_of!(libc::user, u_debugreg) + 8 * register;
        self.request(libc::PTRACE_POKEUSER, at, value as usize)
    }

    /// What its breakpoints met since it was last asked.
    fn status(&self) -> io::Result<u64> {
        let at = offset_of!(libc::user, u_debugreg) + 8 * STATUS;
        // SAFETY: the child has stopped; the result is a word of its.
        let status = unsafe { libc::ptrace(libc::PTRACE_PEEKUSER, self.0, at, 0) };
        self.set(STATUS, 0)?;
        Ok(status.cast_unsigned() & (FIRST | SECOND | STEP))
    }

    fn registers(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: integers, of which all patterns are valid.
        let mut registers: libc::user_regs_struct = unsafe { mem::zeroed() };
        self.request(
            libc::PTRACE_GETREGS,
            0,
            (&raw mut registers).expose_provenance(),
        )?;
        Ok(registers)
    }

    /// Waits until it stops: the signal; None: it ended well.
    fn wait(&self) -> io::Result<Option<i32>> {
        let mut status = 0;
        // SAFETY: the kernel writes one int.
        if unsafe { libc::waitpid(self.0, &raw mut status, 0) } != self.0 {
            return Err(io::Error::last_os_error());
        }
        match status {
            _ if libc::WIFSTOPPED(status) => Ok(Some(libc::WSTOPSIG(status))),
            0 => Ok(None),
            _ => Err(io::Error::other(format!(
                "it ended with status {status:#x}"
            ))),
        }
    }

    /// Lets it go on until it stops again.
    fn go(&self, request: libc::c_uint) -> io::Result<Option<i32>> {
        self.request(request, 0, 0)?;
        self.wait()
    }
}

/// Runs all.
pub(crate) fn run() -> io::Result<Report> {
    let mut words = Pages::map(1)?;
    let mut problems = Vec::new();
    let met = breakpoints(words.page(0).cast(), &mut problems)?;
    single_steps(words.page(0).cast(), &mut problems)?;
    let hits = kernel_stores(words.page(0))?;
    isolated(&mut problems)?;
    words.bytes().fill(0);
    Ok(Report {
        good: problems.is_empty(),
        json: json!({ "problems": problems, "breakpoints": met, "kernel_stores": hits }),
    })
}

fn place(code: unsafe extern "C" fn()) -> u64 {
    code as usize as u64
}

/// A child that will run the code that is looked at.
fn debugged(words: *mut u64) -> io::Result<Traced> {
    Traced::start(|| {
        // SAFETY: the page has room for two words.
        unsafe { guest_check_debug(words) };
        0
    })
}

/// Every pass of an instruction and every store stops the child, in turns, at the right place.
/// Or none does, where breakpoints have no effect: false.
fn breakpoints(words: *mut u64, problems: &mut Vec<String>) -> io::Result<bool> {
    let child = debugged(words)?;
    child.set(0, place(guest_check_debug_target))?;
    child.set(1, words.expose_provenance() as u64)?;
    child.set(CONTROL, BOTH)?;
    for round in 1..=ROUNDS {
        for (status, at, counted) in [
            (FIRST, place(guest_check_debug_target), round - 1),
            (SECOND, place(guest_check_debug_stored), round),
        ] {
            let Some(signal) = child.go(libc::PTRACE_CONT)? else {
                if (round, status) != (1, FIRST) {
                    problems.push(format!("nothing is met in round {round}"));
                }
                return Ok(false);
            };
            let (registers, met) = (child.registers()?, child.status()?);
            let found = (signal, registers.rip, registers.rax, met);
            if found != (libc::SIGTRAP, at, counted, status) {
                problems.push(format!(
                    "round {round}: {found:x?} instead of {at:#x}, {counted}, {status}"
                ));
            }
        }
    }
    child.set(CONTROL, 0)?;
    if child.go(libc::PTRACE_CONT)?.is_some() {
        problems.push("it does not end".to_owned());
    }
    Ok(true)
}

/// Single steps stop at every instruction, that behind a system call among them.
fn single_steps(words: *mut u64, problems: &mut Vec<String>) -> io::Result<()> {
    let child = debugged(words)?;
    let (mut targets, mut stores, mut answer) = (0, 0, None);
    for _ in 0..STEPS {
        let Some(signal) = child.go(libc::PTRACE_SINGLESTEP)? else {
            break;
        };
        let registers = child.registers()?;
        let met = child.status()?;
        match registers.rip {
            rip if rip == place(guest_check_debug_target) => targets += 1,
            rip if rip == place(guest_check_debug_stored) => stores += 1,
            rip if rip == place(guest_check_debug_called) => {
                answer = Some(registers.rax);
                break;
            }
            _ => {}
        }
        // Linux itself reports steps over system calls.
        if signal != libc::SIGTRAP || (met != STEP && met != 0) {
            problems.push(format!("a step: {signal}, {met:#x}"));
        }
    }
    let found = (targets, stores, answer);
    if found != (ROUNDS, ROUNDS, Some(child.0 as u64)) {
        problems.push(format!("steps passed {found:x?}"));
    }
    if child.go(libc::PTRACE_CONT)?.is_some() {
        problems.push("it does not end".to_owned());
    }
    Ok(())
}

/// The kernel itself stores to a watched word, which it must bear. How often the child stopped.
fn kernel_stores(word: *mut u8) -> io::Result<u64> {
    let child = Traced::start(|| {
        for _ in 0..50 {
            // SAFETY: eight bytes of a page of ours.
            unsafe { libc::getrandom(word.cast(), 8, 0) };
        }
        0
    })?;
    child.set(0, word.expose_provenance() as u64)?;
    child.set(CONTROL, STORE)?;
    let mut hits = 0;
    while child.go(libc::PTRACE_CONT)?.is_some() {
        hits += 1;
    }
    Ok(hits)
}

/// Another process that uses the same addresses meets no breakpoint; nor may one be in the kernel.
fn isolated(problems: &mut Vec<String>) -> io::Result<()> {
    let mut own = [0u64; 2];
    let words = &raw mut own;
    let child = Traced::start(|| 0)?;
    child.set(0, guest_check_debug_target as *const () as u64)?;
    child.set(CONTROL, FIRST)?;
    for address in [
        0xffff_8080_0000_5000,
        0xffff_8100_0000_0000,
        0xffff_ffff_8100_0000,
    ] {
        if child.set(1, address).is_ok() && child.set(CONTROL, BOTH).is_ok() {
            problems.push(format!("a breakpoint at {address:#x}"));
        }
    }
    let other = process::fork(|| {
        // SAFETY: two words of ours.
        unsafe { guest_check_debug(words.cast()) };
        0
    })?;
    let end = process::wait(other)?;
    if end != End::Exited(0) {
        problems.push(format!("a process that nobody traces: {end:?}"));
    }
    while child.go(libc::PTRACE_CONT)?.is_some() {}
    Ok(())
}
