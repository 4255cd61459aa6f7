//! What a disk at the destination has already: both ends tell by hashes.
//!
//! A destination may have some of a disk, of an attempt that failed or of a
//! replica. What that is, nobody is believed: the source asks for the hashes of
//! stripes and reads its own disk; what differs is sent. Whatever the guest
//! writes meanwhile is noted, and sent again in any case.

use std::io;
use std::ops::Range;

use crate::disk::Disk;
use crate::wire::{self, MOST_MEMORY};

/// Bytes of a stripe: one hash is for so many.
pub(crate) const STRIPE: usize = MOST_MEMORY;
/// Most stripes that are asked for at once.
pub(crate) const MOST_STRIPES: usize = 128;

/// A stripe's BLAKE3 hash.
pub(crate) type Hash = [u8; 32];

/// Which stripes of a disk are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Compare {
    /// The disk's number.
    pub(crate) disk: u64,
    /// Where the first stripe begins.
    pub(crate) at: u64,
    /// Bytes of them all; the last one ends where the disk does, or is whole.
    pub(crate) len: u64,
}

impl Compare {
    /// As it is sent.
    pub(crate) fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        let numbers = [self.disk, self.at, self.len];
        for (place, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *place = number.to_le_bytes();
        }
        bytes
    }

    /// What was sent.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, wire::Error> {
        let (&[disk, at, len], []) = bytes.as_chunks::<8>() else {
            return Err(wire::Error::Damaged("a question about a disk"));
        };
        let [disk, at, len] = [disk, at, len].map(u64::from_le_bytes);
        Ok(Self { disk, at, len })
    }

    /// The answer, about a disk of these.
    ///
    /// # Errors
    /// There is no such disk or stripe, or it cannot be read.
    pub(crate) fn answer(self, disks: &crate::Disks) -> Result<Vec<u8>, Unanswered> {
        let disk = usize::try_from(self.disk).ok();
        let disk = disk.and_then(|disk| disks.get(disk));
        let end = self.at.checked_add(self.len);
        let most = (STRIPE * MOST_STRIPES) as u64;
        let within = |end: u64, disk: &dyn Disk| {
            let whole = end == disk.capacity() || end.is_multiple_of(STRIPE as u64);
            whole && end <= disk.capacity() && self.at.is_multiple_of(STRIPE as u64)
        };
        match (disk, end) {
            (Some(disk), Some(end)) if self.len <= most && within(end, &**disk) => {
                Ok(hashes(&**disk, self.at..end)?.concat())
            }
            _ => Err(wire::Error::Damaged("stripes outside the disks").into()),
        }
    }
}

/// Why a question has no answer.
pub(crate) enum Unanswered {
    Wire(wire::Error),
    Disk(io::Error),
}

impl From<wire::Error> for Unanswered {
    fn from(error: wire::Error) -> Self {
        Self::Wire(error)
    }
}

impl From<io::Error> for Unanswered {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// The hashes of the stripes in `range`. Holes are not read, and hash like the
/// zeros that they are.
pub(crate) fn hashes(disk: &dyn Disk, range: Range<u64>) -> io::Result<Vec<Hash>> {
    let mut bytes = vec![0; STRIPE];
    let mut zeros = None;
    let mut data = disk.next_data(range.start)?;
    let mut at = range.start;
    let mut all = Vec::new();
    while at < range.end {
        let len = (range.end - at).min(STRIPE as u64);
        if data.as_ref().is_some_and(|data| data.end <= at) {
            data = disk.next_data(at)?;
        }
        let hole = data.as_ref().is_none_or(|data| at + len <= data.start);
        let hash = match zeros {
            Some((hash, zeros)) if hole && zeros == len => hash,
            _ => {
                let bytes = bytes.get_mut(..len as usize).unwrap_or_default();
                if hole {
                    bytes.fill(0);
                } else {
                    disk.read(at, bytes)?;
                }
                let hash = *blake3::hash(bytes).as_bytes();
                if hole {
                    zeros = Some((hash, len));
                }
                hash
            }
        };
        all.push(hash);
        at += len;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_understood_as_it_was_asked() {
        let asked = Compare {
            disk: 3,
            at: 1 << 40,
            len: 77,
        };
        assert_eq!(Compare::from_bytes(&asked.to_bytes()).unwrap(), asked);
        assert!(Compare::from_bytes(&asked.to_bytes()[1..]).is_err());
    }
}
