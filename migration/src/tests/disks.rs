//! Disks of which the destination has some.

use super::*;

/// Bytes of one disk.
const DISK: u64 = SECTORS * SECTOR as u64;

/// A guest whose disks are full of what cannot be packed, and that hardly writes.
fn full() -> Counter {
    filled(Counter::new(Duration::from_millis(5)))
}

pub(super) fn filled(guest: Counter) -> Counter {
    for (number, disk) in guest.disks.iter().enumerate() {
        for sector in 0..SECTORS {
            let mut bytes = [0; SECTOR];
            let seed = [number as u64, sector].map(u64::to_le_bytes).concat();
            blake3::Hasher::new()
                .update(&seed)
                .finalize_xof()
                .fill(&mut bytes);
            disk.store(sector * SECTOR as u64, &bytes);
        }
    }
    guest
}

#[test]
fn what_has_come_before_a_break_is_not_sent_again() {
    let mut guest = full();
    let own = [Ram::new(), Ram::new()];
    // In the middle of the second disk.
    let fault = Fault::Cut {
        to_destination: true,
        after: DISK + DISK / 2,
    };
    let broken = migrate_onto(&mut guest, own.clone(), [true; 2], &options(), fault);
    assert!(broken.moved.is_err() && broken.here && !broken.there);
    assert_eq!(broken.status.disks_same, 0);
    let again = migrate_onto(&mut guest, own, [true, false], &options(), Fault::None);
    again.moved.unwrap();
    let status = again.status;
    // What was on its way when it broke may be missing, and what the guest wrote.
    assert!(status.disks_same > DISK, "{status:?}");
    let sent: u64 = status.rounds.iter().map(|round| round.disk).sum();
    assert!(sent < DISK, "{status:?}");
}

#[test]
fn what_is_there_already_is_durable_there_though_nothing_is_sent() {
    // It never writes to its disks.
    let mut guest = filled(Counter::new(Duration::from_secs(3600)));
    let own = guest.disks.clone().map(|disk| {
        let copy = Ram::new();
        copy.store(0, &disk.bytes.lock().unwrap());
        copy
    });
    let outcome = migrate_onto(&mut guest, own, [true, false], &options(), Fault::None);
    outcome.moved.unwrap();
    let status = outcome.status;
    assert_eq!((status.disks_same, status.disks_sent), (2 * DISK, 0));
}

#[test]
fn what_the_destination_has_of_something_else_is_replaced() {
    let mut guest = full();
    let own = [Ram::new(), Ram::new()];
    // The same, but for one bit; and nothing of it.
    let mut bytes = guest.disks[0].bytes.lock().unwrap().clone();
    bytes[DISK as usize / 2] ^= 1;
    own[0].store(0, &bytes);
    own[1].store(0, &vec![0xaa; DISK as usize]);
    let outcome = migrate_onto(&mut guest, own, [true, false], &options(), Fault::None);
    // Content is compared there.
    outcome.moved.unwrap();
    let same = outcome.status.disks_same;
    assert!(0 < same && same < DISK, "{same}");
}
