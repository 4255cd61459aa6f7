//! A guest that says a line and then waits for ever.
#![no_std]
#![no_main]

use core::arch::asm;

use blanket_firmware::{boot::StartInfo, entry, say};

entry!(main);

fn main(_: &StartInfo) -> ! {
    say!("idle");
    loop {
        // SAFETY: it stops the processor, with interrupts off for good.
        unsafe { asm!("hlt", options(nomem, nostack)) };
    }
}
