use super::*;
use crate::xen::testing::{FrontRing, Guest};
use proptest::prelude::*;

/// blkif's sizes: the largest entries that there are; they lie across pages.
const REQUEST: usize = 112;
const RESPONSE: usize = 16;
type TestRing = Ring<REQUEST, RESPONSE>;

const BASE: u64 = 0x4000;

fn setup(pages: usize) -> (Guest, FrontRing) {
    let guest = Guest::new(64);
    let front = FrontRing::new(&guest.ram, BASE, pages, REQUEST);
    for page in 0..u32::try_from(pages).unwrap() {
        guest.grant(page + 1, 4 + page);
    }
    (guest, front)
}

fn map(guest: &Guest, pages: u32) -> Vec<Grant> {
    (1..=pages)
        .map(|reference| guest.grants.map(reference, Access::Write).unwrap())
        .collect()
}

fn request(n: u32) -> [u8; REQUEST] {
    std::array::from_fn(|i| (n as usize * 7 + i) as u8)
}

fn response(n: u32) -> [u8; RESPONSE] {
    std::array::from_fn(|i| (n as usize * 5 + i) as u8)
}

#[test]
fn entries_come_whole_and_in_order_across_pages_and_the_wrap_of_the_indices() {
    for (pages, entries) in [(1, 32), (2, 64), (4, 128), (8, 256)] {
        let (guest, mut front) = setup(pages);
        front.start_at(u32::MAX - 40);
        let mut ring = TestRing::new(map(&guest, u32::try_from(pages).unwrap())).unwrap();
        assert_eq!((ring.entries(), front.entries()), (entries, entries));
        let (mut sent, mut taken, mut answered) = (0, 0, 0);
        while answered < 3 * entries {
            for _ in 0..entries {
                front.push(&request(sent));
                sent += 1;
            }
            let _ = front.publish();
            while let Some(got) = ring.pop().unwrap() {
                assert_eq!(got, request(taken));
                taken += 1;
            }
            for n in answered..taken {
                ring.push(&response(n));
            }
            assert!(front.pop::<RESPONSE>().is_none());
            assert!(ring.publish());
            while let Some(got) = front.pop::<RESPONSE>() {
                assert_eq!(got, response(answered));
                answered += 1;
            }
            assert_eq!((sent, sent), (taken, answered));
        }
    }
}

#[test]
fn nobody_is_notified_who_did_not_ask() {
    let (guest, mut front) = setup(1);
    let mut ring = TestRing::new(map(&guest, 1)).unwrap();
    // The first request is asked for, the second comes while the backend works.
    front.push(&request(0));
    assert!(front.publish());
    front.push(&request(1));
    assert!(!front.publish());
    while ring.pop().unwrap().is_some() {}
    assert!(!ring.wait_for(1).unwrap());
    front.push(&request(2));
    assert!(front.publish());
    assert!(ring.wait_for(1).unwrap());
    assert!(!ring.wait_for(2).unwrap());
    front.push(&request(3));
    assert!(front.publish());
    // The same the other way round.
    assert!(!ring.publish());
    ring.push(&response(0));
    assert!(ring.publish());
    ring.push(&response(1));
    assert!(!ring.publish());
    while front.pop::<RESPONSE>().is_some() {}
    while ring.pop().unwrap().is_some() {}
    ring.push(&response(2));
    assert!(ring.publish());
}

#[test]
fn a_producer_that_claims_too_much_or_goes_back_breaks_the_ring() {
    let (guest, mut front) = setup(1);
    let mut ring = TestRing::new(map(&guest, 1)).unwrap();
    for n in 0..20 {
        front.push(&request(n));
    }
    let _ = front.publish();
    for _ in 0..20 {
        ring.pop().unwrap().unwrap();
    }
    for _ in 0..5 {
        ring.push(&response(0));
    }
    // 15 are in the backend's hands: 17 may come, up to index 37.
    front.claim(37);
    assert_eq!(ring.available(), Ok(17));
    for req_prod in [38, 19, 0, u32::MAX, 20u32.wrapping_add(1 << 31)] {
        front.claim(req_prod);
        assert!(
            matches!(ring.available(), Err(Error::Overflow { room: 17, .. })),
            "{req_prod}"
        );
        assert!(ring.wait_for(1).is_err());
    }
}

#[test]
fn a_request_that_changes_after_it_was_taken_does_not_change() {
    let (guest, mut front) = setup(1);
    let mut ring = TestRing::new(map(&guest, 1)).unwrap();
    front.push(&request(1));
    let _ = front.publish();
    let taken = ring.pop().unwrap().unwrap();
    front.start_at(0);
    front.push(&request(2));
    assert_eq!(taken, request(1));
}

#[test]
fn requests_that_were_given_back_come_again() {
    let (guest, mut front) = setup(1);
    let mut ring = TestRing::new(map(&guest, 1)).unwrap();
    for n in 0..4 {
        front.push(&request(n));
    }
    let _ = front.publish();
    for _ in 0..3 {
        ring.pop().unwrap().unwrap();
    }
    ring.rewind(2);
    assert_eq!(ring.available(), Ok(3));
    assert_eq!(ring.pop().unwrap(), Some(request(1)));
}

#[test]
fn pages_that_make_no_ring_are_refused() {
    let (guest, _) = setup(4);
    let error = |pages| TestRing::new(pages).err().unwrap();
    assert_eq!(error(Vec::new()), Error::Pages { pages: 0 });
    assert_eq!(error(map(&guest, 3)), Error::Pages { pages: 3 });
    guest.grant_readonly(9, 9);
    let reading = guest.grants.map(9, Access::Read).unwrap();
    assert_eq!(error(vec![reading]), Error::ReadOnly { reference: 9 });
    // No entry as large as this fits.
    assert!(Ring::<5000, 1>::new(map(&guest, 1)).is_err());
}

#[test]
fn a_ring_goes_on_where_it_was_saved() {
    let (guest, mut front) = setup(2);
    let mut ring = TestRing::new(map(&guest, 2)).unwrap();
    for n in 0..3 {
        front.push(&request(n));
    }
    let _ = front.publish();
    ring.pop().unwrap().unwrap();
    ring.push(&response(0));
    let _ = ring.publish();
    let (indices, references) = (ring.indices(), ring.references());
    assert_eq!(references, [1, 2]);
    drop(ring);
    assert!(!guest.in_use(1));
    let mut ring = TestRing::restore(map(&guest, 2), indices).unwrap();
    assert_eq!(ring.pop().unwrap(), Some(request(1)));
    let wrong = Indices {
        req_cons: 70,
        rsp_prod: 5,
    };
    assert!(TestRing::restore(map(&guest, 2), wrong).is_err());
}

#[test]
fn a_new_ring_whose_indices_cannot_be_is_refused() {
    let (guest, mut front) = setup(1);
    front.start_at(7);
    assert!(TestRing::new(map(&guest, 1)).is_ok());
    front.claim(40);
    assert!(matches!(
        TestRing::new(map(&guest, 1)).err(),
        Some(Error::Overflow {
            requests: 33,
            room: 32
        })
    ));
}

proptest! {
    #[test]
    fn whatever_indices_the_guest_writes_no_more_is_taken_than_fits(
        claims in prop::collection::vec((any::<u32>(), any::<bool>(), 0..40u32), 1..20),
    ) {
        let (guest, front) = setup(1);
        let mut ring = TestRing::new(map(&guest, 1)).unwrap();
        let mut claimed = 0u32;
        for (raw, near, answers) in claims {
            claimed = if near { claimed.wrapping_add(raw % 40) } else { raw };
            front.claim(claimed);
            for _ in 0..100 {
                match ring.pop() {
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break,
                }
            }
            let Indices { req_cons, rsp_prod } = ring.indices();
            let taken = req_cons.wrapping_sub(rsp_prod);
            prop_assert!(taken <= ring.entries());
            for n in 0..answers.min(taken) {
                ring.push(&response(n));
            }
            let _ = ring.publish();
        }
    }
}
