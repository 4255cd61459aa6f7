//! Reading actions.

use super::names::{self, TAGGED, VID};
use super::print::CONTROLLER;
use super::{Names, TextError};
use crate::flow::actions::Action;
use crate::flow::fields::{Field, Needs};
use crate::flow::matches::Match;
use crate::frame::PortId;

/// Actions within actions, this deep at most.
const DEPTH: usize = 4;

struct Reader<'a> {
    text: &'a str,
    matches: &'a Match,
    ports: Names<'a>,
}

/// Reads actions without an entry, as `mod_dl_dst:02:00:00:00:00:01,output:2`.
/// `matches` tells which frames they are for.
///
/// # Errors
///
/// See [`TextError`].
pub fn parse_actions(
    text: &str,
    matches: &Match,
    ports: Names<'_>,
) -> Result<Vec<Action>, TextError> {
    read(text, 0, matches, ports)
}

/// Reads the actions in `text` from `begin` on.
pub(super) fn read(
    text: &str,
    begin: usize,
    matches: &Match,
    ports: Names<'_>,
) -> Result<Vec<Action>, TextError> {
    let reader = Reader {
        text,
        matches,
        ports,
    };
    reader.list(begin, text.len(), 0)
}

/// Where the part that begins at `at` ends: at a comma or space, but not
/// within brackets.
fn part_end(text: &str, at: usize, end: usize) -> usize {
    let mut depth = 0_usize;
    for (index, byte) in text.as_bytes()[at..end].iter().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b',' | b' ' | b'\t' | b'\n' | b'\r' if depth == 0 => return at + index,
            _ => {}
        }
    }
    end
}

impl<'a> Reader<'a> {
    fn wrong(&self, at: usize, what: impl Into<String>) -> TextError {
        TextError::new(self.text, at, what)
    }

    fn list(&self, begin: usize, end: usize, depth: usize) -> Result<Vec<Action>, TextError> {
        let mut list = Vec::new();
        let mut at = begin;
        let (mut drop, mut any) = (None, false);
        while at < end {
            if matches!(
                self.text.as_bytes()[at],
                b',' | b' ' | b'\t' | b'\n' | b'\r'
            ) {
                at += 1;
                continue;
            }
            let stop = part_end(self.text, at, end);
            any = true;
            if &self.text[at..stop] == "drop" {
                drop = Some(at);
            } else {
                list.push(self.one(at, stop, depth)?);
            }
            at = stop;
        }
        match drop {
            Some(at) if !list.is_empty() => Err(self.wrong(at, "`drop` stands alone")),
            None if !any => Err(self.wrong(begin, "expected actions, as output:2, or drop")),
            _ => Ok(list),
        }
    }

    fn one(&self, at: usize, end: usize, depth: usize) -> Result<Action, TextError> {
        let part = &self.text[at..end];
        let name_end = part.find([':', '(']).unwrap_or(part.len());
        let name = part[..name_end].to_ascii_lowercase();
        let mut from = at + name_end;
        let mut to = end;
        let round = part[name_end..].starts_with('(');
        if round {
            if !part.ends_with(')') {
                return Err(self.wrong(end, "expected `)`"));
            }
            to -= 1;
        }
        if name_end < part.len() {
            from += 1;
        }
        let has_arg = name_end < part.len();
        let arg = &self.text[from..to];
        if let Some(plain) = plain(&name).filter(|_| !has_arg) {
            return Ok(plain);
        }
        match (name.as_str(), round) {
            ("output", _) => self.output(arg, from),
            ("mirror", false) => Ok(Action::Mirror(self.port(arg, from)?)),
            ("controller", _) if !has_arg => Ok(Action::Controller {
                max_len: CONTROLLER,
            }),
            ("controller", _) => {
                let (from, arg) = match arg.strip_prefix("max_len=") {
                    Some(rest) => (from + 8, rest),
                    None => (from, arg),
                };
                let max_len = self.number(arg, from)?;
                Ok(Action::Controller { max_len })
            }
            ("set_field", false) => self.set_field(arg, from),
            ("push_vlan", false) => Ok(Action::PushVlan(self.number(arg, from)?)),
            ("meter", false) => Ok(Action::Meter(self.number(arg, from)?)),
            ("goto_table", false) => Ok(Action::Goto(self.number(arg, from)?)),
            ("resubmit", true) => {
                let table = arg.strip_prefix(',');
                let table = table.ok_or_else(|| self.wrong(from, "expected (,TABLE)"))?;
                Ok(Action::Resubmit(self.number(table, from + 1)?))
            }
            ("ct", _) => self.ct(from, to),
            ("write_actions", true) if depth < DEPTH => {
                Ok(Action::WriteActions(self.list(from, to, depth + 1)?))
            }
            ("write_metadata", false) => {
                let (value, mask) = self.value(Field::Metadata, arg, from)?;
                Ok(Action::WriteMetadata {
                    value: value as u64,
                    mask: mask as u64,
                })
            }
            (name, false) if name.starts_with("mod_") => self.modify(name, arg, at, from),
            _ if !has_arg => match self.port(part, at) {
                Ok(port) => Ok(Action::Output(port)),
                Err(_) => Err(self.unknown(part, at)),
            },
            _ => Err(self.unknown(part, at)),
        }
    }

    fn unknown(&self, part: &str, at: usize) -> TextError {
        let what = format!(
            "`{part}` is no action: expected one as output:2, normal, drop, \
             set_field:10.0.0.1->ip_dst, goto_table:1"
        );
        self.wrong(at, what)
    }

    fn number<T: TryFrom<u128>>(&self, text: &str, at: usize) -> Result<T, TextError> {
        names::number(text)
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| {
                let bits = 8 * size_of::<T>();
                self.wrong(at, format!("expected a number of at most {bits} bits"))
            })
    }

    fn port(&self, text: &str, at: usize) -> Result<PortId, TextError> {
        let (port, _) = self.value(Field::InPort, text, at)?;
        u32::try_from(port)
            .map(PortId)
            .map_err(|_| self.wrong(at, "expected a port's number or name"))
    }

    fn output(&self, arg: &str, at: usize) -> Result<Action, TextError> {
        match plain(&arg.to_ascii_lowercase()) {
            Some(
                action @ (Action::Normal
                | Action::Flood
                | Action::All
                | Action::InPort
                | Action::Controller { .. }),
            ) => Ok(action),
            _ => Ok(Action::Output(self.port(arg, at)?)),
        }
    }

    fn value(&self, field: Field, text: &str, at: usize) -> Result<(u128, u128), TextError> {
        names::read(field, text, self.ports)
            .map_err(|expected| self.wrong(at, format!("expected {expected}")))
    }

    fn set(&self, field: Field, arg: &str, at: usize) -> Result<Action, TextError> {
        let (mut value, mut mask) = self.value(field, arg, at)?;
        if field == Field::VlanVid && mask == field.all() {
            value |= TAGGED;
            mask = VID;
        }
        // A mask's other bits do not count.
        let value = if value > field.all() {
            value
        } else {
            value & mask
        };
        Ok(Action::Set { field, value, mask })
    }

    fn set_field(&self, arg: &str, at: usize) -> Result<Action, TextError> {
        let Some((value, name)) = arg.split_once("->") else {
            return Err(self.wrong(at, "expected VALUE->FIELD"));
        };
        let name_at = at + value.len() + 2;
        self.set(self.field(name, name_at)?, value, at)
    }

    fn field(&self, name: &str, at: usize) -> Result<Field, TextError> {
        let mut first = None;
        for field in Field::named(name) {
            if self.matches.has(field.needs()) {
                return Ok(field);
            }
            first = first.or(Some(field));
        }
        first.ok_or_else(|| self.wrong(at, format!("`{name}` is no field")))
    }

    fn modify(&self, name: &str, arg: &str, at: usize, from: usize) -> Result<Action, TextError> {
        let field = match name {
            "mod_dl_src" => Field::EthSrc,
            "mod_dl_dst" => Field::EthDst,
            "mod_vlan_vid" => Field::VlanVid,
            "mod_vlan_pcp" => Field::VlanPcp,
            "mod_nw_ttl" => Field::Ttl,
            "mod_nw_ecn" => Field::IpEcn,
            "mod_nw_tos" => {
                let tos: u8 = self.number(arg, from)?;
                return Ok(Action::Set {
                    field: Field::IpDscp,
                    value: (tos >> 2).into(),
                    mask: Field::IpDscp.all(),
                });
            }
            "mod_nw_src" if self.matches.has(Needs::Arp) => Field::ArpSpa,
            "mod_nw_dst" if self.matches.has(Needs::Arp) => Field::ArpTpa,
            "mod_nw_src" | "mod_nw_dst" | "mod_tp_src" | "mod_tp_dst" => {
                self.field(name.trim_start_matches("mod_"), at)?
            }
            _ => return Err(self.unknown(name, at)),
        };
        if field == Field::VlanVid && self.number::<u16>(arg, from)? > 0xfff {
            return Err(self.wrong(from, "expected a VLAN, 0 to 4095"));
        }
        self.set(field, arg, from)
    }

    fn ct(&self, from: usize, to: usize) -> Result<Action, TextError> {
        let (mut commit, mut zone, mut table) = (false, 0, None);
        let mut at = from;
        for part in self.text[from..to].split(',') {
            match part.split_once('=') {
                None if part == "commit" => commit = true,
                None if part.is_empty() => {}
                Some(("zone", value)) => zone = self.number(value, at + 5)?,
                Some(("table", value)) => table = Some(self.number(value, at + 6)?),
                _ => return Err(self.wrong(at, "expected commit, zone=N or table=N")),
            }
            at += part.len() + 1;
        }
        Ok(Action::Ct {
            commit,
            zone,
            table,
        })
    }
}

/// Actions that are one word.
fn plain(name: &str) -> Option<Action> {
    Some(match name {
        "normal" => Action::Normal,
        "flood" => Action::Flood,
        "all" => Action::All,
        "in_port" => Action::InPort,
        "controller" => Action::Controller {
            max_len: CONTROLLER,
        },
        "dec_ttl" => Action::DecTtl,
        "pop_vlan" | "strip_vlan" => Action::PopVlan,
        "clear_actions" => Action::ClearActions,
        _ => return None,
    })
}
