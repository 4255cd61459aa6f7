//! The far end of a TAP: a packet socket (packet(7)) in a network namespace of
//! this process alone.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Moves the process to a network namespace of its own, where it is root. Call
/// it while there is one thread.
///
/// # Errors
/// The kernel does not permit it.
pub fn isolate() -> io::Result<()> {
    // SAFETY: unshare takes flags only; nobody shares what it takes apart.
    let unshare = |flags| unsafe { libc::unshare(flags) } == 0;
    if !unshare(libc::CLONE_NEWNET) && !unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) {
        return Err(io::Error::last_os_error());
    }
    // The kernel's own chatter would make runs differ. It may not be there.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    Ok(())
}

/// Sends to and receives from one interface.
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// A socket for all frames of the interface `name`.
    ///
    /// # Errors
    /// There is none, or the process may not.
    pub fn open(name: &str) -> io::Result<Self> {
        // ETH_P_ALL in wire order.
        let all = (libc::ETH_P_ALL as u16).to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes integers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(all)) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made the descriptor: nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let index = interface_index(name)?;
        // SAFETY: all zeros are a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = index;
        let len = std::mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` has `len` bytes and outlives the call.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(fd))
    }

    /// Sends a frame; the kernel may refuse a bad one.
    pub fn send(&self, frame: &[u8]) {
        let fd = self.0.as_raw_fd();
        // SAFETY: `frame` outlives the call.
        unsafe { libc::send(fd, frame.as_ptr().cast(), frame.len(), 0) };
    }

    /// The next frame that came from the device, if one is there.
    #[must_use]
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0u8; 0x1_0100];
        let fd = self.0.as_raw_fd();
        // SAFETY: `frame` has that many bytes and outlives the call.
        let n = unsafe { libc::recv(fd, frame.as_mut_ptr().cast(), frame.len(), 0) };
        frame.truncate(usize::try_from(n).ok()?);
        Some(frame)
    }

    /// Forgets all frames that are there.
    pub fn drain(&self) {
        while self.receive().is_some() {}
    }
}

fn interface_index(name: &str) -> io::Result<i32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: `name` is a string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => i32::try_from(index).map_err(io::Error::other),
    }
}
