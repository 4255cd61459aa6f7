//! The frames of a migration's streams: none that differs from what was sent is
//! taken, and memory lands where it belongs or nowhere.
#![no_main]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use arbitrary::Arbitrary;
use blanket_fuzz::guest::{RAM, ram};
use blanket_memory::GuestRam;
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
    /// Compressed memory; or another length, or other bytes.
    Compressed {
        page: u32,
        pages: u8,
        value: u8,
        len: Option<u32>,
        block: Option<Vec<u8>>,
    },
    /// Bytes of a page that are others now; or any change, and any checksum.
    Change {
        page: u32,
        was: u8,
        from: u16,
        count: u16,
        change: Option<Vec<u8>>,
        sum: Option<u32>,
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

/// Carries out a frame of compressed memory.
fn compressed(
    memory: &GuestRam,
    (page, count): (u64, u64),
    value: u8,
    len: Option<u32>,
    block: Option<&[u8]>,
) {
    let pages = vec![value; count as usize * 4096];
    let own = lz4_flex::block::compress(&pages);
    let mut payload = (page * 4096).to_le_bytes().to_vec();
    payload.extend(len.unwrap_or(pages.len() as u32).to_le_bytes());
    payload.extend(block.unwrap_or(&own));
    let placed = place(Kind::Lz4, &payload, memory);
    if len.is_none() && block.is_none() {
        let fits = (page + count) * 4096 <= RAM;
        assert!(placed.is_ok() == fits || count == 0, "{placed:?}");
        if fits && count > 0 {
            let last = GuestAddress((page + count) * 4096 - 1);
            let found: u8 = memory.read_obj(last).expect("memory");
            assert_eq!(found, value);
        }
    }
}

/// Carries out a frame with one change of a page that is full of `was`.
fn changed(
    memory: &GuestRam,
    page: u64,
    was: u8,
    (from, count): (usize, usize),
    change: Option<&[u8]>,
    sum: Option<u32>,
) {
    let at = GuestAddress(page * 4096);
    let old = [was; 4096];
    let fits = memory.write_slice(&old, at).is_ok();
    let mut new = old;
    let end = (from + count).min(4096);
    new[from..end].fill(!was);
    let number = |n: usize| [n as u8 | 0x80, (n >> 7) as u8];
    let own = [&number(from)[..], &number(end - from), &new[from..end]].concat();
    let bytes = change.unwrap_or(&own);
    let mut payload = at.0.to_le_bytes().to_vec();
    payload.extend(sum.unwrap_or(crc32fast::hash(&new)).to_le_bytes());
    payload.extend((bytes.len() as u16).to_le_bytes());
    payload.extend(bytes);
    let placed = place(Kind::Change, &payload, memory);
    let mut found = [0; 4096];
    if fits {
        memory.read_slice(&mut found, at).expect("memory");
    }
    match placed {
        // It is what the checksum says, or there was nothing to change.
        Ok(()) => assert!(fits && (sum.is_some() || found == new)),
        Err(_) => assert!(!fits || (change.or(sum.map(|_| &[][..])).is_some() && found == old)),
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
                for kind in [Kind::Pages, Kind::Zeros, Kind::Lz4, Kind::Change] {
                    let _ = place(kind, &bytes, &memory);
                }
                for kind in [Kind::Blocks, Kind::Holes] {
                    let _ = store(kind, &bytes, &disks);
                }
            }
            Input::Compressed {
                page,
                pages: count,
                value,
                len,
                block,
            } => {
                let place = (u64::from(page), u64::from(count % 65));
                compressed(&memory, place, value, len, block.as_deref());
            }
            Input::Change {
                page,
                was,
                from,
                count,
                change,
                sum,
            } => {
                let range = (usize::from(from) % 4096, usize::from(count));
                changed(&memory, page.into(), was, range, change.as_deref(), sum);
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
