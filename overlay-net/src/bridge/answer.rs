//! Frames that the bridge makes itself: answers to ARP and neighbour
//! solicitation, and word that a frame was too big.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::key::{ethertype, protocol};
use crate::frame::{HEAD, Head, Key, Layers, Mac};

/// The Internet checksum (RFC 1071) of bytes, in 16-bit words.
fn sum(bytes: &[u8]) -> u32 {
    let mut words = bytes.chunks_exact(2);
    let sum: u32 = words
        .by_ref()
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    match words.remainder() {
        [last] => sum + (u32::from(*last) << 8),
        _ => sum,
    }
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A checksum after a word that it covers changed (RFC 1624).
pub(super) fn changed(checksum: u16, from: u16, to: u16) -> u16 {
    fold(u32::from(!checksum) + u32::from(!from) + u32::from(to))
}

pub(super) struct Made {
    bytes: [u8; HEAD],
    len: usize,
}

impl Made {
    pub(super) fn new(dst: Mac, src: Mac, kind: u16) -> Self {
        let mut made = Self {
            bytes: [0; HEAD],
            len: 0,
        };
        made.put(&dst.0);
        made.put(&src.0);
        made.put(&kind.to_be_bytes());
        made
    }

    /// Adds bytes; as many as there is room for.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let len = bytes.len().min(HEAD - self.len);
        self.bytes[self.len..self.len + len].copy_from_slice(&bytes[..len]);
        self.len += len;
    }

    fn set(&mut self, at: usize, word: u16) {
        self.bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
    }

    /// Begins an IPv6 packet with ICMPv6 in it, of a length that is not known
    /// yet.
    pub(super) fn icmp6(&mut self, from: Ipv6Addr, to: Ipv6Addr) {
        self.put(&[0x60, 0, 0, 0, 0, 0, protocol::ICMPV6, 255]);
        self.put(&from.octets());
        self.put(&to.octets());
    }

    /// Fills in the length and the checksum.
    pub(super) fn icmp6_done(mut self) -> Head {
        let len = self.len - 54;
        self.set(18, len as u16);
        let pseudo = sum(&self.bytes[22..54]) + len as u32 + u32::from(protocol::ICMPV6);
        self.set(56, fold(pseudo + sum(&self.bytes[54..self.len])));
        self.done()
    }

    pub(super) fn done(self) -> Head {
        Head::of(&self.bytes[..self.len])
    }
}

/// The address that is asked for, if the frame asks all who has it.
pub(super) fn asked(key: &Key) -> Option<IpAddr> {
    // One who knows whom to ask wants to hear whether it is there.
    if !key.dst.is_multicast() {
        return None;
    }
    if let Some(arp) = key.arp {
        // Who tells of itself asks nothing.
        let asks = key.ethertype == ethertype::ARP && arp.op == 1;
        return (asks && arp.sender.1 != arp.target.1).then_some(arp.target.1.into());
    }
    let solicits =
        key.protocol == protocol::ICMPV6 && key.ports == Some((135, 0)) && key.ttl == 255;
    let target = key.nd_target?;
    (solicits && !target.is_multicast()).then_some(target.into())
}

/// The answer that `mac` has what was asked for, without tags.
pub(super) fn answer(key: &Key, ip: IpAddr, mac: Mac) -> Option<Head> {
    match ip {
        IpAddr::V4(ip) => {
            let arp = key.arp?;
            let mut made = Made::new(key.src, mac, ethertype::ARP);
            made.put(&[0, 1, 8, 0, 6, 4, 0, 2]);
            made.put(&mac.0);
            made.put(&ip.octets());
            made.put(&arp.sender.0.0);
            made.put(&arp.sender.1.octets());
            Some(made.done())
        }
        IpAddr::V6(ip) => {
            let (IpAddr::V6(from), _) = key.ip? else {
                return None;
            };
            // Who only wants to know whether an address is taken has none,
            // and listens to all (RFC 4861, 7.2.4).
            let probe = from.is_unspecified();
            let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            let (to, dst) = match probe {
                true => (all, Mac([0x33, 0x33, 0, 0, 0, 1])),
                false => (from, key.src),
            };
            let mut made = Made::new(dst, mac, ethertype::IPV6);
            made.icmp6(ip, to);
            // Solicited, overrides what was known.
            made.put(&[136, 0, 0, 0, if probe { 0x20 } else { 0x60 }, 0, 0, 0]);
            made.put(&ip.octets());
            made.put(&[2, 1]);
            made.put(&mac.0);
            Some(made.icmp6_done())
        }
    }
}

/// Word for a frame's sender that its packet is longer than `mtu`, as if from
/// the one it was sent to: the bridge has no address, and this one is reached.
/// `None` where nobody may be told (RFC 1122, 3.2.2; RFC 4443, 2.4).
pub(super) fn too_big(key: &Key, layers: &Layers, head: &[u8], mtu: usize) -> Option<Head> {
    if key.dst.is_multicast() || key.fragment == Some(true) {
        return None;
    }
    let packet = head.get(layers.network..)?;
    match key.ip? {
        (IpAddr::V4(from), IpAddr::V4(to)) if key.ethertype == ethertype::IPV4 => {
            let error = matches!(key.ports, Some((3 | 4 | 5 | 11 | 12, _)));
            if !is_host4(from) || !is_host4(to) || (key.protocol == protocol::ICMP && error) {
                return None;
            }
            Some(frag_needed(key, from, to, packet, mtu))
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let error = matches!(key.ports, Some((0..=127, _)));
            let host = |ip: Ipv6Addr| !ip.is_multicast() && !ip.is_unspecified();
            if !host(from) || !host(to) || (key.protocol == protocol::ICMPV6 && error) {
                return None;
            }
            let mut made = Made::new(key.src, key.dst, ethertype::IPV6);
            made.icmp6(to, from);
            made.put(&[2, 0, 0, 0]);
            // All links of IPv6 take as much.
            made.put(&(mtu.max(1280) as u32).to_be_bytes());
            made.put(packet);
            Some(made.icmp6_done())
        }
        _ => None,
    }
}

fn is_host4(ip: Ipv4Addr) -> bool {
    !ip.is_multicast() && !ip.is_broadcast() && !ip.is_unspecified()
}

fn frag_needed(key: &Key, from: Ipv4Addr, to: Ipv4Addr, packet: &[u8], mtu: usize) -> Head {
    let mut made = Made::new(key.src, key.dst, ethertype::IPV4);
    made.put(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol::ICMP, 0, 0]);
    made.put(&to.octets());
    made.put(&from.octets());
    made.put(&[3, 4, 0, 0, 0, 0]);
    made.put(&(mtu.clamp(68, 0xffff) as u16).to_be_bytes());
    made.put(packet);
    made.set(16, (made.len - 14) as u16);
    made.set(24, fold(sum(&made.bytes[14..34])));
    made.set(36, fold(sum(&made.bytes[34..made.len])));
    made.done()
}

/// Makes the MSS option of a SYN fit `mtu`. Its checksum follows, unless it
/// is still to be computed (`partial`): then the option is not in it yet.
/// Whether it changed.
pub(super) fn clamp(
    key: &Key,
    layers: &Layers,
    head: &mut [u8],
    mtu: usize,
    partial: bool,
) -> bool {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    if key.protocol != protocol::TCP || key.tcp_flags & (SYN | RST) != SYN {
        return false;
    }
    if key.fragment.is_some() || layers.payload == 0 {
        return false;
    }
    let headers = if key.ethertype == ethertype::IPV6 {
        60
    } else {
        40
    };
    let Ok(most) = u16::try_from(mtu.saturating_sub(headers)) else {
        return false;
    };
    let end = layers.payload.min(head.len());
    let (tcp, mut at) = (layers.transport, layers.transport + 20);
    while at < end {
        let len = match head[at] {
            0 => return false,
            1 => 1,
            _ => match head[..end].get(at + 1) {
                Some(len @ 2..) => usize::from(*len),
                _ => return false,
            },
        };
        if head[at] == 2 && len == 4 && at + 4 <= end {
            return clamp_option(head, tcp, at + 2, most, partial);
        }
        at += len;
    }
    false
}

fn clamp_option(head: &mut [u8], tcp: usize, at: usize, most: u16, partial: bool) -> bool {
    let word = |head: &[u8], at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    let was = word(head, at);
    if was <= most {
        return false;
    }
    head[at..at + 2].copy_from_slice(&most.to_be_bytes());
    if !partial {
        let mut checksum = word(head, tcp + 16);
        if (at - tcp) & 1 == 0 {
            checksum = changed(checksum, was, most);
        } else {
            // The option lies across two words: each byte counts in the other
            // half.
            checksum = changed(checksum, was.swap_bytes(), most.swap_bytes());
        }
        head[tcp + 16..tcp + 18].copy_from_slice(&checksum.to_be_bytes());
    }
    true
}
