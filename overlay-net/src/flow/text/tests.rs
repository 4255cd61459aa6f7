//! What is written is read again.

use proptest::prelude::*;

use super::*;
use crate::flow::actions::{self, Action};
use crate::flow::fields::{Field, Needs};
use crate::flow::matches::Match;
use crate::flow::tables::{Flags, Flow};

fn read(text: &str) -> Result<Flow, TextError> {
    parse_flow(text, &|name| (name == "web0").then_some(PortId(7)))
}

fn shown(text: &str) -> String {
    match read(text) {
        Ok(flow) => flow.to_string(),
        Err(error) => panic!("{error}\n{}", error.shown(text)),
    }
}

#[test]
fn open_vswitch_texts_are_read() {
    for (text, wanted) in [
        (
            "priority=100,ip,nw_dst=10.0.0.0/8,actions=output:2",
            "priority=100,ip,nw_dst=10.0.0.0/8 actions=output:2",
        ),
        ("actions=drop", "actions=drop"),
        (
            "in_port=web0 actions=web0,normal",
            "in_port=7 actions=output:7,NORMAL",
        ),
        (
            "nw_src=1.2.3.4,ip,actions=3",
            "ip,nw_src=1.2.3.4 actions=output:3",
        ),
        (
            "arp,nw_dst=10.0.0.1,arp_op=1 actions=CONTROLLER:65535",
            "arp,arp_tpa=10.0.0.1,arp_op=1 actions=CONTROLLER:65535",
        ),
        (
            "table=1,tcp6,ipv6_dst=fd00::/16,tp_dst=0x50/0xfff0,tcp_flags=+syn-ack,actions=mod_tp_dst:80",
            "table=1, tcp6,ipv6_dst=fd00::/16,tp_dst=0x50/0xfff0,tcp_flags=+syn-ack \
             actions=set_field:80->tcp_dst",
        ),
        (
            "dl_vlan=5,dl_vlan_pcp=2,dl_src=02:00:00:00:00:01 actions=strip_vlan,goto_table:2",
            "dl_src=02:00:00:00:00:01 actions=pop_vlan,goto_table:2",
        ),
        (
            "vlan_tci=0 actions=push_vlan:0x8100,set_field:4101->vlan_vid,all",
            "vlan_tci=0x0000 actions=push_vlan:0x8100,mod_vlan_vid:5,ALL",
        ),
        (
            "ip,nw_frag=later,nw_tos=0x28,nw_ecn=1,actions=dec_ttl,mod_nw_tos:8",
            "ip,ip_dscp=10,nw_ecn=1,nw_frag=later actions=dec_ttl,set_field:2->ip_dscp",
        ),
        (
            "icmp6,icmp_type=135,nd_target=fd00::1,actions=flood",
            "icmp6,icmp_type=135,nd_target=fd00::1 actions=FLOOD",
        ),
        ("tun_id=0x10,actions=mirror:3,meter_is:1", ""),
        (
            "tun_id=16,actions=meter:4,ct(commit,zone=3),mirror:3,clear_actions,write_actions(output:1)",
            "tun_id=0x10 actions=meter:4,ct(commit,zone=3),mirror:3,clear_actions,write_actions(output:1)",
        ),
        (
            "idle_timeout=60,send_flow_rem,cookie=0x1,actions=in_port",
            "cookie=0x1, idle_timeout=60, send_flow_rem actions=IN_PORT",
        ),
    ] {
        if wanted.is_empty() {
            assert!(read(text).is_err(), "{text}");
        } else if text.contains("dl_vlan=5") {
            let flow = shown(text);
            assert!(flow.contains("dl_vlan=5,dl_vlan_pcp=2"), "{flow}");
        } else {
            assert_eq!(shown(text), wanted);
        }
    }
}

#[test]
fn errors_point_at_the_place() {
    for (text, column, what) in [
        ("nw_dst=10.0.0.1,actions=output:2", 1, "needs ip"),
        ("ip,nw_dst=10.0.0.300,actions=output:2", 11, "IPv4 address"),
        ("ip,foo=1,actions=output:2", 4, "`foo` is no field"),
        ("ip,nw_ttl=300,actions=drop", 4, "8 bits"),
        ("ip", 3, "expected actions=..."),
        ("ip,actions=", 12, "expected actions, as"),
        ("ip,actions=output:x1", 19, "a port's number or name"),
        ("actions=goto_table:0", 9, "later table"),
        ("actions=set_field:1->tun_id", 9, "cannot be set"),
        (
            "actions=mod_nw_dst:1.1.1.1",
            9,
            "only be set if the entry matches ip",
        ),
        ("ip,tcp,udp,actions=drop", 8, "twice"),
        ("actions=output:1,drop", 18, "stands alone"),
        ("actions=local", 9, "is no action"),
        ("actions=ct(table=1),output:2", 9, "nothing can follow"),
        ("dl_vlan=5000,actions=drop", 1, "a VLAN"),
        ("priority=70000,actions=drop", 10, "16 bits"),
        ("tcp_flags=+foo,tcp,actions=drop", 11, "flags"),
    ] {
        let error = read(text).expect_err(text);
        assert_eq!(error.column, column, "{text}: {error}");
        assert!(error.what.contains(what), "{text}: {error}");
    }
}

#[test]
fn a_dumped_entry_is_read_again() {
    let text = "cookie=0x5, duration=1.500s, table=3, n_packets=7, n_bytes=90, idle_age=1, \
                priority=7,udp,dl_vlan=4,tp_dst=53 actions=NORMAL";
    let flow = read(text).expect("an entry");
    assert_eq!((flow.cookie, flow.table, flow.priority), (5, 3, 7));
}

/// Matches on any fields, of any value.
fn matching() -> impl Strategy<Value = Match> {
    let protocol = prop_oneof![
        Just((0_u16, 0_u8)),
        Just((0x0800, 0)),
        Just((0x0800, 6)),
        Just((0x0800, 17)),
        Just((0x0800, 1)),
        Just((0x0800, 132)),
        Just((0x0800, 47)),
        Just((0x86dd, 0)),
        Just((0x86dd, 6)),
        Just((0x86dd, 17)),
        Just((0x86dd, 58)),
        Just((0x86dd, 132)),
        Just((0x0806, 0)),
        Just((0x8035, 0)),
        Just((0x88cc, 0)),
    ];
    let some = proptest::collection::vec(
        (
            0..Field::ALL.len(),
            any::<u128>(),
            any::<u128>(),
            any::<bool>(),
        ),
        0..6,
    );
    (protocol, some).prop_map(|((kind, proto), some)| {
        let mut matches = Match::any();
        if kind != 0 {
            matches.exactly(Field::EthType, kind.into()).expect("sound");
        }
        if proto != 0 {
            matches
                .exactly(Field::IpProto, proto.into())
                .expect("sound");
        }
        for (which, value, mask, whole) in some {
            let field = Field::ALL[which];
            if field == Field::InnerTci {
                continue;
            }
            let value = match field {
                Field::Icmp6Type => 135,
                field => value & field.all(),
            };
            let mask = if whole || !field.is_maskable() {
                field.all()
            } else {
                mask & field.all()
            };
            let _ = matches.set(field, value & mask, mask);
        }
        matches
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        (1_u32..9).prop_map(|port| Action::Output(PortId(port))),
        Just(Action::InPort),
        Just(Action::Normal),
        Just(Action::Flood),
        Just(Action::All),
        any::<u16>().prop_map(|max_len| Action::Controller { max_len }),
        (1_u32..9).prop_map(|port| Action::Mirror(PortId(port))),
        (
            0..Field::ALL.len(),
            any::<u128>(),
            any::<u128>(),
            any::<bool>()
        )
            .prop_map(|(which, value, mask, whole)| {
                let field = Field::ALL[which];
                let mask = if whole {
                    field.all()
                } else {
                    mask & field.all()
                };
                let mut value = value & mask;
                if field == Field::VlanVid && whole {
                    value |= 0x1000;
                }
                Action::Set { field, value, mask }
            }),
        Just(Action::DecTtl),
        Just(Action::PopVlan),
        Just(Action::PushVlan(0x88a8)),
        (any::<bool>(), any::<u16>()).prop_map(|(commit, zone)| Action::Ct {
            commit,
            zone,
            table: None
        }),
        (0_u8..254).prop_map(Action::Resubmit),
        (any::<u64>(), any::<u64>())
            .prop_map(|(value, mask)| Action::WriteMetadata { value, mask }),
        (0_u8..254).prop_map(Action::Goto),
        Just(Action::Meter(3)),
        Just(Action::ClearActions),
        Just(Action::WriteActions(vec![
            Action::PopVlan,
            Action::Output(PortId(3))
        ])),
    ]
}

proptest! {
    #[test]
    fn entries_come_back(
        matches in matching(),
        list in proptest::collection::vec(action(), 0..4),
        numbers: (u16, u64, u16, u16), table in 0_u8..=253, flags: [bool; 3],
    ) {
        // Only what an entry with this match can have.
        let mut actions = Vec::new();
        for action in list {
            actions.push(action);
            if actions::check(&actions, &matches, table).is_err() {
                actions.pop();
            }
        }
        let (priority, cookie, idle_timeout, hard_timeout) = numbers;
        let [send_removed, check_overlap, reset_counts] = flags;
        let flow = Flow {
            table, priority, matches, actions, cookie, idle_timeout, hard_timeout,
            flags: Flags { send_removed, check_overlap, reset_counts },
        };
        let text = flow.to_string();
        let again = read(&text).map_err(|error| TestCaseError::fail(
            format!("{error}\n{}", error.shown(&text))))?;
        prop_assert_eq!(again, flow, "{}", text);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "(priority=|ip,|tcp,|nw_dst=|10.0.0.0/|actions=|output:|ct\\(|set_field:|->|é|\\(|\\)|[0-9]{1,3}|,|.){0,12}") {
        let _ = read(&text).map_err(|error| error.shown(&text));
        let _ = parse_filter(&text, true, &no_names);
        let _ = parse_packet(&text, &no_names);
    }
}

#[test]
fn packets_have_what_their_description_says() {
    let (key, state) =
        parse_packet("in_port=1,tcp,nw_src=1.1.1.1,ct_state=+trk", &no_names).expect("a packet");
    assert_eq!(
        (key.port, key.protocol, key.ttl, state),
        (PortId(1), 6, 64, 0x20)
    );
    assert!(Match::any().has(Needs::Nothing));
}
