//! The frames of a migration's streams: none that differs from what was sent is
//! taken, and memory lands where it belongs or nowhere.
#![no_main]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use arbitrary::Arbitrary;
use blanket_fuzz::guest::{RAM, ram};
use blanket_migration::wire::{self, Frames, Kind, Offer};
use blanket_migration::{Disk, Disks, place, store};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

#[derive(Arbitrary, Debug)]
enum Input {
    /// Whatever comes.
    Bytes(Vec<u8>),
    /// A sound frame of memory, and the byte that is another then.
    Memory {
        page: u32,
        pages: u8,
        value: u8,
        zeros: bool,
        change: Option<(u16, u8)>,
    },
}

fn pages(page: u64, count: u64, value: u8, zeros: bool) -> (Kind, Vec<u8>) {
    let mut payload = (page * 4096).to_le_bytes().to_vec();
    if zeros {
        payload.extend((count * 4096).to_le_bytes());
        (Kind::Zeros, payload)
    } else {
        payload.resize(8 + count as usize * 4096, value);
        (Kind::Pages, payload)
    }
}

/// A disk that takes whatever is within its bounds.
struct Bounds;

/// Its bytes.
const CAPACITY: u64 = 1 << 20;

impl Bounds {
    fn check(at: u64, len: u64) -> io::Result<()> {
        assert!(at.checked_add(len).is_some_and(|end| end <= CAPACITY));
        Ok(())
    }
}

impl Disk for Bounds {
    fn capacity(&self) -> u64 {
        CAPACITY
    }
    fn next_data(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }
    fn watch(&self) -> io::Result<()> {
        Ok(())
    }
    fn written(&self, _: usize) -> Vec<(u64, usize)> {
        Vec::new()
    }
    fn unwatch(&self) {}
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        Self::check(at, into.len() as u64)
    }
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        Self::check(at, bytes.len() as u64)
    }
    fn clear(&self, at: u64, len: u64) -> io::Result<()> {
        Self::check(at, len)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|inputs: Vec<Input>| {
    let memory = ram();
    let disks: Arc<Disks> = Arc::new([Arc::new(Bounds), Arc::new(Bounds)]);
    let mut payload = Vec::new();
    for input in inputs {
        match input {
            Input::Bytes(bytes) => {
                let _ = wire::decode::<Offer>(&bytes);
                let _ = wire::Want::from_bytes(&bytes);
                let mut rest = bytes.as_slice();
                while let Ok(kind) = wire::receive(&mut rest, &mut payload) {
                    let _ = place(kind, &payload, &memory);
                }
                for kind in [Kind::Pages, Kind::Zeros] {
                    let _ = place(kind, &bytes, &memory);
                }
                for kind in [Kind::Blocks, Kind::Holes] {
                    let _ = store(kind, &bytes, &disks);
                }
            }
            Input::Memory {
                page,
                pages: count,
                value,
                zeros,
                change,
            } => {
                let (page, count) = (u64::from(page), u64::from(count % 64));
                let (kind, sent) = pages(page, count, value, zeros);
                let mut frames = Frames::default();
                frames.begin();
                frames.push(&sent);
                frames.end(kind);
                let mut bytes = frames.bytes().to_vec();
                let flipped = change.filter(|(_, bits)| *bits != 0);
                if let Some((at, bits)) = flipped {
                    let at = usize::from(at) % bytes.len();
                    bytes[at] ^= bits;
                }
                let received = wire::receive(&mut bytes.as_slice(), &mut payload);
                assert_eq!(received.is_ok(), flipped.is_none(), "{received:?}");
                if flipped.is_some() {
                    continue;
                }
                let fits = (page + count) * 4096 <= RAM;
                let placed = place(kind, &payload, &memory);
                assert!(placed.is_ok() == fits || count == 0, "{placed:?}");
                if fits && count > 0 {
                    let last = GuestAddress((page + count) * 4096 - 1);
                    let found: u8 = memory.read_obj(last).expect("memory");
                    assert_eq!(found, if zeros { 0 } else { value });
                }
            }
        }
    }
});
