//! Datagrams to send, as trains.

use std::net::SocketAddr;
use std::ops::Range;

use blanket_drivers::uplink::{MAX_SEGMENTS, MAX_TRAIN, TxPacket};

use super::PeerId;
use super::wire::{HEADER, MAX_CHUNKS, OVERHEAD};

/// Room that a frame of any length has in a train's buffer that was emptied.
const LEAST: usize = super::wire::MAX_FRAME + (MAX_CHUNKS + 2) * (OVERHEAD + 1) + MAX_TRAIN;

/// Datagrams of one size, but for the last, to one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Train {
    /// Which uplink.
    pub uplink: u8,
    /// Where to.
    pub to: SocketAddr,
    /// Where its bytes are.
    pub bytes: Range<usize>,
    /// Bytes of each datagram but the last.
    pub segment: usize,
}

/// A datagram that still takes small frames.
pub(super) struct Open {
    pub(super) peer: PeerId,
    pub(super) path: u8,
    pub(super) uplink: u8,
    pub(super) to: SocketAddr,
    /// Where its records end; they begin after its header.
    pub(super) end: usize,
    /// Its bytes at most, with header and tag.
    pub(super) size: usize,
}

/// What [`Tunnels`](super::Tunnels) has sealed: a worker has one, empties it
/// to its uplinks after each burst, and uses it again.
pub struct TrainBuffer {
    bytes: Box<[u8]>,
    used: usize,
    trains: Vec<Train>,
    /// Nothing may be added to the last train.
    closed: bool,
    pub(super) open: Option<Open>,
}

impl Default for TrainBuffer {
    fn default() -> Self {
        Self::new(4 * MAX_TRAIN)
    }
}

impl TrainBuffer {
    /// Room for `bytes` (more if a frame of any length needs that).
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self {
            bytes: vec![0; bytes.max(LEAST)].into_boxed_slice(),
            used: 0,
            trains: Vec::with_capacity(256),
            closed: false,
            open: None,
        }
    }

    /// Whether a frame of any length may not fit any more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.room() < LEAST - MAX_TRAIN || self.trains.len() >= 240
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.trains.is_empty() && self.open.is_none()
    }

    /// What is to be sent. [`Tunnels::finish`](super::Tunnels::finish) comes
    /// first.
    pub fn packets(&self) -> impl Iterator<Item = (u8, TxPacket<'_>)> {
        self.trains.iter().map(|train| {
            let bytes = &self.bytes[train.bytes.clone()];
            (
                train.uplink,
                TxPacket::train(train.to, bytes, train.segment),
            )
        })
    }

    /// All was sent.
    pub fn clear(&mut self) {
        self.used = 0;
        self.trains.clear();
        self.open = None;
    }

    pub(super) fn room(&self) -> usize {
        let taken = self.open.as_ref().map_or(0, |open| open.size);
        self.bytes.len() - self.used - taken
    }

    /// The next `len` bytes, and where they begin.
    pub(super) fn next(&mut self, len: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(self.used..self.used.checked_add(len)?)
    }

    /// Where the next datagram begins.
    pub(super) fn start(&self) -> usize {
        self.used
    }

    /// Bytes of the open datagram.
    pub(super) fn at(&mut self, range: Range<usize>) -> Option<&mut [u8]> {
        self.bytes.get_mut(range)
    }

    /// The next `len` bytes are a datagram: part of the last train if it
    /// can be.
    pub(super) fn push(&mut self, uplink: u8, to: SocketAddr, len: usize) {
        let start = self.used;
        self.used += len;
        let closed = std::mem::take(&mut self.closed);
        push(&mut self.trains, closed, (uplink, to), start, len);
    }

    /// The same, but it is in a train of its own: it may be too large, and
    /// then all of a train is lost.
    pub(super) fn push_alone(&mut self, uplink: u8, to: SocketAddr, len: usize) {
        self.closed = true;
        self.push(uplink, to, len);
        self.closed = true;
    }

    /// Begins a datagram for small frames; false: there is no room.
    pub(super) fn begin(
        &mut self,
        peer: PeerId,
        path: u8,
        (uplink, to): (u8, SocketAddr),
        size: usize,
    ) -> bool {
        if self.open.is_some() || self.room() < size {
            return false;
        }
        self.open = Some(Open {
            peer,
            path,
            uplink,
            to,
            end: self.used + HEADER,
            size,
        });
        true
    }
}

/// Adds a datagram to the last of `trains`, or begins one.
pub(super) fn push(
    trains: &mut Vec<Train>,
    closed: bool,
    (uplink, to): (u8, SocketAddr),
    start: usize,
    len: usize,
) {
    let last = trains.last_mut().filter(|train| {
        let bytes = train.bytes.len();
        !closed
            && train.uplink == uplink
            && train.to == to
            && train.bytes.end == start
            && bytes.is_multiple_of(train.segment)
            && len <= train.segment
            && bytes / train.segment < MAX_SEGMENTS
            && bytes + len <= MAX_TRAIN
    });
    match last {
        Some(train) => train.bytes.end = start + len,
        None => trains.push(Train {
            uplink,
            to,
            bytes: start..start + len,
            segment: len,
        }),
    }
}
