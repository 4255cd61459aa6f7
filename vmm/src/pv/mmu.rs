//! The guest's virtual memory, as its hypercalls name it.

use blanket_memory::GuestRam;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::abi::{Errno, PAGE_SIZE};

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// An address space: what a page table of the guest maps. All of it may change
/// at any time, so each use walks anew.
#[derive(Clone, Copy)]
pub(crate) struct Space<'a> {
    ram: &'a GuestRam,
    cr3: u64,
}

impl<'a> Space<'a> {
    /// The one whose top page table is at `cr3`.
    #[must_use]
    pub(crate) fn new(ram: &'a GuestRam, cr3: u64) -> Self {
        Self { ram, cr3 }
    }

    /// Where a virtual address lies in guest memory.
    ///
    /// # Errors
    /// It is not mapped.
    pub(crate) fn translate(&self, va: u64) -> Result<GuestAddress, Errno> {
        let mut table = self.cr3 & ADDRESS;
        for level in (0..4).rev() {
            let shift = 12 + 9 * level;
            let slot = (va >> shift) % 512;
            let entry: u64 = self
                .ram
                .read_obj(GuestAddress(table + slot * 8))
                .map_err(|_| Errno::Fault)?;
            if entry & PRESENT == 0 {
                return Err(Errno::Fault);
            }
            if level == 0 || (level < 3 && entry & LARGE != 0) {
                let within = (1u64 << shift) - 1;
                return Ok(GuestAddress((entry & ADDRESS & !within) | (va & within)));
            }
            table = entry & ADDRESS;
        }
        Err(Errno::Fault)
    }

    /// Calls `part` for each piece of a range that lies in one page: its
    /// address, where it begins in the range, and its length.
    fn pieces(
        &self,
        va: u64,
        len: usize,
        mut part: impl FnMut(GuestAddress, usize, usize) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let at = va.checked_add(done as u64).ok_or(Errno::Fault)?;
            let room = (PAGE_SIZE - at % PAGE_SIZE) as usize;
            let piece = room.min(len - done);
            part(self.translate(at)?, done, piece)?;
            done += piece;
        }
        Ok(())
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Some are not mapped.
    pub(crate) fn read(&self, va: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.pieces(va, data.len(), |at, start, len| {
            self.ram
                .read_slice(&mut data[start..start + len], at)
                .map_err(|_| Errno::Fault)
        })
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// Some are not mapped.
    pub(crate) fn write(&self, va: u64, data: &[u8]) -> Result<(), Errno> {
        self.pieces(va, data.len(), |at, start, len| {
            self.ram
                .write_slice(&data[start..start + len], at)
                .map_err(|_| Errno::Fault)
        })
    }

    /// Reads a structure.
    ///
    /// # Errors
    /// It is not mapped.
    pub(crate) fn get<T: ByteValued + Default>(&self, va: u64) -> Result<T, Errno> {
        let mut value = T::default();
        self.read(va, value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes a structure.
    ///
    /// # Errors
    /// It is not mapped.
    pub(crate) fn put<T: ByteValued>(&self, va: u64, value: T) -> Result<(), Errno> {
        self.write(va, value.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    /// Maps 4 KiB pages 0 and 1 of `va` to frames 0x80 and 0x42.
    fn map(ram: &GuestRam, va: u64) {
        for (table, shift, entry) in [
            (0x1000, 39, 0x2001u64),
            (0x2000, 30, 0x3001),
            (0x3000, 21, 0x4001),
            (0x4000, 12, 0x8_0001),
        ] {
            let slot = (va >> shift) % 512;
            ram.write_obj(entry, GuestAddress(table + slot * 8))
                .unwrap();
        }
        let next = (va >> 12) % 512 + 1;
        ram.write_obj(0x4_2001u64, GuestAddress(0x4000 + next * 8))
            .unwrap();
    }

    #[test]
    fn ranges_go_over_pages_that_lie_apart() {
        let ram = ram();
        let va = 0xffff_8880_1234_5000;
        map(&ram, va);
        let space = Space::new(&ram, 0x1000);
        let data: Vec<u8> = (0..100).collect();
        space.write(va + 4096 - 50, &data).unwrap();
        let mut back = [0; 100];
        space.read(va + 4096 - 50, &mut back).unwrap();
        assert_eq!(back.as_slice(), data.as_slice());
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x4_2000)).unwrap(), 50);
        assert_eq!(space.get::<u8>(va + 8192), Err(Errno::Fault));
    }

    proptest! {
        #[test]
        fn no_page_table_leads_out_of_memory(cr3: u64, va: u64, entries: Vec<(u16, u64)>) {
            let ram = ram();
            for (slot, entry) in entries {
                ram.write_obj(entry, GuestAddress(u64::from(slot) * 8)).unwrap();
            }
            let mut data = [0; 5000];
            let _ = Space::new(&ram, cr3).read(va, &mut data);
            let _ = Space::new(&ram, cr3 % 0x2000).write(va, &data);
        }
    }
}
