//! Disks whose content follows the guest: the destination is told what that is.

use super::rounds::Load;
use super::{Error, Guest, How, Source};
use crate::disk::{self, Extent};
use crate::status::Following;
use crate::wire::{self, Kind, MOST_MEMORY};

impl Source {
    /// Tells what the destination lacks of the disks: all of it but holes; or,
    /// where it has something already, what differs. No extents are left to be
    /// sent.
    pub(super) fn leave_disks(
        &mut self,
        guest: &mut dyn Guest,
        how: &How<'_>,
    ) -> Result<Vec<Extent>, Error> {
        let mut missing = 0;
        // Whatever there is: they follow.
        wire::send(&mut self.control, Kind::Absent, &[])?;
        self.look_over(guest, how, |this, _, _, extents| {
            missing += disk::bytes(&extents);
            this.tell_absent(&extents)
        })?;
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
