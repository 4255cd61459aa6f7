//! The way of a frame: flows, bridge, ports and tunnels.

use vm_memory::VolatileSlice;

use super::{Later, MAX_LATER, PEERS, Switch};
use crate::bridge::{Edit, Output, Place, Station, Vlan};
use crate::capture;
use crate::directory::NodeId;
use crate::drops::Reason;
use crate::flow::groups::Direction;
use crate::flow::{Packet, Sink, Target};
use crate::frame::key::ethertype;
use crate::frame::{Frame, HEAD, Head, Key, Layers, Offload, PortId, Segmenter, Vni, parse};
use crate::tunnel::flow_hash;

/// Where a controller's frames come from that came in nowhere.
const NOBODY: Place = Place::Port(PortId(0));

/// And those that came from a node that it did not name.
pub(super) const SOMEWHERE: Place = Place::Node(NodeId(0));

impl Switch {
    /// A frame has come in.
    pub(super) fn forward(&mut self, from: Place, vni: Vni, frame: &mut Frame<'_>) {
        let len = frame.len();
        let (mut port, mut screened) = (PEERS, false);
        if let Place::Port(id) = from {
            port = id;
            if let Some(slot) = self.slot_mut(id) {
                slot.rx.add(len);
                if slot.closed {
                    return slot.drops.add(Reason::Down);
                }
                screened = !slot.spec.groups.is_empty();
            }
        }
        let Ok((key, layers)) = parse(frame.head.bytes(), len, port, vni) else {
            return self.lose(from, Reason::Malformed, vni, frame);
        };
        if let Some(alike) = &mut self.alike {
            if alike.takes(from, &key, &layers, frame) {
                alike.frames += 1;
                alike.bytes += len as u64;
                let to = alike.to;
                return self.emit(&to, &key, frame);
            }
            // Whatever becomes of this one may change what becomes of those.
            self.end_alike();
        }
        if self.is_watched() {
            self.watch(from, vni, capture::Direction::In, frame);
        }
        if screened {
            let looked_at = (&key, layers, frame.head.bytes());
            if let Err(reason) = self.screen(port, vni, Direction::Out, looked_at) {
                return self.lose(from, reason, vni, frame);
            }
        }
        let Some(flows) = self.flows.get_mut(&vni) else {
            return self.lose(from, Reason::NoNetwork, vni, frame);
        };
        if flows.is_open() {
            self.bridge(from, &key, &layers, frame);
            return;
        }
        let Some(mut pipeline) = flows.pipeline.take() else {
            return self.lose(from, Reason::NoNetwork, vni, frame);
        };
        if pipeline.is_normal(self.now, &key, len) {
            let way = self.bridge(from, &key, &layers, frame);
            if !screened && pipeline.looks_at_nothing() {
                self.begin_alike(from, &key, way);
            }
        } else {
            let mut packet = Packet { frame, key, layers };
            let now = self.now;
            let mut out = Out::new(self, from);
            pipeline.run(now, &mut packet, &mut out);
        }
        if let Some(flows) = self.flows.get_mut(&vni) {
            flows.pipeline = Some(pipeline);
        }
    }

    /// The way through the bridge: the one that others of the same addresses
    /// take until anything changes, and the largest packet on it, if there is one.
    pub(super) fn bridge(
        &mut self,
        from: Place,
        key: &Key,
        layers: &Layers,
        frame: &mut Frame<'_>,
    ) -> Option<(Output, usize)> {
        let mut balanced;
        let mut key = key;
        if !self.vips.is_empty() {
            balanced = *key;
            if !self.balance(from, &mut balanced, frame) {
                return None;
            }
            key = &balanced;
        }
        let mut outputs = std::mem::take(&mut self.outputs);
        let bridge = &mut self.bridge;
        // What it drops, the bridge counts.
        if let Err(reason) = bridge.forward(self.now, from, key, layers, frame, &mut outputs) {
            self.lost(from, reason, key.vni, frame);
        }
        match &outputs.list[..] {
            [output] if !self.settling.is_empty() && self.waits(from, key, frame, output) => {}
            list => {
                for output in list {
                    self.emit(output, key, frame);
                }
            }
        }
        let way = match outputs.list[..] {
            [output] if outputs.known && self.vips.is_empty() && self.settling.is_empty() => {
                let most = self.bridge.most_on(from, &output);
                most.map(|most| (output, most))
            }
            _ => None,
        };
        if let Some(mut reply) = outputs.reply.take() {
            let (to, mut offload) = (reply.output, Offload::default());
            // Its sender has its turn, and cannot be sent to now.
            if to.edit.apply(&mut reply.head, &mut offload) {
                self.put_off(to.to, to.vni, 0, reply.head.bytes().to_vec(), offload);
            }
        }
        self.outputs = outputs;
        way
    }

    /// Out of all ports of a network but one, and to all other nodes in it
    /// unless it came from one.
    pub(super) fn flood(&mut self, from: Place, packet: &Packet<'_, '_>) {
        let vni = packet.key.vni;
        let ports: Vec<PortId> = self
            .all()
            .filter(|(id, slot)| slot.vni == vni && Place::Port(*id) != from)
            .map(|(id, _)| id)
            .collect();
        for id in ports {
            self.send(id, packet.frame);
        }
        if matches!(from, Place::Port(_)) {
            self.send_to_members(packet);
        }
    }

    fn send_to_members(&mut self, packet: &Packet<'_, '_>) {
        let vni = packet.key.vni;
        for node in self.members(vni) {
            self.seal(node, vni, flow_hash(&packet.key), packet.frame);
        }
    }

    /// Where a frame's destination is.
    fn find(&self, key: &Key) -> Option<Place> {
        let vlan = match key.tags[0] {
            None => Vlan::NONE,
            Some(tag) if tag.tpid == ethertype::SERVICE_VLAN => Vlan::service(tag.vid())?,
            Some(tag) => Vlan::new(tag.vid())?,
        };
        let station = Station {
            vni: key.vni,
            vlan,
            mac: key.dst,
        };
        let found = self.bridge.find(self.now, &station);
        found.map(|(place, _)| place)
    }

    /// To where a controller's frame's destination is, or to all.
    fn deliver(&mut self, from: Place, packet: &Packet<'_, '_>) {
        let key = &packet.key;
        match self.find(key) {
            Some(Place::Port(id)) => self.send(id, packet.frame),
            Some(Place::Node(node)) if from == NOBODY => {
                self.seal(node, key.vni, flow_hash(key), packet.frame);
            }
            _ => self.flood(from, packet),
        }
    }

    /// To the node that has a frame's destination, or to all in its network.
    fn send_to_peers(&mut self, from: Place, packet: &Packet<'_, '_>) {
        if !matches!(from, Place::Port(_)) {
            return self.drop(from, Reason::SplitHorizon);
        }
        let key = &packet.key;
        match self.find(key) {
            Some(Place::Node(node)) => self.seal(node, key.vni, flow_hash(key), packet.frame),
            _ => self.send_to_members(packet),
        }
    }

    pub(super) fn drop(&mut self, at: Place, reason: Reason) {
        let slot = match at {
            Place::Port(id) => self.slot_mut(id),
            Place::Node(_) => None,
        };
        match slot {
            Some(slot) => slot.drops.add(reason),
            None => self.drops.add(reason),
        }
    }

    /// Sends a frame to one of its destinations.
    pub(super) fn emit(&mut self, output: &Output, key: &Key, frame: &Frame<'_>) {
        let mut edited;
        let frame = if output.edit == Edit::None {
            frame
        } else {
            edited = frame.clone();
            if !output.edit.apply(&mut edited.head, &mut edited.offload) {
                return self.drop(output.to, Reason::Malformed);
            }
            &edited
        };
        match output.to {
            Place::Port(id) => self.send(id, frame),
            Place::Node(node) => self.seal(node, output.vni, flow_hash(key), frame),
        }
    }

    /// Sends a frame out of a port.
    pub(super) fn send(&mut self, id: PortId, frame: &Frame<'_>) {
        let grouped = self.slot(id).filter(|slot| !slot.spec.groups.is_empty());
        if let Some(vni) = grouped.map(|slot| slot.vni)
            && let Err(reason) = self.screen_to(id, vni, frame)
        {
            return self.lose(Place::Port(id), reason, vni, frame);
        }
        let sent = self.put(id, frame);
        let watched = self.is_watched();
        let Some(slot) = self.slot_mut(id) else {
            return self.answered(id, frame);
        };
        let vni = slot.vni;
        match sent {
            Ok(()) if watched => {
                self.watch(Place::Port(id), vni, capture::Direction::Out, frame);
            }
            Ok(()) => {}
            Err(reason) => {
                slot.drops.add(reason);
                self.lost(Place::Port(id), reason, vni, frame);
            }
        }
    }

    /// The same, past groups, and nobody sees it who mirrors or captures. Why it
    /// cannot be sent, which is not counted.
    pub(super) fn put(&mut self, id: PortId, frame: &Frame<'_>) -> Result<(), Reason> {
        let slot = self.slot_mut(id).ok_or(Reason::NoPort)?;
        let open = !slot.closed;
        let port = slot.port.as_mut().filter(|_| open).ok_or(Reason::Down)?;
        port.send(frame)?;
        slot.tx.add(frame.len());
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(id);
        }
        Ok(())
    }

    /// Sends a frame to a node, in segments if what is large gets lost.
    pub(super) fn seal(&mut self, node: NodeId, vni: Vni, flow: u32, frame: &Frame<'_>) {
        let to = Place::Node(node);
        let Some(remote) = &mut self.remote else {
            // It came by a tunnel and follows its guest into another one, or is
            // a message: the tunnels have their turn.
            return self.put_off(to, vni, flow, frame.to_vec(), frame.offload);
        };
        let cut = remote
            .cut(node)
            .filter(|_| frame.offload.segments.is_some());
        let sealed = match cut {
            None => remote.seal(self.now, node, vni, flow, frame),
            Some(most) => Segmenter::new(frame, most, false).and_then(|mut segments| {
                while let Some(segment) = segments.next() {
                    remote.seal(self.now, node, vni, flow, &segment)?;
                }
                Ok(())
            }),
        };
        match sealed {
            Ok(()) if self.is_watched() => self.watch(to, vni, capture::Direction::Out, frame),
            Ok(()) => {}
            Err(reason) => self.lose(to, reason, vni, frame),
        }
    }

    /// Has a frame wait until nobody has a turn.
    pub(super) fn put_off(
        &mut self,
        to: Place,
        vni: Vni,
        flow: u32,
        bytes: Vec<u8>,
        offload: Offload,
    ) {
        if self.later.len() == MAX_LATER {
            return self.drop(to, Reason::Full);
        }
        self.later.push(Later {
            to,
            vni,
            flow,
            bytes,
            offload,
        });
    }

    /// Sends what was put off.
    pub(super) fn catch_up(&mut self) {
        for mut later in std::mem::take(&mut self.later) {
            let head = Head::of(&later.bytes);
            let rest = later.bytes.get_mut(HEAD..).unwrap_or_default();
            let body = [VolatileSlice::from(rest)];
            let frame = Frame {
                head,
                body: &body,
                offload: later.offload,
            };
            match later.to {
                Place::Port(id) => self.send(id, &frame),
                Place::Node(node) => self.seal(node, later.vni, later.flow, &frame),
            }
        }
    }
}

/// Where frames go that come out of a network's flows.
pub(super) struct Out<'s> {
    switch: &'s mut Switch,
    from: Place,
}

impl<'s> Out<'s> {
    /// For a frame that came in `from` there.
    pub(super) fn new(switch: &'s mut Switch, from: Place) -> Self {
        Self { switch, from }
    }
}

impl Sink for Out<'_> {
    fn send(&mut self, target: Target, packet: &Packet<'_, '_>) {
        let (switch, from) = (&mut *self.switch, self.from);
        match target {
            // The bridge only takes frames from ports and nodes that it knows.
            Target::Normal if matches!(from, NOBODY | SOMEWHERE) => {
                switch.deliver(from, packet);
            }
            Target::Normal => {
                let mut frame = packet.frame.clone();
                switch.bridge(from, &packet.key, &packet.layers, &mut frame);
            }
            Target::Flood | Target::All => switch.flood(from, packet),
            Target::Port(PEERS) => switch.send_to_peers(from, packet),
            Target::Port(id) | Target::Mirror(id) => {
                // Nothing leaves its network.
                if switch
                    .slot(id)
                    .is_some_and(|slot| slot.vni == packet.key.vni)
                {
                    switch.send(id, packet.frame);
                } else {
                    switch.lose(from, Reason::NoPort, packet.key.vni, packet.frame);
                }
            }
            Target::InPort => {
                let (bytes, offload) = (packet.frame.to_vec(), packet.frame.offload);
                switch.put_off(from, packet.key.vni, flow_hash(&packet.key), bytes, offload);
            }
            Target::Controller(what) => switch.punt(from, what, packet),
        }
    }

    fn dropped(&mut self, reason: Reason, packet: &Packet<'_, '_>) {
        let vni = packet.key.vni;
        self.switch.lose(self.from, reason, vni, packet.frame);
    }
}
