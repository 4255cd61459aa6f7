use std::fs::File;
use std::io::{Cursor, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, LazyLock};

use blanket_devices::lifecycle::SavedState;
use vm_memory::{Bytes, GuestAddress};

use super::stream::{HEAD, chunk};
use super::*;
use proptest::prelude::*;

mod based;
mod sealed;

use sealed::{access, encrypted};

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
    bytes.extend(chunk(*b"disk", &encode(&marks()).unwrap()));
    (bytes, ram)
}

fn marks() -> [DiskMark; 1] {
    [DiskMark {
        path: "/d".into(),
        size: 9,
        modified: (1, 2),
    }]
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut all = vec![0; 2 * SIZE];
    let (low, high) = all.split_at_mut(SIZE);
    ram.read_slice(low, GuestAddress(0)).unwrap();
    ram.read_slice(high, GuestAddress(HOLE)).unwrap();
    all
}

fn read(bytes: &[u8]) -> Result<GuestRam, Error> {
    let mut snapshot = stream::Reader::new(bytes)?;
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
    let snapshot = stream::Reader::new(Cursor::new(&bytes)).unwrap();
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
    let found = VERSION + 1;
    assert!(matches!(read(&newer), Err(Error::Version { found: n }) if n == found));
}

#[test]
fn what_does_not_fit_or_is_something_else_is_refused() {
    let (bytes, _) = written();
    let small = GuestRam::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
    let mut snapshot = stream::Reader::new(bytes.as_slice()).unwrap();
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

/// The same in a file, with its disks' marks.
fn file(compression: Compression) -> (tempfile::NamedTempFile, GuestRam) {
    let (bytes, ram) = written();
    let file = tempfile::NamedTempFile::new().unwrap();
    record(&bytes, file.reopen().unwrap(), compression).unwrap();
    (file, ram)
}

/// Takes it in pieces of odd sizes.
fn record(bytes: &[u8], file: File, how: impl Into<How>) -> Result<Written, Error> {
    let mut recorder = Recorder::new(file, how);
    for piece in bytes.chunks(4097) {
        recorder.write_all(piece)?;
    }
    recorder.finish(&marks())
}

fn read_file(path: &Path) -> Result<GuestRam, Error> {
    read_with(path, &Access::default())
}

fn read_with(path: &Path, access: &Access) -> Result<GuestRam, Error> {
    let mut snapshot = Snapshot::open_with(path, access)?;
    let ram = ram();
    ram.write_obj(1u64, GuestAddress(0x9000)).unwrap();
    snapshot.load(&ram, Touched::open())?;
    Ok(ram)
}

#[test]
fn a_file_has_what_was_sent_and_takes_no_more_room_than_that() {
    for compression in [Compression::None, Compression::Zstd] {
        let (file, ram) = file(compression);
        let snapshot = Snapshot::open(file.path()).unwrap();
        assert_eq!(snapshot.state(), &state());
        assert_eq!(snapshot.head().config, head().config);
        assert_eq!(snapshot.disks().unwrap(), marks());
        assert!(content(&read_file(file.path()).unwrap()) == content(&ram));
        let on_disk = file.as_file().metadata().unwrap().blocks() * 512;
        // Five pages, one table, and what is around them.
        assert!(on_disk < 96 << 10, "{on_disk}");
    }
}

#[test]
fn compressed_memory_takes_less_room_and_memory_that_cannot_be_is_stored_as_it_is() {
    let sizes = [Compression::None, Compression::Zstd].map(|compression| {
        let ram = ram();
        let mut x = 1u32;
        for at in (0..SIZE as u64).step_by(4) {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // One half of it cannot be compressed.
            let value = if at < SIZE as u64 / 2 { x >> 3 } else { 7 };
            ram.write_obj(value, GuestAddress(at)).unwrap();
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let written = record(&bytes(&ram), file.reopen().unwrap(), compression).unwrap();
        assert_eq!(written.memory, SIZE as u64);
        assert!(content(&read_file(file.path()).unwrap()) == content(&ram));
        written.on_disk
    });
    assert!(sizes[1] < sizes[0] * 3 / 4, "{sizes:?}");
}

#[test]
fn files_of_version_1_are_read() {
    let (bytes, ram) = written();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    assert!(content(&read_file(file.path()).unwrap()) == content(&ram));
    let snapshot = Snapshot::open(file.path()).unwrap();
    assert_eq!(snapshot.disks().unwrap(), marks());
}

#[test]
fn a_changed_byte_of_memory_is_told_with_the_file_and_the_chunk() {
    let (file, _) = file(Compression::None);
    let Snapshot::File(reader) = Snapshot::open(file.path()).unwrap() else {
        panic!("it is no stream");
    };
    let (chunk, offset) = reader.geometry().chunk(HOLE).unwrap();
    let place = file.as_file().metadata().unwrap().len();
    let data = (0..place)
        .step_by(PAGE)
        .find(|at| {
            let mut byte = [0];
            file.as_file()
                .read_exact_at(&mut byte, at + chunk * CHUNK as u64)
                .unwrap();
            byte == [0xa5]
        })
        .unwrap();
    let at = data + chunk * CHUNK as u64 + offset as u64 + 9;
    file.as_file().write_all_at(&[1], at).unwrap();
    // What is not damaged can still be read.
    let mut content = vec![0; CHUNK];
    assert!(reader.chunk(0, &mut content).unwrap());
    let error = reader.chunk(chunk, &mut content).unwrap_err().to_string();
    let name = file.path().to_str().unwrap();
    assert!(
        error.contains(name) && error.contains("chunk 64,"),
        "{error}"
    );
    assert!(error.contains("0x40000000"), "{error}");
}

#[test]
fn a_file_that_was_not_ended_or_needs_more_is_refused() {
    let (bytes, _) = written();
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut recorder = Recorder::new(file.reopen().unwrap(), Compression::None);
    recorder.write_all(&bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(recorder.finish(&[]), Err(Error::Damaged(_))));
    let error = Snapshot::open(file.path()).err().unwrap().to_string();
    assert!(error.contains("not written to its end"), "{error}");
    #[derive(serde::Serialize)]
    struct Newer {
        version: u32,
        written_by: &'static str,
    }
    for (version, expected) in [(4, "reads up to 3"), (3, "made by Blanket 7.0")] {
        let newer = Newer {
            version,
            written_by: "7.0",
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend(chunk(*b"head", &encode(&newer).unwrap()));
        file.as_file().write_all_at(&bytes, 0).unwrap();
        let error = Snapshot::open(file.path()).err().unwrap().to_string();
        assert!(
            error.contains(expected) && error.contains("upgrade"),
            "{error}"
        );
    }
}

#[test]
fn a_stream_that_sends_a_chunk_twice_is_refused() {
    let regions = Regions(vec![(0, SIZE as u64)]);
    let file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(file, &head(), regions, Compression::None).unwrap();
    for chunk in [0, CHUNK as u64] {
        writer.put(chunk, &[1; PAGE]).unwrap();
    }
    writer.put(PAGE as u64, &[1; PAGE]).unwrap();
    assert!(matches!(
        writer.put(CHUNK as u64, &[1]),
        Err(Error::Damaged(_))
    ));
    let mut writer = Writer::new(
        tempfile::tempfile().unwrap(),
        &head(),
        Regions(vec![(0, SIZE as u64)]),
        Compression::None,
    )
    .unwrap();
    assert!(matches!(
        writer.put(SIZE as u64 - 1, &[1, 2]),
        Err(Error::Memory)
    ));
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
        if let Ok(snapshot) = stream::Reader::new(Cursor::new(&all)) {
            let _ = snapshot.disks();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn no_byte_of_a_file_can_change_what_is_read(at: prop::sample::Index, flip in 1u8..) {
        static FILE: LazyLock<(Vec<u8>, Vec<usize>, Vec<u8>)> = LazyLock::new(|| {
            let (file, ram) = file(Compression::Zstd);
            let bytes = std::fs::read(file.path()).unwrap();
            // Most of the file is holes, which nobody reads.
            let used = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
            (bytes, used, content(&ram))
        });
        let (bytes, used, expected) = &*FILE;
        let at = used[at.index(used.len())];
        let changed = tempfile::NamedTempFile::new().unwrap();
        changed.as_file().write_all_at(bytes, 0).unwrap();
        changed.as_file().write_all_at(&[bytes[at] ^ flip], at as u64).unwrap();
        if let Ok(ram) = read_file(changed.path()) {
            prop_assert!(content(&ram) == *expected);
        }
        changed.as_file().set_len(at as u64).unwrap();
        prop_assert!(read_file(changed.path()).is_err());
    }

    #[test]
    fn no_byte_of_an_encrypted_file_can_change(at: prop::sample::Index, flip in 1u8..) {
        static FILE: LazyLock<(Vec<u8>, Vec<usize>)> = LazyLock::new(|| {
            let (bytes, _) = written();
            let file = tempfile::NamedTempFile::new().unwrap();
            record(&bytes, file.reopen().unwrap(), encrypted(7)).unwrap();
            let bytes = std::fs::read(file.path()).unwrap();
            let used = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
            (bytes, used)
        });
        let (bytes, used) = &*FILE;
        let at = used[at.index(used.len())];
        let changed = tempfile::NamedTempFile::new().unwrap();
        changed.as_file().write_all_at(bytes, 0).unwrap();
        changed.as_file().write_all_at(&[bytes[at] ^ flip], at as u64).unwrap();
        prop_assert!(read_with(changed.path(), &access(7)).is_err());
    }
}
