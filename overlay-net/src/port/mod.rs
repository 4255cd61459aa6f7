//! Ports: where frames come in and go out.

pub mod vhost_user;

use std::io;
use std::os::fd::BorrowedFd;

use crate::drops::Reason;
use crate::frame::Frame;

/// Frames that are taken from a port before the next one's turn.
pub const BURST: usize = 32;

/// A port's data path. One worker owns it: nothing in it is shared.
pub trait Port: Send {
    /// Takes frames that have come, `most` at most, and hands each to `each`;
    /// how many there were. Their bodies are only there during the call: they
    /// may lie in a guest's memory, which gets them back afterwards. What is
    /// malformed beyond being a frame is dropped and counted by the port.
    ///
    /// # Errors
    ///
    /// The port is of no use any more; what to do is in the message.
    fn receive(&mut self, most: usize, each: &mut dyn FnMut(Frame<'_>)) -> io::Result<usize>;

    /// Copies a frame out. The other side need not see it before
    /// [`Port::flush`].
    ///
    /// # Errors
    ///
    /// Why it was dropped, to be counted by the caller.
    fn send(&mut self, frame: &Frame<'_>) -> Result<(), Reason>;

    /// Lets the other side know of what was sent, once for a burst.
    ///
    /// # Errors
    ///
    /// As [`Port::receive`].
    fn flush(&mut self) -> io::Result<()>;

    /// Asks the other side for a notification when there is something to
    /// receive, before the worker sleeps. False: there is already, do not.
    ///
    /// # Errors
    ///
    /// As [`Port::receive`].
    fn arm(&mut self) -> io::Result<bool>;

    /// Notifications are not needed any more: the worker polls.
    fn disarm(&mut self) {}

    /// What becomes readable when there is something to receive.
    fn wakers(&self) -> Vec<BorrowedFd<'_>>;

    /// Bytes of a frame at most that is not to be segmented, with its Ethernet
    /// header and tags: the MTU and 22.
    fn max_frame(&self) -> usize;
}
