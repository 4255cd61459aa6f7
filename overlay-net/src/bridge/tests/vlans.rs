//! VLANs.

use super::*;

const Q: u16 = ethertype::VLAN;
const AD: u16 = ethertype::SERVICE_VLAN;

fn add(bridge: &mut Bridge, number: u32, vlan: Mode) {
    let config = PortConfig {
        vni: vni(7),
        vlan,
        ..PortConfig::default()
    };
    bridge.add_port(PortId(number), config).expect("a new port");
}

fn trunk(vlans: &[u16], native: Option<u16>, double: bool) -> Mode {
    Mode::Trunk {
        vlans: vlans.to_vec(),
        native,
        double,
    }
}

/// 1, 2: access to 5; 3: access to 6; 4: trunk of 5 and 6; 5: trunk of all, 5
/// without tags; 6: without VLAN.
fn vlans() -> Bridge {
    let mut bridge = bridge(0);
    add(&mut bridge, 1, Mode::Access { vlan: 5 });
    add(&mut bridge, 2, Mode::Access { vlan: 5 });
    add(&mut bridge, 3, Mode::Access { vlan: 6 });
    add(&mut bridge, 4, trunk(&[5, 6], None, false));
    add(&mut bridge, 5, trunk(&[], Some(5), false));
    add(&mut bridge, 6, Mode::default());
    bridge
}

#[test]
fn frames_stay_in_their_vlan_and_look_as_each_port_wants_them() {
    let mut bridge = vlans();
    let frame = plain(Mac::BROADCAST, mac(1));
    let sent = send(&mut bridge, at(0), port(1), &frame);
    assert_eq!(sent.to(), [port(2), port(4), port(5), node(1), node(2)]);
    assert_eq!(sent.leaves(0), frame);
    assert_eq!(sent.leaves(1), tagged(&frame, Q, 5));
    assert_eq!(sent.leaves(2), frame, "its own VLAN has no tag");
    assert_eq!(sent.leaves(3), tagged(&frame, Q, 5));

    let six = tagged(&plain(Mac::BROADCAST, mac(4)), Q, 6 | 0xe000);
    let sent = send(&mut bridge, at(0), port(4), &six);
    assert_eq!(sent.to(), [port(3), port(5), node(1), node(2)]);
    assert_eq!(sent.leaves(0), plain(Mac::BROADCAST, mac(4)));
    assert_eq!(sent.leaves(1), six, "with its priority");

    let sent = send(&mut bridge, at(0), node(1), &tagged(&frame, Q, 5));
    assert_eq!(sent.to(), [port(1), port(2), port(4), port(5)]);
    let sent = send(&mut bridge, at(0), node(1), &plain(Mac::BROADCAST, mac(8)));
    assert_eq!(sent.to(), [port(6)]);
}

#[test]
fn the_same_address_in_another_vlan_is_another_station() {
    let mut bridge = vlans();
    send(&mut bridge, at(0), port(1), &plain(Mac::BROADCAST, mac(1)));
    send(&mut bridge, at(0), port(3), &plain(Mac::BROADCAST, mac(1)));
    let five = tagged(&plain(mac(1), mac(9)), Q, 5);
    assert_eq!(send(&mut bridge, at(0), port(4), &five).to(), [port(1)]);
    let six = tagged(&plain(mac(1), mac(9)), Q, 6);
    assert_eq!(send(&mut bridge, at(0), port(4), &six).to(), [port(3)]);
}

#[test]
fn nobody_hops_into_another_vlan() {
    let mut bridge = vlans();
    let frame = plain(Mac::BROADCAST, mac(1));
    let cases = [
        (1, tagged(&frame, Q, 5), Reason::VlanRefused),
        (1, tagged(&frame, Q, 6), Reason::VlanRefused),
        (1, tagged(&frame, AD, 5), Reason::VlanRefused),
        (1, tagged(&tagged(&frame, Q, 6), Q, 0), Reason::DoubleTag),
        (4, frame.clone(), Reason::VlanRefused),
        (4, tagged(&frame, Q, 7), Reason::VlanRefused),
        (4, tagged(&frame, Q, 4095), Reason::VlanRefused),
        (4, tagged(&frame, AD, 5), Reason::VlanRefused),
        (4, tagged(&tagged(&frame, Q, 6), Q, 5), Reason::DoubleTag),
        (5, tagged(&tagged(&frame, Q, 6), Q, 5), Reason::DoubleTag),
        (5, tagged(&tagged(&frame, Q, 6), Q, 0), Reason::DoubleTag),
    ];
    for (number, frame, reason) in cases {
        let sent = send(&mut bridge, at(0), port(number), &frame);
        assert_eq!(sent.result, Err(reason), "port {number}: {frame:02x?}");
    }
    // A tag that only has a priority is taken off.
    let sent = send(&mut bridge, at(0), port(1), &tagged(&frame, Q, 0xe000));
    assert_eq!(sent.leaves(0), frame);
    assert_eq!(sent.leaves(1), tagged(&frame, Q, 0xe005));
}

#[test]
fn customers_tags_are_carried_in_a_service_vlan() {
    let mut bridge = bridge(0);
    for number in [1, 2] {
        add(&mut bridge, number, Mode::Customer { service: 9 });
    }
    add(&mut bridge, 3, Mode::Provider { services: vec![9] });
    add(&mut bridge, 4, Mode::Access { vlan: 9 });
    add(&mut bridge, 5, trunk(&[], None, true));
    let frame = plain(Mac::BROADCAST, mac(1));
    for frame in [frame.clone(), tagged(&frame, Q, 77)] {
        let sent = send(&mut bridge, at(0), port(1), &frame);
        assert_eq!(sent.to(), [port(2), port(3), node(1), node(2)]);
        assert_eq!(sent.leaves(0), frame);
        assert_eq!(sent.leaves(1), tagged(&frame, AD, 9));
        let sent = send(&mut bridge, at(0), port(3), &tagged(&frame, AD, 9));
        assert_eq!(sent.leaves(0), frame);
        let sent = send(&mut bridge, at(0), node(1), &tagged(&frame, AD, 9));
        assert_eq!(sent.to(), [port(1), port(2), port(3)]);
    }
    let sent = send(&mut bridge, at(0), port(1), &tagged(&frame, AD, 9));
    assert_eq!(sent.result, Err(Reason::DoubleTag));
    let sent = send(&mut bridge, at(0), port(3), &tagged(&frame, Q, 9));
    assert_eq!(sent.result, Err(Reason::VlanRefused));
    // Two of 802.1Q's tags pass between trunks that take them, and nowhere
    // else.
    add(&mut bridge, 6, trunk(&[], None, true));
    let double = tagged(&tagged(&frame, Q, 6), Q, 9);
    let sent = send(&mut bridge, at(0), port(5), &double);
    assert_eq!(sent.to(), [port(6), node(1), node(2)]);
}

#[test]
fn vlans_that_do_not_exist_are_refused() {
    let mut bridge = bridge(0);
    for (vlan, error) in [
        (Mode::Access { vlan: 4095 }, PortError::Vlan(4095)),
        (trunk(&[1, 5000], None, false), PortError::Vlan(5000)),
        (Mode::Customer { service: 0 }, PortError::Vlan(0)),
    ] {
        let config = PortConfig {
            vlan,
            ..PortConfig::default()
        };
        assert_eq!(bridge.add_port(PortId(1), config), Err(error));
    }
    let config = PortConfig {
        vlan: trunk(&[], None, false),
        macs: vec![mac(1)],
        ..PortConfig::default()
    };
    assert_eq!(bridge.add_port(PortId(1), config), Err(PortError::Trunk));
}
