//! Writing entries as Open vSwitch does.

use std::fmt::{self, Display, Write};
use std::time::Duration;

use super::names::{self, PROTOCOLS, TAGGED, VID};
use crate::flow::actions::{Action, LAST_TABLE, WHOLE_FRAME};
use crate::flow::fields::Field;
use crate::flow::matches::Match;
use crate::flow::tables::{DEFAULT_PRIORITY, Entry, Flow};

/// Fields in the order in which they are written, but for VLANs and protocols.
const ORDER: [Field; 31] = [
    Field::CtState,
    Field::Vni,
    Field::Metadata,
    Field::InPort,
    Field::EthSrc,
    Field::EthDst,
    Field::Ipv4Src,
    Field::Ipv4Dst,
    Field::Ipv6Src,
    Field::Ipv6Dst,
    Field::ArpSpa,
    Field::ArpTpa,
    Field::ArpOp,
    Field::ArpSha,
    Field::ArpTha,
    Field::IpDscp,
    Field::IpEcn,
    Field::Ttl,
    Field::Fragment,
    Field::TcpSrc,
    Field::TcpDst,
    Field::TcpFlags,
    Field::UdpSrc,
    Field::UdpDst,
    Field::SctpSrc,
    Field::SctpDst,
    Field::IcmpType,
    Field::IcmpCode,
    Field::Icmp6Type,
    Field::Icmp6Code,
    Field::NdTarget,
];

/// The parts of a match, to be joined by commas.
fn parts(matches: &Match) -> Vec<String> {
    let mut parts = Vec::new();
    protocol(matches, &mut parts);
    let (before, after) = ORDER.split_at(4);
    let put = |fields: &[Field], parts: &mut Vec<String>| {
        for field in fields {
            if let Some((value, mask)) = matches.get(*field) {
                let value = names::value(*field, value, mask);
                parts.push(format!("{}={value}", field.in_match()));
            }
        }
    };
    put(before, &mut parts);
    vlan(matches, &mut parts);
    put(after, &mut parts);
    parts
}

fn protocol(matches: &Match, parts: &mut Vec<String>) {
    let Some(kind) = matches.whole(Field::EthType) else {
        return;
    };
    let proto = matches.whole(Field::IpProto);
    let named = |wanted: Option<u128>| {
        let same = |(_, ethertype, proto): &&(&str, u16, Option<u8>)| {
            u128::from(*ethertype) == kind && proto.map(u128::from) == wanted
        };
        PROTOCOLS.iter().find(same).map(|(name, ..)| *name)
    };
    if let Some(name) = named(proto) {
        parts.push(name.to_owned());
        return;
    }
    parts.push(named(None).map_or_else(|| format!("dl_type={kind:#06x}"), str::to_owned));
    if let Some(proto) = proto {
        parts.push(format!("nw_proto={proto}"));
    }
}

fn vlan(matches: &Match, parts: &mut Vec<String>) {
    let Some((value, mask)) = matches.get(Field::VlanTci) else {
        return;
    };
    let (tagged, priority) = (value & TAGGED != 0, mask & !VID);
    let vid = match mask & VID {
        VID if tagged => Some(format!("dl_vlan={}", value & 0xfff)),
        TAGGED if tagged && priority == 0xe000 => None,
        _ => {
            parts.push(if mask == 0xffff {
                format!("vlan_tci={value:#06x}")
            } else {
                format!("vlan_tci={value:#06x}/{mask:#06x}")
            });
            return;
        }
    };
    if priority != 0 && priority != 0xe000 {
        parts.push(format!("vlan_tci={value:#06x}/{mask:#06x}"));
        return;
    }
    parts.extend(vid);
    if priority != 0 {
        parts.push(format!("dl_vlan_pcp={}", value >> 13));
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&parts(self).join(","))
    }
}

fn set(f: &mut fmt::Formatter<'_>, field: Field, value: u128, mask: u128) -> fmt::Result {
    match field {
        Field::VlanVid if mask == VID => write!(f, "mod_vlan_vid:{}", value & 0xfff),
        Field::VlanPcp if mask == field.all() => write!(f, "mod_vlan_pcp:{value}"),
        _ => {
            let value = names::value(field, value, mask);
            write!(f, "set_field:{value}->{}", field.name())
        }
    }
}

impl Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Output(port) => write!(f, "output:{port}"),
            Self::InPort => f.write_str("IN_PORT"),
            Self::Normal => f.write_str("NORMAL"),
            Self::Flood => f.write_str("FLOOD"),
            Self::All => f.write_str("ALL"),
            Self::Controller { max_len } => write!(f, "CONTROLLER:{max_len}"),
            Self::Mirror(port) => write!(f, "mirror:{port}"),
            Self::Set { field, value, mask } => set(f, *field, *value, *mask),
            Self::DecTtl => f.write_str("dec_ttl"),
            Self::PushVlan(tpid) => write!(f, "push_vlan:{tpid:#06x}"),
            Self::PopVlan => f.write_str("pop_vlan"),
            Self::Meter(id) => write!(f, "meter:{id}"),
            Self::Ct {
                commit,
                zone,
                table,
            } => {
                let mut parts = Vec::new();
                parts.extend(commit.then(|| "commit".to_owned()));
                parts.extend((*zone != 0).then(|| format!("zone={zone}")));
                parts.extend(table.map(|table| format!("table={table}")));
                write!(f, "ct({})", parts.join(","))
            }
            Self::Resubmit(table) => write!(f, "resubmit(,{table})"),
            Self::ClearActions => f.write_str("clear_actions"),
            Self::WriteActions(actions) => write!(f, "write_actions({})", actions_text(actions)),
            Self::WriteMetadata { value, mask } if *mask == u64::MAX => {
                write!(f, "write_metadata:{value:#x}")
            }
            Self::WriteMetadata { value, mask } => write!(f, "write_metadata:{value:#x}/{mask:#x}"),
            Self::Goto(table) => write!(f, "goto_table:{table}"),
        }
    }
}

/// Actions, joined by commas; none: `drop`.
#[must_use]
pub fn actions_text(actions: &[Action]) -> String {
    if actions.is_empty() {
        return "drop".to_owned();
    }
    let texts: Vec<_> = actions.iter().map(ToString::to_string).collect();
    texts.join(",")
}

impl Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.cookie != 0 {
            write!(f, "cookie={:#x}, ", self.cookie)?;
        }
        if self.table != 0 {
            write!(f, "table={}, ", self.table)?;
        }
        write!(f, "{}", Rest(self))
    }
}

/// An entry without its cookie and table.
struct Rest<'a>(&'a Flow);

impl Display for Rest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(flow) = self;
        for (name, seconds) in [
            ("idle_timeout", flow.idle_timeout),
            ("hard_timeout", flow.hard_timeout),
        ] {
            if seconds != 0 {
                write!(f, "{name}={seconds}, ")?;
            }
        }
        for (name, set) in [
            ("send_flow_rem", flow.flags.send_removed),
            ("check_overlap", flow.flags.check_overlap),
            ("reset_counts", flow.flags.reset_counts),
        ] {
            if set {
                write!(f, "{name} ")?;
            }
        }
        let mut parts = parts(&flow.matches);
        if flow.priority != DEFAULT_PRIORITY {
            parts.insert(0, format!("priority={}", flow.priority));
        }
        if !parts.is_empty() {
            write!(f, "{} ", parts.join(","))?;
        }
        write!(f, "actions={}", actions_text(&flow.actions))
    }
}

/// An entry with what it has counted, as `ovs-ofctl dump-flows` shows it.
#[must_use]
pub fn dump(entry: &Entry, now: Duration) -> String {
    let flow = &entry.flow;
    let age = now.saturating_sub(entry.created);
    let used = entry.stats.used().max(entry.created);
    let mut line = format!(
        "cookie={:#x}, duration={:.3}s, table={}, n_packets={}, n_bytes={}, ",
        flow.cookie,
        age.as_secs_f64(),
        flow.table.min(LAST_TABLE),
        entry.stats.packets(),
        entry.stats.bytes(),
    );
    if flow.idle_timeout != 0 {
        let idle = now.saturating_sub(used).as_secs();
        // Writing to a string does not fail.
        let _ = write!(line, "idle_age={idle}, ");
    }
    let _ = write!(line, "{}", Rest(flow));
    line
}

/// Bytes that go to a controller when the text does not say: all.
pub(super) const CONTROLLER: u16 = WHOLE_FRAME;
