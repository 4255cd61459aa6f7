//! Tunnels, in a simulated network.

use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::drops::Reason;
use crate::frame::{Head, Offload};

mod codecs;
mod net;
mod paths;

use net::{Faults, Net, UPLINK, VNI, address, number, numbered, offload, with_frame};

const SECOND: Duration = Duration::from_secs(1);

/// What a node has got since it was asked the last time: intact, each once.
fn numbers(net: &mut Net, node: usize) -> HashSet<u64> {
    let mut seen = HashSet::new();
    for (_, vni, bytes, facts) in std::mem::take(&mut net.nodes[node].got) {
        assert_eq!((vni, facts), (VNI, offload(bytes.len())));
        assert!(seen.insert(number(&bytes)), "it came twice");
    }
    seen
}

#[test]
fn frames_of_all_lengths_come_whole() {
    let mut net = Net::new(1, 2, 1);
    assert!(!net.send(0, 1, &numbered(0, 60)), "there are no keys yet");
    net.connect();
    net.run(SECOND * 3);
    assert_eq!(net.status(0, 1).paths[0].datagram, UPLINK);
    assert_eq!(net.status(0, 1).cipher, Some(Cipher::Aes));
    let lens = [
        8, 60, 192, 193, 1400, 1424, 1425, 1514, 9000, 62_000, 65_550, 65_600,
    ];
    for (at, len) in lens.into_iter().enumerate() {
        assert!(net.send(0, 1, &numbered(at as u64, len)), "{len} bytes");
    }
    assert!(!net.send(0, 1, &numbered(0, 65_601)));
    net.run(SECOND);
    assert_eq!(numbers(&mut net, 1).len(), lens.len());
    let stats = net.status(1, 0).stats;
    // Two trains: they do not come in one call here.
    assert_eq!((stats.in_place, stats.assembled), (4, 2));
    let bytes: usize = lens.iter().sum();
    assert_eq!((stats.frames_in, stats.bytes_in), (12, bytes as u64));
}

#[test]
fn a_burst_shares_trains_and_nothing_can_be_read() {
    let mut net = Net::new(2, 2, 1);
    net.connect();
    net.run(SECOND * 3);
    net.tapped = Some(Vec::new());
    for at in 0..100 {
        net.seal(0, 1, 1, &numbered(at, 100)).expect("room");
    }
    let node = &mut net.nodes[0];
    node.tunnels.finish(net.now, &mut node.out);
    assert_eq!(node.out.packets().count(), 1, "one train");
    net.flush(0);
    let tapped = net.tapped.take().expect("tapped");
    assert_eq!(tapped.len(), 9, "12 of them in a datagram");
    for (_, _, datagram) in &tapped {
        let plain = numbered(0, 100);
        assert!(!datagram.windows(8).any(|part| part == &plain[8..16]));
    }
    net.run(SECOND);
    assert_eq!(numbers(&mut net, 1).len(), 100);
}

#[test]
fn a_frame_of_two_trains_that_come_together_is_handed_on_in_place() {
    let mut net = Net::new(3, 2, 1);
    net.connect();
    net.run(SECOND * 3);
    let (one, two) = (numbered(1, 65_550), numbered(2, 65_550));
    net.seal(0, 1, 1, &one).expect("room");
    net.seal(0, 1, 1, &two).expect("room");
    let node = &mut net.nodes[0];
    node.tunnels.finish(net.now, &mut node.out);
    let mut trains: Vec<(usize, Vec<u8>)> = node
        .out
        .packets()
        .map(|(_, packet)| (packet.segment, packet.bytes.to_vec()))
        .collect();
    assert_eq!(trains.len(), 3);
    node.out.clear();
    let batch = trains.iter_mut().map(|(segment, bytes)| Received {
        uplink: 0,
        from: address(0, 0),
        bytes,
        segment: *segment,
    });
    let node = &mut net.nodes[1];
    let mut got = Vec::new();
    node.tunnels
        .open(net.now, batch, &mut node.out, &mut |_, _, frame| {
            got.push((frame.body.len(), frame.to_vec()));
        });
    assert_eq!(got, [(47, one), (47, two)]);
    assert_eq!(net.status(1, 0).stats.in_place, 2);
}

#[test]
fn a_frame_is_sealed_where_it_lies() {
    let mut net = Net::new(4, 2, 1);
    net.connect();
    net.run(SECOND * 3);
    let peer = net.peer(0, 1);
    let gaps = net.nodes[0].tunnels.gaps(None);
    assert_eq!(gaps.chunk(), UPLINK - wire::OVERHEAD);
    for len in [1425, 3000, 65_550] {
        let bytes = numbered(len as u64, len);
        let mut buffer = vec![0xee; gaps.buffer(len) + 7];
        for (index, part) in bytes.chunks(gaps.chunk()).enumerate() {
            let place = gaps.place(index);
            buffer[place.start..place.start + part.len()].copy_from_slice(part);
        }
        // The head is what was copied before.
        buffer[gaps.place(0)][..100].fill(0);
        let (mut trains, what) = (Vec::new(), (&Head::of(&bytes), len, offload(len)));
        let tunnels = &mut net.nodes[0].tunnels;
        let sealed =
            tunnels.seal_gapped(net.now, peer, VNI, 1, what, gaps, &mut buffer, &mut trains);
        assert_eq!(sealed, Ok(true));
        assert_eq!(trains.len(), 1 + usize::from(len > 60_000));
        let batch: Vec<Vec<u8>> = trains
            .iter()
            .map(|train| buffer[train.bytes.clone()].to_vec())
            .collect();
        let mut batch = batch;
        let batch = batch.iter_mut().map(|bytes| Received {
            uplink: 0,
            from: address(0, 0),
            bytes,
            segment: trains[0].segment,
        });
        let node = &mut net.nodes[1];
        let mut got = Vec::new();
        node.tunnels
            .open(net.now, batch, &mut node.out, &mut |_, _, frame| {
                got.push(frame.to_vec());
            });
        assert_eq!(got, [bytes]);
    }
    let small = (&Head::of(&[0; 60]), 60, Offload::default());
    let tunnels = &mut net.nodes[0].tunnels;
    let sealed = tunnels.seal_gapped(
        net.now,
        peer,
        VNI,
        1,
        small,
        gaps,
        &mut [0; 1500],
        &mut Vec::new(),
    );
    assert_eq!(sealed, Ok(false), "small ones share datagrams");
}

#[test]
fn replayed_and_forged_packets_are_counted() {
    let mut net = Net::new(5, 2, 1);
    net.tapped = Some(Vec::new());
    net.connect();
    net.run(SECOND);
    for at in 0..20 {
        net.send(0, 1, &numbered(at, 3000));
    }
    net.run(SECOND);
    assert_eq!(numbers(&mut net, 1).len(), 20);
    let all = net.tapped.take().expect("tapped");
    let before = net.nodes[1].tunnels.table.len();
    for (from, to, bytes) in all.clone() {
        net.inject(from, to, bytes.clone());
        // From elsewhere, too: nothing roams to who only replays.
        net.inject("203.0.113.9:9".parse().expect("an address"), to, bytes);
    }
    net.run(SECOND / 2);
    for (from, to, mut bytes) in all {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        net.inject(from, to, bytes);
    }
    net.run(SECOND / 2);
    assert_eq!(numbers(&mut net, 1), HashSet::new());
    let drops = net.nodes[1].tunnels.drops().clone();
    assert!(
        drops.of(Reason::Replayed) >= 40 && drops.of(Reason::Handshake) >= 1,
        "{drops:?}"
    );
    assert!(
        drops.of(Reason::Replayed) + drops.of(Reason::Forged) >= 80,
        "{drops:?}"
    );
    assert_eq!(net.nodes[1].tunnels.table.len(), before, "no session more");
    assert_eq!(net.status(1, 0).paths[0].remote, address(0, 0));
    assert!(net.send(0, 1, &numbered(100, 3000)));
    net.run(SECOND);
    assert_eq!(numbers(&mut net, 1).len(), 1);
}

#[test]
fn strangers_and_the_wrong_secret_get_nothing() {
    let mut net = Net::new(6, 2, 1);
    let stranger = generate();
    let config = PeerConfig {
        public: public(&net.nodes[1].private),
        psk: Some([8; 32]),
        paths: Vec::new(),
    };
    let mut paths = config.clone();
    paths.paths.push(PathConfig {
        uplink: 0,
        remote: address(1, 0),
        weight: 1,
    });
    for private in [stranger, net.nodes[0].private] {
        let mut tunnels = Tunnels::new(Config {
            private,
            epoch: SECOND,
            uplinks: vec![UPLINK],
            costs: Costs { aes: 1, chacha: 1 },
        });
        tunnels.add(Duration::ZERO, &paths).expect("a peer");
        let mut out = TrainBuffer::default();
        tunnels.tick(Duration::ZERO, &mut out);
        let bytes: Vec<Vec<u8>> = out.packets().map(|(_, it)| it.bytes.to_vec()).collect();
        assert_eq!(bytes.len(), 1);
        let mut reply = TrainBuffer::default();
        let received = Received {
            uplink: 0,
            from: address(0, 0),
            bytes: &mut bytes[0].clone(),
            segment: 0,
        };
        let node = &mut net.nodes[1];
        node.tunnels
            .open(net.now, [received], &mut reply, &mut |_, _, _| {});
        // The secret is only mixed in by the answer, which says nothing.
        let answers: Vec<Vec<u8>> = reply.packets().map(|(_, it)| it.bytes.to_vec()).collect();
        for mut answer in answers {
            let received = Received {
                uplink: 0,
                from: address(1, 0),
                bytes: &mut answer,
                segment: 0,
            };
            tunnels.open(net.now, [received], &mut out, &mut |_, _, _| {});
            assert_eq!(tunnels.drops().of(Reason::Forged), 1);
        }
        let status = tunnels.status(net.now, PeerId(0)).expect("a peer");
        assert!(!status.connected);
    }
    assert_eq!(net.nodes[1].tunnels.drops().of(Reason::Handshake), 1);
    assert!(!net.connected(1));
}

#[test]
fn keys_change_under_traffic_and_nothing_is_lost() {
    let mut net = Net::new(8, 2, 1);
    net.faults.jitter = 3000;
    net.connect();
    let mut number = 0;
    for _ in 0..4000 {
        number += 1;
        assert!(net.send(0, 1, &numbered(number, 2000)));
        assert!(net.send(1, 0, &numbered(number, 2000)));
        net.run(SECOND / 10);
    }
    net.run(SECOND);
    assert_eq!(numbers(&mut net, 1).len() as u64, number);
    assert_eq!(numbers(&mut net, 0).len() as u64, number);
    let status = net.status(0, 1);
    assert!((3..=8).contains(&status.stats.handshakes), "{status:?}");
    assert!(net.nodes[0].tunnels.table.len() <= 5);
    assert!(status.key_age < Some(140));
}

#[test]
fn keys_change_by_count_too() {
    let mut net = Net::new(9, 2, 1);
    net.connect();
    net.run(SECOND);
    let peer = net.nodes[0].tunnels.peers[0].as_deref().expect("a peer");
    let current = peer.current.expect("keys");
    let table = &mut net.nodes[0].tunnels.table;
    table.get(current).expect("a session").skip_to(1 << 27);
    net.run(SECOND * 2);
    let peer = net.nodes[0].tunnels.peers[0].as_deref().expect("a peer");
    assert_ne!(peer.current, Some(current));
    let table = &mut net.nodes[0].tunnels.table;
    table.get(current).expect("a session").skip_to(1 << 28);
    assert!(net.send(0, 1, &numbered(1, 60)));
    net.run(SECOND);
    assert_eq!(numbers(&mut net, 1).len(), 1);
}

#[test]
fn who_starts_anew_is_there_again_soon() {
    let mut net = Net::new(10, 2, 1);
    net.connect();
    net.run(SECOND * 2);
    for node in [0, 1] {
        net.run(SECOND);
        net.restart(node);
        net.run(SECOND);
        for (from, to) in [(0, 1), (1, 0)] {
            assert!(net.send(from, to, &numbered(1, 5000)), "after {node}");
            net.run(SECOND / 10);
            assert_eq!(
                numbers(&mut net, to).len(),
                1,
                "{from} to {to} after {node}"
            );
        }
    }
}

#[test]
fn many_peers_connect_at_once() {
    let mut net = Net::new(14, 2, 1);
    let hub = net.nodes[0].private;
    let mut spokes = Vec::new();
    for at in 0..250 {
        let private = generate();
        let mut tunnels = Tunnels::new(Config {
            private,
            epoch: SECOND,
            uplinks: vec![UPLINK],
            costs: Costs { aes: 3, chacha: 1 },
        });
        let peer = PeerConfig {
            public: public(&private),
            psk: None,
            paths: Vec::new(),
        };
        net.nodes[0].tunnels.add(net.now, &peer).expect("a peer");
        let hub = PeerConfig {
            public: public(&hub),
            psk: None,
            paths: vec![PathConfig {
                uplink: 0,
                remote: address(0, 0),
                weight: 1,
            }],
        };
        tunnels.add(net.now, &hub).expect("a peer");
        spokes.push((at, tunnels, TrainBuffer::default()));
    }
    // All at once, and then each frame to all and back.
    let (mut seen, mut now) = (0, net.now);
    let hub = &mut net.nodes[0];
    for round in 0..200 {
        now += SECOND / 100;
        hub.tunnels.tick(now, &mut hub.out);
        let mut to_hub = Vec::new();
        for (at, tunnels, out) in &mut spokes {
            tunnels.tick(now, out);
            if round == 150 {
                let frame = numbered(*at as u64, 2000);
                with_frame(&frame, |frame| {
                    tunnels
                        .seal(now, PeerId(0), VNI, 0, frame, out)
                        .expect("keys");
                });
            }
            tunnels.finish(now, out);
            for (_, packet) in out.packets() {
                to_hub.push((*at, packet.bytes.to_vec(), packet.segment));
            }
            out.clear();
        }
        for (at, mut bytes, segment) in to_hub {
            let received = Received {
                uplink: 0,
                from: address(1000 + at, 0),
                bytes: &mut bytes,
                segment,
            };
            let hub_out = &mut hub.out;
            hub.tunnels
                .open(now, [received], hub_out, &mut |peer, _, frame| {
                    assert_eq!(number(&frame.to_vec()), u64::from(peer.0) - 1);
                    seen += 1;
                });
        }
        hub.tunnels.finish(now, &mut hub.out);
        for (_, packet) in hub.out.packets() {
            let to = spokes
                .iter_mut()
                .find(|(at, _, _)| address(1000 + at, 0) == packet.to);
            let Some((_, tunnels, out)) = to else {
                continue;
            };
            let received = Received {
                uplink: 0,
                from: address(0, 0),
                bytes: &mut packet.bytes.to_vec(),
                segment: packet.segment,
            };
            tunnels.open(now, [received], out, &mut |_, _, _| {});
        }
        hub.out.clear();
    }
    assert_eq!(seen, 250);
    let asked = hub.tunnels.drops().of(Reason::HandshakeFlood);
    assert!(asked >= 150, "they had to show cookies, {asked}");
    assert!(hub.tunnels.table.len() <= 250 * 2 + 2);
}

#[test]
fn both_may_begin_at_once() {
    for seed in 0..20 {
        let mut net = Net::new(seed, 2, 1);
        net.connect();
        for number in 0..50 {
            assert!(net.send(0, 1, &numbered(number, 3000)));
            assert!(net.send(1, 0, &numbered(number, 3000)));
            net.run(SECOND / 50);
        }
        net.run(SECOND);
        assert_eq!(numbers(&mut net, 0).len() + numbers(&mut net, 1).len(), 100);
    }
}

#[test]
fn peers_are_added_once_and_removed() {
    let mut net = Net::new(15, 3, 1);
    net.connect();
    let config = PeerConfig {
        public: public(&net.nodes[1].private),
        psk: None,
        paths: Vec::new(),
    };
    let tunnels = &mut net.nodes[0].tunnels;
    assert_eq!(tunnels.add(net.now, &config), Err(Error::Twice));
    let own = PeerConfig {
        public: *tunnels.public_key(),
        ..config.clone()
    };
    assert_eq!(tunnels.add(net.now, &own), Err(Error::Own));
    let peer = tunnels.find(&config.public).expect("a peer");
    assert!(tunnels.remove(peer) && !tunnels.remove(peer));
    let sealed = with_frame(&[0; 60], |frame| {
        tunnels.seal(net.now, peer, VNI, 0, frame, &mut TrainBuffer::default())
    });
    assert_eq!(sealed, Err(Reason::NoPeer));
    assert!(tunnels.table.len() <= 3);
    assert_ne!(tunnels.add(net.now, &config), Ok(peer));
}

#[test]
fn the_cheaper_cipher_is_taken() {
    let costs = |aes, chacha| Costs { aes, chacha };
    assert_eq!(costs(2, 1).cheaper(costs(1, 3)), Cipher::Aes);
    assert_eq!(costs(4, 1).cheaper(costs(1, 3)), Cipher::ChaCha);
    let measured = Costs::measure();
    assert!(measured.aes > 0 && measured.chacha > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_network_does_frames_come_intact_and_once(
        seed: u64, lost in 0_u64..800, doubled in 0_u64..800, changed in 0_u64..500,
        split in 0_u64..10_000, jitter in 0_u64..3000, two in 1_usize..3,
        lens in proptest::collection::vec(prop_oneof![8_usize..1500, 8_usize..20_000, Just(65_550)], 1..80),
        disturb in 0..4,
    ) {
        let mut net = Net::new(seed, 2, two);
        net.faults = Faults { lost, doubled, changed, split, jitter, mtu: None };
        net.connect();
        net.run(SECOND * 2);
        let mut sent = 0;
        for (at, len) in lens.iter().enumerate() {
            if at == lens.len() / 2 {
                match disturb {
                    1 => net.restart(1),
                    2 => net.nodes[0].addresses[0].set_port(99),
                    3 => net.run(SECOND * 119),
                    _ => {}
                }
            }
            sent += usize::from(net.seal(0, 1, at as u32, &numbered(at as u64, *len)).is_ok());
            net.flush(0);
            net.run(SECOND / 200);
        }
        net.run(SECOND);
        let got = numbers(&mut net, 1).len();
        prop_assert!(got <= sent);
        if lost + changed == 0 && disturb % 2 == 0 {
            prop_assert_eq!(got, sent);
        }
        let (frames, bytes) = net.nodes[1].tunnels.assembler.held();
        prop_assert!(frames == 0 && bytes <= 64 * 70_000);
        prop_assert!(net.nodes[1].tunnels.table.len() <= 6);
    }

    #[test]
    fn a_peer_with_keys_may_send_any_records(
        seed: u64,
        datagrams in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..1400), 0_u8..6, 0_u8..70, 0_u16..3),
            1..60,
        ),
    ) {
        let mut net = Net::new(seed, 2, 1);
        net.connect();
        for (mut records, kind, index, high) in datagrams {
            if records.len() > wire::RECORD {
                // Often nearly sound.
                (records[0], records[1], records[2]) = (kind, index, records[2] & 0x47);
                records[6..8].copy_from_slice(&[(high >> 1) as u8, (high as u8) << 7]);
            }
            let mut datagram = vec![0; wire::HEADER];
            datagram.extend(records);
            datagram.extend([0; wire::TAG]);
            let node = &mut net.nodes[0];
            let peer = node.tunnels.peers[0].as_deref().expect("a peer");
            let session = node.tunnels.table.get(peer.current.expect("keys"));
            session.expect("a session").seal(&mut datagram);
            net.inject(address(0, 0), address(1, 0), datagram);
        }
        net.run(SECOND / 20);
        let (frames, bytes) = net.nodes[1].tunnels.assembler.held();
        prop_assert!(frames <= 24 && bytes <= 64 * 70_000, "{} {}", frames, bytes);
        for (_, vni, bytes, facts) in std::mem::take(&mut net.nodes[1].got) {
            prop_assert!(wire::Facts::of(vni, bytes.len(), facts).is_ok());
        }
        net.run(SECOND);
        prop_assert!(net.send(0, 1, &numbered(1, 3000)));
        net.run(SECOND);
        prop_assert_eq!(numbers(&mut net, 1).len(), 1);
    }

    #[test]
    fn memory_is_bounded_if_chunks_never_come(seed: u64) {
        let mut net = Net::new(seed, 2, 1);
        net.connect();
        net.faults.lost = 3000;
        net.faults.split = 10_000;
        for number in 0..200 {
            net.seal(0, 1, 1, &numbered(number, 65_000)).expect("room");
            net.flush(0);
        }
        net.run(SECOND / 50);
        let (frames, bytes) = net.nodes[1].tunnels.assembler.held();
        prop_assert!(frames <= 64 && bytes <= 64 * 70_000, "{} {}", frames, bytes);
        net.run(SECOND);
        prop_assert_eq!(net.nodes[1].tunnels.assembler.held().0, 0);
        prop_assert!(net.nodes[1].tunnels.drops().of(Reason::Incomplete) > 100);
    }
}
