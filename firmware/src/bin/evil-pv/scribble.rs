//! Garbage in what guest and hypervisor share.

use blanket_firmware::io::{Width, store};
use blanket_firmware::random::Random;

use crate::Mode;
use crate::entry::Info;

/// Where the hypervisor's area and all of memory are in every address space.
const AREA: u64 = 0xffff_8080_0000_0000;
const DIRECT_MAP: u64 = 0xffff_8100_0000_0000;
/// In the area: shared_info, doorbells and the grant table.
const SHARED: u64 = 0x2_2000;
/// In the area: its page tables, and the vCPUs' parts.
const TABLES: (u64, u64) = (0x10_0000, 0x8_0000);
const VCPU: (u64, u64) = (0x20_0000, 0x4_0000);
/// Of a vCPU's part: code, data, descriptors, stacks, and segments.
const PARTS: [u64; 9] = [
    0, 0x4000, 0x5000, 0x6000, 0x8000, 0x9000, 0xa000, 0x1_0000, 0x1_e000,
];
const PAGE: u64 = 4096;
/// In `shared_info`: where the first vCPU is told that events are masked. A
/// tame run keeps them so: it has no handler for them.
const UPCALL_MASK: u64 = 1;

/// Some writes.
pub(crate) fn step(mode: Mode, info: &Info, random: &mut Random) {
    for _ in 0..=random.below(32) {
        let Some(address) = target(mode, info, random) else {
            continue;
        };
        let width = random.pick(&Width::ALL);
        let value = if random.one_in(2) {
            random.nasty()
        } else {
            random.below(32)
        };
        // SAFETY: this program's only purpose is to write there, and it cannot
        // harm itself more than it means to.
        unsafe { store(address, width, value) }
    }
}

fn target(mode: Mode, info: &Info, random: &mut Random) -> Option<u64> {
    let ring = |frame: u64, random: &mut Random| {
        // Data, or (more often) the indices behind it.
        let offset = if random.one_in(2) { 2048 } else { 3072 };
        frame * PAGE + if random.one_in(4) { 0 } else { offset } + random.below(24)
    };
    match mode {
        Mode::Calls | Mode::Wild => None,
        _ if random.one_in(4) => Some(ring(info.store, random)),
        _ if random.one_in(4) => Some(ring(info.console, random)),
        Mode::Shim if random.one_in(2) => {
            let part = random.pick(&PARTS) + random.below(PAGE);
            Some(AREA + VCPU.0 + part % VCPU.1)
        }
        Mode::Shim if random.one_in(3) => Some(AREA + TABLES.0 + random.below(TABLES.1)),
        Mode::Tables if random.one_in(2) => {
            // Low-half tables start at the top one; through either mapping.
            let offset = random.below(info.table_pages.clamp(1, 64) * PAGE);
            let view = if random.one_in(2) { DIRECT_MAP } else { 0 };
            Some(view + info.tables % (info.pages * PAGE).max(1) + offset)
        }
        Mode::Shared => {
            let offset = random.below(SHARED);
            (offset.abs_diff(UPCALL_MASK) > 8).then_some(AREA + offset)
        }
        _ => Some(AREA + random.below(SHARED)),
    }
}
