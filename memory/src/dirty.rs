//! Which pages of guest memory this process has written.
//!
//! KVM tells which pages a guest has written; this is the other half: what the
//! monitor, its devices and the kernel on their behalf have. Writes through
//! `vm-memory` ([`vm_memory::Bytes`], volatile slices) are noted by themselves.
//! Who writes behind its back, through an [`IoVec`], an atomic or a system call
//! that reads into guest memory, says so with [`mark`] or [`mark_pieces`] *after*
//! the write is done and before the guest can know of it.
//!
//! Nothing is noted before [`start`]; until then, a write costs one load more. A
//! page stays noted until [`take`] takes it: it is to be read after that, and
//! what is written meanwhile is noted for the next time.
//!
//! A disk's writes are noted in the same way, in a [`WriteLog`] of its own.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestRam, IoVec};

/// log2 of the bytes of a page.
const SHIFT: usize = 12;
/// Bytes of a page.
pub const PAGE: usize = 1 << SHIFT;

/// The pages of one region or disk, of which those that are written are noted
/// on demand.
#[derive(Debug, Default)]
pub struct WriteLog {
    on: AtomicBool,
    pages: usize,
    /// A bit per page, made when it is first needed.
    words: OnceLock<Box<[AtomicU64]>>,
}

impl WriteLog {
    /// Of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self {
            pages: len.div_ceil(PAGE),
            ..Self::default()
        }
    }

    fn words(&self) -> &[AtomicU64] {
        let zero = || AtomicU64::new(0);
        let count = self.pages.div_ceil(64);
        self.words
            .get_or_init(|| std::iter::repeat_with(zero).take(count).collect())
    }

    fn word_of(&self, page: usize) -> Option<(&AtomicU64, u64)> {
        Some((self.words().get(page / 64)?, 1 << (page % 64)))
    }

    /// Begins to note, with nothing noted. See [`start`].
    ///
    /// # Errors
    /// As [`start`].
    pub fn start(&self) -> io::Result<()> {
        self.clear();
        barrier()
    }

    /// Ends it.
    pub fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
    }

    /// Takes what is noted: runs of whole pages, as offset and bytes, none
    /// longer than `most` bytes (a multiple of [`PAGE`]).
    #[must_use]
    pub fn take_runs(&self, most: usize) -> Vec<(u64, usize)> {
        let mut found = Vec::new();
        runs(&self.take(), self.pages, most, |start, count| {
            found.push(((start * PAGE) as u64, count * PAGE));
        });
        found
    }

    fn clear(&self) {
        for word in self.words() {
            word.store(0, Ordering::Relaxed);
        }
        self.on.store(true, Ordering::SeqCst);
    }

    fn take(&self) -> Vec<u64> {
        // Whoever writes a page notes it afterwards. So the page of a bit that
        // is taken here has been written, and who reads it then sees that.
        let words = self.words().iter();
        words.map(|word| word.swap(0, Ordering::SeqCst)).collect()
    }
}

impl NewBitmap for WriteLog {
    fn with_len(len: usize) -> Self {
        Self::new(len)
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || !self.on.load(Ordering::Relaxed) {
            return;
        }
        let last = offset.saturating_add(len - 1) >> SHIFT;
        for page in (offset >> SHIFT)..=last {
            let Some((word, bit)) = self.word_of(page) else {
                return;
            };
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.on.load(Ordering::Relaxed)
            && self
                .word_of(offset >> SHIFT)
                .is_some_and(|(word, bit)| word.load(Ordering::SeqCst) & bit != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// A set of pages of a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    /// A bit per page, for each region in the order of addresses.
    regions: Vec<Vec<u64>>,
}

impl Pages {
    /// None of `ram`'s pages.
    #[must_use]
    pub fn none(ram: &GuestRam) -> Self {
        let words = |len: u64| (len as usize).div_ceil(PAGE).div_ceil(64);
        Self {
            regions: ram.iter().map(|it| vec![0; words(it.len())]).collect(),
        }
    }

    /// Adds a page of the region with this index, by its number in it.
    pub fn insert(&mut self, region: usize, page: usize) {
        let words = self.regions.get_mut(region);
        if let Some(word) = words.and_then(|words| words.get_mut(page / 64)) {
            *word |= 1 << (page % 64);
        }
    }

    /// Adds the pages of one region, a bit for each.
    pub fn add(&mut self, region: usize, words: &[u64]) {
        let all = self.regions.get_mut(region).into_iter().flatten();
        for (word, more) in all.zip(words) {
            *word |= more;
        }
    }

    /// Adds all of `other`, of the same memory.
    pub fn merge(&mut self, other: &Self) {
        for (region, words) in other.regions.iter().enumerate() {
            self.add(region, words);
        }
    }

    /// Whether this page is among them.
    #[must_use]
    pub fn contains(&self, region: usize, page: usize) -> bool {
        let words = self.regions.get(region);
        let word = words.and_then(|words| words.get(page / 64));
        word.is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    /// Removes a page.
    pub fn remove(&mut self, region: usize, page: usize) {
        let words = self.regions.get_mut(region);
        if let Some(word) = words.and_then(|words| words.get_mut(page / 64)) {
            *word &= !(1 << (page % 64));
        }
    }

    /// The first run of a region from `page` on: its first page and how many it
    /// has, at most `most`.
    #[must_use]
    pub fn next_run(&self, region: usize, page: usize, most: usize) -> Option<(usize, usize)> {
        let words = self.regions.get(region)?;
        let mut start = page;
        loop {
            match words.get(start / 64)? >> (start % 64) {
                0 => start = (start / 64 + 1) * 64,
                rest => break start += rest.trailing_zeros() as usize,
            }
        }
        let mut end = start + 1;
        while end - start < most && self.contains(region, end) {
            end += 1;
        }
        Some((start, end - start))
    }

    /// A bit per page, region after region, each in whole little-endian words
    /// of 64.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = self.regions.iter().flatten();
        words.flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The pages of `ram` that [`Pages::to_bytes`] has told; none if they are
    /// not of such memory.
    #[must_use]
    pub fn from_bytes(ram: &GuestRam, bytes: &[u8]) -> Option<Self> {
        let mut all = Self::none(ram);
        let (mut rest, odd) = bytes.as_chunks::<8>();
        for (words, region) in all.regions.iter_mut().zip(ram.iter()) {
            let (own, others) = rest.split_at_checked(words.len())?;
            for (word, bytes) in words.iter_mut().zip(own) {
                *word = u64::from_le_bytes(*bytes);
            }
            // Bits behind the last page.
            let pages = (region.len() as usize).div_ceil(PAGE);
            if !pages.is_multiple_of(64) && words.last()? >> (pages % 64) != 0 {
                return None;
            }
            rest = others;
        }
        (rest.is_empty() && odd.is_empty()).then_some(all)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flatten();
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.iter().flatten().all(|word| *word == 0)
    }

    /// Runs of consecutive pages, as guest-physical address and bytes, none
    /// longer than `most` bytes (a multiple of [`PAGE`]).
    pub fn runs(&self, ram: &GuestRam, most: usize) -> Vec<(GuestAddress, usize)> {
        let mut found = Vec::new();
        for (region, words) in ram.iter().zip(&self.regions) {
            let pages = (region.len() as usize).div_ceil(PAGE);
            runs(words, pages, most, |start, count| {
                let at = region.start_addr().unchecked_add((start * PAGE) as u64);
                found.push((at, count * PAGE));
            });
        }
        found
    }
}

/// Calls `each` with the first and the number of the pages of each run of bits
/// among the first `pages` of `words`, none longer than `most` bytes.
fn runs(words: &[u64], pages: usize, most: usize, mut each: impl FnMut(usize, usize)) {
    let most = (most / PAGE).max(1);
    let mut page = 0;
    while page < pages {
        let rest = words.get(page / 64).copied().unwrap_or(0) >> (page % 64);
        if rest == 0 {
            page = (page / 64 + 1) * 64;
            continue;
        }
        page += rest.trailing_zeros() as usize;
        let start = page;
        while page < pages.min(start + most) && words[page / 64] & 1 << (page % 64) != 0 {
            page += 1;
        }
        each(start, page - start);
    }
}

/// Begins to note what is written to `ram`: every write that is not noted is
/// visible to whoever reads the memory after this.
///
/// # Errors
/// The kernel has no barrier for all processors (before Linux 4.3).
pub fn start(ram: &GuestRam) -> io::Result<()> {
    for region in ram.iter() {
        region.bitmap_log().clear();
    }
    barrier()
}

/// Ends it.
pub fn stop(ram: &GuestRam) {
    for region in ram.iter() {
        region.bitmap_log().stop();
    }
}

/// Whether writes are noted: cheaper to ask than to [`mark`].
#[must_use]
pub fn is_on(ram: &GuestRam) -> bool {
    let mut regions = ram.iter();
    regions.any(|region| region.bitmap_log().on.load(Ordering::Relaxed))
}

/// Takes what is noted.
#[must_use]
pub fn take(ram: &GuestRam) -> Pages {
    Pages {
        regions: ram.iter().map(|it| it.bitmap_log().take()).collect(),
    }
}

/// Notes that `len` bytes at `addr` were written. What is no memory does not
/// count.
pub fn mark(ram: &GuestRam, addr: GuestAddress, len: usize) {
    for slice in ram.get_slices(addr, len).flatten() {
        slice.bitmap().mark_dirty(0, slice.len());
    }
}

/// Notes that the memory behind `pieces` was written. Pieces that are not of
/// this memory do not count.
pub fn mark_pieces(ram: &GuestRam, pieces: &[IoVec]) {
    for region in ram.iter() {
        let log = region.bitmap_log();
        if !log.on.load(Ordering::Relaxed) {
            return;
        }
        let base = region.as_ptr() as usize;
        for piece in pieces {
            let offset = (piece.as_ptr() as usize).wrapping_sub(base);
            if offset < region.len() as usize {
                log.mark_dirty(offset, piece.len());
            }
        }
    }
}

/// A full barrier on all processors that run this process.
///
/// Who writes memory looks afterwards whether to note it; the processor may do
/// the second first. Past this barrier, whoever has found that there is nothing
/// to note has written.
fn barrier() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call has no memory to read or write.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A region's log itself.
trait Logged {
    fn bitmap_log(&self) -> &WriteLog;
}

impl Logged for vm_memory::GuestRegionMmap<WriteLog> {
    fn bitmap_log(&self) -> &WriteLog {
        // Through the mapping: `GuestMemoryRegion::bitmap` gives a slice of it.
        let mapping: &vm_memory::MmapRegion<WriteLog> = self;
        mapping.bitmap()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::{Backing, Spec, build_at, iovec};

    const BASE: u64 = 1 << 32;

    fn ram() -> GuestRam {
        let spec = Spec {
            size: 200 * PAGE as u64,
            backing: Backing::Small,
            shared: false,
        };
        let half = 100 * PAGE as u64;
        build_at(
            &spec,
            &[(GuestAddress(0), half), (GuestAddress(BASE), half)],
        )
        .unwrap()
    }

    fn addresses(pages: &Pages, ram: &GuestRam) -> Vec<u64> {
        let runs = pages.runs(ram, PAGE);
        runs.iter().map(|(at, _)| at.0).collect()
    }

    #[test]
    fn every_way_of_writing_is_noted_once() {
        let ram = ram();
        ram.write_obj(1u8, GuestAddress(0)).unwrap();
        start(&ram).unwrap();
        assert!(take(&ram).is_empty());
        ram.write_obj(1u64, GuestAddress(2 * 4096 - 4)).unwrap();
        ram.store(1u32, GuestAddress(BASE), Ordering::Relaxed)
            .unwrap();
        let mut pieces = Vec::new();
        iovec::push(&ram, GuestAddress(BASE + 5 * 4096 + 7), 4096, &mut pieces).unwrap();
        iovec::write_bytes(&pieces, &[1; 4096]);
        mark_pieces(&ram, &pieces);
        mark(&ram, GuestAddress(9 * 4096), 1);
        let written = [0x1000, 0x2000, 0x9000, BASE, BASE + 0x5000, BASE + 0x6000];
        assert_eq!(addresses(&take(&ram), &ram), written);
        assert!(take(&ram).is_empty());
        stop(&ram);
        ram.write_obj(1u64, GuestAddress(0)).unwrap();
        assert!(take(&ram).is_empty());
    }

    #[test]
    fn places_outside_memory_are_not_noted() {
        let ram = ram();
        start(&ram).unwrap();
        mark(&ram, GuestAddress(1 << 40), 4096);
        mark(&ram, GuestAddress(u64::MAX), usize::MAX);
        let mut own = [0u8; 64];
        mark_pieces(&ram, &[IoVec::new(own.as_mut_ptr(), 64)]);
        assert!(take(&ram).is_empty());
    }

    #[test]
    fn no_write_beside_a_reader_is_lost() {
        // The reader's copy is what it read of the pages that were noted: at
        // the end, with the writer at rest, it is the memory.
        let ram = ram();
        let mut copy = vec![0u8; 100 * PAGE];
        start(&ram).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for i in 0..200_000u64 {
                    let at = (i * 7919) % (100 * PAGE as u64 - 8);
                    ram.write_obj(i, GuestAddress(at)).unwrap();
                }
            });
            loop {
                let last = writer.is_finished();
                for (at, len) in take(&ram).runs(&ram, 16 * PAGE) {
                    let range = at.0 as usize..at.0 as usize + len;
                    ram.read_slice(&mut copy[range], at).unwrap();
                }
                if last {
                    break;
                }
            }
        });
        let mut memory = vec![0u8; 100 * PAGE];
        ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
        assert!(memory == copy);
    }

    proptest! {
        #[test]
        fn a_set_of_pages_survives_as_bytes(which in proptest::collection::vec((0..2usize, 0..100usize), 0..80)) {
            let ram = ram();
            let mut pages = Pages::none(&ram);
            for (region, page) in &which {
                pages.insert(*region, *page);
            }
            let bytes = pages.to_bytes();
            prop_assert_eq!(Pages::from_bytes(&ram, &bytes), Some(pages.clone()));
            prop_assert_eq!(Pages::from_bytes(&ram, &bytes[1..]), None);
            prop_assert_eq!(Pages::from_bytes(&ram, &[&bytes[..], &[0; 8]].concat()), None);
            // A page that there is not.
            let mut beyond = bytes.clone();
            *beyond.last_mut().unwrap() |= 0x80;
            prop_assert_eq!(Pages::from_bytes(&ram, &beyond), None);
            for region in 0..2 {
                let mut at = 0;
                while let Some((start, count)) = pages.next_run(region, at, 3) {
                    prop_assert!(start >= at && (1..=3).contains(&count));
                    for page in start..start + count {
                        prop_assert!(which.contains(&(region, page)));
                        prop_assert!(pages.contains(region, page));
                        pages.remove(region, page);
                    }
                    at = start + count;
                }
            }
            prop_assert!(pages.is_empty());
        }

        #[test]
        fn runs_are_exactly_the_pages_of_the_set(
            set in proptest::collection::btree_set((0usize..2, 0usize..100), 0..150),
            most in 1usize..70,
        ) {
            let ram = ram();
            let mut pages = Pages::none(&ram);
            for (region, page) in &set {
                pages.insert(*region, *page);
            }
            prop_assert_eq!(pages.count(), set.len() as u64);
            let mut found = std::collections::BTreeSet::new();
            for (at, len) in pages.runs(&ram, most * PAGE) {
                prop_assert!(len > 0 && len <= most * PAGE);
                for page in 0..len / PAGE {
                    let at = at.0 + (page * PAGE) as u64;
                    let region = usize::from(at >= BASE);
                    let page = (at % BASE) as usize / PAGE;
                    prop_assert!(found.insert((region, page)));
                }
            }
            prop_assert_eq!(found, set);
        }
    }
}
