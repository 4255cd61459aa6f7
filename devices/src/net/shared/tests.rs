use std::io;
use std::sync::mpsc::Receiver;

use blanket_drivers::tap::HEADER_LEN;
use blanket_memory::{GuestRam, IoVec};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::FrameQueue;
use super::queue::{QUEUE_BYTES, Rings, SharedQueue};
use super::ring::{BUFFER, BYTES, Ring, SIZE};
use super::*;
use crate::vhost_user::{Command, Handle};

/// A queue, and the backend at its other end with virtqueues of its own.
struct Rig {
    queue: SharedQueue,
    ram: GuestRam,
    rx: Queue,
    tx: Queue,
    asked: Receiver<Command>,
}

fn device_side(ram: &GuestRam, base: u64) -> Queue {
    let places = Ring::new(ram, base).unwrap().places().map(GuestAddress);
    let mut queue = Queue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(places[0]).unwrap();
    queue.try_set_avail_ring_address(places[1]).unwrap();
    queue.try_set_used_ring_address(places[2]).unwrap();
    queue.set_ready(true);
    queue
}

impl Rig {
    fn new(checksums: bool) -> Self {
        let features = [
            1 << net::VIRTIO_NET_F_CSUM,
            1 << net::VIRTIO_NET_F_HOST_TSO4,
        ];
        let features = if checksums {
            features[0] | features[1]
        } else {
            0
        };
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), QUEUE_BYTES as usize)]).unwrap();
        let (handle, asked) = Handle::without_thread();
        let queue = SharedQueue::new(handle).unwrap();
        queue.replace(Some(Rings::new(&ram, 0, features).unwrap()));
        Self {
            queue,
            rx: device_side(&ram, 0),
            tx: device_side(&ram, BYTES),
            ram,
            asked,
        }
    }

    fn send(&self, frame: &[u8]) -> io::Result<usize> {
        let mut copy = frame.to_vec();
        let (head, tail) = copy.split_at_mut(frame.len() / 3);
        let pieces = [head, tail].map(|part| IoVec::new(part.as_mut_ptr(), part.len()));
        // SAFETY: the pieces are those of `copy`.
        unsafe { self.queue.writev(&pieces) }
    }

    /// The frame that the backend finds, which it gives back.
    fn sent(&mut self) -> Option<Vec<u8>> {
        let mut frame = Vec::new();
        let chain = self.tx.pop_descriptor_chain(&self.ram)?;
        let head = chain.head_index();
        for descriptor in chain {
            let mut bytes = vec![0; descriptor.len() as usize];
            self.ram.read_slice(&mut bytes, descriptor.addr()).unwrap();
            frame.extend(bytes);
        }
        self.tx.add_used(&self.ram, head, 0).unwrap();
        Some(frame)
    }

    /// The backend fills buffers with a frame; the header's count is `count`,
    /// or what it should be.
    fn fill(&mut self, frame: &[u8], count: Option<u16>) {
        let right = frame.len().div_ceil(BUFFER) as u16;
        let mut frame = frame.to_vec();
        frame[10..12].copy_from_slice(&count.unwrap_or(right).to_le_bytes());
        for part in frame.chunks(BUFFER) {
            let mut chain = self.rx.pop_descriptor_chain(&self.ram).unwrap();
            let head = chain.head_index();
            let descriptor = chain.next().unwrap();
            assert!(descriptor.is_write_only() && descriptor.len() as usize == BUFFER);
            self.ram.write_slice(part, descriptor.addr()).unwrap();
            self.rx
                .add_used(&self.ram, head, part.len() as u32)
                .unwrap();
        }
    }

    fn receive(&self, room: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; room];
        let piece = IoVec::new(bytes.as_mut_ptr(), bytes.len());
        // SAFETY: the piece is `bytes`.
        let len = unsafe { self.queue.readv(&[piece]) }?;
        bytes.truncate(len);
        Ok(bytes)
    }

    fn is_given_up(&self) -> bool {
        matches!(self.asked.try_recv(), Ok(Command::GiveUp))
    }
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend((0..len).map(|i| (i % 251) as u8));
    frame
}

fn would_block<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
}

#[test]
fn frames_of_every_length_arrive_as_they_were_and_buffers_come_round() {
    let mut rig = Rig::new(true);
    // More than there are buffers.
    for round in 0..300 {
        let len = [14, 60, 1514, 4084, 4085, 9000, 65_550][round % 7];
        let sent = frame(len);
        assert_eq!(rig.send(&sent).unwrap(), sent.len());
        assert_eq!(rig.sent().unwrap(), sent);
        rig.fill(&sent, None);
        let got = rig.receive(70_000).unwrap();
        assert_eq!(got[HEADER_LEN..], sent[HEADER_LEN..]);
    }
    assert!(would_block(rig.receive(100)));
    assert!(!rig.is_given_up());
}

#[test]
fn what_finds_no_room_is_refused_until_the_backend_gives_buffers_back() {
    let mut rig = Rig::new(true);
    let long = frame(65_550);
    let fitting = usize::from(SIZE) / long.len().div_ceil(BUFFER);
    for _ in 0..fitting {
        rig.send(&long).unwrap();
    }
    assert!(would_block(rig.send(&long)));
    assert_eq!(rig.sent().unwrap(), long);
    rig.send(&long).unwrap();
    assert!(!rig.is_given_up());
}

#[test]
fn a_checksum_that_the_backend_does_not_complete_is_completed_for_it() {
    for completes in [true, false] {
        let mut rig = Rig::new(completes);
        let mut blank = frame(60);
        blank[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0]);
        rig.send(&blank).unwrap();
        let sent = rig.sent().unwrap();
        assert_eq!(sent == blank, completes);
        assert_eq!(sent[0] & 1 == 1, completes);
        // All words from the start on, the sum included, now sum up to ones.
        let words = blank[HEADER_LEN + 34..].chunks(2);
        let sum = words.fold(0u32, |sum, word| {
            sum + u32::from(u16::from_be_bytes([word[0], word[1]]))
        });
        let folded = (sum & 0xffff) + (sum >> 16);
        let field = u16::from_be_bytes([sent[HEADER_LEN + 40], sent[HEADER_LEN + 41]]);
        assert_eq!(u32::from(field) == !folded & 0xffff, !completes);
    }
}

#[test]
fn segments_that_the_backend_does_not_cut_are_refused() {
    for (kind, cut) in [(0, true), (1, true), (3, false), (4, false), (0x81, false)] {
        let mut rig = Rig::new(true);
        let mut long = frame(3000);
        long[1] = kind;
        assert_eq!(rig.send(&long).is_ok(), cut, "{kind}");
        assert_eq!(rig.sent().is_some(), cut, "{kind}");
        assert_eq!(Rig::new(false).send(&long).is_ok(), kind == 0, "{kind}");
    }
}

#[test]
fn features_that_need_others_are_not_used_without_them() {
    let bits = |all: &[u32]| all.iter().fold(0u64, |bits, bit| bits | 1 << bit);
    let segments = [net::VIRTIO_NET_F_HOST_TSO4, net::VIRTIO_NET_F_GUEST_TSO6];
    assert_eq!(whole(bits(&segments)), 0);
    let one = bits(&[segments[0], segments[1], net::VIRTIO_NET_F_CSUM]);
    assert_eq!(whole(one), one & !bits(&segments[1..]));
    let all = one | bits(&[net::VIRTIO_NET_F_GUEST_CSUM]);
    assert_eq!(whole(all), all);
}

#[test]
fn a_frame_that_is_cut_off_does_not_hold_up_the_next() {
    let mut rig = Rig::new(true);
    rig.fill(&frame(9000), None);
    rig.fill(&frame(100), None);
    assert_eq!(rig.receive(50).unwrap().len(), 50);
    assert_eq!(rig.receive(5000).unwrap().len(), 112);
}

#[test]
fn a_backend_that_breaks_a_ring_is_given_up_and_nothing_goes_through_it() {
    let used = |ring: u64| Ring::new(&Rig::new(true).ram, ring).unwrap().places()[2];
    let index = |ram: &GuestRam, ring: u64, value: u16| {
        ram.write_obj(value, GuestAddress(used(ring) + 2)).unwrap();
    };
    let element = |ram: &GuestRam, ring: u64, id: u32, len: u32| {
        let value = u64::from(id) | u64::from(len) << 32;
        ram.write_obj(value, GuestAddress(used(ring) + 4)).unwrap();
        index(ram, ring, 1);
    };
    type Wrong<'a> = Box<dyn Fn(&mut Rig) + 'a>;
    let wrongs: [Wrong; 10] = [
        Box::new(|rig| index(&rig.ram, 0, SIZE + 1)),
        Box::new(|rig| element(&rig.ram, 0, u32::from(SIZE), 64)),
        Box::new(|rig| element(&rig.ram, 0, u32::MAX, 64)),
        Box::new(|rig| element(&rig.ram, 0, 3, BUFFER as u32 + 1)),
        Box::new(|rig| element(&rig.ram, 0, 3, u32::MAX)),
        Box::new(|rig| element(&rig.ram, 0, 3, HEADER_LEN as u32 - 1)),
        Box::new(|rig| rig.fill(&frame(60), Some(0))),
        Box::new(|rig| rig.fill(&frame(60), Some(2))),
        Box::new(|rig| rig.fill(&frame(60), Some(u16::MAX))),
        Box::new(|rig| {
            // The same buffer twice.
            rig.fill(&frame(60), None);
            rig.receive(1000).unwrap();
            rig.fill(&frame(60), None);
            let slot = GuestAddress(used(0) + 4 + 8);
            rig.ram.write_obj(u64::from(SIZE) | 60 << 32, slot).unwrap();
        }),
    ];
    for (i, wrong) in wrongs.iter().enumerate() {
        let mut rig = Rig::new(true);
        wrong(&mut rig);
        assert!(would_block(rig.receive(70_000)), "{i}");
        assert!(rig.is_given_up(), "{i}");
        assert!(would_block(rig.receive(70_000)), "{i}");
        assert!(!rig.is_given_up(), "{i}: once");
    }
    for (id, count) in [(0, 1), (0, 2), (5, 1), (u32::from(SIZE), 1)] {
        let rig = Rig::new(true);
        // One chain is lent, and its head is the first buffer.
        rig.send(&frame(60)).unwrap();
        element(&rig.ram, BYTES, id, 0);
        index(&rig.ram, BYTES, count);
        let right = (id, count) == (0, 1);
        assert_eq!(rig.send(&frame(60)).is_ok(), right, "{id} {count}");
        assert_eq!(rig.is_given_up(), !right, "{id} {count}");
    }
}

#[test]
fn without_a_backend_nothing_is_sent_and_nothing_comes() {
    let rig = Rig::new(true);
    rig.queue.replace(None);
    assert!(would_block(rig.send(&frame(60))));
    assert!(would_block(rig.receive(100)));
    assert!(!rig.is_given_up());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_of_a_backend_hurt(
        pokes in prop::collection::vec(
            (prop::sample::select(vec![0, BYTES]), 0u64..40_960, any::<u64>(), any::<bool>()),
            1..60,
        )
    ) {
        let mut rig = Rig::new(false);
        let rings = [0, BYTES].map(|base| Ring::new(&rig.ram, base).unwrap().places()[2]);
        for (base, offset, value, near) in pokes {
            // Mostly where the backend is supposed to write.
            let used = rings[usize::from(base != 0)];
            let at = if near { used + offset % 64 } else { base + offset };
            rig.ram.write_obj(value, GuestAddress(at)).unwrap();
            let _ = rig.send(&frame((value % 70_000) as usize));
            let _ = rig.receive(70_000);
        }
        // Another backend finds the queue as new.
        rig.ram = GuestRam::from_ranges(&[(GuestAddress(0), QUEUE_BYTES as usize)]).unwrap();
        rig.queue.replace(Some(Rings::new(&rig.ram, 0, 0).unwrap()));
        rig.tx = device_side(&rig.ram, BYTES);
        let last = frame(100);
        rig.send(&last).unwrap();
        prop_assert_eq!(rig.sent().unwrap(), last);
    }
}
