//! A replica of the guest's disks is kept up to date: point after point.
//!
//! A point is what the disks were at one moment, all of them: the guest stands
//! still while the last of what it wrote is read, as it does for a migration.
//! It is what a machine would find on its disks that lost its power just then.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_memory::GuestRam;
use blanket_memory::dirty::Pages;

use super::rounds::{Fresh, LITTLE, Load};
use super::{Error, Guest, How, Source, is_readable};
use crate::disk::{self, Disk, Disks, Extent};
use crate::journal::Point;
use crate::status::{Options, Phase, Progress, Replication, micros};
use crate::wire::{self, Kind};

/// How long the replica may take for a point.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 300 });
/// How often it is looked whether it is still there.
const LOOK: Duration = Duration::from_millis(20);
/// So much is read while the guest stands still; if it writes more than that in
/// no time, it stands still until that is sent.
const MOST_HELD: u64 = 4 * LITTLE;

impl Source {
    /// Makes a point of the guest's disks now and then, until that is cancelled.
    /// The guest runs on, whatever happens.
    ///
    /// # Errors
    /// There are no more points: why.
    pub fn replicate(
        mut self,
        guest: &mut dyn Guest,
        interval: Duration,
        options: &Options,
        progress: &Arc<Progress>,
        listener: &UnixListener,
    ) -> Result<(), Error> {
        let how = How::new(options, progress, listener);
        let made = self.make_points(guest, interval, &how);
        guest.disks().iter().for_each(|disk| disk.unwatch());
        if let Err(error) = &made {
            progress.fail(error.to_string());
            let _ = wire::send(&mut self.control, Kind::Abort, error.to_string().as_bytes());
        }
        made
    }

    fn make_points(
        &mut self,
        guest: &mut dyn Guest,
        interval: Duration,
        how: &How<'_>,
    ) -> Result<(), Error> {
        self.control.set_read_timeout(Some(PATIENCE))?;
        for stream in &self.data {
            stream.socket().set_read_timeout(Some(PATIENCE))?;
            stream.socket().set_write_timeout(Some(PATIENCE))?;
        }
        let mut left = self.copy_disks(guest, how)?;
        how.progress.lock().phase = Phase::Replicating;
        let mut number = 0;
        loop {
            let begin = Instant::now();
            match self.point(guest, left, number + 1, how)? {
                None => number += 1,
                // It is paused: nothing changes, and there is no hurry.
                Some(kept) => {
                    left = kept;
                    self.wait(Duration::from_millis(500), how)?;
                    continue;
                }
            }
            // Nobody looks at them again.
            how.progress.lock().rounds.clear();
            self.wait(interval.saturating_sub(begin.elapsed()), how)?;
            left = disk::written(&guest.disks());
        }
    }

    /// Waits; the replica has nothing to say meanwhile.
    fn wait(&mut self, time: Duration, how: &How<'_>) -> Result<(), Error> {
        let end = Instant::now() + time;
        loop {
            if how.progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let left = end.saturating_duration_since(Instant::now());
            if is_readable(&self.control, left.min(LOOK)) {
                // Why it gives up, or nothing.
                wire::receive(&mut self.control, &mut Vec::new())?;
                return Err(wire::Error::Damaged("a word out of turn").into());
            }
            if left.is_zero() {
                return Ok(());
            }
        }
    }

    /// Makes a point; what was to be in it, if the guest does not run.
    fn point(
        &mut self,
        guest: &mut dyn Guest,
        left: Vec<Extent>,
        number: u64,
        how: &How<'_>,
    ) -> Result<Option<Vec<Extent>>, Error> {
        let progress = how.progress;
        let before = progress.bytes();
        let mut left = self.thin_out(guest, left, LITTLE, how)?;
        let begin = Instant::now();
        if let Err(reason) = guest.stop() {
            progress.lock().replication.get_or_insert_default().waits = Some(reason);
            return Ok(Some(left));
        }
        left.extend(disk::written(&guest.disks()));
        let disks = guest.disks();
        let held = if disk::bytes(&left) > MOST_HELD {
            self.send(guest.ram(), &disks, left, how).map(|()| None)
        } else {
            Held::read(&disks, &left).map(Some).map_err(Error::from)
        };
        let resumed = guest.resume();
        let pause_us = micros(begin.elapsed());
        let held = held?;
        resumed.map_err(Error::Guest)?;
        if let Some(held) = held {
            self.send(guest.ram(), &held.disks, held.extents, how)?;
        }
        let age = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let point = Point {
            number,
            age_ms: age,
            at_ms: 0,
        };
        wire::send_value(&mut self.control, Kind::Point, &point)?;
        wire::expect(&mut self.control, Kind::Point)?;
        progress.point(begin);
        {
            let mut status = progress.lock();
            let all = status.replication.get_or_insert_default();
            *all = Replication {
                points: number,
                bytes: progress.bytes() - before,
                pause_us,
                most_pause_us: all.most_pause_us.max(pause_us),
                ..Replication::default()
            };
        }
        // It is on the replica's disks.
        wire::expect(&mut self.control, Kind::Flush)?;
        Ok(None)
    }

    /// Sends parts of disks.
    fn send(
        &mut self,
        ram: &GuestRam,
        disks: &Disks,
        extents: Vec<Extent>,
        how: &How<'_>,
    ) -> Result<(), Error> {
        if extents.is_empty() {
            return Ok(());
        }
        let pages = Pages::none(ram);
        let load = Load { pages, extents };
        self.round(ram, disks, &load, Fresh::Nothing, how).map(drop)
    }
}

/// What was on the disks at a moment, and where.
struct Held {
    disks: Arc<Disks>,
    extents: Vec<Extent>,
}

/// Parts of a disk, by their places.
struct Frozen {
    capacity: u64,
    parts: BTreeMap<u64, Vec<u8>>,
}

impl Held {
    fn read(disks: &Disks, wanted: &[Extent]) -> io::Result<Self> {
        let (mut all, mut extents) = (Vec::new(), Vec::new());
        for (index, disk) in disks.iter().enumerate() {
            let mut parts: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            for extent in wanted.iter().filter(|extent| extent.disk == index) {
                let known = parts.get(&extent.at);
                if known.is_some_and(|part| part.len() >= extent.len) {
                    continue;
                }
                let mut bytes = vec![0; extent.len];
                disk.read(extent.at, &mut bytes)?;
                parts.insert(extent.at, bytes);
            }
            extents.extend(parts.iter().map(|(at, bytes)| Extent {
                disk: index,
                at: *at,
                len: bytes.len(),
            }));
            let capacity = disk.capacity();
            all.push(Arc::new(Frozen { capacity, parts }) as Arc<dyn Disk>);
        }
        let disks = all.into();
        Ok(Self { disks, extents })
    }
}

impl Disk for Frozen {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..self.capacity))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let part = self.parts.get(&offset);
        let part = part.and_then(|part| part.get(..into.len()));
        into.copy_from_slice(part.ok_or(io::ErrorKind::NotFound)?);
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn clear(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
