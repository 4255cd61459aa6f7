//! IGMP and MLD.

use std::net::Ipv6Addr;

use super::*;

const GROUP: [u8; 4] = [239, 1, 2, 3];

fn group_mac(group: [u8; 4]) -> Mac {
    Mac([1, 0, 0x5e, group[1] & 0x7f, group[2], group[3]])
}

fn igmp(from: [u8; 4], to: [u8; 4], message: &[u8]) -> Vec<u8> {
    let len = (24 + message.len()) as u16;
    // With the router alert option.
    let mut ip = vec![0x46, 0];
    ip.extend(len.to_be_bytes());
    ip.extend([0, 0, 0, 0, 1, protocol::IGMP, 0, 0]);
    ip.extend(from);
    ip.extend(to);
    ip.extend([0x94, 4, 0, 0]);
    ip.extend(message);
    ethernet(group_mac(to), mac(from[3]), ethertype::IPV4, &ip)
}

fn query() -> Vec<u8> {
    igmp(
        [10, 0, 0, 1],
        [224, 0, 0, 1],
        &[0x11, 100, 0, 0, 0, 0, 0, 0],
    )
}

fn two(kind: u8, group: [u8; 4]) -> Vec<u8> {
    let message = [&[kind, 0, 0, 0][..], &group].concat();
    igmp([10, 0, 0, 9], group, &message)
}

/// Its kind, its sources, its group.
type Said<'a> = (u8, &'a [[u8; 4]], [u8; 4]);

fn three(records: &[Said<'_>]) -> Vec<u8> {
    let mut message = vec![0x22, 0, 0, 0, 0, 0, 0, records.len() as u8];
    for (kind, sources, group) in records {
        message.extend([*kind, 0, 0, sources.len() as u8]);
        message.extend(group);
        message.extend(sources.concat());
    }
    igmp([10, 0, 0, 9], [224, 0, 0, 22], &message)
}

fn data(group: [u8; 4]) -> Vec<u8> {
    ethernet(
        group_mac(group),
        mac(1),
        ethertype::IPV4,
        &udp4([10, 0, 0, 1], group, 20),
    )
}

/// Where a frame to the group goes that port 1 sends.
fn listeners(bridge: &mut Bridge, now: u64) -> Vec<Place> {
    send(bridge, at(now), port(1), &data(GROUP)).to()
}

const ALL: [Place; 5] = [
    Place::Port(PortId(2)),
    Place::Port(PortId(3)),
    Place::Port(PortId(4)),
    Place::Node(NodeId(1)),
    Place::Node(NodeId(2)),
];

#[test]
fn without_a_querier_all_hear_all() {
    let mut bridge = bridge(4);
    assert_eq!(listeners(&mut bridge, 0), ALL);
    // Reports too, since there may be a router that has not asked yet.
    assert_eq!(
        send(&mut bridge, at(0), port(2), &two(0x16, GROUP))
            .to()
            .len(),
        5
    );
    assert_eq!(listeners(&mut bridge, 0), ALL);
    // One that has no address is none.
    let proxy = igmp([0, 0, 0, 0], [224, 0, 0, 1], &[0x11, 100, 0, 0, 0, 0, 0, 0]);
    let mut proxy = proxy;
    proxy[11] = 4;
    assert_eq!(send(&mut bridge, at(0), port(4), &proxy).to().len(), 5);
    assert_eq!(listeners(&mut bridge, 0), ALL);
}

#[test]
fn with_one_those_who_listen_hear_and_it_does() {
    let mut bridge = bridge(4);
    assert_eq!(send(&mut bridge, at(0), port(4), &query()).to().len(), 5);
    assert_eq!(listeners(&mut bridge, 0), [port(4)]);
    // A report goes to routers, and to other nodes, where there may be some.
    let sent = send(&mut bridge, at(0), port(2), &two(0x16, GROUP));
    assert_eq!(sent.to(), [port(4), node(1), node(2)]);
    assert_eq!(listeners(&mut bridge, 0), [port(2), port(4)]);
    let report = three(&[(4, &[], GROUP), (2, &[[10, 0, 0, 1]], [239, 9, 9, 9])]);
    assert_eq!(send(&mut bridge, at(0), node(2), &report).to(), [port(4)]);
    assert_eq!(listeners(&mut bridge, 0), [port(2), port(4), node(2)]);

    // Who leaves is given time to say otherwise for others behind its port.
    send(&mut bridge, at(10), port(2), &two(0x17, GROUP));
    assert_eq!(listeners(&mut bridge, 11), [port(2), port(4), node(2)]);
    assert_eq!(listeners(&mut bridge, 12), [port(4), node(2)]);
    send(&mut bridge, at(12), node(2), &three(&[(3, &[], GROUP)]));
    assert_eq!(listeners(&mut bridge, 15), [port(4)]);
    // Only from some sources: it listens.
    send(
        &mut bridge,
        at(15),
        port(3),
        &three(&[(5, &[[10, 0, 0, 1]], GROUP)]),
    );
    assert_eq!(listeners(&mut bridge, 15), [port(3), port(4)]);
    // Those of the link are heard by all.
    assert_eq!(
        send(&mut bridge, at(15), port(1), &data([224, 0, 0, 251])).to(),
        ALL
    );

    // Who does not renew is forgotten; without the querier, all hear all.
    send(&mut bridge, at(200), port(4), &query());
    assert_eq!(listeners(&mut bridge, 276), [port(4)]);
    assert_eq!(listeners(&mut bridge, 456), ALL);
    bridge.expire(at(456));
    assert_eq!(bridge.groups().count(), 0);
}

#[test]
fn groups_are_remembered_in_limits_and_removed_with_their_ports() {
    let mut bridge = bridge(2);
    send(&mut bridge, at(0), port(1), &query());
    for number in 0..2000_u16 {
        let [a, b] = number.to_be_bytes();
        send(&mut bridge, at(0), port(2), &two(0x16, [239, 1, a, b]));
    }
    assert_eq!(bridge.groups().count(), 512);
    bridge.remove_port(at(0), PortId(2)).expect("it is there");
    assert_eq!(bridge.groups().count(), 0);
}

#[test]
fn a_lone_listener_that_leaves_is_gone_at_once() {
    let mut bridge = bridge(1);
    let config = PortConfig {
        vni: vni(7),
        fast_leave: true,
        ..PortConfig::default()
    };
    bridge.add_port(PortId(2), config).expect("a new port");
    send(&mut bridge, at(0), node(1), &query());
    send(&mut bridge, at(0), port(2), &two(0x16, GROUP));
    assert_eq!(listeners(&mut bridge, 0), [port(2), node(1)]);
    send(&mut bridge, at(1), port(2), &two(0x17, GROUP));
    assert_eq!(listeners(&mut bridge, 1), [node(1)]);
}

fn mld(message: &[u8], to: Ipv6Addr) -> Vec<u8> {
    let from = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
    let len = (8 + message.len()) as u8;
    let head = [0x60, 0, 0, 0, 0, len, 0, 1];
    let options = [protocol::ICMPV6, 0, 5, 2, 0, 0, 1, 0];
    let ip = [&head[..], &from.octets(), &to.octets(), &options, message].concat();
    let octets = to.octets();
    let group = Mac([0x33, 0x33, octets[12], octets[13], octets[14], octets[15]]);
    ethernet(group, mac(9), ethertype::IPV6, &ip)
}

#[test]
fn listeners_of_ipv6_are_heard_too() {
    let group = Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 1, 3);
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);
    let mut bridge = bridge(4);
    let query = [&[130, 0, 0, 0, 0, 0, 0, 0][..], &[0; 16]].concat();
    send(&mut bridge, at(0), port(4), &mld(&query, all));
    let record = [&[4, 0, 0, 0][..], &group.octets()].concat();
    let report = [&[143, 0, 0, 0, 0, 0, 0, 1][..], &record].concat();
    send(&mut bridge, at(0), port(2), &mld(&report, routers));
    let one = [&[131, 0, 0, 0, 0, 0, 0, 0][..], &group.octets()].concat();
    send(&mut bridge, at(0), port(3), &mld(&one, group));
    let from = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    let payload = [1, 0, 2, 0, 0, 8, 0, 0];
    let head = [0x60, 0, 0, 0, 0, 8, protocol::UDP, 9];
    let ip = [&head[..], &from.octets(), &group.octets(), &payload].concat();
    let frame = ethernet(Mac([0x33, 0x33, 0, 1, 0, 3]), mac(1), ethertype::IPV6, &ip);
    assert_eq!(
        send(&mut bridge, at(0), port(1), &frame).to(),
        [port(2), port(3), port(4)]
    );
    let done = [&[132, 0, 0, 0, 0, 0, 0, 0][..], &group.octets()].concat();
    send(&mut bridge, at(0), port(3), &mld(&done, all));
    assert_eq!(
        send(&mut bridge, at(3), port(1), &frame).to(),
        [port(2), port(4)]
    );
}
