//! The codec and sessions, without a wire.

use std::time::Duration;

use proptest::prelude::*;

use super::actions::{read_instructions, write_instructions};
use super::oxm::{read_match, write_match};
use super::wire::{Put, Reader};
use super::*;
use crate::flow::control::Filter;
use crate::flow::text::{no_names, parse_flow};

#[derive(Default)]
struct Switch {
    control: Control,
    out: usize,
}

impl Datapath for Switch {
    fn now(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn id(&self) -> u64 {
        1
    }

    fn description(&self) -> Description {
        Description::default()
    }

    fn ports(&self) -> Vec<PortInfo> {
        vec![PortInfo {
            id: PortId(1),
            ..PortInfo::default()
        }]
    }

    fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    fn packet_out(&mut self, _: Option<PortId>, _: &[Action], _: &[u8]) {
        self.out += 1;
    }

    fn set_down(&mut self, _: PortId, _: bool) -> bool {
        true
    }
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut to = Vec::new();
    to.u8(VERSION).u8(kind).u16(0).u32(9).bytes(body);
    to.length(0, 2);
    to
}

/// The kinds of messages in `bytes`, with an error's type and code.
fn kinds(mut bytes: &[u8]) -> Vec<(u8, Option<(u16, u16)>)> {
    let mut kinds = Vec::new();
    while let [_, kind, high, low, ..] = *bytes {
        let len = usize::from(u16::from_be_bytes([high, low]));
        let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        kinds.push((kind, (kind == kind::ERROR).then(|| (word(8), word(10)))));
        bytes = &bytes[len..];
    }
    kinds
}

fn greeted(switch: &mut Switch) -> Session {
    let mut session = Session::new();
    session
        .on_bytes(&message(kind::HELLO, &[]), switch)
        .expect("a hello");
    session.sent(usize::MAX);
    session
}

fn flow_mod(command: u8, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut to = Vec::new();
    to.u64(0).u64(0).u8(0).u8(command).u16(0).u16(0).u16(7);
    to.u32(u32::MAX).u32(u32::MAX).u32(u32::MAX).u16(flags);
    to.zeros(2).bytes(body);
    message(kind::FLOW_MOD, &to)
}

/// A match on everything.
const ANY: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

#[test]
fn versions_are_negotiated() {
    let mut switch = Switch::default();
    let hello = |version: u8, body: &[u8]| {
        let mut hello = message(kind::HELLO, body);
        hello[0] = version;
        hello
    };
    let bitmap = |bits: u32| [&[0, 1, 0, 8][..], &bits.to_be_bytes()].concat();
    for (version, body, sound) in [
        (4, vec![], true),
        (6, vec![], true),
        (1, vec![], false),
        (6, bitmap(0x10), true),
        (1, bitmap(0x12), true),
        (6, bitmap(0x62), false),
    ] {
        let mut session = Session::new();
        let result = session.on_bytes(&hello(version, &body), &mut switch);
        assert_eq!(result.is_ok(), sound, "{version} {body:?}");
        let wrong = kinds(session.output()).contains(&(kind::ERROR, Some((0, 0))));
        assert_eq!(wrong, !sound);
    }
    let mut session = Session::new();
    let result = session.on_bytes(b"GET / HTTP/1.1\r\n\r\n", &mut switch);
    assert!(result.is_ok(), "a long message, as far as can be told");
    let mut session = Session::new();
    let early = session.on_bytes(&message(kind::BARRIER, &[]), &mut switch);
    assert_eq!(early, Err(Fatal::Garbage));
}

#[test]
fn messages_are_taken_byte_by_byte_and_answered() {
    let mut switch = Switch::default();
    let mut session = greeted(&mut switch);
    let all = [
        message(kind::ECHO, b"hello"),
        message(kind::FEATURES, &[]),
        message(kind::GET_CONFIG, &[]),
        flow_mod(0, 0, &ANY),
        message(kind::BARRIER, &[]),
        message(99, &[]),
    ];
    for byte in all.concat() {
        session.on_bytes(&[byte], &mut switch).expect("sound");
    }
    let answers = [
        (kind::ECHO_REPLY, None),
        (kind::FEATURES_REPLY, None),
        (kind::GET_CONFIG_REPLY, None),
        (kind::BARRIER_REPLY, None),
        (kind::ERROR, Some((1, 1))),
    ];
    assert_eq!(kinds(session.output()), answers);
    assert_eq!(switch.control.shared().tables().len(), 1, "published");
}

#[test]
fn removed_entries_are_told_of() {
    let mut switch = Switch::default();
    let mut session = greeted(&mut switch);
    let add = flow_mod(0, 1, &ANY);
    session.on_bytes(&add, &mut switch).expect("sound");
    let delete = flow_mod(3, 0, &ANY);
    session.on_bytes(&delete, &mut switch).expect("sound");
    let events = session.take_events();
    assert_eq!(events.len(), 1);
    session.on_event(&events[0]);
    assert_eq!(kinds(session.output()), [(kind::FLOW_REMOVED, None)]);
}

#[test]
fn a_slave_changes_nothing_and_a_stale_master_is_refused() {
    let mut switch = Switch::default();
    let roles = session::Roles::default();
    let mut greet = |roles| {
        let mut session = Session::among(roles);
        let hello = message(kind::HELLO, &[]);
        session.on_bytes(&hello, &mut switch).expect("a hello");
        session.sent(usize::MAX);
        session
    };
    let (mut one, mut other) = (greet(&roles), greet(&roles));
    let role = |role: u32, generation: u64| {
        let mut to = Vec::new();
        to.u32(role).zeros(4).u64(generation);
        message(kind::ROLE, &to)
    };
    let mut ask = |session: &mut Session, message: &[u8]| {
        session.on_bytes(message, &mut switch).expect("sound");
        let answers = kinds(session.output());
        session.sent(usize::MAX);
        answers
    };
    assert_eq!(ask(&mut one, &role(2, 5)), [(kind::ROLE_REPLY, None)]);
    assert_eq!(ask(&mut one, &flow_mod(0, 0, &ANY)), []);
    assert_eq!(ask(&mut other, &role(2, 4)), [(kind::ERROR, Some((11, 0)))]);
    assert_eq!(ask(&mut other, &role(2, 6)), [(kind::ROLE_REPLY, None)]);
    let slave = [(kind::ERROR, Some((1, 10)))];
    assert_eq!(
        ask(&mut one, &flow_mod(0, 0, &ANY)),
        slave,
        "no master any more"
    );
}

#[test]
fn requests_wait_while_answers_do() {
    let mut switch = Switch::default();
    let mut session = greeted(&mut switch);
    let mut features = Vec::new();
    features.u16(12).u16(0).zeros(4);
    let ask = message(kind::MULTIPART, &features).repeat(100);
    session.on_bytes(&ask, &mut switch).expect("sound");
    assert!(session.is_behind() && session.output().len() < 3 << 20);
    let mut answers = 0;
    while session.is_behind() {
        answers += session.output().len();
        session.sent(usize::MAX);
        session.on_bytes(&[], &mut switch).expect("sound");
    }
    assert!(answers + session.output().len() > 10 << 20);
}

#[test]
fn entries_come_back_from_the_wire() {
    for text in [
        "ip,nw_dst=10.0.0.0/8,actions=output:2",
        "priority=5,tcp6,ipv6_src=fd00::/8,tcp_flags=+syn-ack,tp_dst=0x50/0xfff0,actions=normal,in_port",
        "dl_vlan=5,dl_vlan_pcp=3,udp,nw_frag=no,actions=pop_vlan,flood,all,CONTROLLER:99",
        "vlan_tci=0x1000/0x1000,actions=mod_vlan_pcp:3,mod_vlan_vid:4,push_vlan:0x88a8",
        "vlan_tci=0x2003/0x6003,actions=drop",
        "arp,arp_sha=02:00:00:00:00:01,arp_op=2,actions=set_field:02:00:00:00:00:05->arp_tha",
        "ip,nw_ttl=3,actions=mod_nw_ttl:9,dec_ttl,set_field:1.0.0.0/255.0.0.255->ip_src",
        "metadata=0x10/0xf0,tun_id=0x7,actions=meter:3,output:1,clear_actions,\
         write_actions(output:4),write_metadata:0x3/0xf,goto_table:9",
        "ct_state=+trk-inv,icmp6,icmp_type=136,nd_target=fd00::/64,actions=ct(commit,zone=3)",
        "actions=resubmit(,7),ct(table=3)",
    ] {
        let flow = parse_flow(text, &no_names).expect(text);
        let mut bytes = Vec::new();
        write_match(&mut bytes, &flow.matches);
        let mut reader = Reader(&bytes);
        assert_eq!(read_match(&mut reader), Ok(flow.matches), "{text}");
        assert!(reader.is_empty());
        bytes.clear();
        write_instructions(&mut bytes, &flow.actions);
        assert_eq!(
            read_instructions(Reader(&bytes)),
            Ok(flow.actions),
            "{text}"
        );
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_session_panic(
        kind in 0_u8..31, body in proptest::collection::vec(any::<u8>(), 0..120),
        changes in proptest::collection::vec((0_usize..160, any::<u8>()), 0..6),
    ) {
        let mut switch = Switch::default();
        let mut session = greeted(&mut switch);
        let _ = session.on_bytes(&message(kind, &body), &mut switch);
        let flow = parse_flow("tcp,nw_dst=10.0.0.0/8,tp_dst=80,actions=mod_tp_dst:1,\
                               set_field:1.0.0.0/255.0.0.255->ip_src,output:2,goto_table:9",
                              &no_names).expect("sound");
        let mut body = Vec::new();
        write_match(&mut body, &flow.matches);
        write_instructions(&mut body, &flow.actions);
        let mut bytes = flow_mod(0, 0, &body);
        let len = bytes.len();
        for (at, byte) in changes {
            bytes[HEADER + at % (len - HEADER)] = byte;
        }
        let mut session = greeted(&mut switch);
        let _ = session.on_bytes(&bytes, &mut switch);
        // Whatever was added can be shown.
        let mut all = Vec::new();
        all.u16(1).u16(0).zeros(4).u8(0xff).zeros(3).u32(u32::MAX).u32(u32::MAX).zeros(20);
        all.bytes(&ANY);
        session.sent(usize::MAX);
        let _ = session.on_bytes(&message(kind::MULTIPART, &all), &mut switch);
        prop_assert!(kinds(session.output()).iter().all(|(kind, _)| *kind == kind::MULTIPART_REPLY));
        for entry in switch.control.select(&Filter::default()) {
            let text = entry.flow.to_string();
            prop_assert_eq!(parse_flow(&text, &no_names).map(|flow| flow.matches),
                            Ok(entry.flow.matches), "{}", text);
        }
    }
}
