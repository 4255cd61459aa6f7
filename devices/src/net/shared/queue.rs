//! A pair of rings in shared memory as a queue of frames.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blanket_drivers::tap::HEADER_LEN;
use blanket_memory::{GuestRam, IoVec, iovec};
use virtio_bindings::virtio_net as net;
use vmm_sys_util::eventfd::EventFd;

use super::super::checksum;
use super::super::frames::FrameQueue;
use super::ring::{BUFFER, BYTES, Broken, Ring, SIZE};
use crate::vhost_user::{self, Handle};

/// Bytes of memory for one queue.
pub(super) const QUEUE_BYTES: u64 = 2 * BYTES;
/// Buffers of the longest frame: 64 KiB with its headers.
const LONGEST: u16 = 17;
/// Where the header has `num_buffers` (virtio 1.2, 5.1.6).
const NUM_BUFFERS: usize = 10;

/// As the kernel says it of a TAP.
fn would_block() -> io::Error {
    io::Error::from_raw_os_error(libc::EAGAIN)
}

/// The rings of one backend.
pub(super) struct Rings {
    rx: Rx,
    tx: Tx,
}

/// Buffers that the backend fills, all of them lent.
struct Rx {
    ring: Ring,
    pieces: Vec<IoVec>,
    taken: Vec<u16>,
}

/// Buffers that the backend empties.
struct Tx {
    ring: Ring,
    /// Buffers at hand. The last ones are taken first: the processor's caches
    /// know them.
    free: Vec<u16>,
    /// By head, the buffers of a chain that was lent.
    chains: Vec<Vec<u16>>,
    pieces: Vec<IoVec>,
    /// The backend's features in use.
    features: u64,
}

/// A queue whose frames go through memory shared with a backend, if there is
/// one. One copy in each direction, and no system call but to tell.
pub(super) struct SharedQueue {
    rx: Mutex<Option<Rx>>,
    tx: Mutex<Option<Tx>>,
    /// Frames that came before the backend was stopped.
    waiting: Mutex<VecDeque<Vec<u8>>>,
    /// Kicks and calls of both rings, receive first.
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    handle: Handle,
}

impl SharedQueue {
    pub(super) fn new(handle: Handle) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            rx: Mutex::default(),
            tx: Mutex::default(),
            waiting: Mutex::default(),
            kicks: [event()?, event()?],
            calls: [event()?, event()?],
            handle,
        })
    }

    fn rx(&self) -> MutexGuard<'_, Option<Rx>> {
        self.rx.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tx(&self) -> MutexGuard<'_, Option<Tx>> {
        self.tx.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queued(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames that came before the backend was stopped.
    pub(super) fn waiting(&self) -> Vec<Vec<u8>> {
        self.queued().iter().cloned().collect()
    }

    /// Frames to be received before all others, and no others like these.
    pub(super) fn put(&self, frames: Vec<Vec<u8>>) {
        let wake = !frames.is_empty();
        *self.queued() = frames.into();
        if wake && let Err(error) = self.calls[0].write(1) {
            tracing::error!(%error, "frames wait that nobody is told of");
        }
    }

    /// Whether the backend has taken all that it was sent; also if there is
    /// none.
    pub(super) fn is_sent(&self) -> bool {
        let mut tx = self.tx();
        // One that breaks the rules is found out when something is sent.
        tx.as_mut()
            .is_none_or(|tx| tx.reclaim().is_err() || tx.free.len() == usize::from(SIZE))
    }

    /// Keeps what the backend, which is stopped, has sent: it has forgotten it.
    pub(super) fn keep(&self) {
        let mut rx = self.rx();
        let Some(rings) = &mut *rx else {
            return;
        };
        let mut bytes = vec![0; HEADER_LEN + 65_536 + 64];
        loop {
            let whole = [IoVec::new(bytes.as_mut_ptr(), bytes.len())];
            match rings.receive(&whole) {
                Ok(Some((len, _))) => {
                    let frame = bytes.get(..len).unwrap_or(&bytes).to_vec();
                    self.queued().push_back(frame);
                }
                Ok(None) => break,
                Err(reason) => {
                    tracing::warn!(%reason, "the vhost-user backend broke a ring");
                    break;
                }
            }
        }
        *rx = None;
    }

    /// Goes on with the rings of another backend, or without one.
    pub(super) fn replace(&self, rings: Option<Rings>) {
        let (rx, tx) = rings.map_or((None, None), |rings| (Some(rings.rx), Some(rings.tx)));
        *self.rx() = rx;
        *self.tx() = tx;
    }

    /// What a backend is told of `rings`.
    pub(super) fn describe(
        &self,
        rings: &Rings,
        enabled: bool,
    ) -> io::Result<[vhost_user::Ring; 2]> {
        let describe = |ring: &Ring, index: usize| {
            let [descriptors, available, used] = ring.places();
            Ok::<_, io::Error>(vhost_user::Ring {
                size: SIZE,
                base: 0,
                descriptors,
                available,
                used,
                kick: self.kicks[index].try_clone()?,
                call: self.calls[index].try_clone()?,
                enabled,
            })
        };
        Ok([describe(&rings.rx.ring, 0)?, describe(&rings.tx.ring, 1)?])
    }

    fn kick(&self, ring: usize, wanted: bool) {
        if wanted && let Err(error) = self.kicks[ring].write(1) {
            tracing::error!(%error, "a vhost-user backend cannot be told of buffers");
        }
    }

    /// Leaves a backend alone that breaks the rules.
    fn give_up(&self, reason: &Broken) {
        tracing::warn!(%reason, "the vhost-user backend broke a ring");
        self.handle.give_up();
    }
}

impl Rings {
    /// Rings at `base` in memory of [`QUEUE_BYTES`] that is all zeros, for a
    /// backend with these features.
    pub(super) fn new(ram: &GuestRam, base: u64, features: u64) -> io::Result<Self> {
        Self::build(ram, base, features).map_err(io::Error::other)
    }

    fn build(ram: &GuestRam, base: u64, features: u64) -> Result<Self, Broken> {
        let mut rx = Ring::new(ram, base)?;
        for index in 0..SIZE {
            rx.lend(&[index], BUFFER, true)?;
        }
        rx.publish()?;
        let tx = Ring::new(ram, base + BYTES)?;
        tx.want_calls(false)?;
        Ok(Self {
            rx: Rx {
                ring: rx,
                pieces: Vec::new(),
                taken: Vec::new(),
            },
            tx: Tx {
                ring: tx,
                free: (0..SIZE).rev().collect(),
                chains: vec![Vec::new(); SIZE.into()],
                pieces: Vec::new(),
                features,
            },
        })
    }
}

impl Rx {
    /// Copies the next frame, if there is one; returns its length, and whether
    /// the backend wants to be told that its buffers are back.
    fn receive(&mut self, vectors: &[IoVec]) -> Result<Option<(usize, bool)>, Broken> {
        let used = self.ring.used()?;
        if used == 0 {
            return Ok(None);
        }
        self.pieces.clear();
        self.taken.clear();
        self.take()?;
        let mut count = [0; 2];
        let mut header = self.pieces.clone();
        iovec::advance(&mut header, NUM_BUFFERS);
        // It is there: `take` saw to it.
        let _ = iovec::read_bytes(&header, &mut count);
        let count = u16::from_le_bytes(count);
        if !(1..=LONGEST).contains(&count) || count > used {
            return Err(Broken::Count(count));
        }
        for _ in 1..count {
            self.take()?;
        }
        let len = iovec::copy(&self.pieces, vectors);
        for index in std::mem::take(&mut self.taken) {
            self.ring.lend(&[index], BUFFER, true)?;
        }
        Ok(Some((len, self.ring.publish()?)))
    }

    /// Takes a buffer of the frame back.
    fn take(&mut self) -> Result<(), Broken> {
        let (index, _, len) = self.ring.take_back()?;
        let least = if self.pieces.is_empty() {
            HEADER_LEN
        } else {
            0
        };
        if !(least..=BUFFER).contains(&(len as usize)) {
            return Err(Broken::Length(len));
        }
        self.pieces.push(self.ring.buffer(index, len as usize));
        self.taken.push(index);
        Ok(())
    }
}

impl Tx {
    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Whether the backend does what a frame's header asks for. A guest can ask
    /// for what it was not offered.
    fn accepts(&self, frame: &[IoVec]) -> bool {
        let mut header = [0; HEADER_LEN];
        let len = iovec::read_bytes(frame, &mut header);
        len == HEADER_LEN
            && match u32::from(header[1]) {
                net::VIRTIO_NET_HDR_GSO_NONE => true,
                net::VIRTIO_NET_HDR_GSO_TCPV4 => self.has(net::VIRTIO_NET_F_HOST_TSO4),
                net::VIRTIO_NET_HDR_GSO_TCPV6 => self.has(net::VIRTIO_NET_F_HOST_TSO6),
                _ => false,
            }
    }

    /// Takes the buffers back that the backend has emptied.
    fn reclaim(&mut self) -> Result<(), Broken> {
        for _ in 0..self.ring.used()? {
            let (head, _, _) = self.ring.take_back()?;
            if let Some(chain) = self.chains.get_mut(usize::from(head)) {
                self.free.append(chain);
            }
        }
        Ok(())
    }

    /// Copies a frame; `None` if there is no room for it. Else whether the
    /// backend wants to be told.
    fn send(&mut self, vectors: &[IoVec]) -> Result<Option<bool>, Broken> {
        self.reclaim()?;
        let len = IoVec::total(vectors);
        let Some(rest) = self.free.len().checked_sub(len.div_ceil(BUFFER)) else {
            return Ok(None);
        };
        let chain = self.free.split_off(rest);
        let mut left = len;
        self.pieces.clear();
        for index in &chain {
            self.pieces.push(self.ring.buffer(*index, left));
            left = left.saturating_sub(BUFFER);
        }
        iovec::copy(vectors, &self.pieces);
        if !self.has(net::VIRTIO_NET_F_CSUM) {
            self.complete_checksum();
        }
        self.ring.lend(&chain, len, false)?;
        if let Some(slot) = chain
            .first()
            .and_then(|head| self.chains.get_mut(usize::from(*head)))
        {
            *slot = chain;
        }
        self.ring.publish().map(Some)
    }

    /// Completes the checksum of the frame in `pieces`, if it is blank.
    fn complete_checksum(&mut self) {
        let mut header = [0; HEADER_LEN];
        let _ = iovec::read_bytes(&self.pieces, &mut header);
        let blank = net::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        let [flags, _, _, _, _, _, s0, s1, o0, o1, ..] = header;
        if flags & blank == 0 {
            return;
        }
        iovec::write_bytes(&self.pieces, &[flags & !blank]);
        iovec::advance(&mut self.pieces, HEADER_LEN);
        let (start, offset) = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([o0, o1]));
        checksum::complete(&self.pieces, start.into(), offset.into());
    }
}

impl FrameQueue for SharedQueue {
    unsafe fn readv(&self, vectors: &[IoVec]) -> io::Result<usize> {
        if let Some(frame) = self.queued().pop_front() {
            return Ok(iovec::write_bytes(vectors, &frame));
        }
        let mut rx = self.rx();
        let mut quiet = false;
        loop {
            let Some(rings) = &mut *rx else {
                // Of a backend that has gone.
                let _ = self.calls[0].read();
                return Err(would_block());
            };
            let received = rings.receive(vectors).and_then(|received| {
                rings.ring.want_calls(received.is_none())?;
                Ok(received)
            });
            match received {
                Ok(Some((len, kick))) => {
                    self.kick(0, kick);
                    return Ok(len);
                }
                // What came before calls were wanted is not called.
                Ok(None) if !quiet => {
                    let _ = self.calls[0].read();
                    quiet = true;
                }
                Ok(None) => return Err(would_block()),
                Err(reason) => {
                    self.give_up(&reason);
                    *rx = None;
                }
            }
        }
    }

    unsafe fn writev(&self, vectors: &[IoVec]) -> io::Result<usize> {
        let mut tx = self.tx();
        let Some(rings) = &mut *tx else {
            return Err(would_block());
        };
        if !rings.accepts(vectors) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match rings.send(vectors) {
            Ok(Some(kick)) => {
                self.kick(1, kick);
                Ok(IoVec::total(vectors))
            }
            Ok(None) => Err(would_block()),
            Err(reason) => {
                self.give_up(&reason);
                *tx = None;
                Err(would_block())
            }
        }
    }

    fn event(&self) -> RawFd {
        self.calls[0].as_raw_fd()
    }
}
