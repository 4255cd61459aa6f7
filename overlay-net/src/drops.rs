//! Why frames are dropped: one list for the whole switch, each counted.

use std::fmt;

use serde::{Serialize, Serializer, ser::SerializeMap};

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
    /// The port that it should go to has no room.
    Full = "port_full",
    /// The port that it should go to is down.
    Down = "port_down",
    /// It is longer than the port or the tunnel takes.
    TooBig = "too_big",
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
