//! Hypercalls with garbage.

use blanket_firmware::random::Random;

use crate::entry::hypercall;
use crate::trace;

/// Numbers of hypercalls (`xen.h`).
pub(crate) const SET_TRAP_TABLE: u64 = 0;
pub(crate) const CONSOLE_IO: u64 = 18;
pub(crate) const SCHED_OP: u64 = 29;
pub(crate) const CALLBACK_OP: u64 = 30;
const SET_GDT: u64 = 2;
const MEMORY_OP: u64 = 12;
const MULTICALL: u64 = 13;
const IRET: u64 = 23;
const VCPU_OP: u64 = 24;
const MMUEXT_OP: u64 = 26;
const EVENT_CHANNEL_OP: u64 = 32;
const GRANT_TABLE_OP: u64 = 20;

/// What the caller does not survive, or does not return from: tables of
/// handlers and descriptors, changes of page tables, and returns.
const HARMFUL: [u64; 6] = [SET_TRAP_TABLE, SET_GDT, 10, 14, 1, IRET];
/// Numbers that are tried: behind the last one there is nothing.
const NUMBERS: u64 = 60;

const WORDS: usize = 2048;
/// Where arguments point. It is written by hypercalls too.
static mut ARENA: [u64; WORDS] = [0; WORDS];

/// What hypercalls with commands have, and which of them leave the caller alive.
struct Commands {
    number: u64,
    count: u64,
    /// Shut down, block, poll; give memory away; stop oneself, or have one's
    /// information written over anything.
    harmful: &'static [u64],
}

const COMMANDS: [Commands; 5] = [
    Commands {
        number: SCHED_OP,
        count: 8,
        harmful: &[1, 2, 3, 4, 5, 6],
    },
    Commands {
        number: MEMORY_OP,
        count: 28,
        harmful: &[1, 11],
    },
    Commands {
        number: VCPU_OP,
        count: 15,
        harmful: &[2, 10],
    },
    Commands {
        number: EVENT_CHANNEL_OP,
        count: 15,
        harmful: &[],
    },
    Commands {
        number: GRANT_TABLE_OP,
        count: 14,
        harmful: &[],
    },
];

/// Fills the arena and makes some hypercalls.
pub(crate) fn step(tame: bool, random: &mut Random) {
    for i in 0..64 {
        let at = random.below(WORDS as u64) as usize;
        let value = if i % 2 == 0 {
            random.nasty()
        } else {
            random.below(64)
        };
        put(at, value);
    }
    for _ in 0..=random.below(4) {
        if random.one_in(4) {
            multicall(tame, random);
        } else if random.one_in(4) {
            extended(tame, random);
        } else {
            let (number, arguments) = call(tame, random);
            trace(number, &arguments);
            hypercall(number, arguments);
        }
    }
}

fn put(at: usize, value: u64) {
    // SAFETY: within the arena, to which there is no reference; the
    // hypervisor is told of it by address.
    unsafe {
        (&raw mut ARENA)
            .cast::<u64>()
            .add(at % WORDS)
            .write_volatile(value);
    }
}

fn arena() -> u64 {
    &raw const ARENA as u64
}

/// An argument: a number, or an address. A tame one is no address of anything
/// but the arena.
fn argument(tame: bool, random: &mut Random) -> u64 {
    match random.below(if tame { 6 } else { 10 }) {
        0 | 1 => arena() + 8 * random.below(WORDS as u64),
        // Unaligned, and across a page.
        2 => (arena() + 0x2000) / 4096 * 4096 - random.below(64),
        // Unmapped, and not canonical.
        3 => 0x7f00_0000_0000 + random.bits() % 4096,
        4 => 0x8000_0000_0000_0000 | random.bits() >> 16,
        5 => random.below(16),
        6 => 0xffff_8080_0000_0000 + random.below(0x100_0000),
        7 => 0xffff_8100_0000_0000 + random.below(0x400_0000),
        8 => 0x20_0000 + random.below(0x10_0000),
        _ => random.nasty(),
    }
}

/// A hypercall and its arguments.
fn call(tame: bool, random: &mut Random) -> (u64, [u64; 6]) {
    let mut arguments = [0; 6];
    for value in &mut arguments {
        *value = argument(tame, random);
    }
    if random.one_in(2) {
        let commands = &COMMANDS[random.below(COMMANDS.len() as u64) as usize];
        let command = random.below(commands.count + 2);
        // Others go on with it now and then, or nothing would come after it.
        let harmful = commands.harmful.contains(&command);
        if !harmful || !tame && random.one_in(64) {
            arguments[0] = command;
            if commands.number == VCPU_OP {
                arguments[1] = if random.one_in(4) { random.nasty() } else { 0 };
                arguments[2] = argument(tame, random);
            }
            return (commands.number, arguments);
        }
    }
    loop {
        let number = if random.one_in(16) && !tame {
            random.nasty()
        } else {
            random.below(NUMBERS)
        };
        let commanded = COMMANDS.iter().any(|commands| commands.number == number);
        let unsafe_here = HARMFUL.contains(&number) || number == MULTICALL || number == MMUEXT_OP;
        let allowed = !commanded && (!unsafe_here || !tame && random.one_in(8));
        if allowed {
            return (number, arguments);
        }
    }
}

/// How many entries there are said to be. Seldom far too many: a guest may have
/// its own time wasted.
fn claim(tame: bool, count: usize, random: &mut Random) -> u64 {
    if tame || random.one_in(2) {
        count as u64
    } else if random.one_in(64) {
        random.nasty()
    } else {
        random.below(64)
    }
}

/// Several hypercalls in one, of which some are as odd as any.
fn multicall(tame: bool, random: &mut Random) {
    const ENTRY: usize = 8;
    let count = random.below(8) as usize;
    for i in 0..count {
        let (number, arguments) = call(tame, random);
        trace(number, &arguments);
        put(i * ENTRY, number);
        for (j, value) in arguments.iter().enumerate() {
            put(i * ENTRY + 2 + j, *value);
        }
    }
    let claimed = claim(tame, count, random);
    trace(MULTICALL, &[claimed]);
    hypercall(MULTICALL, [arena(), claimed, 0, 0, 0, 0]);
}

/// `mmuext_op`: pins, flushes, and page tables to load.
fn extended(tame: bool, random: &mut Random) {
    const ENTRY: usize = 3;
    /// Loads a page table; clears and copies pages.
    const HARMFUL: [u64; 4] = [5, 15, 16, 17];
    let count = random.below(5) as usize;
    for i in 0..count {
        let command = random.below(22);
        let safe = if tame && HARMFUL.contains(&command) {
            6
        } else {
            command
        };
        let words = [
            safe,
            random.below(0x8000) | random.below(2) << 40,
            argument(tame, random),
        ];
        trace(MMUEXT_OP, &words);
        for (j, word) in words.into_iter().enumerate() {
            put(i * ENTRY + j, word);
        }
    }
    let pointer = if random.one_in(8) {
        argument(tame, random)
    } else {
        arena()
    };
    let claimed = claim(tame, count, random);
    // An address of anything else would be read as other commands.
    let pointer = if tame { arena() } else { pointer };
    hypercall(
        MMUEXT_OP,
        [pointer, claimed, argument(tame, random), 0x7ff0, 0, 0],
    );
}
