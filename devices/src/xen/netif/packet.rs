//! Where a packet's checksum is, and the checksum itself.
//!
//! Xen's flags say only *that* a checksum is blank; both ends find it by the
//! packet's headers. The virtio header in front of a TAP's frames says where it
//! is. So this looks through Ethernet, VLAN and IP headers, as Linux does in
//! `skb_checksum_setup`. Every offset is within the bytes that are given.

use crate::net::checksum::Sum;

/// Bytes at a packet's start that hold all headers of a packet whose checksum
/// can be found: Ethernet, two VLAN tags, IP with options, TCP with options.
pub(super) const HEAD: usize = 256;

/// Bytes of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Extension headers of IPv6 that are looked through.
const MAX_EXTENSIONS: usize = 8;

/// A version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ip {
    V4,
    V6,
}

/// A packet's TCP or UDP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transport {
    pub(super) ip: Ip,
    /// Whether the packet has a VLAN tag.
    pub(super) tagged: bool,
    /// TCP, or else UDP.
    pub(super) tcp: bool,
    /// Where the IP header begins.
    network: usize,
    /// Where the header begins.
    pub(super) start: usize,
    /// Where the payload begins.
    pub(super) payload: usize,
}

impl Transport {
    /// The checksum's place in the header (RFC 9293, 3.1; RFC 768).
    pub(super) fn checksum_offset(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    /// Finds the header in a packet that begins with `head`. `None` if there is
    /// none (another protocol, a fragment, headers that are cut off).
    pub(super) fn find(head: &[u8]) -> Option<Self> {
        let mut network = ETHERNET;
        let mut ether_type = be16(head, 12)?;
        // 802.1Q and 802.1ad.
        while matches!(ether_type, 0x8100 | 0x88a8) && network < ETHERNET + 8 {
            ether_type = be16(head, network + 2)?;
            network += 4;
        }
        let (ip, protocol, start) = match ether_type {
            0x0800 => ipv4(head, network)?,
            0x86dd => ipv6(head, network)?,
            _ => return None,
        };
        let tcp = match protocol {
            6 => true,
            17 => false,
            _ => return None,
        };
        let len = if tcp {
            usize::from(*head.get(start + 12)? >> 4) * 4
        } else {
            8
        };
        let payload = start + len;
        let complete = payload <= head.len() && (!tcp || len >= 20);
        complete.then_some(Self {
            ip,
            tagged: network > ETHERNET,
            tcp,
            network,
            start,
            payload,
        })
    }

    /// Puts the sum over the pseudo header of a packet of `len` bytes into the
    /// checksum's place (RFC 9293, 3.1; RFC 8200, 8.1).
    pub(super) fn sum_pseudo_header(&self, head: &mut [u8], len: usize) {
        let addresses = match self.ip {
            Ip::V4 => self.network + 12..self.network + 20,
            Ip::V6 => self.network + 8..self.network + 40,
        };
        let mut sum = Sum::default();
        sum.add(head.get(addresses).unwrap_or_default());
        let protocol = if self.tcp { 6u32 } else { 17 };
        // A packet is shorter than 64 KiB.
        let len = len.saturating_sub(self.start) as u32;
        sum.add(&len.to_be_bytes());
        sum.add(&protocol.to_be_bytes());
        let place = self.start + self.checksum_offset();
        if let Some(field) = head.get_mut(place..place + 2) {
            field.copy_from_slice(&sum.folded().to_be_bytes());
        }
    }
}

fn be16(bytes: &[u8], offset: usize) -> Option<u16> {
    let field = bytes.get(offset..)?.first_chunk()?;
    Some(u16::from_be_bytes(*field))
}

/// Protocol and end of an IPv4 header (RFC 791, 3.1).
fn ipv4(head: &[u8], at: usize) -> Option<(Ip, u8, usize)> {
    let len = usize::from(*head.get(at)? & 15) * 4;
    // More fragments, or not the first one: there is no checksum, or not all
    // that it covers.
    let whole = be16(head, at + 6)? & 0x3fff == 0;
    (len >= 20 && whole).then_some((Ip::V4, *head.get(at + 9)?, at + len))
}

/// Protocol behind an IPv6 header and its extensions (RFC 8200, 4).
fn ipv6(head: &[u8], at: usize) -> Option<(Ip, u8, usize)> {
    let (mut protocol, mut start) = (*head.get(at + 6)?, at + 40);
    for _ in 0..MAX_EXTENSIONS {
        // Hop-by-hop, routing, fragment, authentication, destination options.
        if !matches!(protocol, 0 | 43 | 44 | 51 | 60) {
            return Some((Ip::V6, protocol, start));
        }
        let (next, len) = (*head.get(start)?, usize::from(*head.get(start + 1)?));
        start += match protocol {
            // Not all that the checksum covers is in a fragment.
            44 if be16(head, start + 2)? & 0xfff9 != 0 => return None,
            44 => 8,
            51 => (len + 2) * 4,
            _ => (len + 1) * 8,
        };
        protocol = next;
    }
    None
}

#[cfg(test)]
mod tests;
