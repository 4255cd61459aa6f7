//! Counts for ever, and says each number: whoever moves it can see whether it went
//! on where it was.
#![no_std]
#![no_main]

use core::hint::black_box;

use blanket_firmware::{boot::StartInfo, entry, power, say};

entry!(main);

/// What it does between two numbers, in the guest.
const WORK: u64 = 2_000_000;

fn main(_: &StartInfo) -> ! {
    let mut number = 0u64;
    loop {
        say!("number {number}");
        let mut sum = 0u64;
        for step in 0..WORK {
            sum = black_box(sum + step);
        }
        if sum != WORK * (WORK - 1) / 2 {
            say!("wrong sum {sum}");
            power::off();
        }
        number += 1;
    }
}
