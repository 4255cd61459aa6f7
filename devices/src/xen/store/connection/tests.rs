use proptest::prelude::*;

use super::super::{Op, Path, Permissions};
use super::*;
use crate::virtio::testing::ram;
use crate::xen::store::testing::StoreClient;

const PAGE: GuestAddress = GuestAddress(0x1000);

/// A store, its connection, and the guest at the other end.
struct Rig {
    store: Store,
    connection: Connection,
    client: StoreClient,
}

impl Rig {
    fn new() -> Self {
        let memory = ram(0x4000);
        let mut store = Store::default();
        for node in ["data", "device"] {
            let path = Path::new(node).unwrap();
            store.set(&Op::Mkdir(path.clone())).unwrap();
            let owner = Permissions::guest_owns();
            store.set(&Op::SetPermissions(path, owner)).unwrap();
        }
        let connection = Connection::new(memory.clone(), PAGE, State::default());
        connection.initialise().unwrap();
        Self {
            store,
            connection,
            client: StoreClient::new(memory, PAGE),
        }
    }

    /// Lets both ends work until nothing moves; returns what arrived.
    fn run(&mut self) {
        loop {
            let sent = self.client.send();
            let step = self.connection.step(&mut self.store);
            let moved = self.connection.take_moved();
            let received = self.client.receive();
            if !sent && !moved && !received && step == Step::Idle {
                break;
            }
        }
    }

    /// The answer to a request, or its error.
    fn ask(&mut self, kind: u32, transaction: u32, payload: &[u8]) -> Result<Vec<u8>, String> {
        let request = self.client.request(kind, transaction, payload);
        self.run();
        let (kind_, transaction_, answer) = self.client.answer(request).unwrap();
        assert_eq!(transaction_, transaction);
        if kind_ == 16 {
            return Err(String::from_utf8(answer).unwrap());
        }
        assert_eq!(kind_, kind);
        Ok(answer)
    }

    fn ask_ok(&mut self, kind: u32, transaction: u32, payload: &str) -> String {
        let answer = self.ask(kind, transaction, payload.as_bytes());
        String::from_utf8(answer.unwrap()).unwrap()
    }
}

#[test]
fn every_request_of_a_guest_has_its_answer() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask_ok(11, 0, "data/a\0value"), "OK\0");
    assert_eq!(rig.ask_ok(2, 0, "data/a\0"), "value");
    assert_eq!(rig.ask_ok(12, 0, "data/b\0"), "OK\0");
    assert_eq!(rig.ask_ok(1, 0, "data\0"), "a\0b\0");
    let part = rig.ask_ok(22, 0, "/local/domain/1/data\x002\0");
    assert!(part.ends_with("\0b\0\0"), "{part:?}");
    assert_eq!(rig.ask_ok(3, 0, "data/a\0"), "n1\0");
    assert_eq!(rig.ask_ok(14, 0, "data/a\0n1\0r0\0"), "OK\0");
    assert_eq!(rig.ask_ok(3, 0, "data/a\0"), "n1\0r0\0");
    assert_eq!(rig.ask_ok(13, 0, "data/a\0"), "OK\0");
    assert_eq!(rig.ask_ok(10, 0, "1\0"), "/local/domain/1\0");
    assert_eq!(rig.ask_ok(17, 0, "1\0"), "T\0");
    assert_eq!(rig.ask_ok(17, 0, "2\0"), "F\0");
    let transaction = rig.ask_ok(6, 0, "\0");
    let id = transaction.trim_end_matches('\0').parse().unwrap();
    assert_eq!(rig.ask_ok(11, id, "data/c\0in one"), "OK\0");
    assert_eq!(rig.ask_ok(7, id, "T\0"), "OK\0");
    assert_eq!(rig.ask_ok(2, 0, "data/c\0"), "in one");
}

#[test]
fn watches_tell_of_changes_until_they_are_reset() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask_ok(4, 0, "device\0token\0"), "OK\0");
    assert_eq!(rig.client.events(), [("device".into(), "token".into())]);
    assert_eq!(rig.ask_ok(11, 0, "device/vif/0/state\x001"), "OK\0");
    assert_eq!(
        rig.client.events(),
        [("device/vif/0/state".into(), "token".into())]
    );
    assert_eq!(rig.ask_ok(5, 0, "device\0token\0"), "OK\0");
    assert_eq!(rig.ask_ok(4, 0, "data\0token\0"), "OK\0");
    assert_eq!(rig.ask_ok(21, 0, "\0"), "OK\0");
    rig.client.events();
    assert_eq!(rig.ask_ok(11, 0, "data/a\0"), "OK\0");
    assert!(rig.client.events().is_empty());
}

#[test]
fn wrong_requests_are_errors_and_the_connection_goes_on() {
    let mut rig = Rig::new();
    for (kind, transaction, payload, error) in [
        (0, 0, &b"help\0"[..], "EACCES"),
        (8, 0, b"1\0", "EACCES"),
        (19, 0, b"1\0", "EACCES"),
        (77, 0, b"", "ENOSYS"),
        (u32::MAX, 0, b"", "ENOSYS"),
        (2, 0, b"data", "EINVAL"),
        (2, 0, b"data\0more\0", "EINVAL"),
        (2, 0, b"data/\xff\0", "EINVAL"),
        (2, 0, b"", "EINVAL"),
        (2, 0, b"data/none\0", "ENOENT"),
        (2, 0, b"/\0", "EACCES"),
        (1, 0, b"/local/domain/0\0", "EACCES"),
        (2, 5, b"data\0", "ENOENT"),
        (6, 5, b"\0", "EBUSY"),
        (7, 5, b"T\0", "ENOENT"),
        (7, 5, b"maybe\0", "EINVAL"),
        (11, 0, b"/tool\0value", "EACCES"),
        (13, 0, b"/\0", "EINVAL"),
        (14, 0, b"data\0n0", "EINVAL"),
        (14, 0, b"data\0n0\0", "EACCES"),
        (4, 0, b"data\0token", "EINVAL"),
        (5, 0, b"data\0token\0", "ENOENT"),
        (10, 0, b"-1\0", "EINVAL"),
        (22, 0, b"data\0x\0", "EINVAL"),
    ] {
        let got = rig.ask(kind, transaction, payload);
        assert_eq!(got, Err(format!("{error}\0")), "{kind} {payload:?}");
    }
    assert_eq!(rig.ask_ok(11, 0, "data/a\0value"), "OK\0");
}

#[test]
fn long_lists_come_in_parts_and_are_too_big_in_one() {
    let mut rig = Rig::new();
    let names: Vec<_> = (0..500).map(|i| format!("some-child-{i:03}")).collect();
    for name in &names {
        rig.ask_ok(11, 0, &format!("data/{name}\0"));
    }
    let whole = rig.ask(1, 0, b"data\0");
    assert_eq!(whole, Err("E2BIG\0".into()));
    let mut list = String::new();
    while !list.ends_with("\0\0") {
        let part = rig.ask_ok(22, 0, &format!("data\0{}\0", list.len()));
        assert!(part.len() <= MAX_PAYLOAD);
        list.push_str(part.split_once('\0').unwrap().1);
    }
    assert_eq!(list.trim_end_matches('\0').split('\0').count(), names.len());
    let behind = rig.ask_ok(22, 0, "data\0999999\0");
    assert!(behind.ends_with("\0\0"));
}

#[test]
fn messages_larger_than_the_ring_go_in_pieces() {
    let mut rig = Rig::new();
    let value = "x".repeat(2048);
    assert_eq!(rig.ask_ok(11, 0, &format!("data/a\0{value}")), "OK\0");
    assert_eq!(rig.ask_ok(2, 0, "data/a\0"), value);
}

#[test]
fn a_guest_that_takes_no_answers_is_asked_nothing_more_and_loses_none() {
    let mut rig = Rig::new();
    rig.ask_ok(11, 0, &format!("data/a\0{}", "x".repeat(1000)));
    let requests: Vec<_> = (0..40)
        .map(|_| rig.client.request(2, 0, b"data/a\0"))
        .collect();
    for _ in 0..100 {
        rig.client.send();
        rig.connection.step(&mut rig.store);
    }
    let served = rig.connection.metrics()[0].1;
    assert!(served < 5, "{served} answers pile up");
    rig.run();
    for request in requests {
        assert_eq!(rig.client.answer(request).unwrap().2.len(), 1000);
    }
}

#[test]
fn impossible_indices_and_lengths_break_the_connection_until_it_is_renewed() {
    for (fault, at, word) in [(2u32, 2052u64, 1025u32), (2, 2056, 1), (3, 0, 0)] {
        let mut rig = Rig::new();
        if fault == 3 {
            rig.client.request_of_len(2, 4097);
            rig.client.send();
        } else {
            rig.client.request(2, 0, b"data\0");
            rig.client.send();
            rig.client.poke(at, word);
        }
        rig.connection.step(&mut rig.store);
        assert_eq!(rig.client.peek(ERROR), fault);
        assert!(rig.connection.take_moved());
        rig.client.poke(2052, 0);
        rig.client.poke(2056, 0);
        assert_eq!(rig.connection.step(&mut rig.store), Step::Idle);
        assert_eq!(rig.client.peek(ERROR), fault);

        rig.client.reset();
        rig.client.poke(CONNECTION, RECONNECT);
        rig.connection.step(&mut rig.store);
        assert_eq!(rig.client.peek(CONNECTION), CONNECTED);
        assert_eq!(rig.client.peek(ERROR), 0);
        assert_eq!(rig.ask_ok(11, 0, "data/a\0value"), "OK\0");
    }
}

#[test]
fn a_new_kernel_that_reconnects_gets_nothing_of_the_old_ones() {
    let mut rig = Rig::new();
    rig.ask_ok(4, 0, "data\0token\0");
    rig.client.events();
    let id = rig.ask_ok(6, 0, "\0");
    rig.client.request_of_len(11, 100);
    rig.client.send();
    rig.connection.step(&mut rig.store);
    rig.client.reset();
    rig.client.poke(CONNECTION, RECONNECT);
    rig.connection.step(&mut rig.store);
    assert_eq!(rig.ask_ok(11, 0, "data/a\0value"), "OK\0");
    assert!(rig.client.events().is_empty());
    let id = id.trim_end_matches('\0').parse().unwrap();
    assert_eq!(rig.ask(2, id, b"data/a\0"), Err("ENOENT\0".into()));
}

#[test]
fn a_connection_goes_on_from_its_state_in_the_middle_of_messages() {
    let mut rig = Rig::new();
    let value = "x".repeat(2000);
    let write = format!("data/a\0{value}");
    let first = rig.client.request(11, 0, write.as_bytes());
    let second = rig.client.request(2, 0, b"data/a\0");
    // A new connection before each step, each with what the last one left.
    for _ in 0..40 {
        rig.client.send();
        rig.connection.step(&mut rig.store);
        rig.client.receive();
        let mut bytes = Vec::new();
        ciborium::into_writer(rig.connection.state(), &mut bytes).unwrap();
        let state = ciborium::from_reader(bytes.as_slice()).unwrap();
        rig.connection = Connection::new(rig.connection.memory.clone(), PAGE, state);
    }
    assert_eq!(rig.client.answer(first).unwrap().2, b"OK\0");
    assert_eq!(rig.client.answer(second).unwrap().2, value.as_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_bytes_make_the_store_panic_or_grow_without_bound(
        messages in proptest::collection::vec(
            (0u32..26, 0u32..4, "(/|local|domain|1|data|device|a|@releaseDomain|n1|T|\0| ){0,12}"),
            1..60,
        ),
        noise in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut rig = Rig::new();
        for (kind, transaction, payload) in messages {
            rig.client.request(kind, transaction, payload.as_bytes());
        }
        rig.run();
        rig.client.raw(&noise);
        rig.run();
        let path = Path::new("/").unwrap();
        prop_assert!(rig.store.tree().subtree(&path).len() < 1200);
        // Whatever it was, the guest can start anew.
        rig.client.reset();
        rig.client.poke(CONNECTION, RECONNECT);
        rig.connection.step(&mut rig.store);
        prop_assert_eq!(rig.client.peek(CONNECTION), CONNECTED);
    }

    #[test]
    fn no_indices_make_the_connection_panic(words in proptest::array::uniform8(any::<u32>())) {
        let mut rig = Rig::new();
        for (i, word) in words.into_iter().enumerate() {
            rig.client.poke(2048 + 4 * (i as u64 % 5), word);
            rig.connection.step(&mut rig.store);
        }
    }
}
