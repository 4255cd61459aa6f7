use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const DATA: &str = "/local/domain/1/data";

fn path(text: &str) -> Path {
    Path::new(text).unwrap()
}

/// A store with one directory of the guest's.
fn store() -> Store {
    let mut store = Store::default();
    store.set(&Op::Mkdir(path(DATA))).unwrap();
    let owner = Permissions::guest_owns();
    store.set(&Op::SetPermissions(path(DATA), owner)).unwrap();
    store
}

fn write(text: &str, value: &str) -> Op {
    Op::Write(path(text), value.into())
}

fn read(store: &mut Store, transaction: u32, text: &str) -> Result<String, Errno> {
    let path = path(text);
    let value = store.view(transaction, &path)?.read(Who::Guest, &path)?;
    Ok(String::from_utf8(value.to_vec()).unwrap())
}

#[test]
fn a_transaction_is_seen_when_it_ends_and_not_before() {
    let mut store = store();
    store.watches().add("data", b"token").unwrap();
    store.watches().take();
    let id = store.start_transaction().unwrap();
    store.modify(id, write("data/a", "new")).unwrap();
    assert_eq!(read(&mut store, id, "data/a").unwrap(), "new");
    assert_eq!(read(&mut store, 0, "data/a"), Err(Errno::NoEntry));
    assert_eq!(store.watches().take(), None);
    assert!(store.take_changed().is_empty());
    store.end_transaction(id, true).unwrap();
    assert_eq!(read(&mut store, 0, "data/a").unwrap(), "new");
    assert_eq!(
        store.watches().take(),
        Some(("data/a".into(), b"token".to_vec()))
    );
    assert_eq!(store.take_changed(), [path("data/a")]);
    assert_eq!(store.end_transaction(id, true), Err(Errno::NoEntry));
    assert_eq!(store.modify(id, write("data/a", "")), Err(Errno::NoEntry));
}

#[test]
fn an_aborted_transaction_leaves_nothing_behind() {
    let mut store = store();
    let before = store.tree().save();
    let id = store.start_transaction().unwrap();
    store.modify(id, write("data/a", "new")).unwrap();
    store.end_transaction(id, false).unwrap();
    assert_eq!(store.tree().save(), before);
}

#[test]
fn transactions_and_what_they_hold_are_bounded() {
    let mut store = store();
    let first = store.start_transaction().unwrap();
    let mut n = 0;
    while store.view(first, &path(&format!("data/{n}"))).is_ok() {
        n += 1;
        assert!(n <= transaction::MAX_TOUCHED);
    }
    assert_eq!(
        store.modify(first, write("data/a", "")),
        Err(Errno::NoSpace)
    );
    let second = store.start_transaction().unwrap();
    n = 0;
    while store.modify(second, write("data/a", "")).is_ok() {
        n += 1;
        assert!(n <= transaction::MAX_TOUCHED);
    }
    for _ in 2..MAX_TRANSACTIONS {
        store.start_transaction().unwrap();
    }
    assert_eq!(store.start_transaction(), Err(Errno::NoSpace));
    store.forget_client();
    assert!(store.start_transaction().is_ok());
}

#[test]
fn a_store_goes_on_from_its_saved_state_with_transactions_and_events() {
    let mut store = store();
    let good = store.start_transaction().unwrap();
    store.modify(good, write("data/a", "1")).unwrap();
    store.watches().add("data", b"token").unwrap();
    let restore = |store: &Store| {
        let saved = store.save();
        let mut bytes = Vec::new();
        ciborium::into_writer(&saved, &mut bytes).unwrap();
        Store::restore(ciborium::from_reader(bytes.as_slice()).unwrap()).unwrap()
    };
    let mut restored = restore(&store);
    assert_eq!(restored.tree().save(), store.tree().save());
    assert_eq!(read(&mut restored, good, "data/a").unwrap(), "1");
    restored.end_transaction(good, true).unwrap();
    assert_eq!(read(&mut restored, 0, "data/a").unwrap(), "1");
    let told: Vec<_> = std::iter::from_fn(|| restored.watches().take()).collect();
    assert_eq!(told.len(), 2);

    // What this one saw is lost when the tree has changed since.
    store.modify(0, write("data/b", "2")).unwrap();
    let mut restored = restore(&store);
    assert_eq!(read(&mut restored, good, "data/a").unwrap(), "1");
    assert_eq!(restored.end_transaction(good, true), Err(Errno::Again));
    assert_eq!(restored.tree().save(), store.tree().save());
}

/// What somebody does, in a transaction (its slot) or without.
#[derive(Clone, Debug)]
enum Act {
    Read(String),
    List(String),
    Write(String, u8),
    Mkdir(String),
    Remove(String),
}

#[derive(Clone, Debug)]
enum Step {
    Do(Option<usize>, Act),
    Start(usize),
    End(usize, bool),
}

/// The tree as simple as can be.
type Model = BTreeMap<String, String>;

fn parent(node: &str) -> &str {
    &node[..node.rfind('/').unwrap()]
}

/// What an act does to the model, and what it returns.
fn act_on_model(model: &mut Model, act: &Act) -> Result<String, Errno> {
    let make = |model: &mut Model, node: &str| {
        let mut at = node.to_owned();
        while !model.contains_key(&at) {
            model.insert(at.clone(), String::new());
            at = parent(&at).to_owned();
        }
    };
    match act {
        Act::Read(node) => model.get(node).cloned().ok_or(Errno::NoEntry),
        Act::List(node) => {
            model.get(node).ok_or(Errno::NoEntry)?;
            let names = model.keys().filter(|key| parent(key) == node);
            Ok(names.map(|key| key[node.len()..].to_owned()).collect())
        }
        Act::Write(node, value) => {
            make(model, node);
            model.insert(node.clone(), value.to_string());
            Ok(String::new())
        }
        Act::Mkdir(node) => {
            make(model, node);
            Ok(String::new())
        }
        Act::Remove(node) => {
            model.get(parent(node)).ok_or(Errno::NoEntry)?;
            let below = format!("{node}/");
            model.retain(|key, _| key != node && !key.starts_with(&below));
            Ok(String::new())
        }
    }
}

fn act_on_store(store: &mut Store, id: u32, act: &Act) -> Result<String, Errno> {
    let op = match act {
        Act::Read(node) => return read(store, id, node),
        Act::List(node) => {
            let path = path(node);
            let (_, names) = store.view(id, &path)?.directory(Who::Guest, &path)?;
            return Ok(names.map(|name| format!("/{name}")).collect());
        }
        Act::Write(node, value) => Op::Write(path(node), value.to_string().into()),
        Act::Mkdir(node) => Op::Mkdir(path(node)),
        Act::Remove(node) => Op::Remove(path(node)),
    };
    store.modify(id, op).map(|()| String::new())
}

fn node() -> impl Strategy<Value = String> {
    "(/[a-c]){1,3}".prop_map(|below| format!("{DATA}{below}"))
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        node().prop_map(Act::Read),
        node().prop_map(Act::List),
        (node(), any::<u8>()).prop_map(|(node, value)| Act::Write(node, value)),
        node().prop_map(Act::Mkdir),
        node().prop_map(Act::Remove),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (prop_oneof![1 => Just(None), 3 => (0usize..3).prop_map(Some)], act())
            .prop_map(|(slot, act)| Step::Do(slot, act)),
        1 => (0usize..3).prop_map(Step::Start),
        1 => (0usize..3, prop::bool::weighted(0.9)).prop_map(|(slot, commit)| Step::End(slot, commit)),
    ]
}

/// An open transaction: its number, what it did and was told, and whether
/// anything else has changed the tree since its start.
struct Open {
    id: u32,
    log: Vec<(Act, Result<String, Errno>)>,
    disturbed: bool,
}

fn dump(store: &Store) -> Model {
    let tree = store.tree();
    tree.subtree(&path(DATA))
        .into_iter()
        .map(|node| {
            let value = tree.read(Who::Guest, &node).unwrap().to_vec();
            (node.to_string(), String::from_utf8(value).unwrap())
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn transactions_are_as_if_each_had_happened_at_once_when_it_ended(
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let mut store = store();
        let mut model = dump(&store);
        let mut slots: [Option<Open>; 3] = [None, None, None];
        for step in steps {
            let before = model.clone();
            match step {
                Step::Do(None, act) => {
                    let got = act_on_store(&mut store, 0, &act);
                    prop_assert_eq!(got, act_on_model(&mut model, &act));
                    let changes = !matches!(act, Act::Read(_) | Act::List(_));
                    for open in slots.iter_mut().flatten() {
                        open.disturbed |= changes;
                    }
                }
                Step::Do(Some(slot), act) => {
                    if let Some(open) = &mut slots[slot] {
                        let got = act_on_store(&mut store, open.id, &act);
                        open.log.push((act, got));
                    }
                }
                Step::Start(slot) => {
                    if slots[slot].is_none() {
                        let id = store.start_transaction().unwrap();
                        slots[slot] = Some(Open { id, log: Vec::new(), disturbed: false });
                    }
                }
                Step::End(slot, commit) => {
                    let Some(open) = slots[slot].take() else { continue };
                    match store.end_transaction(open.id, commit) {
                        Ok(()) if commit => {
                            for (act, got) in &open.log {
                                prop_assert_eq!(got, &act_on_model(&mut model, act), "{:?}", act);
                            }
                        }
                        Ok(()) => prop_assert!(!commit),
                        Err(errno) => {
                            prop_assert_eq!(errno, Errno::Again);
                            prop_assert!(open.disturbed, "a conflict with nobody");
                        }
                    }
                    for other in slots.iter_mut().flatten() {
                        other.disturbed |= before != model;
                        other.disturbed |= open.log.iter().any(|(act, _)| {
                            commit && !matches!(act, Act::Read(_) | Act::List(_))
                        });
                    }
                }
            }
            prop_assert_eq!(dump(&store), model.clone());
            prop_assert_eq!(store.tree().guest_nodes(), model.len());
        }
    }
}
