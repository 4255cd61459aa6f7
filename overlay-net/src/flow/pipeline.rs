//! A worker's way into the tables: the cache, and what is done with frames.

use std::sync::Arc;
use std::time::Duration;

use super::actions::Action;
use super::apply::{Goes, Packet, Sink, Start, execute};
use super::cache::Cache;
use super::conntrack::Connections;
use super::control::Shared;
use super::fields::{Field, Flat};
use super::tables::{Tables, Words};
pub use super::walk::{Decision, Step, ToController, Walk};
use crate::drops::Reason;
use crate::frame::Key;

/// Decisions that a worker remembers, if nothing else is said: half a megabyte.
pub const CACHE: usize = 4096;

/// How long counts may lie in a worker's cache.
const FOLD: Duration = Duration::from_millis(250);

/// How often a frame may go on after a look at its connection.
const RECIRCULATIONS: usize = 8;

/// A worker's data path. Nothing in it is shared but the tables, which do not
/// change but are swapped, connections, and counters.
#[derive(Debug)]
pub struct Pipeline {
    shared: Arc<Shared>,
    connections: Arc<Connections>,
    tables: Arc<Tables>,
    words: Words,
    cache: Cache,
    folded: Duration,
}

impl Pipeline {
    /// A worker's, with a cache of so many decisions.
    #[must_use]
    pub fn new(shared: Arc<Shared>, connections: Arc<Connections>, cache: usize) -> Self {
        let tables = shared.tables();
        Self {
            words: tables.words(),
            tables,
            shared,
            connections,
            cache: Cache::new(cache),
            folded: Duration::ZERO,
        }
    }

    /// Takes over the tables if they have changed, and adds counts to the
    /// entries' now and then: to be called for each burst, and before the
    /// worker sleeps.
    pub fn tick(&mut self, now: Duration) {
        if self.shared.generation() != self.tables.generation() {
            self.tables = self.shared.tables();
            self.words = self.tables.words();
            self.fold(now);
        } else if now.saturating_sub(self.folded) >= FOLD {
            self.fold(now);
        }
    }

    /// Adds counts to the entries' at once.
    pub fn fold(&mut self, now: Duration) {
        self.folded = now;
        self.cache.fold();
    }

    /// Frames whose decision was in the cache, and was not.
    #[must_use]
    pub fn cached(&self) -> (u64, u64) {
        (self.cache.hits, self.cache.misses)
    }

    /// What is to be done with a frame of `len` bytes; it is counted. `now` is
    /// since the start, for all calls.
    pub fn classify(&mut self, now: Duration, key: &Key, len: usize) -> &Decision {
        let at = self.lookup(key, Start::default());
        self.cache.count(at, 1, len as u64, millis(now))
    }

    fn lookup(&mut self, key: &Key, start: Start) -> usize {
        // Where no entry looks at anything, all frames are alike.
        let (flat, mut masked) = if self.words.is_empty() {
            (None, Flat::default())
        } else {
            let flat = start.flat(key);
            (Some(flat), flat & *self.words.mask())
        };
        // Decisions tell controllers, and other tables, what was handed on.
        masked.set(Field::Metadata, start.metadata.into(), u128::MAX);
        let hash = self.words.hash(&masked) ^ u64::from(start.table) << 7;
        let generation = self.tables.generation();
        if let Some(at) = self.cache.find(hash, &masked, start.table, generation) {
            return at;
        }
        let flat = flat.unwrap_or_else(|| start.flat(key));
        let decision = Walk::new(&self.tables, flat).decide(start.table);
        self.cache
            .put(hash, masked, start.table, generation, decision)
    }

    /// Whether a frame of `len` bytes just goes through the learning bridge, as
    /// most do: then it is counted, and there is nothing to
    /// [run](Pipeline::run).
    pub fn is_normal(&mut self, now: Duration, key: &Key, len: usize) -> bool {
        let at = self.lookup(key, Start::default());
        let normal = self.cache.decision(at).is_normal();
        if normal {
            self.cache.count(at, 1, len as u64, millis(now));
        }
        normal
    }

    /// Whether no entry looks at anything, so that all frames are alike.
    #[must_use]
    pub fn looks_at_nothing(&self) -> bool {
        self.words.is_empty()
    }

    /// Counts frames, where all are alike, that took the way of one for which
    /// [`Pipeline::is_normal`] was so.
    pub fn count_alike(&mut self, now: Duration, frames: u64, bytes: u64) {
        if frames > 0 {
            let at = self.lookup(&Key::default(), Start::default());
            self.cache.count(at, frames, bytes, millis(now));
            self.cache.hits += frames - 1;
        }
    }

    /// Does with a frame what the tables say: `sink` takes what comes out.
    pub fn run(&mut self, now: Duration, packet: &mut Packet<'_, '_>, sink: &mut dyn Sink) {
        self.go(now, Start::default(), RECIRCULATIONS, packet, sink);
    }

    /// Does `actions` with a frame, as a controller wants that sends it out.
    pub fn run_actions(
        &mut self,
        now: Duration,
        actions: &[Action],
        packet: &mut Packet<'_, '_>,
        sink: &mut dyn Sink,
    ) {
        let flat = Start::default().flat(&packet.key);
        let decision = Walk::new(&self.tables, flat).follow(actions);
        for stats in &decision.stats {
            stats.add(1, packet.frame.len() as u64, millis(now));
        }
        if let Goes::On(start) = execute(&decision, now, packet, &self.connections, sink) {
            self.go(now, start, RECIRCULATIONS - 1, packet, sink);
        }
    }

    fn go(
        &mut self,
        now: Duration,
        mut start: Start,
        times: usize,
        packet: &mut Packet<'_, '_>,
        sink: &mut dyn Sink,
    ) {
        let len = packet.frame.len() as u64;
        for _ in 0..times {
            let at = self.lookup(&packet.key, start);
            let decision = self.cache.count(at, 1, len, millis(now));
            match execute(decision, now, packet, &self.connections, sink) {
                Goes::Done => return,
                Goes::On(on) => start = on,
            }
        }
        sink.dropped(Reason::FlowLoop, packet);
    }
}

impl Start {
    fn flat(&self, key: &Key) -> Flat {
        let mut flat = Flat::of(key);
        flat.set(Field::CtState, self.state.into(), u128::MAX);
        flat.set(Field::Metadata, self.metadata.into(), u128::MAX);
        flat
    }
}

fn millis(now: Duration) -> u64 {
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
