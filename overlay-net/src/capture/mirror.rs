//! Copies of a port's frames for another port.

use serde::{Deserialize, Serialize};

use crate::frame::{PortId, Vni};

/// Which way a frame goes, as the switch sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the port into the switch.
    In,
    /// From the switch to the port.
    Out,
}

/// Whose frames are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A port's.
    Port(PortId),
    /// Those of all ports and tunnels of a network.
    Network(Vni),
}

/// One mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// Whose frames.
    pub of: Source,
    /// Only those of this direction; without it, all: of a network, each frame
    /// is there twice then.
    #[serde(default)]
    pub direction: Option<Direction>,
    /// Where the copies go. It should be a port that takes no part in
    /// forwarding: whoever is there sees another's traffic, of whatever
    /// network.
    pub to: PortId,
}

/// All mirrors: a few.
#[derive(Clone, Debug, Default)]
pub struct Mirrors(Vec<Mirror>);

impl Mirrors {
    /// Mirrors at most.
    pub const MOST: usize = 16;

    /// Adds one. False: there are too many, or it copies a port to itself.
    pub fn add(&mut self, mirror: Mirror) -> bool {
        let sound = mirror.of != Source::Port(mirror.to) && self.0.len() < Self::MOST;
        if sound && !self.0.contains(&mirror) {
            self.0.push(mirror);
        }
        sound
    }

    /// Removes one. False: there is none such.
    pub fn remove(&mut self, mirror: &Mirror) -> bool {
        let before = self.0.len();
        self.0.retain(|other| other != mirror);
        self.0.len() < before
    }

    /// Removes those of a port, and those to it.
    pub fn remove_port(&mut self, port: PortId) {
        self.0
            .retain(|other| other.of != Source::Port(port) && other.to != port);
    }

    /// Whether there are none, which is to be asked first.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Where copies of a frame go that is at this port (none: a tunnel) of this
    /// network. A copy is never copied again: do not ask for those.
    pub fn of(
        &self,
        port: Option<PortId>,
        vni: Vni,
        direction: Direction,
    ) -> impl Iterator<Item = PortId> + '_ {
        let fits = move |mirror: &&Mirror| {
            let whose = match mirror.of {
                Source::Port(id) => Some(id) == port,
                // Not what goes to where the copies go, which would be there twice.
                Source::Network(id) => id == vni && port != Some(mirror.to),
            };
            whose && mirror.direction.is_none_or(|only| only == direction)
        };
        self.0.iter().filter(fits).map(|mirror| mirror.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_go_where_they_should() {
        let mut mirrors = Mirrors::default();
        let mirror = |port, direction, to| Mirror {
            of: Source::Port(PortId(port)),
            direction,
            to: PortId(to),
        };
        assert!(mirrors.add(mirror(1, None, 9)));
        assert!(mirrors.add(mirror(2, Some(Direction::Out), 9)));
        assert!(!mirrors.add(mirror(3, None, 3)));
        let vni = Vni::new(7).unwrap_or_default();
        let of = |mirrors: &Mirrors, port, direction| {
            mirrors.of(Some(PortId(port)), vni, direction).count()
        };
        assert_eq!(of(&mirrors, 1, Direction::In), 1);
        assert_eq!(of(&mirrors, 2, Direction::In), 0);
        assert_eq!(of(&mirrors, 2, Direction::Out), 1);
        assert!(mirrors.remove(&mirror(1, None, 9)));
        mirrors.remove_port(PortId(9));
        assert!(mirrors.is_empty());
        assert!(mirrors.add(Mirror {
            of: Source::Network(vni),
            direction: Some(Direction::In),
            to: PortId(9),
        }));
        assert_eq!(of(&mirrors, 1, Direction::In), 1);
        assert_eq!(of(&mirrors, 1, Direction::Out), 0);
        assert_eq!(of(&mirrors, 9, Direction::In), 0);
        assert_eq!(mirrors.of(None, vni, Direction::In).count(), 1);
        assert_eq!(mirrors.of(None, Vni::default(), Direction::In).count(), 0);
    }
}
