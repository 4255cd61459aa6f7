//! ARP and neighbour discovery, and what does not fit.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;
use crate::frame::{Checksum, Kind, Segments};

fn arp(from: Mac, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(from.0);
    arp.extend(sender);
    arp.extend([0; 6]);
    arp.extend(target);
    ethernet(Mac::BROADCAST, from, ethertype::ARP, &arp)
}

fn ip6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u16).to_be_bytes();
    let head = [0x60, 0, 0, 0, len[0], len[1], protocol, 255];
    [&head[..], &from.octets(), &to.octets(), payload].concat()
}

fn solicit(from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let octets = target.octets();
    let group = Mac([0x33, 0x33, 0xff, octets[13], octets[14], octets[15]]);
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, octets[15].into());
    let body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &octets].concat();
    ethernet(group, mac(1), ethertype::IPV6, &ip6(from, to, 58, &body))
}

const SIX: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 9);
const ME: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);

fn known() -> Bridge {
    let mut bridge = bridge(2);
    let station = Station {
        vni: vni(7),
        vlan: Vlan::NONE,
        mac: mac(9),
    };
    let found = Located {
        node: NodeId(1),
        attached: true,
        isolated: false,
        ips: vec![[10, 0, 0, 9].into(), SIX.into()],
    };
    bridge.locate(at(0), station, Some(&found));
    bridge
}

#[test]
fn who_asks_for_what_the_directory_knows_is_answered() {
    let mut bridge = known();
    let sent = send(
        &mut bridge,
        at(0),
        port(1),
        &arp(mac(1), [10, 0, 0, 1], [10, 0, 0, 9]),
    );
    assert_eq!(sent.to(), []);
    let (key, _) = read(&sent.reply(), vni(7));
    let arp_reply = key.arp.expect("ARP");
    assert_eq!((key.dst, key.src, arp_reply.op), (mac(1), mac(9), 2));
    assert_eq!(arp_reply.sender, (mac(9), Ipv4Addr::new(10, 0, 0, 9)));
    assert_eq!(arp_reply.target, (mac(1), Ipv4Addr::new(10, 0, 0, 1)));
    assert_eq!(bridge.answered(), 1);

    // What is not known, who tells of itself, and who refreshes: as ever.
    let asked = |bridge: &mut Bridge, frame: &[u8]| {
        let sent = send(bridge, at(0), port(1), frame);
        (sent.out.reply.is_some(), sent.to().len())
    };
    let frame = arp(mac(1), [10, 0, 0, 1], [10, 0, 0, 8]);
    assert_eq!(asked(&mut bridge, &frame), (false, 3));
    let frame = arp(mac(1), [10, 0, 0, 9], [10, 0, 0, 9]);
    assert_eq!(asked(&mut bridge, &frame), (false, 3));
    let mut frame = arp(mac(1), [10, 0, 0, 1], [10, 0, 0, 9]);
    frame[..6].copy_from_slice(&mac(9).0);
    assert_eq!(asked(&mut bridge, &frame), (false, 1));
    // From a tunnel: its own node did not know. It is asked further.
    let frame = arp(mac(1), [10, 0, 0, 1], [10, 0, 0, 9]);
    let sent = send(&mut bridge, at(0), node(2), &frame);
    assert!(sent.out.reply.is_none());
    // It is gone.
    let station = Station {
        vni: vni(7),
        vlan: Vlan::NONE,
        mac: mac(9),
    };
    bridge.locate(at(0), station, None);
    assert_eq!(asked(&mut bridge, &frame), (false, 3));
}

#[test]
fn neighbours_are_advertised_and_who_probes_hears_of_a_conflict() {
    let mut bridge = known();
    for (from, to, flags) in [
        (ME, ME, 0x60),
        (
            Ipv6Addr::UNSPECIFIED,
            Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
            0x20,
        ),
    ] {
        let sent = send(&mut bridge, at(0), port(1), &solicit(from, SIX));
        assert_eq!(sent.to(), []);
        let reply = sent.reply();
        let (key, layers) = read(&reply, vni(7));
        assert_eq!(key.ip, Some((SIX.into(), to.into())));
        assert_eq!(
            (key.ports, key.nd_target, key.ttl),
            (Some((136, 0)), Some(SIX), 255)
        );
        let icmp = &reply[layers.transport..];
        assert_eq!(
            (icmp[4], &icmp[24..]),
            (flags, &[2, 1, 2, 0, 0, 0, 0, 9][..])
        );
        let pseudo: u32 = reply[22..54]
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        assert!(sums_up(icmp, pseudo + icmp.len() as u32 + 58));
    }
    let sent = send(&mut bridge, at(0), port(1), &solicit(ME, ME));
    assert!(sent.out.reply.is_none());
}

#[test]
fn answers_have_the_tag_that_the_question_had() {
    let mut bridge = bridge(0);
    let config = PortConfig {
        vni: vni(7),
        vlan: Mode::Trunk {
            vlans: vec![5],
            native: None,
            double: false,
        },
        ..PortConfig::default()
    };
    bridge.add_port(PortId(1), config).expect("a new port");
    let config = PortConfig {
        vni: vni(7),
        vlan: Mode::Access { vlan: 5 },
        macs: vec![mac(9)],
        ips: vec![[10, 0, 0, 9].into()],
        ..PortConfig::default()
    };
    bridge.add_port(PortId(2), config).expect("a new port");
    let question = arp(mac(1), [10, 0, 0, 1], [10, 0, 0, 9]);
    let sent = send(
        &mut bridge,
        at(0),
        port(1),
        &tagged(&question, ethertype::VLAN, 5),
    );
    let (key, _) = read(&sent.reply(), vni(7));
    assert_eq!(key.tags[0].map(crate::frame::Tag::vid), Some(5));
    assert_eq!(key.arp.map(|arp| arp.sender.0), Some(mac(9)));
}

fn small(mtu: usize) -> Bridge {
    let mut bridge = bridge(1);
    let config = PortConfig {
        vni: vni(7),
        macs: vec![mac(9)],
        mtu,
        clamp_mss: true,
        ..PortConfig::default()
    };
    bridge.add_port(PortId(2), config).expect("a new port");
    bridge
}

#[test]
fn who_sends_too_much_at_once_is_told_what_fits() {
    let mut bridge = small(1400);
    let fits = ethernet(
        mac(9),
        mac(1),
        0x0800,
        &udp4([10, 0, 0, 1], [10, 0, 0, 9], 1372),
    );
    assert_eq!(send(&mut bridge, at(0), port(1), &fits).to(), [port(2)]);
    let long = ethernet(
        mac(9),
        mac(1),
        0x0800,
        &udp4([10, 0, 0, 1], [10, 0, 0, 9], 1373),
    );
    for from in [port(1), node(1)] {
        let sent = send(&mut bridge, at(0), from, &long);
        assert_eq!(sent.result, Err(Reason::TooBig));
        let output = sent.out.reply.as_ref().expect("a reply").output;
        assert_eq!((output.to, output.vni), (from, vni(7)));
        let reply = sent.reply();
        let (key, layers) = read(&reply, vni(7));
        assert_eq!(
            (key.dst, key.src, key.ports),
            (mac(1), mac(9), Some((3, 4)))
        );
        assert_eq!(key.ip, Some(([10, 0, 0, 9].into(), [10, 0, 0, 1].into())));
        let icmp = &reply[layers.transport..];
        assert!(sums_up(icmp, 0) && sums_up(&reply[14..34], 0));
        assert_eq!(icmp[6..8], 1400_u16.to_be_bytes());
        assert_eq!(icmp[8..100], long[14..106], "what it is about");
    }
    let six = ip6(ME, SIX, 17, &[0; 1400]);
    let sent = send(
        &mut bridge,
        at(0),
        port(1),
        &ethernet(mac(9), mac(1), 0x86dd, &six),
    );
    let reply = sent.reply();
    let (key, layers) = read(&reply, vni(7));
    assert_eq!(
        (key.ports, key.ip),
        (Some((2, 0)), Some((SIX.into(), ME.into())))
    );
    assert_eq!(reply[layers.transport + 4..][..4], 1400_u32.to_be_bytes());
    // Not of errors, not to groups, and not too often.
    let mut error = udp4([10, 0, 0, 1], [10, 0, 0, 9], 1373);
    (error[9], error[20]) = (protocol::ICMP, 3);
    let sent = send(
        &mut bridge,
        at(0),
        port(1),
        &ethernet(mac(9), mac(1), 0x0800, &error),
    );
    assert!(sent.result.is_err() && sent.out.reply.is_none());
    let all = ethernet(
        Mac::BROADCAST,
        mac(1),
        0x0800,
        &udp4([10, 0, 0, 1], [10, 0, 0, 255], 1373),
    );
    let sent = send(&mut bridge, at(0), port(1), &all);
    assert_eq!(sent.to(), [node(1), node(2)]);
    let told = (0..500)
        .filter(|_| send(&mut bridge, at(0), port(1), &long).out.reply.is_some())
        .count();
    assert!((1..=50).contains(&told), "{told}");
}

/// A SYN with an MSS of 1460, after `before` bytes of other options.
fn syn(before: usize, partial: bool) -> (Vec<u8>, Offload) {
    let mut tcp = vec![
        0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0xff, 0xff, 0, 0, 0, 0,
    ];
    tcp.extend(vec![1; before]);
    tcp.extend([2, 4, 5, 180]);
    tcp.resize(tcp.len().next_multiple_of(4), 1);
    tcp[12] = (tcp.len() as u8 / 4) << 4;
    let total = (20 + tcp.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 9]);
    let pseudo = pseudo(tcp.len());
    let sum = |bytes: &[u8]| {
        let words = bytes.chunks(2);
        let mut sum: u32 = words
            .map(|it| u32::from(u16::from_be_bytes([it[0], it[1]])))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    };
    let checksum = match partial {
        true => sum(&[(pseudo >> 8) as u8, pseudo as u8]),
        false => 0xffff - sum(&[&tcp[..], &[(pseudo >> 8) as u8, pseudo as u8]].concat()),
    };
    tcp[16..18].copy_from_slice(&(checksum as u16).to_be_bytes());
    let offload = Offload {
        checksum: partial.then_some(Checksum {
            start: 34,
            offset: 16,
        }),
        ..Offload::default()
    };
    (
        ethernet(mac(9), mac(1), 0x0800, &[ip, tcp].concat()),
        offload,
    )
}

fn pseudo(len: usize) -> u32 {
    let sum = 0x0a00 + 1 + 0x0a00 + 9 + 6 + len as u32;
    (sum & 0xffff) + (sum >> 16)
}

#[test]
fn a_connection_learns_what_fits_and_its_checksum_stays_right() {
    let mut bridge = small(1400);
    for before in [0, 1, 2, 3] {
        let (frame, offload) = syn(before, false);
        let sent = send_with(&mut bridge, at(0), port(1), &frame, offload);
        assert_eq!(sent.to(), [port(2)]);
        let tcp = &sent.head[34..];
        assert_eq!(tcp[22 + before..24 + before], 1360_u16.to_be_bytes());
        assert!(sums_up(tcp, pseudo(tcp.len())), "{before} bytes before it");
    }
    // What is not computed yet is not in it yet either.
    let (frame, offload) = syn(0, true);
    let sent = send_with(&mut bridge, at(0), port(1), &frame, offload);
    assert_eq!(sent.head[56..58], 1360_u16.to_be_bytes());
    assert_eq!(sent.head[50..52], frame[50..52]);
    // The answer, too, on its way out through the port that takes less.
    let (mut frame, offload) = syn(0, true);
    frame[..12].copy_from_slice(&[mac(1).0, mac(9).0].concat());
    frame[47] |= 0x10;
    let sent = send_with(&mut bridge, at(0), port(2), &frame, offload);
    assert_eq!(
        (sent.to(), &sent.head[56..58]),
        (vec![port(1)], &1360_u16.to_be_bytes()[..])
    );
    // Where all fits, nothing changes.
    let (frame, offload) = syn(0, false);
    let sent = send_with(&mut small(1500), at(0), port(1), &frame, offload);
    assert_eq!(sent.head, frame);
}

#[test]
fn a_large_frame_fits_if_its_segments_do() {
    let mut bridge = small(1400);
    let mut frame = syn(0, true).0;
    frame[47] = 0x10;
    frame.resize(14 + 60_000, 0);
    frame[16..18].copy_from_slice(&60_000_u16.to_be_bytes());
    let offload = |size| Offload {
        checksum: Some(Checksum {
            start: 34,
            offset: 16,
        }),
        segments: Some(Segments {
            kind: Kind::Tcp4,
            ecn: false,
            header: 0,
            size,
        }),
        valid: false,
    };
    // 20 bytes of IP, 24 of TCP.
    let sent = send_with(&mut bridge, at(0), port(1), &frame, offload(1356));
    assert_eq!(sent.to(), [port(2)]);
    let sent = send_with(&mut bridge, at(0), port(1), &frame, offload(1357));
    assert_eq!(sent.result, Err(Reason::TooBig));
    assert!(sent.out.reply.is_some());
}
