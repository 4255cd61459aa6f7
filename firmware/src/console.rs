//! Text on the first serial port, by polling.

use core::fmt::{self, Write};

use crate::io::{in8, out8};

/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// Ports that COM1 occupies.
pub const COM1_PORTS: u16 = 8;

const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// Polls before a byte is sent regardless: a dead port must not stop a payload.
const PATIENCE: u32 = 1_000_000;

/// Puts COM1 into 115200 8N1 without interrupts or loopback.
pub fn init() {
    const SETUP: [(u16, u8); 7] = [
        (3, 0x00),
        (1, 0x00),
        (3, 0x80),
        (0, 0x01),
        (1, 0x00),
        (3, 0x03),
        (4, 0x00),
    ];
    for (register, value) in SETUP {
        out8(COM1 + register, value);
    }
}

/// The serial port as a [`Write`].
#[derive(Debug)]
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            for _ in 0..PATIENCE {
                if in8(COM1 + 5) & TRANSMITTER_EMPTY != 0 {
                    break;
                }
            }
            out8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints one line.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use ::core::fmt::Write as _;
        // Writing to the serial port does not fail.
        let _ = ::core::writeln!($crate::console::Serial, $($arg)*);
    }};
}
