//! Processor exceptions end a payload with a line that tells where.

use core::arch::{asm, global_asm};
use core::ptr::addr_of_mut;

use crate::{power, say};

const VECTORS: usize = 32;
const CODE_SELECTOR: u64 = 8;

global_asm!(
    r#"
.section .text.fault, "ax"
.balign 16
.globl fault_stubs
fault_stubs:
.set vector, 0
.rept 32
    .balign 16
    # Vectors without an error code get a 0 in its place.
    .if (0x60227d00 >> vector) & 1
    .else
    pushq $0
    .endif
    pushq $vector
    jmp fault_common
    .set vector, vector + 1
.endr
fault_common:
    movq %rsp, %rdi
    andq $-16, %rsp
    call fault_report
    ud2
"#,
    options(att_syntax)
);

unsafe extern "C" {
    fn fault_stubs();
}

#[repr(C)]
struct Frame {
    vector: u64,
    code: u64,
    rip: u64,
}

static mut IDT: [[u64; 2]; VECTORS] = [[0; 2]; VECTORS];

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// Installs a handler for each exception.
pub(crate) fn init() {
    let table = addr_of_mut!(IDT);
    for vector in 0..VECTORS {
        let stub = fault_stubs as *const () as u64 + 16 * vector as u64;
        let low = stub & 0xffff | CODE_SELECTOR << 16 | 0x8e00 << 32 | (stub >> 16 & 0xffff) << 48;
        // SAFETY: one processor, no interrupts: nothing else uses the table.
        unsafe { (*table)[vector] = [low, stub >> 32] };
    }
    let pointer = TablePointer {
        limit: (size_of::<[[u64; 2]; VECTORS]>() - 1) as u16,
        base: table as u64,
    };
    // SAFETY: the table is static and each of its gates leads to a stub.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack, readonly)) }
}

// SAFETY: called by the stubs only, with the frame that they built.
#[unsafe(no_mangle)]
unsafe extern "C" fn fault_report(frame: &Frame) -> ! {
    let address: u64;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) }
    say!(
        "fault: vector {} code {:#x} at {:#x}, cr2 {address:#x}",
        frame.vector,
        frame.code,
        frame.rip
    );
    power::off()
}
