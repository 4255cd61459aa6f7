//! The switch's state, and what it does:
//!
//! | module | what it does |
//! |---|---|
//! | `told` | what it is told, and tells when it is asked |
//! | `moving` | guests that come, and that go |
//! | `talk` | what switches tell each other of who is where |
//! | `turns` | ports' and uplinks' turns, and what time asks for |
//! | `captures`, `mirrors` | who sees frames besides those who get them |
//! | `options` | ports that are changed, and turns by weight |
//! | `figures`, `pings` | how it is doing; whether others answer |
//! | `foreign` | peers that are no switches |
//! | `vips` | one address for many servers |
//! | `way` | the way of a frame: flows, bridge, ports and tunnels |
//! | `alike` | frames that go the way of the one before |
//! | `groups` | security groups |
//! | `datapath` | a network as its OpenFlow controllers see it |

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::flows::Flows;
use super::remote::Remote;
use crate::api::types::{NetworkSpec, PortSpec, Traffic};
use crate::bridge::{Bridge, Outputs, Place};
use crate::directory::{Directory, Gossip, NodeId};
use crate::drops::Drops;
use crate::frame::{Mac, Offload, PortId, Vni};
use crate::port::Port;

mod alike;
mod captures;
mod datapath;
mod figures;
mod foreign;
mod groups;
mod mirrors;
mod moving;
mod options;
mod pings;
mod talk;
mod told;
mod turns;
mod vips;
mod way;

pub use captures::Stream;
pub use datapath::PEERS;
use moving::{Moving, Settling};

/// How what switches tell each other begins: as a frame of an experiment
/// (IEEE 802's local experimental ethertype) from nobody to nobody.
const CONTROL_HEAD: [u8; 14] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x88, 0xb5];

/// Ports at most: what they cost is bounded.
const MAX_PORTS: usize = 4096;

/// Networks at most.
const MAX_NETWORKS: usize = 4096;

/// Frames that may wait for the end of somebody's turn.
const MAX_LATER: usize = 1024;

/// How often peers are asked whether they are connected.
const LOOK: Duration = Duration::from_millis(200);

/// A port with its data path.
struct Slot {
    name: String,
    spec: PortSpec,
    vni: Vni,
    /// None while it has its turn, and if it is down.
    port: Option<Box<dyn Port>>,
    down: Option<String>,
    rx: Traffic,
    tx: Traffic,
    drops: Drops,
    /// A controller has taken it down.
    closed: bool,
    /// Something was sent since the last flush.
    dirty: bool,
    moving: Moving,
    /// Bytes that it may still send in its turn, where weights count.
    credit: i64,
}

/// A frame that was made here, or waited: sent when nobody else has a turn.
struct Later {
    to: Place,
    vni: Vni,
    flow: u32,
    bytes: Vec<u8>,
    offload: Offload,
}

/// See the module above.
pub struct Switch {
    /// What controllers know this node by.
    identity: u64,
    /// Time 0.
    start: Instant,
    /// Now, in the tables' time.
    now: Duration,
    networks: BTreeMap<String, NetworkSpec>,
    /// Index: a port's number.
    slots: Vec<Option<Slot>>,
    flows: HashMap<Vni, Flows>,
    security: groups::Security,
    names: BTreeMap<String, PortId>,
    /// Ports with something to flush.
    dirty: Vec<PortId>,
    drops: Drops,
    bridge: Bridge,
    /// Where a frame goes: used again for each.
    outputs: Outputs,
    /// What the frame before was, within a turn.
    alike: Option<alike::Alike>,
    later: Vec<Later>,
    /// Frames to guests that have moved, which wait for older ones.
    settling: HashMap<(Vni, Mac), Settling>,
    /// The last number of a message about a way.
    token: u64,
    /// The tunnels; none while they have their turn, or if there are none.
    remote: Option<Box<Remote>>,
    peers: BTreeMap<String, NodeId>,
    /// The networks of those that are no switches.
    foreign: HashMap<NodeId, Vec<Vni>>,
    directory: Directory,
    gossip: Gossip,
    captures: captures::Captures,
    mirrors: mirrors::Mirroring,
    pings: pings::Pings,
    vips: vips::Vips,
    /// Ports have weights that differ.
    weighted: bool,
    /// When peers are looked at again, and what is old is forgotten.
    look: Duration,
    expire: Duration,
}
