//! Which pages of guest memory other processes have written, by their own account.
//!
//! A bit for each page, from guest-physical address 0 on, in memory that is shared
//! with them: the dirty log of vhost-user (`VHOST_USER_SET_LOG_BASE`). They set
//! bits *after* they have written a page.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory};

use crate::GuestRam;
use crate::dirty::{PAGE, Pages};
use crate::map::sealed;

/// Bytes of a word of the log.
const WORD: usize = 8;

/// Such a log.
#[derive(Debug)]
pub struct SharedLog {
    file: Arc<File>,
    map: MmapRegion,
}

impl SharedLog {
    /// For memory below the guest-physical address `end`.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new(end: u64) -> io::Result<Self> {
        let len = end
            .div_ceil((PAGE * 8) as u64)
            .next_multiple_of(PAGE as u64);
        let file = Arc::new(sealed(c"dirty-log", len, 0)?);
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let map = MmapRegion::from_file(offset, size).map_err(io::Error::other)?;
        Ok(Self { file, map })
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.map.size() as u64
    }

    /// Whether it is for no memory at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes what is noted.
    #[must_use]
    pub fn take(&self, ram: &GuestRam) -> Pages {
        let mut pages = Pages::none(ram);
        for (index, region) in ram.iter().enumerate() {
            let first = region.start_addr().0 / PAGE as u64;
            let last = first + region.len() / PAGE as u64;
            for word in first / 64..last.div_ceil(64) {
                let mut bits = self.take_word(word as usize);
                while bits != 0 {
                    let page = word * 64 + u64::from(bits.trailing_zeros());
                    bits &= bits - 1;
                    if (first..last).contains(&page) {
                        pages.insert(index, (page - first) as usize);
                    }
                }
            }
        }
        pages
    }

    fn take_word(&self, word: usize) -> u64 {
        let at = self.map.get_atomic_ref::<AtomicU64>(word * WORD);
        let Ok(at) = at else {
            return 0;
        };
        // Most are empty, and stay untouched.
        match at.load(Ordering::Relaxed) {
            0 => 0,
            _ => u64::from_le(at.swap(0, Ordering::SeqCst)),
        }
    }
}

impl AsRawFd for SharedLog {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::{Backing, Spec, build_at};

    #[test]
    fn what_others_note_is_taken_once_and_only_where_there_is_memory() {
        let spec = Spec {
            size: 3 << 20,
            backing: Backing::Small,
            shared: false,
        };
        let high = 0x1_0001_0000;
        let ram = build_at(
            &spec,
            &[(GuestAddress(0), 1 << 20), (GuestAddress(high), 2 << 20)],
        )
        .unwrap();
        let log = SharedLog::new(high + (2 << 20)).unwrap();
        let note = |address: u64| {
            let page = address / PAGE as u64;
            let mut byte = [0];
            log.file.read_exact_at(&mut byte, page / 8).unwrap();
            byte[0] |= 1 << (page % 8);
            log.file.write_all_at(&byte, page / 8).unwrap();
        };
        for address in [0, 0x5_0000, 0x10_0000, high - 1, high, high + (2 << 20) - 1] {
            note(address);
        }
        let pages = log.take(&ram);
        assert_eq!(pages.count(), 4);
        assert!(pages.contains(0, 0) && pages.contains(0, 0x50));
        assert!(pages.contains(1, 0) && pages.contains(1, 511));
        assert_eq!(log.take(&ram).count(), 0);
        // Nobody who shares it can cut it short.
        assert!(log.file.set_len(0).is_err());
    }
}
