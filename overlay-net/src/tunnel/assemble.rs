//! Frames whose chunks did not come together: they are copied, and put
//! together, within bounds.

use std::time::Duration;

use super::wire::{Facts, MAX_CHUNKS};
use super::{PeerId, Time};
use crate::drops::{Drops, Reason};

/// Frames that may be incomplete at once.
const FRAMES: usize = 64;
/// And of one peer.
const OF_PEER: usize = 24;
/// How long a frame may stay incomplete.
pub(super) const AGE: Duration = Duration::from_millis(100);

/// What names a frame: the session, and the counter of its first chunk.
pub(super) type Name = (u32, u64);

struct Slot {
    name: Name,
    peer: PeerId,
    facts: Facts,
    /// Bytes of a chunk.
    size: usize,
    /// Which chunks have come.
    have: u64,
    since: Time,
    bytes: Vec<u8>,
}

/// Frames that are incomplete.
#[derive(Default)]
pub(super) struct Assembler {
    slots: Vec<Slot>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
}

impl Assembler {
    /// Takes a chunk; the frame if it was the last one missing. The frame is
    /// to be given back ([`Assembler::recycle`]).
    #[allow(clippy::too_many_arguments)]
    pub(super) fn add(
        &mut self,
        now: Time,
        peer: PeerId,
        name: Name,
        facts: &Facts,
        index: u8,
        size: usize,
        copy: impl FnOnce(&mut [u8]),
        drops: &mut Drops,
    ) -> Option<Vec<u8>> {
        let chunks = facts.len.div_ceil(size);
        if chunks > MAX_CHUNKS || usize::from(index) >= chunks {
            drops.add(Reason::Malformed);
            return None;
        }
        let at = match self.slots.iter().position(|slot| slot.name == name) {
            Some(at) => at,
            None => self.begin(now, peer, name, facts, size, drops),
        };
        let slot = &mut self.slots[at];
        let start = usize::from(index) * size;
        let room = slot.bytes.get_mut(start..(start + size).min(facts.len));
        let same = slot.facts == *facts && slot.size == size && slot.have & 1 << index == 0;
        let (Some(room), true) = (room, same) else {
            drops.add(Reason::Malformed);
            return None;
        };
        copy(room);
        slot.have |= 1 << index;
        if slot.have.count_ones() as usize == chunks {
            return Some(self.slots.swap_remove(at).bytes);
        }
        None
    }

    fn begin(
        &mut self,
        now: Time,
        peer: PeerId,
        name: Name,
        facts: &Facts,
        size: usize,
        drops: &mut Drops,
    ) -> usize {
        let mine = self.slots.iter().filter(|slot| slot.peer == peer).count();
        if mine >= OF_PEER {
            self.drop_oldest(|slot| slot.peer == peer, drops);
        } else if self.slots.len() >= FRAMES {
            self.drop_oldest(|_| true, drops);
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.resize(facts.len, 0);
        self.slots.push(Slot {
            name,
            peer,
            facts: *facts,
            size,
            have: 0,
            since: now,
            bytes,
        });
        self.slots.len() - 1
    }

    fn drop_oldest(&mut self, which: impl Fn(&Slot) -> bool, drops: &mut Drops) {
        let slots = self.slots.iter().enumerate();
        let oldest = slots
            .filter(|(_, slot)| which(slot))
            .min_by_key(|(_, slot)| slot.since);
        if let Some((at, _)) = oldest {
            let slot = self.slots.swap_remove(at);
            self.recycle(slot.bytes);
            drops.add(Reason::Incomplete);
        }
    }

    /// Takes a frame's buffer back.
    pub(super) fn recycle(&mut self, bytes: Vec<u8>) {
        if self.spare.len() + self.slots.len() < FRAMES {
            self.spare.push(bytes);
        }
    }

    /// Drops what has been incomplete for too long.
    pub(super) fn age(&mut self, now: Time, drops: &mut Drops) {
        let mut at = 0;
        while at < self.slots.len() {
            if now >= self.slots[at].since + AGE {
                let slot = self.slots.swap_remove(at);
                self.recycle(slot.bytes);
                drops.add(Reason::Incomplete);
            } else {
                at += 1;
            }
        }
        if self.slots.is_empty() {
            // Rare frames need no memory that is kept.
            self.spare.truncate(FRAMES / 4);
        }
    }

    /// Drops what a peer has sent.
    pub(super) fn forget(&mut self, peer: PeerId) {
        self.slots.retain(|slot| slot.peer != peer);
    }

    /// When the next one is too old.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.slots.iter().map(|slot| slot.since + AGE).min()
    }

    /// Frames and bytes that it holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        let slots = self.slots.iter().map(|slot| &slot.bytes);
        let bytes = slots.chain(&self.spare).map(Vec::capacity).sum();
        (self.slots.len(), bytes)
    }
}
