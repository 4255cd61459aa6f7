//! Fields on the wire: OpenFlow's own, and those of Open vSwitch that it lacks.

use super::error::{Code, Wrong};
use super::wire::{Put, Reader};
use crate::flow::fields::{Field, Needs};
use crate::flow::matches::Match;

const BASIC: u16 = 0x8000;
const NXM0: u16 = 0;
const NXM1: u16 = 1;
const EXPERIMENTER: u16 = 0xffff;
/// The Open Networking Foundation's number.
const ONF: u32 = 0x4f4e_4600;

/// Class, number, bytes of the value, field.
const FIELDS: [(u16, u8, u8, Field); 50] = [
    (BASIC, 0, 4, Field::InPort),
    (BASIC, 2, 8, Field::Metadata),
    (BASIC, 3, 6, Field::EthDst),
    (BASIC, 4, 6, Field::EthSrc),
    (BASIC, 5, 2, Field::EthType),
    (BASIC, 6, 2, Field::VlanVid),
    (BASIC, 7, 1, Field::VlanPcp),
    (BASIC, 10, 1, Field::IpProto),
    (BASIC, 8, 1, Field::IpDscp),
    (BASIC, 9, 1, Field::IpEcn),
    (BASIC, 11, 4, Field::Ipv4Src),
    (BASIC, 12, 4, Field::Ipv4Dst),
    (BASIC, 13, 2, Field::TcpSrc),
    (BASIC, 14, 2, Field::TcpDst),
    (BASIC, 15, 2, Field::UdpSrc),
    (BASIC, 16, 2, Field::UdpDst),
    (BASIC, 17, 2, Field::SctpSrc),
    (BASIC, 18, 2, Field::SctpDst),
    (BASIC, 19, 1, Field::IcmpType),
    (BASIC, 20, 1, Field::IcmpCode),
    (BASIC, 21, 2, Field::ArpOp),
    (BASIC, 22, 4, Field::ArpSpa),
    (BASIC, 23, 4, Field::ArpTpa),
    (BASIC, 24, 6, Field::ArpSha),
    (BASIC, 25, 6, Field::ArpTha),
    (BASIC, 26, 16, Field::Ipv6Src),
    (BASIC, 27, 16, Field::Ipv6Dst),
    (BASIC, 29, 1, Field::Icmp6Type),
    (BASIC, 30, 1, Field::Icmp6Code),
    (BASIC, 31, 16, Field::NdTarget),
    (BASIC, 38, 8, Field::Vni),
    (NXM1, 26, 1, Field::Fragment),
    (NXM1, 29, 1, Field::Ttl),
    (NXM1, 34, 2, Field::TcpFlags),
    (NXM1, 105, 4, Field::CtState),
    (NXM0, 4, 2, Field::VlanTci),
    (BASIC, 42, 2, Field::TcpFlags),
    (NXM1, 16, 8, Field::Vni),
    // Open vSwitch's older numbers of OpenFlow's fields.
    (NXM0, 1, 6, Field::EthDst),
    (NXM0, 2, 6, Field::EthSrc),
    (NXM0, 7, 4, Field::Ipv4Src),
    (NXM0, 8, 4, Field::Ipv4Dst),
    (NXM0, 9, 2, Field::TcpSrc),
    (NXM0, 10, 2, Field::TcpDst),
    (NXM0, 11, 2, Field::UdpSrc),
    (NXM0, 12, 2, Field::UdpDst),
    (NXM0, 16, 4, Field::ArpSpa),
    (NXM0, 17, 4, Field::ArpTpa),
    (NXM1, 17, 6, Field::ArpSha),
    (NXM1, 18, 6, Field::ArpTha),
];

fn number(bytes: &[u8]) -> u128 {
    bytes
        .iter()
        .fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

/// A field with its value and mask.
pub(super) struct Oxm {
    pub(super) field: Field,
    pub(super) value: u128,
    /// None: all bits.
    pub(super) mask: Option<u128>,
}

/// Reads a field; `bad` is what an unknown one is, `length` one that is cut off.
pub(super) fn read(reader: &mut Reader<'_>, bad: Wrong, length: Wrong) -> Result<Oxm, Wrong> {
    let mut header = || -> Result<_, Wrong> {
        let (class, kind, len) = (reader.u16()?, reader.u8()?, reader.u8()?);
        Ok((class, kind, reader.take(len.into())?))
    };
    let (mut class, kind, mut body) = header().map_err(|_| length)?;
    if class == EXPERIMENTER {
        let (id, rest) = body.split_first_chunk().ok_or(length)?;
        if u32::from_be_bytes(*id) != ONF {
            return Err(bad);
        }
        (class, body) = (BASIC, rest);
    }
    let (id, masked) = (kind >> 1, kind & 1 == 1);
    let known = FIELDS
        .iter()
        .find(|(of, number, ..)| *of == class && *number == id);
    let (_, _, width, field) = known.ok_or(bad)?;
    let width = usize::from(*width);
    if body.len() != if masked { 2 * width } else { width } {
        return Err(length);
    }
    let (value, mask) = body.split_at(width);
    Ok(Oxm {
        field: *field,
        value: number(value),
        mask: masked.then(|| number(mask)),
    })
}

/// Writes a field.
pub(super) fn write(to: &mut Vec<u8>, field: Field, value: u128, mask: u128) {
    let Some((class, id, width, _)) = FIELDS.iter().find(|(.., known)| *known == field) else {
        return;
    };
    let whole = mask == field.all();
    let width = usize::from(*width);
    let size = if whole { width } else { 2 * width };
    to.u16(*class).u8(id << 1 | u8::from(!whole)).u8(size as u8);
    to.bytes(&value.to_be_bytes()[16 - width..]);
    if !whole {
        to.bytes(&mask.to_be_bytes()[16 - width..]);
    }
}

/// Writes the headers of OpenFlow's own fields, which tell what is known.
pub(super) fn write_headers(to: &mut Vec<u8>, which: impl Fn(Field) -> bool, masks: bool) {
    for (class, id, width, field) in FIELDS {
        if class != BASIC || id > 39 || !which(field) {
            continue;
        }
        let masked = masks && field.is_maskable();
        to.u16(class).u8(id << 1 | u8::from(masked));
        to.u8(if masked { 2 * width } else { width });
    }
}

/// The field that a header alone names.
pub(super) fn named(header: u32) -> Option<Field> {
    let [class @ .., kind, _] = header.to_be_bytes();
    let (class, id) = (u16::from_be_bytes(class), kind >> 1);
    let known = FIELDS
        .iter()
        .find(|(of, number, ..)| *of == class && *number == id);
    known.map(|(.., field)| *field)
}

/// Reads a match with its padding.
pub(super) fn read_match(reader: &mut Reader<'_>) -> Result<Match, Wrong> {
    let (kind, len) = (reader.u16()?, usize::from(reader.u16()?));
    if kind != 1 {
        return Err(Code::MATCH_TYPE);
    }
    let body = len.checked_sub(4).ok_or(Code::MATCH_LENGTH)?;
    let mut fields = Reader(reader.take(body).map_err(|_| Code::MATCH_LENGTH)?);
    let padding = len.next_multiple_of(8) - len;
    reader.skip(padding).map_err(|_| Code::MATCH_LENGTH)?;
    let mut matches = Match::any();
    while !fields.is_empty() {
        let oxm = read(&mut fields, Code::FIELD, Code::MATCH_LENGTH)?;
        let all = oxm.field.all();
        // Fields whose values are wider on the wire than here.
        let mask = match oxm.mask {
            None => all,
            Some(mask) => {
                if oxm.value & !mask != 0 {
                    return Err(Code::WILDCARDS);
                }
                mask & all
            }
        };
        matches.set(oxm.field, oxm.value, mask)?;
    }
    Ok(matches)
}

/// Writes a match with its padding.
pub(super) fn write_match(to: &mut Vec<u8>, matches: &Match) {
    let start = to.len();
    to.u16(1).u16(0);
    let first = [Field::InPort, Field::EthType, Field::IpProto];
    for field in first {
        if let Some((value, mask)) = matches.get(field) {
            write(to, field, value, mask);
        }
    }
    vlan(to, matches);
    let mut done: Vec<Field> = Vec::new();
    for (.., field) in FIELDS {
        let tag = matches!(field, Field::VlanVid | Field::VlanPcp | Field::VlanTci);
        if tag || first.contains(&field) || done.contains(&field) {
            continue;
        }
        done.push(field);
        if let Some((value, mask)) = matches.get(field) {
            write(to, field, value, mask);
        }
    }
    to.length(start, 2).align(start);
}

fn vlan(to: &mut Vec<u8>, matches: &Match) {
    let Some((value, mask)) = matches.get(Field::VlanTci) else {
        return;
    };
    let (vid, priority) = (mask & 0x1fff, mask >> 13);
    let pcp = priority == 0 || priority == 7 && matches.has(Needs::Vlan);
    if vid != 0 && pcp {
        write(to, Field::VlanVid, value & vid, vid);
        if priority == 7 {
            write(to, Field::VlanPcp, value >> 13, 7);
        }
    } else {
        write(to, Field::VlanTci, value, mask);
    }
}
