//! Guests that come, and that go: see "A guest that moves" in `docs/overlay.md`.
//!
//! A port of a guest that leaves becomes [`Moving::Departed`] when its front
//! end stops it, between two bursts of frames: what has not been sent to the
//! guest by then follows it. A port of a guest that comes takes what was sent
//! after it, and becomes an ordinary one when its front end starts it.
//!
//! Others' frames took the way by the guest's old node until now. Before they
//! go straight to the new one, a message takes the old way after them, and
//! frames wait until it has come through: nothing overtakes.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Later, Slot, Switch};
use crate::api::moving::{Offer, Whereabouts};
use crate::api::types::{PortSpec, PortStatus};
use crate::bridge::{Held, Output, Place, Station, stations};
use crate::directory::{Key as Record, NodeId, Value};
use crate::drops::Reason;
use crate::frame::{Frame, HEAD, Head, Key, Mac, PortId, Vni};
use crate::key;
use crate::port::Port;
use crate::switch::Error;
use crate::switch::remote::node_of;
use crate::tunnel::flow_hash;
use vm_memory::VolatileSlice;

/// How messages about ways begin: as a frame of an experiment (IEEE 802's
/// second local experimental ethertype) from nobody to nobody.
pub(super) const WAY_HEAD: [u8; 14] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x88, 0xb6];

/// To the guest's old node: all that came before this has been sent on.
const FLUSH: u8 = 1;
/// From there to its new node.
const PASS: u8 = 2;
/// From there to who asked.
const DONE: u8 = 3;

/// How long frames wait for what took the old way at most.
const LONGEST: Duration = Duration::from_millis(250);
/// How long until a message is taken for lost.
const AGAIN: Duration = Duration::from_millis(20);
/// How long a guest may leave no room for what waits for it.
const STUCK: Duration = Duration::from_secs(1);
/// Frames that may wait for one guest.
const FRAMES: usize = 4096;
/// Their bytes.
const BYTES: usize = 8 << 20;

/// Whether a port's guest is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moving {
    No,
    /// It comes from there; others know it by this epoch.
    Arriving {
        from: Place,
        epoch: u64,
    },
    /// It will go there. Whether its front end has served it since.
    Leaving {
        to: Place,
        was_up: bool,
    },
    /// It has stopped here, to go on there.
    Departed {
        to: Place,
    },
}

/// Frames to a guest that has moved, which wait for older ones.
pub(super) struct Settling {
    /// The next ones.
    first: VecDeque<Later>,
    /// After the gate has opened.
    second: VecDeque<Later>,
    bytes: usize,
    gate: Option<Gate>,
    /// When the first one is given up.
    stuck: Duration,
}

/// What is still on the old way.
struct Gate {
    token: u64,
    via: NodeId,
    to: NodeId,
    again: Duration,
    until: Duration,
}

impl Settling {
    fn push(&mut self, late: bool, later: Later) -> Result<(), Reason> {
        let waiting = self.first.len() + self.second.len();
        if waiting >= FRAMES || self.bytes + later.bytes.len() > BYTES {
            return Err(Reason::HoldFull);
        }
        self.bytes += later.bytes.len();
        let queue = if late {
            &mut self.second
        } else {
            &mut self.first
        };
        queue.push_back(later);
        Ok(())
    }

    fn open(&mut self) {
        self.gate = None;
        self.first.append(&mut self.second);
    }
}

/// A frame that waited, on its way to a place.
fn later(held: Held, to: Place, vni: Vni) -> Later {
    Later {
        to,
        vni,
        flow: 0,
        bytes: held.bytes,
        offload: held.offload,
    }
}

impl Switch {
    /// What another switch needs to know of a port whose guest may come there.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn offer(&self, name: &str) -> Result<Offer, Error> {
        let id = self.named(name)?;
        let slot = self
            .slot(id)
            .ok_or_else(|| Error::NoPort(name.to_owned()))?;
        let network = self.networks.get(&slot.spec.network);
        let network = network.ok_or_else(|| Error::NoNetwork(slot.spec.network.clone()))?;
        let epochs = self.attached(id).into_iter().filter_map(|(key, _)| {
            let record = self.directory.get(&key)?;
            Some(record.version.epoch)
        });
        let rules = |name: &String| Some((name.clone(), self.rules_of(name)?.to_vec()));
        Ok(Offer {
            network: network.clone(),
            key: self.info().key,
            epoch: epochs.max().unwrap_or_default(),
            bridge: slot.spec.bridge.clone(),
            groups: slot.spec.groups.clone(),
            rules: slot.spec.groups.iter().filter_map(rules).collect(),
        })
    }

    pub(super) fn named(&self, name: &str) -> Result<PortId, Error> {
        let missing = || Error::NoPort(name.to_owned());
        self.names.get(name).copied().ok_or_else(missing)
    }

    /// Where a guest comes from or goes to.
    fn place(&mut self, at: &Whereabouts) -> Result<Place, Error> {
        match at {
            Whereabouts::Port(name) => self.named(name).map(Place::Port),
            Whereabouts::Peer(key) => {
                let public = key::parse(key).map_err(|_| Error::Apart(key.clone()))?;
                let node = node_of(&public);
                let (now, remote) = (self.now, self.remote.as_mut());
                let remote = remote.ok_or(Error::Alone)?;
                let status = remote.status(now, node);
                if status.is_some_and(|status| status.connected) {
                    Ok(Place::Node(node))
                } else {
                    Err(Error::Apart(key.clone()))
                }
            }
        }
    }

    /// Makes a port whose guest is on its way here. If it comes from another
    /// port of this switch, that one's guest leaves.
    ///
    /// # Errors
    ///
    /// As [`Switch::add_port`]; or the two switches have no tunnel.
    pub fn expect(
        &mut self,
        name: &str,
        spec: PortSpec,
        (from, epoch): (&Whereabouts, u64),
        opened: Result<Box<dyn Port>, String>,
    ) -> Result<PortStatus, Error> {
        let from = self.place(from)?;
        let status = self.make_port(name, spec, opened, Some((from, epoch)))?;
        if let Place::Port(old) = from {
            self.set_leaving(old, Place::Port(status.id));
        }
        Ok(status)
    }

    /// The guest of a port will leave: when its front end stops it, frames to
    /// it follow it.
    ///
    /// # Errors
    ///
    /// There is no such port, or no tunnel to where it goes.
    pub fn leave(&mut self, name: &str, to: &Whereabouts) -> Result<(), Error> {
        let id = self.named(name)?;
        let to = self.place(to)?;
        self.set_leaving(id, to);
        Ok(())
    }

    fn set_leaving(&mut self, id: PortId, to: Place) {
        self.stay_at(id);
        if let Some(slot) = self.slot_mut(id) {
            let was_up = slot.port.as_ref().is_some_and(|port| port.is_up());
            slot.moving = Moving::Leaving { to, was_up };
        }
    }

    /// The guest of a port does not leave.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn stay(&mut self, name: &str) -> Result<(), Error> {
        let id = self.named(name)?;
        self.stay_at(id);
        Ok(())
    }

    fn stay_at(&mut self, id: PortId) {
        let Some(slot) = self.slot_mut(id) else {
            return;
        };
        match slot.moving {
            Moving::Departed { .. } => {
                slot.moving = Moving::No;
                let elsewhere = |(key, _): &(Record, Value)| self.directory.located(key).is_some();
                // Where it runs by now, that has been told.
                if !self.attached(id).iter().any(elsewhere) {
                    self.go_on(id);
                }
            }
            Moving::Leaving { .. } => slot.moving = Moving::No,
            Moving::No | Moving::Arriving { .. } => {}
        }
    }

    /// The guest has come, as far as others know.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn arrived(&mut self, name: &str) -> Result<PortStatus, Error> {
        let id = self.named(name)?;
        self.arrive(id);
        let slot = self
            .slot(id)
            .ok_or_else(|| Error::NoPort(name.to_owned()))?;
        Ok(self.status(id, slot))
    }

    /// Looks whether a port's front end has begun or stopped.
    pub(super) fn look_at(&mut self, id: PortId) {
        let Some(slot) = self.slot_mut(id) else {
            return;
        };
        let up = slot.port.as_ref().is_some_and(|port| port.is_up());
        match (slot.moving, up) {
            (Moving::Leaving { to, was_up: true }, false) => {
                slot.moving = Moving::Departed { to };
                // It is there.
                let _ = self.bridge.depart(id, to);
            }
            (Moving::Leaving { to, was_up: false }, true) => {
                slot.moving = Moving::Leaving { to, was_up: true };
            }
            (Moving::Departed { to }, true) => {
                slot.moving = Moving::Leaving { to, was_up: true };
                self.go_on(id);
                for (key, value) in self.attached(id) {
                    self.claim_after(key, value, 0);
                }
            }
            (Moving::Arriving { .. }, true) => self.arrive(id),
            _ => {}
        }
    }

    /// A guest that has stopped runs on here.
    fn go_on(&mut self, id: PortId) {
        // It is there, and nothing waits at it.
        let _ = self.bridge.activate(id);
    }

    fn arrive(&mut self, id: PortId) {
        let Some(slot) = self.slot_mut(id) else {
            return;
        };
        let Moving::Arriving { from, epoch } = slot.moving else {
            return;
        };
        slot.moving = Moving::No;
        let vni = slot.vni;
        self.adopt_connections_of(id);
        // It is there.
        let held = self.bridge.activate(id).unwrap_or_default();
        let its = self.stations_of(id);
        for station in &its {
            let via = match from {
                Place::Node(node) => Some((node, self.directory.me())),
                Place::Port(_) => None,
            };
            self.settle_way(vni, station.mac, via);
        }
        for held in held {
            let settling = held.bytes.first_chunk().and_then(|mac| {
                let key = (vni, Mac(*mac));
                self.settling.get_mut(&key)
            });
            let later = later(held, Place::Port(id), vni);
            let pushed = match settling {
                Some(settling) => settling.push(false, later),
                None => Err(Reason::NoDestination),
            };
            if let Err(reason) = pushed {
                self.drop(Place::Port(id), reason);
            }
        }
        self.pump();
        for (key, value) in self.attached(id) {
            self.claim_after(key, value, epoch);
        }
    }

    /// The addresses that are attached to a port.
    pub(super) fn stations_of(&self, id: PortId) -> Vec<Station> {
        self.bridge.port(id).map(stations).unwrap_or_default()
    }

    /// What others are told of a port that is removed, and what becomes of
    /// what waited for it.
    pub(super) fn remove_moving(&mut self, id: PortId, slot: &Slot) {
        let attached = self.attached(id);
        for (station, (key, _)) in self.stations_of(id).iter().zip(&attached) {
            match slot.moving {
                // Another port has it, or does not have it yet.
                _ if self.bridge.attached(station) != Some(id) => {}
                Moving::Departed {
                    to: Place::Node(node),
                } => self.directory.hand_over(self.now, key, node),
                _ => self.directory.withdraw(self.now, key),
            }
        }
        if let Moving::Arriving { from, .. } = slot.moving {
            if let Place::Port(old) = from {
                self.stay_at(old);
            }
            for held in self.bridge.take_held(id) {
                let later = later(held, from, slot.vni);
                self.put_off(from, slot.vni, 0, later.bytes, later.offload);
            }
        }
    }

    /// A station's new place is known, which was at `via` before: frames of
    /// this node wait until those that took that way have come to the guest.
    pub(super) fn moved_away(&mut self, key: &Record, before: Option<Place>) {
        let Record::Station(vni, _, mac) = *key else {
            return;
        };
        let located = self.directory.located(key);
        let (Some(Place::Node(via)), Some(located)) = (before, located) else {
            return;
        };
        let known = self.peers.values().any(|peer| *peer == via);
        if known && located.attached && ![via, self.directory.me()].contains(&located.node) {
            self.settle_way(vni, mac, Some((via, located.node)));
            self.pump();
        }
    }

    /// Has frames to a station wait until they can be sent in order; `way` is
    /// the one that older ones have taken.
    fn settle_way(&mut self, vni: Vni, mac: Mac, way: Option<(NodeId, NodeId)>) {
        let known = |node: NodeId| self.peers.values().any(|peer| *peer == node);
        let now = self.now;
        let gate = way.filter(|(via, _)| known(*via)).map(|(via, to)| {
            self.token = self.token.wrapping_add(1);
            Gate {
                token: self.token,
                via,
                to,
                again: now,
                until: now + LONGEST,
            }
        });
        let settling = self.settling.entry((vni, mac)).or_insert_with(|| Settling {
            first: VecDeque::new(),
            second: VecDeque::new(),
            bytes: 0,
            gate: None,
            stuck: now + STUCK,
        });
        settling.gate = gate;
    }

    /// Whether a frame has to wait for older ones, and does.
    pub(super) fn waits(
        &mut self,
        from: Place,
        key: &Key,
        frame: &Frame<'_>,
        output: &Output,
    ) -> bool {
        let Some(settling) = self.settling.get_mut(&(output.vni, key.dst)) else {
            return false;
        };
        let late = settling.gate.is_some() && matches!(from, Place::Port(_));
        if !late && settling.first.is_empty() {
            return false;
        }
        let mut frame = frame.clone();
        let pushed = match output.edit.apply(&mut frame.head, &mut frame.offload) {
            true => settling.push(
                late,
                Later {
                    to: output.to,
                    vni: output.vni,
                    flow: flow_hash(key),
                    bytes: frame.to_vec(),
                    offload: frame.offload,
                },
            ),
            false => Err(Reason::Malformed),
        };
        if let Err(reason) = pushed {
            self.drop(from, reason);
        }
        true
    }

    /// Sends what has waited, as far as it can be sent now.
    pub(super) fn pump(&mut self) {
        if self.settling.is_empty() {
            return;
        }
        let now = self.now;
        let mut asks = Vec::new();
        let mut all = std::mem::take(&mut self.settling);
        all.retain(|_, settling| {
            if let Some(gate) = &mut settling.gate {
                if now >= gate.until {
                    settling.open();
                } else if now >= gate.again {
                    gate.again = now + AGAIN;
                    asks.push((gate.via, gate.to, gate.token));
                }
            }
            while let Some(later) = settling.first.pop_front() {
                match self.try_later(later) {
                    Ok(len) => {
                        settling.bytes = settling.bytes.saturating_sub(len);
                        settling.stuck = now + STUCK;
                    }
                    Err(later) if now < settling.stuck => {
                        settling.first.push_front(later);
                        break;
                    }
                    Err(later) => {
                        settling.bytes = settling.bytes.saturating_sub(later.bytes.len());
                        self.drop(later.to, Reason::Full);
                    }
                }
            }
            settling.gate.is_some() || !settling.first.is_empty()
        });
        // Nothing that is done here makes another one.
        self.settling.extend(all);
        let me = self.directory.me();
        for (via, to, token) in asks {
            self.say_way(via, FLUSH, token, me, to);
        }
    }

    /// Sends a frame that waited: its bytes; or the frame, if there is no room.
    fn try_later(&mut self, mut later: Later) -> Result<usize, Later> {
        let head = Head::of(&later.bytes);
        let rest = later.bytes.get_mut(HEAD..).unwrap_or_default();
        let body = [VolatileSlice::from(rest)];
        let frame = Frame {
            head,
            body: &body,
            offload: later.offload,
        };
        match later.to {
            Place::Port(id) => {
                // Its front end may be a moment behind its guest.
                let sent = self.put(id, &frame);
                if matches!(sent, Err(Reason::Full | Reason::Down)) {
                    return Err(later);
                }
            }
            Place::Node(node) => self.seal(node, later.vni, later.flow, &frame),
        }
        Ok(later.bytes.len())
    }

    fn say_way(&mut self, node: NodeId, kind: u8, token: u64, origin: NodeId, to: NodeId) {
        let mut bytes = WAY_HEAD.to_vec();
        bytes.push(kind);
        for number in [token, origin.0, to.0] {
            bytes.extend(number.to_be_bytes());
        }
        let at = Place::Node(node);
        self.put_off(at, Vni::default(), 0, bytes, Default::default());
    }

    /// A message about a way, from another switch; false: it is none.
    pub(super) fn hear_way(&mut self, node: NodeId, message: &[u8]) -> bool {
        let Some((kind, numbers)) = message.split_first() else {
            return false;
        };
        let number = |at: usize| {
            let bytes = numbers.get(8 * at..8 * at + 8)?;
            Some(u64::from_be_bytes(bytes.try_into().ok()?))
        };
        let (Some(token), Some(origin), Some(to)) = (number(0), number(1), number(2)) else {
            return false;
        };
        let (origin, to) = (NodeId(origin), NodeId(to));
        match *kind {
            FLUSH if origin == node && to == node => {
                self.say_way(node, DONE, token, origin, to);
            }
            FLUSH if origin == node => self.say_way(to, PASS, token, origin, to),
            PASS if to == self.directory.me() => self.say_way(origin, DONE, token, origin, to),
            DONE if origin == self.directory.me() => {
                let mut all = self.settling.values_mut();
                let of_it = |it: &&mut Settling| {
                    let gate = it.gate.as_ref();
                    gate.is_some_and(|gate| gate.token == token)
                };
                if let Some(settling) = all.find(of_it) {
                    settling.open();
                    self.pump();
                }
            }
            _ => return false,
        }
        true
    }

    /// This node has something since the guest came, whose epoch was this one.
    fn claim_after(&mut self, key: Record, value: Value, epoch: u64) {
        if let Err(refused) = self.directory.claim(self.now, key, value, epoch) {
            tracing::warn!("others are not told of {key:?}: {refused}");
        }
        self.tell();
    }

    /// In a few words, for people.
    pub(super) fn describe_moving(&self, slot: &Slot) -> Option<String> {
        let place = |place: Place| match place {
            Place::Port(id) => self.slot(id).map_or_else(String::new, |it| it.name.clone()),
            Place::Node(node) => self.peer_name(node),
        };
        match slot.moving {
            Moving::No => None,
            Moving::Arriving { from, .. } => Some(format!("coming from {}", place(from))),
            Moving::Leaving { to, .. } => Some(format!("going to {}", place(to))),
            Moving::Departed { to } => Some(format!("gone to {}", place(to))),
        }
    }
}
