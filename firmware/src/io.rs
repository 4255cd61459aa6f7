//! Access to ports and to device memory.

use core::arch::asm;

/// Writes one byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: a port access touches no memory of this program.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Writes two bytes to a port.
pub fn out16(port: u16, value: u16) {
    // SAFETY: a port access touches no memory of this program.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// Writes four bytes to a port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: a port access touches no memory of this program.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

/// Reads one byte from a port.
#[must_use]
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: a port access touches no memory of this program.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Reads two bytes from a port.
#[must_use]
pub fn in16(port: u16) -> u16 {
    let value: u16;
    // SAFETY: a port access touches no memory of this program.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) }
    value
}

/// Reads four bytes from a port.
#[must_use]
pub fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: a port access touches no memory of this program.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) }
    value
}

/// How many bytes one access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// One byte.
    Byte,
    /// Two bytes.
    Word,
    /// Four bytes.
    Long,
    /// Eight bytes.
    Quad,
}

impl Width {
    /// All widths, the narrowest first.
    pub const ALL: [Self; 4] = [Self::Byte, Self::Word, Self::Long, Self::Quad];

    /// Bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Long => 4,
            Self::Quad => 8,
        }
    }
}

/// Stores the low `width` bytes of `value` at `address` with one instruction.
///
/// # Safety
/// `address` is mapped, and nothing that this program relies on lies there.
pub unsafe fn store(address: u64, width: Width, value: u64) {
    // The instructions are spelled out because a misaligned access is a wanted
    // case, which `write_volatile` excludes.
    // SAFETY: the caller vouches for the address.
    unsafe {
        match width {
            Width::Byte => asm!("mov [{}], {:l}", in(reg) address, in(reg_abcd) value),
            Width::Word => asm!("mov [{}], {:x}", in(reg) address, in(reg) value),
            Width::Long => asm!("mov [{}], {:e}", in(reg) address, in(reg) value),
            Width::Quad => asm!("mov [{}], {}", in(reg) address, in(reg) value),
        }
    }
}

/// Loads `width` bytes from `address` with one instruction.
///
/// # Safety
/// `address` is mapped.
#[must_use]
pub unsafe fn load(address: u64, width: Width) -> u64 {
    let value: u64;
    // SAFETY: the caller vouches for the address.
    unsafe {
        match width {
            Width::Byte => {
                asm!("movzx {:e}, byte ptr [{}]", lateout(reg) value, in(reg) address);
            }
            Width::Word => {
                asm!("movzx {:e}, word ptr [{}]", lateout(reg) value, in(reg) address);
            }
            Width::Long => asm!("mov {:e}, [{}]", lateout(reg) value, in(reg) address),
            Width::Quad => asm!("mov {}, [{}]", lateout(reg) value, in(reg) address),
        }
    }
    value
}
