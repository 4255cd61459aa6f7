use super::*;
use crate::xen::netif::abi::{TX_EXTRA_INFO, TX_MORE_DATA};
use crate::xen::ring;
use proptest::prelude::*;

#[test]
fn a_packet_without_its_end_breaks_the_ring() {
    for flags in [TX_MORE_DATA, TX_EXTRA_INFO] {
        let mut rig = Rig::new(ALL);
        rig.front.slot(DATA, 0, 60, flags);
        rig.front.tx.publish();
        assert!(matches!(rig.send(), Err(Broken::Incomplete)));
    }
}

#[test]
fn a_malformed_extra_breaks_the_ring() {
    // Of no kind, of an unknown kind, for no protocol, of no size.
    for extra in [
        [0, 0, 0, 1, 1],
        [5, 0, 0, 1, 1],
        [1, 0, 0, 1, 3],
        [1, 0, 0, 0, 1],
    ] {
        let mut rig = Rig::new(ALL);
        rig.front.slot(DATA, 0, 60, TX_EXTRA_INFO);
        rig.front.tx.push(&extra);
        rig.front.tx.publish();
        assert!(matches!(rig.send(), Err(Broken::Extra)), "{extra:?}");
    }
}

#[test]
fn indices_that_cannot_be_break_the_ring() {
    let mut rig = Rig::new(ALL);
    rig.front.tx.claim(257);
    let error = rig.send().unwrap_err();
    assert!(matches!(
        error,
        Broken::Ring(ring::Error::Overflow { requests: 257, .. })
    ));
    rig.front.rx.claim(u32::MAX);
    assert!(matches!(rig.receive(), Err(Broken::Ring(_))));
}

#[test]
fn a_receive_buffer_that_is_not_granted_for_writing_breaks_the_ring() {
    let mut rig = Rig::new(ALL);
    assert!(rig.front.guest.revoke(DATA + 1));
    rig.front.offer(DATA..DATA + 2);
    assert!(matches!(rig.receive(), Err(Broken::Grant(_))));
    rig.rx.give_back(&mut rig.rx_ring, &rig.metrics.rx);
    assert!(!rig.front.guest.in_use(DATA));

    let mut rig = Rig::new(ALL);
    rig.front.guest.grant_readonly(DATA, DATA);
    rig.front.offer(DATA..DATA + 1);
    assert!(matches!(rig.receive(), Err(Broken::Grant(_))));
}

#[test]
fn a_ring_that_is_its_own_buffer_gets_no_more_than_it_asked_for() {
    let mut rig = Rig::new(ALL);
    rig.front.offer(RX_PAGE..RX_PAGE + 1);
    for _ in 0..3 {
        rig.peer.send(&frame([0; HEADER_LEN], 4096)).unwrap();
    }
    // The packet overwrites the indices.
    assert!(matches!(rig.receive(), Err(Broken::Ring(_))));
    assert_eq!(rig.count("rx_packets"), 1);
}

/// A slot of 12 bytes, now and then a likely one.
fn any_slot() -> impl Strategy<Value = [u8; TX_REQUEST]> {
    let likely = (0..32u32, 0..4200u16, 0..16u16, 0..5000u16).prop_map(
        |(reference, offset, flags, size)| {
            let mut slot = [0; TX_REQUEST];
            slot[..4].copy_from_slice(&(DATA + reference).to_le_bytes());
            slot[4..6].copy_from_slice(&offset.to_le_bytes());
            slot[6..8].copy_from_slice(&flags.to_le_bytes());
            slot[10..].copy_from_slice(&size.to_le_bytes());
            slot
        },
    );
    prop_oneof![3 => likely, 1 => any::<[u8; TX_REQUEST]>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_request_makes_a_queue_panic_or_answer_twice(
        slots in proptest::collection::vec(any_slot(), 1..40),
        buffers in proptest::collection::vec((any::<u16>(), 3..DATA + 64), 0..40),
        frames in proptest::collection::vec((any::<[u8; HEADER_LEN]>(), 1..20_000usize), 0..4),
        content in proptest::collection::vec(any::<u8>(), 0..200),
        features in prop_oneof![Just(ALL), Just(Features::default())],
        claim in proptest::option::of(any::<u32>()),
    ) {
        let mut rig = Rig::new(features);
        for page in 0..32 {
            rig.front.write(DATA + page, 0, &content);
        }
        for slot in &slots {
            rig.front.tx.push(slot);
        }
        rig.front.tx.publish();
        for (id, reference) in &buffers {
            let mut request = id.to_le_bytes().to_vec();
            request.extend([0, 0]);
            request.extend(reference.to_le_bytes());
            rig.front.rx.push(&request);
        }
        rig.front.rx.publish();
        for (header, len) in &frames {
            rig.peer.send(&frame(*header, *len)).unwrap();
        }
        let (sent, received) = (rig.send(), rig.receive());
        if let Some(index) = claim {
            rig.front.tx.claim(index);
            rig.front.rx.claim(index);
            let _ = (rig.send(), rig.receive());
        }
        rig.rx.give_back(&mut rig.rx_ring, &rig.metrics.rx);
        let answers = std::iter::from_fn(|| rig.front.sent()).count();
        prop_assert!(answers <= slots.len());
        if sent.is_ok() && claim.is_none() {
            prop_assert_eq!(answers, slots.len());
        }
        let used = std::iter::from_fn(|| rig.front.received()).count();
        prop_assert!(used <= buffers.len());
        if received.is_err() {
            prop_assert!(!buffers.is_empty());
        }
        let pages = (DATA..PAGES as u32 - 1).filter(|page| rig.front.guest.in_use(*page));
        prop_assert_eq!(pages.count(), 0);
    }
}
