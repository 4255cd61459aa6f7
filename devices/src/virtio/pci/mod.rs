//! virtio over PCI (virtio 1.2, 4.1): modern devices, MSI-X only.
//!
//! One 64-bit BAR holds everything:
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration (4.1.4.3) |
//! | 0x1000 | ISR status (4.1.4.5) |
//! | 0x2000 | the device's configuration (4.1.4.6) |
//! | 0x3000 | notifications: 4 bytes a queue (4.1.4.4) |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |

mod common;
mod function;
mod interrupt;
mod lifecycle;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blanket_memory::GuestRam;
use virtio_bindings::virtio_config as status;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Device, Interrupt, QueueHandler, VirtQueue};
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::{Msix, SharedWiring};
use crate::worker::{Handler, HandlerId, Workers};
use interrupt::Interrupts;

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x8000;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION: u64 = 0x1000;

/// A queue before and while it is in use.
struct QueueSlot {
    /// As the driver sets it up; in use, the handler has its own copy.
    setup: Queue,
    kick: EventFd,
}

/// A handler as a worker sees it.
struct Running(Box<dyn QueueHandler>);

impl event_manager::MutEventSubscriber for Running {
    fn process(&mut self, events: event_manager::Events, ops: &mut event_manager::EventOps) {
        self.0.process(events, ops);
    }
    fn init(&mut self, ops: &mut event_manager::EventOps) {
        self.0.init(ops);
    }
}

impl Handler for Running {
    fn kick(&mut self) {
        self.0.kick();
    }
    fn quiesce(&mut self) {
        self.0.quiesce();
    }
}

/// Where a device's handlers are.
enum Handlers {
    /// The driver has not said `DRIVER_OK`.
    None,
    /// On workers: (worker, handler) each.
    Running(Vec<(usize, HandlerId)>),
    /// Quiescent, here.
    Parked(Vec<Box<dyn QueueHandler>>),
}

/// What a device needs from its machine.
pub struct Context {
    /// Guest memory.
    pub ram: GuestRam,
    /// Interrupts and doorbells.
    pub wiring: SharedWiring,
    /// Threads for the queues.
    pub workers: Workers,
    /// Where the BAR lies at first (aligned to [`BAR_SIZE`]).
    pub bar: u64,
    /// Which worker serves this device's first queue.
    pub first_worker: usize,
}

/// A virtio device with its PCI transport.
pub struct VirtioPci {
    device: Box<dyn Device>,
    config: ConfigSpace,
    /// The configuration space after power-on: what a machine's reset needs,
    /// as no firmware places BARs again.
    power_on: ConfigSpace,
    msix_capability: usize,
    registers: common::Registers,
    queues: Vec<QueueSlot>,
    handlers: Handlers,
    interrupts: Arc<Interrupts>,
    context: Context,
    /// Where doorbells are registered now.
    doorbells: Option<u64>,
}

impl VirtioPci {
    /// Puts a transport in front of `device`.
    ///
    /// # Errors
    /// The machine has no more interrupts or descriptors.
    pub fn new(device: Box<dyn Device>, context: Context) -> io::Result<Self> {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| {
                Ok(QueueSlot {
                    setup: Queue::new(*size).map_err(io::Error::other)?,
                    kick: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        // A vector for each queue and one for configuration changes.
        let vectors = queues.len() as u16 + 1;
        let msix = Msix::new(vectors, context.wiring.clone())?;
        let (config, msix_capability) = config_space(device.kind(), vectors, context.bar);
        Ok(Self {
            interrupts: Arc::new(Interrupts::new(msix, queues.len())),
            device,
            power_on: config.clone(),
            config,
            msix_capability,
            registers: common::Registers::default(),
            queues,
            handlers: Handlers::None,
            context,
            doorbells: None,
        })
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// The device's counters.
    #[must_use]
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.device.metrics()
    }

    fn features(&self) -> u64 {
        self.device.features() | self.device.transport_features()
    }

    /// The status register, with `DEVICE_NEEDS_RESET` where it applies.
    fn status(&self) -> u8 {
        let broken = self.interrupts.broken.load(Ordering::Acquire);
        let needs_reset = status::VIRTIO_CONFIG_S_NEEDS_RESET as u8;
        self.registers.status | if broken { needs_reset } else { 0 }
    }

    /// The driver writes the status register (virtio 1.2, 2.1 and 3.1.1).
    fn set_status(&mut self, value: u8) {
        const FEATURES_OK: u8 = status::VIRTIO_CONFIG_S_FEATURES_OK as u8;
        const DRIVER_OK: u8 = status::VIRTIO_CONFIG_S_DRIVER_OK as u8;
        const NEEDS_RESET: u8 = status::VIRTIO_CONFIG_S_NEEDS_RESET as u8;
        if value == 0 {
            self.reset_device();
            return;
        }
        let old = self.registers.status;
        let mut new = (value & !NEEDS_RESET) | old;
        if new & FEATURES_OK != 0 && old & FEATURES_OK == 0 {
            let accepted = self.registers.driver_features;
            let version_1 = 1u64 << status::VIRTIO_F_VERSION_1;
            if accepted & !self.features() != 0 || accepted & version_1 == 0 {
                new &= !FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 && new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.registers.status = new;
        if new & DRIVER_OK != 0 && old & DRIVER_OK == 0 {
            match self.activate().and_then(|()| self.unpark()) {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(device = self.name(), %error, "the driver's setup is refused");
                    self.interrupts.needs_reset();
                }
            }
        }
    }

    /// Makes the handlers for what the driver set up; they are parked.
    fn activate(&mut self) -> io::Result<()> {
        let event_idx = self.registers.driver_features
            >> virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX
            & 1
            == 1;
        let mut queues = Vec::new();
        for (index, slot) in self.queues.iter_mut().enumerate() {
            if !slot.setup.ready() {
                continue;
            }
            slot.setup.set_event_idx(event_idx);
            if !slot.setup.is_valid(&self.context.ram) {
                return Err(io::Error::other(format!(
                    "queue {index} does not lie in guest memory"
                )));
            }
            let state = slot.setup.state();
            queues.push(VirtQueue::new(
                index as u16,
                Queue::try_from(state).map_err(io::Error::other)?,
                slot.kick.try_clone()?,
                self.context.ram.clone(),
                self.interrupts.clone(),
            ));
        }
        let activation = Activation {
            ram: self.context.ram.clone(),
            features: self.registers.driver_features,
            queues,
            interrupt: self.interrupts.clone(),
        };
        self.handlers = Handlers::Parked(self.device.activate(activation)?);
        Ok(())
    }

    /// Puts parked handlers on workers, round robin.
    fn unpark(&mut self) -> io::Result<()> {
        let Handlers::Parked(parked) = std::mem::replace(&mut self.handlers, Handlers::None) else {
            return Ok(());
        };
        let workers = &self.context.workers;
        let mut running = Vec::new();
        let mut failed = None;
        for (i, handler) in parked.into_iter().enumerate() {
            let worker = (self.context.first_worker + i) % workers.len();
            match workers[worker].add(Box::new(Running(handler))) {
                Ok(id) => running.push((worker, id)),
                Err(error) => failed = Some(error),
            }
        }
        self.handlers = Handlers::Running(running);
        failed.map_or(Ok(()), Err)
    }

    /// Takes the handlers off their workers, with nothing in flight.
    fn park(&mut self) -> io::Result<()> {
        let Handlers::Running(running) = &self.handlers else {
            return Ok(());
        };
        let mut parked = Vec::new();
        for (worker, id) in running {
            let handler = self.context.workers[*worker].remove(*id)?;
            let running = (handler as Box<dyn std::any::Any>)
                .downcast::<Running>()
                .map_err(|_| io::Error::other("a worker gave back another's handler"))?;
            parked.push(running.0);
        }
        self.handlers = Handlers::Parked(parked);
        Ok(())
    }

    /// A reset by the driver or the machine (virtio 1.2, 2.4).
    fn reset_device(&mut self) {
        if let Err(error) = self.park() {
            tracing::error!(device = self.name(), %error, "reset");
        }
        // Without handlers too: the driver may have written the configuration
        // space, or a state was restored that it could not run on.
        let handlers = match std::mem::replace(&mut self.handlers, Handlers::None) {
            Handlers::Parked(handlers) => handlers,
            Handlers::None | Handlers::Running(_) => Vec::new(),
        };
        self.device.reset(handlers);
        for slot in &mut self.queues {
            slot.setup.reset();
            // A notification that nobody took is none for the next driver.
            let _ = slot.kick.read();
        }
        self.registers = common::Registers::default();
        self.interrupts.reset();
    }

    /// The driver notified a queue by an exit.
    fn notify(&self, queue: usize) {
        if let Some(slot) = self.queues.get(queue)
            && let Err(error) = slot.kick.write(1)
        {
            tracing::warn!(device = self.name(), queue, %error, "notification lost");
        }
    }
}

/// The configuration space of a virtio function, and where its MSI-X
/// capability is.
fn config_space(kind: u16, vectors: u16, bar: u64) -> (ConfigSpace, usize) {
    // Class codes as other virtio devices have them (PCI Code and ID 1.11).
    let class = match kind {
        1 => 0x02_00_00,
        2 => 0x01_80_00,
        3 => 0x07_80_00,
        _ => 0xff_00_00,
    };
    let mut config = ConfigSpace::new(&Identity {
        vendor: 0x1af4,
        device: 0x1040 + kind,
        class,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    });
    config.set_bar64(bar, BAR_SIZE);
    config.enable_memory(true);
    let regions = [
        (1u8, 0u64, REGION),
        (2, NOTIFY, REGION),
        (3, ISR, 4),
        (4, DEVICE_CONFIG, REGION),
    ];
    for (kind, offset, len) in regions {
        // struct virtio_pci_cap behind its first two bytes (4.1.4).
        let mut body = vec![0u8; 14];
        body[1] = kind;
        body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
        body[10..14].copy_from_slice(&(len as u32).to_le_bytes());
        if kind == 2 {
            body.extend_from_slice(&NOTIFY_MULTIPLIER.to_le_bytes());
        }
        body[0] = body.len() as u8 + 2;
        config.add_capability(0x09, &body, &[]);
    }
    function::add_pci_access_capability(&mut config);
    let mut msix = [0u8; 10];
    msix[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    msix[2..6].copy_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
    msix[6..].copy_from_slice(&(MSIX_PENDING as u32).to_le_bytes());
    let at = config.add_capability(0x11, &msix, &[0, 0xc0]);
    (config, at)
}

#[cfg(test)]
mod tests;
