//! Tables, cache and rewriting.

mod groups;
mod model;
mod rewriting;
mod walking;

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::conntrack::Connections;
use super::text::{no_names, parse_flow};
use super::{Control, Flow, Packet, Pipeline, Sink, Target};
use crate::drops::Reason;
use crate::frame::{Frame, Head, Key, Mac, Offload, PortId, Vni, parse};

pub(super) fn flow(text: &str) -> Flow {
    parse_flow(text, &no_names).unwrap_or_else(|error| panic!("{}\n{error}", error.shown(text)))
}

pub(super) fn control(flows: &[&str]) -> Control {
    let mut control = Control::new();
    for text in flows {
        control.add(flow(text), Duration::ZERO).expect(text);
    }
    control.publish();
    control
}

pub(super) fn pipeline(control: &Control) -> Pipeline {
    Pipeline::new(control.shared(), Arc::new(Connections::new(1000, 100)), 16)
}

/// The sum over `bytes`, which a right checksum makes 0xffff.
pub(super) fn ones(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An IP packet with right checksums; ICMP's are over no pseudo header.
pub(super) fn ip(v6: bool, proto: u8, transport: &[u8], checksum: usize) -> Vec<u8> {
    let len = transport.len();
    let (mut header, addresses) = if v6 {
        let mut header = vec![0x60, 0, 0, 0, 0, len as u8, proto, 64];
        header.extend([0xfd; 15]);
        header.push(1);
        header.extend([0xfd; 15]);
        header.push(2);
        (header, 8..40)
    } else {
        let total = (20 + len) as u8;
        let mut header = vec![0x45, 0, 0, total, 1, 2, 0, 0, 64, proto, 0, 0];
        header.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = !ones(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        (header, 12..20)
    };
    let mut transport = transport.to_vec();
    if checksum != 0 {
        transport[checksum..checksum + 2].fill(0);
        let mut all = transport.clone();
        all.resize(len.next_multiple_of(2), 0);
        if proto != 1 {
            all.extend(&header[addresses]);
            all.extend([0, proto, 0, len as u8]);
        }
        let sum = !ones(&all);
        transport[checksum..checksum + 2].copy_from_slice(&sum.to_be_bytes());
    }
    header.extend(transport);
    header
}

pub(super) fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    bytes.extend(kind.to_be_bytes());
    bytes.extend(payload);
    bytes
}

pub(super) fn tcp(flags: u8) -> Vec<u8> {
    let mut bytes = vec![0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags];
    bytes.extend([1, 0, 0, 0, 0, 0]);
    bytes.extend(*b"hello");
    bytes
}

#[derive(Default)]
pub(super) struct Seen {
    pub(super) sent: Vec<(Target, Vec<u8>)>,
    pub(super) dropped: Vec<Reason>,
}

impl Sink for Seen {
    fn send(&mut self, target: Target, packet: &Packet<'_, '_>) {
        self.sent.push((target, packet.frame.to_vec()));
    }

    fn dropped(&mut self, reason: Reason, _: &Packet<'_, '_>) {
        self.dropped.push(reason);
    }
}

pub(super) fn run(pipeline: &mut Pipeline, bytes: &[u8], offload: Offload) -> Seen {
    run_at(pipeline, Duration::from_secs(1), 1, bytes, offload)
}

pub(super) fn run_at(
    pipeline: &mut Pipeline,
    now: Duration,
    port: u32,
    bytes: &[u8],
    offload: Offload,
) -> Seen {
    let mut frame = Frame {
        head: Head::of(bytes),
        body: &[],
        offload,
    };
    let (key, layers) = parse(
        frame.head.bytes(),
        bytes.len(),
        PortId(port),
        Vni::default(),
    )
    .expect("sound");
    let mut packet = Packet {
        frame: &mut frame,
        key,
        layers,
    };
    let mut seen = Seen::default();
    pipeline.run(now, &mut packet, &mut seen);
    seen
}

/// Keys with few different values, so that entries match them.
pub(super) fn key() -> impl Strategy<Value = Key> {
    let tag = proptest::option::of((0_u16..3, 0_u16..2));
    let ip = (0_u8..3, 0_u8..4, 0_u8..4, 0_u16..3, 0_u16..3);
    (
        (0_u32..3, 0_u32..2),
        (0_u8..3, 0_u8..3),
        [tag.clone(), tag],
        ip,
    )
        .prop_map(
            |((port, vni), (dst, src), tags, (kind, from, to, sport, dport))| {
                let mac = |last| Mac([2, 0, 0, 0, 0, last]);
                let mut key = Key {
                    port: PortId(port),
                    vni: Vni::new(vni).expect("24 bits"),
                    dst: mac(dst),
                    src: mac(src),
                    ethertype: [0x0800, 0x86dd, 0x88b5][usize::from(kind)],
                    ..Key::default()
                };
                let tag = |tag: Option<(u16, u16)>, tpid| {
                    tag.map(|(vid, priority)| crate::frame::Tag {
                        tpid,
                        tci: vid | priority << 13,
                    })
                };
                key.tags[0] = tag(tags[0], if tags[1].is_some() { 0x88a8 } else { 0x8100 });
                key.tags[1] = tag(tags[1].filter(|_| tags[0].is_some()), 0x8100);
                if key.tags[1].is_none() && key.tags[0].is_some() {
                    key.tags[0].iter_mut().for_each(|tag| tag.tpid = 0x8100);
                }
                if kind < 2 {
                    let address = |last: u8| -> std::net::IpAddr {
                        if kind == 0 {
                            [10, 0, last >> 1, last & 1].into()
                        } else {
                            let last = u16::from(last);
                            [0xfd00, 0, 0, 0, 0, 0, last >> 1, last & 1].into()
                        }
                    };
                    key.ip = Some((address(from), address(to)));
                    key.protocol = if from == to { 6 } else { 17 };
                    key.ttl = 64;
                    key.ports = Some((sport, dport));
                }
                key
            },
        )
}
