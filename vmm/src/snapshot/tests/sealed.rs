//! Snapshots that are encrypted.

use super::*;

fn key(number: u8) -> Key {
    Key::parse(&[number; 32]).unwrap()
}

pub(super) fn encrypted(number: u8) -> How {
    How {
        key: Some(key(number)),
        ..How::default()
    }
}

pub(super) fn access(number: u8) -> Access {
    Access {
        key: Some(key(number)),
        ..Access::default()
    }
}

fn error(path: &Path, access: &Access) -> String {
    read_with(path, access).unwrap_err().to_string()
}

#[test]
fn an_encrypted_file_is_read_with_its_key_and_nothing_of_the_guest_without() {
    let (bytes, ram) = written();
    for compression in [Compression::None, Compression::Zstd] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let how = How {
            compression,
            ..encrypted(7)
        };
        let written = record(&bytes, file.reopen().unwrap(), how).unwrap();
        // Zeros take no room here either.
        assert_eq!(written.memory, 5 * PAGE as u64);
        assert!(written.on_disk < 192 << 10, "{}", written.on_disk);
        let back = read_with(file.path(), &access(7)).unwrap();
        assert!(content(&back) == content(&ram));
        let snapshot = Snapshot::open_with(file.path(), &access(7)).unwrap();
        assert_eq!(snapshot.state(), &state());
        assert_eq!(snapshot.head().config, head().config);
        assert_eq!(snapshot.disks().unwrap(), marks());
        let text = error(file.path(), &Access::default());
        assert!(text.contains("it is encrypted: name its key"), "{text}");
        let text = error(file.path(), &access(8));
        assert!(text.contains("another key"), "{text}");
        let stored = std::fs::read(file.path()).unwrap();
        let has = |what: &[u8]| stored.windows(what.len()).any(|bytes| bytes == what);
        assert!(has(b"web") && !has(b"regions") && !has(&[0xa5, 0, 0, 0]));
    }
}

#[test]
fn no_two_files_are_encrypted_alike() {
    let (bytes, _) = written();
    let stored = || {
        let file = tempfile::NamedTempFile::new().unwrap();
        record(&bytes, file.reopen().unwrap(), encrypted(7)).unwrap();
        let reader = Snapshot::open_with(file.path(), &access(7)).unwrap();
        let Snapshot::File(reader) = reader else {
            panic!("it is no stream");
        };
        let entry = reader.entry(0).unwrap().unwrap();
        (entry.hash, entry.tag)
    };
    let (first, second) = (stored(), stored());
    assert_eq!(first.0, second.0);
    assert_ne!(first.1, second.1);
}

#[test]
fn who_names_a_key_gets_nothing_that_is_not_encrypted() {
    let (file, _) = file(Compression::None);
    let text = error(file.path(), &access(7));
    assert!(text.contains("not encrypted"), "{text}");
    let stream = tempfile::NamedTempFile::new().unwrap();
    stream.as_file().write_all_at(&written().0, 0).unwrap();
    let text = error(stream.path(), &access(7));
    assert!(text.contains("not encrypted"), "{text}");
}

#[test]
fn parts_of_another_file_with_the_same_key_are_refused() {
    let (bytes, ram) = written();
    let make = || {
        let file = tempfile::NamedTempFile::new().unwrap();
        record(&bytes, file.reopen().unwrap(), encrypted(7)).unwrap();
        std::fs::read(file.path()).unwrap()
    };
    let (sound, other) = (make(), make());
    let file = tempfile::NamedTempFile::new().unwrap();
    // The first chunk, behind the head.
    let range = PAGE..PAGE + CHUNK;
    let mut mixed = sound.clone();
    mixed[range.clone()].copy_from_slice(&other[range]);
    file.as_file().write_all_at(&mixed, 0).unwrap();
    assert!(matches!(
        read_with(file.path(), &access(7)),
        Err(Error::Chunk { chunk: 0, .. })
    ));
    file.as_file().write_all_at(&sound, 0).unwrap();
    let back = read_with(file.path(), &access(7)).unwrap();
    assert!(content(&back) == content(&ram));
}
