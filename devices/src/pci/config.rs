//! A function's configuration space (PCI Local Bus 3.0, 6.1).

use serde::{Deserialize, Serialize};

/// Offset of the command register.
pub const COMMAND: usize = 0x04;
/// Command bit: the function answers in memory space.
pub const COMMAND_MEMORY: u8 = 1 << 1;
/// Offset of the first BAR.
pub const BAR0: usize = 0x10;
/// First offset for capabilities.
const FIRST_CAPABILITY: usize = 0x40;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_POINTER: usize = 0x34;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass and programming interface (24 bits).
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// 256 bytes of configuration space and which of their bits are writable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    last_capability: usize,
    next_free: usize,
}

/// The bytes, as a snapshot carries them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    bytes: Vec<u8>,
}

impl ConfigSpace {
    /// A type 0 header without BARs or capabilities.
    #[must_use]
    pub fn new(id: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; 256],
            writable: [0; 256],
            last_capability: CAPABILITY_POINTER,
            next_free: FIRST_CAPABILITY,
        };
        space.set(0x00, &id.vendor.to_le_bytes());
        space.set(0x02, &id.device.to_le_bytes());
        space.set(0x08, &[id.revision]);
        space.set(0x09, &id.class.to_le_bytes()[..3]);
        space.set(0x2c, &id.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &id.subsystem.to_le_bytes());
        // Memory space, bus mastering, INTx disable.
        space.writable[COMMAND] = 0x06;
        space.writable[COMMAND + 1] = 0x04;
        // Interrupt line: scratch for the guest.
        space.writable[0x3c] = 0xff;
        space
    }

    /// Sets bytes as the device's maker, whatever is writable.
    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes BARs 0 and 1 a 64-bit memory BAR of `size` bytes (a power of two,
    /// at least 16) at `base`.
    pub fn set_bar64(&mut self, base: u64, size: u64) {
        debug_assert!(size.is_power_of_two() && base.is_multiple_of(size));
        self.set(BAR0, &(base | 0b100).to_le_bytes());
        self.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Where the 64-bit BAR is, if the function decodes memory.
    #[must_use]
    pub fn bar64(&self) -> Option<u64> {
        let mut bar = [0; 8];
        bar.copy_from_slice(&self.bytes[BAR0..BAR0 + 8]);
        (self.bytes[COMMAND] & COMMAND_MEMORY != 0).then(|| u64::from_le_bytes(bar) & !0xf)
    }

    /// Turns memory decoding on or off, as firmware would.
    pub fn enable_memory(&mut self, on: bool) {
        self.bytes[COMMAND] =
            (self.bytes[COMMAND] & !COMMAND_MEMORY) | if on { COMMAND_MEMORY } else { 0 };
    }

    /// Appends a capability: its ID, and its body behind the two header bytes
    /// with the bits of the body that the guest may write. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_free;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        // The list's tail: the pointer in the header or the last "next" byte.
        let link = if self.last_capability == CAPABILITY_POINTER {
            CAPABILITY_POINTER
        } else {
            self.last_capability + 1
        };
        self.bytes[link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_capability = at;
        self.next_free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Reads at `offset`; what lies behind the 256 bytes reads as zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits at `offset`.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, new) in data.iter().enumerate() {
            let Some(byte) = self.bytes.get_mut(offset + i) else {
                return;
            };
            let mask = self.writable[offset + i];
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// The bytes, to be saved.
    #[must_use]
    pub fn save(&self) -> ConfigState {
        ConfigState {
            bytes: self.bytes.to_vec(),
        }
    }

    /// Takes over the writable bits of saved bytes. False (and no change) if
    /// the state is another function's.
    #[must_use]
    pub fn restore(&mut self, state: &ConfigState) -> bool {
        let same = state.bytes.len() == self.bytes.len()
            && (0..self.bytes.len())
                .all(|i| (state.bytes[i] ^ self.bytes[i]) & !self.writable[i] == 0);
        if same {
            self.bytes.copy_from_slice(&state.bytes);
        }
        same
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_00_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 1,
        });
        space.set_bar64(0xc000_0000, 0x8000);
        space
    }

    fn read32(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        assert_eq!(space.bar64(), None, "off until memory space is enabled");
        space.write(COMMAND, &[0x02]);
        assert_eq!(space.bar64(), Some(0xc000_0000));
        space.write(BAR0, &[0xff; 4]);
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(read32(&space, BAR0), 0xffff_8004);
        assert_eq!(read32(&space, BAR0 + 4), 0xffff_ffff);
        space.write(BAR0, &0xd000_0123u32.to_le_bytes());
        space.write(BAR0 + 4, &[0; 4]);
        assert_eq!(space.bar64(), Some(0xd000_0000));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[0; 14], &[]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        assert_eq!(read32(&space, 0x34) & 0xff, first as u32);
        assert_eq!(read32(&space, first) & 0xffff, (second as u32) << 8 | 9);
        space.write(second + 2, &[0xff, 0xff]);
        assert_eq!(read32(&space, second) >> 16, 0xc000);
    }

    proptest! {
        #[test]
        fn no_access_panics_or_changes_identity(
            accesses in prop::collection::vec((0usize..5000, prop::collection::vec(any::<u8>(), 0..9)), 0..50)
        ) {
            let mut space = space();
            for (offset, data) in accesses {
                space.write(offset, &data);
                space.read(offset, &mut data.clone());
            }
            prop_assert_eq!(read32(&space, 0), 0x1041_1af4);
            let mut other = self::space();
            prop_assert!(other.restore(&space.save()));
            prop_assert_eq!(other, space);
        }
    }
}
