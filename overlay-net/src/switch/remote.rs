//! The way to other nodes: tunnels over this node's uplinks, and what nodes
//! tell each other in them.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use blanket_drivers::uplink::Uplink;

use super::foreign::{Foreign, ForeignError};
use crate::api::types::PeerSpec;
use crate::directory::NodeId;
use crate::drops::{Drops, Reason};
use crate::frame::{Frame, Vni};
use crate::tunnel::io::Links;
use crate::tunnel::{
    Config, Costs, Mode, PathConfig, PeerConfig, PeerId, PeerStatus, PrivateKey, PublicKey,
    TrainBuffer, Tunnels,
};

/// What nodes tell each other goes in frames of this network, which guests
/// cannot be in.
pub(super) const CONTROL: u32 = 0;

/// A node's identifier: the first bytes of its key.
#[must_use]
pub fn node_of(public: &PublicKey) -> NodeId {
    let mut first = [0; 8];
    first.copy_from_slice(&public[..8]);
    NodeId(u64::from_be_bytes(first))
}

/// A peer as the switch knows it.
struct Peer {
    id: PeerId,
    spec: PeerSpec,
    /// It was connected when it was last looked at.
    up: bool,
}

/// See the module.
pub struct Remote {
    links: Links,
    tunnels: Tunnels,
    out: TrainBuffer,
    peers: HashMap<NodeId, Peer>,
    foreign: Foreign,
    nodes: HashMap<PeerId, NodeId>,
    /// When the tunnels want to be asked again.
    next: Duration,
}

impl Remote {
    /// Without peers. `epoch` is the time since 1970 at the switch's time 0.
    #[must_use]
    pub fn new(private: PrivateKey, epoch: Duration, uplinks: Vec<Box<dyn Uplink>>) -> Self {
        Self {
            tunnels: Tunnels::new(Config {
                private,
                epoch,
                uplinks: uplinks
                    .iter()
                    .map(|uplink| uplink.description().capabilities.payload)
                    .collect(),
                costs: Costs::measure(),
            }),
            links: Links::new(uplinks),
            out: TrainBuffer::default(),
            peers: HashMap::new(),
            foreign: Foreign::default(),
            nodes: HashMap::new(),
            next: Duration::ZERO,
        }
    }

    /// Who this node is.
    #[must_use]
    pub fn public_key(&self) -> &PublicKey {
        self.tunnels.public_key()
    }

    /// Its uplinks, for people.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        let uplinks = self.links.uplinks().iter();
        let descriptions = uplinks.map(|uplink| uplink.description());
        let lines = descriptions.map(|its| {
            format!(
                "{} on {} ({}, {})",
                its.local, its.interface, its.kind, its.mode
            )
        });
        lines.collect()
    }

    /// Where others reach it.
    pub(super) fn endpoints(&self) -> Vec<SocketAddr> {
        let uplinks = self.links.uplinks().iter();
        uplinks.map(|uplink| uplink.description().local).collect()
    }

    /// What becomes readable when something has come, of each uplink.
    pub(super) fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let own = self.links.uplinks().iter().map(|uplink| uplink.fd());
        own.chain(self.foreign.wakers())
    }

    /// What was dropped by the tunnels, and on the way to them.
    pub(super) fn drops(&self) -> Drops {
        let mut drops = self.links.drops().clone();
        drops.merge(self.tunnels.drops());
        drops.merge(&self.foreign.drops);
        drops
    }

    pub(super) fn add(
        &mut self,
        now: Duration,
        public: PublicKey,
        spec: PeerSpec,
    ) -> Result<NodeId, crate::tunnel::Error> {
        let path = |remote: &SocketAddr| PathConfig {
            uplink: 0,
            remote: *remote,
            weight: 1,
        };
        let config = PeerConfig {
            public,
            psk: None,
            paths: spec.endpoints.iter().map(path).collect(),
        };
        let id = self.tunnels.add(now, &config)?;
        let node = node_of(&public);
        let up = false;
        self.peers.insert(node, Peer { id, spec, up });
        self.nodes.insert(id, node);
        self.next = now;
        Ok(node)
    }

    /// Adds somebody else's tunnel: its number, and the bytes that a packet to
    /// it may have.
    pub(super) fn add_foreign(&mut self, spec: &PeerSpec) -> Result<(NodeId, usize), ForeignError> {
        let uplink = self.links.uplinks().first().ok_or(ForeignError::Address)?;
        self.foreign.add(uplink.as_ref(), spec)
    }

    pub(super) fn remove(&mut self, node: NodeId) -> bool {
        if self.foreign.remove(node) {
            return true;
        }
        let Some(peer) = self.peers.remove(&node) else {
            return false;
        };
        self.nodes.remove(&peer.id);
        self.tunnels.remove(peer.id)
    }

    /// What a peer was said to be.
    pub(super) fn spec(&self, node: NodeId) -> Option<&PeerSpec> {
        let own = self.peers.get(&node).map(|peer| &peer.spec);
        own.or_else(|| self.foreign.spec(node))
    }

    /// Whether a peer is not connected that should be.
    pub(super) fn waits(&self) -> bool {
        self.peers.values().any(|peer| !peer.up)
    }

    pub(super) fn status(&mut self, now: Duration, node: NodeId) -> Option<PeerStatus> {
        if self.foreign.has(node) {
            return self.foreign.status(node);
        }
        let id = self.peers.get(&node)?.id;
        self.tunnels.status(now, id)
    }

    /// The nodes that have become reachable, or are not any more, since the
    /// last call.
    pub(super) fn turned(&mut self, now: Duration) -> Vec<(NodeId, bool)> {
        let mut turned = Vec::new();
        for (node, peer) in &mut self.peers {
            let status = self.tunnels.status(now, peer.id);
            let up = status.is_some_and(|status| status.connected);
            if up != peer.up {
                peer.up = up;
                turned.push((*node, up));
            }
        }
        turned
    }

    /// Sends a frame to a node, of a flow.
    pub(super) fn seal(
        &mut self,
        now: Duration,
        node: NodeId,
        vni: Vni,
        flow: u32,
        frame: &Frame<'_>,
    ) -> Result<(), Reason> {
        if self.foreign.has(node) {
            return self.foreign.seal(node, vni, frame);
        }
        let peer = self.peers.get(&node).ok_or(Reason::NoTunnel)?.id;
        if self.out.is_full() {
            self.flush(now);
        }
        self.tunnels
            .seal(now, peer, vni, flow, frame, &mut self.out)
    }

    /// Bytes of a frame to a node that goes in one piece, if large ones should
    /// be cut before they go.
    pub(super) fn cut(&self, node: NodeId) -> Option<usize> {
        let peer = self.peers.get(&node)?.id;
        (self.tunnels.mode(peer) == Mode::PerPacket).then(|| self.tunnels.max_frame(peer))
    }

    /// Takes what has come, and hands the frames in it to `each`: how many
    /// datagrams or trains there were.
    pub(super) fn receive(
        &mut self,
        now: Duration,
        each: &mut dyn FnMut(NodeId, Vni, &mut Frame<'_>),
    ) -> io::Result<usize> {
        let foreign = self.foreign.receive(each).unwrap_or_else(|error| {
            tracing::debug!("a socket without encryption: {error}");
            0
        });
        let nodes = &self.nodes;
        let (tunnels, out) = (&mut self.tunnels, &mut self.out);
        self.links
            .receive(now, tunnels, out, &mut |peer, vni, frame| {
                if let Some(node) = nodes.get(&peer) {
                    each(*node, vni, frame);
                }
            })
            .map(|own| own + foreign)
    }

    /// Does what time asks for; when that is next.
    pub(super) fn tick(&mut self, now: Duration) -> Duration {
        if now >= self.next {
            loop {
                self.next = self.tunnels.tick(now, &mut self.out);
                self.flush(now);
                if self.next > now {
                    break;
                }
            }
        }
        self.next
    }

    /// Sends what was sealed.
    pub(super) fn flush(&mut self, now: Duration) {
        self.foreign.flush();
        if self.out.is_empty() {
            return;
        }
        if let Err(error) = self.links.send(now, &mut self.tunnels, &mut self.out) {
            // A link that is down: what was lost is counted.
            tracing::debug!("an uplink: {error}");
        }
    }
}
