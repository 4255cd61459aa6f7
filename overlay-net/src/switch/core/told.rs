//! What the switch is told, and tells when it is asked.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use data_encoding::BASE64;

use super::datapath::{PEERS, Turn};
use super::moving::Moving;
use super::{MAX_NETWORKS, MAX_PORTS, Slot, Switch};
use crate::api::moving::{Arrival, Whereabouts};
use crate::api::types::{
    Info, MacLine, Network, NetworkSpec, Peer, PeerSpec, PortSpec, PortStatus, Traffic,
};
use crate::bridge::{
    Bridge, Config, NetworkConfig, NodeConfig, Origin, Outputs, Place, Station, stations,
};
use crate::directory::{Directory, Gossip, Key as Record, Limits, NodeId, Settings, Value};
use crate::drops::Drops;
use crate::frame::{PortId, Vni};
use crate::jail;
use crate::key;
use crate::port::Port;
use crate::switch::Error;
use crate::switch::flows::Flows;
use crate::switch::remote::{CONTROL, Remote, node_of};
use crate::tunnel::PublicKey;
impl Switch {
    /// A switch without networks.
    #[must_use]
    pub fn new(start: Instant, remote: Option<Remote>) -> Self {
        let me = remote.as_ref().map(|remote| node_of(remote.public_key()));
        Self {
            identity: me.unwrap_or_default().0,
            start,
            now: Duration::ZERO,
            networks: BTreeMap::new(),
            // Numbers begin with 1.
            slots: vec![None],
            flows: HashMap::new(),
            security: super::groups::Security::default(),
            names: BTreeMap::new(),
            dirty: Vec::new(),
            drops: Drops::default(),
            bridge: Bridge::new(Config::default()),
            outputs: Outputs::default(),
            alike: None,
            later: Vec::new(),
            settling: HashMap::new(),
            token: 0,
            remote: remote.map(Box::new),
            peers: BTreeMap::new(),
            foreign: HashMap::new(),
            directory: Directory::new(me.unwrap_or_default(), Limits::default()),
            gossip: Gossip::new(Settings::default()),
            captures: Default::default(),
            mirrors: Default::default(),
            pings: Default::default(),
            vips: Default::default(),
            weighted: false,
            look: Duration::ZERO,
            expire: Duration::ZERO,
        }
    }

    pub(super) fn slot(&self, id: PortId) -> Option<&Slot> {
        self.slots.get(id.0 as usize)?.as_ref()
    }

    pub(super) fn slot_mut(&mut self, id: PortId) -> Option<&mut Slot> {
        self.slots.get_mut(id.0 as usize)?.as_mut()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (PortId, &Slot)> {
        let slots = self.names.values();
        slots.filter_map(|id| Some((*id, self.slot(*id)?)))
    }

    pub(super) fn vni(&self, network: &str) -> Result<Vni, Error> {
        let spec = self.networks.get(network);
        let missing = || Error::NoNetwork(network.to_owned());
        Ok(spec.ok_or_else(missing)?.vni)
    }

    /// Describes it.
    #[must_use]
    pub fn info(&self) -> Info {
        let mut drops = self.drops.clone();
        drops.merge(
            &self
                .remote
                .as_ref()
                .map(|remote| remote.drops())
                .unwrap_or_default(),
        );
        let remote = self.remote.as_ref();
        Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            networks: self.networks.len(),
            ports: self.names.len(),
            drops,
            key: remote.map(|remote| BASE64.encode(remote.public_key())),
            uplinks: remote.map(|remote| remote.describe()).unwrap_or_default(),
            endpoints: remote.map(|remote| remote.endpoints()).unwrap_or_default(),
            confinement: jail::confinement(),
        }
    }

    pub(super) fn network(&self, name: &str, spec: &NetworkSpec) -> Network {
        Network {
            name: name.to_owned(),
            spec: spec.clone(),
            ports: self.all().filter(|(_, slot)| slot.vni == spec.vni).count(),
            macs: self.stations(spec.vni).count(),
        }
    }

    /// All networks, by name.
    #[must_use]
    pub fn networks(&self) -> Vec<Network> {
        let networks = self.networks.iter();
        networks
            .map(|(name, spec)| self.network(name, spec))
            .collect()
    }

    /// Makes a network, or changes its MTU for ports that come.
    ///
    /// # Errors
    ///
    /// Another one has its VNI; what there is has another VNI; too many.
    pub fn add_network(&mut self, name: &str, spec: NetworkSpec) -> Result<Network, Error> {
        if spec.vni.number() == CONTROL {
            return Err(Error::Reserved);
        }
        match self.networks.get(name) {
            Some(old) if old.vni != spec.vni => {
                return Err(Error::Other(name.to_owned(), old.vni));
            }
            None if self.networks.len() == MAX_NETWORKS => {
                return Err(Error::TooMany(MAX_NETWORKS, "networks"));
            }
            _ => (),
        }
        let mut others = self.networks.iter().filter(|(other, _)| *other != name);
        if let Some((other, _)) = others.find(|(_, other)| other.vni == spec.vni) {
            return Err(Error::Taken(spec.vni, other.clone()));
        }
        self.bridge.set_network(spec.vni, NetworkConfig::default());
        self.flows.entry(spec.vni).or_default();
        self.claim(Record::Member(spec.vni, self.directory.me()), Value::Member);
        self.renew_members(spec.vni);
        let network = self.network(name, &spec);
        self.networks.insert(name.to_owned(), spec);
        self.renew_mirrors();
        Ok(network)
    }

    /// Removes a network without ports; what it was.
    ///
    /// # Errors
    ///
    /// There is none, or it has ports.
    pub fn remove_network(&mut self, name: &str) -> Result<Network, Error> {
        let spec = self.networks.get(name);
        let spec = spec.ok_or_else(|| Error::NoNetwork(name.to_owned()))?;
        let network = self.network(name, spec);
        if network.ports > 0 {
            return Err(Error::InUse(name.to_owned(), network.ports));
        }
        let vips = self.vips_of(name);
        if vips > 0 {
            return Err(Error::HasVips(name.to_owned(), vips));
        }
        self.end_probes(Some(network.spec.vni));
        self.bridge.remove_network(network.spec.vni);
        self.flows.remove(&network.spec.vni);
        let member = Record::Member(network.spec.vni, self.directory.me());
        self.directory.withdraw(self.now, &member);
        self.tell();
        self.networks.remove(name);
        self.renew_mirrors();
        Ok(network)
    }

    pub(super) fn status(&self, id: PortId, slot: &Slot) -> PortStatus {
        let mut drops = slot.drops.clone();
        if let Some(port) = &slot.port {
            drops.merge(port.drops());
        }
        if let Some(more) = self.bridge.drops(Some(Place::Port(id))) {
            drops.merge(more);
        }
        PortStatus {
            name: slot.name.clone(),
            id,
            spec: slot.spec.clone(),
            down: slot.down.clone(),
            moving: self.describe_moving(slot),
            rx: slot.rx,
            tx: slot.tx,
            drops,
        }
    }

    /// All ports, by name.
    #[must_use]
    pub fn ports(&self) -> Vec<PortStatus> {
        self.all().map(|(id, slot)| self.status(id, slot)).collect()
    }

    /// Makes a port of what was opened for it, or of why it could not be.
    ///
    /// # Errors
    ///
    /// There is no such network, there is a port of that name, the bridge does
    /// not take it, or too many.
    pub fn add_port(
        &mut self,
        name: &str,
        spec: PortSpec,
        opened: Result<Box<dyn Port>, String>,
    ) -> Result<PortStatus, Error> {
        self.make_port(name, spec, opened, None)
    }

    /// The same, for a port of which a switch knew before it was started again.
    ///
    /// # Errors
    ///
    /// As [`Switch::add_port`].
    pub fn restore_port(
        &mut self,
        name: &str,
        spec: PortSpec,
        arrival: Option<Arrival>,
        opened: Result<Box<dyn Port>, String>,
    ) -> Result<PortStatus, Error> {
        // Of tunnels nothing is known yet.
        let from = arrival.and_then(|arrival| {
            let place = match &arrival.from {
                Whereabouts::Port(name) => Place::Port(self.named(name).ok()?),
                Whereabouts::Peer(key) => Place::Node(node_of(&key::parse(key).ok()?)),
            };
            Some((place, arrival.epoch))
        });
        self.make_port(name, spec, opened, from)
    }

    /// A port; if `from` is there, one whose guest comes from there.
    pub(super) fn make_port(
        &mut self,
        name: &str,
        spec: PortSpec,
        opened: Result<Box<dyn Port>, String>,
        from: Option<(Place, u64)>,
    ) -> Result<PortStatus, Error> {
        let config = self.bridge_config(&spec.network, &spec.bridge);
        let config = config.ok_or_else(|| Error::NoNetwork(spec.network.clone()))?;
        let vni = config.vni;
        if self.names.contains_key(name) {
            return Err(Error::Exists(name.to_owned()));
        }
        if self.names.len() == MAX_PORTS {
            return Err(Error::TooMany(MAX_PORTS, "ports"));
        }
        let id = u32::try_from(self.slots.len());
        let id = PortId(id.map_err(|_| Error::TooMany(self.slots.len(), "ports"))?);
        match from {
            None => self.bridge.add_port(id, config)?,
            Some((Place::Port(old), _)) => self.bridge.prepare_after(id, config, old)?,
            Some((Place::Node(_), _)) => self.bridge.prepare_port(id, config)?,
        }
        let (port, down) = match opened {
            Ok(port) => (Some(port), None),
            Err(reason) => (None, Some(reason)),
        };
        let slot = Slot {
            name: name.to_owned(),
            spec,
            vni,
            port,
            down,
            rx: Traffic::default(),
            tx: Traffic::default(),
            drops: Drops::default(),
            closed: false,
            dirty: false,
            moving: from.map_or(Moving::No, |(from, epoch)| Moving::Arriving { from, epoch }),
            credit: 0,
        };
        self.tell_of_port(id, &slot, Turn::Came);
        let status = self.status(id, &slot);
        self.slots.push(Some(slot));
        self.names.insert(name.to_owned(), id);
        self.renew_groups();
        self.weigh();
        self.renew_mirrors();
        if from.is_none() {
            for (key, value) in self.attached(id) {
                self.claim(key, value);
            }
        }
        Ok(status)
    }

    /// Removes a port; what it was.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn remove_port(&mut self, name: &str) -> Result<PortStatus, Error> {
        let missing = || Error::NoPort(name.to_owned());
        let id = self.names.remove(name).ok_or_else(missing)?;
        let slot = self.slots.get_mut(id.0 as usize).and_then(Option::take);
        let slot = slot.ok_or_else(missing)?;
        let status = self.status(id, &slot);
        self.tell_of_port(id, &slot, Turn::Went);
        self.weigh();
        self.renew_mirrors();
        self.remove_moving(id, &slot);
        self.bridge.remove_port(self.now, id)?;
        self.forget_connections(id);
        self.tell();
        Ok(status)
    }

    /// What is attached to a port, as others are told.
    pub(super) fn attached(&self, id: PortId) -> Vec<(Record, Value)> {
        let Some(config) = self.bridge.port(id) else {
            return Vec::new();
        };
        let value = Value::Station {
            ips: config.ips.clone(),
            attached: true,
            isolated: config.isolated,
            groups: self.told_groups(id),
        };
        let key = |station: Station| Record::Station(station.vni, station.vlan, station.mac);
        let stations = stations(config).into_iter();
        stations
            .map(|station| (key(station), value.clone()))
            .collect()
    }

    /// The addresses that are known in a network: where, why, and since when
    /// nothing was heard.
    pub(super) fn stations(
        &self,
        vni: Vni,
    ) -> impl Iterator<Item = (Station, Place, Origin, Option<Duration>)> + '_ {
        let stations = self.bridge.stations(self.now);
        stations.filter(move |(station, ..)| station.vni == vni)
    }

    /// What is known of the addresses in a network.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn macs(&self, network: &str) -> Result<Vec<MacLine>, Error> {
        let stations = self.stations(self.vni(network)?);
        let lines = stations.map(|(station, place, origin, age)| {
            let (port, peer) = match place {
                Place::Port(id) => (self.slot(id).map(|slot| slot.name.clone()), None),
                Place::Node(node) => (None, Some(self.peer_name(node))),
            };
            MacLine {
                mac: station.mac,
                vlan: station.vlan.number(),
                port,
                peer,
                origin,
                age: age.map(|age| age.as_secs()),
            }
        });
        let mut lines: Vec<MacLine> = lines.collect();
        lines.sort_by_key(|line| (line.vlan, line.mac));
        Ok(lines)
    }

    /// What only a network's own ports are found by.
    pub(super) fn names(&self, vni: Vni) -> impl Fn(&str) -> Option<PortId> + use<> {
        let ports = self.all().filter(|(_, slot)| slot.vni == vni);
        let names: HashMap<_, _> = ports.map(|(id, slot)| (slot.name.clone(), id)).collect();
        let peers = self.remote.is_some();
        move |name| match names.get(name) {
            None if peers && name == "peers" => Some(PEERS),
            id => id.copied(),
        }
    }

    pub(super) fn with_flows<R>(
        &mut self,
        network: &str,
        act: impl FnOnce(&mut Flows, Duration, Vni, &dyn Fn(&str) -> Option<PortId>) -> R,
    ) -> Result<R, Error> {
        let vni = self.vni(network)?;
        let names = self.names(vni);
        let flows = self.flows.get_mut(&vni);
        let flows = flows.ok_or_else(|| Error::NoNetwork(network.to_owned()))?;
        Ok(act(flows, self.now, vni, &names))
    }

    /// Adds an entry to a network's flows.
    ///
    /// # Errors
    ///
    /// There is no such network, or it is no entry; the message says where it
    /// is wrong.
    pub fn add_flow(&mut self, network: &str, entry: &str) -> Result<(), Error> {
        self.with_flows(network, |flows, now, _, names| flows.add(now, entry, names))?
    }

    /// Removes a network's flows that `filter` means, or with `strict` the one
    /// with exactly this match and priority; how many there were.
    ///
    /// # Errors
    ///
    /// As [`Switch::add_flow`].
    pub fn remove_flows(
        &mut self,
        network: &str,
        filter: &str,
        strict: bool,
    ) -> Result<usize, Error> {
        self.with_flows(network, |flows, now, _, names| {
            flows.delete(now, filter, strict, names)
        })?
    }

    /// A network's flows, a line each.
    ///
    /// # Errors
    ///
    /// There is no such network.
    pub fn dump_flows(&mut self, network: &str) -> Result<Vec<String>, Error> {
        self.with_flows(network, |flows, now, _, _| flows.dump(now))
    }

    /// Which flows a packet would hit, as text.
    ///
    /// # Errors
    ///
    /// As [`Switch::add_flow`].
    pub fn trace(&mut self, network: &str, packet: &str) -> Result<String, Error> {
        self.with_flows(network, |flows, _, vni, names| {
            flows.trace(vni, packet, names)
        })?
    }

    pub(super) fn peer_name(&self, node: NodeId) -> String {
        let named = self.peers.iter().find(|(_, its)| **its == node);
        named.map_or_else(|| format!("{:016x}", node.0), |(name, _)| name.clone())
    }

    /// Adds another node's switch, or changes where it is.
    ///
    /// # Errors
    ///
    /// There are no tunnels here, or they do not take it.
    pub fn add_peer(
        &mut self,
        name: &str,
        public: PublicKey,
        spec: PeerSpec,
    ) -> Result<Peer, Error> {
        let old = self.peers.remove(name);
        if let Some(old) = old {
            self.part(old);
        }
        let remote = self.remote.as_mut().ok_or(Error::Alone)?;
        let node = remote.add(self.now, public, spec)?;
        self.bridge.set_node(node, NodeConfig::default());
        self.peers.insert(name.to_owned(), node);
        self.peer(name, node)
    }

    /// Removes another node's switch, and all that it has; what it was.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn remove_peer(&mut self, name: &str) -> Result<Peer, Error> {
        let node = self.peers.get(name).copied();
        let node = node.ok_or_else(|| Error::NoPeer(name.to_owned()))?;
        let peer = self.peer(name, node)?;
        self.peers.remove(name);
        if let Some(remote) = &mut self.remote {
            remote.remove(node);
        }
        self.forget_foreign(node);
        self.bridge.remove_node(self.now, node);
        self.gossip.down(node);
        self.directory.remove_node(self.now, node);
        self.tell();
        Ok(peer)
    }

    pub(super) fn peer(&mut self, name: &str, node: NodeId) -> Result<Peer, Error> {
        let missing = || Error::NoPeer(name.to_owned());
        let remote = self.remote.as_mut().ok_or(Error::Alone)?;
        let status = remote.status(self.now, node).ok_or_else(missing)?;
        let spec = remote.spec(node).ok_or_else(missing)?;
        let drops = self.bridge.drops(Some(Place::Node(node)));
        Ok(Peer {
            name: name.to_owned(),
            spec: spec.clone(),
            status,
            drops: drops.cloned().unwrap_or_default(),
        })
    }

    /// All other switches, by name.
    ///
    /// # Errors
    ///
    /// There are no tunnels here.
    pub fn peers(&mut self) -> Result<Vec<Peer>, Error> {
        let peers: Vec<_> = self.peers.clone().into_iter().collect();
        let peers = peers.into_iter();
        peers.map(|(name, node)| self.peer(&name, node)).collect()
    }
}
