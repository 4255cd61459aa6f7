//! Datagrams become frames.

use std::net::SocketAddr;

use blanket_drivers::uplink::RxBuffer;
use vm_memory::VolatileSlice;

use super::assemble::{self, Name};
use super::wire::{Datagram, Facts, HEADER, MAX_CHUNKS, Record, u64_at};
use super::{PeerId, Time, TrainBuffer, Tunnels};
use crate::drops::Reason;
use crate::frame::{Frame, HEAD, Head, Vni};

/// What has come: a datagram, or a train.
pub struct Received<'b> {
    /// At which uplink.
    pub uplink: u8,
    /// From where.
    pub from: SocketAddr,
    /// Its bytes, which are opened in place.
    pub bytes: &'b mut [u8],
    /// Bytes of each datagram but the last.
    pub segment: usize,
}

impl<'b> Received<'b> {
    /// What an uplink has filled a buffer with.
    #[must_use]
    pub fn of(uplink: u8, buffer: &'b mut RxBuffer<'_>) -> Self {
        Self {
            uplink,
            from: buffer.from,
            bytes: buffer.bytes.get_mut(..buffer.len).unwrap_or_default(),
            segment: buffer.segment,
        }
    }
}

/// Who takes frames.
pub type Each<'e> = dyn FnMut(PeerId, Vni, &mut Frame<'_>) + 'e;

/// Chunks of a frame that have come in order, where they lie.
struct Run<'b> {
    peer: PeerId,
    name: Name,
    facts: Facts,
    size: usize,
    pieces: [VolatileSlice<'b>; MAX_CHUNKS],
    count: usize,
}

/// Where the last datagram of a train was from.
#[derive(Clone, Copy)]
struct Near {
    uplink: u8,
    from: SocketAddr,
    /// The peer's path, if it was found.
    path: Option<(PeerId, usize)>,
}

impl Tunnels {
    /// Opens what has come, and hands the frames in it to `each`, in place if
    /// all of a frame is in `batch`, in order. What is answered goes to `out`
    /// ([`Tunnels::finish`] comes before it is sent). What is not opened is
    /// counted in [`Tunnels::drops`].
    pub fn open<'b>(
        &mut self,
        now: Time,
        batch: impl IntoIterator<Item = Received<'b>>,
        out: &mut TrainBuffer,
        each: &mut Each<'_>,
    ) {
        let mut run = Run {
            peer: PeerId::default(),
            name: (0, 0),
            facts: Facts {
                vni: Vni::default(),
                len: 0,
                offload: Default::default(),
            },
            size: 0,
            pieces: std::array::from_fn(|_| VolatileSlice::from(&mut [][..])),
            count: 0,
        };
        for received in batch {
            let mut near = Near {
                uplink: received.uplink,
                from: received.from,
                path: None,
            };
            let segment = match received.segment {
                0 => received.bytes.len().max(1),
                segment => segment,
            };
            for datagram in received.bytes.chunks_mut(segment) {
                let done = match Datagram::parse(datagram) {
                    Some(Datagram::Data { receiver, counter }) => {
                        let what = (receiver, counter);
                        self.data(now, what, datagram, &mut near, &mut run, out, each)
                    }
                    Some(other) => {
                        self.handshake(now, other, (near.uplink, near.from), datagram, out)
                    }
                    None => Err(Reason::Malformed),
                };
                if let Err(reason) = done {
                    self.drops.add(reason);
                }
            }
        }
        self.spill(now, &mut run, each);
    }

    #[allow(clippy::too_many_arguments)]
    fn data<'b>(
        &mut self,
        now: Time,
        (receiver, counter): (u32, u64),
        datagram: &'b mut [u8],
        near: &mut Near,
        run: &mut Run<'b>,
        out: &mut TrainBuffer,
        each: &mut Each<'_>,
    ) -> Result<(), Reason> {
        let session = self.table.get(receiver).ok_or(Reason::NoSession)?;
        if !session.usable(now) {
            return Err(Reason::NoSession);
        }
        if !session.window.is_new(counter) {
            return Err(Reason::Replayed);
        }
        let sealed = datagram.get_mut(HEADER..).ok_or(Reason::Malformed)?;
        let plain = session.keys.into.open(counter, sealed);
        let mut rest = plain.ok_or(Reason::Forged)?;
        let newest = session.window.mark(counter);
        let (id, confirmed) = (session.peer, !std::mem::replace(&mut session.heard, true));
        let (path, moved) = self.arrived(now, id, near, newest)?;
        if confirmed {
            self.confirmed(now, id, receiver, path);
        }
        if let Some(peer) = self.peers[id.0 as usize].as_deref_mut() {
            peer.stats.moves += u64::from(moved);
            // Frames and chunks: probes are not counted at either end.
            let is_data = matches!(rest.first(), Some(1 | 2));
            if let Some(path) = path.and_then(|path| peer.paths.get_mut(path)) {
                path.received += u64::from(is_data);
                path.last_received = now;
            }
        }
        while !rest.is_empty() {
            let (record, body, next) = Record::split(rest)?;
            match record {
                Record::Padding => {}
                Record::Frame(facts) => self.hand_on(id, &facts, body, each),
                Record::Chunk(facts, index) => {
                    let first = counter.checked_sub(index.into()).ok_or(Reason::Malformed)?;
                    let name = (receiver, first);
                    self.chunk(now, id, name, (facts, index), body, run, each);
                }
                Record::Probe => self.answer(now, id, path, near, body, out),
                Record::Answer => self.answered(now, id, body),
            }
            rest = next;
        }
        Ok(())
    }

    /// Which path a genuine datagram has come by; whether that is a new one.
    fn arrived(
        &mut self,
        now: Time,
        id: PeerId,
        near: &mut Near,
        newest: bool,
    ) -> Result<(Option<usize>, bool), Reason> {
        if let Some((_, path)) = near.path.filter(|(peer, _)| *peer == id) {
            return Ok((Some(path), false));
        }
        let slot = self.peers.get_mut(id.0 as usize);
        let peer = slot.and_then(Option::as_deref_mut).ok_or(Reason::NoPeer)?;
        let (path, moved) = match peer.path(near.uplink, near.from) {
            Some(path) => (Some(path), false),
            None if newest => {
                let path = peer.learn(now, near.uplink, near.from, &self.uplinks);
                self.due = now;
                (Some(path), true)
            }
            None => (None, false),
        };
        near.path = path.map(|path| (id, path));
        Ok((path, moved))
    }

    /// A small frame.
    fn hand_on(&mut self, id: PeerId, facts: &Facts, bytes: &mut [u8], each: &mut Each<'_>) {
        let (head, body) = bytes.split_at_mut(bytes.len().min(HEAD));
        let piece = [VolatileSlice::from(body)];
        let mut frame = Frame {
            head: Head::of(head),
            body: if facts.len > HEAD { &piece } else { &[] },
            offload: facts.offload,
        };
        each(id, facts.vni, &mut frame);
        self.count(id, facts.len, false, false);
    }

    fn count(&mut self, id: PeerId, len: usize, in_place: bool, assembled: bool) {
        if let Some(peer) = self.peers[id.0 as usize].as_deref_mut() {
            peer.stats.frames_in += 1;
            peer.stats.bytes_in += len as u64;
            peer.stats.in_place += u64::from(in_place);
            peer.stats.assembled += u64::from(assembled);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn chunk<'b>(
        &mut self,
        now: Time,
        peer: PeerId,
        name: Name,
        (facts, index): (Facts, u8),
        body: &'b mut [u8],
        run: &mut Run<'b>,
        each: &mut Each<'_>,
    ) {
        let (at, size) = (usize::from(index), body.len());
        let goes_on = run.count > 0
            && run.count == at
            && (run.name, run.size, run.facts) == (name, size, facts);
        if !goes_on {
            self.spill(now, run, each);
            if index > 0 {
                self.assemble(now, peer, name, (&facts, index), size, each, |room| {
                    room.copy_from_slice(&body[..room.len()]);
                });
                return;
            }
            (run.peer, run.name, run.facts, run.size) = (peer, name, facts, size);
        }
        // The last one ends where the frame does.
        let len = size.min(facts.len - at * size);
        run.pieces[at] = VolatileSlice::from(&mut body[..len]);
        run.count = at + 1;
        if run.count * size >= facts.len {
            let first = run.pieces[0];
            let mut head = Head::default();
            let taken = first.copy_to(head.room(HEAD.min(first.len())));
            if let Ok(rest) = first.offset(taken) {
                run.pieces[0] = rest;
            }
            let from = usize::from(run.pieces[0].is_empty());
            let mut frame = Frame {
                head,
                body: &run.pieces[from..run.count],
                offload: facts.offload,
            };
            each(peer, facts.vni, &mut frame);
            run.count = 0;
            self.count(peer, facts.len, true, false);
        }
    }

    /// What is incomplete is copied, to be put together with what comes.
    fn spill(&mut self, now: Time, run: &mut Run<'_>, each: &mut Each<'_>) {
        let count = std::mem::take(&mut run.count);
        for (index, piece) in run.pieces[..count].iter().enumerate() {
            let what = (&run.facts, index as u8);
            self.assemble(now, run.peer, run.name, what, run.size, each, |room| {
                piece.copy_to(room);
            });
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn assemble(
        &mut self,
        now: Time,
        peer: PeerId,
        name: Name,
        (facts, index): (&Facts, u8),
        size: usize,
        each: &mut Each<'_>,
        copy: impl FnOnce(&mut [u8]),
    ) {
        self.due = self.due.min(now + assemble::AGE);
        let drops = &mut self.drops;
        let assembler = &mut self.assembler;
        let whole = assembler.add(now, peer, name, facts, index, size, copy, drops);
        if let Some(mut bytes) = whole {
            let (head, body) = bytes.split_at_mut(HEAD.min(facts.len));
            let piece = [VolatileSlice::from(body)];
            let mut frame = Frame {
                head: Head::of(head),
                body: if facts.len > HEAD { &piece } else { &[] },
                offload: facts.offload,
            };
            each(peer, facts.vni, &mut frame);
            self.assembler.recycle(bytes);
            self.count(peer, facts.len, false, true);
        }
    }

    /// A probe: how many data datagrams have come by its path.
    fn answer(
        &mut self,
        now: Time,
        id: PeerId,
        path: Option<usize>,
        near: &Near,
        body: &[u8],
        out: &mut TrainBuffer,
    ) {
        let received = self.peer(id).and_then(|peer| {
            let path = peer.paths.get(path?)?;
            Some(path.received)
        });
        let (Some(number), Some(received)) = (u64_at(body, 0), received) else {
            return;
        };
        let to = (near.uplink, near.from);
        self.control(now, id, to, Record::Answer, (number, received), 0, out);
    }

    fn answered(&mut self, now: Time, id: PeerId, body: &[u8]) {
        let (Some(number), Some(received)) = (u64_at(body, 0), u64_at(body, 8)) else {
            return;
        };
        let Some(peer) = self.peers[id.0 as usize].as_deref_mut() else {
            return;
        };
        let mut paths = peer.paths.iter_mut();
        if paths.find_map(|path| path.answered(now, number, received)) == Some(true) {
            peer.judge();
        }
    }
}
