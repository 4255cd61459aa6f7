//! Uplinks: how a node's datagrams reach other nodes.
//!
//! An [`Uplink`] carries UDP payloads between nodes in batches, whichever way
//! is the fastest on this machine:
//!
//! | kind | out | in |
//! |---|---|---|
//! | [`Kind::Udp`] | `sendmmsg`, `UDP_SEGMENT` | `recvmmsg`, `UDP_GRO` |
//! | [`Kind::AfPacket`] | `sendmmsg` of frames with a virtio header (UDP segmentation offload) | `TPACKET_V3` ring |
//! | [`Kind::AfXdp`] | `AF_XDP` ring | `AF_XDP` ring, fed by an XDP program |
//! | [`Kind::Tap`] | a TAP of this node, for nested set-ups | the same |
//!
//! All but the first build and take apart the Ethernet, IP and UDP headers
//! themselves, find the next hop in the kernel's routing and neighbour tables,
//! and hold a UDP socket on their port: it keeps the kernel from answering
//! "port unreachable", and it carries what the fast way cannot (a neighbour
//! that the kernel must resolve first, or a node on this machine).
//!
//! A *train* is several datagrams of one size in one buffer, of which the last
//! may be shorter: it crosses the stack, and on some interfaces the wire's
//! driver, as one packet. Sources: Linux `Documentation/networking/` (
//! `af_xdp.rst`, `packet_mmap.rst`, `segmentation-offloads.rst`), udp(7).

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

mod cache;
mod lab;
mod message;
mod netlink;
mod packet;
mod ring;
mod selftest;
mod set;
mod station;
mod tap;
mod udp;
pub mod wire;
mod xdp;

pub use cache::{Cache, Key, Record};
pub use netlink::{Interface, interfaces};
pub use selftest::{Figures, Measured, Report, measure};
pub use set::{Health, Uplinks};

/// Datagrams in a train at most: what every kernel with `UDP_SEGMENT` takes.
pub const MAX_SEGMENTS: usize = 64;

/// Bytes of a train at most: an IPv4 packet's 65,535 less its headers.
pub const MAX_TRAIN: usize = 65_507;

/// Bytes that a buffer for [`Uplink::rx`] needs so that no train is cut off.
pub const RX_BUFFER: usize = 65_536;

/// How an uplink reaches the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A UDP socket with segmentation and coalescing.
    Udp,
    /// An `AF_PACKET` socket with a `TPACKET_V3` ring.
    AfPacket,
    /// An `AF_XDP` socket for each of the interface's queues.
    AfXdp,
    /// A TAP interface.
    Tap,
}

impl Kind {
    /// Those that an interface can be used by, in the order in which they are
    /// preferred where they measure the same.
    pub const OF_INTERFACES: [Self; 3] = [Self::Udp, Self::AfXdp, Self::AfPacket];

    /// The name in commands and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::AfPacket => "af_packet",
            Self::AfXdp => "af_xdp",
            Self::Tap => "tap",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What an uplink can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Payload of one datagram in bytes at most, so that it is not fragmented
    /// on the first link.
    pub payload: usize,
    /// A train goes out as one packet; else it is cut up before.
    pub segmentation: bool,
    /// Trains may come in; else each buffer gets one datagram.
    pub coalescing: bool,
    /// The driver reads and writes the uplink's own memory.
    pub zero_copy: bool,
}

/// What an uplink is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// How it reaches the wire.
    pub kind: Kind,
    /// The interface.
    pub interface: String,
    /// The address that it sends from and receives at.
    pub local: SocketAddr,
    /// What it can do.
    pub capabilities: Capabilities,
    /// How it was set up, for people: `native, zero-copy, 4 queues`.
    pub mode: String,
}

/// A datagram or a train to send.
#[derive(Clone, Copy, Debug)]
pub struct TxPacket<'a> {
    /// Where to.
    pub to: SocketAddr,
    /// The payload.
    pub bytes: &'a [u8],
    /// Bytes of each datagram but the last of a train; 0 or at least the
    /// payload's length for a single one.
    pub segment: usize,
}

impl<'a> TxPacket<'a> {
    /// A single datagram.
    #[must_use]
    pub fn new(to: SocketAddr, bytes: &'a [u8]) -> Self {
        Self {
            to,
            bytes,
            segment: 0,
        }
    }

    /// A train of datagrams of `segment` bytes each.
    #[must_use]
    pub fn train(to: SocketAddr, bytes: &'a [u8], segment: usize) -> Self {
        Self { to, bytes, segment }
    }

    /// The size of its datagrams, but for the last one.
    fn size(&self) -> usize {
        if self.segment == 0 {
            self.bytes.len()
        } else {
            self.segment.min(self.bytes.len())
        }
    }

    /// How many datagrams it is.
    #[must_use]
    pub fn datagrams(&self) -> usize {
        self.bytes.len().div_ceil(self.size().max(1)).max(1)
    }

    /// Its datagrams, one by one.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> {
        let (bytes, size) = (self.bytes, self.size().max(1));
        (0..self.datagrams()).map(move |index| {
            let start = index * size;
            &bytes[start..(start + size).min(bytes.len())]
        })
    }

    fn is_train(&self) -> bool {
        self.datagrams() > 1
    }
}

/// A caller's buffer, and what has come into it.
#[derive(Debug)]
pub struct RxBuffer<'a> {
    /// Room for a datagram, or a train where the uplink coalesces:
    /// [`RX_BUFFER`] bytes are always enough.
    pub bytes: &'a mut [u8],
    /// Bytes that have come.
    pub len: usize,
    /// Bytes of each datagram but the last.
    pub segment: usize,
    /// Who sent them.
    pub from: SocketAddr,
}

impl<'a> RxBuffer<'a> {
    /// An empty buffer.
    #[must_use]
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self {
            bytes,
            len: 0,
            segment: 0,
            from: SocketAddr::from(([0; 4], 0)),
        }
    }

    /// What has come, as what would be sent back to its sender.
    #[must_use]
    pub fn packet(&self) -> TxPacket<'_> {
        TxPacket::train(self.from, &self.bytes[..self.len], self.segment)
    }

    /// Takes a payload over; false, and empty, if there is no room.
    fn fill(&mut self, from: SocketAddr, payload: &[u8], segment: usize) -> bool {
        self.len = 0;
        let Some(room) = self.bytes.get_mut(..payload.len()) else {
            return false;
        };
        room.copy_from_slice(payload);
        (self.from, self.len, self.segment) = (from, payload.len(), segment);
        true
    }
}

/// Datagrams in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Datagrams; those of a train each count.
    pub datagrams: u64,
    /// Bytes of payload.
    pub bytes: u64,
    /// Trains of more than one.
    pub trains: u64,
}

impl Traffic {
    fn add(&mut self, packet: &TxPacket<'_>) {
        self.datagrams += packet.datagrams() as u64;
        self.bytes += packet.bytes.len() as u64;
        self.trains += u64::from(packet.is_train());
    }
}

/// What an uplink has done since it was opened. What was dropped is in
/// datagrams, or frames where these could not be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Handed to the kernel or the driver.
    pub tx: Traffic,
    /// Received.
    pub rx: Traffic,
    /// Sent by the kernel's own stack for a raw uplink (counted in `tx` too).
    pub tx_kernel: u64,
    /// Not sent: longer than the MTU allows, or a train too long.
    pub tx_too_big: u64,
    /// Not sent: no route, another address family, or refused by the kernel.
    pub tx_refused: u64,
    /// Not taken: no sound Ethernet, IP or UDP headers, or not for this uplink.
    pub rx_malformed: u64,
    /// Not taken: a wrong checksum.
    pub rx_checksum: u64,
    /// Not taken: longer than the caller's buffer.
    pub rx_truncated: u64,
    /// Dropped by the kernel (packets, not datagrams): there was no room,
    /// because [`Uplink::rx`] was not called in time.
    pub rx_overrun: u64,
}

/// A way for datagrams to other nodes. It belongs to one thread.
///
/// Neither call blocks, and neither allocates memory for a packet.
///
/// ```no_run
/// use blanket_drivers::uplink::{Kind, RX_BUFFER, RxBuffer, Spec, TxPacket, open};
///
/// let mut uplink = open(Kind::Udp, &Spec::new("eth0", "10.0.0.5:4789".parse()?))?;
/// // 40 datagrams of 1400 bytes, as one train.
/// let peer = "10.0.0.6:4789".parse()?;
/// uplink.tx(&[TxPacket::train(peer, &[0; 56_000], 1400)])?;
/// let mut room = vec![0; RX_BUFFER];
/// let mut buffers = [RxBuffer::new(&mut room)];
/// if uplink.rx(&mut buffers)? > 0 {
///     for datagram in buffers[0].packet().iter() {
///         println!("{} bytes from {}", datagram.len(), buffers[0].from);
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Uplink: Send {
    /// What it is.
    fn description(&self) -> &Description;

    /// Receives into the first of `buffers`; returns how many have something.
    /// 0: nothing is there now.
    ///
    /// # Errors
    /// The interface has gone or is down.
    fn rx(&mut self, buffers: &mut [RxBuffer<'_>]) -> io::Result<usize>;

    /// Sends the first of `packets`; returns how many are done with. What
    /// cannot be sent at all is dropped and counted, and done with too. Fewer
    /// than there are: there is no room now.
    ///
    /// # Errors
    /// The interface has gone or is down.
    fn tx(&mut self, packets: &[TxPacket<'_>]) -> io::Result<usize>;

    /// Becomes readable when something has come.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What it has done. It asks the kernel: not for each packet.
    fn counters(&self) -> Counters;
}

/// What uplink to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The interface; a TAP is made if it is not there.
    pub interface: String,
    /// The node's address on that interface and the port: what peers send to.
    /// Port 0 takes any. For a TAP it is the uplink's own address behind it.
    pub local: SocketAddr,
    /// The node's own address on a TAP that is made, and its prefix length.
    pub host_ip: Option<(std::net::Ipv4Addr, u8)>,
}

impl Spec {
    /// An uplink over an interface of this machine.
    #[must_use]
    pub fn new(interface: &str, local: SocketAddr) -> Self {
        Self {
            interface: interface.to_owned(),
            local,
            host_ip: None,
        }
    }
}

/// Why there is no uplink.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such interface.
    #[error("there is no interface '{0}'; `ip link` lists them")]
    NoInterface(String),
    /// The interface is down or has no carrier.
    #[error("interface '{interface}' is {state}; {remedy}")]
    Dead {
        /// The interface.
        interface: String,
        /// `down` or `without a carrier`.
        state: &'static str,
        /// What to do.
        remedy: String,
    },
    /// The interface does not have the address.
    #[error("interface '{interface}' does not have the address {address}; `ip addr` shows its own")]
    NoAddress {
        /// The interface.
        interface: String,
        /// The address that it should have.
        address: IpAddr,
    },
    /// The interface is no Ethernet.
    #[error("interface '{0}' is not an Ethernet; use the udp uplink")]
    NotEthernet(String),
    /// The kernel does not have it, or has too little of it.
    #[error(
        "{kind} uplink on '{interface}': this kernel cannot {what}: {source}; use the udp uplink"
    )]
    Missing {
        /// The uplink.
        kind: Kind,
        /// The interface.
        interface: String,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The user may not.
    #[error(
        "{kind} uplink on '{interface}': not permitted to {what}; run as root or with {capabilities}"
    )]
    Denied {
        /// The uplink.
        kind: Kind,
        /// The interface.
        interface: String,
        /// What was tried.
        what: &'static str,
        /// What is needed.
        capabilities: &'static str,
    },
    /// Somebody else has it.
    #[error(
        "{kind} uplink on '{interface}': cannot {what}: {source}; stop the program that holds it (`ss -lunp`, `ip link show {interface}`)"
    )]
    Busy {
        /// The uplink.
        kind: Kind,
        /// The interface.
        interface: String,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A TAP cannot be had.
    #[error(transparent)]
    Tap(#[from] crate::tap::Error),
    /// The routing socket does not work.
    #[error("cannot ask the kernel for its {what}: {source}; see that AF_NETLINK is not filtered")]
    Netlink {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// There is nothing to measure on.
    #[error("cannot make a {what} to measure on: {source}; run as root")]
    Lab {
        /// What could not be made.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Not one uplink of a set works.
    #[error("no uplink works: {0}")]
    None(String),
}

/// Makes an [`Error`] of an error number, while one is set up.
#[derive(Clone, Copy)]
struct Setup<'a> {
    kind: Kind,
    interface: &'a str,
    capabilities: &'static str,
}

impl Setup<'_> {
    fn error(&self, what: &'static str, source: io::Error) -> Error {
        let (kind, interface) = (self.kind, self.interface.to_owned());
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Error::Denied {
                kind,
                interface,
                what,
                capabilities: self.capabilities,
            },
            Some(libc::EBUSY | libc::EADDRINUSE) => Error::Busy {
                kind,
                interface,
                what,
                source,
            },
            _ => Error::Missing {
                kind,
                interface,
                what,
                source,
            },
        }
    }
}

/// Opens an uplink of one kind.
///
/// # Errors
/// The interface is missing, dead or without the address, or this kernel, this
/// user or this interface cannot do that kind; the text says which.
pub fn open(kind: Kind, spec: &Spec) -> Result<Box<dyn Uplink>, Error> {
    let interface = || netlink::usable(&spec.interface, spec.local.ip());
    Ok(match kind {
        Kind::Udp => Box::new(udp::Udp::open(spec, &interface()?, udp::Use::Full)?),
        Kind::AfPacket => Box::new(packet::AfPacket::open(spec, &interface()?)?),
        Kind::AfXdp => Box::new(xdp::AfXdp::open(spec, &interface()?)?),
        Kind::Tap => Box::new(tap::TapUplink::open(spec)?),
    })
}

/// The outcome of a system call that returns a negative number on errors.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Sets a socket's option to a plain value.
fn set_option<T>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` has `len` bytes and outlives the call.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const *value).cast(), len) };
    check(result).map(drop)
}

/// Reads a socket's option of `N` words; what the kernel does not fill is 0.
fn option<const N: usize>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<[u32; N]> {
    use std::os::fd::AsRawFd;
    let mut words = [0; N];
    let mut len = size_of_val(&words) as libc::socklen_t;
    let value = words.as_mut_ptr().cast();
    // SAFETY: the kernel writes `len` bytes at most, which `words` has, and
    // the length; both outlive the call.
    let result = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value, &raw mut len) };
    check(result).map(|_| words)
}

#[cfg(test)]
mod tests;
