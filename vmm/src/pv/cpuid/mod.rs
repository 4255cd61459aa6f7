//! What CPUID says in a Xen PV domain, and which register state goes with it.
//!
//! The kernel asks by a trapping form of the instruction and gets what is here.
//! User code executes the instruction itself. With hardware virtualization that
//! traps too, and KVM answers it from the same table. On other hosts
//! ([`Source::Native`]) it does not: user code sees the host's own processor,
//! AVX-512 and all, and uses it. A kernel that were told less would not save
//! that state when it switches tasks, and tasks would get each other's vector
//! registers. So there the kernel sees every extension of the register file
//! that the host has, its `XCR0` is the host's, and a host with state that no
//! PV kernel saves is refused.

mod policy;
#[cfg(test)]
mod tests;

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use policy::{Registers, component};

use blanket_drivers::cpu;

/// Who answers the CPUID instruction of the guest's user code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The host's processor.
    Native,
    /// KVM, with the table that it is given.
    Kvm,
}

/// Why there can be no PV domain here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has register state that PV kernels do not keep.
    #[error(
        "this host's processor has register state (XCR0 {host:#x}) of which the kernel of a pv machine cannot keep {unknown:#x}; use --machine hvm, or a host with hardware virtualization"
    )]
    State {
        /// The host's XCR0.
        host: u64,
        /// The bits that are too many.
        unknown: u64,
    },
    /// A saved guest has seen another processor.
    #[error(
        "the saved guest has seen another processor (CPUID leaf {leaf:#x}/{subleaf} differs); restore it on a host with the same processor"
    )]
    Differs {
        /// The first leaf that differs.
        leaf: u32,
        /// Its sub-leaf.
        subleaf: u32,
    },
    /// A saved guest has other register state.
    #[error(
        "the saved guest has register state {saved:#x} (XCR0), this host {here:#x}; restore it on a host with the same processor"
    )]
    OtherState {
        /// XCR0 of the saved guest.
        saved: u64,
        /// XCR0 here.
        here: u64,
    },
}

/// A leaf, or a sub-leaf of one that has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Leaf {
    function: u32,
    /// None: the sub-leaf that is asked for makes no difference.
    index: Option<u32>,
    registers: Registers,
}

/// What a guest sees of the processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visible {
    leaves: Vec<Leaf>,
    /// What user code sees beyond that, where it asks the processor itself.
    native: Vec<Leaf>,
    xcr0: u64,
}

impl Visible {
    /// For a guest on this host that KVM shows the processor of `table`.
    ///
    /// # Errors
    /// The processor is not one that a PV kernel can use.
    pub fn new(source: Source, table: &[kvm_cpuid_entry2]) -> Result<Self, Error> {
        let host = |function, index| {
            let result = __cpuid_count(function, index);
            [result.eax, result.ebx, result.ecx, result.edx]
        };
        match source {
            Source::Native => Self::build(&host, Some(host_xcr0())),
            Source::Kvm => Self::build(&|leaf, sub| cpu::ask(table, leaf, sub), None),
        }
    }

    /// `xcr0` is what user code has without anybody's doing.
    fn build(ask: &dyn Fn(u32, u32) -> Registers, xcr0: Option<u64>) -> Result<Self, Error> {
        let supported = u64::from(ask(0xd, 0)[0]);
        let xcr0 = match xcr0 {
            Some(host) if host & !component::KEPT != 0 => {
                let unknown = host & !component::KEPT;
                return Err(Error::State { host, unknown });
            }
            Some(host) => host,
            None => component::whole(supported),
        };
        let mut leaves = Vec::new();
        for (function, index) in policy::leaves(ask) {
            leaves.push(Leaf {
                function,
                index,
                registers: policy::registers(ask, function, index.unwrap_or(0), xcr0),
            });
        }
        let native = policy::NATIVE.iter().map(|&(function, index)| {
            let mut registers = ask(function, index);
            if function == 1 {
                // Which processor of the host it is.
                registers[1] &= 0xffff;
            }
            Leaf {
                function,
                index: Some(index),
                registers,
            }
        });
        Ok(Self {
            leaves,
            native: native.collect(),
            xcr0,
        })
    }

    /// The register state that the kernel keeps: the only value that XCR0 may get.
    #[must_use]
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Whether the processor has XSAVE. If not, kernel and user code have x87
    /// and SSE state, and nobody sets XCR0.
    #[must_use]
    pub fn has_xsave(&self) -> bool {
        self.cpuid(0, 1, 0)[2] & policy::XSAVE != 0
    }

    /// What the kernel of vCPU `vcpu` is told: EAX, EBX, ECX and EDX.
    #[must_use]
    pub fn cpuid(&self, vcpu: usize, function: u32, index: u32) -> Registers {
        let leaf = self.leaves.iter().find(|leaf| {
            leaf.function == function && leaf.index.is_none_or(|wanted| wanted == index)
        });
        let mut registers = leaf.map_or([0; 4], |leaf| leaf.registers);
        if function == 1 {
            registers[1] |= apic_id(vcpu) << 24;
        }
        registers
    }

    /// The table for KVM: the same, and what the hypervisor's own code in the
    /// guest uses of the processor.
    #[must_use]
    pub fn kvm(&self, vcpu: usize) -> Vec<kvm_cpuid_entry2> {
        self.leaves
            .iter()
            .map(|leaf| {
                let index = leaf.index.unwrap_or(0);
                let mut registers = self.cpuid(vcpu, leaf.function, index);
                policy::add_own_needs(&mut registers, leaf.function, index);
                let [eax, ebx, ecx, edx] = registers;
                kvm_cpuid_entry2 {
                    function: leaf.function,
                    index,
                    flags: leaf.index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                }
            })
            .collect()
    }

    /// Whether a guest that has seen `saved` can go on with this.
    ///
    /// # Errors
    /// It would find another processor.
    pub fn fits(&self, saved: &Self) -> Result<(), Error> {
        if self.xcr0 != saved.xcr0 {
            return Err(Error::OtherState {
                saved: saved.xcr0,
                here: self.xcr0,
            });
        }
        let pairs = [(&self.leaves, &saved.leaves), (&self.native, &saved.native)];
        for (here, saved) in pairs {
            let differs = saved
                .iter()
                .find(|leaf| !here.contains(leaf))
                .or_else(|| here.iter().find(|leaf| !saved.contains(leaf)));
            if let Some(leaf) = differs {
                return Err(Error::Differs {
                    leaf: leaf.function,
                    subleaf: leaf.index.unwrap_or(0),
                });
            }
        }
        Ok(())
    }
}

fn apic_id(vcpu: usize) -> u32 {
    vcpu as u32 & 0xff
}

/// The host's XCR0; only x87 and SSE state without XSAVE.
fn host_xcr0() -> u64 {
    #[target_feature(enable = "xsave")]
    fn read() -> u64 {
        // SAFETY: register 0 exists wherever XSAVE is in use.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    if __cpuid_count(1, 0).ecx & policy::OSXSAVE == 0 {
        return component::X87 | component::SSE;
    }
    // SAFETY: the operating system has enabled XSAVE, so XGETBV may be executed.
    unsafe { read() }
}
