use super::*;
use crate::xen::netif::abi::{TX_CSUM_BLANK, TX_EXTRA_INFO, TX_MORE_DATA};

impl Rig {
    fn next_frame(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        let len = self.peer.recv(&mut frame).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    fn answers(&mut self) -> Vec<(u16, i16)> {
        std::iter::from_fn(|| self.front.sent()).collect()
    }

    /// Puts a packet of one slot into the ring, shown to nobody yet.
    fn small(&mut self, page: u32) {
        self.front.write(page, 0, &bytes(60));
        self.front.slot(page, 0, 60, 0);
    }
}

/// The start of a TCP packet over IPv4, up to its payload.
fn tcp_head() -> Vec<u8> {
    let mut head = vec![2; 12];
    head.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0]);
    head.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    head.extend([0; 12]);
    head.extend([5 << 4, 0, 0, 0, 0, 0, 0, 0]);
    head
}

#[test]
fn a_packet_to_be_segmented_leaves_whole_and_its_pages_are_free_when_it_is_answered() {
    let mut rig = Rig::new(ALL);
    let packet = [tcp_head(), bytes(60_000)].concat();
    let blank = TX_CSUM_BLANK | TX_EXTRA_INFO | TX_MORE_DATA;
    // 54 bytes at the end of the first page, the rest in 15 more.
    rig.front.write(DATA, 4042, &packet[..54]);
    rig.front.slot(DATA, 4042, packet.len() as u16, blank);
    rig.front.gso(1, 1448);
    let pages: Vec<&[u8]> = packet[54..].chunks(PAGE).collect();
    for (i, page) in pages.iter().enumerate() {
        let reference = DATA + 1 + i as u32;
        rig.front.guest.grant_readonly(reference, reference);
        rig.front.write(reference, 0, page);
        let more = if i + 1 < pages.len() { TX_MORE_DATA } else { 0 };
        rig.front.slot(reference, 0, page.len() as u16, more);
    }
    assert!(rig.front.tx.publish());
    assert!(!rig.send().unwrap());

    let frame = rig.next_frame().unwrap();
    let [s0, s1] = 1448u16.to_le_bytes();
    assert_eq!(
        frame[..HEADER_LEN],
        [1, 1, 54, 0, s0, s1, 34, 0, 16, 0, 0, 0]
    );
    assert_eq!(frame[HEADER_LEN..], packet[..]);
    assert_eq!(rig.notified.get(), 1);
    let answers = rig.answers();
    assert_eq!(answers.len(), 17);
    assert_eq!(answers[0], (DATA as u16, 0));
    assert_eq!(answers[1].1, 1);
    assert!(answers[2..].iter().all(|(_, status)| *status == 0));
    assert!((DATA..DATA + 17).all(|reference| !rig.front.guest.in_use(reference)));
    assert_eq!(
        (rig.count("tx_packets"), rig.count("tx_bytes")),
        (1, packet.len() as u64)
    );
}

#[test]
fn small_packets_leave_in_order_with_one_notification_a_batch() {
    let mut rig = Rig::new(ALL);
    for i in 0..5 {
        rig.front.write(DATA + i, 100, &bytes(100 + i as usize));
        rig.front.slot(DATA + i, 100, 100 + i as u16, 0);
    }
    rig.front.tx.publish();
    assert!(!rig.send().unwrap());
    for i in 0..5 {
        let frame = rig.next_frame().unwrap();
        assert_eq!(frame[..HEADER_LEN], [0; HEADER_LEN]);
        assert_eq!(frame[HEADER_LEN..], bytes(100 + i)[..]);
    }
    assert_eq!((rig.notified.get(), rig.answers().len()), (1, 5));
    // The backend waits for a notification again.
    rig.small(DATA);
    assert!(rig.front.tx.publish());
}

#[test]
fn a_frontend_that_does_not_wait_for_answers_is_not_notified() {
    let mut rig = Rig::new(ALL);
    rig.small(DATA);
    rig.front.tx.publish();
    rig.send().unwrap();
    assert_eq!(rig.notified.get(), 1);
    // It has not taken the answer, so it did not ask for the next one.
    rig.small(DATA + 1);
    rig.front.tx.publish();
    rig.send().unwrap();
    assert_eq!((rig.notified.get(), rig.answers().len()), (1, 2));
}

#[test]
fn malformed_packets_are_answered_with_an_error_and_the_next_one_passes() {
    let mut rig = Rig::new(ALL);
    rig.front.guest.grant_to_stranger(DATA + 9, 9);
    // Beyond the page; a page that is not granted; another's page; less than
    // an Ethernet header; slots that are longer than the packet; a blank
    // checksum that is not to be found.
    rig.front.slot(DATA, 4000, 97, 0);
    rig.front.slot(3, 0, 60, 0);
    rig.front.slot(DATA + 9, 0, 60, 0);
    rig.front.slot(DATA, 0, 13, 0);
    rig.front.slot(DATA, 0, 60, TX_MORE_DATA);
    rig.front.slot(DATA + 1, 0, 61, 0);
    rig.front.slot(DATA, 0, 60, TX_CSUM_BLANK);
    rig.small(DATA + 2);
    rig.front.tx.publish();
    assert!(!rig.send().unwrap());
    let answers = rig.answers();
    assert_eq!(answers.len(), 8);
    assert!(answers[..7].iter().all(|(_, status)| *status == -1));
    assert_eq!(answers[7], ((DATA + 2) as u16, 0));
    assert_eq!(rig.next_frame().unwrap().len(), HEADER_LEN + 60);
    assert!(rig.next_frame().is_none());
    assert_eq!((rig.count("tx_errors"), rig.count("tx_packets")), (6, 1));
    assert!((DATA..DATA + 10).all(|reference| !rig.front.guest.in_use(reference)));
}

#[test]
fn a_packet_has_18_slots_at_most() {
    for (slots, status) in [(18u16, 0), (19, -1), (200, -1)] {
        let mut rig = Rig::new(ALL);
        for i in 0..slots {
            let more = if i + 1 < slots { TX_MORE_DATA } else { 0 };
            let size = if i == 0 { slots * 20 } else { 20 };
            rig.front.slot(DATA + u32::from(i), 0, size, more);
        }
        rig.front.tx.publish();
        assert!(!rig.send().unwrap());
        let answers = rig.answers();
        assert_eq!(answers.len(), usize::from(slots));
        assert!(answers.iter().all(|(_, got)| *got == status), "{slots}");
        assert_eq!(rig.next_frame().is_some(), status == 0);
    }
}

#[test]
fn a_packet_for_which_the_node_has_no_room_is_dropped() {
    let mut rig = Rig::new(ALL);
    let mut room = 0;
    while rig.count("tx_dropped") == 0 {
        rig.small(DATA);
        rig.front.tx.publish();
        rig.send().unwrap();
        let dropped = rig.count("tx_dropped") as i16;
        assert_eq!(rig.answers(), [(DATA as u16, -2 * dropped)]);
        room += 1;
        assert!(room < 100_000);
    }
    assert_eq!(rig.count("tx_errors"), 0);
}

#[test]
fn a_busy_ring_lets_others_have_their_turn() {
    let mut rig = Rig::new(ALL);
    for _ in 0..200 {
        rig.front.slot(DATA, 0, 1, 0);
    }
    rig.front.tx.publish();
    assert!(rig.send().unwrap());
    assert!(!rig.send().unwrap());
    assert_eq!(rig.count("tx_errors"), 200);
    assert_eq!(rig.answers().len(), 200);
}
