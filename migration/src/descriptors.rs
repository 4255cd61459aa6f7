//! Handing descriptors over with a Unix socket.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Descriptors in one message; the kernel takes 253.
const MOST: usize = 128;
/// Descriptors that a guest's devices may have in all.
pub(crate) const MOST_IN_ALL: u32 = 4096;

/// Sends them.
///
/// # Errors
/// The socket fails.
pub(crate) fn send(stream: &UnixStream, descriptors: &[RawFd]) -> io::Result<()> {
    for some in descriptors.chunks(MOST) {
        let byte = [some.len() as u8];
        stream.send_with_fds(&[&byte[..]], some)?;
    }
    Ok(())
}

/// Receives `count` of them.
///
/// # Errors
/// The socket fails, or fewer come.
pub(crate) fn receive(stream: &UnixStream, count: u32) -> io::Result<Vec<OwnedFd>> {
    let count = count.min(MOST_IN_ALL) as usize;
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        let mut fds = [-1; MOST];
        let mut byte = [0u8; 1];
        let mut pieces = [libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: byte.len(),
        }];
        // SAFETY: the one piece is a byte of ours, where anything may be written.
        let (bytes, n) = unsafe { stream.recv_with_fds(&mut pieces, &mut fds) }?;
        if bytes == 0 || n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for fd in fds.into_iter().take(n) {
            // SAFETY: the kernel has just made it for us alone.
            all.push(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Ok(all)
}
