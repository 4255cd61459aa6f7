use std::io::Cursor;
use std::sync::LazyLock;

use super::*;
use proptest::prelude::*;

const SIZE: usize = 4 << 20;
const HOLE: u64 = 1 << 30;

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), SIZE), (GuestAddress(HOLE), SIZE)]).unwrap()
}

fn state() -> SavedState {
    SavedState::pack("test", 3, &7u32).unwrap()
}

fn head() -> Head {
    let config = VmConfig {
        cpus: Some(3),
        ..VmConfig::default()
    };
    Head::new("web".into(), config)
}

fn bytes(ram: &GuestRam) -> Vec<u8> {
    let touched = Touched::open();
    let pieces = Pieces::new(&head(), &state(), ram.clone(), touched, Arc::default());
    pieces.unwrap().flatten().collect()
}

/// A snapshot of memory with a few pages, the last ones of both regions
/// among them.
fn written() -> (Vec<u8>, GuestRam) {
    let ram = ram();
    for at in [
        0x3123,
        0x4000,
        SIZE as u64 - 1,
        HOLE,
        HOLE + SIZE as u64 - 1,
    ] {
        ram.write_obj(0xa5u8, GuestAddress(at)).unwrap();
    }
    let mut bytes = bytes(&ram);
    let marks = [DiskMark {
        path: "/d".into(),
        size: 9,
        modified: (1, 2),
    }];
    write_disks(&mut bytes, &marks).unwrap();
    (bytes, ram)
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut all = vec![0; 2 * SIZE];
    let (low, high) = all.split_at_mut(SIZE);
    ram.read_slice(low, GuestAddress(0)).unwrap();
    ram.read_slice(high, GuestAddress(HOLE)).unwrap();
    all
}

fn read(bytes: &[u8]) -> Result<GuestRam, Error> {
    let mut snapshot = Snapshot::new(bytes)?;
    let ram = ram();
    // What a kernel that was loaded has left.
    ram.write_obj(1u64, GuestAddress(0x9000)).unwrap();
    snapshot.load(&ram, Touched::open())?;
    Ok(ram)
}

#[test]
fn what_was_written_is_read_and_zeros_take_no_room() {
    let (bytes, ram) = written();
    assert!(bytes.len() < 6 * PAGE, "{}", bytes.len());
    assert!(content(&read(&bytes).unwrap()) == content(&ram));
    let snapshot = Snapshot::new(Cursor::new(&bytes)).unwrap();
    assert_eq!((snapshot.head(), snapshot.state()), (&head(), &state()));
    assert_eq!(snapshot.disks().unwrap()[0].path, PathBuf::from("/d"));
}

#[test]
fn memory_that_was_not_touched_is_not_touched() {
    let (first, ram) = written();
    let before = blanket_memory::touched_bytes(&ram);
    assert!(before < 8 * PAGE as u64, "{before}");
    let pieces = bytes(&ram);
    assert_eq!(blanket_memory::touched_bytes(&ram), before);
    // Where nobody can tell, it is read, and the same comes out.
    let read = Pieces::new(
        &head(),
        &state(),
        ram.clone(),
        Touched::default(),
        Arc::default(),
    );
    assert!(read.unwrap().flatten().eq(pieces.iter().copied()));
    assert!(first.starts_with(&pieces));
}

#[test]
fn memory_that_is_full_is_read_too() {
    let ram = ram();
    for (i, at) in (0..2 * SIZE as u64).step_by(PAGE).enumerate() {
        let at = if at < SIZE as u64 {
            at
        } else {
            HOLE + at - SIZE as u64
        };
        ram.write_obj(i as u64 + 1, GuestAddress(at)).unwrap();
    }
    let bytes = bytes(&ram);
    assert!(content(&read(&bytes).unwrap()) == content(&ram));
}

#[test]
fn kinds_that_are_not_known_are_skipped_and_newer_versions_refused() {
    let (bytes, ram) = written();
    let mut with = MAGIC.to_vec();
    with.extend(chunk(*b"new!", b"what?"));
    with.extend(&bytes[MAGIC.len()..]);
    assert!(content(&read(&with).unwrap()) == content(&ram));
    let mut newer = MAGIC.to_vec();
    let head = Head {
        version: VERSION + 1,
        ..head()
    };
    newer.extend(chunk(HEAD, &encode(&head).unwrap()));
    assert!(matches!(read(&newer), Err(Error::Version { found: 2 })));
}

#[test]
fn what_does_not_fit_or_is_something_else_is_refused() {
    let (bytes, _) = written();
    let small = GuestRam::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
    let mut snapshot = Snapshot::new(bytes.as_slice()).unwrap();
    assert!(matches!(
        snapshot.load(&small, Touched::default()),
        Err(Error::Memory)
    ));
    for other in [&b""[..], b"blanket", b"a file of another kind"] {
        assert!(matches!(read(other), Err(Error::NotOne)));
    }
}

#[test]
fn a_disk_that_was_written_to_is_told_from_one_that_was_not() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mark = || DiskMark::of(file.path().to_owned()).unwrap();
    let before = mark();
    assert_eq!(mark(), before);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
    file.as_file().set_modified(later).unwrap();
    assert_ne!(mark(), before);
}

proptest! {
    #[test]
    fn no_byte_can_change_or_be_missing_unnoticed(at: prop::sample::Index, flip in 1u8..) {
        static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| bytes(&written().1));
        let at = at.index(BYTES.len());
        prop_assert!(read(&BYTES[..at]).is_err());
        let mut changed = BYTES.clone();
        changed[at] ^= flip;
        prop_assert!(read(&changed).is_err());
    }

    #[test]
    fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut all = MAGIC.to_vec();
        all.extend(bytes);
        prop_assert!(read(&all).is_err());
        if let Ok(snapshot) = Snapshot::new(Cursor::new(&all)) {
            let _ = snapshot.disks();
        }
    }
}
