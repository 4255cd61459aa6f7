//! A snapshot's file, and a monitor's stream: whatever they hold, they are read
//! or refused, within bounded memory. A sound one is read back as it was.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use arbitrary::Arbitrary;
use blanket_fuzz::file::MemFile;
use blanket_vmm::config::VmConfig;
use blanket_vmm::snapshot::{
    Access, Base, CHUNK, Compression, Head, How, Key, Recorder, Regions, Snapshot, Writer,
};
use libfuzzer_sys::fuzz_target;

/// Bytes of guest memory.
const MEMORY: u64 = 3 * CHUNK as u64;
/// Where the head's length is, and where its bytes begin.
const LENGTH: usize = 16;
const HEAD: usize = 24;

#[derive(Arbitrary, Debug)]
enum Input {
    /// A file that differs from a sound one.
    File {
        compressed: bool,
        encrypted: bool,
        /// It is based on another one, of which nothing is changed.
        based: bool,
        page: u8,
        changes: Vec<(Place, u16, u8)>,
        /// Its root has the hash of what is in the index then.
        sealed: bool,
        cut: Option<u16>,
    },
    /// Any file.
    Bytes(Vec<u8>),
    /// Any stream, and where it is cut into pieces.
    Stream(Vec<u8>, u8),
}

/// Which part is changed.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Start,
    Memory,
    End,
}

/// A sound state, in CBOR.
fn state() -> Vec<u8> {
    let state = blanket_devices::lifecycle::SavedState::pack("fuzz", 1, &7u32).expect("a state");
    let mut bytes = Vec::new();
    ciborium::into_writer(&state, &mut bytes).expect("bytes");
    bytes
}

/// The key of encrypted ones.
fn key() -> Key {
    Key::parse(&[7; 32]).expect("a key")
}

fn sound(how: How, page: u8) -> MemFile {
    let file = MemFile::new(&[], 0);
    let mut options = File::options();
    let open = options.read(true).write(true).open(file.path());
    let head = Head::new("web".into(), VmConfig::default());
    let regions = Regions(vec![(0, CHUNK as u64), (1 << 32, 2 * CHUNK as u64)]);
    let mut writer = Writer::new(open.expect("it"), &head, regions, how).expect("a file");
    writer.put(4096, &[page; 4096]).expect("memory");
    writer
        .put((1 << 32) + MEMORY / 2, &[page; 3])
        .expect("memory");
    writer.finish(&state(), &[]).expect("the end");
    file
}

/// What a file has.
fn content(file: &MemFile) -> Vec<u8> {
    let mut bytes = vec![0; file.len() as usize];
    let open = File::open(file.path()).expect("it");
    open.read_exact_at(&mut bytes, 0).expect("it");
    bytes
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    usize::try_from(u64::from_le_bytes(field.try_into().ok()?)).ok()
}

/// Where the root is, and where the index.
fn index(bytes: &[u8]) -> Option<(usize, std::ops::Range<usize>)> {
    let root = HEAD.checked_add(number(bytes, LENGTH)?)?;
    let start = number(bytes, root)?;
    let end = start.checked_add(number(bytes, root + 8)?)?;
    (end <= bytes.len()).then_some((root, start..end))
}

/// Gives the root the hash of what is in the index.
fn seal(bytes: &mut [u8]) -> Option<()> {
    let (root, index) = index(bytes)?;
    let hash = blake3::hash(bytes.get(index)?);
    bytes
        .get_mut(root + 16..root + 48)?
        .copy_from_slice(hash.as_bytes());
    Some(())
}

fn change(bytes: &mut [u8], place: Place, at: u16, to: u8) {
    let start = match place {
        Place::Start => 0,
        Place::Memory => CHUNK,
        Place::End => index(bytes).map_or(0, |(_, index)| index.start.saturating_sub(512)),
    };
    let len = bytes.len().saturating_sub(start).max(1);
    if let Some(byte) = bytes.get_mut(start + usize::from(at) % len) {
        *byte = to;
    }
}

/// Reads all of it; the memory.
fn read(bytes: &[u8], access: &Access) -> Option<Vec<u8>> {
    let file = MemFile::new(bytes, 0);
    let Snapshot::File(reader) = Snapshot::open_with(&file.path(), access).ok()? else {
        return None;
    };
    let mut all = Vec::new();
    let mut chunk = vec![0; CHUNK];
    assert!(reader.used().iter().all(|(_, len)| *len > 0));
    // Of memory that does not end, the beginning.
    for number in 0..reader.geometry().chunks().min(16) {
        reader.chunk(number, &mut chunk).ok()?;
        all.extend(&chunk);
    }
    Some(all)
}

fuzz_target!(|input: Input| match input {
    Input::File {
        compressed,
        encrypted,
        based,
        page,
        changes,
        sealed,
        cut,
    } => {
        let key = encrypted.then(key);
        // Its pages are the other's if they are odd.
        let below = sound(How::default(), page | 1);
        let access = Access {
            key: key.clone(),
            bases: vec![below.path()],
        };
        let how = How {
            compression: match compressed {
                true => Compression::Zstd,
                false => Compression::None,
            },
            key,
            base: based.then(|| {
                let base = Base::open(&below.path(), Path::new("/new"), &Access::default());
                base.expect("a base")
            }),
        };
        let mut bytes = content(&sound(how, page));
        let intact = changes.is_empty() && cut.is_none();
        for (place, at, to) in changes {
            change(&mut bytes, place, at, to);
        }
        if let Some(cut) = cut {
            bytes.truncate(bytes.len() - usize::from(cut) % bytes.len());
        }
        if sealed {
            let _ = seal(&mut bytes);
        }
        let memory = read(&bytes, &access);
        if intact {
            let memory = memory.expect("a sound snapshot is read");
            assert_eq!(memory.len() as u64, MEMORY);
            assert_eq!(memory[4096..8192], [page; 4096]);
            assert_eq!(memory.iter().filter(|byte| **byte != 0).count() % 4099, 0);
        }
    }
    Input::Bytes(bytes) => drop(read(&bytes, &Access::default())),
    Input::Stream(bytes, piece) => {
        let file = MemFile::new(&[], 0);
        let open = File::options().read(true).write(true).open(file.path());
        let mut recorder = Recorder::new(open.expect("it"), Compression::None);
        let mut stream = b"blanket\x1a".to_vec();
        stream.extend(bytes);
        let mut pieces = stream.chunks(usize::from(piece).max(1));
        let taken = pieces.try_for_each(|piece| recorder.write_all(piece));
        if taken.is_ok() {
            let _ = recorder.finish(&[]);
        }
    }
});
