//! The xenstore: no request, index, pause or reconnection hurts it, what a
//! guest has there stays bounded, and a guest that starts anew is served.
#![no_main]

use std::sync::atomic::Ordering;

use arbitrary::Arbitrary;
use blanket_devices::xen::store::connection::{Connection, State, Step as Progress};
use blanket_devices::xen::store::{Op, Path, Permissions, Store, Who};
use blanket_fuzz::guest::ram;
use blanket_memory::GuestRam;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

/// The shared page, and where things are in it (`xs_wire.h`).
const PAGE: u64 = 0x1000;
const RING: u32 = 1024;
const RESPONSES: u64 = 1024;
const REQ_CONS: u64 = 2048;
const REQ_PROD: u64 = 2052;
const RSP_CONS: u64 = 2056;
const RSP_PROD: u64 = 2060;
const CONNECTION: u64 = 2068;
const RECONNECT: u32 = 1;
/// `XS_READ`, `XS_WRITE`.
const READ: u32 = 2;
const WRITE: u32 = 11;

/// What paths, values and tokens are put together from.
const WORDS: [&str; 20] = [
    "/",
    "a",
    "b",
    "data",
    "local",
    "domain",
    "0",
    "1",
    "device",
    "control",
    "shutdown",
    "\0",
    "\0\0",
    "T",
    "F",
    "n1",
    "b0",
    "@releaseDomain",
    " ",
    "",
];

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request that is nearly one.
    Request {
        kind: u8,
        transaction: u8,
        words: Vec<u8>,
        /// That the header announces, besides what follows.
        excess: Option<u16>,
    },
    /// A long value.
    Long { len: u16 },
    /// Any bytes as a request.
    Raw(Vec<u8>),
    /// Any word anywhere behind the rings.
    Poke { word: u8, value: u32 },
    /// The guest takes all answers.
    Take,
    /// It starts anew.
    Reconnect,
    /// The monitor writes a node.
    Set { words: Vec<u8> },
    /// The store goes on in another monitor.
    Move,
}

struct Guest {
    ram: GuestRam,
    store: Store,
    connection: Connection,
}

fn text(words: &[u8]) -> String {
    words
        .iter()
        .take(200)
        .map(|word| WORDS[usize::from(*word) % WORDS.len()])
        .collect()
}

/// Two empty directories of the guest's.
fn make_directories(store: &mut Store) {
    for node in ["data", "device"] {
        let path = Path::new(node).expect("a path");
        // At first, neither is there.
        let _ = store.set(&Op::Remove(path.clone()));
        store.set(&Op::Mkdir(path.clone())).expect("a node");
        let owner = Op::SetPermissions(path, Permissions::guest_owns());
        store.set(&owner).expect("a node");
    }
}

impl Guest {
    fn new() -> Self {
        let ram = ram();
        let mut store = Store::default();
        make_directories(&mut store);
        let connection = Connection::new(ram.clone(), GuestAddress(PAGE), State::default());
        connection.initialise().expect("a page");
        Self {
            ram,
            store,
            connection,
        }
    }

    fn word(&self, offset: u64) -> u32 {
        let at = GuestAddress(PAGE + offset);
        self.ram.load(at, Ordering::SeqCst).expect("a page")
    }

    fn set_word(&self, offset: u64, value: u32) {
        let at = GuestAddress(PAGE + offset);
        self.ram.store(value, at, Ordering::SeqCst).expect("a page");
    }

    /// Sends bytes, as far as the store takes them.
    fn send(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let producer = self.word(REQ_PROD);
            if producer.wrapping_sub(self.word(REQ_CONS)) >= RING {
                self.serve();
            }
            let at = PAGE + u64::from(producer % RING);
            self.ram.write_obj(*byte, GuestAddress(at)).expect("a page");
            self.set_word(REQ_PROD, producer.wrapping_add(1));
        }
        self.serve();
    }

    fn request(&mut self, kind: u32, transaction: u32, len: u32, payload: &[u8]) {
        let header = [kind, 7, transaction, len].map(u32::to_le_bytes);
        self.send(&[&header.concat(), payload].concat());
    }

    fn serve(&mut self) {
        while self.connection.step(&mut self.store) == Progress::Served {
            self.store.take_changed();
        }
        self.connection.take_moved();
    }

    /// Takes what the store has sent so far, and then more.
    fn take(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let (consumer, producer) = (self.word(RSP_CONS), self.word(RSP_PROD));
            let waiting = producer.wrapping_sub(consumer);
            if waiting == 0 || waiting > RING {
                return all;
            }
            for index in 0..waiting {
                let at = RESPONSES + u64::from(consumer.wrapping_add(index) % RING);
                let at = GuestAddress(PAGE + at);
                all.push(self.ram.read_obj::<u8>(at).expect("a page"));
            }
            self.set_word(RSP_CONS, producer);
            self.serve();
        }
    }

    fn reconnect(&mut self) {
        self.set_word(CONNECTION, RECONNECT);
        self.serve();
        assert_eq!(self.word(CONNECTION), 0, "no reconnection");
    }

    fn carry_over(&mut self) {
        let mut bytes = Vec::new();
        ciborium::into_writer(&self.store.save(), &mut bytes).expect("a vector takes it");
        let state = ciborium::from_reader(bytes.as_slice()).expect("a state");
        self.store = Store::restore(state).expect("a store");
        let state = self.connection.state().clone();
        self.connection = Connection::new(self.ram.clone(), GuestAddress(PAGE), state);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Request {
                kind,
                transaction,
                words,
                excess,
            } => {
                let payload = text(&words);
                let len = payload.len() as u32 + u32::from(excess.unwrap_or(0));
                self.request(
                    u32::from(kind % 26),
                    u32::from(transaction % 12),
                    len,
                    payload.as_bytes(),
                );
            }
            Step::Long { len } => {
                let payload = [b"data/long\0".as_slice(), &vec![b'x'; len.into()]].concat();
                self.request(WRITE, 0, payload.len() as u32, &payload);
            }
            Step::Raw(bytes) => self.send(&bytes),
            Step::Poke { word, value } => {
                self.set_word(REQ_CONS + 4 * u64::from(word % 8), value);
                self.serve();
            }
            Step::Take => drop(self.take()),
            Step::Reconnect => self.reconnect(),
            Step::Set { words } => {
                if let Ok(path) = Path::new(&text(&words)) {
                    // The root cannot be removed; whatever else can.
                    let _ = self.store.set(&Op::Write(path, b"set".to_vec()));
                    self.serve();
                }
            }
            Step::Move => self.carry_over(),
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut guest = Guest::new();
    let mut set = 0;
    for step in steps {
        set += usize::from(matches!(step, Step::Set { .. }));
        guest.step(step);
    }
    let count = |guest: &Guest, name: &str| {
        let metrics = guest.store.metrics();
        metrics.iter().find(|m| m.0 == name).expect("a counter").1
    };
    // What the monitor makes below the guest's nodes is the guest's, too.
    assert!(count(&guest, "guest_nodes") <= 1000 + 64 * set as u64);
    assert!(count(&guest, "watches") <= 128);
    assert!(count(&guest, "events_waiting") <= 1024 + 128);
    assert!(count(&guest, "transactions_open") <= 10);

    guest.reconnect();
    make_directories(&mut guest.store);
    guest.take();
    guest.request(WRITE, 0, 11, b"data/x\0last");
    assert!(guest.take().ends_with(b"OK\0"), "no answer");
    guest.request(READ, 0, 7, b"data/x\0");
    assert!(guest.take().ends_with(b"last"), "no value");
    let path = Path::new("data/x").expect("a path");
    let value = guest.store.tree().read(Who::Toolstack, &path);
    assert_eq!(value.expect("a node"), b"last");
});
