//! The cloud testbed: provider machines, networks between them, and images for guests.
//!
//! A [`Node`] is a machine as a provider would rent it out. It runs Debian's stock kernel under
//! QEMU, and has a working `/dev/kvm` also where the host has none: the emulated processor has
//! SVM with nested paging.
//!
//! ```no_run
//! use blanket_testbed::{Hardware, Node};
//!
//! # fn main() -> blanket_testbed::Result<()> {
//! let node = Node::builder("a").cpus(2).hardware(Hardware::Virtio).boot()?;
//! assert_eq!(node.command("uname").text()?, "Linux\n");
//! # Ok(())
//! # }
//! ```
//!
//! Everything that takes long to build is kept under `target/testbed/cache`, by a hash of what it
//! is made from. Nothing else stays behind, however a test ends.

mod agent;
mod cache;
mod cleanup;
mod cpio;
mod disk;
mod error;
mod guest;
mod hardware;
mod host;
mod image;
mod kernel;
mod metadata;
mod network;
mod node;
mod packages;
mod payload;
mod program;
mod provider;
mod qemu;
mod tree;

pub use agent::guest_check;
pub use blanket_testbed_agent::client::{self, Client, Output, Status};
pub use disk::Disk;
pub use error::{Error, Result};
pub use guest::guest;
pub use hardware::{Hardware, Smbios};
pub use host::{Host, HostBuilder};
pub use image::{BootImages, GUEST_PAGE, GuestImages, inspection, tools, workloads};
pub use kernel::{Kernel, KernelFlavor};
pub use metadata::{Behavior, Event, Metadata};
pub use network::{Counters, Link, Network};
pub use node::{Node, NodeBuilder};
pub use packages::{downloaded, ensure_packages};
pub use payload::Payload;
pub use provider::Provider;
pub use qemu::Accelerator;
