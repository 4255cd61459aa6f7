//! Memory: its map, the table of frames, and the balloon.

use blanket_memory::dirty;
use blanket_pv_shim::layout;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Hypercall, Result};
use crate::pv::abi::{Errno, PAGE_SIZE};

const INCREASE_RESERVATION: u64 = 0;
const DECREASE_RESERVATION: u64 = 1;
const MAXIMUM_RAM_PAGE: u64 = 2;
const CURRENT_RESERVATION: u64 = 3;
const MAXIMUM_RESERVATION: u64 = 4;
const POPULATE_PHYSMAP: u64 = 6;
const MEMORY_MAP: u64 = 9;
const MACHPHYS_MAPPING: u64 = 12;
/// `XENFEAT`-independent: extents of one call that are worked on at a time.
const BATCH: u64 = 1024;
/// Type of usable memory in a memory map.
const E820_RAM: u32 = 1;
/// Where the command's continuation begins in its number.
const CONTINUED: u32 = 6;

impl Hypercall<'_> {
    pub(super) fn memory_op(&self) -> Result {
        let [command, argument, ..] = self.arguments;
        let start = command >> CONTINUED;
        let pages = self.domain.memory / PAGE_SIZE;
        match command & ((1 << CONTINUED) - 1) {
            MAXIMUM_RAM_PAGE => Ok(pages),
            CURRENT_RESERVATION => Ok(pages - self.domain.ballooned()),
            MAXIMUM_RESERVATION => Ok(pages),
            MEMORY_MAP => self.memory_map(argument),
            MACHPHYS_MAPPING => {
                let table = layout::VA + layout::M2P;
                let end = table + pages * 8;
                self.space().put(argument, [table, end, pages - 1])?;
                Ok(0)
            }
            DECREASE_RESERVATION => self.reservation(argument, start, |frame| self.give(frame)),
            POPULATE_PHYSMAP | INCREASE_RESERVATION => {
                self.reservation(argument, start, |frame| self.take(frame))
            }
            _ => Err(Errno::NoSys),
        }
    }

    /// `struct xen_memory_map`: entries that fit, where they go.
    fn memory_map(&self, argument: u64) -> Result {
        let space = self.space();
        let room: u32 = space.get(argument)?;
        let buffer: u64 = space.get(argument.wrapping_add(8))?;
        if room == 0 {
            return Err(Errno::Inval);
        }
        space.put(buffer, [0, self.domain.memory])?;
        space.put(buffer.wrapping_add(16), E820_RAM)?;
        space.put(argument, 1u32)?;
        Ok(0)
    }

    /// `struct xen_memory_reservation`: does something with each of its frames
    /// (machine and domain frames are the same). The result is how many frames
    /// were done; the guest calls again for the rest.
    fn reservation(&self, argument: u64, start: u64, mut each: impl FnMut(u64) -> bool) -> Result {
        let space = self.space();
        let [list, count]: [u64; 2] = space.get(argument)?;
        let order: u32 = space.get(argument.wrapping_add(16))?;
        if order != 0 {
            return Err(Errno::Perm);
        }
        let end = count.min(start.saturating_add(BATCH));
        for i in start..end {
            let frame: u64 = space.get(list.wrapping_add(i * 8))?;
            if !each(frame) {
                return Ok(i);
            }
        }
        Ok(end)
    }

    /// Takes a page from the guest: its content is gone.
    fn give(&self, frame: u64) -> bool {
        let done = self.page(frame).is_some_and(|(page, shared)| {
            // Of a file, only a hole gives the memory back.
            let advice = if shared {
                libc::MADV_REMOVE
            } else {
                libc::MADV_DONTNEED
            };
            // SAFETY: the page is guest memory, mapped as long as the domain
            // lives; nothing holds references into it.
            unsafe { libc::madvise(page.cast(), PAGE_SIZE as usize, advice) == 0 }
        });
        if done {
            dirty::mark(
                &self.domain.ram,
                GuestAddress(frame * PAGE_SIZE),
                PAGE_SIZE as usize,
            );
            self.domain.balloon(1);
        }
        done
    }

    /// Gives it back: an empty page is there when it is touched.
    fn take(&self, frame: u64) -> bool {
        let done = self.page(frame).is_some() && self.domain.ballooned() > 0;
        if done {
            self.domain.balloon(-1);
        }
        done
    }

    /// Where the monitor has a page of the guest, and whether a file backs it.
    fn page(&self, frame: u64) -> Option<(*mut u8, bool)> {
        let at = frame.checked_mul(PAGE_SIZE)?;
        if at >= self.domain.memory {
            return None;
        }
        let region = self.domain.ram.find_region(GuestAddress(at))?;
        let offset = at - region.start_addr().0;
        // SAFETY: the offset is within the region's mapping.
        let page = unsafe { region.as_ptr().add(offset as usize) };
        Some((page, region.file_offset().is_some()))
    }
}
