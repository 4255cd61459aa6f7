//! PCI functions, found and reached through ECAM (PCI Firmware Specification
//! 3.3, section 4.1).

use crate::acpi::Tables;
use crate::io::{Width, load, out8, out16, out32, store};

/// Bytes of a function's configuration space.
pub const CONFIG_SIZE: u64 = 4096;
/// Offset of the command register.
pub const COMMAND: u64 = 4;
/// Offset of the first base address register.
pub const BAR0: u64 = 0x10;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const MEMORY_AND_MASTER: u64 = 6;
const CAPABILITY_LIST: u64 = 1 << 4;
/// Capabilities that fit into the 192 bytes behind the header.
const CAPABILITIES_MAX: usize = 48;
/// Where BARs go that nobody has placed: the hole below 4 GiB.
const WINDOW: core::ops::Range<u64> = 0xc000_0000..0xfe00_0000;

/// The memory-mapped configuration space of PCI segment 0.
#[derive(Clone, Copy, Debug)]
pub struct Ecam {
    base: u64,
    first_bus: u8,
    last_bus: u8,
}

/// One PCI function.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    config: u64,
    /// Bus, device and function number as in a requester ID.
    pub id: u16,
    /// Vendor in the low 16 bits, device in the high ones.
    pub identity: u32,
}

/// A base address register that maps memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bar {
    /// First address; 0 if there is no such BAR.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    wide: bool,
}

impl Ecam {
    /// The first entry of the MCFG table.
    #[must_use]
    pub fn find(tables: &Tables) -> Option<Self> {
        let mcfg = tables.table(*b"MCFG")?;
        Some(Self {
            base: mcfg.field(44, Width::Quad),
            first_bus: mcfg.field(54, Width::Byte) as u8,
            last_bus: mcfg.field(55, Width::Byte) as u8,
        })
        .filter(|ecam| ecam.base != 0)
    }

    /// All functions that answer.
    pub fn functions(self) -> impl Iterator<Item = Function> {
        (self.first_bus..=self.last_bus)
            .flat_map(|bus| (0..=255u8).map(move |devfn| u16::from(bus) << 8 | u16::from(devfn)))
            .map(move |id| Function {
                config: self.base + (u64::from(id) << 12),
                id,
                identity: 0,
            })
            .filter_map(|function| {
                let identity = function.read(0, Width::Long) as u32;
                (identity as u16 != 0xffff).then_some(Function {
                    identity,
                    ..function
                })
            })
    }

    /// The next address from `from` on where a BAR of `size` bytes fits
    /// beside this space.
    fn place(self, from: u64, size: u64) -> u64 {
        let own = self.base..self.base + ((u64::from(self.last_bus) + 1) << 20);
        let address = from.next_multiple_of(size);
        if address < own.end && own.start < address + size {
            return own.end.next_multiple_of(size);
        }
        address
    }
}

impl Function {
    /// Reads configuration space. `offset` is below [`CONFIG_SIZE`].
    #[must_use]
    pub fn read(&self, offset: u64, width: Width) -> u64 {
        // SAFETY: ECAM is mapped, and there is device memory only.
        unsafe { load(self.config + offset, width) }
    }

    /// Writes configuration space. `offset` is below [`CONFIG_SIZE`].
    pub fn write(&self, offset: u64, width: Width, value: u64) {
        // SAFETY: ECAM is mapped, and there is device memory only.
        unsafe { store(self.config + offset, width, value) }
    }

    /// Writes the first 256 bytes of configuration space through the ports.
    pub fn write_by_port(&self, offset: u8, width: Width, value: u64) {
        out32(
            CONFIG_ADDRESS,
            1 << 31 | u32::from(self.id) << 8 | u32::from(offset & 0xfc),
        );
        let port = CONFIG_DATA + u16::from(offset & 3);
        match width {
            Width::Byte => out8(port, value as u8),
            Width::Word => out16(port, value as u16),
            Width::Long | Width::Quad => out32(port, value as u32),
        }
    }

    /// Whether this is a bridge of any kind (base class 6).
    #[must_use]
    pub fn is_bridge(&self) -> bool {
        self.read(0x0b, Width::Byte) == 6
    }

    /// Offsets of the capabilities with their identifiers.
    pub fn capabilities(&self) -> impl Iterator<Item = (u64, u8)> + '_ {
        let has_list = self.read(6, Width::Word) & CAPABILITY_LIST != 0;
        let mut next = if has_list {
            self.read(0x34, Width::Byte) & 0xfc
        } else {
            0
        };
        core::iter::from_fn(move || {
            let here = next;
            if here < 0x40 {
                return None;
            }
            next = self.read(here + 1, Width::Byte) & 0xfc;
            Some((here, self.read(here, Width::Byte) as u8))
        })
        .take(CAPABILITIES_MAX)
    }

    /// Measures the memory BARs, gives those without an address one from
    /// `free` on (which moves), and switches the function on.
    pub fn setup(&self, ecam: Ecam, free: &mut u64) -> [Bar; 6] {
        let mut bars = [Bar::default(); 6];
        if self.read(0x0e, Width::Byte) & 0x7f != 0 {
            return bars; // The header of a bridge has other registers there.
        }
        self.write(COMMAND, Width::Word, 0);
        let mut index = 0;
        while index < bars.len() {
            let mut bar = self.measure(index as u64);
            if bar.size != 0 && bar.address == 0 {
                bar.address = ecam.place((*free).max(WINDOW.start), bar.size);
                *free = bar.address + bar.size;
            }
            bars[index] = bar;
            index += 1 + usize::from(bar.wide);
        }
        self.restore(&bars);
        bars
    }

    /// Puts the BARs where [`Function::setup`] had them and switches the
    /// function on.
    pub fn restore(&self, bars: &[Bar; 6]) {
        self.write(COMMAND, Width::Word, 0);
        for (index, bar) in bars.iter().enumerate().filter(|(_, bar)| bar.size != 0) {
            let register = BAR0 + 4 * index as u64;
            self.write(register, Width::Long, bar.address);
            if bar.wide {
                self.write(register + 4, Width::Long, bar.address >> 32);
            }
        }
        self.write(COMMAND, Width::Word, MEMORY_AND_MASTER);
    }

    fn measure(&self, index: u64) -> Bar {
        let register = BAR0 + 4 * index;
        let low = self.read(register, Width::Long);
        if low & 1 != 0 {
            return Bar::default();
        }
        let wide = low & 6 == 4 && index < 5;
        self.write(register, Width::Long, 0xffff_ffff);
        let mut mask = self.read(register, Width::Long) & !0xf;
        self.write(register, Width::Long, low);
        let mut address = low & !0xf;
        if wide {
            let high = self.read(register + 4, Width::Long);
            self.write(register + 4, Width::Long, 0xffff_ffff);
            mask |= self.read(register + 4, Width::Long) << 32;
            self.write(register + 4, Width::Long, high);
            address |= high << 32;
        } else if mask != 0 {
            mask |= 0xffff_ffff << 32;
        }
        Bar {
            address,
            size: if mask == 0 { 0 } else { mask.wrapping_neg() },
            wide,
        }
    }
}
