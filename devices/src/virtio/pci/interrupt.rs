//! From a queue to the guest's interrupt.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Interrupt;
use crate::pci::Msix;
use crate::pci::msix::NO_VECTOR;

/// ISR bit: a queue has used buffers.
const ISR_QUEUE: u8 = 1;
/// ISR bit: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// What the transport (on vCPU threads) and the handlers (on workers) share.
pub(super) struct Interrupts {
    msix: Mutex<Msix>,
    /// Vector of each queue.
    queues: Vec<AtomicU16>,
    config: AtomicU16,
    pub(super) isr: AtomicU8,
    pub(super) generation: AtomicU8,
    /// `DEVICE_NEEDS_RESET`.
    pub(super) broken: AtomicBool,
}

impl Interrupts {
    pub(super) fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix: Mutex::new(msix),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// The MSI-X table. Held for a few instructions only.
    pub(super) fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, queue: Option<u16>) -> Option<&AtomicU16> {
        match queue {
            Some(queue) => self.queues.get(usize::from(queue)),
            None => Some(&self.config),
        }
    }

    /// The vector of a queue, or of configuration changes (`None`).
    pub(super) fn vector(&self, queue: Option<u16>) -> u16 {
        self.slot(queue)
            .map_or(NO_VECTOR, |slot| slot.load(Ordering::Acquire))
    }

    /// Chooses a vector; one that does not exist becomes `NO_VECTOR`, which
    /// the driver reads back (4.1.5.1.2.1).
    pub(super) fn set_vector(&self, queue: Option<u16>, vector: u16) {
        let valid = vector < self.msix().vectors();
        if let Some(slot) = self.slot(queue) {
            slot.store(if valid { vector } else { NO_VECTOR }, Ordering::Release);
        }
    }

    /// After a device reset; the MSI-X table belongs to the function and stays.
    pub(super) fn reset(&self) {
        for slot in self.queues.iter().chain([&self.config]) {
            slot.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.broken.store(false, Ordering::Release);
    }

    fn raise(&self, vector: u16, isr: u8) {
        self.isr.fetch_or(isr, Ordering::AcqRel);
        if vector != NO_VECTOR {
            self.msix().raise(vector);
        }
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, queue: u16) {
        self.raise(self.vector(Some(queue)), ISR_QUEUE);
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.vector(None), ISR_CONFIG);
    }

    fn needs_reset(&self) {
        self.broken.store(true, Ordering::Release);
        self.config();
    }
}
