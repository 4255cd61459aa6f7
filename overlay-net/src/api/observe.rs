//! What is asked of the switch by those who watch.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /captures` | [`CaptureSpec`] | a capture (pcapng), as it comes; its number is in the header `capture` |
//! | `DELETE /captures/NUMBER` | | whether there was one: it ends |
//! | `GET /metrics` | | figures, as Prometheus reads them |
//! | `POST /ping` | [`PingSpec`] | [`Pong`], or `null` if none came in time |
//! | `GET /mirrors` | | all [`Mirror`]s |
//! | `PUT /mirrors/NAME` | [`MirrorSpec`] | [`Mirror`] |
//! | `DELETE /mirrors/NAME` | | [`Mirror`] as it was |

use serde::{Deserialize, Serialize};

use crate::capture::Direction;
use crate::frame::Mac;

/// The header of a capture's answer that has its number.
pub const CAPTURE: &str = "capture";

/// Which frames are captured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CaptureSpec {
    /// Whose: a port, network or peer by name (`port:`, `network:` or `peer:`
    /// before it says which it is), or `all`.
    pub of: String,
    /// Those that this matches, as flows do.
    pub filter: String,
    /// Bytes of each frame at most; 0: all.
    pub snaplen: u32,
    /// How many frames.
    pub count: Option<u64>,
    /// Only those that go this way.
    pub direction: Option<Direction>,
    /// Only those that are dropped, each with the reason as its comment; else
    /// only those that are not.
    pub drops: bool,
}

/// Who is pinged: a peer, or an address in a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PingSpec {
    /// The peer.
    pub peer: Option<String>,
    /// Or the network.
    pub network: Option<String>,
    /// The address in it.
    pub address: Option<std::net::IpAddr>,
    /// And its VLAN; 0: none.
    pub vlan: u16,
    /// Bytes that are sent to a peer.
    pub bytes: usize,
    /// How long to wait, in milliseconds.
    pub timeout_ms: u64,
}

/// The answer to a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The time from the question to it, in nanoseconds.
    pub nanos: u64,
    /// Who has the address.
    pub mac: Option<Mac>,
}

/// A mirror.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MirrorSpec {
    /// The port whose frames are copied.
    pub port: Option<String>,
    /// Or the network whose are.
    pub network: Option<String>,
    /// Only those that go this way; nothing: of a port both, of a network
    /// those that come in.
    pub direction: Option<Direction>,
    /// The port that gets the copies.
    pub to: String,
}

/// A mirror, and how it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Its name.
    pub name: String,
    /// What it is.
    pub spec: MirrorSpec,
    /// Why it copies nothing; none: it does.
    pub down: Option<String>,
}
