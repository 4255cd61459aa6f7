//! The exact-match cache in front of the tables: one worker's.

use std::sync::Arc;

use super::fields::Flat;
use super::walk::Decision;

/// Slots that a frame may lie in.
const WAYS: usize = 2;

#[derive(Debug)]
struct Slot {
    /// What the frames' keys are, as far as any entry looks at them.
    key: Flat,
    table: u8,
    /// Of the tables that decided; those of others do not count.
    generation: u64,
    decision: Arc<Decision>,
    /// What has been counted, but not yet added to the entries' counts.
    packets: u64,
    bytes: u64,
    used: u64,
    /// It is in the list of those with counts.
    listed: bool,
}

/// Of slots that nothing has been put in.
const NEVER: u64 = u64::MAX;

impl Slot {
    fn fold(&mut self) {
        for stats in &self.decision.stats {
            stats.add(self.packets, self.bytes, self.used);
        }
        (self.packets, self.bytes) = (0, 0);
    }
}

/// What has been decided lately, by key. Its size is fixed.
#[derive(Debug)]
pub(super) struct Cache {
    slots: Box<[Slot]>,
    /// Slots with counts that have not been added.
    dirty: Vec<u32>,
    /// Frames that were found.
    pub(super) hits: u64,
    /// Frames that were not.
    pub(super) misses: u64,
}

impl Cache {
    /// A cache of so many decisions, rounded up to a power of 2 (2 to 2^20).
    #[must_use]
    pub(super) fn new(slots: usize) -> Self {
        let slots = slots.clamp(WAYS, 1 << 20).next_power_of_two();
        let nothing = Arc::<Decision>::default();
        let slot = |_| Slot {
            key: Flat::default(),
            table: 0,
            generation: NEVER,
            decision: Arc::clone(&nothing),
            packets: 0,
            bytes: 0,
            used: 0,
            listed: false,
        };
        Self {
            slots: (0..slots).map(slot).collect(),
            dirty: Vec::with_capacity(slots),
            hits: 0,
            misses: 0,
        }
    }

    fn ways(&self, hash: u64) -> [usize; WAYS] {
        let first = hash as usize & (self.slots.len() - 1);
        [first, first ^ 1]
    }

    /// Where the decision for `key` (masked) is.
    #[must_use]
    pub(super) fn find(
        &mut self,
        hash: u64,
        key: &Flat,
        table: u8,
        generation: u64,
    ) -> Option<usize> {
        let found = self.ways(hash).into_iter().find(|at| {
            let slot = &self.slots[*at];
            slot.generation == generation && slot.table == table && slot.key == *key
        });
        match found {
            Some(_) => self.hits += 1,
            None => self.misses += 1,
        }
        found
    }

    /// Remembers a decision, in place of an outdated one or the one that has
    /// not been used for longer; where.
    pub(super) fn put(
        &mut self,
        hash: u64,
        key: Flat,
        table: u8,
        generation: u64,
        decision: Arc<Decision>,
    ) -> usize {
        let slots = &self.slots;
        let rank = |at: &usize| {
            let slot = &slots[*at];
            (slot.generation == generation, slot.used)
        };
        let [first, other] = self.ways(hash);
        let at = if rank(&other) < rank(&first) {
            other
        } else {
            first
        };
        let slot = &mut self.slots[at];
        if slot.packets != 0 {
            slot.fold();
        }
        (slot.key, slot.table, slot.generation) = (key, table, generation);
        slot.decision = decision;
        slot.used = 0;
        at
    }

    /// The decision at `at`.
    pub(super) fn decision(&self, at: usize) -> &Decision {
        &self.slots[at].decision
    }

    /// Counts frames for the decision at `at`, and gives it.
    pub(super) fn count(&mut self, at: usize, packets: u64, bytes: u64, now: u64) -> &Decision {
        let slot = &mut self.slots[at];
        if !slot.listed {
            slot.listed = true;
            self.dirty.push(at as u32);
        }
        slot.packets += packets;
        slot.bytes += bytes;
        slot.used = now;
        &slot.decision
    }

    /// Adds what has been counted to the entries' counts.
    pub(super) fn fold(&mut self) {
        for at in self.dirty.drain(..) {
            let slot = &mut self.slots[at as usize];
            slot.listed = false;
            slot.fold();
        }
    }
}
