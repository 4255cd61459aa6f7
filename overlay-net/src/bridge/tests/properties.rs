//! Whatever is sent: no panic, and nothing leaves its network.

use proptest::prelude::*;

use super::*;

/// Networks 7 and 8 with ports of all kinds, and nodes in both.
fn world() -> Bridge {
    let mut bridge = Bridge::new(Config::default());
    for number in [1, 2] {
        let config = NodeConfig {
            limit: 8,
            mtu: 1400,
            ..NodeConfig::default()
        };
        bridge.set_node(NodeId(number), config);
    }
    for (offset, network) in [(0, 7), (10, 8)] {
        let modes = [
            Mode::Access { vlan: 0 },
            Mode::Access { vlan: 5 },
            Mode::Trunk {
                vlans: vec![5, 6],
                native: Some(0),
                double: false,
            },
            Mode::Trunk {
                vlans: Vec::new(),
                native: None,
                double: true,
            },
            Mode::Customer { service: 5 },
            Mode::Provider {
                services: Vec::new(),
            },
        ];
        for (number, vlan) in (1..).zip(modes) {
            let config = PortConfig {
                vni: vni(network),
                vlan,
                limit: 4,
                clamp_mss: true,
                mtu: 1300,
                ..PortConfig::default()
            };
            let added = bridge.add_port(PortId(offset + number), config);
            added.expect("a new port");
        }
        bridge.set_members(vni(network), &[NodeId(1), NodeId(2)]);
    }
    bridge
}

/// The VLAN's tag that a port may send and be sent, of each port above.
fn tags(port: u32, key: &Key) -> bool {
    let outer = key.tags[0];
    match port % 10 {
        1 | 2 => outer.is_none(),
        3 => outer.is_none_or(|tag| matches!(tag.vid(), 5 | 6)) && key.tags[1].is_none(),
        4 => outer.is_some_and(|tag| tag.tpid == ethertype::VLAN && tag.vid() != 0),
        5 => true,
        _ => outer.is_some_and(|tag| tag.tpid == ethertype::SERVICE_VLAN),
    }
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let address = prop_oneof![
        (1..6_u8).prop_map(mac),
        Just(Mac::BROADCAST),
        Just(Mac([1, 0, 0x5e, 1, 2, 3])),
        Just(Mac([0x33, 0x33, 0, 0, 0, 0x16])),
    ];
    let tag = prop_oneof![
        3 => Just(None),
        2 => (
            prop_oneof![Just(ethertype::VLAN), Just(ethertype::SERVICE_VLAN)],
            prop_oneof![Just(0_u16), Just(5), Just(6), Just(7), Just(4095)],
        ).prop_map(Some),
    ];
    let kind = prop_oneof![
        Just(ethertype::IPV4),
        Just(ethertype::IPV6),
        Just(ethertype::ARP),
        Just(0x9000)
    ];
    let rest = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..100),
        (0..1600_usize).prop_map(|len| udp4([10, 0, 0, 1], [10, 0, 0, 2], len)),
        (0..1600_usize).prop_map(|len| udp4([10, 0, 0, 1], [239, 1, 2, 3], len)),
        Just([&[0, 1, 8, 0, 6, 4, 0, 1][..], &[2; 20]].concat()),
        Just(
            [
                &[
                    0x46, 0, 0, 32, 0, 0, 0, 0, 1, 2, 0, 0, 10, 0, 0, 1, 224, 0, 0, 22
                ][..],
                &[0x94, 4, 0, 0, 0x16, 0, 0, 0, 239, 1, 2, 3]
            ]
            .concat()
        ),
    ];
    (address, 1..6_u8, [tag.clone(), tag], kind, rest).prop_map(|(to, from, tags, kind, rest)| {
        let mut frame = ethernet(to, mac(from), kind, &rest);
        for (tpid, vid) in tags.into_iter().flatten() {
            frame = tagged(&frame, tpid, vid);
        }
        frame
    })
}

#[derive(Clone, Debug)]
struct Step {
    from: Place,
    network: u32,
    frame: Vec<u8>,
    seconds: u64,
}

fn step() -> impl Strategy<Value = Step> {
    let from = prop_oneof![
        (1..8_u32).prop_map(port),
        (11..18_u32).prop_map(port),
        (1..4_u64).prop_map(node)
    ];
    (from, 6..10_u32, frame(), 0..100_u64).prop_map(|(from, network, frame, seconds)| Step {
        from,
        network,
        frame,
        seconds,
    })
}

proptest! {
    #[test]
    fn nothing_leaves_its_network_or_its_vlan(steps in proptest::collection::vec(step(), 1..60)) {
        let mut bridge = world();
        let mut now = Duration::ZERO;
        for step in &steps {
            now += at(step.seconds);
            let len = step.frame.len();
            let head = Head::of(&step.frame);
            let Ok((key, layers)) = parse(head.bytes(), len, PortId(0), vni(step.network)) else {
                continue;
            };
            let mut rest = step.frame[head.bytes().len()..].to_vec();
            let pieces = [vm_memory::VolatileSlice::from(rest.as_mut_slice())];
            let mut frame = Frame { head, body: &pieces, offload: Offload::default() };
            let mut out = Outputs::default();
            let result = bridge.forward(now, step.from, &key, &layers, &mut frame, &mut out);
            let network = match step.from {
                Place::Port(PortId(number)) => if number > 10 { 8 } else { 7 },
                Place::Node(_) => step.network,
            };
            if result.is_err() {
                prop_assert!(out.list.is_empty());
            }
            let reply = out.reply.as_ref().map(|reply| reply.output);
            prop_assert!(reply.is_none_or(|reply| reply.to == step.from));
            for output in out.list.iter().chain(&reply) {
                prop_assert_eq!(output.vni, vni(network));
                let mut head = frame.head.clone();
                if Some(*output) == reply {
                    head = out.reply.as_ref().map(|reply| reply.head.clone()).unwrap_or_default();
                } else {
                    prop_assert!(output.to != step.from);
                }
                prop_assert!(output.edit.apply(&mut head, &mut Offload::default()));
                match output.to {
                    Place::Port(PortId(number)) => {
                        prop_assert_eq!(if number > 10 { 8 } else { 7 }, network);
                        let (key, _) = read(head.bytes_padded(len).as_slice(), vni(network));
                        prop_assert!(tags(number, &key), "port {}: {:?}", number, key.tags);
                    }
                    Place::Node(_) => prop_assert!(
                        Some(*output) == reply || matches!(step.from, Place::Port(_))
                    ),
                }
            }
            prop_assert!(bridge.len() <= 8 * 14);
        }
    }
}

trait Padded {
    fn bytes_padded(&self, len: usize) -> Vec<u8>;
}

impl Padded for Head {
    /// As long as the frame was, at least.
    fn bytes_padded(&self, len: usize) -> Vec<u8> {
        let mut bytes = self.bytes().to_vec();
        bytes.resize(bytes.len().max(len + 4), 0);
        bytes
    }
}
