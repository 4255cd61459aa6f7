//! The frames of a migration's streams: none that differs from what was sent is
//! taken, and memory lands where it belongs or nowhere; what is missing of a disk
//! is what was said to be, but for what was brought and written.
#![no_main]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use arbitrary::Arbitrary;
use blanket_fuzz::guest::{RAM, ram};
use blanket_memory::GuestRam;
use blanket_memory::absent::{Absent, BLOCK, Entry, Use};
use blanket_migration::wire::{self, Frames, Kind, Offer};
use blanket_migration::{Disk, Disks, expect, place, store};
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
    /// Content of a disk that follows: ranges that are missing, and what is done.
    Late {
        missing: Vec<(u16, u16)>,
        deeds: Vec<(Deed, u32, u16)>,
    },
}

/// What is done with a range of a disk.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Deed {
    Read,
    Write,
    Fail,
    Bring,
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
struct Bounds(Arc<Absent>);

fn bounds() -> Arc<Bounds> {
    Arc::new(Bounds(Arc::new(Absent::new(CAPACITY))))
}

/// Has ranges missing, and does something with others.
fn late(missing: &[(u16, u16)], deeds: &[(Deed, u32, u16)]) {
    let disk = bounds();
    let absent = Arc::clone(&disk.0);
    let disks: [Arc<dyn Disk>; 1] = [disk];
    let mut model = vec![false; CAPACITY.div_ceil(BLOCK) as usize];
    for (at, len) in missing {
        let (at, len) = (u64::from(*at) * 512, u64::from(*len) * 16);
        let range = [0, at, len].map(u64::to_le_bytes).concat();
        let fits = at + len <= CAPACITY;
        assert_eq!(expect(&range, &disks).is_ok(), fits);
        if fits && len > 0 {
            model[(at / BLOCK) as usize..(at + len).div_ceil(BLOCK) as usize].fill(true);
        }
    }
    for (deed, at, len) in deeds {
        let at = u64::from(*at) % CAPACITY / 512 * 512;
        let end = (at + u64::from(*len) * 512).min(CAPACITY);
        let range = at..end;
        let all = (at / BLOCK) as usize..end.div_ceil(BLOCK) as usize;
        let last = if end == CAPACITY {
            end.div_ceil(BLOCK)
        } else {
            end / BLOCK
        };
        let whole = at.div_ceil(BLOCK) as usize..last as usize;
        match deed {
            Deed::Bring => {
                let brought =
                    absent.bring(range, |run| Bounds::check(run.start, run.end - run.start));
                assert!(brought.is_ok());
                if !whole.is_empty() {
                    model[whole].fill(false);
                }
            }
            Deed::Read => {
                let waits = at < end && model[all].contains(&true);
                let entry = absent.enter(Use::Read, &range, false);
                assert_eq!(entry == Entry::Wait, waits);
            }
            Deed::Write | Deed::Fail => {
                let mut parts = all.filter(|block| !whole.contains(block));
                let waits = at < end && parts.any(|block| model[block]);
                let entry = absent.enter(Use::Write, &range, false);
                assert_eq!(entry == Entry::Wait, waits);
                if let Entry::Claimed(claim) = entry {
                    let done = matches!(deed, Deed::Write);
                    absent.written(&claim, done);
                    if done {
                        model[whole].fill(false);
                    }
                }
            }
        }
        let left = model.iter().filter(|missing| **missing).count() as u64;
        assert_eq!(absent.left(), left * BLOCK);
    }
}

/// Its bytes: no whole number of blocks.
const CAPACITY: u64 = (1 << 20) + 512;

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
    fn absent(&self) -> Option<Arc<Absent>> {
        Some(Arc::clone(&self.0))
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
    let disks: Arc<Disks> = Arc::new([bounds(), bounds()]);
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
                let _ = expect(&bytes, &disks);
            }
            Input::Late { missing, deeds } => late(&missing, &deeds),
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
