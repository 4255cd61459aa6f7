//! Everything a guest sees as hardware.
//!
//! [`virtio`] has the device models and the PCI transport in front of them,
//! [`pci`] the bus, [`legacy`] what a PC has always had, [`acpi`] the tables
//! that tell the guest about it all, [`xen`] the devices of `pv` machines. Every device follows [`lifecycle`].
//!
//! The guest is hostile: each value read from its memory is read once, checked
//! and then trusted no further, and no access of its may panic or block.

pub mod acpi;
pub mod char;
mod disk;
pub mod legacy;
pub mod lifecycle;
pub mod net;
pub mod pci;
pub mod platform;
pub mod vhost_user;
pub mod virtio;
pub mod worker;
pub mod xen;
