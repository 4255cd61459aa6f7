use super::*;

#[test]
fn the_disk_says_what_it_is_and_can() {
    let mut bench = Bench::unconnected(&Kind { queues: 2, ..PLAIN });
    let offer: HashMap<_, _> = bench.block.offer().into_iter().collect();
    for (node, value) in [
        ("max-ring-page-order", "3"),
        ("multi-queue-max-queues", "2"),
        ("feature-max-indirect-segments", "256"),
        ("feature-persistent", "0"),
        ("feature-flush-cache", "1"),
        ("mode", "w"),
    ] {
        assert_eq!(offer[node], value, "{node}");
    }
    assert!(!offer.contains_key("feature-barrier"));
    let frontend: HashMap<_, _> = bench.block.frontend().into_iter().collect();
    assert_eq!(frontend["virtual-device"], "51712");
    assert_eq!((bench.block.kind(), bench.block.index()), ("vbd", 51712));
    let nodes = bench.connect().unwrap();
    assert_eq!(nodes["sectors"], "2048");
    assert_eq!(nodes["sector-size"], "512");
    assert_eq!(nodes["info"], "0");
    assert!(nodes["physical-sector-size"].parse::<u32>().unwrap() >= 512);
}

#[test]
fn disks_are_numbered_as_linux_names_them() {
    assert_eq!([0, 1, 15].map(number), [51712, 51728, 51952]);
    assert_eq!(number(16), 1 << 28 | 16 << 8);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let kind = Kind {
        readonly: true,
        ..PERSISTENT
    };
    let mut bench = Bench::unconnected(&kind);
    let offer: HashMap<_, _> = bench.block.offer().into_iter().collect();
    assert_eq!(offer["mode"], "r");
    assert_eq!(offer["feature-flush-cache"], "0");
    assert_eq!(offer["feature-discard"], "0");
    assert_eq!(bench.connect().unwrap()["info"], "4");
    assert_eq!(bench.ask(direct(READ, 0, &[(DATA, 0, 7)])), OKAY);
    assert_eq!(bench.ask(direct(WRITE, 0, &[(DATA, 0, 7)])), ERROR);
    assert_eq!(bench.ask(discard(0, 8)), ERROR);
    assert_eq!(bench.file(), vec![FILL; CAPACITY]);
}

#[test]
fn requests_during_a_pause_are_served_after_it() {
    let mut bench = Bench::new(&PERSISTENT);
    bench.block.pause().unwrap();
    bench.block.pause().unwrap();
    for _ in 0..3 {
        bench.send(0, &direct(READ, 0, &[(DATA, 0, 7)]));
    }
    assert_eq!(bench.counter("reads"), 0);
    bench.block.resume().unwrap();
    for _ in 0..3 {
        assert_eq!(bench.wait(0).2, OKAY);
    }
}

#[test]
fn a_saved_disk_goes_on_in_another_monitor() {
    for kind in [
        PLAIN,
        Kind {
            queues: 2,
            pages: 2,
            ..PERSISTENT
        },
    ] {
        let mut bench = Bench::new(&kind);
        bench.fill_page(DATA, &pattern(3));
        assert_eq!(bench.ask(direct(WRITE, 8, &[(DATA, 0, 7)])), OKAY);
        assert!(bench.block.save().is_err(), "it runs");
        bench.block.pause().unwrap();
        // The guest was faster than the pause.
        bench.send(0, &direct(READ, 8, &[(DATA + 1, 0, 7)]));
        let state = bench.block.save().unwrap();
        let entries = bench.guest.entries();
        // That monitor is gone, and with it its image.
        let other = bench.path.with_file_name("other.raw");
        std::fs::write(&other, [0; 512]).unwrap();
        bench.block.halt();
        bench.block = block(image(&other, &kind), &kind);
        bench.context.grants = bench.guest.moved(&entries);
        let mut other = block(image(&bench.path, &kind), &kind);
        other.restore(&state, &bench.context).unwrap();
        assert_eq!(other.save().unwrap(), state);
        other.resume().unwrap();
        bench.block = other;
        assert_eq!(bench.wait(0).2, OKAY);
        assert_eq!(bench.page(DATA + 1), pattern(3));
        assert_eq!(bench.ask(direct(FLUSH, 0, &[])), OKAY);
        bench.block.disconnect();
        assert!(!bench.guest.in_use(RINGS));
    }
}

#[test]
fn a_disk_without_a_frontend_is_saved_as_such() {
    let bench = Bench::unconnected(&PLAIN);
    let state = bench.block.save().unwrap();
    let mut bench = Bench::new(&PLAIN);
    bench.block.pause().unwrap();
    bench.block.restore(&state, &bench.context).unwrap();
    assert!(bench.events.bound().is_empty());
    bench.connect().unwrap();
    assert_eq!(bench.ask(direct(READ, 0, &[(DATA, 0, 7)])), OKAY);
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut bench = Bench::new(&PLAIN);
    bench.block.pause().unwrap();
    let state = bench.block.save().unwrap();
    bench.block.disconnect();
    let Connection { setup, indices } = state
        .unpack::<State>("blk0", STATE_VERSION)
        .unwrap()
        .connection
        .unwrap();
    let mut restore = |capacity: u64, setup: &Setup, indices: &[Indices]| {
        let state = State {
            capacity,
            connection: Some(Connection {
                setup: setup.clone(),
                indices: indices.to_vec(),
            }),
        };
        let state = SavedState::pack("blk0", STATE_VERSION, &state).unwrap();
        let restored = bench.block.restore(&state, &bench.context);
        let bound = bench.events.bound();
        bench.block.disconnect();
        restored.map(|()| bound).map_err(|error| error.to_string())
    };
    let size = CAPACITY as u64;
    assert_eq!(restore(size, &setup, &indices), Ok(vec![10]));
    let error = restore(size + 512, &setup, &indices).unwrap_err();
    assert!(error.contains("same image"), "{error}");
    let wild = Indices {
        req_cons: 100,
        rsp_prod: 0,
    };
    assert!(restore(size, &setup, &[wild]).is_err());
    let mut twice = setup.clone();
    twice.rings.push(super::setup::RingSetup {
        references: vec![RINGS],
        port: 11,
    });
    assert!(restore(size, &twice, &[indices[0], indices[0]]).is_err());
    let mut gone = setup;
    gone.rings[0].references = vec![290];
    assert!(restore(size, &gone, &indices).is_err());
}
