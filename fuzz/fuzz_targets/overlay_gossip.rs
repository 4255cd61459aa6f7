//! What nodes tell each other of addresses: any bytes are a message or an
//! error; whatever a node hears, it stays bounded, and two nodes that may talk
//! agree in the end.
#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use blanket_overlay::bridge::Vlan;
use blanket_overlay::directory::wire::{MESSAGE, Message};
use blanket_overlay::directory::{
    Directory, EPOCHS, Gossip, GroupId, Key, Limits, NodeId, Record, Settings, Value, Version,
};
use blanket_overlay::frame::{Mac, Vni};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A peer sends these bytes.
    Bytes(Vec<u8>),
    /// A peer sends a record.
    Record {
        push: bool,
        station: u8,
        epoch: u64,
        node: u8,
        gone: bool,
        age: u16,
        flags: u8,
    },
    /// The node claims or withdraws a station.
    Claim(u8),
    Withdraw(u8),
    HandOver(u8),
    Pass(u16),
}

#[derive(Arbitrary, Debug)]
enum Input {
    Message(Vec<u8>),
    Steps(Vec<Step>),
}

const STRANGER: NodeId = NodeId(3);

fn key(station: u8) -> Key {
    let vni = Vni::new(7).unwrap_or_default();
    Key::Station(vni, Vlan::NONE, Mac([2, 0, 0, 0, 0, station]))
}

fn value(flags: u8) -> Value {
    Value::Station {
        ips: vec![[10, 0, 0, flags].into(); usize::from(flags % 4)],
        attached: flags & 1 != 0,
        isolated: flags & 2 != 0,
        groups: vec![GroupId(flags.into()); usize::from(flags >> 6)],
    }
}

struct Node {
    directory: Directory,
    gossip: Gossip,
}

fn node(id: u64, peers: &[NodeId]) -> Node {
    let limits = Limits {
        records: 100,
        per_node: 60,
        tombstones: Duration::from_secs(1000),
    };
    let mut gossip = Gossip::new(Settings::default());
    for peer in peers {
        gossip.up(*peer);
    }
    Node {
        directory: Directory::new(NodeId(id), limits),
        gossip,
    }
}

impl Node {
    fn step(&mut self, now: &mut Duration, step: Step) {
        let directory = &mut self.directory;
        match step {
            Step::Bytes(bytes) => {
                let _ = self.gossip.on_message(*now, directory, STRANGER, &bytes);
            }
            Step::Record {
                push,
                station,
                epoch,
                node,
                gone,
                age,
                flags,
            } => {
                let record = Record {
                    key: key(station % 8),
                    version: Version {
                        epoch: epoch % (EPOCHS + 10),
                        node: NodeId(u64::from(node % 4)),
                    },
                    value: (!gone).then(|| value(flags)),
                };
                let records = vec![(record, Duration::from_secs(age.into()))];
                let message = match push {
                    true => Message::Push(epoch, records),
                    false => Message::Records(records),
                };
                let bytes = message.to_bytes();
                self.gossip
                    .on_message(*now, directory, STRANGER, &bytes)
                    .expect("a sound message");
            }
            Step::Claim(station) => {
                let _ = directory.claim(*now, key(station % 8), value(station), 0);
            }
            Step::Withdraw(station) => directory.withdraw(*now, &key(station % 8)),
            Step::HandOver(station) => {
                directory.hand_over(*now, &key(station % 8), NodeId(u64::from(station % 3)));
            }
            Step::Pass(ms) => *now += Duration::from_millis(ms.into()),
        }
        assert!(self.directory.len() <= 100);
    }
}

fn steps(steps: Vec<Step>) {
    let mut now = Duration::from_secs(1);
    let (one, two) = (NodeId(1), NodeId(2));
    let mut nodes = [node(1, &[two, STRANGER]), node(2, &[one])];
    for step in steps {
        nodes[0].step(&mut now, step);
        exchange(&mut nodes, now);
    }
    // The stranger is gone, and the two agree. What was refused for want of
    // room would be asked for for ever, so it must not have come to that.
    nodes[0].gossip.down(STRANGER);
    for _ in 0..20 {
        now += Duration::from_secs(6);
        exchange(&mut nodes, now);
    }
    if nodes.iter().all(|node| node.directory.len() < 50) {
        let roots = nodes.each_ref().map(|node| node.directory.root());
        assert_eq!(roots[0], roots[1]);
    }
}

fn exchange(nodes: &mut [Node; 2], now: Duration) {
    for _ in 0..64 {
        let mut any = false;
        for at in 0..2 {
            let Node { directory, gossip } = &mut nodes[at];
            for (to, bytes) in gossip.poll(now, directory) {
                assert!(bytes.len() <= MESSAGE);
                if to != STRANGER {
                    any = true;
                    let from = NodeId(at as u64 + 1);
                    let Node { directory, gossip } = &mut nodes[1 - at];
                    gossip
                        .on_message(now, directory, from, &bytes)
                        .expect("a sound message");
                }
            }
        }
        if !any {
            return;
        }
    }
}

fuzz_target!(|input: Input| match input {
    Input::Message(bytes) => {
        if let Ok(message) = Message::from_bytes(&bytes) {
            assert_eq!(message.to_bytes(), bytes);
        }
    }
    Input::Steps(list) => steps(list),
});
