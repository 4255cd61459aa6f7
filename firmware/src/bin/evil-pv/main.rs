//! A malicious kernel of a pv machine: hypercalls with garbage, and garbage in
//! all that it shares with the hypervisor. It runs in ring 3 and needs no
//! hardware virtualization.
//!
//! Command line: `seed=N` (which garbage; 1), `steps=N` (1000), `trace=1` (says
//! each call before it makes it), and what it does:
//!
//! | mode | meaning |
//! |---|---|
//! | `calls` (default) | hypercalls that do the caller itself no harm |
//! | `shared` | the same, and writes to shared_info, doorbells, grant table and both rings |
//! | `wild` | any hypercalls, with any addresses |
//! | `shim` | the same, and writes to the hypervisor's part in its address space |
//! | `tables` | the same, and writes to its page tables |
//!
//! After `calls` and `shared` it says `evil-pv: survived N steps` on Xen's
//! console and shuts down; the others may well kill it before.
#![no_std]
#![no_main]

mod calls;
mod entry;
mod scribble;

use core::sync::atomic::{AtomicU64, Ordering};

use blanket_firmware::random::Random;

use entry::{Info, hypercall};

/// `SCHEDOP_shutdown`, and the reason that is no crash.
const SHUTDOWN: u64 = 2;
const POWER_OFF: u32 = 0;

/// What a run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Calls,
    Shared,
    Wild,
    Shim,
    Tables,
}

/// The step that is being done: an exception ends it.
static STEP: AtomicU64 = AtomicU64::new(0);
/// Whether to say each call.
static TRACE: AtomicU64 = AtomicU64::new(0);
/// Steps that an exception has ended.
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// A decimal number behind `name=` on the command line.
fn number(line: &[u8], name: &[u8]) -> Option<u64> {
    let value = word(line, name)?;
    value.iter().try_fold(0u64, |n, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        n.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// What is behind `name=` on the command line.
fn word<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    line.split(|byte| *byte == b' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix(b"="))
}

/// Does the remaining steps. Every exception comes here again, with an empty
/// stack.
fn run(info: &Info) -> ! {
    let line = info.command_line();
    let mode = match word(line, b"mode") {
        Some(b"shared") => Mode::Shared,
        Some(b"wild") => Mode::Wild,
        Some(b"shim") => Mode::Shim,
        Some(b"tables") => Mode::Tables,
        _ => Mode::Calls,
    };
    let seed = number(line, b"seed").unwrap_or(1);
    let steps = number(line, b"steps").unwrap_or(1000);
    TRACE.store(number(line, b"trace").unwrap_or(0), Ordering::Relaxed);
    let tame = matches!(mode, Mode::Calls | Mode::Shared);
    entry::set_up();
    loop {
        let step = STEP.fetch_add(1, Ordering::Relaxed);
        if step >= steps {
            break;
        }
        if !tame && step % 100 == 99 {
            say(b"evil-pv: step ", step + 1, b"\n");
        }
        // Each step has numbers of its own: an exception changes no later one.
        let mut random = Random::new(seed.wrapping_mul(1_000_003) ^ step);
        if random.one_in(3) {
            scribble::step(mode, info, &mut random);
        }
        calls::step(tame, &mut random);
        if tame {
            entry::set_up();
        }
    }
    entry::set_up();
    say(b"evil-pv: survived ", steps, b" steps, ");
    say(
        b"",
        FAULTS.load(Ordering::Relaxed),
        b" of them with a fault\n",
    );
    loop {
        let reason = POWER_OFF;
        hypercall(
            calls::SCHED_OP,
            [SHUTDOWN, &raw const reason as u64, 0, 0, 0, 0],
        );
    }
}

/// Says a call before it is made, if that is wanted.
fn trace(call: u64, arguments: &[u64]) {
    if TRACE.load(Ordering::Relaxed) != 0 {
        say(b"call ", call, b":");
        for value in arguments {
            say(b" ", *value, b"");
        }
        say(b" (step ", STEP.load(Ordering::Relaxed), b")\n");
    }
}

/// Writes to the hypervisor's console.
fn say(before: &[u8], number: u64, after: &[u8]) {
    let mut digits = [b'0'; 20];
    let (mut rest, mut at) = (number, digits.len() - 1);
    while rest >= 10 {
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        at -= 1;
    }
    digits[at] = b'0' + rest as u8;
    for text in [before, &digits[at..], after] {
        let arguments = [0, text.len() as u64, text.as_ptr() as u64, 0, 0, 0];
        hypercall(calls::CONSOLE_IO, arguments);
    }
}
