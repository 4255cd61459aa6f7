//! Where things lie in a guest's physical address space.
//!
//! ```text
//! 0 ......................... RAM, up to 3 GiB
//! MMIO_GAP_START (3 GiB) .... 32-bit device windows, ECAM, IOAPIC, LAPIC
//! 4 GiB ..................... the rest of RAM
//! ```

use vm_memory::GuestAddress;

/// First address of the hole below 4 GiB.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// First address behind the hole.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// The RAM of a guest with `size` bytes: (address, length) in order.
#[must_use]
pub fn regions(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(MMIO_GAP_START);
    let mut out = vec![(GuestAddress(0), low)];
    if size > low {
        out.push((GuestAddress(MMIO_GAP_END), size - low));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn regions_hold_all_bytes_and_leave_the_hole_free(pages in 1u64..(1 << 28)) {
            let size = pages << 12;
            let regions = regions(size);
            prop_assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), size);
            for (start, len) in &regions {
                let end = start.0 + len;
                prop_assert!(end <= MMIO_GAP_START || start.0 >= MMIO_GAP_END);
            }
        }
    }
}
