//! What freestanding guest programs share: the way from a PVH loader into
//! 64-bit Rust, a console, ACPI, PCI and power.
//!
//! A payload is an ELF64 file that any PVH loader can start. It names its main
//! function with [`entry!`](crate::entry):
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! use blanket_firmware::{boot::StartInfo, entry, power, say};
//! entry!(main);
//! fn main(_: &StartInfo) -> ! {
//!     say!("hello");
//!     power::off()
//! }
//! ```
#![no_std]

pub mod acpi;
pub mod boot;
pub mod console;
mod fault;
pub mod io;
mod mem;
pub mod pci;
pub mod power;
pub mod random;

use core::panic::PanicInfo;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("{info}");
    power::off()
}
