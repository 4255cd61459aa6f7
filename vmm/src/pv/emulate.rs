//! Privileged instructions of the guest's kernel, which fault in ring 3.
//!
//! Linux as a PV guest makes hypercalls for what happens often. The rest is
//! code that it shares with other machines: it is executed, faults, and its
//! effect is had here, as Xen does (`emul-priv-op.c`).

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};
use kvm_bindings::kvm_regs;

/// The longest instruction, in bytes.
pub const MAX_CODE: usize = 15;

/// The instruction of one byte that does nothing.
pub const NOP: u8 = 0x90;

const CLI: u8 = 0xfa;
const STI: u8 = 0xfb;

/// Whether the instruction that begins with `byte` is one that has no effect in
/// a PV kernel, with this byte alone: what it changes is masked elsewhere. The
/// monitor may replace it by [`NOP`].
#[must_use]
pub fn does_nothing(byte: u8) -> bool {
    matches!(byte, CLI | STI)
}

/// `ud2; .ascii "xen"` before an instruction asks the hypervisor to execute it.
const XEN_PREFIX: [u8; 5] = [0x0f, 0x0b, b'x', b'e', b'n'];

/// What privileged instructions act upon.
pub trait Privileged {
    /// EAX, EBX, ECX and EDX of a CPUID leaf.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// A model-specific register; None: there is no such.
    fn read_msr(&mut self, index: u32) -> Option<u64>;
    /// Sets a model-specific register; false: there is no such, or not that value.
    fn write_msr(&mut self, index: u32, value: u64) -> bool;
    /// A control register; None: there is no such.
    fn read_cr(&mut self, register: u8) -> Option<u64>;
    /// Sets a control register; false: there is no such, or not that value.
    fn write_cr(&mut self, register: u8, value: u64) -> bool;
    /// A debug register; None: there is no such.
    fn read_dr(&mut self, register: u8) -> Option<u64>;
    /// Sets a debug register; false: there is no such, or not that value.
    fn write_dr(&mut self, register: u8, value: u64) -> bool;
    /// What `size` (1, 2 or 4) bytes of an I/O port read as.
    fn port_in(&mut self, port: u16, size: u8) -> u32;
    /// Writes `size` (1, 2 or 4) bytes to an I/O port.
    fn port_out(&mut self, port: u16, size: u8, value: u32);
    /// Sets an extended control register; false: there is no such, or not that value.
    fn xsetbv(&mut self, index: u32, value: u64) -> bool;
    /// The processor has nothing to do until an interrupt comes.
    fn halt(&mut self);
}

/// Whether an instruction was one to emulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulated {
    /// It has been executed; the registers are those behind it.
    Done,
    /// It is the guest's own fault; the registers are as they were.
    Refused,
}

/// Executes the instruction that `code` (up to [`MAX_CODE`] bytes at RIP) starts with.
pub fn privileged(regs: &mut kvm_regs, code: &[u8], cpu: &mut dyn Privileged) -> Emulated {
    let mut after = *regs;
    match execute(&mut after, code, cpu) {
        Some(()) => {
            *regs = after;
            Emulated::Done
        }
        None => Emulated::Refused,
    }
}

fn execute(regs: &mut kvm_regs, code: &[u8], cpu: &mut dyn Privileged) -> Option<()> {
    let (prefix, code) = match code.strip_prefix(&XEN_PREFIX) {
        Some(rest) => (XEN_PREFIX.len(), rest),
        None => (0, code),
    };
    let instruction = Decoder::with_ip(64, code, regs.rip, DecoderOptions::NONE).decode();
    if (instruction.code() == Code::Cpuid) != (prefix != 0) {
        return None;
    }
    perform(regs, &instruction, cpu)?;
    regs.rip = regs.rip.wrapping_add((prefix + instruction.len()) as u64);
    Some(())
}

fn perform(regs: &mut kvm_regs, instruction: &Instruction, cpu: &mut dyn Privileged) -> Option<()> {
    // These take their number from the lower half of RCX.
    let index = regs.rcx as u32;
    let wide = regs.rdx << 32 | regs.rax & 0xffff_ffff;
    match instruction.code() {
        Code::Cpuid => {
            let result = cpu.cpuid(regs.rax as u32, index);
            [regs.rax, regs.rbx, regs.rcx, regs.rdx] = result.map(u64::from);
        }
        Code::Rdmsr => {
            let value = cpu.read_msr(index)?;
            (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
        }
        Code::Wrmsr => cpu.write_msr(index, wide).then_some(())?,
        Code::Xsetbv => cpu.xsetbv(index, wide).then_some(())?,
        Code::Mov_r64_cr => {
            let number = number(instruction.op_register(1), Register::CR0)?;
            *general(regs, instruction.op_register(0))? = cpu.read_cr(number)?;
        }
        Code::Mov_cr_r64 => {
            let number = number(instruction.op_register(0), Register::CR0)?;
            let value = *general(regs, instruction.op_register(1))?;
            cpu.write_cr(number, value).then_some(())?;
        }
        Code::Mov_r64_dr => {
            let number = number(instruction.op_register(1), Register::DR0)?;
            *general(regs, instruction.op_register(0))? = cpu.read_dr(number)?;
        }
        Code::Mov_dr_r64 => {
            let number = number(instruction.op_register(0), Register::DR0)?;
            let value = *general(regs, instruction.op_register(1))?;
            cpu.write_dr(number, value).then_some(())?;
        }
        Code::Clts => {
            const TASK_SWITCHED: u64 = 1 << 3;
            let value = cpu.read_cr(0)? & !TASK_SWITCHED;
            cpu.write_cr(0, value).then_some(())?;
        }
        Code::Hlt => cpu.halt(),
        // Interrupts are masked in the vCPU's information, not in RFLAGS;
        // caches are coherent with all that a guest may reach.
        Code::Cli | Code::Sti | Code::Wbinvd | Code::Wbnoinvd | Code::Invd => {}
        _ => port(regs, instruction, cpu)?,
    }
    Some(())
}

/// `in` and `out`, but for those with strings.
fn port(regs: &mut kvm_regs, instruction: &Instruction, cpu: &mut dyn Privileged) -> Option<()> {
    let (inward, size) = match instruction.code() {
        Code::In_AL_imm8 | Code::In_AL_DX => (true, 1),
        Code::In_AX_imm8 | Code::In_AX_DX => (true, 2),
        Code::In_EAX_imm8 | Code::In_EAX_DX => (true, 4),
        Code::Out_imm8_AL | Code::Out_DX_AL => (false, 1),
        Code::Out_imm8_AX | Code::Out_DX_AX => (false, 2),
        Code::Out_imm8_EAX | Code::Out_DX_EAX => (false, 4),
        _ => return None,
    };
    let operand = u32::from(inward);
    let port = match instruction.op_kind(operand) {
        OpKind::Immediate8 => u16::from(instruction.immediate8()),
        _ => regs.rdx as u16,
    };
    let mask = u32::MAX >> (32 - 8 * size);
    if inward {
        let value = u64::from(cpu.port_in(port, size as u8) & mask);
        // Only a 32-bit result clears the upper half.
        let kept = if size == 4 { 0 } else { !u64::from(mask) };
        regs.rax = regs.rax & kept | value;
    } else {
        cpu.port_out(port, size as u8, regs.rax as u32 & mask);
    }
    Some(())
}

/// The number of a register of the kind that `first` is number 0 of.
fn number(register: Register, first: Register) -> Option<u8> {
    let number = (register as usize).checked_sub(first as usize)?;
    u8::try_from(number).ok().filter(|number| *number < 16)
}

fn general(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register {
        Register::RAX => &mut regs.rax,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RBX => &mut regs.rbx,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A processor that writes down what is asked of it.
    #[derive(Default)]
    struct Recorder {
        asked: Vec<String>,
        refuse: bool,
    }

    impl Recorder {
        fn note(&mut self, what: String) -> bool {
            self.asked.push(what);
            !self.refuse
        }
    }

    impl Privileged for Recorder {
        fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
            self.note(format!("cpuid {leaf:#x} {subleaf:#x}"));
            [10, 11, 12, 13]
        }
        fn read_msr(&mut self, index: u32) -> Option<u64> {
            self.note(format!("rdmsr {index:#x}"))
                .then_some(0x1122_3344_5566_7788)
        }
        fn write_msr(&mut self, index: u32, value: u64) -> bool {
            self.note(format!("wrmsr {index:#x} {value:#x}"))
        }
        fn read_cr(&mut self, register: u8) -> Option<u64> {
            self.note(format!("read cr{register}"))
                .then_some(0x8005_003b)
        }
        fn write_cr(&mut self, register: u8, value: u64) -> bool {
            self.note(format!("cr{register} {value:#x}"))
        }
        fn read_dr(&mut self, register: u8) -> Option<u64> {
            self.note(format!("read dr{register}"))
                .then_some(0xffff_0ff0)
        }
        fn write_dr(&mut self, register: u8, value: u64) -> bool {
            self.note(format!("dr{register} {value:#x}"))
        }
        fn port_in(&mut self, port: u16, size: u8) -> u32 {
            self.note(format!("in {port:#x} {size}"));
            0x8182_8384
        }
        fn port_out(&mut self, port: u16, size: u8, value: u32) {
            self.note(format!("out {port:#x} {size} {value:#x}"));
        }
        fn xsetbv(&mut self, index: u32, value: u64) -> bool {
            self.note(format!("xsetbv {index:#x} {value:#x}"))
        }
        fn halt(&mut self) {
            self.note("halt".to_owned());
        }
    }

    fn regs() -> kvm_regs {
        kvm_regs {
            rax: 0xaaaa_bbbb_1111_2222,
            rcx: 0xcccc_dddd_0000_0c80,
            rdx: 0x0303_0404_0000_03f8,
            rbx: 0xb,
            r12: 0x1212,
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x202,
            ..Default::default()
        }
    }

    /// Executes `code`: what was asked, and the registers behind it.
    fn run(code: &[u8]) -> (String, kvm_regs) {
        let (mut regs, mut cpu) = (regs(), Recorder::default());
        assert_eq!(privileged(&mut regs, code, &mut cpu), Emulated::Done);
        assert_eq!(regs.rip, 0xffff_ffff_8100_0000 + code.len() as u64);
        (cpu.asked.join("; "), regs)
    }

    #[test]
    fn what_may_be_replaced_by_nothing_is_what_does_nothing() {
        for byte in 0..=u8::MAX {
            let code = [byte, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            if does_nothing(byte) {
                let (asked, after) = run(&code[..1]);
                let rip = after.rip;
                assert_eq!((asked.as_str(), kvm_regs { rip, ..regs() }), ("", after));
            }
        }
        let instruction = Decoder::new(64, &[NOP], DecoderOptions::NONE).decode();
        assert_eq!(instruction.code(), Code::Nopd);
    }

    #[test]
    fn each_instruction_asks_for_what_it_means() {
        let table: [(&[u8], &str); 24] = [
            (&[0x0f, 0x32], "rdmsr 0xc80"),
            (&[0x0f, 0x30], "wrmsr 0xc80 0x3f811112222"),
            (&[0x0f, 0x01, 0xd1], "xsetbv 0xc80 0x3f811112222"),
            (&[0x0f, 0x20, 0xc0], "read cr0"),
            (&[0x41, 0x0f, 0x20, 0xdc], "read cr3"),
            (&[0x44, 0x0f, 0x20, 0xc0], "read cr8"),
            (&[0x41, 0x0f, 0x22, 0xe4], "cr4 0x1212"),
            (&[0x0f, 0x21, 0xf3], "read dr6"),
            (&[0x0f, 0x23, 0xfb], "dr7 0xb"),
            (&[0x0f, 0x06], "read cr0; cr0 0x80050033"),
            (&[0xf4], "halt"),
            (&[0xfa], ""),
            (&[0xfb], ""),
            (&[0x0f, 0x09], ""),
            (&[0x0f, 0x08], ""),
            (&[0xe4, 0x61], "in 0x61 1"),
            (&[0x66, 0xe5, 0x61], "in 0x61 2"),
            (&[0xec], "in 0x3f8 1"),
            (&[0xed], "in 0x3f8 4"),
            (&[0xe6, 0x80], "out 0x80 1 0x22"),
            (&[0x66, 0xef], "out 0x3f8 2 0x2222"),
            (&[0xee], "out 0x3f8 1 0x22"),
            (&[0xef], "out 0x3f8 4 0x11112222"),
            (
                &[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2],
                "cpuid 0x11112222 0xc80",
            ),
        ];
        for (code, asked) in table {
            assert_eq!(run(code).0, asked, "{code:02x?}");
        }
    }

    #[test]
    fn results_are_as_wide_as_the_instruction() {
        let (_, after) = run(&[0x0f, 0x32]);
        assert_eq!((after.rax, after.rdx), (0x5566_7788, 0x1122_3344));
        let (_, after) = run(&[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2]);
        assert_eq!(
            [after.rax, after.rbx, after.rcx, after.rdx],
            [10, 11, 12, 13]
        );
        let (_, after) = run(&[0x41, 0x0f, 0x20, 0xdc]);
        assert_eq!((after.r12, after.rsp), (0x8005_003b, 0));
        assert_eq!(run(&[0xec]).1.rax, 0xaaaa_bbbb_1111_2284);
        assert_eq!(run(&[0x66, 0xed]).1.rax, 0xaaaa_bbbb_1111_8384);
        assert_eq!(run(&[0xed]).1.rax, 0x8182_8384);
    }

    #[test]
    fn what_the_processor_refuses_is_the_guests_fault() {
        let refused: [&[u8]; 7] = [
            &[0x0f, 0x32],
            &[0x0f, 0x30],
            &[0x0f, 0x01, 0xd1],
            &[0x0f, 0x20, 0xc0],
            &[0x0f, 0x22, 0xc0],
            &[0x0f, 0x21, 0xf3],
            &[0x0f, 0x06],
        ];
        for code in refused {
            let (mut after, mut cpu) = (regs(), Recorder::default());
            cpu.refuse = true;
            assert_eq!(privileged(&mut after, code, &mut cpu), Emulated::Refused);
            assert_eq!(after, regs());
        }
    }

    #[test]
    fn other_instructions_are_not_emulated() {
        let others: [&[u8]; 12] = [
            &[],
            &[0x0f],
            // nop, plain cpuid and ud2, mov to CS, lgdt, invlpg, swapgs, rep insb, iretq
            &[0x90],
            &[0x0f, 0xa2],
            &[0x0f, 0x0b],
            &[0x8e, 0xc8],
            &[0x0f, 0x01, 0x10],
            &[0x0f, 0x01, 0x38],
            &[0x0f, 0x01, 0xf8],
            &[0xf3, 0x6c],
            &[0x48, 0xcf],
            // The prefix with another instruction.
            &[0x0f, 0x0b, b'x', b'e', b'n', 0xf4],
        ];
        for code in others {
            let (mut after, mut cpu) = (regs(), Recorder::default());
            assert_eq!(
                privileged(&mut after, code, &mut cpu),
                Emulated::Refused,
                "{code:02x?}"
            );
            assert_eq!((after, cpu.asked), (regs(), Vec::new()));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_refused_ones_change_nothing(
            start in prop::sample::select(vec![
                vec![], vec![0x0f], vec![0x66], vec![0x41, 0x0f], vec![0xf0, 0x0f], vec![0xc5],
                vec![0x62], vec![0x8f], XEN_PREFIX.to_vec(),
            ]),
            rest in prop::collection::vec(any::<u8>(), 0..16),
            rip: u64,
        ) {
            let mut code = [start, rest].concat();
            code.truncate(MAX_CODE);
            let before = kvm_regs { rip, ..regs() };
            let (mut after, mut cpu) = (before, Recorder::default());
            match privileged(&mut after, &code, &mut cpu) {
                Emulated::Refused => prop_assert_eq!(after, before),
                Emulated::Done => {
                    let len = after.rip.wrapping_sub(rip);
                    prop_assert!((1..=code.len() as u64).contains(&len));
                }
            }
        }
    }
}
