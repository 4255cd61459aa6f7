//! What a frame is to connections.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::frame::key::protocol;
use crate::frame::{Key, Layers};

pub(super) const SYN: u8 = 2;
pub(super) const FIN: u8 = 1;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

/// Who talks to whom: a frame's direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tuple {
    /// From where.
    pub src: IpAddr,
    /// To where.
    pub dst: IpAddr,
    /// IP's protocol.
    pub protocol: u8,
    /// Source and destination port; of an ICMP query its identifier, twice.
    pub ports: (u16, u16),
    /// Fragments without ports.
    pub fragments: bool,
}

impl Tuple {
    /// The other direction.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            ports: (self.ports.1, self.ports.0),
            ..self
        }
    }

    pub(super) fn is_ordered(&self) -> bool {
        (self.src, self.ports.0) <= (self.dst, self.ports.1)
    }
}

/// What a frame can be to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A part of it, which may begin it.
    Opens(Tuple),
    /// A part of it, which may not.
    Within(Tuple),
    /// An error about it; as the frame was sent that it is about.
    About(Tuple),
    /// Nothing.
    None,
}

fn ports_at(bytes: &[u8], at: usize) -> Option<(u16, u16)> {
    let four: &[u8; 4] = bytes.get(at..)?.first_chunk()?;
    let [a, b, c, d] = *four;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

/// What an ICMP message is: an error, a request, an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Message {
    Error,
    Request,
    Answer,
    Other,
}

fn message(proto: u8, kind: u8) -> Message {
    match (proto, kind) {
        // Not redirects: they change where frames go.
        (protocol::ICMP, 3 | 11 | 12) | (protocol::ICMPV6, 1..=4) => Message::Error,
        (protocol::ICMP, 8 | 13 | 17) | (protocol::ICMPV6, 128) => Message::Request,
        (protocol::ICMP, 0 | 14 | 18) | (protocol::ICMPV6, 129) => Message::Answer,
        _ => Message::Other,
    }
}

pub(super) fn kind_of(key: &Key, layers: Layers, head: &[u8]) -> Kind {
    let Some((src, dst)) = key.ip else {
        return Kind::None;
    };
    let mut tuple = Tuple {
        src,
        dst,
        protocol: key.protocol,
        ports: (0, 0),
        fragments: key.fragment == Some(true),
    };
    if key.arp.is_some() {
        return Kind::None;
    }
    if tuple.fragments {
        return Kind::Within(tuple);
    }
    match (key.protocol, key.ports) {
        (protocol::ICMP | protocol::ICMPV6, Some((kind, _))) => {
            let body = layers.transport + 4;
            match message(key.protocol, kind as u8) {
                Message::Error => match inner(head, body + 4) {
                    // It must go to whom it is about.
                    Some(about) if about.src == dst => Kind::About(about),
                    _ => Kind::None,
                },
                Message::Other => Kind::None,
                query => {
                    let Some((id, _)) = ports_at(head, body) else {
                        return Kind::None;
                    };
                    tuple.ports = (id, id);
                    if query == Message::Request {
                        Kind::Opens(tuple)
                    } else {
                        Kind::Within(tuple)
                    }
                }
            }
        }
        (protocol::TCP, Some(ports)) => {
            tuple.ports = ports;
            if key.tcp_flags & (SYN | ACK | RST | FIN) == SYN {
                Kind::Opens(tuple)
            } else {
                Kind::Within(tuple)
            }
        }
        (_, ports) => {
            tuple.ports = ports.unwrap_or_default();
            Kind::Opens(tuple)
        }
    }
}

/// Reads the packet that an ICMP error quotes.
fn inner(head: &[u8], at: usize) -> Option<Tuple> {
    let bytes = head.get(at..)?;
    let (src, dst, proto, ports_from): (IpAddr, IpAddr, u8, usize) = match bytes.first()? >> 4 {
        4 => {
            let ip: &[u8; 20] = bytes.first_chunk()?;
            let word = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
            // A later fragment has no ports.
            if (ip[6] & 0x1f, ip[7]) != (0, 0) {
                return None;
            }
            let len = usize::from(ip[0] & 0xf) * 4;
            (word(12).into(), word(16).into(), ip[9], len)
        }
        6 => {
            let ip: &[u8; 40] = bytes.first_chunk()?;
            let address = |at: usize| {
                let octets: Option<[u8; 16]> = ip.get(at..at + 16)?.try_into().ok();
                octets.map(Ipv6Addr::from)
            };
            (address(8)?.into(), address(24)?.into(), ip[6], 40)
        }
        _ => return None,
    };
    let ports = match proto {
        protocol::TCP | protocol::UDP | protocol::SCTP => ports_at(bytes, ports_from)?,
        protocol::ICMP | protocol::ICMPV6 => {
            let (id, _) = ports_at(bytes, ports_from + 4)?;
            (id, id)
        }
        _ => (0, 0),
    };
    Some(Tuple {
        src,
        dst,
        protocol: proto,
        ports,
        fragments: false,
    })
}
