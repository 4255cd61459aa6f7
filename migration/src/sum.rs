//! What both ends compare in the end, where that is wanted.

use std::io;

use blanket_memory::GuestRam;
use blanket_memory::dirty::PAGE;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::disk::Disks;
use crate::wire::MOST_MEMORY;

/// What all memory and the disks add up to: each page's place and content, but
/// for zeros.
pub(crate) fn sum(ram: &GuestRam, disks: &Disks) -> io::Result<u64> {
    let mut sum = 0u64;
    let mut add = |place: &[u64], page: &[u8]| {
        if page.iter().any(|byte| *byte != 0) {
            let mut hasher = crc32fast::Hasher::new();
            place
                .iter()
                .for_each(|number| hasher.update(&number.to_le_bytes()));
            hasher.update(page);
            sum = sum
                .wrapping_mul(31)
                .wrapping_add(u64::from(hasher.finalize()));
        }
    };
    let mut page = [0; PAGE];
    for region in ram.iter() {
        for offset in (0..region.len()).step_by(PAGE) {
            region
                .read_slice(&mut page, MemoryRegionAddress(offset))
                .map_err(io::Error::other)?;
            add(&[region.start_addr().0 + offset], &page);
        }
    }
    let mut piece = vec![0; MOST_MEMORY];
    for (index, disk) in disks.iter().enumerate() {
        let mut at = 0;
        while let Some(data) = disk.next_data(at)? {
            // Pages, wherever data begin.
            at = data.start / PAGE as u64 * PAGE as u64;
            while at < data.end {
                let len = (disk.capacity() - at).min(MOST_MEMORY as u64) as usize;
                disk.read(at, &mut piece[..len])?;
                for (number, page) in piece[..len].chunks(PAGE).enumerate() {
                    add(&[index as u64, at + (number * PAGE) as u64], page);
                }
                at += len as u64;
            }
        }
    }
    Ok(sum)
}
