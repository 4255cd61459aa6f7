//! A program for ring 3 of a vCPU: memory, ports, device memory, and time.
//!
//! It lies at fixed addresses (see `ring3.ld`: code from 2 MiB on) and needs no
//! loader: whoever starts it maps its segments with user access, sets rip to
//! its ELF entry point, CR4.OSFXSR, a task state segment whose I/O permission
//! map allows the port (IOPL 3 in rflags is not enough: KVM without hardware
//! virtualization ignores it), and these registers:
//!
//! | register | meaning |
//! |---|---|
//! | rdi | scratch memory, 8-byte aligned |
//! | rsi | its length in bytes |
//! | rdx | a port; accesses reach up to 3 ports further |
//! | rcx | an address that no memory backs |
//! | r8 | rounds of a loop that touches registers only |
//!
//! It has its own stack and does, in this order:
//!
//! 1. store `PATTERN ^ address` in each 8-byte word of the scratch memory,
//! 2. write the wrapping sum of these words, read back, to the port: its low
//!    1, 2 and 4 bytes,
//! 3. read 1, 2 and 4 bytes from the port and store each, zero-extended, in
//!    the first three words of the scratch memory,
//! 4. store 1, 2, 4 and 8 bytes of `PATTERN` at the device address,
//! 5. load 8 bytes from the device address and store them in the fourth word,
//! 6. run the loop,
//! 7. write `END` (4 bytes) to the port, over and over.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

use blanket_firmware::io::{Width, in8, in16, in32, load, out8, out16, out32, store};

/// What step 1 stores, before the address is mixed in.
const PATTERN: u64 = 0x424c_414e_4b45_5421;
/// What step 7 writes.
const END: u32 = 0x0e4d_0e4d;

global_asm!(
    r#"
.section .bss.ring3, "aw", @nobits
.balign 16
ring3_stack: .skip 16 * 1024
ring3_stack_top:

.section .text.ring3, "ax"
.globl ring3_start
ring3_start:
    leaq ring3_stack_top(%rip), %rsp
    call ring3_main
    ud2
"#,
    options(att_syntax)
);

// SAFETY: called once, by the stub above, with what the starter put into the
// registers.
#[unsafe(no_mangle)]
unsafe extern "C" fn ring3_main(memory: u64, len: u64, port: u16, device: u64, rounds: u64) -> ! {
    let words = (memory..memory + len / 8 * 8).step_by(8);
    for address in words.clone() {
        // SAFETY: the starter vouches for the scratch memory.
        unsafe { store(address, Width::Quad, PATTERN ^ address) }
    }
    let mut sum = 0u64;
    for address in words {
        // SAFETY: as above.
        sum = sum.wrapping_add(unsafe { load(address, Width::Quad) });
    }
    out8(port, sum as u8);
    out16(port, sum as u16);
    out32(port, sum as u32);

    let inputs = [
        u64::from(in8(port)),
        u64::from(in16(port)),
        u64::from(in32(port)),
    ];
    for (i, value) in inputs.into_iter().enumerate() {
        // SAFETY: as above; the scratch memory has four words at least.
        unsafe { store(memory + 8 * i as u64, Width::Quad, value) };
    }
    // SAFETY: no memory backs the device address.
    unsafe {
        for width in Width::ALL {
            store(device, width, PATTERN);
        }
        let answer = load(device, Width::Quad);
        store(memory + 24, Width::Quad, answer);
    }
    spin(rounds);
    loop {
        out32(port, END);
    }
}

/// Counts `rounds` down to 0: two instructions a round.
fn spin(rounds: u64) {
    if rounds != 0 {
        // SAFETY: changes registers only.
        unsafe {
            asm!("2: dec {0}", "jnz 2b", inout(reg) rounds => _, options(nomem, nostack));
        }
    }
}
