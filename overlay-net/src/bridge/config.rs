//! What can be set.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::frame::{Mac, PortId, Vni};

use super::qos::Rate;
use super::table::Limits;
use super::vlan::Mode;

/// Limits of what a port or a node may send to many. Without one, there is
/// none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storm {
    /// Frames to all.
    pub broadcast: Option<Rate>,
    /// Frames to groups.
    pub multicast: Option<Rate>,
    /// Frames to addresses that nobody knows.
    pub unknown: Option<Rate>,
}

/// A port of the bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PortConfig {
    /// Its network.
    pub vni: Vni,
    /// Its VLANs.
    pub vlan: Mode,
    /// The addresses attached to it: nobody else has them.
    pub macs: Vec<Mac>,
    /// The IP addresses of the (first) attached address: asked for, the
    /// bridge answers.
    pub ips: Vec<IpAddr>,
    /// Frames come from attached addresses only, and ARP tells of them, and of
    /// `ips` if there are any.
    pub guard: bool,
    /// Other addresses are learned, so many at most.
    pub limit: usize,
    /// It only talks to ports that are not isolated.
    pub isolated: bool,
    /// Frames to the link-local groups of IEEE 802.1 (01:80:c2:00:00:00 to
    /// 0f: spanning tree, LACP, LLDP) pass.
    pub link_local: bool,
    /// Bytes that a packet may have, without Ethernet's header and tags; where
    /// a network has an MTU, what is less counts.
    pub mtu: usize,
    /// TCP connections through it learn from their first packets what fits.
    pub clamp_mss: bool,
    /// Limits of what it may send to many.
    pub storm: Storm,
    /// Bytes per second that it may send; more are dropped.
    pub rate: Option<Rate>,
    /// Its share where there is not enough for all (see [`super::Drr`]).
    pub weight: u32,
    /// A multicast listener is alone on it: one that leaves is gone at once.
    pub fast_leave: bool,
}

impl Default for PortConfig {
    fn default() -> Self {
        Self {
            vni: Vni::default(),
            vlan: Mode::default(),
            macs: Vec::new(),
            ips: Vec::new(),
            guard: false,
            limit: 1024,
            isolated: false,
            link_local: false,
            mtu: 65_535,
            clamp_mss: false,
            storm: Storm::default(),
            rate: None,
            weight: 1,
            fast_leave: false,
        }
    }
}

/// A network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Frames to addresses that nobody knows go to all; else nowhere, which
    /// suits networks whose stations are all in the directory.
    pub flood_unknown: bool,
    /// Who asks for an address that is known is answered here, and nobody
    /// else is asked.
    pub suppress: bool,
    /// Frames to groups go to those who listen.
    pub snooping: bool,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            flood_unknown: true,
            suppress: true,
            snooping: true,
        }
    }
}

/// Another node, at the other end of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Bytes that a packet to it may have, without Ethernet's header and tags.
    pub mtu: usize,
    /// So many addresses are learned from its frames: for peers that tell
    /// nothing to the directory (VXLAN, Geneve). 0: none.
    pub limit: usize,
    /// Limits of what it may send to many.
    pub storm: Storm,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            mtu: 65_535,
            limit: 0,
            storm: Storm::default(),
        }
    }
}

/// The bridge as a whole.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Limits of the table of addresses.
    pub limits: Limits,
    /// How long frames to an address that left are sent after it, if they
    /// come from nodes that do not know yet.
    pub forward_for: Duration,
    /// How often a port or a node is told that its frames are too big.
    pub errors: Rate,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            forward_for: Duration::from_secs(60),
            errors: Rate {
                per_second: 100,
                burst: 50,
            },
        }
    }
}

/// A port that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PortError {
    /// There is one.
    #[error("port {0} is there already: remove it first")]
    Exists(PortId),
    /// There is none.
    #[error("there is no port {0}")]
    Unknown(PortId),
    /// There is no such VLAN.
    #[error("there is no VLAN {0}: they are 1 to 4094")]
    Vlan(u16),
    /// An address that is no station's.
    #[error("{0} is no station's address: it is a group's, or nobody's")]
    Mac(Mac),
    /// An attached address needs one VLAN.
    #[error("addresses are attached to ports of one VLAN: make it an access or a customer port")]
    Trunk,
    /// Another port has it.
    #[error("{0} is attached to port {1}: give this one another address, or remove that port")]
    Taken(Mac, PortId),
}
