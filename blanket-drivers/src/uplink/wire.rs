//! Bytes from the wire and from the kernel about it: Ethernet, IPv4, IPv6 and
//! UDP headers (RFC 894, 791, 8200, 768), virtio's header in front of frames,
//! and the control messages of coalesced datagrams. All of it is hostile.

use std::net::{IpAddr, SocketAddr};

use etherparse::checksum::u64_16bit_word as sum;
use etherparse::{
    EtherType, Ethernet2Header, Ethernet2HeaderSlice, IpNumber, Ipv4Header, Ipv4Slice, Ipv6Header,
    Ipv6Slice, UdpHeader, UdpSlice,
};

use crate::mac::MacAddress;

/// Bytes of Ethernet, IPv6 and UDP headers: the longest that are built here.
pub const MAX_HEADERS: usize = 14 + 40 + 8;

/// Hops that datagrams may take, as of Linux.
const TTL: u8 = 64;

/// Bytes of IP and UDP headers in front of a payload to `address`.
#[must_use]
pub fn overhead(address: IpAddr) -> usize {
    if address.is_ipv4() { 20 + 8 } else { 40 + 8 }
}

/// One end of a link: the station and the socket behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The station.
    pub mac: MacAddress,
    /// The socket.
    pub address: SocketAddr,
}

/// Who fills the UDP checksum in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// It is computed here.
    Full,
    /// The kernel or the interface; the header has what virtio 1.2, 5.1.6.2
    /// (`VIRTIO_NET_HDR_F_NEEDS_CSUM`) asks for.
    Partial,
}

/// Headers to be sent in front of a payload.
#[derive(Clone, Copy, Debug)]
pub struct Headers {
    bytes: [u8; MAX_HEADERS],
    len: usize,
}

impl Headers {
    /// The headers for `payload`; none if the ends are of two address families
    /// or the payload is longer than IP can say.
    #[must_use]
    pub fn new(from: End, to: End, payload: &[u8], checksum: Checksum) -> Option<Self> {
        let length = u16::try_from(payload.len() + 8).ok()?;
        let (ether_type, pseudo) = match (from.address.ip(), to.address.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (
                EtherType::IPV4,
                sum::add_4bytes(sum::add_4bytes(0, a.octets()), b.octets()),
            ),
            (IpAddr::V6(a), IpAddr::V6(b)) => (
                EtherType::IPV6,
                sum::add_slice(sum::add_slice(0, &a.octets()), &b.octets()),
            ),
            _ => return None,
        };
        let pseudo = sum::add_2bytes(sum::add_2bytes(pseudo, [0, 17]), length.to_be_bytes());
        let mut udp = UdpHeader {
            source_port: from.address.port(),
            destination_port: to.address.port(),
            length,
            checksum: 0,
        };
        udp.checksum = match checksum {
            Checksum::Full => full_checksum(pseudo, &udp, payload),
            // Not complemented: the sum of the rest is added to it.
            Checksum::Partial => !sum::ones_complement(pseudo).to_be(),
        };
        let mut headers = Self::empty();
        let ethernet = Ethernet2Header {
            source: from.mac.0,
            destination: to.mac.0,
            ether_type,
        };
        headers.push(&ethernet.to_bytes());
        headers.push_ip(from.address.ip(), to.address.ip(), length)?;
        headers.push(&udp.to_bytes());
        Some(headers)
    }

    /// No headers.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            bytes: [0; MAX_HEADERS],
            len: 0,
        }
    }

    fn push(&mut self, part: &[u8]) {
        // The parts are 14, 20 or 40, and 8 bytes.
        self.bytes[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
    }

    fn push_ip(&mut self, from: IpAddr, to: IpAddr, length: u16) -> Option<()> {
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut ip =
                    Ipv4Header::new(length, TTL, IpNumber::UDP, from.octets(), to.octets()).ok()?;
                ip.dont_fragment = true;
                ip.header_checksum = ip.calc_header_checksum();
                self.push(&ip.to_bytes());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let ip = Ipv6Header {
                    payload_length: length,
                    next_header: IpNumber::UDP,
                    hop_limit: TTL,
                    source: from.octets(),
                    destination: to.octets(),
                    ..Ipv6Header::default()
                };
                self.push(&ip.to_bytes());
            }
            _ => return None,
        }
        Some(())
    }

    /// The headers' bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Bytes in front of the UDP header.
    #[must_use]
    pub fn udp_start(&self) -> usize {
        self.len.saturating_sub(8)
    }
}

/// The UDP checksum in the header's byte order; 0 would mean none.
fn full_checksum(pseudo: u64, udp: &UdpHeader, payload: &[u8]) -> u16 {
    let mut total = sum::add_2bytes(pseudo, udp.source_port.to_be_bytes());
    total = sum::add_2bytes(total, udp.destination_port.to_be_bytes());
    total = sum::add_2bytes(total, udp.length.to_be_bytes());
    sum::ones_complement_with_no_zero(sum::add_slice(total, payload)).to_be()
}

/// A datagram in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Who sent it.
    pub from: SocketAddr,
    /// Whom it is for.
    pub to: SocketAddr,
    /// The payload.
    pub payload: &'a [u8],
}

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No whole, unfragmented UDP over IP over Ethernet.
    #[error("not a sound UDP datagram in an Ethernet frame")]
    Malformed,
    /// A checksum is wrong.
    #[error("the checksum is wrong")]
    Checksum,
}

/// Finds the datagram in an Ethernet frame. `verify` is for frames whose UDP
/// checksum nobody has checked.
///
/// # Errors
/// There is none, or a checksum is wrong.
pub fn parse(frame: &[u8], verify: bool) -> Result<Datagram<'_>, FrameError> {
    let ethernet = Ethernet2HeaderSlice::from_slice(frame).map_err(|_| FrameError::Malformed)?;
    let rest = frame.get(14..).ok_or(FrameError::Malformed)?;
    let (source, destination, segment, pseudo): (IpAddr, IpAddr, _, _) = match ethernet.ether_type()
    {
        EtherType::IPV4 => {
            let ip = Ipv4Slice::from_slice(rest).map_err(|_| FrameError::Malformed)?;
            let header = ip.header();
            if sum::ones_complement(sum::add_slice(0, header.slice())) != 0 {
                return Err(FrameError::Checksum);
            }
            let addresses =
                sum::add_4bytes(sum::add_4bytes(0, header.source()), header.destination());
            let (from, to) = (header.source_addr(), header.destination_addr());
            (from.into(), to.into(), ip.payload().clone(), addresses)
        }
        EtherType::IPV6 => {
            let ip = Ipv6Slice::from_slice(rest).map_err(|_| FrameError::Malformed)?;
            let header = ip.header();
            let addresses =
                sum::add_slice(sum::add_slice(0, &header.source()), &header.destination());
            let (from, to) = (header.source_addr(), header.destination_addr());
            (from.into(), to.into(), ip.payload().clone(), addresses)
        }
        _ => return Err(FrameError::Malformed),
    };
    if segment.fragmented || segment.ip_number != IpNumber::UDP {
        return Err(FrameError::Malformed);
    }
    let udp = UdpSlice::from_slice(segment.payload).map_err(|_| FrameError::Malformed)?;
    if verify && !checksum_holds(pseudo, &udp, source.is_ipv4()) {
        return Err(FrameError::Checksum);
    }
    Ok(Datagram {
        from: (source, udp.source_port()).into(),
        to: (destination, udp.destination_port()).into(),
        payload: udp.payload(),
    })
}

/// Whether a UDP checksum is right, absent where it may be, or still to be
/// filled in: a virtual link hands on what the sender left to its interface.
fn checksum_holds(addresses: u64, udp: &UdpSlice<'_>, optional: bool) -> bool {
    if udp.checksum() == 0 {
        return optional;
    }
    let slice = udp.slice();
    // It fitted in IP's 16 bits; a jumbogram is not taken.
    let Ok(length) = u16::try_from(slice.len()) else {
        return false;
    };
    let pseudo = sum::add_2bytes(sum::add_2bytes(addresses, [0, 17]), length.to_be_bytes());
    udp.checksum() == !sum::ones_complement(pseudo).to_be()
        || sum::ones_complement(sum::add_slice(pseudo, slice)) == 0
}

/// What virtio's header in front of a frame says (`virtio_net_hdr`: virtio
/// 1.2, 5.1.6; Linux writes it in the machine's byte order).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioHeader {
    /// Somebody has to verify, or to fill in, nothing: the checksum is known
    /// to be right or is not there yet.
    pub checksum_settled: bool,
    /// Payload of each datagram of a train; 0 for a single one.
    pub segment: u16,
}

/// Bytes of a `virtio_net_hdr`.
pub const VIRTIO_HEADER: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`, `VIRTIO_NET_HDR_F_DATA_VALID`.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
const GSO_UDP_L4: u8 = 5;

impl VirtioHeader {
    /// Reads one; none if it announces what is not UDP, or is too short.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let [flags, gso_type, _, _, size_0, size_1, ..] = *bytes.get(..VIRTIO_HEADER)? else {
            return None;
        };
        let segment = match gso_type {
            0 => 0,
            GSO_UDP_L4 => u16::from_ne_bytes([size_0, size_1]),
            _ => return None,
        };
        Some(Self {
            checksum_settled: flags & (NEEDS_CSUM | DATA_VALID) != 0,
            segment,
        })
    }

    /// The header of a frame that [`Headers`] with [`Checksum::Partial`] are
    /// the start of: a train of `segment` bytes each, or a single one for 0.
    #[must_use]
    pub fn build(headers: &Headers, segment: u16) -> [u8; VIRTIO_HEADER] {
        let mut bytes = [0; VIRTIO_HEADER];
        let start = headers.udp_start() as u16;
        bytes[0] = NEEDS_CSUM;
        if segment != 0 {
            bytes[1] = GSO_UDP_L4;
            bytes[2..4].copy_from_slice(&(start + 8).to_ne_bytes());
            bytes[4..6].copy_from_slice(&segment.to_ne_bytes());
        }
        bytes[6..8].copy_from_slice(&start.to_ne_bytes());
        // The checksum's place in the UDP header.
        bytes[8..10].copy_from_slice(&6u16.to_ne_bytes());
        bytes
    }
}

/// The size of a train's datagrams (udp(7), `UDP_GRO`) in the control messages
/// of a received one (cmsg(3)), if it is one.
#[must_use]
pub fn gro_segment(control: &[u8]) -> Option<usize> {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let mut rest = control;
    while let Some(header) = rest.get(..HEADER) {
        let (len, kind) = header.split_at(size_of::<usize>());
        let len = usize::from_ne_bytes(len.try_into().ok()?);
        let (level, kind) = kind.split_at(4);
        let level = i32::from_ne_bytes(level.try_into().ok()?);
        let kind = i32::from_ne_bytes(kind.try_into().ok()?);
        let data = rest.get(HEADER..len)?;
        if (level, kind) == (libc::SOL_UDP, libc::UDP_GRO) {
            let size = i32::from_ne_bytes(data.get(..4)?.try_into().ok()?);
            return usize::try_from(size).ok().filter(|size| *size > 0);
        }
        rest = rest.get(len.checked_next_multiple_of(size_of::<usize>())?..)?;
    }
    None
}
