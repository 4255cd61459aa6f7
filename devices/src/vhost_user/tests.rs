use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
/// VERSION_1, protocol features, a log, merged buffers.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 26 | 1 << 15;
/// Many queues, a log in shared memory, and acknowledgements.
const PROTOCOL: u64 = 1 | 2 | 8;

/// A message as a backend gets it.
struct Message {
    request: u32,
    body: Vec<u8>,
    needs_reply: bool,
    file: Option<File>,
}

impl Message {
    fn word(&self, at: usize) -> u32 {
        let bytes = self.body.get(4 * at..4 * at + 4);
        bytes.map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()))
    }
}

fn receive(socket: &mut UnixStream) -> Option<Message> {
    let mut header = [0u8; 12];
    let mut iovec = [libc::iovec {
        iov_base: header.as_mut_ptr().cast(),
        iov_len: 12,
    }];
    let mut fds = [0; 32];
    // SAFETY: the vector is the header.
    let (n, count) = unsafe { socket.recv_with_fds(&mut iovec, &mut fds) }.ok()?;
    // SAFETY: the call has just made the descriptors.
    let files = fds[..count]
        .iter()
        .map(|fd| unsafe { File::from_raw_fd(*fd) });
    let file = files.collect::<Vec<_>>().into_iter().next();
    if n != 12 {
        return None;
    }
    let word = |i: usize| u32::from_le_bytes(header[4 * i..4 * i + 4].try_into().unwrap());
    let mut body = vec![0; word(2) as usize];
    socket.read_exact(&mut body).ok()?;
    Some(Message {
        request: word(0),
        needs_reply: word(1) & 8 != 0,
        body,
        file,
    })
}

fn reply(socket: &mut UnixStream, request: u32, value: u64) {
    let mut bytes = Vec::new();
    for word in [request, 5, 8] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(value.to_le_bytes());
    // The front end may have gone.
    let _ = socket.write_all(&bytes);
}

/// Serves one connection as a good backend of `pairs` pairs does, whose rings
/// stopped at `base`; returns what it was told.
fn serve(socket: UnixStream, pairs: u64, base: u32) -> Vec<Message> {
    serve_with(socket, pairs, base, PROTOCOL)
}

fn serve_with(mut socket: UnixStream, pairs: u64, base: u32, protocol: u64) -> Vec<Message> {
    let mut told = Vec::new();
    while let Some(message) = receive(&mut socket) {
        let answer = match message.request {
            GET_FEATURES => Some(FEATURES),
            GET_PROTOCOL_FEATURES => Some(protocol),
            GET_QUEUE_NUM => Some(pairs),
            GET_VRING_BASE => Some(u64::from(message.word(0)) | u64::from(base) << 32),
            GET_INFLIGHT_FD => None,
            _ if message.needs_reply => Some(0),
            _ => None,
        };
        if message.request == GET_INFLIGHT_FD {
            // The header, and what was asked for with a size.
            let mut bytes = [GET_INFLIGHT_FD, 5, 24].map(u32::to_le_bytes).concat();
            bytes.extend(4096u64.to_le_bytes());
            bytes.extend(&message.body[8..]);
            let memory = tempfile::tempfile().unwrap();
            memory.set_len(4096).unwrap();
            socket.send_with_fd(&bytes[..], memory.as_raw_fd()).unwrap();
        }
        if message.request == SET_LOG_BASE {
            // It has written the page with this number.
            let log = message.file.as_ref().unwrap();
            log.write_all_at(&[1 << 5], 0).unwrap();
            // Some answer nothing, which is an answer, too.
            let empty = [SET_LOG_BASE, 5, 0].map(u32::to_le_bytes);
            let _ = socket.write_all(empty.as_flattened());
        }
        if let Some(answer) = answer {
            reply(&mut socket, message.request, answer);
        }
        told.push(message);
    }
    told
}

fn watchdog() -> Watchdog {
    Watchdog::spawn(Box::new(|| Ok(()))).unwrap()
}

fn event() -> vmm_sys_util::eventfd::EventFd {
    vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

/// Two rings in a page of shared memory.
fn setup() -> Setup {
    let spec = blanket_memory::Spec {
        size: 1 << 16,
        backing: blanket_memory::Backing::Small,
        shared: true,
    };
    let ring = |at| Ring {
        size: 16,
        base: 7,
        descriptors: at,
        available: at + 0x400,
        used: at + 0x800,
        kick: event(),
        call: event(),
        enabled: true,
    };
    Setup {
        features: 1 << 32,
        memory: blanket_memory::build_at(&spec, &[(GuestAddress(0), 1 << 16)]).unwrap(),
        rings: vec![ring(0), ring(0x1000)],
        resumed: false,
    }
}

#[test]
fn a_backend_is_greeted_told_of_its_rings_and_stopped() {
    for pairs in [1, 2] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let backend = std::thread::spawn(move || serve(theirs, 2, 9));
        let watchdog = watchdog();
        let mut session = Session::greet(ours, pairs, &watchdog).unwrap();
        assert_eq!(session.features, 1 << 32 | 1 << 15);
        session.start(&setup(), None, &mut None, &watchdog).unwrap();
        session.enable(0, &watchdog).unwrap();
        assert_eq!(session.stop(&watchdog).unwrap(), [9, 9]);
        drop(session);
        let told = backend.join().unwrap();
        let of = |request: u32| told.iter().filter(move |m| m.request == request);
        assert_eq!(of(SET_MEM_TABLE).count(), 1);
        let bases: Vec<_> = of(SET_VRING_BASE).map(|m| (m.word(0), m.word(1))).collect();
        assert_eq!(bases, [(0, 7), (1, 7)]);
        let enabled: Vec<_> = of(SET_VRING_ENABLE).map(|m| m.word(1)).collect();
        assert_eq!(enabled, [1, 1, 0, 0]);
        // It does not learn where its memory lies in this process.
        let table = of(SET_MEM_TABLE).next().unwrap();
        assert_eq!((table.word(6), table.word(7)), (0, 1 << 12));
    }
}

#[test]
fn a_backend_notes_what_it_writes_from_when_it_is_asked_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let backend = std::thread::spawn(move || serve(listener.accept().unwrap().0, 1, 3));
    let opened = Opened::connect(&path, 1).unwrap();
    let logger = opened.logger().unwrap();
    let kept = opened.keep(|| Box::new(|| Ok(()))).unwrap();
    let up = Arc::<AtomicBool>::default();
    kept.start(Box::new(Counted {
        begun: Arc::default(),
        up: Arc::clone(&up),
    }));
    until("link", || up.load(Ordering::SeqCst));
    let ram = setup().memory;
    let log = logger.start(1 << 16).unwrap();
    let pages = log.take(&ram);
    assert!(pages.count() == 1 && pages.contains(0, 5));
    logger.stop();
    drop(kept);
    let told = backend.join().unwrap();
    let of = |request: u32| told.iter().filter(move |m| m.request == request);
    let noting: Vec<_> = of(SET_FEATURES).map(|m| m.word(0) >> 26 & 1).collect();
    assert_eq!(noting, [0, 1, 0]);
    // Its own writes to the used rings, too, at their guest-physical addresses.
    let rings: Vec<_> = of(SET_VRING_ADDR).map(|m| (m.word(1), m.word(8))).collect();
    assert_eq!(
        rings,
        [(0, 0), (0, 0), (1, 0x800), (1, 0x1800), (0, 0), (0, 0)]
    );
}

#[test]
fn what_a_backend_was_at_is_handed_to_its_successor() {
    let watchdog = watchdog();
    let mut inflight = None;
    let mut told = Vec::new();
    for resumed in [false, true, false] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let tracks = PROTOCOL | 1 << 12;
        let backend = std::thread::spawn(move || serve_with(theirs, 1, 9, tracks));
        let mut session = Session::greet(ours, 1, &watchdog).unwrap();
        let setup = Setup { resumed, ..setup() };
        session
            .start(&setup, None, &mut inflight, &watchdog)
            .unwrap();
        drop(session);
        told.push(backend.join().unwrap());
    }
    let files = |told: &[Message], request: u32| -> Vec<_> {
        let of = told.iter().filter(|message| message.request == request);
        of.map(|message| {
            let file = message.file.as_ref();
            (
                message.word(4),
                file.map(|file| file.metadata().unwrap().ino()),
            )
        })
        .collect()
    };
    let asked: Vec<_> = told
        .iter()
        .map(|told| files(told, GET_INFLIGHT_FD))
        .collect();
    let kept: Vec<_> = told
        .iter()
        .map(|told| files(told, SET_INFLIGHT_FD))
        .collect();
    // Two rings of 16 entries. A successor is not asked; other rings begin anew.
    let rings = 2 | 16 << 16;
    assert_eq!(asked, [vec![(rings, None)], vec![], vec![(rings, None)]]);
    assert_eq!(kept[0], kept[1]);
    assert_ne!(kept[1], kept[2]);
}

#[test]
fn too_few_queues_missing_features_and_private_memory_are_named() {
    let watchdog = watchdog();
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || serve(theirs, 2, 0));
    let error = Session::greet(ours, 3, &watchdog).err().unwrap();
    assert!(matches!(error, Error::Pairs { pairs: 3, most: 2 }));
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || serve(theirs, 2, 0));
    let mut session = Session::greet(ours, 1, &watchdog).unwrap();
    let mut lacking = setup();
    lacking.features |= 1;
    let error = session
        .start(&lacking, None, &mut None, &watchdog)
        .unwrap_err();
    assert!(matches!(error, Error::Features(1)), "{error}");
    let mut private = setup();
    private.memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
    let error = session
        .start(&private, None, &mut None, &watchdog)
        .unwrap_err()
        .to_string();
    assert!(error.contains("--shared-memory"), "{error}");
}

#[test]
fn a_silent_backend_does_not_hold_up_the_monitor() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let begin = Instant::now();
    let error = Session::greet(ours, 1, &watchdog()).err().unwrap();
    assert!(matches!(error, Error::Protocol(_)), "{error}");
    assert!(begin.elapsed() < 10 * PATIENCE);
}

#[test]
fn a_position_that_no_ring_has_is_refused() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || serve(theirs, 1, 0x1_0000));
    let watchdog = watchdog();
    let mut session = Session::greet(ours, 1, &watchdog).unwrap();
    session.start(&setup(), None, &mut None, &watchdog).unwrap();
    let error = session.stop(&watchdog).unwrap_err();
    assert!(matches!(error, Error::Base(0x1_0000)), "{error}");
}

/// Rings that count what they are told.
struct Counted {
    begun: Arc<AtomicUsize>,
    up: Arc<AtomicBool>,
}

impl Rings for Counted {
    fn begin(&mut self) -> io::Result<Setup> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        Ok(setup())
    }

    fn link(&mut self, up: bool) {
        self.up.store(up, Ordering::SeqCst);
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "no {what} within 60 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Accepts one connection and serves it until the returned socket is shut down.
fn backend(listener: UnixListener) -> std::thread::JoinHandle<UnixStream> {
    std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let ours = socket.try_clone().unwrap();
        std::thread::spawn(move || serve(socket, 1, 3));
        ours
    })
}

#[test]
fn a_backend_that_has_gone_takes_the_link_along_and_its_successor_brings_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    assert!(matches!(
        Opened::connect(&path, 1),
        Err(Error::Connect { .. })
    ));
    let first = backend(UnixListener::bind(&path).unwrap());
    let opened = Opened::connect(&path, 1).unwrap();
    let kept = opened.keep(|| Box::new(|| Ok(()))).unwrap();
    let (begun, up) = (Arc::default(), Arc::<AtomicBool>::default());
    kept.start(Box::new(Counted {
        begun: Arc::clone(&begun),
        up: Arc::clone(&up),
    }));
    until("link", || up.load(Ordering::SeqCst));
    std::fs::remove_file(&path).unwrap();
    first
        .join()
        .unwrap()
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    until("loss", || !up.load(Ordering::SeqCst));
    assert_eq!(kept.metrics()[0].1, 0);
    let second = backend(UnixListener::bind(&path).unwrap());
    until("link", || up.load(Ordering::SeqCst));
    assert_eq!(begun.load(Ordering::SeqCst), 2);
    assert_eq!(kept.metrics().map(|(_, value)| value), [1, 2]);
    assert_eq!(kept.stop().unwrap(), Some(vec![3, 3]));
    // Stopped, it stays connected.
    assert_eq!(kept.stop().unwrap(), Some(vec![]));
    kept.handle().give_up();
    until("loss", || kept.metrics()[0].1 == 0);
    assert_eq!(kept.stop().unwrap(), None);
    drop(second.join().unwrap());
}

#[test]
fn a_guests_own_queues_are_passed_through_and_stop_where_they_can_be() {
    use crate::virtio::net::PassedNet;
    use crate::virtio::testing::Driver;
    use crate::virtio::{Activation, Device};
    use virtio_queue::QueueT;

    let mac = blanket_drivers::mac::MacAddress([2, 0, 0, 0, 0, 1]);
    // What the backend says counts only if the driver has got so far.
    for (told, next) in [(2, 2), (9, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let backend = std::thread::spawn(move || serve(listener.accept().unwrap().0, 1, told));
        let kept = Opened::connect(&path, 1).unwrap();
        let kept = kept.keep(|| Box::new(|| Ok(()))).unwrap();
        let ram = setup().memory;
        let mut net = PassedNet::new("net0", kept, &ram, mac, None).unwrap();
        // Merged buffers are the backend's; it has no event indices.
        assert_eq!(net.features() & (1 << 15 | 1), 1 << 15);
        assert_eq!(net.transport_features(), 1 << 32);
        assert_eq!(net.config()[6], 0, "the link is down");
        let mut drivers = [(0, 0x1000), (1, 0x4000)].map(|(i, at)| Driver::new(&ram, i, at, 16));
        for driver in &mut drivers {
            for _ in 0..3 {
                driver.add(&[(0x8000, 64, true)]);
            }
        }
        let interrupts = Arc::clone(&drivers[0].interrupts);
        let mut handlers = net
            .activate(Activation {
                ram: ram.clone(),
                features: 1 << 32 | 1 << 15,
                queues: drivers.iter().map(|driver| driver.queue(false)).collect(),
                interrupt: Arc::clone(&interrupts) as Arc<dyn crate::virtio::Interrupt>,
            })
            .unwrap();
        handlers[0].kick();
        until("link", || net.config()[6] == 1);
        until("interrupt", || interrupts.config_count() == 1);
        handlers[0].quiesce();
        for queue in handlers[0].queues() {
            let state = (queue.queue.next_avail(), queue.queue.next_used());
            assert_eq!(state, (next, 0));
        }
        net.reset(handlers);
        drop(net);
        let of = backend.join().unwrap();
        let kicks = of
            .iter()
            .filter(|message| message.request == SET_VRING_ENABLE);
        assert_eq!(kicks.count(), 2);
    }
    let private = Memory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let _backend = backend(UnixListener::bind(&path).unwrap());
    let kept = Opened::connect(&path, 1).unwrap();
    let kept = kept.keep(|| Box::new(|| Ok(()))).unwrap();
    let error = PassedNet::new("net0", kept, &private, mac, None).err();
    assert!(error.unwrap().to_string().contains("--shared-memory"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn garbage_for_answers_is_refused(
        answers in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..8),
        nearly in any::<bool>(),
    ) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for (i, answer) in answers.iter().enumerate() {
            let mut bytes = answer.clone();
            if nearly && bytes.len() >= 12 {
                // Its header is that of the answer which is waited for.
                let request = [GET_FEATURES, GET_PROTOCOL_FEATURES][i % 2];
                for (at, word) in [request, 5, 8].into_iter().enumerate() {
                    bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
                }
            }
            theirs.write_all(&bytes).unwrap();
        }
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let watchdog = watchdog();
        if let Ok(mut session) = Session::greet(ours, 1, &watchdog) {
            prop_assert!(session.start(&setup(), None, &mut None, &watchdog).is_err() || answers.len() > 3);
        }
    }
}
