//! Disks whose content moves along.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use blanket_memory::absent::Absent;

use crate::wire::MOST_MEMORY;

/// A disk at either end. Offsets and lengths are whole blocks of the disk.
pub trait Disk: Send + Sync {
    /// Its bytes.
    fn capacity(&self) -> u64;

    /// The next range from `offset` on that may hold anything but zeros.
    ///
    /// # Errors
    /// The node's disk fails.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// Begins to note what the guest writes: what is not noted, whoever reads
    /// it afterwards sees. There is nothing to note, here and below, of a disk
    /// that no guest has.
    ///
    /// # Errors
    /// It cannot be noted.
    fn watch(&self) -> io::Result<()> {
        Ok(())
    }

    /// Takes what was written since the last time, in runs of at most `most`
    /// bytes, which may reach beyond the end.
    fn written(&self, most: usize) -> Vec<(u64, usize)> {
        let _ = most;
        Vec::new()
    }

    /// Notes no more.
    fn unwatch(&self) {}

    /// What has not come of it, where its guest can do with that; see
    /// [`Absent`]. What is written and read here takes no notice of it.
    fn absent(&self) -> Option<Arc<Absent>> {
        None
    }

    /// Fills `into` from `offset`.
    ///
    /// # Errors
    /// The node's disk fails.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Stores `bytes` at `offset`.
    ///
    /// # Errors
    /// There is no room, or the node's disk fails.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes zeros of a range.
    ///
    /// # Errors
    /// As [`Disk::write`].
    fn clear(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes durable what was written.
    ///
    /// # Errors
    /// As [`Disk::write`].
    fn flush(&self) -> io::Result<()>;
}

/// All disks of a guest.
pub type Disks = [Arc<dyn Disk>];

/// A range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// The disk's number.
    pub(crate) disk: usize,
    /// First byte.
    pub(crate) at: u64,
    /// Bytes, no more than [`MOST_MEMORY`].
    pub(crate) len: usize,
}

/// How many bytes these are.
pub(crate) fn bytes(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len as u64).sum()
}

/// What was written to the disks since the last time.
pub(crate) fn written(disks: &Disks) -> Vec<Extent> {
    let mut all = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        let end = disk.capacity();
        for (at, len) in disk.written(MOST_MEMORY) {
            let len = end.saturating_sub(at).min(len as u64) as usize;
            if len > 0 {
                all.push(Extent {
                    disk: index,
                    at,
                    len,
                });
            }
        }
    }
    all
}

/// Goes over all of a disk, or all of it that may be other than zeros.
pub(crate) struct Whole<'a> {
    disk: &'a dyn Disk,
    index: usize,
    /// Holes, too.
    holes: bool,
    rest: Range<u64>,
}

impl<'a> Whole<'a> {
    pub(crate) fn of(disk: &'a dyn Disk, index: usize, holes: bool) -> Self {
        Self {
            disk,
            index,
            holes,
            rest: 0..0,
        }
    }

    /// The next extents, of at least `most` bytes together unless it is the end.
    pub(crate) fn next(&mut self, most: u64) -> io::Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut left = most;
        while left > 0 {
            if self.rest.is_empty() {
                let from = self.rest.end;
                let next = match self.holes {
                    true => Some(from..self.disk.capacity()).filter(|rest| !rest.is_empty()),
                    false => self.disk.next_data(from)?,
                };
                match next {
                    Some(next) => self.rest = next,
                    None => break,
                }
            }
            // Pieces end at multiples of their longest, however data begin.
            let end = (self.rest.start + 1).next_multiple_of(MOST_MEMORY as u64);
            let end = end.min(self.rest.end);
            let len = end - self.rest.start;
            extents.push(Extent {
                disk: self.index,
                at: self.rest.start,
                len: len as usize,
            });
            self.rest.start = end;
            left = left.saturating_sub(len);
        }
        Ok(extents)
    }
}

/// Whether there are nothing but zeros on a disk, as far as that can be told
/// without reading it.
pub(crate) fn is_blank(disk: &dyn Disk) -> bool {
    matches!(disk.next_data(0), Ok(None))
}
