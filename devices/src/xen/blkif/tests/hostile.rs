//! Frontends that break the rules: an error for the request, or for the ring;
//! never more.

use proptest::prelude::*;

use super::*;

#[test]
fn malformed_requests_get_an_error_and_the_disk_goes_on() {
    for kind in [PLAIN, PERSISTENT] {
        let mut bench = Bench::new(&kind);
        let good = (DATA, 0, 7);
        let mut too_many = direct(READ, 0, &[good; 11]);
        too_many[1] = 12;
        for (request, status) in [
            // No segments, too many, upside down, outside their page.
            (direct(READ, 0, &[]), ERROR),
            (too_many, ERROR),
            (direct(READ, 0, &[(DATA, 7, 0)]), ERROR),
            (direct(WRITE, 0, &[good, (DATA, 0, 8)]), ERROR),
            (direct(READ, 0, &[(DATA, 255, 255)]), ERROR),
            // Beyond the end of the disk, and of all numbers.
            (direct(READ, 2041, &[good]), ERROR),
            (direct(WRITE, 2048, &[good]), ERROR),
            (direct(READ, u64::MAX, &[good]), ERROR),
            (direct(WRITE, (1 << 55) - 1, &[good]), ERROR),
            (discard(2047, 2), ERROR),
            (discard(0, u64::MAX), ERROR),
            (discard(u64::MAX, 1), ERROR),
            (discard((1 << 55) - 1, (1 << 55) - 1), ERROR),
            // Data behind a flush, barriers and other things not offered.
            (direct(FLUSH, 0, &[good]), ERROR),
            (direct(2, 0, &[good]), UNSUPPORTED),
            (direct(4, 0, &[]), UNSUPPORTED),
            (direct(0xff, 0, &[good]), UNSUPPORTED),
        ] {
            assert_eq!(bench.ask(request), status, "{request:?}");
        }
        assert_eq!(bench.counter("errors"), 17);
        assert_eq!(bench.file(), vec![FILL; CAPACITY]);
        assert_eq!(bench.faults.load(Ordering::SeqCst), 0);
        assert_eq!(bench.ask(direct(READ, 0, &[good])), OKAY);
        assert_eq!(bench.page(DATA), [FILL; 4096]);
    }
}

#[test]
fn pages_that_are_not_granted_are_not_touched() {
    for kind in [PLAIN, PERSISTENT] {
        let mut bench = Bench::new(&kind);
        bench.guest.grant_to_stranger(200, 200);
        bench.guest.grant_readonly(201, 201);
        bench.guest.grant(202, u32::try_from(PAGES).unwrap());
        bench.guest.grant(203, u32::MAX);
        bench.guest.put(204, 0, 0, 204);
        for reference in [200, 201, 202, 203, 204, 511, 512, u32::MAX] {
            let pieces = [(DATA, 0, 7), (reference, 0, 7)];
            assert_eq!(bench.ask(direct(READ, 0, &pieces)), ERROR, "{reference}");
            let write = bench.ask(direct(WRITE, 0, &[(reference, 0, 0)]));
            // What is read-only can be written from.
            assert_eq!(write, if reference == 201 { OKAY } else { ERROR });
        }
        assert!((200..205).all(|page| bench.page(page) == [0; 4096]));
        assert!((200..205).all(|page| !bench.guest.in_use(page)));
        assert_eq!(bench.file()[512..], [FILL; CAPACITY - 512]);
    }
}

#[test]
fn a_page_that_was_revoked_is_refused_from_then_on() {
    let mut bench = Bench::new(&PLAIN);
    let read = direct(READ, 0, &[(DATA, 0, 7)]);
    assert_eq!(bench.ask(read), OKAY);
    assert!(bench.guest.revoke(DATA));
    assert_eq!(bench.ask(read), ERROR);
}

#[test]
fn one_page_may_be_in_many_segments() {
    for kind in [PLAIN, PERSISTENT] {
        let mut bench = Bench::new(&kind);
        let pieces = [(DATA, 0, 7); 11];
        assert_eq!(bench.ask(direct(READ, 0, &pieces)), OKAY);
        assert_eq!(bench.ask(direct(WRITE, 0, &pieces)), OKAY);
        bench.block.pause().unwrap();
        assert_eq!(bench.mapped(), 0);
    }
}

#[test]
fn bad_tables_of_segments_are_refused() {
    let mut bench = Bench::new(&PLAIN);
    let table = DATA + 1;
    bench.fill_page(table, &segment((DATA, 0, 7)).repeat(256));
    assert_eq!(bench.ask(indirect(READ, 0, 256, table)), OKAY);
    for (operation, segments, page) in [
        (READ, 0, table),
        (READ, 257, table),
        (READ, u16::MAX, table),
        (FLUSH, 1, table),
        (INDIRECT, 1, table),
        (DISCARD, 1, table),
        (READ, 1, 299),
        (READ, 1, u32::MAX),
    ] {
        let request = indirect(operation, 0, segments, page);
        assert_eq!(bench.ask(request), ERROR, "{operation} {segments} {page}");
    }
    // Its last entry is bad.
    let mut bytes = segment((DATA, 0, 7)).repeat(100);
    bytes[99 * 8 + 5] = 8;
    bench.fill_page(table, &bytes);
    assert_eq!(bench.ask(indirect(WRITE, 0, 100, table)), ERROR);
    bench.fill_page(table, &[0xff; 4096]);
    assert_eq!(bench.ask(indirect(WRITE, 0, 100, table)), ERROR);
    assert_eq!(bench.file(), vec![FILL; CAPACITY]);
    assert_eq!(bench.mapped(), 0);
}

#[test]
fn a_producer_that_claims_what_cannot_be_breaks_the_ring_once() {
    for claim in [34, 0, u32::MAX, 1 << 31] {
        let mut bench = Bench::new(&PLAIN);
        assert_eq!(bench.ask(direct(READ, 0, &[(DATA, 0, 7)])), OKAY);
        bench.rings[0].claim(claim);
        bench.events.send(10);
        until("a fault", || bench.faults.load(Ordering::SeqCst) > 0);
        // Nothing helps any more.
        bench.rings[0].claim(1);
        bench.send(0, &direct(READ, 0, &[(DATA, 0, 7)]));
        bench.events.send(10);
        bench.block.pause().unwrap();
        bench.block.resume().unwrap();
        bench.block.pause().unwrap();
        assert_eq!(bench.faults.load(Ordering::SeqCst), 1);
        assert_eq!(bench.counter("reads"), 1);
        // The next frontend has a disk again.
        bench.block.disconnect();
        bench.rings[0].start_at(5);
        bench.connect().unwrap();
        assert_eq!(bench.ask(direct(READ, 0, &[(DATA, 0, 7)])), OKAY);
    }
}

#[test]
fn a_setup_that_cannot_be_leaves_nothing_behind() {
    let mut bench = Bench::unconnected(&Kind { queues: 2, ..PLAIN });
    let wrong = |node: &str, value: &str, bench: &mut Bench| {
        let before = bench.nodes.insert(node.to_owned(), value.to_owned());
        let error = bench.connect().unwrap_err();
        bench.nodes.insert(node.to_owned(), before.unwrap());
        assert!(bench.events.bound().is_empty());
        assert!(!bench.guest.in_use(RINGS));
        error.to_string()
    };
    for (node, value) in [
        ("multi-queue-num-queues", "3"),
        ("queue-1/ring-ref", "280"),
        ("queue-1/event-channel", "100"),
        ("queue-1/event-channel", "10"),
        ("queue-0/event-channel", "none"),
    ] {
        let error = wrong(node, value, &mut bench);
        assert!(!error.is_empty(), "{node} {value}");
    }
    // Pages that may not be written, or are another's.
    bench.guest.grant_readonly(RINGS, RINGS);
    assert!(matches!(bench.connect(), Err(Error::Grant(_))));
    bench.guest.grant_to_stranger(RINGS, RINGS);
    assert!(matches!(bench.connect(), Err(Error::Grant(_))));
    // Indices that cannot be.
    bench.guest.grant(RINGS, RINGS);
    bench.rings[0].claim(33);
    assert!(matches!(bench.connect(), Err(Error::Refused(_))));
    bench.rings[0].claim(0);
    bench.connect().unwrap();
    assert_eq!(bench.events.bound(), [10, 11]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_in_the_ring_gets_an_answer(
        requests in prop::collection::vec(
            (0..8u8, any::<u8>(), prop::collection::vec(any::<u8>(), 110)), 32),
        near in any::<bool>(),
        persistent in any::<bool>(),
    ) {
        let mut bench = Bench::new(if persistent { &PERSISTENT } else { &PLAIN });
        for (operation, count, rest) in requests {
            let mut request = [0; REQUEST];
            request[0] = operation;
            request[1] = count;
            request[2..].copy_from_slice(&rest);
            if near {
                request[1] = count % 12;
                request[3] = 0;
                request[18..24].fill(0);
                for entry in request[24..].chunks_exact_mut(8) {
                    let reference = DATA + u32::from(entry[0] % 70);
                    entry[..4].copy_from_slice(&reference.to_le_bytes());
                    entry[4] %= 4;
                    entry[5] %= 9;
                }
            }
            bench.send(0, &request);
        }
        for _ in 0..32 {
            let (_, _, status) = bench.wait(0);
            prop_assert!((UNSUPPORTED..=OKAY).contains(&status));
        }
        prop_assert_eq!(bench.faults.load(Ordering::SeqCst), 0);
        bench.block.disconnect();
        prop_assert_eq!(bench.mapped(), 0);
    }
}

#[test]
fn a_page_that_the_guest_takes_back_is_not_touched_although_it_is_kept() {
    let mut bench = Bench::new(&PERSISTENT);
    bench.fill_page(DATA, &pattern(1));
    let write = [(DATA, 0, 7)];
    assert_eq!(bench.ask(direct(WRITE, 0, &write)), OKAY);
    // As no guest should: the page is in use.
    bench.guest.put(DATA, 0, 0, DATA);
    bench.fill_page(DATA, &pattern(2));
    assert_eq!(bench.ask(direct(WRITE, 0, &write)), ERROR);
    assert_eq!(bench.ask(direct(READ, 8, &write)), ERROR);
    assert_eq!(bench.file()[..4096], pattern(1));
    assert_eq!(bench.page(DATA), pattern(2));
    assert_eq!(bench.counter("grant_revocations"), 1);
    assert_eq!(bench.counter("grant_refusals"), 2);
    assert_eq!(bench.mapped(), 0);
    // Another page by the same reference is used as that page.
    bench.guest.grant(DATA, DATA + 1);
    bench.fill_page(DATA + 1, &pattern(3));
    assert_eq!(bench.ask(direct(WRITE, 0, &write)), OKAY);
    assert_eq!(bench.file()[..4096], pattern(3));
}
