//! A whole hvm machine's state, but for its memory.
//!
//! Guest memory is carried by whoever moves the machine, and is in place before
//! the state is restored. The guest is not told: it goes on as it was.

use blanket_devices::lifecycle::{self, Lifecycle, SavedState};
use blanket_memory::GuestRam;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_cpuid_entry2,
    kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::machine::Machine;
use super::time::Stopped;
use crate::machine::lock;
use crate::vcpu::state::VcpuState;

const KIND: &str = "hvm-machine";
const VERSION: u32 = 1;
/// KVM's interrupt controllers.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The state as it is carried.
#[derive(Serialize, Deserialize)]
struct Saved {
    memory: u64,
    cpuid: Vec<kvm_cpuid_entry2>,
    cpus: Vec<SavedState>,
    chips: Vec<kvm_irqchip>,
    /// Nanoseconds of the paravirtual clock. Not every KVM has it.
    clock: Option<u64>,
    /// The register that selects PCI configuration space, at port 0xcf8.
    pci_address: u32,
    virtio: Vec<SavedState>,
    serial: SavedState,
    power: SavedState,
}

/// What two machines have in common between which a guest can move.
#[derive(Serialize, Deserialize)]
struct Look {
    memory: u64,
    cpus: usize,
    devices: usize,
    chips: Vec<u32>,
    cpuid: Vec<kvm_cpuid_entry2>,
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(message: impl ToString) -> lifecycle::Error {
    lifecycle::Error::Device {
        device: KIND.to_owned(),
        message: message.to_string(),
    }
}

fn size(ram: &GuestRam) -> u64 {
    ram.iter().map(GuestMemoryRegion::len).sum()
}

fn read_chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, lifecycle::Error> {
    let read = |chip_id| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).map_err(failed)?;
        Ok(chip)
    };
    CHIPS.into_iter().map(read).collect()
}

impl Machine {
    /// See [`crate::machine::Machine::save`].
    pub(super) fn saved(&self) -> Result<SavedState, lifecycle::Error> {
        let mut cpus = Vec::new();
        for vcpu in &self.vcpus {
            cpus.push(VcpuState::read(&vcpu.paused_fd(), &self.msrs)?.pack()?);
        }
        let mut pci_address = [0; 4];
        self.bus.pci.read_port(0, &mut pci_address);
        let virtio = self.virtio.iter().map(|device| lock(device).save());
        let saved = Saved {
            memory: size(&self.ram),
            cpuid: self.cpuid.clone(),
            cpus,
            chips: read_chips(&self.vm)?,
            clock: self.stopped.and_then(|stopped| stopped.clock),
            pci_address: u32::from_le_bytes(pci_address),
            virtio: virtio.collect::<Result<_, _>>()?,
            serial: self.serial.save()?,
            power: self.power().save()?,
        };
        SavedState::pack(KIND, VERSION, &saved)
    }

    /// See [`crate::machine::Machine::check`].
    pub(super) fn fits(&self, state: &SavedState) -> Result<(), lifecycle::Error> {
        self.unpack(state).map(drop)
    }

    /// See [`crate::machine::Machine::restore`].
    pub(super) fn restored(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        let saved = self.unpack(state)?;
        // The saved guest's memory is in its place.
        self.loaded = None;
        for chip in &saved.chips {
            self.vm.set_irqchip(chip).map_err(failed)?;
        }
        for (vcpu, saved) in self.vcpus.iter().zip(&saved.cpus) {
            VcpuState::unpack(saved)?.write(&vcpu.paused_fd())?;
        }
        // The counters were among the registers; both clocks go on with the vCPUs.
        let now = Stopped::now(&self.vm);
        self.stopped = Some(Stopped {
            clock: saved.clock,
            ..now
        });
        let pci = &self.bus.pci;
        pci.write_port(0, &saved.pci_address.to_le_bytes());
        for (device, saved) in self.virtio.iter().zip(&saved.virtio) {
            lock(device).restore(saved)?;
        }
        pci.reroute();
        self.serial.restore(&saved.serial)?;
        self.power().restore(&saved.power)
    }

    /// A saved state, of a machine like this one.
    fn unpack(&self, state: &SavedState) -> Result<Saved, lifecycle::Error> {
        let saved: Saved = state.unpack(KIND, VERSION)?;
        self.resembles(&Look {
            memory: saved.memory,
            cpus: saved.cpus.len(),
            devices: saved.virtio.len(),
            chips: saved.chips.iter().map(|chip| chip.chip_id).collect(),
            cpuid: saved.cpuid.clone(),
        })?;
        Ok(saved)
    }

    /// See [`crate::machine::Machine::likeness`].
    pub(super) fn look(&self) -> Result<SavedState, lifecycle::Error> {
        let look = Look {
            memory: size(&self.ram),
            cpus: self.vcpus.len(),
            devices: self.virtio.len(),
            chips: CHIPS.to_vec(),
            cpuid: self.cpuid.clone(),
        };
        SavedState::pack(KIND, VERSION, &look)
    }

    /// See [`crate::machine::Machine::is_like`].
    pub(super) fn compare(&self, likeness: &SavedState) -> Result<(), lifecycle::Error> {
        self.resembles(&likeness.unpack(KIND, VERSION)?)
    }

    fn resembles(&self, look: &Look) -> Result<(), lifecycle::Error> {
        let same = [
            ("memory", look.memory == size(&self.ram)),
            ("vCPUs", look.cpus == self.vcpus.len()),
            ("devices", look.devices == self.virtio.len()),
            ("interrupt controllers", look.chips == CHIPS),
        ];
        if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
            return Err(failed(format!(
                "the saved guest has other {what}; configure this machine like it"
            )));
        }
        if look.cpuid != self.cpuid {
            return Err(failed(
                "the saved guest was told of another processor; restore it on a node with the \
                 same processor and kernel",
            ));
        }
        Ok(())
    }
}
