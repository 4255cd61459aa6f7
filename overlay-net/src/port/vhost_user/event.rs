//! Notifications to and from a front end: eventfds that it has made.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use rustix::fs::OFlags;

/// An eventfd of a front end's.
///
/// # Errors
///
/// It is something else, at which the switch might have to wait.
pub(super) fn of(file: File) -> io::Result<OwnedFd> {
    let fd = OwnedFd::from(file);
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return Err(io::Error::other("not an eventfd"));
    }
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
}

/// By which a front end tells of available buffers.
#[derive(Debug)]
pub(super) struct Kick {
    fd: OwnedFd,
    /// What wakes the worker, if this does.
    poll: Option<Arc<OwnedFd>>,
}

impl Kick {
    /// Wakes who waits for `poll`, too, if there is one.
    pub(super) fn new(fd: OwnedFd, poll: Option<&Arc<OwnedFd>>) -> io::Result<Self> {
        if let Some(poll) = poll {
            let data = epoll::EventData::new_u64(0);
            epoll::add(poll, &fd, data, epoll::EventFlags::IN)?;
        }
        let poll = poll.cloned();
        Ok(Self { fd, poll })
    }

    /// Takes what was told.
    pub(super) fn drain(&self) {
        take(&self.fd);
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // It is open elsewhere, too, and would go on to wake the worker.
        if let Some(poll) = &self.poll {
            let _ = epoll::delete(poll, &self.fd);
        }
    }
}

/// Tells whoever waits for the event. A counter that is full has told it.
pub(super) fn tell(event: impl AsFd) {
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// Takes what was told.
pub(super) fn take(event: &OwnedFd) {
    let mut count = [0_u8; 8];
    let to = libc::iovec {
        iov_base: count.as_mut_ptr().cast(),
        iov_len: count.len(),
    };
    // Whoever shares the event could make it wait again: so not by its flags.
    // SAFETY: the vector is the eight bytes.
    let read = unsafe { libc::preadv2(event.as_raw_fd(), &raw const to, 1, -1, libc::RWF_NOWAIT) };
    if read < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
        let _ = rustix::io::read(event, &mut count);
    }
}
