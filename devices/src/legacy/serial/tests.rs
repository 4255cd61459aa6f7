use super::*;
use crate::worker::Worker;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const DATA: u8 = 0;
const IER: u8 = 1;
const LSR: u8 = 5;
const SCRATCH: u8 = 7;
const DATA_READY: u8 = 1;

struct Rig {
    serial: Serial,
    interrupt: EventFd,
    socket: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("serial");
        let port = CharPort::open(&char::Spec {
            socket: Some(socket.clone()),
            ..char::Spec::default()
        });
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let workers: Workers = [Worker::spawn("serial", Box::new(|| Ok(()))).unwrap()].into();
        let serial = Serial::new(port.unwrap(), interrupt.try_clone().unwrap(), workers);
        Self {
            serial: serial.unwrap(),
            interrupt,
            socket,
            _folder: folder,
        }
    }

    fn started() -> Self {
        let mut rig = Self::new();
        rig.serial.start().unwrap();
        rig
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).unwrap();
        stream
    }

    fn write(&self, offset: u8, value: u8) {
        lock(self.serial.uart()).write(offset, value);
    }

    fn say(&self, text: &[u8]) {
        text.iter().for_each(|byte| self.write(DATA, *byte));
    }

    /// What a polling driver reads until it has `len` bytes.
    fn hear(&self, len: usize) -> Vec<u8> {
        let mut heard = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(30);
        while heard.len() < len {
            assert!(Instant::now() < deadline, "{} of {len} bytes", heard.len());
            let mut uart = lock(self.serial.uart());
            if uart.read(LSR) & DATA_READY != 0 {
                heard.push(uart.read(DATA));
            }
        }
        heard
    }
}

fn take(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_the_guest_writes_reaches_the_client() {
    let rig = Rig::started();
    let mut client = rig.connect();
    let text: Vec<u8> = (0..3000).map(|i| (i % 250) as u8).collect();
    rig.say(&text);
    assert_eq!(take(&mut client, text.len()), text);
    let counted = rig.serial.metrics();
    assert!(counted.contains(&("output_bytes", 3000)), "{counted:?}");
}

#[test]
fn input_of_any_length_passes_the_fifo_whole_with_an_interrupt() {
    let rig = Rig::started();
    rig.write(IER, 1);
    let mut client = rig.connect();
    let text: Vec<u8> = (0..5000).map(|i| (i % 247) as u8).collect();
    client.write_all(&text).unwrap();
    assert_eq!(rig.hear(text.len()), text);
    assert!(rig.interrupt.read().unwrap() > 0);
}

#[test]
fn loopback_keeps_the_outside_out_until_it_ends() {
    let rig = Rig::started();
    rig.write(MCR, MCR_LOOP);
    let mut client = rig.connect();
    client.write_all(b"outside").unwrap();
    rig.write(DATA, b'i');
    assert_eq!(rig.hear(1), b"i");
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(lock(rig.serial.uart()).read(LSR) & DATA_READY, 0);
    rig.write(MCR, 0);
    assert_eq!(rig.hear(7), b"outside");
}

#[test]
fn a_paused_port_is_still_and_goes_on_with_what_came_meanwhile() {
    let mut rig = Rig::started();
    let mut client = rig.connect();
    rig.say(b"a");
    assert_eq!(take(&mut client, 1), b"a");
    rig.serial.pause().unwrap();
    client.write_all(b"later").unwrap();
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(lock(rig.serial.uart()).read(LSR) & DATA_READY, 0);
    rig.serial.resume().unwrap();
    assert_eq!(rig.hear(5), b"later");
}

#[test]
fn registers_and_fifo_are_carried_over_and_a_reset_forgets_them() {
    let rig = Rig::new();
    rig.write(SCRATCH, 0x5a);
    rig.write(MCR, MCR_LOOP);
    rig.say(b"fifo");
    let saved = rig.serial.save().unwrap();
    let mut other = Rig::new();
    other.serial.restore(&saved).unwrap();
    assert_eq!(other.hear(4), b"fifo");
    assert_eq!(lock(other.serial.uart()).read(SCRATCH), 0x5a);
    assert!(lock(other.serial.uart()).loopback);
    other.serial.reset().unwrap();
    assert_eq!(lock(other.serial.uart()).read(SCRATCH), 0);
    assert!(!lock(other.serial.uart()).loopback);
}

#[test]
fn a_state_with_more_than_the_fifo_holds_is_refused() {
    let mut rig = Rig::new();
    let mut state = State::from(SerialState::default());
    state.in_buffer = vec![0; 65];
    let saved = SavedState::pack(NAME, 1, &state).unwrap();
    assert!(rig.serial.restore(&saved).is_err());
}

#[test]
fn halting_sends_the_last_words_and_removes_the_socket() {
    let mut rig = Rig::started();
    let mut client = rig.connect();
    rig.say(b"first");
    assert_eq!(take(&mut client, 5), b"first");
    rig.say(b"panic: the end");
    rig.serial.halt();
    let mut last = String::new();
    client.read_to_string(&mut last).unwrap();
    assert_eq!(last, "panic: the end");
    assert!(!rig.socket.exists());
}

#[test]
fn a_guest_that_nobody_serves_is_not_blocked_and_memory_stays_bounded() {
    let rig = Rig::new();
    for _ in 0..BUFFER + 1000 {
        rig.write(DATA, b'x');
    }
    let (bytes, lost) = lock(rig.serial.uart()).take_output();
    assert_eq!((bytes.len(), lost), (BUFFER, 1000));
}

proptest! {
    #[test]
    fn no_access_to_the_registers_panics(accesses: Vec<(bool, u8, u8)>) {
        let rig = Rig::new();
        let mut uart = lock(rig.serial.uart());
        for (write, offset, value) in accesses {
            if write {
                uart.write(offset, value);
            } else {
                uart.read(offset);
            }
        }
    }
}
