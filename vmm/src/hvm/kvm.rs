//! This machine's KVM.

use std::arch::x86_64::__cpuid;
use std::io;

use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::config::VmConfig;
use crate::machine::{Error, kvm};
use blanket_drivers::cpu::{self, Shown};

/// KVM and what it can do.
pub(super) struct Host {
    pub kvm: Kvm,
    /// The processor that the guest is shown.
    pub cpu: Shown,
    /// The MSRs that make up a vCPU's state.
    pub msrs: Vec<u32>,
    /// Whether the local APIC has a TSC-deadline timer.
    pub deadline_timer: bool,
}

/// Opens KVM for a VM of this configuration.
pub(super) fn open(config: &VmConfig) -> Result<Host, Error> {
    let cpus = config.cpus();
    let host = Kvm::new().map_err(|error| no_kvm(error.into()))?;
    let most = host.get_max_vcpus();
    if usize::from(cpus) > most {
        return Err(Error::TooManyCpus { cpus, most });
    }
    for (cap, name) in [
        (Cap::Irqchip, "interrupt controllers"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::UserMemory, "user memory"),
        (Cap::SetTssAddr, "TSS address"),
    ] {
        if !host.check_extension(cap) {
            return Err(Error::Missing(name));
        }
    }
    warn_without_hardware();
    let supported = cpu::supported(&host).map_err(kvm("read the supported CPUID"))?;
    let msrs = host
        .get_msr_index_list()
        .map_err(kvm("list the MSRs"))?
        .as_slice()
        .to_vec();
    Ok(Host {
        deadline_timer: host.check_extension(Cap::TscDeadlineTimer),
        kvm: host,
        cpu: Shown::choose(
            config.cpu.unwrap_or_default(),
            &supported,
            config.nested.unwrap_or(false),
        )?,
        msrs,
    })
}

/// Gives a VM what only an hvm machine has.
pub(super) fn prepare(vm: &VmFd) -> Result<(), Error> {
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(kvm("place the TSS"))
}

/// Three pages that Intel's processors need, where no guest looks: below the
/// BIOS at 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

pub(crate) fn no_kvm(source: io::Error) -> Error {
    let remedy = match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "load kvm_amd or kvm_intel (`modprobe kvm_amd`), or ask your provider for an instance type with nested virtualization"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "run as a member of group kvm (`sudo usermod -aG kvm $USER`, then log in again)"
        }
        _ => "see `blanket doctor`",
    };
    Error::NoKvm { source, remedy }
}

/// KVM without VMX and SVM (KVM-PVM) interprets a guest's kernel: a stock
/// kernel takes forever, small freestanding guests work.
fn warn_without_hardware() {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let vmx = __cpuid(1).ecx & VMX != 0;
    let svm = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & SVM != 0;
    if !vmx && !svm {
        tracing::warn!(
            "this machine has neither VMX nor SVM: a stock kernel will hardly get anywhere in the hvm machine"
        );
    }
}
