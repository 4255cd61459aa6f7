//! A TAP uplink, with the node's kernel at the other end.

use super::*;
use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};

fn spec() -> Spec {
    Spec {
        host_ip: Some((Ipv4Addr::new(198, 51, 100, 1), 24)),
        ..Spec::new("t0", "198.51.100.2:4789".parse().unwrap())
    }
}

fn in_tap_network(test: impl FnOnce(&mut dyn Uplink) + Send + 'static) {
    in_own_network(|| {
        if let Err(error) = File::open("/dev/net/tun") {
            println!("skipped, because /dev/net/tun cannot be opened: {error}");
        } else {
            test(&mut *open(Kind::Tap, &spec()).unwrap());
        }
    });
}

#[test]
fn datagrams_and_trains_cross_a_tap_both_ways() {
    in_tap_network(|uplink| {
        let here = uplink.description().local;
        let node = netlink::interface("t0").unwrap();
        let bound = Spec::new("t0", "198.51.100.1:4789".parse().unwrap());
        let mut node = udp::Udp::open(&bound, &node, udp::Use::Full).unwrap();
        let there = node.description().local;
        let content: Vec<u8> = (0..1400 * 20 + 5).map(|at| (at / 7) as u8).collect();
        for _ in 0..2 {
            send(uplink, &[TxPacket::train(there, &content, 1400)]);
            let got = receive(&mut node, 21);
            let joined: Vec<u8> = got.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            assert!(joined == content);
            assert!(got.iter().all(|(_, from)| *from == here));
            send(&mut node, &[TxPacket::train(here, &content, 1400)]);
            let got = receive(uplink, 21);
            let joined: Vec<u8> = got.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            assert!(joined == content);
            assert!(got.iter().all(|(_, from)| *from == there));
        }
        assert_eq!(uplink.counters().rx.bytes, 2 * content.len() as u64);
    });
}

#[test]
fn what_is_for_another_port_behind_a_tap_is_counted_and_dropped() {
    in_tap_network(|uplink| {
        let node = UdpSocket::bind("198.51.100.1:0").unwrap();
        node.send_to(b"other", "198.51.100.2:4790").unwrap();
        node.send_to(b"mine", "198.51.100.2:4789").unwrap();
        assert_eq!(receive(uplink, 1)[0].0, b"mine");
        assert!(uplink.counters().rx_malformed >= 1);
        let long = vec![0; 1473];
        let to = node.local_addr().unwrap();
        send(uplink, &[TxPacket::new(to, &long)]);
        assert_eq!(uplink.counters().tx_too_big, 1);
    });
}
