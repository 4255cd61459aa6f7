//! What of a disk the destination has already is not sent.

use super::{Error, How, Source};
use crate::compare::{Compare, Hash, MOST_STRIPES, hashes};
use crate::disk::{Disk, Extent};
use crate::wire::{self, Kind};

impl Source {
    /// Those of the stripes that are others at the destination. They follow one
    /// another on `disk`, which is watched.
    pub(super) fn differing(
        &mut self,
        disk: &dyn Disk,
        extents: &[Extent],
        how: &How<'_>,
    ) -> Result<Vec<Extent>, Error> {
        let mut others = Vec::new();
        for stripes in extents.chunks(MOST_STRIPES) {
            if how.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let (Some(first), Some(last)) = (stripes.first(), stripes.last()) else {
                continue;
            };
            let end = last.at + last.len as u64;
            let ask = Compare {
                disk: first.disk as u64,
                at: first.at,
                len: end - first.at,
            };
            wire::send(&mut self.control, Kind::Compare, &ask.to_bytes())?;
            // Both ends read at the same time.
            let here = hashes(disk, first.at..end);
            let here =
                here.map_err(|error| Error::Guest(format!("a disk cannot be read: {error}")))?;
            let there = wire::expect(&mut self.control, Kind::Hashes)?;
            let (there, rest) = there.as_chunks::<{ size_of::<Hash>() }>();
            if there.len() != stripes.len() || !rest.is_empty() {
                return Err(wire::Error::Damaged("hashes of other stripes").into());
            }
            let mut same = 0;
            for ((stripe, here), there) in stripes.iter().zip(&here).zip(there) {
                if here == there {
                    same += stripe.len as u64;
                } else {
                    others.push(*stripe);
                }
            }
            how.progress.lock().disks_same += same;
        }
        Ok(others)
    }
}
