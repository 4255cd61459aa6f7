//! Doing what was decided: rewriting frames and sending them on.

use std::time::Duration;

use super::conntrack::Connections;
use super::fields::Field;
use super::meter::{Metered, remarked};
use super::rewrite;
use super::walk::{Decision, Step, ToController};
use crate::drops::Reason;
use crate::frame::{Frame, Key, Layers, PortId, parse};

/// A frame with what its headers say.
#[derive(Debug)]
pub struct Packet<'f, 'b> {
    /// The frame.
    pub frame: &'f mut Frame<'b>,
    /// What its headers say, now.
    pub key: Key,
    /// Where they begin, now.
    pub layers: Layers,
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Out of this port.
    Port(PortId),
    /// Out of the one that it came in at.
    InPort,
    /// Through the learning bridge.
    Normal,
    /// Out of all ports that broadcasts go to, but the one it came in at.
    Flood,
    /// Out of all ports of its network but the one that it came in at.
    All,
    /// A copy to a port that only watches.
    Mirror(PortId),
    /// To the controllers.
    Controller(ToController),
}

/// Takes what comes out of the tables.
pub trait Sink {
    /// Sends a frame on. It is only there during the call.
    fn send(&mut self, target: Target, packet: &Packet<'_, '_>);

    /// It was dropped, for this reason, after what was sent, if anything.
    fn dropped(&mut self, reason: Reason, packet: &Packet<'_, '_>);
}

/// Where and as what a frame is looked up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Start {
    /// In which table.
    pub(super) table: u8,
    /// What is known of its connection.
    pub(super) state: u8,
    /// What entries handed on.
    pub(super) metadata: u64,
}

/// How it goes on after a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goes {
    /// It does not.
    Done,
    /// In another table.
    On(Start),
}

impl Packet<'_, '_> {
    /// Reads the headers again after they were changed.
    fn again(&mut self) -> Result<(), Reason> {
        let (key, layers) = parse(
            self.frame.head.bytes(),
            self.frame.len(),
            self.key.port,
            self.key.vni,
        )
        .map_err(|_| Reason::Rewrite)?;
        (self.key, self.layers) = (key, layers);
        Ok(())
    }

    /// How many packets it stands for.
    fn packets(&self) -> u32 {
        let Some(segments) = self.frame.offload.segments else {
            return 1;
        };
        let payload = self.frame.len().saturating_sub(self.layers.payload);
        let size = usize::from(segments.size).max(1);
        u32::try_from(payload.div_ceil(size)).unwrap_or(1).max(1)
    }
}

/// Does what was decided.
pub(super) fn execute(
    decision: &Decision,
    now: Duration,
    packet: &mut Packet<'_, '_>,
    connections: &Connections,
    sink: &mut dyn Sink,
) -> Goes {
    for step in &decision.steps {
        match one(step, now, packet, connections, sink) {
            Ok(Goes::Done) => {}
            Ok(on) => return on,
            Err(reason) => {
                sink.dropped(reason, packet);
                return Goes::Done;
            }
        }
    }
    if let Some(reason) = decision.drop {
        sink.dropped(reason, packet);
    }
    Goes::Done
}

fn one(
    step: &Step,
    now: Duration,
    packet: &mut Packet<'_, '_>,
    connections: &Connections,
    sink: &mut dyn Sink,
) -> Result<Goes, Reason> {
    match *step {
        Step::Output(port) if port == packet.key.port => {}
        Step::Output(port) => sink.send(Target::Port(port), packet),
        Step::InPort => sink.send(Target::InPort, packet),
        Step::Normal => sink.send(Target::Normal, packet),
        Step::Flood => sink.send(Target::Flood, packet),
        Step::All => sink.send(Target::All, packet),
        Step::Mirror(port) => sink.send(Target::Mirror(port), packet),
        Step::Controller(what) => sink.send(Target::Controller(what), packet),
        Step::Set { field, value, mask } => {
            rewrite::set(packet.frame, &packet.key, packet.layers, field, value, mask)?;
            packet.again()?;
        }
        Step::DecTtl => {
            if packet.key.ttl <= 1 {
                return Err(Reason::Ttl);
            }
            let ttl = u128::from(packet.key.ttl - 1);
            let (key, layers) = (&packet.key, packet.layers);
            rewrite::set(packet.frame, key, layers, Field::Ttl, ttl, 0xff)?;
            packet.key.ttl -= 1;
        }
        Step::PushVlan(tpid) => {
            let tci = packet.key.tags[0].map_or(0, |tag| tag.tci);
            rewrite::push_tag(packet.frame, tpid, tci)?;
            packet.again()?;
        }
        Step::PopVlan if packet.key.tags[0].is_some() => {
            rewrite::pop_tag(packet.frame)?;
            packet.again()?;
        }
        Step::PopVlan => {}
        Step::Meter(ref meter) => match meter.take(now, packet.packets(), packet.frame.len()) {
            Metered::Pass => {}
            Metered::Drop => return Err(Reason::Meter),
            Metered::Remark(steps) => {
                let dscp = remarked(packet.key.tos >> 2, steps);
                let (key, layers) = (&packet.key, packet.layers);
                rewrite::set(packet.frame, key, layers, Field::IpDscp, dscp.into(), 0x3f)?;
                packet.key.tos = dscp << 2 | packet.key.tos & 3;
            }
        },
        Step::Ct {
            commit,
            zone,
            table,
        } => {
            let head = packet.frame.head.bytes();
            let (key, layers) = (&packet.key, packet.layers);
            let state = connections.track(now, zone.into(), key, layers, head, commit);
            if let Some((table, metadata)) = table {
                return Ok(Goes::On(Start {
                    table,
                    state,
                    metadata,
                }));
            }
        }
    }
    Ok(Goes::Done)
}
