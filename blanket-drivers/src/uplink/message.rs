//! Batches of messages for `sendmmsg` and `recvmmsg`, on the stack.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Messages of one system call at most.
pub(super) const BATCH: usize = 32;

/// Bytes for one control message with an integer: a header of 16 bytes, and 8.
const CONTROL: usize = 24;
/// Room for control messages that come in, also ones nobody asked for.
const CONTROL_IN: usize = 64;

/// Pieces of a message: virtio header, headers, payload.
pub(super) const PIECES: usize = 3;

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control<const N: usize>([u8; N]);

/// Messages to send. What they point to lies beside them, or is borrowed.
pub(super) struct Outgoing<'a> {
    pieces: [[libc::iovec; PIECES]; BATCH],
    names: [libc::sockaddr_in6; BATCH],
    controls: [Control<CONTROL>; BATCH],
    /// Length of the name, number of pieces, whether there is a control.
    shapes: [(libc::socklen_t, usize, bool); BATCH],
    len: usize,
    borrowed: std::marker::PhantomData<&'a [u8]>,
}

impl<'a> Outgoing<'a> {
    pub(super) fn new() -> Self {
        // SAFETY: zeros are valid for all of these: pointers, integers, and a
        // bool that is false.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }

    pub(super) fn is_full(&self) -> bool {
        self.len == BATCH
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a message; there must be room.
    pub(super) fn push(
        &mut self,
        to: Option<SocketAddr>,
        pieces: &[&'a [u8]],
        segment: Option<u16>,
    ) {
        let index = self.len;
        let count = pieces.len().min(PIECES);
        for (vector, piece) in self.pieces[index].iter_mut().zip(pieces) {
            *vector = libc::iovec {
                iov_base: piece.as_ptr().cast_mut().cast(),
                iov_len: piece.len(),
            };
        }
        let name_len = to.map_or(0, |to| write_name(&mut self.names[index], to));
        if let Some(segment) = segment {
            self.controls[index] = udp_segment(segment);
        }
        self.shapes[index] = (name_len, count, segment.is_some());
        self.len += 1;
    }

    /// Sends them in one call; returns how many the kernel took.
    pub(super) fn send(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: zeros are a valid mmsghdr: pointers and integers.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        for (index, header) in headers.iter_mut().enumerate().take(self.len) {
            let (name_len, pieces, control) = self.shapes[index];
            let header = &mut header.msg_hdr;
            if name_len > 0 {
                header.msg_name = (&raw mut self.names[index]).cast();
                header.msg_namelen = name_len;
            }
            header.msg_iov = self.pieces[index].as_mut_ptr();
            header.msg_iovlen = pieces;
            if control {
                header.msg_control = self.controls[index].0.as_mut_ptr().cast();
                header.msg_controllen = CONTROL;
            }
        }
        // SAFETY: the first `len` headers point to names, pieces and controls
        // that live as long as `self`; the pieces' bytes are borrowed for 'a
        // and only read.
        let sent = unsafe {
            libc::sendmmsg(
                fd.as_raw_fd(),
                headers.as_mut_ptr(),
                self.len as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// A control message that has a train cut up (udp(7), `UDP_SEGMENT`).
fn udp_segment(segment: u16) -> Control<CONTROL> {
    let mut bytes = [0; CONTROL];
    // cmsg_len is the header and the two bytes behind it.
    bytes[..8].copy_from_slice(&18usize.to_ne_bytes());
    bytes[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
    bytes[12..16].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
    bytes[16..18].copy_from_slice(&segment.to_ne_bytes());
    Control(bytes)
}

/// Writes an address as the kernel wants it; returns its length. An IPv4
/// address takes the first half of the room.
fn write_name(name: &mut libc::sockaddr_in6, address: SocketAddr) -> libc::socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            let short = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_in is shorter than a sockaddr_in6 and not
            // more strictly aligned; both are plain integers.
            unsafe { (&raw mut *name).cast::<libc::sockaddr_in>().write(short) };
            size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(v6) => {
            *name = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

/// An address that the kernel wrote.
fn read_name(name: &libc::sockaddr_in6) -> Option<SocketAddr> {
    match libc::c_int::from(name.sin6_family) {
        libc::AF_INET => {
            // SAFETY: as in `write_name`; the family says that it is one.
            let short = unsafe { (&raw const *name).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(short.sin_addr.s_addr.to_ne_bytes());
            Some((ip, u16::from_be(short.sin_port)).into())
        }
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            Some((ip, u16::from_be(name.sin6_port)).into())
        }
        _ => None,
    }
}

/// A message that has come.
pub(super) struct Incoming<'c> {
    /// Bytes in its buffer.
    pub(super) len: usize,
    /// Whether there were more.
    pub(super) truncated: bool,
    /// Who sent it.
    pub(super) from: Option<SocketAddr>,
    /// Its control messages.
    pub(super) control: &'c [u8],
}

/// Receives up to [`BATCH`] messages into `buffers`, and calls `each` with its
/// place for every one.
pub(super) fn receive<'b>(
    fd: BorrowedFd<'_>,
    buffers: impl Iterator<Item = &'b mut [u8]>,
    mut each: impl FnMut(usize, Incoming<'_>),
) -> io::Result<usize> {
    // SAFETY: zeros are valid for all of these: pointers and integers.
    let (mut headers, mut names, mut pieces): (
        [libc::mmsghdr; BATCH],
        [libc::sockaddr_in6; BATCH],
        [libc::iovec; BATCH],
    ) = unsafe { std::mem::zeroed() };
    let mut controls = [Control([0u8; CONTROL_IN]); BATCH];
    let mut count = 0;
    for (index, buffer) in buffers.take(BATCH).enumerate() {
        pieces[index] = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let header = &mut headers[index].msg_hdr;
        header.msg_name = (&raw mut names[index]).cast();
        header.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
        header.msg_iov = &raw mut pieces[index];
        header.msg_iovlen = 1;
        header.msg_control = controls[index].0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL_IN;
        count += 1;
    }
    // SAFETY: `count` headers point to names, controls and vectors on this
    // frame, and to buffers that are borrowed for longer than the call.
    let got = unsafe {
        libc::recvmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
        )
    };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    for (index, header) in headers.iter().enumerate().take(got) {
        let control_len = header.msg_hdr.msg_controllen.min(CONTROL_IN);
        let incoming = Incoming {
            len: header.msg_len as usize,
            truncated: header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
            from: read_name(&names[index]),
            control: &controls[index].0[..control_len],
        };
        each(index, incoming);
    }
    Ok(got)
}

/// Binds a socket of the address's family.
pub(super) fn bind(fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
    // SAFETY: zeros are a valid address of no family.
    let mut name: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    let len = write_name(&mut name, address);
    // SAFETY: `name` has `len` bytes and outlives the call.
    super::check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const name).cast(), len) }).map(drop)
}
