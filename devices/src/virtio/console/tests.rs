use super::super::testing::{Driver, Interrupts, ram, until};
use super::*;
use crate::worker::{HandlerId, Worker};
use blanket_memory::GuestRam;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 8 << 20;
const OUT: u64 = 0x10_0000;
const IN: u64 = 0x8_0000;

struct Rig {
    device: Console,
    worker: Worker,
    id: Option<HandlerId>,
    memory: GuestRam,
    rx: Driver,
    tx: Driver,
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
        let memory = ram(RAM);
        let mut rig = Self {
            device: Console::new("console0", port.unwrap()),
            worker: Worker::spawn("console", Box::new(|| Ok(()))).unwrap(),
            id: None,
            rx: Driver::new(&memory, 0, 0, 64),
            tx: Driver::new(&memory, 1, 0x4000, 64),
            memory,
            socket,
            _folder: folder,
        };
        rig.activate();
        rig
    }

    fn activate(&mut self) {
        let handlers = self
            .device
            .activate(Activation {
                ram: self.memory.clone(),
                features: 0,
                queues: vec![self.rx.queue(true), self.tx.queue(true)],
                interrupt: Arc::new(Interrupts::default()),
            })
            .unwrap();
        for handler in handlers {
            self.id = Some(self.worker.add(handler).unwrap());
        }
    }

    fn park(&mut self) -> Box<dyn QueueHandler> {
        let handler = self.worker.remove(self.id.take().unwrap()).unwrap();
        (handler as Box<dyn Any>).downcast::<Line>().unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).unwrap();
        stream
    }

    /// Connects, and returns once the port has taken the client.
    fn attach(&mut self) -> UnixStream {
        let mut client = self.connect();
        self.memory.write_obj(b'>', GuestAddress(OUT)).unwrap();
        self.tx.add(&[(OUT, 1, false)]);
        self.tx.kick();
        self.tx.wait_used();
        assert_eq!(take(&mut client, 1), b">");
        client
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

fn take(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn megabytes_reach_a_slow_client_whole_and_the_ring_holds_the_rest() {
    let mut rig = Rig::new();
    let mut client = rig.attach();
    let sent = pattern(4 << 20);
    rig.write(OUT, &sent);
    for (i, part) in sent.chunks(128 << 10).enumerate() {
        let address = OUT + (i as u64) * (128 << 10);
        rig.tx.add(&[
            (address, 100, false),
            (address + 100, part.len() as u32 - 100, false),
        ]);
    }
    rig.tx.kick();
    // The client does not read: most of the ring stays where it is.
    std::thread::sleep(Duration::from_millis(50));
    let before = std::iter::from_fn(|| rig.tx.used()).count();
    assert!(before < 32, "{before} of 32 buffers were taken");
    assert_eq!(take(&mut client, sent.len()), sent);
    for _ in before..32 {
        rig.tx.wait_used();
    }
    let dropped = rig
        .device
        .metrics()
        .into_iter()
        .find(|m| m.0 == "dropped_bytes");
    assert_eq!(dropped.unwrap().1, 0);
}

#[test]
fn megabytes_reach_the_guest_whole_in_whatever_buffers_it_offers() {
    let mut rig = Rig::new();
    let client = rig.connect();
    let sent = pattern(2 << 20);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || (&client).write_all(&sent).map(|()| client)
    });
    let mut got = Vec::new();
    let lens = [1, 4096, 30, 20_000];
    for i in 0.. {
        let len = lens[i % lens.len()];
        rig.rx.add(&[(IN, len, true), (IN + 0x1_0000, 50, true)]);
        rig.rx.kick();
        let (_, n) = rig.rx.wait_used();
        let first = n.min(len);
        got.extend(rig.read(IN, first as usize));
        got.extend(rig.read(IN + 0x1_0000, (n - first) as usize));
        if got.len() >= sent.len() {
            break;
        }
    }
    assert_eq!(got, sent);
    writer.join().unwrap().unwrap();
}

#[test]
fn without_buffers_input_stays_in_the_socket_and_the_worker_rests() {
    let mut rig = Rig::new();
    let mut client = rig.attach();
    client.write_all(b"hello").unwrap();
    std::thread::sleep(Duration::from_millis(10));
    let input = |rig: &Rig| {
        rig.device
            .metrics()
            .into_iter()
            .find(|m| m.0 == "input_bytes")
            .unwrap()
            .1
    };
    assert_eq!(input(&rig), 0);
    rig.rx.add(&[(IN, 3, true)]);
    rig.rx.add(&[(IN + 16, 0, true)]);
    rig.rx.add(&[(IN + 32, 64, true)]);
    rig.rx.kick();
    assert_eq!(rig.rx.wait_used().1, 3);
    assert_eq!(rig.rx.wait_used().1, 0);
    assert_eq!(rig.rx.wait_used().1, 2);
    assert_eq!(
        (rig.read(IN, 3), rig.read(IN + 32, 2)),
        (b"hel".to_vec(), b"lo".to_vec())
    );
}

#[test]
fn without_a_client_output_is_dropped_and_the_guest_goes_on() {
    let mut rig = Rig::new();
    rig.write(OUT, &pattern(1 << 20));
    for _ in 0..8 {
        rig.tx.add(&[(OUT, 1 << 20, false)]);
    }
    rig.tx.kick();
    for _ in 0..8 {
        rig.tx.wait_used();
    }
    let dropped = rig
        .device
        .metrics()
        .into_iter()
        .find(|m| m.0 == "dropped_bytes");
    assert_eq!(dropped.unwrap().1, (8 << 20) - char::SCROLLBACK as u64);
}

#[test]
fn a_buffer_that_was_sent_in_part_goes_on_after_a_pause() {
    let mut rig = Rig::new();
    let mut client = rig.attach();
    let sent = pattern(2 << 20);
    rig.write(OUT, &sent);
    rig.tx.add(&[(OUT, 2 << 20, false)]);
    rig.tx.kick();
    until("a part", || {
        rig.device
            .metrics()
            .into_iter()
            .any(|(n, v)| n == "output_bytes" && v > 60_000)
    });
    let parked = [rig.park()];
    let saved = rig.device.save(&parked).unwrap();
    let State { sent: part } = saved.unpack(SAVED, 1).unwrap();
    assert!(part > 0 && part < sent.len(), "{part}");
    let [line] = parked;
    rig.device.restore(&saved).unwrap();
    assert_eq!(rig.device.state.sent, part);
    rig.worker.add(line).unwrap();
    assert_eq!(take(&mut client, sent.len()), sent);
    rig.tx.wait_used();
}

#[test]
fn a_client_stays_attached_over_a_reset_and_halting_removes_the_socket() {
    let mut rig = Rig::new();
    let mut client = rig.attach();
    let parked = rig.park();
    rig.device.reset(vec![parked]);
    rig.rx = Driver::new(&rig.memory, 0, 0, 64);
    rig.tx = Driver::new(&rig.memory, 1, 0x4000, 64);
    for address in [0, 0x4000] {
        rig.write(address, &[0; 0x2000]);
    }
    rig.activate();
    rig.write(OUT, b"again");
    rig.tx.add(&[(OUT, 5, false)]);
    rig.tx.kick();
    assert_eq!(take(&mut client, 5), b"again");
    let parked = rig.park();
    rig.device.reset(vec![parked]);
    rig.device.halt();
    assert!(!rig.socket.exists());
}

#[test]
fn a_driver_without_both_queues_is_refused_and_may_try_again() {
    let mut rig = Rig::new();
    let parked = rig.park();
    rig.device.reset(vec![parked]);
    let one = rig.device.activate(Activation {
        ram: rig.memory.clone(),
        features: 0,
        queues: vec![rig.rx.queue(true)],
        interrupt: Arc::new(Interrupts::default()),
    });
    assert!(one.is_err());
    rig.activate();
    rig.attach();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_ring_makes_the_console_panic(
        descriptors in proptest::collection::vec(
            (0u64..0x10_0000, prop_oneof![0u32..0x3000, any::<u32>()], 0u16..8, 0u16..9),
            8,
        ),
        heads in proptest::collection::vec(0u16..10, 1..12),
    ) {
        let memory = ram(0x8_0000);
        let mut drivers = [0u16, 1].map(|i| Driver::new(&memory, i, 0x1000 * u64::from(i), 8));
        let mut line = Line {
            queues: [drivers[0].queue(true), drivers[1].queue(true)],
            port: CharPort::open(&char::Spec::default()).unwrap(),
            buffers: Buffers::default(),
            step: vec![0; STEP],
            state: State::default(),
        };
        for driver in &mut drivers {
            for (i, (address, len, flags, next)) in descriptors.iter().enumerate() {
                let address = address + 0x2000;
                driver.describe(i as u16, Descriptor::new(address, *len, *flags, *next));
            }
        }
        for head in heads {
            drivers[0].offer(head);
            drivers[1].offer(head);
            line.send();
            line.receive();
        }
    }
}
