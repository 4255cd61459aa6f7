//! Frames to all, to groups, and to those whom nobody knows.

use crate::drops::Reason;
use crate::frame::Mac;
use crate::frame::key::ethertype;

use super::forward::Sent;
use super::snoop::{Snoop, is_local};
use super::table::Place;
use super::{Bridge, Output, Outputs, State, answer, igmp};

/// What kind of frame it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Many {
    Broadcast,
    Multicast,
    Unknown,
}

impl Bridge {
    /// Whether the sender has not sent too many of them.
    pub(super) fn storm(&mut self, sent: &Sent<'_, '_>, kind: Many) -> Result<(), Reason> {
        let buckets = match sent.from {
            Place::Port(id) => self.ports.get_mut(&id).map(|port| &mut port.buckets),
            Place::Node(id) => self.nodes.get_mut(&id).map(|node| &mut node.buckets),
        };
        let Some(buckets) = buckets else {
            return Ok(());
        };
        let (bucket, reason) = match kind {
            Many::Broadcast => (&mut buckets.broadcast, Reason::StormBroadcast),
            Many::Multicast => (&mut buckets.multicast, Reason::StormMulticast),
            Many::Unknown => (&mut buckets.unknown, Reason::StormUnknown),
        };
        match bucket
            .as_mut()
            .is_none_or(|bucket| bucket.take(sent.now, 1))
        {
            true => Ok(()),
            false => Err(reason),
        }
    }

    pub(super) fn multicast(
        &mut self,
        sent: &Sent<'_, '_>,
        out: &mut Outputs,
    ) -> Result<(), Reason> {
        let kind = match sent.key.dst == Mac::BROADCAST {
            true => Many::Broadcast,
            false => Many::Multicast,
        };
        self.storm(sent, kind)?;
        let network = self.networks.get(&sent.vni).ok_or(Reason::NoNetwork)?;
        let config = network.config;
        if config.suppress && matches!(sent.from, Place::Port(_)) && self.answers(sent, out) {
            return Ok(());
        }
        if !config.snooping || sent.key.fragment == Some(true) {
            return self.flood(sent, out, |_, _| true);
        }
        if igmp::is_message(sent.key) {
            return self.membership(sent, out);
        }
        let (ethertype::IPV4 | ethertype::IPV6, Some((_, group))) =
            (sent.key.ethertype, sent.key.ip)
        else {
            return self.flood(sent, out, |_, _| true);
        };
        let (now, domain) = (sent.now, sent.domain());
        if !group.is_multicast() || is_local(group) || !self.snoop.is_ruled(now, domain) {
            return self.flood(sent, out, |_, _| true);
        }
        self.flood(sent, out, |snoop, place| {
            snoop.listens(now, domain, group, place)
        })
    }

    /// Answers who asks for an address that is known.
    fn answers(&mut self, sent: &Sent<'_, '_>, out: &mut Outputs) -> bool {
        let Some(ip) = answer::asked(sent.key) else {
            return false;
        };
        let key = (sent.vni, sent.tagged.vlan, ip);
        let Some(mac) = self.neighbours.get(&key).copied() else {
            return false;
        };
        // Whoever asks for itself asks whether others have the address too.
        if mac == sent.key.src {
            return false;
        }
        if let Some(head) = answer::answer(sent.key, ip, mac) {
            self.reply(sent, head, out);
        }
        self.answered += u64::from(out.reply.is_some());
        out.reply.is_some()
    }

    /// Hears who listens to what. Routers hear it too; those who listen must
    /// not, or they would keep quiet themselves (RFC 4541, 2.1.1).
    fn membership(&mut self, sent: &Sent<'_, '_>, out: &mut Outputs) -> Result<(), Reason> {
        let mut bytes = [0; igmp::MESSAGE];
        let len = sent.frame.copy_from(0, &mut bytes);
        let fast = match sent.from {
            Place::Port(id) => {
                let port = self.ports.get(&id);
                port.is_some_and(|port| port.config.fast_leave)
            }
            Place::Node(_) => false,
        };
        let (now, domain, from) = (sent.now, sent.domain(), sent.from);
        let ruled = self.snoop.is_ruled(now, domain);
        let (snoop, mut query) = (&mut self.snoop, false);
        igmp::read(sent.key, sent.layers, &bytes[..len], |word| {
            query |= word == igmp::Word::Query;
            snoop.heard(now, domain, from, word, fast);
        });
        let is_query = query || matches!(bytes.get(sent.layers.transport), Some(0x11 | 130));
        self.flood(sent, out, |snoop, place| {
            let routers = matches!(place, Place::Node(_)) || snoop.asks(now, domain, place);
            is_query || !ruled || routers
        })
    }

    /// Sends it to all ports and nodes of its network that are `wanted`.
    pub(super) fn flood(
        &mut self,
        sent: &Sent<'_, '_>,
        out: &mut Outputs,
        wanted: impl Fn(&Snoop, Place) -> bool,
    ) -> Result<(), Reason> {
        let network = self.networks.get(&sent.vni).ok_or(Reason::NoNetwork)?;
        let isolated = self.isolates(sent);
        let (packet, mut too_big) = (sent.packet(), 0_u64);
        for id in &network.ports {
            let to = Place::Port(*id);
            let Some(port) = self.ports.get(id).filter(|_| sent.from != to) else {
                continue;
            };
            let active = matches!(port.state, State::Active);
            if !active || (isolated && port.config.isolated) || !wanted(&self.snoop, to) {
                continue;
            }
            let Some(edit) = port.config.vlan.egress(&sent.tagged) else {
                continue;
            };
            if packet > port.config.mtu {
                too_big += 1;
                continue;
            }
            let vni = sent.vni;
            out.list.push(Output { to, vni, edit });
        }
        // What came by a tunnel has been sent to all nodes.
        let nodes = match sent.from {
            Place::Port(_) => network.nodes.as_slice(),
            Place::Node(_) => &[],
        };
        for id in nodes {
            let to = Place::Node(*id);
            let Some(node) = self.nodes.get(id).filter(|_| wanted(&self.snoop, to)) else {
                continue;
            };
            if packet > node.config.mtu {
                too_big += 1;
                continue;
            }
            out.list.push(Output {
                to,
                vni: sent.vni,
                edit: sent.tagged.to_node(),
            });
        }
        for _ in 0..too_big {
            self.count(sent.from, Reason::TooBig);
        }
        Ok(())
    }
}
