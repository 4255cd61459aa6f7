//! Against a linear search.

use std::cmp::Reverse;
use std::time::Duration;

use proptest::prelude::*;

use super::super::fields::{Field, Flat};
use super::super::{Action, Filter, Flow, Match, Pipeline, Step};
use super::{control, key, pipeline};
use crate::drops::Reason;
use crate::frame::{Key, PortId};

/// A match on some fields of a key, some in part.
fn matching(key: &Key, choice: u16, narrow: bool) -> Match {
    let flat = Flat::of(key);
    let mut matches = Match::any();
    let fields = [
        Field::EthType,
        Field::IpProto,
        Field::VlanTci,
        Field::InPort,
        Field::Vni,
        Field::EthDst,
        Field::EthSrc,
        Field::Ipv4Src,
        Field::Ipv4Dst,
        Field::Ipv6Dst,
        Field::TcpDst,
        Field::UdpSrc,
    ];
    for (index, field) in fields.into_iter().enumerate() {
        if choice >> index & 1 == 0 {
            continue;
        }
        let mask = if narrow && field.is_maskable() {
            field.all() & !1
        } else {
            field.all()
        };
        // What the key does not have is refused.
        let _ = matches.set(field, flat.get(field) & mask, mask);
    }
    matches
}

#[derive(Clone, Debug)]
enum Op {
    Add(Key, u16, bool, u16, u8),
    Delete(Key, u16, bool),
    Strict(usize),
    Modify(Key, u16, u32),
    Look(Vec<Key>),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (key(), any::<u16>(), any::<bool>(), 0_u16..4, 0_u8..2)
            .prop_map(|(key, choice, narrow, priority, table)|
                Op::Add(key, choice, narrow, priority, table)),
        1 => (key(), any::<u16>(), any::<bool>())
            .prop_map(|(key, choice, narrow)| Op::Delete(key, choice | 3, narrow)),
        1 => any::<usize>().prop_map(Op::Strict),
        1 => (key(), any::<u16>(), 100_u32..200).prop_map(|(key, choice, port)|
            Op::Modify(key, choice, port)),
        4 => proptest::collection::vec(key(), 1..20).prop_map(Op::Look),
    ]
}

/// The entries, the oldest first, with what they were added as.
type Model = Vec<(u64, Flow)>;

fn best<'a>(model: &'a Model, table: u8, flat: &Flat) -> Option<&'a Flow> {
    let found = model
        .iter()
        .filter(|(_, flow)| flow.table == table && flow.matches.matches(flat));
    found
        .max_by_key(|(id, flow)| (flow.priority, Reverse(*id)))
        .map(|(_, flow)| flow)
}

fn expected(model: &Model, key: &Key) -> Vec<PortId> {
    let flat = Flat::of(key);
    let ports = |flow: &Flow| {
        flow.actions
            .iter()
            .filter_map(|action| match action {
                Action::Output(port) => Some(*port),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    let Some(first) = best(model, 0, &flat) else {
        return Vec::new();
    };
    let mut out = ports(first);
    if first.actions.contains(&Action::Goto(1)) {
        out.extend(best(model, 1, &flat).map(ports).unwrap_or_default());
    }
    out
}

fn look(pipeline: &mut Pipeline, key: &Key) -> (Vec<PortId>, Option<Reason>) {
    let decision = pipeline.classify(Duration::from_secs(1), key, 100);
    let ports = decision.steps.iter().filter_map(|step| match step {
        Step::Output(port) => Some(*port),
        _ => None,
    });
    (ports.collect(), decision.drop)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn tables_and_cache_do_as_a_linear_search(ops in proptest::collection::vec(op(), 1..60)) {
        let mut control = control(&[]);
        let mut pipeline = pipeline(&control);
        let mut model = Model::new();
        let mut looked = 0_u64;
        for (id, op) in ops.into_iter().enumerate() {
            let id = id as u64;
            match op {
                Op::Add(key, choice, narrow, priority, table) => {
                    let mut actions = vec![Action::Output(PortId(id as u32 + 1000))];
                    actions.extend((table == 0 && choice & 0x8000 != 0).then_some(Action::Goto(1)));
                    let matches = matching(&key, choice, narrow);
                    let flow = Flow { table, priority, matches, actions, ..Flow::default() };
                    let same = |other: &Flow| other.table == table
                        && other.priority == priority && other.matches == matches;
                    model.retain(|(_, other)| !same(other));
                    model.push((id, flow.clone()));
                    control.add(flow, Duration::ZERO).expect("sound");
                }
                Op::Delete(key, choice, narrow) => {
                    let matches = matching(&key, choice, narrow);
                    let gone = control.delete(&Filter { matches, ..Filter::default() }).len();
                    let before = model.len();
                    model.retain(|(_, flow)| !matches.covers(&flow.matches));
                    prop_assert_eq!(gone, before - model.len());
                }
                Op::Strict(which) if !model.is_empty() => {
                    let (_, flow) = model.remove(which % model.len());
                    let gone = control.delete(&Filter {
                        matches: flow.matches,
                        strict: Some(flow.priority),
                        table: Some(flow.table),
                        ..Filter::default()
                    });
                    prop_assert_eq!(gone.len(), 1);
                }
                Op::Strict(_) => {}
                Op::Modify(key, choice, port) => {
                    let matches = matching(&key, choice, false);
                    let actions = [Action::Output(PortId(port))];
                    let filter = Filter { matches, ..Filter::default() };
                    let count = control.modify(&filter, &actions, false).expect("sound");
                    let mut changed = 0;
                    for (_, flow) in &mut model {
                        if matches.covers(&flow.matches) {
                            flow.actions = actions.to_vec();
                            changed += 1;
                        }
                    }
                    prop_assert_eq!(count, changed);
                }
                Op::Look(keys) => {
                    for key in &keys {
                        let (ports, drop) = look(&mut pipeline, key);
                        let wanted = expected(&model, key);
                        prop_assert_eq!(drop.is_some(), wanted.is_empty(), "{:?}", drop);
                        prop_assert_eq!(ports, wanted);
                        looked += u64::from(best(&model, 0, &Flat::of(key)).is_some());
                    }
                }
            }
            prop_assert_eq!(control.tables().len(), model.len());
            control.publish();
            pipeline.tick(Duration::from_secs(1));
        }
        let (hits, misses) = pipeline.cached();
        prop_assert!(hits + misses >= looked);
    }

    #[test]
    fn every_frame_is_counted_once(keys in proptest::collection::vec(key(), 1..100)) {
        let control = control(&[
            "priority=3,in_port=1,actions=output:2",
            "priority=2,ip,nw_dst=10.0.0.0/24,actions=goto_table:1",
            "priority=1,actions=drop",
            "table=1,udp,udp_src=1,actions=output:3",
        ]);
        let mut pipeline = pipeline(&control);
        for (index, key) in keys.iter().enumerate() {
            pipeline.classify(Duration::from_millis(index as u64), key, 100);
            if index % 7 == 0 {
                pipeline.fold(Duration::ZERO);
            }
        }
        pipeline.fold(Duration::ZERO);
        let entries = control.tables().entries();
        let first: u64 = entries.iter().filter(|entry| entry.flow.table == 0)
            .map(|entry| entry.stats.packets()).sum();
        prop_assert_eq!(first, keys.len() as u64);
        for entry in entries.iter().filter(|entry| entry.flow.priority == 3) {
            let matched = keys.iter().filter(|key| key.port == PortId(1)).count() as u64;
            prop_assert_eq!((entry.stats.packets(), entry.stats.bytes()), (matched, matched * 100));
        }
    }

    #[test]
    fn keys_come_back_from_words(key in key()) {
        prop_assert_eq!(Flat::of(&key).to_key(), key);
    }
}
