//! The `hvm` machine's map: addresses, ports and interrupt lines. ACPI tells
//! the guest; `firmware/` payloads have a copy of the ports.

/// The serial port's eight registers (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// The serial port's interrupt line.
pub const SERIAL_GSI: u32 = 4;

/// ACPI power registers, one byte each: see [`crate::legacy::power`].
pub const POWER_PORT: u16 = 0x600;
/// The line by which the power button and a new generation are told.
pub const POWER_GSI: u32 = 5;

/// PCI configuration access by ports: address and data, eight bytes.
pub const PCI_PORT: u16 = 0xcf8;
/// PCI configuration access by memory: one bus.
pub const ECAM_START: u64 = 0xe000_0000;
/// Memory for BARs: start.
pub const PCI_WINDOW_START: u64 = blanket_memory::layout::MMIO_GAP_START;
/// Memory for BARs: end.
pub const PCI_WINDOW_END: u64 = ECAM_START;

/// The in-kernel IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The in-kernel local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// First interrupt source behind the IOAPIC's pins: for message interrupts.
pub const FIRST_MSI_GSI: u32 = 24;

/// Where the ACPI tables lie: the BIOS area, where a guest without other
/// advice looks for them.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI tables.
pub const ACPI_END: u64 = GENERATION;
/// The [generation ID](crate::legacy::generation), in a page of its own of the
/// BIOS area.
pub const GENERATION: u64 = 0xf_e000;
/// Where a PC starts anew in real mode (F000:FFF0), in the BIOS area's last 16
/// bytes.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of the BIOS area.
pub const BIOS_END: u64 = 0x10_0000;
