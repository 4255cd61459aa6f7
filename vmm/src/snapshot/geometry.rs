//! Guest memory as numbered chunks.

use super::{Error, PAGE, Regions};

/// Bytes of a chunk of memory: what is hashed, and read, at once.
pub const CHUNK: usize = 64 << 10;

/// More memory than any machine has, in bytes.
const MOST: u64 = 1 << 46;

/// Which chunk has which memory. Each region begins with a chunk of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// First chunk, guest-physical address and bytes of each region.
    regions: Vec<(u64, u64, u64)>,
    chunks: u64,
}

impl Geometry {
    /// Of memory that lies so.
    ///
    /// # Errors
    /// No memory can lie so.
    pub fn new(regions: &Regions) -> Result<Self, Error> {
        const WRONG: Error = Error::Damaged("no memory can lie so");
        let mut all = Vec::new();
        let (mut chunks, mut end) = (0u64, 0u64);
        for &(start, len) in &regions.0 {
            let aligned = (start | len).is_multiple_of(PAGE as u64);
            let after = start.checked_add(len).ok_or(WRONG)?;
            if len == 0 || start < end || !aligned {
                return Err(WRONG);
            }
            all.push((chunks, start, len));
            chunks += len.div_ceil(CHUNK as u64);
            end = after;
            if chunks > MOST / CHUNK as u64 {
                return Err(WRONG);
            }
        }
        Ok(Self {
            regions: all,
            chunks,
        })
    }

    /// How many there are.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Guest-physical address and bytes of a chunk: the last of a region may be
    /// shorter than others.
    #[must_use]
    pub fn memory(&self, chunk: u64) -> Option<(u64, usize)> {
        let after = self.regions.partition_point(|region| region.0 <= chunk);
        let (first, start, len) = *self.regions.get(after.checked_sub(1)?)?;
        let offset = (chunk - first).checked_mul(CHUNK as u64)?;
        let left = len.checked_sub(offset).filter(|left| *left > 0)?;
        Some((start + offset, left.min(CHUNK as u64) as usize))
    }

    /// The chunk that has the memory at `address`, and where in it.
    #[must_use]
    pub fn chunk(&self, address: u64) -> Option<(u64, usize)> {
        let after = self.regions.partition_point(|region| region.1 <= address);
        let (first, start, len) = *self.regions.get(after.checked_sub(1)?)?;
        let offset = address - start;
        let size = CHUNK as u64;
        (offset < len).then(|| (first + offset / size, (offset % size) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_is_in_the_chunk_that_says_so() {
        let size = CHUNK as u64;
        let regions = Regions(vec![(0, 3 * size + 4096), (1 << 32, size)]);
        let geometry = Geometry::new(&regions).unwrap();
        assert_eq!(geometry.chunks(), 5);
        assert_eq!(geometry.memory(3), Some((3 * size, 4096)));
        assert_eq!(geometry.memory(4), Some((1 << 32, CHUNK)));
        assert_eq!(geometry.memory(5), None);
        assert_eq!(geometry.chunk(3 * size + 4095), Some((3, 4095)));
        assert_eq!(geometry.chunk(3 * size + 4096), None);
        assert_eq!(geometry.chunk((1 << 32) + 5), Some((4, 5)));
        assert_eq!(geometry.chunk(u64::MAX), None);
    }

    #[test]
    fn regions_that_cannot_be_are_refused() {
        for regions in [
            vec![(0, 0)],
            vec![(0, 1)],
            vec![(1, 4096)],
            vec![(4096, 4096), (0, 4096)],
            vec![(0, 8192), (4096, 4096)],
            vec![(u64::MAX - 4095, 8192)],
            vec![(0, 1 << 60)],
        ] {
            assert!(Geometry::new(&Regions(regions)).is_err());
        }
    }
}
