//! Learning, and where frames go.

use super::*;

#[test]
fn what_nobody_knows_goes_to_all_and_is_learned() {
    let mut bridge = bridge(3);
    let sent = send(&mut bridge, at(0), port(1), &plain(mac(2), mac(1)));
    assert_eq!(sent.to(), [port(2), port(3), node(1), node(2)]);
    let sent = send(&mut bridge, at(0), port(2), &plain(mac(1), mac(2)));
    assert_eq!(sent.to(), [port(1)]);
    let sent = send(&mut bridge, at(1), port(1), &plain(mac(2), mac(1)));
    assert_eq!(sent.to(), [port(2)]);
    let sent = send(&mut bridge, at(1), port(2), &plain(mac(2), mac(1)));
    assert_eq!(sent.result, Err(Reason::SamePort));
    let events: Vec<Event> = bridge.events().collect();
    assert!(events.len() >= 2, "{events:?}");
}

#[test]
fn what_came_by_a_tunnel_leaves_by_none() {
    let mut bridge = bridge(2);
    let sent = send(&mut bridge, at(0), node(1), &plain(Mac::BROADCAST, mac(9)));
    assert_eq!(sent.to(), [port(1), port(2)]);
    let sent = send(&mut bridge, at(0), node(1), &plain(mac(8), mac(9)));
    assert_eq!(sent.to(), [port(1), port(2)]);
    let station = Station {
        vni: vni(7),
        vlan: Vlan::NONE,
        mac: mac(8),
    };
    let found = Located {
        node: NodeId(2),
        attached: true,
        isolated: false,
        ips: Vec::new(),
    };
    bridge.locate(at(0), station, Some(&found));
    let sent = send(&mut bridge, at(0), node(1), &plain(mac(8), mac(9)));
    assert_eq!(sent.result, Err(Reason::SplitHorizon));
    let sent = send(&mut bridge, at(0), port(1), &plain(mac(8), mac(1)));
    assert_eq!(sent.to(), [node(2)]);
    // Nodes' frames teach nothing unless they should.
    assert_eq!(bridge.learned(node(1)), 0);
    let config = NodeConfig {
        limit: 10,
        ..NodeConfig::default()
    };
    bridge.set_node(NodeId(1), config);
    send(&mut bridge, at(0), node(1), &plain(Mac::BROADCAST, mac(9)));
    let sent = send(&mut bridge, at(0), port(1), &plain(mac(9), mac(1)));
    assert_eq!(sent.to(), [node(1)]);
    bridge.remove_node(at(0), NodeId(1));
    assert_eq!(bridge.learned(node(1)), 0);
}

#[test]
fn networks_and_nodes_that_are_not_there_get_and_send_nothing() {
    let mut bridge = bridge(1);
    let other = PortConfig {
        vni: vni(8),
        ..PortConfig::default()
    };
    bridge.add_port(PortId(9), other).expect("a new port");
    let sent = send(&mut bridge, at(0), port(1), &plain(Mac::BROADCAST, mac(1)));
    assert_eq!(sent.to(), [node(1), node(2)]);
    let sent = send(&mut bridge, at(0), port(9), &plain(mac(1), mac(9)));
    assert_eq!(sent.to(), []);
    let sent = send(&mut bridge, at(0), node(5), &plain(mac(1), mac(9)));
    assert_eq!(sent.result, Err(Reason::NoPort));
    bridge.remove_port(at(0), PortId(1)).expect("it is there");
    bridge.set_members(vni(7), &[]);
    assert!(bridge.remove_network(vni(7)));
    let sent = send(&mut bridge, at(0), node(1), &plain(mac(1), mac(9)));
    assert_eq!(sent.result, Err(Reason::NoNetwork));
}

#[test]
fn addresses_age_and_make_room_for_others_of_their_port() {
    let mut bridge = Bridge::new(Config::default());
    for (number, limit) in [(1, 3), (2, 100)] {
        let config = PortConfig {
            vni: vni(7),
            limit,
            ..PortConfig::default()
        };
        bridge.add_port(PortId(number), config).expect("a new port");
    }
    send(
        &mut bridge,
        at(0),
        port(2),
        &plain(Mac::BROADCAST, mac(100)),
    );
    for number in 1..=5 {
        let now = at(number.into());
        send(
            &mut bridge,
            now,
            port(1),
            &plain(Mac::BROADCAST, mac(number)),
        );
    }
    assert_eq!((bridge.learned(port(1)), bridge.learned(port(2))), (3, 1));
    assert_eq!(bridge.counts().evicted, 2);
    let known: Vec<u8> = (1..=5)
        .filter(|number| bridge.stations(at(6)).any(|it| it.0.mac == mac(*number)))
        .collect();
    assert_eq!(known, [3, 4, 5], "the oldest made room");
    // One that goes on sending stays.
    send(
        &mut bridge,
        at(200),
        port(1),
        &plain(Mac::BROADCAST, mac(4)),
    );
    bridge.expire(at(310));
    assert_eq!((bridge.len(), bridge.learned(port(1))), (1, 1));
    let forgotten = bridge
        .events()
        .filter(|event| matches!(event, Event::Forgotten(..)));
    assert_eq!(forgotten.count(), 5);
    bridge.expire(at(501));
    assert!(bridge.is_empty());
}

#[test]
fn all_together_have_limited_room_too() {
    let mut config = Config::default();
    config.limits.learned = 10;
    let mut bridge = Bridge::new(config);
    for number in [1, 2] {
        let config = PortConfig {
            vni: vni(7),
            ..PortConfig::default()
        };
        bridge.add_port(PortId(number), config).expect("a new port");
    }
    for number in 0..50 {
        send(
            &mut bridge,
            at(0),
            port(1),
            &plain(Mac::BROADCAST, mac(number)),
        );
    }
    send(&mut bridge, at(0), port(2), &plain(Mac::BROADCAST, mac(99)));
    assert_eq!((bridge.learned(port(1)), bridge.learned(port(2))), (10, 0));
    assert_eq!((bridge.len(), bridge.counts().refused), (10, 1));
}

#[test]
fn an_address_that_flaps_stays_where_it_is_for_a_while() {
    let mut bridge = bridge(2);
    let frame = plain(Mac::BROADCAST, mac(1));
    let mut dropped = 0;
    for turn in 0..20_u64 {
        let now = Duration::from_millis(turn * 10);
        let from = port(1 + (turn % 2) as u32);
        let sent = send(&mut bridge, now, from, &frame);
        if let Err(reason) = sent.result {
            assert_eq!(reason, Reason::Flapping);
            dropped += 1;
        }
    }
    // After five moves, every other frame comes from the wrong side.
    assert_eq!((bridge.counts().moved, bridge.counts().held), (5, 1));
    assert_eq!(dropped, 7);
    // It had settled on the second port. Later, it may move again.
    assert!(send(&mut bridge, at(20), port(1), &frame).result.is_err());
    assert!(send(&mut bridge, at(31), port(1), &frame).result.is_ok());
    let drops = bridge.drops(Some(port(1))).expect("a port");
    assert_eq!(drops.of(Reason::Flapping), 8);
}

#[test]
fn attached_addresses_are_nobody_elses() {
    let mut bridge = bridge(2);
    let config = PortConfig {
        vni: vni(7),
        macs: vec![mac(50)],
        ips: vec![[10, 0, 0, 50].into()],
        guard: true,
        ..PortConfig::default()
    };
    bridge
        .add_port(PortId(5), config.clone())
        .expect("a new port");
    let again = bridge.add_port(PortId(6), config);
    assert_eq!(again, Err(PortError::Taken(mac(50), PortId(5))));
    let sent = send(&mut bridge, at(0), port(1), &plain(mac(50), mac(1)));
    assert_eq!(sent.to(), [port(5)]);
    for from in [port(1), port(2)] {
        let sent = send(&mut bridge, at(0), from, &plain(mac(1), mac(50)));
        assert_eq!(sent.result, Err(Reason::Spoofed));
    }
    // It may not take another's, either, nor speak for another.
    let sent = send(&mut bridge, at(0), port(5), &plain(mac(1), mac(51)));
    assert_eq!(sent.result, Err(Reason::Spoofed));
    let sent = send(&mut bridge, at(0), port(5), &plain(mac(1), mac(50)));
    assert_eq!(sent.to(), [port(1)]);
    for (who, ip, result) in [
        (mac(50), 50, Ok(())),
        (mac(50), 51, Err(Reason::Spoofed)),
        (mac(51), 50, Err(Reason::Spoofed)),
    ] {
        let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
        arp.extend(who.0);
        arp.extend([10, 0, 0, ip]);
        arp.extend([0; 10]);
        let frame = ethernet(Mac::BROADCAST, mac(50), ethertype::ARP, &arp);
        assert_eq!(send(&mut bridge, at(0), port(5), &frame).result, result);
    }
    bridge.remove_port(at(0), PortId(5)).expect("it is there");
    let sent = send(&mut bridge, at(0), port(1), &plain(mac(1), mac(50)));
    assert_eq!(sent.result, Err(Reason::SamePort));
}

#[test]
fn isolated_ports_only_talk_to_others() {
    let mut bridge = bridge(1);
    for number in [2, 3] {
        let config = PortConfig {
            vni: vni(7),
            macs: vec![mac(number)],
            isolated: true,
            ..PortConfig::default()
        };
        bridge
            .add_port(PortId(number.into()), config)
            .expect("a new port");
    }
    let sent = send(&mut bridge, at(0), port(2), &plain(Mac::BROADCAST, mac(2)));
    assert_eq!(sent.to(), [port(1), node(1), node(2)]);
    let sent = send(&mut bridge, at(0), port(2), &plain(mac(3), mac(2)));
    assert_eq!(sent.result, Err(Reason::Isolated));
    let sent = send(&mut bridge, at(0), port(1), &plain(mac(3), mac(1)));
    assert_eq!(sent.to(), [port(3)]);
    // Also when the other one is on another node.
    let station = Station {
        vni: vni(7),
        vlan: Vlan::NONE,
        mac: mac(9),
    };
    let found = Located {
        node: NodeId(1),
        attached: true,
        isolated: true,
        ips: Vec::new(),
    };
    bridge.locate(at(0), station, Some(&found));
    let sent = send(&mut bridge, at(0), node(1), &plain(mac(3), mac(9)));
    assert_eq!(sent.result, Err(Reason::Isolated));
    let sent = send(&mut bridge, at(0), node(1), &plain(Mac::BROADCAST, mac(9)));
    assert_eq!(sent.to(), [port(1)]);
}

#[test]
fn groups_of_the_next_bridge_only_pass_where_they_may() {
    let mut bridge = bridge(1);
    let config = PortConfig {
        vni: vni(7),
        link_local: true,
        ..PortConfig::default()
    };
    bridge.add_port(PortId(2), config).expect("a new port");
    let bpdu = plain(Mac([1, 0x80, 0xc2, 0, 0, 0]), mac(1));
    let sent = send(&mut bridge, at(0), port(1), &bpdu);
    assert_eq!(sent.result, Err(Reason::LinkLocal));
    let bpdu = plain(Mac([1, 0x80, 0xc2, 0, 0, 0x0e]), mac(2));
    assert!(send(&mut bridge, at(0), port(2), &bpdu).result.is_ok());
}

#[test]
fn a_thousand_ports_and_ten_thousand_addresses_are_found() {
    let mut bridge = bridge(0);
    for number in 1..=1000_u32 {
        let [_, _, high, low] = number.to_be_bytes();
        let config = PortConfig {
            vni: vni(7),
            macs: (0..10).map(|it| Mac([2, 1, 0, high, low, it])).collect(),
            ..PortConfig::default()
        };
        bridge.add_port(PortId(number), config).expect("a new port");
    }
    assert_eq!(bridge.len(), 10_000);
    let from = Mac([2, 1, 0, 0, 1, 0]);
    for number in 2..=1000_u32 {
        let [_, _, high, low] = number.to_be_bytes();
        for last in 0..10 {
            let frame = plain(Mac([2, 1, 0, high, low, last]), from);
            assert_eq!(
                send(&mut bridge, at(0), port(1), &frame).to(),
                [port(number)]
            );
        }
    }
    let sent = send(&mut bridge, at(0), port(1), &plain(Mac::BROADCAST, from));
    assert_eq!(sent.to().len(), 999 + 2);
    for number in 1..=1000 {
        bridge
            .remove_port(at(0), PortId(number))
            .expect("it is there");
    }
    assert!(bridge.is_empty());
}
