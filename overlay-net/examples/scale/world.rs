//! A switch that knows many stations, and many nodes that tell each other.
#![allow(clippy::expect_used, reason = "what cannot be set up is not measured")]

use std::net::IpAddr;
use std::time::Duration;

use blanket_overlay::bridge::{
    Bridge, Config, NetworkConfig, NodeConfig, Outputs, Place, PortConfig, Station, Vlan,
};
use blanket_overlay::directory::{
    Directory, Gossip, Key as Name, Limits, NodeId, Record, Settings, Value, Version,
};
use blanket_overlay::frame::{Frame, Head, Key, Layers, Mac, Offload, PortId, Vni, parse};

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Stations. The first of them are attached to this node's ports, one to
    /// each; the others are on the other nodes.
    pub(crate) stations: u32,
    /// This node's ports; fewer.
    pub(crate) ports: u32,
    /// Nodes, this one included.
    pub(crate) nodes: u32,
}

/// This node.
const ME: NodeId = NodeId(1);
/// Some time after the start.
pub(crate) const NOW: Duration = Duration::from_secs(100);

fn network() -> Vni {
    Vni::new(7).unwrap_or_default()
}

fn mac(number: u32) -> Mac {
    let [a, b, c, d] = number.to_be_bytes();
    Mac([2, 0, a, b, c, d])
}

fn name(number: u32) -> Name {
    Name::Station(network(), Vlan::NONE, mac(number))
}

fn value(number: u32) -> Value {
    Value::Station {
        ips: vec![IpAddr::from((0x0a00_0000 | number).to_be_bytes())],
        attached: true,
        isolated: false,
        groups: Vec::new(),
    }
}

fn record(number: u32, node: NodeId) -> Record {
    Record {
        key: name(number),
        version: Version { epoch: 1, node },
        value: Some(value(number)),
    }
}

/// A switch's tables.
pub(crate) struct World {
    /// Where frames go.
    pub(crate) bridge: Bridge,
    /// What it knows of all nodes.
    pub(crate) directory: Directory,
    size: Size,
    key: Key,
    layers: Layers,
    bytes: Vec<u8>,
    /// Where the last frame went.
    pub(crate) out: Outputs,
}

impl World {
    /// All ports are there, and all has been told.
    ///
    /// # Panics
    /// Something is refused: there is no room.
    pub(crate) fn new(size: Size) -> Self {
        let mut bridge = Bridge::new(Config::default());
        bridge.set_network(network(), NetworkConfig::default());
        let limits = Limits {
            records: 1 << 24,
            per_node: 1 << 20,
            ..Limits::default()
        };
        let mut directory = Directory::new(ME, limits);
        for number in 0..size.ports {
            let config = PortConfig {
                vni: network(),
                macs: vec![mac(number)],
                ..PortConfig::default()
            };
            let added = bridge.add_port(PortId(number + 1), config);
            added.expect("a port");
            let claimed = directory.claim(NOW, name(number), value(number), 0);
            claimed.expect("room");
        }
        let nodes: Vec<_> = (2..=size.nodes).map(|node| NodeId(node.into())).collect();
        bridge.set_members(network(), &nodes);
        for node in &nodes {
            bridge.set_node(*node, NodeConfig::default());
        }
        for number in size.ports..size.stations {
            let node = nodes[number as usize % nodes.len()];
            directory.merge(NOW, record(number, node), Duration::ZERO);
        }
        // As the switch does.
        for key in directory.changes() {
            if let Name::Station(vni, vlan, mac) = key {
                let station = Station { vni, vlan, mac };
                bridge.locate(NOW, station, directory.located(&key).as_ref());
            }
        }
        let mut bytes = [mac(1).0, mac(0).0].concat();
        bytes.extend([0x90, 0]);
        bytes.resize(60, 0);
        let (key, layers) =
            parse(&bytes, bytes.len(), PortId(1), network()).expect("a sound frame");
        Self {
            bridge,
            directory,
            size,
            key,
            layers,
            bytes,
            out: Outputs::default(),
        }
    }

    /// Sends a frame from the first port to a station; whether it goes to
    /// where that is, and to nobody else.
    pub(crate) fn forward(&mut self, number: u32) -> bool {
        let is_sent = self.send(mac(number));
        let is_there = |place| match place {
            Place::Port(id) => id.0 == number + 1 && number < self.size.ports,
            Place::Node(_) => number >= self.size.ports,
        };
        is_sent && matches!(self.out.list[..], [one] if is_there(one.to))
    }

    /// Sends a frame from the first port to that address; whether it goes
    /// somewhere: [`World::out`].
    pub(crate) fn send(&mut self, to: Mac) -> bool {
        self.key.dst = to;
        let mut frame = Frame {
            head: Head::of(&self.bytes),
            body: &[],
            offload: Offload::default(),
        };
        let from = Place::Port(PortId(1));
        let (key, layers, out) = (&self.key, &self.layers, &mut self.out);
        let sent = self.bridge.forward(NOW, from, key, layers, &mut frame, out);
        sent.is_ok()
    }
}

/// Many nodes that know all stations of each other.
pub(crate) struct Nodes {
    nodes: Vec<(Directory, Gossip)>,
    stations: u32,
}

/// What it took until all knew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spread {
    /// Times that messages had to cross the network, one after the other.
    pub(crate) rounds: u32,
    /// Messages until then.
    pub(crate) messages: usize,
    /// Their bytes.
    pub(crate) bytes: usize,
}

impl Nodes {
    /// All know all, and have nothing to tell.
    pub(crate) fn new(count: u32, stations: u32) -> Self {
        let id = |number: u32| NodeId(u64::from(number) + 1);
        let node = |at: u32| {
            let mut directory = Directory::new(id(at), Limits::default());
            let mut gossip = Gossip::new(Settings::default());
            for number in 0..stations {
                let owner = number % count;
                if owner == at {
                    let claimed = directory.claim(NOW, name(number), value(number), 0);
                    claimed.expect("room");
                } else {
                    directory.merge(NOW, record(number, id(owner)), Duration::ZERO);
                }
            }
            // To nobody.
            gossip.poll(NOW, &mut directory);
            directory.changes();
            for peer in (0..count).filter(|peer| *peer != at) {
                gossip.up(id(peer));
            }
            (directory, gossip)
        };
        let mut nodes = Self {
            nodes: (0..count).map(node).collect(),
            stations,
        };
        // They compare, and find no difference.
        nodes.settle(|_| false);
        nodes
    }

    /// A station moves to the last node: what it takes until all know.
    ///
    /// # Panics
    /// It is the last node's already, or is never known to all.
    pub(crate) fn moves(&mut self, number: u32) -> Spread {
        let number = number % self.stations;
        let key = name(number);
        let last = self.nodes.len() - 1;
        let (directory, _) = &mut self.nodes[last];
        let epoch = directory.get(&key).map_or(0, |known| known.version.epoch);
        let version = directory.claim(NOW, key, value(number), epoch);
        let version = version.expect("room");
        self.settle(|nodes| {
            let mut nodes = nodes.iter();
            nodes.all(|(directory, _)| {
                directory
                    .get(&key)
                    .is_some_and(|known| known.version == version)
            })
        })
    }

    /// Has all messages delivered, one round after the other, until it is
    /// `done` or there are none.
    fn settle(&mut self, done: impl Fn(&[(Directory, Gossip)]) -> bool) -> Spread {
        let mut spread = Spread {
            rounds: 0,
            messages: 0,
            bytes: 0,
        };
        while !done(&self.nodes) {
            let mut under_way = Vec::new();
            for (at, (directory, gossip)) in self.nodes.iter_mut().enumerate() {
                let from = NodeId(at as u64 + 1);
                let messages = gossip.poll(NOW, directory).into_iter();
                under_way.extend(messages.map(|(to, bytes)| (from, to, bytes)));
            }
            if under_way.is_empty() {
                break;
            }
            spread.rounds += 1;
            for (from, to, bytes) in under_way {
                spread.messages += 1;
                spread.bytes += bytes.len();
                let (directory, gossip) = &mut self.nodes[to.0 as usize - 1];
                let heard = gossip.on_message(NOW, directory, from, &bytes);
                heard.expect("a sound message");
                directory.changes();
            }
        }
        spread
    }
}
