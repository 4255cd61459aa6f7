//! Security groups at ports.

use super::*;
use crate::api::moving::Whereabouts;
use crate::api::types::{Direction, PortSpec, Remote, Rule};
use crate::switch::Error;

/// A TCP segment between 10.0.0.`from` and 10.0.0.`to`, whose MAC addresses end
/// so, too.
fn tcp(from: (u8, u16), to: (u8, u16), flags: u8) -> Vec<u8> {
    let mut bytes = frame(from.0, Mac([2, 0, 0, 0, 0, to.0]));
    bytes[12..14].copy_from_slice(&[8, 0]);
    let ip = [
        0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, from.0, 10, 0, 0, to.0,
    ];
    bytes[14..34].copy_from_slice(&ip);
    bytes[34..36].copy_from_slice(&from.1.to_be_bytes());
    bytes[36..38].copy_from_slice(&to.1.to_be_bytes());
    bytes[38..54].fill(0);
    (bytes[46], bytes[47]) = (0x50, flags);
    bytes.truncate(54);
    bytes
}

const SYN: u8 = 2;
const ACK: u8 = 16;

fn ingress(port: u16, remote: Remote) -> Rule {
    Rule {
        direction: Direction::In,
        protocol: Some(6),
        ports: Some((port, port)),
        remote,
    }
}

/// A port with 10.0.0.`number` attached.
fn member(switch: &mut Switch, name: &str, number: u8, groups: &[&str]) -> (PortId, Ends) {
    let (wire, port) = end();
    let mut spec = spec("blue");
    spec.bridge.macs = vec![Mac([2, 0, 0, 0, 0, number])];
    spec.bridge.ips = vec![[10, 0, 0, number].into()];
    spec.groups = groups.iter().map(|&name| name.to_owned()).collect();
    let status = switch.add_port(name, spec, Ok(port));
    (status.unwrap().id, wire)
}

fn passes(switch: &mut Switch, from: &(PortId, Ends), to: &(PortId, Ends), bytes: Vec<u8>) -> bool {
    let sent = bytes.clone();
    put(switch, from, bytes);
    match &got(to)[..] {
        [] => false,
        [one] => {
            assert_eq!(*one, sent);
            true
        }
        more => panic!("{more:?}"),
    }
}

fn dropped(switch: &Switch, port: &str, reason: Reason) -> u64 {
    let ports = switch.ports();
    let port = ports.iter().find(|one| one.name == port).unwrap();
    port.drops.of(reason)
}

#[test]
fn what_rules_let_begin_passes_with_its_answers_and_all_else_is_counted() {
    let mut switch = switch();
    switch
        .add_group("web", vec![ingress(80, Remote::Any)])
        .unwrap();
    let a = member(&mut switch, "a", 1, &[]);
    let w = member(&mut switch, "w", 2, &["web"]);
    let switch = &mut switch;
    assert!(!passes(switch, &a, &w, tcp((1, 4000), (2, 81), SYN)));
    assert_eq!(dropped(switch, "w", Reason::Group), 1);
    assert!(!passes(switch, &w, &a, tcp((2, 80), (1, 4000), SYN | ACK)));
    assert_eq!(dropped(switch, "w", Reason::NoConnection), 1);
    assert!(passes(switch, &a, &w, tcp((1, 4000), (2, 80), SYN)));
    assert!(passes(switch, &w, &a, tcp((2, 80), (1, 4000), SYN | ACK)));
    assert!(passes(switch, &a, &w, tcp((1, 4000), (2, 80), ACK)));
    assert!(
        !passes(switch, &w, &a, tcp((2, 4000), (1, 80), SYN)),
        "not out"
    );
    // The rule goes: so does what it let through.
    switch
        .remove_rule("web", &ingress(80, Remote::Any))
        .unwrap();
    assert!(!passes(switch, &a, &w, tcp((1, 4000), (2, 80), ACK)));
    assert_eq!(
        switch.remove_rule("web", &ingress(80, Remote::Any)),
        Err(Error::NoRule("web".to_owned()))
    );
    // Out of all groups, nothing is filtered.
    switch.set_port_groups("w", vec![]).unwrap();
    assert!(passes(switch, &a, &w, tcp((1, 4000), (2, 9), ACK)));
}

#[test]
fn a_group_that_has_gone_closes_its_ports() {
    let mut switch = switch();
    switch
        .add_group("web", vec![ingress(80, Remote::Any)])
        .unwrap();
    let a = member(&mut switch, "a", 1, &[]);
    let w = member(&mut switch, "w", 2, &["web"]);
    let switch = &mut switch;
    assert!(passes(switch, &a, &w, tcp((1, 4000), (2, 80), SYN)));
    assert_eq!(
        switch.remove_group("web", false),
        Err(Error::GroupInUse("web".to_owned(), 1))
    );
    switch.remove_group("web", true).unwrap();
    assert!(!passes(switch, &a, &w, tcp((1, 4000), (2, 80), ACK)));
    assert!(!passes(switch, &a, &w, tcp((1, 4001), (2, 80), SYN)));
    let groups = switch.groups();
    assert_eq!((groups.len(), &groups[0].rules), (1, &None));
    // A port that comes and names it is closed, too.
    let v = member(switch, "v", 3, &["web"]);
    assert!(!passes(switch, &a, &v, tcp((1, 4000), (3, 80), SYN)));
    switch
        .add_group("web", vec![ingress(80, Remote::Any)])
        .unwrap();
    assert!(passes(switch, &a, &v, tcp((1, 4000), (3, 80), SYN)));
}

#[test]
fn members_of_a_group_are_those_of_the_same_network() {
    let mut switch = switch();
    let rule = ingress(80, Remote::Group("front".to_owned()));
    switch.add_group("web", vec![rule]).unwrap();
    let out = Rule {
        direction: Direction::Out,
        protocol: None,
        ports: None,
        remote: Remote::Any,
    };
    switch.add_group("front", vec![out]).unwrap();
    let a = member(&mut switch, "a", 1, &["front"]);
    let b = member(&mut switch, "b", 3, &[]);
    let w = member(&mut switch, "w", 2, &["web"]);
    // It has b's address, elsewhere.
    let mut other = spec("red");
    other.bridge.macs = vec![Mac([2, 0, 0, 0, 0, 9])];
    other.bridge.ips = vec![[10, 0, 0, 3].into()];
    other.groups = vec!["front".to_owned()];
    switch.add_port("r", other, Err(String::new())).unwrap();
    let switch = &mut switch;
    assert!(passes(switch, &a, &w, tcp((1, 4000), (2, 80), SYN)));
    assert!(!passes(switch, &b, &w, tcp((3, 4000), (2, 80), SYN)));
    switch
        .set_port_groups("b", vec!["front".to_owned()])
        .unwrap();
    assert!(passes(switch, &b, &w, tcp((3, 4000), (2, 80), SYN)));
    // Who leaves it is let in no more, and what it has begun ends.
    switch.remove_port("a").unwrap();
    let a = member(switch, "a", 1, &[]);
    assert!(!passes(switch, &a, &w, tcp((1, 4000), (2, 80), ACK)));
}

#[test]
fn no_flow_leads_around_groups() {
    let mut switch = switch();
    switch.add_group("shut", vec![]).unwrap();
    let a = member(&mut switch, "a", 1, &[]);
    let s = member(&mut switch, "s", 2, &["shut"]);
    let switch = &mut switch;
    for to in ["output:s", "mirror:s", "FLOOD", "ALL", "NORMAL"] {
        switch.add_flow("blue", &format!("actions={to}")).unwrap();
        assert!(
            !passes(switch, &a, &s, tcp((1, 4000), (2, 80), SYN)),
            "{to}"
        );
    }
    switch.add_flow("blue", "actions=output:a").unwrap();
    assert!(!passes(switch, &s, &a, tcp((2, 4000), (1, 80), SYN)));
}

#[test]
fn groups_and_connections_go_where_a_guest_goes() {
    let mut switch = switch();
    switch
        .add_group("web", vec![ingress(80, Remote::Any)])
        .unwrap();
    let a = member(&mut switch, "a", 1, &[]);
    let w = member(&mut switch, "w", 2, &["web"]);
    let switch = &mut switch;
    assert!(passes(switch, &a, &w, tcp((1, 4000), (2, 80), SYN)));
    assert!(passes(switch, &w, &a, tcp((2, 80), (1, 4000), SYN | ACK)));
    let offer = switch.offer("w").unwrap();
    assert_eq!(offer.groups, ["web"]);
    assert_eq!(offer.rules["web"], [ingress(80, Remote::Any)]);
    assert_eq!(offer.bridge.macs, [Mac([2, 0, 0, 0, 0, 2])]);
    // Another monitor on the same node.
    let (wire, port) = end();
    let spec = PortSpec {
        bridge: offer.bridge,
        groups: offer.groups,
        ..spec("blue")
    };
    let from = Whereabouts::Port("w".to_owned());
    let status = switch.expect("w2", spec, (&from, 0), Ok(port));
    let w2 = (status.unwrap().id, wire);
    switch.arrived("w2").unwrap();
    switch.remove_port("w").unwrap();
    assert!(passes(switch, &a, &w2, tcp((1, 4000), (2, 80), ACK)));
    assert!(!passes(switch, &a, &w2, tcp((1, 4000), (2, 81), ACK)));
    assert!(!passes(switch, &a, &w2, tcp((1, 4000), (2, 81), SYN)));
}
