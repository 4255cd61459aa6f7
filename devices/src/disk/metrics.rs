//! What a disk has done.

use std::fmt;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blanket_drivers::store::Operation;

/// Is told when a write finds no room.
type WhenFull = Box<dyn Fn() + Send + Sync>;

/// Counters of a disk, shared by its queues.
#[derive(Default)]
pub struct Metrics {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
    /// Writes that wait for room, now.
    held: AtomicU64,
    /// Whether an error was one of a device that is not there.
    gone: AtomicBool,
    when_full: OnceLock<WhenFull>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.list()).finish()
    }
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

    /// Has `call` called, on the thread that serves the disk, whenever a write
    /// finds no room and is kept until the disk is resumed. The first one counts.
    pub fn when_full(&self, call: impl Fn() + Send + Sync + 'static) {
        // A second one is nobody's.
        let _ = self.when_full.set(Box::new(call));
    }

    /// So many writes wait for room now.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// What is wrong with the disk and what helps, if anything is.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let (held, errors) = (self.held(), self.errors.load(Ordering::Relaxed));
        if held > 0 {
            return Some(format!(
                "no room on the node for {held} of the guest's writes: make some where the image is, then resume the VM; nothing is lost"
            ));
        }
        if self.gone.load(Ordering::Relaxed) {
            return Some(format!(
                "its volume is gone, {errors} requests have failed: attach it again and start the VM anew"
            ));
        }
        (errors > 0).then(|| {
            format!("{errors} requests have failed: the monitor's log has the first one's reason")
        })
    }

    /// A write waits for room. True for the first of those that do.
    pub(crate) fn hold(&self) -> bool {
        let first = self.held.fetch_add(1, Ordering::Relaxed) == 0;
        if let Some(call) = self.when_full.get() {
            call();
        }
        first
    }

    /// So many writes wait no more.
    pub(crate) fn release(&self, count: usize) {
        self.held.fetch_sub(count as u64, Ordering::Relaxed);
    }

    /// A request failed for this reason. True for the first one.
    pub(crate) fn failed_with(&self, error: &io::Error) -> bool {
        // Another one's error tells of a medium, not of a missing device.
        if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) {
            self.gone.store(true, Ordering::Relaxed);
        }
        self.failed()
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
            ("held", &self.held),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .into()
    }
}
