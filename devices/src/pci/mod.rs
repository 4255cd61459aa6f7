//! One PCI bus: configuration space (ECAM and the 0xcf8 ports), memory BARs
//! and MSI-X. No firmware runs: the monitor places the BARs, and the guest may
//! move them within the window.

pub mod bus;
pub mod config;
pub mod msix;

pub use bus::{Function, PciBus};
pub use config::ConfigSpace;
pub use msix::{MsiMessage, Msix};

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Where the machine takes a device's doorbells and gives it interrupts.
///
/// Implemented by the machine over KVM, and in tests and fuzz targets without.
pub trait Wiring: Send + Sync {
    /// A new interrupt source: its number and the eventfd that raises it.
    ///
    /// # Errors
    /// No more sources.
    fn add_interrupt(&self) -> io::Result<(u32, EventFd)>;

    /// Says which message source `gsi` sends; `None` disconnects it.
    ///
    /// # Errors
    /// The hypervisor refuses the message.
    fn route(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()>;

    /// From now on a guest's write to `addr` signals `event` without an exit
    /// to the device. Best effort: the device also handles the exit.
    fn add_doorbell(&self, addr: u64, event: &EventFd);

    /// Undoes [`Wiring::add_doorbell`].
    fn remove_doorbell(&self, addr: u64, event: &EventFd);
}

/// What devices share.
pub type SharedWiring = Arc<dyn Wiring>;
