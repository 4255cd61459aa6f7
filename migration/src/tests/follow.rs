//! Guests that run before their memory is there.

use super::*;

/// Whether this user has what it takes.
fn can_follow() -> bool {
    let opened = Uffd::open();
    if let Err(error) = &opened {
        println!("skipped: {error}");
    }
    opened.is_ok()
}

#[test]
fn a_guest_that_writes_too_fast_arrives_before_its_memory() {
    if !can_follow() {
        return;
    }
    for (mode, verify) in [
        (Mode::Hybrid, false),
        (Mode::PostCopy, false),
        (Mode::PostCopy, true),
    ] {
        let mut guest = Counter::new(Duration::ZERO);
        let options = Options {
            mode,
            verify,
            ..slow()
        };
        let outcome = migrate(&mut guest, true, &options, Fault::None);
        outcome.moved.unwrap();
        outcome.arrived.unwrap();
        assert!(outcome.there && !outcome.here && guest.given_up);
        let status = outcome.status;
        assert_eq!((status.phase, &status.error), (Phase::Moved, &None));
        let following = status.following.unwrap();
        assert!(following.missing > 1 << 20 && following.left == 0);
        assert!(following.faults > 0);
        assert!(0 < following.us && following.us <= status.total_us);
        // Without the rounds over disks.
        let rounds = status.rounds.iter().filter(|round| round.pages > 0);
        assert_eq!(rounds.count() > 0, mode == Mode::Hybrid);
    }
}

#[test]
fn a_guest_whose_source_is_lost_before_its_memory_has_followed_is_reported() {
    if !can_follow() {
        return;
    }
    let mut guest = Counter::new(Duration::ZERO);
    let options = Options {
        mode: Mode::PostCopy,
        ..slow()
    };
    let fault = Fault::Sever { after: 1_000_000 };
    let outcome = migrate(&mut guest, true, &options, fault);
    // It was handed over.
    outcome.moved.unwrap();
    assert!(outcome.there && !outcome.here && guest.given_up);
    let said = outcome.arrived.unwrap_err().to_string();
    assert!(said.starts_with(MEMORY_LOST), "{said}");
    assert!(said.contains(": 0x"), "{said}");
    let error = outcome.status.error.unwrap();
    assert!(error.contains("has gone away"), "{error}");
}

fn follows() -> Options {
    Options {
        mode: Mode::PostCopy,
        bandwidth: 80 << 20,
        ..slow()
    }
}

#[test]
fn wherever_it_is_cut_exactly_one_end_runs_a_guest_that_its_memory_follows() {
    if can_follow() {
        wherever(24, &follows(), |to_destination, after| Fault::Cut {
            to_destination,
            after,
        });
    }
}

#[test]
fn wherever_a_bit_changes_exactly_one_end_runs_a_guest_that_its_memory_follows() {
    if can_follow() {
        wherever(16, &follows(), |to_destination, at| Fault::Flip {
            to_destination,
            at,
        });
    }
}
