//! Content of disks that is missing.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use blanket_memory::absent::Absent;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::fetch::{Missing, Piece, Stop};
use crate::disk::{Disk, Disks};
use crate::status::{Following, Status};
use crate::wire::{self, Kind, MOST_MEMORY};

/// Bytes that are asked for at once.
const PIECE: u64 = MOST_MEMORY as u64;

/// A disk, and what has not come of it.
struct Late {
    disk: Arc<dyn Disk>,
    absent: Arc<Absent>,
    /// Where it is gone on with what has not been asked for.
    next: u64,
    /// What has been asked for.
    asked: Vec<Range<u64>>,
}

impl Late {
    /// The next run of what has not been asked for: from where it was gone on to
    /// the end, and once from the start.
    fn next_run(&mut self) -> Option<Range<u64>> {
        let absent = &self.absent;
        self.asked.retain(|asked| absent.is_missing(asked));
        let mut around = self.next == 0;
        loop {
            let Some(run) = absent.next(self.next, PIECE) else {
                if std::mem::replace(&mut around, true) {
                    return None;
                }
                self.next = 0;
                continue;
            };
            let overlap = |asked: &&Range<u64>| asked.start < run.end && run.start < asked.end;
            let asked = self.asked.iter().filter(overlap).min_by_key(|it| it.start);
            let run = match asked {
                None => run,
                Some(asked) if run.start < asked.start => run.start..asked.start,
                Some(asked) => {
                    self.next = asked.end;
                    continue;
                }
            };
            self.next = run.end;
            self.asked.push(run.clone());
            return Some(run);
        }
    }
}

/// What the guest's disks lack.
pub(super) struct Blocks {
    disks: Vec<Late>,
    touched: EventFd,
}

impl Blocks {
    /// Of `disks`, all of which can be used before their content has come.
    pub(super) fn new(disks: &Disks) -> io::Result<Self> {
        let touched = EventFd::new(EFD_NONBLOCK)?;
        let mut all = Vec::new();
        for disk in disks {
            let absent = disk.absent();
            let absent = absent.ok_or(io::Error::other("a disk that cannot wait"))?;
            absent.set_bringer(touched.try_clone()?);
            all.push(Late {
                disk: Arc::clone(disk),
                absent,
                next: 0,
                asked: Vec::new(),
            });
        }
        Ok(Self {
            disks: all,
            touched,
        })
    }

    fn find(&self, disk: u64) -> Result<&Late, wire::Error> {
        let disk = usize::try_from(disk).ok();
        let disk = disk.and_then(|disk| self.disks.get(disk));
        disk.ok_or(wire::Error::Damaged("blocks of another disk"))
    }

    /// Stores what is missing of a range; `None` for zeros.
    fn put(&self, disk: u64, at: u64, len: u64, bytes: Option<&[u8]>) -> Result<(), Stop> {
        let Late { disk, absent, .. } = self.find(disk)?;
        let end = at.checked_add(len).filter(|end| *end <= disk.capacity());
        let end = end.ok_or(wire::Error::Damaged("blocks outside the disks"))?;
        let brought = absent.bring(at..end, |run| {
            let Some(bytes) = bytes else {
                return disk.clear(run.start, run.end - run.start);
            };
            let part = (run.start - at) as usize..(run.end - at) as usize;
            disk.write(run.start, bytes.get(part).unwrap_or_default())
        });
        brought.map_err(Stop::Kernel)
    }
}

impl Missing for Blocks {
    fn status<'a>(&self, status: &'a mut Status) -> &'a mut Option<Following> {
        &mut status.following_disks
    }

    fn touched(&self) -> RawFd {
        self.touched.as_raw_fd()
    }

    fn take_touched(&mut self) -> io::Result<Vec<Piece>> {
        // Cleared first: what comes from now on sets it again.
        let _ = self.touched.read();
        let mut all = Vec::new();
        for (of, late) in (0..).zip(&mut self.disks) {
            for range in late.absent.take_wanted() {
                let mut at = range.start;
                while at < range.end {
                    let len = (range.end - at).min(PIECE);
                    all.push(Piece { of, at, len });
                    late.asked.push(at..at + len);
                    at += len;
                }
                // What is behind it may well be next.
                late.next = range.end;
            }
        }
        Ok(all)
    }

    fn next(&mut self) -> Option<Piece> {
        for (of, late) in (0..).zip(&mut self.disks) {
            if let Some(run) = late.next_run() {
                return Some(Piece {
                    of,
                    at: run.start,
                    len: run.end - run.start,
                });
            }
        }
        None
    }

    fn again(&mut self, piece: Piece) {
        let disk = usize::try_from(piece.of).ok();
        if let Some(late) = disk.and_then(|disk| self.disks.get_mut(disk)) {
            late.asked.retain(|asked| asked.start != piece.at);
        }
    }

    fn lacks(&self, piece: Piece) -> Result<bool, wire::Error> {
        let late = self.find(piece.of)?;
        Ok(late
            .absent
            .is_missing(&(piece.at..piece.at.saturating_add(piece.len))))
    }

    fn place(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Stop> {
        let damaged = |what| Stop::Stream(wire::Error::Damaged(what));
        match kind {
            Kind::Blocks => {
                let (head, bytes) = payload
                    .split_first_chunk::<16>()
                    .ok_or(damaged("blocks without a place"))?;
                let (numbers, _) = head.as_chunks::<8>();
                let [disk, at] = [0, 1].map(|i: usize| u64::from_le_bytes(numbers[i]));
                self.put(disk, at, bytes.len() as u64, Some(bytes))
            }
            Kind::Holes => {
                let (ranges, rest) = payload.as_chunks::<24>();
                if !rest.is_empty() {
                    return Err(damaged("a part of a range"));
                }
                for range in ranges {
                    let (numbers, _) = range.as_chunks::<8>();
                    let [disk, at, len] = [0, 1, 2].map(|i: usize| u64::from_le_bytes(numbers[i]));
                    self.put(disk, at, len, None)?;
                }
                Ok(())
            }
            _ => Err(damaged("its parts are not in order")),
        }
    }

    fn left(&self) -> u64 {
        self.disks.iter().map(|late| late.absent.left()).sum()
    }

    fn places(&self) -> String {
        let mut named = Vec::new();
        for (number, late) in self.disks.iter().enumerate() {
            let left = late.absent.left();
            if let Some(first) = late.absent.next(0, u64::MAX) {
                named.push(format!(
                    "{left} bytes of disk {number}, the first at {:#x}",
                    first.start
                ));
            }
        }
        named.join(", ")
    }

    fn release(&mut self) -> io::Result<()> {
        // Of a guest that does not come, nothing is needed.
        if self.left() > 0 {
            return Ok(());
        }
        self.disks.iter().try_for_each(|late| late.disk.flush())
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        // Nobody brings it any more.
        for late in &self.disks {
            if late.absent.any() {
                late.absent.lose();
            }
        }
    }
}
