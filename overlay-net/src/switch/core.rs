//! See the module above.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant, SystemTime};

use data_encoding::BASE64;
use vm_memory::VolatileSlice;

use super::Error;
use super::flows::Flows;
use super::remote::{CONTROL, Remote, node_of};
use super::worker::Waker;
use crate::api::types::{
    Info, MacLine, Network, NetworkSpec, Peer, PeerSpec, PortSpec, PortStatus, Traffic,
};
use crate::bridge::{
    Bridge, Config, Edit, Event, NetworkConfig, NodeConfig, Origin, Output, Outputs, Place,
    PortConfig, Station, stations,
};
use crate::directory::{Directory, Gossip, Key as Record, Limits, NodeId, Settings, Value};
use crate::drops::{Drops, Reason};
use crate::flow::{Packet, Sink, Target};
use crate::frame::{Frame, HEAD, Head, Key, Layers, Offload, PortId, Segmenter, Vni, parse};
use crate::port::{BURST, Port};
use crate::tunnel::{PublicKey, flow_hash};

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
    /// Something was sent since the last flush.
    dirty: bool,
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
    /// Time 0.
    start: Instant,
    /// Now, in the tables' time.
    now: Duration,
    networks: BTreeMap<String, NetworkSpec>,
    /// Index: a port's number.
    slots: Vec<Option<Slot>>,
    flows: HashMap<Vni, Flows>,
    names: BTreeMap<String, PortId>,
    /// Ports with something to flush.
    dirty: Vec<PortId>,
    drops: Drops,
    bridge: Bridge,
    /// Where a frame goes: used again for each.
    outputs: Outputs,
    later: Vec<Later>,
    /// The tunnels; none while they have their turn, or if there are none.
    remote: Option<Box<Remote>>,
    peers: BTreeMap<String, NodeId>,
    directory: Directory,
    gossip: Gossip,
    /// When peers are looked at again, and what is old is forgotten.
    look: Duration,
    expire: Duration,
}

// What it is told.
impl Switch {
    /// A switch without networks.
    #[must_use]
    pub fn new(start: Instant, remote: Option<Remote>) -> Self {
        let me = remote.as_ref().map(|remote| node_of(remote.public_key()));
        Self {
            start,
            now: Duration::ZERO,
            networks: BTreeMap::new(),
            // Numbers begin with 1.
            slots: vec![None],
            flows: HashMap::new(),
            names: BTreeMap::new(),
            dirty: Vec::new(),
            drops: Drops::default(),
            bridge: Bridge::new(Config::default()),
            outputs: Outputs::default(),
            later: Vec::new(),
            remote: remote.map(Box::new),
            peers: BTreeMap::new(),
            directory: Directory::new(me.unwrap_or_default(), Limits::default()),
            gossip: Gossip::new(Settings::default()),
            look: Duration::ZERO,
            expire: Duration::ZERO,
        }
    }

    fn slot(&self, id: PortId) -> Option<&Slot> {
        self.slots.get(id.0 as usize)?.as_ref()
    }

    fn slot_mut(&mut self, id: PortId) -> Option<&mut Slot> {
        self.slots.get_mut(id.0 as usize)?.as_mut()
    }

    fn all(&self) -> impl Iterator<Item = (PortId, &Slot)> {
        let slots = self.names.values();
        slots.filter_map(|id| Some((*id, self.slot(*id)?)))
    }

    fn vni(&self, network: &str) -> Result<Vni, Error> {
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
        }
    }

    fn network(&self, name: &str, spec: &NetworkSpec) -> Network {
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
        self.flows.entry(spec.vni).or_insert_with(Flows::new);
        self.claim(Record::Member(spec.vni, self.directory.me()), Value::Member);
        let members = self.directory.members(spec.vni);
        self.bridge.set_members(spec.vni, &members);
        let network = self.network(name, &spec);
        self.networks.insert(name.to_owned(), spec);
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
        self.bridge.remove_network(network.spec.vni);
        self.flows.remove(&network.spec.vni);
        let member = Record::Member(network.spec.vni, self.directory.me());
        self.directory.withdraw(self.now, &member);
        self.tell();
        self.networks.remove(name);
        Ok(network)
    }

    fn status(&self, id: PortId, slot: &Slot) -> PortStatus {
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
        let network = self.networks.get(&spec.network);
        let network = network.ok_or_else(|| Error::NoNetwork(spec.network.clone()))?;
        let (vni, mtu) = (network.vni, usize::from(network.mtu));
        if self.names.contains_key(name) {
            return Err(Error::Exists(name.to_owned()));
        }
        if self.names.len() == MAX_PORTS {
            return Err(Error::TooMany(MAX_PORTS, "ports"));
        }
        let id = u32::try_from(self.slots.len());
        let id = PortId(id.map_err(|_| Error::TooMany(self.slots.len(), "ports"))?);
        let config = PortConfig {
            vni,
            mtu,
            ..spec.bridge.clone()
        };
        self.bridge.add_port(id, config)?;
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
            dirty: false,
        };
        let status = self.status(id, &slot);
        self.slots.push(Some(slot));
        self.names.insert(name.to_owned(), id);
        for (key, value) in self.attached(id) {
            self.claim(key, value);
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
        for (key, _) in self.attached(id) {
            self.directory.withdraw(self.now, &key);
        }
        self.bridge.remove_port(self.now, id)?;
        self.tell();
        Ok(status)
    }

    /// What is attached to a port, as others are told.
    fn attached(&self, id: PortId) -> Vec<(Record, Value)> {
        let Some(config) = self.bridge.port(id) else {
            return Vec::new();
        };
        let value = Value::Station {
            ips: config.ips.clone(),
            attached: true,
            isolated: config.isolated,
        };
        let key = |station: Station| Record::Station(station.vni, station.vlan, station.mac);
        let stations = stations(config).into_iter();
        stations
            .map(|station| (key(station), value.clone()))
            .collect()
    }

    /// The addresses that are known in a network: where, why, and since when
    /// nothing was heard.
    fn stations(
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
    fn names(&self, vni: Vni) -> impl Fn(&str) -> Option<PortId> + use<> {
        let ports = self.all().filter(|(_, slot)| slot.vni == vni);
        let names: HashMap<_, _> = ports.map(|(id, slot)| (slot.name.clone(), id)).collect();
        move |name| names.get(name).copied()
    }

    fn with_flows<R>(
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

    fn peer_name(&self, node: NodeId) -> String {
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
        let remote = self.remote.as_mut().ok_or(Error::Alone)?;
        if let Some(old) = old {
            remote.remove(old);
            self.bridge.remove_node(self.now, old);
            self.gossip.down(old);
        }
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
        self.bridge.remove_node(self.now, node);
        self.gossip.down(node);
        self.directory.remove_node(self.now, node);
        self.tell();
        Ok(peer)
    }

    fn peer(&mut self, name: &str, node: NodeId) -> Result<Peer, Error> {
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

// What nodes tell each other.
impl Switch {
    /// This node has something, whoever had it before, and all others are to
    /// know.
    fn claim(&mut self, key: Record, value: Value) {
        // A switch that was started again does not know what it said before.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let after = since.map_or(0, |since| since.as_millis() as u64);
        if let Err(refused) = self.directory.claim(self.now, key, value, after) {
            tracing::warn!("others are not told of {key:?}: {refused}");
        }
        self.tell();
    }

    /// Does what follows from the directory's changes, and tells others of
    /// what is new here.
    fn tell(&mut self) {
        for key in self.directory.changes() {
            match key {
                Record::Station(vni, vlan, mac) => {
                    let located = self.directory.located(&key);
                    let station = Station { vni, vlan, mac };
                    self.bridge.locate(self.now, station, located.as_ref());
                }
                Record::Member(vni, _) => {
                    let members = self.directory.members(vni);
                    self.bridge.set_members(vni, &members);
                }
                Record::Node(_) => {}
            }
        }
        for (node, message) in self.gossip.poll(self.now, &mut self.directory) {
            let bytes = [&CONTROL_HEAD, &message[..]].concat();
            let (to, vni) = (Place::Node(node), Vni::default());
            self.put_off(to, vni, 0, bytes, Offload::default());
        }
        if self.remote.is_some() {
            self.catch_up();
        }
    }

    /// A message from another switch.
    fn hear(&mut self, node: NodeId, frame: &Frame<'_>) {
        let bytes = frame.to_vec();
        let message = bytes.strip_prefix(&CONTROL_HEAD);
        let heard = message.is_some_and(|message| {
            let heard = self
                .gossip
                .on_message(self.now, &mut self.directory, node, message);
            heard.is_ok()
        });
        if heard {
            self.tell();
        } else {
            self.drop(Place::Node(node), Reason::Malformed);
        }
    }

    /// Tells others of the addresses that were learned and forgotten here.
    fn notice(&mut self) {
        let events: Vec<Event> = self.bridge.events().collect();
        for event in &events {
            let (Event::Learned(station, _) | Event::Forgotten(station, _)) = event;
            let key = Record::Station(station.vni, station.vlan, station.mac);
            match event {
                Event::Learned(_, port) => {
                    let value = Value::Station {
                        ips: Vec::new(),
                        attached: false,
                        isolated: self.bridge.port(*port).is_some_and(|port| port.isolated),
                    };
                    // A full directory only means that frames to it go to all.
                    let _ = self.directory.claim(self.now, key, value, 0);
                }
                Event::Forgotten(..) => self.directory.withdraw(self.now, &key),
            }
        }
        if !events.is_empty() {
            self.tell();
        }
    }
}

// Its turns.
impl Switch {
    /// What becomes readable when there is work, of each port that is not down.
    pub(super) fn wakers(&self) -> impl Iterator<Item = Waker<'_>> {
        let ports = self.all();
        ports.filter_map(|(id, slot)| Some((id, slot.port.as_ref()?.waker())))
    }

    pub(super) fn uplink_waker(&self) -> Option<BorrowedFd<'_>> {
        self.remote.as_ref().map(|remote| remote.waker())
    }

    pub(super) fn set_now(&mut self, now: Instant) {
        self.now = now.saturating_duration_since(self.start);
    }

    /// Does what time asks for; when that is next.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        self.set_now(now);
        let now = self.now;
        if now >= self.expire {
            self.expire = now + Duration::from_secs(1);
            self.bridge.expire(now);
            for flows in self.flows.values_mut() {
                flows.expire(now);
            }
        }
        self.notice();
        let remote = self.remote.as_mut()?;
        let mut next = remote.tick(now);
        if now >= self.look {
            self.look = now + LOOK;
            for (node, up) in remote.turned(now) {
                if up {
                    self.gossip.up(node);
                } else {
                    self.gossip.down(node);
                }
            }
        }
        if remote.waits() {
            next = next.min(self.look);
        }
        if now >= self.gossip.next(now) {
            self.tell();
        }
        self.flush();
        let soon = now + Duration::from_millis(1);
        Some(self.start + next.min(self.gossip.next(now).max(soon)))
    }

    /// Gives a port (none: the uplinks) its turn: how many frames there were.
    pub(super) fn service(&mut self, id: Option<PortId>) -> usize {
        let count = match id {
            Some(id) => self.service_port(id),
            None => self.service_uplinks(),
        };
        if !self.later.is_empty() {
            self.catch_up();
        }
        count
    }

    fn service_port(&mut self, id: PortId) -> usize {
        let Some(slot) = self.slot_mut(id) else {
            return 0;
        };
        let vni = slot.vni;
        let Some(mut port) = slot.port.take() else {
            return 0;
        };
        let from = Place::Port(id);
        let received = port.receive(BURST, &mut |frame| self.forward(from, vni, frame));
        self.settle(id, port, received).unwrap_or(0)
    }

    fn service_uplinks(&mut self) -> usize {
        let Some(mut remote) = self.remote.take() else {
            return 0;
        };
        let received = remote.receive(self.now, &mut |node, vni, frame| {
            if vni.number() == CONTROL {
                self.hear(node, &frame);
            } else {
                self.forward(Place::Node(node), vni, frame);
            }
        });
        self.remote = Some(remote);
        received.unwrap_or_else(|error| {
            // A link that is down, which others may not be.
            tracing::debug!("an uplink: {error}");
            0
        })
    }

    /// Puts a port back after something was done with it; it is down if that
    /// has failed.
    fn settle<T>(&mut self, id: PortId, port: Box<dyn Port>, done: io::Result<T>) -> Option<T> {
        let slot = self.slot_mut(id)?;
        match done {
            Ok(done) => {
                slot.port = Some(port);
                Some(done)
            }
            Err(error) => {
                tracing::warn!("port {} is down: {error}", slot.name);
                slot.drops.merge(port.drops());
                slot.down = Some(error.to_string());
                None
            }
        }
    }

    fn with_port<T>(
        &mut self,
        id: Option<PortId>,
        act: impl FnOnce(&mut dyn Port) -> io::Result<T>,
    ) -> Option<T> {
        let mut port = self.slot_mut(id?)?.port.take()?;
        let done = act(port.as_mut());
        self.settle(id?, port, done)
    }

    /// Whether it pays to look for frames of a port before sleeping.
    pub(super) fn polls_cheaply(&self, id: Option<PortId>) -> bool {
        let slot = id.and_then(|id| self.slot(id));
        let port = slot.and_then(|slot| slot.port.as_ref());
        port.is_some_and(|port| port.polls_cheaply())
    }

    /// Asks a port for notifications; false: it has something already.
    pub(super) fn arm(&mut self, id: Option<PortId>) -> bool {
        // One that is down, or has gone, is not looked at any more.
        self.with_port(id, |port| port.arm()).unwrap_or(true)
    }

    /// The port is polled from now on.
    pub(super) fn disarm(&mut self, id: Option<PortId>) {
        self.with_port(id, |port| {
            port.disarm();
            Ok(())
        });
    }

    /// Lets the other sides know of what was sent to them.
    pub(super) fn flush(&mut self) {
        if let Some(remote) = &mut self.remote {
            remote.flush(self.now);
        }
        while let Some(id) = self.dirty.pop() {
            if let Some(slot) = self.slot_mut(id) {
                slot.dirty = false;
            }
            self.with_port(Some(id), |port| port.flush());
        }
    }
}

// The way of a frame.
impl Switch {
    /// A frame has come in.
    fn forward(&mut self, from: Place, vni: Vni, mut frame: Frame<'_>) {
        let len = frame.len();
        let mut port = PortId::default();
        if let Place::Port(id) = from {
            port = id;
            if let Some(slot) = self.slot_mut(id) {
                slot.rx.add(len);
            }
        }
        let Ok((key, layers)) = parse(frame.head.bytes(), len, port, vni) else {
            return self.drop(from, Reason::Malformed);
        };
        let flows = self.flows.get_mut(&vni);
        let Some(mut pipeline) = flows.and_then(|flows| flows.pipeline.take()) else {
            return self.drop(from, Reason::NoNetwork);
        };
        if pipeline.is_normal(self.now, &key, len) {
            self.bridge(from, &key, &layers, &mut frame);
        } else {
            let mut packet = Packet {
                frame: &mut frame,
                key,
                layers,
            };
            let now = self.now;
            let mut out = Out { switch: self, from };
            pipeline.run(now, &mut packet, &mut out);
        }
        if let Some(flows) = self.flows.get_mut(&vni) {
            flows.pipeline = Some(pipeline);
        }
    }

    /// The way through the bridge.
    fn bridge(&mut self, from: Place, key: &Key, layers: &Layers, frame: &mut Frame<'_>) {
        let mut outputs = std::mem::take(&mut self.outputs);
        let bridge = &mut self.bridge;
        // What it drops, the bridge counts.
        let _ = bridge.forward(self.now, from, key, layers, frame, &mut outputs);
        for output in &outputs.list {
            self.emit(output, key, frame);
        }
        if let Some(mut reply) = outputs.reply.take() {
            let (to, mut offload) = (reply.output, Offload::default());
            // Its sender has its turn, and cannot be sent to now.
            if to.edit.apply(&mut reply.head, &mut offload) {
                self.put_off(to.to, to.vni, 0, reply.head.bytes().to_vec(), offload);
            }
        }
        self.outputs = outputs;
    }

    /// Out of all ports of a network but one, and to all other nodes in it
    /// unless it came from one.
    fn flood(&mut self, from: Place, packet: &Packet<'_, '_>) {
        let vni = packet.key.vni;
        let ports: Vec<PortId> = self
            .all()
            .filter(|(id, slot)| slot.vni == vni && Place::Port(*id) != from)
            .map(|(id, _)| id)
            .collect();
        for id in ports {
            self.send(id, packet.frame);
        }
        if matches!(from, Place::Port(_)) {
            for node in self.directory.members(vni) {
                self.seal(node, vni, flow_hash(&packet.key), packet.frame);
            }
        }
    }

    fn drop(&mut self, at: Place, reason: Reason) {
        let slot = match at {
            Place::Port(id) => self.slot_mut(id),
            Place::Node(_) => None,
        };
        match slot {
            Some(slot) => slot.drops.add(reason),
            None => self.drops.add(reason),
        }
    }

    /// Sends a frame to one of its destinations.
    fn emit(&mut self, output: &Output, key: &Key, frame: &Frame<'_>) {
        let mut edited;
        let frame = if output.edit == Edit::None {
            frame
        } else {
            edited = frame.clone();
            if !output.edit.apply(&mut edited.head, &mut edited.offload) {
                return self.drop(output.to, Reason::Malformed);
            }
            &edited
        };
        match output.to {
            Place::Port(id) => self.send(id, frame),
            Place::Node(node) => self.seal(node, output.vni, flow_hash(key), frame),
        }
    }

    /// Sends a frame out of a port.
    fn send(&mut self, id: PortId, frame: &Frame<'_>) {
        let Some(slot) = self.slot_mut(id) else {
            return;
        };
        let Some(port) = &mut slot.port else {
            slot.drops.add(Reason::Down);
            return;
        };
        match port.send(frame) {
            Ok(()) => {
                slot.tx.add(frame.len());
                if !slot.dirty {
                    slot.dirty = true;
                    self.dirty.push(id);
                }
            }
            Err(reason) => slot.drops.add(reason),
        }
    }

    /// Sends a frame to a node, in segments if what is large gets lost.
    fn seal(&mut self, node: NodeId, vni: Vni, flow: u32, frame: &Frame<'_>) {
        let to = Place::Node(node);
        let Some(remote) = &mut self.remote else {
            // It came by a tunnel and follows its guest into another one, or is
            // a message: the tunnels have their turn.
            return self.put_off(to, vni, flow, frame.to_vec(), frame.offload);
        };
        let cut = remote
            .cut(node)
            .filter(|_| frame.offload.segments.is_some());
        let sealed = match cut {
            None => remote.seal(self.now, node, vni, flow, frame),
            Some(most) => Segmenter::new(frame, most, false).and_then(|mut segments| {
                while let Some(segment) = segments.next() {
                    remote.seal(self.now, node, vni, flow, &segment)?;
                }
                Ok(())
            }),
        };
        if let Err(reason) = sealed {
            self.drop(to, reason);
        }
    }

    /// Has a frame wait until nobody has a turn.
    fn put_off(&mut self, to: Place, vni: Vni, flow: u32, bytes: Vec<u8>, offload: Offload) {
        if self.later.len() == MAX_LATER {
            return self.drop(to, Reason::Full);
        }
        self.later.push(Later {
            to,
            vni,
            flow,
            bytes,
            offload,
        });
    }

    /// Sends what was put off.
    fn catch_up(&mut self) {
        for mut later in std::mem::take(&mut self.later) {
            let head = Head::of(&later.bytes);
            let rest = later.bytes.get_mut(HEAD..).unwrap_or_default();
            let body = [VolatileSlice::from(rest)];
            let frame = Frame {
                head,
                body: &body,
                offload: later.offload,
            };
            match later.to {
                Place::Port(id) => self.send(id, &frame),
                Place::Node(node) => self.seal(node, later.vni, later.flow, &frame),
            }
        }
    }
}

/// Where frames go that come out of a network's flows.
struct Out<'s> {
    switch: &'s mut Switch,
    from: Place,
}

impl Sink for Out<'_> {
    fn send(&mut self, target: Target, packet: &Packet<'_, '_>) {
        let (switch, from) = (&mut *self.switch, self.from);
        match target {
            Target::Normal => {
                let mut frame = packet.frame.clone();
                switch.bridge(from, &packet.key, &packet.layers, &mut frame);
            }
            Target::Flood | Target::All => switch.flood(from, packet),
            Target::Port(id) | Target::Mirror(id) => {
                // Nothing leaves its network.
                if switch
                    .slot(id)
                    .is_some_and(|slot| slot.vni == packet.key.vni)
                {
                    switch.send(id, packet.frame);
                } else {
                    switch.drop(from, Reason::NoPort);
                }
            }
            Target::InPort => {
                let (bytes, offload) = (packet.frame.to_vec(), packet.frame.offload);
                switch.put_off(from, packet.key.vni, flow_hash(&packet.key), bytes, offload);
            }
            Target::Controller(_) => switch.drop(from, Reason::NoController),
        }
    }

    fn dropped(&mut self, reason: Reason, _: &Packet<'_, '_>) {
        self.switch.drop(self.from, reason);
    }
}
