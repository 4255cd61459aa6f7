//! Ports: where frames come in and go out.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::api::types::Attachment;
use crate::drops::{Drops, Reason};
use crate::frame::Frame;
use vhost_user::VhostUser;

pub mod tap;
pub mod vhost_user;

/// Pairs of queues that a vhost-user front end may have.
const MAX_PAIRS: u16 = 16;

/// Bytes in front of an IP packet at most: the Ethernet header and two tags.
pub const ETHERNET: usize = 22;

/// Frames that are taken from a port before the next one's turn.
pub const BURST: usize = 32;

/// Why a port cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The TAP.
    #[error(transparent)]
    Tap(#[from] blanket_drivers::tap::Error),
    /// The socket.
    #[error("cannot listen on {}: {source}; name another socket, or end who has it", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Opens what is behind a port of a network with this MTU.
///
/// # Errors
///
/// It is not there, is somebody else's, or this process may not have it.
pub fn open(attachment: &Attachment, mtu: Option<u16>) -> Result<Box<dyn Port>, OpenError> {
    Ok(match attachment {
        Attachment::Tap(name) => Box::new(tap::TapPort::open(name, mtu)?),
        Attachment::VhostUser(path) => {
            let most = usize::from(mtu.unwrap_or(1500)) + ETHERNET;
            let port = VhostUser::listen(path, MAX_PAIRS, most);
            Box::new(port.map_err(|source| OpenError::Socket {
                path: path.clone(),
                source,
            })?)
        }
    })
}

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
    fn receive(&mut self, most: usize, each: &mut dyn FnMut(&mut Frame<'_>)) -> io::Result<usize>;

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

    /// What becomes readable when there is something to receive, or when the
    /// port has something else to do. Always the same descriptor: a port with
    /// several has an epoll of its own.
    fn waker(&self) -> BorrowedFd<'_>;

    /// Whether there is somebody at the other end whom frames can be sent to,
    /// as of the last time that the port had a turn.
    fn is_up(&self) -> bool {
        true
    }

    /// Whether to look for frames costs no system call, so that it pays to
    /// look for a while before it sleeps.
    fn polls_cheaply(&self) -> bool {
        false
    }

    /// Bytes of a frame at most that is not to be segmented, with its Ethernet
    /// header and tags: the MTU and [`ETHERNET`].
    fn max_frame(&self) -> usize;

    /// What the port itself has dropped of what came.
    fn drops(&self) -> &Drops;
}
