//! The grant table: pages of the guest that it lets backends use
//! (`xen/include/public/grant_table.h`, version 1 entries).
//!
//! The table lies in memory that the guest writes at any time. An entry is one
//! aligned word of 64 bits: it is read whole, checked, and marked as in use by
//! a compare-and-exchange of all of it, so that what was checked is what is
//! mapped.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blanket_drivers::grant::Granter;
pub use blanket_drivers::grant::{Access, PAGE};
use blanket_memory::dirty::{self, WriteLog};
use blanket_memory::{GuestRam, IoVec};
use vm_memory::bitmap::{Bitmap, RefSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::BACKEND;

/// Entries in one frame of the table.
pub const ENTRIES_PER_FRAME: u32 = (PAGE / ENTRY) as u32;

/// Bytes of an entry: flags (16 bits), domain (16), frame (32).
const ENTRY: usize = 8;

/// `GTF_type_mask`, `GTF_permit_access`: the kind of an entry, and the only
/// kind that can be mapped.
const TYPE_MASK: u64 = 3;
const PERMIT_ACCESS: u64 = 1;

/// `GTF_readonly`: the guest keeps the page from being written.
const READONLY: u64 = 1 << 2;

/// `GTF_reading`, `GTF_writing`: the backend's marks of a mapping.
const READING: u64 = 1 << 3;
const WRITING: u64 = 1 << 4;

/// How often an entry that changes while it is marked is read again. A guest
/// that follows the protocol changes an entry once while it is in use.
const ATTEMPTS: usize = 5;

/// Why a page cannot be mapped or used. All of it is the guest's doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such entry.
    #[error("grant {reference} is outside the grant table")]
    Reference {
        /// The entry.
        reference: u32,
    },
    /// The entry permits no access: unused, revoked, or a transfer.
    #[error("grant {reference} permits no access")]
    NotGranted {
        /// The entry.
        reference: u32,
    },
    /// The entry is for another domain.
    #[error("grant {reference} is for domain {domain}")]
    Foreign {
        /// The entry.
        reference: u32,
        /// Whom the guest let in.
        domain: u16,
    },
    /// The page was to be written but may only be read.
    #[error("grant {reference} is read-only")]
    ReadOnly {
        /// The entry.
        reference: u32,
    },
    /// The frame is not the guest's memory.
    #[error("grant {reference} names frame {frame:#x}, which is not guest memory")]
    Frame {
        /// The entry.
        reference: u32,
        /// The page's number.
        frame: u32,
    },
    /// The page is mapped too often, or its entry changes all the time.
    #[error("grant {reference} cannot be pinned")]
    Busy {
        /// The entry.
        reference: u32,
    },
    /// A range that is not within the page.
    #[error("{len} bytes at {offset} are not within a page")]
    Range {
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
    },
}

/// How often a page is mapped.
#[derive(Clone, Copy, Default)]
struct Pin {
    readers: u16,
    writers: u16,
}

impl Pin {
    fn of(&mut self, access: Access) -> &mut u16 {
        match access {
            Access::Read => &mut self.readers,
            Access::Write => &mut self.writers,
        }
    }

    /// The marks that an entry with these mappings has.
    fn marks(self) -> u64 {
        match (self.readers, self.writers) {
            (0, 0) => 0,
            (_, 0) => READING,
            _ => READING | WRITING,
        }
    }
}

/// The mappings of the entries of one frame; empty until the first.
type Pins = Mutex<Vec<Pin>>;

/// A guest's grant table.
pub struct GrantTable {
    memory: GuestRam,
    frames: GuestAddress,
    /// By frame of the table. An entry's marks change under its lock only.
    pins: Vec<Pins>,
    mapped: AtomicU64,
    refused: AtomicU64,
}

impl GrantTable {
    /// The table in `count` frames of guest memory from `frames` on.
    #[must_use]
    pub fn new(memory: GuestRam, frames: GuestAddress, count: u32) -> Self {
        Self {
            memory,
            frames,
            pins: (0..count).map(|_| Pins::default()).collect(),
            mapped: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Maps the page that the guest has granted to the backends as
    /// `reference`. It is marked as in use until the [`Grant`] is dropped.
    ///
    /// # Errors
    /// The guest did not grant it, or not this way.
    pub fn map(self: &Arc<Self>, reference: u32, access: Access) -> Result<Grant, Error> {
        let page = self.pin(reference, access).inspect_err(|_| {
            self.refused.fetch_add(1, Ordering::Relaxed);
        })?;
        self.mapped.fetch_add(1, Ordering::Relaxed);
        Ok(Grant {
            table: Arc::clone(self),
            reference,
            access,
            page,
        })
    }

    /// Counters by name: pages that are mapped now, and references that were
    /// refused.
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("grants_mapped", self.mapped.load(Ordering::Relaxed)),
            ("grants_refused", self.refused.load(Ordering::Relaxed)),
        ]
    }

    fn pin(&self, reference: u32, access: Access) -> Result<Page, Error> {
        let (mut pins, index) = self.pins(reference)?;
        let mut pin = pins[index];
        let count = pin.of(access);
        *count = count.checked_add(1).ok_or(Error::Busy { reference })?;
        let page = self.with_entry(reference, |entry| {
            let mut seen = entry.load(Ordering::Acquire);
            for _ in 0..ATTEMPTS {
                let page = self.check(reference, seen, access)?;
                let marked = seen | pin.marks();
                match entry.compare_exchange(seen, marked, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => return Ok(page),
                    Err(now) => seen = now,
                }
            }
            Err(Error::Busy { reference })
        })?;
        pins[index] = pin;
        Ok(page)
    }

    fn unpin(&self, reference: u32, access: Access) {
        self.mapped.fetch_sub(1, Ordering::Relaxed);
        let Ok((mut pins, index)) = self.pins(reference) else {
            return;
        };
        let count = pins[index].of(access);
        *count = count.saturating_sub(1);
        let gone = (READING | WRITING) & !pins[index].marks();
        // The page's last use is over before the guest sees the marks go.
        let _ = self.with_entry(reference, |entry| {
            entry.fetch_and(!gone, Ordering::Release);
            Ok(())
        });
    }

    /// The mappings of the entries in the same frame, and the entry's index
    /// there.
    fn pins(&self, reference: u32) -> Result<(MutexGuard<'_, Vec<Pin>>, usize), Error> {
        let frame = (reference / ENTRIES_PER_FRAME) as usize;
        let index = (reference % ENTRIES_PER_FRAME) as usize;
        let frame = self.pins.get(frame).ok_or(Error::Reference { reference })?;
        let mut pins = frame.lock().unwrap_or_else(PoisonError::into_inner);
        if pins.is_empty() {
            pins.resize(ENTRIES_PER_FRAME as usize, Pin::default());
        }
        Ok((pins, index))
    }

    /// Runs `f` on the entry, which is within the table.
    fn with_entry<T>(
        &self,
        reference: u32,
        f: impl FnOnce(&AtomicU64) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let missing = Error::Reference { reference };
        let addr = self
            .frames
            .0
            .checked_add(u64::from(reference) * ENTRY as u64)
            .ok_or(missing)?;
        let slice = self
            .memory
            .get_slice(GuestAddress(addr), ENTRY)
            .map_err(|_| missing)?;
        let result = f(slice.get_atomic_ref(0).map_err(|_| missing)?);
        slice.bitmap().mark_dirty(0, ENTRY);
        result
    }

    /// Whether `entry`, as it was read, lets a backend do `access`.
    fn check(&self, reference: u32, entry: u64, access: Access) -> Result<Page, Error> {
        if entry & TYPE_MASK != PERMIT_ACCESS {
            return Err(Error::NotGranted { reference });
        }
        let domain = (entry >> 16) as u16;
        if domain != BACKEND {
            return Err(Error::Foreign { reference, domain });
        }
        if access == Access::Write && entry & READONLY != 0 {
            return Err(Error::ReadOnly { reference });
        }
        let frame = (entry >> 32) as u32;
        let addr = GuestAddress(u64::from(frame) * PAGE as u64);
        let slice = self
            .memory
            .get_slice(addr, PAGE)
            .map_err(|_| Error::Frame { reference, frame })?;
        let bytes = IoVec::new(slice.ptr_guard_mut().as_ptr(), PAGE);
        Ok(Page { addr, bytes })
    }
}

impl Granter for GrantTable {
    type Page = Grant;
    type Error = Error;

    fn map(self: &Arc<Self>, reference: u32, access: Access) -> Result<Grant, Error> {
        Self::map(self, reference, access)
    }

    fn stands(&self, grant: &Grant) -> bool {
        let (reference, access) = (grant.reference, grant.access);
        let page = self.with_entry(reference, |entry| {
            self.check(reference, entry.load(Ordering::Acquire), access)
        });
        page.is_ok_and(|page| page.addr == grant.page.addr)
    }

    fn may_be_readable(error: &Error) -> bool {
        matches!(error, Error::ReadOnly { .. })
    }
}

/// A page of guest memory.
#[derive(Clone, Copy)]
struct Page {
    addr: GuestAddress,
    bytes: IoVec,
}

/// A granted page, marked as in use. Dropping it ends the use.
pub struct Grant {
    // Keeps guest memory mapped.
    table: Arc<GrantTable>,
    reference: u32,
    access: Access,
    page: Page,
}

impl Grant {
    /// Its entry in the grant table.
    #[must_use]
    pub fn reference(&self) -> u32 {
        self.reference
    }

    /// What it was mapped for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Where the page lies in guest memory.
    #[must_use]
    pub fn addr(&self) -> GuestAddress {
        self.page.addr
    }

    /// `len` bytes of the page from `offset` on.
    ///
    /// # Errors
    /// The range is not within the page.
    pub fn slice(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<VolatileSlice<'_, RefSlice<'_, WriteLog>>, Error> {
        check_range(offset, len)?;
        let addr = GuestAddress(self.page.addr.0 + offset as u64);
        self.table
            .memory
            .get_slice(addr, len)
            .map_err(|_| Error::Range { offset, len })
    }

    /// Notes that the page was written, if it was mapped for that: to be called
    /// behind each write through [`Grant::iovec`], before the guest knows of it.
    pub fn written(&self) {
        if self.access == Access::Write {
            dirty::mark(&self.table.memory, self.page.addr, PAGE);
        }
    }

    /// `len` bytes of the page from `offset` on, for vectored I/O: keep the
    /// grant until that is over, and do not write to one mapped for
    /// [`Access::Read`]. After a write, [`Grant::written`] is due.
    ///
    /// # Errors
    /// The range is not within the page.
    pub fn iovec(&self, offset: usize, len: usize) -> Result<IoVec, Error> {
        check_range(offset, len)?;
        let mut vector = self.page.bytes;
        vector.advance(offset);
        vector.truncate(len);
        Ok(vector)
    }
}

fn check_range(offset: usize, len: usize) -> Result<(), Error> {
    match offset.checked_add(len) {
        Some(end) if end <= PAGE => Ok(()),
        _ => Err(Error::Range { offset, len }),
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.table.unpin(self.reference, self.access);
    }
}

impl std::fmt::Debug for Grant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grant")
            .field("reference", &self.reference)
            .field("access", &self.access)
            .field("addr", &self.page.addr)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::ram;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    const TABLE: u64 = 0x1000;
    const FRAMES: u32 = 2;

    fn table() -> (GuestRam, Arc<GrantTable>) {
        let ram = ram(0x10_0000);
        let table = GrantTable::new(ram.clone(), GuestAddress(TABLE), FRAMES);
        (ram, Arc::new(table))
    }

    fn put(ram: &GuestRam, reference: u32, entry: u64) {
        let addr = GuestAddress(TABLE + 8 * u64::from(reference));
        ram.write_obj(entry, addr).unwrap();
    }

    fn marks(ram: &GuestRam, reference: u32) -> u64 {
        let addr = GuestAddress(TABLE + 8 * u64::from(reference));
        ram.read_obj::<u64>(addr).unwrap() & (READING | WRITING)
    }

    fn entry(flags: u64, domain: u16, frame: u32) -> u64 {
        flags | u64::from(domain) << 16 | u64::from(frame) << 32
    }

    #[test]
    fn a_page_that_was_written_and_its_entry_are_noted() {
        let (ram, table) = table();
        put(&ram, 3, entry(PERMIT_ACCESS, BACKEND, 0x20));
        put(&ram, 4, entry(PERMIT_ACCESS, BACKEND, 0x21));
        dirty::start(&ram).unwrap();
        let written = table.map(3, Access::Write).unwrap();
        let read = table.map(4, Access::Read).unwrap();
        let noted = || {
            let runs = dirty::take(&ram).runs(&ram, PAGE);
            runs.into_iter().map(|(at, _)| at.0).collect::<Vec<_>>()
        };
        assert_eq!(noted(), [TABLE]);
        written.written();
        read.written();
        assert_eq!(noted(), [0x2_0000]);
        drop((written, read));
        assert_eq!(noted(), [TABLE]);
    }

    #[test]
    fn a_granted_page_is_marked_as_long_as_it_is_mapped() {
        let (ram, table) = table();
        put(&ram, 9, entry(PERMIT_ACCESS, BACKEND, 0x20));
        let reading = table.map(9, Access::Read).unwrap();
        assert_eq!(marks(&ram, 9), READING);
        assert_eq!(reading.addr(), GuestAddress(0x2_0000));
        let writing = table.map(9, Access::Write).unwrap();
        assert_eq!(marks(&ram, 9), READING | WRITING);
        drop(reading);
        assert_eq!(marks(&ram, 9), READING | WRITING);
        let again = table.map(9, Access::Read).unwrap();
        drop(writing);
        assert_eq!(marks(&ram, 9), READING);
        assert_eq!(table.metrics()[0], ("grants_mapped", 1));
        drop(again);
        assert_eq!(marks(&ram, 9), 0);
        assert_eq!(table.metrics()[0], ("grants_mapped", 0));
    }

    #[test]
    fn a_grant_reaches_its_own_page_and_no_byte_more() {
        let (ram, table) = table();
        put(&ram, 1, entry(PERMIT_ACCESS, BACKEND, 0x20));
        let grant = table.map(1, Access::Write).unwrap();
        grant.slice(4090, 6).unwrap().copy_from(b"abcdef");
        let mut bytes = [0; 6];
        ram.read_slice(&mut bytes, GuestAddress(0x2_0ffa)).unwrap();
        assert_eq!(&bytes, b"abcdef");
        let vector = grant.iovec(4090, 6).unwrap();
        let mut back = [0; 6];
        assert_eq!(blanket_memory::iovec::read_bytes(&[vector], &mut back), 6);
        assert_eq!(&back, b"abcdef");
        for (offset, len) in [(4096, 1), (4095, 2), (usize::MAX, 2), (0, 4097)] {
            assert_eq!(
                grant.iovec(offset, len).unwrap_err(),
                Error::Range { offset, len }
            );
            assert!(grant.slice(offset, len).is_err());
        }
    }

    #[test]
    fn what_the_guest_did_not_grant_is_refused_and_counted() {
        let (ram, table) = table();
        put(&ram, 1, entry(0, BACKEND, 0x20));
        put(&ram, 2, entry(2, BACKEND, 0x20)); // GTF_accept_transfer
        put(&ram, 3, entry(3, BACKEND, 0x20)); // GTF_transitive
        put(&ram, 4, entry(PERMIT_ACCESS, 1, 0x20));
        put(&ram, 5, entry(PERMIT_ACCESS | READONLY, BACKEND, 0x20));
        put(&ram, 6, entry(PERMIT_ACCESS, BACKEND, 0x100));
        put(&ram, 7, entry(PERMIT_ACCESS, BACKEND, u32::MAX));
        let refusal = |reference| table.map(reference, Access::Write).unwrap_err();
        for reference in 1..=3 {
            assert_eq!(refusal(reference), Error::NotGranted { reference });
        }
        let (reference, domain) = (4, 1);
        assert_eq!(refusal(4), Error::Foreign { reference, domain });
        assert_eq!(refusal(5), Error::ReadOnly { reference: 5 });
        assert!(table.map(5, Access::Read).is_ok());
        for (reference, frame) in [(6, 0x100), (7, u32::MAX)] {
            assert_eq!(refusal(reference), Error::Frame { reference, frame });
        }
        for reference in [1024, u32::MAX] {
            assert_eq!(refusal(reference), Error::Reference { reference });
        }
        assert_eq!(table.metrics()[1], ("grants_refused", 9));
        assert!((1..8).all(|reference| marks(&ram, reference) == 0));
    }

    #[test]
    fn a_grant_stands_until_the_guest_changes_its_entry() {
        let (ram, table) = table();
        put(&ram, 1, entry(PERMIT_ACCESS, BACKEND, 0x20));
        let grant = table.map(1, Access::Write).unwrap();
        assert!(table.stands(&grant));
        for changed in [
            entry(0, BACKEND, 0x20),
            entry(PERMIT_ACCESS, 1, 0x20),
            entry(PERMIT_ACCESS | READONLY, BACKEND, 0x20),
            entry(PERMIT_ACCESS, BACKEND, 0x21),
        ] {
            put(&ram, 1, changed);
            assert!(!table.stands(&grant), "{changed:#x}");
        }
        put(&ram, 1, entry(PERMIT_ACCESS, BACKEND, 0x20));
        assert!(table.stands(&grant));
    }

    #[test]
    fn a_table_outside_memory_grants_nothing() {
        let ram = ram(0x10_0000);
        for frames in [0x10_0000, u64::MAX - 4] {
            let table = Arc::new(GrantTable::new(ram.clone(), GuestAddress(frames), 1));
            assert!(table.map(3, Access::Read).is_err());
        }
    }

    #[test]
    fn pins_are_counted_and_bounded() {
        let (ram, table) = table();
        put(&ram, 1, entry(PERMIT_ACCESS, BACKEND, 0x20));
        let mut grants: Vec<_> = (0..u16::MAX)
            .map(|_| table.map(1, Access::Read).unwrap())
            .collect();
        assert_eq!(
            table.map(1, Access::Read).unwrap_err(),
            Error::Busy { reference: 1 }
        );
        grants.truncate(1);
        assert_eq!(marks(&ram, 1), READING);
        drop(grants);
        assert_eq!(marks(&ram, 1), 0);
    }

    #[test]
    fn threads_that_map_the_same_page_leave_no_mark_behind() {
        let (ram, table) = table();
        put(&ram, 1, entry(PERMIT_ACCESS, BACKEND, 0x20));
        std::thread::scope(|scope| {
            for access in [Access::Read, Access::Write, Access::Read] {
                let (ram, table) = (&ram, &table);
                scope.spawn(move || {
                    for _ in 0..5_000 {
                        let grant = table.map(1, access).unwrap();
                        assert_ne!(marks(ram, 1) & READING, 0);
                        assert!(access == Access::Read || marks(ram, 1) & WRITING != 0);
                        drop(grant);
                    }
                });
            }
        });
        assert_eq!(marks(&ram, 1), 0);
    }

    proptest! {
        #[test]
        fn any_entry_gives_a_page_of_guest_memory_or_an_error(
            raw in any::<u64>(),
            likely in any::<bool>(),
            reference in prop_oneof![0..1030u32, any::<u32>()],
            write in any::<bool>(),
        ) {
            let (ram, table) = table();
            let raw = if likely {
                raw & 0x1ff_0000_00ff & !TYPE_MASK | PERMIT_ACCESS
            } else {
                raw
            };
            if reference < 1024 {
                put(&ram, reference, raw);
            }
            let access = if write { Access::Write } else { Access::Read };
            let mapped = table.map(reference, access);
            let fine = reference < 1024
                && raw & 3 == 1
                && raw >> 16 & 0xffff == 0
                && raw >> 32 < 0x100
                && !(write && raw & READONLY != 0);
            prop_assert_eq!(mapped.is_ok(), fine);
            if let Ok(grant) = mapped {
                prop_assert_eq!(grant.addr().0, (raw >> 32) << 12);
                prop_assert!(ram.get_slice(grant.addr(), PAGE).is_ok());
            }
        }
    }
}
