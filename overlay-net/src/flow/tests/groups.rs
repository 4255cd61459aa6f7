//! Security groups and connections.

use super::super::groups::{self, BadRule, Direction, Group, Groups, Remote, Rule, Verdict};
use super::*;
use crate::frame::key::ethertype;
use std::net::IpAddr;

const PORT: PortId = PortId(5);

fn second(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn rule(direction: Direction, protocol: u8, ports: Option<(u16, u16)>, remote: Remote) -> Rule {
    Rule {
        direction,
        protocol: (protocol != 0).then_some(protocol),
        ports,
        remote,
    }
}

fn groups(rules: Vec<Rule>) -> Groups {
    let group = Group { rules };
    Groups {
        generation: 1,
        groups: [("web".to_owned(), group)].into(),
        ports: [(PORT, vec!["web".to_owned()])].into(),
        ..Groups::default()
    }
}

/// A packet from 10.0.0.`from` to 10.0.0.`to`.
fn between(from: u8, to: u8, proto: u8, transport: &[u8]) -> Vec<u8> {
    let mut packet = ip(false, proto, transport, 0);
    packet[12..20].copy_from_slice(&[10, 0, 0, from, 10, 0, 0, to]);
    ethernet(ethertype::IPV4, &packet)
}

fn segment(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut bytes = tcp(flags);
    bytes[..2].copy_from_slice(&from.to_be_bytes());
    bytes[2..4].copy_from_slice(&to.to_be_bytes());
    bytes
}

fn datagram(from: u16, to: u16) -> Vec<u8> {
    let [a, b] = from.to_be_bytes();
    let [c, d] = to.to_be_bytes();
    vec![a, b, c, d, 0, 8, 0, 0]
}

struct World {
    groups: Groups,
    connections: Connections,
    now: Duration,
}

impl World {
    fn new(rules: Vec<Rule>) -> Self {
        Self {
            groups: groups(rules),
            connections: Connections::new(6400, 50),
            now: second(1),
        }
    }

    fn check(&self, direction: Direction, bytes: &[u8]) -> Verdict {
        let (key, layers) = parse(bytes, bytes.len(), PORT, Vni::default()).expect("sound");
        let frame = (&key, layers, bytes);
        self.groups
            .check(self.now, &self.connections, frame, direction, PORT)
    }

    fn passes(&self, direction: Direction, bytes: &[u8]) -> bool {
        self.check(direction, bytes) == Verdict::Pass
    }
}

use Direction::{In, Out};

const GROUP: Verdict = Verdict::Drop(Reason::Group);
const NONE: Verdict = Verdict::Drop(Reason::NoConnection);

fn web() -> World {
    World::new(vec![rule(In, 6, Some((80, 80)), Remote::Any)])
}

#[test]
fn a_connection_that_is_let_in_is_answered() {
    let world = web();
    let (to, from) = (
        |flags| between(9, 5, 6, &segment(4000, 80, flags)),
        |flags| between(5, 9, 6, &segment(80, 4000, flags)),
    );
    assert_eq!(world.check(Out, &from(18)), NONE, "nobody asked");
    assert_eq!(world.check(In, &to(16)), NONE, "not begun");
    assert!(world.passes(In, &to(2)));
    assert!(world.passes(Out, &from(18)));
    assert!(world.passes(In, &to(16)) && world.passes(Out, &from(24)));
    assert_eq!(
        world.check(In, &between(9, 5, 6, &segment(4000, 81, 2))),
        GROUP
    );
    assert_eq!(
        world.check(Out, &between(5, 9, 6, &segment(4001, 80, 2))),
        GROUP,
        "not out"
    );
    // Both have ended: another may begin, if the rules let it.
    assert!(world.passes(In, &to(17)) && world.passes(Out, &from(17)) && world.passes(In, &to(16)));
    assert_eq!(
        world.check(Out, &between(5, 9, 6, &segment(80, 4000, 2))),
        GROUP
    );
    assert!(world.passes(In, &to(2)));
    assert!(world.passes(Out, &from(20)), "refused");
    assert_eq!(world.check(In, &to(16)), NONE);
}

#[test]
fn connections_end_with_time() {
    let mut world = World::new(vec![rule(Out, 17, None, Remote::Any)]);
    let (ask, answer) = (
        between(5, 9, 17, &datagram(1000, 53)),
        between(9, 5, 17, &datagram(53, 1000)),
    );
    assert_eq!(world.check(In, &answer), GROUP);
    assert!(world.passes(Out, &ask) && world.passes(In, &answer));
    world.now = second(170);
    assert!(world.passes(In, &answer));
    world.now = second(360);
    assert_eq!(world.check(In, &answer), GROUP);
}

#[test]
fn errors_about_a_connection_pass_and_others_do_not() {
    let world = World::new(vec![rule(Out, 17, None, Remote::Any)]);
    let ask = between(5, 9, 17, &datagram(1000, 33434));
    let error = |about: &[u8]| {
        let icmp = [&[11, 0, 0, 0, 0, 0, 0, 0][..], &about[14..]].concat();
        between(77, 5, 1, &icmp)
    };
    assert_eq!(world.check(In, &error(&ask)), NONE);
    assert!(world.passes(Out, &ask));
    assert!(world.passes(In, &error(&ask)));
    let other = between(5, 9, 17, &datagram(1000, 33435));
    assert_eq!(world.check(In, &error(&other)), NONE);
    let redirect = [&[5, 0, 0, 0, 0, 0, 0, 0][..], &ask[14..]].concat();
    assert_eq!(world.check(In, &between(77, 5, 1, &redirect)), NONE);
    for len in 0..28 {
        let cut = [&[11, 0, 0, 0, 0, 0, 0, 0][..], &ask[14..14 + len]].concat();
        let bytes = between(77, 5, 1, &cut);
        assert_eq!(world.passes(In, &bytes), len >= 24, "{len} bytes of it");
    }
}

#[test]
fn an_echo_is_answered_and_only_answered() {
    let world = World::new(vec![rule(Out, 1, None, Remote::Any)]);
    let echo = |kind: u8, id: u8| [kind, 0, 0, 0, 0, id, 0, 1];
    assert!(world.passes(Out, &between(5, 9, 1, &echo(8, 7))));
    assert!(world.passes(In, &between(9, 5, 1, &echo(0, 7))));
    assert_eq!(world.check(In, &between(9, 5, 1, &echo(0, 8))), NONE);
    assert_eq!(world.check(Out, &between(5, 9, 1, &echo(0, 7))), NONE);
    assert_eq!(world.check(In, &between(8, 5, 1, &echo(8, 9))), GROUP);
}

#[test]
fn later_fragments_follow_a_first_one() {
    let world = World::new(vec![rule(In, 17, Some((53, 53)), Remote::Any)]);
    let fragment = |high: u8, low: u8| {
        let mut bytes = between(9, 5, 17, &datagram(1000, 53));
        bytes[20..22].copy_from_slice(&[high, low]);
        bytes
    };
    assert_eq!(world.check(In, &fragment(0, 185)), NONE);
    assert!(world.passes(In, &fragment(0x20, 0)));
    assert!(world.passes(In, &fragment(0, 185)));
}

#[test]
fn remote_networks_and_groups_are_looked_at() {
    let network = |text: &str, prefix| Remote::Network {
        address: text.parse().expect("an address"),
        prefix,
    };
    let syn = |from| between(from, 5, 6, &segment(4000, 80, 2));
    let world = World::new(vec![rule(In, 6, None, network("10.0.0.8", 30))]);
    assert!(world.passes(In, &syn(9)) && world.passes(In, &syn(11)));
    assert_eq!(world.check(In, &syn(12)), GROUP);
    let mut world = World::new(vec![rule(In, 0, None, Remote::Group("db".into()))]);
    assert_eq!(
        world.check(In, &syn(9)),
        GROUP,
        "an unknown group has no members"
    );
    let members = [IpAddr::from([10, 0, 0, 9])].into();
    world.groups.members.insert("db".into(), members);
    assert!(world.passes(In, &syn(9)));
    assert_eq!(world.check(In, &syn(8)), GROUP);
}

#[test]
fn what_is_not_known_is_closed_but_for_discovery() {
    let mut world = web();
    let syn = between(9, 5, 6, &segment(4000, 80, 2));
    world
        .groups
        .ports
        .insert(PORT, vec!["web".into(), "gone".into()]);
    assert_eq!(world.check(In, &syn), GROUP);
    world.groups.ports.clear();
    assert_eq!(world.check(In, &syn), GROUP);
    assert_eq!(world.check(Out, &ethernet(0x88b5, &[0; 50])), GROUP);
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.resize(28, 1);
    assert!(world.passes(Out, &ethernet(ethertype::ARP, &arp)));
    let icmp6 = |kind| {
        let transport = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &[9; 16]].concat();
        ethernet(ethertype::IPV6, &ip(true, 58, &transport, 2))
    };
    assert!(world.passes(In, &icmp6(135)) && world.passes(In, &icmp6(134)));
    assert_ne!(
        world.check(Out, &icmp6(134)),
        Verdict::Pass,
        "a guest is no router"
    );
}

#[test]
fn rules_that_change_judge_connections_again() {
    let mut world = web();
    let syn = between(9, 5, 6, &segment(4000, 80, 2));
    let answer = between(5, 9, 6, &segment(80, 4000, 18));
    assert!(world.passes(In, &syn) && world.passes(Out, &answer));
    world.groups.generation = 2;
    assert!(world.passes(Out, &answer), "still let in");
    world.groups = groups(vec![]);
    world.groups.generation = 3;
    assert_eq!(world.check(Out, &answer), GROUP);
    assert!(world.connections.is_empty());
}

#[test]
fn where_there_is_no_room_established_connections_stay() {
    let mut world = web();
    let syn = |from: u16| between(9, 5, 6, &segment(from, 80, 2));
    for from in 0..50 {
        assert!(world.passes(In, &syn(from)));
    }
    assert_eq!(
        world.check(In, &syn(50)),
        Verdict::Drop(Reason::Connections)
    );
    assert!(world.passes(Out, &between(5, 9, 6, &segment(80, 7, 18))));
    assert!(world.passes(In, &between(9, 5, 6, &segment(7, 80, 16))));
    // What is only half open goes with time.
    world.now = second(100);
    let passed = (100..400)
        .filter(|from| world.passes(In, &syn(*from)))
        .count();
    assert!(passed >= 10, "{passed}");
    assert!(world.passes(In, &between(9, 5, 6, &segment(7, 80, 16))));
    assert!(world.connections.len() <= 50);
    groups::forget(&world.connections, PORT);
    assert!(world.connections.is_empty());
}

#[test]
fn connections_of_a_guest_that_has_come_go_on_if_rules_let_them_begin() {
    let mut there = web();
    let (answer, other) = (
        between(5, 9, 6, &segment(80, 4000, 16)),
        between(9, 5, 6, &segment(4000, 81, 16)),
    );
    there.groups.came.insert(PortId(PORT.0 + 1), second(120));
    assert_eq!(there.check(Out, &answer), NONE, "it is another one's");
    there.groups.came.insert(PORT, second(120));
    assert!(there.passes(Out, &answer));
    assert_eq!(there.check(In, &other), NONE);
    // Answers of ICMP to who may ask, and to nobody else.
    let (ping, pong) = (
        between(9, 5, 1, &[8, 0, 0, 0, 0, 0, 0, 0]),
        between(5, 9, 1, &[0; 8]),
    );
    assert_eq!(there.check(Out, &pong), NONE, "who may not ask");
    let mut rules = vec![rule(In, 1, None, Remote::Any)];
    rules.push(rule(Out, 1, None, Remote::Any));
    there
        .groups
        .groups
        .values_mut()
        .for_each(|group| group.rules.append(&mut rules));
    assert!(there.passes(Out, &pong) && there.passes(In, &ping) && there.passes(Out, &pong));
    there.now = second(121);
    let late = between(9, 5, 6, &segment(4001, 80, 16));
    assert_eq!(there.check(In, &late), NONE);
}

#[test]
fn connections_of_before_a_restart_go_on_for_a_while_if_rules_let_them_begin() {
    let mut world = web();
    let to = |flags| between(9, 5, 6, &segment(4000, 80, flags));
    let from = |flags| between(5, 9, 6, &segment(80, 4000, flags));
    world.groups.adopts = second(120);
    // Whoever of the two is heard first.
    assert!(world.passes(Out, &from(16)) && world.passes(In, &to(24)));
    assert!(world.passes(In, &between(9, 5, 6, &segment(4001, 80, 16))));
    assert_eq!(
        world.check(In, &between(9, 5, 6, &segment(4002, 81, 16))),
        NONE
    );
    assert_eq!(
        world.check(Out, &between(5, 9, 6, &segment(81, 4002, 16))),
        NONE
    );
    // A new one is one that begins, and what begins nothing else is none.
    assert_eq!(
        world.check(Out, &between(5, 9, 6, &segment(80, 4003, 2))),
        GROUP
    );
    assert_eq!(
        world.check(Out, &between(5, 9, 6, &segment(80, 4003, 18))),
        NONE
    );
    assert_eq!(
        world.check(Out, &between(5, 9, 6, &segment(80, 4003, 4))),
        NONE
    );
    world.now = second(121);
    assert_eq!(
        world.check(In, &between(9, 5, 6, &segment(4004, 80, 16))),
        NONE
    );
    assert!(world.passes(Out, &from(16)), "what was taken over is there");
}

#[test]
fn rules_that_make_no_sense_are_told() {
    let port = |protocol, ports| rule(In, protocol, Some(ports), Remote::Any).check();
    assert_eq!(port(6, (80, 80)), Ok(()));
    for (protocol, ports) in [(0, (80, 80)), (1, (80, 80)), (6, (81, 80)), (17, (0, 80))] {
        assert_eq!(port(protocol, ports), Err(BadRule::Ports));
    }
    let prefix = |text: &str, prefix| {
        let address = text.parse().expect("an address");
        rule(In, 0, None, Remote::Network { address, prefix }).check()
    };
    assert_eq!(
        (prefix("10.0.0.0", 32), prefix("fd00::", 128)),
        (Ok(()), Ok(()))
    );
    assert_eq!(prefix("10.0.0.0", 33), Err(BadRule::Prefix));
    assert_eq!(prefix("fd00::", 129), Err(BadRule::Prefix));
}
