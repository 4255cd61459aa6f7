//! What is known: keys, values, versions.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::bridge::Vlan;
use crate::frame::{Mac, Vni};

/// A node of the overlay.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// An address, in its network and VLAN.
    Station(Vni, Vlan, Mac),
    /// A node that has ports in a network.
    Member(Vni, NodeId),
    /// A node.
    Node(NodeId),
}

/// What is known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// The node of the version has the address.
    Station {
        /// Its IP addresses.
        ips: Vec<IpAddr>,
        /// It is attached there, not just learned.
        attached: bool,
        /// Its port is isolated.
        isolated: bool,
        /// The security groups that its port is in.
        groups: GroupList,
    },
    /// The node is in the network.
    Member,
    /// How the node is reached.
    Node {
        /// Its public key.
        public: [u8; 32],
        /// Its addresses, the best first.
        endpoints: Vec<SocketAddr>,
    },
}

/// A security group as nodes tell each other of it: those of the same name are
/// the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u64);

impl GroupId {
    /// The first bytes of its name's hash.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let mut first = [0; 8];
        first.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..8]);
        Self(u64::from_be_bytes(first))
    }
}

/// Groups of a station.
pub type GroupList = Vec<GroupId>;

/// Groups of a station at most.
pub const GROUPS: usize = 16;

/// IP addresses of a station, and endpoints of a node, at most.
pub const ADDRESSES: usize = 16;

/// How new a record is: first by its epoch, which whoever makes a newer one
/// increments, then by who made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    /// Counts up.
    pub epoch: u64,
    /// Who says so; of a station, who has it.
    pub node: NodeId,
}

/// Epochs are below this.
pub const EPOCHS: u64 = 1 << 62;

/// What a version says of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Key,
    /// How new it is.
    pub version: Version,
    /// `None`: nobody has it any more (a tombstone).
    pub value: Option<Value>,
}

impl Record {
    /// Whether it holds, and `other` (of the same key) does not.
    #[must_use]
    pub fn beats(&self, other: &Self) -> bool {
        let rank = |record: &Self| (record.version, record.value.is_none());
        (rank(self), &self.value) > (rank(other), &other.value)
    }

    /// Whether an honest node could have made it.
    pub(super) fn is_sound(&self) -> bool {
        let by = self.version.node;
        let fits = match (&self.key, &self.value) {
            (_, None) => true,
            (Key::Station(..), Some(Value::Station { ips, groups, .. })) => {
                ips.len() <= ADDRESSES && groups.len() <= GROUPS
            }
            (Key::Member(_, node), Some(Value::Member)) => *node == by,
            (Key::Node(node), Some(Value::Node { endpoints, .. })) => {
                *node == by && endpoints.len() <= ADDRESSES
            }
            _ => false,
        };
        let station = match self.key {
            Key::Station(_, _, mac) => mac.is_station(),
            _ => true,
        };
        fits && station && self.version.epoch < EPOCHS
    }
}
