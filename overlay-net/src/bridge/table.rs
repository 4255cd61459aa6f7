//! Where MAC addresses are.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use foldhash::fast::RandomState;

use crate::directory::NodeId;
use crate::drops::Reason;
use crate::frame::{Mac, PortId, Vni};

use super::vlan::Vlan;

/// An address, in its network and VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Station {
    /// The network.
    pub vni: Vni,
    /// The VLAN.
    pub vlan: Vlan,
    /// The address.
    pub mac: Mac,
}

/// Where a frame comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// A port of this switch.
    Port(PortId),
    /// Another node.
    Node(NodeId),
}

/// Why an address is where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Attached to, or pinned on, a port of this switch.
    Attached,
    /// The directory says so.
    Directory,
    /// It was learned from a frame.
    Learned,
}

/// What happened to learned addresses of local ports, for the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is on this port now.
    Learned(Station, PortId),
    /// It is not on this port any more: it aged, or others took its room.
    Forgotten(Station, PortId),
}

/// Limits of the table.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long an address is remembered that sends nothing.
    pub aging: Duration,
    /// Learned addresses altogether.
    pub learned: usize,
    /// An address that changes its place more often than this ...
    pub moves: u8,
    /// ... within this time ...
    pub window: Duration,
    /// ... stays where it is for this time, and is not heard elsewhere.
    pub hold: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            aging: Duration::from_secs(300),
            learned: 65_536,
            moves: 5,
            window: Duration::from_secs(10),
            hold: Duration::from_secs(30),
        }
    }
}

/// Events that nobody has fetched yet, at most.
const EVENTS: usize = 65_536;
/// How often a frame's source is written down again.
const REFRESH: Duration = Duration::from_secs(1);
const NIL: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Learned {
    place: Place,
    seen: Duration,
    before: u32,
    after: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Remote {
    pub(super) node: NodeId,
    /// It is attached there, and cannot be elsewhere.
    pub(super) attached: bool,
    /// It is on an isolated port.
    pub(super) isolated: bool,
}

#[derive(Clone, Debug)]
struct Entry {
    station: Station,
    port: Option<PortId>,
    remote: Option<Remote>,
    learned: Option<Learned>,
    /// When it left a port of this switch for another node.
    left: Option<Duration>,
    moves: u8,
    window: Duration,
    held: Duration,
}

#[derive(Clone, Copy, Debug)]
struct List {
    oldest: u32,
    newest: u32,
    len: usize,
}

/// What a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) place: Place,
    pub(super) origin: Origin,
    /// It left a port of this switch at this time.
    pub(super) left: Option<Duration>,
}

/// Counts of what the table did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Addresses learned.
    pub learned: u64,
    /// Learned addresses that changed their place.
    pub moved: u64,
    /// Learned addresses that made room for others.
    pub evicted: u64,
    /// Addresses that were held where they are, because they moved too often.
    pub held: u64,
    /// Addresses not learned for want of room.
    pub refused: u64,
    /// Events that nobody fetched in time.
    pub lost: u64,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) limits: Limits,
    pub(super) counts: Counts,
    index: HashMap<Station, u32, RandomState>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    lists: HashMap<Place, List, RandomState>,
    learned: usize,
    events: VecDeque<Event>,
}

impl Table {
    pub(super) fn find(&self, now: Duration, station: &Station) -> Option<Found> {
        let entry = &self.entries[*self.index.get(station)? as usize];
        let found = |place, origin| {
            Some(Found {
                place,
                origin,
                left: entry.left,
            })
        };
        if let Some(remote) = entry.remote {
            return found(Place::Node(remote.node), Origin::Directory);
        }
        if let Some(port) = entry.port {
            return found(Place::Port(port), Origin::Attached);
        }
        let learned = entry.learned?;
        let fresh = now.saturating_sub(learned.seen) < self.limits.aging;
        fresh.then(|| found(learned.place, Origin::Learned))?
    }

    /// Whether the directory says that it is on an isolated port.
    pub(super) fn isolated(&self, station: &Station) -> bool {
        let entry = self.index.get(station);
        entry.is_some_and(|at| {
            let remote = self.entries[*at as usize].remote;
            remote.is_some_and(|remote| remote.isolated)
        })
    }

    /// A frame from it came from `place`, which may have `limit` learned
    /// addresses.
    pub(super) fn learn(
        &mut self,
        now: Duration,
        station: &Station,
        place: Place,
        limit: usize,
    ) -> Result<(), Reason> {
        let Some(&at) = self.index.get(station) else {
            if let Some(at) = self.room(station, place, limit) {
                self.link(at, place, now);
                self.counts.learned += 1;
                self.tell(Event::Learned, at, place);
            }
            return Ok(());
        };
        let entry = &self.entries[at as usize];
        if let Some(port) = entry.port {
            // Also while it is elsewhere: what its port had left to send.
            let own = place == Place::Port(port);
            let there = entry.remote.map(|remote| Place::Node(remote.node));
            return match own || there == Some(place) {
                true => Ok(()),
                false => Err(Reason::Spoofed),
            };
        }
        if let Some(remote) = entry.remote {
            if place == Place::Node(remote.node) {
                return Ok(());
            }
            // Other nodes learn of it from the directory too.
            if remote.attached || matches!(place, Place::Node(_)) {
                return Err(Reason::Spoofed);
            }
            self.moving(now, at)?;
            self.entries[at as usize].remote = None;
            return self.relearn(now, at, place, limit);
        }
        match entry.learned {
            Some(learned) if learned.place == place => {
                if now.saturating_sub(learned.seen) >= REFRESH {
                    self.unlink(at);
                    self.link(at, place, now);
                }
                Ok(())
            }
            Some(_) => {
                self.moving(now, at)?;
                self.relearn(now, at, place, limit)
            }
            None => self.relearn(now, at, place, limit),
        }
    }

    /// Counts a move; an error if there were too many.
    fn moving(&mut self, now: Duration, at: u32) -> Result<(), Reason> {
        let entry = &mut self.entries[at as usize];
        if now < entry.held {
            return Err(Reason::Flapping);
        }
        if now.saturating_sub(entry.window) > self.limits.window {
            entry.window = now;
            entry.moves = 0;
        }
        if entry.moves >= self.limits.moves {
            entry.held = now + self.limits.hold;
            entry.moves = 0;
            self.counts.held += 1;
            return Err(Reason::Flapping);
        }
        entry.moves += 1;
        self.counts.moved += 1;
        Ok(())
    }

    fn relearn(
        &mut self,
        now: Duration,
        at: u32,
        place: Place,
        limit: usize,
    ) -> Result<(), Reason> {
        self.forget(at);
        if self.make_room(place, limit) {
            self.link(at, place, now);
            self.tell(Event::Learned, at, place);
        } else {
            self.tidy(at);
        }
        Ok(())
    }

    /// Room for one more learned at `place`, of its own oldest if need be.
    fn make_room(&mut self, place: Place, limit: usize) -> bool {
        let list = self.lists.get(&place).copied();
        let len = list.map_or(0, |list| list.len);
        if len < limit && self.learned < self.limits.learned {
            return true;
        }
        match list {
            Some(list) if limit > 0 && list.oldest != NIL => {
                self.forget(list.oldest);
                self.tidy(list.oldest);
                self.counts.evicted += 1;
                true
            }
            _ => {
                self.counts.refused += 1;
                false
            }
        }
    }

    fn room(&mut self, station: &Station, place: Place, limit: usize) -> Option<u32> {
        self.make_room(place, limit).then(|| self.entry(station))
    }

    fn entry(&mut self, station: &Station) -> u32 {
        if let Some(at) = self.index.get(station) {
            return *at;
        }
        let entry = Entry {
            station: *station,
            port: None,
            remote: None,
            learned: None,
            left: None,
            moves: 0,
            window: Duration::ZERO,
            held: Duration::ZERO,
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.entries[at as usize] = entry;
                at
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        self.index.insert(*station, at);
        at
    }

    /// Frees an entry that says nothing any more.
    fn tidy(&mut self, at: u32) {
        let entry = &self.entries[at as usize];
        if entry.port.is_none() && entry.remote.is_none() && entry.learned.is_none() {
            self.index.remove(&entry.station);
            self.free.push(at);
        }
    }

    fn link(&mut self, at: u32, place: Place, now: Duration) {
        let list = self.lists.entry(place).or_insert(List {
            oldest: NIL,
            newest: NIL,
            len: 0,
        });
        let before = list.newest;
        list.newest = at;
        list.len += 1;
        if before == NIL {
            list.oldest = at;
        } else if let Some(learned) = &mut self.entries[before as usize].learned {
            learned.after = at;
        }
        self.entries[at as usize].learned = Some(Learned {
            place,
            seen: now,
            before,
            after: NIL,
        });
        self.learned += 1;
    }

    fn unlink(&mut self, at: u32) -> Option<Place> {
        let learned = self.entries[at as usize].learned.take()?;
        let (before, after) = (learned.before, learned.after);
        if before != NIL
            && let Some(other) = &mut self.entries[before as usize].learned
        {
            other.after = after;
        }
        if after != NIL
            && let Some(other) = &mut self.entries[after as usize].learned
        {
            other.before = before;
        }
        self.learned -= 1;
        if let Some(list) = self.lists.get_mut(&learned.place) {
            list.len -= 1;
            if list.oldest == at {
                list.oldest = after;
            }
            if list.newest == at {
                list.newest = before;
            }
            if list.len == 0 {
                self.lists.remove(&learned.place);
            }
        }
        Some(learned.place)
    }

    fn forget(&mut self, at: u32) {
        if let Some(place) = self.unlink(at) {
            self.tell(Event::Forgotten, at, place);
        }
    }

    fn tell(&mut self, event: impl FnOnce(Station, PortId) -> Event, at: u32, place: Place) {
        let Place::Port(port) = place else { return };
        if self.events.len() >= EVENTS {
            self.events.pop_front();
            self.counts.lost += 1;
        }
        let station = self.entries[at as usize].station;
        self.events.push_back(event(station, port));
    }

    pub(super) fn events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    /// It is attached to this port now, wherever it was.
    pub(super) fn attach(&mut self, station: &Station, port: PortId) {
        let at = self.entry(station);
        self.unlink(at);
        let entry = &mut self.entries[at as usize];
        entry.port = Some(port);
        entry.left = None;
    }

    /// What the directory said of it before does not count any more.
    pub(super) fn settle(&mut self, station: &Station) {
        if let Some(&at) = self.index.get(station) {
            let entry = &mut self.entries[at as usize];
            entry.remote = None;
            entry.left = None;
            self.tidy(at);
        }
    }

    /// The port of this switch that it is attached to.
    pub(super) fn attached(&self, station: &Station) -> Option<PortId> {
        let at = self.index.get(station)?;
        self.entries[*at as usize].port
    }

    /// The node that the directory says it is at.
    pub(super) fn elsewhere(&self, station: &Station) -> Option<NodeId> {
        let at = self.index.get(station)?;
        let remote = self.entries[*at as usize].remote?;
        Some(remote.node)
    }

    pub(super) fn detach(&mut self, station: &Station, port: PortId) {
        if let Some(&at) = self.index.get(station)
            && self.entries[at as usize].port == Some(port)
        {
            self.entries[at as usize].port = None;
            self.tidy(at);
        }
    }

    /// What the directory says now.
    pub(super) fn remote(&mut self, now: Duration, station: &Station, remote: Option<Remote>) {
        if remote.is_none() {
            return self.settle(station);
        }
        let at = self.entry(station);
        let place = self.unlink(at);
        let entry = &mut self.entries[at as usize];
        let here = entry.port.is_some() || matches!(place, Some(Place::Port(_)));
        if here && entry.remote.is_none() {
            entry.left = Some(now);
        }
        entry.remote = remote;
    }

    /// Forgets all that was learned from there.
    pub(super) fn flush(&mut self, place: Place) {
        while let Some(list) = self.lists.get(&place) {
            let at = list.oldest;
            self.forget(at);
            self.tidy(at);
        }
    }

    /// Forgets what is too old.
    pub(super) fn expire(&mut self, now: Duration) {
        let places: Vec<Place> = self.lists.keys().copied().collect();
        for place in places {
            while let Some(list) = self.lists.get(&place) {
                let at = list.oldest;
                let seen = self.entries[at as usize].learned.map(|it| it.seen);
                let fresh = seen.is_some_and(|seen| now.saturating_sub(seen) < self.limits.aging);
                if fresh {
                    break;
                }
                self.forget(at);
                self.tidy(at);
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(super) fn learned(&self, place: Place) -> usize {
        self.lists.get(&place).map_or(0, |list| list.len)
    }

    /// All, with when each learned one was heard last.
    pub(super) fn iter(
        &self,
        now: Duration,
    ) -> impl Iterator<Item = (Station, Place, Origin, Option<Duration>)> + '_ {
        self.index.iter().filter_map(move |(station, at)| {
            let found = self.find(now, station)?;
            let seen = self.entries[*at as usize].learned.map(|it| it.seen);
            Some((*station, found.place, found.origin, seen))
        })
    }
}
