//! Models of the processor: what guests are told by CPUID, the same on every
//! node that has the model, whatever its own processor is.
//!
//! A model is a level of x86-64 (its psABI) of one of two vendors. The vendor
//! is the node's: what kernels do by vendor does not work on the other's
//! processors. Family and model are of an early processor of that level, so
//! that guests protect themselves from what any of its successors may have.
//! What the node's processor and its microcode have to protect guests from
//! speculation comes on top, as does what KVM offers: hiding it would be worse
//! than a difference. All else (caches, sizes of addresses, counters, power
//! management, frequencies) is the same everywhere, or not there.

mod features;
#[cfg(test)]
mod tests;

use std::arch::x86_64::__cpuid;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use features::{ALL, D1, D81, Given, REPEATED, Word};

/// Bits of a physical address in every model.
const ADDRESS_BITS: u32 = 40;

/// Bytes of memory that a guest of any model can have: below 4 GiB is room for
/// devices.
pub const MOST_MEMORY: u64 = (1 << ADDRESS_BITS) - (4 << 30);

/// EAX, EBX, ECX and EDX.
pub type Registers = [u32; 4];

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CpuChoice {
    /// `x86-64-v3` where the node has it, else `x86-64-v2`; the node's own
    /// processor where neither can be shown.
    #[default]
    Auto,
    /// The node's own processor, with all that KVM offers of it.
    Host,
    /// SSE4.2, AES.
    #[serde(rename = "x86-64-v2")]
    #[value(name = "x86-64-v2")]
    V2,
    /// And AVX2, BMI, FMA, RDRAND.
    #[serde(rename = "x86-64-v3")]
    #[value(name = "x86-64-v3")]
    V3,
    /// And AVX-512.
    #[serde(rename = "x86-64-v4")]
    #[value(name = "x86-64-v4")]
    V4,
}

/// A level of x86-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// SSE4.2, AES.
    V2,
    /// And AVX2, BMI, FMA, RDRAND.
    V3,
    /// And AVX-512.
    V4,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

/// Why a guest cannot have the processor that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The node's processor is less.
    #[error("this node's processor, as KVM offers it, has no {missing}, which {level} has")]
    Lacks {
        /// What was asked for.
        level: Level,
        /// The features that are missing, by their names in `/proc/cpuinfo`.
        missing: String,
    },
    /// The node's processor is of a vendor without models.
    #[error("there are models of AMD's and Intel's processors only")]
    Vendor,
    /// Nothing stands between the guest's programs and the processor.
    #[error(
        "this node's KVM does not intercept CPUID, so that programs in a pv machine see the node's processor"
    )]
    Native,
}

/// What KVM offers of this node's processor, and the processor's name, which
/// KVM leaves out.
///
/// # Errors
/// KVM does not tell.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let mut table = supported.as_slice().to_vec();
    for entry in &mut table {
        if NAME.contains(&entry.function) {
            let name = __cpuid(entry.function);
            [entry.eax, entry.ebx, entry.ecx, entry.edx] = [name.eax, name.ebx, name.ecx, name.edx];
        }
    }
    Ok(table)
}

/// The leaves with the processor's name.
const NAME: RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

/// The processor that a guest is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    /// What CPUID says of it, before the guest's topology is put in.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// What it is: a level, or none for the node's own processor.
    pub level: Option<Level>,
    /// Why it is no better one, where nobody said which.
    pub why: Option<Error>,
}

impl Shown {
    /// The choice that comes to the same on this node and on all others.
    #[must_use]
    pub fn settled(&self) -> CpuChoice {
        match self.level {
            None => CpuChoice::Host,
            Some(Level::V2) => CpuChoice::V2,
            Some(Level::V3) => CpuChoice::V3,
            Some(Level::V4) => CpuChoice::V4,
        }
    }

    /// What is chosen, given what KVM supports. Without `nested`, the guest
    /// finds no virtualization in its processor.
    ///
    /// # Errors
    /// The node's processor lacks what the choice needs.
    pub fn choose(
        choice: CpuChoice,
        supported: &[kvm_cpuid_entry2],
        nested: bool,
    ) -> Result<Self, Error> {
        let fixed = |level| {
            Ok(Self {
                cpuid: model(level, supported, nested)?,
                level: Some(level),
                why: None,
            })
        };
        match choice {
            CpuChoice::Host => Ok(Self::host(supported, nested)),
            CpuChoice::V2 => fixed(Level::V2),
            CpuChoice::V3 => fixed(Level::V3),
            CpuChoice::V4 => fixed(Level::V4),
            CpuChoice::Auto => Ok(fixed(Level::V3).unwrap_or_else(|why| Self {
                why: Some(why),
                ..fixed(Level::V2).unwrap_or_else(|_| Self::host(supported, nested))
            })),
        }
    }

    /// The processor of a node whose KVM does not intercept CPUID in programs.
    ///
    /// # Errors
    /// A model was asked for.
    pub fn native(choice: CpuChoice, supported: &[kvm_cpuid_entry2]) -> Result<Self, Error> {
        match choice {
            CpuChoice::Auto => Ok(Self {
                why: Some(Error::Native),
                ..Self::host(supported, false)
            }),
            CpuChoice::Host => Ok(Self::host(supported, false)),
            CpuChoice::V2 | CpuChoice::V3 | CpuChoice::V4 => Err(Error::Native),
        }
    }

    fn host(supported: &[kvm_cpuid_entry2], nested: bool) -> Self {
        let mut cpuid = supported.to_vec();
        if !nested {
            for feature in ALL.iter().filter(|feature| feature.given == Given::Nested) {
                let Word(function, index, register) = feature.word;
                for entry in &mut cpuid {
                    if (entry.function, entry.index) == (function, index) {
                        let mut registers = registers(entry);
                        registers[register] &= !(1 << feature.bit);
                        [entry.eax, entry.ebx, entry.ecx, entry.edx] = registers;
                    }
                }
            }
            cpuid.retain(|entry| entry.function != SVM_LEAF);
        }
        Self {
            cpuid,
            level: None,
            why: None,
        }
    }
}

/// What KVM offers of SVM to a guest hypervisor.
const SVM_LEAF: u32 = 0x8000_000a;

fn registers(entry: &kvm_cpuid_entry2) -> Registers {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// What a table says to a guest that asks for a leaf.
#[must_use]
pub fn ask(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> Registers {
    let found = table.iter().find(|entry| {
        let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        entry.function == function && (!indexed || entry.index == index)
    });
    found.map_or([0; 4], registers)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Amd,
    Intel,
}

impl Vendor {
    fn of(leaf_0: Registers) -> Option<Self> {
        let [_, ebx, ecx, edx] = leaf_0.map(u32::to_le_bytes);
        match &[ebx, edx, ecx].concat()[..] {
            b"AuthenticAMD" => Some(Self::Amd),
            b"GenuineIntel" => Some(Self::Intel),
            _ => None,
        }
    }

    /// Family, model and stepping, as leaf 1 has them: Zen and Zen 4;
    /// Westmere, Haswell and Skylake, all of servers.
    fn signature(self, level: Level) -> u32 {
        match (self, level) {
            (Self::Amd, Level::V2 | Level::V3) => 0x0080_0f12,
            (Self::Amd, Level::V4) => 0x00a1_0f11,
            (Self::Intel, Level::V2) => 0x0002_06c2,
            (Self::Intel, Level::V3) => 0x0003_06f2,
            (Self::Intel, Level::V4) => 0x0005_0654,
        }
    }
}

/// The leaves of a model by number and index, whose index matters if it is there.
#[derive(Default)]
struct Leaves(BTreeMap<(u32, Option<u32>), Registers>);

impl Leaves {
    fn set(&mut self, function: u32, registers: Registers) {
        self.0.insert((function, None), registers);
    }

    fn set_indexed(&mut self, function: u32, index: u32, registers: Registers) {
        self.0.insert((function, Some(index)), registers);
    }

    /// The register of a leaf with its features.
    fn word(&mut self, Word(function, index, register): Word) -> &mut u32 {
        let index = matches!(function, 7 | 0xd).then_some(index);
        &mut self.0.entry((function, index)).or_default()[register]
    }

    fn entries(self) -> Vec<kvm_cpuid_entry2> {
        let entry = |((function, index), [eax, ebx, ecx, edx]): ((u32, Option<u32>), Registers)| {
            kvm_cpuid_entry2 {
                function,
                index: index.unwrap_or(0),
                flags: index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            }
        };
        self.0.into_iter().map(entry).collect()
    }
}

fn model(
    level: Level,
    supported: &[kvm_cpuid_entry2],
    nested: bool,
) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    let ask = |function, index| ask(supported, function, index);
    let vendor = Vendor::of(ask(0, 0)).ok_or(Error::Vendor)?;
    let mut leaves = Leaves::default();
    general(&mut leaves, vendor, level, ask(0, 0));
    match vendor {
        Vendor::Amd => amd(&mut leaves),
        Vendor::Intel => intel(&mut leaves),
    }
    if level >= Level::V3 {
        vectors(&mut leaves, level, &ask);
    }
    // KVM's signature.
    leaves.set(0x4000_0000, ask(0x4000_0000, 0));
    leaves.set(0x4000_0001, [0; 4]);
    if nested {
        leaves.set(SVM_LEAF, ask(SVM_LEAF, 0));
    }
    let mut missing = Vec::new();
    for feature in ALL {
        let Word(function, index, register) = feature.word;
        let has = ask(function, index)[register] >> feature.bit & 1 != 0;
        let shown = match feature.given {
            Given::From(first) => first <= level,
            Given::WithNode => has,
            Given::Nested => has && nested,
        };
        if shown && !has {
            missing.push(feature.name);
        }
        *leaves.word(feature.word) |= u32::from(shown) << feature.bit;
    }
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Err(Error::Lacks { level, missing });
    }
    if vendor == Vendor::Amd {
        let repeated = *leaves.word(D1) & REPEATED;
        *leaves.word(D81) |= repeated;
    }
    Ok(leaves.entries())
}

/// What both vendors have.
fn general(leaves: &mut Leaves, vendor: Vendor, level: Level, leaf_0: Registers) {
    let last = if level >= Level::V3 { 0xd } else { 0xb };
    let [_, ebx, ecx, edx] = leaf_0;
    leaves.set(0, [last, ebx, ecx, edx]);
    // Lines of caches have 64 bytes; APIC IDs come later.
    leaves.set(1, [vendor.signature(level), 8 << 8, 0, 0]);
    // The local APIC's timer runs in every state of sleep.
    leaves.set(6, [1 << 2, 0, 0, 0]);
    leaves.set_indexed(7, 0, [0; 4]);
    leaves.set_indexed(0xb, 0, [0; 4]);
    let last = match vendor {
        Vendor::Amd => 0x8000_0021,
        Vendor::Intel => 0x8000_0008,
    };
    leaves.set(0x8000_0000, [last, ebx, ecx, edx]);
    let mut name = [0; 48];
    for (to, from) in name
        .iter_mut()
        .zip(format!("Blanket {level} processor").bytes())
    {
        *to = from;
    }
    for (function, part) in NAME.zip(name.chunks_exact(16)) {
        let word = |i: usize| u32::from_le_bytes([part[i], part[i + 1], part[i + 2], part[i + 3]]);
        leaves.set(function, [word(0), word(4), word(8), word(12)]);
    }
    // 48 bits of virtual addresses.
    leaves.set(0x8000_0008, [48 << 8 | ADDRESS_BITS, 0, 0, 0]);
}

/// First-level caches of 32 KiB, a second one of 512 KiB, a third one of 16 MiB.
fn amd(leaves: &mut Leaves) {
    const ENTRIES: u32 = 64;
    const FULLY: u32 = 0xff << 8;
    let tlb = (FULLY | ENTRIES) << 16 | FULLY | ENTRIES;
    let first = 32 << 24 | 8 << 16 | 1 << 8 | 64;
    leaves.set(0x8000_0005, [tlb, tlb, first, first]);
    // Associativity by code: 4 is 4-way, 6 is 8-way, 8 is 16-way.
    let tlb = (4 << 12 | 512) << 16 | 4 << 12 | 512;
    let second = 512 << 16 | 6 << 12 | 1 << 8 | 64;
    let third = 32 << 18 | 8 << 12 | 1 << 8 | 64;
    leaves.set(0x8000_0006, [tlb, tlb, second, third]);
}

/// The same, but for a second-level cache of 256 KiB.
fn intel(leaves: &mut Leaves) {
    // "See leaf 4".
    leaves.set(2, [0x00fe_ff01, 0, 0, 0]);
    const DATA: u32 = 1;
    const CODE: u32 = 2;
    const UNIFIED: u32 = 3;
    let caches = [
        (DATA, 1, 8, 64),
        (CODE, 1, 8, 64),
        (UNIFIED, 2, 8, 512),
        (UNIFIED, 3, 16, 16384),
    ];
    for (index, (kind, level, ways, sets)) in (0..).zip(caches) {
        const INITIALIZES_ITSELF: u32 = 1 << 8;
        let eax = kind | level << 5 | INITIALIZES_ITSELF;
        leaves.set_indexed(4, index, [eax, (ways - 1) << 22 | 63, sets - 1, 0]);
    }
}

/// The state of vector registers. Where the parts are is the processor's.
fn vectors(leaves: &mut Leaves, level: Level, ask: &dyn Fn(u32, u32) -> Registers) {
    let parts: &[u32] = if level >= Level::V4 {
        &[2, 5, 6, 7]
    } else {
        &[2]
    };
    // The parts that are always there: x87 and SSE.
    let mut components = 3;
    let mut size = 576;
    for part in parts {
        let [length, offset, ecx, edx] = ask(0xd, *part);
        components |= 1 << part;
        size = size.max(length.saturating_add(offset));
        leaves.set_indexed(0xd, *part, [length, offset, ecx, edx]);
    }
    leaves.set_indexed(0xd, 0, [components, size, size, 0]);
    leaves.set_indexed(0xd, 1, [0; 4]);
}
