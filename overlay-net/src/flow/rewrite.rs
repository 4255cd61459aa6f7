//! Changing a frame's headers, with their checksums: those that are computed
//! incrementally (RFC 1624), those that are left to be computed by the sum of
//! the pseudo header that is in their place.

use super::fields::{Field, mac_of};
use crate::drops::Reason;
use crate::frame::key::{ethertype, protocol};
use crate::frame::{Frame, Key, Layers};

/// The bytes of a field in a frame, and which checksums are over them.
struct Place {
    at: usize,
    len: usize,
    /// IPv4's header checksum is over it.
    header: bool,
    /// The transport's checksum is, as it is over the transport's bytes, or
    /// only by its pseudo header.
    transport: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Pseudo,
    Own,
}

/// Where a field that is in IP or behind it lies; none: the frame has none.
fn place(field: Field, key: &Key, layers: Layers) -> Option<Place> {
    let is = |kind: u16| key.ethertype == kind;
    let (v4, v6) = (is(ethertype::IPV4), is(ethertype::IPV6));
    let arp = key.arp.is_some();
    let network = |at: usize, len: usize, transport| Place {
        at: layers.network + at,
        len,
        header: v4,
        transport,
    };
    let pseudo = Some(Part::Pseudo);
    let own = |wanted: bool, at: usize, len: usize| {
        (wanted && key.ports.is_some()).then_some(Place {
            at: layers.transport + at,
            len,
            header: false,
            transport: Some(Part::Own),
        })
    };
    let over = |proto: u8| key.protocol == proto && (v4 || v6);
    match field {
        Field::Ipv4Src => v4.then(|| network(12, 4, pseudo)),
        Field::Ipv4Dst => v4.then(|| network(16, 4, pseudo)),
        Field::Ipv6Src => v6.then(|| network(8, 16, pseudo)),
        Field::Ipv6Dst => v6.then(|| network(24, 16, pseudo)),
        // Checksums are over pairs of bytes: the one before comes, too.
        Field::IpDscp | Field::IpEcn if v4 || v6 => Some(network(0, 2, None)),
        Field::Ttl if v4 => Some(network(8, 2, None)),
        Field::Ttl if v6 => Some(network(6, 2, None)),
        Field::ArpOp => arp.then(|| network(6, 2, None)),
        Field::ArpSha => arp.then(|| network(8, 6, None)),
        Field::ArpSpa => arp.then(|| network(14, 4, None)),
        Field::ArpTha => arp.then(|| network(18, 6, None)),
        Field::ArpTpa => arp.then(|| network(24, 4, None)),
        Field::TcpSrc => own(over(protocol::TCP), 0, 2),
        Field::TcpDst => own(over(protocol::TCP), 2, 2),
        Field::UdpSrc => own(over(protocol::UDP), 0, 2),
        Field::UdpDst => own(over(protocol::UDP), 2, 2),
        Field::IcmpType | Field::IcmpCode => own(v4 && over(protocol::ICMP), 0, 2),
        Field::Icmp6Type | Field::Icmp6Code => own(v6 && over(protocol::ICMPV6), 0, 2),
        Field::NdTarget => own(key.nd_target.is_some(), 8, 16),
        _ => None,
    }
}

/// A field's bits within its place.
fn shift(field: Field, key: &Key) -> u32 {
    let v6 = key.ethertype == ethertype::IPV6;
    match field {
        Field::IpDscp => 2 + if v6 { 4 } else { 0 },
        Field::IpEcn if v6 => 4,
        Field::Ttl if !v6 => 8,
        Field::IcmpType | Field::Icmp6Type => 8,
        _ => 0,
    }
}

/// Sets the bits of a field that are in `mask`. A frame that does not have the
/// field stays as it is, but for a VLAN, which is put in.
///
/// # Errors
///
/// The frame must be dropped: it has no room for a tag, or what is to be
/// changed is not in its head.
pub(super) fn set(
    frame: &mut Frame<'_>,
    key: &Key,
    layers: Layers,
    field: Field,
    value: u128,
    mask: u128,
) -> Result<(), Reason> {
    match field {
        Field::EthDst => ethernet(frame, 0, value, mask),
        Field::EthSrc => ethernet(frame, 6, value, mask),
        Field::VlanVid => tag(frame, key, value as u16, mask as u16 & 0xfff),
        Field::VlanPcp => tag(frame, key, (value as u16) << 13, (mask as u16) << 13),
        _ => match place(field, key, layers) {
            Some(place) => {
                let shift = shift(field, key);
                change(frame, key, layers, &place, value << shift, mask << shift)
            }
            None => Ok(()),
        },
    }
}

fn ethernet(frame: &mut Frame<'_>, at: usize, value: u128, mask: u128) -> Result<(), Reason> {
    let bytes = frame.head.bytes_mut().get_mut(at..at + 6);
    let bytes = bytes.ok_or(Reason::Rewrite)?;
    for ((byte, value), mask) in bytes.iter_mut().zip(mac_of(value).0).zip(mac_of(mask).0) {
        *byte = (*byte & !mask) | (value & mask);
    }
    Ok(())
}

fn tag(frame: &mut Frame<'_>, key: &Key, value: u16, mask: u16) -> Result<(), Reason> {
    if key.tags[0].is_none() {
        return push_tag(frame, ethertype::VLAN, value & mask);
    }
    let bytes = frame.head.bytes_mut().get_mut(14..16);
    let bytes = bytes.ok_or(Reason::Rewrite)?;
    let tci = u16::from_be_bytes([bytes[0], bytes[1]]);
    bytes.copy_from_slice(&((tci & !mask) | (value & mask)).to_be_bytes());
    Ok(())
}

/// Puts a tag in front.
///
/// # Errors
///
/// There is no room for it.
pub(super) fn push_tag(frame: &mut Frame<'_>, tpid: u16, tci: u16) -> Result<(), Reason> {
    let moved = frame.offload.moved(4).ok_or(Reason::Rewrite)?;
    let [a, b] = tpid.to_be_bytes();
    let [c, d] = tci.to_be_bytes();
    if !frame.head.insert(12, [a, b, c, d]) {
        return Err(Reason::Rewrite);
    }
    frame.offload = moved;
    Ok(())
}

/// Takes the outer tag away, which must be there.
///
/// # Errors
///
/// It is not there.
pub(super) fn pop_tag(frame: &mut Frame<'_>) -> Result<(), Reason> {
    let moved = frame.offload.moved(-4).ok_or(Reason::Rewrite)?;
    if !frame.head.remove(12, 4) {
        return Err(Reason::Rewrite);
    }
    frame.offload = moved;
    Ok(())
}

/// The sum of 16-bit words in ones' complement, not folded.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn change(
    frame: &mut Frame<'_>,
    key: &Key,
    layers: Layers,
    place: &Place,
    value: u128,
    mask: u128,
) -> Result<(), Reason> {
    let bytes = frame
        .head
        .bytes_mut()
        .get_mut(place.at..place.at + place.len);
    let bytes = bytes.ok_or(Reason::Rewrite)?;
    let skip = 16 - place.len;
    let (value, mask) = (value.to_be_bytes(), mask.to_be_bytes());
    let mut difference = 0;
    // Words of 16 bits: what goes is taken off by adding its complement.
    for at in (0..place.len).step_by(2) {
        let old = [bytes[at], bytes[at + 1]];
        for (byte, at) in bytes[at..at + 2].iter_mut().zip(skip + at..) {
            *byte = (*byte & !mask[at]) | (value[at] & mask[at]);
        }
        difference += sum(&bytes[at..at + 2]) + (!sum(&old) & 0xffff);
    }
    let difference = folded(difference);
    if place.header {
        let at = layers.network + 10;
        add(frame.head.bytes_mut(), at, difference, false)?;
    }
    match place.transport {
        Some(part) => transport(frame, key, layers, part, difference),
        None => Ok(()),
    }
}

/// Where the transport's checksum is, from its header's start, and whether it
/// is over a pseudo header.
fn checksum_of(key: &Key) -> Option<(usize, bool)> {
    match key.protocol {
        protocol::TCP => Some((16, true)),
        protocol::UDP => Some((6, true)),
        protocol::ICMP => Some((2, false)),
        protocol::ICMPV6 => Some((2, true)),
        _ => None,
    }
}

fn transport(
    frame: &mut Frame<'_>,
    key: &Key,
    layers: Layers,
    part: Part,
    difference: u16,
) -> Result<(), Reason> {
    // The checksum of a datagram in fragments is in the first.
    if key.fragment == Some(true) {
        return Ok(());
    }
    let Some((offset, pseudo)) = checksum_of(key) else {
        return Ok(());
    };
    if part == Part::Pseudo && !pseudo {
        return Ok(());
    }
    let left = frame.offload.checksum.is_some_and(|left| {
        usize::from(left.start) == layers.transport && usize::from(left.offset) == offset
    });
    let at = layers.transport + offset;
    let bytes = frame.head.bytes_mut();
    match (left, part) {
        // Whoever computes it adds what is there by then.
        (true, Part::Own) => Ok(()),
        (true, Part::Pseudo) => add(bytes, at, !difference, false).map(|_| ()),
        (false, _) => {
            let udp = key.protocol == protocol::UDP;
            let none = bytes.get(at..at + 2).ok_or(Reason::Rewrite)? == [0, 0];
            if udp && none {
                return Ok(());
            }
            add(bytes, at, difference, udp)
        }
    }
}

/// Changes the checksum at `at` by what the words it is over have changed by;
/// `never_zero`: 0 means that there is none.
fn add(bytes: &mut [u8], at: usize, difference: u16, never_zero: bool) -> Result<(), Reason> {
    let bytes = bytes.get_mut(at..at + 2).ok_or(Reason::Rewrite)?;
    let old = u16::from_be_bytes([bytes[0], bytes[1]]);
    let mut new = !folded(u32::from(!old) + u32::from(difference));
    if never_zero && new == 0 {
        new = 0xffff;
    }
    bytes.copy_from_slice(&new.to_be_bytes());
    Ok(())
}
