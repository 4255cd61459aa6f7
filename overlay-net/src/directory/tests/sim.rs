//! Many nodes, and a network between them that loses, doubles, delays and
//! parts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::*;

/// Always the same numbers from the same seed (xorshift64*).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

pub(super) struct Node {
    pub(super) directory: Directory,
    pub(super) gossip: Gossip,
}

#[derive(Clone, Copy)]
pub(super) struct Net {
    /// Of a hundred.
    pub(super) loss: u64,
    pub(super) double: u64,
    /// Milliseconds.
    pub(super) delay: (u64, u64),
}

type Packet = (usize, usize, Arc<[u8]>);

pub(super) struct Sim {
    pub(super) now: Duration,
    pub(super) nodes: Vec<Node>,
    pub(super) net: Net,
    /// In which part each node is.
    pub(super) parts: Vec<u64>,
    pub(super) random: Random,
    pub(super) messages: u64,
    pub(super) bytes: u64,
    on_the_way: BTreeMap<(Duration, u64), Packet>,
    count: u64,
    /// When each node has something to do.
    next: Vec<Duration>,
}

pub(super) fn id(at: usize) -> NodeId {
    NodeId(at as u64 + 1)
}

impl Sim {
    pub(super) fn new(nodes: usize, seed: u64, net: Net) -> Self {
        let mut sim = Self {
            now: Duration::from_secs(1),
            nodes: Vec::new(),
            net,
            parts: vec![0; nodes],
            random: Random(seed | 1),
            messages: 0,
            bytes: 0,
            on_the_way: BTreeMap::new(),
            count: 0,
            next: vec![Duration::ZERO; nodes],
        };
        for at in 0..nodes {
            sim.nodes.push(Self::node(at, nodes));
        }
        sim
    }

    pub(super) fn node(at: usize, nodes: usize) -> Node {
        let mut gossip = Gossip::new(Settings::default());
        for peer in (0..nodes).filter(|peer| *peer != at) {
            gossip.up(id(peer));
        }
        Node {
            directory: Directory::new(id(at), Limits::default()),
            gossip,
        }
    }

    pub(super) fn reaches(&self, a: usize, b: usize) -> bool {
        self.parts[a] == self.parts[b]
    }

    /// Lets the time pass, and sends what there is to send.
    pub(super) fn run(&mut self, until: Duration) {
        for at in 0..self.nodes.len() {
            self.poll(at);
        }
        loop {
            let next = self.next.iter().copied().min();
            let arrives = self.on_the_way.keys().next().map(|(time, _)| *time);
            let step = next.into_iter().chain(arrives).min().unwrap_or(until);
            if step.max(self.now) >= until {
                self.now = until;
                return;
            }
            self.now = self.now.max(step);
            let mut busy = BTreeSet::new();
            while let Some(entry) = self.on_the_way.first_entry()
                && entry.key().0 <= self.now
            {
                let (from, to, bytes) = entry.remove();
                if self.reaches(from, to) {
                    let node = &mut self.nodes[to];
                    let (gossip, directory) = (&mut node.gossip, &mut node.directory);
                    gossip
                        .on_message(self.now, directory, id(from), &bytes)
                        .expect("a sound message");
                    busy.insert(to);
                }
            }
            for at in 0..self.nodes.len() {
                if busy.contains(&at) || self.next[at] <= self.now {
                    self.poll(at);
                }
            }
        }
    }

    fn poll(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        for (to, bytes) in node.gossip.poll(self.now, &mut node.directory) {
            self.messages += 1;
            self.bytes += bytes.len() as u64;
            let to = to.0 as usize - 1;
            let copies = 1 + u64::from(self.random.below(100) < self.net.double);
            for _ in 0..copies {
                if self.random.below(100) < self.net.loss {
                    continue;
                }
                let (least, most) = self.net.delay;
                let delay = least + self.random.below(most - least + 1);
                let time = self.now + Duration::from_millis(delay);
                self.count += 1;
                let packet = (at, to, Arc::clone(&bytes));
                self.on_the_way.insert((time, self.count), packet);
            }
        }
        self.next[at] = self.nodes[at].gossip.next(self.now);
    }
}
