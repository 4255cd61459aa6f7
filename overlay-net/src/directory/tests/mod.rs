//! The directory: its order, its format, and many nodes' together.

mod model;
mod scale;
mod sim;

use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;

use super::wire::{MESSAGE, Message};
use super::*;

pub(super) fn vni(number: u32) -> Vni {
    Vni::new(number).expect("24 bits")
}

pub(super) fn mac(number: u32) -> Mac {
    let [a, b, c, d] = number.to_be_bytes();
    Mac([2, 0, a, b, c, d])
}

pub(super) fn key(number: u32) -> Key {
    Key::Station(vni(7), Vlan::NONE, mac(number))
}

pub(super) fn station(number: u32) -> Value {
    Value::Station {
        ips: vec![IpAddr::from(number.to_be_bytes())],
        attached: true,
        isolated: false,
        groups: Vec::new(),
    }
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(IpAddr::from)
    ]
}

/// Few keys, epochs and nodes, so that records often meet.
fn record() -> impl Strategy<Value = Record> {
    let version = (0..4_u64, 0..3_u64).prop_map(|(epoch, node)| Version {
        epoch,
        node: NodeId(node),
    });
    let ips = proptest::collection::vec(ip(), 0..=2);
    let kind = 0..3_u8;
    (version, kind, 0..3_u32, ips, any::<(bool, bool, bool)>()).prop_map(
        |(version, kind, number, ips, (gone, attached, isolated))| {
            let (key, value) = match kind {
                0 => (
                    key(number),
                    Value::Station {
                        ips,
                        attached,
                        isolated,
                        groups: if attached {
                            vec![GroupId(number.into())]
                        } else {
                            Vec::new()
                        },
                    },
                ),
                1 => (Key::Member(vni(number), version.node), Value::Member),
                _ => {
                    let endpoint = |ip| SocketAddr::new(ip, 7400);
                    let endpoints = ips.into_iter().map(endpoint).collect();
                    let public = [number as u8; 32];
                    (Key::Node(version.node), Value::Node { public, endpoints })
                }
            };
            let value = (!gone).then_some(value);
            Record {
                key,
                version,
                value,
            }
        },
    )
}

/// A directory that claims nothing.
fn bystander() -> Directory {
    Directory::new(NodeId(99), Limits::default())
}

fn state(directory: &Directory) -> Vec<Record> {
    let records = directory.records.values();
    records.map(|slot| slot.record.clone()).collect()
}

proptest! {
    #[test]
    fn merging_takes_any_order_and_any_number_of_times(
        records in proptest::collection::vec(record(), 0..20),
        order in proptest::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let now = Duration::ZERO;
        let (mut one, mut two) = (bystander(), bystander());
        for record in &records {
            one.merge(now, record.clone(), now);
        }
        for index in &order {
            if let Some(record) = records.get(index.index(records.len().max(1))) {
                two.merge(now, record.clone(), now);
            }
        }
        for record in records.iter().rev() {
            two.merge(now, record.clone(), now);
        }
        prop_assert_eq!(state(&one), state(&two));
        prop_assert_eq!(one.root(), two.root());
        // What is merged again is known.
        for record in state(&one) {
            prop_assert_eq!(one.merge(now, record, now), Merged::Known);
        }
        // Merging what others have merged is the same as merging all.
        let (mut left, mut right) = (bystander(), bystander());
        let half = records.len() / 2;
        for record in &records[..half] {
            left.merge(now, record.clone(), now);
        }
        for record in &records[half..] {
            right.merge(now, record.clone(), now);
        }
        for record in state(&right) {
            left.merge(now, record, now);
        }
        prop_assert_eq!(left.root(), one.root());
    }

    #[test]
    fn one_of_two_records_holds(a in record(), b in record()) {
        if a != b && a.key == b.key {
            prop_assert!(a.beats(&b) != b.beats(&a));
        }
        prop_assert!(!a.beats(&a));
    }

    #[test]
    fn messages_come_back_as_they_were(
        records in proptest::collection::vec((record(), 0..100_u64), 0..10),
        number: u64,
        bits: u128,
    ) {
        let aged = |(record, age): (Record, u64)| {
            let age = if record.value.is_none() { age } else { 0 };
            (record, Duration::from_secs(age))
        };
        let records: Vec<_> = records.into_iter().map(aged).collect();
        for message in [
            Message::Push(number, records.clone()),
            Message::Records(records),
            Message::Ack(number),
            Message::Root(number),
            Message::Buckets(Box::new([number; BUCKETS])),
            Message::Want(bits),
            Message::Same,
        ] {
            let bytes = message.to_bytes();
            prop_assert!(bytes.len() <= MESSAGE);
            prop_assert_eq!(Message::from_bytes(&bytes), Ok(message));
            prop_assert!(Message::from_bytes(&bytes[..bytes.len() - 1]).is_err()
                || bytes.len() == 2 || bytes.len() > 10);
        }
    }

    #[test]
    fn no_bytes_make_it_fail_otherwise(bytes in proptest::collection::vec(any::<u8>(), 0..1300)) {
        if let Ok(message) = Message::from_bytes(&bytes) {
            prop_assert_eq!(message.to_bytes(), bytes);
        }
    }
}

#[test]
fn the_newer_place_wins_and_what_was_is_not_known_again() {
    let (now, later) = (Duration::ZERO, Duration::from_secs(10));
    let mut one = Directory::new(NodeId(1), Limits::default());
    let mut two = Directory::new(NodeId(2), Limits::default());
    let started = one.claim(now, key(5), station(5), 1000).expect("room");
    assert_eq!(started.epoch, 1001);
    // Saying it again is no news.
    assert_eq!(one.claim(now, key(5), station(5), 1000), Ok(started));
    let before = one.get(&key(5)).expect("known").clone();
    two.merge(now, before.clone(), now);
    assert_eq!(two.located(&key(5)).map(|it| it.node), Some(NodeId(1)));

    let moved = two
        .claim(later, key(5), station(5), started.epoch)
        .expect("room");
    assert!(moved > started);
    assert_eq!(two.merge(later, before, now), Merged::Older);
    let after = two.get(&key(5)).expect("known").clone();
    assert_eq!(one.merge(later, after.clone(), now), Merged::News);
    assert_eq!(one.located(&key(5)).map(|it| it.node), Some(NodeId(2)));
    assert_eq!((one.counts().lost, one.counts().corrected), (1, 0));
    one.withdraw(later, &key(5));
    assert_eq!(
        one.get(&key(5)),
        Some(&after),
        "it is not the first one's any more"
    );

    two.withdraw(later, &key(5));
    let gone = two.get(&key(5)).expect("a tombstone").clone();
    one.merge(later, gone, now);
    assert_eq!((one.located(&key(5)), one.root()), (None, two.root()));
    assert_eq!(one.changes(), [key(5)]);
    assert_eq!(one.changes(), []);
}

#[test]
fn a_source_and_a_destination_say_the_same() {
    let now = Duration::ZERO;
    let mut one = Directory::new(NodeId(1), Limits::default());
    let mut two = Directory::new(NodeId(2), Limits::default());
    let started = one.claim(now, key(5), station(5), 0).expect("room");
    two.claim(now, key(5), station(5), started.epoch)
        .expect("room");
    one.hand_over(now, &key(5), NodeId(2));
    assert_eq!(one.root(), two.root());
    assert_eq!(one.located(&key(5)).map(|it| it.node), Some(NodeId(2)));
}

#[test]
fn tombstones_do_not_live_for_ever_even_if_nodes_tell_each_other_of_them() {
    let limits = Limits {
        tombstones: Duration::from_secs(100),
        ..Limits::default()
    };
    let mut nodes: Vec<Directory> = (1..=3)
        .map(|node| Directory::new(NodeId(node), limits))
        .collect();
    nodes[0]
        .claim(Duration::ZERO, key(1), station(1), 0)
        .expect("room");
    nodes[0].withdraw(Duration::ZERO, &key(1));
    let mut last = 0;
    for second in 0..300 {
        let now = Duration::from_secs(second);
        for from in 0..3 {
            nodes[from].expire(now);
            let told: Vec<(Record, Duration)> = (0..BUCKETS as u8)
                .flat_map(|at| nodes[from].part(now, at))
                .map(|(record, age)| (record.clone(), age))
                .collect();
            for (record, age) in told {
                for to in &mut nodes {
                    to.merge(now, record.clone(), age);
                }
            }
        }
        if nodes.iter().any(|node| !node.is_empty()) {
            last = second;
        }
    }
    assert!((90..=101).contains(&last), "{last}");
}

#[test]
fn limits_hold_and_what_is_unsound_is_refused() {
    let limits = Limits {
        records: 50,
        per_node: 20,
        ..Limits::default()
    };
    let now = Duration::ZERO;
    let mut directory = Directory::new(NodeId(1), limits);
    let of = |node, number| Record {
        key: key(number),
        version: Version {
            epoch: 1,
            node: NodeId(node),
        },
        value: Some(station(number)),
    };
    for node in 2..10 {
        for number in 0..30 {
            directory.merge(now, of(node, node as u32 * 100 + number), now);
        }
    }
    assert_eq!(directory.len(), 50);
    assert_eq!(directory.per_node[&NodeId(2)], 20);
    assert_eq!(
        directory.claim(now, key(1), station(1), 0),
        Err(Refused::Full)
    );

    let mut directory = Directory::new(NodeId(1), Limits::default());
    let mut wrong = of(2, 1);
    wrong.version.epoch = EPOCHS;
    let refused = Merged::Refused(Refused::Unsound);
    assert_eq!(directory.merge(now, wrong, now), refused);
    let mut wrong = of(2, 1);
    wrong.value = Some(Value::Member);
    assert_eq!(directory.merge(now, wrong, now), refused);
    let mut wrong = of(2, 1);
    wrong.key = Key::Member(vni(1), NodeId(3));
    wrong.value = Some(Value::Member);
    assert_eq!(
        directory.merge(now, wrong, now),
        refused,
        "it speaks for another"
    );
    assert_eq!(directory.counts().refused, 3);
}

#[test]
fn a_file_says_where_stations_are() {
    let text = r#"
        [[node]]
        id = 2
        key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
        endpoints = ["192.0.2.1:7400", "[2001:db8::1]:7400"]
        networks = [7]

        [[station]]
        vni = 7
        mac = "02:00:00:00:00:05"
        ips = ["10.0.0.5"]
        node = 2
    "#;
    let path = std::env::temp_dir().join(format!("directory-{}.toml", std::process::id()));
    std::fs::write(&path, text).expect("a temporary file");
    let mut file = StaticFile::new(path.clone());
    let records = file.fetch().expect("sound").expect("new");
    assert!(file.fetch().expect("sound").is_none());
    std::fs::remove_file(path).expect("it is there");

    let mut directory = Directory::new(NodeId(1), Limits::default());
    directory.load(Duration::ZERO, records.clone());
    assert_eq!(directory.members(vni(7)), [NodeId(2)]);
    assert_eq!(directory.members(vni(6)), []);
    directory.remove_node(Duration::ZERO, NodeId(2));
    assert_eq!(directory.members(vni(7)), []);
    assert_eq!(directory.located(&key(5)), None);
    let mut directory = Directory::new(NodeId(1), Limits::default());
    directory.load(Duration::ZERO, records.clone());
    assert_eq!(
        directory.located(&key(5)).map(|it| it.node),
        Some(NodeId(2))
    );
    // The node itself claims them.
    let mut two = Directory::new(NodeId(2), Limits::default());
    two.load(Duration::ZERO, records);
    assert_eq!(two.own.len(), 3);

    for wrong in [
        "[[station]]\nvni = 16777216\nmac = \"02:00:00:00:00:05\"\nnode = 2",
        "[[station]]\nvni = 1\nmac = \"03:00:00:00:00:05\"\nnode = 2",
        "[[station]]\nvni = 1\nvlan = 4095\nmac = \"02:00:00:00:00:05\"\nnode = 2",
        "[[station]]\nvni = 1\nvlan = 1\nservice = 1\nmac = \"02:00:00:00:00:05\"\nnode = 2",
        "[[node]]\nid = 1\nkey = \"12\"",
        "[[nodes]]",
    ] {
        assert!(file::parse(wrong).is_err(), "{wrong}");
    }
}
