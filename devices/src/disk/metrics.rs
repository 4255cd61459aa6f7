//! What a disk has done.

use std::sync::atomic::{AtomicU64, Ordering};

use blanket_drivers::store::Operation;

/// Counters of a disk, shared by its queues.
#[derive(Debug, Default)]
pub struct Metrics {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
}

impl Metrics {
    /// A request was done; `bytes` of data moved.
    pub(crate) fn done(&self, operation: Operation, bytes: u32) {
        let (count, moved) = match operation {
            Operation::Read => (&self.reads, Some(&self.read_bytes)),
            Operation::Write => (&self.writes, Some(&self.written_bytes)),
            Operation::Flush => (&self.flushes, None),
            Operation::Discard | Operation::WriteZeroes => (&self.discards, None),
        };
        count.fetch_add(1, Ordering::Relaxed);
        if let Some(moved) = moved {
            moved.fetch_add(bytes.into(), Ordering::Relaxed);
        }
    }

    /// A request failed. True for the first one.
    pub(crate) fn failed(&self) -> bool {
        self.errors.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// The counters by name.
    #[must_use]
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        [
            ("reads", &self.reads),
            ("writes", &self.writes),
            ("flushes", &self.flushes),
            ("discards", &self.discards),
            ("read_bytes", &self.read_bytes),
            ("written_bytes", &self.written_bytes),
            ("errors", &self.errors),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .into()
    }
}
