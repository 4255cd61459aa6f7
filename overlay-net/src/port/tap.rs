//! A TAP interface as a port: the node's own network, or whatever else the
//! kernel connects to it. Large frames come and go whole.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use blanket_drivers::tap::{self, HEADER_LEN, Offloads, Tap, TapQueue};
use blanket_memory::IoVec;
use vm_memory::VolatileSlice;

use super::{ETHERNET, Port};
use crate::drops::{Drops, Reason};
use crate::frame::{Frame, HEAD, Head, Offload};

/// Room for the largest frame with its header, and a byte more to notice one
/// that is too long.
const ROOM: usize = HEADER_LEN + 65_535 + ETHERNET + 1;

/// Pieces of a frame in one system call at most.
const PIECES: usize = 128;

/// See the module.
pub struct TapPort {
    tap: Tap,
    queue: Arc<TapQueue>,
    buffer: Box<[u8]>,
    drops: Drops,
}

impl TapPort {
    /// Attaches to the TAP `name`, or makes it, with all offloads that the
    /// kernel has. It goes away with the port if it was made here.
    ///
    /// # Errors
    ///
    /// See [`tap::Error`].
    pub fn open(name: &str, mtu: Option<u16>) -> Result<Self, tap::Error> {
        let tap = Tap::open(&tap::Spec {
            name: Some(name.to_owned()),
            mtu,
            queues: 1,
            ..tap::Spec::default()
        })?;
        // Fragmentation by IP is nobody's offload any more.
        let offloads = tap.offloads().0 & !libc::TUN_F_UFO;
        tap.set_offloads(Offloads(offloads))
            .map_err(|source| tap::Error::Io {
                name: name.to_owned(),
                what: "switch its offloads on",
                source,
            })?;
        let queue = tap.queues().first().map(Arc::clone);
        Ok(Self {
            queue: queue.ok_or(tap::Error::Queues(0))?,
            tap,
            buffer: vec![0; ROOM].into(),
            drops: Drops::default(),
        })
    }

    /// The interface.
    #[must_use]
    pub fn name(&self) -> &str {
        self.tap.name()
    }
}

impl Port for TapPort {
    fn receive(&mut self, most: usize, each: &mut dyn FnMut(&mut Frame<'_>)) -> io::Result<usize> {
        for count in 0..most {
            let len = match self.queue.read(&mut self.buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if len == self.buffer.len() {
                self.drops.add(Reason::TooBig);
                continue;
            }
            let Some((header, frame)) = self.buffer[..len].split_first_chunk_mut() else {
                self.drops.add(Reason::Malformed);
                continue;
            };
            let Ok(offload) = Offload::from_virtio(header, frame.len()) else {
                self.drops.add(Reason::Offload);
                continue;
            };
            let head = Head::of(frame);
            let rest = frame.get_mut(HEAD..).unwrap_or_default();
            let body = [VolatileSlice::from(rest)];
            each(&mut Frame {
                head,
                body: if body[0].is_empty() { &[] } else { &body },
                offload,
            });
        }
        Ok(most)
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), Reason> {
        let header = frame.offload.to_virtio();
        let head = frame.head.bytes();
        let piece = |bytes: &[u8]| IoVec::new(bytes.as_ptr().cast_mut(), bytes.len());
        let mut vectors = [const { IoVec::new(std::ptr::null_mut(), 0) }; PIECES];
        vectors[0] = piece(&header);
        vectors[1] = piece(head);
        let Some(body) = vectors.get_mut(2..2 + frame.body.len()) else {
            return Err(Reason::TooBig);
        };
        for (vector, part) in body.iter_mut().zip(frame.body) {
            *vector = IoVec::new(part.ptr_guard_mut().as_ptr(), part.len());
        }
        let count = 2 + frame.body.len();
        // SAFETY: header, head and body outlive the call, which only reads them.
        match unsafe { self.queue.writev(&vectors[..count]) } {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(Reason::Offload),
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Err(Reason::Down),
            Err(_) => Err(Reason::Full),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    fn waker(&self) -> BorrowedFd<'_> {
        // SAFETY: the queue keeps its descriptor open for as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.queue.as_raw_fd()) }
    }

    fn max_frame(&self) -> usize {
        usize::from(self.tap.mtu()) + ETHERNET
    }

    fn drops(&self) -> &Drops {
        &self.drops
    }
}
