//! Memory that is missing.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use blanket_memory::GuestRam;
use blanket_memory::dirty::{PAGE, Pages};
use blanket_memory::uffd::Uffd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::fetch::{Missing, Piece, Stop};
use crate::squeeze;
use crate::status::{Following, Status};
use crate::wire::{self, Kind, MEMORY};

/// Bytes that are asked for at once.
const PIECE: usize = 64 << 10;
/// Runs of pages that a report names.
const NAMED: usize = 4;

/// A region of memory.
struct Region {
    start: u64,
    len: u64,
    host: u64,
}

/// Pages, on which a userfaultfd tells who waits.
pub(super) struct Memory<'a> {
    uffd: &'a Uffd,
    ram: &'a GuestRam,
    regions: Vec<Region>,
    missing: Pages,
    /// Those that are missing and have not been asked for.
    rest: Pages,
    /// How many are missing.
    left: u64,
    /// Where somebody waits.
    waits: BTreeSet<u64>,
    /// Where it is gone on with: region and page.
    next: (usize, usize),
}

impl<'a> Memory<'a> {
    pub(super) fn new(missing: Pages, uffd: &'a Uffd, ram: &'a GuestRam) -> Self {
        let region = |it: &vm_memory::GuestRegionMmap<_>| Region {
            start: it.start_addr().0,
            len: it.len(),
            host: it.as_ptr() as u64,
        };
        Self {
            uffd,
            ram,
            regions: ram.iter().map(region).collect(),
            rest: missing.clone(),
            left: missing.count(),
            missing,
            waits: BTreeSet::new(),
            next: (0, 0),
        }
    }

    /// The region and the first page of whole pages in one region.
    fn locate(&self, at: u64, len: u64) -> Option<(usize, usize)> {
        let end = at.checked_add(len)?;
        let holds = |it: &Region| it.start <= at && end <= it.start + it.len;
        let region = self.regions.iter().position(holds)?;
        let whole = len > 0 && (at | len).is_multiple_of(PAGE as u64);
        let page = (at - self.regions[region].start) as usize / PAGE;
        whole.then_some((region, page))
    }

    /// Puts pages where they are missing; `None` for zeros. Those that are there
    /// are the guest's own by now.
    fn put(&mut self, at: u64, len: u64, bytes: Option<&[u8]>) -> Result<(), Stop> {
        let place = self.locate(at, len);
        let (region, first) = place.ok_or(Stop::Stream(wire::Error::Damaged(
            "memory at another place",
        )))?;
        let end = first + len as usize / PAGE;
        let mut page = first;
        while let Some((start, count)) = self
            .missing
            .next_run(region, page, end.saturating_sub(page))
            .filter(|(start, _)| *start < end)
        {
            let count = count.min(end - start);
            let host = self.regions[region].host + (start * PAGE) as u64;
            let filled = match bytes {
                Some(bytes) => {
                    let from = (start - first) * PAGE;
                    self.uffd.fill(host, &bytes[from..from + count * PAGE])
                }
                None => self.uffd.fill_zeros(host, count * PAGE),
            };
            filled.map_err(Stop::Kernel)?;
            for page in start..start + count {
                self.missing.remove(region, page);
                self.rest.remove(region, page);
                let address = self.regions[region].start + (page * PAGE) as u64;
                self.waits.remove(&address);
            }
            self.left -= count as u64;
            page = start + count;
            if page >= end {
                break;
            }
        }
        Ok(())
    }
}

impl Missing for Memory<'_> {
    fn status<'a>(&self, status: &'a mut Status) -> &'a mut Option<Following> {
        &mut status.following
    }

    fn touched(&self) -> RawFd {
        self.uffd.as_fd().as_raw_fd()
    }

    fn take_touched(&mut self) -> io::Result<Vec<Piece>> {
        let mut all = Vec::new();
        while let Some(fault) = self.uffd.fault()? {
            let host = fault.address & !(PAGE as u64 - 1);
            let region = self
                .regions
                .iter()
                .position(|it| (it.host..it.host + it.len).contains(&host));
            let Some(region) = region else {
                return Err(io::Error::other("a fault where no guest memory is"));
            };
            let offset = host - self.regions[region].host;
            let page = offset as usize / PAGE;
            if !self.missing.contains(region, page) {
                // Nothing was there, or it has come meanwhile.
                self.uffd.fill_zeros(host, PAGE)?;
                continue;
            }
            let at = self.regions[region].start + offset;
            if self.waits.insert(at) {
                // What is beside it may well be next.
                self.next = (region, page + 1);
                all.push(Piece {
                    of: MEMORY,
                    at,
                    len: PAGE as u64,
                });
            }
        }
        Ok(all)
    }

    fn next(&mut self) -> Option<Piece> {
        let count = self.regions.len();
        // Once around, and the start of the region where it began.
        for _ in 0..=count {
            let (region, page) = self.next;
            if let Some((start, pages)) = self.rest.next_run(region, page, PIECE / PAGE) {
                self.next.1 = start + pages;
                (start..start + pages).for_each(|page| self.rest.remove(region, page));
                return Some(Piece {
                    of: MEMORY,
                    at: self.regions.get(region)?.start + (start * PAGE) as u64,
                    len: (pages * PAGE) as u64,
                });
            }
            self.next = ((region + 1) % count.max(1), 0);
        }
        None
    }

    fn again(&mut self, piece: Piece) {
        let Some((region, page)) = self.locate(piece.at, piece.len) else {
            return;
        };
        for page in page..page + piece.len as usize / PAGE {
            if self.missing.contains(region, page) {
                self.rest.insert(region, page);
            }
        }
    }

    fn lacks(&self, piece: Piece) -> Result<bool, wire::Error> {
        let place = self.locate(piece.at, piece.len);
        let (region, page) = place.ok_or(wire::Error::Damaged("memory at another place"))?;
        let mut pages = page..page + piece.len as usize / PAGE;
        Ok(pages.any(|page| self.missing.contains(region, page)))
    }

    fn place(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Stop> {
        let damaged = |what| Stop::Stream(wire::Error::Damaged(what));
        match kind {
            Kind::Pages => {
                let (at, bytes) = payload
                    .split_first_chunk()
                    .ok_or(damaged("memory without a place"))?;
                self.put(u64::from_le_bytes(*at), bytes.len() as u64, Some(bytes))
            }
            Kind::Lz4 => {
                let (at, bytes) = squeeze::unpack(payload)?;
                self.put(at, bytes.len() as u64, Some(&bytes))
            }
            Kind::Zeros => {
                let (ranges, rest) = payload.as_chunks::<16>();
                if !rest.is_empty() {
                    return Err(damaged("a part of a range"));
                }
                for range in ranges {
                    let (numbers, _) = range.as_chunks::<8>();
                    let [at, len] = [0, 1].map(|i: usize| u64::from_le_bytes(numbers[i]));
                    self.put(at, len, None)?;
                }
                Ok(())
            }
            _ => Err(damaged("its parts are not in order")),
        }
    }

    fn left(&self) -> u64 {
        self.left * PAGE as u64
    }

    fn places(&self) -> String {
        let runs = self.missing.runs(self.ram, usize::MAX);
        let named = runs.iter().take(NAMED);
        let named: Vec<_> = named
            .map(|(at, len)| format!("{:#x}-{:#x}", at.0, at.0 + *len as u64 - 1))
            .collect();
        let more = runs.len().saturating_sub(NAMED);
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more ranges"),
        };
        named.join(", ") + &more
    }

    /// Nothing is missing any more; or is not needed.
    fn release(&mut self) -> io::Result<()> {
        for region in &self.regions {
            self.uffd.unregister(region.host, region.len)?;
        }
        Ok(())
    }
}
