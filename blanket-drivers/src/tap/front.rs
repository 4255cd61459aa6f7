//! Frames that come before a tap's own: those that have waited for a guest
//! where it was before, while it moved.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use blanket_memory::{IoVec, iovec};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Most bytes that wait.
const MOST: usize = 16 << 20;

/// What is in front of one queue; nothing, as a rule.
#[derive(Debug, Default)]
pub(super) struct Front {
    /// Readers have to look here first.
    on: AtomicBool,
    waiting: Mutex<Waiting>,
    signal: OnceLock<Signal>,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// There will be no more: the tap's own are next.
    over: bool,
}

/// Readable when there is a frame, here or in the tap.
#[derive(Debug)]
struct Signal {
    both: Epoll,
    here: EventFd,
}

impl Front {
    /// Lets none of the tap's frames through until [`Front::release`].
    pub(super) fn hold(&self) -> io::Result<()> {
        let signal = Signal {
            both: Epoll::new()?,
            here: EventFd::new(EFD_NONBLOCK)?,
        };
        signal.watch(signal.here.as_raw_fd())?;
        let _ = self.signal.set(signal);
        *self.waiting() = Waiting::default();
        self.on.store(true, Ordering::Release);
        Ok(())
    }

    /// Adds a frame, if it is not one too many.
    pub(super) fn put(&self, frame: &[u8]) -> bool {
        let mut waiting = self.waiting();
        let (true, Some(signal)) = (self.is_on(), self.signal.get()) else {
            return false;
        };
        if waiting.over || waiting.bytes + frame.len() > MOST {
            return false;
        }
        waiting.bytes += frame.len();
        waiting.frames.push_back(frame.to_vec());
        signal.here.write(1).is_ok()
    }

    /// Lets the frames of `tap` through, behind those that are here.
    pub(super) fn release(&self, tap: RawFd) -> io::Result<()> {
        let mut waiting = self.waiting();
        match self.signal.get() {
            Some(signal) if self.is_on() && !waiting.over => {
                waiting.over = true;
                signal.watch(tap)
            }
            _ => Ok(()),
        }
    }

    /// Whether it was ever used.
    fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// What to wait for, if not for the tap alone.
    pub(super) fn event(&self) -> Option<RawFd> {
        self.signal.get().map(|signal| signal.both.as_raw_fd())
    }

    /// The next frame; nothing if it is the tap's turn.
    ///
    /// # Safety
    /// The memory behind `vectors` is mapped and free to be written to.
    pub(super) unsafe fn readv(&self, vectors: &[IoVec]) -> Option<io::Result<usize>> {
        if !self.is_on() {
            return None;
        }
        let mut waiting = self.waiting();
        let Some(frame) = waiting.frames.pop_front() else {
            if waiting.over {
                self.on.store(false, Ordering::Release);
                return None;
            }
            return Some(Err(io::ErrorKind::WouldBlock.into()));
        };
        waiting.bytes -= frame.len();
        if waiting.frames.is_empty()
            && let Some(signal) = self.signal.get()
        {
            let _ = signal.here.read();
        }
        Some(Ok(iovec::write_bytes(vectors, &frame)))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Signal {
    fn watch(&self, fd: RawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, 0);
        self.both.ctl(ControlOperation::Add, fd, event)
    }
}
