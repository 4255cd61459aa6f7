//! The learning bridge: what happens to a frame that no flow has an opinion on.
//!
//! A frame belongs to a network (VNI) and a VLAN: those of the port, or of the
//! tunnel's packet, that it came in by. It only ever goes to ports and nodes
//! of the same. Where its destination is, is known from
//!
//! 1. the directory, when it says that another node has it,
//! 2. the ports of this switch that it is attached to or pinned on,
//! 3. frames that came from it.
//!
//! An attached address is not learned elsewhere, so a guest cannot take
//! another one's frames by sending from its address.
//!
//! Frames to all (and to groups that nobody rules, and to addresses that
//! nobody knows) are sent to each node that is in the network, once: what came
//! through a tunnel never goes into one again, so there are no loops between
//! nodes. The one exception is a frame to an address that was here and has
//! moved: it is sent after it, to a node that said so with a greater version
//! than this one has seen before, so it gets nearer with each step.
//!
//! Nothing here blocks or allocates for a frame that is forwarded, and nothing
//! grows without bound. Time is handed in: a duration since any fixed moment.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use foldhash::fast::RandomState;

use crate::directory::NodeId;
use crate::drops::{Drops, Reason};
use crate::frame::{Head, Mac, PortId, Vni};

mod answer;
mod ask;
mod change;
mod config;
mod forward;
mod hold;
mod igmp;
mod many;
mod qos;
mod snoop;
mod table;
#[cfg(test)]
mod tests;
mod vlan;

pub use ask::{answers as asked_by, question};
pub use config::{Config, NetworkConfig, NodeConfig, PortConfig, PortError, Storm};
pub use hold::Held;
pub use qos::{Bucket, Drr, Rate};
pub use table::{Counts, Event, Limits, Origin, Place, Station};
pub use vlan::{Edit, Mode, Vlan};

use hold::Hold;
use snoop::Snoop;
use table::{Remote, Table};

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// To whom.
    pub to: Place,
    /// Its network: the tunnel's packet says so.
    pub vni: Vni,
    /// What to do with its tag before it is sent there.
    pub edit: Edit,
}

/// A frame that the bridge made.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Where it goes, and how it is to be changed.
    pub output: Output,
    /// All of it; there is nothing left to do for it.
    pub head: Head,
}

/// What is to be done with a frame. Used again for the next one.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// Where it goes.
    pub list: Vec<Output>,
    /// What its sender is told.
    pub reply: Option<Reply>,
    /// It waits for its port to be activated.
    pub held: bool,
    /// It is known where its destination is.
    pub known: bool,
}

#[derive(Debug)]
enum State {
    Active,
    /// Its guest is on its way here: frames to it wait.
    Prepared(Hold),
    /// Its guest is on its way there: frames to it follow.
    Departed(Place),
}

#[derive(Debug)]
struct Buckets {
    broadcast: Option<Bucket>,
    multicast: Option<Bucket>,
    unknown: Option<Bucket>,
    errors: Bucket,
}

impl Buckets {
    fn new(storm: &Storm, errors: Rate) -> Self {
        Self {
            broadcast: storm.broadcast.map(Bucket::new),
            multicast: storm.multicast.map(Bucket::new),
            unknown: storm.unknown.map(Bucket::new),
            errors: Bucket::new(errors),
        }
    }
}

#[derive(Debug)]
struct Port {
    config: PortConfig,
    state: State,
    buckets: Buckets,
    rate: Option<Bucket>,
    drops: Drops,
}

#[derive(Debug)]
struct Node {
    config: NodeConfig,
    buckets: Buckets,
    drops: Drops,
}

#[derive(Debug, Default)]
struct Network {
    config: NetworkConfig,
    /// It was set, and stays without ports.
    kept: bool,
    ports: Vec<PortId>,
    nodes: Vec<NodeId>,
}

/// Who has which IP address.
type Neighbours = HashMap<(Vni, Vlan, IpAddr), Mac, RandomState>;

/// The bridge.
#[derive(Debug, Default)]
pub struct Bridge {
    config: Config,
    ports: HashMap<PortId, Port, RandomState>,
    nodes: HashMap<NodeId, Node, RandomState>,
    networks: HashMap<Vni, Network, RandomState>,
    table: Table,
    /// Who has which IP address: from the directory, and attached here.
    neighbours: Neighbours,
    /// IP addresses of each station in `neighbours` that came from the
    /// directory.
    told: HashMap<Station, Vec<IpAddr>, RandomState>,
    snoop: Snoop,
    /// Of frames from nowhere that is known.
    drops: Drops,
    answered: u64,
}

impl Bridge {
    /// Without ports.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let mut bridge = Self {
            config,
            ..Self::default()
        };
        bridge.table.limits = config.limits;
        bridge
    }

    /// How a network behaves. It is there even without ports.
    pub fn set_network(&mut self, vni: Vni, config: NetworkConfig) {
        let network = self.networks.entry(vni).or_default();
        network.config = config;
        network.kept = true;
    }

    /// Removes a network that has no ports. False: it has some.
    pub fn remove_network(&mut self, vni: Vni) -> bool {
        match self.networks.get_mut(&vni) {
            Some(network) if !network.ports.is_empty() => {
                network.kept = false;
                false
            }
            _ => {
                self.networks.remove(&vni);
                true
            }
        }
    }

    /// The nodes that have ports in the network.
    pub fn set_members(&mut self, vni: Vni, nodes: &[NodeId]) {
        let network = self.networks.entry(vni).or_default();
        network.nodes = nodes.to_vec();
        network.nodes.sort_unstable();
        network.nodes.dedup();
        self.tidy(vni);
    }

    /// Forgets a network that has nothing any more.
    fn tidy(&mut self, vni: Vni) {
        let empty = |it: &Network| !it.kept && it.ports.is_empty() && it.nodes.is_empty();
        if self.networks.get(&vni).is_some_and(empty) {
            self.networks.remove(&vni);
        }
    }

    /// There is a tunnel to this node, or it is not as it was.
    pub fn set_node(&mut self, node: NodeId, config: NodeConfig) {
        let buckets = Buckets::new(&config.storm, self.config.errors);
        match self.nodes.get_mut(&node) {
            Some(known) if known.config.storm == config.storm => known.config = config,
            Some(known) => (known.config, known.buckets) = (config, buckets),
            None => {
                let drops = Drops::default();
                let known = Node {
                    config,
                    buckets,
                    drops,
                };
                self.nodes.insert(node, known);
            }
        }
    }

    /// There is no tunnel to this node any more.
    pub fn remove_node(&mut self, now: Duration, node: NodeId) {
        self.nodes.remove(&node);
        self.table.flush(Place::Node(node));
        self.snoop.expire(now, |place| place == Place::Node(node));
    }

    /// `old` may have the same addresses: its guest is on its way to this one.
    fn checked(
        &self,
        id: PortId,
        config: &PortConfig,
        old: Option<PortId>,
    ) -> Result<Option<Vlan>, PortError> {
        config.vlan.check().map_err(PortError::Vlan)?;
        let vlan = match config.vlan {
            Mode::Access { vlan } => Vlan::new(vlan),
            Mode::Customer { service } => Vlan::service(service),
            Mode::Trunk { .. } | Mode::Provider { .. } => None,
        };
        for mac in &config.macs {
            if !mac.is_station() {
                return Err(PortError::Mac(*mac));
            }
            let Some(vlan) = vlan else {
                return Err(PortError::Trunk);
            };
            let vni = config.vni;
            let station = Station {
                vni,
                vlan,
                mac: *mac,
            };
            if let Some(other) = self.table.attached(&station)
                && other != id
                && Some(other) != old
            {
                return Err(PortError::Taken(*mac, other));
            }
        }
        Ok(vlan)
    }

    /// Adds a port whose guest is here.
    ///
    /// # Errors
    ///
    /// See [`PortError`]; nothing changed.
    pub fn add_port(&mut self, id: PortId, config: PortConfig) -> Result<(), PortError> {
        self.prepare_port(id, config)?;
        self.activate(id).map(|_| ())
    }

    /// Adds a port whose guest is on its way here: its addresses are not taken
    /// from where they are, and frames that are sent after it wait here until
    /// [`Bridge::activate`]. Frames to groups do not: its guest gets them
    /// where it is, and would have them twice.
    ///
    /// # Errors
    ///
    /// See [`PortError`]; nothing changed.
    pub fn prepare_port(&mut self, id: PortId, config: PortConfig) -> Result<(), PortError> {
        self.prepare(id, config, None)
    }

    /// The same for a guest that comes from another port of this bridge, which
    /// keeps its addresses until [`Bridge::activate`].
    ///
    /// # Errors
    ///
    /// See [`PortError`]; nothing changed.
    pub fn prepare_after(
        &mut self,
        id: PortId,
        config: PortConfig,
        old: PortId,
    ) -> Result<(), PortError> {
        self.prepare(id, config, Some(old))
    }

    fn prepare(
        &mut self,
        id: PortId,
        config: PortConfig,
        old: Option<PortId>,
    ) -> Result<(), PortError> {
        if self.ports.contains_key(&id) {
            return Err(PortError::Exists(id));
        }
        let vlan = self.checked(id, &config, old)?.unwrap_or_default();
        let network = self.networks.entry(config.vni).or_default();
        network.ports.push(id);
        network.ports.sort_unstable();
        let vni = config.vni;
        for mac in &config.macs {
            let mac = *mac;
            let station = Station { vni, vlan, mac };
            if self.table.attached(&station).is_none() {
                self.table.attach(&station, id);
            }
        }
        let port = Port {
            state: State::Prepared(Hold::default()),
            buckets: Buckets::new(&config.storm, self.config.errors),
            rate: config.rate.map(Bucket::new),
            drops: Drops::default(),
            config,
        };
        self.ports.insert(id, port);
        Ok(())
    }

    /// The guest runs here: its addresses are here, whatever the directory
    /// said before (tell the directory first, or right now). What waited for
    /// it, in order, to be sent to the port before anything else.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn activate(&mut self, id: PortId) -> Result<Vec<Held>, PortError> {
        let port = self.ports.get_mut(&id).ok_or(PortError::Unknown(id))?;
        let state = std::mem::replace(&mut port.state, State::Active);
        for station in stations(&port.config) {
            self.table.attach(&station, id);
            self.table.settle(&station);
            for ip in &port.config.ips {
                let key = (station.vni, station.vlan, *ip);
                self.neighbours.insert(key, port.config.macs[0]);
            }
        }
        match state {
            State::Prepared(mut hold) => Ok(hold.take()),
            _ => Ok(Vec::new()),
        }
    }

    /// What has waited for a guest that does not come.
    pub fn take_held(&mut self, id: PortId) -> Vec<Held> {
        match self.ports.get_mut(&id).map(|port| &mut port.state) {
            Some(State::Prepared(hold)) => hold.take(),
            _ => Vec::new(),
        }
    }

    /// The guest has stopped here, to go on at another node, or at another port
    /// here, where its port is prepared: from now on, frames to it follow it
    /// there, in order. If it goes on here after all: [`Bridge::activate`].
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn depart(&mut self, id: PortId, to: Place) -> Result<(), PortError> {
        let port = self.ports.get_mut(&id).ok_or(PortError::Unknown(id))?;
        port.state = State::Departed(to);
        Ok(())
    }

    /// Removes a port. Frames to a guest that has departed go on following it.
    ///
    /// # Errors
    ///
    /// There is no such port.
    pub fn remove_port(&mut self, now: Duration, id: PortId) -> Result<(), PortError> {
        let port = self.ports.remove(&id).ok_or(PortError::Unknown(id))?;
        for station in stations(&port.config) {
            let is_ours = self.table.attached(&station) == Some(id);
            if let State::Departed(Place::Node(node)) = port.state
                && is_ours
                && self.table.elsewhere(&station).is_none()
            {
                let remote = Remote {
                    node,
                    attached: true,
                    isolated: port.config.isolated,
                };
                self.table.remote(now, &station, Some(remote));
            }
            self.table.detach(&station, id);
            for ip in &port.config.ips {
                let key = (station.vni, station.vlan, *ip);
                if is_ours && self.neighbours.get(&key) == port.config.macs.first() {
                    self.neighbours.remove(&key);
                }
            }
        }
        self.table.flush(Place::Port(id));
        self.snoop.expire(now, |place| place == Place::Port(id));
        if let Some(network) = self.networks.get_mut(&port.config.vni) {
            network.ports.retain(|other| *other != id);
        }
        self.tidy(port.config.vni);
        Ok(())
    }

    /// Pins an address on a port, whatever its VLANs: as if attached, until
    /// [`Bridge::unpin`].
    ///
    /// # Errors
    ///
    /// No such port, no station's address, or another port has it.
    pub fn pin(&mut self, id: PortId, vlan: Vlan, mac: Mac) -> Result<(), PortError> {
        let port = self.ports.get_mut(&id).ok_or(PortError::Unknown(id))?;
        if !mac.is_station() {
            return Err(PortError::Mac(mac));
        }
        let vni = port.config.vni;
        let station = Station { vni, vlan, mac };
        match self.table.attached(&station) {
            Some(other) if other != id => Err(PortError::Taken(mac, other)),
            _ => {
                self.table.attach(&station, id);
                Ok(())
            }
        }
    }

    /// Takes an address that was pinned off its port.
    pub fn unpin(&mut self, id: PortId, vlan: Vlan, mac: Mac) {
        if let Some(port) = self.ports.get(&id) {
            let vni = port.config.vni;
            self.table.detach(&Station { vni, vlan, mac }, id);
        }
    }

    /// Who asks for this IP address is answered with that address (or, `None`,
    /// not any more): a service's, which is no station's.
    pub fn set_neighbour(&mut self, vni: Vni, vlan: Vlan, ip: IpAddr, mac: Option<Mac>) {
        match mac {
            Some(mac) => self.neighbours.insert((vni, vlan, ip), mac),
            None => self.neighbours.remove(&(vni, vlan, ip)),
        };
    }

    /// Who has an IP address, if that is known.
    #[must_use]
    pub fn neighbour(&self, vni: Vni, vlan: Vlan, ip: IpAddr) -> Option<Mac> {
        self.neighbours.get(&(vni, vlan, ip)).copied()
    }

    /// What the directory says of a station now: which other node has it, or
    /// that none does (this node itself among the reasons).
    pub fn locate(&mut self, now: Duration, station: Station, found: Option<&Located>) {
        for ip in self.told.remove(&station).unwrap_or_default() {
            let key = (station.vni, station.vlan, ip);
            if self.neighbours.get(&key) == Some(&station.mac) {
                self.neighbours.remove(&key);
            }
        }
        if let Some(port) = self.table.attached(&station)
            && found.is_none()
            && let Some(port) = self.ports.get(&port)
        {
            for ip in &port.config.ips {
                let key = (station.vni, station.vlan, *ip);
                self.neighbours.insert(key, station.mac);
            }
        }
        if let Some(found) = found {
            for ip in &found.ips {
                let key = (station.vni, station.vlan, *ip);
                self.neighbours.insert(key, station.mac);
            }
            if !found.ips.is_empty() {
                self.told.insert(station, found.ips.clone());
            }
        }
        let remote = found.map(|found| Remote {
            node: found.node,
            attached: found.attached,
            isolated: found.isolated,
        });
        self.table.remote(now, &station, remote);
    }

    /// Forgets what is too old. To be called about once a second.
    pub fn expire(&mut self, now: Duration) {
        self.table.expire(now);
        self.snoop.expire(now, |_| false);
    }

    /// Forgets what was learned from a port or a node.
    pub fn flush(&mut self, place: Place) {
        self.table.flush(place);
    }

    /// What was learned and forgotten since the last call, for the directory,
    /// and for other workers' bridges ([`Bridge::learn`]).
    pub fn events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.table.events()
    }

    /// As if a frame had come from the station on this port.
    ///
    /// # Errors
    ///
    /// Why such a frame would be dropped.
    pub fn learn(&mut self, now: Duration, station: &Station, id: PortId) -> Result<(), Reason> {
        let port = self.ports.get(&id).ok_or(Reason::NoPort)?;
        let place = Place::Port(id);
        self.table.learn(now, station, place, port.config.limit)
    }

    /// All stations that are known: where, why, and when a learned one was
    /// last heard.
    pub fn stations(
        &self,
        now: Duration,
    ) -> impl Iterator<Item = (Station, Place, Origin, Option<Duration>)> + '_ {
        self.table.iter(now)
    }

    /// Where a station is, and why.
    #[must_use]
    pub fn find(&self, now: Duration, station: &Station) -> Option<(Place, Origin)> {
        let found = self.table.find(now, station)?;
        Some((found.place, found.origin))
    }

    /// How many stations there are in the table.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many were learned from there.
    #[must_use]
    pub fn learned(&self, place: Place) -> usize {
        self.table.learned(place)
    }

    /// What the table did.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.table.counts
    }

    /// Questions that were answered instead of being sent to all.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Groups and those who listen, with when each is forgotten.
    pub fn groups(&self) -> impl Iterator<Item = (Vni, Vlan, IpAddr, &[(Place, Duration)])> + '_ {
        let groups = self.snoop.iter();
        groups.map(|((vni, vlan), group, list)| (vni, vlan, group, list))
    }

    /// What was dropped of the frames from there; of those from nowhere that
    /// is known: `None`.
    #[must_use]
    pub fn drops(&self, from: Option<Place>) -> Option<&Drops> {
        match from {
            Some(Place::Port(id)) => self.ports.get(&id).map(|port| &port.drops),
            Some(Place::Node(id)) => self.nodes.get(&id).map(|node| &node.drops),
            None => Some(&self.drops),
        }
    }

    /// The port of this bridge that a station is attached to.
    #[must_use]
    pub fn attached(&self, station: &Station) -> Option<PortId> {
        self.table.attached(station)
    }

    /// A port's configuration.
    #[must_use]
    pub fn port(&self, id: PortId) -> Option<&PortConfig> {
        self.ports.get(&id).map(|port| &port.config)
    }
}

/// Where the directory says that a station is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The node.
    pub node: NodeId,
    /// It is attached there, and cannot be elsewhere.
    pub attached: bool,
    /// Its port there is isolated.
    pub isolated: bool,
    /// Its IP addresses.
    pub ips: Vec<IpAddr>,
}

/// What is attached to a port.
pub(crate) fn stations(config: &PortConfig) -> Vec<Station> {
    let vlan = match config.vlan {
        Mode::Access { vlan } => Vlan::new(vlan),
        Mode::Customer { service } => Vlan::service(service),
        Mode::Trunk { .. } | Mode::Provider { .. } => None,
    };
    let vni = config.vni;
    let station = |mac: &Mac| Station {
        vni,
        vlan: vlan.unwrap_or_default(),
        mac: *mac,
    };
    config.macs.iter().map(station).collect()
}
