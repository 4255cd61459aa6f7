//! Where a striped set's bytes are.

use blanket_memory::IoVec;

use super::DATA_START;

/// How data lies on the volumes of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How many there are.
    pub volumes: u32,
    /// Bytes that lie together.
    pub chunk: u64,
    /// Bytes of data on each volume: whole chunks.
    pub data: u64,
}

/// What a range of the set has on one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct Extent {
    /// First byte, on the volume.
    pub(in crate::store) offset: u64,
    /// Bytes.
    pub(in crate::store) len: u64,
}

impl Layout {
    /// Bytes of the whole set.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.data * u64::from(self.volumes)
    }

    /// How many of the first `position` bytes of the set are on `volume`.
    fn before(&self, volume: u32, position: u64) -> u64 {
        let row = self.chunk * u64::from(self.volumes);
        let rest = position % row;
        let own = u64::from(volume) * self.chunk;
        position / row * self.chunk + rest.saturating_sub(own).min(self.chunk)
    }

    /// What the bytes from `offset` on have on `volume`; they are within the set.
    pub(in crate::store) fn extent(&self, volume: u32, offset: u64, len: u64) -> Extent {
        let start = self.before(volume, offset);
        Extent {
            offset: DATA_START + start,
            len: self.before(volume, offset + len) - start,
        }
    }

    /// Deals the memory of a request that begins at `offset` out to the volumes.
    pub(in crate::store) fn deal(&self, mut offset: u64, vectors: &[IoVec]) -> Vec<Vec<IoVec>> {
        let mut dealt = vec![Vec::new(); self.volumes as usize];
        for vector in vectors {
            let mut rest = *vector;
            while !rest.is_empty() {
                let left = self.chunk - offset % self.chunk;
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                let mut piece = rest;
                piece.truncate(n);
                let volume = offset / self.chunk % u64::from(self.volumes);
                push(&mut dealt[volume as usize], piece);
                rest.advance(n);
                offset += n as u64;
            }
        }
        dealt
    }
}

/// Appends a piece; one that goes on where the last ends, to that.
fn push(vectors: &mut Vec<IoVec>, piece: IoVec) {
    if let Some(last) = vectors.last_mut()
        && last.as_ptr().wrapping_add(last.len()) == piece.as_ptr()
        && let Some(len) = last.len().checked_add(piece.len())
    {
        *last = IoVec::new(last.as_ptr(), len);
        return;
    }
    vectors.push(piece);
}
