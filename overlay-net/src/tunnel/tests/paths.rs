//! Ways to a peer that come, go, move, lose and shrink.

use super::super::*;
use super::net::{Faults, Net, address, numbered};
use super::{SECOND, numbers};
use crate::drops::Reason;

#[test]
fn an_address_that_changes_is_followed() {
    let mut net = Net::new(7, 2, 1);
    net.connect();
    net.run(SECOND * 2);
    for port in 1..5 {
        let moved = format!("198.51.100.{port}:{port}")
            .parse()
            .expect("an address");
        net.nodes[0].addresses[0] = moved;
        assert!(net.send(0, 1, &numbered(port, 500)));
        net.run(SECOND / 100);
        assert!(net.send(1, 0, &numbered(port, 500)), "to where it is now");
        net.run(SECOND / 100);
        assert_eq!(numbers(&mut net, 0).len() + numbers(&mut net, 1).len(), 2);
        assert_eq!(net.status(1, 0).paths[0].remote, moved);
    }
    assert_eq!(net.status(1, 0).paths.len(), 1);
}

#[test]
fn a_dead_path_is_left_within_a_second_and_comes_back() {
    let mut net = Net::new(11, 2, 2);
    net.connect();
    net.run(SECOND * 3);
    let mut number = 0;
    let mut burst = |net: &mut Net| {
        let mut got = 0;
        for flow in 0..40 {
            number += 1;
            net.seal(0, 1, flow, &numbered(number, 1000)).expect("room");
        }
        net.flush(0);
        net.run(SECOND / 50);
        got += numbers(net, 1).len();
        got
    };
    for _ in 0..20 {
        assert_eq!(burst(&mut net), 40);
    }
    let used: Vec<u64> = net
        .status(0, 1)
        .paths
        .iter()
        .map(|path| path.sent)
        .collect();
    assert!(used.iter().all(|sent| *sent > 50), "{used:?}");
    let dead = Faults {
        lost: 10_000,
        ..Faults::default()
    };
    net.on_path.insert(address(1, 0), dead);
    let start = net.now;
    while burst(&mut net) < 40 {
        assert!(net.now - start < SECOND, "still used");
    }
    for _ in 0..100 {
        assert_eq!(burst(&mut net), 40);
    }
    net.on_path.clear();
    net.run(SECOND * 5);
    let before = net.status(0, 1).paths[0].sent;
    assert_eq!(burst(&mut net), 40);
    assert!(net.status(0, 1).paths[0].sent > before);
}

#[test]
fn a_path_that_died_while_nothing_was_sent_is_left_within_a_second() {
    let mut net = Net::new(17, 2, 2);
    net.connect();
    net.run(SECOND * 20);
    let dead = Faults {
        lost: 10_000,
        ..Faults::default()
    };
    // Just after the last probe, the next one is two seconds away.
    net.on_path.insert(address(1, 1), dead);
    let (start, mut number) = (net.now, 0);
    loop {
        for flow in 0..40 {
            number += 1;
            net.seal(0, 1, flow, &numbered(number, 1000)).expect("room");
        }
        net.flush(0);
        net.run(SECOND / 50);
        if numbers(&mut net, 1).len() == 40 {
            break;
        }
        assert!(net.now - start < SECOND, "still used");
    }
}

#[test]
fn a_partition_heals() {
    for (seconds, soon) in [(20, 3), (400, 8)] {
        let mut net = Net::new(18, 2, 1);
        net.connect();
        net.faults.lost = 10_000;
        net.run(SECOND * seconds);
        assert_eq!(net.connected(0), seconds < 180);
        net.faults.lost = 0;
        net.run(SECOND * soon);
        for (from, to) in [(0, 1), (1, 0)] {
            assert!(net.send(from, to, &numbered(1, 3000)), "after {seconds} s");
            net.run(SECOND / 10);
            assert_eq!(numbers(&mut net, to).len(), 1, "after {seconds} s");
        }
    }
}

#[test]
fn what_is_for_a_peer_that_cannot_be_reached_is_dropped_and_counted_until_it_can() {
    let mut net = Net::new(19, 2, 1);
    net.connect();
    net.run(SECOND * 3);
    net.faults.lost = 10_000;
    let attempt = |net: &mut Net, number| {
        let sealed = net.seal(0, 1, 0, &numbered(number, 500));
        net.flush(0);
        net.run(SECOND / 50);
        sealed
    };
    // Until it is known, within a second and a half or so, frames go to nobody.
    let sent = (0..).take_while(|number| attempt(&mut net, *number).is_ok());
    let sent = sent.count();
    assert!((10..100).contains(&sent), "{sent}");
    for number in 0..100 {
        assert_eq!(attempt(&mut net, number), Err(Reason::NoSession));
    }
    assert!(net.connected(0), "there are keys all the same");
    net.faults.lost = 0;
    net.run(SECOND * 2);
    assert_eq!(attempt(&mut net, 7), Ok(()));
    assert_eq!(numbers(&mut net, 1).len(), 1);
}

#[test]
fn a_lossy_path_is_left_while_another_is_clean_and_loss_changes_the_mode() {
    let mut net = Net::new(12, 2, 2);
    net.connect();
    net.run(SECOND * 3);
    let lossy = Faults {
        lost: 500,
        ..Faults::default()
    };
    net.on_path.insert(address(1, 1), lossy);
    let traffic = |net: &mut Net, rounds: u64| {
        for number in 0..rounds * 40 {
            net.seal(0, 1, number as u32, &numbered(number, 1000))
                .expect("room");
            if number % 40 == 39 {
                net.flush(0);
                net.run(SECOND / 50);
            }
        }
        net.nodes[1].got.clear();
    };
    traffic(&mut net, 100);
    let status = net.status(0, 1);
    assert!(
        status.paths[1].lossy && !status.paths[0].lossy,
        "{status:?}"
    );
    assert_eq!(status.mode, Mode::Whole);
    net.on_path.insert(address(1, 0), lossy);
    traffic(&mut net, 200);
    let status = net.status(0, 1);
    assert_eq!(status.mode, Mode::PerPacket, "{status:?}");
    let lossy = status.paths.iter().filter(|path| path.lossy).count();
    assert!(lossy <= 1, "one must be left");
    net.on_path.clear();
    let again = (0..60).any(|_| {
        traffic(&mut net, 50);
        net.status(0, 1).mode == Mode::Whole
    });
    assert!(again);
}

#[test]
fn the_size_of_datagrams_is_found_and_a_black_hole_too() {
    let mut net = Net::new(13, 2, 1);
    net.faults.mtu = Some(1333);
    net.connect();
    net.run(SECOND * 10);
    let size = net.status(0, 1).paths[0].datagram;
    assert!((1325..=1333).contains(&size), "{size}");
    net.faults.mtu = Some(1250);
    let mut lost = 0;
    for number in 0..100 {
        net.send(0, 1, &numbered(number, 4000));
        net.run(SECOND / 20);
        lost = if numbers(&mut net, 1).is_empty() {
            number
        } else {
            lost
        };
    }
    assert!(lost < 40, "two seconds");
    net.run(SECOND * 5);
    let size = net.status(0, 1).paths[0].datagram;
    assert!((1242..=1250).contains(&size), "{size}");
}

#[test]
fn a_peers_paths_can_be_changed() {
    let mut net = Net::new(16, 2, 2);
    net.connect();
    net.run(SECOND * 2);
    let peer = net.peer(0, 1);
    let path = |uplink: u8, weight| PathConfig {
        uplink,
        remote: address(1, uplink.into()),
        weight,
    };
    let now = net.now;
    let tunnels = &mut net.nodes[0].tunnels;
    assert!(tunnels.set_paths(now, peer, &[path(1, 3)]));
    let status = net.status(0, 1);
    assert_eq!((status.paths.len(), status.paths[0].up), (1, true));
    for number in 0..10 {
        assert!(net.seal(0, 1, number, &numbered(number.into(), 60)).is_ok());
    }
    net.flush(0);
    assert_eq!(net.status(0, 1).paths[0].sent, 1);
    let tunnels = &mut net.nodes[0].tunnels;
    assert!(tunnels.set_paths(now, peer, &[path(0, 1), path(1, 3)]));
    net.run(SECOND);
    assert_eq!(numbers(&mut net, 1).len(), 10);
    assert!(net.status(0, 1).paths.iter().all(|path| path.up));
    let tunnels = &mut net.nodes[0].tunnels;
    assert!(!tunnels.set_paths(now, PeerId(9), &[]));
}
