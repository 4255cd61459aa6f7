//! Guests that run before their disks' content is there.

use super::*;

/// With what is on its disks behind it.
fn behind(mode: Mode) -> Options {
    Options {
        mode,
        lazy_disks: true,
        bandwidth: 30 << 20,
        downtime_ms: 1000,
        verify: true,
        ..options()
    }
}

/// Memory follows only where it can.
fn modes() -> Vec<Mode> {
    let opened = Uffd::open();
    match opened {
        Ok(_) => vec![Mode::PreCopy, Mode::PostCopy],
        Err(_) => vec![Mode::PreCopy],
    }
}

#[test]
fn a_guest_uses_disks_whose_content_follows_it() {
    for mode in modes() {
        let mut guest = disks::filled(Counter::new(Duration::from_millis(1)));
        let outcome = migrate(&mut guest, true, &behind(mode), Fault::None);
        outcome.moved.unwrap();
        outcome.arrived.unwrap();
        assert!(outcome.there && !outcome.here && guest.given_up);
        let status = outcome.status;
        assert_eq!((status.phase, &status.error), (Phase::Moved, &None));
        let following = status.following_disks.unwrap();
        assert!(following.missing > 1 << 20 && following.left == 0);
        assert!(following.faults > 0, "{following:?}");
        assert_eq!(status.following.is_some(), mode == Mode::PostCopy);
        assert_eq!(status.disks_sent, 0);
    }
}

#[test]
fn disks_without_content_follow_at_once() {
    let mut guest = Counter::new(Duration::from_secs(3600));
    for disk in &guest.disks {
        disk.store(0, &vec![0; SECTORS as usize * SECTOR]);
    }
    let own = [Ram::new(), Ram::new()];
    let options = behind(Mode::PreCopy);
    let outcome = migrate_onto(&mut guest, own, [true; 2], &options, Fault::None);
    outcome.moved.unwrap();
    outcome.arrived.unwrap();
    assert_eq!(outcome.status.phase, Phase::Moved);
}

#[test]
fn of_disks_that_follow_only_what_the_destination_lacks_is_sent() {
    let mut guest = disks::filled(Counter::new(Duration::from_secs(3600)));
    let own = guest.disks.clone().map(|disk| {
        let copy = Ram::new();
        copy.store(0, &disk.bytes.lock().unwrap());
        copy
    });
    own[1].store(1 << 20, &[7; SECTOR]);
    let options = behind(Mode::PreCopy);
    let outcome = migrate_onto(&mut guest, own, [true; 2], &options, Fault::None);
    outcome.moved.unwrap();
    outcome.arrived.unwrap();
    let following = outcome.status.following_disks.unwrap();
    assert_eq!(following.missing, 256 << 10);
}

#[test]
fn a_guest_whose_source_is_lost_before_its_disks_have_followed_is_told_so() {
    let mut guest = disks::filled(Counter::new(Duration::from_millis(1)));
    let fault = Fault::Sever { after: 1_000_000 };
    let outcome = migrate(&mut guest, true, &behind(Mode::PreCopy), fault);
    outcome.moved.unwrap();
    assert!(outcome.there && !outcome.here && guest.given_up);
    let said = outcome.arrived.unwrap_err().to_string();
    assert!(
        said.starts_with(DISKS_LOST) && said.contains("of disk 1"),
        "{said}"
    );
    assert!(outcome.failed, "it waits for ever");
    let error = outcome.status.error.unwrap();
    assert!(error.contains("bytes of its disks"), "{error}");
}

#[test]
fn wherever_it_is_cut_exactly_one_end_runs_a_guest_that_its_disks_follow() {
    for mode in modes() {
        wherever(8, &behind(mode), |to_destination, after| Fault::Cut {
            to_destination,
            after,
        });
    }
}

#[test]
fn wherever_a_bit_changes_exactly_one_end_runs_a_guest_that_its_disks_follow() {
    for mode in modes() {
        wherever(6, &behind(mode), |to_destination, at| Fault::Flip {
            to_destination,
            at,
        });
    }
}
