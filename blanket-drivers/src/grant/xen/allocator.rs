//! Pages of this domain for others: `/dev/xen/gntalloc`.

use std::fs::File;
use std::ops::Deref;
use std::sync::Arc;

use vmm_sys_util::ioctl::ioctl_with_mut_ptr;

use super::abi::{GNTALLOC_ALLOC_GREF, GNTALLOC_DEALLOC_GREF, Range, WRITABLE};
use super::{Error, Memory, checked, open};

/// Makes pages for other domains.
#[derive(Clone, Debug)]
pub struct Allocator(Arc<File>);

impl Allocator {
    /// Opens the driver.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn open() -> Result<Self, Error> {
        open("/dev/xen/gntalloc", "xen_gntalloc").map(Self)
    }

    /// `count` pages full of zeros that `domain` may map: for writing, too, if
    /// `writable`. This process may always write.
    ///
    /// # Errors
    /// [`Error::Count`], or the driver has no more pages or grants.
    pub fn share(&self, domain: u16, count: usize, writable: bool) -> Result<Shared, Error> {
        let count = checked(count)?;
        let mut request = request(domain, count, writable);
        // SAFETY: the driver reads the 16 bytes in front, and writes those and
        // `count` references of 4 bytes behind them; there is room for both.
        let done = unsafe {
            let call = GNTALLOC_ALLOC_GREF();
            ioctl_with_mut_ptr(&*self.0, call, request.as_mut_ptr())
        };
        if done < 0 {
            return Err(Error::last("allocate pages to share"));
        }
        let range = Range::new(request[1], count);
        let memory = Memory::map(&self.0, range, GNTALLOC_DEALLOC_GREF(), true);
        let what = "map pages to share";
        Ok(Shared {
            memory: memory.map_err(|source| Error::System { what, source })?,
            references: references(&request, count),
        })
    }
}

/// `struct ioctl_gntalloc_alloc_gref`: domain (16 bits), flags (16), count (32),
/// index (64), then the references (32 each).
pub(super) fn request(domain: u16, count: u32, writable: bool) -> Vec<u64> {
    let flags = if writable { WRITABLE } else { 0 };
    let mut request = vec![0; 2 + (count as usize).div_ceil(2)];
    request[0] = u64::from(domain) | u64::from(flags) << 16 | u64::from(count) << 32;
    request
}

/// The references of an answered request.
pub(super) fn references(request: &[u64], count: u32) -> Vec<u32> {
    let pairs = request.iter().skip(2);
    let all = pairs.flat_map(|pair| [*pair as u32, (pair >> 32) as u32]);
    all.take(count as usize).collect()
}

/// Pages that another domain may map by their references. Dropping them takes
/// the grants back; a page that is still mapped elsewhere is freed when that
/// ends.
#[derive(Debug)]
pub struct Shared {
    memory: Memory,
    references: Vec<u32>,
}

impl Shared {
    /// The grants, by page.
    #[must_use]
    pub fn references(&self) -> &[u32] {
        &self.references
    }
}

impl Deref for Shared {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.memory
    }
}
