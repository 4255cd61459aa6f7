//! Garbage to configuration space, BARs, ports and unused addresses.

use blanket_firmware::boot;
use blanket_firmware::console::COM1;
use blanket_firmware::io::{Width, in8, in16, in32, load, out8, out16, out32, store};
use blanket_firmware::pci::{CONFIG_SIZE, Function};
use blanket_firmware::power::is_power_port;
use blanket_firmware::random::Random;

use super::Target;

const CONFIG_WRITES: u64 = 64;
const BAR_WRITES: u64 = 64;
const PORT_WRITES: u64 = 64;
const ADDRESS_WRITES: u64 = 64;
const CAP_MSI: u8 = 5;
const CAP_MSIX: u8 = 17;
/// The bits of a message's delivery mode that make it more than an interrupt
/// (NMI, SMI, INIT): those would end the guest, not try the monitor.
const UNWANTED_DELIVERY: u64 = 0x600;

/// Garbage to the configuration space, by memory and by ports: to each
/// register once if `all`, else to some.
pub(crate) fn configuration(function: &Function, random: &mut Random, all: bool) {
    let writes = if all { CONFIG_SIZE / 4 } else { CONFIG_WRITES };
    for i in 0..writes {
        let offset = if all {
            4 * i
        } else {
            // Most registers that do something lie in the first 256 bytes.
            let end = random.pick(&[0x40, 0x100, 0x100, CONFIG_SIZE]);
            random.below(end - 8)
        };
        let width = random.pick(&Width::ALL);
        let value = random.nasty();
        if offset < 0x100 && random.one_in(2) {
            function.write_by_port(offset as u8, width, value);
        } else {
            function.write(offset, width, value);
        }
        let _ = function.read(offset, width);
    }
}

/// Takes back what would let the function interrupt with a garbage message.
pub(crate) fn disarm(function: &Function) {
    for (offset, id) in function.capabilities() {
        if id == CAP_MSI {
            function.write(offset + 2, Width::Word, 0);
        }
    }
}

/// Bytes of BAR `index` that hold the MSI-X table.
fn msix_table(function: &Function, index: usize) -> core::ops::Range<u64> {
    let Some((capability, _)) = function.capabilities().find(|&(_, id)| id == CAP_MSIX) else {
        return 0..0;
    };
    let entries = (function.read(capability + 2, Width::Word) & 0x7ff) + 1;
    let table = function.read(capability + 4, Width::Long);
    if table & 7 != index as u64 {
        return 0..0;
    }
    (table & !7)..(table & !7) + 16 * entries
}

/// Garbage to all memory BARs.
pub(crate) fn bars(target: &Target, random: &mut Random) {
    for (index, bar) in target.bars.iter().enumerate().filter(|(_, b)| b.size > 16) {
        if bar.address + bar.size > boot::mapped_end() {
            continue;
        }
        let table = msix_table(&target.function, index);
        for _ in 0..BAR_WRITES {
            let end = random.pick(&[64, 4096, bar.size]).min(bar.size);
            let mut offset = random.below(end - 8);
            let mut width = random.pick(&Width::ALL);
            let mut value = random.nasty();
            if offset + 8 > table.start && offset < table.end {
                (offset, width) = (offset & !3, Width::Long);
                if offset & 12 == 8 {
                    value &= !UNWANTED_DELIVERY;
                }
            }
            let mut address = bar.address + offset;
            if let Some(device) = target.virtio {
                (address, width, value) = device.harmless(address, width, value);
            }
            // SAFETY: a device's BAR, in the identity map.
            unsafe {
                store(address, width, value);
                let _ = load(address, width);
            }
        }
    }
}

/// Garbage to ports, but to those that end the machine.
pub(crate) fn ports(random: &mut Random) {
    for _ in 0..PORT_WRITES {
        let port = match random.below(4) {
            0 => COM1 + 1 + random.below(7) as u16,
            1 => 0x600 + random.below(0x20) as u16,
            2 => random.below(0x100) as u16,
            _ => random.bits() as u16,
        };
        if is_power_port(port) || (COM1 - 3..=COM1).contains(&port) {
            continue;
        }
        let value = random.nasty();
        match random.below(3) {
            0 => {
                out8(port, value as u8);
                let _ = in8(port);
            }
            1 => {
                out16(port, value as u16);
                let _ = in16(port);
            }
            _ => {
                out32(port, value as u32);
                let _ = in32(port);
            }
        }
    }
}

/// Garbage to addresses in the holes, where no device may be.
pub(crate) fn addresses(random: &mut Random) {
    for _ in 0..ADDRESS_WRITES {
        // The interrupt controllers at 0xfec00000 would end the guest.
        let address = if random.one_in(2) {
            0xc000_0000 + random.below(0x3ec0_0000 - 8)
        } else {
            random.below(boot::mapped_end()) | 1 << 32
        };
        if address + 8 > boot::mapped_end() {
            continue;
        }
        let width = random.pick(&Width::ALL);
        // SAFETY: mapped, and this program's memory lies below 16 MiB.
        unsafe {
            store(address, width, random.nasty());
            let _ = load(address, width);
        }
    }
}
