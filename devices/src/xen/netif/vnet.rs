//! Between Xen's flags and extras and the virtio header (virtio 1.2, 5.1.6) of
//! frames at the other end.

use blanket_drivers::tap::{HEADER_LEN, Offloads};
use blanket_memory::IoVec;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as net;

use super::abi::{Gso, GsoKind, RX_CSUM_BLANK, RX_DATA_VALIDATED};
use super::packet::{HEAD, Ip, Transport};
use crate::net::checksum;

/// What the frontend takes from the backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Features {
    /// Packets in several slots.
    pub(super) sg: bool,
    /// Blank checksums, of IPv4 and IPv6 alike: a TAP knows no difference.
    pub(super) checksum: bool,
    /// TCP over IPv4 that is still to be segmented: implies both of the above.
    pub(super) gso4: bool,
    /// TCP over IPv6 that is still to be segmented: implies both, too.
    pub(super) gso6: bool,
}

impl Features {
    /// Whether packets may have an extra that says how to segment them.
    pub(super) fn gso(&self) -> bool {
        self.gso4 || self.gso6
    }

    /// What the other end need not do for this frontend.
    pub(super) fn offloads(&self) -> Offloads {
        let bit = |on, bit| if on { bit } else { 0 };
        Offloads(
            bit(self.checksum, libc::TUN_F_CSUM)
                | bit(self.gso4, libc::TUN_F_TSO4)
                | bit(self.gso6, libc::TUN_F_TSO6),
        )
    }
}

/// The virtio header of a packet of the guest's. `head` is a copy of the
/// packet's first bytes (all, if it is short), `len` its length. `None` if the
/// flags do not fit what is in the packet.
pub(super) fn to_node(
    head: &mut [u8],
    len: usize,
    checksum_blank: bool,
    gso: Option<Gso>,
) -> Option<[u8; HEADER_LEN]> {
    if !checksum_blank && gso.is_none() {
        return Some([0; HEADER_LEN]);
    }
    let transport = Transport::find(head)?;
    let mut header = Header {
        flags: net::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
        // Both are within the head.
        start: transport.start as u16,
        offset: transport.checksum_offset() as u16,
        ..Header::default()
    };
    if let Some(gso) = gso {
        let (kind, ip) = match gso.kind {
            GsoKind::Tcp4 => (net::VIRTIO_NET_HDR_GSO_TCPV4, Ip::V4),
            GsoKind::Tcp6 => (net::VIRTIO_NET_HDR_GSO_TCPV6, Ip::V6),
        };
        if !transport.tcp || transport.ip != ip {
            return None;
        }
        if !checksum_blank {
            // Each segment gets a checksum: like Linux, take it for forgotten.
            transport.sum_pseudo_header(head, len);
        }
        header.gso_kind = kind as u8;
        header.gso_size = gso.size;
        header.len = transport.payload as u16;
    }
    Some(header.bytes())
}

/// Whether a packet that came with `header` is to be segmented.
pub(super) fn is_gso(header: &[u8; HEADER_LEN]) -> bool {
    u32::from(Header::parse(header).gso_kind) != net::VIRTIO_NET_HDR_GSO_NONE
}

/// The frontend's flags for a received packet, and how to segment it.
pub(super) struct Received {
    pub(super) flags: u16,
    pub(super) gso: Option<Gso>,
}

/// Flags and segmentation of `packet`, which came with `header`. A checksum
/// that the frontend would not find is completed in the packet. `None` if the
/// frontend cannot take the packet.
pub(super) fn to_guest(
    header: &[u8; HEADER_LEN],
    packet: &[IoVec],
    features: Features,
) -> Option<Received> {
    let header = Header::parse(header);
    let gso = match u32::from(header.gso_kind) {
        net::VIRTIO_NET_HDR_GSO_NONE => None,
        net::VIRTIO_NET_HDR_GSO_TCPV4 if features.gso4 => Some(GsoKind::Tcp4),
        net::VIRTIO_NET_HDR_GSO_TCPV6 if features.gso6 => Some(GsoKind::Tcp6),
        _ => return None,
    }
    .map(|kind| Gso {
        kind,
        size: header.gso_size,
    });
    let flags = u32::from(header.flags);
    if flags & net::VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
        let valid = flags & net::VIRTIO_NET_HDR_F_DATA_VALID != 0;
        let flags = if valid { RX_DATA_VALIDATED } else { 0 };
        return gso.is_none().then_some(Received { flags, gso });
    }
    if features.checksum && is_found(&header, packet) {
        let flags = RX_CSUM_BLANK | RX_DATA_VALIDATED;
        return Some(Received { flags, gso });
    }
    let (start, offset) = (usize::from(header.start), usize::from(header.offset));
    let done = gso.is_none() && checksum::complete(packet, start, offset);
    done.then_some(Received {
        flags: RX_DATA_VALIDATED,
        gso,
    })
}

/// Whether the frontend finds the blank checksum by the packet's headers: it
/// looks for TCP or UDP right behind Ethernet and IP.
fn is_found(header: &Header, packet: &[IoVec]) -> bool {
    let mut head = [0; HEAD];
    let n = blanket_memory::iovec::read_bytes(packet, &mut head);
    Transport::find(&head[..n]).is_some_and(|transport| {
        !transport.tagged
            && transport.start == usize::from(header.start)
            && transport.checksum_offset() == usize::from(header.offset)
    })
}

/// `struct virtio_net_hdr_v1`, as far as a TAP uses it.
#[derive(Debug, Default)]
struct Header {
    flags: u8,
    gso_kind: u8,
    /// Bytes of the packet's headers.
    len: u16,
    gso_size: u16,
    /// Where the checksum's bytes begin.
    start: u16,
    /// Where the checksum is, from there.
    offset: u16,
}

impl Header {
    fn bytes(&self) -> [u8; HEADER_LEN] {
        let [l0, l1] = self.len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.start.to_le_bytes();
        let [o0, o1] = self.offset.to_le_bytes();
        [
            self.flags,
            self.gso_kind,
            l0,
            l1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
            0,
            0,
        ]
    }

    fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let &[flags, gso_kind, l0, l1, g0, g1, s0, s1, o0, o1, ..] = bytes;
        Self {
            flags,
            gso_kind,
            len: u16::from_le_bytes([l0, l1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            start: u16::from_le_bytes([s0, s1]),
            offset: u16::from_le_bytes([o0, o1]),
        }
    }
}

#[cfg(test)]
mod tests;
