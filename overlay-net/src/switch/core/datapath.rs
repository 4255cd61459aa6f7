//! A network as OpenFlow's controllers see it: a datapath of its own.

use std::time::Duration;

use vm_memory::VolatileSlice;

use super::way::SOMEWHERE;
use super::{Slot, Switch};
use crate::bridge::Place;
use crate::drops::{Drops, Reason};
use crate::flow::openflow::{Datapath, Description, Event, Hub, PacketIn, PortInfo, PortStats};
use crate::flow::{Action, Control, Packet, ToController};
use crate::frame::{
    Frame, HEAD, Head, Mac, Offload, PortId, Segmenter, Vni, finish_checksum, parse,
};
use crate::switch::Error;
use crate::switch::flows::FailMode;

/// The number of the port that all other nodes are behind, which controllers
/// are shown if there are any: what goes out of it goes to where the directory
/// says, or to all nodes in the network.
pub const PEERS: PortId = PortId(0xffff_fe00);

/// What happened to a port, as OpenFlow numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Came,
    Went,
    Changed,
}

/// A network while a controller's request is carried out.
struct Seen<'s> {
    switch: &'s mut Switch,
    vni: Vni,
    name: String,
}

impl Datapath for Seen<'_> {
    fn now(&self) -> Duration {
        self.switch.now
    }

    fn id(&self) -> u64 {
        self.switch.datapath_id(self.vni)
    }

    fn description(&self) -> Description {
        Description {
            manufacturer: "Blanket".to_owned(),
            hardware: "blanket-switch".to_owned(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
            serial: format!("VNI {}", self.vni),
            datapath: self.name.clone(),
        }
    }

    fn ports(&self) -> Vec<PortInfo> {
        let slots = self.switch.all().filter(|(_, slot)| slot.vni == self.vni);
        let mut ports: Vec<_> = slots
            .map(|(id, slot)| self.switch.port_info(id, slot))
            .collect();
        ports.sort_by_key(|port| port.id);
        ports.extend(self.switch.remote.as_ref().map(|_| PortInfo {
            id: PEERS,
            name: "peers".to_owned(),
            mac: made_up(PEERS),
            ..PortInfo::default()
        }));
        ports
    }

    fn control(&mut self) -> &mut Control {
        self.switch.flows.entry(self.vni).or_default().control()
    }

    fn packet_out(&mut self, port: Option<PortId>, actions: &[Action], frame: &[u8]) {
        // What was changed in the same message before it counts.
        self.switch.renew_flows(self.vni);
        self.switch.packet_out(self.vni, port, actions, frame);
    }

    fn set_down(&mut self, port: PortId, down: bool) -> bool {
        let vni = self.vni;
        let slot = self.switch.slot_mut(port);
        let Some(slot) = slot.filter(|slot| slot.vni == vni) else {
            return false;
        };
        slot.closed = down;
        true
    }
}

/// The address of a port that has none attached: as the kernel makes them up
/// for interfaces, one of its owner's own.
fn made_up(id: PortId) -> Mac {
    let [a, b, c, d] = id.0.to_be_bytes();
    Mac([0xfe, 0, a, b, c, d])
}

impl Switch {
    /// Does something with a network as a controller sees it.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn with_datapath<R>(
        &mut self,
        network: &str,
        act: impl FnOnce(&mut dyn Datapath) -> R,
    ) -> Result<R, Error> {
        let vni = self.vni(network)?;
        if let Some(flows) = self.flows.get_mut(&vni) {
            flows.fold(self.now);
        }
        let mut seen = Seen {
            switch: self,
            vni,
            name: network.to_owned(),
        };
        let done = act(&mut seen);
        self.renew_flows(vni);
        self.catch_up();
        Ok(done)
    }

    /// What tells a network's controllers.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn hub(&self, network: &str) -> Result<Hub, Error> {
        let vni = self.vni(network)?;
        let flows = self.flows.get(&vni);
        let missing = || Error::NoNetwork(network.to_owned());
        Ok(flows.ok_or_else(missing)?.hub.clone())
    }

    /// What a network does without a controller that it should have; none: it
    /// should have none.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn set_fail_mode(&mut self, network: &str, mode: Option<FailMode>) -> Result<(), Error> {
        self.with_flows(network, |flows, now, _, _| flows.set_fail_mode(now, mode))
    }

    /// How many controllers that a network should have it has.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn set_controllers(&mut self, network: &str, count: usize) -> Result<(), Error> {
        self.with_flows(network, |flows, now, _, _| {
            flows.set_controllers(now, count);
        })
    }

    /// Whether a network goes on without the controller that it should have.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn is_standalone(&mut self, network: &str) -> Result<bool, Error> {
        self.with_flows(network, |flows, _, _, _| flows.is_open())
    }

    /// Makes a network's flows what they were when it was made, for those that
    /// were added by command to be added again.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn reset_flows(&mut self, network: &str) -> Result<(), Error> {
        self.with_flows(network, |flows, now, _, _| flows.reset(now))
    }

    /// The number of a network's datapath: the highest 40 bits are the node's,
    /// the others the VNI.
    pub(super) fn datapath_id(&self, vni: Vni) -> u64 {
        self.identity & !u64::from(Vni::MAX) | u64::from(vni.number())
    }

    /// What this node is known by to controllers.
    pub fn set_identity(&mut self, identity: u64) {
        self.identity = identity;
    }

    fn renew_flows(&mut self, vni: Vni) {
        let now = self.now;
        if let Some(flows) = self.flows.get_mut(&vni) {
            flows.publish(now);
        }
    }

    fn port_info(&self, id: PortId, slot: &Slot) -> PortInfo {
        let mut drops = slot.drops.clone();
        if let Some(more) = self.bridge.drops(Some(Place::Port(id))) {
            drops.merge(more);
        }
        let mut sent = Drops::default();
        if let Some(port) = &slot.port {
            sent.merge(port.drops());
        }
        let out = |reason| drops.of(reason);
        let tx_dropped = out(Reason::Full) + out(Reason::Down) + out(Reason::TooBig);
        let macs = self.bridge.port(id).map(|port| &port.macs[..]);
        let mac = macs.and_then(<[Mac]>::first).copied();
        PortInfo {
            id,
            name: slot.name.clone(),
            mac: mac.unwrap_or_else(|| made_up(id)),
            down: slot.closed,
            unplugged: slot.port.is_none(),
            stats: PortStats {
                rx_packets: slot.rx.frames,
                tx_packets: slot.tx.frames,
                rx_bytes: slot.rx.bytes,
                tx_bytes: slot.tx.bytes,
                rx_dropped: drops.total() - tx_dropped,
                tx_dropped: tx_dropped + sent.total(),
            },
        }
    }

    /// Tells the controllers of a port's network what happened to it.
    pub(super) fn tell_of_port(&self, id: PortId, slot: &Slot, turn: Turn) {
        let Some(flows) = self.flows.get(&slot.vni) else {
            return;
        };
        let event = Event::Port(turn as u8, self.port_info(id, slot));
        // Who has no room for it has been told too much already.
        let _ = flows.hub.send(&event);
    }

    /// Sends a frame to the controllers of its network, as it would be on a
    /// wire: in segments, with checksums.
    pub(super) fn punt(&mut self, from: Place, what: ToController, packet: &Packet<'_, '_>) {
        let vni = packet.key.vni;
        let hub = self.flows.get(&vni).map(|flows| flows.hub.clone());
        let Some(hub) = hub.filter(Hub::has_sessions) else {
            return self.drop(from, Reason::NoController);
        };
        let send = |frame: &Frame<'_>| {
            hub.send(&Event::Packet(PacketIn {
                port: packet.key.port,
                vni: vni.number(),
                what,
                frame: frame.to_vec().into(),
            }))
        };
        let sent = if packet.frame.offload.segments.is_some() {
            Segmenter::new(packet.frame, usize::MAX, true).and_then(|mut segments| {
                while let Some(segment) = segments.next() {
                    send(&segment)?;
                }
                Ok(())
            })
        } else {
            let mut whole = packet.frame.clone();
            finish_checksum(&mut whole).and_then(|()| send(&whole))
        };
        if let Err(reason) = sent {
            self.drop(from, reason);
        }
    }

    /// Does with a frame what a controller says.
    fn packet_out(&mut self, vni: Vni, port: Option<PortId>, actions: &[Action], bytes: &[u8]) {
        let id = port.unwrap_or_default();
        // What came by a tunnel never leaves by one.
        let from = if id == PEERS {
            SOMEWHERE
        } else {
            Place::Port(id)
        };
        let mut bytes = bytes.to_vec();
        let Ok((key, layers)) = parse(&bytes[..bytes.len().min(HEAD)], bytes.len(), id, vni) else {
            return self.drop(from, Reason::Malformed);
        };
        let head = Head::of(&bytes);
        let body = [VolatileSlice::from(
            bytes.get_mut(HEAD..).unwrap_or_default(),
        )];
        let mut frame = Frame {
            head,
            body: &body,
            offload: Offload::default(),
        };
        let flows = self.flows.get_mut(&vni);
        let Some(mut pipeline) = flows.and_then(|flows| flows.pipeline.take()) else {
            return self.drop(from, Reason::NoNetwork);
        };
        let now = self.now;
        let mut packet = Packet {
            frame: &mut frame,
            key,
            layers,
        };
        let mut out = super::way::Out::new(self, from);
        pipeline.run_actions(now, actions, &mut packet, &mut out);
        if let Some(flows) = self.flows.get_mut(&vni) {
            flows.pipeline = Some(pipeline);
        }
    }
}
