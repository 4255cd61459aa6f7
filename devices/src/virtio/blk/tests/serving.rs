//! What a driver gets.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;

use blanket_drivers::store::{Completion, Operation, Request};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::worker::{Handler, Worker};

const OK: u8 = Status::Ok as u8;

#[test]
fn what_is_written_is_read_back_and_is_in_the_image() {
    let mut bench = Bench::new(EVERYTHING);
    let bytes: Vec<u8> = (0..8192u32).map(|i| ((i * 7) >> 3) as u8).collect();
    assert_eq!(bench.write(3, &bytes), OK);
    assert_eq!(bench.read(3, 8192), bytes);
    assert_eq!(bench.read(2, 512), vec![0x11; 512]);
    assert_eq!(bench.flush(), OK);
    let image = std::fs::read(&bench.path).unwrap();
    assert_eq!(image[1536..1536 + 8192], bytes);
    for (name, count) in [
        ("writes", 1),
        ("written_bytes", 8192),
        ("reads", 2),
        ("read_bytes", 8704),
        ("flushes", 1),
        ("errors", 0),
    ] {
        assert_eq!(bench.counter(name), count, "{name}");
    }
}

#[test]
fn the_serial_is_the_images_name_padded_with_zeros() {
    let mut bench = Bench::new(EVERYTHING);
    let answer = bench.ask(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_AT, 20, true)]);
    assert_eq!(answer, (21, OK));
    let id = bytes_at(&bench.ram, DATA_AT, 20);
    assert_eq!(&id, b"some-disk\0\0\0\0\0\0\0\0\0\0\0");
}

/// A discard's or write-zeroes' range.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn free(bench: &mut Bench, kind: u32, segment: &[u8]) -> u8 {
    bench
        .ram
        .write_slice(segment, GuestAddress(DATA_AT))
        .unwrap();
    let len = u32::try_from(segment.len()).unwrap();
    bench.ask(kind, 0, &[(DATA_AT, len, false)]).1
}

#[test]
fn zeroed_and_discarded_ranges_are_freed_and_bad_ones_refused() {
    let mut bench = Bench::new(EVERYTHING);
    assert!(bench.block.features() & 1 << VIRTIO_BLK_F_DISCARD != 0);
    let zeroes = VIRTIO_BLK_T_WRITE_ZEROES;
    assert_eq!(free(&mut bench, zeroes, &segment(8, 16, 1)), OK);
    assert_eq!(bench.read(8, 8192), vec![0; 8192]);
    assert_eq!(bench.read(24, 512), vec![0x11; 512]);
    let discard = VIRTIO_BLK_T_DISCARD;
    assert_eq!(free(&mut bench, discard, &segment(64, 64, 0)), OK);
    let (error, unsupported) = (Status::IoError as u8, Status::Unsupported as u8);
    let two = [segment(0, 1, 0), segment(8, 1, 0)].concat();
    for (kind, range, status) in [
        (discard, segment(0, 8, 1), unsupported),
        (zeroes, segment(0, 8, 2), unsupported),
        (zeroes, segment(0, MAX_FREED_SECTORS + 1, 0), error),
        (zeroes, segment(2048, 1, 0), error),
        (discard, segment(u64::MAX, 1, 0), error),
        (zeroes, two, error),
        (zeroes, segment(0, 8, 0)[..15].to_vec(), error),
    ] {
        assert_eq!(free(&mut bench, kind, &range), status, "{range:?}");
    }
    assert_eq!(bench.read(0, 512), vec![0x11; 512]);
    // Not negotiated, not known.
    let mut plain = Bench::new(1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(free(&mut plain, zeroes, &segment(0, 8, 0)), unsupported);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// Header, data and status in any number of buffers that begin anywhere
    /// (virtio 1.2, 2.7.4: no assumption on framing).
    #[test]
    fn any_layout_of_descriptors_is_the_same_request(
        mut cuts in prop::collection::vec(0..1040u32, 0..6),
        indirect in any::<bool>(),
        out in any::<bool>(),
    ) {
        let mut bench = Bench::new(EVERYTHING);
        let bytes: Vec<u8> = (0..1024u32).map(|i| (i >> 2) as u8).collect();
        let at = DATA_AT + 3;
        let (ram, status_at) = (bench.ram.clone(), at + 16 + 1024);
        put_header(&ram, at, if out { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN }, 5);
        // Readable up to here; the status follows the data.
        let readable = if out { 16 + 1024 } else { 16 };
        let contents = if out { &bytes[..] } else { &[0; 1024] };
        ram.write_slice(contents, GuestAddress(at + 16)).unwrap();
        ram.write_obj(NO_STATUS, GuestAddress(status_at)).unwrap();
        cuts.extend([0, readable, 16 + 1024 + 1]);
        cuts.sort_unstable();
        let buffers: Vec<_> = cuts
            .windows(2)
            .map(|pair| (at + u64::from(pair[0]), pair[1] - pair[0], pair[0] >= readable))
            .filter(|(_, len, _)| *len > 0)
            .collect();
        let head = if indirect {
            bench.driver.add_indirect(HEADER_AT, &buffers)
        } else {
            bench.driver.add(&buffers)
        };
        bench.serve();
        let given = if out { 1 } else { 1025 };
        prop_assert_eq!(bench.driver.used(), Some((head, given)));
        prop_assert_eq!(ram.read_obj::<u8>(GuestAddress(status_at)).unwrap(), OK);
        let image = std::fs::read(&bench.path).unwrap();
        let expected = if out { bytes } else { vec![0x11; 1024] };
        prop_assert_eq!(&image[2560..3584], &expected[..]);
        if !out {
            prop_assert_eq!(bytes_at(&ram, at + 16, 1024), expected);
        }
    }
}

/// Offers `count` writes of one sector each; sector `i` gets bytes `i`.
fn offer_writes(ram: &GuestRam, driver: &mut Driver, base: u64, count: u8) {
    for i in 0..count {
        let at = base + u64::from(i) * 1024;
        put_header(ram, at, VIRTIO_BLK_T_OUT, i.into());
        ram.write_slice(&[i; 512], GuestAddress(at + 16)).unwrap();
        ram.write_obj(NO_STATUS, GuestAddress(at + 528)).unwrap();
        driver.add(&[(at, 16 + 512, false), (at + 528, 1, true)]);
    }
}

#[test]
fn queues_on_workers_serve_drivers_by_their_events() {
    let dir = tempfile::tempdir().unwrap();
    let (_, spec) = image_of(dir.path(), 1 << 20);
    let engines = [Engine::Auto, Engine::Sync];
    for (engine, event_idx) in engines.into_iter().flat_map(|e| [(e, true), (e, false)]) {
        let mut disk = block(
            &Spec {
                engine,
                ..spec.clone()
            },
            2,
        );
        let ram = testing::ram(RAM);
        let mut drivers = [driver(&ram, 0), driver(&ram, 1)];
        let handlers = disk
            .activate(activation(&ram, &drivers, EVERYTHING, event_idx))
            .unwrap();
        let worker = Worker::spawn("blk", Box::new(|| Ok(()))).unwrap();
        let ids: Vec<_> = handlers
            .into_iter()
            .map(|handler| worker.add(handler).unwrap())
            .collect();
        for round in 0..4 {
            for (i, driver) in drivers.iter_mut().enumerate() {
                let base = DATA_AT + i as u64 * 0x10_0000;
                offer_writes(&ram, driver, base, 50);
                driver.kick();
            }
            for driver in &mut drivers {
                for _ in 0..50 {
                    assert_eq!(driver.wait_used().1, 1, "round {round}");
                }
            }
        }
        for driver in &drivers {
            // By its events, a driver that looks all the time may need but the first.
            let least = if event_idx { 1 } else { 4 };
            testing::until("interrupt", || driver.interrupts.queue_count() >= least);
            assert_eq!(driver.interrupts.reset_count(), 0);
        }
        for id in ids {
            worker.remove(id).unwrap();
        }
        assert!(disk.metrics().contains(&("writes", 400)));
        let image = std::fs::read(&spec.path).unwrap();
        assert!(
            image
                .chunks(512)
                .take(50)
                .enumerate()
                .all(|(i, sector)| { sector.iter().all(|byte| usize::from(*byte) == i) })
        );
    }
}

/// What a [`Slow`] store saw.
#[derive(Default)]
struct Seen {
    operations: Vec<Operation>,
    commits: usize,
}

/// A store that holds what it gets until it is drained, and takes 4 at a time.
struct Slow {
    seen: Arc<Mutex<Seen>>,
    held: VecDeque<Request>,
    event: EventFd,
}

impl Store for Slow {
    unsafe fn submit(&mut self, request: Request) -> io::Result<()> {
        if self.held.len() == 4 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.seen.lock().unwrap().operations.push(request.operation);
        self.held.push_back(request);
        Ok(())
    }
    fn commit(&mut self) -> io::Result<()> {
        self.seen.lock().unwrap().commits += 1;
        Ok(())
    }
    fn complete(&mut self, _: &mut Vec<Completion>) {}
    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
    fn in_flight(&self) -> usize {
        self.held.len()
    }
    fn drain(&mut self, out: &mut Vec<Completion>) {
        let done = |request: Request| Completion::new(request.token, Ok(0));
        out.extend(self.held.drain(..).map(done));
    }
}

fn slow_handler(driver: &Driver, write_through: bool) -> (BlockHandler, Arc<Mutex<Seen>>) {
    let seen = Arc::<Mutex<Seen>>::default();
    let store = Slow {
        seen: Arc::clone(&seen),
        held: VecDeque::new(),
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
    };
    let shared = Arc::new(Shared {
        id: [0; ID_BYTES],
        writeback: AtomicBool::new(true),
        identity: Arc::new(Identity {
            name: "slow".to_owned(),
            metrics: Arc::default(),
            log: Arc::default(),
        }),
    });
    let (queue, accepted) = (driver.queue(true), Accepted::default());
    let handler = BlockHandler::new(queue, Box::new(store), accepted, write_through, shared);
    (handler, seen)
}

#[test]
fn a_full_store_holds_the_ring_back_and_loses_nothing() {
    let ram = testing::ram(RAM);
    let mut driver = driver(&ram, 0);
    let (mut handler, seen) = slow_handler(&driver, false);
    offer_writes(&ram, &mut driver, DATA_AT, 10);
    handler.kick();
    assert_eq!(seen.lock().unwrap().operations.len(), 4);
    assert_eq!(seen.lock().unwrap().commits, 1, "one commit per batch");
    assert!(!driver.kick_wanted(), "no kicks while the store is full");
    assert_eq!(driver.used(), None);
    for batch in [4, 4, 2] {
        handler.quiesce();
        for _ in 0..batch {
            assert!(driver.used().is_some());
        }
        assert_eq!(driver.used(), None);
        handler.kick();
    }
    assert_eq!(seen.lock().unwrap().operations.len(), 10);
    assert_eq!(
        driver.interrupts.queue_count(),
        3,
        "one interrupt per batch"
    );
    driver.add(&[(HEADER_AT, 16, false), (STATUS_AT, 1, true)]);
    assert!(driver.kick_wanted(), "kicks once the ring was empty");
}

#[test]
fn a_driver_without_flush_gets_every_write_flushed_before_it_completes() {
    let ram = testing::ram(RAM);
    let mut driver = driver(&ram, 0);
    let (mut handler, seen) = slow_handler(&driver, true);
    offer_writes(&ram, &mut driver, DATA_AT, 3);
    handler.kick();
    handler.quiesce();
    use Operation::{Flush, Write};
    assert_eq!(
        seen.lock().unwrap().operations,
        [Write, Write, Write, Flush, Flush, Flush]
    );
    for _ in 0..3 {
        assert_eq!(driver.used().unwrap().1, 1);
    }
    assert_eq!(driver.used(), None);
}

#[test]
fn turning_the_write_cache_off_flushes_every_write() {
    let mut bench = Bench::new(EVERYTHING);
    assert_eq!(bench.block.config()[WRITEBACK], 1);
    bench.block.write_config(WRITEBACK, &[0]);
    bench.block.write_config(0, &[9, 9]);
    assert_eq!(bench.block.config()[WRITEBACK], 0);
    assert_eq!(bench.block.config()[0..8], 2048u64.to_le_bytes());
    assert!(!bench.block.shared.writeback.load(Ordering::Relaxed));
    assert_eq!(bench.write(0, &[1; 512]), OK);
    assert_eq!(bench.counter("writes"), 1);
    assert_eq!(bench.counter("written_bytes"), 512);
}
