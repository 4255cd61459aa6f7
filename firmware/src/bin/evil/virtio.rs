//! virtio over PCI as a driver sees it (virtio 1.2, 4.1).

use blanket_firmware::boot;
use blanket_firmware::io::{Width, load, store};
use blanket_firmware::pci::{Bar, Function};
use blanket_firmware::random::Random;

use super::arena::START_BIT;

const VENDOR: u16 = 0x1af4;
const CAP_VENDOR: u8 = 9;
const REGISTER_WRITES: usize = 96;
/// Reads of the status register before a device that does not reset counts
/// as lost.
const PATIENCE: u32 = 100_000;

/// Registers of the common configuration.
pub(crate) mod common {
    pub(crate) const FEATURE_SELECT: u64 = 0;
    pub(crate) const FEATURES: u64 = 4;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(crate) const DRIVER_FEATURES: u64 = 12;
    pub(crate) const MSIX_VECTOR: u64 = 16;
    pub(crate) const QUEUES: u64 = 18;
    pub(crate) const STATUS: u64 = 20;
    pub(crate) const QUEUE_SELECT: u64 = 22;
    pub(crate) const QUEUE_SIZE: u64 = 24;
    pub(crate) const QUEUE_MSIX_VECTOR: u64 = 26;
    pub(crate) const QUEUE_ENABLE: u64 = 28;
    pub(crate) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(crate) const QUEUE_DESC: u64 = 32;
    pub(crate) const QUEUE_DRIVER: u64 = 40;
    pub(crate) const QUEUE_DEVICE: u64 = 48;
    pub(crate) const END: u64 = 64;
}

/// A region of a device's BAR.
#[derive(Clone, Copy, Default)]
struct Region {
    address: u64,
    len: u64,
}

/// A virtio device's registers.
#[derive(Clone, Copy)]
pub(crate) struct Device {
    common: Region,
    notify: Region,
    notify_multiplier: u64,
    isr: Region,
    specific: Region,
}

impl Device {
    /// The registers of `function`, if it is a modern virtio device.
    pub(crate) fn find(function: &Function, bars: &[Bar; 6]) -> Option<Self> {
        if function.identity as u16 != VENDOR {
            return None;
        }
        let mut regions = [Region::default(); 6];
        let mut notify_multiplier = 0;
        for (capability, _) in function.capabilities().filter(|&(_, id)| id == CAP_VENDOR) {
            let kind = function.read(capability + 3, Width::Byte) as usize;
            let bar = function.read(capability + 4, Width::Byte) as usize;
            let (Some(bar), 1..=4) = (bars.get(bar), kind) else {
                continue;
            };
            let offset = function.read(capability + 8, Width::Long);
            let len = function.read(capability + 12, Width::Long);
            if bar.size != 0 && bar.address + bar.size <= boot::mapped_end() {
                let address = bar.address + offset;
                regions[kind] = Region { address, len };
            }
            if kind == 2 {
                notify_multiplier = function.read(capability + 16, Width::Long);
            }
        }
        let [_, common, notify, isr, specific, _] = regions;
        (common.address != 0 && notify.len >= 4).then_some(Self {
            common,
            notify,
            notify_multiplier,
            isr,
            specific,
        })
    }

    /// Reads a register of the common configuration.
    pub(crate) fn get(&self, register: u64, width: Width) -> u64 {
        // SAFETY: device memory in the identity map.
        unsafe { load(self.common.address + register, width) }
    }

    /// Writes a register of the common configuration.
    pub(crate) fn set(&self, register: u64, width: Width, value: u64) {
        // SAFETY: device memory in the identity map.
        unsafe { store(self.common.address + register, width, value) }
    }

    /// Resets the device; false if it does not confirm.
    pub(crate) fn reset(&self) -> bool {
        self.set(common::STATUS, Width::Byte, 0);
        (0..PATIENCE).any(|_| self.get(common::STATUS, Width::Byte) == 0)
    }

    /// Tells the device that the selected queue, `queue`, has work.
    pub(crate) fn kick(&self, queue: u16) {
        let slot = self.get(common::QUEUE_NOTIFY_OFF, Width::Word);
        let offset = (slot * self.notify_multiplier).min(self.notify.len - 4);
        // SAFETY: device memory in the identity map.
        unsafe { store(self.notify.address + offset, Width::Word, u64::from(queue)) }
    }

    /// Notifies anywhere, with anything, and reads what a driver would read.
    pub(crate) fn garbage_kick(&self, random: &mut Random) {
        let offset = random.below(self.notify.len - 3);
        let width = random.pick(&Width::ALL[..3]);
        // SAFETY: device memory in the identity map.
        unsafe {
            store(self.notify.address + offset, width, random.nasty());
            if self.isr.len != 0 {
                let _ = load(self.isr.address, Width::Byte);
            }
            if self.specific.len >= 8 {
                let at = self.specific.address + random.below(self.specific.len - 7);
                let _ = load(at, width);
                store(at, width, random.nasty());
            }
        }
    }

    /// Garbage to each register of the common configuration in any order.
    pub(crate) fn garbage_registers(&self, random: &mut Random) {
        for _ in 0..REGISTER_WRITES {
            let register = random.below(common::END.min(self.common.len) - 8);
            let width = random.pick(&Width::ALL);
            let (address, width, value) =
                self.harmless(self.common.address + register, width, random.nasty());
            // SAFETY: device memory in the identity map.
            unsafe {
                store(address, width, value);
                let _ = load(self.common.address + register, width);
            }
        }
    }

    /// The same write, unless it could make a queue address point at this
    /// program's own memory: then one that cannot.
    pub(crate) fn harmless(&self, address: u64, width: Width, value: u64) -> (u64, Width, u64) {
        let queues = self.common.address + common::QUEUE_DESC
            ..self.common.address + common::QUEUE_DEVICE + 8;
        if address + 8 <= queues.start || address >= queues.end {
            return (address, width, value);
        }
        let register = address.clamp(queues.start, queues.end - 1) & !7;
        (register, Width::Quad, value | START_BIT)
    }
}
