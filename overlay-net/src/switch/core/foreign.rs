//! Peers that are no switches: VXLAN and Geneve.

use super::Switch;
use crate::api::types::{Peer, PeerSpec};
use crate::bridge::NodeConfig;
use crate::directory::NodeId;
use crate::frame::Vni;
use crate::switch::Error;
use crate::switch::remote::CONTROL;

/// Addresses that are learned from such a peer: nobody tells where they are.
const ADDRESSES: usize = 4096;

impl Switch {
    /// All others in a network.
    pub(super) fn members(&self, vni: Vni) -> Vec<NodeId> {
        let mut members = self.directory.members(vni);
        let foreign = self.foreign.iter().filter(|(_, vnis)| vnis.contains(&vni));
        members.extend(foreign.map(|(node, _)| *node));
        members
    }

    /// Has the bridge know who is in a network.
    pub(super) fn renew_members(&mut self, vni: Vni) {
        let members = self.members(vni);
        self.bridge.set_members(vni, &members);
    }

    /// Adds a peer that is no switch, or changes what it is.
    ///
    /// # Errors
    ///
    /// There are no tunnels here, or there is no way to it.
    pub fn add_foreign(&mut self, name: &str, spec: &PeerSpec) -> Result<Peer, Error> {
        let vnis = spec.foreign.as_ref().map(|foreign| foreign.vnis.clone());
        let vnis = vnis.unwrap_or_default();
        if vnis.iter().any(|vni| vni.number() == CONTROL) {
            return Err(Error::Reserved);
        }
        if let Some(old) = self.peers.remove(name) {
            self.part(old);
        }
        let remote = self.remote.as_mut().ok_or(Error::Alone)?;
        let (node, mtu) = remote.add_foreign(spec)?;
        let config = NodeConfig {
            mtu,
            limit: ADDRESSES,
            ..NodeConfig::default()
        };
        self.bridge.set_node(node, config);
        self.peers.insert(name.to_owned(), node);
        self.foreign.insert(node, vnis.clone());
        for vni in vnis {
            if self.flows.contains_key(&vni) {
                self.renew_members(vni);
            }
        }
        self.peer(name, node)
    }

    /// Another peer takes the name of this one.
    pub(super) fn part(&mut self, node: NodeId) {
        if let Some(remote) = &mut self.remote {
            remote.remove(node);
        }
        self.forget_foreign(node);
        self.bridge.remove_node(self.now, node);
        self.gossip.down(node);
    }

    /// A peer has gone: if it was no switch, it is in no network any more.
    pub(super) fn forget_foreign(&mut self, node: NodeId) {
        for vni in self.foreign.remove(&node).unwrap_or_default() {
            self.renew_members(vni);
        }
    }
}
