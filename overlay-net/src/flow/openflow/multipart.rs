//! What controllers ask for in messages of several parts.

use std::time::Duration;

use super::actions::{self, port as ports};
use super::error::{Code, Wrong};
use super::oxm;
use super::requests::{filter, flags_of};
use super::session::Session;
use super::wire::{Put, Reader};
use super::{Datapath, PortInfo, kind};
use crate::flow::actions::LAST_TABLE;
use crate::flow::control::{Filter, MOST_ENTRIES, MOST_METERS};
use crate::flow::fields::Field;
use crate::flow::meter::{BANDS, Excess, Meter, MeterSpec};
use crate::flow::tables::Entry;

/// Bytes of one part's answers, before the next begins.
const PART: usize = 32 << 10;

/// Answers a request.
pub(super) fn answer(
    session: &mut Session,
    xid: u32,
    mut body: Reader<'_>,
    datapath: &mut dyn Datapath,
) -> Result<(), Wrong> {
    let (what, flags) = (body.u16()?, body.u16()?);
    body.skip(4)?;
    // Requests in several parts are those for table features, which are refused.
    if flags != 0 {
        return Err(Code::MULTIPART);
    }
    let answers = match what {
        0 => vec![description(datapath)],
        1 => flows(body, datapath)?,
        2 => vec![aggregate(body, datapath)?],
        3 => tables(datapath),
        4 => port_stats(body, datapath)?,
        // There are no queues.
        5 => Vec::new(),
        6 | 7 => Vec::new(),
        // Neither groups nor what they could do.
        8 => vec![vec![0; 40]],
        9 => meters(body, datapath, meter_stats)?,
        10 => meters(body, datapath, |id, meter, _| {
            meter_config(id, meter.spec())
        })?,
        11 => vec![meter_features()],
        // They can be asked for, not changed.
        12 if !body.is_empty() => return Err(Code::TABLE_FEATURES),
        12 => (0..=LAST_TABLE).map(table_features).collect(),
        13 => datapath.ports().iter().map(described).collect(),
        _ => return Err(Code::MULTIPART),
    };
    send(session, xid, what, &answers);
    Ok(())
}

fn send(session: &mut Session, xid: u32, what: u16, answers: &[Vec<u8>]) {
    let mut rest = answers;
    loop {
        let mut size = 0;
        let mut count = 0;
        while let Some(next) = rest.get(count)
            && (count == 0 || size + next.len() <= PART)
        {
            size += next.len();
            count += 1;
        }
        let (part, after) = rest.split_at(count);
        let more = !after.is_empty();
        session.reply(kind::MULTIPART_REPLY, xid, |to| {
            to.u16(what).u16(more.into()).zeros(4);
            for answer in part {
                to.bytes(answer);
            }
        });
        if !more {
            return;
        }
        rest = after;
    }
}

fn description(datapath: &dyn Datapath) -> Vec<u8> {
    let about = datapath.description();
    let mut to = Vec::new();
    to.text(&about.manufacturer, 256);
    to.text(&about.hardware, 256).text(&about.software, 256);
    to.text(&about.serial, 32).text(&about.datapath, 256);
    to
}

fn meant(mut body: Reader<'_>) -> Result<Option<Filter>, Wrong> {
    let table = body.u8()?;
    body.skip(3)?;
    let (out_port, out_group) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    let cookie = (body.u64()?, body.u64()?);
    let matches = oxm::read_match(&mut body)?;
    Ok(filter(table, out_port, out_group, cookie, matches))
}

fn flows(body: Reader<'_>, datapath: &mut dyn Datapath) -> Result<Vec<Vec<u8>>, Wrong> {
    let Some(filter) = meant(body)? else {
        return Ok(Vec::new());
    };
    let now = datapath.now();
    let entries = datapath.control().select(&filter);
    Ok(entries.iter().map(|entry| flow(entry, now)).collect())
}

fn flow(entry: &Entry, now: Duration) -> Vec<u8> {
    let flow = &entry.flow;
    let age = now.saturating_sub(entry.created);
    let mut to = Vec::new();
    to.u16(0).u8(flow.table).u8(0);
    to.u32(u32::try_from(age.as_secs()).unwrap_or(u32::MAX));
    to.u32(age.subsec_nanos()).u16(flow.priority);
    to.u16(flow.idle_timeout).u16(flow.hard_timeout);
    to.u16(flags_of(flow.flags)).zeros(4).u64(flow.cookie);
    to.u64(entry.stats.packets()).u64(entry.stats.bytes());
    oxm::write_match(&mut to, &flow.matches);
    actions::write_instructions(&mut to, &flow.actions);
    to.length(0, 0);
    to
}

fn aggregate(body: Reader<'_>, datapath: &mut dyn Datapath) -> Result<Vec<u8>, Wrong> {
    let filter = meant(body)?;
    let entries = filter.map(|filter| datapath.control().select(&filter));
    let entries = entries.unwrap_or_default();
    let mut to = Vec::new();
    to.u64(entries.iter().map(|entry| entry.stats.packets()).sum());
    to.u64(entries.iter().map(|entry| entry.stats.bytes()).sum());
    to.u32(entries.len() as u32).zeros(4);
    Ok(to)
}

fn tables(datapath: &mut dyn Datapath) -> Vec<Vec<u8>> {
    let tables = datapath.control().tables();
    let one = |id: u8| {
        let table = tables.table(id);
        let mut to = Vec::new();
        to.u8(id).zeros(3);
        to.u32(table.map_or(0, |table| table.len() as u32));
        to.u64(table.map_or(0, |table| table.looked_up.packets()));
        to.u64(table.map_or(0, |table| table.matched.packets()));
        to
    };
    (0..=LAST_TABLE).map(one).collect()
}

/// What every table can do: the same.
fn table_features(id: u8) -> Vec<u8> {
    const INSTRUCTIONS: [u16; 6] = [1, 2, 3, 4, 5, 6];
    const ACTIONS: [u16; 6] = [0, 17, 18, 23, 24, 25];
    let mut to = Vec::new();
    to.u16(0).u8(id).zeros(5).text(&format!("table{id}"), 32);
    to.u64(u64::MAX).u64(u64::MAX);
    to.u32(0).u32(MOST_ENTRIES as u32);
    let mut property = |kind: u16, put: &dyn Fn(&mut Vec<u8>)| {
        let start = to.len();
        to.u16(kind).u16(0);
        put(&mut to);
        to.length(start, 2).align(start);
    };
    let list = |kinds: &'static [u16]| {
        move |to: &mut Vec<u8>| {
            for kind in kinds {
                to.u16(*kind).u16(4);
            }
        }
    };
    property(0, &list(&INSTRUCTIONS));
    property(2, &|to| to.extend(id + 1..=LAST_TABLE));
    property(4, &list(&ACTIONS));
    property(6, &list(&ACTIONS));
    property(8, &|to| oxm::write_headers(to, |_| true, true));
    property(10, &|to| oxm::write_headers(to, |_| true, false));
    property(12, &|to| oxm::write_headers(to, Field::is_settable, false));
    property(14, &|to| oxm::write_headers(to, Field::is_settable, false));
    to.length(0, 0);
    to
}

/// Writes a port's description.
pub(super) fn port(to: &mut Vec<u8>, port: &PortInfo) {
    to.u32(port.id.0).zeros(4).bytes(&port.mac.0).zeros(2);
    to.text(&port.name, 16);
    to.u32(port.down.into());
    to.u32(port.unplugged.into());
    // What it can do, and speeds: a port in memory has none.
    to.zeros(24);
}

fn described(info: &PortInfo) -> Vec<u8> {
    let mut to = Vec::new();
    port(&mut to, info);
    to
}

fn port_stats(mut body: Reader<'_>, datapath: &dyn Datapath) -> Result<Vec<Vec<u8>>, Wrong> {
    let wanted = body.u32()?;
    let all = wanted == ports::ANY;
    let ports = datapath.ports().into_iter();
    let found: Vec<_> = ports
        .filter(|port| all || port.id.0 == wanted)
        .map(|port| {
            let stats = port.stats;
            let mut to = Vec::new();
            to.u32(port.id.0).zeros(4);
            to.u64(stats.rx_packets).u64(stats.tx_packets);
            to.u64(stats.rx_bytes).u64(stats.tx_bytes);
            to.u64(stats.rx_dropped).u64(stats.tx_dropped);
            // Errors, frames, overruns, CRCs, collisions; for how long: unknown.
            to.zeros(48).u32(u32::MAX).u32(u32::MAX);
            to
        })
        .collect();
    if found.is_empty() && !all {
        return Err(Code::PORT);
    }
    Ok(found)
}

fn meters(
    mut body: Reader<'_>,
    datapath: &mut dyn Datapath,
    one: impl Fn(u32, &Meter, Duration) -> Vec<u8>,
) -> Result<Vec<Vec<u8>>, Wrong> {
    let wanted = body.u32()?;
    let all = wanted == u32::MAX;
    let now = datapath.now();
    let meters = datapath.control().meters();
    if !all && !meters.contains_key(&wanted) {
        return Err(Code::NO_METER);
    }
    let meant = meters.iter().filter(|(id, _)| all || **id == wanted);
    Ok(meant.map(|(id, meter)| one(*id, meter, now)).collect())
}

fn meter_stats(id: u32, meter: &Meter, now: Duration) -> Vec<u8> {
    let stats = meter.stats();
    let age = now.saturating_sub(meter.since);
    let mut to = Vec::new();
    to.u32(id).u16(0).zeros(6).u32(0);
    to.u64(stats.packets).u64(stats.bytes);
    to.u32(u32::try_from(age.as_secs()).unwrap_or(u32::MAX));
    to.u32(age.subsec_nanos());
    for (packets, bytes) in stats.bands {
        to.u64(packets).u64(bytes);
    }
    to.length(0, 4);
    to
}

fn meter_config(id: u32, spec: &MeterSpec) -> Vec<u8> {
    let burst = spec.bands.iter().any(|band| band.burst != 0);
    let mut to = Vec::new();
    to.u16(0)
        .u16(if spec.packets { 2 } else { 1 } | if burst { 4 } else { 0 });
    to.u32(id);
    for band in &spec.bands {
        let (kind, steps) = match band.excess {
            Excess::Drop => (1, 0),
            Excess::Remark(steps) => (2, steps),
        };
        to.u16(kind).u16(16).u32(band.rate).u32(band.burst);
        to.u8(steps).zeros(3);
    }
    to.length(0, 0);
    to
}

fn meter_features() -> Vec<u8> {
    let mut to = Vec::new();
    // Drop and remark; by bits or packets, with bursts, counted.
    to.u32(MOST_METERS as u32).u32(0b110).u32(0b1111);
    to.u8(BANDS as u8).u8(0).zeros(2);
    to
}

// What is told of tables fits its field.
const _: () = assert!(MOST_ENTRIES <= u32::MAX as usize);
