//! Interrupts and doorbells over KVM: irqfd, ioeventfd and GSI routing.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use blanket_devices::pci::{MsiMessage, Wiring};
use blanket_devices::platform;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// Message interrupts that one VM can have.
const MAX_MESSAGES: u32 = 1024;

/// A VM's interrupt routes.
pub(super) struct KvmWiring {
    vm: Arc<VmFd>,
    /// The message of each source from [`platform::FIRST_MSI_GSI`] on.
    messages: Mutex<Vec<Option<MsiMessage>>>,
}

impl KvmWiring {
    /// Wires a VM whose interrupt chips exist already.
    ///
    /// # Errors
    /// KVM refuses the routes.
    pub(super) fn new(vm: Arc<VmFd>) -> io::Result<Self> {
        let wiring = Self {
            vm,
            messages: Mutex::default(),
        };
        wiring.commit(&[])?;
        Ok(wiring)
    }

    /// An eventfd that raises line `gsi` of the interrupt controllers.
    ///
    /// # Errors
    /// KVM refuses it.
    pub(super) fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(io::Error::from)?;
        Ok(event)
    }

    /// Tells KVM all routes anew.
    fn commit(&self, messages: &[Option<MsiMessage>]) -> io::Result<()> {
        let mut entries: Vec<_> = (0..platform::FIRST_MSI_GSI).flat_map(pin_routes).collect();
        for (i, message) in messages.iter().enumerate() {
            if let Some(message) = message {
                entries.push(message_route(platform::FIRST_MSI_GSI + i as u32, message));
            }
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        self.vm.set_gsi_routing(&routing).map_err(io::Error::from)
    }
}

/// A line goes to the IOAPIC pin of its number, and to the PICs below 16.
fn pin_routes(gsi: u32) -> impl Iterator<Item = kvm_irq_routing_entry> {
    const PIC_MASTER: u32 = 0;
    const PIC_SLAVE: u32 = 1;
    const IOAPIC: u32 = 2;
    let route = move |irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let pic = match gsi {
        0..8 => Some(route(PIC_MASTER, gsi)),
        8..16 => Some(route(PIC_SLAVE, gsi - 8)),
        _ => None,
    };
    pic.into_iter().chain([route(IOAPIC, gsi)])
}

fn message_route(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

impl Wiring for KvmWiring {
    fn add_interrupt(&self) -> io::Result<(u32, EventFd)> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let index = messages.len() as u32;
        if index == MAX_MESSAGES {
            return Err(io::Error::other(format!(
                "all {MAX_MESSAGES} interrupts are taken: use fewer devices or queues"
            )));
        }
        let gsi = platform::FIRST_MSI_GSI + index;
        let event = self.line(gsi)?;
        messages.push(None);
        Ok((gsi, event))
    }

    fn route(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let index = (gsi - platform::FIRST_MSI_GSI) as usize;
        let old = std::mem::replace(&mut messages[index], message);
        self.commit(&messages)
            .inspect_err(|_| messages[index] = old)
    }

    fn add_doorbell(&self, addr: u64, event: &EventFd) {
        let at = IoEventAddress::Mmio(addr);
        if let Err(error) = self.vm.register_ioevent(event, &at, NoDatamatch) {
            tracing::warn!(addr, %error, "no doorbell: notifications go through the vCPU");
        }
    }

    fn remove_doorbell(&self, addr: u64, event: &EventFd) {
        let at = IoEventAddress::Mmio(addr);
        // It fails only where adding had failed.
        let _ = self.vm.unregister_ioevent(event, &at, NoDatamatch);
    }
}
