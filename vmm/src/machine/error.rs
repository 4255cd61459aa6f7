//! What can go wrong on the way to a running machine.

use std::io;

use blanket_devices::lifecycle;

use crate::hvm::boot;
use crate::pv::builder;

/// Why a machine cannot be built or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No kernel is configured.
    #[error("no kernel: name one with --kernel FILE")]
    NoKernel,
    /// `/dev/kvm` cannot be used.
    #[error("cannot use /dev/kvm: {source}; {remedy}")]
    NoKvm {
        /// Why.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// KVM has fewer vCPUs.
    #[error("{cpus} vCPUs: this machine's KVM has at most {most}; ask for fewer with --cpus")]
    TooManyCpus {
        /// Asked for.
        cpus: u8,
        /// What KVM has.
        most: usize,
    },
    /// KVM lacks something that the machine cannot do without.
    #[error("this machine's KVM has no {0}; use a newer kernel")]
    Missing(&'static str),
    /// KVM refused something.
    #[error("KVM cannot {0}: {1}")]
    Kvm(&'static str, io::Error),
    /// Threads, event loops or descriptors cannot be had.
    #[error("cannot {0}: {1}")]
    Resource(&'static str, io::Error),
    /// The memory for BARs is full.
    #[error("no room for another PCI device: {0}")]
    Window(vm_allocator::Error),
    /// No random bytes.
    #[error("cannot read /dev/urandom: {0}")]
    Random(io::Error),
    /// The kernel or what belongs to it.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The domain of a pv machine.
    #[error(transparent)]
    Domain(#[from] builder::Error),
    /// The hypervisor's area of a pv machine.
    #[error("cannot prepare the hypervisor's area: {0}")]
    Area(#[from] vm_memory::GuestMemoryError),
    /// The processor that was asked for cannot be shown.
    #[error("{0}; use --cpu host, or a lower level")]
    Cpu(#[from] blanket_drivers::cpu::Error),
    /// The processor's register state cannot be managed.
    #[error(transparent)]
    Cpuid(#[from] crate::pv::cpuid::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] blanket_memory::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] blanket_drivers::store::Error),
    /// A network interface.
    #[error(transparent)]
    Tap(#[from] blanket_drivers::tap::Error),
    /// A network interface's backend.
    #[error(transparent)]
    VhostUser(#[from] blanket_devices::vhost_user::Error),
    /// A serial port or console.
    #[error(transparent)]
    Char(#[from] blanket_devices::char::Error),
    /// A device or vCPU.
    #[error(transparent)]
    Lifecycle(#[from] lifecycle::Error),
}
