//! Switching the machine off, as ACPI 6.5 describes it.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::acpi::{Table, Tables};
use crate::io::{Width, out8, out16};

/// FADT flag: sleep states are entered by the sleep control register (4.8.3.7).
const HW_REDUCED_ACPI: u64 = 1 << 20;
const SLEEP_ENABLE_REDUCED: u8 = 1 << 5;
const SLEEP_ENABLE_FIXED: u16 = 1 << 13;
/// Address space of a generic address: ports.
const SYSTEM_IO: u64 = 1;
/// The sleep type of S5 where the machine's DSDT has no `_S5` package.
const DEFAULT_S5: u8 = 5;

/// Offsets in the FADT.
mod fadt {
    pub(super) const DSDT: u64 = 40;
    pub(super) const PM1A_CONTROL: u64 = 64;
    pub(super) const FLAGS: u64 = 112;
    pub(super) const RESET: u64 = 116;
    pub(super) const X_DSDT: u64 = 140;
    pub(super) const SLEEP_CONTROL: u64 = 244;
}

/// What [`off`] writes where: port | value << 16. The tables are read once, at
/// the start, because a payload may destroy them. 0: not known.
static REDUCED: AtomicU32 = AtomicU32::new(0);
static FIXED: AtomicU32 = AtomicU32::new(0);
static RESET_PORT: AtomicU32 = AtomicU32::new(0);

/// The sleep type that the DSDT gives for S5.
fn s5_type(dsdt: &Table) -> Option<u8> {
    // Name (_S5_, Package { SLP_TYPa, .. }): the name, PackageOp, the package's
    // length, the number of its elements, then a byte constant or Zero / One.
    const PACKAGE: u8 = 0x12;
    const BYTE: u8 = 0x0a;
    let bytes = dsdt.bytes();
    let name = bytes.windows(4).position(|window| window == b"_S5_")?;
    let package = bytes.get(name + 4..)?;
    if *package.first()? != PACKAGE {
        return None;
    }
    // The top bits of the length's first byte count the bytes that follow it.
    let elements = 3 + usize::from(*package.get(1)? >> 6);
    match *package.get(elements)? {
        BYTE => package.get(elements + 1).copied(),
        value => Some(value),
    }
}

fn io_port(table: &Table, generic_address: u64) -> u64 {
    if table.field(generic_address, Width::Byte) == SYSTEM_IO {
        table.field(generic_address + 4, Width::Word)
    } else {
        0
    }
}

/// Remembers how this machine is switched off.
pub(crate) fn init(tables: &Option<Tables>) {
    let Some(fadt) = tables.and_then(|tables| tables.table(*b"FACP")) else {
        return;
    };
    let kind = fadt
        .follow(fadt::X_DSDT, fadt::DSDT)
        .and_then(|dsdt| s5_type(&dsdt))
        .unwrap_or(DEFAULT_S5)
        & 7;
    RESET_PORT.store(io_port(&fadt, fadt::RESET) as u32, Ordering::Relaxed);
    if fadt.field(fadt::FLAGS, Width::Long) & HW_REDUCED_ACPI != 0 {
        let value = u32::from(kind << 2 | SLEEP_ENABLE_REDUCED);
        let port = io_port(&fadt, fadt::SLEEP_CONTROL) as u32;
        REDUCED.store(port | value << 16, Ordering::Relaxed);
    } else {
        let value = u32::from(u16::from(kind) << 10 | SLEEP_ENABLE_FIXED);
        let port = fadt.field(fadt::PM1A_CONTROL, Width::Word) as u32;
        FIXED.store(port | value << 16, Ordering::Relaxed);
    }
}

/// Whether a write to `port` may switch the machine off or reset it.
#[must_use]
pub fn is_power_port(port: u16) -> bool {
    // Keyboard controller, fast reset, and the chipset's reset register.
    const LEGACY: [u16; 3] = [0x64, 0x92, 0xcf9];
    let known = |register: &AtomicU32, len: u16| {
        let first = register.load(Ordering::Relaxed) as u16;
        // Three bytes below as well: a wider access reaches further.
        first != 0 && (first.saturating_sub(3)..first.saturating_add(len)).contains(&port)
    };
    LEGACY.iter().any(|&p| (p - 3..=p).contains(&port))
        || known(&REDUCED, 1)
        || known(&RESET_PORT, 1)
        || known(&FIXED, 2)
}

/// Switches the machine off. Where it cannot be, the processor stops.
pub fn off() -> ! {
    let (reduced, fixed) = (
        REDUCED.load(Ordering::Relaxed),
        FIXED.load(Ordering::Relaxed),
    );
    if reduced as u16 != 0 {
        out8(reduced as u16, (reduced >> 16) as u8);
    }
    if fixed as u16 != 0 {
        out16(fixed as u16, (fixed >> 16) as u16);
    }
    loop {
        // SAFETY: interrupts are off, so this waits for ever.
        unsafe { core::arch::asm!("hlt", options(nomem, nostack)) }
    }
}
