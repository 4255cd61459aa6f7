//! A frame in a line, as tcpdump's users know it.

use std::fmt::Write;
use std::net::IpAddr;

use crate::frame::key::{ethertype, protocol};
use crate::frame::{Key, Layers, PortId, Vni, parse};

/// TCP's flags as tcpdump writes them.
const FLAGS: [(u8, char); 8] = [
    (1, 'F'),
    (2, 'S'),
    (4, 'R'),
    (8, 'P'),
    (16, '.'),
    (32, 'U'),
    (64, 'E'),
    (128, 'W'),
];

/// Describes a frame of `len` bytes by its first ones.
#[must_use]
pub fn describe(bytes: &[u8], len: usize) -> String {
    let parsed = parse(bytes, len, PortId::default(), Vni::default());
    let Ok((key, layers)) = parsed else {
        return format!("malformed, length {len}");
    };
    let mut text = String::new();
    for tag in key.tags.iter().flatten() {
        let _ = write!(text, "vlan {}, ", tag.vid());
    }
    match key.ip {
        _ if key.arp.is_some() => arp(&mut text, &key),
        Some((from, to)) => ip(&mut text, &key, &layers, bytes, len, (from, to)),
        None => {
            let (src, dst, kind) = (key.src, key.dst, key.ethertype);
            let _ = write!(text, "{src} > {dst}, ethertype 0x{kind:04x}, length {len}");
        }
    }
    text
}

fn arp(text: &mut String, key: &Key) {
    let Some(arp) = key.arp else { return };
    let _ = match (key.ethertype, arp.op) {
        (ethertype::ARP, 1) => {
            write!(text, "ARP, who-has {} tell {}", arp.target.1, arp.sender.1)
        }
        (ethertype::ARP, 2) => write!(text, "ARP, {} is-at {}", arp.sender.1, arp.sender.0),
        (ethertype::ARP, op) => write!(text, "ARP, operation {op}"),
        (_, op) => write!(text, "RARP, operation {op}, of {}", arp.target.0),
    };
}

fn ip(
    text: &mut String,
    key: &Key,
    layers: &Layers,
    bytes: &[u8],
    len: usize,
    (from, to): (IpAddr, IpAddr),
) {
    let name = if key.ethertype == ethertype::IPV6 {
        "IP6"
    } else {
        "IP"
    };
    let icmp = matches!(key.protocol, protocol::ICMP | protocol::ICMPV6);
    let _ = match key.ports.filter(|_| !icmp) {
        Some((source, port)) => write!(text, "{name} {from}.{source} > {to}.{port}: "),
        None => write!(text, "{name} {from} > {to}: "),
    };
    if key.fragment == Some(true) {
        let _ = write!(text, "fragment, protocol {}", key.protocol);
        return;
    }
    // Of what an IP packet says of itself, not what pads a short frame.
    let word = |at: usize| {
        let word = bytes.get(at..)?.first_chunk()?;
        Some(u16::from_be_bytes(*word))
    };
    let network = layers.network;
    let total = match key.ethertype {
        ethertype::IPV6 => word(network + 4).map(|len| network + 40 + usize::from(len)),
        _ => word(network + 2).map(|len| network + usize::from(len)),
    };
    // What is to be segmented may be longer than it can say.
    let end = total.filter(|end| *end > network && *end <= len && len <= 65_535);
    let end = end.unwrap_or(len);
    let payload = end.saturating_sub(layers.payload);
    let _ = match key.protocol {
        protocol::TCP => {
            let set = FLAGS.iter().filter(|(bit, _)| key.tcp_flags & bit != 0);
            let flags: String = set.map(|(_, letter)| *letter).collect();
            write!(text, "Flags [{flags}], length {payload}")
        }
        protocol::UDP => write!(text, "UDP, length {payload}"),
        protocol::ICMP | protocol::ICMPV6 => {
            return icmp_text(text, key, end.saturating_sub(layers.transport), |at| {
                word(layers.transport + at)
            });
        }
        other => {
            let len = end.saturating_sub(layers.transport);
            write!(text, "protocol {other}, length {len}")
        }
    };
}

fn icmp_text(text: &mut String, key: &Key, len: usize, word: impl Fn(usize) -> Option<u16>) {
    let (kind, code) = key.ports.unwrap_or_default();
    let name = match key.protocol {
        protocol::ICMP => "ICMP",
        _ => "ICMP6",
    };
    let echo = match (key.protocol, kind) {
        (protocol::ICMP, 8) | (protocol::ICMPV6, 128) => Some("request"),
        (protocol::ICMP, 0) | (protocol::ICMPV6, 129) => Some("reply"),
        _ => None,
    };
    let _ = match (echo, kind) {
        (Some(echo), _) => {
            let (id, seq) = (word(4).unwrap_or(0), word(6).unwrap_or(0));
            write!(text, "{name} echo {echo}, id {id}, seq {seq}, length {len}")
        }
        (None, 135) if key.nd_target.is_some() => {
            let target = key.nd_target.unwrap_or(std::net::Ipv6Addr::UNSPECIFIED);
            write!(text, "ICMP6, neighbor solicitation, who has {target}")
        }
        (None, 136) if key.nd_target.is_some() => {
            let target = key.nd_target.unwrap_or(std::net::Ipv6Addr::UNSPECIFIED);
            write!(text, "ICMP6, neighbor advertisement, tgt is {target}")
        }
        (None, 3) if code == 4 && key.protocol == protocol::ICMP => {
            let mtu = word(6).unwrap_or(0);
            write!(
                text,
                "ICMP unreachable, need to frag (mtu {mtu}), length {len}"
            )
        }
        _ => write!(text, "{name}, type {kind}, code {code}, length {len}"),
    };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::describe;

    fn ethernet(kind: u16) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        bytes.extend(kind.to_be_bytes());
        bytes
    }

    #[test]
    fn lines_are_as_tcpdump_writes_them() {
        let mut tcp = ethernet(0x800);
        tcp.extend([0x45, 0, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0]);
        tcp.extend([10, 0, 0, 1, 10, 0, 0, 2, 0x13, 0x88, 0, 80]);
        tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x12, 1, 0, 0, 0, 0, 0]);
        tcp.resize(60, 7);
        assert_eq!(
            describe(&tcp, tcp.len()),
            "IP 10.0.0.1.5000 > 10.0.0.2.80: Flags [S.], length 4"
        );
        let mut arp = ethernet(0x8100);
        arp.extend([0, 5, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1]);
        arp.extend([10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 9]);
        assert_eq!(
            describe(&arp, arp.len()),
            "vlan 5, ARP, who-has 10.0.0.9 tell 10.0.0.1"
        );
        let mut echo = ethernet(0x800);
        echo.extend([0x45, 0, 0, 84, 0, 0, 0x40, 0, 64, 1, 0, 0]);
        echo.extend([10, 0, 0, 1, 10, 0, 0, 2, 8, 0, 0, 0, 0, 3, 0, 4]);
        echo.resize(98, 0);
        assert_eq!(
            describe(&echo, 98),
            "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 3, seq 4, length 64"
        );
        assert_eq!(describe(&[0; 9], 9), "malformed, length 9");
        let mut other = ethernet(0x88b6);
        other.resize(60, 0);
        assert_eq!(
            describe(&other, 60),
            "02:00:00:00:00:01 > 02:00:00:00:00:02, ethertype 0x88b6, length 60"
        );
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes: Vec<u8>, len: u16) {
            prop_assert!(!describe(&bytes, usize::from(len)).is_empty());
        }
    }
}
