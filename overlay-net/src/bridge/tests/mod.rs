//! The bridge, with frames as stations send them.

mod answers;
mod forwarding;
mod groups;
mod limits;
mod migration;
mod properties;
mod vlans;

use std::time::Duration;

use super::*;
use crate::frame::key::{ethertype, protocol};
use crate::frame::{Frame, Key, Layers, Offload, parse};

pub(super) fn mac(number: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, number])
}

pub(super) fn vni(number: u32) -> Vni {
    Vni::new(number).expect("24 bits")
}

pub(super) fn port(number: u32) -> Place {
    Place::Port(PortId(number))
}

pub(super) fn node(number: u64) -> Place {
    Place::Node(NodeId(number))
}

pub(super) fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Ports `1..=ports` of network 7, and nodes 1 and 2 in it.
pub(super) fn bridge(ports: u32) -> Bridge {
    let mut bridge = Bridge::new(Config::default());
    for number in 1..=ports {
        let config = PortConfig {
            vni: vni(7),
            ..PortConfig::default()
        };
        bridge.add_port(PortId(number), config).expect("a new port");
    }
    bridge.set_members(vni(7), &[NodeId(1), NodeId(2)]);
    for number in [1, 2] {
        bridge.set_node(NodeId(number), NodeConfig::default());
    }
    bridge
}

pub(super) fn ethernet(to: Mac, from: Mac, kind: u16, rest: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind.to_be_bytes(), rest].concat()
}

/// A frame of something that is not IP.
pub(super) fn plain(to: Mac, from: Mac) -> Vec<u8> {
    ethernet(to, from, 0x9000, &[0; 46])
}

pub(super) fn tagged(frame: &[u8], tpid: u16, vid: u16) -> Vec<u8> {
    let tag = [tpid.to_be_bytes(), vid.to_be_bytes()].concat();
    [&frame[..12], &tag, &frame[12..]].concat()
}

pub(super) fn udp4(from: [u8; 4], to: [u8; 4], payload: usize) -> Vec<u8> {
    let len = (28 + payload) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(len.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, protocol::UDP, 0, 0]);
    ip.extend(from);
    ip.extend(to);
    ip.extend([1, 0, 2, 0]);
    ip.extend((len - 20).to_be_bytes());
    ip.extend([0, 0]);
    ip.resize(usize::from(len), 0);
    ip
}

pub(super) struct Sent {
    pub(super) result: Result<(), Reason>,
    pub(super) out: Outputs,
    pub(super) head: Vec<u8>,
}

impl Sent {
    pub(super) fn to(&self) -> Vec<Place> {
        assert_eq!(self.result, Ok(()));
        self.out.list.iter().map(|output| output.to).collect()
    }

    /// The frame as it leaves at this output.
    pub(super) fn leaves(&self, at: usize) -> Vec<u8> {
        let mut head = Head::of(&self.head);
        let edit = self.out.list[at].edit;
        assert!(edit.apply(&mut head, &mut Offload::default()));
        head.bytes().to_vec()
    }

    pub(super) fn reply(&self) -> Vec<u8> {
        let reply = self.out.reply.clone().expect("a reply");
        let mut head = reply.head;
        assert!(reply.output.edit.apply(&mut head, &mut Offload::default()));
        head.bytes().to_vec()
    }
}

pub(super) fn read(bytes: &[u8], vni: Vni) -> (Key, Layers) {
    parse(&bytes[..bytes.len().min(192)], bytes.len(), PortId(0), vni).expect("a sound frame")
}

pub(super) fn send_with(
    bridge: &mut Bridge,
    now: Duration,
    from: Place,
    bytes: &[u8],
    offload: Offload,
) -> Sent {
    let (key, layers) = read(bytes, vni(7));
    let head = Head::of(bytes);
    let mut rest = bytes[head.bytes().len()..].to_vec();
    let pieces = [vm_memory::VolatileSlice::from(rest.as_mut_slice())];
    let mut frame = Frame {
        head,
        body: &pieces,
        offload,
    };
    let mut out = Outputs::default();
    let result = bridge.forward(now, from, &key, &layers, &mut frame, &mut out);
    Sent {
        result,
        out,
        head: frame.head.bytes().to_vec(),
    }
}

pub(super) fn send(bridge: &mut Bridge, now: Duration, from: Place, bytes: &[u8]) -> Sent {
    send_with(bridge, now, from, bytes, Offload::default())
}

/// The Internet checksum over `bytes` with a pseudo header's sum is right.
pub(super) fn sums_up(bytes: &[u8], pseudo: u32) -> bool {
    let mut sum = pseudo;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum == 0xffff
}
