//! Frames of a turn become the same as if each had a turn of its own.

use proptest::prelude::*;

use super::*;
use crate::bridge::Rate;

/// A frame of a station to another one (5 is unknown, 6 all), and what it is.
type Sketch = (u8, u8, u8);

fn bytes((from, to, kind): Sketch) -> Vec<u8> {
    let to = if to == 6 {
        Mac::BROADCAST
    } else {
        Mac([2, 0, 0, 0, 0, to])
    };
    let mut bytes = frame(from, to);
    let mut tcp = |flags: u8, len: u16| {
        bytes.resize(14 + usize::from(len), 0);
        bytes[12..14].copy_from_slice(&[8, 0]);
        bytes[14..34].copy_from_slice(&[
            0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, 9,
        ]);
        bytes[16..18].copy_from_slice(&len.to_be_bytes());
        bytes[34..58].fill(0);
        // With the largest segment that it takes.
        (bytes[46], bytes[47]) = (0x60, flags);
        bytes[54..58].copy_from_slice(&[2, 4, 5, 0xb4]);
    };
    match kind {
        0 | 1 => {}
        2 => tcp(16, 60),
        3 => tcp(2, 60),
        4 => tcp(16, 1200),
        // Larger than one of the ports takes.
        5 => tcp(16, 1400),
        // Tagged.
        6 => {
            bytes.splice(12..12, [0x81, 0, 0, 7]);
        }
        // Cut off.
        7 => {
            bytes[12..14].copy_from_slice(&[8, 0]);
            bytes.truncate(20);
        }
        _ => {
            bytes[12..14].copy_from_slice(&[8, 6]);
            bytes[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        }
    }
    bytes
}

/// What came of frames: what each port got, all counts, and what flows counted.
#[derive(Debug, PartialEq)]
struct Seen {
    got: Vec<Vec<Vec<u8>>>,
    ports: Vec<crate::api::types::PortStatus>,
    flows: Vec<String>,
    macs: usize,
}

fn run(frames: &[Sketch], at_once: bool, entry: Option<&str>, limited: bool) -> Seen {
    let mut switch = switch();
    let ports: Vec<_> = ["a", "b", "c"]
        .map(|name| plug(&mut switch, name, "blue"))
        .into();
    let mut config = PortConfig {
        mtu: 1300,
        clamp_mss: true,
        ..switch.ports()[1].spec.bridge.clone()
    };
    switch.set_port("b", config.clone()).unwrap();
    if limited {
        config = PortConfig {
            rate: Some(Rate {
                per_second: 1000,
                burst: 2000,
            }),
            ..PortConfig::default()
        };
        switch.set_port("a", config).unwrap();
    }
    if let Some(entry) = entry {
        switch.add_flow("blue", entry).unwrap();
    }
    put(&mut switch, &ports[1], frame(2, Mac::BROADCAST));
    put(&mut switch, &ports[2], frame(3, Mac::BROADCAST));
    let mut wire = ports[0].1.lock().unwrap();
    if at_once {
        wire.sent.extend(frames.iter().map(|sketch| bytes(*sketch)));
        drop(wire);
        assert_eq!(switch.service(Some(ports[0].0)), frames.len());
    } else {
        drop(wire);
        for sketch in frames {
            put(&mut switch, &ports[0], bytes(*sketch));
        }
    }
    Seen {
        got: ports.iter().map(got).collect(),
        flows: switch.dump_flows("blue").unwrap(),
        macs: switch.macs("blue").unwrap().len(),
        ports: switch.ports(),
    }
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let from = prop_oneof![9 => Just(1_u8), 1 => Just(4)];
    let to = prop_oneof![9 => Just(2_u8), 1 => 3_u8..7];
    (from, to, 0_u8..9)
}

proptest! {
    #[test]
    fn frames_of_one_turn_go_the_way_they_would_go_one_by_one(
        // Most are from one station to another.
        runs in proptest::collection::vec((sketch(), 1_usize..4), 1..10),
        entry in prop_oneof![
            Just(None),
            Just(Some("priority=9,tcp,actions=output:b")),
            Just(Some("priority=9,actions=normal")),
        ],
        limited: bool,
    ) {
        let frames: Vec<Sketch> = runs
            .into_iter()
            .flat_map(|(sketch, count)| std::iter::repeat_n(sketch, count))
            .collect();
        let at_once = run(&frames, true, entry, limited);
        let one_by_one = run(&frames, false, entry, limited);
        prop_assert!(at_once == one_by_one, "{frames:?}");
    }
}

#[test]
fn a_burst_to_one_station_takes_one_look_and_each_frame_counts() {
    let frames = [(1, 2, 0); 30];
    let seen = run(&frames, true, None, false);
    assert_eq!(seen.got[1].len(), 31, "and one that was for all");
    let flow = &seen.flows[0];
    assert!(flow.contains("n_packets=32"), "{flow}");
}

#[test]
fn what_is_too_large_or_too_much_is_dropped_in_the_midst_of_a_burst() {
    let large = [(1, 2, 0), (1, 2, 5), (1, 2, 0)];
    let seen = run(&large, true, None, false);
    assert_eq!(seen.got[1].len(), 3);
    let much = [(1, 2, 4); 5];
    let seen = run(&much, true, None, true);
    assert_eq!(seen.got[1].len(), 2);
}
