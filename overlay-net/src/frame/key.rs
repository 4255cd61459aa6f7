//! What a frame's headers say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;

use super::{Frame, Kind, Mac, PortId, Vni};

/// Ethertypes.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// RARP, which a hypervisor announces a moved guest with.
    pub const RARP: u16 = 0x8035;
    /// An 802.1Q tag.
    pub const VLAN: u16 = 0x8100;
    /// An 802.1ad tag: the outer one of two.
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocols.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// IGMP.
    pub const IGMP: u8 = 2;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// A VLAN tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Its ethertype: 802.1Q or 802.1ad.
    pub tpid: u16,
    /// Priority (3 bits), drop eligible (1), identifier (12).
    pub tci: u16,
}

impl Tag {
    /// The VLAN.
    #[must_use]
    pub fn vid(self) -> u16 {
        self.tci & 0xfff
    }

    /// The priority.
    #[must_use]
    pub fn priority(self) -> u8 {
        (self.tci >> 13) as u8
    }
}

/// An ARP packet for IPv4 over Ethernet (RFC 826).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arp {
    /// 1: who has, 2: is at.
    pub op: u16,
    /// The sender's addresses.
    pub sender: (Mac, Ipv4Addr),
    /// The target's addresses.
    pub target: (Mac, Ipv4Addr),
}

/// What a frame's headers say: everything that flows, groups and the bridge
/// match on. What a frame does not have is 0 or `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key {
    /// Where it came in.
    pub port: PortId,
    /// Its network.
    pub vni: Vni,
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// Tags, the outer first.
    pub tags: [Option<Tag>; 2],
    /// What follows the tags.
    pub ethertype: u16,
    /// IP source and destination; of ARP, those in it.
    pub ip: Option<(IpAddr, IpAddr)>,
    /// IP's protocol (after extension headers).
    pub protocol: u8,
    /// Differentiated services and congestion bits, as in the header.
    pub tos: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Whether it is a fragment, and whether a later one, which has no ports.
    pub fragment: Option<bool>,
    /// Source and destination port (TCP, UDP, SCTP), or type and code (ICMP).
    pub ports: Option<(u16, u16)>,
    /// TCP's flags: FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128.
    pub tcp_flags: u8,
    /// An ARP packet.
    pub arp: Option<Arp>,
    /// The target of a neighbour's solicitation or advertisement.
    pub nd_target: Option<Ipv6Addr>,
}

/// Where a frame's headers begin, in bytes from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layers {
    /// What follows the Ethernet header and tags.
    pub network: usize,
    /// What follows the IP header and its extensions; 0: there is no IP.
    pub transport: usize,
    /// The transport's payload (TCP, UDP); 0: there is none.
    pub payload: usize,
}

impl Layers {
    /// Bytes of the frame's packet, or of each that it will be cut into.
    #[must_use]
    pub fn packet(&self, frame: &Frame<'_>) -> usize {
        match frame.offload.segments {
            // Cut by IP into what fits.
            Some(segments) if segments.kind == Kind::Fragments => 0,
            Some(segments) if self.payload > self.network => {
                self.payload - self.network + usize::from(segments.size)
            }
            _ => frame.len().saturating_sub(self.network),
        }
    }
}

/// A frame that no station sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum Malformed {
    /// Its Ethernet header or a tag is cut off.
    #[error("cut off in its Ethernet header")]
    Ethernet,
    /// It is sent from a group address, or from none.
    #[error("from an address that no station has")]
    Source,
    /// An IP header is cut off, or contradicts itself.
    #[error("its IP header is cut off, or contradicts itself")]
    Ip,
    /// A TCP, UDP or ICMP header is cut off.
    #[error("its transport header is cut off")]
    Transport,
    /// An ARP packet is cut off.
    #[error("its ARP packet is cut off")]
    Arp,
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn mac(bytes: &[u8], at: usize) -> Option<Mac> {
    Some(Mac(bytes.get(at..at + 6)?.try_into().ok()?))
}

fn v4(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(octets.into())
}

fn v6(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(octets.into())
}

/// Reads the headers of a frame of `len` bytes that begins with `head`. Two
/// tags are read; behind a third, nothing is looked at (`ethertype` is the
/// tag's).
///
/// # Errors
///
/// See [`Malformed`]: a header that is cut off, by the frame's end or by the
/// head's, or that contradicts itself. Checksums are not looked at.
pub fn parse(head: &[u8], len: usize, port: PortId, vni: Vni) -> Result<(Key, Layers), Malformed> {
    let mut key = Key {
        port,
        vni,
        dst: mac(head, 0).ok_or(Malformed::Ethernet)?,
        src: mac(head, 6).ok_or(Malformed::Ethernet)?,
        ..Key::default()
    };
    if !key.src.is_station() {
        return Err(Malformed::Source);
    }
    let mut at = 12;
    let mut next = word(head, at).ok_or(Malformed::Ethernet)?;
    at += 2;
    for tag in &mut key.tags {
        if !matches!(next, ethertype::VLAN | ethertype::SERVICE_VLAN) {
            break;
        }
        let tci = word(head, at).ok_or(Malformed::Ethernet)?;
        *tag = Some(Tag { tpid: next, tci });
        next = word(head, at + 2).ok_or(Malformed::Ethernet)?;
        at += 4;
    }
    key.ethertype = next;
    let mut layers = Layers {
        network: at,
        ..Layers::default()
    };
    let rest = head.get(at..).unwrap_or_default();
    match next {
        ethertype::IPV4 => ipv4(rest, len - at, &mut key, &mut layers)?,
        ethertype::IPV6 => ipv6(rest, len - at, &mut key, &mut layers)?,
        ethertype::ARP | ethertype::RARP => {
            let arp = arp(rest).ok_or(Malformed::Arp)?;
            key.ip = Some((arp.sender.1.into(), arp.target.1.into()));
            key.arp = Some(arp);
        }
        _ => {}
    }
    Ok((key, layers))
}

fn arp(rest: &[u8]) -> Option<Arp> {
    // Ethernet, IPv4, and the lengths of their addresses.
    if rest.get(..6)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    Some(Arp {
        op: word(rest, 6)?,
        sender: (mac(rest, 8)?, v4(rest, 14)?),
        target: (mac(rest, 18)?, v4(rest, 24)?),
    })
}

fn ipv4(rest: &[u8], len: usize, key: &mut Key, layers: &mut Layers) -> Result<(), Malformed> {
    let fixed: &[u8; 20] = rest.first_chunk().ok_or(Malformed::Ip)?;
    let header = usize::from(fixed[0] & 0xf) * 4;
    let total = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
    // A large frame may say 0 (more than 16 bits) or what it is.
    if fixed[0] >> 4 != 4 || header < 20 || header > rest.len() || total > len {
        return Err(Malformed::Ip);
    }
    if total < header && total != 0 {
        return Err(Malformed::Ip);
    }
    let end = if total == 0 { len } else { total };
    key.tos = fixed[1];
    key.ttl = fixed[8];
    key.protocol = fixed[9];
    key.ip = v4(fixed, 12)
        .zip(v4(fixed, 16))
        .map(|(src, dst)| (src.into(), dst.into()));
    let fragment = u16::from_be_bytes([fixed[6], fixed[7]]);
    if fragment & 0x3fff != 0 {
        key.fragment = Some(fragment & 0x1fff != 0);
    }
    layers.transport = layers.network + header;
    transport(&rest[header..], end - header, key, layers)
}

/// Extension headers that are looked through; more are not sound.
const EXTENSIONS: usize = 8;

fn ipv6(rest: &[u8], len: usize, key: &mut Key, layers: &mut Layers) -> Result<(), Malformed> {
    let fixed: &[u8; 40] = rest.first_chunk().ok_or(Malformed::Ip)?;
    let payload = usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
    if fixed[0] >> 4 != 6 || payload + 40 > len {
        return Err(Malformed::Ip);
    }
    let end = if payload == 0 { len } else { 40 + payload };
    key.tos = (fixed[0] << 4) | (fixed[1] >> 4);
    key.ttl = fixed[7];
    key.ip = v6(fixed, 8)
        .zip(v6(fixed, 24))
        .map(|(src, dst)| (src.into(), dst.into()));
    let (mut at, mut next) = (40, fixed[6]);
    for _ in 0..EXTENSIONS {
        let size = match next {
            // Hop-by-hop, routing, destination options.
            0 | 43 | 60 => (usize::from(*rest.get(at + 1).ok_or(Malformed::Ip)?) + 1) * 8,
            // Authentication: in words of four bytes, less two.
            51 => (usize::from(*rest.get(at + 1).ok_or(Malformed::Ip)?) + 2) * 4,
            44 => {
                let offset = word(rest, at + 2).ok_or(Malformed::Ip)?;
                key.fragment = Some(offset & 0xfff8 != 0);
                8
            }
            _ => break,
        };
        next = *rest.get(at).ok_or(Malformed::Ip)?;
        at += size;
        if at > end || at > rest.len() {
            return Err(Malformed::Ip);
        }
        if key.fragment == Some(true) {
            break;
        }
    }
    key.protocol = next;
    layers.transport = layers.network + at;
    transport(&rest[at..], end - at, key, layers)
}

/// Reads the transport header in `rest`, which is the head's part of `len`
/// bytes.
fn transport(rest: &[u8], len: usize, key: &mut Key, layers: &mut Layers) -> Result<(), Malformed> {
    if key.fragment == Some(true) {
        return Ok(());
    }
    let rest = &rest[..rest.len().min(len)];
    let ports = || word(rest, 0).zip(word(rest, 2));
    let header = match key.protocol {
        protocol::TCP => {
            let offset = usize::from(*rest.get(12).ok_or(Malformed::Transport)? >> 4) * 4;
            if offset < 20 || offset > len {
                return Err(Malformed::Transport);
            }
            key.ports = ports();
            key.tcp_flags = *rest.get(13).ok_or(Malformed::Transport)?;
            offset
        }
        protocol::UDP => {
            key.ports = ports();
            8
        }
        protocol::SCTP => {
            key.ports = ports();
            12
        }
        protocol::ICMP => {
            let (kind, code) = rest.first().zip(rest.get(1)).ok_or(Malformed::Transport)?;
            key.ports = Some(((*kind).into(), (*code).into()));
            8
        }
        protocol::ICMPV6 => {
            let (kind, code) = rest.first().zip(rest.get(1)).ok_or(Malformed::Transport)?;
            key.ports = Some(((*kind).into(), (*code).into()));
            if matches!(kind, 135 | 136) {
                key.nd_target = Some(v6(rest, 8).ok_or(Malformed::Transport)?);
            }
            4
        }
        _ => return Ok(()),
    };
    if header > len {
        return Err(Malformed::Transport);
    }
    layers.payload = layers.transport + header;
    Ok(())
}
