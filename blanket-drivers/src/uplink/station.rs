//! What the raw uplinks share: their own station, the stations of others, and
//! the socket through which the kernel does what they cannot.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::netlink::{Interface, Netlink, NextHop};
use super::udp::{Udp, Use, fits, with_port};
use super::wire::{self, Datagram, End, FrameError};
use super::{Counters, Error, RxBuffer, Spec, TxPacket, Uplink};
use crate::mac::MacAddress;

/// How long a station is believed to be where it was.
const FRESH: Duration = Duration::from_secs(1);
/// How soon the kernel is asked again for one that it has not found yet.
const RETRY: Duration = Duration::from_millis(10);
/// Destinations that are remembered at most.
const MOST: usize = 8192;

/// What becomes of a packet that the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// There will be room.
    Later,
    /// It is too long.
    TooBig,
    /// It is not for this uplink; others may be.
    Refused,
}

/// What an error is about: a packet, or (the error itself) the interface.
pub(super) fn fate(error: io::Error) -> io::Result<Fate> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::EBUSY | libc::ENOMEM) => {
            Ok(Fate::Later)
        }
        Some(libc::EMSGSIZE) => Ok(Fate::TooBig),
        Some(libc::ENETDOWN | libc::ENODEV | libc::ENXIO | libc::EBADF) => Err(error),
        _ => Ok(Fate::Refused),
    }
}

impl Counters {
    /// Counts datagrams that are not sent.
    pub(super) fn refuse(&mut self, datagrams: usize, fate: Fate) {
        match fate {
            Fate::TooBig => self.tx_too_big += datagrams as u64,
            Fate::Refused | Fate::Later => self.tx_refused += datagrams as u64,
        }
    }
}

/// How a packet is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// In a frame to this station.
    Frame(MacAddress),
    /// By the kernel.
    Kernel,
    /// Not at all: it is too long.
    TooBig,
    /// Not at all: its address is of another family.
    Refused,
}

/// One node's end of an Ethernet.
pub(super) struct Station {
    pub(super) end: End,
    pub(super) payload: usize,
    pub(super) kernel: Udp,
    pub(super) counters: Counters,
    index: u32,
    netlink: Netlink,
    hops: HashMap<IpAddr, (NextHop, Instant)>,
}

impl Station {
    /// Takes the uplink's port at its address for itself.
    pub(super) fn open(spec: &Spec, interface: &Interface, used: Use) -> Result<Self, Error> {
        let mac = interface.mac;
        let mac = mac.ok_or_else(|| Error::NotEthernet(spec.interface.clone()))?;
        let kernel = Udp::open(spec, interface, used)?;
        let address = with_port(spec, kernel.description().local).local;
        Ok(Self {
            end: End { mac, address },
            payload: interface.payload(address.ip()),
            kernel,
            counters: Counters::default(),
            index: interface.index,
            netlink: Netlink::open()?,
            hops: HashMap::new(),
        })
    }

    /// How to send `packet`.
    pub(super) fn way(&mut self, packet: &TxPacket<'_>, now: Instant) -> Way {
        if !fits(packet, self.payload) {
            return Way::TooBig;
        }
        if packet.to.is_ipv4() != self.end.address.is_ipv4() {
            return Way::Refused;
        }
        match self.hop(packet.to.ip(), now) {
            NextHop::Station { mac, .. } => Way::Frame(mac),
            NextHop::Kernel => Way::Kernel,
        }
    }

    fn hop(&mut self, to: IpAddr, now: Instant) -> NextHop {
        if let Some((hop, until)) = self.hops.get(&to)
            && now < *until
        {
            return *hop;
        }
        let hop = self.netlink.next_hop(self.index, self.end.address.ip(), to);
        let age = match hop {
            NextHop::Station { .. } => FRESH,
            NextHop::Kernel => RETRY,
        };
        if self.hops.len() >= MOST {
            self.hops.clear();
        }
        self.hops.insert(to, (hop, now + age));
        match hop {
            // The kernel finds out whether it is still there when it sends
            // something itself.
            NextHop::Station {
                verified: false, ..
            } => NextHop::Kernel,
            hop => hop,
        }
    }

    /// Has the kernel send `packet`; false: later.
    pub(super) fn send_by_kernel(&mut self, packet: &TxPacket<'_>) -> io::Result<bool> {
        let before = self.kernel.tally();
        let done = self.kernel.tx(std::slice::from_ref(packet))?;
        let after = self.kernel.tally();
        let sent = after.tx.datagrams - before.tx.datagrams;
        if sent > 0 {
            self.counters.tx.add(packet);
        }
        self.counters.tx_kernel += sent;
        self.counters.tx_too_big += after.tx_too_big - before.tx_too_big;
        self.counters.tx_refused += after.tx_refused - before.tx_refused;
        Ok(done == 1)
    }

    /// Takes what came to the kernel's socket.
    pub(super) fn receive_from_kernel(
        &mut self,
        buffers: &mut [RxBuffer<'_>],
    ) -> io::Result<usize> {
        if buffers.is_empty() {
            return Ok(0);
        }
        let before = self.kernel.tally();
        let got = self.kernel.rx(buffers)?;
        let after = self.kernel.tally();
        self.counters.rx_truncated += after.rx_truncated - before.rx_truncated;
        for buffer in &buffers[..got] {
            self.counters.rx.add(&buffer.packet());
        }
        Ok(got)
    }

    /// Takes a frame's datagram, or train of `segment` bytes each, into a
    /// buffer; false, and counted, if it is none or there is no room.
    pub(super) fn take(
        &mut self,
        frame: &[u8],
        verify: bool,
        segment: usize,
        buffer: &mut RxBuffer<'_>,
    ) -> bool {
        let datagram = match wire::parse(frame, verify) {
            Ok(datagram) if datagram.to == self.end.address => datagram,
            Ok(_) | Err(FrameError::Malformed) => {
                self.counters.rx_malformed += 1;
                return false;
            }
            Err(FrameError::Checksum) => {
                self.counters.rx_checksum += 1;
                return false;
            }
        };
        self.accept(&datagram, segment, buffer)
    }

    fn accept(
        &mut self,
        datagram: &Datagram<'_>,
        segment: usize,
        buffer: &mut RxBuffer<'_>,
    ) -> bool {
        let Datagram { from, payload, .. } = *datagram;
        let segment = if segment == 0 { payload.len() } else { segment };
        if !buffer.fill(from, payload, segment) {
            self.counters.rx_truncated += 1;
            return false;
        }
        self.counters.rx.add(&buffer.packet());
        true
    }

    /// The headers in front of `payload` to a peer behind `mac`.
    pub(super) fn headers(
        &self,
        to: SocketAddr,
        mac: MacAddress,
        payload: &[u8],
        checksum: wire::Checksum,
    ) -> Option<wire::Headers> {
        let to = End { mac, address: to };
        wire::Headers::new(self.end, to, payload, checksum)
    }
}
