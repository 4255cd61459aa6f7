//! Guests that write faster than can be sent.

use super::*;

#[test]
fn a_guest_that_writes_too_fast_stays() {
    let mut guest = Counter::new(Duration::ZERO);
    let options = Options {
        mode: Mode::PreCopy,
        rounds: 3,
        ..slow()
    };
    let outcome = migrate(&mut guest, true, &options, Fault::None);
    assert!(matches!(outcome.moved, Err(Error::Diverges { .. })));
    assert!(outcome.here && !outcome.there);
    // Memory would follow, but it cannot there.
    for mode in [Mode::Hybrid, Mode::PostCopy] {
        let options = Options { mode, ..options };
        let outcome = migrate_to(&mut guest, true, false, &options, Fault::None);
        assert!(matches!(outcome.moved, Err(Error::Diverges { .. })));
        assert!(outcome.here && !outcome.there);
        assert_eq!(outcome.status.unable.as_deref(), Some("it cannot"));
    }
}

#[test]
fn a_guest_that_writes_too_fast_moves_when_it_is_slowed_down() {
    let options = Options {
        mode: Mode::PreCopy,
        bandwidth: 20 << 20,
        downtime_ms: 100,
        ..options()
    };
    let options = Options {
        compress: Compress::Off,
        ..options
    };
    let pause = Duration::from_micros(75);
    let stays = Options {
        rounds: 5,
        ..options.clone()
    };
    let mut guest = Counter::new(pause);
    let outcome = migrate(&mut guest, true, &stays, Fault::None);
    assert!(matches!(outcome.moved, Err(Error::Diverges { .. })));
    assert_eq!(outcome.status.throttle, 0);

    let slows = |rounds| Options {
        auto_converge: true,
        rounds,
        ..options.clone()
    };
    // It ends before it is slow enough: it is as fast as before.
    let outcome = migrate(&mut guest, true, &slows(3), Fault::None);
    let error = outcome.moved.unwrap_err().to_string();
    assert!(error.contains("slowed down as it is"), "{error}");
    assert!(outcome.here && outcome.status.throttle > 0);
    assert_eq!(guest.slowed.load(Ordering::SeqCst), 0);

    let outcome = migrate(&mut guest, true, &slows(30), Fault::None);
    outcome.moved.unwrap();
    outcome.arrived.unwrap();
    assert!(outcome.there && !outcome.here);
    let status = outcome.status;
    assert!(status.throttle >= 20, "{status:?}");
    let steps = status.rounds.iter().map(|round| round.throttle);
    assert!(steps.is_sorted(), "{status:?}");
    assert_eq!(guest.slowed.load(Ordering::SeqCst), 0);
}

#[test]
fn a_guest_that_writes_too_fast_moves_when_little_is_sent_of_what_it_writes() {
    let options = |compress| Options {
        compress,
        mode: Mode::PreCopy,
        bandwidth: 20 << 20,
        downtime_ms: 30,
        rounds: 30,
        ..options()
    };
    let mut guest = Counter::new(Duration::from_micros(75));
    let off = Options {
        rounds: 5,
        ..options(Compress::Off)
    };
    let outcome = migrate(&mut guest, true, &off, Fault::None);
    assert!(matches!(outcome.moved, Err(Error::Diverges { .. })));
    assert_eq!(outcome.status.packed, Packed::default());
    // The link is slow: it is found out that it is worth it.
    let outcome = migrate(&mut guest, true, &options(Compress::Auto), Fault::None);
    outcome.moved.unwrap();
    outcome.arrived.unwrap();
    let status = outcome.status;
    let packed = status.packed;
    assert!(packed.compressed > 1 << 20, "{status:?}");
    assert!(packed.compressed_to < packed.compressed / 2, "{status:?}");
    assert!(packed.changed > 100_000, "{status:?}");
    assert!(packed.changed_to < packed.changed / 10, "{status:?}");
    let saved: u64 = status.rounds.iter().map(|round| round.saved).sum();
    assert_eq!(saved, packed.saved());
}

#[test]
fn memory_that_is_always_made_less_arrives_over_any_number_of_streams() {
    let mut changed = 0;
    for (streams, delta_cache) in [(1, 64 << 20), (2, 1 << 20), (5, 64 << 20), (5, 0)] {
        let mut guest = Counter::new(Duration::from_micros(75));
        let options = Options {
            streams,
            delta_cache,
            compress: Compress::Lz4,
            // Several rounds.
            mode: Mode::PreCopy,
            bandwidth: 20 << 20,
            downtime_ms: 30,
            ..options()
        };
        let outcome = migrate(&mut guest, true, &options, Fault::None);
        outcome.moved.unwrap();
        outcome.arrived.unwrap();
        let packed = outcome.status.packed;
        assert!(packed.compressed_to < packed.compressed, "{packed:?}");
        assert!(packed.changed == 0 || delta_cache > 0, "{packed:?}");
        changed += packed.changed;
    }
    assert!(changed > 0);
}

#[test]
fn wherever_a_bit_changes_in_memory_that_was_made_less_exactly_one_end_runs_the_guest() {
    let options = Options {
        compress: Compress::Lz4,
        ..options()
    };
    wherever(8, &options, |to_destination, at| Fault::Flip {
        to_destination,
        // It is about half as much.
        at: at / 2,
    });
}
