//! Stateful security groups: which connections a port's guest may have.
//!
//! A port is in groups; a group has rules for connections that come in to its
//! ports and that go out from them. What no rule lets through is dropped; what
//! belongs to a connection that was let through passes, with ICMP errors about
//! it. All fails closed: a port that is not known, or is in a group that is not
//! known, gets and sends nothing but ARP and neighbour discovery, without which
//! rules could not be told to work.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::conntrack::{Connections, Found, Full, Tuple};
use crate::drops::Reason;
use crate::frame::key::{ethertype, protocol};
use crate::frame::{Key, Layers, PortId};

/// Where a frame goes, as its port's guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// To the guest.
    In,
    /// From the guest.
    Out,
}

impl Direction {
    fn opposite(self) -> Self {
        match self {
            Self::In => Self::Out,
            Self::Out => Self::In,
        }
    }
}

/// With whom a connection is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remote {
    /// Anybody.
    #[default]
    Any,
    /// Addresses that begin with these bits.
    Network {
        /// The address.
        address: IpAddr,
        /// How many of its bits count.
        prefix: u8,
    },
    /// Members of this group; nobody, if none are known.
    Group(String),
}

/// What a rule lets through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Who begins the connection.
    pub direction: Direction,
    /// IP's protocol; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u8>,
    /// Destination ports, first and last (TCP, UDP, SCTP); none: all. A rule
    /// with ports lets nothing through that has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<(u16, u16)>,
    /// With whom.
    #[serde(default)]
    pub remote: Remote,
}

/// Why a rule makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRule {
    /// Ports of something that has none, or the last before the first.
    #[error("ports are 1 to 65535, the first before the last, and of tcp, udp or sctp")]
    Ports,
    /// More bits than an address has.
    #[error("an IPv4 prefix has 0 to 32 bits, an IPv6 prefix 0 to 128")]
    Prefix,
}

impl Rule {
    /// Whether it makes sense.
    ///
    /// # Errors
    ///
    /// See [`BadRule`].
    pub fn check(&self) -> Result<(), BadRule> {
        if let Some((first, last)) = self.ports {
            let has_ports = matches!(
                self.protocol,
                Some(protocol::TCP | protocol::UDP | protocol::SCTP)
            );
            if !has_ports || first == 0 || first > last {
                return Err(BadRule::Ports);
            }
        }
        match self.remote {
            Remote::Network { address, prefix }
                if prefix > if address.is_ipv4() { 32 } else { 128 } =>
            {
                Err(BadRule::Prefix)
            }
            _ => Ok(()),
        }
    }
}

/// A group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Group {
    /// What it lets through.
    pub rules: Vec<Rule>,
}

/// What is done with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes.
    Pass,
    /// It is dropped.
    Drop(Reason),
}

/// All groups, and the ports that are in them: swapped whole when something
/// changes, as flow tables are. Connections outlive it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Groups {
    /// Differs from that of all before: connections that were let through by
    /// others are judged again.
    pub generation: u64,
    /// Groups by name.
    pub groups: BTreeMap<String, Group>,
    /// The addresses of groups' members, wherever they and the groups are.
    pub members: BTreeMap<String, HashSet<IpAddr>>,
    /// The groups that a port is in; without any, it has no connections.
    pub ports: BTreeMap<PortId, Vec<String>>,
    /// Until then, connections (of TCP and ICMP) whose beginning was not seen are
    /// taken over if rules would have let them begin.
    pub adopts: Duration,
    /// The same of single ports.
    pub came: HashMap<PortId, Duration>,
}

/// Zones of ports are no zones of flows.
fn zone(port: PortId) -> u64 {
    1 << 32 | u64::from(port.0)
}

fn contains(address: IpAddr, prefix: u8, ip: IpAddr) -> bool {
    let same = |a: u128, b: u128, width: u32| {
        let prefix = u32::from(prefix).min(width);
        prefix == 0 || (a ^ b) >> (width - prefix) == 0
    };
    match (address, ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(u32::from(a).into(), u32::from(b).into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.into(), b.into(), 128),
        _ => false,
    }
}

/// What works without rules: ARP, and what IPv6 needs to find neighbours and
/// routers, and to say which groups it listens to.
fn is_discovery(key: &Key, direction: Direction) -> bool {
    if matches!(key.ethertype, ethertype::ARP | ethertype::RARP) {
        return true;
    }
    let icmp6 = key.ethertype == ethertype::IPV6 && key.protocol == protocol::ICMPV6;
    let Some((kind, _)) = key.ports.filter(|_| icmp6) else {
        return false;
    };
    match (kind, direction) {
        (135 | 136, _) => true,
        // Routers ask who listens, and say that they are there; guests answer.
        (130 | 134, Direction::In) => true,
        (131 | 132 | 133 | 143, Direction::Out) => true,
        _ => false,
    }
}

impl Groups {
    /// Whether a frame may pass that goes to or comes from a port's guest.
    /// `head` begins as the frame does, with `layers` in it.
    pub fn check(
        &self,
        now: Duration,
        connections: &Connections,
        (key, layers, head): (&Key, Layers, &[u8]),
        direction: Direction,
        port: PortId,
    ) -> Verdict {
        if is_discovery(key, direction) {
            return Verdict::Pass;
        }
        let Some(groups) = self.of(port) else {
            return Verdict::Drop(Reason::Group);
        };
        if !matches!(key.ethertype, ethertype::IPV4 | ethertype::IPV6) {
            return Verdict::Drop(Reason::Group);
        }
        let zone = zone(port);
        let known = |tuple: Tuple, direction: Direction, generation: u64| {
            // A fragment is judged by the first of its datagram.
            if generation == self.generation {
                return Verdict::Pass;
            }
            if tuple.fragments || !self.allows(&groups, &tuple, direction) {
                connections.remove(zone, tuple);
                return Verdict::Drop(Reason::Group);
            }
            // It is there: there is room for it.
            let _ = connections.commit(now, zone, tuple, self.generation);
            Verdict::Pass
        };
        let began = |reply| {
            if reply {
                direction.opposite()
            } else {
                direction
            }
        };
        let verdict = match connections.find(now, zone, key, layers, head) {
            Found::Known {
                tuple,
                reply,
                generation,
            } => known(tuple, began(reply), generation),
            // An error goes against what it is about.
            Found::Related {
                tuple,
                reply,
                generation,
            } => known(tuple, began(!reply), generation),
            Found::New(tuple) if !self.allows(&groups, &tuple, direction) => {
                Verdict::Drop(Reason::Group)
            }
            Found::New(tuple) => match connections.commit(now, zone, tuple, self.generation) {
                Ok(()) => Verdict::Pass,
                Err(Full) => Verdict::Drop(Reason::Connections),
            },
            Found::Within(tuple) if self.adopts(now, port) => {
                self.adopt(now, connections, &groups, tuple, direction, port)
            }
            Found::Within(_) | Found::Invalid => Verdict::Drop(Reason::NoConnection),
        };
        if verdict == Verdict::Pass && key.fragment == Some(false) {
            connections.expect_fragments(now, zone, key, self.generation);
        }
        verdict
    }

    /// A frame in the middle of a connection that nothing is known of: it may
    /// have been begun by either side; an answer of ICMP by the other one.
    fn adopt(
        &self,
        now: Duration,
        connections: &Connections,
        groups: &[&Group],
        tuple: Tuple,
        direction: Direction,
        port: PortId,
    ) -> Verdict {
        let answers = matches!(tuple.protocol, protocol::ICMP | protocol::ICMPV6);
        let as_begun = if !answers && self.allows(groups, &tuple, direction) {
            tuple
        } else if self.allows(groups, &tuple.reversed(), direction.opposite()) {
            tuple.reversed()
        } else {
            return Verdict::Drop(Reason::NoConnection);
        };
        match connections.adopt(now, zone(port), as_begun, self.generation) {
            Ok(()) => Verdict::Pass,
            Err(Full) => Verdict::Drop(Reason::Connections),
        }
    }

    fn adopts(&self, now: Duration, port: PortId) -> bool {
        let came = self.came.get(&port);
        now < self.adopts || came.is_some_and(|until| now < *until)
    }

    /// A port's groups; none if it, or one of them, is not known.
    fn of(&self, port: PortId) -> Option<Vec<&Group>> {
        let names = self.ports.get(&port)?;
        names.iter().map(|name| self.groups.get(name)).collect()
    }

    fn allows(&self, groups: &[&Group], tuple: &Tuple, direction: Direction) -> bool {
        let mut rules = groups.iter().flat_map(|group| &group.rules);
        rules.any(|rule| self.lets(rule, tuple, direction))
    }

    fn lets(&self, rule: &Rule, tuple: &Tuple, direction: Direction) -> bool {
        let remote = match direction {
            Direction::In => tuple.src,
            Direction::Out => tuple.dst,
        };
        let has_ports = matches!(
            tuple.protocol,
            protocol::TCP | protocol::UDP | protocol::SCTP
        );
        let within = |(first, last): (u16, u16)| {
            has_ports && RangeInclusive::new(first, last).contains(&tuple.ports.1)
        };
        rule.direction == direction
            && rule.protocol.is_none_or(|wanted| wanted == tuple.protocol)
            && rule.ports.is_none_or(within)
            && match &rule.remote {
                Remote::Any => true,
                Remote::Network { address, prefix } => contains(*address, *prefix, remote),
                Remote::Group(name) => self
                    .members
                    .get(name)
                    .is_some_and(|members| members.contains(&remote)),
            }
    }
}

/// A port has gone: its connections with it.
pub fn forget(connections: &Connections, port: PortId) {
    connections.clear(zone(port));
}
