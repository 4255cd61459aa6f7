//! virtio 1.2 device models.
//!
//! A model is a folder with a [`Device`] (identity, features, configuration
//! space) and one or more [`QueueHandler`]s that own its virtqueues and do the
//! work on a [`crate::worker::Worker`]. The transport in front (`pci`) drives
//! the driver's handshake, moves handlers on and off workers, and implements
//! [`crate::lifecycle::Lifecycle`] once for all models.

use std::any::Any;
use std::io;
use std::sync::Arc;

use blanket_memory::GuestRam;

use crate::lifecycle::{self, SavedState};
use crate::worker::Handler;

pub mod blk;
pub mod console;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;

pub use queue::VirtQueue;

/// Feature bits that every model has with this transport (virtio 1.2, 6).
pub const TRANSPORT_FEATURES: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1
    | 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Raises a device's interrupts in the guest.
pub trait Interrupt: Send + Sync {
    /// A used buffer is there in queue `queue`.
    fn queue(&self, queue: u16);
    /// The configuration space changed, or the device needs a reset
    /// (virtio 1.2, 2.1.2).
    fn config(&self);
    /// Marks the device as broken (`DEVICE_NEEDS_RESET`) and tells the driver.
    fn needs_reset(&self);
}

/// What a driver has set up when it says `DRIVER_OK`.
pub struct Activation {
    /// Guest memory.
    pub ram: GuestRam,
    /// Accepted features.
    pub features: u64,
    /// The queues that the driver enabled, in order of index.
    pub queues: Vec<VirtQueue>,
    /// For configuration changes; queues carry their own.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Owns some of a device's queues and does their work on a worker.
pub trait QueueHandler: Handler {
    /// Its queues.
    fn queues(&self) -> &[VirtQueue];
}

/// A device model, without its transport.
///
/// Every method is called with the device quiescent or from a vCPU's access to
/// its registers; none may block on the guest.
pub trait Device: Send {
    /// Device type (virtio 1.2, 5): 1 net, 2 block, 3 console, 4 entropy.
    fn kind(&self) -> u16;

    /// Name for people, logs and metrics, like `net0`.
    fn name(&self) -> &str;

    /// Features offered besides [`Device::transport_features`].
    fn features(&self) -> u64;

    /// Those of [`TRANSPORT_FEATURES`] that whoever serves the queues has.
    fn transport_features(&self) -> u64 {
        TRANSPORT_FEATURES
    }

    /// Largest size of each queue (powers of two).
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space's bytes as the driver reads them now.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes `data` at `offset` of the configuration space, within
    /// the bounds of [`Device::config`].
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Makes the handlers that will serve the queues. They start when the
    /// transport puts them on workers.
    ///
    /// # Errors
    /// The driver's choice (features, queues) cannot be served, or a resource
    /// is missing: the device then asks for a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn QueueHandler>>>;

    /// Takes back the handlers (quiescent, off their workers) after the driver
    /// or the machine has reset the device: recover what `activate` put into
    /// them, so that `activate` works again.
    fn reset(&mut self, handlers: Vec<Box<dyn QueueHandler>>);

    /// State besides the queues and the transport's registers, with the
    /// handlers (quiescent) at hand. Empty for most models.
    ///
    /// # Errors
    /// It cannot be encoded.
    fn save(&self, handlers: &[Box<dyn QueueHandler>]) -> Result<SavedState, lifecycle::Error> {
        let _ = handlers;
        SavedState::pack(self.name(), 1, &())
    }

    /// Takes over what [`Device::save`] gave, before `activate`.
    ///
    /// # Errors
    /// It is damaged or does not fit.
    fn restore(&mut self, state: &SavedState) -> Result<(), lifecycle::Error> {
        state.unpack(self.name(), 1)
    }

    /// Ends the device for good: flush, close.
    fn halt(&mut self) {}

    /// Its counters now, as (name, value): bytes, packets, requests, errors.
    fn metrics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A handler as its concrete type again: what [`Device::reset`] needs.
#[must_use]
pub fn downcast<T: Handler>(handler: Box<dyn QueueHandler>) -> Option<Box<T>> {
    (handler as Box<dyn Any>).downcast().ok()
}
