use super::*;

#[test]
fn what_is_written_is_in_the_image_and_is_read_back() {
    for kind in [PLAIN, PERSISTENT] {
        let mut bench = Bench::new(&kind);
        bench.fill_page(DATA, &pattern(1));
        bench.fill_page(DATA + 1, &pattern(2));
        let pieces = [(DATA, 0, 7), (DATA + 1, 2, 3)];
        assert_eq!(bench.ask(direct(WRITE, 9, &pieces)), OKAY);
        let mut expected = vec![FILL; CAPACITY];
        expected[9 * 512..17 * 512].copy_from_slice(&pattern(1));
        expected[17 * 512..19 * 512].copy_from_slice(&pattern(2)[1024..2048]);
        assert_eq!(bench.file(), expected);
        // Back to other pages and places.
        let pieces = [(DATA + 5, 7, 7), (DATA + 6, 0, 7)];
        assert_eq!(bench.ask(direct(READ, 9, &pieces)), OKAY);
        assert_eq!(bench.page(DATA + 5)[3584..], expected[9 * 512..10 * 512]);
        assert_eq!(bench.page(DATA + 5)[..3584], [0; 3584]);
        assert_eq!(bench.page(DATA + 6), expected[10 * 512..18 * 512]);
        assert_eq!(bench.ask(direct(FLUSH, 0, &[])), OKAY);
        assert_eq!(bench.counter("flushes"), 1);
        assert_eq!(bench.counter("errors"), 0);
    }
}

#[test]
fn pages_are_unmapped_with_their_request_unless_they_are_kept() {
    for (persistent, kept) in [
        ((false, false), 0),
        ((true, false), 0),
        ((false, true), 0),
        ((true, true), 2),
    ] {
        let kind = Kind {
            persistent,
            ..PLAIN
        };
        let mut bench = Bench::new(&kind);
        for _ in 0..3 {
            let pieces = [(DATA, 0, 7), (DATA + 1, 0, 7)];
            assert_eq!(bench.ask(direct(READ, 0, &pieces)), OKAY);
            assert_eq!(bench.ask(direct(WRITE, 8, &pieces)), OKAY);
        }
        assert_eq!(bench.mapped(), kept);
        // Six requests for two pages each.
        let maps = if kept == 0 { 12 } else { kept as u64 };
        assert_eq!(bench.counter("grant_maps"), maps);
        assert_eq!(bench.counter("grant_unmaps"), maps - kept as u64);
        let hits = if kept == 0 { 0 } else { 12 - maps };
        assert_eq!(bench.counter("grant_hits"), hits);
        assert_eq!(bench.guest.revoke(DATA), kept == 0);
        bench.block.pause().unwrap();
        assert_eq!(bench.mapped(), 0);
        bench.block.resume().unwrap();
        bench.guest.grant(DATA, DATA);
        assert_eq!(bench.ask(direct(READ, 0, &[(DATA, 0, 7)])), OKAY);
        bench.block.disconnect();
        assert_eq!(bench.mapped(), 0);
        assert!(!bench.guest.in_use(RINGS));
    }
}

#[test]
fn no_more_pages_are_kept_than_a_ring_can_use() {
    let table = Guest::new(PAGES);
    for page in 1..=6 {
        table.grant(page, page);
    }
    let mut pages = Pages::new(
        Arc::clone(&table.grants),
        NonZeroUsize::new(3),
        &Arc::default(),
    );
    let kept = |table: &Guest| -> Vec<u32> { (1..=6).filter(|page| table.in_use(*page)).collect() };
    for page in [1, 2, 3, 1, 4] {
        pages.map(page, Access::Read).unwrap();
    }
    // 2 was not used for longest.
    assert_eq!(kept(&table), [1, 3, 4]);
    let in_flight = pages.map(3, Access::Write).unwrap();
    for page in [4, 5, 6, 1] {
        pages.map(page, Access::Read).unwrap();
    }
    assert_eq!(kept(&table), [1, 3, 5, 6]);
    drop(in_flight);
    assert_eq!(kept(&table), [1, 5, 6]);
    pages.release();
    assert!(kept(&table).is_empty());
}

#[test]
fn long_requests_have_their_segments_in_a_page() {
    for kind in [PLAIN, PERSISTENT] {
        let mut bench = Bench::new(&kind);
        let mut table = Vec::new();
        for page in 0..40 {
            bench.fill_page(DATA + page, &pattern(page));
            table.extend(segment((DATA + page, 0, 7)));
        }
        bench.fill_page(DATA + 60, &table);
        let write = indirect(WRITE, 16, 40, DATA + 60);
        assert_eq!(bench.ask(write), OKAY);
        let file = bench.file();
        for page in 0..40 {
            let at = 16 * 512 + page as usize * 4096;
            assert_eq!(file[at..at + 4096], pattern(page));
        }
        for page in 0..40 {
            bench.fill_page(DATA + page, &[0; 4096]);
        }
        assert_eq!(bench.ask(indirect(READ, 16, 40, DATA + 60)), OKAY);
        assert!((0..40).all(|page| bench.page(DATA + page) == pattern(page)));
    }
}

#[test]
fn discarded_ranges_read_as_zeros() {
    let mut bench = Bench::new(&PLAIN);
    let offer: HashMap<_, _> = bench.block.offer().into_iter().collect();
    if offer["feature-discard"] == "0" {
        assert_eq!(bench.ask(discard(8, 8)), UNSUPPORTED);
        return;
    }
    assert!(offer["discard-granularity"].parse::<u32>().unwrap() >= 512);
    assert_eq!(bench.ask(discard(8, 16)), OKAY);
    let file = bench.file();
    assert_eq!(file[8 * 512..24 * 512], [0; 16 * 512]);
    assert_eq!(file[24 * 512], FILL);
    assert_eq!(bench.counter("discards"), 1);
}

#[test]
fn rings_of_any_size_are_served_in_parallel_and_to_the_last_entry() {
    for (queues, pages) in [(1, 1), (2, 1), (1, 8), (2, 4)] {
        let kind = Kind {
            queues,
            pages,
            ..PERSISTENT
        };
        let mut bench = Bench::new(&kind);
        let entries = bench.rings[0].entries();
        for round in 0..4u64 {
            for queue in 0..u32::from(queues) {
                for n in 0..entries {
                    let page = DATA + (n % 32) + 32 * queue;
                    let sector = u64::from(n * 4 + queue * 2);
                    let mut request = direct(READ, sector, &[(page, 0, 1)]);
                    request[8..16].copy_from_slice(&u64::from(n).to_le_bytes());
                    bench.send(queue, &request);
                }
            }
            for queue in 0..u32::from(queues) {
                let mut ids: Vec<_> = (0..entries)
                    .map(|_| {
                        let (id, operation, status) = bench.wait(queue);
                        assert_eq!((operation, status), (READ, OKAY), "round {round}");
                        id
                    })
                    .collect();
                ids.sort_unstable();
                assert!(ids.iter().copied().eq(0..u64::from(entries)));
            }
        }
        let requests = u64::from(4 * entries * u32::from(queues));
        assert_eq!(bench.counter("reads"), requests);
        assert!(bench.events.notified() as u64 <= requests);
    }
}

#[test]
fn a_slow_engine_holds_the_ring_back_and_loses_nothing() {
    let kind = Kind {
        engine: Engine::Sync,
        pages: 8,
        ..PLAIN
    };
    let mut bench = Bench::new(&kind);
    for n in 0..2000u64 {
        let mut request = direct(WRITE, n % 1000 * 2, &[(DATA + (n % 64) as u32, 0, 1)]);
        request[8..16].copy_from_slice(&n.to_le_bytes());
        if n >= 256 {
            let (_, _, status) = bench.wait(0);
            assert_eq!(status, OKAY);
        }
        bench.send(0, &request);
    }
    for _ in 0..256 {
        assert_eq!(bench.wait(0).2, OKAY);
    }
    assert_eq!(bench.counter("writes"), 2000);
    assert_eq!(bench.mapped(), 0);
}
