//! Any frames from ports and nodes of two networks: nothing goes from one to
//! the other, what came by a tunnel leaves by none, and tables stay bounded.
#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use blanket_overlay::bridge::{
    Bridge, Config, Mode, NodeConfig, Outputs, Place, PortConfig, Rate, Storm,
};
use blanket_overlay::directory::NodeId;
use blanket_overlay::frame::{Frame, Head, OFFLOAD_BYTES, Offload, PortId, Vni, parse};
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A frame of any bytes, or with a header that makes it go on.
    Frame {
        from: u8,
        network: u8,
        header: Option<(u8, u8, u8)>,
        bytes: Vec<u8>,
        offload: [u8; OFFLOAD_BYTES],
    },
    Depart(u8),
    Activate(u8),
    Pass(u16),
    Expire,
}

fn network(number: u32) -> u32 {
    if number > 4 { 8 } else { 7 }
}

fn bridge() -> Bridge {
    let mut config = Config::default();
    config.limits.learned = 100;
    let mut bridge = Bridge::new(config);
    for number in 1..=8_u32 {
        let vlan = match number % 4 {
            1 => Mode::Access { vlan: 0 },
            2 => Mode::Trunk {
                vlans: vec![0, 5],
                native: Some(0),
                double: false,
            },
            3 => Mode::Customer { service: 5 },
            _ => Mode::Access { vlan: 5 },
        };
        let config = PortConfig {
            vni: Vni::new(network(number)).unwrap_or_default(),
            vlan,
            clamp_mss: true,
            mtu: 600,
            limit: 10,
            macs: match number % 4 {
                1 => vec![blanket_overlay::frame::Mac([2, 0, 0, 0, 1, number as u8])],
                _ => Vec::new(),
            },
            ips: vec![[10, 0, 0, number as u8].into()],
            storm: Storm {
                broadcast: Some(Rate {
                    per_second: 10,
                    burst: 1000,
                }),
                ..Storm::default()
            },
            ..PortConfig::default()
        };
        let added = bridge.prepare_port(PortId(number), config);
        added.expect("a sound port");
        if number != 5 {
            bridge.activate(PortId(number)).expect("it is there");
        }
    }
    for vni in [7, 8] {
        let nodes = [NodeId(1), NodeId(2)];
        bridge.set_members(Vni::new(vni).unwrap_or_default(), &nodes);
    }
    for node in [1, 2] {
        let config = NodeConfig {
            limit: 10,
            ..NodeConfig::default()
        };
        bridge.set_node(NodeId(node), config);
    }
    bridge
}

fn frame(header: Option<(u8, u8, u8)>, mut bytes: Vec<u8>) -> Vec<u8> {
    let Some((to, from, kind)) = header else {
        return bytes;
    };
    let to = match to {
        0..64 => [0xff; 6],
        64..128 => [1, 0, 0x5e, 1, 2, to],
        128..160 => [0x33, 0x33, 0, 0, 0, to],
        _ => [2, 0, 0, 0, to & 1, to & 15],
    };
    let kind: &[u8] = match kind & 7 {
        0 => &[8, 0],
        1 => &[0x86, 0xdd],
        2 => &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        3 => &[0x81, 0, 0, 5, 8, 0],
        4 => &[0x88, 0xa8, 0, 5, 8, 0],
        5 => &[8, 0, 0x45, 0],
        6 => &[0x86, 0xdd, 0x60],
        _ => &[0x81, 0, 0, 5, 0x81, 0, 0, 5],
    };
    let head = [&to[..], &[2, 0, 0, 0, from & 1, from & 15], kind].concat();
    bytes.splice(0..0, head);
    bytes
}

fuzz_target!(|steps: Vec<Step>| {
    let mut bridge = bridge();
    let mut now = Duration::ZERO;
    let mut out = Outputs::default();
    for step in steps {
        let (from, vni, bytes, offload) = match step {
            Step::Frame {
                from,
                network,
                header,
                bytes,
                offload,
            } => (from % 12, network % 3 + 7, frame(header, bytes), offload),
            Step::Depart(port) => {
                let _ = bridge.depart(PortId(u32::from(port % 9)), Place::Node(NodeId(1)));
                continue;
            }
            Step::Activate(port) => {
                let _ = bridge.activate(PortId(u32::from(port % 9)));
                continue;
            }
            Step::Pass(ms) => {
                now += Duration::from_millis(u64::from(ms) * 16);
                continue;
            }
            Step::Expire => {
                bridge.expire(now);
                continue;
            }
        };
        let from = match from {
            0..=8 => Place::Port(PortId(from.into())),
            _ => Place::Node(NodeId(u64::from(from) - 8)),
        };
        let vni = Vni::new(vni.into()).unwrap_or_default();
        let head = Head::of(&bytes);
        let Ok((key, layers)) = parse(head.bytes(), bytes.len(), PortId(0), vni) else {
            continue;
        };
        let offload = Offload::from_virtio(&offload, bytes.len()).unwrap_or_default();
        let mut rest = bytes[head.bytes().len()..].to_vec();
        let pieces = [VolatileSlice::from(rest.as_mut_slice())];
        let mut frame = Frame {
            head,
            body: &pieces,
            offload,
        };
        let _ = bridge.forward(now, from, &key, &layers, &mut frame, &mut out);
        let own = match from {
            Place::Port(PortId(number)) => network(number),
            Place::Node(_) => vni.number(),
        };
        let reply = out.reply.as_ref().map(|reply| reply.output);
        for output in out.list.iter().chain(&reply) {
            assert_eq!(output.vni.number(), own);
            if let Place::Port(PortId(number)) = output.to {
                assert_eq!(network(number), own);
            }
            // What is sent after a guest may; nothing else.
            let after = matches!(output.to, Place::Node(_)) && matches!(from, Place::Node(_));
            assert!(!after || out.list.len() <= 1);
            let mut head = frame.head.clone();
            let mut offload = frame.offload;
            let _ = output.edit.apply(&mut head, &mut offload);
        }
        assert!(bridge.len() <= 110);
    }
});
