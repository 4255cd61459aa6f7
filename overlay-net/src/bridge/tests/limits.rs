//! Storms and rates.

use super::*;

fn limited() -> Bridge {
    let mut bridge = bridge(1);
    let ten = Some(Rate {
        per_second: 10,
        burst: 10,
    });
    let config = PortConfig {
        vni: vni(7),
        storm: Storm {
            broadcast: ten,
            multicast: ten,
            unknown: ten,
        },
        ..PortConfig::default()
    };
    bridge.add_port(PortId(2), config).expect("a new port");
    bridge
}

#[test]
fn each_kind_of_storm_is_limited_by_itself() {
    let mut bridge = limited();
    send(&mut bridge, at(0), port(1), &plain(Mac::BROADCAST, mac(1)));
    for (to, reason) in [
        (Mac::BROADCAST, Some(Reason::StormBroadcast)),
        (Mac([1, 0, 0x5e, 1, 2, 3]), Some(Reason::StormMulticast)),
        (mac(77), Some(Reason::StormUnknown)),
        (mac(1), None),
    ] {
        let frame = plain(to, mac(2));
        let mut passed = 0;
        for _ in 0..100 {
            let sent = send(&mut bridge, at(0), port(2), &frame);
            match sent.result {
                Ok(()) => passed += 1,
                Err(other) => assert_eq!(Some(other), reason),
            }
        }
        assert_eq!(passed, if reason.is_some() { 10 } else { 100 }, "{to}");
        // Others are not held up, and a second later, it may send again.
        assert!(
            send(&mut bridge, at(0), port(1), &plain(to, mac(1))).result != Err(Reason::NoPort)
        );
    }
    let frame = plain(Mac::BROADCAST, mac(2));
    let passed = (0..100)
        .filter(|_| send(&mut bridge, at(1), port(2), &frame).result.is_ok())
        .count();
    assert_eq!(passed, 10);
    let drops = bridge.drops(Some(port(2))).expect("a port");
    assert_eq!(drops.of(Reason::StormBroadcast), 180);
}

#[test]
fn what_a_port_may_send_is_limited_in_bytes() {
    let mut bridge = bridge(1);
    let config = PortConfig {
        vni: vni(7),
        rate: Some(Rate {
            per_second: 6000,
            burst: 600,
        }),
        ..PortConfig::default()
    };
    bridge.add_port(PortId(2), config).expect("a new port");
    let frame = plain(mac(1), mac(2));
    assert_eq!(frame.len(), 60);
    let mut passed = 0;
    for ms in 0..1000 {
        let now = Duration::from_millis(ms);
        let sent = send(&mut bridge, now, port(2), &frame);
        passed += u32::from(sent.result.is_ok());
    }
    assert!((108..=110).contains(&passed), "{passed}");
}

#[test]
fn networks_may_drop_what_nobody_knows() {
    let mut bridge = bridge(2);
    let config = NetworkConfig {
        flood_unknown: false,
        ..NetworkConfig::default()
    };
    bridge.set_network(vni(7), config);
    let sent = send(&mut bridge, at(0), port(1), &plain(mac(2), mac(1)));
    assert_eq!(sent.result, Err(Reason::NoDestination));
    let sent = send(&mut bridge, at(0), port(2), &plain(mac(1), mac(2)));
    assert_eq!(sent.to(), [port(1)]);
}

#[test]
fn guests_that_send_from_all_addresses_use_no_more_room() {
    let mut bridge = bridge(1);
    for number in 0..200_000_u32 {
        let [a, b, c, d] = number.to_be_bytes();
        let frame = plain(Mac::BROADCAST, Mac([2, 1, a, b, c, d]));
        assert!(send(&mut bridge, at(0), port(1), &frame).result.is_ok());
    }
    assert_eq!((bridge.len(), bridge.learned(port(1))), (1024, 1024));
    assert!(bridge.events().count() <= 65_536);
    assert!(bridge.counts().lost > 0);
}
