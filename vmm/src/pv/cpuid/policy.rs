//! Which bits of which leaves a PV kernel may see: what Xen itself gives to PV
//! guests (`cpufeatureset.h`), without what would have the kernel use
//! instructions that trap where it could do without.

/// EAX, EBX, ECX, EDX.
pub(super) type Registers = [u32; 4];

/// Leaf 1 ECX.
pub(super) const XSAVE: u32 = 1 << 26;
/// Leaf 1 ECX.
pub(super) const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 ECX.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 ECX: what the hypervisor's own code uses for its timer.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 EDX: large pages, the local APIC and global pages.
const PSE_APIC_PGE: u32 = 1 << 3 | 1 << 9 | 1 << 13;
/// Leaf 7 EBX.
const FSGSBASE: u32 = 1;

/// The highest leaves that are shown.
const MAX_BASIC: u32 = 0xd;
const MAX_EXTENDED: u32 = 0x8000_0021;
/// Where Xen's own leaves are.
const XEN: u32 = 0x4000_0000;
/// The version that the machine says it is, as Xen's leaf 1 has it.
const XEN_VERSION: u32 = 4 << 16 | 17;

/// Bits by number.
const fn bits(numbers: &[u32]) -> u32 {
    let mut out = 0;
    let mut i = 0;
    while i < numbers.len() {
        out |= 1 << numbers[i];
        i += 1;
    }
    out
}

/// Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE,
/// POPCNT, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND.
const LEAF_1_ECX: u32 = bits(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 27, 28, 29, 30]);
/// Leaf 1 EDX: FPU, DE, TSC, MSR, PAE, CX8, SEP, CMOV, PAT, CLFLUSH, MMX, FXSR,
/// SSE, SSE2. Without PGE: a new page table is all that flushes the TLB.
const LEAF_1_EDX: u32 = bits(&[0, 2, 4, 5, 6, 8, 11, 15, 16, 19, 23, 24, 25, 26]);
/// Leaf 7 EBX: BMI1, AVX2, BMI2, ERMS, AVX512F, DQ, RDSEED, ADX, IFMA,
/// CLFLUSHOPT, CLWB, CD, SHA, BW, VL. Without FSGSBASE: a kernel that has it
/// reads a model-specific register in every task switch.
const LEAF_7_EBX: u32 = bits(&[3, 5, 8, 9, 16, 17, 18, 19, 21, 23, 24, 28, 29, 30, 31]);
/// Leaf 7 ECX: VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ,
/// CLDEMOTE, MOVDIRI, MOVDIR64B. Without RDPID: it reads what nobody sets.
const LEAF_7_ECX: u32 = bits(&[1, 6, 8, 9, 10, 11, 12, 14, 25, 27, 28]);
/// Leaf 7 EDX: 4VNNIW, 4FMAPS, FSRM, VP2INTERSECT, SERIALIZE, FP16.
const LEAF_7_EDX: u32 = bits(&[2, 3, 4, 8, 14, 23]);
/// Leaf 7, sub-leaf 1, EAX: AVX_VNNI, AVX512_BF16, AVX_IFMA.
const LEAF_7_1_EAX: u32 = bits(&[4, 5, 23]);
/// Leaf 8000_0001 ECX: LAHF, ABM, SSE4A, misaligned SSE, PREFETCHW.
const EXTENDED_1_ECX: u32 = bits(&[0, 5, 6, 7, 8]);
/// Leaf 8000_0001 EDX: SYSCALL, NX, MMXEXT, FFXSR, RDTSCP, LM, 3DNOWEXT, 3DNOW,
/// and what repeats leaf 1.
const EXTENDED_1_EDX: u32 =
    bits(&[11, 20, 22, 25, 27, 29, 30, 31]) | bits(&[0, 2, 4, 5, 6, 8, 15, 16, 23, 24]);
/// Leaf 8000_0021 EAX: LFENCE waits; loading a null selector clears its base.
const EXTENDED_21_EAX: u32 = bits(&[2, 6]);

/// Leaves by which user code finds extensions to use, where it asks itself.
pub(super) const NATIVE: [(u32, u32); 6] = [
    (1, 0),
    (7, 0),
    (7, 1),
    (0xd, 1),
    (0x8000_0001, 0),
    (0x8000_0008, 0),
];

/// Components of the extended register state (bits of XCR0).
pub(super) mod component {
    pub(in super::super) const X87: u64 = 1;
    pub(in super::super) const SSE: u64 = 2;
    const AVX: u64 = 4;
    /// Mask registers, upper halves of ZMM0 to 15, ZMM16 to 31.
    const AVX512: u64 = 0xe0;
    /// What a PV kernel keeps. Not PKRU: it never learns of protection keys.
    pub(in super::super) const KEPT: u64 = X87 | SSE | AVX | AVX512;

    /// The largest valid XCR0 within `supported`.
    pub(in super::super) fn whole(supported: u64) -> u64 {
        let mut xcr0 = X87 | SSE;
        if supported & AVX != 0 {
            xcr0 |= AVX;
            if supported & AVX512 == AVX512 {
                xcr0 |= AVX512;
            }
        }
        xcr0
    }
}

/// The leaves of a guest: (leaf, sub-leaf if it matters).
pub(super) fn leaves(ask: &dyn Fn(u32, u32) -> Registers) -> Vec<(u32, Option<u32>)> {
    let mut out = vec![(0, None), (1, None), (2, None)];
    // Caches, until one of type 0.
    out.extend(
        (0..8)
            .take_while(|index| ask(4, *index)[0] & 0x1f != 0)
            .map(|index| (4, Some(index))),
    );
    out.extend([(7, Some(0)), (7, Some(1)), (0xd, Some(0)), (0xd, Some(1))]);
    out.extend((2..8).map(|index| (0xd, Some(index))));
    out.extend((XEN..=XEN + 2).map(|leaf| (leaf, None)));
    let last = ask(0x8000_0000, 0)[0].clamp(0x8000_0000, 0x8000_0008);
    out.extend((0x8000_0000..=last).map(|leaf| (leaf, None)));
    if ask(0x8000_0000, 0)[0] >= MAX_EXTENDED {
        out.push((MAX_EXTENDED, None));
    }
    out
}

/// What a leaf says, given what the processor says.
pub(super) fn registers(
    ask: &dyn Fn(u32, u32) -> Registers,
    function: u32,
    index: u32,
    xcr0: u64,
) -> Registers {
    let [eax, ebx, ecx, edx] = ask(function, index);
    match function {
        0 => [eax.min(MAX_BASIC), ebx, ecx, edx],
        1 => {
            // Family and model; the cache line that CLFLUSH writes.
            let osxsave = if ecx & XSAVE == 0 { 0 } else { OSXSAVE };
            let ecx = (ecx & LEAF_1_ECX & !OSXSAVE) | osxsave | HYPERVISOR;
            [eax, ebx & 0xff00, ecx & wide(xcr0, 1, 2), edx & LEAF_1_EDX]
        }
        // Each vCPU has its caches for itself.
        4 => [eax & 0x3fff, ebx, ecx, edx],
        7 if index == 0 => [
            eax.min(1),
            ebx & LEAF_7_EBX & wide(xcr0, 7, 1),
            ecx & LEAF_7_ECX & wide(xcr0, 7, 2),
            edx & LEAF_7_EDX & wide(xcr0, 7, 3),
        ],
        7 => [eax & LEAF_7_1_EAX & wide(xcr0, 7, 0), 0, 0, 0],
        0xd => state(ask, index, xcr0),
        XEN => {
            let name = b"XenVMMXenVMM";
            let word = |at: usize| {
                u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]])
            };
            [XEN + 2, word(0), word(4), word(8)]
        }
        0x4000_0001 => [XEN_VERSION, 0, 0, 0],
        // Hypercall pages, and the register that makes one.
        0x4000_0002 => [1, XEN, 0, 0],
        0x8000_0000 => {
            let last = if eax >= MAX_EXTENDED {
                MAX_EXTENDED
            } else {
                eax.min(0x8000_0008)
            };
            [last, ebx, ecx, edx]
        }
        0x8000_0001 => [eax, ebx, ecx & EXTENDED_1_ECX, edx & EXTENDED_1_EDX],
        // Power management: a stable TSC is told by the clock's pages.
        0x8000_0007 => [0; 4],
        // Sizes of addresses.
        0x8000_0008 => [eax & 0xffff, 0, 0, 0],
        MAX_EXTENDED => [eax & EXTENDED_21_EAX, 0, 0, 0],
        // Names and caches.
        _ => [eax, ebx, ecx, edx],
    }
}

/// Masks out what needs registers that XCR0 does not have.
fn wide(xcr0: u64, leaf: u32, register: usize) -> u32 {
    const AVX_1_ECX: u32 = bits(&[12, 28, 29]);
    const AVX_7_EBX: u32 = bits(&[5]);
    const AVX_7_ECX: u32 = bits(&[9, 10]);
    const AVX512_7_EBX: u32 = bits(&[16, 17, 21, 28, 30, 31]);
    const AVX512_7_ECX: u32 = bits(&[1, 6, 11, 12, 14]);
    const AVX512_7_EDX: u32 = bits(&[2, 3, 8, 23]);
    let (avx, avx512) = match (leaf, register) {
        (1, 2) => (AVX_1_ECX, 0),
        (7, 1) => (AVX_7_EBX, AVX512_7_EBX),
        (7, 2) => (AVX_7_ECX, AVX512_7_ECX),
        (7, 3) => (0, AVX512_7_EDX),
        // Sub-leaf 1.
        (7, 0) => (bits(&[4, 23]), bits(&[5])),
        _ => (0, 0),
    };
    let mut hidden = 0;
    if xcr0 & 4 == 0 {
        hidden |= avx | avx512;
    }
    if xcr0 & 0xe0 != 0xe0 {
        hidden |= avx512;
    }
    !hidden
}

/// Leaf 0xd: the layout of what XSAVE writes. XSAVEOPT only of its variants:
/// XSAVES is for ring 0, XSAVEC has another layout.
fn state(ask: &dyn Fn(u32, u32) -> Registers, index: u32, xcr0: u64) -> Registers {
    if ask(1, 0)[2] & XSAVE == 0 {
        return [0; 4];
    }
    let kept = |i: u32| xcr0 >> i & 1 != 0;
    match index {
        0 => {
            // x87, SSE and the header, then the components at their offsets.
            let end = |i| {
                let [size, offset, ..] = ask(0xd, i);
                size.saturating_add(offset)
            };
            let size = (2..8)
                .filter(|i| kept(*i))
                .map(end)
                .max()
                .unwrap_or(0)
                .max(576);
            [xcr0 as u32, size, size, 0]
        }
        1 => [ask(0xd, 1)[0] & 1, 0, 0, 0],
        2..8 if kept(index) => ask(0xd, index),
        _ => [0; 4],
    }
}

/// Adds what the hypervisor's code in the guest needs and the kernel does not see.
pub(super) fn add_own_needs(registers: &mut Registers, function: u32, index: u32) {
    match (function, index) {
        (1, _) => {
            registers[2] |= X2APIC | TSC_DEADLINE;
            registers[3] |= PSE_APIC_PGE;
        }
        (7, 0) => registers[1] |= FSGSBASE,
        _ => {}
    }
}
