//! Ports' and uplinks' turns, and what time asks for.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::datapath::Turn;
use super::moving::Moving;
use super::{LOOK, Switch};
use crate::bridge::Place;
use crate::frame::PortId;
use crate::port::{BURST, Port};
use crate::switch::remote::CONTROL;
use crate::switch::worker::Waker;
impl Switch {
    /// What becomes readable when there is work, of each port that is not down.
    pub(in crate::switch) fn wakers(&self) -> impl Iterator<Item = Waker<'_>> {
        let ports = self.all();
        ports.filter_map(|(id, slot)| Some((id, slot.port.as_ref()?.waker())))
    }

    pub(in crate::switch) fn uplink_wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.remote.iter().flat_map(|remote| remote.wakers())
    }

    #[cfg(test)]
    pub(in crate::switch) fn start(&self) -> Instant {
        self.start
    }

    pub(in crate::switch) fn set_now(&mut self, now: Instant) {
        self.now = now.saturating_duration_since(self.start);
    }

    /// Does what time asks for; when that is next.
    pub(in crate::switch) fn tick(&mut self, now: Instant) -> Option<Instant> {
        self.set_now(now);
        let now = self.now;
        if now >= self.expire {
            self.expire = now + Duration::from_secs(1);
            self.bridge.expire(now);
            self.end_probes(None);
            for flows in self.flows.values_mut() {
                flows.expire(now);
            }
        }
        self.notice();
        self.refresh_groups();
        self.pump();
        // What waits for room is looked at again soon.
        let soon = now + Duration::from_millis(1);
        let settling = (!self.settling.is_empty()).then(|| self.start + soon);
        let Some(remote) = self.remote.as_mut() else {
            self.catch_up();
            self.flush();
            return settling;
        };
        let mut next = remote.tick(now);
        if now >= self.look {
            self.look = now + LOOK;
            for (node, up) in remote.turned(now) {
                if up {
                    self.gossip.up(node);
                } else {
                    self.gossip.down(node);
                }
            }
        }
        if remote.waits() {
            next = next.min(self.look);
        }
        if let Some(at) = self.security.next() {
            next = next.min(at);
        }
        if now >= self.gossip.next(now) {
            self.tell();
        }
        self.catch_up();
        self.flush();
        let next = self.start + next.min(self.gossip.next(now).max(soon));
        Some(settling.map_or(next, |settling| next.min(settling)))
    }

    /// Gives a port (none: the uplinks) its turn: how many frames there were.
    pub(in crate::switch) fn service(&mut self, id: Option<PortId>) -> usize {
        let count = match id {
            Some(id) => self.service_port(id),
            None => self.service_uplinks(),
        };
        self.end_alike();
        if !self.later.is_empty() {
            self.catch_up();
        }
        if !self.settling.is_empty() {
            self.pump();
            self.catch_up();
        }
        count
    }

    pub(super) fn service_port(&mut self, id: PortId) -> usize {
        let Some(slot) = self.slot_mut(id) else {
            return 0;
        };
        let vni = slot.vni;
        if let Moving::Arriving { .. } = slot.moving
            && !self.has_begun(id)
        {
            return 0;
        }
        let port = self.slot_mut(id).and_then(|slot| slot.port.take());
        let Some(mut port) = port else {
            return 0;
        };
        let from = Place::Port(id);
        if self.weighted {
            let received = self.weighted_turn(id, port.as_mut());
            return self.settle(id, port, received).unwrap_or(0);
        }
        let received = port.receive(BURST, &mut |frame| self.forward(from, vni, frame));
        self.settle(id, port, received).unwrap_or(0)
    }

    /// Whether the front end of a port that waits for its guest has begun: then
    /// the port is active before anything comes from it.
    fn has_begun(&mut self, id: PortId) -> bool {
        self.with_port(Some(id), |port| port.receive(0, &mut |_| {}));
        let slot = self.slot(id);
        slot.is_some_and(|slot| !matches!(slot.moving, Moving::Arriving { .. }))
    }

    pub(super) fn service_uplinks(&mut self) -> usize {
        let Some(mut remote) = self.remote.take() else {
            return 0;
        };
        let received = remote.receive(self.now, &mut |node, vni, frame| {
            if vni.number() == CONTROL {
                self.end_alike();
                self.hear(node, frame);
            } else {
                self.forward(Place::Node(node), vni, frame);
            }
        });
        self.remote = Some(remote);
        received.unwrap_or_else(|error| {
            // A link that is down, which others may not be.
            tracing::debug!("an uplink: {error}");
            0
        })
    }

    /// Puts a port back after something was done with it; it is down if that
    /// has failed.
    pub(super) fn settle<T>(
        &mut self,
        id: PortId,
        port: Box<dyn Port>,
        done: io::Result<T>,
    ) -> Option<T> {
        let slot = self.slot_mut(id)?;
        match done {
            Ok(done) => {
                slot.port = Some(port);
                if slot.moving != Moving::No {
                    self.look_at(id);
                }
                Some(done)
            }
            Err(error) => {
                tracing::warn!("port {} is down: {error}", slot.name);
                slot.drops.merge(port.drops());
                slot.down = Some(error.to_string());
                if let Some(slot) = self.slot(id) {
                    self.tell_of_port(id, slot, Turn::Changed);
                }
                None
            }
        }
    }

    pub(super) fn with_port<T>(
        &mut self,
        id: Option<PortId>,
        act: impl FnOnce(&mut dyn Port) -> io::Result<T>,
    ) -> Option<T> {
        let mut port = self.slot_mut(id?)?.port.take()?;
        let done = act(port.as_mut());
        self.settle(id?, port, done)
    }

    /// Whether it pays to look for frames of a port before sleeping.
    pub(in crate::switch) fn polls_cheaply(&self, id: Option<PortId>) -> bool {
        let slot = id.and_then(|id| self.slot(id));
        let port = slot.and_then(|slot| slot.port.as_ref());
        port.is_some_and(|port| port.polls_cheaply())
    }

    /// Asks a port for notifications; false: it has something already.
    pub(in crate::switch) fn arm(&mut self, id: Option<PortId>) -> bool {
        // One that is down, or has gone, is not looked at any more.
        self.with_port(id, |port| port.arm()).unwrap_or(true)
    }

    /// The port is polled from now on.
    pub(in crate::switch) fn disarm(&mut self, id: Option<PortId>) {
        self.with_port(id, |port| {
            port.disarm();
            Ok(())
        });
    }

    /// Lets the other sides know of what was sent to them.
    pub(in crate::switch) fn flush(&mut self) {
        if let Some(remote) = &mut self.remote {
            remote.flush(self.now);
        }
        while let Some(id) = self.dirty.pop() {
            if let Some(slot) = self.slot_mut(id) {
                slot.dirty = false;
            }
            self.with_port(Some(id), |port| port.flush());
        }
        if !self.captures.is_empty() {
            self.captures.flush();
        }
    }
}
