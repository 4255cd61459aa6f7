use super::*;
use crate::xen::netif::abi::{RX_CSUM_BLANK, RX_DATA_VALIDATED, RX_EXTRA_INFO, RX_MORE_DATA};

const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];
/// To be segmented to 1000 bytes, with the checksum of TCP behind IPv4.
const LARGE: [u8; HEADER_LEN] = [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0, 0, 0];

/// A slot of a packet: number of the request, flags, bytes.
#[derive(Debug, PartialEq)]
struct Slot(u16, u16, i16);

fn slot([i0, i1, o0, o1, f0, f1, s0, s1]: [u8; RX_SLOT]) -> Slot {
    assert_eq!([o0, o1], [0, 0]);
    Slot(
        u16::from_le_bytes([i0, i1]),
        u16::from_le_bytes([f0, f1]),
        i16::from_le_bytes([s0, s1]),
    )
}

/// A packet: its slots, its bytes, and its extra if there is one.
type Packet = (Vec<Slot>, Vec<u8>, Option<[u8; RX_SLOT]>);

impl Rig {
    /// Takes a packet.
    fn packet(&mut self) -> Option<Packet> {
        let mut extra = None;
        let mut slots = vec![slot(self.front.received()?)];
        if slots[0].1 & RX_EXTRA_INFO != 0 {
            extra = self.front.received();
        }
        while slots.last().unwrap().1 & RX_MORE_DATA != 0 {
            slots.push(slot(self.front.received().unwrap()));
        }
        let mut bytes = Vec::new();
        for Slot(page, _, len) in &slots {
            assert!(!self.front.guest.in_use(u32::from(*page)));
            bytes.extend(self.front.read(u32::from(*page), *len as usize));
        }
        Some((slots, bytes, extra))
    }
}

/// A frame with a TCP packet over IPv4 of `len` bytes behind `LARGE`.
fn large(len: usize) -> Vec<u8> {
    let mut frame = frame(LARGE, len);
    frame[HEADER_LEN + 12..HEADER_LEN + 15].copy_from_slice(&[8, 0, 0x45]);
    frame[HEADER_LEN + 20..HEADER_LEN + 24].copy_from_slice(&[0, 0, 64, 6]);
    frame[HEADER_LEN + 46] = 5 << 4;
    frame
}

#[test]
fn a_packet_to_be_segmented_arrives_whole_with_its_extra_in_the_second_slot() {
    let mut rig = Rig::new(ALL);
    assert!(rig.front.offer(DATA..DATA + 40));
    let sent = large(60_000);
    rig.peer.send(&sent).unwrap();
    rig.peer.send(&frame(PLAIN, 100)).unwrap();
    assert_eq!(rig.receive().unwrap(), Outcome::Empty);
    assert_eq!(rig.notified.get(), 1);
    let (slots, bytes, extra) = rig.packet().unwrap();
    assert_eq!(slots.len(), 15);
    let blank = RX_CSUM_BLANK | RX_DATA_VALIDATED;
    let first = DATA as u16;
    assert_eq!(
        slots[0],
        Slot(first, blank | RX_EXTRA_INFO | RX_MORE_DATA, 4096)
    );
    assert_eq!(slots[1], Slot(first + 2, RX_MORE_DATA, 4096));
    assert_eq!(slots[14], Slot(first + 15, 0, 2656));
    assert_eq!(extra.unwrap(), [1, 0, 0xe8, 3, 1, 0, 0, 0]);
    assert_eq!(bytes, sent[HEADER_LEN..]);
    let (slots, bytes, extra) = rig.packet().unwrap();
    assert_eq!((slots, extra), (vec![Slot(first + 16, 0, 100)], None));
    assert_eq!(bytes, super::bytes(100));
    assert_eq!(
        (rig.count("rx_packets"), rig.count("rx_bytes")),
        (2, 60_100)
    );
}

#[test]
fn a_small_packet_to_be_segmented_takes_two_slots() {
    let mut rig = Rig::new(ALL);
    rig.front.offer(DATA..DATA + 3);
    let sent = large(3000);
    rig.peer.send(&sent).unwrap();
    rig.receive().unwrap();
    let (slots, bytes, extra) = rig.packet().unwrap();
    assert_eq!((slots.len(), extra.is_some()), (1, true));
    assert_eq!(bytes, sent[HEADER_LEN..]);
    assert_eq!(rig.front.rx.rsp_cons, 2);
}

#[test]
fn a_long_packet_arrives_whole_whether_it_could_have_been_segmented_or_not() {
    let without = Features {
        gso4: false,
        gso6: false,
        ..ALL
    };
    for features in [ALL, without] {
        let mut rig = Rig::new(features);
        rig.front.offer(DATA..DATA + 20);
        for len in [9000, 4096, 4097, 100] {
            rig.peer.send(&frame(PLAIN, len)).unwrap();
            assert_eq!(rig.receive().unwrap(), Outcome::Empty);
            let (slots, bytes, extra) = rig.packet().unwrap();
            assert_eq!((slots.len(), extra), (len.div_ceil(PAGE), None));
            assert_eq!(bytes, super::bytes(len));
        }
    }
}

#[test]
fn a_packet_that_outgrows_the_ring_waits_for_buffers_and_arrives_whole() {
    for sent in [large(30_000), frame(PLAIN, 30_000)] {
        let mut rig = Rig::new(ALL);
        rig.front.offer(DATA..DATA + 3);
        rig.peer.send(&sent).unwrap();
        assert_eq!(rig.receive().unwrap(), Outcome::Starved);
        assert!(rig.front.received().is_none());
        // The backend asks for a notification.
        assert!(rig.front.offer(DATA + 3..DATA + 5));
        assert_eq!(rig.receive().unwrap(), Outcome::Starved);
        assert!(rig.front.offer(DATA + 5..DATA + 20));
        assert_eq!(rig.receive().unwrap(), Outcome::Empty);
        assert_eq!(rig.packet().unwrap().1, sent[HEADER_LEN..]);
        assert_eq!((rig.count("rx_dropped"), rig.count("rx_packets")), (0, 1));
    }
}

#[test]
fn a_frontend_without_scatter_gather_gets_packets_of_a_page_at_most() {
    let mut rig = Rig::new(Features::default());
    rig.front.offer(DATA..DATA + 4);
    for len in [4097, 4096, 1500] {
        rig.peer.send(&frame(PLAIN, len)).unwrap();
    }
    rig.peer.send(&large(1000)).unwrap();
    assert_eq!(rig.receive().unwrap(), Outcome::Empty);
    assert_eq!(rig.packet().unwrap().0, [Slot(DATA as u16, 0, 4096)]);
    assert_eq!(rig.packet().unwrap().1, bytes(1500));
    assert!(rig.packet().is_none());
    assert_eq!((rig.count("rx_dropped"), rig.count("rx_errors")), (1, 1));
}

#[test]
fn without_buffers_frames_stay_in_the_tap() {
    let mut rig = Rig::new(ALL);
    rig.peer.send(&frame(PLAIN, 64)).unwrap();
    assert_eq!(rig.receive().unwrap(), Outcome::Starved);
    assert_eq!(rig.count("rx_dropped"), 0);
    assert!(rig.front.offer(DATA..DATA + 1));
    assert_eq!(rig.receive().unwrap(), Outcome::Starved);
    assert_eq!(rig.packet().unwrap().1, bytes(64));
}

#[test]
fn unused_buffers_go_back_to_the_ring_when_the_queue_rests() {
    let mut rig = Rig::new(ALL);
    rig.front.offer(DATA..DATA + 6);
    rig.peer.send(&frame(PLAIN, 5000)).unwrap();
    assert_eq!(rig.receive().unwrap(), Outcome::Empty);
    assert!(rig.front.guest.in_use(DATA + 2));
    rig.rx.give_back(&mut rig.rx_ring, &rig.metrics.rx);
    assert!((DATA..DATA + 6).all(|page| !rig.front.guest.in_use(page)));
    let indices = rig.rx_ring.indices();
    assert_eq!((indices.req_cons, indices.rsp_prod), (2, 2));
    rig.packet().unwrap();
    rig.peer.send(&frame(PLAIN, 64)).unwrap();
    assert_eq!(rig.receive().unwrap(), Outcome::Empty);
    assert_eq!(rig.packet().unwrap().0, [Slot(DATA as u16 + 2, 0, 64)]);
}

#[test]
fn a_busy_tap_lets_others_have_their_turn() {
    let mut rig = Rig::new(Features::default());
    rig.front.offer(DATA..DATA + 200);
    let mut turns = 0;
    for i in 0..200 {
        // The socket has room for a few at a time.
        rig.peer.send(&frame(PLAIN, 64)).unwrap();
        if i % 8 == 7 {
            assert_ne!(rig.receive().unwrap(), Outcome::More);
            turns += 1;
        }
    }
    assert_eq!((turns, rig.count("rx_packets")), (25, 200));
}
