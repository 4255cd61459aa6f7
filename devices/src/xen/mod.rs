//! The backends of Xen's paravirtual devices, for `pv` machines.
//!
//! A guest's frontend and its backend here meet in the xenstore: each writes
//! what it offers into its own directory and watches the other's `state`
//! (`xen/include/public/io/xenbus.h`). Then they share rings in pages that the
//! guest grants, and ring each other by event channels.
//!
//! The hypervisor's side of a `pv` machine (in the monitor) implements
//! [`EventChannels`] and places the grant table; everything else is here.

pub mod blkif;
pub mod bus;
mod channel;
pub mod console;
pub mod control;
pub mod grant;
pub mod netif;
pub mod ring;
pub mod store;
mod stream;
#[cfg(test)]
pub(crate) mod testing;

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// The guest's domain number: it is the only guest of its hypervisor.
pub const GUEST: u16 = 1;

/// The backends' domain number, Xen's control domain.
pub const BACKEND: u16 = 0;

/// The backends' ends of the guest's event channels.
pub trait EventChannels: Send + Sync {
    /// Joins `port`, which the guest has allocated for [`BACKEND`] and not
    /// bound yet, to a backend: `kick` is signalled whenever the guest sends.
    /// Notifications sent before are not lost: one kick follows at once.
    ///
    /// # Errors
    /// No such port, or it is bound, or KVM refuses the wiring.
    fn bind(&self, port: u32, kick: &EventFd) -> io::Result<()>;

    /// Frees the backend's end of `port`. The guest may have closed its own
    /// end before: that is no error.
    fn unbind(&self, port: u32);

    /// Sets `port` pending in the guest and makes it look; never blocks.
    /// Without effect on a port that is not bound.
    fn notify(&self, port: u32);
}
