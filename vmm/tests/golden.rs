//! Snapshots of every version that was ever written are read, as `docs/compatibility.md` says.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs::File;
use std::path::{Path, PathBuf};

use blanket_devices::lifecycle::SavedState;
use blanket_memory::GuestRam;
use blanket_vmm::config::{ByteSize, VmConfig};
use blanket_vmm::snapshot::{
    Access, Base, Compression, Head, How, Key, Pieces, Recorder, Regions, Snapshot, Touched, Writer,
};
use std::io::Write;
use vm_memory::{Bytes, GuestAddress};

const SIZE: usize = 8192;

/// A state and two pages of memory, one of them used.
fn guest() -> (Head, SavedState, GuestRam) {
    let config = VmConfig {
        memory: Some(ByteSize(SIZE as u64)),
        cpus: Some(2),
        ..VmConfig::default()
    };
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
    for at in 0..1024 {
        ram.write_obj(at as u32, GuestAddress(4096 + 4 * at))
            .unwrap();
    }
    let state = SavedState::pack("golden", 1, &vec![7u64, 8, 9]).unwrap();
    (Head::new("golden".into(), config), state, ram)
}

fn path(version: &str) -> PathBuf {
    let name = format!("tests/golden/{version}.snapshot");
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The key of the encrypted one.
fn access() -> Access {
    Access {
        key: Key::parse(&[b'k'; 32]),
        ..Access::default()
    }
}

/// Writes one anew, with what is there today.
fn write(path: &Path, how: impl Into<How>) {
    let (head, state, ram) = guest();
    let mut recorder = Recorder::new(File::create(path).unwrap(), how);
    for piece in Pieces::new(&head, &state, ram, Touched::default(), Default::default()).unwrap() {
        recorder.write_all(&piece).unwrap();
    }
    recorder.finish(&[]).unwrap();
}

fn assert_is_read(path: &Path) {
    let (head, state, ram) = guest();
    let access = match path.ends_with("3-encrypted.snapshot") {
        true => access(),
        false => Access::default(),
    };
    let mut snapshot = Snapshot::open_with(path, &access).unwrap();
    assert_eq!(snapshot.head().name, head.name);
    assert_eq!(snapshot.head().config, head.config);
    assert_eq!(snapshot.state(), &state);
    let back = GuestRam::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
    snapshot.load(&back, Touched::default()).unwrap();
    let content = |ram: &GuestRam| {
        let mut bytes = vec![0; SIZE];
        ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    assert!(content(&back) == content(&ram), "{}", path.display());
}

/// With `BLANKET_WRITE_GOLDEN` those of this version are written anew first.
#[test]
fn snapshots_of_all_versions_are_read() {
    if std::env::var_os("BLANKET_WRITE_GOLDEN").is_some() {
        write(&path("3"), Compression::None);
        write(&path("3-zstd"), Compression::Zstd);
        let key = access().key;
        let how = How {
            key,
            ..How::default()
        };
        write(&path("3-encrypted"), how);
        let base = Base::open(&path("3"), &path("3-based"), &Access::default());
        let how = How {
            base: Some(base.unwrap()),
            ..How::default()
        };
        write(&path("3-based"), how);
    }
    for version in ["1", "2", "2-zstd", "3", "3-zstd", "3-encrypted", "3-based"] {
        assert_is_read(&path(version));
    }
}

#[test]
fn what_is_written_today_is_read_too() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for compression in [Compression::None, Compression::Zstd] {
        write(file.path(), compression);
        assert_is_read(file.path());
    }
}

#[test]
fn a_snapshot_of_another_guest_is_told_by_its_regions() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (head, ..) = guest();
    let regions = Regions(vec![(4096, 4096)]);
    let writer = Writer::new(file.reopen().unwrap(), &head, regions, Compression::None).unwrap();
    let mut state = Vec::new();
    ciborium::into_writer(&guest().1, &mut state).unwrap();
    writer.finish(&state, &[]).unwrap();
    let Snapshot::File(reader) = Snapshot::open(file.path()).unwrap() else {
        panic!("it is no stream")
    };
    assert!(reader.load(&guest().2, Touched::default()).is_err());
}
