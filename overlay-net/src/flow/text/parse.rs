//! Reading matches and entries.

use super::names::{self, PROTOCOLS, TAGGED, VID};
use super::{Names, TextError};
use crate::flow::actions;
use crate::flow::control::Filter;
use crate::flow::fields::{Field, Needs};
use crate::flow::matches::{Match, MatchError};
use crate::flow::tables::{DEFAULT_PRIORITY, Flow};
use crate::frame::{Key, PortId};

/// One part of a text: `name` or `name=value`.
#[derive(Clone, Copy, Debug)]
struct Item<'a> {
    name: &'a str,
    /// Where it begins.
    at: usize,
    value: Option<(&'a str, usize)>,
}

/// The parts of a text, and where what follows `actions=` begins.
fn items(text: &str) -> (Vec<Item<'_>>, Option<usize>) {
    let mut items = Vec::new();
    let mut at = 0;
    let between = |c: char| c == ',' || c.is_whitespace();
    while let Some(skip) = text[at..].find(|c| !between(c)) {
        at += skip;
        let rest = &text[at..];
        for begin in ["actions=", "action="] {
            if rest.starts_with(begin) {
                return (items, Some(at + begin.len()));
            }
        }
        let end = rest.find(between).unwrap_or(rest.len());
        let part = &rest[..end];
        items.push(match part.split_once('=') {
            Some((name, value)) => Item {
                name,
                at,
                value: Some((value, at + name.len() + 1)),
            },
            None => Item {
                name: part,
                at,
                value: None,
            },
        });
        at += end;
    }
    (items, None)
}

/// A reader of one text.
struct Reader<'a> {
    text: &'a str,
    ports: Names<'a>,
}

impl<'a> Reader<'a> {
    fn wrong(&self, at: usize, what: impl Into<String>) -> TextError {
        TextError::new(self.text, at, what)
    }

    fn value(&self, item: Item<'a>) -> Result<(&'a str, usize), TextError> {
        let end = item.at + item.name.len();
        item.value
            .ok_or_else(|| self.wrong(end, format!("`{}` needs a value: =...", item.name)))
    }

    fn number<T: TryFrom<u128>>(&self, item: Item<'a>) -> Result<T, TextError> {
        let (value, at) = self.value(item)?;
        names::number(value)
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| {
                let bits = 8 * size_of::<T>();
                self.wrong(at, format!("expected a number of at most {bits} bits"))
            })
    }

    /// Reads a match: first what frames are, then what is in them.
    fn matches(&self, items: Vec<Item<'a>>) -> Result<Match, TextError> {
        let mut matches = Match::any();
        let mut rest = Vec::new();
        for item in items {
            if !self.protocol(item, &mut matches)? {
                rest.push(item);
            }
        }
        let stage = |item: &Item<'_>| match item.name {
            "nw_proto" | "ip_proto" => 0,
            "nd_target" => 2,
            _ => 1,
        };
        rest.sort_by_key(stage);
        for item in rest {
            self.field(item, &mut matches)?;
        }
        Ok(matches)
    }

    fn set(
        &self,
        matches: &mut Match,
        at: usize,
        field: Field,
        (value, mask): (u128, u128),
    ) -> Result<(), TextError> {
        matches
            .set(field, value, mask)
            .map_err(|error: MatchError| self.wrong(at, error.to_string()))
    }

    fn protocol(&self, item: Item<'a>, matches: &mut Match) -> Result<bool, TextError> {
        if matches!(item.name, "dl_type" | "eth_type") {
            let kind: u16 = self.number(item)?;
            let bits = (kind.into(), Field::EthType.all());
            self.set(matches, item.at, Field::EthType, bits)?;
            return Ok(true);
        }
        let known = PROTOCOLS.iter().find(|(name, ..)| *name == item.name);
        let Some((_, kind, proto)) = known.filter(|_| item.value.is_none()) else {
            return Ok(false);
        };
        let bits = ((*kind).into(), Field::EthType.all());
        self.set(matches, item.at, Field::EthType, bits)?;
        if let Some(proto) = proto {
            let bits = ((*proto).into(), Field::IpProto.all());
            self.set(matches, item.at, Field::IpProto, bits)?;
        }
        Ok(true)
    }

    fn field(&self, item: Item<'a>, matches: &mut Match) -> Result<(), TextError> {
        let vlan = |bits| (Field::VlanTci, bits);
        let (field, bits) = match item.name {
            "dl_vlan" => {
                let vid: u16 = self.number(item)?;
                match vid {
                    0xffff => vlan((0, VID)),
                    0..=0xfff => vlan((u128::from(vid) | TAGGED, VID)),
                    _ => {
                        let what = "expected a VLAN, 0 to 4095, or 0xffff: no tag";
                        return Err(self.wrong(item.at, what));
                    }
                }
            }
            "dl_vlan_pcp" | "vlan_pcp" => {
                let priority: u8 = self.number(item)?;
                if priority > 7 {
                    return Err(self.wrong(item.at, "expected a priority, 0 to 7"));
                }
                vlan((u128::from(priority) << 13 | TAGGED, 0xe000 | TAGGED))
            }
            "nw_tos" => {
                let tos: u8 = self.number(item)?;
                (Field::IpDscp, ((tos >> 2).into(), Field::IpDscp.all()))
            }
            name => {
                let field = self.which(item, name, matches)?;
                let (text, at) = self.value(item)?;
                let bits = names::read(field, text, self.ports)
                    .map_err(|expected| self.wrong(at, format!("expected {expected}")))?;
                (field, bits)
            }
        };
        self.set(matches, item.at, field, bits)
    }

    /// The field that a name means for the protocol that is matched.
    fn which(&self, item: Item<'a>, name: &str, matches: &Match) -> Result<Field, TextError> {
        let mut first = None;
        for field in Field::named(name) {
            // Its needs are looked at again when it is set.
            let needs = match field.needs() {
                Needs::Neighbour => Needs::Nothing,
                needs => needs,
            };
            if matches.has(needs) {
                return Ok(field);
            }
            first = first.or(Some(field));
        }
        // An ARP packet's addresses have IP's names, too.
        let arp = match name {
            "nw_src" => Some(Field::ArpSpa),
            "nw_dst" => Some(Field::ArpTpa),
            _ => None,
        };
        match (arp, first) {
            (Some(arp), _) if matches.has(Needs::Arp) => Ok(arp),
            (_, Some(field)) => {
                let needs = field.needs();
                let error = MatchError::Needs { field, needs };
                Err(self.wrong(item.at, error.to_string()))
            }
            _ => Err(self.wrong(
                item.at,
                format!("`{name}` is no field: expected one as in_port, ip, nw_dst, tp_dst"),
            )),
        }
    }
}

/// Reads a match, as `tcp,nw_dst=10.0.0.0/8,tp_dst=80`.
///
/// # Errors
///
/// See [`TextError`].
pub fn parse_match(text: &str, ports: Names<'_>) -> Result<Match, TextError> {
    let reader = Reader { text, ports };
    match items(text) {
        (items, None) => reader.matches(items),
        (_, Some(at)) => Err(reader.wrong(at, "actions are not expected here")),
    }
}

/// Reads an entry, as `priority=100,ip,nw_dst=10.0.0.0/8,actions=output:2`.
/// What [`super::dump`] tells beyond that is skipped.
///
/// # Errors
///
/// See [`TextError`].
pub fn parse_flow(text: &str, ports: Names<'_>) -> Result<Flow, TextError> {
    let reader = Reader { text, ports };
    let mut flow = Flow {
        priority: DEFAULT_PRIORITY,
        ..Flow::default()
    };
    let (items, begin) = items(text);
    let mut rest = Vec::new();
    for item in items {
        match item.name {
            "table" => flow.table = reader.number(item)?,
            "priority" => flow.priority = reader.number(item)?,
            "cookie" => flow.cookie = reader.number(item)?,
            "idle_timeout" => flow.idle_timeout = reader.number(item)?,
            "hard_timeout" => flow.hard_timeout = reader.number(item)?,
            "send_flow_rem" => flow.flags.send_removed = true,
            "check_overlap" => flow.flags.check_overlap = true,
            "reset_counts" => flow.flags.reset_counts = true,
            "duration" | "n_packets" | "n_bytes" | "idle_age" | "hard_age" => {}
            _ => rest.push(item),
        }
    }
    flow.matches = reader.matches(rest)?;
    let begin = begin.ok_or_else(|| reader.wrong(text.len(), "expected actions=..."))?;
    flow.actions = super::actions::read(text, begin, &flow.matches, ports)?;
    actions::check(&flow.actions, &flow.matches, flow.table)
        .map_err(|error| reader.wrong(begin, error.to_string()))?;
    Ok(flow)
}

/// Reads which entries are meant, as `table=0,cookie=0x1/-1,ip`. With
/// `strict`, those with exactly this match and priority.
///
/// # Errors
///
/// See [`TextError`].
pub fn parse_filter(text: &str, strict: bool, ports: Names<'_>) -> Result<Filter, TextError> {
    let reader = Reader { text, ports };
    let (items, begin) = items(text);
    if let Some(at) = begin {
        return Err(reader.wrong(at, "actions are not expected here"));
    }
    let mut filter = Filter::default();
    let mut priority = DEFAULT_PRIORITY;
    let mut rest = Vec::new();
    for item in items {
        match item.name {
            "table" => filter.table = Some(reader.number(item)?),
            "priority" if strict => priority = reader.number(item)?,
            "cookie" => filter.cookie = cookie(&reader, item)?,
            "out_port" => {
                let (text, at) = reader.value(item)?;
                let (port, _) = names::read(Field::InPort, text, ports)
                    .map_err(|expected| reader.wrong(at, format!("expected {expected}")))?;
                filter.out_port = u32::try_from(port).ok().map(PortId);
            }
            _ => rest.push(item),
        }
    }
    filter.matches = reader.matches(rest)?;
    filter.strict = strict.then_some(priority);
    Ok(filter)
}

fn cookie(reader: &Reader<'_>, item: Item<'_>) -> Result<(u64, u64), TextError> {
    let (value, at) = item.value.unwrap_or(("", item.at));
    let (value, mask) = value.split_once('/').unwrap_or((value, "-1"));
    let read = |text| names::number(text).and_then(|number| u64::try_from(number).ok());
    let mask = if mask == "-1" {
        Some(u64::MAX)
    } else {
        read(mask)
    };
    read(value)
        .zip(mask)
        .ok_or_else(|| reader.wrong(at, "expected a cookie and mask, as 0x10/-1"))
}

/// Reads a packet's description for a trace: a match, whose values a frame
/// has. What it does not say is 0, but for the TTL, which is 64.
///
/// # Errors
///
/// See [`TextError`].
pub fn parse_packet(text: &str, ports: Names<'_>) -> Result<(Key, u8), TextError> {
    let matches = parse_match(text, ports)?;
    let flat = *matches.value();
    let mut key = flat.to_key();
    if matches.has(Needs::Ip) && matches.get(Field::Ttl).is_none() {
        key.ttl = 64;
    }
    Ok((key, flat.get(Field::CtState) as u8))
}
