//! Where the builder puts things, and the page tables that show them.

use std::ops::Range;

use blanket_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::notes::Notes;
use crate::pv::abi::PAGE_SIZE;

/// Entries of a page table, and bits of an index into one.
const ENTRIES: u64 = 512;
const INDEX_BITS: u64 = 9;
/// Bytes that one lowest table maps.
const TABLE_SPAN: u64 = PAGE_SIZE * ENTRIES;
/// Present, writable, accessible to the kernel in ring 3, accessed, dirty.
const WRITABLE: u64 = 0x67;
/// At least so many bytes are mapped behind the boot stack, and the mapping
/// ends at a multiple of the second: part of the ABI (`xen.h`).
const SLACK: u64 = 512 << 10;
const MAPPED_TO: u64 = 4 << 20;
/// Bytes that one L2 table maps: the kernel's mapping has one.
const L2_SPAN: u64 = TABLE_SPAN * ENTRIES;
/// Bytes that one L3 table maps.
const L3_SPAN: u64 = L2_SPAN * ENTRIES;
/// Entries of the top table that are the hypervisor's (`xen-x86_64.h`).
const HYPERVISOR: Range<u64> = 256..272;

/// Physical addresses of all that lies behind the kernel, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    virt_base: u64,
    init_p2m: u64,
    /// Bytes of memory.
    memory: u64,
    pub(super) start_info: u64,
    pub(super) store: u64,
    pub(super) console: u64,
    pub(super) tables: Range<u64>,
    pub(super) stack: u64,
    /// The table of frames.
    pub(super) frames: u64,
    pub(super) initrd: u64,
    /// First byte behind everything.
    pub(super) end: u64,
    /// First byte that the kernel's mapping does not show.
    mapped: u64,
}

impl Layout {
    /// For a kernel that ends at `kernel_end`, in a domain of `memory` bytes
    /// (whole pages) with `initrd` bytes of initrd. None if the mapping would
    /// not fit into a gigabyte, or the notes ask for impossible addresses.
    pub(super) fn new(notes: &Notes, kernel_end: u64, memory: u64, initrd: u64) -> Option<Self> {
        let Notes {
            virt_base,
            init_p2m,
            ..
        } = *notes;
        let aligned = virt_base % L2_SPAN == 0 && init_p2m % L3_SPAN == 0;
        let (kernel_slot, frames_slot) = (index(virt_base, 4), index(init_p2m, 4));
        let free = |slot| !HYPERVISOR.contains(&slot);
        let distinct = kernel_slot != frames_slot && free(kernel_slot) && free(frames_slot);
        let started = (virt_base..virt_base.saturating_add(kernel_end)).contains(&notes.entry);
        if !aligned || !distinct || !started || kernel_end > L2_SPAN || memory > L3_SPAN {
            return None;
        }
        let start_info = kernel_end.next_multiple_of(PAGE_SIZE);
        let store = start_info + PAGE_SIZE;
        let console = store + PAGE_SIZE;
        let first_table = console + PAGE_SIZE;
        let frame_pages = frame_pages(memory);
        let mut kernel_tables = 1;
        // More tables map more, which may need one more.
        let (tables, mapped) = loop {
            let pages = 1 + 2 + 2 + kernel_tables + frame_pages.div_ceil(ENTRIES);
            let end = first_table + pages * PAGE_SIZE;
            let mapped = (end + PAGE_SIZE + SLACK).next_multiple_of(MAPPED_TO);
            let needed = mapped.div_ceil(TABLE_SPAN);
            if needed <= kernel_tables {
                break (first_table..end, mapped);
            }
            kernel_tables = needed;
        };
        if mapped > L2_SPAN {
            return None;
        }
        let stack = tables.end;
        let frames = stack + PAGE_SIZE;
        let initrd_at = frames + frame_pages * PAGE_SIZE;
        let end = initrd_at.checked_add(initrd)?;
        Some(Self {
            virt_base,
            init_p2m,
            memory,
            start_info,
            store,
            console,
            tables,
            stack,
            frames,
            initrd: initrd_at,
            end,
            mapped: mapped.min(memory),
        })
    }

    /// Pages of the table of frames.
    pub(super) fn frame_pages(&self) -> u64 {
        frame_pages(self.memory)
    }

    /// The kernel's virtual address of a physical one.
    pub(super) fn virt(&self, address: u64) -> u64 {
        self.virt_base + address
    }

    /// Writes the page tables: the kernel's mapping, and that of the table of
    /// frames. The kernel may write them: what it writes reaches no further than
    /// its own memory.
    pub(super) fn write_page_tables(&self, ram: &GuestRam) -> Result<(), GuestMemoryError> {
        let table = |index: u64| self.tables.start + index * PAGE_SIZE;
        let (l4, l3, l3_frames, l2, l2_frames, l1) =
            (table(0), table(1), table(2), table(3), table(4), table(5));
        let kernel_tables = self.mapped.div_ceil(TABLE_SPAN);
        let frame_tables = self.frame_pages().div_ceil(ENTRIES);
        let l1_frames = self.tables.end - frame_tables * PAGE_SIZE;

        // The table of frames starts at a multiple of an L3 table's span.
        let top = [
            (index(self.virt_base, 4), l3, 1),
            (index(self.init_p2m, 4), l3_frames, 1),
        ];
        write_upper(ram, l4, &top)?;
        write_upper(ram, l3, &[(index(self.virt_base, 3), l2, 1)])?;
        write_upper(ram, l2, &[(0, l1, kernel_tables)])?;
        // The table of frames starts at a multiple of an L3 table's span.
        write_upper(ram, l3_frames, &[(0, l2_frames, 1)])?;
        write_upper(ram, l2_frames, &[(0, l1_frames, frame_tables)])?;
        Self::write_leaves(ram, l1, 0..self.mapped)?;
        let frames = self.frames..self.frames + self.frame_pages() * PAGE_SIZE;
        Self::write_leaves(ram, l1_frames, frames)
    }

    /// Lowest tables from `at` on that map the pages of `range`.
    fn write_leaves(ram: &GuestRam, at: u64, range: Range<u64>) -> Result<(), GuestMemoryError> {
        let pages: Vec<u64> = range.step_by(PAGE_SIZE as usize).collect();
        for (i, pages) in pages.chunks(ENTRIES as usize).enumerate() {
            let mut entries = Table::default();
            for (slot, page) in (0..).zip(pages) {
                entries.set(slot, page | WRITABLE);
            }
            entries.write(ram, at + i as u64 * PAGE_SIZE)?;
        }
        Ok(())
    }

    /// Writes the table of frames: every frame is its own machine frame.
    pub(super) fn write_frames(&self, ram: &GuestRam) -> Result<(), GuestMemoryError> {
        let count = self.memory / PAGE_SIZE;
        for page in 0..self.frame_pages() {
            let mut entries = Table::default();
            let first = page * ENTRIES;
            for slot in 0..ENTRIES.min(count - first) {
                entries.set(slot, first + slot);
            }
            entries.write(ram, self.frames + page * PAGE_SIZE)?;
        }
        Ok(())
    }
}

/// Writes a table above the lowest, with runs of tables: (slot, first, count).
fn write_upper(ram: &GuestRam, at: u64, runs: &[(u64, u64, u64)]) -> Result<(), GuestMemoryError> {
    let mut entries = Table::default();
    for &(slot, first, count) in runs {
        for i in 0..count {
            entries.set(slot + i, (first + i * PAGE_SIZE) | WRITABLE);
        }
    }
    entries.write(ram, at)
}

fn frame_pages(memory: u64) -> u64 {
    (memory / PAGE_SIZE).div_ceil(ENTRIES)
}

/// Index of a virtual address in its table of `level` (1 is the lowest).
fn index(virt: u64, level: u64) -> u64 {
    (virt >> (12 + INDEX_BITS * (level - 1))) % ENTRIES
}

/// A page of 64-bit entries.
struct Table([u8; PAGE_SIZE as usize]);

impl Default for Table {
    fn default() -> Self {
        Self([0; PAGE_SIZE as usize])
    }
}

impl Table {
    /// `slot` is below [`ENTRIES`].
    fn set(&mut self, slot: u64, entry: u64) {
        let at = slot as usize * 8;
        self.0[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }

    fn write(&self, ram: &GuestRam, at: u64) -> Result<(), GuestMemoryError> {
        ram.write_slice(&self.0, GuestAddress(at))
    }
}
