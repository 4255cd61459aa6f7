//! A front end's memory.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{fstat, fstatfs};
use vm_memory::VolatileSlice;

use super::Error;
use super::fault::Mapping;

/// Regions at most.
pub(super) const MOST: usize = 64;

/// Bytes that a front end's regions may have together.
const TOTAL: u64 = 16 << 40;

/// Bytes for which a dirty log has a bit.
const PAGE: u64 = 4096;

/// The file systems whose memory comes without waiting for anybody.
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;

/// What a front end says of a region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Description {
    /// Where the guest has it, ...
    pub(super) guest: u64,
    /// ... and the front end.
    pub(super) user: u64,
    pub(super) size: u64,
    /// Where it begins in its file.
    pub(super) offset: u64,
}

/// A region, mapped.
#[derive(Debug)]
pub(super) struct Region {
    is: Description,
    map: Mapping,
    /// Bytes in the mapping before it.
    skip: usize,
}

/// Maps `len` bytes of `file` from `offset` on, and how many bytes before them.
fn map(file: &File, offset: u64, len: u64) -> Result<(Mapping, usize), Error> {
    let system = fstatfs(file).map_err(|error| Error::Memory(error.into()))?;
    // Another's, of FUSE or a network, could make the switch wait.
    if !matches!(system.f_type, TMPFS | HUGETLBFS) {
        return Err(Error::Foreign);
    }
    let page = match system.f_type {
        HUGETLBFS => system.f_bsize as u64,
        _ => PAGE,
    };
    let size = fstat(file)
        .map_err(|error| Error::Memory(error.into()))?
        .st_size as u64;
    let end = offset
        .checked_add(len)
        .filter(|end| *end <= size && len > 0);
    let end = end.ok_or(Error::Outside)?;
    let start = offset - offset % page;
    let whole = end
        .checked_next_multiple_of(page)
        .and_then(|end| usize::try_from(end - start).ok())
        .ok_or(Error::Outside)?;
    let map = Mapping::new(file, start, whole, page as usize).map_err(Error::Memory)?;
    Ok((map, (offset - start) as usize))
}

impl Region {
    /// Maps what a front end describes.
    ///
    /// # Errors
    ///
    /// It is not there, or its memory could make the switch wait.
    pub(super) fn new(is: Description, file: &File) -> Result<Self, Error> {
        if is.size > TOTAL
            || is.guest.checked_add(is.size).is_none()
            || is.user.checked_add(is.size).is_none()
        {
            return Err(Error::Outside);
        }
        let (map, skip) = map(file, is.offset, is.size)?;
        Ok(Self { is, map, skip })
    }

    pub(super) fn is(&self) -> &Description {
        &self.is
    }

    /// `len` bytes from `offset` on, or as many as there are.
    fn at(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let left = self.is.size.checked_sub(offset)?;
        let len = len.min(usize::try_from(left).unwrap_or(usize::MAX));
        if len == 0 {
            return None;
        }
        // SAFETY: within the mapping, as it has `size` bytes behind `skip`; it
        // lives as long as this region.
        Some(unsafe { VolatileSlice::new(self.map.as_ptr().add(self.skip + offset as usize), len) })
    }
}

/// All regions.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// Of these regions.
    ///
    /// # Errors
    ///
    /// They overlap, or are too many or too large.
    pub(super) fn new(mut regions: Vec<Arc<Region>>) -> Result<Self, Error> {
        regions.sort_by_key(|region| region.is.guest);
        let overlap = |pair: &[Arc<Region>]| pair[0].is.guest + pair[0].is.size > pair[1].is.guest;
        let total = regions
            .iter()
            .try_fold(0_u64, |sum, region| sum.checked_add(region.is.size));
        if regions.len() > MOST
            || regions.windows(2).any(overlap)
            || total.is_none_or(|total| total > TOTAL)
        {
            return Err(Error::Outside);
        }
        Ok(Self { regions })
    }

    pub(super) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether its owner took some of it away.
    pub(super) fn is_cut(&self) -> bool {
        self.regions.iter().any(|region| region.map.is_cut())
    }

    fn region(&self, guest: u64) -> Option<(&Region, u64)> {
        let region = self.regions.iter().find(|region| {
            guest.wrapping_sub(region.is.guest) < region.is.size && guest >= region.is.guest
        })?;
        Some((region, guest - region.is.guest))
    }

    /// Gives `each` the `len` bytes at the guest's address with their address,
    /// in as many pieces as there are regions. `None` if they are not all there.
    pub(super) fn slices<'a>(
        &'a self,
        mut guest: u64,
        mut len: usize,
        each: &mut impl FnMut(u64, VolatileSlice<'a>),
    ) -> Option<()> {
        while len > 0 {
            let (region, offset) = self.region(guest)?;
            let slice = region.at(offset, len)?;
            each(guest, slice);
            len -= slice.len();
            guest = guest.checked_add(slice.len() as u64)?;
        }
        Some(())
    }

    /// `len` bytes at the guest's address, in one piece.
    pub(super) fn slice(&self, guest: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let (region, offset) = self.region(guest)?;
        region.at(offset, len).filter(|slice| slice.len() == len)
    }

    /// Where `len` bytes are that the front end has at `user`, aligned to
    /// `align`.
    pub(super) fn pointer(&self, user: u64, len: usize, align: usize) -> Option<NonNull<u8>> {
        let region = self
            .regions
            .iter()
            .find(|region| user >= region.is.user && user - region.is.user < region.is.size)?;
        let slice = region.at(user - region.is.user, len)?;
        let start = slice.ptr_guard_mut().as_ptr();
        if slice.len() != len || !(start as usize).is_multiple_of(align) {
            return None;
        }
        NonNull::new(start)
    }
}

/// Where the port notes which pages it has written, a bit for each.
#[derive(Debug)]
pub(super) struct Log {
    map: Mapping,
    skip: usize,
    len: usize,
}

impl Log {
    /// In `len` bytes of `file` from `offset` on.
    ///
    /// # Errors
    ///
    /// As [`Region::new`].
    pub(super) fn new(file: &File, offset: u64, len: u64) -> Result<Self, Error> {
        let (map, skip) = map(file, offset, len)?;
        let len = map.len().min(len as usize);
        Ok(Self { map, skip, len })
    }

    /// Whether its owner took some of it away.
    pub(super) fn is_cut(&self) -> bool {
        self.map.is_cut()
    }

    /// Notes that `len` bytes at the guest's address have been written. What
    /// it has no place for is left out: its owner wanted it so.
    pub(super) fn note(&self, guest: u64, len: usize) {
        if len == 0 {
            return;
        }
        let last = guest.saturating_add(len as u64 - 1) / PAGE;
        for page in guest / PAGE..=last {
            let Some(byte) = usize::try_from(page / 8)
                .ok()
                .filter(|byte| *byte < self.len)
            else {
                return;
            };
            // SAFETY: within the mapping, and a byte is always aligned. Others
            // change it by atomic accesses, too, or have only themselves to blame.
            let byte = unsafe { AtomicU8::from_ptr(self.map.as_ptr().add(self.skip + byte)) };
            byte.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }
}
