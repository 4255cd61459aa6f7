//! The smallest guest: says a line and switches the machine off.
#![no_std]
#![no_main]

use blanket_firmware::{boot::StartInfo, entry, power, say};

entry!(main);

fn main(info: &StartInfo) -> ! {
    say!("hello from a guest, command line '{}'", info.cmdline());
    power::off()
}
