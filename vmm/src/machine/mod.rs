//! What all kinds of machines have in common, and which kind a guest gets.

pub(crate) mod ahead;
pub(crate) mod dirty;
mod error;
pub(crate) mod health;
pub(crate) mod open;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blanket_devices::lifecycle::{self, SavedState};
use blanket_devices::worker::{ThreadSetup, Worker, Workers};
use blanket_devices::xen::control;
use blanket_drivers::probe::Virtualization;
use blanket_memory::GuestRam;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

pub use ahead::Ahead;
pub use error::Error;
pub use open::Given;

use crate::api::types::{DeviceInfo, Machine as Kind, MemoryMetrics, Metrics, Target};
use crate::config::{MachineChoice, VmConfig};
use crate::jail::{Class, seccomp};
use crate::migrate::HandOver;
use crate::vcpu::{Brake, EventSink};
use crate::{hvm, pv};
use blanket_drivers::cpu::Shown;
use blanket_drivers::rings::Rings;

/// A machine, whole. The monitor's states say when each step makes sense.
pub trait Machine: Send {
    /// Which kind it is.
    fn kind(&self) -> Kind;

    /// The processor that the guest is shown.
    fn cpu(&self) -> &Shown;

    /// Loads the kernel, unless that was done when the machine was built, and
    /// points the first vCPU at it.
    ///
    /// # Errors
    /// The kernel cannot be loaded.
    fn load(&mut self) -> Result<(), Error>;

    /// Starts the devices, then the vCPUs.
    ///
    /// # Errors
    /// A device cannot start.
    fn start(&mut self) -> Result<(), lifecycle::Error>;

    /// Stops the vCPUs, then brings the devices to rest.
    ///
    /// # Errors
    /// A device does not come to rest.
    fn pause(&mut self) -> Result<(), lifecycle::Error>;

    /// Lets a paused machine run on.
    ///
    /// # Errors
    /// A device cannot go on.
    fn resume(&mut self) -> Result<(), lifecycle::Error>;

    /// Brings a paused machine to its state after power-on, kernel loaded.
    ///
    /// # Errors
    /// A device, a vCPU or the kernel cannot be reset.
    fn reset(&mut self) -> Result<(), Error>;

    /// Ends the machine: the vCPUs stop, the devices flush and let go.
    fn halt(&mut self);

    /// Asks the guest to shut itself down.
    ///
    /// # Errors
    /// It cannot be asked.
    fn press_power_button(&mut self) -> Result<(), lifecycle::Error>;

    /// Asks the guest to suspend itself. It does so when it can, and says so
    /// with [`crate::vcpu::Event::Suspended`].
    ///
    /// # Errors
    /// It cannot be asked.
    fn suspend(&mut self) -> Result<(), RequestError>;

    /// Presses a SysRq key of the guest's.
    ///
    /// # Errors
    /// There is no such key.
    fn press_sysrq(&mut self, key: char) -> Result<(), RequestError>;

    /// Whether the guest has suspended itself: until the machine is resumed,
    /// which the guest takes for a cancelled suspension.
    fn is_suspended(&self) -> bool;

    /// All memory that goes with a saved state.
    fn memory(&self) -> &GuestRam;

    /// KVM's end of the machine: it knows which pages the guest writes.
    fn vm(&self) -> Arc<VmFd>;

    /// Where KVM lists those pages, if it is not in its log.
    fn rings(&self) -> Option<Arc<Rings>>;

    /// What slows each vCPU down.
    fn brakes(&self) -> Vec<Brake>;

    /// What another machine has to have in common with this one to take its
    /// guest over, as far as that can be told while the guest runs.
    ///
    /// # Errors
    /// It cannot be encoded.
    fn likeness(&self) -> Result<SavedState, lifecycle::Error>;

    /// Whether this machine is like the one that `likeness` is of.
    ///
    /// # Errors
    /// It is not: what differs, and the remedy.
    fn is_like(&self, likeness: &SavedState) -> Result<(), lifecycle::Error>;

    /// The state of a paused machine, but for its memory.
    ///
    /// # Errors
    /// KVM or a device does not tell its own.
    fn save(&self) -> Result<SavedState, lifecycle::Error>;

    /// Whether [`Machine::restore`] can work here, before anything else is
    /// moved, stopped or changed for it.
    ///
    /// # Errors
    /// The state is damaged, too new, or of a machine or processor that differs.
    fn check(&self, state: &SavedState) -> Result<(), lifecycle::Error>;

    /// Takes over a saved state, on an equally configured machine that is paused
    /// or has not been started, with the saved guest's memory in place. It is
    /// paused then. A guest that had suspended itself finds itself in a new
    /// domain when it is resumed.
    ///
    /// # Errors
    /// As for [`Machine::check`]: nothing has been touched then. Or KVM or a
    /// device refuses its part: the machine must be reset then.
    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error>;

    /// Tells the guest, which may go on from where another one was, what its VM is
    /// called, where it can look for that.
    ///
    /// # Errors
    /// It cannot be told.
    fn set_name(&mut self, name: &str) -> Result<(), lifecycle::Error>;

    /// Tells a guest that has just been restored that it may be one of several
    /// that go on from there, if its machine can: the guest of a `pv` machine
    /// only finds out if it had suspended itself.
    ///
    /// # Errors
    /// It cannot be told.
    fn new_generation(&mut self) -> Result<(), lifecycle::Error>;

    /// Asks the guest to use so much of what it has.
    ///
    /// # Errors
    /// It cannot be asked, or not for so much or little.
    fn set_target(&mut self, target: &Target) -> Result<(), TargetError>;

    /// What the guest is asked to use, if it can be asked.
    fn target(&self) -> Option<Target>;

    /// The devices, for people.
    fn devices(&self) -> Vec<DeviceInfo>;

    /// Whether a write waits for room on the node.
    fn waits_for_room(&self) -> bool;

    /// The counters now.
    fn metrics(&self) -> Metrics;
}

/// Why a guest is not asked to use more or less.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Its machine has no way to ask.
    #[error(
        "the guest of an hvm machine uses all that it has; only the guests of pv machines can be asked to use less"
    )]
    Fixed,
    /// It is out of bounds.
    #[error(transparent)]
    Refused(#[from] control::Error),
}

/// Why a guest is not asked for something.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Its machine has no way to ask.
    #[error("the guest of an hvm machine cannot be asked to suspend itself; pause it instead")]
    NoSuspension,
    /// Its machine has no such key.
    #[error(
        "an hvm machine has no SysRq key; write the letter to /proc/sysrq-trigger in the guest"
    )]
    NoSysRq,
    /// It has not said that it can.
    #[error(
        "the guest has not said that it can suspend itself: its drivers are not up yet, or its kernel lacks support for hibernation; wait, or pause it instead"
    )]
    Unable,
    /// There is no such key, or the xenstore refuses.
    #[error(transparent)]
    Refused(#[from] control::Error),
}

/// What a machine is made of, opened while the process still may.
pub enum Parts {
    /// Of an hvm machine.
    Hvm(Box<hvm::Parts>),
    /// Of a pv machine.
    Pv(Box<pv::Parts>),
}

/// The kind of machine for a configuration, and why.
#[must_use]
pub fn choose(config: &VmConfig) -> (Kind, String) {
    match config.machine.unwrap_or_default() {
        MachineChoice::Hvm => (Kind::Hvm, "it was asked for".to_owned()),
        MachineChoice::Pv => (Kind::Pv, "it was asked for".to_owned()),
        MachineChoice::Auto => {
            let found = Virtualization::of_this_machine();
            let kind = if found.is_hardware() {
                Kind::Hvm
            } else {
                Kind::Pv
            };
            (kind, format!("this machine has {found}"))
        }
    }
}

impl Parts {
    /// Opens all that `config` names but for what is given, for the machine that
    /// it gets.
    ///
    /// # Errors
    /// The first thing that is missing, in use or not permitted, with the
    /// remedy. What was made until then (taps, sockets) goes away again.
    pub fn open(config: &VmConfig, given: Given) -> Result<Self, Error> {
        let (kind, reason) = choose(config);
        tracing::info!(machine = %kind, %reason, "machine chosen");
        Ok(match kind {
            Kind::Hvm => Self::Hvm(Box::new(hvm::Parts::open(config, given)?)),
            Kind::Pv => Self::Pv(Box::new(pv::Parts::open(config, given)?)),
        })
    }

    /// What hands its disks and interfaces over to another monitor.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn hand_over(&self) -> io::Result<HandOver> {
        match self {
            Self::Hvm(parts) => HandOver::of(parts.disks.iter(), &parts.interfaces, true),
            Self::Pv(parts) => HandOver::of(
                parts.disks.iter().map(|(it, _)| it),
                &parts.interfaces,
                false,
            ),
        }
    }

    /// Puts the machine together. Threads are made here, each under its
    /// filter; the guest does not run yet.
    ///
    /// # Errors
    /// KVM or the kernel refuses something.
    pub fn build(self, config: &VmConfig, events: &EventSink) -> Result<Box<dyn Machine>, Error> {
        Ok(match self {
            Self::Hvm(parts) => Box::new(hvm::Machine::build(config, *parts, events)?),
            Self::Pv(parts) => Box::new(pv::Machine::build(config, *parts, events)?),
        })
    }
}

/// Names an operation of KVM that failed.
pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| Error::Kvm(what, error.into())
}

/// Names a resource that could not be had.
pub(crate) fn resource(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::Resource(what, error)
}

/// What every thread of a class does first.
pub(crate) fn setup(class: Class) -> ThreadSetup {
    Box::new(move || seccomp::confine(class))
}

/// Locks what a panic cannot have left inconsistent: panics end the process.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives a VM its memory, and then interrupt controllers. In this order: those are
/// on KVM's buses, whose old lists it forgets some milliseconds later, and until
/// then it takes no other memory (8 ms against 0.4, whatever its size).
pub(crate) fn furnish(vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    map_memory_with(vm, ram, 0)?;
    vm.create_irq_chip()
        .map_err(kvm("create interrupt controllers"))
}

/// The same with flags of KVM's (`KVM_MEM_*`), which may change as it runs.
pub(crate) fn map_memory_with(vm: &VmFd, ram: &GuestRam, flags: u32) -> Result<(), Error> {
    for (slot, region) in ram.iter().enumerate() {
        let mapping = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is the region's own and lives as long as the
        // machine, which outlives its vCPUs.
        unsafe { vm.set_user_memory_region(mapping) }.map_err(kvm("map guest memory"))?;
    }
    Ok(())
}

/// Starts the threads that serve rings.
pub(crate) fn spawn_workers(count: u8) -> Result<Workers, Error> {
    (0..count)
        .map(|i| Worker::spawn(&format!("io{i}"), setup(Class::Worker)))
        .collect::<io::Result<Vec<_>>>()
        .map(Into::into)
        .map_err(resource("start an I/O thread"))
}

/// Counters by name.
pub(crate) fn named(pairs: Vec<(&'static str, u64)>) -> BTreeMap<String, u64> {
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// Memory of a guest and of this process.
pub(crate) fn memory_metrics(ram: &GuestRam) -> MemoryMetrics {
    MemoryMetrics {
        guest: ram.iter().map(GuestMemoryRegion::len).sum(),
        guest_resident: blanket_memory::touched_bytes(ram),
        resident: resident(),
    }
}

/// Bytes of this process that are in memory: the second field of statm.
fn resident() -> u64 {
    const PAGE: u64 = 4096;
    std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|statm| statm.split(' ').nth(1)?.parse::<u64>().ok())
        .map_or(0, |pages| pages * PAGE)
}
