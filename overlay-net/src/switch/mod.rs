//! The switch: networks, ports, and where each frame goes.
//!
//! [`Switch`] is a plain structure that one thread, the [worker], owns; it does
//! no waiting and is told the time. Whoever wants something of it sends the
//! worker an order.

use thiserror::Error;

use crate::bridge::PortError;
use crate::frame::Vni;

mod core;
mod flows;
mod foreign;
mod remote;
pub mod saved;
#[cfg(test)]
mod tests;
pub mod worker;

pub use self::core::{PEERS, Stream, Switch};
pub use flows::{FailMode, FlowError};
pub use foreign::ForeignError;
pub use remote::{Remote, node_of};

/// Why the switch refuses something.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// No such network.
    #[error("there is no network `{0}`; blanket net ls shows those that there are")]
    NoNetwork(String),
    /// No such port.
    #[error("there is no port `{0}`; blanket net port shows those that there are")]
    NoPort(String),
    /// No such peer.
    #[error("there is no peer `{0}`; blanket net peer ls shows those that there are")]
    NoPeer(String),
    /// Neither a port nor a network nor a peer.
    #[error(
        "there is no port, network or peer `{0}`; `all` means all, and port:, network: or peer: before a name what it is"
    )]
    Nothing(String),
    /// No such mirror.
    #[error("there is no mirror `{0}`; blanket net mirror ls shows those that there are")]
    NoMirror(String),
    /// A mirror of nothing, or of a port to itself.
    #[error("a mirror copies what is at one port or network to another port")]
    Mirror,
    /// A ping of nobody.
    #[error("a peer is pinged, or an address in a network")]
    Ping,
    /// Nodes talk to each other in it.
    #[error("VNI 0 is what switches talk to each other in; take 1 to 16777215")]
    Reserved,
    /// Another network has the identifier.
    #[error("VNI {0} is the network `{1}` already; take another one")]
    Taken(Vni, String),
    /// A network's identifier cannot change.
    #[error("the network `{0}` has VNI {1}; remove it first to give it another one")]
    Other(String, Vni),
    /// A network has ports.
    #[error("the network `{0}` has {1} ports; detach them first (blanket net detach)")]
    InUse(String, usize),
    /// A port of that name is there.
    #[error("there is a port `{0}` already; detach it first, or take another name")]
    Exists(String),
    /// No such group.
    #[error("there is no security group `{0}`; blanket net group ls shows those that there are")]
    NoGroup(String),
    /// A group of that name is there.
    #[error("there is a security group `{0}` already; change its rules, or take another name")]
    GroupExists(String),
    /// A group has ports.
    #[error(
        "{1} ports are in the security group `{0}`; put them into others (blanket net group set), or close them with --force"
    )]
    GroupInUse(String, usize),
    /// No such rule.
    #[error(
        "the security group `{0}` has no such rule; blanket net group ls shows those that it has"
    )]
    NoRule(String),
    /// There are too many.
    #[error("there are {0} {1} already, and no more are taken")]
    TooMany(usize, &'static str),
    /// The bridge does not take a port.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The tunnels do not take a peer.
    #[error(transparent)]
    Peer(#[from] crate::tunnel::Error),
    /// No such service.
    #[error("there is no virtual address `{0}`; blanket net vip ls shows those that there are")]
    NoVip(String),
    /// Another service has the address; or its own is another one.
    #[error("an address has one name for good: see `{0}`, and remove it first")]
    VipAddress(String),
    /// A network has services.
    #[error("the network `{0}` has {1} virtual addresses; remove them first (blanket net vip rm)")]
    HasVips(String, usize),
    /// A port that no station is attached to.
    #[error("no address is attached to port `{0}` (--mac): name the server by its MAC address")]
    NoStation(String),
    /// A service that cannot be.
    #[error(transparent)]
    Service(#[from] crate::vip::ServiceError),
    /// There is no way to somebody else's tunnel.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// No flow.
    #[error(transparent)]
    Flow(#[from] FlowError),
    /// There is no tunnel to that switch.
    #[error(
        "there is no tunnel to the switch with the key {0}: join the two switches (blanket net peer add, on both), and see blanket net peer ls"
    )]
    Apart(String),
    /// There are no tunnels.
    #[error(
        "this switch has no way to others: start blanket-switch with --listen ADDRESS:PORT and --interface NAME"
    )]
    Alone,
}
