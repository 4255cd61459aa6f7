//! The features of processors that models are made of, by the bits of CPUID
//! that tell of them, under the names that Linux has for them.

use super::Level;

/// A register of a leaf: function, index, and 0 to 3 for EAX to EDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word(pub(super) u32, pub(super) u32, pub(super) usize);

/// Which guests have a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Given {
    /// Those of models from this level on. A processor without it has no such model.
    From(Level),
    /// All, where the node has it: it protects the guest or speaks with the hypervisor.
    WithNode,
    /// Guests that may run hypervisors, where the node has it.
    Nested,
}

/// A feature.
#[derive(Clone, Copy, Debug)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) word: Word,
    pub(super) bit: u32,
    pub(super) given: Given,
}

const C1: Word = Word(1, 0, 2);
pub(super) const D1: Word = Word(1, 0, 3);
const B7: Word = Word(7, 0, 1);
const C7: Word = Word(7, 0, 2);
const D7: Word = Word(7, 0, 3);
const A_XSAVE: Word = Word(0xd, 1, 0);
const A_KVM: Word = Word(0x4000_0001, 0, 0);
const C81: Word = Word(0x8000_0001, 0, 2);
pub(super) const D81: Word = Word(0x8000_0001, 0, 3);
const B88: Word = Word(0x8000_0008, 0, 1);
const A821: Word = Word(0x8000_0021, 0, 0);

const V2: Given = Given::From(Level::V2);
const V3: Given = Given::From(Level::V3);
const V4: Given = Given::From(Level::V4);
const NODE: Given = Given::WithNode;

/// Bits of [`D1`] that AMD's processors repeat in [`D81`].
pub(super) const REPEATED: u32 = 0x0183_f3ff;

macro_rules! features {
    ($(($word:ident, $bit:literal, $given:expr, $name:literal)),* $(,)?) => {
        &[$(Feature { name: $name, word: $word, bit: $bit, given: $given }),*]
    };
}

/// All of them. The levels are those of the x86-64 psABI, and what processors
/// of server clouds had when they came to that level: AES with the second,
/// random numbers with the third, further instructions with the fourth.
pub(super) const ALL: &[Feature] = features![
    (D1, 0, V2, "fpu"),
    (D1, 2, V2, "de"),
    (D1, 3, V2, "pse"),
    (D1, 4, V2, "tsc"),
    (D1, 5, V2, "msr"),
    (D1, 6, V2, "pae"),
    (D1, 7, V2, "mce"),
    (D1, 8, V2, "cx8"),
    (D1, 9, V2, "apic"),
    (D1, 11, V2, "sep"),
    (D1, 12, V2, "mtrr"),
    (D1, 13, V2, "pge"),
    (D1, 14, V2, "mca"),
    (D1, 15, V2, "cmov"),
    (D1, 16, V2, "pat"),
    (D1, 17, V2, "pse36"),
    (D1, 19, V2, "clflush"),
    (D1, 23, V2, "mmx"),
    (D1, 24, V2, "fxsr"),
    (D1, 25, V2, "sse"),
    (D1, 26, V2, "sse2"),
    (C1, 0, V2, "pni"),
    (C1, 1, V2, "pclmulqdq"),
    (C1, 9, V2, "ssse3"),
    (C1, 13, V2, "cx16"),
    (C1, 19, V2, "sse4_1"),
    (C1, 20, V2, "sse4_2"),
    (C1, 21, V2, "x2apic"),
    (C1, 23, V2, "popcnt"),
    (C1, 25, V2, "aes"),
    (D81, 11, V2, "syscall"),
    (D81, 20, V2, "nx"),
    (D81, 27, V2, "rdtscp"),
    (D81, 29, V2, "lm"),
    (C81, 0, V2, "lahf_lm"),
    (C1, 12, V3, "fma"),
    (C1, 22, V3, "movbe"),
    (C1, 26, V3, "xsave"),
    (C1, 28, V3, "avx"),
    (C1, 29, V3, "f16c"),
    (C1, 30, V3, "rdrand"),
    (B7, 0, V3, "fsgsbase"),
    (B7, 3, V3, "bmi1"),
    (B7, 5, V3, "avx2"),
    (B7, 8, V3, "bmi2"),
    (C81, 5, V3, "abm"),
    (A_XSAVE, 0, V3, "xsaveopt"),
    (C1, 17, V4, "pcid"),
    (B7, 9, V4, "erms"),
    (B7, 10, V4, "invpcid"),
    (B7, 16, V4, "avx512f"),
    (B7, 17, V4, "avx512dq"),
    (B7, 18, V4, "rdseed"),
    (B7, 19, V4, "adx"),
    (B7, 23, V4, "clflushopt"),
    (B7, 24, V4, "clwb"),
    (B7, 28, V4, "avx512cd"),
    (B7, 30, V4, "avx512bw"),
    (B7, 31, V4, "avx512vl"),
    // Protection of the guest's kernel from its user code.
    (B7, 7, NODE, "smep"),
    (B7, 20, NODE, "smap"),
    (C7, 2, NODE, "umip"),
    // What speculation is told, Intel's way.
    (D7, 10, NODE, "md_clear"),
    (D7, 26, NODE, "spec_ctrl"),
    (D7, 27, NODE, "intel_stibp"),
    (D7, 28, NODE, "flush_l1d"),
    (D7, 29, NODE, "arch_capabilities"),
    (D7, 31, NODE, "spec_ctrl_ssbd"),
    // And AMD's.
    (B88, 12, NODE, "ibpb"),
    (B88, 14, NODE, "ibrs"),
    (B88, 15, NODE, "stibp"),
    (B88, 17, NODE, "stibp_always_on"),
    (B88, 19, NODE, "ibrs_same_mode"),
    (B88, 24, NODE, "amd_ssbd"),
    (B88, 25, NODE, "virt_ssbd"),
    (B88, 26, NODE, "amd_ssb_no"),
    (B88, 28, NODE, "amd_psfd"),
    (B88, 29, NODE, "btc_no"),
    (B88, 30, NODE, "amd_ibpb_ret"),
    (A821, 2, NODE, "lfence_rdtsc"),
    (A821, 6, NODE, "null_sel_clr_base"),
    (A821, 8, NODE, "autoibrs"),
    (A821, 27, NODE, "sbpb"),
    (A821, 28, NODE, "ibpb_brtype"),
    (A821, 29, NODE, "srso_no"),
    // What KVM's vendor modules emulate wherever they are.
    (B7, 1, NODE, "tsc_adjust"),
    // KVM's own: clocks, delays of ports, steal time, ends of interrupts,
    // spinning, flushes, signals and yields among vCPUs, polling, pages that
    // come later, stable clock.
    (A_KVM, 0, NODE, "kvm-clock-old"),
    (A_KVM, 1, NODE, "kvm-nopiodelay"),
    (A_KVM, 3, NODE, "kvm-clock"),
    (A_KVM, 4, NODE, "kvm-asyncpf"),
    (A_KVM, 5, NODE, "kvm-steal-time"),
    (A_KVM, 6, NODE, "kvm-pv-eoi"),
    (A_KVM, 7, NODE, "kvm-pv-unhalt"),
    (A_KVM, 9, NODE, "kvm-pv-tlb-flush"),
    (A_KVM, 10, NODE, "kvm-asyncpf-vmexit"),
    (A_KVM, 11, NODE, "kvm-pv-ipi"),
    (A_KVM, 12, NODE, "kvm-poll-control"),
    (A_KVM, 13, NODE, "kvm-pv-sched-yield"),
    (A_KVM, 14, NODE, "kvm-asyncpf-int"),
    (A_KVM, 24, NODE, "kvm-clock-stable"),
    (C1, 5, Given::Nested, "vmx"),
    (C81, 2, Given::Nested, "svm"),
];
