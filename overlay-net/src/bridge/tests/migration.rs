//! A guest moves from this node (1) to another (2), with a third in play.

use super::*;

const GUEST: u8 = 50;

/// Two nodes' bridges, of which the first has the guest on port 5; each has a
/// station on port 1. Nodes of both: 1 (the first itself), 2, 3.
struct Nodes {
    source: Bridge,
    destination: Bridge,
}

fn config() -> PortConfig {
    PortConfig {
        vni: vni(7),
        macs: vec![mac(GUEST)],
        guard: true,
        ..PortConfig::default()
    }
}

fn station() -> Station {
    Station {
        vni: vni(7),
        vlan: Vlan::NONE,
        mac: mac(GUEST),
    }
}

fn located(at: u64) -> Located {
    Located {
        node: NodeId(at),
        attached: true,
        isolated: false,
        ips: Vec::new(),
    }
}

fn nodes() -> Nodes {
    let (mut source, mut destination) = (bridge(1), bridge(1));
    source.set_node(NodeId(3), NodeConfig::default());
    destination.set_node(NodeId(3), NodeConfig::default());
    source.add_port(PortId(5), config()).expect("a new port");
    destination.locate(at(0), station(), Some(&located(1)));
    Nodes {
        source,
        destination,
    }
}

fn numbered(number: u8) -> Vec<u8> {
    let mut frame = plain(mac(GUEST), mac(1));
    frame[20] = number;
    frame
}

#[test]
fn frames_follow_a_guest_in_order_and_once() {
    let Nodes {
        mut source,
        mut destination,
    } = nodes();
    destination
        .prepare_port(PortId(5), config())
        .expect("a new port");
    let mut arrived = Vec::new();

    // It still runs at the source: those there and elsewhere reach it there.
    assert_eq!(
        send(&mut destination, at(1), port(1), &numbered(0)).to(),
        [node(1)]
    );
    assert_eq!(
        send(&mut source, at(1), node(3), &numbered(1)).to(),
        [port(5)]
    );
    // Frames to all reach it there too, and do not wait here.
    let all = plain(Mac::BROADCAST, mac(9));
    assert_eq!(
        send(&mut source, at(1), node(3), &all).to(),
        [port(1), port(5)]
    );
    assert_eq!(send(&mut destination, at(1), node(3), &all).to(), [port(1)]);

    source.depart(PortId(5), node(2)).expect("it is there");
    for number in 2..=4 {
        assert_eq!(
            send(&mut source, at(2), node(3), &numbered(number)).to(),
            [node(2)]
        );
        let sent = send(&mut destination, at(2), node(1), &numbered(number));
        assert_eq!((sent.to(), sent.out.held), (vec![], true));
    }
    // Also those of stations at the source, and of those at the destination,
    // who think it is at the source.
    assert_eq!(
        send(&mut source, at(2), port(1), &numbered(5)).to(),
        [node(2)]
    );
    assert_eq!(
        send(&mut source, at(2), node(2), &numbered(5)).to(),
        [node(2)]
    );
    assert!(
        send(&mut destination, at(2), node(1), &numbered(5))
            .out
            .held
    );
    assert_eq!(send(&mut source, at(2), node(3), &all).to(), [port(1)]);
    // What it had left to send goes out.
    let left = plain(Mac::BROADCAST, mac(GUEST));
    assert!(send(&mut source, at(2), port(5), &left).result.is_ok());

    let held = destination.activate(PortId(5)).expect("it is there");
    arrived.extend(held.iter().map(|held| held.bytes[20]));
    assert_eq!(held[0].bytes, numbered(2));
    // The source hears of it from the directory, others later.
    assert_eq!(
        send(&mut source, at(3), node(3), &numbered(6)).to(),
        [node(2)]
    );
    source.locate(at(3), station(), Some(&located(2)));
    assert_eq!(
        send(&mut source, at(3), node(3), &numbered(7)).to(),
        [node(2)]
    );
    source.remove_port(at(4), PortId(5)).expect("it is there");
    assert_eq!(
        send(&mut source, at(4), node(3), &numbered(8)).to(),
        [node(2)]
    );
    for number in 6..=8 {
        assert_eq!(
            send(&mut destination, at(4), node(1), &numbered(number)).to(),
            [port(5)]
        );
        arrived.push(number);
    }
    assert_eq!(arrived, [2, 3, 4, 5, 6, 7, 8]);
    assert!(
        destination
            .activate(PortId(5))
            .expect("it is there")
            .is_empty()
    );
    assert_eq!(
        send(&mut destination, at(4), port(1), &numbered(9)).to(),
        [port(5)]
    );

    // One that still asks the source after a minute is not served any more,
    // nor is a frame ever sent back.
    let sent = send(&mut source, at(4), node(2), &numbered(9));
    assert_eq!(sent.result, Err(Reason::SplitHorizon));
    let sent = send(&mut source, at(64), node(3), &numbered(9));
    assert_eq!(sent.result, Err(Reason::SplitHorizon));
    assert_eq!(
        send(&mut source, at(64), port(1), &numbered(9)).to(),
        [node(2)]
    );
}

#[test]
fn a_source_that_forgets_the_port_first_still_sends_frames_on() {
    let Nodes { mut source, .. } = nodes();
    source.depart(PortId(5), node(2)).expect("it is there");
    source.remove_port(at(1), PortId(5)).expect("it is there");
    assert_eq!(
        send(&mut source, at(2), node(3), &numbered(0)).to(),
        [node(2)]
    );
    assert_eq!(
        send(&mut source, at(2), port(1), &numbered(0)).to(),
        [node(2)]
    );
}

#[test]
fn a_migration_that_fails_leaves_the_guest_where_it_is() {
    let Nodes {
        mut source,
        mut destination,
    } = nodes();
    destination
        .prepare_port(PortId(5), config())
        .expect("a new port");
    source.depart(PortId(5), node(2)).expect("it is there");
    assert_eq!(
        send(&mut source, at(1), node(3), &numbered(0)).to(),
        [node(2)]
    );
    source.activate(PortId(5)).expect("it is there");
    destination
        .remove_port(at(1), PortId(5))
        .expect("it is there");
    assert_eq!(
        send(&mut source, at(1), node(3), &numbered(0)).to(),
        [port(5)]
    );
    assert_eq!(
        send(&mut destination, at(1), port(1), &numbered(0)).to(),
        [node(1)]
    );
    // A frame that was on its way is lost, not sent round.
    let sent = send(&mut destination, at(1), node(1), &numbered(0));
    assert_eq!(sent.result, Err(Reason::SplitHorizon));
}

#[test]
fn what_waits_is_bounded() {
    let Nodes {
        mut destination, ..
    } = nodes();
    destination
        .prepare_port(PortId(5), config())
        .expect("a new port");
    let held = (0..5000)
        .filter(|_| {
            send(&mut destination, at(1), node(1), &numbered(0))
                .result
                .is_ok()
        })
        .count();
    assert_eq!(held, 4096);
    let drops = destination.drops(Some(node(1))).expect("a node");
    assert_eq!(drops.of(Reason::HoldFull), 5000 - 4096);
    assert_eq!(
        destination.activate(PortId(5)).expect("it is there").len(),
        4096
    );
    // A prepared port sends nothing.
    destination
        .prepare_port(
            PortId(6),
            PortConfig {
                vni: vni(7),
                ..PortConfig::default()
            },
        )
        .expect("a new port");
    let sent = send(&mut destination, at(1), port(6), &numbered(0));
    assert_eq!(sent.result, Err(Reason::Down));
}

#[test]
fn a_guest_moves_to_another_port_of_its_switch() {
    let mut bridge = bridge(1);
    bridge.add_port(PortId(5), config()).expect("a new port");
    assert!(bridge.prepare_port(PortId(6), config()).is_err());
    bridge
        .prepare_after(PortId(6), config(), PortId(5))
        .expect("the same addresses");
    assert_eq!(
        send(&mut bridge, at(1), port(1), &numbered(0)).to(),
        [port(5)]
    );
    bridge.depart(PortId(5), port(6)).expect("it is there");
    for number in 1..=3 {
        let sent = send(&mut bridge, at(2), port(1), &numbered(number));
        assert_eq!((sent.to(), sent.out.held), (vec![], true));
    }
    let held = bridge.activate(PortId(6)).expect("it is there");
    let held: Vec<u8> = held.iter().map(|held| held.bytes[20]).collect();
    assert_eq!(held, [1, 2, 3]);
    for _ in 0..2 {
        assert_eq!(
            send(&mut bridge, at(3), port(1), &numbered(4)).to(),
            [port(6)]
        );
        // Whether or not the old one is still there.
        let _ = bridge.remove_port(at(3), PortId(5));
    }
    // One that goes on where it was.
    bridge
        .prepare_after(PortId(7), config(), PortId(6))
        .expect("the same addresses");
    bridge.depart(PortId(6), port(7)).expect("it is there");
    assert!(send(&mut bridge, at(4), port(1), &numbered(5)).out.held);
    bridge.remove_port(at(4), PortId(7)).expect("it is there");
    let sent = send(&mut bridge, at(4), port(1), &numbered(6));
    assert_eq!(sent.result, Err(Reason::Down));
    bridge.activate(PortId(6)).expect("it is there");
    assert_eq!(
        send(&mut bridge, at(4), port(1), &numbered(7)).to(),
        [port(6)]
    );
}
