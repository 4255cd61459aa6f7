//! A network that loses, delays, doubles and changes datagrams; nodes on it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::super::*;
use crate::drops::Reason;
use crate::frame::{Checksum, Frame, HEAD, Head, Kind, Offload, Segments, Vni};

/// Numbers that are the same each time.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }

    pub(super) fn chance(&mut self, of_10000: u64) -> bool {
        self.below(10_000) < of_10000
    }
}

/// What goes wrong, in parts of 10,000 of datagrams.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) changed: u64,
    /// Trains whose datagrams go one by one.
    pub(super) split: u64,
    /// Up to so many microseconds later than others.
    pub(super) jitter: u64,
    /// Datagrams of more bytes are lost.
    pub(super) mtu: Option<usize>,
}

pub(super) struct Node {
    pub(super) tunnels: Tunnels,
    pub(super) out: TrainBuffer,
    pub(super) private: PrivateKey,
    /// For each uplink.
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) got: Vec<(PeerId, Vni, Vec<u8>, Offload)>,
    rest: Time,
}

impl Node {
    fn next(&self) -> Time {
        self.tunnels.due().max(self.rest)
    }
}

struct Packet {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
    segment: usize,
}

pub(super) struct Net {
    pub(super) now: Time,
    pub(super) random: Random,
    pub(super) faults: Faults,
    /// Where a path (of the receiver's address) has its own.
    pub(super) on_path: BTreeMap<SocketAddr, Faults>,
    pub(super) nodes: Vec<Node>,
    /// Everything that was sent, if it is wanted.
    pub(super) tapped: Option<Vec<(SocketAddr, SocketAddr, Vec<u8>)>>,
    wire: BTreeMap<(Time, u64), Packet>,
    number: u64,
}

pub(super) const UPLINK: usize = 1472;
const COSTS: Costs = Costs { aes: 1, chacha: 2 };

pub(super) fn address(node: usize, uplink: usize) -> SocketAddr {
    SocketAddr::from(([10, uplink as u8, (node >> 8) as u8, node as u8], 4790))
}

impl Net {
    /// `count` nodes that each have `uplinks`, and know each other.
    pub(super) fn new(seed: u64, count: usize, uplinks: usize) -> Self {
        let mut net = Self {
            now: Duration::ZERO,
            random: Random::new(seed),
            faults: Faults::default(),
            on_path: BTreeMap::new(),
            nodes: (0..count)
                .map(|node| {
                    let private = generate();
                    Node {
                        tunnels: tunnels(private, 0, uplinks),
                        out: TrainBuffer::default(),
                        private,
                        addresses: (0..uplinks).map(|uplink| address(node, uplink)).collect(),
                        got: Vec::new(),
                        rest: Duration::ZERO,
                    }
                })
                .collect(),
            tapped: None,
            wire: BTreeMap::new(),
            number: 0,
        };
        for one in 0..count {
            net.introduce(one);
        }
        net
    }

    fn introduce(&mut self, one: usize) {
        for two in (0..self.nodes.len()).filter(|two| *two != one) {
            let config = PeerConfig {
                public: public(&self.nodes[two].private),
                psk: Some([7; 32]),
                paths: (0..self.nodes[one].addresses.len())
                    .map(|uplink| PathConfig {
                        uplink: uplink as u8,
                        remote: self.nodes[two].addresses[uplink],
                        weight: 1,
                    })
                    .collect(),
            };
            self.nodes[one]
                .tunnels
                .add(self.now, &config)
                .expect("a peer");
        }
    }

    /// A node starts anew, and knows nothing but its configuration.
    pub(super) fn restart(&mut self, node: usize) {
        let uplinks = self.nodes[node].addresses.len();
        let private = self.nodes[node].private;
        self.nodes[node].tunnels = tunnels(private, 0, uplinks);
        self.nodes[node].rest = self.now;
        self.introduce(node);
    }

    pub(super) fn peer(&self, of: usize, node: usize) -> PeerId {
        let public = public(&self.nodes[node].private);
        self.nodes[of].tunnels.find(&public).expect("a peer")
    }

    /// Sends what a node has sealed.
    pub(super) fn flush(&mut self, node: usize) {
        let at = &mut self.nodes[node];
        at.tunnels.finish(self.now, &mut at.out);
        let mut sent = Vec::new();
        for (uplink, packet) in at.out.packets() {
            let from = at.addresses[usize::from(uplink)];
            let datagrams: Vec<Vec<u8>> = packet.iter().map(<[u8]>::to_vec).collect();
            let sizes: Vec<usize> = datagrams.iter().map(Vec::len).collect();
            let (last, others) = sizes.split_last().expect("a datagram");
            assert!(others.iter().all(|size| *size == packet.segment) && *last <= packet.segment);
            assert!(packet.bytes.len() <= 65_507 && datagrams.len() <= 64);
            sent.push((from, packet.to, packet.segment, datagrams));
        }
        at.out.clear();
        for (from, to, segment, datagrams) in sent {
            self.transmit(from, to, segment, datagrams);
        }
    }

    fn transmit(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        segment: usize,
        datagrams: Vec<Vec<u8>>,
    ) {
        let faults = self.on_path.get(&to).copied().unwrap_or(self.faults);
        let split = self.random.chance(faults.split);
        let mut whole = Vec::new();
        for mut bytes in datagrams {
            if let Some(tapped) = &mut self.tapped {
                tapped.push((from, to, bytes.clone()));
            }
            let large = faults.mtu.is_some_and(|mtu| bytes.len() > mtu);
            if large || self.random.chance(faults.lost) {
                self.carry(from, to, std::mem::take(&mut whole), segment, faults.jitter);
                continue;
            }
            if self.random.chance(faults.changed) {
                let at = self.random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << self.random.below(8);
            }
            if self.random.chance(faults.doubled) {
                self.carry(from, to, bytes.clone(), 0, faults.jitter);
            }
            if split {
                self.carry(from, to, bytes, 0, faults.jitter);
            } else {
                whole.extend(bytes);
            }
        }
        self.carry(from, to, whole, segment, faults.jitter);
    }

    fn carry(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        bytes: Vec<u8>,
        segment: usize,
        jitter: u64,
    ) {
        if bytes.is_empty() {
            return;
        }
        let late = Duration::from_micros(500 + self.random.below(jitter + 1));
        self.number += 1;
        let packet = Packet {
            from,
            to,
            bytes,
            segment,
        };
        self.wire.insert((self.now + late, self.number), packet);
    }

    /// Somebody sends this.
    pub(super) fn inject(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        self.carry(from, to, bytes, 0, 0);
    }

    fn deliver(&mut self, packet: Packet) {
        let place = self.nodes.iter().enumerate().find_map(|(at, node)| {
            let mut addresses = node.addresses.iter();
            let uplink = addresses.position(|address| *address == packet.to)?;
            Some((at, uplink))
        });
        let Some((at, uplink)) = place else {
            return;
        };
        let (now, mut bytes) = (self.now, packet.bytes);
        let node = &mut self.nodes[at];
        let received = Received {
            uplink: uplink as u8,
            from: packet.from,
            bytes: &mut bytes,
            segment: packet.segment,
        };
        let got = &mut node.got;
        let mut each = |peer, vni, frame: &mut Frame<'_>| {
            got.push((peer, vni, frame.to_vec(), frame.offload));
        };
        node.tunnels.open(now, [received], &mut node.out, &mut each);
        self.flush(at);
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let ticks = self.nodes.iter().map(Node::next).min();
            let wire = self.wire.first_key_value().map(|(key, _)| key.0);
            let next = ticks.into_iter().chain(wire).min().unwrap_or(end);
            if next > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(next);
            if wire == Some(next) {
                if let Some((_, packet)) = self.wire.pop_first() {
                    self.deliver(packet);
                }
                continue;
            }
            for at in 0..self.nodes.len() {
                let node = &mut self.nodes[at];
                if node.next() <= self.now {
                    node.tunnels.tick(self.now, &mut node.out);
                    // Workers do not come more often.
                    node.rest = self.now + Duration::from_millis(1);
                    self.flush(at);
                }
            }
        }
    }

    /// Seals a frame; it goes with the next flush.
    pub(super) fn seal(
        &mut self,
        from: usize,
        to: usize,
        flow: u32,
        bytes: &[u8],
    ) -> Result<(), Reason> {
        let peer = self.peer(from, to);
        let node = &mut self.nodes[from];
        with_frame(bytes, |frame| {
            node.tunnels
                .seal(self.now, peer, VNI, flow, frame, &mut node.out)
        })
    }

    /// Sends a frame.
    pub(super) fn send(&mut self, from: usize, to: usize, bytes: &[u8]) -> bool {
        let sealed = self.seal(from, to, 1, bytes);
        self.flush(from);
        sealed.is_ok()
    }

    /// Runs until all nodes have keys with all others.
    pub(super) fn connect(&mut self) {
        for _ in 0..200 {
            self.run(Duration::from_millis(50));
            if (0..self.nodes.len()).all(|node| self.connected(node)) {
                return;
            }
        }
        panic!("not connected");
    }

    pub(super) fn connected(&mut self, node: usize) -> bool {
        let (count, now) = (self.nodes.len() as u32, self.now);
        let tunnels = &mut self.nodes[node].tunnels;
        (0..count - 1).all(|peer| {
            tunnels
                .status(now, PeerId(peer))
                .is_some_and(|peer| peer.connected)
        })
    }

    pub(super) fn status(&mut self, of: usize, node: usize) -> PeerStatus {
        let (peer, now) = (self.peer(of, node), self.now);
        self.nodes[of].tunnels.status(now, peer).expect("a peer")
    }
}

fn tunnels(private: PrivateKey, epoch: u64, uplinks: usize) -> Tunnels {
    Tunnels::new(Config {
        private,
        epoch: Duration::from_secs(1_700_000_000 + epoch),
        uplinks: vec![UPLINK; uplinks],
        costs: COSTS,
    })
}

pub(super) const VNI: Vni = match Vni::new(0xabcdef) {
    Some(vni) => vni,
    None => panic!(),
};

pub(super) fn offload(len: usize) -> Offload {
    let checksum = (len > 60).then_some(Checksum {
        start: 34,
        offset: 16,
    });
    Offload {
        checksum,
        valid: false,
        segments: (len > 1514).then_some(Segments {
            kind: Kind::Tcp4,
            ecn: len % 2 == 1,
            header: 54,
            size: 1448,
        }),
    }
}

/// A frame, its body in two pieces.
pub(super) fn with_frame<T>(bytes: &[u8], then: impl FnOnce(&Frame<'_>) -> T) -> T {
    let mut body = bytes[bytes.len().min(HEAD)..].to_vec();
    let middle = body.len() / 3;
    let (one, two) = body.split_at_mut(middle);
    let pieces = [VolatileSlice::from(one), VolatileSlice::from(two)];
    then(&Frame {
        head: Head::of(bytes),
        body: &pieces,
        offload: offload(bytes.len()),
    })
}

/// A frame of `len` bytes (8 at least) that has a number.
pub(super) fn numbered(number: u64, len: usize) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().to_vec();
    let mut random = Random::new(number);
    while bytes.len() < len {
        bytes.extend(random.below(u64::MAX).to_le_bytes());
    }
    bytes.truncate(len.max(8));
    bytes
}

/// Its number, if it is as it was sent.
pub(super) fn number(bytes: &[u8]) -> u64 {
    let number = u64::from_be_bytes(bytes[..8].try_into().expect("8 bytes"));
    assert_eq!(bytes, numbered(number, bytes.len()), "changed on the way");
    number
}
