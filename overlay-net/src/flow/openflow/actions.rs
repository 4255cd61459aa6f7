//! Actions and instructions on the wire.

use super::error::{Code, Wrong};
use super::oxm;
use super::wire::{Put, Reader};
use crate::flow::actions::Action;
use crate::flow::fields::{Field, TAGGED};
use crate::frame::PortId;

/// Ports that are none.
pub(super) mod port {
    pub(in super::super) const MAX: u32 = 0xffff_ff00;
    pub(in super::super) const IN_PORT: u32 = 0xffff_fff8;
    pub(in super::super) const TABLE: u32 = 0xffff_fff9;
    pub(in super::super) const NORMAL: u32 = 0xffff_fffa;
    pub(in super::super) const FLOOD: u32 = 0xffff_fffb;
    pub(in super::super) const ALL: u32 = 0xffff_fffc;
    pub(in super::super) const CONTROLLER: u32 = 0xffff_fffd;
    pub(in super::super) const ANY: u32 = 0xffff_ffff;
}

/// Open vSwitch's number.
const NICIRA: u32 = 0x2320;
const NX_RESUBMIT: u16 = 14;
const NX_LOAD_BITS: u16 = 7;
const NX_LOAD: u16 = 33;
const NX_CT: u16 = 35;

/// Reads a list of actions. `out` says that they are a packet's, which may be
/// sent through the tables.
pub(super) fn read(mut reader: Reader<'_>, out: bool) -> Result<Vec<Action>, Wrong> {
    let mut actions = Vec::new();
    while !reader.is_empty() {
        let (kind, body) = element(&mut reader, Code::ACTION_LENGTH)?;
        let action = one(kind, Reader(body), out);
        actions.push(action.map_err(|wrong| short(wrong, Code::ACTION_LENGTH))?);
    }
    Ok(actions)
}

fn short(wrong: Wrong, instead: Wrong) -> Wrong {
    if wrong == Code::LENGTH {
        instead
    } else {
        wrong
    }
}

/// Reads something's kind and length, and gives its body.
fn element<'a>(reader: &mut Reader<'a>, length: Wrong) -> Result<(u16, &'a [u8]), Wrong> {
    let mut header = || -> Result<_, Wrong> {
        let (kind, len) = (reader.u16()?, usize::from(reader.u16()?));
        if len < 8 || !len.is_multiple_of(8) {
            return Err(length);
        }
        Ok((kind, reader.take(len - 4)?))
    };
    header().map_err(|wrong| short(wrong, length))
}

fn one(kind: u16, mut body: Reader<'_>, out: bool) -> Result<Action, Wrong> {
    Ok(match kind {
        0 => {
            let (port, max_len) = (body.u32()?, body.u16()?);
            output(port, max_len, out)?
        }
        17 => Action::PushVlan(body.u16()?),
        18 => Action::PopVlan,
        22 => return Err(Code::GROUP),
        23 => Action::Set {
            field: Field::Ttl,
            value: body.u8()?.into(),
            mask: Field::Ttl.all(),
        },
        24 => Action::DecTtl,
        25 => set(&mut body, false)?,
        0xffff => experimenter(&mut body)?,
        _ => return Err(Code::ACTION_TYPE),
    })
}

fn output(to: u32, max_len: u16, out: bool) -> Result<Action, Wrong> {
    Ok(match to {
        port::IN_PORT => Action::InPort,
        port::TABLE if out => Action::Resubmit(0),
        port::NORMAL => Action::Normal,
        port::FLOOD => Action::Flood,
        port::ALL => Action::All,
        port::CONTROLLER => Action::Controller { max_len },
        0 | port::MAX.. => return Err(Code::OUT_PORT),
        to => Action::Output(PortId(to)),
    })
}

fn set(body: &mut Reader<'_>, masked: bool) -> Result<Action, Wrong> {
    let oxm = oxm::read(body, Code::SET_TYPE, Code::SET_LENGTH)?;
    let mask = match oxm.mask {
        Some(_) if !masked => return Err(Code::SET_TYPE),
        Some(mask) => mask & oxm.field.all(),
        None => oxm.field.all(),
    };
    let mut value = oxm.value;
    if oxm.field == Field::VlanVid && mask == oxm.field.all() {
        value |= u128::from(TAGGED);
    }
    Ok(Action::Set {
        field: oxm.field,
        value,
        mask,
    })
}

fn experimenter(body: &mut Reader<'_>) -> Result<Action, Wrong> {
    if body.u32()? != NICIRA {
        return Err(Code::ACTION_EXPERIMENTER);
    }
    match body.u16()? {
        NX_RESUBMIT => {
            let (in_port, table) = (body.u16()?, body.u8()?);
            if in_port != 0xfff8 {
                return Err(Code::ARGUMENT);
            }
            Ok(Action::Resubmit(table))
        }
        NX_LOAD => set(body, true),
        NX_LOAD_BITS => load_bits(body),
        NX_CT => {
            let (flags, source) = (body.u16()?, body.u32()?);
            let (zone, table) = (body.u16()?, body.u8()?);
            body.skip(3)?;
            let alg = body.u16()?;
            if flags & !1 != 0 || source != 0 || alg != 0 || !body.is_empty() {
                return Err(Code::ARGUMENT);
            }
            Ok(Action::Ct {
                commit: flags & 1 == 1,
                zone,
                table: (table != 0xff).then_some(table),
            })
        }
        _ => Err(Code::ACTION_EXPERIMENT),
    }
}

/// Some bits of a field, next to each other.
fn load_bits(body: &mut Reader<'_>) -> Result<Action, Wrong> {
    let (place, header, bits) = (body.u16()?, body.u32()?, body.u64()?);
    let field = oxm::named(header).ok_or(Code::SET_TYPE)?;
    let (offset, count) = (u32::from(place >> 6), u32::from(place & 0x3f) + 1);
    if offset + count > field.bits() || count < 64 && bits >> count != 0 {
        return Err(Code::ARGUMENT);
    }
    Ok(Action::Set {
        field,
        value: u128::from(bits) << offset,
        mask: u128::from(u64::MAX >> (64 - count)) << offset,
    })
}

/// Writes a list of actions.
pub(super) fn write(to: &mut Vec<u8>, actions: &[Action]) {
    for action in actions {
        let start = to.len();
        let mut plain = |kind: u16| {
            to.u16(kind).u16(0);
        };
        match *action {
            Action::PushVlan(tpid) => {
                plain(17);
                to.u16(tpid).zeros(2);
            }
            Action::PopVlan => {
                plain(18);
                to.zeros(4);
            }
            Action::DecTtl => {
                plain(24);
                to.zeros(4);
            }
            Action::Set { field, value, mask } => write_set(to, field, value, mask),
            Action::Resubmit(table) => {
                nicira(to, NX_RESUBMIT);
                to.u16(0xfff8).u8(table).zeros(3);
            }
            Action::Ct {
                commit,
                zone,
                table,
            } => {
                nicira(to, NX_CT);
                to.u16(commit.into()).u32(0).u16(zone);
                to.u8(table.unwrap_or(0xff)).zeros(3).u16(0);
            }
            ref other => {
                let Some((port, max_len)) = out(other) else {
                    continue;
                };
                plain(0);
                to.u32(port).u16(max_len).zeros(6);
            }
        }
        to.align(start).length(start, 2);
    }
}

fn out(action: &Action) -> Option<(u32, u16)> {
    Some(match action {
        // OpenFlow has no word for a port that only watches.
        Action::Output(port) | Action::Mirror(port) => (port.0, 0),
        Action::InPort => (port::IN_PORT, 0),
        Action::Normal => (port::NORMAL, 0),
        Action::Flood => (port::FLOOD, 0),
        Action::All => (port::ALL, 0),
        Action::Controller { max_len } => (port::CONTROLLER, *max_len),
        _ => return None,
    })
}

fn nicira(to: &mut Vec<u8>, kind: u16) {
    to.u16(0xffff).u16(0).u32(NICIRA).u16(kind);
}

fn write_set(to: &mut Vec<u8>, field: Field, value: u128, mask: u128) {
    match field {
        Field::Ttl if mask == field.all() => {
            to.u16(23).u16(0).u8(value as u8).zeros(3);
        }
        _ if mask == field.all() => {
            to.u16(25).u16(0);
            oxm::write(to, field, value, mask);
        }
        _ => {
            nicira(to, NX_LOAD);
            oxm::write(to, field, value, mask);
        }
    }
}

/// Reads instructions, as one list in the order in which they are followed.
pub(super) fn read_instructions(mut reader: Reader<'_>) -> Result<Vec<Action>, Wrong> {
    let mut found: Vec<(u16, Vec<Action>)> = Vec::new();
    while !reader.is_empty() {
        let (kind, body) = element(&mut reader, Code::INSTRUCTION_LENGTH)?;
        let mut body = Reader(body);
        let mut read = || -> Result<_, Wrong> {
            Ok(match kind {
                1 => vec![Action::Goto(body.u8()?)],
                2 => {
                    body.skip(4)?;
                    let (value, mask) = (body.u64()?, body.u64()?);
                    vec![Action::WriteMetadata { value, mask }]
                }
                3 | 4 => {
                    body.skip(4)?;
                    let actions = self::read(body, false)?;
                    if kind == 4 {
                        actions
                    } else {
                        vec![Action::WriteActions(actions)]
                    }
                }
                5 => vec![Action::ClearActions],
                6 => vec![Action::Meter(body.u32()?)],
                _ => return Err(Code::INSTRUCTION),
            })
        };
        let actions = read().map_err(|wrong| short(wrong, Code::INSTRUCTION_LENGTH))?;
        if found.iter().any(|(other, _)| *other == kind) {
            return Err(Code::INSTRUCTION_TWICE);
        }
        found.push((kind, actions));
    }
    let mut actions: Vec<_> = found.into_iter().flat_map(|(_, list)| list).collect();
    actions.sort_by_key(Action::rank);
    Ok(actions)
}

/// Writes an entry's actions as instructions.
pub(super) fn write_instructions(to: &mut Vec<u8>, actions: &[Action]) {
    let at_once: Vec<_> = actions
        .iter()
        .filter(|action| action.rank() == 1)
        .cloned()
        .collect();
    let list = |to: &mut Vec<u8>, kind: u16, actions: &[Action]| {
        let start = to.len();
        to.u16(kind).u16(0).zeros(4);
        write(to, actions);
        to.length(start, 2);
    };
    let mut applied = at_once.is_empty();
    for action in actions {
        match action {
            Action::Meter(id) => {
                to.u16(6).u16(8).u32(*id);
            }
            Action::ClearActions => {
                to.u16(5).u16(8).zeros(4);
            }
            Action::WriteActions(written) => list(to, 3, written),
            Action::WriteMetadata { value, mask } => {
                to.u16(2).u16(24).zeros(4).u64(*value).u64(*mask);
            }
            Action::Goto(table) => {
                to.u16(1).u16(8).u8(*table).zeros(3);
            }
            _ if !applied => {
                list(to, 4, &at_once);
                applied = true;
            }
            _ => {}
        }
    }
}
