use super::super::testing::{Driver, Interrupts, ram};
use super::super::{Interrupt, VirtQueue};
use super::rx::Rx;
use super::tx::Tx;
use super::*;
use crate::net::{FrameQueue, Metrics, Outcome};
use crate::worker::Worker;
use blanket_drivers::tap::{HEADER_LEN, Spec, TapQueue};
use blanket_memory::GuestRam;
use proptest::prelude::*;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 4 << 20;
const BUFFERS: u64 = 0x10_0000;

/// A queue with a datagram socket in the TAP's place.
struct Rig {
    driver: Driver,
    queue: VirtQueue,
    tap: Arc<dyn FrameQueue>,
    peer: UnixDatagram,
    metrics: Metrics,
}

impl Rig {
    fn new(index: u16, size: u16) -> Self {
        let driver = Driver::new(&ram(RAM), index, 0, size);
        let queue = driver.queue(true);
        let (tap, peer) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        peer.set_nonblocking(true).unwrap();
        Self {
            driver,
            queue,
            tap: Arc::new(TapQueue::from(OwnedFd::from(tap))),
            peer,
            metrics: Metrics::default(),
        }
    }

    fn rx(&self, mergeable: bool) -> Rx {
        let interrupt = Arc::clone(&self.driver.interrupts) as Arc<dyn Interrupt>;
        Rx::new(&self.tap, mergeable, &self.queue, &interrupt)
    }

    fn receive(&mut self, rx: &mut Rx) -> Outcome {
        rx.receive(&mut self.queue, &self.metrics.rx)
    }

    /// Offers `count` buffers of `len` bytes, one behind the other.
    fn offer(&mut self, first: u64, count: u64, len: u32) {
        for i in first..first + count {
            let address = BUFFERS + i * u64::from(len);
            self.driver.add(&[(address, len, true)]);
        }
    }

    fn count(&self, name: &str) -> u64 {
        let all = self.metrics.read();
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// A frame of `len` bytes behind a header of ones.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![1; HEADER_LEN];
    frame.extend((0..len).map(|i| (i % 251) as u8));
    frame
}

fn read(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn merged_count(ram: &GuestRam, address: u64) -> u16 {
    ram.read_obj(GuestAddress(address + 10)).unwrap()
}

#[test]
fn a_long_frame_fills_merged_buffers_and_the_header_counts_them() {
    let mut rig = Rig::new(0, 64);
    let mut rx = rig.rx(true);
    rig.offer(0, 40, 4096);
    let sent = frame(60_000);
    rig.peer.send(&sent).unwrap();
    rig.peer.send(&frame(100)).unwrap();
    assert_eq!(rig.receive(&mut rx), Outcome::Empty);
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.used()).collect();
    assert_eq!(used.len(), 16);
    assert_eq!(merged_count(&rig.driver.ram, BUFFERS), 15);
    assert_eq!(merged_count(&rig.driver.ram, BUFFERS + 15 * 4096), 1);
    let total: u32 = used[..15].iter().map(|(_, len)| len).sum();
    assert_eq!(total as usize, sent.len());
    let got = read(&rig.driver.ram, BUFFERS, sent.len());
    assert_eq!(got[HEADER_LEN..], sent[HEADER_LEN..]);
    assert_eq!(used[15].1 as usize, HEADER_LEN + 100);
    assert_eq!(rig.driver.interrupts.queue_count(), 1);
    assert_eq!(
        (rig.count("rx_packets"), rig.count("rx_bytes")),
        (2, 60_100)
    );
}

#[test]
fn a_frame_that_outgrows_the_ring_waits_for_buffers_and_arrives_whole() {
    let mut rig = Rig::new(0, 64);
    let mut rx = rig.rx(true);
    rig.offer(0, 3, 4096);
    let sent = frame(20_000);
    rig.peer.send(&sent).unwrap();
    assert_eq!(rig.receive(&mut rx), Outcome::Starved);
    assert!(rig.driver.used().is_none());
    rig.offer(3, 3, 4096);
    assert_eq!(rig.receive(&mut rx), Outcome::Empty);
    assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), 5);
    let got = read(&rig.driver.ram, BUFFERS, sent.len());
    assert_eq!(got[HEADER_LEN..], sent[HEADER_LEN..]);
    assert_eq!(rig.count("rx_dropped"), 0);
}

#[test]
fn a_frame_that_half_the_ring_cannot_hold_is_dropped_and_the_next_one_passes() {
    let mut rig = Rig::new(0, 8);
    let mut rx = rig.rx(true);
    rig.offer(0, 4, 256);
    rig.peer.send(&frame(5000)).unwrap();
    rig.peer.send(&frame(64)).unwrap();
    assert_eq!(rig.receive(&mut rx), Outcome::Empty);
    assert_eq!(rig.driver.used().unwrap().1 as usize, HEADER_LEN + 64);
    assert_eq!((rig.count("rx_dropped"), rig.count("rx_packets")), (1, 1));
}

#[test]
fn without_merging_a_frame_gets_one_chain_or_is_dropped() {
    let mut rig = Rig::new(0, 8);
    let mut rx = rig.rx(false);
    rig.driver.add(&[
        (BUFFERS, 10, true),
        (BUFFERS + 10, 2, true),
        (BUFFERS + 12, 1500, true),
    ]);
    rig.peer.send(&frame(1501)).unwrap();
    let sent = frame(1500);
    rig.peer.send(&sent).unwrap();
    assert_eq!(rig.receive(&mut rx), Outcome::Starved);
    assert_eq!(rig.driver.used().unwrap().1 as usize, sent.len());
    assert_eq!(merged_count(&rig.driver.ram, BUFFERS), 1);
    assert_eq!(
        read(&rig.driver.ram, BUFFERS + 12, 1500),
        sent[HEADER_LEN..]
    );
    assert_eq!(rig.count("rx_dropped"), 1);
}

#[test]
fn without_buffers_frames_stay_in_the_tap() {
    let mut rig = Rig::new(0, 8);
    let mut rx = rig.rx(true);
    rig.peer.send(&frame(64)).unwrap();
    assert_eq!(rig.receive(&mut rx), Outcome::Starved);
    assert_eq!(rig.count("rx_dropped"), 0);
    rig.offer(0, 1, 2048);
    assert_eq!(rig.receive(&mut rx), Outcome::Starved);
    assert_eq!(rig.count("rx_packets"), 1);
}

#[test]
fn unused_buffers_go_back_to_the_ring_when_the_handler_rests() {
    let mut rig = Rig::new(0, 16);
    let mut rx = rig.rx(true);
    rig.offer(0, 6, 4096);
    rig.peer.send(&frame(5000)).unwrap();
    assert_eq!(rig.receive(&mut rx), Outcome::Empty);
    rx.give_back(&mut rig.queue, &rig.metrics.rx);
    assert_eq!(rig.queue.queue.next_avail(), 2);
    assert_eq!(rig.queue.queue.next_used(), 2);
    rig.peer.send(&frame(64)).unwrap();
    assert_eq!(rig.receive(&mut rx), Outcome::Empty);
    assert_eq!(
        std::iter::from_fn(|| rig.driver.used()).last().unwrap().0,
        2
    );
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none_for_merged_buffers() {
    let mut rig = Rig::new(0, 64);
    let mut rx = rig.rx(true);
    rig.offer(0, 32, 1024);
    // The driver asks for an interrupt only at the tenth used buffer.
    let used_event = GuestAddress(64 * 16 + 4 + 2 * 64);
    rig.driver.ram.write_obj(9u16, used_event).unwrap();
    rig.peer.send(&frame(8 * 1024)).unwrap();
    rig.receive(&mut rx);
    assert_eq!(rig.driver.interrupts.queue_count(), 0);
    rig.peer.send(&frame(10)).unwrap();
    rig.receive(&mut rx);
    assert_eq!(rig.driver.interrupts.queue_count(), 1);
}

#[test]
fn a_receive_buffer_without_room_for_the_header_breaks_the_device_once() {
    for buffer in [
        (BUFFERS, 11, true),
        (BUFFERS, 4096, false),
        (BUFFERS, 0, true),
    ] {
        let mut rig = Rig::new(0, 8);
        let mut rx = rig.rx(true);
        rig.driver.add(&[buffer]);
        rig.peer.send(&frame(64)).unwrap();
        assert_eq!(rig.receive(&mut rx), Outcome::Starved);
        assert_eq!(rig.receive(&mut rx), Outcome::Starved);
        assert_eq!(rig.driver.interrupts.reset_count(), 1);
    }
}

#[test]
fn frames_leave_whole_in_order_with_one_interrupt_a_batch() {
    let mut rig = Rig::new(1, 64);
    let mut tx = Tx::new(&rig.tap);
    for len in [60, 1500, 40_000] {
        let sent = frame(len);
        let at = BUFFERS + 0x1_0000 * len as u64 % 0x20_0000;
        rig.driver.ram.write_slice(&sent, GuestAddress(at)).unwrap();
        let header = HEADER_LEN as u32;
        rig.driver.add(&[
            (at, header, false),
            (at + u64::from(header), len as u32, false),
        ]);
    }
    assert!(!tx.send(&mut rig.queue, &rig.metrics.tx));
    let mut got = vec![0; 65_536];
    for len in [60, 1500, 40_000] {
        let n = rig.peer.recv(&mut got).unwrap();
        assert_eq!(got[..n], frame(len)[..]);
    }
    assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), 3);
    assert_eq!(rig.driver.interrupts.queue_count(), 1);
    assert_eq!(rig.count("tx_bytes"), 41_560);
}

#[test]
fn malformed_frames_are_counted_and_given_back() {
    let mut rig = Rig::new(1, 16);
    let mut tx = Tx::new(&rig.tap);
    rig.driver.add(&[(BUFFERS, 11, false)]);
    rig.driver.add(&[(BUFFERS, 4096, true)]);
    rig.driver.add(&[(BUFFERS, 200_000, false)]);
    assert!(!tx.send(&mut rig.queue, &rig.metrics.tx));
    assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), 3);
    assert_eq!((rig.count("tx_errors"), rig.count("tx_packets")), (3, 0));
    assert_eq!(rig.driver.interrupts.reset_count(), 0);
}

#[test]
fn a_busy_queue_lets_others_have_their_turn() {
    let mut rig = Rig::new(1, 256);
    let mut tx = Tx::new(&rig.tap);
    for _ in 0..200 {
        rig.driver.add(&[(BUFFERS, 5, false)]);
    }
    assert!(tx.send(&mut rig.queue, &rig.metrics.tx));
    assert!(!tx.send(&mut rig.queue, &rig.metrics.tx));
    assert_eq!(rig.count("tx_errors"), 200);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_ring_makes_a_queue_panic(
        descriptors in proptest::collection::vec(
            (0u64..RAM as u64 + 0x2000, prop_oneof![0u32..0x3000, any::<u32>()], 0u16..8, 0u16..9),
            8,
        ),
        heads in proptest::collection::vec(0u16..10, 1..12),
    ) {
        for index in [0, 1] {
            let mut rig = Rig::new(index, 8);
            let (mut rx, mut tx) = (rig.rx(true), Tx::new(&rig.tap));
            for (i, (address, len, flags, next)) in descriptors.iter().enumerate() {
                // Rings lie at the start of memory: keep buffers off them.
                let address = address.saturating_add(0x1000);
                rig.driver.describe(i as u16, Descriptor::new(address, *len, *flags, *next));
            }
            for head in &heads {
                rig.driver.offer(*head);
                let _ = rig.peer.send(&frame(700));
                if index == 0 {
                    rig.receive(&mut rx);
                } else {
                    tx.send(&mut rig.queue, &rig.metrics.tx);
                }
            }
            rx.give_back(&mut rig.queue, &rig.metrics.rx);
        }
    }
}

#[test]
fn offloads_follow_what_the_driver_can_take() {
    let all = GUEST_OFFLOADS
        .iter()
        .fold(0, |bits, (feature, _)| bits | feature);
    assert_eq!(offloads(all).0, Offloads::BASE.0 | Offloads::USO.0);
    assert_eq!(offloads(all & !bit(net::VIRTIO_NET_F_GUEST_CSUM)).0, 0);
    let one = bit(net::VIRTIO_NET_F_GUEST_CSUM) | bit(net::VIRTIO_NET_F_GUEST_USO4);
    assert_eq!(offloads(one).0, libc::TUN_F_CSUM);
}

/// Runs a test with a TAP in a network namespace that its thread takes along.
fn with_tap(queues: u16, test: impl FnOnce(Tap) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: no memory is involved.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let error = io::Error::last_os_error();
            println!("skipped, because there is no network namespace: {error}");
            return;
        }
        match Tap::open(&Spec {
            name: Some("t0".into()),
            host_ip: Some((Ipv4Addr::new(10, 9, 8, 1), 24)),
            queues,
            ..Spec::default()
        }) {
            Ok(tap) => test(tap),
            Err(error) => println!("skipped, because there is no tap: {error}"),
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

/// A broadcast ARP request for 10.9.8.1 from 10.9.8.2 behind an empty header.
fn arp_request() -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend([0xff; 6]);
    frame.extend(MAC.0);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC.0);
    frame.extend([10, 9, 8, 2, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
    frame.resize(HEADER_LEN + 60, 0);
    frame
}

fn activation(queues: Vec<VirtQueue>, ram: &GuestRam, features: u64) -> Activation {
    Activation {
        ram: ram.clone(),
        features,
        queues,
        interrupt: Arc::new(Interrupts::default()),
    }
}

#[test]
fn a_request_through_the_rings_is_answered_by_the_node_and_again_after_a_reset() {
    with_tap(1, |tap| {
        let worker = Worker::spawn("net", Box::new(|| Ok(()))).unwrap();
        let mut device = Net::new("net0", tap, MAC, None).unwrap();
        for round in 0..2 {
            let memory = ram(RAM);
            let mut rx = Driver::new(&memory, 0, 0, 16);
            let mut tx = Driver::new(&memory, 1, 0x1000, 16);
            let features = device.features();
            let queues = vec![rx.queue(true), tx.queue(true)];
            let mut handlers = device
                .activate(activation(queues, &memory, features))
                .unwrap();
            assert_eq!(handlers.len(), 1);
            let id = worker.add(handlers.remove(0)).unwrap();
            rx.add(&[(BUFFERS, 2048, true)]);
            rx.kick();
            let request = arp_request();
            memory.write_slice(&request, GuestAddress(0x8000)).unwrap();
            tx.add(&[(0x8000, request.len() as u32, false)]);
            tx.kick();
            // The node may also send of its own accord (IPv6 discovery).
            loop {
                let (_, len) = rx.wait_used();
                let got = read(&memory, BUFFERS, len as usize);
                if got[HEADER_LEN..HEADER_LEN + 6] == MAC.0 && got[HEADER_LEN + 12..][..2] == [8, 6]
                {
                    assert_eq!(got[HEADER_LEN + 28..][..4], [10, 9, 8, 1]);
                    break;
                }
                rx.add(&[(BUFFERS, 2048, true)]);
                rx.kick();
            }
            tx.wait_used();
            let handler = worker.remove(id).unwrap();
            let pair = (handler as Box<dyn std::any::Any>)
                .downcast::<Pair>()
                .unwrap();
            device.reset(vec![pair as Box<dyn QueueHandler>]);
            let sent = device
                .metrics()
                .iter()
                .find(|(n, _)| *n == "tx_packets")
                .unwrap()
                .1;
            assert_eq!(sent, round + 1);
        }
    });
}

#[test]
fn the_control_queue_steers_pairs_and_the_address_and_refuses_the_rest() {
    with_tap(3, |tap| {
        let worker = Worker::spawn("net", Box::new(|| Ok(()))).unwrap();
        let mut device = Net::new("net0", tap, MAC, Some(1400)).unwrap();
        assert_eq!(device.config()[8..12], [3, 0, 0x78, 5]);
        let memory = ram(RAM);
        let drivers: Vec<_> = (0..7)
            .map(|i| Driver::new(&memory, i, 0x1000 * u64::from(i), 16))
            .collect();
        let queues = drivers.iter().map(|driver| driver.queue(true)).collect();
        let mut handlers = device
            .activate(activation(queues, &memory, device.features()))
            .unwrap();
        assert_eq!(handlers.len(), 4);
        worker.add(handlers.pop().unwrap()).unwrap();
        let mut control = drivers.into_iter().next_back().unwrap();
        let mut ask = |command: &[u8]| {
            memory.write_slice(command, GuestAddress(0x9000)).unwrap();
            let len = command.len() as u32;
            control.add(&[
                (0x9000, len.min(2), false),
                (0x9002, len.saturating_sub(2), false),
                (0xa000, 1, true),
            ]);
            control.kick();
            assert_eq!(control.wait_used().1, 1);
            read(&memory, 0xa000, 1)[0]
        };
        assert_eq!(ask(&[4, 0, 3, 0]), 0);
        assert_eq!(device.shared.port.used_queues(), 3);
        assert_eq!(ask(&[4, 0, 2, 0]), 0);
        assert_eq!(device.shared.port.used_queues(), 2);
        for bad in [
            &[4, 0, 0, 0][..],
            &[4, 0, 4, 0],
            &[4, 0, 1],
            &[4],
            &[9, 9, 9],
            &[1, 1, 1, 0, 0, 0, 0, 0],
            &[0, 0, 2],
        ] {
            assert_eq!(ask(bad), 1, "{bad:?}");
        }
        assert_eq!(device.shared.port.used_queues(), 2);
        assert_eq!(ask(&[1, 1, 2, 0, 0, 0, 0, 9]), 0);
        assert_eq!(device.config()[..6], [2, 0, 0, 0, 0, 9]);
        assert_eq!(ask(&[0, 0, 1]), 0);
        let saved = device.save(&[]).unwrap();
        device.reset(Vec::new());
        assert_eq!(device.shared.port.used_queues(), 1);
        assert_eq!(device.config()[..6], MAC.0);
        device.restore(&saved).unwrap();
        assert_eq!((device.pairs, device.config()[5]), (2, 9));
    });
}

#[test]
fn a_driver_without_queues_is_refused_and_the_state_of_more_pairs_too() {
    with_tap(1, |tap| {
        let mut device = Net::new("net0", tap, MAC, None).unwrap();
        let none = device.activate(activation(Vec::new(), &ram(RAM), device.features()));
        assert!(none.is_err());
        let settings = Settings { mac: MAC, pairs: 2 };
        let state = SavedState::pack("virtio-net", 1, &settings).unwrap();
        assert!(device.restore(&state).is_err());
    });
}
