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
        let same = [
            ("memory", saved.memory == size(&self.ram)),
            ("vCPUs", saved.cpus.len() == self.vcpus.len()),
            ("devices", saved.virtio.len() == self.virtio.len()),
            (
                "interrupt controllers",
                saved.chips.iter().map(|chip| chip.chip_id).eq(CHIPS),
            ),
        ];
        if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
            return Err(failed(format!(
                "the saved guest has other {what}; configure this machine like it"
            )));
        }
        if saved.cpuid != self.cpuid {
            return Err(failed(
                "the saved guest was told of another processor; restore it on a node with the \
                 same processor and kernel",
            ));
        }
        Ok(saved)
    }
}
