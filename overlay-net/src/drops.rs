//! Why frames are dropped: one list for the whole switch, each counted.

use std::fmt;

use serde::de::{Deserialize, Deserializer};
use serde::ser::{Serialize, SerializeMap, Serializer};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a frame, or a tunnel's packet, was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// All there are.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name in commands and metrics.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// Its headers are cut off or contradict themselves.
    Malformed = "malformed",
    /// Its offload header says nothing sensible.
    Offload = "bad_offload",
    /// It is for a controller, and there is none.
    NoController = "no_controller",
    /// The port that it should go to has no room.
    Full = "port_full",
    /// The port that it should go to is down.
    Down = "port_down",
    /// It is longer than the port or the tunnel takes.
    TooBig = "too_big",
    /// It came from a port or a node that does not exist.
    NoPort = "no_port",
    /// There is no such network here.
    NoNetwork = "no_network",
    /// There is no tunnel to the node that it should go to.
    NoTunnel = "no_tunnel",
    /// Its VLAN is not one of the port's.
    VlanRefused = "vlan_refused",
    /// It has more VLAN tags than the port may send.
    DoubleTag = "double_tag",
    /// It is sent from an address that is not its sender's.
    Spoofed = "mac_spoofed",
    /// It is sent from an address that changed its place too often.
    Flapping = "mac_flapping",
    /// It is sent to a group that ends at the next bridge.
    LinkLocal = "link_local_group",
    /// Its sender may send fewer frames to all.
    StormBroadcast = "storm_broadcast",
    /// Its sender may send fewer frames to groups.
    StormMulticast = "storm_multicast",
    /// Its sender may send fewer frames to addresses that nobody knows.
    StormUnknown = "storm_unknown",
    /// Its sender may send fewer bytes.
    RateLimited = "rate_limited",
    /// It is sent to the port that it comes from.
    SamePort = "same_port",
    /// It came by a tunnel, and would leave by one.
    SplitHorizon = "split_horizon",
    /// Nobody knows where its destination is.
    NoDestination = "no_destination",
    /// It would go from one isolated port to another.
    Isolated = "port_isolated",
    /// Too many frames wait for the port to become active.
    HoldFull = "hold_full",
    /// There is no such peer.
    NoPeer = "no_peer",
    /// There are no keys with the peer yet, or it cannot be reached.
    NoSession = "no_session",
    /// A tunnel's packet that nobody who has the keys has sent.
    Forged = "forged",
    /// A tunnel's packet that has been taken already, or is too old to tell.
    Replayed = "replayed",
    /// Chunks of a frame of which others were lost.
    Incomplete = "incomplete",
    /// A handshake from a stranger, or one that was there already.
    Handshake = "handshake",
    /// A handshake, of too many.
    HandshakeFlood = "handshake_flood",
    /// A tunnel's packet without encryption from an unknown address.
    Stranger = "stranger",
    /// An entry of the flow table says so.
    Flow = "flow_drop",
    /// No entry of the flow table matches it.
    FlowMiss = "flow_miss",
    /// Its way through the flow tables is too long.
    FlowLoop = "flow_loop",
    /// A meter's limit is exceeded.
    Meter = "meter",
    /// Its time to live is over.
    Ttl = "ttl",
    /// There is no room for what an entry puts into it.
    Rewrite = "rewrite",
    /// It belongs to no connection, and cannot begin one.
    NoConnection = "no_connection",
    /// It would begin a connection, of which there are too many.
    Connections = "too_many_connections",
    /// No rule of its port's security groups lets it through.
    Group = "security_group",
    /// It is to a service that has no server for it.
    NoBackend = "no_backend",
    /// More frames wait for a controller than it takes.
    Controller = "controller_queue_full",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How many were dropped, by reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drops([u64; Reason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self([0; Reason::ALL.len()])
    }
}

impl Drops {
    /// Counts one.
    pub fn add(&mut self, reason: Reason) {
        self.0[reason as usize] += 1;
    }

    /// Counts what `other` has counted, too.
    pub fn merge(&mut self, other: &Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }

    /// How many were dropped for `reason`.
    #[must_use]
    pub fn of(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }

    /// Those that are not 0.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        let counts = Reason::ALL.iter().zip(self.0);
        counts
            .filter(|(_, count)| *count > 0)
            .map(|(reason, count)| (*reason, count))
    }

    /// All together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl Serialize for Drops {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (reason, count) in self.iter() {
            map.serialize_entry(reason.name(), &count)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Drops {
    /// Reasons that are not known, from a newer switch, are left out.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let counts = std::collections::BTreeMap::<String, u64>::deserialize(deserializer)?;
        let mut drops = Self::default();
        for reason in Reason::ALL {
            drops.0[*reason as usize] = counts.get(reason.name()).copied().unwrap_or(0);
        }
        Ok(drops)
    }
}
