//! Which pages of guest memory can be other than zeros.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blanket_memory::GuestRam;
use blanket_memory::dirty::WriteLog;
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use super::{Error, PAGE};

/// Which pages of this process's private memory were ever touched: reading the
/// others would fill page tables, and take its time.
#[derive(Clone, Default)]
pub struct Touched {
    pagemap: Option<Arc<File>>,
    /// Page number of the first of `entries`.
    first: u64,
    entries: Vec<u8>,
}

impl Touched {
    /// Opens what tells it. A process that has given up its privileges cannot
    /// any more; all pages count as touched then.
    #[must_use]
    pub fn open() -> Self {
        Self {
            pagemap: File::open("/proc/self/pagemap").ok().map(Arc::new),
            ..Self::default()
        }
    }

    /// Whether a page of a region can be other than all zeros. (What others
    /// write to a file is not this process's.)
    pub(crate) fn must_read(&mut self, region: &GuestRegionMmap<WriteLog>, offset: u64) -> bool {
        region.file_offset().is_some() || self.has(region.as_ptr() as u64 + offset)
    }

    /// Whether it can be told at all.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.pagemap.is_some()
    }

    /// Whether the page at `address` is write-protected by userfaultfd: what
    /// was there when that was done is, until it is undone.
    pub(super) fn is_held(&mut self, address: u64) -> bool {
        const WRITE_PROTECTED: u64 = 1 << 57;
        let entry = self.entry(address);
        entry.is_some_and(|entry| entry & WRITE_PROTECTED != 0)
    }

    /// Whether the page at `address` was: it is in memory, or swapped out.
    fn has(&mut self, address: u64) -> bool {
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        let entry = self.entry(address);
        entry.is_none_or(|entry| entry & PRESENT_OR_SWAPPED != 0)
    }

    /// A page's entry in the pagemap (the kernel's `admin-guide/mm/pagemap`), as
    /// it was when it or one of its neighbours was asked for.
    fn entry(&mut self, address: u64) -> Option<u64> {
        const BATCH: usize = 1 << 12;
        const ENTRY: usize = 8;
        let page = address / PAGE as u64;
        let index = |this: &Self| page.checked_sub(this.first).map(|i| i as usize * ENTRY);
        if index(self).is_none_or(|index| index >= self.entries.len()) {
            self.first = page;
            self.entries.resize(BATCH * ENTRY, 0);
            let read = self
                .pagemap
                .as_ref()
                .map(|pagemap| pagemap.read_at(&mut self.entries, page * ENTRY as u64));
            self.entries
                .truncate(read.and_then(Result::ok).unwrap_or(0));
        }
        index(self)
            .and_then(|index| self.entries.get(index..)?.first_chunk())
            .map(|entry| u64::from_ne_bytes(*entry))
    }
}

/// Makes all of it zeros.
pub(crate) fn clear(ram: &GuestRam, mut touched: Touched) -> Result<(), Error> {
    for region in ram.iter() {
        for offset in (0..region.len()).step_by(PAGE) {
            if touched.must_read(region, offset) {
                let at = MemoryRegionAddress(offset);
                let cleared = region.write_slice(&[0; PAGE], at);
                cleared.map_err(|_| Error::Memory)?;
            }
        }
    }
    Ok(())
}

/// Neighbouring pages that are all zeros, or all not, from the first to the last: where they
/// begin, what they are, and whether they are zeros. `content` is whole pages.
pub(in crate::snapshot) fn runs(content: &[u8]) -> impl Iterator<Item = (usize, &[u8], bool)> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut pages = content[at..].chunks(PAGE).map(is_zero);
        let zeros = pages.next()?;
        let more = pages.take_while(|next| *next == zeros).count();
        let (start, end) = (at, (at + (1 + more) * PAGE).min(content.len()));
        at = end;
        Some((start, &content[start..end], zeros))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_all_there_in_their_order_and_change_each_time(pages: Vec<bool>) {
            let mut content = Vec::new();
            for zeros in &pages {
                let mut page = [0; PAGE];
                page[content.len() / PAGE % PAGE] = u8::from(!zeros);
                content.extend(page);
            }
            let mut told = Vec::new();
            let mut last = None;
            for (start, bytes, zeros) in runs(&content) {
                prop_assert_eq!(start, told.len() * PAGE);
                prop_assert_eq!(bytes, &content[start..start + bytes.len()]);
                prop_assert!(last != Some(zeros));
                last = Some(zeros);
                told.extend(vec![zeros; bytes.len() / PAGE]);
            }
            prop_assert_eq!(told, pages);
        }
    }
}
