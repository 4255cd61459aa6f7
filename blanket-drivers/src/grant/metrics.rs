//! What became of the pages that a backend asked for.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of [`Pages`](super::Pages); several may share them.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Kept pages that were used again.
    pub(super) hits: AtomicU64,
    /// Pages that were to be kept and were not there.
    pub(super) misses: AtomicU64,
    /// Kept pages that made room for others.
    pub(super) evictions: AtomicU64,
    /// Kept pages whose grants did not stand any more.
    pub(super) revocations: AtomicU64,
    pub(super) maps: AtomicU64,
    pub(super) unmaps: AtomicU64,
    /// References that were refused.
    pub(super) refusals: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Metrics {
    /// The counters by name.
    #[must_use]
    pub fn list(&self) -> [(&'static str, u64); 7] {
        [
            ("grant_hits", &self.hits),
            ("grant_misses", &self.misses),
            ("grant_evictions", &self.evictions),
            ("grant_revocations", &self.revocations),
            ("grant_maps", &self.maps),
            ("grant_unmaps", &self.unmaps),
            ("grant_refusals", &self.refusals),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}
