use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::testing::{ram, until};
use crate::worker::Worker;
use crate::xen::testing::Events;

const PAGE: SharedPage = SharedPage {
    address: 0x2000,
    port: 7,
};

/// The guest's end.
#[derive(Clone)]
struct Guest {
    input: Stream,
    output: Stream,
    memory: GuestRam,
    events: Arc<Events>,
}

impl Guest {
    /// Writes what the ring has room for.
    fn write(&self, data: &[u8]) -> usize {
        let n = self.output.write(data).unwrap();
        self.events.send(PAGE.port);
        n
    }

    /// Reads what has arrived.
    fn read(&self) -> Vec<u8> {
        let mut data = vec![0; 1024];
        let n = self.input.read(&mut data).unwrap();
        data.truncate(n);
        if n > 0 {
            self.events.send(PAGE.port);
        }
        data
    }

    fn poke(&self, offset: u64, value: u32) {
        let at = GuestAddress(PAGE.address + offset);
        self.memory.store(value, at, Ordering::SeqCst).unwrap();
    }
}

struct Rig {
    console: Console,
    guest: Guest,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("console");
        let port = CharPort::open(&char::Spec {
            socket: Some(socket.clone()),
            ..char::Spec::default()
        });
        let memory = ram(0x8000);
        let events = Arc::new(Events::default());
        let workers: Workers = [Worker::spawn("console", Box::new(|| Ok(()))).unwrap()].into();
        let address = GuestAddress(PAGE.address);
        let mut rig = Self {
            console: Console::new(port.unwrap(), memory.clone(), events.clone(), workers),
            guest: Guest {
                input: Stream::new(memory.clone(), address, INPUT),
                output: Stream::new(memory.clone(), address, OUTPUT),
                memory,
                events,
            },
            socket,
            _folder: folder,
        };
        rig.console.attach(PAGE).unwrap();
        rig.console.run().unwrap();
        rig
    }

    /// Connects, and returns once the port has taken the client.
    fn attach(&self) -> UnixStream {
        let mut client = UnixStream::connect(&self.socket).unwrap();
        let patience = Some(Duration::from_secs(30));
        client.set_read_timeout(patience).unwrap();
        assert_eq!(self.guest.write(b">"), 1);
        assert_eq!(take(&mut client, 1), b">");
        client
    }

    fn counter(&self, name: &str) -> u64 {
        let metrics = self.console.metrics();
        metrics.into_iter().find(|m| m.0 == name).unwrap().1
    }
}

fn take(client: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    client.read_exact(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn bytes_go_both_ways_whole_and_in_order() {
    let rig = Rig::new();
    let mut client = rig.attach();
    let data = pattern(100_000);
    let (guest, sent) = (rig.guest.clone(), data.clone());
    let writer = std::thread::spawn(move || {
        let mut rest = sent.as_slice();
        until("room in the ring", || {
            rest = &rest[guest.write(rest)..];
            rest.is_empty()
        });
    });
    assert_eq!(take(&mut client, data.len()), data);
    writer.join().unwrap();
    let sent = data.clone();
    let typist = std::thread::spawn(move || {
        client.write_all(&sent).unwrap();
        client
    });
    let mut got = Vec::new();
    until("all input", || {
        got.extend(rig.guest.read());
        got.len() >= data.len()
    });
    assert_eq!(got, data);
    typist.join().unwrap();
    assert_eq!(rig.counter("dropped_bytes"), 0);
    assert!(rig.guest.events.notified() > 0);
}

#[test]
fn without_a_client_the_guest_writes_on_and_what_is_lost_is_counted() {
    let rig = Rig::new();
    let data = pattern(100_000);
    let mut rest = data.as_slice();
    until("room in the ring", || {
        rest = &rest[rig.guest.write(rest)..];
        rest.is_empty()
    });
    until("all output", || {
        rig.counter("output_bytes") == data.len() as u64
    });
    let dropped = rig.counter("dropped_bytes");
    assert_eq!(dropped, (data.len() - char::SCROLLBACK) as u64);
}

#[test]
fn a_client_that_does_not_read_makes_the_guest_wait_and_loses_nothing() {
    let rig = Rig::new();
    let mut client = rig.attach();
    let data = pattern(2 << 20);
    let mut sent = 0;
    // Until nothing moves for a while.
    let mut idle = 0;
    while idle < 50 {
        let n = rig.guest.write(&data[sent..]);
        sent += n;
        idle = if n > 0 { 0 } else { idle + 1 };
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(sent < data.len(), "all of it went to nobody");
    assert_eq!(take(&mut client, sent), data[..sent]);
    assert_eq!(rig.counter("dropped_bytes"), 0);
}

#[test]
fn a_paused_console_moves_nothing_and_its_successor_everything() {
    let mut rig = Rig::new();
    let mut client = rig.attach();
    rig.console.park().unwrap();
    rig.guest.write(b"held back");
    client.write_all(b"typed").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.counter("output_bytes"), 1);
    assert!(rig.guest.read().is_empty());
    let state = rig.console.save().unwrap();
    rig.console.detach().unwrap();
    assert!(rig.guest.events.bound().is_empty());
    rig.console.restore(&state).unwrap();
    rig.console.run().unwrap();
    assert_eq!(take(&mut client, 9), b"held back");
    let mut got = Vec::new();
    until("input", || {
        got.extend(rig.guest.read());
        got == b"typed"
    });
}

#[test]
fn a_guest_that_breaks_its_ring_has_no_console_until_it_is_reset() {
    let mut rig = Rig::new();
    let mut client = rig.attach();
    rig.guest.poke(OUTPUT.producer, 5000);
    rig.guest.events.send(PAGE.port);
    std::thread::sleep(Duration::from_millis(20));
    rig.guest.poke(OUTPUT.producer, 10);
    rig.guest.poke(OUTPUT.consumer, 0);
    rig.guest.events.send(PAGE.port);
    std::thread::sleep(Duration::from_millis(20));
    rig.console.park().unwrap();
    assert_eq!(rig.counter("output_bytes"), 1);
    rig.console.attach(PAGE).unwrap();
    rig.console.run().unwrap();
    rig.guest.write(b"again");
    assert_eq!(take(&mut client, 5), b"again");
}

#[test]
fn a_page_outside_memory_or_a_foreign_port_is_refused() {
    let mut rig = Rig::new();
    assert!(rig.console.attach(PAGE).is_err(), "it runs");
    rig.console.park().unwrap();
    let far = SharedPage {
        address: 1 << 40,
        ..PAGE
    };
    assert!(rig.console.attach(far).is_err());
    assert!(
        rig.console
            .attach(SharedPage { port: 1000, ..PAGE })
            .is_err()
    );
    rig.console.attach(PAGE).unwrap();
    rig.console.halt();
    assert!(!rig.socket.exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn no_indices_make_the_console_panic(words in proptest::array::uniform8(any::<u32>())) {
        let mut rig = Rig::new();
        for (i, word) in words.into_iter().enumerate() {
            rig.guest.poke(3072 + 4 * (i as u64 % 4), word);
            rig.guest.events.send(PAGE.port);
        }
        rig.console.park().unwrap();
        rig.console.attach(PAGE).unwrap();
    }
}
