//! Connections that have been let through: what belongs to one may pass.
//!
//! Sequence numbers are not looked at. A TCP connection begins with SYN; one in
//! the middle of which a frame arrives, unknown, is invalid. The table is
//! bounded, as a whole and for each zone; where it is full, no new connection
//! is remembered, and those that are stay.

mod tuple;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::fields::ct_state;
use crate::frame::key::{ethertype, protocol};
use crate::frame::{Key, Layers};

pub use tuple::Tuple;
use tuple::{ACK, FIN, Kind, RST, SYN, kind_of};

/// Parts of the table that are locked one by one, for a few instructions.
const SHARDS: usize = 64;

/// Places that are looked at for what is over, for each new connection.
const SWEEP: usize = 4;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// Only its first side has been heard.
    Opening,
    /// Both have; of TCP, the answer to SYN.
    Answered,
    /// Both talk.
    Open,
    /// One side, or both, has said that it has nothing more to send.
    Closing {
        /// The side that began it.
        first: bool,
        /// The other.
        second: bool,
    },
    /// Cut off.
    Closed,
}

impl Progress {
    fn lasts(self, proto: u8) -> Duration {
        let seconds = match (proto, self) {
            (protocol::TCP, Self::Open) => 7440,
            (protocol::TCP, Self::Closing { first, second }) if first && second => 60,
            (protocol::TCP, Self::Closing { .. }) => 120,
            (protocol::TCP, Self::Closed) => 10,
            (protocol::TCP, _) => 60,
            (protocol::UDP | protocol::SCTP, Self::Open | Self::Answered) => 180,
            (protocol::ICMP | protocol::ICMPV6, _) => 30,
            (_, Self::Opening) => 30,
            _ => 600,
        };
        Duration::from_secs(seconds)
    }

    /// After a frame with these TCP flags; none: it does not belong there.
    fn after_tcp(self, flags: u8, reply: bool) -> Option<Self> {
        if flags & RST != 0 {
            return Some(Self::Closed);
        }
        let fin = |first, second| Self::Closing {
            first: first || !reply,
            second: second || reply,
        };
        match self {
            Self::Opening if !reply => (flags & (SYN | ACK) == SYN).then_some(self),
            // Both may open at once.
            Self::Opening if flags & SYN == 0 => None,
            Self::Opening if flags & ACK == 0 => Some(self),
            Self::Opening => Some(Self::Answered),
            Self::Answered if reply => Some(self),
            Self::Answered | Self::Open if flags & FIN != 0 => Some(fin(false, false)),
            Self::Answered if flags & ACK != 0 => Some(Self::Open),
            Self::Closing { first, second } if flags & FIN != 0 => Some(fin(first, second)),
            Self::Closed => None,
            _ => Some(self),
        }
    }

    fn is_over(self) -> bool {
        matches!(self, Self::Closed)
            || matches!(
                self,
                Self::Closing {
                    first: true,
                    second: true
                }
            )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Id {
    zone: u64,
    /// In one order, whoever sends.
    tuple: Tuple,
}

#[derive(Clone, Copy, Debug)]
struct Connection {
    id: Id,
    /// It was begun in the direction of `id.tuple`.
    forward: bool,
    progress: Progress,
    until: Duration,
    /// Of the rules that let it through.
    generation: u64,
}

#[derive(Debug, Default)]
struct Shard {
    index: HashMap<Id, u32>,
    slots: Vec<Option<Connection>>,
    free: Vec<u32>,
    hand: usize,
}

impl Shard {
    fn get(&mut self, id: &Id, now: Duration) -> Option<&mut Connection> {
        let at = *self.index.get(id)? as usize;
        let slot = self.slots.get_mut(at)?.as_mut()?;
        (slot.until > now).then_some(slot)
    }

    fn remove(&mut self, id: &Id) -> bool {
        let Some(at) = self.index.remove(id) else {
            return false;
        };
        if let Some(slot) = self.slots.get_mut(at as usize) {
            *slot = None;
        }
        self.free.push(at);
        true
    }
}

/// No more connections are remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("there are too many connections")]
pub struct Full;

/// What a frame is, as far as connections tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It may begin one.
    New(Tuple),
    /// Of a connection.
    Known {
        /// As it was begun.
        tuple: Tuple,
        /// Opposite to that.
        reply: bool,
        /// What it was committed with.
        generation: u64,
    },
    /// An error about one that was begun like this.
    Related {
        /// As it was begun.
        tuple: Tuple,
        /// What it is about was sent opposite to that.
        reply: bool,
        /// What that was committed with.
        generation: u64,
    },
    /// In the middle of a TCP connection, or an answer of ICMP, if there is a
    /// connection: nothing is known of it.
    Within(Tuple),
    /// Neither.
    Invalid,
}

/// All connections, of all workers.
#[derive(Debug)]
pub struct Connections {
    shards: Box<[Mutex<Shard>]>,
    most: usize,
    per_zone: u32,
    zones: Mutex<HashMap<u64, u32>>,
    hasher: RandomState,
}

impl Default for Connections {
    fn default() -> Self {
        Self::new(1 << 18, 1 << 14)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connections {
    /// Room for `most`, of each zone `per_zone`.
    #[must_use]
    pub fn new(most: usize, per_zone: u32) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            most: most.div_ceil(SHARDS).max(1),
            per_zone,
            zones: Mutex::default(),
            hasher: RandomState::new(),
        }
    }

    fn id(zone: u64, tuple: Tuple) -> (Id, bool) {
        let forward = tuple.is_ordered();
        let tuple = if forward { tuple } else { tuple.reversed() };
        (Id { zone, tuple }, forward)
    }

    fn shard(&self, id: &Id) -> MutexGuard<'_, Shard> {
        let hash = self.hasher.hash_one(id) as usize;
        lock(&self.shards[hash % SHARDS])
    }

    /// What a frame is to the connections of a zone; how far its connection is
    /// follows it.
    #[must_use]
    pub fn find(&self, now: Duration, zone: u64, key: &Key, layers: Layers, head: &[u8]) -> Found {
        let (tuple, opens) = match kind_of(key, layers, head) {
            Kind::None => return Found::Invalid,
            Kind::About(about) => return self.about(now, zone, about),
            Kind::Opens(tuple) => (tuple, true),
            Kind::Within(tuple) => (tuple, false),
        };
        let middle = !tuple.fragments
            && match key.protocol {
                protocol::TCP => key.tcp_flags & (SYN | RST | ACK) == ACK,
                protocol::ICMP | protocol::ICMPV6 => true,
                _ => false,
            };
        let unknown = if opens {
            Found::New(tuple)
        } else if middle {
            Found::Within(tuple)
        } else {
            Found::Invalid
        };
        let (id, forward) = Self::id(zone, tuple);
        let mut shard = self.shard(&id);
        let Some(connection) = shard.get(&id, now) else {
            return unknown;
        };
        // Both ports and addresses may be equal: then there is no reply.
        let reply = connection.forward != forward;
        let progress = connection.progress;
        let next = if key.protocol != protocol::TCP || tuple.fragments {
            Some(if reply || progress == Progress::Open {
                Progress::Open
            } else {
                Progress::Opening
            })
        } else if opens && progress.is_over() {
            drop(shard);
            self.remove(zone, tuple);
            return unknown;
        } else {
            progress.after_tcp(key.tcp_flags, reply)
        };
        // Answers only answer.
        if !opens
            && !reply
            && matches!(key.protocol, protocol::ICMP | protocol::ICMPV6)
            && !tuple.fragments
        {
            return Found::Invalid;
        }
        let Some(next) = next else {
            return Found::Invalid;
        };
        connection.progress = next;
        connection.until = now + next.lasts(key.protocol);
        Found::Known {
            tuple: if reply { tuple.reversed() } else { tuple },
            reply,
            generation: connection.generation,
        }
    }

    fn about(&self, now: Duration, zone: u64, about: Tuple) -> Found {
        let (id, forward) = Self::id(zone, about);
        match self.shard(&id).get(&id, now) {
            Some(connection) => {
                let reply = connection.forward != forward;
                Found::Related {
                    tuple: if reply { about.reversed() } else { about },
                    reply,
                    generation: connection.generation,
                }
            }
            None => Found::Invalid,
        }
    }

    /// Remembers a connection that begins with `tuple`, or that it was let
    /// through by rules of this generation.
    ///
    /// # Errors
    ///
    /// There is no room; it is not remembered.
    pub fn commit(
        &self,
        now: Duration,
        zone: u64,
        tuple: Tuple,
        generation: u64,
    ) -> Result<(), Full> {
        let lasts = Progress::Opening.lasts(tuple.protocol);
        self.put(now, zone, tuple, Progress::Opening, lasts, generation)
    }

    /// Remembers a connection, begun with `tuple`, as one that both sides talk
    /// in.
    ///
    /// # Errors
    ///
    /// There is no room; it is not remembered.
    pub fn adopt(
        &self,
        now: Duration,
        zone: u64,
        tuple: Tuple,
        generation: u64,
    ) -> Result<(), Full> {
        let lasts = Progress::Open.lasts(tuple.protocol);
        self.put(now, zone, tuple, Progress::Open, lasts, generation)
    }

    fn put(
        &self,
        now: Duration,
        zone: u64,
        tuple: Tuple,
        progress: Progress,
        lasts: Duration,
        generation: u64,
    ) -> Result<(), Full> {
        let (id, forward) = Self::id(zone, tuple);
        let mut shard = self.shard(&id);
        if let Some(connection) = shard.get(&id, now) {
            connection.generation = generation;
            return Ok(());
        }
        self.sweep(&mut shard, now);
        if shard.remove(&id) {
            self.left(zone);
        }
        let full = shard.index.len() >= self.most;
        if full || !self.enter(zone) {
            return Err(Full);
        }
        let connection = Connection {
            id,
            forward,
            progress,
            until: now + lasts,
            generation,
        };
        let at = match shard.free.pop() {
            Some(at) => at,
            None => {
                shard.slots.push(None);
                (shard.slots.len() - 1) as u32
            }
        };
        shard.slots[at as usize] = Some(connection);
        shard.index.insert(id, at);
        Ok(())
    }

    /// Forgets a few connections that are over.
    fn sweep(&self, shard: &mut Shard, now: Duration) {
        for _ in 0..SWEEP.min(shard.slots.len()) {
            shard.hand = (shard.hand + 1) % shard.slots.len();
            if let Some(connection) = shard.slots[shard.hand]
                && connection.until <= now
                && shard.remove(&connection.id)
            {
                self.left(connection.id.zone);
            }
        }
    }

    fn enter(&self, zone: u64) -> bool {
        let mut zones = lock(&self.zones);
        let count = zones.entry(zone).or_default();
        if *count >= self.per_zone {
            return false;
        }
        *count += 1;
        true
    }

    fn left(&self, zone: u64) {
        let mut zones = lock(&self.zones);
        if let Some(count) = zones.get_mut(&zone) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                zones.remove(&zone);
            }
        }
    }

    /// Forgets one.
    pub fn remove(&self, zone: u64, tuple: Tuple) {
        let (id, _) = Self::id(zone, tuple);
        if self.shard(&id).remove(&id) {
            self.left(zone);
        }
    }

    /// Forgets all of a zone.
    pub fn clear(&self, zone: u64) {
        for shard in &self.shards {
            let mut shard = lock(shard);
            let all = shard.index.keys().filter(|id| id.zone == zone);
            let all: Vec<_> = all.copied().collect();
            for id in all {
                if shard.remove(&id) {
                    self.left(zone);
                }
            }
        }
    }

    /// How many are remembered, with some that are over.
    #[must_use]
    pub fn len(&self) -> usize {
        let lens = self.shards.iter().map(|shard| lock(shard).index.len());
        lens.sum()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What `ct()` of a flow tells of a frame: [`ct_state`]. What cannot be
    /// remembered is invalid.
    #[must_use]
    pub fn track(
        &self,
        now: Duration,
        zone: u64,
        key: &Key,
        layers: Layers,
        head: &[u8],
        commit: bool,
    ) -> u8 {
        let reply = |reply| if reply { ct_state::REPLY } else { 0 };
        let first = key.fragment == Some(false);
        let state = match self.find(now, zone, key, layers, head) {
            Found::New(tuple) if commit => match self.commit(now, zone, tuple, 0) {
                Ok(()) => ct_state::NEW,
                Err(Full) => ct_state::INVALID,
            },
            Found::New(_) => ct_state::NEW,
            Found::Known { reply: back, .. } => ct_state::ESTABLISHED | reply(back),
            Found::Related { reply: back, .. } => ct_state::RELATED | reply(!back),
            Found::Within(_) | Found::Invalid => ct_state::INVALID,
        };
        if commit && first && state & ct_state::INVALID == 0 {
            self.expect_fragments(now, zone, key, 0);
        }
        state | ct_state::TRACKED
    }

    /// Later fragments may follow this first one.
    pub fn expect_fragments(&self, now: Duration, zone: u64, key: &Key, generation: u64) {
        if let Some((src, dst)) = key.ip {
            let tuple = Tuple {
                src,
                dst,
                protocol: key.protocol,
                ports: (0, 0),
                fragments: true,
            };
            // Without room, they are dropped.
            let _ = self.commit(now, zone, tuple, generation);
        }
    }
}

/// Whether a frame is of a protocol that has connections.
#[must_use]
pub fn is_tracked(key: &Key) -> bool {
    matches!(key.ethertype, ethertype::IPV4 | ethertype::IPV6)
}
