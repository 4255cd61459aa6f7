//! The JSON bodies of the switch's API, shared by its server and its clients.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /switch` | | [`Info`] |
//! | `GET /networks` | | all [`Network`]s |
//! | `PUT /networks/NAME` | [`NetworkSpec`] | [`Network`] |
//! | `DELETE /networks/NAME` | | [`Network`] as it was |
//! | `GET /ports` | | all [`PortStatus`]es |
//! | `PUT /ports/NAME` | [`PortSpec`] | [`PortStatus`] |
//! | `DELETE /ports/NAME` | | [`PortStatus`] as it was |
//! | `PUT /ports/NAME/groups` | its security groups, by name | [`PortStatus`] |
//! | `GET /groups` | | all [`GroupStatus`]es |
//! | `PUT /groups/NAME` | its [`Rule`]s | `null` |
//! | `DELETE /groups/NAME` | [`GroupRemoval`] | `null` |
//! | `POST /groups/NAME/rules` | [`Rule`] | `null` |
//! | `DELETE /groups/NAME/rules` | [`Rule`] | `null` |
//! | `PUT /ports/NAME/options` | how the bridge sees it ([`PortSpec::bridge`]) | [`PortStatus`] |
//! | `GET /peers` | | all [`Peer`]s |
//! | `PUT /peers/NAME` | [`PeerSpec`] | [`Peer`] |
//! | `DELETE /peers/NAME` | | [`Peer`] as it was |
//! | `GET /networks/NAME/macs` | | its [`MacLine`]s |
//! | `GET /networks/NAME/flows` | | its flows, a line of text each |
//! | `POST /networks/NAME/flows` | flows, a line of text each | `null` |
//! | `DELETE /networks/NAME/flows` | [`FlowFilter`] | how many there were |
//! | `GET /networks/NAME/controllers` | | its [`Controllers`] |
//! | `PUT /networks/NAME/controllers` | [`ControllerSpec`] | its [`Controllers`] |
//! | `DELETE /networks/NAME/controllers` | | [`ControllerSpec`] as it was |
//! | `POST /networks/NAME/trace` | a packet, as text | which flows it would hit, as text |
//!
//! Whatever fails is answered with a 4xx or 5xx status and a [`Problem`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::bridge::{Origin, PortConfig};
pub use crate::controllers::{ControllerSpec, ControllerStatus, Controllers, Target, Tls};
use crate::drops::Drops;
pub use crate::flow::groups::{Direction, Remote, Rule};
use crate::frame::{Mac, PortId, Vni};
pub use crate::jail::{Confinement, Seccomp};
pub use crate::switch::FailMode;
use crate::tunnel::PeerStatus;

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What is wrong, in one line.
    pub error: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// The switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Networks.
    pub networks: usize,
    /// Ports.
    pub ports: usize,
    /// What was dropped that belongs to no port.
    pub drops: Drops,
    /// Its public key, in base64, if it has a way to others.
    pub key: Option<String>,
    /// Its ways to others, for people.
    pub uplinks: Vec<String>,
    /// Where it listens for others.
    #[serde(default)]
    pub endpoints: Vec<std::net::SocketAddr>,
    /// What is left to its process.
    #[serde(default)]
    pub confinement: Confinement,
}

/// What a network is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its identifier between nodes.
    pub vni: Vni,
    /// Bytes of an IP packet at most, in all of it.
    #[serde(default = "NetworkSpec::usual_mtu")]
    pub mtu: u16,
}

impl NetworkSpec {
    /// The MTU if nothing is said.
    #[must_use]
    pub fn usual_mtu() -> u16 {
        1500
    }
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name on this node.
    pub name: String,
    /// What it is.
    pub spec: NetworkSpec,
    /// Ports on this node.
    pub ports: usize,
    /// MAC addresses that are known.
    pub macs: usize,
}

/// What is behind a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attachment {
    /// A TAP interface, made if it is not there.
    Tap(String),
    /// A vhost-user front end, which connects to this socket.
    VhostUser(PathBuf),
}

/// What a port is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// The network's name.
    pub network: String,
    /// What is behind it.
    pub attachment: Attachment,
    /// How the bridge sees it; its network is that of the network, its MTU
    /// at most.
    #[serde(default)]
    pub bridge: PortConfig,
    /// The security groups that it is in; without any, all passes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// User and group that may connect to its socket, if not the switch's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<(u32, u32)>,
}

/// Another node's switch, or somebody else's tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSpec {
    /// Its public key, in base64: it is known by that.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// Where it may be reached; none: it calls.
    #[serde(default)]
    pub endpoints: Vec<std::net::SocketAddr>,
    /// It is here because its node is in the same cluster: `blanketd` sees to
    /// it, and nobody else has to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub member: bool,
    /// It is no switch but another kind of tunnel, without a key: nothing is
    /// encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign: Option<ForeignSpec>,
}

/// Kinds of tunnels that others have, without encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForeignKind {
    /// RFC 7348.
    Vxlan,
    /// RFC 8926.
    Geneve,
}

impl ForeignKind {
    /// Its name, for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "VXLAN",
            Self::Geneve => "Geneve",
        }
    }
}

/// Somebody else's tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForeignSpec {
    /// What it is.
    pub kind: ForeignKind,
    /// The networks that it is in.
    pub vnis: Vec<Vni>,
}

/// Another node's switch, and what is known of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name on this node.
    pub name: String,
    /// What it was said to be.
    pub spec: PeerSpec,
    /// What the tunnels know of it.
    pub status: PeerStatus,
    /// What was dropped of what it sent.
    pub drops: Drops,
}

/// An address that is known in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacLine {
    /// The address.
    pub mac: Mac,
    /// Its VLAN, 0 for none; with 0x8000 it is an 802.1ad one.
    pub vlan: u16,
    /// The port that it is behind.
    pub port: Option<String>,
    /// The other switch that it is behind.
    pub peer: Option<String>,
    /// Why it is known.
    pub origin: Origin,
    /// Seconds since it was heard, if it was learned.
    pub age: Option<u64>,
}

/// Which flows are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowFilter {
    /// As text; an empty one means all.
    #[serde(default)]
    pub filter: String,
    /// Only the one with exactly this match and priority.
    #[serde(default)]
    pub strict: bool,
}

/// A security group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// What it lets through; none: ports are in it, and it is not there, so
    /// they are closed.
    pub rules: Option<Vec<Rule>>,
    /// This node's ports in it.
    pub ports: Vec<String>,
}

/// How a group is removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRemoval {
    /// Even if ports are in it, which are closed then.
    #[serde(default)]
    pub force: bool,
}

/// What went through a port in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Frames; a large one is one.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Traffic {
    /// Counts a frame of so many bytes.
    pub fn add(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes as u64;
    }
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    /// Its name on this node.
    pub name: String,
    /// Its number.
    pub id: PortId,
    /// What it is.
    pub spec: PortSpec,
    /// Why it is of no use; none: it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down: Option<String>,
    /// Where its guest is going to, or coming from, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<String>,
    /// Came in.
    pub rx: Traffic,
    /// Went out.
    pub tx: Traffic,
    /// Dropped: of what came in, and of what should have gone out.
    pub drops: Drops,
}
