//! Registers of every kind keep their values while something else happens.
//!
//! Each check fills all registers, does one thing that enters the kernel or gives it time to
//! switch to another process, and writes all registers to memory, in one piece of assembly
//! (`registers.s`) in which nothing else runs. Processes fill them with different values, so
//! that whatever is mixed up shows.

use std::io;
use std::mem::offset_of;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Report;
use crate::memory::{PAGE, Pages};
use crate::process::{self, End};

/// The subcommand that checks in one process.
pub(crate) const CHILD: &str = "registers-child";

/// Checks of each kind in one process.
const REPEATS: usize = 6;

/// Indices of registers in [`State::general`], in the order of their numbers.
const RAX: usize = 0;
const RCX: usize = 1;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;
const R11: usize = 11;

/// Carry, parity, adjust, zero, sign, direction and overflow.
const FLAGS: u64 = 0xcd5;

/// The direction flag, which string operations obey.
const DIRECTION: u64 = 0x400;

/// Bytes that the string operation copies: onto three pages.
const COPIED: usize = 2 * PAGE;

/// How long the loop turns: longer than some time slices, all repetitions together.
const TURNS: u64 = 400_000;

/// The same for [`hold`]: most of a time slice and more.
const LONG_TURNS: u64 = 100 * TURNS;

/// Vector registers that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Level {
    Sse = 0,
    Avx = 1,
    Avx512 = 2,
}

impl Level {
    fn of_this_processor() -> Self {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            Self::Avx512
        } else if is_x86_feature_detected!("avx") {
            Self::Avx
        } else {
            Self::Sse
        }
    }

    /// Vector registers, and 64-bit parts of each that are loaded.
    fn vectors(self) -> (usize, usize) {
        match self {
            Self::Sse => (16, 2),
            Self::Avx => (16, 4),
            Self::Avx512 => (32, 8),
        }
    }
}

/// What happens while the registers hold their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Action {
    /// A store of RAX at RSI.
    Store = 0,
    /// A load of RAX from RSI.
    Load = 1,
    /// RCX is counted down to 0.
    Loop = 2,
    /// System call number RAX: `sched_yield`.
    Yield = 3,
    /// RCX bytes are copied from RSI to RDI.
    Copy = 4,
}

/// Values of registers.
#[derive(Clone, PartialEq)]
#[repr(C, align(64))]
struct State {
    general: [u64; 16],
    flags: u64,
    /// Of the x87 unit: one value, and the control word.
    x87: u64,
    x87_control: u32,
    /// Control of SSE.
    mxcsr: u32,
    padding: [u64; 5],
    masks: [u64; 8],
    vectors: [[u64; 8]; 32],
}

const _: () = assert!(
    offset_of!(State, flags) == 0x80
        && offset_of!(State, x87) == 0x88
        && offset_of!(State, x87_control) == 0x90
        && offset_of!(State, mxcsr) == 0x94
        && offset_of!(State, masks) == 0xc0
        && offset_of!(State, vectors) == 0x100
        && size_of::<State>() == 0x900,
    "registers.s knows these numbers"
);

std::arch::global_asm!(include_str!("registers.s"));

unsafe extern "C" {
    /// Loads `before`, does the action, stores `after`. The registers that C keeps across calls
    /// are kept.
    fn guest_check_registers(before: *const State, after: *mut State, action: u64, level: u64);
}

impl State {
    fn empty() -> Self {
        Self {
            general: [0; 16],
            flags: 0,
            x87: 0,
            x87_control: 0,
            mxcsr: 0,
            padding: [0; 5],
            masks: [0; 8],
            vectors: [[0; 8]; 32],
        }
    }

    /// Random values where the processor takes any.
    fn random(seed: &mut u64) -> Self {
        let mut state = Self::empty();
        state.general = std::array::from_fn(|_| process::random(seed));
        state.flags = process::random(seed) & FLAGS;
        // A normal number, which the unit keeps as it is.
        state.x87 = (process::random(seed) as f64).to_bits();
        // All exceptions masked; precision and rounding vary.
        let rounding = (process::random(seed) & 3) as u32;
        state.x87_control = 0x37f | rounding << 10;
        state.mxcsr = 0x1f80 | rounding << 13;
        state.masks = std::array::from_fn(|_| process::random(seed));
        for vector in &mut state.vectors {
            *vector = std::array::from_fn(|_| process::random(seed));
        }
        state
    }
}

/// One process's checks.
struct Checker {
    level: Level,
    seed: u64,
    wrong: u32,
}

impl Checker {
    /// Does `action` with what `prepare` sets in the registers; the result must be what
    /// `expect` makes of them.
    fn check(
        &mut self,
        action: Action,
        prepare: impl FnOnce(&mut State),
        expect: impl FnOnce(&mut State),
    ) {
        let mut before = State::random(&mut self.seed);
        prepare(&mut before);
        let mut after = State::empty();
        // SAFETY: `prepare` has set pointers to memory of ours for actions that use them, and
        // the level is this processor's.
        unsafe {
            let level = self.level as u64;
            guest_check_registers(&raw const before, &raw mut after, action as u64, level);
        }
        expect(&mut before);
        self.compare(action, &before, &after);
    }

    fn compare(&mut self, action: Action, expected: &State, found: &State) {
        let mut differ = |name: String, expected: u64, found: u64| {
            if expected != found {
                self.wrong += 1;
                eprintln!("{action:?}: {name} is {found:#x}, not {expected:#x}");
            }
        };
        // A system call changes these by its nature.
        let lost: &[usize] = if action == Action::Yield {
            &[RCX, R11]
        } else {
            &[]
        };
        for register in (0..16).filter(|r| *r != RSP && !lost.contains(r)) {
            let (expected, found) = (expected.general[register], found.general[register]);
            differ(format!("general register {register}"), expected, found);
        }
        differ("flags".into(), expected.flags, found.flags & FLAGS);
        differ("x87 register".into(), expected.x87, found.x87);
        let control = |state: &State| u64::from(state.x87_control);
        differ("x87 control word".into(), control(expected), control(found));
        differ("mxcsr".into(), expected.mxcsr.into(), found.mxcsr.into());
        let (vectors, parts) = self.level.vectors();
        for vector in 0..vectors {
            for part in 0..parts {
                let (expected, found) =
                    (expected.vectors[vector][part], found.vectors[vector][part]);
                differ(format!("vector {vector}, part {part}"), expected, found);
            }
        }
        if self.level == Level::Avx512 {
            for mask in 1..8 {
                let (expected, found) = (expected.masks[mask], found.masks[mask]);
                differ(format!("mask {mask}"), expected, found);
            }
        }
    }

    /// All checks that need no second process.
    fn round(&mut self) -> io::Result<()> {
        let fresh = Pages::map(4 * REPEATS)?;
        for index in 0..REPEATS {
            // Somewhere within a page that is not there yet.
            let (stored, loaded) = (fresh.page(index), fresh.page(REPEATS + index));
            self.store_at(stored.wrapping_add(8 * index));
            self.check(
                Action::Load,
                |state| state.general[RSI] = loaded as u64,
                |state| state.general[RAX] = 0,
            );
            self.turn(TURNS);
            self.check(
                Action::Yield,
                |state| state.general[RAX] = libc::SYS_sched_yield as u64,
                |state| state.general[RAX] = 0,
            );
        }
        for _ in 0..REPEATS / 2 {
            self.copy()?;
        }
        Ok(())
    }

    /// A loop that does nothing else.
    fn turn(&mut self, turns: u64) {
        self.check(
            Action::Loop,
            |state| state.general[RCX] = turns,
            |state| state.general[RCX] = 0,
        );
    }

    /// A store, read back.
    fn store_at(&mut self, address: *mut u8) {
        let mut value = 0;
        self.check(
            Action::Store,
            |state| {
                state.general[RSI] = address as u64;
                value = state.general[RAX];
            },
            |_| {},
        );
        // SAFETY: the address is that of eight bytes of a mapping of ours.
        let stored = unsafe { address.cast::<u64>().read_unaligned() };
        if stored != value {
            self.wrong += 1;
            eprintln!("stored {value:#x}, but there is {stored:#x}");
        }
    }

    /// A string operation that faults on its way.
    fn copy(&mut self) -> io::Result<()> {
        const OFFSET: usize = 100;
        let mut source = Pages::map(2)?;
        for byte in source.bytes() {
            *byte = process::random(&mut self.seed) as u8;
        }
        let mut target = Pages::map(3)?;
        let (from, to) = (source.page(0) as u64, target.page(0) as u64 + OFFSET as u64);
        self.check(
            Action::Copy,
            |state| {
                state.flags &= !DIRECTION;
                state.general[RSI] = from;
                state.general[RDI] = to;
                state.general[RCX] = COPIED as u64;
            },
            |state| {
                state.general[RSI] += COPIED as u64;
                state.general[RDI] += COPIED as u64;
                state.general[RCX] = 0;
            },
        );
        let bytes = target.bytes();
        let (head, rest) = bytes.split_at(OFFSET);
        let (middle, tail) = rest.split_at(COPIED);
        if middle != source.bytes() || head.iter().chain(tail).any(|byte| *byte != 0) {
            self.wrong += 1;
            eprintln!("a string operation copied something else");
        }
        Ok(())
    }

    /// Stores to pages that are shared with the parent until then, in a child.
    fn copy_on_write(&mut self) -> io::Result<()> {
        let mut shared = Pages::map(REPEATS)?;
        for (byte, index) in shared.bytes().iter_mut().zip(0usize..) {
            *byte = (index / 7) as u8;
        }
        let is_intact = |shared: &mut Pages, except: Option<usize>| {
            shared.bytes().iter().enumerate().all(|(index, byte)| {
                let changed = except.is_some_and(|at| (at..at + 8).contains(&(index % PAGE)));
                changed || *byte == (index / 7) as u8
            })
        };
        const AT: usize = 512;
        let child = process::fork(|| {
            self.seed ^= 0x5555;
            self.wrong = 0;
            for index in 0..REPEATS {
                self.store_at(shared.page(index).wrapping_add(AT));
            }
            if !is_intact(&mut shared, Some(AT)) {
                self.wrong += 1;
                eprintln!("a copied page has lost bytes");
            }
            i32::from(self.wrong > 0)
        })?;
        let end = process::wait(child)?;
        if end != End::Exited(0) {
            self.wrong += 1;
            eprintln!("the child that copies on write: {end:?}");
        }
        if !is_intact(&mut shared, None) {
            self.wrong += 1;
            eprintln!("a child's store is seen by its parent");
        }
        Ok(())
    }
}

/// The checks of one process that was just executed.
pub(crate) fn child(seed: u64) -> ExitCode {
    let mut checker = Checker {
        level: Level::of_this_processor(),
        seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        wrong: 0,
    };
    let result = checker.round().and_then(|()| checker.copy_on_write());
    if let Err(error) = result {
        eprintln!("guest-check: {error}");
        return ExitCode::from(2);
    }
    ExitCode::from(u8::from(checker.wrong > 0))
}

/// Holds values in all registers for most of the time, for so many seconds: what stops the
/// processor and lets it go on will find them there.
pub(crate) fn hold(seconds: u64) -> Report {
    let level = Level::of_this_processor();
    let mut checker = Checker {
        level,
        seed: u64::from(std::process::id()) | 1,
        wrong: 0,
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        checker.turn(LONG_TURNS);
    }
    let json = json!({ "bad": checker.wrong, "vectors": format!("{level:?}") });
    Report {
        good: checker.wrong == 0,
        json,
    }
}

/// Runs `rounds` new processes in each of `workers` at once.
pub(crate) fn run(workers: u32, rounds: u32) -> io::Result<Report> {
    let program = std::env::current_exe()?;
    let mut pids = Vec::new();
    for worker in 0..workers {
        pids.push(process::fork(|| {
            let mut bad = 0;
            for round in 0..rounds {
                let seed = u64::from(worker * rounds + round) + 1;
                let status = process::fork(|| {
                    let seed = seed.to_string();
                    // Only returns if it fails.
                    drop(Command::new(&program).args([CHILD, &seed]).exec());
                    99
                })
                .and_then(process::wait);
                match status {
                    Ok(End::Exited(0)) => {}
                    other => {
                        eprintln!("worker {worker}, round {round}: {other:?}");
                        bad += 1;
                    }
                }
            }
            bad.min(100)
        })?);
    }
    let mut bad = 0;
    for pid in pids {
        bad += match process::wait(pid)? {
            End::Exited(count) => count,
            End::Signaled(_) => 1,
        };
    }
    let json = json!({
        "processes": workers * rounds,
        "bad": bad,
        "vectors": format!("{:?}", Level::of_this_processor()),
    });
    Ok(Report {
        good: bad == 0,
        json,
    })
}
