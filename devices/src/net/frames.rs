//! Where frames go and come from.

use std::io;
use std::os::fd::RawFd;

use blanket_drivers::tap::TapQueue;
use blanket_memory::IoVec;

/// A queue of frames, each with a virtio header of
/// [`HEADER_LEN`](blanket_drivers::tap::HEADER_LEN) bytes in front. Nothing
/// here waits.
pub(crate) trait FrameQueue: Send + Sync {
    /// Receives one frame. A frame that is longer than the vectors is cut off:
    /// offer a little more than is wanted to notice.
    ///
    /// # Safety
    /// The memory behind `vectors` is mapped and free to be written to.
    ///
    /// # Errors
    /// `WouldBlock`: there is no frame, and [`FrameQueue::event`] will be
    /// readable when there is one.
    unsafe fn readv(&self, vectors: &[IoVec]) -> io::Result<usize>;

    /// Sends one frame.
    ///
    /// # Safety
    /// The memory behind `vectors` is mapped.
    ///
    /// # Errors
    /// `WouldBlock`: there is no room for it. Others: it is malformed.
    unsafe fn writev(&self, vectors: &[IoVec]) -> io::Result<usize>;

    /// Readable when there is a frame.
    fn event(&self) -> RawFd;
}

impl FrameQueue for TapQueue {
    unsafe fn readv(&self, vectors: &[IoVec]) -> io::Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { TapQueue::readv(self, vectors) }
    }

    unsafe fn writev(&self, vectors: &[IoVec]) -> io::Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { TapQueue::writev(self, vectors) }
    }

    fn event(&self) -> RawFd {
        TapQueue::event(self)
    }
}
