//! What IGMP and MLD say (RFC 1112, 2236, 3376; 2710, 3810).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::key::{ethertype, protocol};
use crate::frame::{Key, Layers};

/// One statement of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// The sender asks who listens: it is a querier.
    Query,
    /// The sender listens.
    Join(IpAddr),
    /// The sender does not listen any more.
    Leave(IpAddr),
}

/// Bytes of a message that are looked at: a frame of the usual size.
pub(super) const MESSAGE: usize = 1500;
/// Records of one report that are looked at.
const RECORDS: usize = 128;

/// Whether the frame is one that [`read`] reads.
pub(super) fn is_message(key: &Key) -> bool {
    match key.ethertype {
        ethertype::IPV4 => key.protocol == protocol::IGMP && key.fragment.is_none(),
        ethertype::IPV6 => {
            key.protocol == protocol::ICMPV6
                && key.fragment.is_none()
                && matches!(key.ports, Some((130..=132 | 143, _)))
        }
        _ => false,
    }
}

fn v4(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    let group = Ipv4Addr::from(octets);
    group.is_multicast().then_some(IpAddr::V4(group))
}

fn v6(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    let group = Ipv6Addr::from(octets);
    group.is_multicast().then_some(IpAddr::V6(group))
}

/// Reads a message that begins with `bytes`, and hands its statements on.
/// What is cut off or is no group address is not heard.
pub(super) fn read(key: &Key, layers: &Layers, frame: &[u8], mut each: impl FnMut(Word)) {
    let bytes = frame.get(layers.transport..).unwrap_or_default();
    let six = key.ethertype == ethertype::IPV6;
    let group = if six { v6(bytes, 8) } else { v4(bytes, 4) };
    let router = key.ip.is_some_and(|(from, _)| !from.is_unspecified());
    match (six, bytes.first()) {
        // A router sends queries from its own address; a proxy that only
        // snoops sends them from none, and is no router (RFC 4541, 2.1.1).
        (false, Some(0x11)) | (true, Some(130)) if router => each(Word::Query),
        (false, Some(0x12 | 0x16)) | (true, Some(131)) => group.map(Word::Join).map_or((), each),
        (false, Some(0x17)) | (true, Some(132)) => group.map(Word::Leave).map_or((), each),
        (false, Some(0x22)) => records(bytes, 4, v4, each),
        (true, Some(143)) => records(bytes, 16, v6, each),
        _ => {}
    }
}

fn records(
    bytes: &[u8],
    size: usize,
    group: impl Fn(&[u8], usize) -> Option<IpAddr>,
    mut each: impl FnMut(Word),
) {
    let word = |at: usize| {
        let pair: [u8; 2] = bytes.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_be_bytes(pair)))
    };
    let count = word(6).unwrap_or(0).min(RECORDS);
    let mut at = 8;
    for _ in 0..count {
        let (Some(kind), Some(sources)) = (bytes.get(at), word(at + 2)) else {
            return;
        };
        if let Some(group) = group(bytes, at + 4) {
            // Only these sources (1, 3), all but these (2, 4), these too (5),
            // these not (6). Sources are not told apart.
            match (kind, sources) {
                (1 | 3, 0) => each(Word::Leave(group)),
                (1..=5, _) => each(Word::Join(group)),
                _ => {}
            }
        }
        let more = usize::from(bytes.get(at + 1).copied().unwrap_or(0)) * 4;
        at += 4 + size + sources * size + more;
    }
}
