//! Disks whose content follows the guest: the destination is told what that is.

use super::rounds::Load;
use super::{Error, Guest, How, Source};
use crate::disk::{self, Extent, Whole};
use crate::status::{Following, Phase};
use crate::wire::{self, Kind, MOST_MEMORY};

/// Bytes of a disk that are looked through at once.
const STRETCH: u64 = 1 << 30;

impl Source {
    /// Tells what the destination lacks of the disks: all of it but holes; or,
    /// where it has something already, what differs. No extents are left to be
    /// sent.
    pub(super) fn leave_disks(
        &mut self,
        guest: &mut dyn Guest,
        how: &How<'_>,
    ) -> Result<Vec<Extent>, Error> {
        let disks = guest.disks();
        {
            let mut status = how.progress.lock();
            status.phase = Phase::Disks;
            status.disks = disks.iter().map(|disk| disk.capacity()).sum();
        }
        let mut missing = 0;
        // Whatever there is: they follow.
        wire::send(&mut self.control, Kind::Absent, &[])?;
        for (index, disk) in disks.iter().enumerate() {
            disk.watch()?;
            let blank = self.blank.get(index).copied().unwrap_or(false);
            let mut whole = Whole::of(&**disk, index, !blank);
            loop {
                let extents = whole.next(STRETCH)?;
                if extents.is_empty() {
                    break;
                }
                let extents = match blank {
                    true => extents,
                    false => self.differing(&**disk, &extents, how)?,
                };
                missing += disk::bytes(&extents);
                self.tell_absent(&extents)?;
            }
        }
        if self.blank.iter().any(|blank| !blank) {
            // What it had may not be durable there, and nothing else be sent.
            self.flush()?;
        }
        how.progress.lock().following_disks = Some(Following {
            missing,
            left: missing,
            ..Following::default()
        });
        Ok(Vec::new())
    }

    /// What has been written since the last time, and is to be sent: of disks that
    /// follow, the destination is told instead.
    pub(super) fn written(&mut self, guest: &mut dyn Guest) -> Result<Load, Error> {
        let mut load = Load::written(guest)?;
        if self.lazy {
            self.tell_absent(&std::mem::take(&mut load.extents))?;
        }
        Ok(load)
    }

    fn tell_absent(&mut self, extents: &[Extent]) -> Result<(), Error> {
        // Those that follow one another are one.
        let mut runs: Vec<[u64; 3]> = Vec::new();
        for Extent { disk, at, len } in extents {
            let (disk, len) = (*disk as u64, *len as u64);
            match runs.last_mut() {
                Some(last) if last[0] == disk && last[1] + last[2] == *at => last[2] += len,
                _ => runs.push([disk, *at, len]),
            }
        }
        for some in runs.chunks(MOST_MEMORY / 24) {
            let numbers = some.as_flattened().iter();
            let payload: Vec<u8> = numbers.flat_map(|it| it.to_le_bytes()).collect();
            wire::send(&mut self.control, Kind::Absent, &payload)?;
        }
        Ok(())
    }
}
