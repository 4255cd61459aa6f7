//! What happens by itself: handshakes, probes, and what expires.

use std::net::SocketAddr;
use std::time::Duration;

use super::cookie::Verdict;
use super::path::ToSend;
use super::peer::Handshake;
use super::session::{EXPIRED, Session, UNHEARD};
use super::wire::{Datagram, HEADER, INITIATION, OVERHEAD, PROBE, RECORD, RESPONSE, Record, TAG};
use super::{PeerId, Time, TrainBuffer, Tunnels};
use crate::drops::Reason;

/// Between two initiations of a peer that are answered.
const APART: Duration = Duration::from_millis(20);
/// How long without anything to do the caller may wait at most.
const REST: Duration = Duration::from_secs(10);

impl Tunnels {
    /// When [`Tunnels::tick`] should come, at the latest: all other calls may
    /// make it earlier.
    #[must_use]
    pub fn due(&self) -> Time {
        self.due
    }

    /// Does what is due: handshakes, probes, new keys. Returns when to come
    /// again ([`Tunnels::due`]); at once, if `out` is full and is to be sent
    /// first. What is to be sent is in `out`, after [`Tunnels::finish`].
    pub fn tick(&mut self, now: Time, out: &mut TrainBuffer) -> Time {
        self.due = self.do_tick(now, out);
        self.due
    }

    fn do_tick(&mut self, now: Time, out: &mut TrainBuffer) -> Time {
        self.assembler.age(now, &mut self.drops);
        let mut next = now + REST;
        for at in 0..self.peers.len() {
            // Where it stopped the last time, so that each has its turn.
            let at = (self.resume + at) % self.peers.len();
            if out.is_full() {
                self.resume = at;
                return now;
            }
            if self.peers[at].is_some() {
                next = next.min(self.tick_peer(now, PeerId(at as u32), out));
            }
        }
        self.resume = 0;
        self.assembler.deadline().map_or(next, |age| next.min(age))
    }

    fn tick_peer(&mut self, now: Time, id: PeerId, out: &mut TrainBuffer) -> Time {
        self.expire(now, id);
        let Some(peer) = self.peers[id.0 as usize].as_deref_mut() else {
            return now + REST;
        };
        let mut next = now + REST;
        peer.forget_paths(now);
        let session = peer.current.and_then(|id| self.table.get(id));
        let old = session.as_ref().is_none_or(|session| session.is_old(now));
        if let Some(session) = session {
            let mut due: Vec<(usize, ToSend)> = Vec::new();
            let mut changed = false;
            let probe = &mut self.probe;
            for (at, path) in peer.paths.iter_mut().enumerate() {
                let mut number = || {
                    *probe += 1;
                    *probe
                };
                changed |= path.tick(now, &mut number, &mut |send| due.push((at, send)));
                next = next.min(path.deadline());
            }
            next = next.min(session.deadline(now));
            if changed {
                peer.judge();
            }
            for (at, send) in due {
                self.probe(now, id, at, send, out);
            }
        }
        let Some(peer) = self.peers[id.0 as usize].as_deref_mut() else {
            return next;
        };
        let lost = old || peer.paths.iter().all(|path| !path.up);
        if lost && !peer.paths.is_empty() {
            if now >= peer.next_try {
                self.initiate(now, id, out);
            }
            next = next.min(self.peer(id).map_or(next, |peer| peer.next_try));
        }
        next.max(now)
    }

    /// Forgets keys that are not used any more.
    fn expire(&mut self, now: Time, id: PeerId) {
        let Some(peer) = self.peers[id.0 as usize].as_deref_mut() else {
            return;
        };
        let table = &mut self.table;
        peer.sessions.retain(|id| {
            let age = table.get(*id).map(|session| {
                let age = now.saturating_sub(session.born);
                age < if session.heard { EXPIRED } else { UNHEARD }
            });
            if age != Some(true) {
                table.remove(*id);
            }
            age == Some(true)
        });
        let sessions = &peer.sessions;
        peer.current = peer.current.filter(|id| sessions.contains(id));
        if let Some(handshake) = peer.handshake.take_if(|shake| now >= shake.at + UNHEARD) {
            table.remove(handshake.id);
        }
    }

    fn probe(&mut self, now: Time, id: PeerId, path: usize, send: ToSend, out: &mut TrainBuffer) {
        let path = self.peer(id).and_then(|peer| peer.paths.get(path));
        if let Some(to) = path.map(|path| (path.uplink, path.remote)) {
            self.control(now, id, to, Record::Probe, (send.id, 0), send.size, out);
        }
    }

    /// Sends a probe or an answer, in a datagram of `size` bytes or what it
    /// needs.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn control(
        &mut self,
        now: Time,
        id: PeerId,
        (uplink, to): (u8, SocketAddr),
        record: Record,
        (one, two): (u64, u64),
        size: usize,
        out: &mut TrainBuffer,
    ) {
        self.finish(now, out);
        let session = self.peer(id).and_then(|peer| peer.current);
        let session = session.and_then(|id| self.table.get(id));
        let Some(session) = session.filter(|session| session.usable(now)) else {
            return;
        };
        let len = size.max(OVERHEAD + PROBE);
        let Some(bytes) = out.next(len) else {
            return;
        };
        bytes.fill(0);
        let records = &mut bytes[HEADER..len - TAG];
        records[..RECORD].copy_from_slice(&record.write());
        records[RECORD..RECORD + 8].copy_from_slice(&one.to_be_bytes());
        records[RECORD + 8..RECORD + PROBE].copy_from_slice(&two.to_be_bytes());
        session.seal(bytes);
        out.push_alone(uplink, to, len);
    }

    fn message(&mut self, (uplink, to): (u8, SocketAddr), bytes: &[u8], out: &mut TrainBuffer) {
        if let Some(room) = out.next(bytes.len()) {
            room.copy_from_slice(bytes);
            out.push_alone(uplink, to, bytes.len());
        }
    }

    fn initiate(&mut self, now: Time, id: PeerId, out: &mut TrainBuffer) {
        self.finish(now, out);
        // It grows even if the time does not.
        let time = u64::try_from((self.epoch + now).as_nanos()).unwrap_or(u64::MAX);
        self.stamp = time.max(self.stamp.saturating_add(1));
        let Some(peer) = self.peers[id.0 as usize].as_deref_mut() else {
            return;
        };
        peer.next_try = now + peer.backoff();
        let up = peer.paths.iter().position(|path| path.up);
        // One after the other, and where they should be, now and then.
        let tries = peer.tries as usize;
        let at = up
            .filter(|_| tries == 0)
            .unwrap_or(tries % peer.paths.len());
        let path = &peer.paths[at];
        let home = path.home.filter(|_| (tries / peer.paths.len()) % 2 == 1);
        let to = (path.uplink, home.unwrap_or(path.remote));
        peer.tries = peer.tries.saturating_add(1);
        if let Some(before) = peer.handshake.take() {
            self.table.remove(before.id);
        }
        let Some(session) = self.table.reserve(id) else {
            return;
        };
        let started = self
            .identity
            .start(&peer.public, &peer.psk, session, self.stamp);
        let Some((started, mut message)) = started else {
            self.table.remove(session);
            return;
        };
        peer.to.mark(now, &mut message);
        peer.handshake = Some(Handshake {
            id: session,
            started,
            at: now,
        });
        self.message(to, &message, out);
    }

    /// A handshake's message has come.
    pub(super) fn handshake(
        &mut self,
        now: Time,
        what: Datagram,
        from: (u8, SocketAddr),
        bytes: &mut [u8],
        out: &mut TrainBuffer,
    ) -> Result<(), Reason> {
        if out.is_full() {
            return Err(Reason::Full);
        }
        match what {
            Datagram::Initiation { sender } => self.initiated(now, sender, from, bytes, out),
            Datagram::Response { sender, receiver } => {
                self.responded(now, (sender, receiver), from, bytes, out)
            }
            Datagram::Cookie { receiver } => {
                let id = self.table.waiting(receiver).ok_or(Reason::Handshake)?;
                let slot = self.peers.get_mut(id.0 as usize);
                let peer = slot.and_then(Option::as_deref_mut).ok_or(Reason::NoPeer)?;
                if !peer.to.take(now, bytes) {
                    return Err(Reason::Forged);
                }
                // Come again with it, soon.
                let soon = now + Duration::from_millis(100);
                peer.next_try = peer.next_try.min(soon);
                self.due = self.due.min(soon);
                Ok(())
            }
            Datagram::Data { .. } => Err(Reason::Malformed),
        }
    }

    fn initiated(
        &mut self,
        now: Time,
        sender: u32,
        from: (u8, SocketAddr),
        bytes: &[u8],
        out: &mut TrainBuffer,
    ) -> Result<(), Reason> {
        let message: &[u8; INITIATION] = bytes.try_into().map_err(|_| Reason::Malformed)?;
        if let Verdict::Answer(cookie) = self.gate.judge(now, from.1, sender, message)? {
            self.finish(now, out);
            self.message(from, &cookie, out);
            return Err(Reason::HandshakeFlood);
        }
        let asked = self.identity.read(message)?;
        let id = self.find(&asked.public).ok_or(Reason::Handshake)?;
        let slot = self.peers.get_mut(id.0 as usize);
        let peer = slot.and_then(Option::as_deref_mut).ok_or(Reason::NoPeer)?;
        let early = peer.answered.is_some_and(|last| now < last + APART);
        if asked.stamp <= peer.stamp || early {
            return Err(Reason::Handshake);
        }
        let session = self.table.reserve(id).ok_or(Reason::Full)?;
        let stamp = asked.stamp;
        let answer = asked.answer(self.identity.costs, &peer.psk, session, sender);
        let Some((keys, mut message)) = answer else {
            self.table.remove(session);
            return Err(Reason::Handshake);
        };
        (peer.stamp, peer.answered) = (stamp, Some(now));
        let made = Session::new(id, sender, keys, now, false);
        self.table.open(session, made);
        peer.add_session(session, &mut self.table);
        peer.to.mark(now, &mut message);
        self.finish(now, out);
        self.message(from, &message, out);
        Ok(())
    }

    fn responded(
        &mut self,
        now: Time,
        (sender, receiver): (u32, u32),
        from: (u8, SocketAddr),
        bytes: &[u8],
        out: &mut TrainBuffer,
    ) -> Result<(), Reason> {
        let message: &[u8; RESPONSE] = bytes.try_into().map_err(|_| Reason::Malformed)?;
        let id = self.table.waiting(receiver).ok_or(Reason::Handshake)?;
        if !self.gate.is_for_us(message) {
            return Err(Reason::Forged);
        }
        let slot = self.peers.get_mut(id.0 as usize);
        let peer = slot.and_then(Option::as_deref_mut).ok_or(Reason::NoPeer)?;
        let shake = peer.handshake.as_mut().ok_or(Reason::Handshake)?;
        let keys = shake.started.finish(message)?;
        peer.handshake = None;
        // What is open was meant for the session before.
        self.finish(now, out);
        let session = Session::new(id, sender, keys, now, true);
        self.table.open(receiver, session);
        let slot = self.peers.get_mut(id.0 as usize);
        let peer = slot.and_then(Option::as_deref_mut).ok_or(Reason::NoPeer)?;
        peer.add_session(receiver, &mut self.table);
        peer.switch(now, receiver);
        self.due = now;
        peer.stats.handshakes += 1;
        if peer.path(from.0, from.1).is_none() {
            peer.learn(now, from.0, from.1, &self.uplinks);
            peer.stats.moves += 1;
        }
        // The peer sends in it when something has come in it: a probe.
        self.probe += 1;
        let number = (self.probe, 0);
        self.control(now, id, from, Record::Probe, number, 0, out);
        let Some(peer) = self.peers[id.0 as usize].as_deref_mut() else {
            return Ok(());
        };
        if let Some(at) = peer.path(from.0, from.1) {
            peer.paths[at].up = true;
        }
        for path in &mut peer.paths {
            path.hurry(now);
        }
        peer.judge();
        Ok(())
    }

    /// The peer has a session that it has asked for: it is used now.
    pub(super) fn confirmed(&mut self, now: Time, id: PeerId, session: u32, path: Option<usize>) {
        let Some(peer) = self.peers[id.0 as usize].as_deref_mut() else {
            return;
        };
        peer.stats.handshakes += 1;
        let born = |table: &mut super::session::Table, id| table.get(id).map(|it| it.born);
        let current = peer.current.and_then(|id| born(&mut self.table, id));
        if current > born(&mut self.table, session) {
            // There are newer ones; this one is for what comes late.
            return;
        }
        peer.switch(now, session);
        self.due = now;
        for path in &mut peer.paths {
            path.hurry(now);
        }
        if let Some(path) = path.and_then(|at| peer.paths.get_mut(at)) {
            path.up = true;
        }
        peer.judge();
    }
}
