//! What happens to one frame.

use std::net::IpAddr;
use std::time::Duration;

use crate::directory::NodeId;
use crate::drops::Reason;
use crate::frame::{Frame, Head, Key, Layers, Mac, PortId, Vni};

use super::many::Many;
use super::table::{Origin, Place, Station};
use super::vlan::{Tagged, Vlan};
use super::{Bridge, Output, Outputs, Reply, State, answer};

/// A frame, and what is known of it.
pub(super) struct Sent<'f, 'b> {
    pub(super) now: Duration,
    pub(super) from: Place,
    pub(super) vni: Vni,
    pub(super) tagged: Tagged,
    pub(super) key: &'f Key,
    pub(super) layers: &'f Layers,
    pub(super) frame: &'f mut Frame<'b>,
}

impl Sent<'_, '_> {
    fn station(&self, mac: Mac) -> Station {
        Station {
            vni: self.vni,
            vlan: self.tagged.vlan,
            mac,
        }
    }

    pub(super) fn domain(&self) -> (Vni, Vlan) {
        (self.vni, self.tagged.vlan)
    }

    /// Bytes of the packet, or of each that it will be cut into.
    pub(super) fn packet(&self) -> usize {
        self.layers.packet(self.frame)
    }
}

/// Whether the group is one of IEEE 802.1's that bridges keep to themselves.
fn is_link_local(mac: Mac) -> bool {
    matches!(mac.0, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f])
}

impl Bridge {
    /// Decides where a frame goes that came in `from` there. Its `key` and
    /// `layers` are what [`crate::frame::parse`] read from it; of a node's
    /// frame, the key's VNI is the tunnel's; a port's own counts, whatever the
    /// key says. The frame itself is only changed where a TCP connection is
    /// told what fits.
    ///
    /// # Errors
    ///
    /// It goes nowhere, for this reason, which has been counted (see
    /// [`Bridge::drops`]). There may be a reply all the same.
    pub fn forward(
        &mut self,
        now: Duration,
        from: Place,
        key: &Key,
        layers: &Layers,
        frame: &mut Frame<'_>,
        out: &mut Outputs,
    ) -> Result<(), Reason> {
        out.list.clear();
        out.reply = None;
        out.held = false;
        out.known = false;
        let result = self.decide(now, from, key, layers, frame, out);
        if let Err(reason) = result {
            out.list.clear();
            self.count(from, reason);
        }
        result
    }

    /// Bytes of the largest packet that takes the way of one before it, whose
    /// addresses are the same; none: each has to be looked at.
    pub(crate) fn most_on(&self, from: Place, way: &Output) -> Option<usize> {
        if let Place::Port(id) = from
            && self.ports.get(&id).is_none_or(|port| port.rate.is_some())
        {
            return None;
        }
        match way.to {
            Place::Port(id) => self.ports.get(&id).map(|port| port.config.mtu),
            Place::Node(id) => self.nodes.get(&id).map(|node| node.config.mtu),
        }
    }

    pub(super) fn count(&mut self, from: Place, reason: Reason) {
        let drops = match from {
            Place::Port(id) => self.ports.get_mut(&id).map(|port| &mut port.drops),
            Place::Node(id) => self.nodes.get_mut(&id).map(|node| &mut node.drops),
        };
        drops.unwrap_or(&mut self.drops).add(reason);
    }

    fn decide(
        &mut self,
        now: Duration,
        from: Place,
        key: &Key,
        layers: &Layers,
        frame: &mut Frame<'_>,
        out: &mut Outputs,
    ) -> Result<(), Reason> {
        let (vni, tagged, limit) = match from {
            Place::Port(id) => self.admit(now, id, key, frame.len())?,
            Place::Node(id) => {
                let node = self.nodes.get(&id).ok_or(Reason::NoPort)?;
                if !self.networks.contains_key(&key.vni) {
                    return Err(Reason::NoNetwork);
                }
                (key.vni, Tagged::from_node(key)?, node.config.limit)
            }
        };
        let sent = Sent {
            now,
            from,
            vni,
            tagged,
            key,
            layers,
            frame,
        };
        if limit > 0 || matches!(from, Place::Port(_)) {
            self.table.learn(now, &sent.station(key.src), from, limit)?;
        }
        if key.dst.is_multicast() {
            self.multicast(&sent, out)
        } else {
            self.unicast(sent, out)
        }
    }

    /// Whether the port may send the frame.
    fn admit(
        &mut self,
        now: Duration,
        id: PortId,
        key: &Key,
        len: usize,
    ) -> Result<(Vni, Tagged, usize), Reason> {
        let port = self.ports.get_mut(&id).ok_or(Reason::NoPort)?;
        if matches!(port.state, State::Prepared(_)) {
            return Err(Reason::Down);
        }
        let config = &port.config;
        let tagged = config.vlan.ingress(key)?;
        if is_link_local(key.dst) && !config.link_local {
            return Err(Reason::LinkLocal);
        }
        if config.guard {
            let arp = key.arp.is_none_or(|arp| {
                let ip = arp.sender.1;
                let told = config.ips.is_empty() || config.ips.contains(&IpAddr::V4(ip));
                arp.sender.0 == key.src && (told || ip.is_unspecified())
            });
            if !config.macs.contains(&key.src) || !arp {
                return Err(Reason::Spoofed);
            }
        }
        if let Some(rate) = &mut port.rate
            && !rate.take(now, len as u64)
        {
            return Err(Reason::RateLimited);
        }
        Ok((config.vni, tagged, config.limit))
    }

    fn unicast(&mut self, mut sent: Sent<'_, '_>, out: &mut Outputs) -> Result<(), Reason> {
        let station = sent.station(sent.key.dst);
        let Some(found) = self.table.find(sent.now, &station) else {
            return self.unknown(&sent, out);
        };
        out.known = true;
        let from_node = matches!(sent.from, Place::Node(_));
        // What was sent after a guest on its way waits here; what others send
        // goes to where the guest still is.
        let attached = match found.origin {
            Origin::Directory if from_node => self.table.attached(&station),
            _ => None,
        };
        let prepared = attached.filter(|id| self.awaits(*id));
        match prepared.map_or(found.place, Place::Port) {
            Place::Port(id) => self.deliver(&mut sent, id, out),
            Place::Node(id) => {
                if from_node {
                    let after = |left| sent.now.saturating_sub(left) < self.config.forward_for;
                    if sent.from == found.place || !found.left.is_some_and(after) {
                        return Err(Reason::SplitHorizon);
                    }
                }
                self.tunnel(&mut sent, id, out)
            }
        }
    }

    fn deliver(
        &mut self,
        sent: &mut Sent<'_, '_>,
        id: PortId,
        out: &mut Outputs,
    ) -> Result<(), Reason> {
        if sent.from == Place::Port(id) {
            return Err(Reason::SamePort);
        }
        let port = self.ports.get(&id).ok_or(Reason::NoPort)?;
        match port.state {
            State::Departed(Place::Node(node)) => return self.tunnel(sent, node, out),
            // Only a port that waits for its guest is followed to: there is no
            // ring of ports.
            State::Departed(Place::Port(to)) if self.awaits(to) => {
                return self.deliver(sent, to, out);
            }
            State::Departed(Place::Port(_)) => return Err(Reason::Down),
            State::Active | State::Prepared(_) => {}
        }
        if port.config.vni != sent.vni {
            return Err(Reason::NoNetwork);
        }
        if port.config.isolated && self.isolates(sent) {
            return Err(Reason::Isolated);
        }
        let edit = port.config.vlan.egress(&sent.tagged);
        let edit = edit.ok_or(Reason::VlanRefused)?;
        let (mtu, clamp) = (port.config.mtu, port.config.clamp_mss);
        self.fit(sent, mtu, clamp, out)?;
        if let Some(port) = self.ports.get_mut(&id)
            && let State::Prepared(hold) = &mut port.state
        {
            out.held = true;
            return hold.push(sent.frame, edit);
        }
        out.list.push(Output {
            to: Place::Port(id),
            vni: sent.vni,
            edit,
        });
        Ok(())
    }

    /// Whether the port's guest is on its way to it.
    fn awaits(&self, id: PortId) -> bool {
        let port = self.ports.get(&id);
        port.is_some_and(|port| matches!(port.state, State::Prepared(_)))
    }

    fn tunnel(
        &mut self,
        sent: &mut Sent<'_, '_>,
        id: NodeId,
        out: &mut Outputs,
    ) -> Result<(), Reason> {
        let node = self.nodes.get(&id).ok_or(Reason::NoTunnel)?;
        let mtu = node.config.mtu;
        self.fit(sent, mtu, false, out)?;
        out.list.push(Output {
            to: Place::Node(id),
            vni: sent.vni,
            edit: sent.tagged.to_node(),
        });
        Ok(())
    }

    /// Whether it comes from an isolated port, here or elsewhere.
    pub(super) fn isolates(&self, sent: &Sent<'_, '_>) -> bool {
        match sent.from {
            Place::Port(id) => {
                let port = self.ports.get(&id);
                port.is_some_and(|port| port.config.isolated)
            }
            Place::Node(_) => self.table.isolated(&sent.station(sent.key.src)),
        }
    }

    /// Whether the frame fits; if not, its sender is told. Of a TCP connection
    /// that begins, the largest segment is made to fit what its other end can
    /// take: the smaller of the ports' at both ends.
    fn fit(
        &mut self,
        sent: &mut Sent<'_, '_>,
        mtu: usize,
        clamp: bool,
        out: &mut Outputs,
    ) -> Result<(), Reason> {
        if sent.packet() > mtu {
            self.tell_too_big(sent, mtu, out);
            return Err(Reason::TooBig);
        }
        let from = match sent.from {
            Place::Port(id) => self.ports.get(&id).map(|port| &port.config),
            Place::Node(_) => None,
        };
        let clamps = clamp || from.is_some_and(|from| from.clamp_mss);
        if clamps {
            let most = from.map_or(mtu, |from| from.mtu.min(mtu));
            let partial = sent.frame.offload.checksum.is_some();
            let head = sent.frame.head.bytes_mut();
            answer::clamp(sent.key, sent.layers, head, most, partial);
        }
        Ok(())
    }

    fn tell_too_big(&mut self, sent: &Sent<'_, '_>, mtu: usize, out: &mut Outputs) {
        let head = sent.frame.head.bytes();
        let Some(reply) = answer::too_big(sent.key, sent.layers, head, mtu) else {
            return;
        };
        let bucket = match sent.from {
            Place::Port(id) => self.ports.get_mut(&id).map(|port| &mut port.buckets),
            Place::Node(id) => self.nodes.get_mut(&id).map(|node| &mut node.buckets),
        };
        if bucket.is_some_and(|bucket| bucket.errors.take(sent.now, 1)) {
            self.reply(sent, reply, out);
        }
    }

    /// Sends a frame without tags back to where `sent` came from.
    pub(super) fn reply(&self, sent: &Sent<'_, '_>, head: Head, out: &mut Outputs) {
        let tagged = sent.tagged.bare();
        let edit = match sent.from {
            Place::Port(id) => {
                let port = self.ports.get(&id);
                port.and_then(|port| port.config.vlan.egress(&tagged))
            }
            Place::Node(_) => Some(tagged.to_node()),
        };
        // Behind a customer's own tag, there are stations that would not see
        // an answer without it.
        if let Some(edit) = edit.filter(|_| !sent.tagged.is_double()) {
            let output = Output {
                to: sent.from,
                vni: sent.vni,
                edit,
            };
            out.reply = Some(Reply { output, head });
        }
    }

    fn unknown(&mut self, sent: &Sent<'_, '_>, out: &mut Outputs) -> Result<(), Reason> {
        let network = self.networks.get(&sent.vni).ok_or(Reason::NoNetwork)?;
        if !network.config.flood_unknown {
            return Err(Reason::NoDestination);
        }
        self.storm(sent, Many::Unknown)?;
        self.flood(sent, out, |_, _| true)
    }
}
