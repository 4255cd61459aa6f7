//! The directory: which node has which address.
//!
//! Every node has all of it, and tells all others of what changes on it; a
//! lookup asks nobody. See `docs/overlay.md` for why it is enough that all
//! agree in the end.
//!
//! What is known of a key is one [`Record`] with a [`Version`]; of two, the
//! one with the greater version holds (and of two of the same version, which
//! an honest node never makes, the greater record). So it does not matter in
//! which order, how often, and by what way records come: merging is
//! commutative, associative and idempotent.
//!
//! A node vouches for what it claims. It answers a record that takes from it
//! what it still has, or gives to it what it does not have, with one of a
//! greater version. Only a record that says that *another* node has it, of a
//! greater version, is believed: that is how a guest moves.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

use crate::bridge::{Located, Vlan};
use crate::frame::{Mac, Vni};

mod file;
mod gossip;
mod record;
#[cfg(test)]
mod tests;
pub mod wire;

pub use file::{FileError, Source, StaticFile};
pub use gossip::{Gossip, Outgoing, Settings, Traffic};
pub use record::{
    ADDRESSES, EPOCHS, GROUPS, GroupId, GroupList, Key, NodeId, Record, Value, Version,
};

/// What became of a record that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Merged {
    /// It holds now.
    News,
    /// It was known.
    Known,
    /// There is a newer one, which its sender does not know.
    Older,
    /// It was not taken, for this reason.
    Refused(Refused),
}

/// Why a record was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// It contradicts itself.
    #[error("the record contradicts itself")]
    Unsound,
    /// The directory is full, or its maker's part of it is.
    #[error("the directory is full: raise its limits, or remove stations")]
    Full,
}

/// Limits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Records altogether.
    pub records: usize,
    /// Records of one node.
    pub per_node: usize,
    /// How long it is remembered that something is gone: longer than a
    /// partition from which a node comes back with what it knew before.
    pub tombstones: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            records: 1 << 20,
            per_node: 1 << 17,
            tombstones: Duration::from_secs(7200),
        }
    }
}

/// Parts of the directory that are compared.
pub const BUCKETS: usize = 128;

type Bucket = u8;

#[derive(Clone, Debug)]
struct Slot {
    record: Record,
    hash: u64,
    /// Of a tombstone: when it is not told any more, then when it is
    /// forgotten.
    until: Duration,
    /// It is compared with others' and told to them.
    told: bool,
}

/// Counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Records that came and hold.
    pub news: u64,
    /// Records that were not taken.
    pub refused: u64,
    /// What this node had claimed and another has now: guests that moved, or
    /// addresses that two guests have.
    pub lost: u64,
    /// What others took for this node's or for nobody's, wrongly.
    pub corrected: u64,
}

/// The directory, as one node knows it.
#[derive(Debug)]
pub struct Directory {
    me: NodeId,
    limits: Limits,
    records: BTreeMap<(Bucket, Key), Slot>,
    /// What is here, as far as this node was told by its own.
    own: HashMap<Key, Value>,
    per_node: HashMap<NodeId, usize>,
    hashes: [u64; BUCKETS],
    /// Which nodes are in which network.
    members: BTreeSet<(Vni, NodeId)>,
    /// Tombstones, by their `until`.
    tombstones: BTreeSet<(Duration, Key)>,
    changed: BTreeSet<Key>,
    /// What this node has to tell others.
    fresh: BTreeSet<Key>,
    counts: Counts,
}

fn bucket(key: &Key) -> Bucket {
    let mut bytes = Vec::with_capacity(24);
    wire::put_key(&mut bytes, key);
    blake3::hash(&bytes).as_bytes()[0] % BUCKETS as u8
}

fn hash(record: &Record) -> u64 {
    let mut bytes = Vec::with_capacity(64);
    wire::put_record(&mut bytes, record, Duration::ZERO);
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..8]);
    u64::from_be_bytes(first)
}

impl Directory {
    /// An empty one, of node `me`.
    #[must_use]
    pub fn new(me: NodeId, limits: Limits) -> Self {
        Self {
            me,
            limits,
            records: BTreeMap::new(),
            own: HashMap::new(),
            per_node: HashMap::new(),
            hashes: [0; BUCKETS],
            members: BTreeSet::new(),
            tombstones: BTreeSet::new(),
            changed: BTreeSet::new(),
            fresh: BTreeSet::new(),
            counts: Counts::default(),
        }
    }

    /// Whose it is.
    #[must_use]
    pub fn me(&self) -> NodeId {
        self.me
    }

    fn slot(&self, key: &Key) -> Option<&Slot> {
        self.records.get(&(bucket(key), *key))
    }

    /// What is known of a key; also that it is gone.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Record> {
        self.slot(key).map(|slot| &slot.record)
    }

    /// This node has it now, whoever had it before: the new version's epoch is
    /// greater than the known one's and `after`. A guest that migrates brings
    /// its epoch along as `after`; for one that is started, the time in
    /// milliseconds since 1970 is good, since a record that is not known yet
    /// may lie about.
    ///
    /// # Errors
    ///
    /// The directory is full, or the value is not one of the key's.
    pub fn claim(
        &mut self,
        now: Duration,
        key: Key,
        value: Value,
        after: u64,
    ) -> Result<Version, Refused> {
        let known = self.get(&key);
        // Saying the same again is no news.
        if let Some(record) = known
            && record.version.node == self.me
            && record.value.as_ref() == Some(&value)
            && record.version.epoch > after
        {
            let version = record.version;
            self.own.insert(key, value);
            return Ok(version);
        }
        let epoch = known.map_or(0, |record| record.version.epoch).max(after);
        let version = Version {
            epoch: epoch.saturating_add(1).min(EPOCHS - 1),
            node: self.me,
        };
        let record = Record {
            key,
            version,
            value: Some(value.clone()),
        };
        if !record.is_sound() {
            return Err(Refused::Unsound);
        }
        self.put(now, record, Duration::ZERO)?;
        self.own.insert(key, value);
        self.fresh.insert(key);
        Ok(version)
    }

    /// This node does not have it any more, and nobody else does. Without
    /// effect if another node has it by now.
    pub fn withdraw(&mut self, now: Duration, key: &Key) {
        if self.own.remove(key).is_some() {
            self.bury(now, key);
        }
    }

    /// Another node has what this node had: the source's word for what the
    /// destination claims, with the same version. So it is known even if the
    /// destination cannot tell anybody yet. Without effect if this node does
    /// not claim it any more.
    pub fn hand_over(&mut self, now: Duration, key: &Key, to: NodeId) {
        if self.own.remove(key).is_none() {
            return;
        }
        let Some(mut record) = self.get(key).cloned() else {
            return;
        };
        if record.version.node == self.me {
            record.version = Version {
                epoch: (record.version.epoch + 1).min(EPOCHS - 1),
                node: to,
            };
            if record.is_sound() && self.put(now, record, Duration::ZERO).is_ok() {
                self.fresh.insert(*key);
            }
        }
    }

    /// Makes a tombstone for what this node is said to have.
    fn bury(&mut self, now: Duration, key: &Key) {
        let Some(record) = self
            .get(key)
            .filter(|record| record.version.node == self.me && record.value.is_some())
        else {
            return;
        };
        let version = Version {
            epoch: (record.version.epoch + 1).min(EPOCHS - 1),
            node: self.me,
        };
        let record = Record {
            key: *key,
            version,
            value: None,
        };
        // There is room: the key is there.
        if self.put(now, record, Duration::ZERO).is_ok() {
            self.fresh.insert(*key);
        }
    }

    /// Removes all that a node has, which is gone for good.
    pub fn remove_node(&mut self, now: Duration, node: NodeId) {
        let of = |slot: &&Slot| slot.record.version.node == node && slot.record.value.is_some();
        let gone: Vec<Record> = self
            .records
            .values()
            .filter(of)
            .map(|slot| slot.record.clone())
            .collect();
        for mut record in gone {
            record.version = Version {
                epoch: (record.version.epoch + 1).min(EPOCHS - 1),
                node: self.me,
            };
            record.value = None;
            let key = record.key;
            if self.put(now, record, Duration::ZERO).is_ok() {
                self.fresh.insert(key);
            }
        }
    }

    /// Takes what a [`Source`] has; this node claims what is its own.
    pub fn load(&mut self, now: Duration, records: Vec<Record>) {
        for record in records {
            match record.value {
                Some(value) if record.version.node == self.me => {
                    if self
                        .claim(now, record.key, value, record.version.epoch)
                        .is_err()
                    {
                        self.counts.refused += 1;
                    }
                }
                _ => {
                    self.merge(now, record, Duration::ZERO);
                }
            }
        }
    }

    /// Takes a record from elsewhere, a tombstone with its age.
    pub fn merge(&mut self, now: Duration, record: Record, age: Duration) -> Merged {
        let merged = self.merge_one(now, record, age);
        match merged {
            Merged::News => self.counts.news += 1,
            Merged::Refused(_) => self.counts.refused += 1,
            Merged::Known | Merged::Older => {}
        }
        merged
    }

    fn merge_one(&mut self, now: Duration, record: Record, age: Duration) -> Merged {
        if !record.is_sound() {
            return Merged::Refused(Refused::Unsound);
        }
        if let Some(known) = self.get(&record.key) {
            if *known == record {
                return Merged::Known;
            }
            if !record.beats(known) {
                return Merged::Older;
            }
        }
        let key = record.key;
        let (mine, gone) = (record.version.node == self.me, record.value.is_none());
        let epoch = record.version.epoch;
        if let Err(refused) = self.put(now, record, age) {
            return Merged::Refused(refused);
        }
        match self.own.get(&key) {
            // It is here all the same.
            Some(value) if mine || gone => {
                let value = value.clone();
                self.counts.corrected += 1;
                // There is room: the key is there.
                let _ = self.claim(now, key, value, epoch);
            }
            // It has moved, and who moved it withdraws the claim here; or the
            // other one is wrong, and will say so: then it is claimed again.
            Some(_) => self.counts.lost += 1,
            // Somebody remembers what this node had before it was started
            // again.
            None if mine && !gone => {
                self.counts.corrected += 1;
                self.bury(now, &key);
            }
            None => {}
        }
        Merged::News
    }

    fn put(&mut self, now: Duration, record: Record, age: Duration) -> Result<(), Refused> {
        let key = record.key;
        let (at, node) = (bucket(&key), record.version.node);
        let place = (at, key);
        if !self.records.contains_key(&place) {
            let of_node = self.per_node.get(&node).copied().unwrap_or(0);
            let own = node == self.me;
            if self.records.len() >= self.limits.records
                || (!own && of_node >= self.limits.per_node)
            {
                return Err(Refused::Full);
            }
        }
        self.take_out(&place);
        let half = self.limits.tombstones / 2;
        let told = record.value.is_some() || age < half;
        let hash = hash(&record);
        let left = if told { half } else { self.limits.tombstones };
        let until = now + left.saturating_sub(age);
        if record.value.is_none() {
            self.tombstones.insert((until, key));
        }
        if told {
            self.hashes[usize::from(at)] ^= hash;
        }
        *self.per_node.entry(node).or_default() += 1;
        if let (Key::Member(vni, node), Some(_)) = (key, &record.value) {
            self.members.insert((vni, node));
        }
        let slot = Slot {
            record,
            hash,
            until,
            told,
        };
        self.records.insert(place, slot);
        self.changed.insert(key);
        Ok(())
    }

    fn take_out(&mut self, place: &(Bucket, Key)) {
        let Some(slot) = self.records.remove(place) else {
            return;
        };
        self.tombstones.remove(&(slot.until, place.1));
        if let Key::Member(vni, node) = place.1 {
            self.members.remove(&(vni, node));
        }
        if slot.told {
            self.hashes[usize::from(place.0)] ^= slot.hash;
        }
        let node = slot.record.version.node;
        if let Some(count) = self.per_node.get_mut(&node) {
            *count -= 1;
            if *count == 0 {
                self.per_node.remove(&node);
            }
        }
    }

    /// Forgets old tombstones. First they are not told any more, or nodes
    /// would tell each other of them for ever; while all still know them.
    pub fn expire(&mut self, now: Duration) {
        while let Some((until, key)) = self.tombstones.first().copied() {
            if until > now {
                break;
            }
            self.tombstones.remove(&(until, key));
            let place = (bucket(&key), key);
            let Some(slot) = self.records.get_mut(&place) else {
                continue;
            };
            if slot.told {
                slot.told = false;
                self.hashes[usize::from(place.0)] ^= slot.hash;
                slot.until = until + self.limits.tombstones / 2;
                self.tombstones.insert((slot.until, key));
            } else {
                self.take_out(&place);
            }
        }
    }

    /// The keys of which something else is known than at the last call.
    pub fn changes(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.changed).into_iter().collect()
    }

    /// Which other node has a station: what [`crate::bridge::Bridge::locate`]
    /// takes.
    #[must_use]
    pub fn located(&self, key: &Key) -> Option<Located> {
        let record = self.get(key)?;
        match &record.value {
            Some(Value::Station {
                ips,
                attached,
                isolated,
                ..
            }) if record.version.node != self.me => Some(Located {
                node: record.version.node,
                attached: *attached,
                isolated: *isolated,
                ips: ips.clone(),
            }),
            _ => None,
        }
    }

    /// The other nodes that have ports in a network: what
    /// [`crate::bridge::Bridge::set_members`] takes.
    #[must_use]
    pub fn members(&self, vni: Vni) -> Vec<NodeId> {
        let all = (vni, NodeId(0))..=(vni, NodeId(u64::MAX));
        let nodes = self.members.range(all).map(|(_, node)| *node);
        nodes.filter(|node| *node != self.me).collect()
    }

    /// All records but tombstones.
    pub fn iter(&self) -> impl Iterator<Item = &Record> + '_ {
        let records = self.records.values().map(|slot| &slot.record);
        records.filter(|record| record.value.is_some())
    }

    /// How many records there are, with tombstones.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// What happened.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A hash of each part: where two nodes' are the same, so are their
    /// records.
    #[must_use]
    pub fn hashes(&self) -> &[u64; BUCKETS] {
        &self.hashes
    }

    /// A hash of all.
    #[must_use]
    pub fn root(&self) -> u64 {
        let mut bytes = Vec::with_capacity(BUCKETS * 8);
        for hash in self.hashes {
            bytes.extend(hash.to_be_bytes());
        }
        let mut first = [0; 8];
        first.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..8]);
        u64::from_be_bytes(first)
    }

    /// What others are told of a part, with the ages of tombstones.
    fn part(&self, now: Duration, at: Bucket) -> impl Iterator<Item = (&Record, Duration)> + '_ {
        let first = (at, Key::Station(Vni::default(), Vlan::NONE, Mac([0; 6])));
        let slots = self.records.range(first..);
        let slots = slots.take_while(move |((bucket, _), _)| *bucket == at);
        let told = slots.filter(|(_, slot)| slot.told);
        told.map(move |(_, slot)| (&slot.record, self.age(now, slot)))
    }

    fn age(&self, now: Duration, slot: &Slot) -> Duration {
        match slot.record.value {
            Some(_) => Duration::ZERO,
            None => {
                let half = self.limits.tombstones / 2;
                let life = if slot.told { half } else { half * 2 };
                (now + life).saturating_sub(slot.until)
            }
        }
    }

    fn with_age(&self, now: Duration, key: &Key) -> Option<(&Record, Duration)> {
        let slot = self.slot(key)?;
        Some((&slot.record, self.age(now, slot)))
    }

    /// What this node has to tell others, once.
    fn take_fresh(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.fresh)
    }
}
