//! The memory that devices are told about.

use blanket_firmware::io::{Width, load, store};
use blanket_firmware::random::Random;

/// First address of the arena. The payload lies below.
pub(crate) const START: u64 = 16 << 20;
/// The bit that makes any address at least [`START`].
pub(crate) const START_BIT: u64 = START;
/// Where descriptors, indirect tables and data lie, from [`START`] on.
const TABLES: u64 = 8 << 20;
const DATA: u64 = 12 << 20;
/// Bytes of the indirect tables.
const FILLED: u64 = 1 << 20;
/// Bytes of data that are filled.
const FILLED_DATA: u64 = 64 << 10;
/// Bytes between the rings of two queues.
const RING_SPACE: u64 = 256 << 10;

/// RAM from [`START`] on.
pub(crate) struct Arena {
    end: u64,
}

impl Arena {
    /// The arena that ends at `end`; none if that is too little.
    pub(crate) fn new(end: u64) -> Option<Self> {
        (end >= START + DATA + 16 * FILLED).then_some(Self { end })
    }

    /// Where queue `index` has its rings if they are to be sound.
    pub(crate) fn rings(&self, index: u16) -> u64 {
        START + u64::from(index % 32) * RING_SPACE
    }

    /// Somewhere in the indirect tables.
    pub(crate) fn table(&self, random: &mut Random) -> u64 {
        START + TABLES + random.below(FILLED / 16) * 16
    }

    /// Somewhere in the data.
    pub(crate) fn data(&self, random: &mut Random) -> u64 {
        START + DATA + random.below(FILLED_DATA)
    }

    /// An address that a device should not be given, but never one of the
    /// payload's own memory.
    pub(crate) fn garbage(&self, random: &mut Random) -> u64 {
        match random.below(4) {
            0 => START + random.below(self.end - START),
            1 => self.end - random.below(64),
            2 => 0xc000_0000 + random.below(0x4000_0000),
            _ => random.nasty() | START_BIT,
        }
    }

    /// Fills the data with small and large numbers: many of them pass for
    /// request types, sectors and header fields.
    pub(crate) fn fill_data(&self, random: &mut Random) {
        for at in (0..FILLED_DATA).step_by(4) {
            self.put(START + DATA + at, Width::Long, random.nasty());
        }
    }

    /// Fills a part of the indirect tables with what `make` gives for it.
    pub(crate) fn fill_tables(&self, random: &mut Random, make: impl Fn(&mut Random, u64)) {
        let first = random.below(FILLED / 16 - 64);
        for i in first..first + 64 {
            make(random, START + TABLES + 16 * i);
        }
    }

    /// Stores in the arena.
    pub(crate) fn put(&self, address: u64, width: Width, value: u64) {
        assert!(address >= START && address + width.bytes() <= self.end);
        // SAFETY: the arena is mapped RAM that this program does not rely on.
        unsafe { store(address, width, value) }
    }

    /// Loads from the arena.
    pub(crate) fn get(&self, address: u64, width: Width) -> u64 {
        assert!(address >= START && address + width.bytes() <= self.end);
        // SAFETY: the arena is mapped RAM.
        unsafe { load(address, width) }
    }
}
