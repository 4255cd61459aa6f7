//! Every kind with every other, over a veth pair.

use super::*;
use std::net::UdpSocket;

const KINDS: [Kind; 3] = Kind::OF_INTERFACES;

/// Runs a test with every pair of kinds, in IPv4 and IPv6.
fn with_pairs(mtu: u32, test: for<'a> fn(&'a mut dyn Uplink, &'a mut dyn Uplink)) {
    for v6 in [false, true] {
        for near in KINDS {
            for far in KINDS {
                in_lab(mtu, 1, move |lab| {
                    println!("{near} to {far}, IPv6: {v6}");
                    let (Some(mut near), Some(mut far)) =
                        (end(lab, near, 0, 0, v6), end(lab, far, 0, 1, v6))
                    else {
                        return;
                    };
                    test(&mut *near, &mut *far);
                });
            }
        }
    }
}

fn numbered(count: usize, len: usize) -> Vec<Vec<u8>> {
    let datagram = |n: usize| (0..len).map(|at| (n * 7 + at) as u8).collect();
    (0..count).map(datagram).collect()
}

#[test]
fn all_kinds_carry_datagrams_of_all_lengths_both_ways() {
    with_pairs(1500, |mut near, mut far| {
        acquaint(near, far);
        let longest = near
            .description()
            .capabilities
            .payload
            .min(far.description().capabilities.payload);
        let contents: Vec<_> = [1, 2, 3, 17, 96, 1000, longest - 1, longest]
            .into_iter()
            .flat_map(|len| numbered(3, len))
            .collect();
        for _ in 0..2 {
            let (from, to) = (near.description().local, far.description().local);
            let packets: Vec<_> = contents.iter().map(|it| TxPacket::new(to, it)).collect();
            let before = (near.counters().tx, far.counters().rx);
            send(near, &packets);
            let got = receive(far, contents.len());
            let bytes: Vec<_> = got.iter().map(|(bytes, _)| bytes.clone()).collect();
            assert_eq!(bytes, contents);
            assert!(got.iter().all(|(_, sender)| *sender == from));
            let total: usize = contents.iter().map(Vec::len).sum();
            let after = (near.counters().tx, far.counters().rx);
            for (after, before) in [(after.0, before.0), (after.1, before.1)] {
                assert_eq!(after.datagrams - before.datagrams, contents.len() as u64);
                assert_eq!(after.bytes - before.bytes, total as u64);
            }
            (near, far) = (far, near);
        }
    });
}

#[test]
fn a_train_arrives_as_its_datagrams_whoever_cuts_it_up() {
    with_pairs(1500, |near, far| {
        acquaint(near, far);
        let to = far.description().local;
        let size = 1400;
        // The last one is shorter.
        let content: Vec<u8> = (0..size * 40 + 123).map(|at| (at / 3) as u8).collect();
        let train = TxPacket::train(to, &content, size);
        assert_eq!(train.datagrams(), 41);
        let before = far.counters().rx;
        send(near, &[train, train, TxPacket::new(to, b"end")]);
        let got = receive(far, 83);
        let joined: Vec<u8> = got[..41]
            .iter()
            .flat_map(|(bytes, _)| bytes.clone())
            .collect();
        assert!(joined == content);
        assert!(got[..40].iter().all(|(bytes, _)| bytes.len() == size));
        assert_eq!(got[40].0.len(), 123);
        assert_eq!(got[82].0, b"end");
        let after = far.counters().rx;
        assert_eq!(after.datagrams - before.datagrams, 83);
        assert_eq!(after.bytes - before.bytes, 2 * content.len() as u64 + 3);
        let sent = near.counters();
        assert_eq!((sent.tx_too_big, sent.tx_refused), (0, 0));
        let whole = near.description().capabilities.segmentation
            && far.description().capabilities.coalescing;
        if whole {
            assert!(after.trains - before.trains > 0, "{after:?}");
        }
    });
}

#[test]
fn what_is_longer_than_the_mtu_is_dropped_and_counted_and_the_rest_goes() {
    with_pairs(1280, |near, far| {
        acquaint(near, far);
        let to = far.description().local;
        let longest = near.description().capabilities.payload;
        assert!(longest <= 1280 - 28, "{longest}");
        let content = vec![7; 65_000];
        let packets = [
            TxPacket::new(to, b"before"),
            TxPacket::new(to, &content[..longest + 1]),
            TxPacket::train(to, &content[..longest * 3], longest + 1),
            // 65 datagrams.
            TxPacket::train(to, &content[..650], 10),
            TxPacket::new(to, b"after"),
        ];
        send(near, &packets);
        let got = receive(far, 2);
        assert_eq!(
            (got[0].0.as_slice(), got[1].0.as_slice()),
            (&b"before"[..], &b"after"[..])
        );
        assert!(silent(far));
        assert_eq!(near.counters().tx_too_big, 1 + 3 + 65);
    });
}

#[test]
fn another_address_family_is_refused_and_counted() {
    with_pairs(1500, |near, far| {
        acquaint(near, far);
        let other: SocketAddr = if near.description().local.is_ipv4() {
            "[fd00::2]:4789".parse().unwrap()
        } else {
            "192.0.2.2:4789".parse().unwrap()
        };
        let to = far.description().local;
        send(near, &[TxPacket::new(other, b"x"), TxPacket::new(to, b"y")]);
        assert_eq!(receive(far, 1)[0].0, b"y");
        assert_eq!(near.counters().tx_refused, 1);
    });
}

#[test]
fn a_peer_that_goes_away_and_comes_back_is_reached_again() {
    for kind in KINDS {
        in_lab(1500, 1, move |lab| {
            let (Some(mut near), Some(mut far)) =
                (end(lab, kind, 0, 0, false), end(lab, kind, 0, 1, false))
            else {
                return;
            };
            acquaint(&mut *near, &mut *far);
            let to = far.description().local;
            drop(far);
            // Nobody is there: the far kernel says so, which must not matter.
            for _ in 0..10 {
                send(&mut *near, &[TxPacket::new(to, b"lost")]);
            }
            let mut far = end(lab, kind, 0, 1, false).unwrap();
            acquaint(&mut *near, &mut *far);
            assert_eq!(near.counters().rx_malformed, 0);
        });
    }
}

#[test]
fn a_raw_uplink_takes_its_own_datagrams_and_leaves_the_rest_to_the_kernel() {
    for kind in [Kind::AfPacket, Kind::AfXdp] {
        in_lab(1500, 1, move |lab| {
            let Some(mut far) = end(lab, kind, 0, 1, false) else {
                return;
            };
            let to = far.description().local;
            let other = UdpSocket::bind((to.ip(), to.port() + 1)).unwrap();
            other.set_read_timeout(Some(LIMIT)).unwrap();
            lab.enter(0).unwrap();
            let peer = UdpSocket::bind("192.0.2.1:9").unwrap();
            peer.connect(to).unwrap();
            for _ in 0..5 {
                peer.send(b"mine").unwrap();
            }
            for (bytes, from) in receive(&mut *far, 5) {
                assert_eq!(bytes, b"mine");
                assert_eq!(from, peer.local_addr().unwrap());
            }
            let other_address = other.local_addr().unwrap();
            let second = UdpSocket::bind("192.0.2.1:10").unwrap();
            second.send_to(b"other", other_address).unwrap();
            let mut room = [0; 16];
            assert_eq!(other.recv(&mut room).unwrap(), 5);
            assert!(silent(&mut *far));
            // No "port unreachable" came back, which a connected socket shows.
            assert!(peer.take_error().unwrap().is_none());
            peer.send(b"more").unwrap();
            assert_eq!(receive(&mut *far, 1)[0].0, b"more");
        });
    }
}

#[test]
fn a_buffer_that_is_too_short_loses_its_datagram_only() {
    for kind in KINDS {
        in_lab(1500, 1, move |lab| {
            let (Some(mut near), Some(mut far)) =
                (end(lab, kind, 0, 0, false), end(lab, kind, 0, 1, false))
            else {
                return;
            };
            acquaint(&mut *near, &mut *far);
            let to = far.description().local;
            let long = [1; 600];
            send(
                &mut *near,
                &[TxPacket::new(to, &long), TxPacket::new(to, b"short")],
            );
            let deadline = Instant::now() + LIMIT;
            let mut room = [[0; 500]; 2];
            loop {
                let [a, b] = &mut room;
                let mut buffers = [RxBuffer::new(a), RxBuffer::new(b)];
                if far.rx(&mut buffers).unwrap() == 1 {
                    assert_eq!(buffers[0].packet().bytes, b"short");
                    break;
                }
                assert!(Instant::now() < deadline);
                wait(far.fd(), Duration::from_millis(100));
            }
            assert_eq!(far.counters().rx_truncated, 1);
        });
    }
}

#[test]
fn a_node_on_the_same_machine_or_behind_no_route_is_the_kernels_business() {
    for kind in [Kind::AfPacket, Kind::AfXdp] {
        in_lab(1500, 1, move |lab| {
            let Some(mut near) = end(lab, kind, 0, 0, false) else {
                return;
            };
            let nowhere = "203.0.113.9:4789".parse().unwrap();
            send(&mut *near, &[TxPacket::new(nowhere, b"x")]);
            let counters = near.counters();
            assert_eq!(
                counters.tx.datagrams + counters.tx_refused,
                1,
                "{counters:?}"
            );
        });
    }
}

#[test]
fn an_interface_that_goes_is_an_error_and_not_a_hang() {
    for kind in KINDS {
        in_lab(1500, 1, move |lab| {
            let (Some(mut near), Some(mut far)) =
                (end(lab, kind, 0, 0, false), end(lab, kind, 0, 1, false))
            else {
                return;
            };
            acquaint(&mut *near, &mut *far);
            let to = far.description().local;
            lab.enter(0).unwrap();
            let index = netlink::interface(&Lab::name(0, 0)).unwrap().index;
            netlink::Netlink::open()
                .unwrap()
                .set_up(index, false)
                .unwrap();
            let mut room = vec![0; RX_BUFFER];
            for _ in 0..50 {
                let _ = near.rx(&mut [RxBuffer::new(&mut room)]);
                let _ = near.tx(&[TxPacket::new(to, b"x")]);
                std::thread::sleep(Duration::from_millis(1));
            }
            netlink::Netlink::open()
                .unwrap()
                .set_up(index, true)
                .unwrap();
            let deadline = Instant::now() + LIMIT;
            while near.tx(&[TxPacket::new(to, b"back")]).unwrap_or(0) == 0
                || silent_of(&mut *far, b"back")
            {
                assert!(Instant::now() < deadline, "{kind}: {:?}", near.counters());
            }
        });
    }
}

#[test]
fn what_nobody_takes_in_time_is_counted_as_an_overrun() {
    for kind in KINDS {
        in_lab(1500, 1, move |lab| {
            let (Some(mut near), Some(mut far)) = (
                end(lab, Kind::Udp, 0, 0, false),
                end(lab, kind, 0, 1, false),
            ) else {
                return;
            };
            acquaint(&mut *near, &mut *far);
            let to = far.description().local;
            let content = vec![3; 1400 * 40];
            let packets = [TxPacket::train(to, &content, 1400); 32];
            let before = far.counters().rx_overrun;
            // 36 MB, with 8 MB of room.
            for _ in 0..20 {
                send(&mut *near, &packets);
            }
            let counters = far.counters();
            assert!(counters.rx_overrun > before, "{kind}: {counters:?}");
            assert_eq!(far.counters().rx_overrun, counters.rx_overrun);
        });
    }
}

/// Whether `what` does not come within a moment.
fn silent_of(uplink: &mut dyn Uplink, what: &[u8]) -> bool {
    let mut room = vec![0; RX_BUFFER];
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        let mut buffers = [RxBuffer::new(&mut room)];
        if uplink.rx(&mut buffers).unwrap() > 0 && buffers[0].packet().bytes == what {
            return false;
        }
        wait(uplink.fd(), Duration::from_millis(10));
    }
    true
}

#[test]
fn what_cannot_be_an_uplink_is_named_with_its_remedy() {
    in_lab(1500, 1, |lab| {
        lab.enter(0).unwrap();
        let spec =
            |name: &str, ip: &str| Spec::new(name, (ip.parse::<IpAddr>().unwrap(), 0).into());
        let refused = |spec: &Spec| KINDS.map(|kind| open(kind, spec).err().unwrap().to_string());
        for told in refused(&spec("eth9", "192.0.2.1")) {
            assert!(told.contains("`ip link`"), "{told}");
        }
        for told in refused(&spec("up0", "192.0.2.77")) {
            assert!(
                told.contains("192.0.2.77") && told.contains("`ip addr`"),
                "{told}"
            );
        }
        let index = netlink::interface("up0").unwrap().index;
        netlink::Netlink::open()
            .unwrap()
            .set_up(index, false)
            .unwrap();
        for told in refused(&spec("up0", "192.0.2.1")) {
            assert!(told.contains("ip link set up0 up"), "{told}");
        }
        lab.enter(1).unwrap();
        for told in refused(&spec("up1", "192.0.2.2")) {
            assert!(told.contains("without a carrier"), "{told}");
        }
    });
}

#[test]
fn a_port_that_is_taken_is_said_to_be() {
    in_lab(1500, 1, |lab| {
        for kind in KINDS {
            let Some(_first) = end(lab, kind, 0, 0, false) else {
                continue;
            };
            let told = lab.open(kind, 0, 0, false).err().unwrap();
            assert!(matches!(told, Error::Busy { .. }), "{told}");
        }
    });
}
