//! Tables: what a snapshot's file says of each chunk.

use super::crypt::TAG;
use super::{CHUNK, Geometry, PAGE};

/// Chunks in one table.
pub(super) const ENTRIES: usize = 1024;
/// Pages of a chunk: a bit for each.
pub(super) const PAGES: usize = CHUNK / PAGE;
const _: () = assert!(PAGES == u16::BITS as usize);

/// Chunks in table number `table`: the last one has only those that there are.
pub(super) fn entries_in(table: usize, geometry: &Geometry) -> usize {
    let before = table as u64 * ENTRIES as u64;
    geometry.chunks().saturating_sub(before).min(ENTRIES as u64) as usize
}

/// How entries are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Version 2: length and hash. All pages are here.
    Two,
    /// Version 3.
    Three,
}

impl Layout {
    /// Bytes of an entry.
    pub(super) fn entry(self) -> usize {
        match self {
            Self::Two => 4 + 32,
            Self::Three => 4 + 2 + 2 + 32 + TAG,
        }
    }
}

/// A chunk that is not all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Bytes at its place.
    pub(super) stored: usize,
    /// Which pages they are.
    pub(super) here: u16,
    /// Which pages are the base's.
    pub(super) base: u16,
    /// Of the whole chunk.
    pub(super) hash: [u8; 32],
    /// Of what is stored, where it is encrypted.
    pub(super) tag: [u8; TAG],
}

impl Entry {
    /// Bytes of the pages that are here.
    pub(super) fn len(&self) -> usize {
        self.here.count_ones() as usize * PAGE
    }

    /// Reads one; none for a chunk of zeros.
    ///
    /// # Panics
    /// `bytes` is no entry long.
    pub(super) fn read(layout: Layout, bytes: &[u8]) -> Option<Self> {
        assert_eq!(bytes.len(), layout.entry(), "a whole entry");
        let stored = u32::from_le_bytes(std::array::from_fn(|i| bytes[i])) as usize;
        let hash_at = |at: usize| std::array::from_fn(|i| bytes[at + i]);
        let entry = match layout {
            Layout::Two => Self {
                stored,
                here: if stored == 0 { 0 } else { u16::MAX },
                base: 0,
                hash: hash_at(4),
                tag: [0; TAG],
            },
            Layout::Three => Self {
                stored,
                here: u16::from_le_bytes([bytes[4], bytes[5]]),
                base: u16::from_le_bytes([bytes[6], bytes[7]]),
                hash: hash_at(8),
                tag: std::array::from_fn(|i| bytes[40 + i]),
            },
        };
        ((entry.stored, entry.here, entry.base) != (0, 0, 0)).then_some(entry)
    }

    /// As it is written today.
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = (self.stored as u32).to_le_bytes().to_vec();
        bytes.extend(self.here.to_le_bytes());
        bytes.extend(self.base.to_le_bytes());
        bytes.extend(self.hash);
        bytes.extend(self.tag);
        bytes
    }

    /// Whether a chunk can be so.
    pub(super) fn is_sound(&self) -> bool {
        self.here & self.base == 0
            && self.stored <= self.len()
            && (self.stored == 0) == (self.here == 0)
    }
}

/// The pages of a chunk, by number, that a mask names.
pub(super) fn pages_of(mask: u16) -> impl Iterator<Item = usize> {
    (0..PAGES).filter(move |page| mask & 1 << page != 0)
}

/// Bytes of a page in its chunk.
pub(super) fn range(page: usize) -> std::ops::Range<usize> {
    page * PAGE..(page + 1) * PAGE
}

/// The pages of which something is told, as a mask.
pub(super) fn mask(told: impl Fn(usize) -> bool) -> u16 {
    (0..PAGES).fold(0, |mask, page| mask | u16::from(told(page)) << page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let entry = Entry {
            stored: 3 * PAGE,
            here: 0b111,
            base: 0x8000,
            hash: [9; 32],
            tag: [8; TAG],
        };
        assert!(entry.is_sound());
        let bytes = entry.to_bytes();
        assert_eq!(Entry::read(Layout::Three, &bytes), Some(entry));
        assert_eq!(Entry::read(Layout::Three, &vec![0; bytes.len()]), None);
        assert_eq!(pages_of(entry.here | entry.base).last(), Some(15));
        assert_eq!(mask(|page| page < 3), entry.here);
        for wrong in [
            Entry { base: 1, ..entry },
            Entry { stored: 0, ..entry },
            Entry { here: 0, ..entry },
            Entry { here: 3, ..entry },
        ] {
            assert!(!wrong.is_sound(), "{wrong:?}");
        }
    }

    #[test]
    fn in_version_2_all_pages_are_here() {
        let mut bytes = vec![7; Layout::Two.entry()];
        bytes[..4].copy_from_slice(&100u32.to_le_bytes());
        let entry = Entry::read(Layout::Two, &bytes).unwrap();
        assert_eq!(
            (entry.len(), entry.stored, entry.hash),
            (CHUNK, 100, [7; 32])
        );
        bytes[..4].fill(0);
        assert_eq!(Entry::read(Layout::Two, &bytes), None);
    }
}
