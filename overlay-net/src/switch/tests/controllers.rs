//! Networks as datapaths of OpenFlow controllers.

use std::time::Duration;

use super::*;
use crate::flow::openflow::{Event, Inbox};
use crate::flow::text::{no_names, parse_flow};
use crate::switch::FailMode;

fn flow(switch: &mut Switch, text: &str) {
    let flow = parse_flow(text, &no_names).unwrap();
    let added = switch.with_datapath("blue", |datapath| {
        let now = datapath.now();
        datapath.control().add(flow, now)
    });
    added.unwrap().unwrap();
}

fn frames(inbox: &Inbox) -> Vec<(u32, Vec<u8>)> {
    let events = std::iter::from_fn(|| inbox.next());
    let packets = events.filter_map(|event| match event {
        Event::Packet(packet) => Some((packet.port.0, packet.frame.to_vec())),
        _ => None,
    });
    packets.collect()
}

fn drops(switch: &Switch, reason: Reason) -> u64 {
    switch.ports()[0].drops.of(reason)
}

#[test]
fn frames_for_controllers_wait_in_a_bounded_queue() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    flow(&mut switch, "priority=0,actions=CONTROLLER:65535");
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert_eq!(drops(&switch, Reason::NoController), 1);
    let inbox = switch.hub("blue").unwrap().join();
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert_eq!(frames(&inbox), [(1, frame(1, Mac::BROADCAST))]);
    // A controller that is slow holds nobody up.
    for _ in 0..300 {
        put(&mut switch, &a, frame(1, Mac::BROADCAST));
    }
    assert_eq!(frames(&inbox).len(), 256);
    assert_eq!(drops(&switch, Reason::Controller), 44);
    drop(inbox);
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert_eq!(drops(&switch, Reason::NoController), 2);
}

#[test]
fn controllers_send_frames_and_stay_in_their_network() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let r = plug(&mut switch, "r", "red");
    let out = |switch: &mut Switch, port: Option<u32>, actions: &str, bytes: &[u8]| {
        let flow = parse_flow(&format!("actions={actions}"), &no_names).unwrap();
        let sent = switch.with_datapath("blue", |datapath| {
            datapath.packet_out(port.map(PortId), &flow.actions, bytes);
        });
        sent.unwrap();
    };
    let sent = frame(9, Mac::BROADCAST);
    out(&mut switch, None, "output:2", &sent);
    assert_eq!((got(&a), got(&b)), (vec![], vec![sent.clone()]));
    out(&mut switch, Some(1), "FLOOD", &sent);
    assert_eq!((got(&a), got(&b)), (vec![], vec![sent.clone()]));
    out(&mut switch, None, "NORMAL", &sent);
    assert_eq!((got(&a).len(), got(&b).len()), (1, 1));
    out(&mut switch, Some(2), "IN_PORT", &sent);
    assert_eq!(got(&b).len(), 1);
    out(&mut switch, None, "output:3", &sent);
    out(&mut switch, Some(3), "NORMAL", &sent);
    out(&mut switch, None, "FLOOD", &[1; 5]);
    let long = vec![2; 65_000];
    out(&mut switch, None, "FLOOD", &long);
    assert_eq!(got(&r), Vec::<Vec<u8>>::new());
}

#[test]
fn controllers_are_told_of_ports_and_entries() {
    let mut switch = switch();
    let inbox = switch.hub("blue").unwrap().join();
    let a = plug(&mut switch, "a", "blue");
    plug(&mut switch, "r", "red");
    a.1.lock().unwrap().broken = true;
    switch.service(Some(a.0));
    flow(&mut switch, "priority=7,send_flow_rem,actions=drop");
    flow(
        &mut switch,
        "priority=8,send_flow_rem,hard_timeout=2,actions=drop",
    );
    switch.remove_flows("blue", "priority=7", true).unwrap();
    switch.tick(switch.start() + Duration::from_secs(3));
    switch.remove_port("a").unwrap();
    let told: Vec<_> = std::iter::from_fn(|| inbox.next())
        .map(|event| match event {
            Event::Port(what, port) => format!("{what} {} {}", port.name, port.unplugged),
            Event::Removed { entry, why, .. } => format!("{} {why:?}", entry.flow.priority),
            Event::Packet(_) => "a frame".to_owned(),
        })
        .collect();
    assert_eq!(
        told,
        ["0 a false", "2 a true", "7 Deleted", "8 Hard", "1 a true"]
    );
}

#[test]
fn controllers_take_ports_of_their_network_down() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let r = plug(&mut switch, "r", "red");
    let down = |switch: &mut Switch, port: PortId, down| {
        switch
            .with_datapath("blue", |datapath| datapath.set_down(port, down))
            .unwrap()
    };
    assert!(!down(&mut switch, r.0, true) && !down(&mut switch, PortId(99), true));
    assert!(down(&mut switch, b.0, true));
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    put(&mut switch, &b, frame(2, Mac::BROADCAST));
    assert_eq!((got(&a).len(), got(&b).len()), (0, 0));
    assert!(down(&mut switch, b.0, false));
    put(&mut switch, &a, frame(1, Mac::BROADCAST));
    assert_eq!(got(&b).len(), 1);
}

#[test]
fn a_network_without_its_controller_bridges_or_does_what_flows_say() {
    let mut switch = switch();
    let a = plug(&mut switch, "a", "blue");
    let b = plug(&mut switch, "b", "blue");
    let passes = |switch: &mut Switch| {
        put(switch, &a, frame(1, Mac::BROADCAST));
        !got(&b).is_empty()
    };
    let at = |switch: &mut Switch, seconds| {
        switch.tick(switch.start() + Duration::from_secs(seconds));
    };
    switch
        .set_fail_mode("blue", Some(FailMode::Standalone))
        .unwrap();
    switch.set_controllers("blue", 1).unwrap();
    flow(&mut switch, "priority=0,actions=drop");
    at(&mut switch, 60);
    assert!(!passes(&mut switch), "the controller is there");
    switch.set_controllers("blue", 0).unwrap();
    at(&mut switch, 70);
    assert!(!passes(&mut switch), "it may come back");
    at(&mut switch, 80);
    assert!(passes(&mut switch));
    switch.set_controllers("blue", 1).unwrap();
    assert!(!passes(&mut switch));
    // Secure: without the entry that all networks begin with, and for ever.
    switch
        .set_fail_mode("blue", Some(FailMode::Secure))
        .unwrap();
    switch.set_controllers("blue", 0).unwrap();
    at(&mut switch, 600);
    assert!(!passes(&mut switch));
    switch.reset_flows("blue").unwrap();
    assert_eq!(switch.dump_flows("blue"), Ok(vec![]));
    switch.set_fail_mode("blue", None).unwrap();
    switch.reset_flows("blue").unwrap();
    assert!(passes(&mut switch));
}
