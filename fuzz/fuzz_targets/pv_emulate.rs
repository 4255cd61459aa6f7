//! Privileged instructions of a pv guest's kernel: any code with any registers
//! is emulated or refused; what is refused has changed nothing.
#![no_main]

use arbitrary::Arbitrary;
use blanket_vmm::pv::emulate::{Emulated, MAX_CODE, Privileged, privileged};
use kvm_bindings::kvm_regs;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    code: Vec<u8>,
    general: [u64; 16],
    rip: u64,
    rflags: u64,
    /// What registers of the processor are read as.
    value: u64,
    accept: bool,
}

/// A processor whose every register is the same.
struct Processor {
    value: u64,
    accept: bool,
    halted: bool,
}

impl Privileged for Processor {
    fn cpuid(&mut self, _: u32, _: u32) -> [u32; 4] {
        [self.value as u32; 4]
    }
    fn read_msr(&mut self, _: u32) -> Option<u64> {
        self.accept.then_some(self.value)
    }
    fn write_msr(&mut self, _: u32, _: u64) -> bool {
        self.accept
    }
    fn read_cr(&mut self, register: u8) -> Option<u64> {
        assert!(register < 16);
        self.accept.then_some(self.value)
    }
    fn write_cr(&mut self, register: u8, _: u64) -> bool {
        assert!(register < 16);
        self.accept
    }
    fn read_dr(&mut self, register: u8) -> Option<u64> {
        assert!(register < 16);
        self.accept.then_some(self.value)
    }
    fn write_dr(&mut self, register: u8, _: u64) -> bool {
        assert!(register < 16);
        self.accept
    }
    fn port_in(&mut self, _: u16, size: u8) -> u32 {
        assert!(matches!(size, 1 | 2 | 4));
        self.value as u32
    }
    fn port_out(&mut self, _: u16, size: u8, value: u32) {
        assert!(size == 4 || matches!(size, 1 | 2) && value >> (8 * size) == 0);
    }
    fn xsetbv(&mut self, _: u32, _: u64) -> bool {
        self.accept
    }
    fn halt(&mut self) {
        self.halted = true;
    }
}

fuzz_target!(|input: Input| {
    let code = &input.code[..input.code.len().min(MAX_CODE)];
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = input.general;
    let before = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: input.rip,
        rflags: input.rflags,
    };
    let mut processor = Processor {
        value: input.value,
        accept: input.accept,
        halted: false,
    };
    let mut after = before;
    match privileged(&mut after, code, &mut processor) {
        Emulated::Refused => assert!(after == before && !processor.halted),
        Emulated::Done => {
            let len = after.rip.wrapping_sub(before.rip);
            assert!(len > 0 && len <= code.len() as u64, "{len}");
            assert_eq!(after.rflags, before.rflags);
        }
    }
});
