//! From the other end to guest memory.

use std::io;
use std::sync::Arc;

use blanket_drivers::tap::HEADER_LEN;
use blanket_memory::{IoVec, iovec};
use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;

use super::{Direction, FrameQueue};

/// Longest tail of a frame that goes on beyond the guest's buffers: the
/// longest frame of all, and a little to notice one that is longer still.
const SPILL: usize = 65550 + HEADER_LEN + 64;

/// How receiving came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// There is no frame: wait for one.
    Empty,
    /// The driver has no buffer: wait for its notification.
    Starved,
    /// There may be more, but others have their turn.
    More,
    /// Somebody has deleted the TAP: there is nothing to wait for.
    Gone,
}

/// A frame that was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    /// Bytes in all, header included.
    pub(crate) len: usize,
    /// Bytes that the guest's buffers could take; what is longer is spilt.
    pub(crate) direct: usize,
}

/// Memory for the end of a frame that is longer than the buffers at hand.
pub(crate) struct Spill(Vec<u8>);

impl Spill {
    pub(crate) fn new() -> Self {
        Self(vec![0; SPILL + 1])
    }

    /// Reads a frame into `pieces` (at most `UIO_MAXIOV - 1` of them) and what
    /// is longer in here.
    ///
    /// # Safety
    /// The memory behind `pieces` is mapped and free to be written to.
    ///
    /// # Errors
    /// `WouldBlock`: there is no frame. Others: see [`read_failed`].
    pub(crate) unsafe fn read(
        &mut self,
        queue: &dyn FrameQueue,
        pieces: &mut Vec<IoVec>,
    ) -> io::Result<Frame> {
        let direct = IoVec::total(pieces);
        pieces.push(IoVec::new(self.0.as_mut_ptr(), self.0.len()));
        // SAFETY: the caller's promise; the last piece is this spill, which
        // nobody else refers to.
        let result = unsafe { queue.readv(pieces) };
        pieces.pop();
        let len = result?;
        if len < HEADER_LEN {
            return Err(io::Error::other("a frame without a header"));
        }
        Ok(Frame { len, direct })
    }

    /// Whether `frame` was longer than what could be kept of it.
    pub(crate) fn is_cut(frame: &Frame) -> bool {
        frame.len > frame.direct + SPILL
    }

    /// The end of `frame`, which is not cut.
    pub(crate) fn tail(&self, frame: &Frame) -> &[u8] {
        let len = frame.len.saturating_sub(frame.direct);
        self.0.get(..len).unwrap_or_default()
    }
}

/// Counts a failed read (but not that there was no frame) and says how
/// receiving ends with it.
pub(crate) fn read_failed(error: &io::Error, queue: u16, metrics: &Direction) -> Outcome {
    if error.kind() == io::ErrorKind::WouldBlock {
        return Outcome::Empty;
    }
    tracing::warn!(queue, %error, "a frame could not be received");
    metrics.refuse_one();
    match error.raw_os_error() {
        Some(libc::EBADFD | libc::EIO) => Outcome::Gone,
        _ => Outcome::Empty,
    }
}

/// Copies `bytes` to `offset` in `pieces`.
pub(crate) fn copy_at(pieces: &[IoVec], offset: usize, bytes: &[u8]) {
    let (mut skip, mut left) = (offset, bytes);
    for mut piece in pieces.iter().copied() {
        let here = skip.min(piece.len());
        piece.advance(here);
        skip -= here;
        let n = iovec::write_bytes(&[piece], left);
        left = &left[n..];
        if left.is_empty() {
            break;
        }
    }
}

/// Whether epoll looks at a queue: not while the driver has no buffers.
pub(crate) struct FrameWatch {
    queue: Arc<dyn FrameQueue>,
    token: u32,
    watching: bool,
}

impl FrameWatch {
    /// Does not watch yet; events will carry `token`.
    pub(crate) fn new(queue: &Arc<dyn FrameQueue>, token: u32) -> Self {
        Self {
            queue: Arc::clone(queue),
            token,
            watching: false,
        }
    }

    /// Forgets the event loop that was told, after its owner left it.
    pub(crate) fn forget(&mut self) {
        self.watching = false;
    }

    /// Watches or not, as `outcome` of receiving asks for.
    pub(crate) fn follow(&mut self, outcome: Outcome, ops: &mut EventOps) {
        let watch = matches!(outcome, Outcome::Empty | Outcome::More);
        if watch == self.watching {
            return;
        }
        self.watching = watch;
        let events = Events::with_data_raw(self.queue.event(), self.token, EventSet::IN);
        let changed = if watch {
            ops.add(events)
        } else {
            ops.remove(events)
        };
        if let Err(error) = changed {
            tracing::error!(?error, "a queue of frames cannot be watched");
        }
    }
}
