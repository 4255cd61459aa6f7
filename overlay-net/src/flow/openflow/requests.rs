//! What controllers change.

use std::sync::Arc;

use super::actions::{self, port};
use super::error::{Code, Wrong};
use super::oxm;
use super::session::Session;
use super::wire::Reader;
use super::{Datapath, Event};
use crate::flow::actions::Action;
use crate::flow::control::{Filter, Gone};
use crate::flow::matches::Match;
use crate::flow::meter::{BANDS, Band, Excess, MeterSpec};
use crate::flow::tables::{Entry, Flags, Flow};
use crate::frame::PortId;

const ALL_TABLES: u8 = 0xff;

/// Flags of entries.
pub(super) fn flags_of(flags: Flags) -> u16 {
    u16::from(flags.send_removed)
        | u16::from(flags.check_overlap) << 1
        | u16::from(flags.reset_counts) << 2
}

/// Which entries a request means; an out port that none can have: none.
pub(super) fn filter(
    table: u8,
    out_port: u32,
    out_group: u32,
    cookie: (u64, u64),
    matches: Match,
) -> Option<Filter> {
    // No entry sends to a group.
    if out_group != port::ANY {
        return None;
    }
    Some(Filter {
        table: (table != ALL_TABLES).then_some(table),
        matches,
        strict: None,
        cookie,
        out_port: (out_port != port::ANY).then_some(PortId(out_port)),
    })
}

fn tell(session: &mut Session, gone: Vec<Arc<Entry>>, why: Gone, datapath: &dyn Datapath) {
    let at = datapath.now();
    let told = gone
        .into_iter()
        .filter(|entry| entry.flow.flags.send_removed);
    session
        .events
        .extend(told.map(|entry| Event::Removed { entry, why, at }));
}

/// Adds, changes or deletes entries.
pub(super) fn flow_mod(
    session: &mut Session,
    mut body: Reader<'_>,
    datapath: &mut dyn Datapath,
) -> Result<(), Wrong> {
    let (cookie, cookie_mask) = (body.u64()?, body.u64()?);
    let (table, command) = (body.u8()?, body.u8()?);
    let (idle_timeout, hard_timeout) = (body.u16()?, body.u16()?);
    let (priority, buffer) = (body.u16()?, body.u32()?);
    let (out_port, out_group) = (body.u32()?, body.u32()?);
    let flags = body.u16()?;
    body.skip(2)?;
    let matches = oxm::read_match(&mut body)?;
    let actions = actions::read_instructions(body)?;
    let flags = Flags {
        send_removed: flags & 1 != 0,
        check_overlap: flags & 2 != 0,
        reset_counts: flags & 4 != 0,
    };
    let now = datapath.now();
    let deletes = matches!(command, 3 | 4);
    if !deletes && table == ALL_TABLES {
        return Err(Code::TABLE);
    }
    let strict = matches!(command, 2 | 4).then_some(priority);
    let (out_port, out_group) = if deletes {
        (out_port, out_group)
    } else {
        (port::ANY, port::ANY)
    };
    let filter = filter(table, out_port, out_group, (cookie, cookie_mask), matches);
    let filter = filter.map(|filter| Filter { strict, ..filter });
    match command {
        0 => datapath.control().add(
            Flow {
                table,
                priority,
                matches,
                actions,
                cookie,
                idle_timeout,
                hard_timeout,
                flags,
            },
            now,
        )?,
        1 | 2 => {
            if let Some(filter) = filter {
                let control = datapath.control();
                control.modify(&filter, &actions, flags.reset_counts)?;
            }
        }
        3 | 4 => {
            let gone = filter.map(|filter| datapath.control().delete(&filter));
            tell(session, gone.unwrap_or_default(), Gone::Deleted, datapath);
        }
        _ => return Err(Code::COMMAND),
    }
    // Frames are not buffered: there is none with this number.
    if !deletes && buffer != u32::MAX {
        return Err(Code::BUFFER);
    }
    Ok(())
}

/// Sends a frame.
pub(super) fn packet_out(mut body: Reader<'_>, datapath: &mut dyn Datapath) -> Result<(), Wrong> {
    let (buffer, in_port) = (body.u32()?, body.u32()?);
    let len = usize::from(body.u16()?);
    body.skip(6)?;
    let list = Reader(body.take(len).map_err(|_| Code::ACTION_LENGTH)?);
    let actions = actions::read(list, true)?;
    let fixed =
        |action: &Action| matches!(action, Action::Set { field, .. } if !field.is_settable());
    if actions.iter().any(fixed) {
        return Err(Code::SET_TYPE);
    }
    if buffer != u32::MAX {
        return Err(Code::BUFFER);
    }
    let in_port = match in_port {
        port::CONTROLLER | port::ANY => None,
        0 | port::MAX.. => return Err(Code::PORT),
        other => Some(PortId(other)),
    };
    if body.0.len() < 14 {
        return Err(Code::PACKET);
    }
    datapath.packet_out(in_port, &actions, body.0);
    Ok(())
}

/// Adds, changes or deletes a meter.
pub(super) fn meter_mod(
    session: &mut Session,
    mut body: Reader<'_>,
    datapath: &mut dyn Datapath,
) -> Result<(), Wrong> {
    const KBPS: u16 = 1;
    const PACKETS: u16 = 2;
    const BURST: u16 = 4;
    let (command, flags, id) = (body.u16()?, body.u16()?, body.u32()?);
    if command == 2 {
        if id != u32::MAX && !datapath.control().meters().contains_key(&id) {
            return Ok(());
        }
        let meter = (id != u32::MAX).then_some(id);
        let gone = datapath.control().delete_meter(meter);
        tell(session, gone, Gone::Meter, datapath);
        return Ok(());
    }
    if command > 2 {
        return Err(Code::METER_COMMAND);
    }
    if id == 0 || id > 0xffff_0000 {
        return Err(Code::METER);
    }
    if flags & KBPS != 0 && flags & PACKETS != 0 {
        return Err(Code::METER_FLAGS);
    }
    let mut bands = Vec::new();
    while !body.is_empty() {
        let (kind, len) = (body.u16()?, usize::from(body.u16()?));
        let mut band = Reader(body.take(len.checked_sub(4).ok_or(Code::LENGTH)?)?);
        let (rate, burst) = (band.u32()?, band.u32()?);
        let excess = match kind {
            1 => Excess::Drop,
            2 => Excess::Remark(band.u8()?),
            _ => return Err(Code::BAND),
        };
        if rate == 0 {
            return Err(Code::RATE);
        }
        if bands.len() >= BANDS {
            return Err(Code::BANDS);
        }
        let burst = if flags & BURST != 0 { burst } else { 0 };
        bands.push(Band {
            rate,
            burst,
            excess,
        });
    }
    let spec = MeterSpec {
        packets: flags & PACKETS != 0,
        bands,
    };
    let now = datapath.now();
    datapath.control().meter(id, spec, command == 1, now)?;
    Ok(())
}

/// Takes a port down or up.
pub(super) fn port_mod(
    session: &mut Session,
    mut body: Reader<'_>,
    datapath: &mut dyn Datapath,
) -> Result<(), Wrong> {
    const DOWN: u32 = 1;
    let id = PortId(body.u32()?);
    body.skip(12)?;
    let (config, mask) = (body.u32()?, body.u32()?);
    let find = |datapath: &dyn Datapath| datapath.ports().into_iter().find(|port| port.id == id);
    if find(datapath).is_none() {
        return Err(Code::NO_PORT);
    }
    if mask & !DOWN != 0 {
        return Err(Code::PORT_CONFIG);
    }
    if mask & DOWN != 0 {
        if !datapath.set_down(id, config & DOWN != 0) {
            return Err(Code::PORT_CONFIG);
        }
        let port = find(datapath);
        session.events.extend(port.map(|port| Event::Port(2, port)));
    }
    Ok(())
}
