//! What an interface counts. "Receive" is towards the guest.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one direction.
#[derive(Debug, Default)]
pub(crate) struct Direction {
    /// Frames passed on.
    pub(crate) packets: AtomicU64,
    /// Their bytes, without virtio headers.
    pub(crate) bytes: AtomicU64,
    /// Well-formed frames for which there was no room.
    pub(crate) dropped: AtomicU64,
    /// Frames that were refused as malformed.
    pub(crate) errors: AtomicU64,
}

impl Direction {
    /// Counts a frame of `bytes`.
    pub(crate) fn passed(&self, bytes: usize) {
        add(&self.packets, 1);
        add(&self.bytes, bytes as u64);
    }

    /// Counts a frame that had no room.
    pub(crate) fn drop_one(&self) {
        add(&self.dropped, 1);
    }

    /// Counts a frame that was refused.
    pub(crate) fn refuse_one(&self) {
        add(&self.errors, 1);
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Counters of an interface, over all its queues.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) rx: Direction,
    pub(crate) tx: Direction,
}

impl Metrics {
    pub(crate) fn read(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("rx_packets", get(&self.rx.packets)),
            ("rx_bytes", get(&self.rx.bytes)),
            ("rx_dropped", get(&self.rx.dropped)),
            ("rx_errors", get(&self.rx.errors)),
            ("tx_packets", get(&self.tx.packets)),
            ("tx_bytes", get(&self.tx.bytes)),
            ("tx_dropped", get(&self.tx.dropped)),
            ("tx_errors", get(&self.tx.errors)),
        ]
    }
}
