//! Frames become datagrams.

use std::hash::{Hash, Hasher};
use std::ops::Range;

use blanket_drivers::uplink::{MAX_SEGMENTS, MAX_TRAIN};
use vm_memory::VolatileSlice;

use super::peer::Peer;
use super::session::{Session, Table};
use super::train::{Train, TrainBuffer, push};
use super::wire::{
    Facts, HEADER, MAX_CHUNKS, MIN_CHUNK, MIN_DATAGRAM, OVERHEAD, RECORD, Record, TAG,
};
use super::{PeerId, Time, Tunnels};
use crate::drops::Reason;
use crate::frame::{Frame, HEAD, Head, Key, Offload, Vni};

/// A flow, as a number: what takes one path, so that it stays in order.
#[must_use]
pub fn flow_hash(key: &Key) -> u32 {
    // FNV-1a: whoever chooses flows that collide only slows himself down.
    struct Fnv(u64);
    impl Hasher for Fnv {
        fn finish(&self) -> u64 {
            self.0
        }
        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    key.vni.number().hash(&mut hasher);
    // Fragments have no ports but in the first: none of them counts them.
    let ports = key.ports.filter(|_| key.fragment.is_none());
    match key.ip {
        Some(ip) => (ip, key.protocol, ports).hash(&mut hasher),
        None => (key.src, key.dst, key.ethertype).hash(&mut hasher),
    }
    let hash = hasher.finish();
    (hash ^ hash >> 32) as u32
}

/// Reads a frame from its start to its end.
struct Source<'f, 'a> {
    head: &'f [u8],
    pieces: std::slice::Iter<'f, VolatileSlice<'a>>,
    piece: Option<VolatileSlice<'a>>,
}

impl<'f, 'a> Source<'f, 'a> {
    fn new(frame: &'f Frame<'a>) -> Self {
        Self {
            head: frame.head.bytes(),
            pieces: frame.body.iter(),
            piece: None,
        }
    }

    /// Fills `to`, with zeros where there is nothing left.
    fn read(&mut self, to: &mut [u8]) {
        let mut done = self.head.len().min(to.len());
        to[..done].copy_from_slice(&self.head[..done]);
        self.head = &self.head[done..];
        while done < to.len() {
            let Some(piece) = self.piece.take().or_else(|| self.pieces.next().copied()) else {
                to[done..].fill(0);
                return;
            };
            let copied = piece.copy_to(&mut to[done..]);
            done += copied;
            self.piece = piece.offset(copied).ok().filter(|rest| !rest.is_empty());
        }
    }
}

/// How a frame lies in a buffer that it is sealed in without being copied:
/// chunk after chunk, with room for headers before each and tags behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gaps {
    datagram: usize,
}

impl Gaps {
    /// Bytes of the frame in each chunk.
    #[must_use]
    pub fn chunk(self) -> usize {
        self.datagram - OVERHEAD
    }

    /// Where the frame's bytes of the `index`th chunk lie.
    #[must_use]
    pub fn place(self, index: usize) -> Range<usize> {
        let start = index * self.datagram + HEADER + RECORD;
        start..start + self.chunk()
    }

    /// Chunks of a frame of `len` bytes.
    #[must_use]
    pub fn chunks(self, len: usize) -> usize {
        len.div_ceil(self.chunk())
    }

    /// Bytes of a buffer for a frame of `len`.
    #[must_use]
    pub fn buffer(self, len: usize) -> usize {
        self.chunks(len) * self.datagram
    }
}

struct Ready<'t> {
    peer: &'t mut Peer,
    session: &'t mut Session,
    path: u8,
}

impl Tunnels {
    fn ready(&mut self, now: Time, peer: PeerId, flow: u32) -> Result<Ready<'_>, Reason> {
        let slot = self.peers.get_mut(peer.0 as usize);
        let peer = slot.and_then(Option::as_deref_mut).ok_or(Reason::NoPeer)?;
        let id = peer.current.ok_or(Reason::NoSession)?;
        let session = self.table.get(id).filter(|session| session.usable(now));
        let session = session.ok_or(Reason::NoSession)?;
        let path = peer.route(flow);
        let way = peer.paths.get(usize::from(path));
        // A dead one is only what is left if all are.
        if way.is_none_or(|way| way.is_dead(now)) {
            return Err(Reason::NoSession);
        }
        Ok(Ready {
            peer,
            session,
            path,
        })
    }

    /// Seals a frame to a peer. `flow` decides on its path ([`flow_hash`]).
    /// When `out` [is full](TrainBuffer::is_full), and after each burst,
    /// [`Tunnels::finish`] comes and `out` is sent.
    ///
    /// # Errors
    ///
    /// Why it was not: to be counted by the caller.
    pub fn seal(
        &mut self,
        now: Time,
        peer: PeerId,
        vni: Vni,
        flow: u32,
        frame: &Frame<'_>,
        out: &mut TrainBuffer,
    ) -> Result<(), Reason> {
        let facts = Facts::of(vni, frame.len(), frame.offload)?;
        let ready = self.ready(now, peer, flow)?;
        let path = ready.path;
        if facts.len + OVERHEAD <= ready.peer.paths[usize::from(path)].size {
            self.seal_small(now, peer, path, facts, frame, out)?;
        } else {
            self.seal_large(now, peer, flow, facts, frame, out)?;
        }
        if let Some(peer) = self.peers[peer.0 as usize].as_deref_mut() {
            peer.stats.frames_out += 1;
            peer.stats.bytes_out += facts.len as u64;
        }
        Ok(())
    }

    fn seal_small(
        &mut self,
        now: Time,
        id: PeerId,
        path: u8,
        facts: Facts,
        frame: &Frame<'_>,
        out: &mut TrainBuffer,
    ) -> Result<(), Reason> {
        let need = RECORD + facts.len;
        let start = out.start();
        let fits = |open: &super::train::Open| {
            open.peer == id && open.path == path && open.end + need + TAG <= start + open.size
        };
        if !out.open.as_ref().is_some_and(fits) {
            let same = |open: &super::train::Open| open.peer == id && open.path == path;
            let pad = out.open.as_ref().is_some_and(same);
            close(
                &mut self.peers,
                &mut self.table,
                &mut self.due,
                now,
                pad,
                out,
            );
            let way = self.peer(id).map(|peer| &peer.paths[usize::from(path)]);
            let way = way.ok_or(Reason::NoPeer)?;
            if !out.begin(id, path, (way.uplink, way.remote), way.size) {
                return Err(Reason::Full);
            }
        }
        let end = out.open.as_ref().map_or(0, |open| open.end);
        let room = out.at(end..end + need).ok_or(Reason::Full)?;
        let (header, bytes) = room.split_at_mut(RECORD);
        header.copy_from_slice(&Record::Frame(facts).write());
        Source::new(frame).read(bytes);
        if let Some(open) = &mut out.open {
            open.end = end + need;
        }
        Ok(())
    }

    fn seal_large(
        &mut self,
        now: Time,
        id: PeerId,
        flow: u32,
        facts: Facts,
        frame: &Frame<'_>,
        out: &mut TrainBuffer,
    ) -> Result<(), Reason> {
        self.finish(now, out);
        let ready = self.ready(now, id, flow)?;
        let path = &mut ready.peer.paths[usize::from(ready.path)];
        // All chunks have the same size: those of the next frame can be in
        // their train.
        let chunks = facts.len.div_ceil(path.size - OVERHEAD);
        let size = facts.len.div_ceil(chunks.max(1)).max(MIN_CHUNK);
        if chunks > MAX_CHUNKS {
            return Err(Reason::TooBig);
        }
        let datagram = size + OVERHEAD;
        if out.room() < chunks * datagram {
            return Err(Reason::Full);
        }
        let mut source = Source::new(frame);
        for index in 0..chunks {
            let bytes = out.next(datagram).ok_or(Reason::Full)?;
            source.read(&mut bytes[HEADER + RECORD..datagram - TAG]);
            seal_chunk(ready.session, facts, index, bytes);
            out.push(path.uplink, path.remote, datagram);
        }
        if path.used(now, chunks) {
            self.due = now;
        }
        Ok(())
    }

    /// How frames should lie that [`Tunnels::seal_gapped`] seals, for all
    /// peers or for one.
    #[must_use]
    pub fn gaps(&self, peer: Option<PeerId>) -> Gaps {
        let datagram = match peer {
            Some(peer) => self.peer(peer).map(Peer::size),
            None => {
                let peers = self.peers.iter().flatten();
                peers.map(|peer| peer.size()).min()
            }
        };
        Gaps {
            datagram: datagram.unwrap_or(MIN_DATAGRAM),
        }
    }

    /// Seals a large frame where it lies. In `buffer` the body's bytes are at
    /// [`Gaps::place`], behind room for as many bytes as the head has: these
    /// are written. The trains to send from `buffer` are added to `trains`.
    /// What is in a [`TrainBuffer`] should be sent before, to stay in order.
    ///
    /// `Ok(false)`: it does not fit (the path takes less, the head has become
    /// longer or shorter, or it is a small frame, which is better copied):
    /// nothing has happened, and [`Tunnels::seal`] does it.
    ///
    /// # Errors
    ///
    /// Why it was not, and cannot be: to be counted by the caller.
    #[allow(clippy::too_many_arguments)]
    pub fn seal_gapped(
        &mut self,
        now: Time,
        peer: PeerId,
        vni: Vni,
        flow: u32,
        (head, len, offload): (&Head, usize, Offload),
        gaps: Gaps,
        buffer: &mut [u8],
        trains: &mut Vec<Train>,
    ) -> Result<bool, Reason> {
        let facts = Facts::of(vni, len, offload)?;
        let ready = self.ready(now, peer, flow)?;
        let path = &mut ready.peer.paths[usize::from(ready.path)];
        let (chunks, size) = (gaps.chunks(len), gaps.datagram);
        let head = head.bytes();
        if !(2..=MAX_CHUNKS).contains(&chunks)
            || size > path.size
            || head.len() != HEAD
            || buffer.len() < chunks * size
        {
            return Ok(false);
        }
        let start = HEADER + RECORD;
        buffer[start..start + HEAD].copy_from_slice(head);
        // The last chunk is as large as the others: what lay there before
        // stays here.
        let last = gaps.place(chunks - 1);
        buffer[last.start + (len - (chunks - 1) * gaps.chunk())..last.end].fill(0);
        let each = MAX_SEGMENTS.min(MAX_TRAIN / size).max(1);
        let first = trains.len();
        for (index, bytes) in buffer.chunks_exact_mut(size).take(chunks).enumerate() {
            seal_chunk(ready.session, facts, index, bytes);
            let closed = index % each == 0 || trains.len() == first;
            let to = (path.uplink, path.remote);
            push(trains, closed, to, index * size, size);
        }
        let hurry = path.used(now, chunks);
        ready.peer.stats.frames_out += 1;
        ready.peer.stats.bytes_out += len as u64;
        if hurry {
            self.due = now;
        }
        Ok(true)
    }

    /// Seals what still had room for small frames. Then `out` can be sent.
    pub fn finish(&mut self, now: Time, out: &mut TrainBuffer) {
        close(
            &mut self.peers,
            &mut self.table,
            &mut self.due,
            now,
            false,
            out,
        );
    }
}

fn seal_chunk(session: &mut Session, facts: Facts, index: usize, bytes: &mut [u8]) {
    let header = Record::Chunk(facts, index as u8).write();
    bytes[HEADER..HEADER + RECORD].copy_from_slice(&header);
    session.seal(bytes);
}

/// Seals the datagram that is open, if one is. `pad`: another one to the same
/// address comes, and may be in its train if this one is filled up.
pub(super) fn close(
    peers: &mut [Option<Box<Peer>>],
    table: &mut Table,
    due: &mut Time,
    now: Time,
    pad: bool,
    out: &mut TrainBuffer,
) {
    let Some(open) = out.open.take() else {
        return;
    };
    let slot = peers.get_mut(open.peer.0 as usize);
    let Some(peer) = slot.and_then(Option::as_deref_mut) else {
        return;
    };
    let session = peer.current.and_then(|id| table.get(id));
    let Some(session) = session.filter(|session| session.usable(now)) else {
        return;
    };
    let start = out.start();
    let mut end = open.end;
    let full = start + open.size - TAG;
    if pad && (full - end) * 8 <= open.size {
        if let Some(rest) = out.at(end..full) {
            rest.fill(0);
        }
        end = full;
    }
    let len = end - start + TAG;
    if let Some(datagram) = out.next(len) {
        session.seal(datagram);
        out.push(open.uplink, open.to, len);
    }
    if let Some(path) = peer.paths.get_mut(usize::from(open.path))
        && path.used(now, 1)
    {
        *due = now;
    }
}
